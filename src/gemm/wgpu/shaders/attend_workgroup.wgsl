// The greatest of all threads and their sum through memory of the workgroup, by halves: for adapters without subgroups.

// Which thread of a workgroup this is.
struct Place {
    thread: u32,
}

fn all_max(place: Place, value: vec4<f32>) -> vec4<f32> {
    scratch[place.thread] = value;
    workgroupBarrier();
    for (var half_way = THREADS / 2u; half_way > 0u; half_way /= 2u) {
        if (place.thread < half_way) {
            scratch[place.thread] = max(scratch[place.thread], scratch[place.thread + half_way]);
        }
        workgroupBarrier();
    }
    let all = scratch[0];
    workgroupBarrier();
    return all;
}

fn all_sum(place: Place, value: vec4<f32>) -> vec4<f32> {
    scratch[place.thread] = value;
    workgroupBarrier();
    for (var half_way = THREADS / 2u; half_way > 0u; half_way /= 2u) {
        if (place.thread < half_way) {
            scratch[place.thread] += scratch[place.thread + half_way];
        }
        workgroupBarrier();
    }
    let all = scratch[0];
    workgroupBarrier();
    return all;
}

@compute @workgroup_size(THREADS)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    attend(workgroup, Place(thread));
}
