//! Whether two processes read the same weights, told without reading all of them.
//!
//! Reading everything in every process only to compare digests would cost more than quantizing. What is compared instead
//! are names, shapes and settings, and samples of every tensor: a model that was trained further differs in all of them.

use crate::artifact::Identity;
use crate::error::{Error, Result};
use crate::source::Source;
use crate::stats::Stats;

/// Bytes of one sample of a tensor or file.
const SAMPLE: u64 = 4096;

/// A digest of names, shapes and dtypes of a source, of its settings, of three samples of every tensor, and of samples of
/// the statistics.
pub(super) fn of(source: &Source, stats: Option<&Stats>) -> Result<Identity> {
    let mut hasher = blake3::Hasher::new();
    let mut text = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes()).update(bytes);
    };
    text(b"tenpak source 1");
    for (key, value) in source.metadata() {
        text(key.as_bytes());
        text(value.as_bytes());
    }
    for (index, tensor) in source.tensors().iter().enumerate() {
        let info = tensor.info();
        text(info.name().as_bytes());
        text(info.dtype().name().as_bytes());
        text(&info.shape().iter().flat_map(|dim| dim.to_le_bytes()).collect::<Vec<_>>());
        text(&[u8::from(tensor.transposed())]);
        for at in places(info.bytes(), 3) {
            text(&source.read_bytes(index, at, SAMPLE.min(info.bytes() - at))?);
        }
    }
    for file in source.attached() {
        text(file.name().as_bytes());
        let bytes = file.file().len();
        let len = usize::try_from(bytes).map_err(|_| Error::invalid("an attached file is larger than memory"))?;
        text(&file.file().read(0, len)?);
    }
    if let Some(file) = stats.and_then(Stats::file).map(crate::source::SourceFile::file) {
        text(&file.len().to_le_bytes());
        for at in places(file.len(), 256) {
            let len = usize::try_from(SAMPLE.min(file.len() - at)).expect("a sample is small");
            text(&file.read(at, len)?);
        }
    }
    Ok(hasher.finalize().into())
}

/// Where samples of so many bytes begin: at most `count`, evenly from the start to the end.
fn places(bytes: u64, count: u64) -> Vec<u64> {
    if bytes <= count * SAMPLE {
        return (0..bytes.div_ceil(SAMPLE)).map(|i| i * SAMPLE).collect();
    }
    let last = u128::from(bytes - SAMPLE);
    let place = |i| u64::try_from(last * u128::from(i) / u128::from(count - 1)).expect("inside the file");
    (0..count).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_lie_inside_and_cover_what_is_small() {
        assert!(places(0, 3).is_empty());
        assert_eq!(places(10, 3), [0]);
        assert_eq!(places(3 * SAMPLE, 3), [0, SAMPLE, 2 * SAMPLE]);
        assert_eq!(places(10 * SAMPLE, 3), [0, 9 * SAMPLE / 2, 9 * SAMPLE]);
        assert_eq!(places(u64::MAX, 3).last(), Some(&(u64::MAX - SAMPLE)));
    }
}
