//! The instruction sets: one table of functions for each, the best of this machine chosen once.
//!
//! Every table holds the same generic code over vectors of another width, and gives the same bytes; tests run them all
//! against the reference. A table is handed out only where its instruction set was detected.

#![expect(unsafe_code, reason = "functions that enable an instruction set are unsafe to call without it")]

use std::fmt;
use std::sync::OnceLock;

use super::lanes::array::Array;
use super::{Planes, PlanesMut, convert, decode, encode};
use crate::fit::{self, Fit, OutOfRange, Params};
use crate::layout::Grouped;

type Encode = unsafe fn(&Grouped, Fit, &[f32], usize, &mut PlanesMut<'_>) -> Result<(), OutOfRange>;

type Nested = unsafe fn(&Grouped, &[f32], Option<&[f32]>) -> Result<Vec<Params>, OutOfRange>;

/// The codec's functions for one instruction set.
pub struct Isa {
    name: &'static str,
    encode: Encode,
    decode: unsafe fn(&Grouped, &Planes<'_>, usize, &mut [f32]),
    nested: Nested,
    f16_to_f32: unsafe fn(&[u8], &mut [f32]),
    f32_to_f16: unsafe fn(&[f32], &mut [u8]),
    bf16_to_f32: unsafe fn(&[u8], &mut [f32]),
    f32_to_bf16: unsafe fn(&[f32], &mut [u8]),
}

/// Stamps the generic code into a module with a table of its functions.
macro_rules! stamp {
    ($module:ident, $lanes:ty, $eight:ty $(, $features:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $features)])?
            fn encode_rows(
                layout: &Grouped,
                fit: Fit,
                weights: &[f32],
                cols: usize,
                planes: &mut PlanesMut<'_>,
            ) -> Result<(), OutOfRange> {
                encode::encode::<$lanes>(layout, fit, weights, cols, planes)
            }

            $(#[target_feature(enable = $features)])?
            fn decode_rows(layout: &Grouped, planes: &Planes<'_>, cols: usize, out: &mut [f32]) {
                decode::decode::<$lanes, $eight>(layout, planes, cols, out);
            }

            $(#[target_feature(enable = $features)])?
            fn nested(
                layout: &Grouped,
                weights: &[f32],
                importance: Option<&[f32]>,
            ) -> Result<Vec<Params>, OutOfRange> {
                fit::nested::lanes::<$lanes>(layout, weights, importance)
            }

            $(#[target_feature(enable = $features)])?
            fn f16_to_f32(bytes: &[u8], out: &mut [f32]) {
                convert::f16_to_f32::<$lanes>(bytes, out);
            }

            $(#[target_feature(enable = $features)])?
            fn f32_to_f16(values: &[f32], out: &mut [u8]) {
                convert::f32_to_f16::<$lanes>(values, out);
            }

            $(#[target_feature(enable = $features)])?
            fn bf16_to_f32(bytes: &[u8], out: &mut [f32]) {
                convert::bf16_to_f32(bytes, out);
            }

            $(#[target_feature(enable = $features)])?
            fn f32_to_bf16(values: &[f32], out: &mut [u8]) {
                convert::f32_to_bf16(values, out);
            }

            pub(super) static ISA: Isa = Isa {
                name: stringify!($module),
                encode: encode_rows,
                decode: decode_rows,
                nested,
                f16_to_f32,
                f32_to_f16,
                bf16_to_f32,
                f32_to_bf16,
            };
        }
    };
}

stamp!(portable, Array<4>, Array<8>);
#[cfg(target_arch = "aarch64")]
stamp!(neon, crate::codec::lanes::neon::F32x4, Array<8>);
#[cfg(target_arch = "x86_64")]
stamp!(sse2, crate::codec::lanes::sse2::F32x4, Array<8>);
#[cfg(target_arch = "x86_64")]
stamp!(avx2, crate::codec::lanes::avx2::F32x8, crate::codec::lanes::avx2::F32x8, "avx2,f16c");
#[cfg(target_arch = "x86_64")]
stamp!(
    avx512,
    crate::codec::lanes::avx512::F32x16,
    crate::codec::lanes::avx2::F32x8,
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c"
);

/// The instruction sets of this machine, the best one last.
#[must_use]
pub fn available() -> Vec<&'static Isa> {
    let mut found = vec![&portable::ISA];
    #[cfg(target_arch = "aarch64")]
    found.push(&neon::ISA);
    #[cfg(target_arch = "x86_64")]
    {
        found.push(&sse2::ISA);
        let halves = is_x86_feature_detected!("f16c");
        if is_x86_feature_detected!("avx2") && halves {
            found.push(&avx2::ISA);
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
            {
                found.push(&avx512::ISA);
            }
        }
    }
    found
}

/// The best instruction set of this machine.
#[must_use]
pub fn best() -> &'static Isa {
    static BEST: OnceLock<&'static Isa> = OnceLock::new();
    BEST.get_or_init(|| available().last().copied().unwrap_or(&portable::ISA))
}

impl fmt::Debug for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Isa {
    /// The name of the instruction set.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Encodes consecutive rows of finite weights into zeroed planes, on this thread.
    ///
    /// # Errors
    /// [`OutOfRange`] when a scale or offset does not fit its stored type.
    pub fn encode_rows(
        &self,
        layout: &Grouped,
        fit: Fit,
        weights: &[f32],
        cols: usize,
        planes: &mut PlanesMut<'_>,
    ) -> Result<(), OutOfRange> {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.encode)(layout, fit, weights, cols, planes) }
    }

    /// The parameters of a row of nested scales; see [`fit::nested::row`].
    ///
    /// # Errors
    /// [`OutOfRange`] when the row has no scale that can be stored.
    pub fn nested(
        &self,
        layout: &Grouped,
        weights: &[f32],
        importance: Option<&[f32]>,
    ) -> Result<Vec<Params>, OutOfRange> {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.nested)(layout, weights, importance) }
    }

    /// Decodes consecutive rows, on this thread.
    pub fn decode_rows(&self, layout: &Grouped, planes: &Planes<'_>, cols: usize, out: &mut [f32]) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.decode)(layout, planes, cols, out) }
    }

    /// Reads little-endian IEEE halves as f32.
    ///
    /// # Panics
    /// When there are not two bytes for every number.
    pub fn f16_to_f32(&self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), 2 * out.len(), "bytes do not match the elements");
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.f16_to_f32)(bytes, out) }
    }

    /// Writes f32 as little-endian IEEE halves, rounding to nearest even.
    ///
    /// # Panics
    /// When there are not two bytes for every number.
    pub fn f32_to_f16(&self, values: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), 2 * values.len(), "bytes do not match the elements");
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.f32_to_f16)(values, out) }
    }

    /// Reads little-endian upper halves of singles as f32.
    ///
    /// # Panics
    /// When there are not two bytes for every number.
    pub fn bf16_to_f32(&self, bytes: &[u8], out: &mut [f32]) {
        assert_eq!(bytes.len(), 2 * out.len(), "bytes do not match the elements");
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.bf16_to_f32)(bytes, out) }
    }

    /// Writes f32 as little-endian upper halves of singles, rounding to nearest even.
    ///
    /// # Panics
    /// When there are not two bytes for every number.
    pub fn f32_to_bf16(&self, values: &[f32], out: &mut [u8]) {
        assert_eq!(out.len(), 2 * values.len(), "bytes do not match the elements");
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.f32_to_bf16)(values, out) }
    }
}
