//! What a tensor is before and after compression: a name, a dtype, a shape, and little-endian bytes in C order.
//!
//! Everything that multiplies dimensions goes through [`TensorInfo::new`], which checks the product once; nothing
//! downstream multiplies again.

use std::fmt;
use std::str::FromStr;

use crate::codec::isa;
use crate::error::{Error, Result};
use crate::limits::{self, Limits};

macro_rules! dtypes {
    ($($variant:ident $name:literal $size:literal $doc:literal),* $(,)?) => {
        /// How one element of a tensor is stored, named as safetensors names it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum DType { $(#[doc = $doc] $variant),* }

        impl DType {
            /// Every dtype this build reads.
            pub const ALL: &[Self] = &[$(Self::$variant),*];

            /// The name in headers and reports.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),* }
            }

            /// Bytes of one element.
            #[must_use]
            pub const fn size(self) -> u64 {
                match self { $(Self::$variant => $size),* }
            }
        }
    };
}

dtypes! {
    F64 "F64" 8 "IEEE double.",
    F32 "F32" 4 "IEEE single.",
    F16 "F16" 2 "IEEE half.",
    BF16 "BF16" 2 "The upper half of a single.",
    F8E4M3 "F8_E4M3" 1 "FP8 with 4 exponent bits, no infinities.",
    F8E5M2 "F8_E5M2" 1 "FP8 with 5 exponent bits.",
    I64 "I64" 8 "Signed 64-bit integer.",
    I32 "I32" 4 "Signed 32-bit integer.",
    I16 "I16" 2 "Signed 16-bit integer.",
    I8 "I8" 1 "Signed byte.",
    U64 "U64" 8 "Unsigned 64-bit integer.",
    U32 "U32" 4 "Unsigned 32-bit integer.",
    U16 "U16" 2 "Unsigned 16-bit integer.",
    U8 "U8" 1 "Byte.",
    Bool "BOOL" 1 "A byte that is 0 or 1.",
}

impl DType {
    /// Whether the elements are floating-point numbers, the only ones a lossy codec may touch.
    #[must_use]
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F64 | Self::F32 | Self::F16 | Self::BF16 | Self::F8E4M3 | Self::F8E5M2)
    }

    /// The greatest finite number of a float narrower than f32.
    #[must_use]
    pub fn max(self) -> Option<f32> {
        match self {
            Self::F16 => Some(half::f16::MAX.to_f32()),
            Self::BF16 => Some(half::bf16::MAX.to_f32()),
            Self::F8E4M3 => Some(float8::F8E4M3::MAX.to_f32()),
            Self::F8E5M2 => Some(float8::F8E5M2::MAX.to_f32()),
            _ => None,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for DType {
    type Err = Error;

    /// Reads the safetensors name, or the numpy/torch name (`float32`, `bfloat16`, …).
    fn from_str(s: &str) -> Result<Self> {
        let alias = match s {
            "float64" | "f64" => "F64",
            "float32" | "f32" => "F32",
            "float16" | "f16" => "F16",
            "bfloat16" | "bf16" => "BF16",
            other => other,
        };
        Self::ALL.iter().copied().find(|d| d.name() == alias).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|d| d.name()).collect();
            // It may come from a file, whose control characters a terminal would obey.
            let found: String = s.chars().take(100).flat_map(char::escape_debug).collect();
            Error::invalid(format!("unknown dtype '{found}', expected one of {}", known.join(", ")))
        })
    }
}

/// Name, dtype and shape of a tensor, with the product of its dimensions already checked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    name: Box<str>,
    dtype: DType,
    shape: Box<[u64]>,
}

impl TensorInfo {
    /// A tensor description within the default [`Limits`].
    ///
    /// # Errors
    /// Those of [`TensorInfo::within`].
    pub fn new(name: impl Into<String>, dtype: DType, shape: Vec<u64>) -> Result<Self> {
        Self::within(&Limits::DEFAULT, name, dtype, shape)
    }

    /// A tensor description within `limits`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the name is empty or has control characters, or when the product of the non-zero
    /// dimensions and the element size does not fit 63 bits; [`Error::Limit`] when the name is too long or there are
    /// too many dimensions.
    pub fn within(limits: &Limits, name: impl Into<String>, dtype: DType, shape: Vec<u64>) -> Result<Self> {
        let name = name.into();
        check_name(&name, limits)?;
        limits::check("dimensions of a tensor", limits.dims, shape.len() as u64)?;
        let bytes = shape
            .iter()
            .filter(|&&d| d != 0)
            .try_fold(dtype.size(), |product, &d| product.checked_mul(d))
            .filter(|&product| product < 1 << 63);
        if bytes.is_none() {
            return Err(Error::invalid(format!(
                "tensor '{name}' of shape {shape:?} and dtype {dtype} is larger than 2^63 bytes"
            )));
        }
        Ok(Self { name: name.into(), dtype, shape: shape.into() })
    }

    /// The name, unique in its model.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// How each element is stored.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The dimensions; empty for a scalar.
    #[must_use]
    pub fn shape(&self) -> &[u64] {
        &self.shape
    }

    /// How many elements there are.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes of the elements.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.elements() * self.dtype.size()
    }

    /// The tensor as a matrix: all leading dimensions by the last one; a vector is one row, a scalar one weight.
    #[must_use]
    pub fn matrix(&self) -> (u64, u64) {
        match self.shape.split_last() {
            None => (1, 1),
            Some((&cols, leading)) => (leading.iter().product(), cols),
        }
    }
}

