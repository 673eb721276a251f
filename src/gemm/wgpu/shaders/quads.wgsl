// Quads of both sides of a product with many rows of activations, as tiles are made of them.

// A quad of weights; beyond the last column zeros, because what is stored there is anything.
fn read_weights(row: u32, quad: u32) -> vec4<f32> {
    if (quad >= shape.quads) {
        return vec4<f32>(0.0);
    }
    let inside = min(row, shape.rows - 1u);
    let group = read_group(inside, group_of(quad));
    let weights = read_levels(inside, quad, group.mark) * group.scale;
    if (OFFSET_BITS != 0u) {
        return weights + vec4<f32>(group.offset);
    }
    return weights;
}

// A quad of activations, in the same way.
fn read_x(m: u32, quad: u32) -> vec4<half> {
    if (quad >= shape.quads) {
        return vec4<half>();
    }
    return x[min(m, call.m - 1u) * call.x_stride + quad];
}
