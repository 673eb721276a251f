//! Reads an artifact: entries, planes, weights.
//!
//! Every chunk is checked before the first use of any of its bytes, once per handle: against its checksum, and for what
//! no layout allows, so that no decoder or kernel meets a scale that is not finite. What is read is checked in the memory
//! where it then stays.

use std::ops::{Deref, Range};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};

use super::attached::AttachedFile;
use super::coded::{self, Known};
use super::entry::{CHUNK, Entry};
use super::header::Header;
use super::identity::Identity;
use super::store::{CHANGED, Store};
use super::verify::bad_content;
use crate::codec::extra::{ExtraPlanes, Extras};
use crate::codec::{self, Planes};
use crate::error::{Error, Result};
use crate::file::{Access, Block, InputFile};
use crate::layout::{Layout, Plane};
use crate::limits::Limits;
use crate::location::{self, Kind};
use crate::tensor;

/// An artifact, open for reading; its header has been validated.
#[derive(Debug)]
pub struct ArtifactFile {
    store: Store,
    header: Header,
    /// One bit per chunk of a plane, in the order of the header: set when it was found sound.
    sound: Box<[AtomicU8]>,
    /// The bit of the first chunk of each tensor.
    first_chunk: Box<[usize]>,
}

impl ArtifactFile {
    /// Opens an artifact to be read, not mapped, with the default limits.
    ///
    /// # Errors
    /// Those of [`ArtifactFile::open_with`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, Access::default(), &Limits::DEFAULT)
    }

    /// Opens an artifact, a file or a directory, here or at a URL, and validates its header; no plane is read.
    ///
    /// A directory is a safetensors checkpoint of planes with a `tenpak.json`; one without, as other programs write it,
    /// is read entirely for its checksums.
    ///
    /// # Errors
    /// [`Error::Io`], or what is wrong with the header: [`Error::Corrupt`], [`Error::Unsupported`], [`Error::Limit`];
    /// [`Error::Invalid`] for a directory that is not compressed.
    pub fn open_with(path: impl AsRef<Path>, access: Access, limits: &Limits) -> Result<Self> {
        let path = &*location::resolved(path.as_ref())?;
        if location::found(path)? == Some(Kind::Directory) {
            return super::directory::open(path, access, limits);
        }
        let file = InputFile::open(path, access)?;
        let header = Header::read(&file, limits).map_err(|e| e.in_file(path))?;
        Ok(Self::new(Store::File(Box::new(file)), header))
    }

    /// An artifact whose header has been checked against where its bytes lie.
    pub(super) fn new(store: Store, header: Header) -> Self {
        let mut total = 0;
        let first_chunk = header
            .tensors()
            .iter()
            .map(|t| {
                let first = total;
                total += t.planes().iter().map(|p| p.crc32c.len()).sum::<usize>();
                first
            })
            .collect();
        let sound = std::iter::repeat_with(AtomicU8::default).take(total.div_ceil(8)).collect();
        Self { store, header, sound, first_chunk }
    }

    /// Where it is: a file, or a directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.store.path()
    }

    /// Length of the file, or of all files of the directory.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.store.bytes(&self.header).0
    }

    /// Bytes of it that weights and header take, attached files left out.
    #[must_use]
    pub fn weight_bytes(&self) -> u64 {
        self.store.bytes(&self.header).1
    }

    /// The files that it is read from, so that none of them is chosen as an output.
    pub fn inputs(&self) -> impl Iterator<Item = &InputFile> {
        self.store.files()
    }

    /// Everything the artifact says about itself.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The tensors, in stored order.
    #[must_use]
    pub fn tensors(&self) -> &[Entry] {
        self.header.tensors()
    }

    /// Refuses a delta, which is no model by itself.
    ///
    /// # Errors
    /// [`Error::Invalid`] where this is one.
    pub(crate) fn refuse_delta(&self) -> Result<()> {
        if self.header.delta().is_some() {
            return Err(Error::invalid(format!(
                "{} is a delta and has only the tensors that differ from its base; run tenpak materialize first",
                self.path().display()
            )));
        }
        Ok(())
    }

    /// The index of the tensor with this name.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none.
    pub fn find(&self, name: &str) -> Result<usize> {
        self.header.find(name).ok_or_else(|| {
            Error::invalid(format!("{} has no tensor '{name}', see tenpak inspect", self.path().display()))
        })
    }

    /// The bytes of a plane as they are in memory, checked; a coded one is decoded.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming tensor, plane and chunk; [`Error::Io`].
    pub fn plane(&self, tensor: usize, plane: usize) -> Result<Block> {
        let bytes = self.tensors()[tensor].plain_bytes(plane);
        self.range(tensor, plane, 0, bytes)
    }

    /// The bytes of all planes of a tensor as they are in memory, checked, and with all that holds of the extra ones.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming tensor, plane and chunk; [`Error::Io`].
    pub fn planes(&self, tensor: usize) -> Result<Vec<Block>> {
        let entry = &self.tensors()[tensor];
        let mut blocks: Vec<Block> = Vec::new();
        for plane in 0..entry.planes().len() {
            let found = |kind| entry.planes()[..plane].iter().position(|place| place.plane == kind);
            let block = |at: usize| (0, &*blocks[at]);
            let columns = found(Plane::OutlierColumns).map_or((0, &[][..]), block);
            let known = found(Plane::Codes).map(|at| Known { codes: block(at), columns });
            blocks.push(self.range_by(tensor, plane, 0, entry.plain_bytes(plane), known)?);
        }
        if entry.extras() != Extras::NONE {
            let extra = slices(&blocks[entry.codec().layout.planes().len()..]);
            with_extras(entry, entry.matrix().0, &extra, |_| Ok(())).map_err(|e| self.of_file(e))?;
        }
        Ok(blocks)
    }

    /// Reads the extra planes of a tensor and checks all that holds of them.
    ///
    /// # Errors
    /// [`Error::Corrupt`] naming tensor and plane; [`Error::Io`].
    pub fn check_extras(&self, tensor: usize) -> Result<()> {
        let entry = &self.tensors()[tensor];
        let rows = entry.matrix().0;
        let parts = extra_parts(entry, 0, rows, None, |plane, start, bytes, known| {
            self.range_by(tensor, plane, start, bytes, known)
        });
        parts.and_then(|parts| with_extras(entry, rows, &slices(&parts), |_| Ok(()))).map_err(|e| self.of_file(e))
    }

    /// An error about a tensor as one of the file.
    fn of_file(&self, error: Error) -> Error {
        if let Error::Corrupt { .. } = error { error.in_file(self.path()) } else { error }
    }

    /// The attached files, by name.
    #[must_use]
    pub fn files(&self) -> &[AttachedFile] {
        self.header.files()
    }

    /// The bytes of an attached file, checked.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is none of this name; [`Error::Corrupt`] naming file and chunk; [`Error::Io`].
    pub fn read_file(&self, name: &str) -> Result<Block> {
        match self.files().iter().position(|file| &*file.name == name) {
            Some(index) => self.attached(index),
            None => Err(Error::invalid(format!("{} has no file '{name}', see tenpak inspect", self.path().display()))),
        }
    }

    /// The bytes of attached file number `index`, checked.
    pub(crate) fn attached(&self, index: usize) -> Result<Block> {
        let entry = &self.files()[index];
        let (path, offset, bytes) = self.store.attached(index, entry)?;
        let Some((chunk, what)) = bad_file(entry, &bytes) else { return Ok(bytes) };
        let at = offset + chunk.unwrap_or(0) * CHUNK;
        let remedy = match &self.store {
            Store::File(_) => "fetch or write the file again",
            Store::Directory(_) => CHANGED,
        };
        Err(Error::corrupt(at, format!("file '{}': {what}; {remedy}", entry.name)).in_file(path))
    }

    /// Where the bytes lie.
    pub(super) fn store(&self) -> &Store {
        &self.store
    }

    /// Some bytes of a plane as they are in memory, checked. Of a coded one the blocks are decoded that hold them, each
    /// time again.
    pub(crate) fn range(&self, tensor: usize, plane: usize, start: u64, bytes: u64) -> Result<Block> {
        self.range_by(tensor, plane, start, bytes, None)
    }

    /// The same, where something of what the plane leans on may be known.
    fn range_by(&self, tensor: usize, plane: usize, start: u64, bytes: u64, known: Option<Known<'_>>) -> Result<Block> {
        let entry = &self.tensors()[tensor];
        let place = &entry.planes()[plane];
        if place.coding.is_none() {
            return self.stored(tensor, plane, start, bytes);
        }
        let read = |plane: usize, start: u64, bytes: u64| self.stored(tensor, plane, start, bytes);
        let part =
            coded::range(entry, plane, start, bytes, known, &read).map_err(|e| self.in_plane(tensor, plane, e))?;
        match bad_content(entry, place.plane, start, &part) {
            Some(what) => Err(self.in_plane(tensor, plane, Error::corrupt(0, what))),
            None => Ok(Block::Owned(part)),
        }
    }

    /// The digest of a coded plane as it is in memory.
    pub(super) fn digest(&self, tensor: usize, plane: usize) -> Result<Identity> {
        let entry = &self.tensors()[tensor];
        let read = |plane: usize, start: u64, bytes: u64| self.stored(tensor, plane, start, bytes);
        coded::digest(entry, plane, &read, |_, _| Ok(())).map_err(|e| self.in_plane(tensor, plane, e))
    }

    /// The error of a stream as one of the file.
    fn in_plane(&self, tensor: usize, plane: usize, error: Error) -> Error {
        let Error::Corrupt { at, what } = error else { return error };
        let entry = &self.tensors()[tensor];
        let (name, kind) = (entry.info().name(), entry.planes()[plane].plane.name());
        let (file, offset) = self.store.plane(&self.header, tensor, plane);
        let what = format!("tensor '{name}', plane {kind}: {what}; fetch or write the file again");
        Error::corrupt(offset + at, what).in_file(file.path())
    }

    /// Some bytes of a plane as they are in the file, checked.
    pub(crate) fn stored(&self, tensor: usize, plane: usize, start: u64, bytes: u64) -> Result<Block> {
        let len = usize::try_from(bytes).map_err(|_| Error::invalid("the plane is larger than memory"))?;
        let (file, offset) = self.store.plane(&self.header, tensor, plane);
        let end = start + bytes;
        let place = &self.tensors()[tensor].planes()[plane];
        let unseen: Vec<(u64, Range<u64>)> = (start / CHUNK..end.div_ceil(CHUNK))
            .filter(|&chunk| bytes > 0 && !self.is_sound(tensor, plane, chunk))
            .map(|chunk| (chunk, chunk * CHUNK..place.bytes.min((chunk + 1) * CHUNK)))
            .collect();
        let whole = |range: &Range<u64>| {
            file.read(offset + range.start, usize::try_from(range.end - range.start).expect("at most a chunk"))
        };
        if file.access() == Access::Map {
            for (chunk, range) in unseen {
                self.check(tensor, plane, chunk, &whole(&range)?)?;
            }
            return file.read(offset + start, len);
        }
        let mut block = file.read(offset + start, len)?;
        let Block::Owned(out) = &mut block else { unreachable!("it is read, not mapped") };
        let index = |at: u64| usize::try_from(at - start).expect("inside the range");
        // Chunks that are wanted as a whole are checked where they are; of others what was checked is taken.
        for (chunk, range) in unseen {
            if start <= range.start && range.end <= end {
                self.check(tensor, plane, chunk, &out[index(range.start)..index(range.end)])?;
                continue;
            }
            let checked = whole(&range)?;
            self.check(tensor, plane, chunk, &checked)?;
            let (from, until) = (range.start.max(start), range.end.min(end));
            let of_chunk = |at: u64| usize::try_from(at - range.start).expect("at most a chunk");
            out[index(from)..index(until)].copy_from_slice(&checked[of_chunk(from)..of_chunk(until)]);
        }
        Ok(block)
    }

    /// The number of a chunk among all.
    fn bit(&self, tensor: usize, plane: usize, chunk: u64) -> usize {
        let before: usize = self.tensors()[tensor].planes()[..plane].iter().map(|p| p.crc32c.len()).sum();
        self.first_chunk[tensor] + before + usize::try_from(chunk).expect("chunks were counted at opening")
    }

    /// Whether this handle has found a chunk sound.
    fn is_sound(&self, tensor: usize, plane: usize, chunk: u64) -> bool {
        let bit = self.bit(tensor, plane, chunk);
        self.sound[bit / 8].load(Ordering::Relaxed) & (1 << (bit % 8)) != 0
    }

    /// Checks the bytes of one chunk, and remembers that it is sound.
    fn check(&self, tensor: usize, plane: usize, chunk: u64, bytes: &[u8]) -> Result<()> {
        let entry = &self.tensors()[tensor];
        let place = &entry.planes()[plane];
        let start = chunk * CHUNK;
        let index = usize::try_from(chunk).expect("chunks were counted at opening");
        let (found, expected) = (crc32c::crc32c(bytes), place.crc32c[index]);
        let wrong = if found == expected {
            // Of a coded plane that is seen when it is decoded.
            if place.coding.is_some() { None } else { bad_content(entry, place.plane, start, bytes) }
        } else {
            Some(format!("checksum is {found:08x}, expected {expected:08x}"))
        };
        if let Some(what) = wrong {
            let (name, kind) = (entry.info().name(), place.plane.name());
            let (file, offset) = self.store.plane(&self.header, tensor, plane);
            let what = format!("tensor '{name}', plane {kind}, chunk {chunk}: {what}; fetch or write the file again");
            return Err(Error::corrupt(offset + start, what).in_file(file.path()));
        }
        let bit = self.bit(tensor, plane, chunk);
        self.sound[bit / 8].fetch_or(1 << (bit % 8), Ordering::Relaxed);
        Ok(())
    }

    /// Rows of a tensor as f32, in parallel; `out` holds whole rows of the stored matrix.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when a chunk is damaged, [`Error::Io`].
    ///
    /// # Panics
    /// When the rows are not rows of the tensor: a bug of the caller.
    pub fn decode_rows(&self, tensor: usize, first_row: u64, out: &mut [f32]) -> Result<()> {
        decode_rows(&self.tensors()[tensor], first_row, out, |plane, start, bytes, known| {
            self.range_by(tensor, plane, start, bytes, known)
        })
        .map_err(|e| self.of_file(e))
    }
}

