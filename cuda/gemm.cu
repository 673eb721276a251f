// y[m, n] = x[m, k] * w[n, k]^T for many rows of activations, and for those of a stack of matrices (mixture of
// experts).
//
// Work: a block of WARPS warps takes 32 * WARPS rows of weights, a tile of M_BLOCK rows of activations and a share of
// the columns. A warp has 32 rows of weights of its own, which go from global memory to registers and become halves
// there once; activations, put in order by `tenpak_prepare`, go through shared memory in STAGES stages and serve all
// warps.
//
// What decides the shape: shared memory delivers 128 bytes a cycle. A vector of activations of 512 bytes a warp feeds
// two tiles of 16 rows of weights, four instructions, and that is what keeps tensor cores and not shared memory busy.
// Blocks of the same rows of weights are neighbours, so that weights come from memory once and then from the L2
// cache.
#include "dequant.cuh"
#include "fragments.cuh"
#include "splits.cuh"
#include "tiles.cuh"

#define ROWS (32 * WARPS)
#define TILES (M_BLOCK / 8)
// Blocks of threads that a multiprocessor should have registers for: left alone, a compiler aims at more of them and puts
// some numbers into local memory for it.
#define GEMM_RESIDENT (M_BLOCK > 32 ? 2 : 3)
// Vectors of activations of one stage.
#define STAGE (OCTETS * M_BLOCK)

// Starts the copies of a block of columns into its stage.
DEVICE void copy_stage(uint4 *stages, const uint4 *tile, u32 block) {
    const uint4 *from = tile + (size_t)block * STAGE;
    uint4 *to = stages + block % STAGES * STAGE;
    for (u32 i = threadIdx.x; i < STAGE; i += 32 * WARPS) copy_async(to + i, from + i);
}

KERNEL void __launch_bounds__(32 * WARPS, GEMM_RESIDENT) tenpak_gemm(
    Planes planes, const uint4 *x, const float *inverses, const int *ends, u32 experts, void *y, float *partial,
    u32 *counters, u32 m
) {
    DYNAMIC_SHARED(memory);
    __shared__ u32 levels[LEVEL_WORDS > 0 ? LEVEL_WORDS : 1];
    Tile tile = tile_of(ends, experts, m, M_BLOCK, blockIdx.x);
    if (tile.rows == 0) return;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 blocks = blocks_of(planes.cols), shares = gridDim.z;
    u32 begin = share_begin(blockIdx.z, shares, blocks), end = share_begin(blockIdx.z + 1, shares, blocks);
    u32 last_run = (planes.cols - 1) / RUN * RUN;
    // Rows of one matrix of the stack, and where they stand in the whole.
    u32 rows = planes.rows / experts, base = tile.expert * rows;
    u32 n0 = blockIdx.y * ROWS + warp * 32;
    const uint4 *own = x + (size_t)blockIdx.x * blocks * STAGE;
    uint4 *stages = (uint4 *)memory;

#pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++) {
        if (begin + s < end) copy_stage(stages, own, begin + s);
        copies_commit();
    }
    Run next[2][2];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            next[i][h] = load_run(
                planes, base + min(n0 + 16 * i + 8 * h + g, rows - 1), min(begin * BLOCK + RUN * t, last_run)
            );
    fill_levels(levels, threadIdx.x, 32 * WARPS);

    float sums[2][TILES][4] = {};
    for (u32 block = begin; block < end; block++) {
        copies_wait<STAGES - 2>();
        // Everyone's copies are there, and everyone is done with the stage that comes next.
        __syncthreads();
        if (block + STAGES - 1 < end) copy_stage(stages, own, block + STAGES - 1);
        copies_commit();
        Run now[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                now[i][h] = next[i][h];
                if (block + 1 < end)
                    next[i][h] = load_run(
                        planes, base + min(n0 + 16 * i + 8 * h + g, rows - 1),
                        min((block + 1) * BLOCK + RUN * t, last_run)
                    );
            }
        const uint4 *stage = stages + block % STAGES * STAGE + lane;
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 first[2][4], second[2][4];
#pragma unroll
            for (int i = 0; i < 2; i++) {
                u32 pairs[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    octet(now[i][h], w, pair_group(now[i][h], w * RUN_GROUPS / 4), levels, pairs[h]);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    first[i][c] = pairs[c % 2][c / 2];
                    second[i][c] = pairs[c % 2][2 + c / 2];
                }
            }
#pragma unroll
            for (int j = 0; j < TILES; j++) {
                uint4 b = stage[w * M_BLOCK * 4 + j * 32];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    multiply_add(sums[i][j], first[i], b.x, b.y);
                    multiply_add(sums[i][j], second[i], b.z, b.w);
                }
            }
        }
    }
    copies_wait<0>();
    __syncthreads();

    // Eight rows of activations at a time go through a corner of shared memory, so that a warp writes 32 results of a
    // row.
    float *corner = (float *)memory + warp * 8 * 33;
    size_t size = (size_t)m * rows;
    u32 n = n0 + lane;
    float scale = n < rows ? row_scale(planes, base + n) : 0.0f;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int c = 0; c < 4; c++) corner[(2 * t + c % 2) * 33 + 16 * i + 8 * (c / 2) + g] = sums[i][j][c];
        __syncwarp();
#pragma unroll
        for (u32 r = 0; r < 8; r++) {
            u32 row = 8 * j + r;
            if (row >= tile.rows || n >= rows) continue;
            float sum = mul(corner[r * 33 + lane], load_const(inverses + blockIdx.x * M_BLOCK + row));
            size_t at = (size_t)(tile.first + row) * rows + n;
            if (shares == 1)
                store_number(y, at, mul(sum, scale));
            else
                partial[blockIdx.z * size + at] = sum;
        }
        __syncwarp();
    }
    if (shares == 1 || !is_last(counters + blockIdx.y * gridDim.x + blockIdx.x, shares)) return;
    if (n >= rows) return;
    for (u32 row = 0; row < tile.rows; row++) {
        size_t at = (size_t)(tile.first + row) * rows + n;
        store_number(y, at, mul(sum_of_shares(partial, shares, size, at), scale));
    }
}
