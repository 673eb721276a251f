// Reading a weight: the one place in CUDA that knows what the bytes of a codec mean.
//
// What it is told about a layout are the constants of `Layout::constants`, as macros, and TABLE, the levels of a
// table or a bank; what a layout does not have costs nothing. Planes are read as they are stored: there is no second
// copy of a matrix on the device, and no time is spent on making one.
//
// There are two ways in. `read_weights` is the specification, f32 and bit for bit. `Run` is for tensor cores: 32
// consecutive columns of a row, loaded raw, so that loads can be on their way long before `octet` makes pairs of
// halves of eight of them. A product may take columns in any order if both sides take the same one. So each quarter of
// a warp owns 32 columns and not those two or four that the instruction names: that makes loads of 16 bytes of the
// stored order, and pairs of columns (i, i + 4), which are one mask away from the stored words.
#pragma once

#include "ptx.cuh"

#define UNSIGNED 0
#define SIGNED 1
#define ZERO_POINT 2
#define LOOKED_UP 3
#define BANKED 4

#define LOW_BITS (BITS == 8 ? 8 : 4)
#define HIGH_BITS (BITS - LOW_BITS)
#define HAS_TABLE (LEVELS >= LOOKED_UP)

// Columns of a run.
#define RUN 32
// Whether a row has one scale that is multiplied at the very end, beside or instead of those of groups.
#define SCALED_ROWS (GROUP == 0 || LEVELS == BANKED)
// Whether groups have scales of 16 bits or less, which is what pairs of halves can be multiplied by.
#define HAS_PAIRS (SCALED_ROWS || SCALE_BITS == 16)
// Groups of a run.
#define RUN_GROUPS (GROUP == 0 || GROUP >= RUN ? 1 : RUN / GROUP)

// The planes of a matrix: addresses on the device, null for what the layout does not have.
struct Planes {
    const u32 *codes;
    const u32 *high_codes;
    const u8 *scales;
    const u8 *addends;
    const float *row_scales;
    u32 rows, cols;
};

#ifdef TABLE
__constant__ const float all_levels[] = {TABLE};
#endif

// Sizes of one row.
DEVICE u32 groups_of(u32 cols) { return GROUP == 0 ? 1 : (cols + (GROUP ? GROUP : 1) - 1) / (GROUP ? GROUP : 1); }
DEVICE u32 code_words_of(u32 cols) { return (cols * LOW_BITS + 31) / 32; }
DEVICE u32 high_words_of(u32 cols) { return (cols * HIGH_BITS + 31) / 32; }
DEVICE u32 zero_point_bytes_of(u32 cols) { return (groups_of(cols) * BITS + 7) / 8; }

// ---- The specification: eight weights at a time ----

// What the weights of a group share; `mark` is the zero point, or the scale byte of a bank.
struct Group {
    float scale, offset;
    u32 mark;
};

// What the scale of the row is multiplied by.
DEVICE float multiplier_of(u32 byte) {
    u32 magnitude = byte & ((2u << BITS) - 1);
    u32 steep = magnitude > KNEE ? magnitude - KNEE : 0;
    float multiplier = (float)(magnitude + ((STEP > 0 ? STEP : 1) - 1) * steep);
    return byte > 127 ? -multiplier : multiplier;
}

DEVICE u32 read_zero_point(const Planes &planes, u32 row, u32 group) {
    u32 bit = group * BITS;
    u32 byte = load_const(planes.addends + (size_t)row * zero_point_bytes_of(planes.cols) + bit / 8);
    return byte >> bit % 8 & ((1u << BITS) - 1);
}

DEVICE Group read_group(const Planes &planes, u32 row, u32 group) {
    size_t at = (size_t)row * groups_of(planes.cols) + group;
    Group found = {0.0f, 0.0f, 0};
#if SCALE_BITS == 8
    found.mark = load_const(planes.scales + at);
    found.scale = mul(multiplier_of(found.mark), load_const(planes.row_scales + row));
#elif SCALE_BITS == 16
    found.scale = float_of_half(load_const((const u16 *)planes.scales + at));
#else
    found.scale = load_const((const float *)planes.scales + at);
#endif
#if OFFSET_BITS == 16
    found.offset = float_of_half(load_const((const u16 *)planes.addends + at));
#elif OFFSET_BITS == 32
    found.offset = load_const((const float *)planes.addends + at);
#endif
#if LEVELS == ZERO_POINT
    found.mark = read_zero_point(planes, row, group);
#endif
    return found;
}

