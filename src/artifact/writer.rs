//! Streams planes into a new artifact.
//!
//! Tensors come one after the other; within a tensor every plane is written from its start to its end, in pieces of
//! any size, the planes side by side. Checksums grow with the pieces. A tensor can be taken back as long as it has not
//! been finished, which is how one that does not fit its codec is stored with another.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::path::Path;

use super::attached::AttachedFile;
use super::checksum::{Checksums, chunks};
use super::coded::{self, Coding};
use super::entry::{ALIGN, CHUNK, Entry, align};
use super::header::{Delta, Header, MOST_BYTES, Provenance};
use super::identity::Identity;
use super::map::{ArtifactFile, decode_rows};
use super::preamble::Preamble;
use super::store::Store;
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::error::{Error, Result};
use crate::file::{Access, Block, InputFile};
use crate::fit::Rate;
use crate::limits::Limits;
use crate::output::OutputFile;
use crate::tensor::{DType, TensorInfo};

/// An artifact under way.
#[derive(Debug)]
pub struct Writer {
    out: OutputFile,
    tensors: Vec<Entry>,
    files: Vec<AttachedFile>,
    end: u64,
}

/// A tensor under way; it counts only once [`Writer::keep`] has taken it.
#[derive(Debug)]
pub struct TensorWriter {
    entry: Entry,
    planes: Vec<Checksums>,
    /// The digests of coded planes, which are not those of what is written.
    digests: Vec<Option<Identity>>,
}

/// A plane as it will be stored.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// How it is coded, unless it is stored as it is.
    pub coding: Option<Coding>,
    /// What will stand in the file.
    pub stored: Vec<u8>,
    /// Digest of the plane in memory.
    pub blake3: Identity,
}

impl Prepared {
    /// A plane of `plain` bytes in memory: as this stream, unless the plane itself is shorter.
    pub fn new(plain: Vec<u8>, stream: Option<(Coding, Vec<u8>)>) -> Self {
        let blake3 = blake3::Hasher::new().update_rayon(&plain).finalize().into();
        match stream.filter(|(coding, stream)| coding.check(plain.len() as u64, stream.len() as u64).is_ok()) {
            Some((coding, stored)) => Self { coding: Some(coding), stored, blake3 },
            None => Self { coding: None, stored: plain, blake3 },
        }
    }
}

