// y[m, n] = x[m, k] * w[n, k]^T in f32 throughout, for every layout and for stacks of matrices: weights are those of
// the specification.
//
// Work: a warp takes four rows of weights and up to M_TILE rows of activations; its lanes take octets of columns in
// turn and add up across the warp in the end. What decides the shape: without tensor cores the L1 cache is the limit,
// which activations come from, so that each of them is used for four rows of weights.
#include "dequant.cuh"
#include "numbers.cuh"
#include "tiles.cuh"

#define EXACT_ROWS 4
#define EXACT_WARPS 8
// Blocks of threads that a multiprocessor should have registers for: left alone, a compiler aims at more of them and puts
// some numbers into local memory for it.
#define EXACT_RESIDENT (M_TILE > 4 ? 1 : 2)

KERNEL void __launch_bounds__(32 * EXACT_WARPS, EXACT_RESIDENT) tenpak_exact(
    Planes planes, const float *column_scales, const void *x, const int *ends, u32 experts, void *y, u32 m
) {
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, n0 = (blockIdx.x * EXACT_WARPS + warp) * EXACT_ROWS;
    Tile tile = tile_of(ends, experts, m, M_TILE, blockIdx.y);
    // Rows of one matrix of the stack, and where they stand in the whole.
    u32 rows = planes.rows / experts, base = tile.expert * rows;
    if (n0 >= rows || tile.rows == 0) return;
    float sums[EXACT_ROWS][M_TILE] = {};
    for (u32 octet = lane; octet * 8 < planes.cols; octet += 32) {
        float weights[EXACT_ROWS][8];
#pragma unroll
        for (u32 r = 0; r < EXACT_ROWS; r++) read_weights(planes, base + min(n0 + r, rows - 1), octet, weights[r]);
#pragma unroll
        for (u32 i = 0; i < M_TILE; i++) {
            float eight[8];
            load_activations(x, column_scales, tile.first + min(i, tile.rows - 1), octet * 8, planes.cols, eight);
#pragma unroll
            for (u32 j = 0; j < 8; j++) {
                // Codes beyond the row are zero, their weights are not.
                bool inside = ALIGNED || octet * 8 + j < planes.cols;
#pragma unroll
                for (u32 r = 0; r < EXACT_ROWS; r++)
                    if (inside) sums[r][i] = fused(weights[r][j], eight[j], sums[r][i]);
            }
        }
    }
#pragma unroll
    for (u32 r = 0; r < EXACT_ROWS; r++)
#pragma unroll
        for (u32 i = 0; i < M_TILE; i++) {
            float sum = sums[r][i];
#pragma unroll
            for (u32 mask = 16; mask > 0; mask /= 2) sum = add(sum, shuffle_xor(sum, mask));
            if (lane == 0 && n0 + r < rows && i < tile.rows)
                store_number(y, (size_t)(tile.first + i) * rows + n0 + r, sum);
        }
}
