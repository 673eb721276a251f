//! A zip of numpy arrays: stored members are read in place, deflated ones are unpacked once into a temporary file.
//!
//! Against archives made to explode, a member is unpacked only if its shape, its stated size and what deflate can do at
//! best agree, and members may not overlap; so the temporary file never exceeds about a thousand times the archive.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::io::{self, BufWriter, Read, Seek, SeekFrom, Write};
use std::path::Path;

use zip::CompressionMethod;
use zip::read::{ArchiveOffset, Config};
use zip::result::ZipError;

use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::{self, Limits};

use super::rows::Store;
use super::{Kind, Options, Source, SourceFile, SourceTensor, detect, npy, quoted};

/// Deflate cannot do better than this, and this much more for a short member.
const BEST_RATIO: u64 = 1032;

/// Room beside the directory for what ends an archive: its longest comment, and a little.
const END_BYTES: u64 = 1 << 20;

/// Opens the archive at `path`.
pub(super) fn open(path: &Path, options: &Options) -> Result<Source> {
    let file = InputFile::open(path, options.access)?;
    let (tensors, spool) = read_members(&file, options).map_err(|e| e.in_file(path))?;
    let mut source = Source::new(Kind::Npz, vec![SourceFile::new(file)], tensors);
    source.spool = spool;
    source.finish(&options.limits).map_err(|e| e.in_file(path))
}

/// Reads the directory of the archive and the header of every member.
fn read_members(file: &InputFile, options: &Options) -> Result<(Vec<SourceTensor>, Option<InputFile>)> {
    let limits = &options.limits;
    let damaged = |e: ZipError| match e {
        ZipError::Io(e) => e.downcast::<Error>().unwrap_or_else(|e| Error::io(file.path(), e)),
        e => Error::corrupt(0, format!("the zip directory is damaged: {e}")),
    };
    check_claimed_members(file, limits)?;
    let left = Cell::new(limits.header_bytes.saturating_add(END_BYTES));
    let config = Config { archive_offset: ArchiveOffset::Known(0) };
    let stream = Metered { inner: file.stream()?, left: &left, limit: limits.header_bytes };
    let mut archive = zip::ZipArchive::with_config(config, stream).map_err(damaged)?;
    left.set(u64::MAX);
    limits::check("members of a zip archive", limits.tensors, archive.len() as u64)?;
    if archive.has_duplicate_names() {
        return Err(Error::corrupt(0, "two members have the same name, expected unique names"));
    }
    if archive.file_names_raw().any(|name| name == b"data.pkl" || name.ends_with(b"/data.pkl")) {
        return Err(detect::pickle(&file.path().file_name().unwrap_or_default().to_string_lossy()));
    }

    let mut spool = Spool::default();
    let mut tensors = Vec::new();
    let mut extents = BTreeMap::new();
    for index in 0..archive.len() {
        let member = archive.by_index_raw(index).map_err(damaged)?;
        if member.is_dir() {
            continue;
        }
        let label = member.name().map_err(damaged)?.into_owned();
        let Some(name) = label.strip_suffix(".npy") else {
            return Err(Error::unsupported(format!(
                "member {} is not a .npy array; pack arrays only, with numpy.savez",
                quoted(&label)
            )));
        };
        if member.encrypted() {
            return Err(Error::unsupported(format!("member {} is encrypted: decrypt it first", quoted(&label))));
        }
        let (method, packed, size) = (member.compression(), member.compressed_size(), member.size());
        let start = member.data_start().expect("known once a member is open");
        let header_start = member.header_start();
        drop(member);
        if start.checked_add(packed).is_none_or(|end| end > file.len()) {
            return Err(Error::corrupt(
                start,
                format!("member {} has {packed} bytes and leaves the file: it is cut off", quoted(&label)),
            ));
        }
        // Before anything is unpacked, so that the same bytes are never unpacked twice.
        claim(&mut extents, header_start, start + packed, &label)?;
        match method {
            CompressionMethod::Stored => {
                let mut part = Part { file, at: start, end: start + packed };
                let array = npy::read_header(&mut part, packed, name, limits)?.check_length(packed)?;
                tensors.push(SourceTensor::new(array.info, Store::File(0), start + array.data, array.order));
            }
            CompressionMethod::Deflated => {
                if size / BEST_RATIO > packed {
                    return Err(Error::corrupt(
                        start,
                        format!("member {} cannot have {size} bytes packed into {packed}", quoted(&label)),
                    ));
                }
                let mut member = archive.by_index(index).map_err(damaged)?;
                let array = npy::read_header(&mut member, size, name, limits)?.check_length(size)?;
                let offset = spool.append(&mut member, array.info.bytes(), start, &label)?;
                tensors.push(SourceTensor::new(array.info, Store::Spool, offset, array.order));
            }
            other => {
                return Err(Error::unsupported(format!(
                    "member {} is packed by {other}, which is not read: use numpy.savez or numpy.savez_compressed",
                    quoted(&label)
                )));
            }
        }
    }
    Ok((tensors, spool.finish(file, options)?))
}

