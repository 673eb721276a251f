// The kernels of Hopper for one layout, run on a processor: what `tests/python/test_cuda_hopper.py` calls.
#define MATRICES 1
#include "prepare.cu"
#include "wgmma.cu"

extern "C" {

void prepare(
    const void *x, const float *column_scales, const int *ends, u32 experts, u32 m, u32 cols, u32 tile, void *fragments,
    float *inverses, dim3 *grid
) {
    host::launch(*grid, 256, 0, [=] {
        tenpak_prepare(x, column_scales, ends, experts, m, cols, tile, (uint4 *)fragments, inverses);
    });
}

void wgmma(
    const Planes *planes, const void *x, const float *inverses, const int *ends, u32 experts, void *y, float *partial,
    u32 *counters, u32 m, dim3 *grid, u32 shared
) {
    host::launch(*grid, THREADS, shared, [=] {
        tenpak_wgmma(*planes, (const u8 *)x, inverses, ends, experts, y, partial, counters, m);
    });
}
}
