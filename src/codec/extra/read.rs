//! Reading extra planes: rows of them, what they make of weights, and what outliers add to products.
//!
//! Memory may be anyone's, so an outlier beyond its row is an error of whoever reads it, and never a panic.

use std::ops::Range;

use half::f16;

use super::{Extras, SHORT, kinds, of_number};
use crate::error::{Error, Result};
use crate::layout::Plane;

/// The extra planes of consecutive rows, for reading: lengths and counts agree.
#[derive(Debug, Clone, Copy, Default)]
pub struct ExtraPlanes<'a> {
    column_scales: Option<&'a [u8]>,
    outliers: Option<Outliers<'a>>,
}

/// The outliers of consecutive rows.
#[derive(Debug, Clone, Copy)]
struct Outliers<'a> {
    counts: &'a [u8],
    columns: &'a [u8],
    values: &'a [u8],
    cols: usize,
}

impl<'a> ExtraPlanes<'a> {
    /// The extra planes of a `rows x cols` matrix, in stored order.
    ///
    /// # Errors
    /// [`Error::Invalid`] when their number or a length is wrong, or counts do not add up to the outliers.
    pub fn new(planes: &[&'a [u8]], rows: usize, cols: usize) -> Result<Self> {
        let (Some(extras), Some((column_scales, outliers))) = (Extras::of(planes), of_number(planes.len())) else {
            return Err(Error::invalid(format!(
                "{} extra planes, expected column scales, the three of outliers, or both",
                planes.len()
            )));
        };
        extras.plane_bytes(rows as u64, cols as u64)?;
        for (plane, got) in kinds(column_scales, outliers).iter().zip(planes) {
            let elements = extras.elements(*plane, rows as u64, cols as u64);
            let want = elements.map_or(0, |(dtype, count)| dtype.size() * count);
            if got.len() as u64 != want {
                return Err(Error::invalid(format!(
                    "plane {} of a {rows} x {cols} matrix has {} bytes, expected {want}",
                    plane.name(),
                    got.len()
                )));
            }
        }
        let (scales, outliers) = planes.split_at(usize::from(column_scales));
        let outliers = match *outliers {
            [counts, columns, values] => Some(Outliers { counts, columns, values, cols }),
            _ => None,
        };
        if let Some(outliers) = &outliers {
            let (sum, count) = (outliers.before(rows), values_of(outliers.values) as u64);
            if sum != count {
                return Err(Error::invalid(format!("counts add up to {sum} outliers, there are {count}")));
            }
        }
        Ok(Self { column_scales: scales.first().copied(), outliers })
    }

    /// Whether there is nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.column_scales.is_none() && self.outliers.is_none()
    }

    /// Whether there are planes of outliers.
    pub(crate) fn has_outliers(&self) -> bool {
        self.outliers.is_some()
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let outliers = self.outliers.map_or(0, |o| o.counts.len() + o.columns.len() + o.values.len());
        self.column_scales.map_or(0, <[u8]>::len) + outliers
    }

    /// Checks what lengths do not say: scales are finite and not zero, values finite, columns of a row ascend and exist.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the plane and the place.
    pub fn check(&self) -> Result<()> {
        if let Some(what) = self.column_scales.and_then(bad_scale) {
            return Err(Error::invalid(format!("plane {}: {what}", Plane::ColumnScales.name())));
        }
        let Some(outliers) = &self.outliers else { return Ok(()) };
        if let Some(what) = bad_value(outliers.values) {
            return Err(Error::invalid(format!("plane {}: {what}", Plane::OutlierValues.name())));
        }
        let mut at = 0;
        for row in 0..outliers.rows() {
            let count = outliers.count(row);
            let mut least = 0;
            for i in at..at + count {
                let column = outliers.column(i);
                if column < least || column >= outliers.cols {
                    return Err(Error::invalid(format!(
                        "plane {}: column {column} of row {row} of {} columns, expected ascending ones inside the row",
                        Plane::OutlierColumns.name(),
                        outliers.cols
                    )));
                }
                least = column + 1;
            }
            at += count;
        }
        Ok(())
    }

