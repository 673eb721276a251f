// Products with many rows of activations: every weight is decoded once for 32 of them.
//
// A workgroup of 128 threads makes 32 x 64 results, a thread 4 x 4 of them. Along the columns it goes by 32, that is eight
// quads: all threads fetch activations and decode weights into tiles, neighbours neighbouring quads of a row, and then
// multiply quads, neighbours those of neighbouring rows. In the tiles the quads of a column stand together, one place
// apart from a power of two, so that both ways of going through them touch all banks of the memory. Tiles take 12.5 KiB
// as f32 and half of it as f16.

const X_ROWS: u32 = 32u;
const W_ROWS: u32 = 64u;
const DEPTH: u32 = 8u;      // quads of columns of a tile
const X_PITCH: u32 = 33u;   // vectors from one quad of columns to the next
const W_PITCH: u32 = 65u;
const X_STEP: u32 = 8u;     // from one row of a thread's results to the next
const W_STEP: u32 = 16u;
const THREADS: u32 = 128u;

var<workgroup> tile_x: array<vec4<half>, 264>;
var<workgroup> tile_w: array<vec4<half>, 520>;

// Four rows of a tile that are `step` apart.
fn rows_of_x(at: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        vec4<f32>(tile_x[at]),
        vec4<f32>(tile_x[at + X_STEP]),
        vec4<f32>(tile_x[at + 2u * X_STEP]),
        vec4<f32>(tile_x[at + 3u * X_STEP]),
    );
}

fn rows_of_w(at: u32) -> mat4x4<f32> {
    return mat4x4<f32>(
        vec4<f32>(tile_w[at]),
        vec4<f32>(tile_w[at + W_STEP]),
        vec4<f32>(tile_w[at + 2u * W_STEP]),
        vec4<f32>(tile_w[at + 3u * W_STEP]),
    );
}

fn store(m: u32, row: u32, values: vec4<f32>) {
    if (m >= call.m) {
        return;
    }
    let at = m * shape.all_rows + shape.first + row;
    if (row < shape.rows) {
        y[at] = values.x;
    }
    if (row + W_STEP < shape.rows) {
        y[at + W_STEP] = values.y;
    }
    if (row + 2u * W_STEP < shape.rows) {
        y[at + 2u * W_STEP] = values.z;
    }
    if (row + 3u * W_STEP < shape.rows) {
        y[at + 3u * W_STEP] = values.w;
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    fill_table(thread);
    let first_row = workgroup.x * W_ROWS;
    let first_m = workgroup.y * X_ROWS;
    // The first of the rows of either side of which this thread makes results.
    let my_row = thread % W_STEP;
    let my_m = thread / W_STEP;
    var sums = mat4x4<f32>();
    for (var start = 0u; start < shape.quads; start += DEPTH) {
        for (var i = thread; i < W_ROWS * DEPTH; i += THREADS) {
            let row = i / DEPTH;
            let quad = i % DEPTH;
            tile_w[quad * W_PITCH + row] = vec4<half>(read_weights(first_row + row, start + quad));
        }
        for (var i = thread; i < X_ROWS * DEPTH; i += THREADS) {
            let m = i / DEPTH;
            let quad = i % DEPTH;
            tile_x[quad * X_PITCH + m] = read_x(first_m + m, start + quad);
        }
        workgroupBarrier();
        for (var quad = 0u; quad < DEPTH; quad++) {
            let a = rows_of_x(quad * X_PITCH + my_m);
            let w = rows_of_w(quad * W_PITCH + my_row);
            // A vector times a matrix: the products of one row of activations with four rows of weights.
            sums += mat4x4<f32>(a[0] * w, a[1] * w, a[2] * w, a[3] * w);
        }
        workgroupBarrier();
    }
    let row = first_row + my_row;
    let m = first_m + my_m;
    store(m, row, sums[0]);
    store(m + X_STEP, row, sums[1]);
    store(m + 2u * X_STEP, row, sums[2]);
    store(m + 3u * X_STEP, row, sums[3]);
}
