//! Streams planes into a new artifact.
//!
//! Tensors come one after the other; within a tensor every plane is written from its start to its end, in pieces of
//! any size, the planes side by side. Checksums grow with the pieces. A tensor can be taken back as long as it has not
//! been finished, which is how one that does not fit its codec is stored with another.

use std::collections::BTreeMap;
use std::path::Path;

use super::entry::{ALIGN, CHUNK, Entry, align};
use super::header::{Delta, Header, Provenance};
use super::identity::Identity;
use super::map::decode_rows;
use super::preamble::{FLAG_DELTA, Preamble};
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::limits::Limits;
use crate::output::OutputFile;
use crate::tensor::TensorInfo;

/// An artifact under way.
#[derive(Debug)]
pub struct Writer {
    out: OutputFile,
    tensors: Vec<Entry>,
    end: u64,
}

/// A tensor under way; it counts only once [`Writer::keep`] has taken it.
#[derive(Debug)]
pub struct TensorWriter {
    entry: Entry,
    planes: Vec<PlaneWriter>,
}

/// How far a plane is, and its checksums so far.
#[derive(Debug, Default)]
struct PlaneWriter {
    written: u64,
    crc: u32,
    crcs: Vec<u32>,
    hasher: blake3::Hasher,
}

/// What was written.
#[derive(Debug, Clone)]
pub struct Written {
    /// Length of the file.
    pub file_bytes: u64,
    /// Its header.
    pub header: Header,
}

impl Writer {
    /// Starts an artifact that will be called `target`.
    ///
    /// # Errors
    /// Those of [`OutputFile::create`].
    pub fn create(target: &Path, force: bool) -> Result<Self> {
        Ok(Self { out: OutputFile::create(target, force)?, tensors: Vec::new(), end: ALIGN })
    }

    /// The file under way, for checks before anything is written.
    pub fn output(&self) -> &OutputFile {
        &self.out
    }

    /// Starts the next tensor; what an earlier one that was not kept has written is overwritten.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the codec cannot hold the tensor.
    pub fn tensor(&self, info: TensorInfo, codec: &'static Codec, transposed: bool) -> Result<TensorWriter> {
        let entry = place(Entry::unplaced(info, codec, transposed)?, self.end)?;
        let planes = entry.planes().iter().map(|_| PlaneWriter::default()).collect();
        Ok(TensorWriter { entry, planes })
    }

    /// Takes a complete tensor into the artifact and gives its entry.
    ///
    /// # Errors
    /// [`Error::Io`] when the padding cannot be written.
    ///
    /// # Panics
    /// When a plane has not been written to its end: a bug of the caller.
    pub fn keep(&mut self, tensor: TensorWriter) -> Result<&Entry> {
        let TensorWriter { mut entry, planes } = tensor;
        for (place, plane) in entry.planes_mut().iter_mut().zip(planes) {
            assert_eq!(plane.written, place.bytes, "plane {} is not complete", place.plane.name());
            let end = place.offset + place.bytes;
            let padding = usize::try_from(align(end) - end).expect("less than the alignment");
            // A tensor that was not kept may have left bytes here.
            self.out.write_at(end, &[0; 64][..padding])?;
            let mut crcs = plane.crcs;
            if place.bytes % CHUNK != 0 {
                crcs.push(plane.crc);
            }
            place.crc32c = crcs.into();
            place.blake3 = plane.hasher.finalize().into();
            self.end = align(end);
        }
        self.tensors.push(entry);
        Ok(self.tensors.last().expect("pushed on the line above"))
    }

    /// Writes the header, makes the file durable and gives it its name.
    ///
    /// # Errors
    /// Those of [`OutputFile::commit`], or [`Error::Invalid`] for duplicate names.
    pub fn finish(
        self,
        metadata: BTreeMap<String, String>,
        provenance: Provenance,
        delta: Option<Delta>,
    ) -> Result<Written> {
        let flags = if delta.is_some() { FLAG_DELTA } else { 0 };
        let header = Header::new(&Limits::DEFAULT, metadata, provenance, delta, self.tensors)?;
        let mut text = Vec::new();
        header.print(&mut text).map_err(|e| Error::io(self.out.target(), e))?;
        let start = header.start();
        let preamble = Preamble {
            flags,
            header_bytes: text.len() as u64,
            file_bytes: start + text.len() as u64,
            header_crc32c: crc32c::crc32c(&text),
        };
        crate::limits::check("bytes of the header", Limits::DEFAULT.header_bytes, preamble.header_bytes)?;
        self.out.write_at(start, &text)?;
        self.out.write_at(0, &preamble.print())?;
        self.out.commit(preamble.file_bytes)?;
        Ok(Written { file_bytes: preamble.file_bytes, header })
    }
}

