//! Layout: the one description of a codec's bytes. Sizes, bits per weight, decode and kernel constants derive from it.
//!
//! A tensor is seen as a matrix of `rows x cols`, groups run along the columns:
//!
//! ```text
//! weight[r, c] = level(code[r, c]) * scale[r, g] + offset[r, g]        g = c / group
//! level(q)     = q (Unsigned) | q - 2^(bits-1) (Signed) | q - zero_point[r, g] (ZeroPoint) | table[q] (Table)
//!              | bank[q, byte[r, g]] (Bank)      and then scale[r, g] = multiplier(byte[r, g]) * row_scale[r]
//! ```
//!
//! in f32, one rounding for each product and one for the sum, never fused. Planes are separate arrays:
//!
//! | plane | element | one row takes |
//! |---|---|---|
//! | `codes` | `bits` bits (of 5 and 6 the low 4), low bits first, in little-endian words of 32 bits | `4 * ceil(cols * bits / 32)` bytes |
//! | `high_codes` | the bits above the low 4 of 5 and 6, in the same way | `4 * ceil(cols * (bits - 4) / 32)` bytes |
//! | `scales` | F16 or F32, or the byte of a [`Bank`] | `groups * size` bytes |
//! | `row_scales` (banks) | F32 | 4 bytes |
//! | `offsets` | F16 or F32 | `groups * size` bytes |
//! | `zero_points` | `bits` bits, low bits first, in bytes | `ceil(groups * bits / 8)` bytes |
//! | `data` (raw codec) | the source dtype | `cols * size` bytes |
//!
//! Bits of the last word of a row that belong to no column are zero.

mod bank;

pub use bank::{BANK4, BANK5, BANK6, Bank, LEVELS, ROW_SCALE_END};

use crate::error::{Error, Result};
use crate::tensor::DType;

/// What the bytes of a codec mean.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Layout {
    /// The source's own bytes.
    Raw,
    /// Codes with shared scales.
    Grouped(Grouped),
}

/// Codes with shared scales: the fields that every kernel needs, and nothing else.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Grouped {
    bits: u32,
    levels: Levels,
    group: usize,
    scale: Float,
    offset: Option<Float>,
}

/// How a code becomes a level.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Levels {
    /// `q`
    Unsigned,
    /// `q - 2^(bits-1)`
    Signed,
    /// `q - zero_point`, an integer of the code's width per group.
    ZeroPoint,
    /// `table[q]`, ascending.
    Table(&'static [f32; 16]),
    /// `bank[q]` of the table that the group's scale byte names; the group's scale is a multiple of the row's.
    Bank(&'static Bank),
}

/// How a scale or an offset is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Float {
    /// IEEE half.
    F16,
    /// IEEE single.
    F32,
}

impl Float {
    /// Bytes of one number.
    #[must_use]
    pub const fn size(self) -> usize {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// As the dtype of a tensor.
    #[must_use]
    pub const fn dtype(self) -> DType {
        match self {
            Self::F16 => DType::F16,
            Self::F32 => DType::F32,
        }
    }

    /// The nearest storable number, ties to even; may be infinite.
    #[must_use]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F16 => half::f16::from_f32(x).to_f32(),
            Self::F32 => x,
        }
    }

    /// Reads number `index` of a plane.
    #[must_use]
    pub fn load(self, plane: &[u8], index: usize) -> f32 {
        match self {
            Self::F16 => half::f16::from_le_bytes([plane[2 * index], plane[2 * index + 1]]).to_f32(),
            Self::F32 => {
                let at = 4 * index;
                f32::from_le_bytes([plane[at], plane[at + 1], plane[at + 2], plane[at + 3]])
            }
        }
    }

    /// Writes number `index` of a plane; `x` is already rounded by [`Float::round`].
    pub fn store(self, plane: &mut [u8], index: usize, x: f32) {
        match self {
            Self::F16 => plane[2 * index..][..2].copy_from_slice(&half::f16::from_f32(x).to_le_bytes()),
            Self::F32 => plane[4 * index..][..4].copy_from_slice(&x.to_le_bytes()),
        }
    }
}

