// Rows of activations or queries as halves, for tensor cores.
//
// Halves have all bits of a bfloat but not its range. So each row is multiplied by the power of two that brings its
// greatest magnitude to 2^14 or a little more, and products by its inverse: what gets lost is below 2^-38 of that.
#pragma once

#include "numbers.cuh"

// Eight columns in the order in which `octet` makes weights: pairs (0, 4), (1, 5), (2, 6), (3, 7).
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
