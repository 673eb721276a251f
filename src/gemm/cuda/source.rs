//! The text of kernels: what lies in `cuda/`, behind the constants of a layout.
//!
//! A compiler gets one text without includes, so that it needs no folder to look in and the text is the whole key of what
//! is kept on disk.

use std::fmt::Write as _;

use crate::attention::KvFormat;
use crate::error::{Error, Result};
use crate::layout::{Float, Grouped, Layout, Levels, ROW};
use crate::tensor::DType;

/// A kernel, as far as its text goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kernel {
    /// Weights, of all rows or of some.
    Decode,
    /// Products in f32 throughout.
    Exact,
    /// Activations in the order of tensor cores.
    Prepare,
    /// Products with few rows of activations.
    Gemv,
    /// Products with many, and those of stacks of matrices.
    Gemm,
    /// Products with many more, by instructions of sm_90a.
    Wgmma,
    /// What outliers add to products and weights.
    Outliers,
    /// Tokens into a cache of keys and values.
    Append,
    /// Attention over a cache.
    Attend,
    /// One result of those of shares of a cache.
    Merge,
    /// Keys and values of a cache as numbers.
    Recall,
}

const PTX: &str = include_str!("../../../cuda/ptx.cuh");
const DEQUANT: &str = include_str!("../../../cuda/dequant.cuh");
const NUMBERS: &str = include_str!("../../../cuda/numbers.cuh");
const HALVES: &str = include_str!("../../../cuda/halves.cuh");
const HOPPER: &str = include_str!("../../../cuda/hopper.cuh");
const FRAGMENTS: &str = include_str!("../../../cuda/fragments.cuh");
const SPLITS: &str = include_str!("../../../cuda/splits.cuh");
const TILES: &str = include_str!("../../../cuda/tiles.cuh");
const CACHE: &str = include_str!("../../../cuda/cache.cuh");

impl Kernel {
    /// Every kernel of matrices.
    pub const ALL: [Self; 7] =
        [Self::Decode, Self::Exact, Self::Prepare, Self::Gemv, Self::Gemm, Self::Wgmma, Self::Outliers];
    /// Every kernel of caches.
    pub const OF_CACHES: [Self; 4] = [Self::Append, Self::Attend, Self::Merge, Self::Recall];

    /// The name of its file in `cuda/`, without the ending.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Decode => "decode",
            Self::Exact => "exact",
            Self::Prepare => "prepare",
            Self::Gemv => "gemv",
            Self::Gemm => "gemm",
            Self::Wgmma => "wgmma",
            Self::Outliers => "outliers",
            Self::Append => "append",
            Self::Attend => "attend",
            Self::Merge => "merge",
            Self::Recall => "recall",
        }
    }

    /// The name of its function.
    #[must_use]
    pub fn entry(self) -> String {
        format!("tenpak_{}", self.name())
    }

    /// Whether it reads weights, and so has the constants of a layout.
    const fn reads_weights(self) -> bool {
        matches!(self, Self::Decode | Self::Exact | Self::Gemv | Self::Gemm | Self::Wgmma)
    }

    /// The texts that it is made of, in the order in which they include each other.
    const fn texts(self) -> &'static [&'static str] {
        match self {
            Self::Decode => &[PTX, DEQUANT, NUMBERS, include_str!("../../../cuda/decode.cu")],
            Self::Exact => &[PTX, DEQUANT, NUMBERS, TILES, include_str!("../../../cuda/exact.cu")],
            Self::Prepare => &[PTX, NUMBERS, HALVES, FRAGMENTS, TILES, include_str!("../../../cuda/prepare.cu")],
            Self::Gemv => &[PTX, DEQUANT, NUMBERS, HALVES, FRAGMENTS, SPLITS, include_str!("../../../cuda/gemv.cu")],
            Self::Gemm => {
                &[PTX, DEQUANT, NUMBERS, HALVES, FRAGMENTS, SPLITS, TILES, include_str!("../../../cuda/gemm.cu")]
            }
            Self::Wgmma => &[
                PTX,
                DEQUANT,
                NUMBERS,
                HALVES,
                FRAGMENTS,
                HOPPER,
                SPLITS,
                TILES,
                include_str!("../../../cuda/wgmma.cu"),
            ],
            Self::Outliers => &[PTX, NUMBERS, include_str!("../../../cuda/outliers.cu")],
            Self::Append => &[PTX, NUMBERS, CACHE, include_str!("../../../cuda/append.cu")],
            Self::Attend => &[PTX, NUMBERS, CACHE, HALVES, include_str!("../../../cuda/attend.cu")],
            Self::Merge => &[PTX, NUMBERS, include_str!("../../../cuda/merge.cu")],
            Self::Recall => &[PTX, NUMBERS, CACHE, include_str!("../../../cuda/recall.cu")],
        }
    }
}

/// A kernel and all that it is compiled with.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Variant {
    kernel: Kernel,
    constants: Vec<(&'static str, u32)>,
    levels: Option<String>,
}

