// Activations in the order in which tensor cores want them, as halves.
//
// A block of 128 columns is cut in four runs of 32, one for each quarter t of a warp, and a run in four octets w. The
// 16 bytes of (octet w, row r, quarter t) are columns 32 t + 8 w + (0, 4, 1, 5, 2, 6, 3, 7): what a lane of row r
// multiplies the pairs of `octet` with. Vectors stand in the order block of columns, w, r, t, so that lanes read side
// by side.
//
// Halves have all bits of a bfloat but not its range. So each row is multiplied by the power of two that brings its
// greatest magnitude to 2^14 or a little more, and products by its inverse: what gets lost is below 2^-38 of that.
#pragma once

#include "numbers.cuh"

#define BLOCK 128
#define OCTETS (BLOCK / 8)

DEVICE u32 blocks_of(u32 cols) { return (cols + BLOCK - 1) / BLOCK; }

// The vector of octet `o` of a block of columns, of row `r` of `rows`; octets are counted in the order of columns.
DEVICE u32 vector_of(u32 block, u32 o, u32 r, u32 rows) { return ((block * 4 + o % 4) * rows + r) * 4 + o / 4; }

DEVICE uint4 fragment(const float eight[8], float factor) {
    return make_uint4(
        pair_of_floats(mul(eight[0], factor), mul(eight[4], factor)),
        pair_of_floats(mul(eight[1], factor), mul(eight[5], factor)),
        pair_of_floats(mul(eight[2], factor), mul(eight[6], factor)),
        pair_of_floats(mul(eight[3], factor), mul(eight[7], factor)));
}

// The bits of the greatest magnitude; those of what is not finite are greater than all others.
DEVICE u32 greatest(const float eight[8], u32 before) {
#pragma unroll
    for (int i = 0; i < 8; i++) before = max(before, bits_of_float(eight[i]) & 0x7fffffffu);
    return before;
}

// The exponent, with its bias, of the factor of a row; 127 is a factor of 1.
DEVICE u32 factor_exponent(u32 greatest) {
    u32 exponent = max(greatest >> 23, 16u);
    // What is not finite stays what it is.
    return exponent == 255 ? 127 : 127 + 14 - (exponent - 127);
}

DEVICE float factor_of(u32 greatest) { return float_of_bits(factor_exponent(greatest) << 23); }
DEVICE float inverse_of(u32 greatest) { return float_of_bits((254 - factor_exponent(greatest)) << 23); }

// Whether halves hold the activations as they are.
DEVICE bool fits_halves(const float *column_scales) { return NUMBERS == F16 && !column_scales; }
