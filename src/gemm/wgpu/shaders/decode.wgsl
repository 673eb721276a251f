// Decoding: one thread for each quad of weights, with the two roundings of the specification.
//
// A driver may fuse a product and a sum, which rounds once; an operation on the bits of the product between the two
// makes that impossible.

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    fill_table(thread);
    let index = linear(workgroup) * 64u + thread;
    if (index >= call.m * shape.quads) {
        return;
    }
    let row = index / shape.quads;
    let quad = index % shape.quads;
    let group = read_group(call.first + row, group_of(quad));
    let levels = read_levels(call.first + row, quad, group.mark);
    let product = bitcast<vec4<u32>>(levels * group.scale) ^ vec4<u32>(call.zero);
    var weights = bitcast<vec4<f32>>(product);
    if (OFFSET_BITS != 0u) {
        weights += vec4<f32>(group.offset);
    }
    let at = row * shape.cols + 4u * quad;
    let left = shape.cols - 4u * quad;
    y[at] = weights.x;
    if (left > 1u) {
        y[at + 1u] = weights.y;
    }
    if (left > 2u) {
        y[at + 2u] = weights.z;
    }
    if (left > 3u) {
        y[at + 3u] = weights.w;
    }
}
