//! Numpy archives: a zip of `.npy` members, stored without compression so that any of them can be mapped.

use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::path::Path;

use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

use super::{Files, Job};
use crate::error::{Error, Result};
use crate::tensor::DType;

/// Writes all tensors into one archive; a transposed matrix becomes a member in Fortran order.
pub(super) fn file(job: &mut Job<'_, '_>, target: &Path) -> Result<Files> {
    let total = job.artifact.tensors().iter().map(|t| t.info().elements() * numpy_dtype(job.dtype(t)).0.size()).sum();
    let out = job.create(target, total)?;
    let mut zip = ZipWriter::new(Stream::new(out.stream()));
    let failed = |e: zip::result::ZipError| Error::io(target, e.into());
    for i in 0..job.artifact.tensors().len() {
        let entry = &job.artifact.tensors()[i];
        let name = entry.info().name();
        let own = job.dtype(entry);
        let (dtype, descr) = numpy_dtype(own);
        if dtype != own {
            job.notes.push(format!("{name}: numpy has no {own}, written as {dtype}"));
        }
        let bytes = entry.info().elements() * dtype.size();
        let options = SimpleFileOptions::default()
            .compression_method(CompressionMethod::Stored)
            .large_file(bytes >= u64::from(u32::MAX) - 65_536);
        zip.start_file(format!("{name}.npy"), options).map_err(failed)?;
        let header = npy_header(descr, entry.transposed(), entry.info().shape());
        zip.write_all(&header).map_err(|e| Error::io(target, e))?;
        // The stored matrix is the transpose, row by row: the tensor itself, column by column.
        job.matrix_order(i, dtype, &mut |bytes| zip.write_all(bytes).map_err(|e| Error::io(target, e)))?;
    }
    zip.finish().map_err(failed)?;
    let bytes = out.stream().metadata().map_err(|e| Error::io(target, e))?.len();
    out.commit(bytes)?;
    Ok(vec![(target.to_owned(), bytes)])
}

/// A file that fails once: a zip that is dropped after an error is finished nonetheless, and would say on standard error that
/// it cannot be. What is written after the error goes nowhere.
struct Stream<'a> {
    file: &'a File,
    failed: bool,
    at: u64,
    end: u64,
}

impl<'a> Stream<'a> {
    fn new(file: &'a File) -> Self {
        Self { file, failed: false, at: 0, end: 0 }
    }
}

impl Write for Stream<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = if self.failed { Ok(bytes.len()) } else { self.file.write(bytes) };
        match &written {
            Ok(count) => self.at += *count as u64,
            Err(e) => self.failed |= e.kind() != io::ErrorKind::Interrupted,
        }
        self.end = self.end.max(self.at);
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Seek for Stream<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        if !self.failed {
            let at = self.file.seek(to).inspect_err(|_| self.failed = true)?;
            self.at = at;
            return Ok(at);
        }
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.end.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

/// The dtype that numpy has for ours, and its name there.
fn numpy_dtype(dtype: DType) -> (DType, &'static str) {
    match dtype {
        DType::F64 => (dtype, "<f8"),
        DType::F32 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => (DType::F32, "<f4"),
        DType::F16 => (dtype, "<f2"),
        DType::I64 => (dtype, "<i8"),
        DType::I32 => (dtype, "<i4"),
        DType::I16 => (dtype, "<i2"),
        DType::I8 => (dtype, "|i1"),
        DType::U64 => (dtype, "<u8"),
        DType::U32 => (dtype, "<u4"),
        DType::U16 => (dtype, "<u2"),
        DType::U8 => (dtype, "|u1"),
        DType::Bool => (dtype, "|b1"),
    }
}

/// The header of a `.npy` file, version 1.0: magic, length, a Python dict padded to 64 bytes.
fn npy_header(descr: &str, fortran: bool, shape: &[u64]) -> Vec<u8> {
    let mut dims = shape.iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
    if shape.len() == 1 {
        dims.push(',');
    }
    let fortran = if fortran { "True" } else { "False" };
    let mut dict = format!("{{'descr': '{descr}', 'fortran_order': {fortran}, 'shape': ({dims}), }}");
    let padded = (10 + dict.len() + 1).next_multiple_of(64) - 10;
    dict.extend(std::iter::repeat_n(' ', padded - dict.len() - 1));
    dict.push('\n');
    let len = u16::try_from(dict.len()).expect("eight dimensions fit");
    let mut header = b"\x93NUMPY\x01\x00".to_vec();
    header.extend(len.to_le_bytes());
    header.extend(dict.into_bytes());
    header
}
