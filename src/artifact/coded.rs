//! Coded planes: shorter on disk than in memory, and the same bytes once they are read.
//!
//! How a plane lies on disk is a matter of the plane and not of the codec: whoever reads it gets the bytes that the
//! layout describes, so kernels and decoders know nothing of codings. Digests are of those bytes too, so that what
//! an artifact *is* does not depend on how it is stored.

use std::ops::Range;

use rayon::prelude::*;

use super::entry::Entry;
use super::identity::Identity;
use super::outliers;
#[cfg(feature = "python")]
use crate::codec::{Codec, extra::Extras};
use crate::coding::{self, ByteStream, Stream, words};
use crate::error::{Error, Result, try_zeroed};
use crate::file::Block;
use crate::layout::{Float, Layout, Plane, ROW};
use crate::tensor::DType;
#[cfg(feature = "python")]
use crate::tensor::TensorInfo;

/// How a plane lies on disk, where it is not stored as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// Rows of 8-bit codes, close to their entropy; see [`mod@crate::coding`].
    Rows,
    /// The same where much was clipped to the last codes.
    Clipped,
    /// F32 scales of rows, of which many are equal.
    Scales,
    /// Any bytes, close to the entropy of each.
    Bytes,
    /// The words of a raw tensor, as what they differ from those of the base; only in a delta of a checkpoint, and the one
    /// coding that a plane cannot be read from without something else. See [`mod@crate::coding::words`].
    Words,
    /// How many outliers rows have.
    Counts,
    /// Columns of outliers among the codes at the ends; see [`crate::coding::ends`].
    Columns,
    /// Values of outliers in whole steps beyond their codes; see [`crate::coding::tail`].
    Tails,
}

/// Bytes of scales that are all equal.
const EQUAL_SCALES: u64 = 5;

impl Coding {
    /// Every coding, with its id.
    pub const ALL: &[(&'static str, Self)] = &[
        ("rows_v1", Self::Rows),
        ("rows_v2", Self::Clipped),
        ("scales_v1", Self::Scales),
        ("bytes_v1", Self::Bytes),
        ("words_v1", Self::Words),
        ("counts_v1", Self::Counts),
        ("columns_v1", Self::Columns),
        ("tails_v1", Self::Tails),
    ];

    /// The id in files.
    #[must_use]
    pub fn id(self) -> &'static str {
        Self::ALL.iter().find(|(_, coding)| *coding == self).map_or("", |(id, _)| id)
    }

    /// The coding of an id.
    ///
    /// # Errors
    /// [`Error::Unsupported`] when this build does not know it.
    pub fn get(id: &str) -> Result<Self> {
        Self::ALL.iter().find(|(known, _)| *known == id).map(|(_, coding)| *coding).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|(id, _)| *id).collect();
            Error::unsupported(format!(
                "unknown coding '{id}' of a plane, this build of tenpak {} knows {}; upgrade",
                env!("CARGO_PKG_VERSION"),
                known.join(", ")
            ))
        })
    }

    /// Whether a plane of this kind may have it, of a tensor of a dtype.
    #[must_use]
    pub fn takes(self, layout: &Layout, plane: Plane, dtype: DType) -> bool {
        let kind = match self {
            Self::Clipped => return Self::Rows.takes(layout, plane, dtype),
            Self::Words => return *layout == Layout::Raw && plane == Plane::Data && words::is_width(dtype.size()),
            Self::Counts => Plane::OutlierCounts,
            Self::Columns => Plane::OutlierColumns,
            Self::Tails => Plane::OutlierValues,
            _ => return Self::of(layout, plane) == Some(self),
        };
        // Steps are those of a row, and codes are compared with their ends.
        let of_rows = |coding: Self, plane| Self::of(layout, plane) == Some(coding);
        plane == kind && of_rows(Self::Rows, Plane::Codes) && of_rows(Self::Scales, Plane::Scales)
    }

    /// The coding of a stream of rows of codes.
    pub(crate) fn of_rows(stream: &[u8]) -> Self {
        if coding::has_ends(stream) { Self::Clipped } else { Self::Rows }
    }

    /// Whether a plane is decoded with the help of others.
    fn leans(self) -> bool {
        matches!(self, Self::Columns | Self::Tails)
    }

    /// The coding that planes of this kind take by themselves.
    #[must_use]
    pub fn of(layout: &Layout, plane: Plane) -> Option<Self> {
        match (layout, plane) {
            // Their coding depends on how they were chosen.
            (_, Plane::ColumnScales | Plane::OutlierCounts | Plane::OutlierColumns | Plane::OutlierValues) => None,
            (Layout::Grouped(g), Plane::Codes) if g.bits() == 8 => Some(Self::Rows),
            (Layout::Grouped(g), Plane::Scales) if g.group() == ROW && g.scale() == Float::F32 => Some(Self::Scales),
            (Layout::Grouped(_), _) => Some(Self::Bytes),
            // A raw tensor is the source's own, for whoever wants to map it.
            (Layout::Raw, _) => None,
        }
    }

    /// Checks the length of a coded plane, given what it has in memory.
    pub(super) fn check(self, plain: u64, bytes: u64) -> Result<(), String> {
        if bytes >= plain {
            return Err(format!("{bytes} coded bytes of a plane of {plain}, expected fewer"));
        }
        // Scales are few beside the codes, whose length bounds the rows.
        if self != Self::Scales && !coding::is_worth(plain, bytes) {
            return Err(format!("{bytes} coded bytes of a plane of {plain}, expected more"));
        }
        Ok(())
    }
}

