// Attention of few queries over a cache of keys and values: softmax(scale * q * k^T) * v, with codes read once.
//
// Work: a block of WARPS warps takes a share of the blocks of tokens of one head of keys and values, and up to
// 8 * ROW_TILES of the queries that share it; its warps take blocks of 32 tokens in turn, each with an online softmax of
// its own, and in the end put their results together. Where several shares make one result, `merge.cu` does the same
// with theirs. Keys, and values turned around, are the first operand of tensor cores, so that eight queries cost what
// one costs; tokens after the last whole block are halves and pass through the same instructions.
//
// Channels have no order in a product. So a quarter of a warp owns octets of neighbouring channels of keys, and eight
// lanes own quads of neighbouring channels of values: codes become pairs of halves where they stand, by a mask.
//
// What decides the shape: it is bound by memory, and a row of codes is short. So each warp keeps STAGES - 1 blocks of
// tokens on their way into shared memory, 5 KiB each with 4 bits and 128 channels, and waits for nobody else.
//
// A key or a value becomes a half by one rounding, 2^-11 of itself at most; so does a query that is no half, and a
// weight. Sums are f32.
#include "cache.cuh"
#include "halves.cuh"

#define ROWS (8 * ROW_TILES)
// Octets of channels that a quarter of a warp has of a key, and quads that each of eight lanes has of a value.
#define PARTS ((HEAD_DIM + 31) / 32)
// Words from one row of values to the next in shared memory: rows of 2 t of all four t in different banks.
#define VALUE_ROW (VALUE_WORDS % 4 ? VALUE_WORDS : VALUE_WORDS + 4)

// Blocks of threads that a multiprocessor should have registers for: left alone, a compiler aims at more of them and puts
// some numbers into local memory for it.
#define RESIDENT (ROW_TILES * PARTS <= 4 ? 3 : 1)

#define KEYS_AT 0
#define KEY_PARAMS_AT (BLOCK * KEY_WORDS)
#define VALUES_AT (KEY_PARAMS_AT + HEAD_DIM)
#define VALUE_PARAMS_AT (VALUES_AT + BLOCK * VALUE_ROW)
#define STAGE_WORDS (VALUE_PARAMS_AT + BLOCK * GROUPS)

// The score of what a query does not see; all others are greater, or NaN.
#define UNSEEN -3.0e38f
// Weights are 2^14 times what they are, so that halves have more of the small ones.
#define WEIGHT_EXPONENT 14.0f

#define ONES 0x64006400u
#define TIMES(n) ((u32)(n) * 0x10001u)

// Nibbles 0 to 3 of both halves of a word as pairs of halves.
DEVICE void pairs_of_nibbles(u32 word, u32 pairs[4]) {
    u32 high = word >> 8;
    pairs[0] = pair_sub(and_or(word, TIMES(0x0f), ONES), ONES);
    pairs[1] = pair_fma(and_or(word, TIMES(0xf0), ONES), TIMES(0x2c00), TIMES(0xd400)); // by 1/16, less 64
    pairs[2] = pair_sub(and_or(high, TIMES(0x0f), ONES), ONES);
    pairs[3] = pair_fma(and_or(high, TIMES(0xf0), ONES), TIMES(0x2c00), TIMES(0xd400));
}

// Bytes 0 to 3 of two words as pairs of halves.
DEVICE void pairs_of_bytes(u32 first, u32 second, u32 pairs[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++)
        pairs[i] = pair_sub(and_or(choose_bytes(first, second, 0x4400u + 0x1111u * i), TIMES(0xff), ONES), ONES);
}

// Starts copying a block of tokens into a stage.
DEVICE void copy_block(const Cache &cache, u32 sequence, u32 head, u32 block, u32 *stage) {
    size_t unit = unit_of(cache, sequence, block, head);
    u32 lane = threadIdx.x % 32;
    const u32 *keys = cache.key_codes + unit * BLOCK * KEY_WORDS;
    const u32 *values = cache.value_codes + unit * BLOCK * VALUE_WORDS;
    const u32 *key_params = cache.key_params + unit * HEAD_DIM;
    const u32 *value_params = cache.value_params + unit * BLOCK * GROUPS;
#pragma unroll
    for (u32 i = 4 * lane; i < BLOCK * KEY_WORDS; i += 128) copy_async(stage + KEYS_AT + i, keys + i);
#pragma unroll
    for (u32 i = 4 * lane; i < HEAD_DIM; i += 128) copy_async(stage + KEY_PARAMS_AT + i, key_params + i);
#pragma unroll
    for (u32 i = 4 * lane; i < BLOCK * VALUE_WORDS; i += 128)
        copy_async(stage + VALUES_AT + i / VALUE_WORDS * VALUE_ROW + i % VALUE_WORDS, values + i);
#pragma unroll
    for (u32 i = 4 * lane; i < BLOCK * GROUPS; i += 128) copy_async(stage + VALUE_PARAMS_AT + i, value_params + i);
}

