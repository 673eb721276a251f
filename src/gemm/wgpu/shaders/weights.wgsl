// Reading weights from stored planes: the one place in WGSL that knows what the bytes of a codec mean.
//
// All kernels begin with this text. What it is told about a layout are the constants of `Layout::constants`; a driver
// folds them, so that what a layout does not have costs nothing. Everything is read in quads: four columns that start
// at a multiple of four never straddle a group or a word.
//
// The alias `half` is what activations and tiles are made of, f16 or f32; the line that says which comes before this
// text.

override BITS: u32;
override LEVELS: u32;
override GROUP: u32;
override SCALE_BITS: u32;
override OFFSET_BITS: u32;
override KNEE: u32;
override STEP: u32;

const UNSIGNED: u32 = 0u;
const SIGNED: u32 = 1u;
const ZERO_POINT: u32 = 2u;
const TABLE: u32 = 3u;
const BANK: u32 = 4u;

// Workgroups of a dispatch along one dimension, at most.
const WIDTH: u32 = 65535u;

// Consecutive rows of a matrix.
struct Shape {
    rows: u32,
    quads: u32,         // of a row, the last one may be ragged
    cols: u32,
    groups: u32,        // of a row
    code_words: u32,    // of a row
    high_words: u32,    // of a row
    addend_bits: u32,   // of a row of zero points, padding included
    first: u32,         // where the first row stands in the whole matrix
    all_rows: u32,      // of the whole matrix
}

// One product, or one run of rows to decode.
struct Call {
    m: u32,         // rows of activations, or of weights to decode
    x_stride: u32,  // vectors of a row of activations
    first: u32,     // the first row to decode
    zero: u32,      // is 0, which no compiler knows
}

@group(0) @binding(0) var<storage, read> codes: array<u32>;
@group(0) @binding(1) var<storage, read> high_codes: array<u32>;
@group(0) @binding(2) var<storage, read> scales: array<u32>;
@group(0) @binding(3) var<storage, read> addends: array<u32>;
@group(0) @binding(4) var<storage, read> row_scales: array<f32>;
@group(0) @binding(5) var<storage, read> all_levels: array<f32>;
@group(0) @binding(6) var<uniform> shape: Shape;
@group(1) @binding(0) var<storage, read> x: array<vec4<half>>;
@group(1) @binding(1) var<storage, read_write> y: array<f32>;
@group(1) @binding(2) var<uniform> call: Call;

// Levels of a table or a bank, where every thread finds them fast.
var<workgroup> table: array<f32, 64>;

// The number of a workgroup that is dispatched in as many rows of WIDTH as are needed.
fn linear(workgroup: vec3<u32>) -> u32 {
    return workgroup.y * WIDTH + workgroup.x;
}

// Fills the table; every thread of the workgroup must come here, at least 64 of them.
fn fill_table(thread: u32) {
    if (LEVELS >= TABLE) {
        if (thread < 64u) {
            table[thread] = all_levels[thread];
        }
        workgroupBarrier();
    }
}

// A half as f32, exactly, subnormal ones included, which `unpack2x16float` may flush.
fn from_half(bits: u32) -> f32 {
    let magnitude = bits & 0x7fffu;
    var wide = (magnitude << 13u) + 0x38000000u;
    if (magnitude >= 0x7c00u) {
        wide += 0x38000000u;
    }
    if (magnitude < 0x0400u) {
        wide = bitcast<u32>(f32(magnitude) * 0x1p-24f);
    }
    return bitcast<f32>(wide | ((bits & 0x8000u) << 16u));
}

// What the weights of a group share.
struct Group {
    scale: f32,
    offset: f32,
    mark: u32,  // the zero point, or the scale byte of a bank
}

// The group of a quad of a row.
fn group_of(quad: u32) -> u32 {
    if (GROUP == 0u) {
        return 0u;
    }
    // An octet of a ragged row may reach past the last group, where its activations are zero.
    return min(quad * 4u / max(GROUP, 1u), shape.groups - 1u);
}

fn read_group(row: u32, group: u32) -> Group {
    let at = row * shape.groups + group;
    var found = Group(0.0, 0.0, 0u);
    if (SCALE_BITS == 8u) {
        let byte = (scales[at >> 2u] >> ((at & 3u) * 8u)) & 255u;
        let magnitude = byte & ((2u << BITS) - 1u);
        let steep = max(magnitude, KNEE) - KNEE;
        let multiplier = f32(magnitude + (max(STEP, 1u) - 1u) * steep);
        found.scale = select(multiplier, -multiplier, byte > 127u) * row_scales[row];
        found.mark = byte;
    } else if (SCALE_BITS == 16u) {
        found.scale = from_half(scales[at >> 1u] >> ((at & 1u) * 16u));
    } else {
        found.scale = bitcast<f32>(scales[at]);
    }
    if (OFFSET_BITS == 16u) {
        found.offset = from_half(addends[at >> 1u] >> ((at & 1u) * 16u));
    } else if (OFFSET_BITS == 32u) {
        found.offset = bitcast<f32>(addends[at]);
    }
    if (LEVELS == ZERO_POINT) {
        let bit = row * shape.addend_bits + group * BITS;
        found.mark = (addends[bit >> 5u] >> (bit & 31u)) & ((1u << BITS) - 1u);
    }
    return found;
}

// The codes of a quad, of those of 5 and 6 bits the low four, in the low bits of a word.
fn read_codes(row: u32, quad: u32) -> u32 {
    if (BITS == 8u) {
        return codes[row * shape.code_words + quad];
    }
    return codes[row * shape.code_words + (quad >> 1u)] >> ((quad & 1u) * 16u);
}

// The bits of codes above the low four, in the low bits of a word; what stands above them is anything.
fn read_high_codes(row: u32, quad: u32) -> u32 {
    if (BITS == 5u) {
        return high_codes[row * shape.high_words + (quad >> 3u)] >> ((quad & 7u) * 4u);
    }
    if (BITS == 6u) {
        return high_codes[row * shape.high_words + (quad >> 2u)] >> ((quad & 3u) * 8u);
    }
    return 0u;
}

// The levels of a quad of codes.
fn levels_of(low: u32, high: u32, mark: u32) -> vec4<f32> {
    var code = (vec4<u32>(low) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u);
    if (BITS == 8u) {
        code = (vec4<u32>(low) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u);
    }
    if (BITS == 5u) {
        code |= ((vec4<u32>(high) >> vec4<u32>(0u, 1u, 2u, 3u)) & vec4<u32>(1u)) << vec4<u32>(4u);
    }
    if (BITS == 6u) {
        code |= ((vec4<u32>(high) >> vec4<u32>(0u, 2u, 4u, 6u)) & vec4<u32>(3u)) << vec4<u32>(4u);
    }
    if (LEVELS >= TABLE) {
        if (LEVELS == BANK) {
            code |= vec4<u32>((mark >> 1u) & (64u - (1u << BITS)));
        }
        return vec4<f32>(table[code.x], table[code.y], table[code.z], table[code.w]);
    }
    if (LEVELS == SIGNED) {
        return vec4<f32>(code) - vec4<f32>(f32(1u << (BITS - 1u)));
    }
    if (LEVELS == ZERO_POINT) {
        return vec4<f32>(code) - vec4<f32>(f32(mark));
    }
    return vec4<f32>(code);
}

// The levels of a quad of a row.
fn read_levels(row: u32, quad: u32, mark: u32) -> vec4<f32> {
    return levels_of(read_codes(row, quad), read_high_codes(row, quad), mark);
}
