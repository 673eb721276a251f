// Products with many rows of activations on matrix units: cooperative matrices of SIZE x SIZE numbers.
//
// A workgroup of 128 threads makes 32 x 64 results, as `gemm.wgsl` does, and fetches and decodes the same tiles of 32
// columns, here with the columns of a row side by side, 40 numbers from one row to the next, so that every fragment of a
// tile begins at a multiple of 16 bytes. A team of threads makes 32 x 16 of the results, a subgroup at a time; there are
// four teams, and one, two or four subgroups, which take teams in turns. Results go through memory of the workgroup,
// because a fragment may reach past the last row of either side.
//
// The text that follows this one has fragments and what is done with them, in terms of the hardware or, to test all the
// rest without it, of loops. `@…@` are lines for every fragment of a team, see `units.rs`.

const X_ROWS: u32 = 32u;
const W_ROWS: u32 = 64u;
const DEPTH: u32 = 8u;      // quads of columns of a tile
const COLUMNS: u32 = 32u;
const PITCH: u32 = 40u;     // numbers from one row of a tile to the next
const TEAMS: u32 = 4u;
const TEAM_ROWS: u32 = 16u; // of weights
const THREADS: u32 = 128u;

var<workgroup> tile_x: array<half, 1280>;
var<workgroup> tile_w: array<half, 2560>;
// A fragment of results for each subgroup.
var<workgroup> staged: array<f32, TEAMS * SIZE * SIZE>;

// Which thread of a workgroup this is.
struct Place {
    thread: u32,
    subgroup: u32,
    subgroups: u32,
    lane: u32,
    lanes: u32,
}

fn fetch(thread: u32, first_m: u32, first_row: u32, start: u32) {
    for (var i = thread; i < W_ROWS * DEPTH; i += THREADS) {
        let weights = vec4<half>(read_weights(first_row + i / DEPTH, start + i % DEPTH));
        let at = i / DEPTH * PITCH + i % DEPTH * 4u;
        tile_w[at] = weights.x;
        tile_w[at + 1u] = weights.y;
        tile_w[at + 2u] = weights.z;
        tile_w[at + 3u] = weights.w;
    }
    for (var i = thread; i < X_ROWS * DEPTH; i += THREADS) {
        let values = read_x(first_m + i / DEPTH, start + i % DEPTH);
        let at = i / DEPTH * PITCH + i % DEPTH * 4u;
        tile_x[at] = values.x;
        tile_x[at + 1u] = values.y;
        tile_x[at + 2u] = values.z;
        tile_x[at + 3u] = values.w;
    }
}

// Stores the fragment that this subgroup has staged.
fn store(place: Place, first_m: u32, first_row: u32) {
    for (var i = place.lane; i < SIZE * SIZE; i += place.lanes) {
        let m = first_m + i / SIZE;
        let row = first_row + i % SIZE;
        if (m < call.m && row < shape.rows) {
            y[m * shape.all_rows + shape.first + row] = staged[place.subgroup * SIZE * SIZE + i];
        }
    }
}

fn product(workgroup: vec3<u32>, place: Place) {
    fill_table(place.thread);
    let first_row = workgroup.x * W_ROWS;
    let first_m = workgroup.y * X_ROWS;
    for (var done = 0u; done < TEAMS; done += place.subgroups) {
        // Where there are more subgroups than teams are left, some do the same.
        let team = min(done + place.subgroup, TEAMS - 1u);
@DECLARE@
        for (var start = 0u; start < shape.quads; start += DEPTH) {
            fetch(place.thread, first_m, first_row, start);
            workgroupBarrier();
            for (var column = 0u; column < COLUMNS; column += SIZE) {
@MULTIPLY@
            }
            workgroupBarrier();
        }
@STORE@
    }
}
