// Instructions of sm_90a, beside those of `ptx.cuh`: products of warpgroups, and copies that a barrier counts.
#pragma once

#include "ptx.cuh"

#ifdef __CUDACC__

// A barrier in shared memory, for so many arrivals a phase.
DEVICE void barrier_init(u64 *barrier, u32 count) {
    u32 at = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(at), "r"(count) : "memory");
}

// Barriers are seen by what copies, once this was called behind `barrier_init`.
DEVICE void barriers_ready() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Arrives, and has the phase wait for so many bytes as well.
DEVICE void barrier_expect(u64 *barrier, u32 bytes) {
    u32 at = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(at), "r"(bytes) : "memory");
}

DEVICE void barrier_arrive(u64 *barrier) {
    u32 at = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(at) : "memory");
}

// Waits for the end of a phase, which are even and odd in turn.
DEVICE void barrier_wait(u64 *barrier, u32 parity) {
    u32 at = (u32)__cvta_generic_to_shared(barrier), done;
    do {
        asm volatile("{\n.reg .pred p;\n"
                     "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, p;\n}"
                     : "=r"(done)
                     : "r"(at), "r"(parity)
                     : "memory");
    } while (!done);
}

// Bytes into shared memory, a multiple of 16, which the barrier counts as they come.
DEVICE void copy_bulk(void *to, const void *from, u32 bytes, u64 *barrier) {
    u32 at = (u32)__cvta_generic_to_shared(to), by = (u32)__cvta_generic_to_shared(barrier);
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(at),
                 "l"(from), "r"(bytes), "r"(by)
                 : "memory");
}

// Describes matrices of 8 rows and 16 bytes: how far the next 16 bytes of the same rows are, and the next 8 rows. Moving
// on by 16 bytes adds 1.
DEVICE u64 matrices_at(const void *first, u32 along, u32 rows) {
    u64 at = (u32)__cvta_generic_to_shared(first);
    return at >> 4 | (u64)(along >> 4) << 16 | (u64)(rows >> 4) << 32;
}

// What registers hold is what products of the warpgroup read from here on.
DEVICE void group_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Ends a batch of products.
DEVICE void group_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most `LEFT` batches of products are on their way.
template <int LEFT> DEVICE void group_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory"); }

// d[64 x 128] += a[64 x 16] * b[128 x 16]^T by a warpgroup, in its own time. A warp has 16 rows of a and d, a lane of
// them what it has of `multiply_add`, eight columns of d after the other; `b` describes matrices in shared memory.
DEVICE void group_multiply_add(float (&d)[64], const u32 a[4], u64 b) {
    asm volatile(
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
        "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

#endif
