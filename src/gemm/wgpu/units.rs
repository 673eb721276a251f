//! Matrix units: which an adapter has that products can use, and the text of the kernel for them.
//!
//! Vulkan calls them cooperative matrices, Metal matrices of a SIMD group. wgpu has them as an experiment. The kernel has not
//! yet run on hardware that has them: what is tested is that it compiles for each, and, with loops in place of the three
//! operations on fragments, that it computes the right products.

use std::fmt::Write;

use wgpu::{CooperativeMatrixProperties, CooperativeScalarType, Features};

use super::adapter::Adapter;

/// How products with many rows of activations use the matrix units of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MatrixUnits {
    /// Where it has some of a size and type that kernels use.
    #[default]
    Native,
    /// Not at all.
    Never,
    /// As if it had some of this size, 8 or 16, with loops in their place: slow, for tests on devices without them.
    Emulated(u32),
}

/// The matrix units that products use, with activations and weights as f32 and as halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Units {
    pub native: bool,
    single: Option<u32>,
    half: Option<u32>,
}

/// What has to be asked for where matrix units are used.
pub(super) const FEATURES: Features = Features::EXPERIMENTAL_COOPERATIVE_MATRIX.union(Features::SUBGROUP);

/// The least number of threads of a subgroup: so that no more of them than teams are in a workgroup.
const LEAST_SUBGROUP: u32 = 32;

impl Units {
    /// Those that a device with these features is used with.
    pub fn new(wanted: MatrixUnits, features: Features, described: &Adapter, adapter: &wgpu::Adapter) -> Self {
        match wanted {
            MatrixUnits::Never => Self::default(),
            MatrixUnits::Emulated(size) => Self { native: false, single: Some(size), half: Some(size) },
            MatrixUnits::Native => {
                let large = described.subgroups.is_some_and(|(least, _)| least >= LEAST_SUBGROUP);
                if !features.contains(FEATURES) || !large {
                    return Self::default();
                }
                Self::of(&adapter.cooperative_matrix_properties())
            }
        }
    }

    /// The largest ones of those that an adapter lists.
    fn of(listed: &[CooperativeMatrixProperties]) -> Self {
        let largest = |wanted| {
            let fits = |p: &&CooperativeMatrixProperties| {
                let square = p.m_size == p.n_size && p.n_size == p.k_size && (p.m_size == 8 || p.m_size == 16);
                square && p.ab_type == wanted && p.cr_type == CooperativeScalarType::F32
            };
            listed.iter().filter(fits).map(|p| p.m_size).max()
        };
        let (single, half) = (largest(CooperativeScalarType::F32), largest(CooperativeScalarType::F16));
        Self { native: true, single, half }
    }

    /// The size of those that a product uses.
    pub fn size(&self, half: bool) -> Option<u32> {
        if half { self.half } else { self.single }
    }
}

/// The text of the kernel, but for what reads weights: lines for every fragment of a team are written out, because
/// fragments cannot be numbered in a loop.
pub(super) fn text(size: u32, native: bool) -> String {
    let (mut declare, mut multiply, mut store) = (String::new(), String::new(), String::new());
    let line = |text: &mut String, line: String| writeln!(text, "{line}").expect("a string takes all");
    let (lefts, rights) = (32 / size, 16 / size);
    for i in 0..lefts {
        line(&mut multiply, format!("let left{i} = left({}u * PITCH + column);", i * size));
    }
    for j in 0..rights {
        line(&mut multiply, format!("let right{j} = right((team * TEAM_ROWS + {}u) * PITCH + column);", j * size));
    }
    for i in 0..lefts {
        for j in 0..rights {
            line(&mut declare, format!("var sums{i}{j} = nothing();"));
            line(&mut multiply, format!("sums{i}{j} = multiply_add(left{i}, right{j}, sums{i}{j});"));
            let at = "place.subgroup * SIZE * SIZE";
            let (m, row) = (i * size, j * size);
            line(&mut store, format!("stage({at}, sums{i}{j});\nworkgroupBarrier();"));
            line(&mut store, format!("store(place, first_m + {m}u, first_row + team * TEAM_ROWS + {row}u);"));
            line(&mut store, "workgroupBarrier();".to_owned());
        }
    }
    let shared = include_str!("shaders/units.wgsl");
    let shared = shared.replace("@DECLARE@", &declare).replace("@MULTIPLY@", &multiply).replace("@STORE@", &store);
    let fragments =
        if native { include_str!("shaders/units_native.wgsl") } else { include_str!("shaders/units_emulated.wgsl") };
    format!("const SIZE: u32 = {size}u;\n{shared}\n{}", fragments.replace("@SIZE@", &size.to_string()))
}

