//! The checksums of a run of bytes, growing with them: a CRC32C per chunk, and the digest of all.

use super::entry::CHUNK;
use super::identity::Identity;

/// Checksums of what was seen so far.
#[derive(Debug, Default)]
pub(super) struct Checksums {
    seen: u64,
    crc: u32,
    crcs: Vec<u32>,
    hasher: blake3::Hasher,
}

impl Checksums {
    /// Takes in the next bytes.
    pub fn observe(&mut self, mut bytes: &[u8]) {
        self.hasher.update_rayon(bytes);
        while !bytes.is_empty() {
            let room = CHUNK - self.seen % CHUNK;
            let n = usize::try_from(room.min(bytes.len() as u64)).expect("at most the length of a slice");
            let (head, tail) = bytes.split_at(n);
            self.crc = crc32c::crc32c_append(self.crc, head);
            self.seen += n as u64;
            if self.seen.is_multiple_of(CHUNK) {
                self.crcs.push(std::mem::take(&mut self.crc));
            }
            bytes = tail;
        }
    }

    /// Bytes seen so far.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// The digest of what was seen so far.
    pub fn digest(&self) -> Identity {
        self.hasher.finalize().into()
    }

    /// The checksum of each chunk, and the digest.
    pub fn finish(mut self) -> (Box<[u32]>, Identity) {
        let digest = self.digest();
        if !self.seen.is_multiple_of(CHUNK) {
            self.crcs.push(self.crc);
        }
        (self.crcs.into(), digest)
    }
}

/// Checksums as the header prints them: eight hex digits each.
pub(super) fn to_hex(crcs: &[u32]) -> String {
    crcs.iter().map(|crc| format!("{crc:08x}")).collect()
}

/// Eight hex digits for every chunk of `bytes` bytes.
pub(super) fn from_hex(hex: &str, bytes: u64) -> Option<Box<[u32]>> {
    if hex.len() != chunks(bytes).checked_mul(8)? || !hex.is_ascii() {
        return None;
    }
    (0..hex.len()).step_by(8).map(|at| u32::from_str_radix(&hex[at..at + 8], 16).ok()).collect()
}

/// How many checksums so many bytes have.
#[must_use]
pub(super) fn chunks(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(CHUNK)).unwrap_or(usize::MAX)
}
