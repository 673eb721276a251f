// Attention of few queries over a quantized cache of keys and values: the planes of `src/attention/`, read once.
//
// A workgroup takes a run of tokens of one head of keys and values, and up to ROWS of the queries that share it. It goes
// by 128 tokens: every thread makes the scores of one token, then all of them together add up values, each a quad of
// channels of every so-many-th token. The greatest score so far is kept as in any online softmax. Where tokens are
// divided among several runs, so that there is work for a whole device, `attention_merge.wgsl` makes one result of theirs.
//
// One query (ROWS 1) is read four channels in a vector. More of them (4 or 8) come transposed: a vector holds four queries
// of one channel. Scales and offsets of keys are made f32 once for 32 tokens, not by each of their threads. How the
// threads find the greatest score and a sum is the text that follows this one.

override ROWS: u32;

const THREADS: u32 = 128u;
// Quads of channels whose scales and offsets are in memory of the workgroup at once, for each of four blocks.
const CHUNK: u32 = 16u;

// Queries: of one quads of channels, of more of them vectors of four queries for each channel.
var<workgroup> queries: array<vec4<f32>, 512>;
// Weights of 128 tokens, for each four queries.
var<workgroup> weights: array<vec4<f32>, 256>;
var<workgroup> key_scales: array<vec4<f32>, 64>;
var<workgroup> key_offsets: array<vec4<f32>, 64>;
var<workgroup> scratch: array<vec4<f32>, THREADS>;

fn key_words() -> u32 {
    return (HEAD_DIM * KEY_BITS + 31u) / 32u;
}

fn value_words() -> u32 {
    return (HEAD_DIM * VALUE_BITS + 31u) / 32u;
}

fn tail_words() -> u32 {
    return (HEAD_DIM + 1u) / 2u;
}

fn groups() -> u32 {
    return (HEAD_DIM + GROUP - 1u) / GROUP;
}

fn quads() -> u32 {
    return (HEAD_DIM + 3u) / 4u;
}

// Both halves of a word as f32, exactly, subnormal ones included, which `unpack2x16float` may flush.
fn pair(word: u32) -> vec2<f32> {
    let bits = vec2<u32>(word, word >> 16u);
    let magnitude = bits & vec2<u32>(0x7fffu);
    let normal = (magnitude << vec2<u32>(13u)) + vec2<u32>(0x38000000u);
    let small = bitcast<vec2<u32>>(vec2<f32>(magnitude) * 0x1p-24f);
    let wide = select(normal, small, magnitude < vec2<u32>(0x0400u));
    return bitcast<vec2<f32>>(wide | ((bits & vec2<u32>(0x8000u)) << vec2<u32>(16u)));
}

fn nibbles(word: u32) -> vec4<f32> {
    return vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u));
}

fn bytes(word: u32) -> vec4<f32> {
    return vec4<f32>((vec4<u32>(word) >> vec4<u32>(0u, 8u, 16u, 24u)) & vec4<u32>(255u));
}

// Tokens that are in whole blocks.
fn whole() -> u32 {
    return call.len / BLOCK * BLOCK;
}

// Where the rows of a token in a tail begin.
fn tail_row(token: u32, head: u32) -> u32 {
    return ((token - whole()) * HEADS + head) * tail_words();
}

// What four queries have seen so far, or in the first place one.
struct Four {
    greatest: vec4<f32>,
    sums: vec4<f32>,        // of weights, of this thread's tokens
    out: mat4x4<f32>,       // values times weights: a column for each channel of this thread's quad; of one query the first
}

// The scores of a token with four queries, or in the first place with one.
struct Scores {
    low: vec4<f32>,
    high: vec4<f32>,
}

fn add_scores(scores: Scores, quad: u32, key: vec4<f32>) -> Scores {
    var sums = scores;
    if (ROWS == 1u) {
        sums.low.x += dot(key, queries[quad]);
    } else {
        let step = ROWS / 4u;
        let at = 4u * quad * step;
        let low = mat4x4<f32>(queries[at], queries[at + step], queries[at + 2u * step], queries[at + 3u * step]);
        sums.low += low * key;
        if (ROWS == 8u) {
            let high = mat4x4<f32>(
                queries[at + 1u],
                queries[at + 1u + step],
                queries[at + 1u + 2u * step],
                queries[at + 1u + 3u * step],
            );
            sums.high += high * key;
        }
    }
    return sums;
}

// Four channels of a value; those beyond the last one are anything.
fn read_value(token: u32, head: u32, quad: u32) -> vec4<f32> {
    if (token >= whole()) {
        let row = tail_row(token, head);
        let last = tail_words() - 1u;
        return vec4<f32>(pair(value_tail[row + 2u * quad]), pair(value_tail[row + min(2u * quad + 1u, last)]));
    }
    let row = (token / BLOCK * HEADS + head) * BLOCK + token % BLOCK;
    let params = pair(value_params[row * groups() + 4u * quad / GROUP]);
    if (VALUE_BITS == 8u) {
        return bytes(value_codes[row * value_words() + quad]) * params.x + vec4<f32>(params.y);
    }
    let word = value_codes[row * value_words() + quad / 2u] >> (quad % 2u * 16u);
    return nibbles(word) * params.x + vec4<f32>(params.y);
}

