//! Which kernels compute a product, on how many blocks, with how much memory: a function of sizes alone.
//!
//! | rows of activations | kernels |
//! |---|---|
//! | any, in f32 throughout, or scales of groups beyond halves | `exact.cu` |
//! | 1 to [`FEW`] | `gemv.cu` |
//! | more, or a stack of matrices | `prepare.cu`, then `gemm.cu` |
//! | [`MANY`] and more of one matrix, on Hopper | `prepare.cu`, then `wgmma.cu` |
//!
//! Where there are outliers, `outliers.cu` adds them in the end.

use super::source::{Kernel, Variant, has_pairs, is_looked_up};
use crate::error::{Error, Result};
use crate::layout::Grouped;
use crate::tensor::DType;

/// Most rows of activations of `gemv.cu`: two tiles of tensor cores.
pub const FEW: usize = 16;

/// Rows of activations from which `wgmma.cu` is taken where there is its instruction: two of its tiles.
pub const MANY: usize = 256;

/// Columns of a block of columns; see `fragments.cuh`.
const BLOCK: usize = 128;
/// Bytes of shared memory that activations may take of a block of threads that puts them in order by itself: more would
/// leave too few blocks on a multiprocessor to have enough loads on their way.
const FUSED_BYTES: usize = 64 << 10;
/// Rows of weights of a block of `exact.cu`, `gemm.cu` and `outliers.cu`, and the warps of the second.
const EXACT_ROWS: usize = 32;
const GEMM_ROWS: usize = 128;
const GEMM_WARPS: usize = 4;
/// Rows of activations and of weights of a tile of `wgmma.cu`, of which a block has two or four, and its stages.
const WGMMA_ROWS: usize = 128;
const WGMMA_WEIGHTS: usize = 64;
const WGMMA_STAGES: usize = 5;
const OUTLIER_ROWS: usize = 32;
/// Most blocks that share the columns of one result: their sums are added up by one of them.
const SHARES: usize = 16;

/// What a plan needs to know of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hardware {
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may have at most.
    pub shared_bytes: usize,
    /// Whether it has the instructions of `wgmma.cu`, and they are wanted.
    pub wgmma: bool,
}

/// What is to be multiplied.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Problem {
    /// The layout of the weights.
    pub layout: Grouped,
    /// Rows of each matrix: results of a row of activations.
    pub rows: usize,
    /// Columns.
    pub cols: usize,
    /// Matrices of the stack; 1 where there is no stack.
    pub experts: usize,
    /// Rows of activations, of all matrices together.
    pub m: usize,
    /// Type of activations and results.
    pub numbers: DType,
    /// Whether the product is computed in f32 throughout.
    pub exact: bool,
    /// Whether all addresses are multiples of 16.
    pub aligned: bool,
    /// Whether there are outliers.
    pub outliers: bool,
}

/// One launch of a kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// The kernel.
    pub variant: Variant,
    /// Blocks along each dimension.
    pub grid: [u32; 3],
    /// Threads of a block.
    pub threads: u32,
    /// Bytes of shared memory beside what the kernel has by itself.
    pub shared: u32,
}

/// Where the parts of a product's own memory on the device begin, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Workspace {
    /// Factors of rows of activations, behind the activations in order.
    pub inverses: usize,
    /// Sums of shares.
    pub partial: usize,
    /// Counters, which must be zero.
    pub counters: usize,
    /// The end.
    pub bytes: usize,
}

/// A product.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Product {
    /// What puts activations in order, where the next step does not do so itself.
    pub prepare: Option<Step>,
    /// What multiplies.
    pub multiply: Step,
    /// What adds the outliers.
    pub outliers: Option<Step>,
    /// Rows of activations of a tile, in order.
    pub tile_rows: u32,
    /// The memory of its own.
    pub workspace: Workspace,
}

impl Product {
    /// How to compute a product of which no side is empty.
    ///
    /// # Errors
    /// [`Error::Invalid`] for numbers that are not F32, F16 or BF16, or sizes beyond what a launch can count.
    pub fn new(problem: &Problem, hardware: Hardware) -> Result<Self> {
        let Problem { layout, m, experts, exact, .. } = *problem;
        let product = if exact || !has_pairs(&layout) {
            problem.exact()
        } else if experts == 1 && m <= FEW {
            problem.few(hardware)
        } else if hardware.wgmma && experts == 1 && m >= MANY && problem.is_aligned() {
            problem.hopper(hardware)
        } else {
            problem.many(hardware)
        }?;
        let outliers = problem.outliers.then(|| problem.add_outliers()).transpose()?;
        Ok(Self { outliers, ..product })
    }

