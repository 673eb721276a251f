//! Codec = id + layout + fit; encode and decode, rayon over rows.
//!
//! [`mod@reference`] is the specification; what runs is one fast path per instruction set that gives the same bytes: the
//! same generic code over vectors of different width, chosen once by [`isa`].

pub(crate) mod batch;
pub(crate) mod convert;
mod decode;
mod encode;
pub mod extra;
pub mod isa;
pub(crate) mod kind;
pub(crate) mod lanes;
mod nested;
pub mod reference;

use rayon::prelude::*;

use crate::error::{Error, Result};
use crate::fit::outliers::Share;
use crate::fit::{self, Fit, OutOfRange};
use crate::layout::{Grouped, Layout, Plane};
use crate::tensor::DType;
use extra::{ExtraPlanes, Extras, Outlier};

/// A registered way to store a matrix: see [`crate::codecs`].
#[derive(Debug, PartialEq)]
pub struct Codec {
    /// The id in files; `_v<n>` rises when the same parameters would decode differently.
    pub id: &'static str,
    /// What the bytes mean.
    pub layout: Layout,
    /// How they are chosen.
    pub fit: Fit,
}

/// Consecutive rows of every plane of a grouped layout, for reading.
#[derive(Debug, Clone, Copy)]
pub struct Planes<'a> {
    /// Codes, of those of 5 and 6 bits the low 4.
    pub codes: &'a [u8],
    /// High bits of codes; empty where the layout has none.
    pub high_codes: &'a [u8],
    /// Scales, or scale bytes of a bank.
    pub scales: &'a [u8],
    /// Offsets or zero points; empty where the layout has neither.
    pub addends: &'a [u8],
    /// Scales of rows; empty where the layout has none.
    pub row_scales: &'a [u8],
}

/// Consecutive rows of every plane of a grouped layout, for writing; zeroed by whoever made them.
#[derive(Debug)]
pub struct PlanesMut<'a> {
    /// Codes, of those of 5 and 6 bits the low 4.
    pub codes: &'a mut [u8],
    /// High bits of codes; empty where the layout has none.
    pub high_codes: &'a mut [u8],
    /// Scales, or scale bytes of a bank.
    pub scales: &'a mut [u8],
    /// Offsets or zero points; empty where the layout has neither.
    pub addends: &'a mut [u8],
    /// Scales of rows; empty where the layout has none.
    pub row_scales: &'a mut [u8],
}

/// Bytes of one row of every plane.
#[derive(Debug, Clone, Copy)]
struct Strides {
    codes: usize,
    high_codes: usize,
    scales: usize,
    addends: usize,
    row_scales: usize,
}

impl Strides {
    fn new(layout: &Grouped, cols: usize) -> Self {
        let addends = match layout.offset() {
            Some(float) => layout.groups(cols) * float.size(),
            None if layout.levels() == crate::layout::Levels::ZeroPoint => layout.zero_point_stride(cols),
            None => 0,
        };
        Self {
            codes: layout.code_stride(cols),
            high_codes: layout.high_code_stride(cols),
            scales: layout.scale_stride(cols),
            addends,
            row_scales: layout.row_scale_stride(cols),
        }
    }
}

/// Codes, high codes, scales, addends and scales of rows out of the planes of a layout, in stored order; what it does not
/// have is empty.
fn placed<T: Default>(layout: &Grouped, planes: impl Iterator<Item = T>) -> [T; 5] {
    let mut all = <[T; 5]>::default();
    for (plane, bytes) in Layout::Grouped(*layout).planes().iter().zip(planes) {
        let place = match plane {
            Plane::Codes => 0,
            Plane::HighCodes => 1,
            Plane::Scales => 2,
            Plane::Offsets | Plane::ZeroPoints => 3,
            Plane::RowScales => 4,
            Plane::Data | Plane::ColumnScales | Plane::OutlierCounts | Plane::OutlierColumns | Plane::OutlierValues => {
                unreachable!("no plane of a grouped layout")
            }
        };
        all[place] = bytes;
    }
    all
}