// Codes of eight columns of a row, as they are stored.
struct Octet {
    u32 codes[LOW_BITS / 4];
    u32 high;
};

// Columns 8 * octet ...; the row has at least the first one.
DEVICE Octet read_octet(const Planes &planes, u32 row, u32 octet) {
    Octet found = {};
    u32 words = code_words_of(planes.cols);
    const u32 *codes = planes.codes + (size_t)row * words;
#pragma unroll
    for (u32 i = 0; i < LOW_BITS / 4; i++)
        found.codes[i] = load_const(codes + min(octet * (LOW_BITS / 4) + i, words - 1));
#if HIGH_BITS > 0
    const u8 *high = (const u8 *)(planes.high_codes + (size_t)row * high_words_of(planes.cols)) + octet * HIGH_BITS;
#pragma unroll
    for (u32 i = 0; i < HIGH_BITS; i++) found.high |= load_const(high + i) << 8 * i;
#endif
    return found;
}

DEVICE u32 code_of(const Octet &octet, u32 i) {
    u32 code = octet.codes[i * LOW_BITS / 32] >> i * LOW_BITS % 32 & ((1u << LOW_BITS) - 1);
#if HIGH_BITS > 0
    code |= (octet.high >> i * HIGH_BITS & ((1u << HIGH_BITS) - 1)) << 4;
#endif
    return code;
}

DEVICE float level_of(u32 code, u32 mark) {
#if LEVELS == BANKED
    return all_levels[(mark >> 1 & (64 - (1u << BITS))) | code];
#elif LEVELS == LOOKED_UP
    return all_levels[code];
#elif LEVELS == SIGNED
    return (float)(int)(code - (1u << (BITS - 1)));
#elif LEVELS == ZERO_POINT
    return (float)(int)(code - mark);
#else
    return (float)code;
#endif
}

// The weight that a code stands for: one rounding for the product, one for the sum.
DEVICE float weight_of(u32 code, const Group &group) {
    float weight = mul(level_of(code, group.mark), group.scale);
#if OFFSET_BITS > 0
    weight = add(weight, group.offset);
#endif
    return weight;
}

DEVICE u32 group_of(u32 col) { return GROUP == 0 ? 0 : col / (GROUP ? GROUP : 1); }

// Eight weights; no octet straddles a group.
DEVICE void read_weights(const Planes &planes, u32 row, u32 octet, float weights[8]) {
    Octet codes = read_octet(planes, row, octet);
    Group group = read_group(planes, row, group_of(octet * 8));
#pragma unroll
    for (u32 i = 0; i < 8; i++) weights[i] = weight_of(code_of(codes, i), group);
}

// ---- Pairs of halves for tensor cores ----
#if HAS_PAIRS

#define SCALE_WORDS (SCALED_ROWS && GROUP == 0 ? 0 : (RUN_GROUPS * SCALE_BITS + 31) / 32)
#define ADDEND_WORDS ((RUN_GROUPS * OFFSET_BITS + 31) / 32 + (LEVELS == ZERO_POINT))

// 32 columns of a row as they are stored.
struct Run {
    u32 codes[LOW_BITS];
    u32 high[HIGH_BITS > 0 ? HIGH_BITS : 1];
    u32 scales[SCALE_WORDS > 0 ? SCALE_WORDS : 1];
    u32 addends[ADDEND_WORDS > 0 ? ADDEND_WORDS : 1];
};

