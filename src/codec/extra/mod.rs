//! Extra planes: what the matrix of any grouped codec may have beside its codec's own planes.
//!
//! ```text
//! weight[r, c] = base[r, c] * column_scale[c], then + outlier[r, c] where there is one
//! ```
//!
//! in f32, each one rounding, *base* being what the codec decodes. Both are of the matrix and not of the codec, so a codec
//! stays what its layout says, and kernels never meet them: in a product activations are multiplied by the column scales
//! first, and what outliers add comes last.
//!
//! | plane | element | count |
//! |---|---|---|
//! | `column_scales` | F32, finite, not zero | one per column |
//! | `outlier_counts` | U32 | one per row: its outliers |
//! | `outlier_columns` | U16, or U32 where there are more than 65536 columns | one per outlier, row after row, ascending in a row |
//! | `outlier_values` | F16, finite | one per outlier |

mod read;

use half::f16;

use crate::error::{Error, Result};
use crate::layout::Plane;
use crate::tensor::DType;
pub use read::ExtraPlanes;
pub(crate) use read::bad_scale;

/// Columns that a U16 can count.
const SHORT: u64 = 1 << 16;

/// Which extra planes a matrix has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Extras {
    /// Whether columns have scales.
    pub column_scales: bool,
    /// How many weights are outliers; without any there are no planes of them.
    pub outliers: u64,
}

impl Extras {
    /// Nothing beside the codec's planes.
    pub const NONE: Self = Self { column_scales: false, outliers: 0 };

    /// The planes, in the order in which they are stored, behind the codec's.
    #[must_use]
    pub const fn planes(&self) -> &'static [Plane] {
        kinds(self.column_scales, self.outliers > 0)
    }

    /// Dtype of the elements of an extra plane, and how many it has; nothing where `plane` is a codec's.
    #[must_use]
    pub fn elements(&self, plane: Plane, rows: u64, cols: u64) -> Option<(DType, u64)> {
        match plane {
            Plane::ColumnScales => Some((DType::F32, cols)),
            Plane::OutlierCounts => Some((DType::U32, rows)),
            Plane::OutlierColumns => Some((if cols > SHORT { DType::U32 } else { DType::U16 }, self.outliers)),
            Plane::OutlierValues => Some((DType::F16, self.outliers)),
            _ => None,
        }
    }

    /// Bytes of every extra plane of a `rows x cols` matrix, in stored order.
    ///
    /// # Errors
    /// [`Error::Invalid`] for more outliers than weights, more columns than 32 bits count, or sizes beyond 63 bits.
    pub fn plane_bytes(&self, rows: u64, cols: u64) -> Result<Vec<(Plane, u64)>> {
        let most = u128::from(rows) * u128::from(cols);
        if u128::from(self.outliers) > most {
            return Err(Error::invalid(format!("{} outliers of {most} weights", self.outliers)));
        }
        if self.outliers > 0 && cols > 1 << 32 {
            return Err(Error::invalid(format!("outliers in rows of {cols} weights, more than 32 bits count")));
        }
        let too_large = || Error::invalid(format!("extra planes of a {rows} x {cols} matrix are too large"));
        let bytes = |plane| {
            let (dtype, count) = self.elements(plane, rows, cols).expect("an extra plane");
            count.checked_mul(dtype.size()).filter(|&bytes| bytes < 1 << 63).ok_or_else(too_large)
        };
        self.planes().iter().map(|&plane| Ok((plane, bytes(plane)?))).collect()
    }

    /// What these planes are: none, column scales, those of outliers, or both; the lengths are not looked at.
    pub(crate) fn of(planes: &[&[u8]]) -> Option<Self> {
        let (column_scales, outliers) = of_number(planes.len())?;
        let values = if outliers { planes.last().map_or(0, |values| values.len() as u64 / 2) } else { 0 };
        Some(Self { column_scales, outliers: values })
    }
}

/// The extra planes of a matrix, given whether it has column scales and outliers.
const fn kinds(column_scales: bool, outliers: bool) -> &'static [Plane] {
    const ALL: &[Plane] = &[Plane::ColumnScales, Plane::OutlierCounts, Plane::OutlierColumns, Plane::OutlierValues];
    match (column_scales, outliers) {
        (false, false) => &[],
        (true, false) => ALL.split_at(1).0,
        (false, true) => ALL.split_at(1).1,
        (true, true) => ALL,
    }
}

/// Whether so many extra planes are column scales, and whether they are outliers.
fn of_number(planes: usize) -> Option<(bool, bool)> {
    [(false, false), (true, false), (false, true), (true, true)]
        .into_iter()
        .find(|&(column_scales, outliers)| kinds(column_scales, outliers).len() == planes)
}

/// One outlier: what is added to the weight at a row and a column.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlier {
    /// Row of the matrix.
    pub row: usize,
    /// Column of the matrix.
    pub column: usize,
    /// What is added, as it is stored.
    pub value: f16,
}

/// The extra planes of a `rows x cols` matrix: column scales, and outliers in the order of rows and columns.
///
/// # Errors
/// [`Error::Invalid`] when scales or outliers break a rule of their planes.
pub fn planes(rows: usize, cols: usize, column_scales: Option<&[f32]>, outliers: &[Outlier]) -> Result<Vec<Vec<u8>>> {
    let mut planes = Vec::new();
    if let Some(scales) = column_scales {
        planes.push(scales.iter().flat_map(|s| s.to_le_bytes()).collect());
    }
    if !outliers.is_empty() {
        let mut counts = vec![0_u32; rows];
        let mut columns = Vec::new();
        for outlier in outliers {
            let count = counts.get_mut(outlier.row).ok_or_else(|| Error::invalid("an outlier beyond the last row"))?;
            *count += 1;
            if cols as u64 > SHORT {
                let column = u32::try_from(outlier.column).map_err(|_| Error::invalid("a column beyond 32 bits"))?;
                columns.extend(column.to_le_bytes());
            } else {
                let column = u16::try_from(outlier.column).map_err(|_| Error::invalid("an outlier beyond its row"))?;
                columns.extend(column.to_le_bytes());
            }
        }
        if !outliers.is_sorted_by_key(|outlier| (outlier.row, outlier.column)) {
            return Err(Error::invalid("outliers are not in the order of rows and columns"));
        }
        planes.push(counts.iter().flat_map(|c| c.to_le_bytes()).collect());
        planes.push(columns);
        planes.push(outliers.iter().flat_map(|o| o.value.to_le_bytes()).collect());
    }
    let slices: Vec<&[u8]> = planes.iter().map(Vec::as_slice).collect();
    ExtraPlanes::new(&slices, rows, cols)?.check()?;
    Ok(planes)
}