    /// Blocks that share the columns.
    #[must_use]
    pub fn shares(&self) -> u32 {
        let [_, y, z] = self.multiply.grid;
        match self.multiply.variant.kernel() {
            Kernel::Gemv => y,
            Kernel::Gemm | Kernel::Wgmma => z,
            _ => 1,
        }
    }
}

impl Problem {
    fn blocks(&self) -> usize {
        self.cols.div_ceil(BLOCK)
    }

    fn is_aligned(&self) -> bool {
        self.aligned && self.cols.is_multiple_of(32)
    }

    fn step(
        &self,
        kernel: Kernel,
        own: &[(&'static str, u32)],
        grid: [usize; 3],
        threads: usize,
        shared: usize,
    ) -> Result<Step> {
        let grid = [count(grid[0], i32::MAX.unsigned_abs())?, count(grid[1], 65_535)?, count(grid[2], 65_535)?];
        let variant = Variant::new(kernel, &self.layout, self.numbers, self.is_aligned(), own)?;
        Ok(Step { variant, grid, threads: count(threads, 1024)?, shared: count(shared, u32::MAX)? })
    }

    /// Tiles of so many rows of activations; each expert may have one that is not full.
    fn tiles(&self, rows: usize) -> usize {
        if self.experts == 1 { self.m.div_ceil(rows) } else { self.m / rows + self.experts.min(self.m) }
    }

    fn exact(&self) -> Result<Product> {
        let tile = [1, 4, 8].into_iter().find(|&tile| self.m <= tile).unwrap_or(8);
        let grid = [self.rows.div_ceil(EXACT_ROWS), self.tiles(tile), 1];
        let multiply = self.step(Kernel::Exact, &[("M_TILE", count(tile, 8)?)], grid, 256, 0)?;
        Ok(Product { prepare: None, multiply, outliers: None, tile_rows: 0, workspace: Workspace::default() })
    }

    fn add_outliers(&self) -> Result<Step> {
        let own = [("WIDE_COLUMNS", u32::from(self.cols > 1 << 16)), ("DECODED", 0)];
        let grid = [(self.rows * self.experts).div_ceil(OUTLIER_ROWS), self.m.div_ceil(8), 1];
        self.step(Kernel::Outliers, &own, grid, 256, 0)
    }

    fn few(&self, hardware: Hardware) -> Result<Product> {
        let m_tiles = self.m.div_ceil(8);
        let wanted = [4, 2, 1].into_iter().find(|&tiles| self.m > tiles).unwrap_or(1);
        // Many rows of weights to a block read activations less often, but every multiprocessor should have a block.
        let row_tiles = [4, 2, 1]
            .into_iter()
            .filter(|&tiles| tiles <= wanted)
            .find(|&tiles| self.rows.div_ceil(16 * tiles) >= hardware.multiprocessors)
            .unwrap_or(1);
        let row_blocks = self.rows.div_ceil(16 * row_tiles);
        // Each of the eight warps should have a block of columns.
        let shares = self.shares(row_blocks, 2 * hardware.multiprocessors, 8);
        let arranged = self.blocks().div_ceil(shares) * BLOCK * 2 * self.m;
        let sums = 8 * 8 * m_tiles * 16 * row_tiles * 4;
        let fused = arranged <= FUSED_BYTES.min(hardware.shared_bytes - STATIC_BYTES);
        let own = [("ROW_TILES", count(row_tiles, 4)?), ("M_TILES", count(m_tiles, 2)?), ("FUSED", u32::from(fused))];
        let shared = if fused { arranged.max(sums) } else { sums };
        let multiply = self.step(Kernel::Gemv, &own, [row_blocks, shares, 1], 256, shared)?;
        let tile_rows = self.m;
        let prepare = (!fused).then(|| self.step(Kernel::Prepare, &[], [tile_rows, 1, 1], 256, 0)).transpose()?;
        let workspace = self.workspace(if fused { 0 } else { tile_rows }, shares, row_blocks);
        Ok(Product { prepare, multiply, outliers: None, tile_rows: count(tile_rows, u32::MAX)?, workspace })
    }

    fn many(&self, hardware: Hardware) -> Result<Product> {
        // Experts get uneven numbers of rows: a tile of twice the average wastes little, and two of them waste no more.
        let usual = if self.experts == 1 { self.m } else { 2 * self.m.div_ceil(self.experts) };
        let tile_rows = [16, 32].into_iter().find(|&tile| usual <= tile).unwrap_or(64);
        let stages = if tile_rows == 64 { 3 } else { 4 };
        let tiles = self.tiles(tile_rows);
        let row_blocks = self.rows.div_ceil(GEMM_ROWS);
        let shares = self.shares(tiles * row_blocks, 2 * hardware.multiprocessors, 4);
        let own = [("M_BLOCK", count(tile_rows, 64)?), ("WARPS", count(GEMM_WARPS, 8)?), ("STAGES", count(stages, 4)?)];
        let shared = stages * tile_rows * BLOCK * 2;
        let multiply = self.step(Kernel::Gemm, &own, [tiles, row_blocks, shares], 32 * GEMM_WARPS, shared)?;
        let prepare = Some(self.step(Kernel::Prepare, &[], [tile_rows, tiles, 1], 256, 0)?);
        let workspace = self.workspace(tiles * tile_rows, shares, tiles * row_blocks);
        Ok(Product { prepare, multiply, outliers: None, tile_rows: count(tile_rows, 64)?, workspace })
    }

    fn hopper(&self, hardware: Hardware) -> Result<Product> {
        // Registers hold the results of two tiles of weights beside codes of 4 bits.
        let weight_tiles = if self.layout.bits() == 4 && !is_looked_up(&self.layout) { 2 } else { 1 };
        let weights = 2 * WGMMA_WEIGHTS * weight_tiles;
        let (tiles, row_blocks) = (self.tiles(WGMMA_ROWS), self.rows.div_ceil(weights));
        let shares = self.shares(tiles * row_blocks, hardware.multiprocessors, 8);
        let own = [
            ("M_BLOCK", count(WGMMA_ROWS, 128)?),
            ("WEIGHT_TILES", count(weight_tiles, 2)?),
            ("STAGES", count(WGMMA_STAGES, 8)?),
        ];
        let shared = WGMMA_STAGES * WGMMA_ROWS * BLOCK * 2;
        let multiply = self.step(Kernel::Wgmma, &own, [tiles, row_blocks, shares], 256, shared)?;
        let prepare = Some(self.step(Kernel::Prepare, &[("MATRICES", 1)], [WGMMA_ROWS, tiles, 1], 256, 0)?);
        let workspace = self.workspace(tiles * WGMMA_ROWS, shares, tiles * row_blocks);
        Ok(Product { prepare, multiply, outliers: None, tile_rows: count(WGMMA_ROWS, 128)?, workspace })
    }

    /// How many blocks share the columns of a result, so that there are `wanted` blocks in all, each with at least `least`
    /// blocks of columns.
    fn shares(&self, blocks: usize, wanted: usize, least: usize) -> usize {
        if 2 * blocks > wanted {
            return 1;
        }
        wanted.div_ceil(blocks).min(self.blocks() / least).clamp(1, SHARES)
    }

    /// Memory for so many rows of activations in order, sums of shares, and counters.
    fn workspace(&self, rows: usize, shares: usize, counters: usize) -> Workspace {
        let align = |bytes: usize| bytes.next_multiple_of(256);
        let inverses = align(rows * self.blocks() * BLOCK * 2);
        let partial = align(inverses + 4 * rows);
        let (sums, counters_bytes) = if shares > 1 { (4 * shares * self.m * self.rows, 4 * counters) } else { (0, 0) };
        let counters = align(partial + sums);
        Workspace { inverses, partial, counters, bytes: counters + counters_bytes }
    }
}

/// Shared memory that kernels have by themselves at most: the levels of a bank for each lane, factors and magnitudes.
pub const STATIC_BYTES: usize = 64 * 32 * 4 + 1024;

/// A number of blocks, threads or bytes, as launches count them.
pub(super) fn count(number: usize, most: u32) -> Result<u32> {
    u32::try_from(number).ok().filter(|&n| n <= most).ok_or_else(|| {
        Error::invalid(format!("a product needs {number} blocks or bytes, expected at most {most}; divide it by rows"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codecs;

    const H200: Hardware = Hardware { multiprocessors: 132, shared_bytes: 232_448, wgmma: true };
    const SMALL: Hardware = Hardware { multiprocessors: 16, shared_bytes: 101_376, wgmma: false };

    fn problem(id: &str, m: usize, rows: usize, cols: usize) -> Problem {
        let layout = *codecs::get(id).unwrap().grouped().unwrap();
        Problem {
            layout,
            rows,
            cols,
            experts: 1,
            m,
            numbers: DType::BF16,
            exact: false,
            aligned: true,
            outliers: false,
        }
    }

    fn kernels(product: &Product) -> Vec<&'static str> {
        product.prepare.iter().chain([&product.multiply]).map(|step| step.variant.kernel().name()).collect()
    }

    #[test]
    fn few_rows_take_one_launch_and_many_take_two() {
        let plan = |m, k| Product::new(&problem("int4_g128_fp16_v1", m, 8192, k), H200).unwrap();
        assert_eq!(kernels(&plan(1, 8192)), ["gemv"]);
        assert_eq!(kernels(&plan(4, 8192)), ["gemv"]);
        assert_eq!(kernels(&plan(16, 8192)), ["prepare", "gemv"]);
        assert_eq!(kernels(&plan(17, 8192)), ["prepare", "gemm"]);
        assert_eq!(kernels(&plan(4096, 8192)), ["prepare", "wgmma"]);
        assert_eq!(kernels(&plan(255, 8192)), ["prepare", "gemm"]);
        let without = Hardware { wgmma: false, ..H200 };
        let many = problem("int4_g128_fp16_v1", 4096, 8192, 8192);
        assert_eq!(kernels(&Product::new(&many, without).unwrap()), ["prepare", "gemm"]);
        let stack = Problem { experts: 8, ..many };
        assert_eq!(kernels(&Product::new(&stack, H200).unwrap()), ["prepare", "gemm"]);
        assert_eq!(kernels(&plan(4096, 8200)), ["prepare", "gemm"], "rows that are not whole runs");
        let wide = problem("int4_g8_v1", 4, 64, 64);
        assert_eq!(kernels(&Product::new(&wide, H200).unwrap()), ["exact"], "scales beyond halves");
        let exact = Problem { exact: true, ..problem("int4_g8_fp16_v1", 4, 64, 64) };
        assert_eq!(kernels(&Product::new(&exact, H200).unwrap()), ["exact"]);
    }

    #[test]
    fn every_plan_covers_its_results_and_fits_its_device() {
        for hardware in [H200, SMALL] {
            for codec in codecs::all().iter().filter(|codec| codec.grouped().is_ok()) {
                for m in [1, 2, 3, 5, 8, 9, 16, 17, 32, 33, 64, 65, 500, 8192] {
                    for (rows, cols) in [(1, 1), (17, 33), (1000, 4096), (4096, 1000), (8192, 28672), (151_936, 896)] {
                        for experts in [1, 7] {
                            let problem = Problem { experts, ..problem(codec.id, m, rows, cols) };
                            let plan = Product::new(&problem, hardware).unwrap();
                            let what = format!("{} m={m} n={rows} k={cols}: {plan:?}", codec.id);
                            let Step { grid, shared, variant, .. } = &plan.multiply;
                            let value = |name: &str| {
                                let all = variant.definitions();
                                let found = all.iter().find(|(n, _)| *n == name).expect("a constant of the kernel");
                                found.1.parse::<usize>().unwrap()
                            };
                            let [x, y, _] = grid.map(|n| n as usize);
                            match variant.kernel() {
                                Kernel::Exact => assert!(x * 32 >= rows && y * value("M_TILE") >= m, "{what}"),
                                Kernel::Gemv => {
                                    assert!(x * 16 * value("ROW_TILES") >= rows && 8 * value("M_TILES") >= m, "{what}");
                                }
                                Kernel::Wgmma => {
                                    let weights = 128 * value("WEIGHT_TILES");
                                    assert!(x * value("M_BLOCK") >= m && y * weights >= rows, "{what}");
                                    assert_eq!(*shared as usize, value("STAGES") * value("M_BLOCK") * 256, "{what}");
                                    assert_eq!(plan.tile_rows as usize, value("M_BLOCK"), "{what}");
                                }
                                _ => assert!(x * value("M_BLOCK") >= m && y * 32 * value("WARPS") >= rows, "{what}"),
                            }
                            assert!(*shared as usize + STATIC_BYTES <= hardware.shared_bytes, "{what}");
                            assert!(plan.shares() as usize <= cols.div_ceil(BLOCK), "{what}: a share without columns");
                            let Workspace { inverses, partial, counters, bytes } = plan.workspace;
                            assert!(inverses <= partial && partial <= counters && counters <= bytes, "{what}");
                            if plan.shares() > 1 {
                                assert!(counters - partial >= 4 * plan.shares() as usize * m * rows, "{what}");
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn a_stack_has_a_tile_for_every_expert_however_rows_are_spread() {
        for experts in [2, 8, 64] {
            for m in [1, 5, 16, 100, 1000] {
                let plan =
                    Product::new(&Problem { experts, ..problem("int4_g32_fp16_v1", m, 128, 256) }, H200).unwrap();
                let tile = plan.tile_rows as usize;
                // The worst case: as many experts as can be have one row beyond full tiles.
                let with_rest = experts.min(m);
                let worst = (m - with_rest) / tile + with_rest;
                assert!(plan.multiply.grid[0] as usize >= worst, "{experts} experts, {m} rows");
            }
        }
    }

    #[test]
    fn unaligned_rows_are_said_to_be_so() {
        let text = |p: &Problem| Product::new(p, H200).unwrap().multiply.variant.text();
        let whole = problem("int4_g8_fp16_v1", 1, 64, 64);
        assert!(text(&whole).contains("#define ALIGNED 1\n"));
        assert!(text(&Problem { aligned: false, ..whole }).contains("#define ALIGNED 0\n"));
        assert!(text(&problem("int4_g8_fp16_v1", 1, 64, 72)).contains("#define ALIGNED 0\n"));
    }
}
