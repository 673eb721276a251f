// Adds tokens to a cache of keys and values, and quantizes the blocks that they make whole; `lengths` are those before.
//
// Bytes are those of `src/attention/` on a processor, for every finite number within the range of halves. What is not,
// makes the scale of its group NaN, and so is seen in all that attention makes of it: nobody waits for a device to say
// that it refuses a number.
//
// Work: a block of threads takes one block of tokens of one head; the first one also writes the tail, after it has read
// what was there before. What decides the shape: at decode there is one token, a copy of some bytes, and one step of 32
// quantizes; at the prompt every block of tokens has a block of threads, which reads its numbers once into shared memory.
#include "cache.cuh"

#define THREADS 128
// Halves of a row in shared memory: neighbours in a column are in different banks.
#define ROW (HEAD_DIM + 2)

// What numbers from `least` to `greatest` share: scale and offset, two halves.
DEVICE u32 params_of(float least, float greatest, u32 bits, bool finite) {
    u32 scale = half_of_float(quotient(sub(greatest, least), bits == 8 ? 255.0f : 15.0f));
    // A negative zero is zero, so that the order of numbers never shows.
    return (finite ? scale : 0x7e00u) | half_of_float(add(least, 0.0f)) << 16;
}

// The level nearest to a number, ties to the even one.
DEVICE u32 code_of(float x, u32 params, u32 bits) {
    float scale = float_of_half(params & 0xffff), offset = float_of_half(params >> 16);
    if (!(scale > 0.0f)) return 0;
    float level = quotient(sub(x, offset), scale), top = bits == 8 ? 255.0f : 15.0f;
    level = level > 0.0f ? level < top ? level : top : 0.0f;
    return bits_of_float(add(level, 8388608.0f)) & 0xff;
}

// Puts the numbers of a block's tokens into shared memory: those before `before` come from the tail.
DEVICE void gather(
    u16 *numbers, const u32 *tail, const void *fresh, Strides of, u32 sequence, u32 head, u32 block, u32 before
) {
    for (u32 i = threadIdx.x; i < BLOCK * HEAD_DIM; i += THREADS) {
        u32 t = i / HEAD_DIM, c = i % HEAD_DIM, token = block * BLOCK + t;
        if (token < before) {
            numbers[t * ROW + c] = ((const u16 *)(tail + tail_at(sequence, token, head)))[c];
        } else {
            size_t at = of.sequence * sequence + of.head * head + of.token * (token - before) + c;
            numbers[t * ROW + c] = (u16)half_of_float(load_number(fresh, at));
        }
    }
}

struct Range {
    float least, greatest;
    bool finite;
};

DEVICE void widen_range(Range &range, u32 half) {
    float x = float_of_half(half);
    range.least = x < range.least ? x : range.least;
    range.greatest = x > range.greatest ? x : range.greatest;
    range.finite = range.finite && (half & 0x7c00) != 0x7c00;
}

// Writes the codes of the block in shared memory, row by row; a number's parameters are those `params_at` finds.
template <u32 BITS_OF, u32 WORDS, class F> DEVICE void write_codes(const u16 *numbers, u32 *codes, F params_at) {
    constexpr u32 each = 32 / BITS_OF;
    for (u32 i = threadIdx.x; i < BLOCK * WORDS; i += THREADS) {
        u32 t = i / WORDS, first = i % WORDS * each, word = 0;
        for (u32 j = 0; j < each; j++)
            if (first + j < HEAD_DIM)
                word |= code_of(float_of_half(numbers[t * ROW + first + j]), params_at(t, first + j), BITS_OF)
                        << j * BITS_OF;
        codes[i] = word;
    }
}

KERNEL void __launch_bounds__(THREADS) tenpak_append(
    Cache cache, const void *keys, Strides of_keys, const void *values, Strides of_values, u32 count
) {
    __shared__ u16 numbers[BLOCK * ROW];
    __shared__ u32 params[BLOCK * GROUPS > HEAD_DIM ? BLOCK * GROUPS : HEAD_DIM];
    u32 head = blockIdx.y, sequence = blockIdx.z;
    u32 before = length_of(cache, sequence), after = before + count;
    u32 block = before / BLOCK + blockIdx.x;
    if (block < after / BLOCK && block < cache.columns) {
        size_t unit = unit_of(cache, sequence, block, head);
        gather(numbers, cache.key_tail, keys, of_keys, sequence, head, block, before);
        __syncthreads();
        for (u32 c = threadIdx.x; c < HEAD_DIM; c += THREADS) {
            Range range = {infinity(), -infinity(), true};
            for (u32 t = 0; t < BLOCK; t++) widen_range(range, numbers[t * ROW + c]);
            params[c] = params_of(range.least, range.greatest, KEY_BITS, range.finite);
            cache.key_params[unit * HEAD_DIM + c] = params[c];
        }
        __syncthreads();
        write_codes<KEY_BITS, KEY_WORDS>(
            numbers, cache.key_codes + unit * BLOCK * KEY_WORDS, [&](u32, u32 c) { return params[c]; }
        );
        __syncthreads();
        gather(numbers, cache.value_tail, values, of_values, sequence, head, block, before);
        __syncthreads();
        for (u32 i = threadIdx.x; i < BLOCK * GROUPS; i += THREADS) {
            u32 t = i / GROUPS, first = i % GROUPS * GROUP;
            Range range = {infinity(), -infinity(), true};
            for (u32 c = first; c < min(first + GROUP, (u32)HEAD_DIM); c++) widen_range(range, numbers[t * ROW + c]);
            params[i] = params_of(range.least, range.greatest, VALUE_BITS, range.finite);
            cache.value_params[unit * BLOCK * GROUPS + i] = params[i];
        }
        __syncthreads();
        write_codes<VALUE_BITS, VALUE_WORDS>(
            numbers, cache.value_codes + unit * BLOCK * VALUE_WORDS,
            [&](u32 t, u32 c) { return params[t * GROUPS + c / GROUP]; }
        );
    }
    if (blockIdx.x != 0) return;
    // What the tail held was read above.
    __syncthreads();
    u32 first = max(before, after / BLOCK * BLOCK);
    for (u32 i = threadIdx.x; i < (after - first) * HEAD_DIM; i += THREADS) {
        u32 token = first + i / HEAD_DIM, c = i % HEAD_DIM, from = token - before;
        size_t to = tail_at(sequence, token, head) * 2 + c;
        ((u16 *)cache.key_tail)[to] =
            (u16)half_of_float(load_number(keys, of_keys.sequence * sequence + of_keys.head * head + of_keys.token * from + c));
        ((u16 *)cache.value_tail)[to] = (u16)half_of_float(
            load_number(values, of_values.sequence * sequence + of_values.head * head + of_values.token * from + c)
        );
    }
}
