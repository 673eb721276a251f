// Sums of threads by subgroups, whatever their size, and of subgroups through memory of the workgroup.
//
// Threads are numbered by their subgroup and their place in it, because nothing says that subgroups follow the order
// of the workgroup. LANES is a multiple of every size that the adapter's subgroups may have.

// A subgroup has at least four threads.
var<workgroup> partials: array<vec4<f32>, THREADS>;

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(subgroup_invocation_id) place: u32,
    @builtin(subgroup_size) size: u32,
) {
    fill_table(thread);
    let number = subgroup * size + place;
    let pairs = THREADS / LANES;
    let first = linear(workgroup) * pairs;
    let sums = sums_of(first + number / LANES, number % LANES);
    for (var part = 0u; part < parts(); part++) {
        let sum = subgroupAdd(part_of(sums, part));
        if (place == 0u) {
            partials[4u * subgroup + part] = sum;
        }
    }
    workgroupBarrier();
    let pair = thread / 4u;
    let part = thread % 4u;
    if (pair < pairs && part < parts()) {
        let subgroups = LANES / size;
        var sum = partials[4u * pair * subgroups + part];
        for (var i = 1u; i < subgroups; i++) {
            sum += partials[4u * (pair * subgroups + i) + part];
        }
        store_part(first + pair, part, sum);
    }
}
