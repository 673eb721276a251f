// Fragments as the hardware has them.

alias Left = coop_mat@SIZE@x@SIZE@<half, A>;
alias Right = coop_mat@SIZE@x@SIZE@<half, B>;
alias Sums = coop_mat@SIZE@x@SIZE@<f32, C>;

// Rows of activations: columns of a row stand side by side.
fn left(at: u32) -> Left {
    return coopLoadT<Left>(&tile_x[at], PITCH);
}

// Rows of weights, as the columns of the other side.
fn right(at: u32) -> Right {
    return coopLoad<Right>(&tile_w[at], PITCH);
}

fn multiply_add(a: Left, b: Right, sums: Sums) -> Sums {
    return coopMultiplyAdd(a, b, sums);
}

fn nothing() -> Sums {
    return Sums();
}

fn stage(at: u32, sums: Sums) {
    coopStoreT(sums, &staged[at], SIZE);
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
    @builtin(subgroup_invocation_id) lane: u32,
    @builtin(subgroup_size) lanes: u32,
) {
    product(workgroup, Place(thread, subgroup, subgroups, lane, lanes));
}