/// One stored array of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Plane {
    /// The source's bytes.
    Data,
    /// The codes, of those of 5 and 6 bits the low 4.
    Codes,
    /// The high bits of codes of 5 and 6 bits.
    HighCodes,
    /// One multiplier per group.
    Scales,
    /// What multipliers are relative to, one number per row.
    RowScales,
    /// One addend per group.
    Offsets,
    /// One integer zero point per group.
    ZeroPoints,
    /// One multiplier per column; this and what follows is never a layout's, see [`crate::codec::extra`].
    ColumnScales,
    /// How many outliers each row has.
    OutlierCounts,
    /// The column of each outlier.
    OutlierColumns,
    /// What each outlier adds.
    OutlierValues,
}

impl Plane {
    /// The name in headers and in Python.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Data => "data",
            Self::Codes => "codes",
            Self::HighCodes => "high_codes",
            Self::Scales => "scales",
            Self::RowScales => "row_scales",
            Self::Offsets => "offsets",
            Self::ZeroPoints => "zero_points",
            Self::ColumnScales => "column_scales",
            Self::OutlierCounts => "outlier_counts",
            Self::OutlierColumns => "outlier_columns",
            Self::OutlierValues => "outlier_values",
        }
    }
}

/// The group of a codec whose scale is shared by a whole row.
pub const ROW: usize = 0;

impl Grouped {
    /// A layout; in a const context an impossible one does not compile.
    ///
    /// `group` is the number of columns that share a scale, or [`ROW`].
    ///
    /// # Panics
    /// When the fields contradict each other.
    #[must_use]
    pub const fn new(bits: u32, levels: Levels, group: usize, scale: Float, offset: Option<Float>) -> Self {
        match levels {
            Levels::Bank(bank) => {
                assert!(bits == bank.bits(), "codes are as wide as those of the bank");
                assert!(group != ROW && matches!(scale, Float::F32), "groups have bytes and rows have F32 scales");
            }
            _ => assert!(bits == 4 || bits == 8, "codes are 4 or 8 bits wide"),
        }
        assert!(group == ROW || (group * low_bits(bits) as usize).is_multiple_of(32), "a group fills whole words");
        assert!(offset.is_none() || matches!(levels, Levels::Unsigned), "only unsigned levels take an offset");
        assert!(!matches!(levels, Levels::Table(_)) || bits == 4, "tables have 16 levels");
        Self { bits, levels, group, scale, offset }
    }

    /// Bits of a code.
    #[must_use]
    pub const fn bits(&self) -> u32 {
        self.bits
    }

    /// How a code becomes a level.
    #[must_use]
    pub const fn levels(&self) -> Levels {
        self.levels
    }

    /// Columns that share a scale, [`ROW`] for all of them.
    #[must_use]
    pub const fn group(&self) -> usize {
        self.group
    }

    /// How a scale is stored; with a bank, that of the row.
    #[must_use]
    pub const fn scale(&self) -> Float {
        self.scale
    }

    /// How an offset is stored, where there is one.
    #[must_use]
    pub const fn offset(&self) -> Option<Float> {
        self.offset
    }

