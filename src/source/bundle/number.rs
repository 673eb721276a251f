//! One number of a bundle, in the dtype that it is stored in.
//!
//! F32 and narrower floats are parsed straight into f32: going through f64 would round twice.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, Visitor};

use crate::tensor::{DType, from_f32};

/// The little-endian bytes of a number, in the first ones of these.
pub(super) type Bytes = [u8; 8];

/// Reads a number that must be exact, or round without overflow, in the dtype.
#[derive(Clone, Copy)]
pub(super) struct Number(pub(super) DType);

impl<'de> DeserializeSeed<'de> for Number {
    type Value = Bytes;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Bytes, D::Error> {
        match self.0 {
            DType::F64 => json.deserialize_f64(self),
            float if float.is_float() => json.deserialize_f32(self),
            _ => json.deserialize_any(self),
        }
    }
}

impl Number {
    fn float<E: Error>(self, value: f64) -> Result<Bytes, E> {
        let mut bytes = Bytes::default();
        if self.0 == DType::F64 {
            return Ok(value.to_le_bytes());
        }
        #[expect(clippy::cast_possible_truncation, reason = "parsed as f32 and only widened by serde; integers round")]
        let value = value as f32;
        if value.abs() > largest(self.0) {
            return Err(E::custom(format!("{value:e} overflows {}", self.0)));
        }
        let size = usize::try_from(self.0.size()).expect("at most 8");
        from_f32(self.0, &[value], &mut bytes[..size]).map_err(E::custom)?;
        Ok(bytes)
    }

    fn integer<E: Error>(self, value: i128) -> Result<Bytes, E> {
        let bytes = match self.0 {
            DType::I64 => i64::try_from(value).map(|v| v.to_le_bytes()),
            DType::I32 => i32::try_from(value).map(|v| padded(v.to_le_bytes())),
            DType::I16 => i16::try_from(value).map(|v| padded(v.to_le_bytes())),
            DType::I8 => i8::try_from(value).map(|v| padded(v.to_le_bytes())),
            DType::U64 => u64::try_from(value).map(|v| v.to_le_bytes()),
            DType::U32 => u32::try_from(value).map(|v| padded(v.to_le_bytes())),
            DType::U16 => u16::try_from(value).map(|v| padded(v.to_le_bytes())),
            DType::Bool if value > 1 => {
                return Err(E::custom(format!("{value} is no BOOL, expected 0, 1, false or true")));
            }
            _ => u8::try_from(value).map(|v| padded(v.to_le_bytes())),
        };
        bytes.map_err(|_| E::custom(format!("{value} overflows {}", self.0)))
    }
}

/// The largest finite number of a floating-point dtype.
fn largest(dtype: DType) -> f32 {
    match dtype {
        DType::F16 => half::f16::MAX.to_f32(),
        DType::BF16 => half::bf16::MAX.to_f32(),
        DType::F8E4M3 => 448.0,
        DType::F8E5M2 => 57344.0,
        _ => f32::MAX,
    }
}

fn padded<const N: usize>(bytes: [u8; N]) -> Bytes {
    let mut all = Bytes::default();
    all[..N].copy_from_slice(&bytes);
    all
}

impl Visitor<'_> for Number {
    type Value = Bytes;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a number of {} in one flat list, in C order", self.0)
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Bytes, E> {
        match self.0 {
            DType::F64 => self.float(value as f64),
            // Straight to f32, since f64 in between would round twice.
            float if float.is_float() => self.float(f64::from(value as f32)),
            _ => self.integer(value.into()),
        }
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Bytes, E> {
        match self.0 {
            DType::F64 => self.float(value as f64),
            float if float.is_float() => self.float(f64::from(value as f32)),
            _ => self.integer(value.into()),
        }
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Bytes, E> {
        if self.0.is_float() {
            return self.float(value);
        }
        Err(E::custom(format!("{value:e} is not written as an integer, but the tensor is {}", self.0)))
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Bytes, E> {
        if self.0 == DType::Bool {
            return self.integer(value.into());
        }
        Err(E::invalid_type(serde::de::Unexpected::Bool(value), &self))
    }
}