// Words `first` ... of a row in shared memory, as wide as they can be read.
template <u32 COUNT> DEVICE void read_words(const u32 *at, u32 (&words)[COUNT]) {
    if constexpr (COUNT % 4 == 0) {
#pragma unroll
        for (u32 i = 0; i < COUNT / 4; i++) {
            uint4 four = ((const uint4 *)at)[i];
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
        }
    } else if constexpr (COUNT % 2 == 0) {
#pragma unroll
        for (u32 i = 0; i < COUNT / 2; i++) {
            uint2 two = ((const uint2 *)at)[i];
            words[2 * i] = two.x, words[2 * i + 1] = two.y;
        }
    } else {
#pragma unroll
        for (u32 i = 0; i < COUNT; i++) words[i] = at[i];
    }
}

// Whether all lanes have whole parts of a row: none reaches beyond it.
#define WHOLE (HEAD_DIM % 32 == 0)

// Octets of keys that are unpacked together.
#define CHUNK (!WHOLE || PARTS % 2 ? 1 : KEY_BITS == 8 || PARTS % 4 ? 2 : 4)
#define OCTET_WORDS (KEY_BITS / 4)

// Adds the products of octet `w` of four tokens, those of rows g, g + 8, g + 16, g + 24 of the block, to scores.
DEVICE void add_scores(float scores[ROW_TILES][2][4], const u32 pairs[4][4], const uint4 *queries, u32 w) {
    u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < ROW_TILES; j++) {
        uint4 b = queries[(w * ROWS + 8 * j) * 4 + lane];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const u32 *low = pairs[2 * i], *high = pairs[2 * i + 1];
            u32 first[4] = {low[0], high[0], low[1], high[1]}, second[4] = {low[2], high[2], low[3], high[3]};
            multiply_add(scores[j][i], first, b.x, b.y);
            multiply_add(scores[j][i], second, b.z, b.w);
        }
    }
}

// Scores of a block of tokens in shared memory.
DEVICE void score_block(float scores[ROW_TILES][2][4], const u32 *stage, const uint4 *queries) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 chunk = 0; chunk < PARTS; chunk += CHUNK) {
        u32 codes[4][CHUNK * OCTET_WORDS], first = (t * PARTS + chunk) * OCTET_WORDS;
#pragma unroll
        for (int r = 0; r < 4; r++) {
            const u32 *row = stage + KEYS_AT + (g + 8 * r) * KEY_WORDS;
#if WHOLE
            read_words(row + first, codes[r]);
#else
#pragma unroll
            for (u32 i = 0; i < CHUNK * OCTET_WORDS; i++) codes[r][i] = row[min(first + i, (u32)KEY_WORDS - 1)];
#endif
        }
#pragma unroll
        for (u32 o = 0; o < CHUNK; o++) {
            u32 octet = min(t * PARTS + chunk + o, (u32)HEAD_DIM / 8 - 1), params[8], scales[4], offsets[4];
            read_words(stage + KEY_PARAMS_AT + 8 * octet, params);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                scales[i] = choose_bytes(params[i], params[i + 4], 0x5410);
                offsets[i] = choose_bytes(params[i], params[i + 4], 0x7632);
            }
            u32 pairs[4][4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
#if KEY_BITS == 8
                pairs_of_bytes(codes[r][2 * o], codes[r][2 * o + 1], pairs[r]);
#else
                pairs_of_nibbles(codes[r][o], pairs[r]);
#endif
#pragma unroll
                for (int i = 0; i < 4; i++) pairs[r][i] = pair_fma(pairs[r][i], scales[i], offsets[i]);
            }
            add_scores(scores, pairs, queries, chunk + o);
        }
    }
}

// Scores of the tokens of a tail, `there` of them.
DEVICE void score_tail(
    float scores[ROW_TILES][2][4], const Cache &cache, u32 sequence, u32 head, u32 there, const uint4 *queries
) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll 1
    for (u32 w = 0; w < PARTS; w++) {
        u32 pairs[4][4];
#pragma unroll
        for (u32 r = 0; r < 4; r++) {
            u32 token = min(g + 8 * r, there - 1), octet = min(t * PARTS + w, (u32)HEAD_DIM / 8 - 1);
            uint4 v = load_const((const uint4 *)(cache.key_tail + tail_at(sequence, token, head)) + octet);
            pairs[r][0] = choose_bytes(v.x, v.z, 0x5410);
            pairs[r][1] = choose_bytes(v.x, v.z, 0x7632);
            pairs[r][2] = choose_bytes(v.y, v.w, 0x5410);
            pairs[r][3] = choose_bytes(v.y, v.w, 0x7632);
        }
        add_scores(scores, pairs, queries, w);
    }
}

