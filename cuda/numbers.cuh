// Activations and results, which are f32, halves or bfloats: NUMBERS says which, by these names.
#pragma once

#include "ptx.cuh"

#define F32 0
#define F16 1
#define BF16 2

#define NUMBER_BYTES (NUMBERS == F32 ? 4 : 2)

DEVICE float number_of_bits(u32 bits) { return NUMBERS == F16 ? float_of_half(bits) : float_of_bits(bits << 16); }

DEVICE float load_number(const void *numbers, size_t at) {
#if NUMBERS == F32
    return load_const((const float *)numbers + at);
#else
    return number_of_bits(load_const((const u16 *)numbers + at));
#endif
}

// Eight numbers at a multiple of eight.
DEVICE void load_eight(const void *numbers, size_t at, float eight[8]) {
    const uint4 *from = (const uint4 *)((const u8 *)numbers + at * NUMBER_BYTES);
    uint4 v = load_const(from);
    u32 words[8] = {v.x, v.y, v.z, v.w};
#if NUMBERS == F32
    v = load_const(from + 1);
    words[4] = v.x, words[5] = v.y, words[6] = v.z, words[7] = v.w;
#endif
#pragma unroll
    for (int i = 0; i < 8; i++)
        eight[i] = NUMBERS == F32 ? float_of_bits(words[i]) : number_of_bits(words[i / 2] >> i % 2 * 16 & 0xffff);
}

DEVICE u32 bits_of_number(float x) {
    return NUMBERS == F32 ? bits_of_float(x) : NUMBERS == F16 ? half_of_float(x) : bfloat_of_float(x);
}

DEVICE void store_number(void *numbers, size_t at, float x) {
    if (NUMBERS == F32)
        ((u32 *)numbers)[at] = bits_of_number(x);
    else
        ((u16 *)numbers)[at] = (u16)bits_of_number(x);
}

// A number that a kernel has written.
DEVICE float stored_number(const void *numbers, size_t at) {
    return NUMBERS == F32 ? ((const float *)numbers)[at] : number_of_bits(((const u16 *)numbers)[at]);
}

// Eight activations of a row of `cols`, multiplied by column scales where there are any, zeros beyond the row. ALIGNED
// says that rows are whole octets at multiples of 16 bytes.
DEVICE void load_activations(const void *x, const float *column_scales, u32 row, u32 col, u32 cols, float eight[8]) {
    size_t at = (size_t)row * cols + col;
#if ALIGNED
    if (col < cols) {
        load_eight(x, at, eight);
    } else {
#pragma unroll
        for (u32 i = 0; i < 8; i++) eight[i] = 0.0f;
    }
#else
#pragma unroll
    for (u32 i = 0; i < 8; i++) eight[i] = col + i < cols ? load_number(x, at + i) : 0.0f;
#endif
    if (column_scales) {
#pragma unroll
        for (u32 i = 0; i < 8; i++)
            if (col + i < cols) eight[i] = mul(eight[i], load_const(column_scales + col + i));
    }
}
