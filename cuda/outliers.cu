// What outliers add: y[m, n] += o[n, k] * x[m, k] after a product, or out[i, c] += o[row, c] after rows were decoded
// (DECODED).
//
// Work: a block takes 32 rows of weights, a warp four of them, and eight rows of activations; or it takes one decoded
// row. Outliers are stored row after row with a count for each row, so a block first adds up the counts before its
// own: that is a few KiB from the L2 cache, and nothing has to be kept beside the planes. What decides the shape: it
// is a percent or less of the weights, so that all that matters is to read each of them once for several rows of
// activations.
#include "numbers.cuh"

#define ROWS 32
#define TOGETHER 8

// The sum of the counts before `row`; all threads must come here.
DEVICE u32 outliers_before(const u32 *counts, u32 row) {
    __shared__ u32 before;
    if (threadIdx.x == 0) before = 0;
    __syncthreads();
    u32 sum = 0;
    for (u32 i = threadIdx.x; i < row; i += 256) sum += load_const(counts + i);
    if (sum > 0) atomicAdd(&before, sum);
    __syncthreads();
    return before;
}

DEVICE u32 column_of(const void *columns, u32 at) {
    return WIDE_COLUMNS ? load_const((const u32 *)columns + at) : load_const((const u16 *)columns + at);
}

// `values` are `total` halves. What counts or columns place beyond them or beyond the row is left out: nothing is
// read or written where it should not be.
KERNEL void __launch_bounds__(256) tenpak_outliers(
    const u32 *counts, const void *columns, const u16 *values, const void *x, const int *ends, const long long *ids,
    u32 experts, void *y, u32 rows, u32 cols, u32 m, u32 total
) {
#if DECODED
    long long row = ids ? ids[blockIdx.x] : blockIdx.x;
    if (row < 0 || row >= rows) return;
    u32 first = outliers_before(counts, (u32)row), count = load_const(counts + row);
    for (u32 i = threadIdx.x; i < count; i += 256) {
        if (first + i >= total) return;
        u32 column = column_of(columns, first + i);
        if (column >= cols) continue;
        size_t at = (size_t)blockIdx.x * cols + column;
        store_number(y, at, add(stored_number(y, at), float_of_half(load_const(values + first + i))));
    }
#else
    u32 row0 = blockIdx.x * ROWS, lane = threadIdx.x % 32, warp = threadIdx.x / 32, n = rows / experts;
    u32 first = outliers_before(counts, row0);
    for (u32 r = 0; r < ROWS; r++) {
        u32 row = row0 + r;
        if (row >= rows) return;
        u32 count = load_const(counts + row), own = first;
        first += count;
        if (r % 8 != warp || count == 0) continue;
        // Rows of activations of the matrix of the stack.
        u32 expert = row / n, begin = 0, end = m;
        if (ends) {
            begin = expert > 0 ? (u32)max(ends[expert - 1], 0) : 0;
            end = min((u32)max(ends[expert], 0), m);
        }
        begin += blockIdx.y * TOGETHER;
        if (begin >= end) continue;
        float sums[TOGETHER] = {};
        for (u32 i = lane; i < count; i += 32) {
            u32 column = own + i < total ? column_of(columns, own + i) : cols;
            if (column >= cols) continue;
            float value = float_of_half(load_const(values + own + i));
#pragma unroll
            for (u32 j = 0; j < TOGETHER; j++)
                if (begin + j < end)
                    sums[j] = fused(value, load_number(x, (size_t)(begin + j) * cols + column), sums[j]);
        }
#pragma unroll
        for (u32 j = 0; j < TOGETHER; j++) {
            float sum = sums[j];
#pragma unroll
            for (u32 mask = 16; mask > 0; mask /= 2) sum = add(sum, shuffle_xor(sum, mask));
            size_t at = (size_t)(begin + j) * n + row % n;
            if (lane == 0 && begin + j < end) store_number(y, at, add(stored_number(y, at), sum));
        }
    }
#endif
}