impl<'a> Planes<'a> {
    /// The planes of a layout, in stored order.
    #[must_use]
    pub fn new(layout: &Grouped, planes: &[&'a [u8]]) -> Self {
        let [codes, high_codes, scales, addends, row_scales] = placed(layout, planes.iter().copied());
        Self { codes, high_codes, scales, addends, row_scales }
    }

    /// `count` rows of the matrix from `first` on.
    #[must_use]
    pub fn slice(&self, layout: &Grouped, cols: usize, first: usize, count: usize) -> Self {
        self.rows(&Strides::new(layout, cols), first, count)
    }

    fn rows(&self, strides: &Strides, first: usize, count: usize) -> Self {
        Self {
            codes: &self.codes[first * strides.codes..][..count * strides.codes],
            high_codes: &self.high_codes[first * strides.high_codes..][..count * strides.high_codes],
            scales: &self.scales[first * strides.scales..][..count * strides.scales],
            addends: &self.addends[first * strides.addends..][..count * strides.addends],
            row_scales: &self.row_scales[first * strides.row_scales..][..count * strides.row_scales],
        }
    }
}

impl<'a> PlanesMut<'a> {
    /// The planes of a layout, in stored order.
    #[must_use]
    pub fn new(layout: &Grouped, planes: &'a mut [Vec<u8>]) -> Self {
        let planes = planes.iter_mut().map(Vec::as_mut_slice);
        let [codes, high_codes, scales, addends, row_scales] = placed(layout, planes);
        Self { codes, high_codes, scales, addends, row_scales }
    }

    fn split(self, strides: &Strides, rows: usize) -> (Self, Self) {
        let (codes, codes_rest) = self.codes.split_at_mut(rows * strides.codes);
        let (high_codes, high_codes_rest) = self.high_codes.split_at_mut(rows * strides.high_codes);
        let (scales, scales_rest) = self.scales.split_at_mut(rows * strides.scales);
        let (addends, addends_rest) = self.addends.split_at_mut(rows * strides.addends);
        let (row_scales, row_scales_rest) = self.row_scales.split_at_mut(rows * strides.row_scales);
        let rest = Self {
            codes: codes_rest,
            high_codes: high_codes_rest,
            scales: scales_rest,
            addends: addends_rest,
            row_scales: row_scales_rest,
        };
        (Self { codes, high_codes, scales, addends, row_scales }, rest)
    }

    /// Row `r` alone.
    #[must_use]
    pub fn row(&mut self, layout: &Grouped, cols: usize, r: usize) -> PlanesMut<'_> {
        let strides = Strides::new(layout, cols);
        PlanesMut {
            codes: &mut self.codes[r * strides.codes..][..strides.codes],
            high_codes: &mut self.high_codes[r * strides.high_codes..][..strides.high_codes],
            scales: &mut self.scales[r * strides.scales..][..strides.scales],
            addends: &mut self.addends[r * strides.addends..][..strides.addends],
            row_scales: &mut self.row_scales[r * strides.row_scales..][..strides.row_scales],
        }
    }

    /// The same rows, for reading what was written.
    #[must_use]
    pub fn as_planes(&self) -> Planes<'_> {
        Planes {
            codes: self.codes,
            high_codes: self.high_codes,
            scales: self.scales,
            addends: self.addends,
            row_scales: self.row_scales,
        }
    }

    /// The rows in runs of `rows`, the last one shorter: the tasks of a parallel encoder.
    #[must_use]
    pub fn chunks(self, layout: &Grouped, cols: usize, total: usize, rows: usize) -> Vec<Self> {
        let strides = Strides::new(layout, cols);
        let mut rest = self;
        let mut left = total;
        let mut chunks = Vec::with_capacity(total.div_ceil(rows));
        while left > 0 {
            let (head, tail) = rest.split(&strides, rows.min(left));
            chunks.push(head);
            rest = tail;
            left -= rows.min(left);
        }
        chunks
    }
}

/// How many rows one task takes: about 16 Ki weights, so that its floats stay in the second-level cache.
pub(crate) fn rows_per_task(cols: usize) -> usize {
    (16_384 / cols.max(1)).max(1)
}

/// Encodes consecutive rows of finite weights into zeroed planes, on this thread.
///
/// # Errors
/// [`OutOfRange`] when a scale or offset does not fit its stored type.
pub fn encode_rows(
    layout: &Grouped,
    fit: Fit,
    weights: &[f32],
    cols: usize,
    planes: &mut PlanesMut<'_>,
) -> Result<(), OutOfRange> {
    isa::best().encode_rows(layout, fit, weights, cols, planes)
}

/// Decodes consecutive rows, on this thread.
pub fn decode_rows(layout: &Grouped, planes: &Planes<'_>, cols: usize, out: &mut [f32]) {
    isa::best().decode_rows(layout, planes, cols, out);
}

