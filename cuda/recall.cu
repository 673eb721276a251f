// Keys and values of a cache as numbers, [sequences, heads, tokens, channels] each: those of the specification, bit for
// bit where they are f32, rounded once more where they are not. Tokens beyond a sequence's length are zero.
//
// Work: a thread makes eight channels of a token, of keys and of values. It only moves bytes.
#include "cache.cuh"

#define OCTETS (HEAD_DIM / 8)

// Code `i` of a row of codes.
template <u32 BITS_OF> DEVICE float level_at(const u32 *row, u32 i) {
    return (float)(load_const(row + i * BITS_OF / 32) >> i * BITS_OF % 32 & ((1u << BITS_OF) - 1));
}

DEVICE float number_at(float level, u32 params) {
    return add(mul(level, float_of_half(params & 0xffff)), float_of_half(params >> 16));
}

KERNEL void __launch_bounds__(256) tenpak_recall(Cache cache, u32 sequences, u32 tokens, void *keys, void *values) {
    size_t at = (size_t)blockIdx.x * 256 + threadIdx.x;
    if (at >= (size_t)sequences * HEADS * tokens * OCTETS) return;
    u32 c = (u32)(at % OCTETS) * 8, token = (u32)(at / OCTETS % tokens);
    u32 head = (u32)(at / OCTETS / tokens % HEADS), sequence = (u32)(at / OCTETS / tokens / HEADS);
    u32 len = length_of(cache, sequence), block = token / BLOCK, t = token % BLOCK;
    bool whole = block < len / BLOCK;
    size_t unit = unit_of(cache, sequence, block, head), row = unit * BLOCK + t, tail = tail_at(sequence, token, head);
    for (u32 i = 0; i < 8; i++) {
        float key = 0.0f, value = 0.0f;
        if (token >= len) {
        } else if (whole) {
            key = number_at(
                level_at<KEY_BITS>(cache.key_codes + row * KEY_WORDS, c + i),
                load_const(cache.key_params + unit * HEAD_DIM + c + i)
            );
            value = number_at(
                level_at<VALUE_BITS>(cache.value_codes + row * VALUE_WORDS, c + i),
                load_const(cache.value_params + row * GROUPS + c / GROUP)
            );
        } else {
            key = float_of_half(load_const((const u16 *)(cache.key_tail + tail) + c + i));
            value = float_of_half(load_const((const u16 *)(cache.value_tail + tail) + c + i));
        }
        store_number(keys, at * 8 + i, key);
        store_number(values, at * 8 + i, value);
    }
}
