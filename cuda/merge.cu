// Makes one result of those of the shares of `attend.cu`: each is a sum of values times weights relative to its greatest
// score, in powers of two, with that score and the sum of weights behind it.
//
// Work: a block takes a query, a thread a channel. The order of shares is fixed, so that results are the same every time.
#include "numbers.cuh"

KERNEL void __launch_bounds__(HEAD_DIM) tenpak_merge(const float *partial, u32 shares, u32 queries, void *out) {
    size_t query = blockIdx.x, step = (size_t)queries * (HEAD_DIM + 2);
    const float *own = partial + query * (HEAD_DIM + 2);
    float top = -3.0e38f, total = 0.0f, value = 0.0f;
    for (u32 s = 0; s < shares; s++) {
        float other = load_const(own + s * step + HEAD_DIM);
        top = other > top ? other : top;
    }
    for (u32 s = 0; s < shares; s++) {
        float weight = power_of_two(sub(load_const(own + s * step + HEAD_DIM), top));
        total = fused(weight, load_const(own + s * step + HEAD_DIM + 1), total);
        value = fused(weight, load_const(own + s * step + threadIdx.x), value);
    }
    store_number(out, query * HEAD_DIM + threadIdx.x, quotient(value, total));
}