/// What of an attached file is not as its entry says: the chunk, where it is one, and what.
pub(super) fn bad_file(entry: &AttachedFile, bytes: &[u8]) -> Option<(Option<u64>, String)> {
    let chunks = bytes.chunks(usize::try_from(CHUNK).expect("a chunk is small"));
    for (chunk, (bytes, &expected)) in (0..).zip(chunks.zip(&entry.crc32c)) {
        let found = crc32c::crc32c(bytes);
        if found != expected {
            return Some((Some(chunk), format!("checksum is {found:08x}, expected {expected:08x}")));
        }
    }
    let digest = Identity::from(blake3::hash(bytes));
    (digest != entry.blake3).then(|| (None, format!("digest is {digest}, expected {}", entry.blake3)))
}

/// Decodes rows of a tensor, given a way to read `bytes` bytes of a plane from `start` on, with what is known of others.
pub(crate) fn decode_rows<B: Deref<Target = [u8]>>(
    entry: &Entry,
    first_row: u64,
    out: &mut [f32],
    read: impl Fn(usize, u64, u64, Option<Known<'_>>) -> Result<B>,
) -> Result<()> {
    let (rows, cols) = entry.matrix();
    let cols = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
    if out.is_empty() {
        return Ok(());
    }
    let count = (out.len() / cols) as u64;
    assert!(out.len().is_multiple_of(cols) && first_row + count <= rows, "not rows of the tensor");
    let dtype = entry.info().dtype();
    let layout = &entry.codec().layout;
    let part = |(plane, &kind)| {
        let stride = layout.stride(kind, dtype, cols) as u64;
        read(plane, first_row * stride, count * stride, None)
    };
    let parts: Vec<B> = layout.planes().iter().enumerate().map(part).collect::<Result<_>>()?;
    match layout {
        Layout::Raw => tensor::to_f32(dtype, &parts[0], out),
        Layout::Grouped(layout) => {
            let own = slices(&parts);
            let codes = entry.codec().layout.planes().iter().position(|&kind| kind == Plane::Codes);
            let first = usize::try_from(first_row).map_err(|_| Error::invalid("the matrix is larger than memory"))?;
            let known = codes.map(|at| Known { codes: (first, own[at]), columns: (0, &[]) });
            let extra = extra_parts(entry, first_row, count, known, read)?;
            with_extras(entry, count, &slices(&extra), |extra| {
                codec::decode_matrix(layout, &Planes::new(layout, &own), extra, cols, out)
            })?;
        }
    }
    Ok(())
}

fn slices<B: Deref<Target = [u8]>>(parts: &[B]) -> Vec<&[u8]> {
    parts.iter().map(|part| &**part).collect()
}

/// The extra planes of `count` rows from `first` on; what counts say must be seen as a whole.
fn extra_parts<B: Deref<Target = [u8]>>(
    entry: &Entry,
    first: u64,
    count: u64,
    known: Option<Known<'_>>,
    read: impl Fn(usize, u64, u64, Option<Known<'_>>) -> Result<B>,
) -> Result<Vec<Vec<u8>>> {
    if entry.extras() == Extras::NONE {
        return Ok(Vec::new());
    }
    let (rows, cols) = entry.matrix();
    let own = entry.codec().layout.planes().len();
    let mut skipped = 0;
    let mut taken = 0;
    let mut parts = Vec::new();
    for (plane, place) in entry.planes().iter().enumerate().skip(own) {
        let width = entry.extras().elements(place.plane, rows, cols).map_or(1, |(dtype, _)| dtype.size());
        let whole = || read(plane, 0, entry.plain_bytes(plane), None);
        parts.push(match place.plane {
            Plane::ColumnScales => whole()?.to_vec(),
            Plane::OutlierCounts => {
                let counts = whole()?;
                let number = |bytes: &[u8; 4]| u64::from(u32::from_le_bytes(*bytes));
                let sum = |counts: &[u8]| counts.as_chunks::<4>().0.iter().map(number).sum::<u64>();
                let [from, until] =
                    [first, first + count].map(|row| usize::try_from(4 * row).expect("a part of what was just read"));
                (skipped, taken) = (sum(&counts[..from]), sum(&counts[from..until]));
                if skipped + taken + sum(&counts[until..]) != entry.extras().outliers {
                    return Err(wrong(entry, "counts do not add up to the number of outliers"));
                }
                counts[from..until].to_vec()
            }
            _ => {
                // Values come right behind their columns.
                let columns = parts.last().map_or(&[][..], Vec::as_slice);
                let first = usize::try_from(skipped).map_err(|_| Error::invalid("the matrix is larger than memory"))?;
                let known = known.map(|known| match place.plane {
                    Plane::OutlierValues => Known { columns: (first, columns), ..known },
                    _ => known,
                });
                read(plane, skipped * width, taken * width, known)?.to_vec()
            }
        });
    }
    Ok(parts)
}

/// Gives the extra planes of `count` rows to `work`, once all that holds of them was found to hold.
fn with_extras(
    entry: &Entry,
    count: u64,
    parts: &[&[u8]],
    work: impl FnOnce(&ExtraPlanes<'_>) -> Result<()>,
) -> Result<()> {
    let size = |n: u64| usize::try_from(n).map_err(|_| Error::invalid("the matrix is larger than memory"));
    let (rows, cols) = (size(count)?, size(entry.matrix().1)?);
    let extra = ExtraPlanes::new(parts, rows, cols).and_then(|extra| extra.check().map(|()| extra));
    work(&extra.map_err(|e| wrong(entry, &e.to_string()))?)
}

/// The error of extra planes that break a rule.
fn wrong(entry: &Entry, what: &str) -> Error {
    let at = entry.planes().get(entry.codec().layout.planes().len()).map_or(0, |place| place.offset);
    Error::corrupt(at, format!("tensor '{}': {what}; fetch or write the file again", entry.info().name()))
}