// The product of every number of `column` with every one of `row`.
fn outer(column: vec4<f32>, row: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(column * row.x, column * row.y, column * row.z, column * row.w);
}

fn scaled(m: mat4x4<f32>, rows: vec4<f32>) -> mat4x4<f32> {
    return mat4x4<f32>(m[0] * rows, m[1] * rows, m[2] * rows, m[3] * rows);
}

// Sums over all threads that have the same quad of channels, in the first of them.
fn over_slices(thread: u32, value: vec4<f32>) -> vec4<f32> {
    scratch[thread] = value;
    workgroupBarrier();
    var sum = value;
    if (thread < quads()) {
        for (var other = thread + quads(); other < THREADS / quads() * quads(); other += quads()) {
            sum += scratch[other];
        }
    }
    workgroupBarrier();
    return sum;
}

// Tokens that queries see, of the rows `row` of queries; tokens of queries follow each other, each with its heads.
fn seen(row: vec4<u32>) -> vec4<u32> {
    if (call.causal == 0u) {
        return vec4<u32>(call.len);
    }
    return min(vec4<u32>(call.len + 1u - call.m) + row / vec4<u32>(call.per_head), vec4<u32>(call.len));
}

// Stores what a query's run makes of a channel.
fn store(run: u32, head: u32, row: u32, channel: u32, value: f32, sum: f32) {
    if (row >= call.m * call.per_head || channel >= HEAD_DIM) {
        return;
    }
    let query = row / call.per_head * HEADS * call.per_head + head * call.per_head + row % call.per_head;
    if (call.runs == 1u) {
        y[query * HEAD_DIM + channel] = value / sum;
    } else {
        y[call.partials + (run * call.m * HEADS * call.per_head + query) * (HEAD_DIM + 2u) + channel] = value;
    }
}

// Stores what the merging of runs needs to know of a query's run.
fn store_sum(run: u32, head: u32, row: u32, greatest: f32, sum: f32) {
    if (row >= call.m * call.per_head || call.runs == 1u) {
        return;
    }
    let query = row / call.per_head * HEADS * call.per_head + head * call.per_head + row % call.per_head;
    let at = call.partials + (run * call.m * HEADS * call.per_head + query) * (HEAD_DIM + 2u) + HEAD_DIM;
    y[at] = greatest;
    y[at + 1u] = sum;
}

// Stores the results of four queries, or of one.
fn finish(place: Place, run: u32, head: u32, row: u32, four: Four) {
    let thread = place.thread;
    let sum = all_sum(place, four.sums);
    if (ROWS == 1u) {
        let out = over_slices(thread, four.out[0]);
        if (thread < quads()) {
            store(run, head, row, 4u * thread, out.x, sum.x);
            store(run, head, row, 4u * thread + 1u, out.y, sum.x);
            store(run, head, row, 4u * thread + 2u, out.z, sum.x);
            store(run, head, row, 4u * thread + 3u, out.w, sum.x);
        }
    } else {
        let out = mat4x4<f32>(
            over_slices(thread, four.out[0]),
            over_slices(thread, four.out[1]),
            over_slices(thread, four.out[2]),
            over_slices(thread, four.out[3]),
        );
        if (thread < quads()) {
            for (var i = 0u; i < 4u; i++) {
                store(run, head, row, 4u * thread + i, out[i].x, sum.x);
                store(run, head, row + 1u, 4u * thread + i, out[i].y, sum.y);
                store(run, head, row + 2u, 4u * thread + i, out[i].z, sum.z);
                store(run, head, row + 3u, 4u * thread + i, out[i].w, sum.w);
            }
        }
    }
    if (thread == 0u) {
        store_sum(run, head, row, four.greatest.x, sum.x);
        if (ROWS > 1u) {
            store_sum(run, head, row + 1u, four.greatest.y, sum.y);
            store_sum(run, head, row + 2u, four.greatest.z, sum.z);
            store_sum(run, head, row + 3u, four.greatest.w, sum.w);
        }
    }
}

// Takes the scores of this thread's token into account; gives its weights, and scales what was there before.
fn weigh(place: Place, four: ptr<function, Four>, scores: vec4<f32>, visible: vec4<bool>) -> vec4<f32> {
    let greatest = max((*four).greatest, all_max(place, select(vec4<f32>(LOWEST), scores, visible)));
    let before = exp((*four).greatest - greatest);
    let weight = select(vec4<f32>(0.0), exp(scores - greatest), visible);
    (*four).greatest = greatest;
    (*four).sums = before * (*four).sums + weight;
    if (ROWS == 1u) {
        (*four).out[0] *= before.x;
    } else {
        (*four).out = scaled((*four).out, before);
    }
    return weight;
}

