//! The first 64 bytes of an artifact, and the way from there to its header.

use super::header::Header;
use super::text::Text;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::{self, Limits};

/// First bytes of an artifact: not text, and broken by every kind of newline or 7-bit conversion.
pub const MAGIC: [u8; 8] = *b"\x89TNPK\r\n\x1a";
/// The version this build writes, and the highest that it reads.
pub const VERSION: u32 = 1;
/// Flag bit of a delta.
pub const FLAG_DELTA: u32 = 1;
/// Flag bit of an artifact that has coded planes.
pub const FLAG_CODED: u32 = 2;
/// Flag bit of an artifact that has extra planes.
pub const FLAG_EXTRA: u32 = 4;
/// Flag bit of a delta of a checkpoint.
pub const FLAG_CHECKPOINT: u32 = 8;
/// The flags that this build knows.
const FLAGS: u32 = FLAG_DELTA | FLAG_CODED | FLAG_EXTRA | FLAG_CHECKPOINT;

/// The first 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub flags: u32,
    pub header_bytes: u64,
    pub file_bytes: u64,
    pub header_crc32c: u32,
}

impl Preamble {
    pub fn print(&self) -> [u8; 64] {
        let mut out = [0; 64];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.flags.to_le_bytes());
        out[16..24].copy_from_slice(&self.header_bytes.to_le_bytes());
        out[24..32].copy_from_slice(&self.file_bytes.to_le_bytes());
        out[32..36].copy_from_slice(&self.header_crc32c.to_le_bytes());
        let crc = crc32c::crc32c(&out[..60]);
        out[60..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    pub fn read(file: &InputFile, limits: &Limits) -> Result<Self> {
        let mut bytes = [0; 64];
        let have = usize::try_from(file.len().min(64)).expect("at most 64");
        file.read_into(0, &mut bytes[..have])?;
        if have < 8 || bytes[..8] != MAGIC {
            return Err(Error::corrupt(0, "this is not a tenpak artifact: the magic bytes are missing"));
        }
        if have < 64 {
            return Err(Error::corrupt(have as u64, "truncated: the file ends inside its 64-byte preamble"));
        }
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let crc = crc32c::crc32c(&bytes[..60]);
        if u32_at(60) != crc {
            return Err(Error::corrupt(60, format!("preamble checksum is {:08x}, expected {crc:08x}", u32_at(60))));
        }
        if u32_at(8) != VERSION {
            return Err(Error::unsupported(format!(
                "artifact version {} is not known, this build reads version {VERSION}; upgrade tenpak",
                u32_at(8)
            )));
        }
        let flags = u32_at(12);
        if flags & !FLAGS != 0 {
            return Err(Error::unsupported(format!(
                "the artifact needs features {:#x}, this build knows {FLAGS:#x}; upgrade tenpak",
                flags & !FLAGS
            )));
        }
        if bytes[36..60] != [0; 24] {
            return Err(Error::corrupt(36, "reserved bytes of the preamble are not zero"));
        }
        let preamble = Self { flags, header_bytes: u64_at(16), file_bytes: u64_at(24), header_crc32c: u32_at(32) };
        match preamble.file_bytes.cmp(&file.len()) {
            std::cmp::Ordering::Less => Err(Error::corrupt(
                preamble.file_bytes,
                format!("trailing data: the file has {} bytes, expected {}", file.len(), preamble.file_bytes),
            )),
            std::cmp::Ordering::Greater => Err(Error::corrupt(
                file.len(),
                format!("truncated: the file has {} bytes, expected {}", file.len(), preamble.file_bytes),
            )),
            std::cmp::Ordering::Equal => Ok(()),
        }?;
        limits::check("bytes of the header", limits.header_bytes, preamble.header_bytes)?;
        if preamble.header_bytes > file.len() - 64 {
            return Err(Error::corrupt(
                16,
                format!("a header of {} bytes in a file of {}", preamble.header_bytes, file.len()),
            ));
        }
        Ok(preamble)
    }

    pub fn header(&self, file: &InputFile, limits: &Limits) -> Result<Header> {
        let range = self.file_bytes - self.header_bytes..self.file_bytes;
        Text { file, range, crc32c: Some(self.header_crc32c), ends_planes: true, flags: self.flags }.header(limits)
    }
}
