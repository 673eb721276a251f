//! The instruction sets: one table of functions for each, the best of this machine chosen once.
//!
//! Integer sums are exact, so tables differ only in the order in which floats are added.

#![expect(unsafe_code, reason = "functions that enable an instruction set are unsafe to call without it")]

use std::fmt;
use std::sync::OnceLock;

use super::activations::{self, Records, Rounded};
use super::few::Stored;
use super::lanes::array::Words;
use super::panels::Panels;
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{CODES, SIGNED, ZERO_POINTS, few, many};
use crate::error::{Error, Result};
#[cfg(target_arch = "x86_64")]
use crate::gemm::cpu::amx::Amx;
use crate::gemm::cpu::nested;
use crate::gemm::cpu::tile::Tile;
use crate::gemm::cpu::{Product, is_small};
use crate::gemm::{Weights, check_sizes};
use crate::layout::{Grouped, Levels};

type Few = unsafe fn(&Weights<'_>, &Records, &mut Tile<'_>);
type Many = unsafe fn(&Weights<'_>, &Panels, &mut Tile<'_>);

/// The kernels for one instruction set.
pub struct Isa {
    name: &'static str,
    /// Rows of activations that share a panel.
    pub(super) lanes: usize,
    /// From how many rows of activations on panels pay.
    pub(super) many_from: usize,
    round: unsafe fn(&[f32], &mut [i8], &mut [f32]),
    records: unsafe fn(&Rounded, &Grouped) -> Records,
    few: Few,
    many: Many,
    /// Whether the kernel of few rows takes 4-bit codes of a bank as they are stored.
    finds_levels: bool,
}

