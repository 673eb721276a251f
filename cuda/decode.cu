// Decodes a matrix, or some rows of it: out[i, c] = weight[ids ? ids[i] : first + i, c] * column_scale[c].
//
// Bit for bit the specification, rounded once more where NUMBERS are not f32. Work: a thread makes eight columns, a
// block 256 octets of the row-major result. What decides the shape: this only moves bytes, so that a thread writes 16
// bytes or more at once and neighbours write side by side.
#include "dequant.cuh"
#include "numbers.cuh"

KERNEL void __launch_bounds__(256)
    tenpak_decode(Planes planes, const float *column_scales, const long long *ids, u32 first, u32 count, void *out) {
    u32 octets = (planes.cols + 7) / 8;
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= (size_t)count * octets) return;
    u32 i = (u32)(at / octets), octet = (u32)(at % octets);
    long long row = ids ? ids[i] : first + i;
    float weights[8];
    if (row < 0 || row >= planes.rows) {
        // Who asks for a row that is not there shall see it.
        for (int j = 0; j < 8; j++) weights[j] = float_of_bits(0x7fc00000);
    } else {
        read_weights(planes, (u32)row, octet, weights);
    }
    u32 col = octet * 8;
    if (column_scales) {
        for (u32 j = 0; j < 8; j++)
            if (col + j < planes.cols) weights[j] = mul(weights[j], load_const(column_scales + col + j));
    }
    size_t to = (size_t)i * planes.cols + col;
#if ALIGNED
    u32 words[NUMBER_BYTES * 2];
#pragma unroll
    for (int j = 0; j < NUMBER_BYTES * 2; j++) {
        words[j] = NUMBERS == F32 ? bits_of_number(weights[j])
                                  : bits_of_number(weights[2 * j % 8]) | bits_of_number(weights[(2 * j + 1) % 8]) << 16;
    }
    uint4 *vectors = (uint4 *)((u8 *)out + to * NUMBER_BYTES);
#pragma unroll
    for (int j = 0; j < NUMBER_BYTES / 2; j++)
        vectors[j] = make_uint4(words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3]);
#else
    for (u32 j = 0; j < 8; j++)
        if (col + j < planes.cols) store_number(out, to + j, weights[j]);
#endif
}