// Adds values of quad `u` of a lane's channels times weights: `low` and `high` are pairs of tokens for each channel.
DEVICE void add_values(
    float sums[ROW_TILES][PARTS][2][4], const u32 low[4], const u32 high[4], const u32 weights[ROW_TILES][2], u32 u
) {
#pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 a[4] = {low[2 * h], low[2 * h + 1], high[2 * h], high[2 * h + 1]};
#pragma unroll
        for (int j = 0; j < ROW_TILES; j++) multiply_add(sums[j][u][h], a, weights[j][0], weights[j][1]);
    }
}

// Quads of 4 bits are two in a word where lanes have an even number of them.
#define PAIRED (VALUE_BITS == 4 && WHOLE && PARTS % 2 == 0)
#define QUAD_WORDS (PAIRED ? PARTS / 2 : PARTS)

// Quads of a lane of a row of values in shared memory.
DEVICE void read_quads(const u32 *row, u32 g, u32 (&quads)[QUAD_WORDS]) {
#if PAIRED || (VALUE_BITS == 8 && WHOLE)
    read_words(row + g * QUAD_WORDS, quads);
#else
#pragma unroll
    for (u32 u = 0; u < PARTS; u++) {
        u32 quad = min(g * PARTS + u, (u32)VALUE_WORDS * (8 / VALUE_BITS) - 1);
        quads[u] = VALUE_BITS == 8 ? row[quad] : ((const u16 *)row)[quad];
    }
#endif
}

// Adds values of tokens `16 * i` ... of a block in shared memory.
DEVICE void add_block(
    float sums[ROW_TILES][PARTS][2][4], const u32 *stage, const u32 weights[ROW_TILES][2], u32 i
) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    u32 quads[4][QUAD_WORDS];
    u32 token[4] = {16 * i + 2 * t, 16 * i + 2 * t + 1, 16 * i + 8 + 2 * t, 16 * i + 9 + 2 * t};
#pragma unroll
    for (int r = 0; r < 4; r++) read_quads(stage + VALUES_AT + token[r] * VALUE_ROW, g, quads[r]);
    u32 scales[2], offsets[2];
#pragma unroll
    for (u32 u = 0; u < PARTS; u++) {
        // Groups of 32 channels are those of eight quads.
        if (u == 0 || 8 % PARTS != 0) {
            u32 group = min((g * PARTS + u) / 8, (u32)GROUPS - 1), params[4];
#pragma unroll
            for (int r = 0; r < 4; r++) params[r] = stage[VALUE_PARAMS_AT + token[r] * GROUPS + group];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                scales[r] = choose_bytes(params[2 * r], params[2 * r + 1], 0x5410);
                offsets[r] = choose_bytes(params[2 * r], params[2 * r + 1], 0x7632);
            }
        }
        u32 pairs[2][4];
#pragma unroll
        for (int r = 0; r < 2; r++) {
#if VALUE_BITS == 8
            pairs_of_bytes(quads[2 * r][u], quads[2 * r + 1][u], pairs[r]);
#else
            u32 word = PAIRED ? u / 2 : u, half = PAIRED && u % 2 ? 0x7632 : 0x5410;
            pairs_of_nibbles(choose_bytes(quads[2 * r][word], quads[2 * r + 1][word], half), pairs[r]);
#endif
#pragma unroll
            for (int c = 0; c < 4; c++) pairs[r][c] = pair_fma(pairs[r][c], scales[r], offsets[r]);
        }
        add_values(sums, pairs[0], pairs[1], weights, u);
    }
}

// Adds values of tokens `16 * i` ... of a tail of `there` tokens.
DEVICE void add_tail(
    float sums[ROW_TILES][PARTS][2][4], const Cache &cache, u32 sequence, u32 head, u32 there,
    const u32 weights[ROW_TILES][2], u32 i
) {
    u32 lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (u32 u = 0; u < PARTS; u++) {
        u32 pairs[2][4];
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            uint2 two[2];
#pragma unroll
            for (u32 s = 0; s < 2; s++) {
                u32 token = min(16 * i + 8 * r + 2 * t + s, there - 1), quad = min(g * PARTS + u, (u32)HEAD_DIM / 4 - 1);
                two[s] = load_const((const uint2 *)(cache.value_tail + tail_at(sequence, token, head)) + quad);
            }
            pairs[r][0] = choose_bytes(two[0].x, two[1].x, 0x5410);
            pairs[r][1] = choose_bytes(two[0].x, two[1].x, 0x7632);
            pairs[r][2] = choose_bytes(two[0].y, two[1].y, 0x5410);
            pairs[r][3] = choose_bytes(two[0].y, two[1].y, 0x7632);
        }
        add_values(sums, pairs[0], pairs[1], weights, u);
    }
}