/// Stamps the generic code into a module with a table of its functions.
macro_rules! stamp {
    ($module:ident, $lanes:ty, $transposer:ty, $n:literal x $m:literal, from $from:literal $(, $features:literal)?) => {
        mod $module {
            use super::*;
            use super::super::lanes::Lanes as _;

            $(#[target_feature(enable = $features)])?
            fn round(x: &[f32], codes: &mut [i8], scales: &mut [f32]) {
                activations::round_row(x, codes, scales);
            }

            $(#[target_feature(enable = $features)])?
            fn records(x: &Rounded, layout: &Grouped) -> Records {
                Records::new::<$lanes>(x, layout)
            }

            $(#[target_feature(enable = $features)])?
            fn few(weights: &Weights<'_>, x: &Records, tile: &mut Tile<'_>) {
                match (weights.layout().levels(), weights.layout().bits()) {
                    (Levels::Unsigned, 4) => few::multiply::<$lanes, _, CODES>(Stored::<4>, weights, x, tile),
                    (Levels::Signed, 4) => few::multiply::<$lanes, _, SIGNED>(Stored::<4>, weights, x, tile),
                    (Levels::ZeroPoint, 4) => few::multiply::<$lanes, _, ZERO_POINTS>(Stored::<4>, weights, x, tile),
                    (Levels::Signed, 8) | (Levels::Bank(_), _) => {
                        few::multiply::<$lanes, _, SIGNED>(Stored::<8>, weights, x, tile);
                    }
                    _ => unreachable!("checked by supports()"),
                }
            }

            $(#[target_feature(enable = $features)])?
            fn many(weights: &Weights<'_>, x: &Panels, tile: &mut Tile<'_>) {
                match (weights.layout().levels(), weights.layout().bits()) {
                    (Levels::Unsigned, 4) => many::multiply::<$lanes, $transposer, 4, CODES, $n, $m>(weights, x, tile),
                    (Levels::Signed, 4) => many::multiply::<$lanes, $transposer, 4, SIGNED, $n, $m>(weights, x, tile),
                    (Levels::ZeroPoint, 4) => {
                        many::multiply::<$lanes, $transposer, 4, ZERO_POINTS, $n, $m>(weights, x, tile);
                    }
                    (Levels::Signed, 8) | (Levels::Bank(_), _) => {
                        many::multiply::<$lanes, $transposer, 8, SIGNED, $n, $m>(weights, x, tile);
                    }
                    _ => unreachable!("checked by supports()"),
                }
            }

            pub(super) const ISA: Isa = Isa {
                name: stringify!($module),
                lanes: <$lanes>::N,
                many_from: $from,
                round,
                records,
                few,
                many,
                finds_levels: false,
            };
        }
    };
}

stamp!(portable, Words, crate::codec::lanes::array::Array<4>, 2 x 2, from 9);
#[cfg(target_arch = "aarch64")]
stamp!(neon, super::super::lanes::neon::Neon, crate::codec::lanes::neon::F32x4, 4 x 2, from 9);
#[cfg(target_arch = "x86_64")]
stamp!(
    avx2,
    super::super::lanes::avx2::Avx<false>,
    crate::codec::lanes::avx2::F32x8,
    2 x 2,
    from 9,
    "avx2,f16c,fma"
);
#[cfg(target_arch = "x86_64")]
stamp!(
    avxvnni,
    super::super::lanes::avx2::Avx<true>,
    crate::codec::lanes::avx2::F32x8,
    2 x 2,
    from 9,
    "avx2,f16c,fma,avxvnni"
);
#[cfg(target_arch = "x86_64")]
stamp!(
    avx512vnni,
    super::super::lanes::avx512::Vnni512,
    crate::codec::lanes::avx512::F32x16,
    4 x 2,
    from 9,
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,f16c,fma"
);

/// [`avx512vnni`] with a permutation that finds levels of a bank.
#[cfg(target_arch = "x86_64")]
const VBMI: Isa = Isa { name: "avx512vbmi", few: few_with_vbmi, finds_levels: true, ..avx512vnni::ISA };

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi,avx2,f16c,fma")]
fn few_with_vbmi(weights: &Weights<'_>, x: &Records, tile: &mut Tile<'_>) {
    match weights.layout().bank() {
        Some(bank) if bank.bits() == 4 => {
            let source = super::lanes::avx512::Found::new(bank, few::lanes_shift(weights));
            few::multiply::<super::lanes::avx512::Vnni512, _, SIGNED>(source, weights, x, tile);
        }
        // SAFETY: this function enables more than that one does.
        _ => unsafe { (avx512vnni::ISA.few)(weights, x, tile) },
    }
}

/// [`VBMI`] with the kernel of tiles.
#[cfg(target_arch = "x86_64")]
const AMX: Isa = Isa { name: "amx", many: tiles::multiply, ..VBMI };

/// The instruction sets of this machine, the best one last.
#[must_use]
pub fn available() -> Vec<&'static Isa> {
    let mut found = vec![&portable::ISA];
    #[cfg(target_arch = "aarch64")]
    found.push(&neon::ISA);
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c") {
            found.push(&avx2::ISA);
            if is_x86_feature_detected!("avxvnni") {
                found.push(&avxvnni::ISA);
            }
            if is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni")
            {
                found.push(&avx512vnni::ISA);
                if is_x86_feature_detected!("avx512vbmi") {
                    found.push(&VBMI);
                    if Amx::int8().is_some() {
                        found.push(&AMX);
                    }
                }
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

    /// Whether the kernels know a layout.
    #[must_use]
    pub fn supports(&self, layout: &Grouped) -> bool {
        super::supports(layout)
    }

    /// [`crate::gemm::cpu::multiply`] in this arithmetic with this instruction set.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `x` is not `m * k` or `y` not `m * n` numbers, or for a layout that is not supported.
    pub fn multiply(&self, weights: &Weights<'_>, x: &[f32], m: usize, y: &mut [f32]) -> Result<()> {
        check_sizes(weights, x.len(), m, y.len())?;
        if !self.supports(weights.layout()) {
            return Err(Error::invalid("no kernel of this arithmetic knows the layout"));
        }
        super::multiply(self, Product::list(*weights, x, m, y), is_small(weights.rows(), weights.cols(), m));
        Ok(())
    }

    /// [`activations::round_row`]
    pub(super) fn round_row(&self, x: &[f32], codes: &mut [i8], scales: &mut [f32]) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.round)(x, codes, scales) }
    }

    /// [`Records::new`] for what the kernel of few rows takes.
    pub(super) fn records(&self, x: &Rounded, layout: &Grouped) -> Records {
        let stored = self.finds_levels && layout.bits() == 4;
        let layout = if stored { *layout } else { nested::plain(layout) };
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.records)(x, &layout) }
    }

    /// [`few::multiply`]
    pub(super) fn few(&self, weights: &Weights<'_>, x: &Records, tile: &mut Tile<'_>) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.few)(weights, x, tile) }
    }

    /// [`many::multiply`]
    pub(super) fn many(&self, weights: &Weights<'_>, x: &Panels, tile: &mut Tile<'_>) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.many)(weights, x, tile) }
    }
}
