// Fragments by loops: where they begin in the tiles, and of results every 32nd number for each thread of a team of 32.

alias Left = u32;
alias Right = u32;
alias Sums = array<f32, SIZE * SIZE / 32u>;

var<private> my_lane: u32;

fn left(at: u32) -> Left {
    return at;
}

fn right(at: u32) -> Right {
    return at;
}

fn multiply_add(a: Left, b: Right, sums: Sums) -> Sums {
    var more = sums;
    for (var i = 0u; i < SIZE * SIZE / 32u; i++) {
        let number = 32u * i + my_lane;
        for (var k = 0u; k < SIZE; k++) {
            more[i] += f32(tile_x[a + number / SIZE * PITCH + k]) * f32(tile_w[b + number % SIZE * PITCH + k]);
        }
    }
    return more;
}

fn nothing() -> Sums {
    return Sums();
}

fn stage(at: u32, sums: Sums) {
    for (var i = 0u; i < SIZE * SIZE / 32u; i++) {
        staged[at + 32u * i + my_lane] = sums[i];
    }
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    my_lane = thread % 32u;
    product(workgroup, Place(thread, thread / 32u, TEAMS, my_lane, 32u));
}