    /// `count` rows of the matrix from `first` on.
    pub(crate) fn slice(&self, first: usize, count: usize) -> Self {
        Self { column_scales: self.column_scales, outliers: self.outliers.map(|o| o.slice(first, count)) }
    }

    /// The scales of the columns.
    pub(crate) fn column_scales(&self) -> Option<Vec<f32>> {
        Some(self.column_scales?.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }

    /// Makes weights of what the codec's planes of these rows decode to.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an outlier beyond its row.
    pub(crate) fn apply(&self, weights: &mut [f32]) -> Result<()> {
        self.scale(weights);
        let Some(outliers) = &self.outliers else { return Ok(()) };
        let mut at = 0;
        for (row, weights) in weights.chunks_exact_mut(outliers.cols).enumerate() {
            let count = outliers.count(row);
            outliers.add(at..at + count, weights)?;
            at += count;
        }
        Ok(())
    }

    /// Multiplies rows of numbers with the column scales.
    pub(crate) fn scale(&self, numbers: &mut [f32]) {
        let Some(scales) = self.column_scales() else { return };
        for row in numbers.chunks_exact_mut(scales.len().max(1)) {
            for (number, scale) in row.iter_mut().zip(&scales) {
                *number *= scale;
            }
        }
    }

    /// The rows in runs of `rows`, the last one shorter: the tasks of a parallel decoder, or the matrices of a stack.
    pub(crate) fn chunks(&self, total: usize, rows: usize) -> Vec<Self> {
        let mut rest = *self;
        let mut chunks = Vec::with_capacity(total.div_ceil(rows));
        for first in (0..total).step_by(rows) {
            let count = rows.min(total - first);
            chunks.push(rest.slice(0, count));
            rest = rest.slice(count, total - first - count);
        }
        chunks
    }

    /// The outliers in an order of rows of the caller's; nothing where there are none.
    pub(crate) fn rows(&self) -> Option<Rows<'a>> {
        let outliers = self.outliers?;
        let mut starts = Vec::with_capacity(outliers.rows());
        let mut start = 0;
        for row in 0..outliers.rows() {
            starts.push(start);
            start += outliers.count(row);
        }
        Some(Rows { outliers, starts })
    }

    /// Adds what outliers add to the products of all rows with one row of activations.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an outlier beyond its row.
    pub(crate) fn add_products(&self, x: &[f32], y: &mut [f32]) -> Result<()> {
        let Some(outliers) = &self.outliers else { return Ok(()) };
        let mut at = 0;
        for (row, y) in y.iter_mut().enumerate() {
            let count = outliers.count(row);
            let mut sum = 0.0;
            for i in at..at + count {
                let column = outliers.column(i);
                sum += x.get(column).ok_or_else(|| outliers.beyond(column))? * outliers.value(i);
            }
            at += count;
            *y += sum;
        }
        Ok(())
    }

    /// The outliers in numbers that can be multiplied as they are, for many rows of activations.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an outlier beyond its row.
    pub(crate) fn sparse(&self) -> Result<Option<Sparse>> {
        let Some(outliers) = &self.outliers else { return Ok(None) };
        let number = values_of(outliers.values);
        let columns: Vec<usize> = (0..number).map(|i| outliers.column(i)).collect();
        if let Some(&column) = columns.iter().find(|&&column| column >= outliers.cols) {
            return Err(outliers.beyond(column));
        }
        Ok(Some(Sparse {
            counts: (0..outliers.rows()).map(|row| outliers.count(row)).collect(),
            columns,
            values: (0..number).map(|i| outliers.value(i)).collect(),
        }))
    }
}

/// The outliers of single rows.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    outliers: Outliers<'a>,
    starts: Vec<usize>,
}

impl Rows<'_> {
    /// Adds the outliers of row `row` to its weights.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an outlier beyond its row.
    pub fn add(&self, row: usize, weights: &mut [f32]) -> Result<()> {
        self.outliers.add(self.starts[row]..self.starts[row] + self.outliers.count(row), weights)
    }
}

/// Outliers as numbers, all of their columns inside the rows.
#[derive(Debug)]
pub(crate) struct Sparse {
    counts: Vec<usize>,
    columns: Vec<usize>,
    values: Vec<f32>,
}

