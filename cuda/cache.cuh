// A cache of keys and values on a device: what its planes are and where, the format of `src/attention/` with its
// constants as macros (HEADS, HEAD_DIM, KEY_BITS, VALUE_BITS, BLOCK, GROUP).
//
// Blocks of 32 tokens lie on pages of a pool, all heads of a block on one; each sequence has a row of a table that says
// which. Its last tokens stand in its own tail until a block of them is full. Lengths are on the device, so that a
// recorded launch stays right while sequences grow.
#pragma once

#include "numbers.cuh"

#define KEY_WORDS ((HEAD_DIM * KEY_BITS + 31) / 32)
#define VALUE_WORDS ((HEAD_DIM * VALUE_BITS + 31) / 32)
#define GROUPS ((HEAD_DIM + GROUP - 1) / GROUP)
#define TAIL_WORDS (HEAD_DIM / 2)

struct Cache {
    // [pages, heads, words].
    u32 *key_codes, *key_params, *value_codes, *value_params;
    // [sequences, tokens, heads, words].
    u32 *key_tail, *value_tail;
    // [sequences, columns], and tokens of each sequence.
    const int *pages, *lengths;
    // Columns of the table, and pages of the pool.
    u32 columns, pool;
};

// Numbers between neighbours along each dimension; those of a channel stand side by side.
struct Strides {
    u64 sequence, head, token;
};

// The number of a block and head among all of the pool: words of it begin at so many times those of one. A page that is
// not there is taken for another, so that nothing is touched outside.
DEVICE size_t unit_of(const Cache &cache, u32 sequence, u32 block, u32 head) {
    u32 page = load_const((const u32 *)cache.pages + (size_t)sequence * cache.columns + min(block, cache.columns - 1));
    return (size_t)min(page, cache.pool - 1) * HEADS + head;
}

// The words of a token of a tail.
DEVICE size_t tail_at(u32 sequence, u32 token, u32 head) {
    return (((size_t)sequence * BLOCK + token % BLOCK) * HEADS + head) * TAIL_WORDS;
}

DEVICE u32 length_of(const Cache &cache, u32 sequence) {
    return load_const((const u32 *)cache.lengths + sequence);
}
