// y[m, n] = x[m, k] * w[n, k]^T for few rows of activations, at most 8 * M_TILES.
//
// Work: a block of eight warps takes 16 * ROW_TILES rows of weights and a share of the columns; its warps take blocks
// of 128 columns in turn, so that together they read 512 consecutive bytes of each row of 4-bit codes. Activations
// are put into the order of tensor cores in shared memory once, or have been before (FUSED 0), and then stand in `x`.
// Weights are the first operand of the instruction, 16 x 16, so that 8 rows of activations cost what one costs.
//
// What decides the shape: it is bound by memory. With the loads of the next block of columns on their way, a warp has
// 2 * ROW_TILES KiB in flight, and shared memory is not on the way of weights at all. More rows of weights in a block
// mean that its activations are read less often from the L2 cache: 4 m / (16 * ROW_TILES) times the bytes of weights.
#include "dequant.cuh"
#include "fragments.cuh"
#include "splits.cuh"

#define WARPS 8
#define ROWS (16 * ROW_TILES)
// Blocks that a multiprocessor should have registers for: as many as keep the same number of loads on their way.
#define RESIDENT (M_TILES > 1 ? 1 : ROW_TILES == 1 ? 3 : ROW_TILES == 2 ? 2 : 1)

// Puts the activations of blocks of columns `begin` ... `end` in order, and the inverse factors of rows.
DEVICE void arrange(
    const void *x, const float *column_scales, u32 m, u32 cols, u32 begin, u32 end, uint4 *fragments, u32 *magnitudes,
    float *inverses
) {
    u32 octets = (end - begin) * OCTETS;
    bool scaled = !fits_halves(column_scales);
    if (scaled) {
        if (threadIdx.x < 8 * M_TILES) magnitudes[threadIdx.x] = 0;
        __syncthreads();
        for (u32 r = 0; r < m; r++) {
            u32 most = 0;
            for (u32 o = threadIdx.x; o < octets; o += 32 * WARPS) {
                float eight[8];
                load_activations(x, column_scales, r, begin * BLOCK + o * 8, cols, eight);
                most = greatest(eight, most);
            }
            if (most > 0) atomicMax(magnitudes + r, most);
        }
        __syncthreads();
    }
    for (u32 r = 0; r < m; r++) {
        float factor = scaled ? factor_of(magnitudes[r]) : 1.0f;
        for (u32 o = threadIdx.x; o < octets; o += 32 * WARPS) {
            float eight[8];
            load_activations(x, column_scales, r, begin * BLOCK + o * 8, cols, eight);
            fragments[vector_of(o / OCTETS, o % OCTETS, r, m)] = fragment(eight, factor);
        }
        if (threadIdx.x == 0) inverses[r] = scaled ? inverse_of(magnitudes[r]) : 1.0f;
    }
}

// Shared memory holds the activations, and later the sums of all warps.
KERNEL void __launch_bounds__(32 * WARPS, RESIDENT) tenpak_gemv(
    Planes planes, const float *column_scales, const void *x, const float *inverses, void *y, float *partial,
    u32 *counters, u32 m
) {
    DYNAMIC_SHARED(memory);
    __shared__ u32 levels[LEVEL_WORDS > 0 ? LEVEL_WORDS : 1];
#if FUSED
    __shared__ u32 magnitudes[8 * M_TILES];
#endif
    __shared__ float factors[8 * M_TILES];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 blocks = blocks_of(planes.cols), n0 = blockIdx.x * ROWS, shares = gridDim.y;
    u32 begin = share_begin(blockIdx.y, shares, blocks), end = share_begin(blockIdx.y + 1, shares, blocks);
    u32 last_run = (planes.cols - 1) / RUN * RUN;

    Run next[ROW_TILES][2];
    u32 block = begin + warp;
    if (block < end) {
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++)
                next[i][h] = load_run(
                    planes, min(n0 + 16 * i + 8 * h + g, planes.rows - 1), min(block * BLOCK + RUN * t, last_run)
                );
    }

    fill_levels(levels, threadIdx.x, 32 * WARPS);