/// Refuses a count of members beyond the limits before the zip reader makes room for so many.
///
/// Only ZIP64 can claim more than 65535: in a record that a locator, right before the end record, points to.
fn check_claimed_members(file: &InputFile, limits: &Limits) -> Result<()> {
    const LOCATOR: usize = 20;
    const RECORD: usize = 40;
    const MOST_END_BYTES: u64 = 22 + 65535 + LOCATOR as u64;
    let len = MOST_END_BYTES.min(file.len());
    let end = file.read(file.len() - len, usize::try_from(len).expect("at most 64 KiB"))?;
    let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
    for locator in end.windows(LOCATOR).filter(|w| w.starts_with(b"PK\x06\x07")) {
        let at = number(&locator[8..16]);
        if at.checked_add(RECORD as u64).is_none_or(|end| end > file.len()) {
            continue;
        }
        let record = file.read(at, RECORD)?;
        limits::check(
            "members of a zip archive",
            limits.tensors,
            number(&record[24..32]).max(number(&record[32..40])),
        )?;
    }
    Ok(())
}

/// Notes that a member lies at `start..end`, and refuses it when another does so too.
fn claim(extents: &mut BTreeMap<u64, u64>, start: u64, end: u64, label: &str) -> Result<()> {
    let before = extents.range(..=start).next_back().is_none_or(|(_, &e)| e <= start);
    let after = extents.range(start..).next().is_none_or(|(&s, _)| end <= s);
    if before && after {
        extents.insert(start, end);
        return Ok(());
    }
    Err(Error::corrupt(
        start,
        format!("member {} shares bytes with another, expected one after another", quoted(label)),
    ))
}

/// The temporary file for unpacked members, made when first needed.
#[derive(Default)]
struct Spool {
    out: Option<BufWriter<std::fs::File>>,
    len: u64,
}

impl Spool {
    /// Unpacks the remaining bytes of a member, which must be exactly `expected`, and returns where they lie.
    fn append(&mut self, member: &mut impl Read, expected: u64, at: u64, label: &str) -> Result<u64> {
        let refused = |e| Error::io(std::env::temp_dir(), e);
        let out = match &mut self.out {
            Some(out) => out,
            none => none.insert(BufWriter::with_capacity(1 << 20, tempfile::tempfile().map_err(refused)?)),
        };
        let mut buffer = vec![0; 256 << 10];
        let (mut copied, wanted) = (0, expected.saturating_add(1));
        // One byte more is asked for than is expected: its absence is the end at which the checksum is compared.
        while copied < wanted {
            let most = usize::try_from(wanted - copied).map_or(buffer.len(), |left| left.min(buffer.len()));
            let count = member.read(&mut buffer[..most]).map_err(|e| {
                Error::corrupt(at, format!("member {} cannot be unpacked: {e}; fetch the file again", quoted(label)))
            })?;
            if count == 0 {
                break;
            }
            copied += count as u64;
            if copied <= expected {
                out.write_all(&buffer[..count]).map_err(refused)?;
            }
        }
        if copied != expected {
            return Err(Error::corrupt(
                at,
                format!("member {} unpacks to another size than the {expected} bytes of its shape", quoted(label)),
            ));
        }
        let offset = self.len;
        self.len += expected;
        Ok(offset)
    }

    fn finish(self, archive: &InputFile, options: &Options) -> Result<Option<InputFile>> {
        let Some(out) = self.out else { return Ok(None) };
        let file = out.into_inner().map_err(|e| Error::io(std::env::temp_dir(), e.into_error()))?;
        InputFile::from_file(archive.path(), file, options.access).map(Some)
    }
}

/// A range of a file as a stream.
struct Part<'a> {
    file: &'a InputFile,
    at: u64,
    end: u64,
}

impl Read for Part<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let left = usize::try_from(self.end - self.at).unwrap_or(usize::MAX);
        let count = left.min(buffer.len());
        self.file.read_into(self.at, &mut buffer[..count]).map_err(io::Error::other)?;
        self.at += count as u64;
        Ok(count)
    }
}

/// A stream of which only so much may be read: the zip reader itself has no cap on its directory.
struct Metered<'a, R> {
    inner: R,
    left: &'a Cell<u64>,
    limit: u64,
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        match self.left.get().checked_sub(count as u64) {
            Some(left) => self.left.set(left),
            None => {
                let got = self.limit.saturating_add(1);
                return Err(io::Error::other(Error::Limit {
                    what: "bytes of a zip directory",
                    limit: self.limit,
                    got,
                }));
            }
        }
        Ok(count)
    }
}

impl<R: Seek> Seek for Metered<'_, R> {
    fn seek(&mut self, position: SeekFrom) -> io::Result<u64> {
        self.inner.seek(position)
    }
}