fn attend(workgroup: vec3<u32>, place: Place) {
    let thread = place.thread;
    let run = workgroup.x;
    let row = workgroup.y * ROWS;
    let head = workgroup.z;
    // Two quads are read at once, so that queries end with a whole pair of them.
    let pairs = (quads() + 1u) / 2u;
    let vectors = 2u * pairs * ROWS;
    let tiles_of_rows = (call.m * call.per_head + ROWS - 1u) / ROWS;
    let from_x = (head * tiles_of_rows + workgroup.y) * vectors;
    for (var i = thread; i < vectors; i += THREADS) {
        queries[i] = x[from_x + i];
    }
    let rows_low = vec4<u32>(row) + vec4<u32>(0u, 1u, 2u, 3u);
    let seen_low = seen(rows_low);
    let seen_high = seen(rows_low + vec4<u32>(4u));
    var low = Four(vec4<f32>(LOWEST), vec4<f32>(0.0), mat4x4<f32>());
    var high = Four(vec4<f32>(LOWEST), vec4<f32>(0.0), mat4x4<f32>());
    let slices = THREADS / quads();
    let my_quad = thread % quads();
    let my_slice = thread / quads();
    let end = min((run + 1u) * call.tiles * THREADS, call.len);
    for (var start = run * call.tiles * THREADS; start < end; start += THREADS) {
        let token = start + thread;
        var scores = Scores(vec4<f32>(0.0), vec4<f32>(0.0));
        for (var chunk = 0u; chunk < quads(); chunk += CHUNK) {
            workgroupBarrier();
            if (thread < 4u * CHUNK) {
                // The quad of channels of the block that this thread prepares.
                let block = start / BLOCK + thread / CHUNK;
                let first = 4u * (chunk + thread % CHUNK);
                if (block < call.len / BLOCK && first < HEAD_DIM) {
                    let at = (block * HEADS + head) * HEAD_DIM;
                    let last = HEAD_DIM - 1u;
                    let a = pair(key_params[at + first]);
                    let b = pair(key_params[at + min(first + 1u, last)]);
                    let c = pair(key_params[at + min(first + 2u, last)]);
                    let d = pair(key_params[at + min(first + 3u, last)]);
                    key_scales[thread] = vec4<f32>(a.x, b.x, c.x, d.x);
                    key_offsets[thread] = vec4<f32>(a.y, b.y, c.y, d.y);
                } else {
                    key_scales[thread] = vec4<f32>(0.0);
                    key_offsets[thread] = vec4<f32>(0.0);
                }
            }
            workgroupBarrier();
            let last_quad = min(chunk + CHUNK, quads());
            if (token < whole()) {
                let codes = ((token / BLOCK * HEADS + head) * BLOCK + token % BLOCK) * key_words();
                let prepared = thread / BLOCK * CHUNK;
                for (var quad = chunk; quad < last_quad; quad += 2u) {
                    var a: vec4<f32>;
                    var b: vec4<f32>;
                    if (KEY_BITS == 8u) {
                        a = bytes(key_codes[codes + quad]);
                        b = bytes(key_codes[codes + min(quad + 1u, key_words() - 1u)]);
                    } else {
                        let word = key_codes[codes + quad / 2u];
                        a = nibbles(word);
                        b = nibbles(word >> 16u);
                    }
                    let at = prepared + quad - chunk;
                    scores = add_scores(scores, quad, a * key_scales[at] + key_offsets[at]);
                    scores = add_scores(scores, quad + 1u, b * key_scales[at + 1u] + key_offsets[at + 1u]);
                }
            } else if (token < call.len) {
                let tail = tail_row(token, head);
                let last = tail_words() - 1u;
                for (var quad = chunk; quad < last_quad; quad++) {
                    let key = vec4<f32>(pair(key_tail[tail + 2u * quad]), pair(key_tail[tail + min(2u * quad + 1u, last)]));
                    scores = add_scores(scores, quad, key);
                }
            }
        }
        weights[thread] = weigh(place, &low, scores.low, vec4<u32>(token) < seen_low);
        if (ROWS == 8u) {
            weights[THREADS + thread] = weigh(place, &high, scores.high, vec4<u32>(token) < seen_high);
        }
        workgroupBarrier();
        if (my_slice < slices) {
            let tokens = min(THREADS, end - start);
            for (var i = my_slice; i < tokens; i += slices) {
                let value = read_value(start + i, head, my_quad);
                if (ROWS == 1u) {
                    low.out[0] += value * weights[i].x;
                } else {
                    low.out += outer(weights[i], value);
                    if (ROWS == 8u) {
                        high.out += outer(weights[THREADS + i], value);
                    }
                }
            }
        }
    }
    finish(place, run, head, row, low);
    if (ROWS == 8u) {
        finish(place, run, head, row + 4u, high);
    }
}