#if FUSED
    uint4 *fragments = (uint4 *)memory;
    arrange(x, column_scales, m, planes.cols, begin, end, fragments, magnitudes, factors);
#else
    const uint4 *fragments = (const uint4 *)x + vector_of(begin, 0, 0, m);
    if (threadIdx.x < m) factors[threadIdx.x] = load_const(inverses + threadIdx.x);
#endif
    __syncthreads();

    float sums[ROW_TILES][M_TILES][4] = {};
    for (; block < end; block += WARPS) {
        Run now[ROW_TILES][2];
#pragma unroll
        for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                now[i][h] = next[i][h];
                if (block + WARPS < end)
                    next[i][h] = load_run(
                        planes, min(n0 + 16 * i + 8 * h + g, planes.rows - 1),
                        min((block + WARPS) * BLOCK + RUN * t, last_run)
                    );
            }
#pragma unroll
        for (int w = 0; w < 4; w++) {
            uint4 b[M_TILES];
#pragma unroll
            for (int j = 0; j < M_TILES; j++) {
                u32 r = 8 * j + g;
                b[j] = make_uint4(0, 0, 0, 0);
                if (r < m) {
                    const uint4 *at = fragments + vector_of(block - begin, w + 4 * t, r, m);
                    b[j] = FUSED ? *at : load_const(at);
                }
            }
#pragma unroll
            for (int i = 0; i < ROW_TILES; i++) {
                u32 pairs[2][4];
#pragma unroll
                for (int h = 0; h < 2; h++)
                    octet(now[i][h], w, pair_group(now[i][h], w * RUN_GROUPS / 4), levels, pairs[h]);
                u32 first[4] = {pairs[0][0], pairs[1][0], pairs[0][1], pairs[1][1]};
                u32 second[4] = {pairs[0][2], pairs[1][2], pairs[0][3], pairs[1][3]};
#pragma unroll
                for (int j = 0; j < M_TILES; j++) {
                    multiply_add(sums[i][j], first, b[j].x, b[j].y);
                    multiply_add(sums[i][j], second, b[j].z, b[j].w);
                }
            }
        }
    }

    // [warp][row of activations][row of weights]: in the end threads write consecutive results.
    __syncthreads();
    float *all = (float *)memory;
#pragma unroll
    for (int i = 0; i < ROW_TILES; i++)
#pragma unroll
        for (int j = 0; j < M_TILES; j++)
#pragma unroll
            for (int c = 0; c < 4; c++) {
                u32 r = 8 * j + 2 * t + c % 2, n = 16 * i + 8 * (c / 2) + g;
                all[(warp * 8 * M_TILES + r) * ROWS + n] = sums[i][j][c];
            }
    __syncthreads();
    size_t size = (size_t)m * planes.rows;
    for (u32 e = threadIdx.x; e < m * ROWS; e += 32 * WARPS) {
        u32 r = e / ROWS, n = e % ROWS;
        if (n0 + n >= planes.rows) continue;
        float sum = 0.0f;
#pragma unroll
        for (u32 v = 0; v < WARPS; v++) sum = add(sum, all[(v * 8 * M_TILES + r) * ROWS + n]);
        sum = mul(sum, factors[r]);
        size_t at = (size_t)r * planes.rows + n0 + n;
        if (shares == 1)
            store_number(y, at, mul(sum, row_scale(planes, n0 + n)));
        else
            partial[blockIdx.y * size + at] = sum;
    }
    if (shares == 1 || !is_last(counters + blockIdx.x, shares)) return;
    for (u32 e = threadIdx.x; e < m * ROWS; e += 32 * WARPS) {
        u32 r = e / ROWS, n = n0 + e % ROWS;
        if (n >= planes.rows) continue;
        size_t at = (size_t)r * planes.rows + n;
        store_number(y, at, mul(sum_of_shares(partial, shares, size, at), row_scale(planes, n)));
    }
}
