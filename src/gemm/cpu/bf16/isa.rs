//! The instruction sets that multiply bf16, the best of this machine chosen once; a machine may have none.

#![expect(unsafe_code, reason = "functions that enable an instruction set are unsafe to call without it")]

use std::fmt;
use std::sync::OnceLock;

use super::kernel;
use super::panels::Panels;
use crate::gemm::Weights;
use crate::gemm::cpu::amx::Amx;
use crate::gemm::cpu::tile::Tile;

/// The kernel for one instruction set.
pub struct Isa {
    name: &'static str,
    multiply: unsafe fn(&Weights<'_>, &Panels, &mut Tile<'_>),
}

static AVX512: Isa = Isa { name: "avx512bf16", multiply: kernel::avx512 };
static AMX: Isa = Isa { name: "amx", multiply: kernel::amx };

/// The instruction sets of this machine, the best one last.
#[must_use]
pub fn available() -> Vec<&'static Isa> {
    let mut found = Vec::new();
    if is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512bf16")
        && is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("f16c")
        && is_x86_feature_detected!("fma")
    {
        found.push(&AVX512);
        if Amx::bf16().is_some() {
            found.push(&AMX);
        }
    }
    found
}

/// The best instruction set of this machine.
#[must_use]
pub fn best() -> Option<&'static Isa> {
    static BEST: OnceLock<Option<&'static Isa>> = OnceLock::new();
    *BEST.get_or_init(|| available().last().copied())
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

    pub(super) fn multiply(&self, weights: &Weights<'_>, x: &Panels, tile: &mut Tile<'_>) {
        // SAFETY: tables leave this module only where their instruction set was detected.
        unsafe { (self.multiply)(weights, x, tile) }
    }
}
