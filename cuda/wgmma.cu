// y[m, n] = x[m, k] * w[n, k]^T for many rows of activations, by the instructions that Hopper alone has (sm_90a).
//
// Work: a block of two warpgroups takes 128 * WEIGHT_TILES rows of weights, M_BLOCK rows of activations and a share of
// the columns. A warpgroup multiplies tiles of 64 rows of weights, which are its registers, with all rows of activations,
// which are in shared memory: what a warp has of a tile are 16 rows, and its tiles are consecutive ones. Weights go from
// global memory to registers and become halves there once; a product is on its way while the next octet is unpacked.
//
// `tenpak_prepare` (MATRICES) has put activations into the order in which the instruction reads them: matrices of 8 rows
// and 16 bytes, one after the other, so that a block of columns is one piece of memory. One bulk copy brings it, which
// needs no map of a tensor from the driver, and nothing is swizzled, since the 128 bytes of a matrix are all banks.
//
// What decides the shape: 64 rows of weights and 128 of activations take 64 cycles and 64 of the 128 bytes a cycle that
// shared memory delivers, so that products and not reads are the limit; and with 256 rows of weights to a block
// activations come from the L2 cache half as often as with 128.
#include "dequant.cuh"
#include "fragments.cuh"
#include "hopper.cuh"
#include "splits.cuh"
#include "tiles.cuh"

#define GROUPS_OF_WARPS 2
#define THREADS (128 * GROUPS_OF_WARPS)
#define ROWS (64 * WEIGHT_TILES * GROUPS_OF_WARPS)
// Bytes of a block of columns of a tile, and of one of its 8 steps of 16 columns.
#define STAGE_BYTES (BLOCK * M_BLOCK * 2)
#define STEP_BYTES (16 * M_BLOCK * 2)

// Blocks of columns that are on their way: one stage less than there might be, so that who asks for a block does not wait
// for the slower warpgroup.
#define LEAD (STAGES - 2)

// Asks for the activations of a block of columns; one thread does.
DEVICE void fetch(u8 *stages, u64 *full, const u8 *own, u32 number, u32 block) {
    u32 stage = number % STAGES;
    barrier_expect(full + stage, STAGE_BYTES);
    copy_bulk(stages + stage * STAGE_BYTES, own + (size_t)block * STAGE_BYTES, STAGE_BYTES, full + stage);
}