/// Refuses planes that are not those of a `rows x cols` matrix in `layout`, and gives the extra ones behind them.
///
/// # Errors
/// [`Error::Invalid`] naming the plane, its length and the expected one.
pub(crate) fn check_planes<'a>(
    layout: &Layout,
    rows: usize,
    cols: usize,
    planes: &[&'a [u8]],
) -> Result<ExtraPlanes<'a>> {
    let expected = layout.plane_bytes(DType::F32, rows as u64, cols as u64)?;
    let Some((planes, extra)) =
        planes.split_at_checked(expected.len()).filter(|(_, extra)| Extras::of(extra).is_some())
    else {
        let names: Vec<_> = expected.iter().map(|(plane, _)| plane.name()).collect();
        return Err(Error::invalid(format!("{} planes, expected {}", planes.len(), names.join(", "))));
    };
    for ((plane, want), got) in expected.iter().zip(planes) {
        if got.len() as u64 != *want {
            return Err(Error::invalid(format!(
                "plane {} of a {rows} x {cols} matrix has {} bytes, expected {want}",
                plane.name(),
                got.len()
            )));
        }
    }
    ExtraPlanes::new(extra, rows, cols)
}

/// A matrix in a codec: its planes have exactly the lengths that the layout gives, and those behind them are sound.
#[derive(Debug, Clone, PartialEq)]
pub struct Encoded {
    codec: &'static Codec,
    rows: usize,
    cols: usize,
    planes: Vec<Vec<u8>>,
    extras: Extras,
}

impl Encoded {
    /// Takes planes that came from elsewhere: the codec's, and behind them [`extra`] ones.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the number or the length of the planes is not what the layout gives, extra ones break a
    /// rule, or for `raw_v1`, which has no codes.
    pub fn from_planes(codec: &'static Codec, rows: usize, cols: usize, planes: Vec<Vec<u8>>) -> Result<Self> {
        let _ = codec.grouped()?;
        let slices: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
        check_planes(&codec.layout, rows, cols, &slices)?.check()?;
        let extra = &slices[codec.layout.planes().len()..];
        let extras = Extras::of(extra).unwrap_or_default();
        if extras.planes().len() != extra.len() {
            return Err(Error::invalid("planes of outliers without any, expected none"));
        }
        Ok(Self { codec, rows, cols, planes, extras })
    }

    /// The same matrix with other [`extra`] planes: column scales, and outliers in the order of rows and columns.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they break a rule of their planes.
    pub fn with_extras(mut self, column_scales: Option<&[f32]>, outliers: &[Outlier]) -> Result<Self> {
        self.planes.truncate(self.codec.layout.planes().len());
        self.planes.extend(extra::planes(self.rows, self.cols, column_scales, outliers)?);
        Self::from_planes(self.codec, self.rows, self.cols, self.planes)
    }

    /// Which planes there are beside the codec's.
    #[must_use]
    pub fn extras(&self) -> Extras {
        self.extras
    }

    /// The codec.
    #[must_use]
    pub fn codec(&self) -> &'static Codec {
        self.codec
    }

    /// Rows of the matrix (outputs).
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns of the matrix (inputs).
    #[must_use]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The planes with their kinds, in stored order.
    pub fn planes(&self) -> impl Iterator<Item = (Plane, &[u8])> {
        let kinds = self.codec.layout.planes().iter().chain(self.extras.planes()).copied();
        kinds.zip(self.planes.iter().map(Vec::as_slice))
    }

    /// The weights, row by row.
    #[must_use]
    pub fn decode(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.rows * self.cols];
        self.decode_into(&mut out);
        out
    }

    /// The weights, row by row, into memory of the caller.
    ///
    /// # Panics
    /// When `out` does not hold `rows * cols` numbers.
    pub fn decode_into(&self, out: &mut [f32]) {
        assert_eq!(out.len(), self.rows * self.cols, "the output does not match the matrix");
        let layout = self.codec.grouped().expect("checked by the constructor");
        let planes: Vec<_> = self.planes.iter().map(Vec::as_slice).collect();
        let (own, extra) = planes.split_at(self.codec.layout.planes().len());
        let extra = ExtraPlanes::new(extra, self.rows, self.cols).expect("checked by the constructor");
        decode_matrix(layout, &Planes::new(layout, own), &extra, self.cols, out).expect("checked by the constructor");
    }
}

/// Decodes all rows with their extra planes, in parallel.
///
/// # Errors
/// [`Error::Invalid`] for an outlier beyond its row.
pub(crate) fn decode_matrix(
    layout: &Grouped,
    planes: &Planes<'_>,
    extra: &ExtraPlanes<'_>,
    cols: usize,
    out: &mut [f32],
) -> Result<()> {
    decode_planes(layout, planes, cols, out);
    if extra.is_empty() || out.is_empty() {
        return Ok(());
    }
    let rows = rows_per_task(cols);
    let parts = extra.chunks(out.len() / cols, rows);
    out.par_chunks_mut(rows * cols).zip(parts).try_for_each(|(out, extra)| extra.apply(out))
}

