//! The text of a header, streamed: parsed from a file and printed against it, so that it is never in memory as a whole.

use std::io::{self, BufReader, Read, Write};
use std::ops::Range;

use super::header::{Header, HeaderIn};
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::Limits;

/// Where a header stands, and what is known of it from elsewhere.
pub(super) struct Text<'a> {
    pub file: &'a InputFile,
    pub range: Range<u64>,
    /// The checksum that it must have, where one is stored.
    pub crc32c: Option<u32>,
    /// Whether the planes end where it begins, as in a file of its own they must.
    pub ends_planes: bool,
    pub flags: u32,
}

impl Text<'_> {
    /// Parses and checks the header.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Unsupported`] or [`Error::Limit`].
    pub fn header(&self, limits: &Limits) -> Result<Header> {
        let Range { start, end } = self.range;
        if let Some(expected) = self.crc32c {
            let crc = self.crc32c()?;
            if crc != expected {
                return Err(Error::corrupt(start, format!("header checksum is {crc:08x}, expected {expected:08x}")));
            }
        }
        let bad = |what: String| Error::corrupt(start, format!("header: {what}"));
        let parsed: HeaderIn = serde_json::from_reader(self.stream()).map_err(|e| bad(e.to_string()))?;
        let header = parsed.check(limits, start, self.ends_planes, self.flags)?;
        let mut compare = Compare { expected: self.stream(), at: start };
        let printed = header.print(&mut compare);
        // White space behind the object is no part of what is printed.
        if printed.is_err() || compare.at != end {
            let what = "header: not in canonical form, expected it as this program prints it";
            return Err(Error::corrupt(compare.at, what));
        }
        Ok(header)
    }

    /// The checksum of the text.
    pub fn crc32c(&self) -> Result<u32> {
        let mut crc = 0;
        let mut reader = self.stream();
        loop {
            let bytes = io::BufRead::fill_buf(&mut reader).map_err(|e| Error::io(self.file.path(), e))?;
            if bytes.is_empty() {
                return Ok(crc);
            }
            crc = crc32c::crc32c_append(crc, bytes);
            let n = bytes.len();
            io::BufRead::consume(&mut reader, n);
        }
    }

    fn stream(&self) -> BufReader<Section<'_>> {
        BufReader::with_capacity(64 << 10, Section { file: self.file, at: self.range.start, end: self.range.end })
    }
}

/// A part of a file as a stream.
struct Section<'a> {
    file: &'a InputFile,
    at: u64,
    end: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from((self.end - self.at).min(out.len() as u64)).expect("at most the length of a slice");
        self.file.read_into(self.at, &mut out[..n]).map_err(io::Error::other)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Counts what is written.
pub(super) struct Count(pub u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Fails when what is written is not what is expected.
struct Compare<R> {
    expected: R,
    at: u64,
}

impl<R: Read> Write for Compare<R> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut buffer = [0; 256];
        for part in bytes.chunks(buffer.len()) {
            let expected = &mut buffer[..part.len()];
            self.expected.read_exact(expected)?;
            if expected != part {
                return Err(io::Error::other("the header is not canonical"));
            }
            self.at += part.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