/// Refuses a name that a header, a terminal or a file system could choke on.
fn check_name(name: &str, limits: &Limits) -> Result<()> {
    if name.is_empty() {
        return Err(Error::invalid("a tensor has an empty name, expected at least one character"));
    }
    limits::check("bytes of a tensor name", limits.name_bytes, name.len() as u64)?;
    if let Some(c) = name.chars().find(|c| c.is_control()) {
        return Err(Error::invalid(format!("tensor name {name:?} has the control character {c:?}")));
    }
    Ok(())
}

/// Applies `$convert` to each little-endian element of `$bytes` and stores the result in `$out`.
macro_rules! each_le {
    ($ty:ty, $bytes:expr, $out:expr, $convert:expr) => {
        for (value, chunk) in $out.iter_mut().zip($bytes.as_chunks::<{ size_of::<$ty>() }>().0) {
            *value = $convert(<$ty>::from_le_bytes(*chunk));
        }
    };
}

/// Reads `out.len()` elements of `dtype` from little-endian `bytes` as f32, rounding to nearest where f32 is narrower.
///
/// # Panics
/// When `bytes` is not exactly as long as `out` needs: a bug of the caller.
#[expect(clippy::cast_possible_truncation, reason = "f64 to f32 rounds to nearest, which is the contract")]
pub fn to_f32(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len() as u64, out.len() as u64 * dtype.size(), "bytes do not match the elements");
    match dtype {
        DType::F64 => each_le!(f64, bytes, out, |x| x as f32),
        DType::F32 => each_le!(f32, bytes, out, |x| x),
        DType::F16 => isa::best().f16_to_f32(bytes, out),
        DType::BF16 => isa::best().bf16_to_f32(bytes, out),
        DType::F8E4M3 => each_le!(u8, bytes, out, |x| float8::F8E4M3::from_bits(x).to_f32()),
        DType::F8E5M2 => each_le!(u8, bytes, out, |x| float8::F8E5M2::from_bits(x).to_f32()),
        DType::I64 => each_le!(i64, bytes, out, |x| x as f32),
        DType::I32 => each_le!(i32, bytes, out, |x| x as f32),
        DType::I16 => each_le!(i16, bytes, out, f32::from),
        DType::I8 => each_le!(i8, bytes, out, f32::from),
        DType::U64 => each_le!(u64, bytes, out, |x| x as f32),
        DType::U32 => each_le!(u32, bytes, out, |x| x as f32),
        DType::U16 => each_le!(u16, bytes, out, f32::from),
        DType::U8 | DType::Bool => each_le!(u8, bytes, out, f32::from),
    }
}

/// Converts to a two-byte dtype with finite weights kept within its range, so that rounding makes none infinite;
/// infinities and NaN stay as they are.
fn narrow(dtype: DType, values: &[f32], out: &mut [u8], convert: impl Fn(&[f32], &mut [u8])) {
    const PART: usize = 1024;
    let max = dtype.max().expect("only narrow floats are converted here");
    let mut part = [0.0; PART];
    for (values, out) in values.chunks(PART).zip(out.chunks_mut(2 * PART)) {
        for (kept, &x) in part.iter_mut().zip(values) {
            *kept = if x.is_finite() { x.clamp(-max, max) } else { x };
        }
        convert(&part[..values.len()], out);
    }
}

/// Applies `$convert` to each f32 and stores the little-endian result in `$out`.
macro_rules! each_from {
    ($ty:ty, $values:expr, $out:expr, $convert:expr) => {
        for (chunk, &value) in $out.as_chunks_mut::<{ size_of::<$ty>() }>().0.iter_mut().zip($values) {
            let converted: $ty = $convert(value);
            *chunk = converted.to_le_bytes();
        }
    };
}

/// Writes f32 `values` as little-endian elements of a floating-point `dtype`, rounding to nearest even.
///
/// A finite number beyond the largest of the dtype becomes the largest: decoded weights may lie half a step outside the
/// range of their source, and must not become infinite for it.
///
/// # Errors
/// [`Error::Invalid`] when `dtype` is not a floating-point type.
///
/// # Panics
/// When `out` is not exactly as long as `values` need: a bug of the caller.
pub fn from_f32(dtype: DType, values: &[f32], out: &mut [u8]) -> Result<()> {
    assert_eq!(out.len() as u64, values.len() as u64 * dtype.size(), "bytes do not match the elements");
    match dtype {
        DType::F64 => each_from!(f64, values, out, f64::from),
        DType::F32 => each_from!(f32, values, out, |x| x),
        DType::F16 => narrow(dtype, values, out, |values, out| isa::best().f32_to_f16(values, out)),
        DType::BF16 => narrow(dtype, values, out, |values, out| isa::best().f32_to_bf16(values, out)),
        DType::F8E4M3 => each_from!(u8, values, out, |x| float8::F8E4M3::from_f32(x).to_bits()),
        DType::F8E5M2 => each_from!(u8, values, out, |x| float8::F8E5M2::from_f32(x).to_bits()),
        other => return Err(Error::invalid(format!("weights cannot be written as {other}, choose a float dtype"))),
    }
    Ok(())
}
