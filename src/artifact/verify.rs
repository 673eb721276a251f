//! Reads all of an artifact and lists everything that is not as it should be.
//!
//! Beyond the checksums: the digest of each plane, padding between planes, unused bits of rows, and scales and offsets
//! that are not finite, none of which a writer of this project leaves behind.

use super::coded::{self, Coding};
use super::entry::{CHUNK, Entry, align};
use super::identity::Identity;
use super::map::{ArtifactFile, bad_file};
use super::store::Store;
use crate::codec::extra::bad_scale;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::layout::{Float, Layout, Plane, ROW_SCALE_END};

/// Something wrong in an artifact.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Problem {
    /// Name of the tensor, unless it is an attached file that is damaged.
    pub tensor: Option<String>,
    /// Name of its plane.
    pub plane: Option<&'static str>,
    /// Name of the attached file, or of the file of a directory that holds the plane.
    pub file: Option<String>,
    /// The chunk, where it is one chunk that is damaged.
    pub chunk: Option<u64>,
    /// Where in the file.
    pub at: u64,
    /// What was found and what was expected.
    pub what: String,
}

/// The result of reading everything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// Bytes of planes and attached files that were read.
    pub bytes: u64,
    /// Chunks that were compared with their checksum.
    pub chunks: u64,
    /// What is wrong, tensors and then files, each in stored order; empty for a sound artifact.
    pub problems: Vec<Problem>,
}

/// Reads every plane of an artifact whose header was found sound when it was opened.
///
/// `step` is told the bytes done so far after each chunk and may stop the work.
///
/// # Errors
/// [`Error::Io`], and whatever `step` returns. Damage is no error: it is the result.
pub fn verify(artifact: &ArtifactFile, mut step: impl FnMut(u64) -> Result<()>) -> Result<Verified> {
    let mut result = Verified { bytes: 0, chunks: 0, problems: Vec::new() };
    for (tensor, entry) in artifact.tensors().iter().enumerate() {
        let before = result.problems.len();
        for plane in 0..entry.planes().len() {
            check_plane(artifact, (tensor, plane), &mut result, &mut step)?;
        }
        if result.problems.len() == before {
            check_extras(artifact, tensor, &mut result)?;
        }
    }
    for index in 0..artifact.files().len() {
        check_file(artifact, index, &mut result)?;
        step(result.bytes)?;
    }
    Ok(result)
}

/// Checks an attached file; one of another length is damage as well.
fn check_file(artifact: &ArtifactFile, index: usize, result: &mut Verified) -> Result<()> {
    let entry = &artifact.files()[index];
    let mut problem = |chunk, at, what| {
        let file = Some(entry.name.to_string());
        result.problems.push(Problem { tensor: None, plane: None, file, chunk, at, what });
    };
    let read = artifact.store().attached(index, entry);
    match read {
        Ok((_, offset, bytes)) => {
            if let Some((chunk, what)) = bad_file(entry, &bytes) {
                problem(chunk, offset + chunk.unwrap_or(0) * CHUNK, what);
            }
        }
        Err(e) => match e.root() {
            Error::Corrupt { at, what } => problem(None, *at, what.clone()),
            _ => return Err(e),
        },
    }
    if let Store::File(file) = artifact.store() {
        let end = entry.offset + entry.bytes;
        if !is_padding(file, end)? {
            problem(None, end, "padding behind the file is not zero".into());
        }
    }
    result.chunks += entry.crc32c.len() as u64;
    result.bytes += entry.bytes;
    Ok(())
}

fn check_plane(
    artifact: &ArtifactFile,
    (tensor, plane): (usize, usize),
    result: &mut Verified,
    step: &mut impl FnMut(u64) -> Result<()>,
) -> Result<()> {
    let mut damaged = false;
    let mut hasher = blake3::Hasher::new();
    let index = plane;
    let (file, offset) = artifact.store().plane(artifact.header(), tensor, plane);
    let entry = &artifact.tensors()[tensor];
    let plane = &entry.planes()[plane];
    let coded = plane.coding.is_some();
    let shard = match artifact.store() {
        Store::File(_) => None,
        Store::Directory(_) => file.path().file_name().map(|name| name.to_string_lossy().into_owned()),
    };
    let problem = |chunk, at, what| Problem {
        tensor: Some(entry.info().name().to_owned()),
        plane: Some(plane.plane.name()),
        file: shard.clone(),
        chunk,
        at,
        what,
    };
    for (chunk, &expected) in (0..).zip(&plane.crc32c) {
        let start = chunk * CHUNK;
        let at = offset + start;
        let len = usize::try_from(CHUNK.min(plane.bytes - start)).expect("at most a chunk");
        let bytes = file.read(at, len)?;
        let found = crc32c::crc32c(&bytes);
        if found == expected {
            if !coded && let Some(what) = bad_content(entry, plane.plane, start, &bytes) {
                result.problems.push(problem(Some(chunk), at, what));
            }
        } else {
            damaged = true;
            let what = format!("checksum is {found:08x}, expected {expected:08x}");
            result.problems.push(problem(Some(chunk), at, what));
        }
        if !coded {
            hasher.update_rayon(&bytes);
        }
        result.chunks += 1;
        result.bytes += bytes.len() as u64;
        step(result.bytes)?;
    }
    // What a difference gives is known with the base only.
    let without_base = plane.coding == Some(Coding::Words);
    let digest = match coded && !damaged {
        _ if without_base => Ok(plane.blake3),
        false => Ok(Identity::from(hasher.finalize())),
        true => coded_digest(artifact, (tensor, index), &mut |what| {
            result.problems.push(problem(None, offset, what));
            step(result.bytes)
        }),
    };
    let digest = match digest {
        Ok(digest) => digest,
        Err(e) => match e.root() {
            Error::Corrupt { at, what } => {
                result.problems.push(problem(None, offset + at, what.clone()));
                plane.blake3
            }
            _ => return Err(e),
        },
    };
    if digest != plane.blake3 && !damaged {
        let what = format!("digest is {digest}, expected {}", plane.blake3);
        result.problems.push(problem(None, offset, what));
    }
    if shard.is_none() && !is_padding(file, offset + plane.bytes)? {
        result.problems.push(problem(None, offset + plane.bytes, "padding behind the plane is not zero".into()));
    }
    Ok(())
}

