// Puts activations into the order of `fragments.cuh`, for kernels that read them many times: tiles of `tile` rows,
// each with all its blocks of columns, rows beyond the last one filled with zeros.
//
// Work: a block takes a row of a tile. With `ends`, which say where the rows of each of `experts` matrices end, a tile
// has rows of one of them only; tiles that there are none for are left as they are. What decides the shape: a row needs
// its greatest magnitude before its first number is written, and a block finds that without another kernel.
//
// With MATRICES the order is that of `wgmma.cu`: for each octet w and each q of four all rows, of each 16 bytes, which are
// pair q of octet w of every quarter t.
#include "fragments.cuh"
#include "tiles.cuh"

KERNEL void __launch_bounds__(256) tenpak_prepare(
    const void *x, const float *column_scales, const int *ends, u32 experts, u32 m, u32 cols, u32 tile_rows,
    uint4 *fragments, float *inverses
) {
    __shared__ u32 magnitude;
    Tile tile = tile_of(ends, experts, m, tile_rows, blockIdx.y);
    u32 r = blockIdx.x, row = tile.first + r, blocks = blocks_of(cols);
    if (tile.rows == 0) return;
    bool scaled = !fits_halves(column_scales), empty = r >= tile.rows;
    if (scaled && !empty) {
        if (threadIdx.x == 0) magnitude = 0;
        __syncthreads();
        u32 most = 0;
        for (u32 o = threadIdx.x; o < blocks * OCTETS; o += 256) {
            float eight[8];
            load_activations(x, column_scales, row, o * 8, cols, eight);
            most = greatest(eight, most);
        }
        if (most > 0) atomicMax(&magnitude, most);
        __syncthreads();
    }
    float factor = scaled && !empty ? factor_of(magnitude) : 1.0f;
    uint4 *own = fragments + (size_t)blockIdx.y * blocks * OCTETS * tile_rows;
    for (u32 o = threadIdx.x; o < blocks * OCTETS; o += 256) {
        float eight[8] = {};
        if (!empty) load_activations(x, column_scales, row, o * 8, cols, eight);
        uint4 four = fragment(eight, factor);
#if MATRICES
        // Word q of (octet w, quarter t): 16 bytes of a row are those of all four t.
        u32 block = o / OCTETS, w = o % 4, t = o % OCTETS / 4;
        u32 *words = (u32 *)own + (((size_t)block * 16 + w * 4) * tile_rows + r) * 4 + t;
        words[0] = four.x;
        words[4 * tile_rows] = four.y;
        words[8 * tile_rows] = four.z;
        words[12 * tile_rows] = four.w;
#else
        own[vector_of(o / OCTETS, o % OCTETS, r, tile_rows)] = four;
#endif
    }
    if (threadIdx.x == 0) inverses[blockIdx.y * tile_rows + r] = scaled && !empty ? inverse_of(magnitude) : 1.0f;
}