DEVICE float over_rows(float x, bool greatest) {
#pragma unroll
    for (u32 mask = 4; mask < 32; mask *= 2) {
        float other = shuffle_xor(x, mask);
        x = greatest ? (other > x ? other : x) : add(x, other);
    }
    return x;
}

// `mask` has a byte for each token of each token of queries, zero for what is not seen; null for none.
KERNEL void __launch_bounds__(32 * WARPS, RESIDENT) tenpak_attend(
    Cache cache, const void *q, Strides of_q, const u8 *mask, u64 mask_sequence, u64 mask_token, float scale, u32 m,
    u32 per_head, u32 causal, float *partial, void *out
) {
    DYNAMIC_SHARED(memory);
    __shared__ uint4 queries[PARTS * ROWS * 4];
    __shared__ float factors[ROWS];
    u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
    u32 head = blockIdx.y % HEADS, row0 = blockIdx.y / HEADS * ROWS, sequence = blockIdx.z, rows = m * per_head;
    u32 len = length_of(cache, sequence), whole = len / BLOCK, blocks = (len + BLOCK - 1) / BLOCK;
    u32 begin = (u32)((u64)blocks * blockIdx.x / gridDim.x), end = (u32)((u64)blocks * (blockIdx.x + 1) / gridDim.x);
    u32 *stages = (u32 *)memory + warp * STAGES * STAGE_WORDS;

    u32 ahead = begin + warp;
#pragma unroll
    for (u32 s = 0; s < STAGES - 1; s++, ahead += WARPS) {
        if (ahead < end && ahead < whole) copy_block(cache, sequence, head, ahead, stages + s * STAGE_WORDS);
        copies_commit();
    }

    // Queries: a warp takes a row, a lane an octet of it.
    for (u32 r = warp; r < ROWS; r += WARPS) {
        float eight[8] = {};
        u32 row = row0 + r, most = 0;
        if (row < rows && lane * 8 < HEAD_DIM) {
            size_t at = of_q.sequence * sequence + of_q.head * (head * per_head + row % per_head)
                + of_q.token * (row / per_head) + lane * 8;
            for (u32 i = 0; i < 8; i++) eight[i] = load_number(q, at + i);
        }
        bool scaled = !fits_halves(nullptr);
        if (scaled) {
            most = greatest(eight, 0);
#pragma unroll
            for (u32 by = 16; by > 0; by /= 2) most = max(most, bits_of_float(shuffle_xor(float_of_bits(most), by)));
        }
        if (lane < 4 * PARTS)
            queries[(lane % PARTS * ROWS + r) * 4 + lane / PARTS] = fragment(eight, scaled ? factor_of(most) : 1.0f);
        // Powers are of two, not of e.
        if (lane == 0) factors[r] = mul(scaled ? inverse_of(most) : 1.0f, mul(scale, 1.44269504f));
    }
    __syncthreads();

    float sums[ROW_TILES][PARTS][2][4] = {}, most[ROW_TILES][2], weight_sums[ROW_TILES][2] = {}, own_factors[ROW_TILES][2];
    u32 seen[ROW_TILES][2];
#pragma unroll
    for (u32 j = 0; j < ROW_TILES; j++)
#pragma unroll
        for (u32 c = 0; c < 2; c++) {
            u32 r = 8 * j + 2 * t + c, token = min(row0 + r, rows - 1) / per_head;
            most[j][c] = UNSEEN;
            own_factors[j][c] = factors[r];
            seen[j][c] = causal ? len + token + 1 - min(m, len + token + 1) : len;
        }
    u32 stage = 0;
    for (u32 block = begin + warp; block < end; block += WARPS, ahead += WARPS) {
        u32 next = stage + STAGES - 1 - (stage > 0 ? STAGES : 0);
        if (ahead < end && ahead < whole) copy_block(cache, sequence, head, ahead, stages + next * STAGE_WORDS);
        copies_commit();
        copies_wait<STAGES - 1>();
        __syncwarp();
        const u32 *here = stages + stage * STAGE_WORDS;
        bool in_tail = block >= whole;
        float scores[ROW_TILES][2][4] = {};
        if (in_tail)
            score_tail(scores, cache, sequence, head, len % BLOCK, queries);
        else
            score_block(scores, here, queries);

        u32 weights[2][ROW_TILES][2];
#pragma unroll
        for (int j = 0; j < ROW_TILES; j++) {
#pragma unroll
            for (int c = 0; c < 2; c++) {
                float top = most[j][c];
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    // Token g + 8 i of the block, query 2 t + c.
                    float &score = scores[j][i / 2][i % 2 * 2 + c];
                    u32 token = block * BLOCK + 8 * i + g;
                    score = mul(score, own_factors[j][c]);
                    if (token >= seen[j][c]) {
                        score = UNSEEN;
                    } else if (mask) {
                        u32 query = min(row0 + 8 * j + 2 * t + c, rows - 1) / per_head;
                        if (!load_const(mask + mask_sequence * sequence + mask_token * query + token)) score = UNSEEN;
                    }
                    top = score > top ? score : top;
                }
                top = over_rows(top, true);
                float before = power_of_two(sub(most[j][c], top));
                most[j][c] = top;
                float sum = 0.0f;
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    float &score = scores[j][i / 2][i % 2 * 2 + c];
                    // What there is no token for has no weight, whatever others have.
                    bool there = block * BLOCK + 8 * i + g < len;
                    score = there ? power_of_two(add(sub(score, top), WEIGHT_EXPONENT)) : 0.0f;
                    sum = add(sum, score);
                }
                weight_sums[j][c] = fused(weight_sums[j][c], before, sum);
#pragma unroll
                for (u32 u = 0; u < PARTS; u++)
#pragma unroll
                    for (int h = 0; h < 2; h++) {
                        sums[j][u][h][c] = mul(sums[j][u][h][c], before);
                        sums[j][u][h][2 + c] = mul(sums[j][u][h][2 + c], before);
                    }
            }
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int h = 0; h < 2; h++)
                    weights[i][j][h] = turn_around(pair_of_floats(scores[j][i][2 * h], scores[j][i][2 * h + 1]));
        }
