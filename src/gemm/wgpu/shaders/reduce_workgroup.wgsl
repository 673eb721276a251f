// Sums of threads through memory of the workgroup, by halves: for adapters without subgroups.

var<workgroup> partials: array<vec4<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
) {
    fill_table(thread);
    let pair = linear(workgroup) * (THREADS / LANES) + thread / LANES;
    let lane = thread % LANES;
    let sums = sums_of(pair, lane);
    for (var part = 0u; part < parts(); part++) {
        partials[thread] = part_of(sums, part);
        workgroupBarrier();
        for (var half_way = LANES / 2u; half_way > 0u; half_way /= 2u) {
            if (lane < half_way) {
                partials[thread] += partials[thread + half_way];
            }
            workgroupBarrier();
        }
        if (lane == 0u) {
            store_part(pair, part, partials[thread]);
        }
        workgroupBarrier();
    }
}