/// Decodes all rows, in parallel.
pub(crate) fn decode_planes(layout: &Grouped, planes: &Planes<'_>, cols: usize, out: &mut [f32]) {
    if out.is_empty() {
        return;
    }
    let strides = Strides::new(layout, cols);
    let rows = rows_per_task(cols);
    out.par_chunks_mut(rows * cols).enumerate().for_each(|(task, out)| {
        decode_rows(layout, &planes.rows(&strides, task * rows, out.len() / cols), cols, out);
    });
}

impl Codec {
    /// The layout of codes and scales.
    ///
    /// # Errors
    /// [`Error::Invalid`] for the raw codec, which has none.
    pub fn grouped(&self) -> Result<&Grouped> {
        match &self.layout {
            Layout::Grouped(layout) => Ok(layout),
            Layout::Raw => Err(Error::invalid(format!("codec {} stores bytes as they are and has no codes", self.id))),
        }
    }

    /// Encodes a matrix of `rows x cols` weights, in parallel.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the number of weights is not `rows * cols`, when a weight is not finite, when a scale
    /// leaves the range of its stored type, or for the raw codec.
    pub fn encode(&'static self, weights: &[f32], rows: usize, cols: usize) -> Result<Encoded> {
        let layout = self.grouped()?;
        if rows.checked_mul(cols) != Some(weights.len()) {
            return Err(Error::invalid(format!("{} weights for a {rows} x {cols} matrix", weights.len())));
        }
        // Whole chunks first: a search for the first one would go weight by weight.
        let finite = weights.par_chunks(65_536).all(|chunk| chunk.iter().fold(true, |ok, w| ok & w.is_finite()));
        if !finite && let Some(index) = weights.iter().position(|w| !w.is_finite()) {
            return Err(Error::Nonfinite {
                tensor: "array".into(),
                index: index as u64,
                count: weights.iter().filter(|w| !w.is_finite()).count() as u64,
            });
        }
        let mut planes = Vec::new();
        for (plane, bytes) in self.layout.plane_bytes(DType::F32, rows as u64, cols as u64)? {
            let bytes = usize::try_from(bytes).map_err(|_| Error::invalid("the matrix is larger than memory"))?;
            planes.push(crate::error::try_zeroed(bytes, || format!("plane {}", plane.name()))?);
        }
        if !weights.is_empty() {
            let per_task = rows_per_task(cols);
            PlanesMut::new(layout, &mut planes)
                .chunks(layout, cols, rows, per_task)
                .into_par_iter()
                .zip(weights.par_chunks(per_task * cols))
                .try_for_each(|(mut planes, weights)| encode_rows(layout, self.fit, weights, cols, &mut planes))
                .map_err(|OutOfRange| self.out_of_range())?;
        }
        Ok(Encoded { codec: self, rows, cols, planes, extras: Extras::NONE })
    }

    /// The same with [`extra`] planes: column scales, of which each weight is divided by its column's first, and a part of
    /// the weights stored as outliers, those of the greatest squares.
    ///
    /// # Errors
    /// Those of [`Codec::encode`]; [`Error::Invalid`] when column scales break a rule of theirs, or what an outlier adds leaves
    /// the range of F16.
    pub fn encode_with(
        &'static self,
        weights: &[f32],
        rows: usize,
        cols: usize,
        column_scales: Option<&[f32]>,
        outliers: Option<Share>,
    ) -> Result<Encoded> {
        let layout = self.grouped()?;
        if rows.checked_mul(cols) != Some(weights.len()) {
            return Err(Error::invalid(format!("{} weights for a {rows} x {cols} matrix", weights.len())));
        }
        extra::planes(rows, cols, column_scales, &[])?;
        let wanted = outliers.map_or(0, |share| share.of(weights.len() as u64));
        let wanted = usize::try_from(wanted).map_err(|_| Error::invalid("the matrix is larger than memory"))?;
        let places = fit::outliers::choose(weights, cols, wanted, None);
        let mut fitted = weights.to_vec();
        fit::awq::prepare(&mut fitted, cols, layout.group_len(cols).max(1), column_scales, &places);
        let encoded = self.encode(&fitted, rows, cols)?.with_extras(column_scales, &[])?;
        let decoded = encoded.decode();
        let outlier = |&place: &usize| {
            let value = half::f16::from_f32(weights[place] - decoded[place]);
            Outlier { row: place / cols, column: place % cols, value }
        };
        let outliers: Vec<Outlier> = places.iter().map(outlier).collect();
        encoded.with_extras(column_scales, &outliers)
    }

    /// The error of a matrix whose scales leave the range of their stored type.
    fn out_of_range(&self) -> Error {
        Error::invalid(format!(
            "a scale or offset leaves the range of its stored type in {}; rescale the weights or use {}",
            self.id,
            crate::codecs::wider(self).id
        ))
    }
}