#pragma unroll
        for (u32 i = 0; i < 2; i++) {
            if (in_tail)
                add_tail(sums, cache, sequence, head, len % BLOCK, weights[i], i);
            else
                add_block(sums, here, weights[i], i);
        }
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        // Everyone is done with the stage that is filled next.
        __syncwarp();
    }
    copies_wait<0>();
    __syncthreads();

    // Results of warps: [warp][row][channel], and behind them the greatest score and the sum of weights of each row.
    float *all = (float *)memory, *tops = all + WARPS * ROWS * PARTS * 32, *totals = tops + WARPS * ROWS;
#pragma unroll
    for (int j = 0; j < ROW_TILES; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
            u32 r = warp * ROWS + 8 * j + 2 * t + c;
            float sum = over_rows(weight_sums[j][c], false);
            if (g == 0) tops[r] = most[j][c], totals[r] = sum;
#pragma unroll
            for (u32 u = 0; u < PARTS; u++)
#pragma unroll
                for (u32 h = 0; h < 4; h++)
                    all[r * PARTS * 32 + (g * PARTS + u) * 4 + h] = sums[j][u][h / 2][h % 2 * 2 + c];
        }
    __syncthreads();
    for (u32 i = threadIdx.x; i < ROWS * HEAD_DIM; i += 32 * WARPS) {
        u32 r = i / HEAD_DIM, c = i % HEAD_DIM, row = row0 + r;
        if (row >= rows) break;
        float top = UNSEEN, total = 0.0f, value = 0.0f;
        for (u32 w = 0; w < WARPS; w++) top = tops[w * ROWS + r] > top ? tops[w * ROWS + r] : top;
        for (u32 w = 0; w < WARPS; w++) {
            float weight = power_of_two(sub(tops[w * ROWS + r], top));
            total = fused(weight, totals[w * ROWS + r], total);
            value = fused(weight, all[(w * ROWS + r) * PARTS * 32 + c], value);
        }
        // [sequences, tokens, heads of queries].
        size_t place = ((size_t)sequence * m + row / per_head) * (HEADS * per_head) + head * per_head + row % per_head;
        if (gridDim.x == 1) {
            store_number(out, place * HEAD_DIM + c, quotient(value, total));
        } else {
            size_t queries_of_all = (size_t)gridDim.z * m * HEADS * per_head;
            float *own = partial + (blockIdx.x * queries_of_all + place) * (HEAD_DIM + 2);
            own[c] = value;
            if (c == 0) own[HEAD_DIM] = top, own[HEAD_DIM + 1] = total;
        }
    }
}