KERNEL void __launch_bounds__(THREADS, 1) tenpak_wgmma(
    Planes planes, const u8 *x, const float *inverses, const int *ends, u32 experts, void *y, float *partial,
    u32 *counters, u32 m
) {
    DYNAMIC_SHARED(memory);
    __shared__ u32 levels[LEVEL_WORDS > 0 ? LEVEL_WORDS : 1];
    __shared__ u64 full[STAGES], empty[STAGES];
    Tile tile = tile_of(ends, experts, m, M_BLOCK, blockIdx.x);
    if (tile.rows == 0) return;
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 blocks = blocks_of(planes.cols), shares = gridDim.z;
    u32 begin = share_begin(blockIdx.z, shares, blocks), end = share_begin(blockIdx.z + 1, shares, blocks);
    u32 last_run = (planes.cols - 1) / RUN * RUN;
    u32 rows = planes.rows / experts, base = tile.expert * rows;
    // A warp has 16 * WEIGHT_TILES consecutive rows of weights.
    u32 n0 = blockIdx.y * ROWS + warp * 16 * WEIGHT_TILES;
    const u8 *own = x + (size_t)blockIdx.x * blocks * STAGE_BYTES;

    if (threadIdx.x == 0) {
        for (u32 s = 0; s < STAGES; s++) {
            barrier_init(full + s, 1);
            barrier_init(empty + s, THREADS / 32);
        }
        barriers_ready();
    }
    fill_levels(levels, threadIdx.x, THREADS);
    __syncthreads();
    if (threadIdx.x == 0)
        for (u32 s = 0; s < LEAD && begin + s < end; s++) fetch(memory, full, own, s, begin + s);
    Run next[WEIGHT_TILES][2];
#pragma unroll
    for (int i = 0; i < WEIGHT_TILES; i++)
#pragma unroll
        for (int h = 0; h < 2; h++)
            next[i][h] = load_run(
                planes, base + min(n0 + 16 * i + 8 * h + g, rows - 1), min(begin * BLOCK + RUN * t, last_run)
            );

    float sums[WEIGHT_TILES][M_BLOCK / 2] = {};
    for (u32 block = begin; block < end; block++) {
        u32 number = block - begin, stage = number % STAGES;
        if (threadIdx.x == 0 && block + LEAD < end) {
            // Into the stage of the block before the last one.
            if (number > 1) barrier_wait(empty + (number - 2) % STAGES, (number - 2) / STAGES % 2);
            fetch(memory, full, own, number + LEAD, block + LEAD);
        }
        Run now[WEIGHT_TILES][2];
#pragma unroll
        for (int i = 0; i < WEIGHT_TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                now[i][h] = next[i][h];
                if (block + 1 < end)
                    next[i][h] = load_run(
                        planes, base + min(n0 + 16 * i + 8 * h + g, rows - 1),
                        min((block + 1) * BLOCK + RUN * t, last_run)
                    );
            }
        __syncwarp();
        barrier_wait(full + stage, number / STAGES % 2);
        u64 matrix = matrices_at(memory + stage * STAGE_BYTES, M_BLOCK * 16, 128);
#pragma unroll
        for (int w = 0; w < 4; w++) {
            u32 a[WEIGHT_TILES][2][4];
#pragma unroll
            for (int i = 0; i < WEIGHT_TILES; i++) {
                u32 pairs[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    octet(now[i][h], w, pair_group(now[i][h], w * RUN_GROUPS / 4), levels, pairs[h]);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    a[i][0][c] = pairs[c % 2][c / 2];
                    a[i][1][c] = pairs[c % 2][2 + c / 2];
                }
            }
            group_fence();
#pragma unroll
            for (int i = 0; i < WEIGHT_TILES; i++)
#pragma unroll
                for (int s = 0; s < 2; s++)
                    group_multiply_add(sums[i], a[i][s], matrix + (2 * w + s) * (STEP_BYTES / 16));
            group_commit();
            // The products of the octet before are done, and its registers free.
            group_wait<1>();
        }
        group_wait<0>();
        if (lane == 0) barrier_arrive(empty + stage);
    }
    __syncthreads();

    // Eight rows of activations at a time go through a corner of shared memory, so that a warp writes consecutive
    // results of a row.
    float *corner = (float *)memory + warp * 8 * 33;
    size_t size = (size_t)m * rows;
    u32 n = n0 + lane % (16 * WEIGHT_TILES);
    float scale = n < rows ? row_scale(planes, base + n) : 0.0f;
#pragma unroll
    for (int j = 0; j < M_BLOCK / 8; j++) {
#pragma unroll
        for (int i = 0; i < WEIGHT_TILES; i++)
#pragma unroll
            for (int c = 0; c < 4; c++)
                corner[(2 * t + c % 2) * 33 + 16 * i + 8 * (c / 2) + g] = sums[i][4 * j + c];
        __syncwarp();
        // With one tile half a warp writes a row, and the other half the next one.
#pragma unroll
        for (u32 r = lane / (16 * WEIGHT_TILES); r < 8; r += 2 / WEIGHT_TILES) {
            u32 row = 8 * j + r;
            if (row >= tile.rows || n >= rows) continue;
            float sum = mul(corner[r * 33 + n - n0], load_const(inverses + blockIdx.x * M_BLOCK + row));
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
    for (u32 row = lane / (16 * WEIGHT_TILES); row < tile.rows; row += 2 / WEIGHT_TILES) {
        size_t at = (size_t)(tile.first + row) * rows + n;
        store_number(y, at, mul(sum_of_shares(partial, shares, size, at), scale));
    }
}
