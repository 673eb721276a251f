// The greatest of all threads and their sum by subgroups, whatever their size.

// Which thread of a workgroup this is.
struct Place {
    thread: u32,
    subgroup: u32,
    subgroups: u32,
}

fn all_max(place: Place, value: vec4<f32>) -> vec4<f32> {
    let greatest = subgroupMax(value);
    // Every thread of a subgroup has the same.
    scratch[place.subgroup] = greatest;
    workgroupBarrier();
    var all = scratch[0];
    for (var i = 1u; i < place.subgroups; i++) {
        all = max(all, scratch[i]);
    }
    workgroupBarrier();
    return all;
}

fn all_sum(place: Place, value: vec4<f32>) -> vec4<f32> {
    let sum = subgroupAdd(value);
    scratch[place.subgroup] = sum;
    workgroupBarrier();
    var all = scratch[0];
    for (var i = 1u; i < place.subgroups; i++) {
        all += scratch[i];
    }
    workgroupBarrier();
    return all;
}

@compute @workgroup_size(THREADS)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(local_invocation_index) thread: u32,
    @builtin(subgroup_id) subgroup: u32,
    @builtin(num_subgroups) subgroups: u32,
) {
    attend(workgroup, Place(thread, subgroup, subgroups));
}