    /// The bank of nested scales, where the levels are one.
    #[must_use]
    pub const fn bank(&self) -> Option<&'static Bank> {
        if let Levels::Bank(bank) = self.levels { Some(bank) } else { None }
    }

    /// Bits of a code that lie in the plane `codes`.
    #[must_use]
    pub const fn low_bits(&self) -> u32 {
        low_bits(self.bits)
    }

    /// Bits of a code that lie in the plane `high_codes`; none where there is no such plane.
    #[must_use]
    pub const fn high_bits(&self) -> u32 {
        self.bits - self.low_bits()
    }

    /// The largest code.
    #[must_use]
    pub const fn max_code(&self) -> u8 {
        if self.bits == 8 { u8::MAX } else { (1 << self.bits) - 1 }
    }

    /// The code whose level is zero, given the group's zero point; of a bank the first one, which stands for zero where
    /// the scale is zero.
    #[must_use]
    pub const fn zero_code(&self, zero_point: u8) -> u8 {
        match self.levels {
            Levels::Unsigned | Levels::Bank(_) => 0,
            Levels::Signed => 1 << (self.bits - 1),
            Levels::ZeroPoint => zero_point,
            Levels::Table(_) => 7,
        }
    }

    /// The level of a code, given the group's zero point, or the scale byte of a bank.
    #[must_use]
    pub fn level(&self, code: u8, zero_point: u8) -> f32 {
        match self.levels {
            Levels::Unsigned | Levels::Signed => f32::from(i16::from(code) - i16::from(self.zero_code(0))),
            Levels::ZeroPoint => f32::from(i16::from(code) - i16::from(zero_point)),
            Levels::Table(table) => table[usize::from(code)],
            Levels::Bank(bank) => bank.level(code, zero_point),
        }
    }

    /// Bytes of one number of a plane; codes and zero points are packed into bytes.
    #[must_use]
    pub const fn element(&self, plane: Plane) -> usize {
        match (plane, self.offset) {
            (Plane::Scales, _) if self.bank().is_none() => self.scale.size(),
            (Plane::RowScales, _) => self.scale.size(),
            (Plane::Offsets, Some(float)) => float.size(),
            _ => 1,
        }
    }

    /// Columns of a full group in a matrix of `cols` columns.
    #[must_use]
    pub const fn group_len(&self, cols: usize) -> usize {
        if self.group == ROW { cols } else { self.group }
    }

    /// Groups of one row; the last may be ragged.
    #[must_use]
    pub const fn groups(&self, cols: usize) -> usize {
        if self.group == ROW { (cols > 0) as usize } else { cols.div_ceil(self.group) }
    }

    /// Bytes of one row of codes.
    #[must_use]
    pub const fn code_stride(&self, cols: usize) -> usize {
        (cols * self.low_bits() as usize).div_ceil(32) * 4
    }

    /// Bytes of one row of the high bits of codes.
    #[must_use]
    pub const fn high_code_stride(&self, cols: usize) -> usize {
        (cols * self.high_bits() as usize).div_ceil(32) * 4
    }

    /// Bytes of one row of scales, or of scale bytes.
    #[must_use]
    pub const fn scale_stride(&self, cols: usize) -> usize {
        self.groups(cols) * if self.bank().is_some() { 1 } else { self.scale.size() }
    }

    /// Bytes of the scale of one row, where there is one beside the scales of groups.
    #[must_use]
    pub const fn row_scale_stride(&self, cols: usize) -> usize {
        if self.bank().is_some() && cols > 0 { self.scale.size() } else { 0 }
    }

    /// Bytes of one row of zero points.
    #[must_use]
    pub const fn zero_point_stride(&self, cols: usize) -> usize {
        (self.groups(cols) * self.bits as usize).div_ceil(8)
    }

    /// Reads code `index` of a row and of the row of high bits, empty where there are none.
    #[must_use]
    pub fn load_code(&self, row: &[u8], high: &[u8], index: usize) -> u8 {
        let low = load_bits(self.low_bits(), row, index);
        if self.high_bits() == 0 { low } else { low | load_bits(self.high_bits(), high, index) << 4 }
    }

    /// Writes code `index` of a zeroed row and of the zeroed row of high bits, empty where there are none.
    pub fn store_code(&self, row: &mut [u8], high: &mut [u8], index: usize, code: u8) {
        if self.high_bits() == 0 {
            store_bits(self.bits, row, index, code);
        } else {
            store_bits(4, row, index, code & 15);
            store_bits(self.high_bits(), high, index, code >> 4);
        }
    }
}

/// Bits of a code of `bits` bits that lie in the plane `codes`.
const fn low_bits(bits: u32) -> u32 {
    if bits == 8 { 8 } else { 4 }
}

/// Reads the `index`-th number of `bits` (1, 2, 4 or 8) bits, low bits first.
#[must_use]
pub(crate) fn load_bits(bits: u32, row: &[u8], index: usize) -> u8 {
    let bit = bits as usize * index;
    if bits == 8 { row[index] } else { (row[bit / 8] >> (bit % 8)) & ((1 << bits) - 1) }
}

/// Writes the `index`-th number of `bits` (1, 2, 4 or 8) bits of a zeroed row, low bits first.
pub(crate) fn store_bits(bits: u32, row: &mut [u8], index: usize, code: u8) {
    let bit = bits as usize * index;
    row[bit / 8] |= code << (bit % 8);
}