/// What an entry says besides tensor and codec.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Whole {
    /// Whether the matrix is the transpose of the source tensor.
    pub transposed: bool,
    /// Bits per weight that were asked for.
    pub rate: Option<Rate>,
    /// Which planes there are beside the codec's.
    pub extras: Extras,
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
        Ok(Self { out: OutputFile::create(target, force)?, tensors: Vec::new(), files: Vec::new(), end: ALIGN })
    }

    /// Goes on with an artifact that was given up, from tensors that lie in the file already, one after another from the
    /// start on.
    pub(crate) fn resumed(out: OutputFile, tensors: Vec<Entry>) -> Self {
        let end = tensors.iter().fold(ALIGN, end_of);
        Self { out, tensors, files: Vec::new(), end }
    }

    /// Bytes of what was kept.
    pub(crate) fn kept_bytes(&self) -> u64 {
        self.end - ALIGN
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
        self.start(Entry::unplaced(info, codec, transposed)?)
    }

    /// Writes a tensor again, every plane that gets shorter by it in its coding. Needs the planes in memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::Io`].
    pub(crate) fn coded(&self, plain: TensorWriter) -> Result<TensorWriter> {
        let layout = &plain.entry.codec().layout;
        if plain.entry.planes().iter().all(|place| place.coding.is_some() || Coding::of(layout, place.plane).is_none())
        {
            return Ok(plain);
        }
        let mut planes = Vec::with_capacity(plain.entry.planes().len());
        for (index, place) in plain.entry.planes().iter().enumerate() {
            let what = || format!("plane {} of tensor '{}'", place.plane.name(), plain.entry.info().name());
            let len =
                usize::try_from(place.bytes).map_err(|_| Error::OutOfMemory { what: what(), bytes: place.bytes })?;
            let mut stored = crate::error::try_zeroed(len, what)?;
            self.out.read_at(place.offset, &mut stored)?;
            planes.push(match place.coding {
                Some(_) => {
                    let blake3 = plain.digests[index].expect("a coded plane has a digest of its own");
                    Prepared { coding: place.coding, stored, blake3 }
                }
                None => {
                    let stream = coded::stream(&plain.entry, index, &stored)?;
                    Prepared::new(stored, stream)
                }
            });
        }
        if planes.iter().zip(plain.entry.planes()).all(|(plane, place)| plane.coding == place.coding) {
            return Ok(plain);
        }
        self.whole(plain.entry.info().clone(), plain.entry.codec(), plain.entry.how(), planes)
    }

    /// Starts a tensor whose codings, coded lengths and rate are known.
    fn start(&self, entry: Entry) -> Result<TensorWriter> {
        let entry = place(entry, self.end)?;
        let planes = entry.planes().iter().map(|_| Checksums::default()).collect();
        let digests = vec![None; entry.planes().len()];
        Ok(TensorWriter { entry, planes, digests })
    }

    /// Writes a tensor whose planes are in memory.
    ///
    /// # Errors
    /// Those of [`Writer::tensor`], [`Error::Io`].
    pub(crate) fn whole(
        &self,
        info: TensorInfo,
        codec: &'static Codec,
        how: Whole,
        planes: Vec<Prepared>,
    ) -> Result<TensorWriter> {
        let mut entry = Entry::unplaced(info, codec, how.transposed)?.with_extras(how.extras)?.at_rate(how.rate)?;
        for (index, plane) in planes.iter().enumerate() {
            if let Some(coding) = plane.coding {
                entry.set_coding(index, coding, plane.stored.len() as u64)?;
            }
        }
        let mut out = self.start(entry)?;
        for (index, plane) in planes.into_iter().enumerate() {
            out.write(self, index, &plane.stored)?;
            out.digests[index] = plane.coding.map(|_| plane.blake3);
        }
        Ok(out)
    }

    /// Takes a complete tensor into the artifact and gives its entry.
    ///
    /// # Errors
    /// [`Error::Io`] when the padding cannot be written.
    ///
    /// # Panics
    /// When a plane has not been written to its end: a bug of the caller.
    pub fn keep(&mut self, tensor: TensorWriter) -> Result<&Entry> {
        let TensorWriter { mut entry, planes, digests } = tensor;
        for ((place, plane), digest) in entry.planes_mut().iter_mut().zip(planes).zip(digests) {
            assert_eq!(plane.seen(), place.bytes, "plane {} is not complete", place.plane.name());
            (place.crc32c, place.blake3) = plane.finish();
            place.blake3 = digest.unwrap_or(place.blake3);
            self.end = pad(&self.out, place.offset + place.bytes)?;
        }
        self.tensors.push(entry);
        Ok(self.tensors.last().expect("pushed on the line above"))
    }

    /// Copies a tensor of another artifact, its planes checked; `tick` is told the bytes of each piece.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it is damaged, [`Error::Io`], and whatever `tick` returns.
    pub(crate) fn copy(
        &mut self,
        from: &ArtifactFile,
        index: usize,
        tick: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let entry = &from.tensors()[index];
        let mut out = self.start(entry.clone())?;
        for (plane, place) in entry.planes().iter().enumerate() {
            for chunk in 0..place.crc32c.len() as u64 {
                let start = chunk * CHUNK;
                let len = CHUNK.min(place.bytes - start);
                out.write(self, plane, &from.stored(index, plane, start, len)?)?;
                tick(len)?;
            }
            if place.coding.is_some() {
                out.digests[plane] = Some(from.digest(index, plane)?);
            }
        }
        if !out.same_as(entry) {
            let what = format!("tensor '{}' does not have its digest; fetch or write it again", entry.info().name());
            return Err(Error::corrupt(0, what).in_file(from.path()));
        }
        self.keep(out).map(drop)
    }

    /// Attaches a file of `bytes` bytes, read in pieces; files come after all tensors, by name.
    ///
    /// # Errors
    /// Those of `read`, [`Error::Io`].
    ///
    /// # Panics
    /// When `read` gives other lengths than it is asked for: a bug of the caller.
    pub(crate) fn attach<B: Deref<Target = [u8]>>(
        &mut self,
        name: &str,
        bytes: u64,
        mut read: impl FnMut(u64, usize) -> Result<B>,
    ) -> Result<()> {
        let mut sums = Checksums::default();
        while sums.seen() < bytes {
            let len = usize::try_from(CHUNK.min(bytes - sums.seen())).expect("at most a chunk");
            let piece = read(sums.seen(), len)?;
            assert_eq!(piece.len(), len, "a piece of '{name}' has another length");
            self.out.write_at(self.end + sums.seen(), &piece)?;
            sums.observe(&piece);
        }
        let (offset, (crc32c, blake3)) = (self.end, sums.finish());
        self.files.push(AttachedFile { name: name.into(), offset, bytes, crc32c, blake3 });
        self.end = pad(&self.out, offset + bytes)?;
        Ok(())
    }

    /// Attaches the files of another artifact, checked.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when one is damaged, [`Error::Io`].
    pub(crate) fn attach_all(&mut self, from: &ArtifactFile) -> Result<()> {
        for (index, file) in from.files().iter().enumerate() {
            let content = from.attached(index)?;
            self.attach(&file.name, file.bytes, |at, len| {
                let at = usize::try_from(at).expect("inside memory");
                Ok(&content[at..at + len])
            })?;
        }
        Ok(())
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
        let (out, written) = self.seal(metadata, provenance, delta)?;
        out.commit(written.file_bytes)?;
        Ok(written)
    }

    /// Starts an artifact in `dir` that never gets a name, to be read with [`Writer::reopen`].
    ///
    /// # Errors
    /// [`Error::Io`].
    pub(crate) fn nameless_in(dir: &Path) -> Result<Self> {
        let out = OutputFile::nameless_in(dir)?;
        Ok(Self { out, tensors: Vec::new(), files: Vec::new(), end: ALIGN })
    }

    /// Writes the header and gives the artifact back for reading, whatever its name or lack of one.
    ///
    /// # Errors
    /// Those of [`Writer::finish`].
    pub(crate) fn reopen(self, metadata: BTreeMap<String, String>, provenance: Provenance) -> Result<ArtifactFile> {
        let (out, Written { header, .. }) = self.seal(metadata, provenance, None)?;
        let path = out.target().to_owned();
        let file = InputFile::from_file(&path, out.into_file(), Access::Read)?;
        Ok(ArtifactFile::new(Store::File(Box::new(file)), header))
    }

    /// Writes header and preamble.
    fn seal(
        self,
        metadata: BTreeMap<String, String>,
        provenance: Provenance,
        delta: Option<Delta>,
    ) -> Result<(OutputFile, Written)> {
        let header = Header::new(&Limits::DEFAULT, metadata, provenance, delta, self.tensors, self.files)?;
        let mut text = Vec::new();
        header.print(&mut text).map_err(|e| Error::io(self.out.target(), e))?;
        let start = header.start();
        let preamble = Preamble {
            flags: header.flags(),
            header_bytes: text.len() as u64,
            file_bytes: start + text.len() as u64,
            header_crc32c: crc32c::crc32c(&text),
        };
        crate::limits::check("bytes of the header", Limits::DEFAULT.header_bytes, preamble.header_bytes)?;
        self.out.write_at(start, &text)?;
        self.out.write_at(0, &preamble.print())?;
        Ok((self.out, Written { file_bytes: preamble.file_bytes, header }))
    }
}