// COUNT numbers of WIDTH bits, from number `first` of a plane of which the row has `count`, side by side; ALIGNED
// says that words of a run neither straddle a multiple of their size nor reach past the row.
template <int COUNT, int WIDTH, int WORDS>
DEVICE void load_numbers(const u8 *row, u32 first, u32 count, u32 (&words)[WORDS]) {
#if ALIGNED
    const u8 *at = row + (size_t)first * WIDTH / 8;
    if (COUNT * WIDTH == 8) words[0] = load_const(at);
    if (COUNT * WIDTH == 16) words[0] = load_const((const u16 *)at);
    if (COUNT * WIDTH == 32) words[0] = load_const((const u32 *)at);
    if (COUNT * WIDTH == 64) {
        uint2 two = load_const((const uint2 *)at);
        words[0] = two.x;
        words[WORDS > 1 ? 1 : 0] = two.y;
    }
#else
#pragma unroll
    for (int i = 0; i < WORDS; i++) words[i] = 0;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        u32 number = min(first + i, count - 1);
        u32 bits = WIDTH == 8 ? load_const(row + number) : load_const((const u16 *)row + number);
        words[i * WIDTH / 32] |= bits << i * WIDTH % 32;
    }
#endif
}

// Loads the run of columns `col` ... of a row; `col` is a multiple of 32, less than `cols`.
DEVICE Run load_run(const Planes &planes, u32 row, u32 col) {
    Run run;
    u32 words = code_words_of(planes.cols), groups = groups_of(planes.cols);
    const u32 *codes = planes.codes + (size_t)row * words;
    u32 first = col / RUN * LOW_BITS;
#if ALIGNED
#pragma unroll
    for (int i = 0; i < LOW_BITS; i += 4) {
        uint4 four = load_once((const uint4 *)(codes + first + i));
        run.codes[i] = four.x;
        run.codes[i + 1] = four.y;
        run.codes[i + 2] = four.z;
        run.codes[i + 3] = four.w;
    }
#else
#pragma unroll
    for (int i = 0; i < LOW_BITS; i++) run.codes[i] = load_const(codes + min(first + i, words - 1));
#endif
#if HIGH_BITS > 0
    u32 high_words = high_words_of(planes.cols);
    const u32 *high = planes.high_codes + (size_t)row * high_words;
#if ALIGNED && HIGH_BITS == 2
    uint2 two = load_const((const uint2 *)(high + col / RUN * HIGH_BITS));
    run.high[0] = two.x;
    run.high[1] = two.y;
#else
#pragma unroll
    for (int i = 0; i < HIGH_BITS; i++)
        run.high[i] = load_const(high + min(col / RUN * HIGH_BITS + i, high_words - 1));
#endif
#endif
#if GROUP > 0
    u32 group = col / GROUP;
    load_numbers<RUN_GROUPS, SCALE_BITS>(
        planes.scales + (size_t)row * groups * (SCALE_BITS / 8), group, groups, run.scales);
#if OFFSET_BITS > 0
    load_numbers<RUN_GROUPS, OFFSET_BITS>(
        planes.addends + (size_t)row * groups * (OFFSET_BITS / 8), group, groups, run.addends);
#endif
#if LEVELS == ZERO_POINT
    run.addends[0] = read_zero_point(planes, row, group);
#endif
#endif
    return run;
}

// Where tensor cores find levels: one column of shared memory for each lane, so that lanes never wait for each other.
#if HAS_TABLE
#define TABLE_ENTRIES (LEVELS == BANKED ? 64 : 16)
#define LEVEL_WORDS (TABLE_ENTRIES * 32)
#else
#define LEVEL_WORDS 0
#endif

// Fills the table; a barrier must follow.
DEVICE void fill_levels(u32 *levels, u32 thread, u32 threads) {
#if HAS_TABLE
    for (u32 i = thread; i < LEVEL_WORDS; i += threads) levels[i] = half_of_float(all_levels[i / 32]);
#endif
}

// Number `i` of 16 bits, twice.
DEVICE u32 both(const u32 *words, int i) { return choose_bytes(words[i / 2], 0, i % 2 ? 0x3232 : 0x1010); }

// What makes weights of levels in a group: halves, twice each. Where the row has a scale, that is left out.
struct PairGroup {
    u32 scale, offset, mark;
};

