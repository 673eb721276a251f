// Products with many rows of activations: every weight is decoded once for 32 of them.
//
// A workgroup of 128 threads makes 32 x 64 results, a thread 4 x 4 of them. Along the columns it goes by 32: all threads
// decode weights, half of them fetch activations, and both are stored transposed, so that a thread reads the four
// numbers of either side that a column has for it as one vector. Tiles take 12 KiB as f32 and 6 KiB as f16.

const X_QUADS: u32 = 8u;    // vectors of a column of the tile of activations: 32 rows
const W_QUADS: u32 = 16u;   // vectors of a column of the tile of weights: 64 rows
const DEPTH: u32 = 8u;      // quads of columns of a tile

var<workgroup> tile_x: array<vec4<half>, 256>;
var<workgroup> tile_w: array<vec4<half>, 512>;

fn read_weights(row: u32, quad: u32) -> vec4<f32> {
    let inside = min(row, shape.rows - 1u);
    let group = read_group(inside, group_of(quad));
    let weights = read_levels(inside, quad, group.mark) * group.scale;
    if (OFFSET_BITS != 0u) {
        return weights + vec4<f32>(group.offset);
    }
    return weights;
}

fn read_x(m: u32, quad: u32) -> vec4<half> {
    return x[min(m, call.m - 1u) * call.x_stride + quad];
}

// What a column adds to the results of a thread: a column of the matrix is a row of activations.
fn column(k: u32, x_quad: u32, w_quad: u32) -> mat4x4<f32> {
    let a = vec4<f32>(tile_x[k * X_QUADS + x_quad]);
    let w = vec4<f32>(tile_w[k * W_QUADS + w_quad]);
    return mat4x4<f32>(a.x * w, a.y * w, a.z * w, a.w * w);
}

fn store(m: u32, row: u32, values: vec4<f32>) {
    if (m >= call.m) {
        return;
    }
    let at = m * shape.all_rows + shape.first + row;
    if (row < shape.rows) {
        y[at] = values.x;
    }
    if (row + 1u < shape.rows) {
        y[at + 1u] = values.y;
    }
    if (row + 2u < shape.rows) {
        y[at + 2u] = values.z;
    }
    if (row + 3u < shape.rows) {
        y[at + 3u] = values.w;
    }
}

@compute @workgroup_size(128)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    fill_table(thread);
    let first_row = workgroup.x * 4u * W_QUADS;
    let first_m = workgroup.y * 4u * X_QUADS;
    // Which block of 4 x 4 weights, and which of activations, this thread fetches; and which results it makes.
    let w_quad = thread % W_QUADS;
    let w_depth = thread / W_QUADS;
    let x_quad = thread % X_QUADS;
    let x_depth = thread / X_QUADS;
    let result = thread / W_QUADS;
    var sums = mat4x4<f32>();
    for (var start = 0u; start < shape.quads; start += DEPTH) {
        var w = mat4x4<f32>();
        // Beyond the last column both sides are zero: what is stored there is anything.
        if (start + w_depth < shape.quads) {
            let row = first_row + 4u * w_quad;
            let quad = start + w_depth;
            w = transpose(mat4x4<f32>(
                read_weights(row, quad),
                read_weights(row + 1u, quad),
                read_weights(row + 2u, quad),
                read_weights(row + 3u, quad),
            ));
        }
        let w_at = 4u * w_depth * W_QUADS + w_quad;
        tile_w[w_at] = vec4<half>(w[0]);
        tile_w[w_at + W_QUADS] = vec4<half>(w[1]);
        tile_w[w_at + 2u * W_QUADS] = vec4<half>(w[2]);
        tile_w[w_at + 3u * W_QUADS] = vec4<half>(w[3]);
        if (x_depth < DEPTH) {
            var a = mat4x4<half>();
            if (start + x_depth < shape.quads) {
                let m = first_m + 4u * x_quad;
                let quad = start + x_depth;
                a = transpose(mat4x4<half>(
                    read_x(m, quad), read_x(m + 1u, quad), read_x(m + 2u, quad), read_x(m + 3u, quad),
                ));
            }
            let x_at = 4u * x_depth * X_QUADS + x_quad;
            tile_x[x_at] = a[0];
            tile_x[x_at + X_QUADS] = a[1];
            tile_x[x_at + 2u * X_QUADS] = a[2];
            tile_x[x_at + 3u * X_QUADS] = a[3];
        }
        workgroupBarrier();
        for (var k = 0u; k < 4u * DEPTH; k += 4u) {
            sums += column(k, result, w_quad);
            sums += column(k + 1u, result, w_quad);
            sums += column(k + 2u, result, w_quad);
            sums += column(k + 3u, result, w_quad);
        }
        workgroupBarrier();
    }
    let row = first_row + 4u * w_quad;
    let m = first_m + 4u * result;
    store(m, row, sums[0]);
    store(m + 1u, row, sums[1]);
    store(m + 2u, row, sums[2]);
    store(m + 3u, row, sums[3]);
}