/// Where the next tensor begins.
fn end_of(end: u64, entry: &Entry) -> u64 {
    entry.planes().last().map_or(end, |p| align(p.offset + p.bytes))
}

/// How many of these tensors, from the first on, lie in the file as their entries say: one after another, whole and
/// undamaged.
pub(crate) fn whole_tensors(file: &std::fs::File, entries: &[Entry]) -> Result<usize> {
    let mut end = ALIGN;
    let mut piece = crate::error::try_zeroed(CHUNK.try_into().unwrap_or(0), || "a chunk".to_owned())?;
    let sound = |entry: &Entry, end: u64, piece: &mut [u8]| {
        let placed = place(entry.clone(), end).is_ok_and(|placed| {
            placed.planes().iter().zip(entry.planes()).all(|(wanted, found)| wanted.offset == found.offset)
        });
        placed
            && entry.planes().iter().all(|plane| {
                plane.crc32c.iter().zip((0..plane.bytes).step_by(piece.len())).all(|(&crc, at)| {
                    let len = usize::try_from(CHUNK.min(plane.bytes - at)).unwrap_or(0);
                    let piece = &mut piece[..len];
                    crate::output::read_exact_at(file, plane.offset + at, piece).is_ok() && crc32c::crc32c(piece) == crc
                })
            })
    };
    for (index, entry) in entries.iter().enumerate() {
        if !sound(entry, end, &mut piece) {
            return Ok(index);
        }
        end = end_of(end, entry);
    }
    Ok(entries.len())
}

/// Gives the planes of an entry their offsets from `at` on.
pub(super) fn place(mut entry: Entry, at: u64) -> Result<Entry> {
    let mut at = at;
    for plane in entry.planes_mut() {
        plane.offset = at;
        at = at
            .checked_add(plane.bytes)
            .filter(|&end| end < MOST_BYTES)
            .map(align)
            .ok_or_else(|| Error::invalid("the artifact would be larger than 2^62 bytes"))?;
    }
    Ok(entry)
}

