//! The instruction sets: one table of functions for each, the best of this machine chosen once.
//!
//! Every table holds the same generic code over vectors of another width, which add up in another order: results differ
//! within the bound of [`crate::gemm::Act::F32`]. A table is handed out only where its instruction set was detected.

#![expect(unsafe_code, reason = "functions that enable an instruction set are unsafe to call without it")]

use std::fmt;
use std::sync::OnceLock;

use super::few::{self, Spread, SpreadRow};
#[cfg(target_arch = "x86_64")]
use super::found;
use super::many::{self, Packed, PackedPanel};
use super::vector::Vector;
use super::{Arranged, Product, Tile};
use crate::codec::lanes::array::Array;
use crate::error::Result;
use crate::gemm::cpu::nested;
use crate::gemm::{Weights, check_sizes};
use crate::layout::Grouped;

/// The functions of products in f32 for one instruction set.
pub struct Isa {
    name: &'static str,
    lanes: usize,
    height: usize,
    spread: unsafe fn(&Grouped, &[f32], SpreadRow<'_>),
    pack: unsafe fn(&[f32], usize, PackedPanel<'_>),
    few: unsafe fn(&Weights<'_>, &Spread, &mut Tile<'_>),
    many: unsafe fn(&Weights<'_>, &Packed, &mut Tile<'_>),
    /// The layout by which a [`Spread`] makes room for the kernel of few rows.
    room: fn(&Grouped) -> Grouped,
}

/// Stamps the generic code into a module with a table of its functions.
macro_rules! stamp {
    ($module:ident, $lanes:ty, $eight:ty $(, $features:literal)?) => {
        mod $module {
            use super::*;

            $(#[target_feature(enable = $features)])?
            fn spread(layout: &Grouped, x: &[f32], row: SpreadRow<'_>) {
                few::spread::<$lanes>(&nested::plain(layout), x, row);
            }

            $(#[target_feature(enable = $features)])?
            fn pack(x: &[f32], cols: usize, panel: PackedPanel<'_>) {
                many::pack::<$lanes>(x, cols, panel);
            }

            $(#[target_feature(enable = $features)])?
            fn few(weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
                few::multiply::<$lanes, $eight>(weights, spread, tile);
            }

            $(#[target_feature(enable = $features)])?
            fn many(weights: &Weights<'_>, packed: &Packed, tile: &mut Tile<'_>) {
                many::multiply::<$lanes, $eight>(weights, packed, tile);
            }

            pub(super) const ISA: Isa = Isa {
                name: stringify!($module),
                lanes: <$lanes as crate::codec::lanes::Lanes>::N,
                height: <$lanes as Vector>::HEIGHT,
                spread,
                pack,
                few,
                many,
                room: nested::plain,
            };
        }
    };
}

stamp!(portable, Array<4>, Array<8>);
#[cfg(target_arch = "aarch64")]
stamp!(neon, crate::codec::lanes::neon::F32x4, Array<8>);
#[cfg(target_arch = "x86_64")]
stamp!(avx2, crate::codec::lanes::avx2::F32x8, crate::codec::lanes::avx2::F32x8, "avx2,f16c,fma");
#[cfg(target_arch = "x86_64")]
stamp!(
    avx512,
    crate::codec::lanes::avx512::F32x16,
    crate::codec::lanes::avx2::F32x8,
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,fma"
);

/// [`avx512`] with byte permutations that find levels of a bank.
#[cfg(target_arch = "x86_64")]
const VBMI: Isa =
    Isa { name: "avx512vbmi", spread: spread_for_vbmi, few: few_with_vbmi, room: found::room, ..avx512::ISA };

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,f16c,fma")]
fn spread_for_vbmi(layout: &Grouped, x: &[f32], row: SpreadRow<'_>) {
    if found::knows(layout) {
        found::spread(x, row);
    } else {
        // SAFETY: this function enables what that one does.
        unsafe { (avx512::ISA.spread)(layout, x, row) }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vbmi,avx2,f16c,fma")]
fn few_with_vbmi(weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
    if found::knows(weights.layout()) {
        found::multiply(weights, spread, tile);
    } else {
        // SAFETY: this function enables more than that one does.
        unsafe { (avx512::ISA.few)(weights, spread, tile) }
    }
}

/// The instruction sets of this machine, the best one last.
#[must_use]
pub fn available() -> Vec<&'static Isa> {
    let mut found = vec![&portable::ISA];
    #[cfg(target_arch = "aarch64")]
    found.push(&neon::ISA);
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("f16c") && is_x86_feature_detected!("fma") {
        found.push(&avx2::ISA);
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
        {
            found.push(&avx512::ISA);
            if is_x86_feature_detected!("avx512vbmi") {
                found.push(&VBMI);
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

    /// [`crate::gemm::cpu::multiply`] in f32 with this instruction set.
    ///
    /// # Errors
    /// [`crate::Error::Invalid`] when `x` is not `m * k` or `y` not `m * n` numbers.
    pub fn multiply(&self, weights: &Weights<'_>, x: &[f32], m: usize, y: &mut [f32]) -> Result<()> {
        check_sizes(weights, x.len(), m, y.len())?;
        let small = crate::gemm::cpu::is_small(weights.rows(), weights.cols(), m);
        super::multiply(self, Product::list(*weights, x, m, y), small);
        Ok(())
    }

    /// Lanes of a vector.
    pub(super) fn lanes(&self) -> usize {
        self.lanes
    }

    /// Room for the activations of a product.
    pub(super) fn room(&self, product: &Product<'_>) -> Arranged {
        let (weights, m) = (&product.weights, product.m);
        if m <= few::MOST {
            Arranged::Few(Spread::new(&(self.room)(weights.layout()), weights.cols(), m, self.lanes))
        } else {
            Arranged::Many(Packed::new(weights.cols(), m, self.height))
        }
    }

    /// Brings a row of activations into order.
    pub(super) fn spread(&self, layout: &Grouped, x: &[f32], row: SpreadRow<'_>) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.spread)(layout, x, row) }
    }

    /// Packs some columns of rows of activations.
    pub(super) fn pack(&self, x: &[f32], cols: usize, panel: PackedPanel<'_>) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.pack)(x, cols, panel) }
    }

    /// Fills a tile that has all rows of activations, at most [`few::MOST`].
    pub(super) fn few(&self, weights: &Weights<'_>, spread: &Spread, tile: &mut Tile<'_>) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.few)(weights, spread, tile) }
    }

    /// Fills a tile of whole strips of activations.
    pub(super) fn many(&self, weights: &Weights<'_>, packed: &Packed, tile: &mut Tile<'_>) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.many)(weights, packed, tile) }
    }
}