impl Layout {
    /// The planes, in the order in which they are stored.
    #[must_use]
    pub const fn planes(&self) -> &'static [Plane] {
        match self {
            Self::Raw => &[Plane::Data],
            Self::Grouped(g) => match (g.levels, g.offset) {
                (Levels::ZeroPoint, _) => &[Plane::Codes, Plane::Scales, Plane::ZeroPoints],
                (Levels::Bank(bank), _) if bank.bits() == 4 => &[Plane::Codes, Plane::Scales, Plane::RowScales],
                (Levels::Bank(_), _) => &[Plane::Codes, Plane::HighCodes, Plane::Scales, Plane::RowScales],
                (_, Some(_)) => &[Plane::Codes, Plane::Scales, Plane::Offsets],
                (_, None) => &[Plane::Codes, Plane::Scales],
            },
        }
    }

    /// Bytes of one row of `plane` for a matrix of `cols` columns whose source dtype is `dtype`.
    ///
    /// # Panics
    /// When the layout has no such plane: a bug of the caller.
    #[must_use]
    pub fn stride(&self, plane: Plane, dtype: DType, cols: usize) -> usize {
        match (self, plane) {
            (Self::Raw, Plane::Data) => cols * usize::try_from(dtype.size()).expect("at most 8"),
            (Self::Grouped(g), Plane::Codes) => g.code_stride(cols),
            (Self::Grouped(g), Plane::HighCodes) => g.high_code_stride(cols),
            (Self::Grouped(g), Plane::Scales) => g.scale_stride(cols),
            (Self::Grouped(g), Plane::RowScales) => g.row_scale_stride(cols),
            (Self::Grouped(g), Plane::Offsets) => g.groups(cols) * g.offset.expect("checked by planes()").size(),
            (Self::Grouped(g), Plane::ZeroPoints) => g.zero_point_stride(cols),
            _ => panic!("{self:?} has no plane {plane:?}"),
        }
    }

    /// Bytes of every plane of a `rows x cols` matrix, in stored order: the one place where they are computed.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a size does not fit this machine or 63 bits.
    pub fn plane_bytes(&self, dtype: DType, rows: u64, cols: u64) -> Result<Vec<(Plane, u64)>> {
        let too_large = || Error::invalid(format!("a matrix of {rows} x {cols} {dtype} weights is too large"));
        // Eight bytes a column is the widest row of any plane, so no stride can overflow below this cap.
        let cols = usize::try_from(cols).ok().filter(|&c| c < usize::MAX / 64).ok_or_else(too_large)?;
        self.planes()
            .iter()
            .map(|&plane| {
                let stride = self.stride(plane, dtype, cols) as u64;
                let bytes = stride.checked_mul(rows).filter(|&b| b < 1 << 63).ok_or_else(too_large)?;
                Ok((plane, bytes))
            })
            .collect()
    }

    /// Average cost of a weight in a matrix with long rows; `raw` depends on the dtype and has none.
    #[must_use]
    pub fn bits_per_weight(&self) -> Option<f64> {
        let Self::Grouped(g) = self else { return None };
        if g.group == ROW {
            return Some(f64::from(g.bits));
        }
        let zero_point = if g.levels == Levels::ZeroPoint { g.bits as usize } else { 0 };
        let scale = if g.bank().is_some() { 1 } else { g.scale.size() };
        let per_group = 8 * (scale + g.offset.map_or(0, Float::size)) + zero_point;
        Some(f64::from(g.bits) + per_group as f64 / g.group as f64)
    }

    /// The layout as named integers: the only thing a kernel is told about it.
    ///
    /// `LEVELS` is 0 unsigned, 1 signed, 2 zero point, 3 table, 4 bank; `GROUP` is 0 for a whole row; `SCALE_BITS` and
    /// `OFFSET_BITS` are 16, 32, or 0 for none, and with a bank 8 for its bytes; `KNEE` and `STEP` are those of the bank, 0
    /// without one. The raw layout has no constants: nothing multiplies it.
    #[must_use]
    pub fn constants(&self) -> Vec<(&'static str, u32)> {
        let Self::Grouped(g) = self else { return Vec::new() };
        let levels = match g.levels {
            Levels::Unsigned => 0,
            Levels::Signed => 1,
            Levels::ZeroPoint => 2,
            Levels::Table(_) => 3,
            Levels::Bank(_) => 4,
        };
        let bits = |f: Float| if f == Float::F16 { 16 } else { 32 };
        vec![
            ("BITS", g.bits),
            ("LEVELS", levels),
            ("GROUP", u32::try_from(g.group).expect("groups are short")),
            ("SCALE_BITS", if g.bank().is_some() { 8 } else { bits(g.scale) }),
            ("OFFSET_BITS", g.offset.map_or(0, bits)),
            ("KNEE", g.bank().map_or(0, |bank| u32::from(bank.knee()))),
            ("STEP", g.bank().map_or(0, |bank| u32::from(bank.step()))),
        ]
    }
}

/// The sixteen levels of NF4: quantiles of a normal distribution with both ends and zero pinned
/// (Dettmers et al., QLoRA, 2023), as published in f32.
pub static NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];