/// Gives the planes of an entry the coded lengths that its rate asks for, as far as streams can have them.
pub(super) fn plan(entry: &mut Entry) -> Result<()> {
    let Some(rate) = entry.rate() else { return Ok(()) };
    let mut left = rate.bytes(entry.info().elements());
    for plane in (0..entry.planes().len()).rev() {
        let Some(coding) = Coding::of(&entry.codec().layout, entry.planes()[plane].plane) else { continue };
        let bytes = if coding == Coding::Scales { EQUAL_SCALES } else { left };
        if coding.check(entry.plain_bytes(plane), bytes).is_ok() {
            entry.set_coding(plane, coding, bytes)?;
            left = left.saturating_sub(bytes);
        }
    }
    Ok(())
}

/// The stream of a plane of an entry, in the coding that such planes take; none where that does not save a
/// sixty-fourth of it, which is what makes a plane worth decoding instead of mapping.
///
/// # Errors
/// [`Error::Invalid`] when a row is too long for the coder.
pub(super) fn stream(entry: &Entry, plane: usize, plain: &[u8]) -> Result<Option<(Coding, Vec<u8>)>> {
    let kind = entry.planes()[plane].plane;
    let layout = &entry.codec().layout;
    let (Some(coding), Layout::Grouped(grouped), false) = (Coding::of(layout, kind), layout, plain.is_empty()) else {
        return Ok(None);
    };
    let too_large = |_| Error::invalid("the plane is larger than memory");
    let cols = usize::try_from(entry.matrix().1).map_err(too_large)?;
    let stride = layout.stride(kind, entry.info().dtype(), cols);
    let stream = match coding {
        Coding::Rows => {
            let codes: Vec<u8> = plain.chunks_exact(stride).flat_map(|row| &row[..cols]).copied().collect();
            // Code 0 is no level that an encoder of this project chooses, but others may.
            match coding::encode(&codes, codes.len() / cols, cols) {
                Err(Error::Invalid(_)) => return Ok(None),
                stream => stream?,
            }
        }
        // None that a plane takes by itself.
        Coding::Clipped | Coding::Counts | Coding::Columns | Coding::Tails => return Ok(None),
        Coding::Scales => {
            let scales: Vec<f32> = (0..plain.len() / 4).map(|i| Float::F32.load(plain, i)).collect();
            coding::encode_scales(&scales)
        }
        Coding::Bytes => coding::encode_bytes(plain, stride, grouped.element(kind)),
        Coding::Words => unreachable!("no layout takes it by itself"),
    };
    let coding = if coding == Coding::Rows { Coding::of_rows(&stream) } else { coding };
    Ok((stream.len() <= plain.len() - plain.len() / 64).then_some((coding, stream)))
}

/// A coded plane of an entry, open for reading.
pub(super) struct Coded<'a> {
    stream: Inner<'a>,
    rows: usize,
    cols: usize,
    stride: usize,
}

