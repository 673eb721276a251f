// Instructions that kernels are made of, by their names in PTX: no header of a toolkit is needed, so that NVRTC alone
// compiles all kernels. `host.h` defines the same names for an ordinary compiler, which runs the same kernels on a
// processor, one fiber for each thread of a block.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef __CUDACC__
#include "host.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
// Shared memory whose size the launch gives.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) u8 name[]

// What is read once: past the L1 cache, which keeps what is read again.
DEVICE uint4 load_once(const uint4 *at) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

// What nobody writes while the kernel runs.
DEVICE uint4 load_const(const uint4 *at) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(at));
    return v;
}

DEVICE uint2 load_const(const uint2 *at) {
    uint2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(at));
    return v;
}

DEVICE u32 load_const(const u32 *at) {
    u32 v;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

DEVICE u32 load_const(const u16 *at) {
    u16 v;
    asm volatile("ld.global.nc.u16 %0, [%1];" : "=h"(v) : "l"(at));
    return v;
}

DEVICE u32 load_const(const u8 *at) {
    u32 v;
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(v) : "l"(at));
    return v;
}

DEVICE float load_const(const float *at) {
    return __uint_as_float(load_const((const u32 *)at));
}

// What other blocks have written during this kernel: from the L2 cache, where all blocks meet.
DEVICE float load_shared_result(const float *at) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(at) : "memory");
    return v;
}

DEVICE float float_of_bits(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of_float(float x) { return __float_as_uint(x); }

// One rounding each, never fused: what the specification says of a weight.
DEVICE float mul(float a, float b) { return __fmul_rn(a, b); }
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
DEVICE float sub(float a, float b) { return __fsub_rn(a, b); }
DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float infinity() { return __uint_as_float(0x7f800000u); }

// 2^x within two units of the last place; zero where it would be subnormal.
DEVICE float power_of_two(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

DEVICE float float_of_half(u32 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)bits));
    return x;
}

DEVICE u32 half_of_float(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

DEVICE u32 bfloat_of_float(float x) {
    u16 bits;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}

// Pairs of halves in a register, the first one in its low bits.
DEVICE u32 pair_of_floats(float low, float high) {
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

DEVICE u32 pair_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

DEVICE u32 pair_mul(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

DEVICE u32 pair_sub(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}

// (a & mask) | set, which compilers do not always find to be one instruction.
DEVICE u32 and_or(u32 a, u32 mask, u32 set) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(set));
    return d;
}

// Bytes of (b, a), chosen by the four nibbles of `choice`.
DEVICE u32 choose_bytes(u32 a, u32 b, u32 choice) {
    u32 d;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(choice));
    return d;
}

// d[16 x 8] += a[16 x 16] * b[16 x 8]: halves, added up in f32. With g = lane / 4 and t = lane % 4, a lane holds of
// a the pairs (row g | g + 8 | g | g + 8, columns 2t, 2t + 1 | the same | 2t + 8, 2t + 9 | the same), of b the pairs
// (rows 2t, 2t + 1 | 2t + 8, 2t + 9, column g), of d (row g | g | g + 8 | g + 8, column 2t | 2t + 1 | 2t | 2t + 1).
DEVICE void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Turns an 8 x 8 matrix of numbers of 16 bits around: lane 4 g + t has columns 2 t and 2 t + 1 of row g.
DEVICE u32 turn_around(u32 a) {
    u32 d;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
    return d;
}

// Sixteen bytes into shared memory, without passing registers; they are there after `copies_wait`.
DEVICE void copy_async(void *to, const void *from) {
    u32 shared = (u32)__cvta_generic_to_shared(to);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
}

// Ends a batch of copies.
DEVICE void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `LEFT` batches of this thread are on their way.
template <int LEFT> DEVICE void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

DEVICE float shuffle_xor(float x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

#endif
