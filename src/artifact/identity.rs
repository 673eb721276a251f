//! Identity: BLAKE3-256 of planes, of files, and of the logical content of an artifact.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::entry::Entry;

/// BLAKE3-256 of something, printed as hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity(pub [u8; 32]);

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<blake3::Hash> for Identity {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl Serialize for Identity {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl<'de> Deserialize<'de> for Identity {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let hex = String::deserialize(d)?;
        let hash = blake3::Hash::from_hex(&hex).map_err(|_| {
            serde::de::Error::custom(format!("{hex:?} is not a digest, expected 64 lower-case hex digits"))
        })?;
        Ok(hash.into())
    }
}

/// Digest of the logical content of `tensors`.
pub(crate) fn of<'a>(tensors: impl ExactSizeIterator<Item = &'a Entry>) -> Identity {
    let mut hasher = blake3::Hasher::new();
    let text = |hasher: &mut blake3::Hasher, s: &str| {
        hasher.update(&(s.len() as u64).to_le_bytes()).update(s.as_bytes());
    };
    hasher.update(b"tenpak identity 1").update(&(tensors.len() as u64).to_le_bytes());
    for tensor in tensors {
        text(&mut hasher, tensor.info().name());
        text(&mut hasher, tensor.info().dtype().name());
        hasher.update(&(tensor.info().shape().len() as u64).to_le_bytes());
        for dim in tensor.info().shape() {
            hasher.update(&dim.to_le_bytes());
        }
        hasher.update(&[u8::from(tensor.transposed())]);
        // No id has a plus, so that no tensor can pass for another.
        let mut codec = tensor.codec().id.to_owned();
        if tensor.extras().column_scales {
            codec += "+column_scales";
        }
        if tensor.extras().outliers > 0 {
            codec += "+outliers";
        }
        if tensor.is_difference() {
            codec += "+difference";
        }
        text(&mut hasher, &codec);
        for plane in tensor.planes() {
            hasher.update(&plane.blake3.0);
        }
    }
    hasher.finalize().into()
}