DEVICE PairGroup pair_group(const Run &run, int group) {
    PairGroup found = {0, 0, 0};
#if SCALE_BITS == 8
    found.mark = run.scales[0] >> 8 * group & 255;
    float multiplier = multiplier_of(found.mark);
    found.scale = pair_of_floats(multiplier, multiplier);
#elif SCALE_BITS == 16
    found.scale = both(run.scales, group);
#endif
#if OFFSET_BITS == 16
    found.offset = both(run.addends, group);
#endif
#if LEVELS == ZERO_POINT
    found.mark = run.addends[0];
#endif
    return found;
}

// Halves whose last four bits of mantissa count ones (1024 + q) or sixteens (1024 + 16 q): a mask makes numbers of
// codes.
#define ONES 0x64006400u
#define TIMES(n) ((u32)(n) * 0x10001u)

// The levels of octet `w` of a run, exact, as pairs (0, 4), (1, 5), (2, 6), (3, 7).
DEVICE void octet_levels(const Run &run, int w, const PairGroup &group, const u32 *levels, u32 pairs[4]) {
#if HAS_TABLE
    u32 lane = threadIdx.x % 32;
    u32 base = LEVELS == BANKED ? group.mark >> 1 & (64 - (1u << BITS)) : 0;
    const u32 *own = levels + base * 32 + lane;
#if HIGH_BITS > 0
    u32 high = run.high[w * HIGH_BITS / 4] >> w * 8 * HIGH_BITS % 32;
#endif
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 first = run.codes[w] >> 4 * i & 15, second = run.codes[w] >> 4 * (i + 4) & 15;
#if HIGH_BITS > 0
        first |= (high >> HIGH_BITS * i & ((1u << HIGH_BITS) - 1)) << 4;
        second |= (high >> HIGH_BITS * (i + 4) & ((1u << HIGH_BITS) - 1)) << 4;
#endif
        pairs[i] = choose_bytes(own[first * 32], own[second * 32], 0x5410);
    }
#elif BITS == 8
#pragma unroll
    for (int i = 0; i < 4; i++) {
        u32 bytes = choose_bytes(run.codes[2 * w], run.codes[2 * w + 1], 0x4400u + 0x1100u * i + 0x11u * i);
        pairs[i] = pair_sub(and_or(bytes, TIMES(0xff), ONES), TIMES(0x6480)); // less 1024 + 128
    }
#else
    u32 zero = LEVELS == SIGNED ? 8 : LEVELS == ZERO_POINT ? group.mark : 0;
    // 1024 + zero, and -(64 + zero): both are exact.
    u32 ones = ONES + TIMES(zero), sixteens = TIMES(0xd400) + TIMES(zero << 4);
    u32 low = run.codes[w], high = low >> 8;
    pairs[0] = pair_sub(and_or(low, TIMES(0x0f), ONES), ones);
    pairs[1] = pair_fma(and_or(low, TIMES(0xf0), ONES), TIMES(0x2c00), sixteens); // by 1/16
    pairs[2] = pair_sub(and_or(high, TIMES(0x0f), ONES), ones);
    pairs[3] = pair_fma(and_or(high, TIMES(0xf0), ONES), TIMES(0x2c00), sixteens);
#endif
}

// The weights of octet `w` of a run as pairs (0, 4), (1, 5), (2, 6), (3, 7), each one rounding from exact; where the
// row has a scale, they are yet to be multiplied by it.
DEVICE void octet(const Run &run, int w, const PairGroup &group, const u32 *levels, u32 pairs[4]) {
    octet_levels(run, w, group, levels, pairs);
#if GROUP > 0
#pragma unroll
    for (int i = 0; i < 4; i++) {
#if OFFSET_BITS > 0
        pairs[i] = pair_fma(pairs[i], group.scale, group.offset);
#else
        pairs[i] = pair_mul(pairs[i], group.scale);
#endif
    }
#endif
}

// The scale that is left out of pairs.
DEVICE float row_scale(const Planes &planes, u32 row) {
#if LEVELS == BANKED
    return load_const(planes.row_scales + row);
#elif GROUP == 0 && SCALE_BITS == 16
    return float_of_half(load_const((const u16 *)planes.scales + row));
#elif GROUP == 0
    return load_const((const float *)planes.scales + row);
#else
    return 1.0f;
#endif
}

#endif