enum Inner<'a> {
    Rows(Stream<'a>),
    Whole(Vec<u8>),
    Bytes(ByteStream<'a>),
}

impl<'a> Coded<'a> {
    /// Opens the stream of a plane.
    ///
    /// # Errors
    /// [`Error::Corrupt`], with the byte of the stream, when it is not that of a plane of this matrix.
    pub fn open(entry: &Entry, plane: usize, stored: &'a [u8]) -> Result<Self> {
        let too_large = |_| Error::invalid("the plane is larger than memory");
        let (rows, cols) = entry.matrix();
        let (rows, cols) = (usize::try_from(rows).map_err(too_large)?, usize::try_from(cols).map_err(too_large)?);
        let place = &entry.planes()[plane];
        let coding = place.coding.ok_or_else(|| Error::invalid("the plane is not coded"))?;
        let stride = match coding {
            Coding::Counts => 4,
            _ => entry.codec().layout.stride(place.plane, entry.info().dtype(), cols),
        };
        Self::of(coding, [rows, cols, stride], stored)
    }

    /// The same for a plane of a matrix, given its rows, its columns and the bytes of a row of the plane.
    fn of(coding: Coding, [rows, cols, stride]: [usize; 3], stored: &'a [u8]) -> Result<Self> {
        let stream = match coding {
            Coding::Rows | Coding::Clipped => {
                let stream = Stream::open(stored, rows, cols)?;
                if stream.blocks() > 0 && stream.ends() != (coding == Coding::Clipped) {
                    return Err(Error::corrupt(7, format!("a stream that is not one of {}", coding.id())));
                }
                Inner::Rows(stream)
            }
            Coding::Counts => {
                let counts = coding::ends::decode_counts(stored, rows)?;
                Inner::Whole(counts.iter().flat_map(|count| count.to_le_bytes()).collect())
            }
            Coding::Columns | Coding::Tails => return Err(Error::invalid("a plane that is decoded with others")),
            Coding::Bytes => Inner::Bytes(ByteStream::open(stored, rows, stride)?),
            Coding::Scales => {
                let scales = coding::decode_scales(stored, rows * stride / 4)?;
                let mut bytes = try_zeroed(rows * stride, || "a plane of scales".to_owned())?;
                scales.iter().enumerate().for_each(|(i, &scale)| Float::F32.store(&mut bytes, i, scale));
                Inner::Whole(bytes)
            }
            Coding::Words => {
                let what =
                    "the plane holds what it differs in from the base of the delta; run tenpak materialize first";
                return Err(Error::invalid(what));
            }
        };
        Ok(Self { stream, rows, cols, stride })
    }

    /// The bytes of the plane in pieces, each of whole rows, from the one that holds row `first` on; `take` is given the
    /// first byte of each piece, and says whether to go on.
    pub fn pieces(&self, first: usize, mut take: impl FnMut(usize, &[u8]) -> Result<bool>) -> Result<()> {
        let (blocks, per_block) = match &self.stream {
            Inner::Whole(bytes) => return take(0, bytes).map(drop),
            Inner::Rows(stream) => (stream.blocks(), if stream.blocks() > 0 { stream.rows(0).len() } else { 1 }),
            Inner::Bytes(stream) => (stream.blocks(), if stream.blocks() > 0 { stream.rows(0).len() } else { 1 }),
        };
        let together = rayon::current_num_threads();
        let mut block = first / per_block;
        let mut buffer = Vec::new();
        while block < blocks {
            let last = (block + together).min(blocks);
            let (start, end) = (block * per_block, (last * per_block).min(self.rows));
            if buffer.len() != (end - start) * self.stride {
                buffer = try_zeroed((end - start) * self.stride, || "rows of a coded plane".to_owned())?;
            }
            let parts = buffer.par_chunks_mut(per_block * self.stride).enumerate();
            parts.map(|(i, out)| self.decode(block + i, out)).collect::<Result<()>>()?;
            if !take(start * self.stride, &buffer)? {
                return Ok(());
            }
            block = last;
        }
        Ok(())
    }

    /// Decodes a block into rows of the plane.
    fn decode(&self, block: usize, out: &mut [u8]) -> Result<()> {
        match &self.stream {
            Inner::Whole(_) => Ok(()),
            Inner::Bytes(stream) => stream.decode_block(block, out),
            Inner::Rows(stream) if self.stride == self.cols => stream.decode_block(block, out),
            Inner::Rows(stream) => {
                let rows = out.len() / self.stride;
                let mut codes = try_zeroed(rows * self.cols, || "rows of a coded plane".to_owned())?;
                stream.decode_block(block, &mut codes)?;
                for (row, codes) in out.chunks_exact_mut(self.stride).zip(codes.chunks_exact(self.cols)) {
                    row[..self.cols].copy_from_slice(codes);
                }
                Ok(())
            }
        }
    }

    /// The rows of one block of codes.
    pub fn block(&self, block: usize) -> Result<Vec<u8>> {
        let Inner::Rows(stream) = &self.stream else { return Err(Error::invalid("a plane that is not one of codes")) };
        let mut out = try_zeroed(stream.rows(block).len() * self.stride, || "a block of codes".to_owned())?;
        self.decode(block, &mut out)?;
        Ok(out)
    }

    /// A range of the plane.
    pub fn range(&self, range: Range<usize>) -> Result<Vec<u8>> {
        let mut out = try_zeroed(range.len(), || "a part of a coded plane".to_owned())?;
        if range.is_empty() {
            return Ok(out);
        }
        assert!(range.end <= self.rows * self.stride, "beyond the plane");
        self.pieces(range.start / self.stride.max(1), |at, piece| {
            let (from, until) = (range.start.max(at), range.end.min(at + piece.len()));
            if from < until {
                out[from - range.start..until - range.start].copy_from_slice(&piece[from - at..until - at]);
            }
            Ok(at + piece.len() < range.end)
        })?;
        Ok(out)
    }
}

/// Reads bytes of a plane of an entry as they are in the file: plane, first byte, number of bytes.
pub(super) type Read<'a> = dyn Fn(usize, u64, u64) -> Result<Block> + 'a;

/// Parts of planes as they are in memory, which were read already: those that others lean on.
#[derive(Clone, Copy)]
pub(crate) struct Known<'a> {
    /// Rows of codes, and the first of them.
    pub codes: (usize, &'a [u8]),
    /// Columns of outliers, and the first of them; none where they are not known yet.
    pub columns: (usize, &'a [u8]),
}

/// Some elements of `width` bytes of a part of a plane that begins with element `first`, where the part has all of them.
pub(super) fn part_of<'a>((first, part): (usize, &'a [u8]), elements: &Range<usize>, width: usize) -> Option<&'a [u8]> {
    let start = elements.start.checked_sub(first)?;
    part.get(start * width..(start + elements.len()) * width)
}

