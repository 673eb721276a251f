//! Coded planes: shorter on disk than in memory, and the same bytes once they are read.
//!
//! How a plane lies on disk is a matter of the plane and not of the codec: whoever reads it gets the bytes that the
//! layout describes, so kernels and decoders know nothing of codings. Digests are of those bytes too, so that what
//! an artifact *is* does not depend on how it is stored.

use std::ops::{Deref, Range};

use rayon::prelude::*;

use super::entry::Entry;
use super::identity::Identity;
#[cfg(feature = "python")]
use crate::codec::Codec;
use crate::coding::{self, ByteStream, Stream, words};
use crate::error::{Error, Result, try_zeroed};
use crate::layout::{Float, Layout, Plane, ROW};
use crate::tensor::DType;

/// How a plane lies on disk, where it is not stored as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coding {
    /// Rows of 8-bit codes, close to their entropy; see [`mod@crate::coding`].
    Rows,
    /// F32 scales of rows, of which many are equal.
    Scales,
    /// Any bytes, close to the entropy of each.
    Bytes,
    /// The words of a raw tensor, as what they differ from those of the base; only in a delta of a checkpoint, and the one
    /// coding that a plane cannot be read from without something else. See [`mod@crate::coding::words`].
    Words,
}

/// A plane is at most so many times as long as its stream, so that a short file cannot ask for memory without end: no
/// code takes less than a thousandth of a bit.
pub(super) const EXPANSION: u64 = 1 << 14;

/// Bytes of scales that are all equal.
const EQUAL_SCALES: u64 = 5;

impl Coding {
    /// Every coding, with its id.
    pub const ALL: &[(&'static str, Self)] =
        &[("rows_v1", Self::Rows), ("scales_v1", Self::Scales), ("bytes_v1", Self::Bytes), ("words_v1", Self::Words)];

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

    /// The coding that planes of this kind take.
    #[must_use]
    pub fn of(layout: &Layout, plane: Plane) -> Option<Self> {
        match (layout, plane) {
            // Few bytes, and not in rows.
            (_, Plane::ColumnScales | Plane::OutlierCounts | Plane::OutlierColumns | Plane::OutlierValues) => None,
            (Layout::Grouped(g), Plane::Codes) if g.bits() == 8 => Some(Self::Rows),
            (Layout::Grouped(g), Plane::Scales) if g.group() == ROW && g.scale() == Float::F32 => Some(Self::Scales),
            (Layout::Grouped(_), _) => Some(Self::Bytes),
            // A raw tensor is the source's own, for whoever wants to map it.
            (Layout::Raw, _) => None,
        }
    }

    /// Whether a plane of this kind may lie in this coding.
    pub(super) fn fits(self, layout: &Layout, plane: Plane, dtype: DType) -> bool {
        match self {
            Self::Words => *layout == Layout::Raw && plane == Plane::Data && words::is_width(dtype.size()),
            _ => Self::of(layout, plane) == Some(self),
        }
    }

    /// Checks the length of a coded plane, given what it has in memory.
    pub(super) fn check(self, plain: u64, bytes: u64) -> Result<(), String> {
        if bytes >= plain {
            return Err(format!("{bytes} coded bytes of a plane of {plain}, expected fewer"));
        }
        // Scales are few beside the codes, whose length bounds the rows.
        if self != Self::Scales && plain / EXPANSION > bytes {
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
        Coding::Scales => {
            let scales: Vec<f32> = (0..plain.len() / 4).map(|i| Float::F32.load(plain, i)).collect();
            coding::encode_scales(&scales)
        }
        Coding::Bytes => coding::encode_bytes(plain, stride, grouped.element(kind)),
        Coding::Words => unreachable!("no layout takes it by itself"),
    };
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
    Scales(Vec<u8>),
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
        let stride = entry.codec().layout.stride(place.plane, entry.info().dtype(), cols);
        Self::of(coding, [rows, cols, stride], stored)
    }

    /// The same for a plane of a matrix, given its rows, its columns and the bytes of a row of the plane.
    fn of(coding: Coding, [rows, cols, stride]: [usize; 3], stored: &'a [u8]) -> Result<Self> {
        let stream = match coding {
            Coding::Rows => Inner::Rows(Stream::open(stored, rows, cols)?),
            Coding::Bytes => Inner::Bytes(ByteStream::open(stored, rows, stride)?),
            Coding::Scales => {
                let scales = coding::decode_scales(stored, rows * stride / 4)?;
                let mut bytes = try_zeroed(rows * stride, || "a plane of scales".to_owned())?;
                scales.iter().enumerate().for_each(|(i, &scale)| Float::F32.store(&mut bytes, i, scale));
                Inner::Scales(bytes)
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
            Inner::Scales(bytes) => return take(0, bytes).map(drop),
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
            Inner::Scales(_) => Ok(()),
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

/// The digest of a coded plane, given all of its stream.
///
/// # Errors
/// Those of [`Coded::open`], and whatever `look` returns: it is given every piece.
pub(super) fn digest(
    entry: &Entry,
    plane: usize,
    stored: &[u8],
    mut look: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<Identity> {
    let mut hasher = blake3::Hasher::new();
    Coded::open(entry, plane, stored)?.pieces(0, |at, piece| {
        hasher.update_rayon(piece);
        look(at, piece).map(|()| true)
    })?;
    Ok(hasher.finalize().into())
}

/// The bytes of a part of a coded plane, given all of its stream.
///
/// # Errors
/// Those of [`Coded::open`].
pub(super) fn range(
    entry: &Entry,
    plane: usize,
    stored: impl Deref<Target = [u8]>,
    start: u64,
    bytes: u64,
) -> Result<Vec<u8>> {
    let too_large = |_| Error::invalid("the plane is larger than memory");
    let start = usize::try_from(start).map_err(too_large)?;
    let bytes = usize::try_from(bytes).map_err(too_large)?;
    Coded::open(entry, plane, &stored)?.range(start..start + bytes)
}

/// A plane of a matrix in a codec, given all of its stream.
///
/// # Errors
/// [`Error::Invalid`] when planes of this kind are not coded, those of [`Coded::open`].
#[cfg(feature = "python")]
pub(crate) fn decode(codec: &Codec, plane: &str, rows: usize, cols: usize, stored: &[u8]) -> Result<Vec<u8>> {
    let kind = codec.layout.planes().iter().copied().find(|kind| kind.name() == plane);
    let Some((kind, coding)) = kind.and_then(|kind| Some((kind, Coding::of(&codec.layout, kind)?))) else {
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