/// Checks what extra planes, sound each by itself, say together.
fn check_extras(artifact: &ArtifactFile, tensor: usize, result: &mut Verified) -> Result<()> {
    let Err(e) = artifact.check_extras(tensor) else { return Ok(()) };
    let Error::Corrupt { at, what } = e.root() else { return Err(e) };
    let name = artifact.tensors()[tensor].info().name().to_owned();
    let problem = Problem { tensor: Some(name), plane: None, file: None, chunk: None, at: *at, what: what.clone() };
    result.problems.push(problem);
    Ok(())
}

/// Decodes a coded plane whose chunks are sound and gives its digest; `found` is told what no layout allows.
fn coded_digest(
    artifact: &ArtifactFile,
    (tensor, plane): (usize, usize),
    found: &mut dyn FnMut(String) -> Result<()>,
) -> Result<Identity> {
    let entry = &artifact.tensors()[tensor];
    let place = &entry.planes()[plane];
    let read = |plane: usize, start: u64, bytes: u64| artifact.stored(tensor, plane, start, bytes);
    coded::digest(entry, plane, &read, |at, piece| match bad_content(entry, place.plane, at as u64, piece) {
        Some(what) => found(what),
        None => Ok(()),
    })
}

/// Whether zeros stand from `end` up to the alignment.
fn is_padding(file: &InputFile, end: u64) -> Result<bool> {
    let padding = file.read(end, usize::try_from(align(end) - end).expect("less than the alignment"))?;
    Ok(padding.iter().all(|&b| b == 0))
}

/// What a chunk holds that its layout does not allow.
pub(super) fn bad_content(entry: &Entry, plane: Plane, start: u64, bytes: &[u8]) -> Option<String> {
    let Layout::Grouped(layout) = &entry.codec().layout else { return None };
    let cols = usize::try_from(entry.matrix().1).ok()?;
    let (bits, low, high) = (layout.bits() as usize, layout.low_bits() as usize, layout.high_bits() as usize);
    match plane {
        Plane::Codes => unused_bits(start, bytes, layout.code_stride(cols), cols * low),
        Plane::HighCodes => unused_bits(start, bytes, layout.high_code_stride(cols), cols * high),
        Plane::ZeroPoints => unused_bits(start, bytes, layout.zero_point_stride(cols), layout.groups(cols) * bits),
        // Every byte means something to a bank.
        Plane::Scales if layout.bank().is_some() => None,
        Plane::Scales => not_finite(layout.scale(), bytes),
        Plane::RowScales => not_finite(layout.scale(), bytes).or_else(|| too_large(layout.scale(), bytes)),
        Plane::Offsets => not_finite(layout.offset()?, bytes),
        Plane::ColumnScales => bad_scale(bytes),
        Plane::OutlierValues => not_finite(Float::F16, bytes),
        // Counts and columns mean something together only.
        Plane::Data | Plane::OutlierCounts | Plane::OutlierColumns => None,
    }
}

/// Looks for bits that are set in rows of `stride` bytes beyond the `used` bits of each.
fn unused_bits(start: u64, bytes: &[u8], stride: usize, used: usize) -> Option<String> {
    if stride * 8 == used {
        return None;
    }
    let stride = stride as u64;
    let end = start + bytes.len() as u64;
    let mask_of = |column: u64| {
        let bits_before = column * 8;
        match (used as u64).saturating_sub(bits_before) {
            0 => 0xff_u8,
            n if n >= 8 => 0,
            n => 0xff << n,
        }
    };
    for row in start / stride..end.div_ceil(stride) {
        for column in used as u64 / 8..stride {
            let at = row * stride + column;
            if (start..end).contains(&at) {
                let index = usize::try_from(at - start).expect("inside the chunk");
                if bytes[index] & mask_of(column) != 0 {
                    return Some(format!("unused bits of row {row} are not zero"));
                }
            }
        }
    }
    None
}

/// Looks for scales of rows of which a multiple could be infinite.
fn too_large(float: Float, bytes: &[u8]) -> Option<String> {
    let mut scales = (0..bytes.len() / float.size()).map(|i| float.load(bytes, i));
    scales
        .find(|x| x.abs() >= ROW_SCALE_END)
        .map(|x| format!("a scale of a row is {x:e}, expected less than {ROW_SCALE_END:e}"))
}

/// Looks for numbers that are NaN or infinite.
fn not_finite(float: Float, bytes: &[u8]) -> Option<String> {
    let count = bytes.len() / float.size();
    (0..count).map(|i| float.load(bytes, i)).find(|x| !x.is_finite()).map(|x| format!("a value is {x}"))
}