/// Gives the planes of an entry their offsets from `at` on.
fn place(mut entry: Entry, at: u64) -> Result<Entry> {
    let mut at = at;
    for plane in entry.planes_mut() {
        plane.offset = at;
        at = at
            .checked_add(plane.bytes)
            .filter(|&end| end < 1 << 62)
            .map(align)
            .ok_or_else(|| Error::invalid("the artifact would be larger than 2^62 bytes"))?;
    }
    Ok(entry)
}

/// Length of the artifact that would hold these tensors, to the byte, with nothing read or written.
///
/// # Errors
/// [`Error::Invalid`] when a codec cannot hold its tensor or a name occurs twice.
pub(crate) fn planned_bytes(
    tensors: impl IntoIterator<Item = (TensorInfo, &'static Codec, bool)>,
    metadata: &BTreeMap<String, String>,
    provenance: &Provenance,
) -> Result<u64> {
    let mut end = ALIGN;
    let mut entries = Vec::new();
    for (info, codec, transposed) in tensors {
        let entry = place(Entry::unplaced(info, codec, transposed)?, end)?;
        end = entry.planes().last().map_or(end, |p| align(p.offset + p.bytes));
        entries.push(entry);
    }
    let header = Header::new(&Limits::DEFAULT, metadata.clone(), provenance.clone(), None, entries)?;
    Ok(header.start() + header.printed_bytes())
}

impl TensorWriter {
    /// The next bytes of plane number `index`, into the artifact that the tensor was started for.
    ///
    /// # Errors
    /// [`Error::Io`].
    ///
    /// # Panics
    /// When the plane gets more bytes than its codec and shape give it: a bug of the caller.
    pub fn write(&mut self, writer: &Writer, index: usize, bytes: &[u8]) -> Result<()> {
        let place = &self.entry.planes()[index];
        let plane = &mut self.planes[index];
        assert!(plane.written + bytes.len() as u64 <= place.bytes, "plane {index} overflows");
        writer.out.write_at(place.offset + plane.written, bytes)?;
        plane.observe(bytes);
        Ok(())
    }

    /// The next bytes of every plane.
    pub(crate) fn write_planes(&mut self, writer: &Writer, planes: &[Vec<u8>]) -> Result<()> {
        planes.iter().enumerate().try_for_each(|(index, bytes)| self.write(writer, index, bytes))
    }

    /// The codec that the tensor is written with.
    pub(crate) fn codec(&self) -> &'static Codec {
        self.entry.codec()
    }

    /// Whether the matrix is the transpose of the source tensor.
    pub(crate) fn transposed(&self) -> bool {
        self.entry.transposed()
    }

    /// Rows of what was written, as f32; `out` holds whole rows of the stored matrix.
    pub(crate) fn decode_rows(&self, writer: &Writer, first_row: u64, out: &mut [f32]) -> Result<()> {
        decode_rows(&self.entry, first_row, out, |plane, start, bytes| {
            let len = usize::try_from(bytes).map_err(|_| Error::invalid("the rows are larger than memory"))?;
            let mut buffer = crate::error::try_zeroed(len, || "rows of a plane".to_owned())?;
            writer.out.read_at(self.entry.planes()[plane].offset + start, &mut buffer)?;
            Ok(buffer)
        })
    }

    /// Whether what was written so far is the content of `other`.
    pub(crate) fn same_as(&self, other: &Entry) -> bool {
        other.codec() == self.entry.codec()
            && other.transposed() == self.entry.transposed()
            && other.info() == self.entry.info()
            && other.planes().iter().zip(&self.planes).all(|(a, b)| a.blake3 == Identity::from(b.hasher.finalize()))
    }
}

impl PlaneWriter {
    fn observe(&mut self, mut bytes: &[u8]) {
        self.hasher.update_rayon(bytes);
        while !bytes.is_empty() {
            let room = CHUNK - self.written % CHUNK;
            let n = usize::try_from(room.min(bytes.len() as u64)).expect("at most the length of a slice");
            let (head, tail) = bytes.split_at(n);
            self.crc = crc32c::crc32c_append(self.crc, head);
            self.written += n as u64;
            if self.written.is_multiple_of(CHUNK) {
                self.crcs.push(std::mem::take(&mut self.crc));
            }
            bytes = tail;
        }
    }
}
