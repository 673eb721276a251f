// One result of those of several runs: a workgroup for each query, a thread for every 64th channel.

@compute @workgroup_size(64)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) thread: u32) {
    let queries_of_run = call.m * HEADS * call.per_head;
    let query = workgroup.y * 65535u + workgroup.x;
    if (query >= queries_of_run) {
        return;
    }
    let pitch = HEAD_DIM + 2u;
    let first = call.partials + query * pitch;
    let step = queries_of_run * pitch;
    var greatest = LOWEST;
    for (var run = 0u; run < call.runs; run++) {
        greatest = max(greatest, y[first + run * step + HEAD_DIM]);
    }
    var sum = 0.0;
    for (var run = 0u; run < call.runs; run++) {
        sum += exp(y[first + run * step + HEAD_DIM] - greatest) * y[first + run * step + HEAD_DIM + 1u];
    }
    for (var channel = thread; channel < HEAD_DIM; channel += 64u) {
        var out = 0.0;
        for (var run = 0u; run < call.runs; run++) {
            out += exp(y[first + run * step + HEAD_DIM] - greatest) * y[first + run * step + channel];
        }
        y[query * HEAD_DIM + channel] = out / sum;
    }
}
