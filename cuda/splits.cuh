// Results that several blocks add to: each has its share of the columns.
//
// A block writes its sums and counts itself; the last one to come adds up all of them, in the order of shares, so
// that the same product has the same bits every time. It leaves the counter at zero for the next product on the
// stream.
#pragma once

#include "numbers.cuh"

// Columns of a share: whole blocks of 128, as even as can be.
DEVICE u32 share_begin(u32 share, u32 shares, u32 blocks) { return (u32)((u64)blocks * share / shares); }

// Whether this block is the last of `shares`; all threads must come here after they have written their sums.
DEVICE bool is_last(u32 *counter, u32 shares) {
    __shared__ u32 last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(counter, 1) + 1 == shares;
        if (last) *counter = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// The sum of all shares of a result.
DEVICE float sum_of_shares(const float *partial, u32 shares, size_t size, size_t at) {
    float sum = 0.0f;
    for (u32 share = 0; share < shares; share++) sum = add(sum, load_shared_result(partial + share * size + at));
    return sum;
}