/// Rows in a block of codes.
pub(super) fn rows_per_block(cols: usize) -> usize {
    coding::head::rows_per_block(cols)
}

/// The digest of a coded plane.
///
/// # Errors
/// Those of [`range`], and whatever `look` returns: it is given every piece.
pub(super) fn digest(
    entry: &Entry,
    plane: usize,
    read: &Read<'_>,
    mut look: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<Identity> {
    let mut hasher = blake3::Hasher::new();
    let place = &entry.planes()[plane];
    let mut take = |at: usize, piece: &[u8]| {
        hasher.update_rayon(piece);
        look(at, piece)
    };
    if place.coding.is_some_and(Coding::leans) {
        outliers::pieces(entry, plane, 0..usize::MAX, None, read, |first, piece| {
            take(first * width(entry, plane), piece)
        })?;
    } else {
        let stored = read(plane, 0, place.bytes)?;
        Coded::open(entry, plane, &stored)?.pieces(0, |at, piece| take(at, piece).map(|()| true))?;
    }
    Ok(hasher.finalize().into())
}

/// Bytes of an element of a plane of outliers.
pub(super) fn width(entry: &Entry, plane: usize) -> usize {
    let (rows, cols) = entry.matrix();
    let elements = entry.extras().elements(entry.planes()[plane].plane, rows, cols);
    elements.map_or(1, |(dtype, _)| usize::try_from(dtype.size()).expect("at most 8"))
}

/// The bytes of a part of a plane as they are in memory; what is `known` is not decoded for it again.
///
/// # Errors
/// [`Error::Corrupt`], with the byte of the stream, when it is not that of a plane of this matrix; those of `read`.
pub(super) fn range(
    entry: &Entry,
    plane: usize,
    start: u64,
    bytes: u64,
    known: Option<Known<'_>>,
    read: &Read<'_>,
) -> Result<Vec<u8>> {
    let place = &entry.planes()[plane];
    let Some(coding) = place.coding else { return read(plane, start, bytes).map(|block| block.to_vec()) };
    let too_large = |_| Error::invalid("the plane is larger than memory");
    let start = usize::try_from(start).map_err(too_large)?;
    let bytes = usize::try_from(bytes).map_err(too_large)?;
    if !coding.leans() {
        let stored = read(plane, 0, place.bytes)?;
        return Coded::open(entry, plane, &stored)?.range(start..start + bytes);
    }
    let width = width(entry, plane);
    let mut out = try_zeroed(bytes, || "a part of a coded plane".to_owned())?;
    let end = start + bytes;
    outliers::pieces(entry, plane, start / width..end.div_ceil(width), known, read, |first, piece| {
        let at = first * width;
        let (from, until) = (start.max(at), end.min(at + piece.len()));
        if from < until {
            out[from - start..until - start].copy_from_slice(&piece[from - at..until - at]);
        }
        Ok(())
    })?;
    Ok(out)
}

/// A plane of a matrix in a codec, given all of its stream.
///
/// # Errors
/// [`Error::Invalid`] when planes of this kind are not coded, those of [`Coded::open`].
#[cfg(feature = "python")]
pub(crate) fn decode(codec: &Codec, plane: &str, rows: usize, cols: usize, stored: &[u8]) -> Result<Vec<u8>> {
    let kind = codec.layout.planes().iter().copied().find(|kind| kind.name() == plane);
    let of = |kind| match Coding::of(&codec.layout, kind)? {
        Coding::Rows => Some(Coding::of_rows(stored)),
        coding => Some(coding),
    };
    let Some((kind, coding)) = kind.and_then(|kind| Some((kind, of(kind)?))) else {
        return Err(Error::invalid(format!("codec {} has no coded plane '{}'", codec.id, plane.escape_debug())));
    };
    let (_, bytes) = *codec
        .layout
        .plane_bytes(DType::F32, rows as u64, cols as u64)?
        .iter()
        .find(|(found, _)| *found == kind)
        .ok_or_else(|| Error::invalid("the codec has no such plane"))?;
    coding.check(bytes, stored.len() as u64).map_err(|what| Error::corrupt(0, format!("plane {plane}: {what}")))?;
    let bytes = usize::try_from(bytes).map_err(|_| Error::invalid("the plane is larger than memory"))?;
    let stride = codec.layout.stride(kind, DType::F32, cols);
    Coded::of(coding, [rows, cols, stride], stored)?.range(0..bytes)
}

/// A plane of outliers of a matrix in a codec, given all planes as they are stored: name, coding, bytes.
///
/// # Errors
/// [`Error::Invalid`] when planes are missing or have another length, those of [`range`].
#[cfg(feature = "python")]
pub(crate) fn decode_outliers(
    codec: &'static Codec,
    plane: &str,
    [rows, cols, outliers]: [u64; 3],
    planes: &[(&str, Option<&str>, &[u8])],
) -> Result<Vec<u8>> {
    let info = TensorInfo::new("matrix".to_owned(), DType::F32, vec![rows, cols])?;
    let column_scales = planes.iter().any(|(name, ..)| *name == Plane::ColumnScales.name());
    let mut entry = Entry::unplaced(info, codec, false)?.with_extras(Extras { column_scales, outliers })?;
    let mut found = Vec::new();
    for index in 0..entry.planes().len() {
        let kind = entry.planes()[index].plane.name();
        let Some((_, coding, bytes)) = planes.iter().find(|(name, ..)| *name == kind) else {
            return Err(Error::invalid(format!("plane {kind} is missing")));
        };
        match coding {
            Some(coding) => entry.set_coding(index, Coding::get(coding)?, bytes.len() as u64)?,
            None if entry.planes()[index].bytes == bytes.len() as u64 => {}
            None => return Err(Error::invalid(format!("plane {kind} has {} bytes", bytes.len()))),
        }
        found.push(*bytes);
    }
    let Some(index) = entry.planes().iter().position(|place| place.plane.name() == plane) else {
        return Err(Error::invalid(format!("there is no plane '{}'", plane.escape_debug())));
    };
    let too_large = |_| Error::invalid("the plane is larger than memory");
    range(&entry, index, 0, entry.plain_bytes(index), None, &|plane, start, bytes| {
        let start = usize::try_from(start).map_err(too_large)?;
        Ok(Block::Owned(found[plane][start..start + usize::try_from(bytes).map_err(too_large)?].to_vec()))
    })
}