/// Writes zeros from `end` up to the alignment, where a tensor that was not kept may have left bytes.
fn pad(out: &OutputFile, end: u64) -> Result<u64> {
    let padding = usize::try_from(align(end) - end).expect("less than the alignment");
    out.write_at(end, &[0; 64][..padding])?;
    Ok(align(end))
}

/// The header of the artifact that would hold these tensors and files (names and lengths), with nothing read or written:
/// all lengths in it are those of the real one, only checksums are not known; of planes that will be coded the length is
/// the one that was asked for.
///
/// # Errors
/// [`Error::Invalid`] when a codec cannot hold its tensor or a name occurs twice.
pub(crate) fn planned<'a>(
    tensors: impl IntoIterator<Item = (TensorInfo, &'static Codec, Whole)>,
    attached: impl IntoIterator<Item = (&'a str, u64)>,
    metadata: &BTreeMap<String, String>,
    provenance: &Provenance,
) -> Result<Header> {
    let mut end = ALIGN;
    let mut entries = Vec::new();
    for (info, codec, how) in tensors {
        let mut entry = Entry::unplaced(info, codec, how.transposed)?.with_extras(how.extras)?.at_rate(how.rate)?;
        coded::plan(&mut entry)?;
        let mut entry = place(entry, end)?;
        entry.planes_mut().iter_mut().for_each(|plane| plane.crc32c = vec![0; chunks(plane.bytes)].into());
        end = end_of(end, &entry);
        entries.push(entry);
    }
    let mut files = Vec::new();
    for (name, bytes) in attached {
        files.push(AttachedFile { offset: end, ..AttachedFile::unplaced(name, bytes) });
        end = align(end + bytes);
    }
    Header::new(&Limits::DEFAULT, metadata.clone(), provenance.clone(), None, entries, files)
}

/// The header of the artifact that has these entries and files, whose own places may be any.
///
/// # Errors
/// [`Error::Invalid`] when a name occurs twice.
pub(crate) fn assembled(
    tensors: impl IntoIterator<Item = Entry>,
    attached: &[AttachedFile],
    metadata: BTreeMap<String, String>,
    provenance: Provenance,
) -> Result<Header> {
    let mut end = ALIGN;
    let mut entries = Vec::new();
    for entry in tensors {
        let entry = place(entry, end)?;
        end = end_of(end, &entry);
        entries.push(entry);
    }
    let mut files = Vec::new();
    for file in attached {
        files.push(AttachedFile { offset: end, ..file.clone() });
        end = align(end + file.bytes);
    }
    Header::new(&Limits::DEFAULT, metadata, provenance, None, entries, files)
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
        assert!(plane.seen() + bytes.len() as u64 <= place.bytes, "plane {index} overflows");
        writer.out.write_at(place.offset + plane.seen(), bytes)?;
        plane.observe(bytes);
        Ok(())
    }

    /// The next bytes of every plane.
    pub(crate) fn write_planes(&mut self, writer: &Writer, planes: &[Vec<u8>]) -> Result<()> {
        planes.iter().enumerate().try_for_each(|(index, bytes)| self.write(writer, index, bytes))
    }

    /// Bytes of all planes in the file.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.entry.planes().iter().map(|plane| plane.bytes).sum()
    }

    /// Says that what was written is added to the base's tensor, of this dtype.
    ///
    /// # Errors
    /// Those of [`Entry::into_difference`].
    pub(super) fn into_difference(mut self, dtype: DType) -> Result<Self> {
        self.entry = self.entry.in_dtype(dtype)?.into_difference()?;
        Ok(self)
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
        let read = |plane: usize, start: u64, bytes: u64| {
            let len = usize::try_from(bytes).map_err(|_| Error::invalid("the rows are larger than memory"))?;
            let mut buffer = crate::error::try_zeroed(len, || "rows of a plane".to_owned())?;
            writer.out.read_at(self.entry.planes()[plane].offset + start, &mut buffer)?;
            Ok(Block::Owned(buffer))
        };
        decode_rows(&self.entry, first_row, out, |plane, start, bytes, known| {
            coded::range(&self.entry, plane, start, bytes, known, &read)
        })
    }

    /// Whether what was written so far is the content of `other`.
    pub(crate) fn same_as(&self, other: &Entry) -> bool {
        other.codec() == self.entry.codec()
            && other.transposed() == self.entry.transposed()
            && other.extras() == self.entry.extras()
            && other.info() == self.entry.info()
            && other
                .planes()
                .iter()
                .enumerate()
                .all(|(i, a)| a.blake3 == self.digests[i].unwrap_or_else(|| self.planes[i].digest()))
    }
}
