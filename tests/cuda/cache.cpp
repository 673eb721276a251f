// The kernels for one format of caches, run on a processor: what `tests/python/test_cuda_cache.py` calls.
#include "append.cu"
#undef ROW
#undef THREADS
#include "attend.cu"
#include "merge.cu"
#undef OCTETS
#include "recall.cu"

extern "C" {

void append(
    const Cache *cache, const void *keys, const Strides *of_keys, const void *values, const Strides *of_values, u32 count,
    dim3 *grid
) {
    host::launch(*grid, 128, 0, [=] { tenpak_append(*cache, keys, *of_keys, values, *of_values, count); });
}

void attend(
    const Cache *cache, const void *q, const Strides *of_q, const u8 *mask, u64 mask_sequence, u64 mask_token, float scale,
    u32 m, u32 per_head, u32 causal, float *partial, void *out, dim3 *grid, u32 shared
) {
    host::launch(*grid, 32 * WARPS, shared, [=] {
        tenpak_attend(
            *cache, q, *of_q, mask, mask_sequence, mask_token, scale, m, per_head, causal, partial, out
        );
    });
}

void merge(const float *partial, u32 shares, u32 queries, void *out, dim3 *grid) {
    host::launch(*grid, HEAD_DIM, 0, [=] { tenpak_merge(partial, shares, queries, out); });
}

void recall(const Cache *cache, u32 sequences, u32 tokens, void *keys, void *values, dim3 *grid) {
    host::launch(*grid, 256, 0, [=] { tenpak_recall(*cache, sequences, tokens, keys, values); });
}
}