#[cfg(test)]
mod tests {
    use wgpu::naga::back::pipeline_constants::process_overrides;
    use wgpu::naga::back::{PipelineConstants, spv};
    use wgpu::naga::front::wgsl::{Frontend, Options};
    use wgpu::naga::ir::ShaderStage;
    use wgpu::naga::valid::{Capabilities, ValidationFlags, Validator};

    use super::*;
    use crate::codecs;
    use crate::gemm::wgpu::kernel::{Kernel, source};
    use crate::layout::Layout;

    /// A kernel for each layout of the registry, compiled as a Vulkan driver gets it.
    fn compiled(kernel: Kernel, half: bool) -> Vec<Vec<u32>> {
        let source = source(kernel, half, true);
        let capabilities = Capabilities::all();
        let options = Options { parse_doc_comments: false, capabilities };
        let module = Frontend::new_with_options(options).parse(&source);
        let module = module.unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
        let mut validator = Validator::new(ValidationFlags::all(), capabilities);
        let info = validator.validate(&module).unwrap_or_else(|e| panic!("{}", e.emit_to_string(&source)));
        let layouts = codecs::all().iter().map(|codec| codec.layout).filter(|layout| *layout != Layout::Raw);
        let compile = |layout: Layout| {
            let constants: PipelineConstants =
                layout.constants().into_iter().map(|(name, value)| (name.to_owned(), f64::from(value))).collect();
            let entry = Some((ShaderStage::Compute, "main"));
            let (module, info) = process_overrides(&module, &info, entry, &constants).unwrap();
            let options = spv::Options { lang_version: (1, 6), ..spv::Options::default() };
            spv::write_vec(&module, &info, &options, None).unwrap()
        };
        layouts.map(compile).collect()
    }

    /// Words of SPIR-V instructions by their number.
    fn count(words: &[u32], wanted: u32) -> usize {
        let (mut at, mut found) = (5, 0);
        while at < words.len() {
            found += usize::from(words[at] & 0xffff == wanted);
            at += usize::try_from(words[at] >> 16).unwrap();
        }
        found
    }

    #[test]
    fn the_kernel_compiles_for_every_layout_and_kind_of_units_and_multiplies_on_them() {
        const MULTIPLY_ADD: u32 = 4459;
        for (size, half) in [(16, true), (8, true), (8, false), (16, false)] {
            for native in [true, false] {
                for words in compiled(Kernel::Units { size, native }, half) {
                    assert_eq!(count(&words, MULTIPLY_ADD) > 0, native, "{size}, halves {half}");
                }
            }
        }
    }

    #[test]
    fn units_are_used_where_they_are_square_and_add_up_in_f32() {
        let listed = |m_size, n_size, k_size, ab_type, cr_type| CooperativeMatrixProperties {
            m_size,
            n_size,
            k_size,
            ab_type,
            cr_type,
            saturating_accumulation: false,
        };
        use CooperativeScalarType::{F16, F32, I32};
        let nvidia = [listed(16, 8, 16, F16, F32), listed(16, 16, 16, F16, F16), listed(16, 16, 16, F16, F32)];
        assert_eq!(Units::of(&nvidia), Units { native: true, single: None, half: Some(16) });
        let apple = [listed(8, 8, 8, F32, F32), listed(8, 8, 8, F16, F16), listed(8, 8, 8, F16, F32)];
        assert_eq!(Units::of(&apple), Units { native: true, single: Some(8), half: Some(8) });
        let none = [listed(16, 16, 16, I32, I32), listed(8, 16, 16, F16, F32), listed(16, 16, 16, F16, F16)];
        assert_eq!(Units::of(&none), Units { native: true, single: None, half: None });
    }
}