impl Sparse {
    /// As [`ExtraPlanes::add_products`].
    pub fn add_products(&self, x: &[f32], y: &mut [f32]) {
        let (mut columns, mut values) = (&*self.columns, &*self.values);
        for (&count, y) in self.counts.iter().zip(y) {
            let (now, later) = columns.split_at(count);
            let (value, rest) = values.split_at(count);
            let mut sum = 0.0;
            for (&column, value) in now.iter().zip(value) {
                sum += x[column] * value;
            }
            (columns, values) = (later, rest);
            *y += sum;
        }
    }
}

impl Outliers<'_> {
    fn rows(&self) -> usize {
        self.counts.len() / 4
    }

    fn count(&self, row: usize) -> usize {
        let bytes = self.counts[4 * row..].first_chunk().expect("a count has four bytes");
        usize::try_from(u32::from_le_bytes(*bytes)).unwrap_or(usize::MAX)
    }

    /// How many outliers stand before row `row`.
    fn before(&self, row: usize) -> u64 {
        let counts = self.counts[..4 * row].as_chunks::<4>().0;
        counts.iter().map(|bytes| u64::from(u32::from_le_bytes(*bytes))).sum()
    }

    fn column(&self, i: usize) -> usize {
        if self.cols as u64 > SHORT {
            let bytes = self.columns[4 * i..].first_chunk().expect("a column has four bytes");
            usize::try_from(u32::from_le_bytes(*bytes)).unwrap_or(usize::MAX)
        } else {
            usize::from(u16::from_le_bytes([self.columns[2 * i], self.columns[2 * i + 1]]))
        }
    }

    fn value(&self, i: usize) -> f32 {
        f16::from_le_bytes([self.values[2 * i], self.values[2 * i + 1]]).to_f32()
    }

    /// Adds some of them to the weights of their row.
    fn add(&self, outliers: Range<usize>, weights: &mut [f32]) -> Result<()> {
        let values = &self.values.as_chunks::<2>().0[outliers.clone()];
        let mut one = |column: usize, value: &[u8; 2]| {
            let weight = weights.get_mut(column).ok_or_else(|| self.beyond(column))?;
            *weight += f16::from_le_bytes(*value).to_f32();
            Ok(())
        };
        if self.cols as u64 > SHORT {
            let columns = &self.columns.as_chunks::<4>().0[outliers];
            columns.iter().zip(values).try_for_each(|(column, value)| {
                one(usize::try_from(u32::from_le_bytes(*column)).unwrap_or(usize::MAX), value)
            })
        } else {
            let columns = &self.columns.as_chunks::<2>().0[outliers];
            columns.iter().zip(values).try_for_each(|(column, value)| one(u16::from_le_bytes(*column).into(), value))
        }
    }

    fn slice(&self, first: usize, count: usize) -> Self {
        let number = |n: u64| usize::try_from(n).expect("counts were added up");
        let start = number(self.before(first));
        let counts = &self.counts[4 * first..][..4 * count];
        let len = number(Outliers { counts, ..*self }.before(count));
        let width = if self.cols as u64 > SHORT { 4 } else { 2 };
        Self {
            counts,
            columns: &self.columns[width * start..][..width * len],
            values: &self.values[2 * start..][..2 * len],
            cols: self.cols,
        }
    }

    fn beyond(&self, column: usize) -> Error {
        Error::invalid(format!("an outlier in column {column} of {}", self.cols))
    }
}

fn values_of(values: &[u8]) -> usize {
    values.len() / 2
}

/// What a part of a plane of column scales holds that is not allowed.
pub(crate) fn bad_scale(bytes: &[u8]) -> Option<String> {
    let scales = bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes));
    scales.into_iter().find(|s| !s.is_finite() || *s == 0.0).map(|s| format!("a value is {s}"))
}

/// What a part of a plane of values holds that is not allowed.
fn bad_value(bytes: &[u8]) -> Option<String> {
    let values = bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes));
    values.into_iter().find(|v| !v.is_finite()).map(|v| format!("a value is {v}"))
}