impl Variant {
    /// A kernel for a layout, for activations or weights out of `numbers`, and constants of its own.
    ///
    /// `aligned` says that rows are whole runs of 32 columns and all planes and activations begin at multiples of 16
    /// bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] for other numbers than F32, F16 and BF16.
    pub fn new(
        kernel: Kernel,
        layout: &Grouped,
        numbers: DType,
        aligned: bool,
        own: &[(&'static str, u32)],
    ) -> Result<Self> {
        let mut constants = vec![("NUMBERS", number_type(numbers)?), ("ALIGNED", u32::from(aligned))];
        constants.extend(own);
        let mut levels = None;
        if kernel.reads_weights() {
            constants.extend(Layout::Grouped(*layout).constants());
            levels = table(layout);
        }
        Ok(Self { kernel, constants, levels })
    }

    /// A kernel for a cache of keys and values, for queries or tokens out of `numbers`, and constants of its own.
    ///
    /// # Errors
    /// As [`Variant::new`].
    pub fn of_cache(kernel: Kernel, format: &KvFormat, numbers: DType, own: &[(&'static str, u32)]) -> Result<Self> {
        let mut constants = vec![("NUMBERS", number_type(numbers)?), ("ALIGNED", 0)];
        constants.extend(format.constants());
        constants.extend(own);
        Ok(Self { kernel, constants, levels: None })
    }

    /// Which kernel.
    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// What is defined in front of the text, by name; the levels of a table are `TABLE`.
    #[must_use]
    pub fn definitions(&self) -> Vec<(&'static str, String)> {
        let constants = self.constants.iter().map(|&(name, value)| (name, value.to_string()));
        constants.chain(self.levels.clone().map(|levels| ("TABLE", levels))).collect()
    }

    /// The whole text.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        for (name, value) in self.definitions() {
            let _ = writeln!(text, "#define {name} {value}");
        }
        let included = |line: &&str| !line.starts_with("#include \"") && !line.starts_with("#pragma once");
        for part in self.kernel.texts() {
            for line in part.lines().filter(included) {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }
}

/// What kernels call a type of numbers.
fn number_type(numbers: DType) -> Result<u32> {
    match numbers {
        DType::F32 => Ok(0),
        DType::F16 => Ok(1),
        DType::BF16 => Ok(2),
        other => Err(Error::invalid(format!("numbers on a CUDA device are {other}, expected F32, F16 or BF16"))),
    }
}

/// Whether tensor cores can multiply with a layout: its groups have scales that are halves or less. Scales of 32 bits are
/// for weights that leave the range of halves, and so would their products.
#[must_use]
pub fn has_pairs(layout: &Grouped) -> bool {
    layout.bank().is_some() || layout.group() == ROW || layout.scale() == Float::F16
}

/// Whether codes stand for levels of a table or a bank.
#[must_use]
pub fn is_looked_up(layout: &Grouped) -> bool {
    matches!(layout.levels(), Levels::Table(_) | Levels::Bank(_))
}

/// The levels that codes are looked up in, as C writes numbers.
fn table(layout: &Grouped) -> Option<String> {
    let levels: Vec<f32> = match layout.levels() {
        Levels::Table(table) => table.to_vec(),
        Levels::Bank(bank) => bank.levels().iter().map(|&level| f32::from(level)).collect(),
        Levels::Unsigned | Levels::Signed | Levels::ZeroPoint => return None,
    };
    Some(levels.iter().map(|level| format!("{level:?}f")).collect::<Vec<_>>().join(","))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codecs;

    #[test]
    fn texts_need_no_folder_and_differ_wherever_layouts_do() {
        let mut seen = std::collections::HashMap::new();
        for codec in codecs::all() {
            let Ok(layout) = codec.grouped() else { continue };
            for kernel in Kernel::ALL {
                let text = Variant::new(kernel, layout, DType::F16, true, &[("M_TILE", 1)]).unwrap().text();
                assert!(!text.contains("\n#include \""), "{kernel:?} includes a file");
                assert!(text.contains(&format!(" {}(", kernel.entry())), "{kernel:?} has no entry");
                if kernel == Kernel::Decode {
                    let before = seen.insert(text, *layout);
                    assert!(before.is_none_or(|before| before == *layout), "{} has the text of another", codec.id);
                }
            }
        }
        let format = KvFormat::new(2, 64, 4, 8).unwrap();
        for kernel in Kernel::OF_CACHES {
            let text = Variant::of_cache(kernel, &format, DType::BF16, &[]).unwrap().text();
            assert!(!text.contains("\n#include \""), "{kernel:?} includes a file");
            assert!(text.contains(&format!(" {}(", kernel.entry())), "{kernel:?} has no entry");
            assert!(text.contains("#define HEAD_DIM 64\n"), "{kernel:?} does not know its format");
        }
        assert!(
            Variant::new(Kernel::Decode, codecs::get("int8_sym_v1").unwrap().grouped().unwrap(), DType::I8, true, &[])
                .is_err()
        );
    }
}
