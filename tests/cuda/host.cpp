// The kernels for one layout, run on a processor: what `tests/python/test_cuda.py` calls.
#include "decode.cu"
#include "exact.cu"
#include "prepare.cu"
#include "outliers.cu"
#undef ROWS
#if HAS_PAIRS
#include "gemv.cu"
#undef ROWS
#undef WARPS
#define WARPS GEMM_WARPS
#include "gemm.cu"
#endif

extern "C" {

// All weights, by what every kernel reads them with.
void weights(const Planes *planes, float *out) {
    for (u32 row = 0; row < planes->rows; row++)
        for (u32 octet = 0; octet * 8 < planes->cols; octet++) {
            float eight[8];
            read_weights(*planes, row, octet, eight);
            for (u32 i = 0; i < 8 && octet * 8 + i < planes->cols; i++)
                out[(size_t)row * planes->cols + octet * 8 + i] = eight[i];
        }
}

void decode(const Planes *planes, const float *column_scales, const long long *ids, u32 first, u32 count, void *out) {
    u32 octets = (planes->cols + 7) / 8 * count;
    host::launch({(octets + 255) / 256, 1, 1}, 256, 0, [=] {
        tenpak_decode(*planes, column_scales, ids, first, count, out);
    });
}

void exact(
    const Planes *planes, const float *column_scales, const void *x, const int *ends, u32 experts, void *y, u32 m,
    dim3 *grid
) {
    host::launch(*grid, 256, 0, [=] { tenpak_exact(*planes, column_scales, x, ends, experts, y, m); });
}

void prepare(
    const void *x, const float *column_scales, const int *ends, u32 experts, u32 m, u32 cols, u32 tile, void *fragments,
    float *inverses, dim3 *grid
) {
    host::launch(*grid, 256, 0, [=] {
        tenpak_prepare(x, column_scales, ends, experts, m, cols, tile, (uint4 *)fragments, inverses);
    });
}

void outliers(
    const u32 *counts, const void *columns, const u16 *values, const void *x, const int *ends, const long long *ids,
    u32 experts, void *y, u32 rows, u32 cols, u32 m, u32 total, dim3 *grid
) {
    host::launch(*grid, 256, 0, [=] {
        tenpak_outliers(counts, columns, values, x, ends, ids, experts, y, rows, cols, m, total);
    });
}

#if HAS_PAIRS
void gemv(
    const Planes *planes, const float *column_scales, const void *x, const float *inverses, void *y, float *partial,
    u32 *counters, u32 m, dim3 *grid, u32 shared
) {
    host::launch(*grid, 256, shared, [=] {
        tenpak_gemv(*planes, column_scales, x, inverses, y, partial, counters, m);
    });
}

void gemm(
    const Planes *planes, const void *x, const float *inverses, const int *ends, u32 experts, void *y, float *partial,
    u32 *counters, u32 m, dim3 *grid, u32 shared
) {
    host::launch(*grid, 32 * GEMM_WARPS, shared, [=] {
        tenpak_gemm(*planes, (const uint4 *)x, inverses, ends, experts, y, partial, counters, m);
    });
}
#endif
}
