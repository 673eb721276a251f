// Products with few rows of activations, which memory bounds: every weight is read once.
//
// A pair of rows of weights belongs to LANES threads, which take its octets of columns in turns; neighbours read
// neighbouring words. A thread holds sums for both rows and up to eight rows of activations, so that activations are
// read, and added up for the offsets, once for two rows of weights. How the sums of the threads become one is the text
// that follows this one: by subgroups, or through memory of the workgroup.
//
// One row of activations (M_TILE 1) is read as it is, four columns in a vector. More of them (4 or 8) come transposed:
// a vector holds four rows of one column.

override M_TILE: u32;
override LANES: u32;

const THREADS: u32 = 256u;

// Sums of the rows `a` and `b` of a pair with activations 0 to 3 and 4 to 7; of one row of activations the first.
struct Sums {
    a0: vec4<f32>,
    a1: vec4<f32>,
    b0: vec4<f32>,
    b1: vec4<f32>,
}

// Eight weights: two quads of levels and what makes weights of them.
struct Octet {
    low: vec4<f32>,
    high: vec4<f32>,
    low_group: Group,
    high_group: Group,
}

// Whether both quads of an octet always lie in the same group.
fn same_group() -> bool {
    return GROUP % 8u == 0u;
}

fn read_octet(row: u32, octet: u32) -> Octet {
    let quad = 2u * octet;
    var read: Octet;
    read.low_group = read_group(row, group_of(quad));
    read.high_group = read.low_group;
    if (!same_group()) {
        read.high_group = read_group(row, group_of(quad + 1u));
    }
    if (BITS == 8u) {
        read.low = read_levels(row, quad, read.low_group.mark);
        read.high = read_levels(row, quad + 1u, read.high_group.mark);
    } else {
        // One word holds the codes of both.
        let word = read_codes(row, quad);
        let above = read_high_codes(row, quad);
        read.low = levels_of(word, above, read.low_group.mark);
        read.high = levels_of(word >> 16u, above >> (4u * (BITS - 4u)), read.high_group.mark);
    }
    return read;
}

// The product of an octet with one row of activations.
fn dot_one(w: Octet, low: vec4<f32>, high: vec4<f32>) -> f32 {
    var sum = w.low_group.scale * dot(w.low, low);
    if (same_group()) {
        sum = w.low_group.scale * (dot(w.low, low) + dot(w.high, high));
    } else {
        sum += w.high_group.scale * dot(w.high, high);
    }
    if (OFFSET_BITS != 0u) {
        let ones = vec4<f32>(1.0);
        if (same_group()) {
            sum += w.low_group.offset * (dot(ones, low) + dot(ones, high));
        } else {
            sum += w.low_group.offset * dot(ones, low) + w.high_group.offset * dot(ones, high);
        }
    }
    return sum;
}

// The products of an octet with four rows of activations, whose sums over the columns of each quad are given.
fn dot_four(w: Octet, low: mat4x4<f32>, high: mat4x4<f32>, sum_low: vec4<f32>, sum_high: vec4<f32>) -> vec4<f32> {
    var sum = w.low_group.scale * (low * w.low);
    if (same_group()) {
        sum = w.low_group.scale * (low * w.low + high * w.high);
    } else {
        sum += w.high_group.scale * (high * w.high);
    }
    if (OFFSET_BITS != 0u) {
        if (same_group()) {
            sum += w.low_group.offset * (sum_low + sum_high);
        } else {
            sum += w.low_group.offset * sum_low + w.high_group.offset * sum_high;
        }
    }
    return sum;
}

// Four columns of four rows of activations, `step` vectors apart.
fn four_columns(at: u32, step: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        vec4<f32>(x[at]),
        vec4<f32>(x[at + step]),
        vec4<f32>(x[at + 2u * step]),
        vec4<f32>(x[at + 3u * step]),
    );
}

// What thread `lane` of a pair of rows adds to its sums.
fn sums_of(pair: u32, lane: u32) -> Sums {
    let a = min(2u * pair, shape.rows - 1u);
    let b = min(2u * pair + 1u, shape.rows - 1u);
    let octets = (shape.quads + 1u) / 2u;
    var sums = Sums(vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0), vec4<f32>(0.0));
    for (var octet = lane; octet < octets; octet += LANES) {
        let wa = read_octet(a, octet);
        let wb = read_octet(b, octet);
        if (M_TILE == 1u) {
            let low = vec4<f32>(x[2u * octet]);
            let high = vec4<f32>(x[2u * octet + 1u]);
            sums.a0.x += dot_one(wa, low, high);
            sums.b0.x += dot_one(wb, low, high);
        } else {
            let step = M_TILE / 4u;
            let ones = vec4<f32>(1.0);
            let at = 8u * octet * step;
            let low = four_columns(at, step);
            let high = four_columns(at + 4u * step, step);
            sums.a0 += dot_four(wa, low, high, low * ones, high * ones);
            sums.b0 += dot_four(wb, low, high, low * ones, high * ones);
            if (M_TILE == 8u) {
                let low = four_columns(at + 1u, step);
                let high = four_columns(at + 4u * step + 1u, step);
                sums.a1 += dot_four(wa, low, high, low * ones, high * ones);
                sums.b1 += dot_four(wb, low, high, low * ones, high * ones);
            }
        }
    }
    if (M_TILE == 1u) {
        sums.a0.y = sums.b0.x;
    }
    return sums;
}

// Vectors of sums that have to be added up over threads.
fn parts() -> u32 {
    return select(M_TILE / 2u, 1u, M_TILE == 1u);
}

fn store(row: u32, m: u32, value: f32) {
    if (row < shape.rows && m < call.m) {
        y[m * shape.all_rows + shape.first + row] = value;
    }
}

// Stores the part `part` of the results of a pair of rows.
fn store_part(pair: u32, part: u32, sum: vec4<f32>) {
    if (M_TILE == 1u) {
        store(2u * pair, 0u, sum.x);
        store(2u * pair + 1u, 0u, sum.y);
        return;
    }
    let of_row = max(M_TILE / 4u, 1u);
    let row = 2u * pair + part / of_row;
    let m = part % of_row * 4u;
    store(row, m, sum.x);
    store(row, m + 1u, sum.y);
    store(row, m + 2u, sum.z);
    store(row, m + 3u, sum.w);
}

// The part `part` of sums: one row of activations has one, four have two, eight have four.
fn part_of(sums: Sums, part: u32) -> vec4<f32> {
    if (M_TILE == 8u) {
        if (part == 1u) {
            return sums.a1;
        }
        if (part == 2u) {
            return sums.b0;
        }
        if (part == 3u) {
            return sums.b1;
        }
    } else if (part == 1u) {
        return sums.b0;
    }
    return sums.a0;
}
