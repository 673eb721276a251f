// What the kernels of attention share: the constants of the format of a cache, its planes, and a call.

override HEADS: u32;
override HEAD_DIM: u32;
override KEY_BITS: u32;
override VALUE_BITS: u32;
override BLOCK: u32;
override GROUP: u32;

// Less than any score.
const LOWEST: f32 = -1e38;

struct Call {
    len: u32,       // tokens
    m: u32,         // tokens of queries
    per_head: u32,  // heads of queries that share one of keys and values
    tiles: u32,     // times 128 tokens of a run
    runs: u32,
    causal: u32,    // whether queries are those of the last tokens
    partials: u32,  // where in `y` the runs' results begin
    zero: u32,
}

@group(0) @binding(0) var<storage, read> key_codes: array<u32>;
@group(0) @binding(1) var<storage, read> key_params: array<u32>;
@group(0) @binding(2) var<storage, read> value_codes: array<u32>;
@group(0) @binding(3) var<storage, read> value_params: array<u32>;
@group(0) @binding(4) var<storage, read> key_tail: array<u32>;
@group(0) @binding(5) var<storage, read> value_tail: array<u32>;
@group(1) @binding(0) var<storage, read> x: array<vec4<f32>>;
@group(1) @binding(1) var<storage, read_write> y: array<f32>;
@group(1) @binding(2) var<uniform> call: Call;

