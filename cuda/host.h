// CUDA for an ordinary compiler: runs a kernel's source on a processor, so that tests execute what a GPU will, without
// one. It is slow and exact, and only tests include it.
//
// Every thread of a block is a fiber. A fiber runs until it comes to a barrier or to an instruction of a whole warp
// and goes on when all others have come there. Which one goes first changes from block to block, warps stand still
// for a while at random, and an asynchronous copy is carried out as late as it may be, when it is waited for: so a
// missing barrier gives wrong results here as well.
#pragma once

#include <cmath>
#include <csetjmp>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include <ucontext.h>

#define DEVICE static inline
#define KERNEL static
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __shared__ static
#define __align__(bytes) alignas(bytes)
#define __constant__ static
#define DYNAMIC_SHARED(name) u8 *name = host::shared_memory()

struct uint2 {
    u32 x, y;
};
struct alignas(16) uint4 {
    u32 x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct dim3 {
    u32 x, y, z;
};

static dim3 threadIdx, blockIdx, blockDim, gridDim;

DEVICE float2 make_float2(float x, float y) { return {x, y}; }
DEVICE uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
DEVICE uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
template <class T> DEVICE T min(T a, T b) { return b < a ? b : a; }
template <class T> DEVICE T max(T a, T b) { return a < b ? b : a; }

namespace host {

constexpr size_t STACK = 64 << 10;

struct Copy {
    void *to;
    const void *from;
};

struct Fiber {
    std::vector<char> stack;
    ucontext_t start;
    jmp_buf state;
    bool started, done;
    // It waits for as long as this is what it was: nothing where it does not wait.
    const u64 *waits;
    u64 seen;
    std::vector<std::vector<Copy>> batches;
    std::vector<Copy> open;
};

// What the lanes of a warp bring to an instruction, and what it gives each of them.
struct Warp {
    u32 arrived;
    u64 passed;
    u32 in[32][12];
    float out[32][4];
};

struct Block {
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<u8> memory;
    std::function<void()> body;
    u32 current, arrived, alive;
    u64 passed;
    bool backwards;
    jmp_buf scheduler;
};

static Block block;

DEVICE u8 *shared_memory() {
    size_t at = (size_t)block.memory.data();
    return (u8 *)((at + 127) / 128 * 128);
}

static void leave(const u64 *until) {
    Fiber &fiber = block.fibers[block.current];
    fiber.waits = until;
    fiber.seen = *until;
    if (_setjmp(fiber.state) == 0) _longjmp(block.scheduler, 1);
}

static void enter() {
    block.body();
    block.fibers[block.current].done = true;
    _longjmp(block.scheduler, 1);
}

// Runs one fiber up to where it waits.
static void resume(u32 thread) {
    block.current = thread;
    threadIdx = {thread, 0, 0};
    if (_setjmp(block.scheduler) != 0) return;
    Fiber &fiber = block.fibers[thread];
    if (fiber.started) _longjmp(fiber.state, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

static void run_block() {
    u32 threads = blockDim.x;
    block.fibers.resize(threads);
    block.warps.assign((threads + 31) / 32, Warp{});
    block.arrived = 0;
    block.alive = threads;
    for (Fiber &fiber : block.fibers) {
        fiber.stack.resize(STACK);
        fiber.started = fiber.done = false;
        fiber.waits = nullptr;
        fiber.batches.clear();
        fiber.open.clear();
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.data();
        fiber.start.uc_stack.ss_size = STACK;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    u64 rounds = 0;
    static u64 random = 1;
    for (u32 left = threads; left > 0;) {
        left = 0;
        if (rounds % 64 == 0) random = random * 6364136223846793005u + 1442695040888963407u;
        u32 stalled = (u32)(random >> 32);
        for (u32 i = 0; i < threads; i++) {
            u32 thread = block.backwards ? threads - 1 - i : i;
            if (block.fibers[thread].done) continue;
            // Some warps stand still for a while, as they may: others run ahead as far as barriers let them.
            const Fiber &fiber = block.fibers[thread];
            if (stalled >> thread / 32 % 32 & 1 || (fiber.waits && *fiber.waits == fiber.seen))
                left++;
            else {
                resume(thread);
                left += !block.fibers[thread].done;
            }
        }
        // Some thread waits for one that will never come.
        if (++rounds > (1u << 21)) abort();
    }
    block.backwards = !block.backwards;
}

// Runs all blocks of a grid, one after the other. Shared memory begins with what nobody should read.
template <class F> static void launch(dim3 grid, u32 threads, size_t shared, F body) {
    gridDim = grid;
    blockDim = {threads, 1, 1};
    block.body = body;
    for (u32 z = 0; z < grid.z; z++)
        for (u32 y = 0; y < grid.y; y++)
            for (u32 x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                block.memory.assign(shared + 256, 0xff);
                run_block();
            }
}

// Waits until all lanes of the warp are here; the last one computes for all of them.
template <class F> static Warp &together(F compute) {
    Warp &warp = block.warps[block.current / 32];
    if (++warp.arrived == 32) {
        compute(warp);
        warp.arrived = 0;
        warp.passed++;
    } else {
        leave(&warp.passed);
    }
    return warp;
}

DEVICE u32 lane() { return block.current % 32; }

} // namespace host

static inline void __syncthreads() {
    host::Block &block = host::block;
    if (++block.arrived == blockDim.x) {
        block.arrived = 0;
        block.passed++;
    } else {
        host::leave(&block.passed);
    }
}

static inline void __syncwarp() {
    host::together([](host::Warp &) {});
}
static inline void __threadfence() {}
static inline u32 atomicAdd(u32 *at, u32 by) {
    u32 before = *at;
    *at += by;
    return before;
}
static inline u32 atomicMax(u32 *at, u32 with) {
    u32 before = *at;
    *at = before < with ? with : before;
    return before;
}

template <class T> DEVICE T read(const void *at) {
    T v;
    memcpy(&v, at, sizeof v);
    return v;
}
// A GPU refuses an address that is not a multiple of the size.
template <class T> DEVICE T aligned(const T *at) {
    if ((size_t)at % sizeof(T)) abort();
    return read<T>(at);
}
DEVICE uint4 load_once(const uint4 *at) { return aligned(at); }
DEVICE uint4 load_const(const uint4 *at) { return aligned(at); }
DEVICE uint2 load_const(const uint2 *at) { return aligned(at); }
DEVICE u32 load_const(const u32 *at) { return aligned(at); }
DEVICE u32 load_const(const u16 *at) { return aligned(at); }
DEVICE u32 load_const(const u8 *at) { return *at; }
DEVICE float load_const(const float *at) { return aligned(at); }
DEVICE float load_shared_result(const float *at) { return *at; }

DEVICE float float_of_bits(u32 bits) { return read<float>(&bits); }
DEVICE u32 bits_of_float(float x) { return read<u32>(&x); }
DEVICE float mul(float a, float b) { return a * b; }
DEVICE float add(float a, float b) { return a + b; }
DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE float sub(float a, float b) { return a - b; }
DEVICE float quotient(float a, float b) { return a / b; }
DEVICE float infinity() { return float_of_bits(0x7f800000u); }
DEVICE float power_of_two(float x) { return x < -126.0f ? 0.0f : exp2f(x); }

DEVICE double half(u32 bits) {
    u16 low = (u16)bits;
    return (double)read<_Float16>(&low);
}
DEVICE u32 half_bits(double x) {
    _Float16 rounded = (_Float16)x;
    return read<u16>(&rounded);
}
DEVICE float float_of_half(u32 bits) { return (float)half(bits); }
DEVICE u32 half_of_float(float x) { return half_bits(x); }
DEVICE u32 bfloat_of_float(float x) {
    u32 bits = bits_of_float(x);
    if (x != x) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
DEVICE u32 pair_of_floats(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
DEVICE u32 pair_fma(u32 a, u32 b, u32 c) {
    // Products of halves are exact in f64, and so is nearly every sum.
    return half_bits(half(a) * half(b) + half(c)) | half_bits(half(a >> 16) * half(b >> 16) + half(c >> 16)) << 16;
}
DEVICE u32 pair_mul(u32 a, u32 b) {
    return half_bits(half(a) * half(b)) | half_bits(half(a >> 16) * half(b >> 16)) << 16;
}
DEVICE u32 pair_sub(u32 a, u32 b) {
    return half_bits(half(a) - half(b)) | half_bits(half(a >> 16) - half(b >> 16)) << 16;
}
DEVICE u32 and_or(u32 a, u32 mask, u32 set) { return (a & mask) | set; }
DEVICE u32 choose_bytes(u32 a, u32 b, u32 choice) {
    u64 bytes = (u64)b << 32 | a;
    u32 d = 0;
    for (u32 i = 0; i < 4; i++) d |= (u32)(bytes >> 8 * (choice >> 4 * i & 7) & 255) << 8 * i;
    return d;
}

DEVICE void multiply_add(float d[4], const u32 a[4], u32 b0, u32 b1) {
    u32 own = host::lane();
    host::Warp &here = host::block.warps[host::block.current / 32];
    memcpy(here.in[own], a, 16);
    here.in[own][4] = b0;
    here.in[own][5] = b1;
    memcpy(&here.in[own][6], d, 16);
    host::Warp &warp = host::together([](host::Warp &w) {
        float a[16][16], b[16][8];
        for (u32 l = 0; l < 32; l++) {
            u32 g = l / 4, t = l % 4;
            for (u32 r = 0; r < 4; r++)
                for (u32 i = 0; i < 2; i++) a[g + r % 2 * 8][2 * t + r / 2 * 8 + i] = (float)half(w.in[l][r] >> 16 * i);
            for (u32 r = 0; r < 2; r++)
                for (u32 i = 0; i < 2; i++) b[2 * t + r * 8 + i][g] = (float)half(w.in[l][4 + r] >> 16 * i);
        }
        for (u32 l = 0; l < 32; l++)
            for (u32 i = 0; i < 4; i++) {
                u32 row = l / 4 + i / 2 * 8, column = l % 4 * 2 + i % 2;
                float sum = float_of_bits(w.in[l][6 + i]);
                for (u32 k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
                w.out[l][i] = sum;
            }
    });
    memcpy(d, warp.out[own], 16);
}

DEVICE u32 turn_around(u32 a) {
    host::block.warps[host::block.current / 32].in[host::lane()][0] = a;
    host::Warp &warp = host::together([](host::Warp &w) {
        for (u32 l = 0; l < 32; l++) {
            // Numbers (2t, g) and (2t + 1, g) of what they bring.
            u32 g = l / 4, t = l % 4, pair = 0;
            for (u32 i = 0; i < 2; i++) pair |= (w.in[(2 * t + i) * 4 + g / 2][0] >> g % 2 * 16 & 0xffff) << 16 * i;
            w.out[l][0] = float_of_bits(pair);
        }
    });
    return bits_of_float(warp.out[host::lane()][0]);
}

DEVICE void copy_async(void *to, const void *from) {
    if ((size_t)to % 16 || (size_t)from % 16) abort();
    host::block.fibers[host::block.current].open.push_back({to, from});
}
DEVICE void copies_commit() {
    host::Fiber &fiber = host::block.fibers[host::block.current];
    fiber.batches.push_back(std::move(fiber.open));
    fiber.open.clear();
}
template <int LEFT> DEVICE void copies_wait() {
    auto &batches = host::block.fibers[host::block.current].batches;
    while (batches.size() > LEFT) {
        for (host::Copy &copy : batches.front()) memcpy(copy.to, copy.from, 16);
        batches.erase(batches.begin());
    }
}

DEVICE float shuffle_xor(float x, u32 mask) {
    host::block.warps[host::block.current / 32].in[host::lane()][0] = bits_of_float(x);
    host::Warp &warp = host::together([](host::Warp &w) {
        for (u32 l = 0; l < 32; l++) w.out[l][0] = float_of_bits(w.in[l][0]);
    });
    return warp.out[host::lane() ^ mask][0];
}

// ---- Hopper ----

namespace host {

// A barrier by its definition: a phase ends when all have arrived and all bytes have come. What is to come comes when
// somebody waits for it, and not before.
struct Barrier {
    u32 count, arrived;
    u64 expected, phase;
    struct Bytes {
        void *to;
        const void *from;
        u32 bytes;
    };
    std::vector<Bytes> coming;
};
static std::map<u64 *, Barrier> barriers;

static void settle(Barrier &barrier) {
    if (barrier.arrived == barrier.count && barrier.expected == 0) {
        barrier.arrived = 0;
        barrier.phase++;
    }
}

// A product on its way: what each lane of a warp brought to it. Shared memory is read when it is waited for.
struct Product {
    u32 a[32][4];
    float *d[32];
    u64 b;
};
struct Batches {
    std::vector<Product> open;
    std::vector<std::vector<Product>> closed;
};
static std::map<u32, Batches> batches;

static void multiply(const Product &product) {
    u64 first = (product.b & 0x3fff) << 4, along = (product.b >> 16 & 0x3fff) << 4, rows = (product.b >> 32 & 0x3fff) << 4;
    if (product.b >> 46) abort(); // nothing is swizzled
    const u8 *shared = shared_memory();
    for (u32 l = 0; l < 32; l++)
        for (u32 i = 0; i < 64; i++) {
            u32 row = l / 4 + i % 4 / 2 * 8, column = i / 4 * 8 + l % 4 * 2 + i % 2;
            float sum = product.d[l][i];
            for (u32 k = 0; k < 16; k++) {
                u32 word = product.a[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
                const u8 *b = shared + first + k / 8 * along + column / 8 * rows + column % 8 * 16 + k % 8 * 2;
                sum += (float)(half(word >> k % 2 * 16) * half(read<u16>(b)));
            }
            product.d[l][i] = sum;
        }
}

} // namespace host

DEVICE void barrier_init(u64 *barrier, u32 count) { host::barriers[barrier] = {count, 0, 0, 0, {}}; }
DEVICE void barriers_ready() {}
DEVICE void barrier_arrive(u64 *barrier) {
    host::Barrier &state = host::barriers.at(barrier);
    state.arrived++;
    host::settle(state);
}
DEVICE void barrier_expect(u64 *barrier, u32 bytes) {
    host::barriers.at(barrier).expected += bytes;
    barrier_arrive(barrier);
}
DEVICE void copy_bulk(void *to, const void *from, u32 bytes, u64 *barrier) {
    if ((size_t)to % 16 || (size_t)from % 16 || bytes % 16) abort();
    host::barriers.at(barrier).coming.push_back({to, from, bytes});
}
DEVICE void barrier_wait(u64 *barrier, u32 parity) {
    host::Barrier &state = host::barriers.at(barrier);
    while (state.phase % 2 == parity) {
        if (state.coming.empty()) {
            host::leave(&state.phase);
            continue;
        }
        for (auto &bytes : state.coming) {
            memcpy(bytes.to, bytes.from, bytes.bytes);
            state.expected -= bytes.bytes;
        }
        state.coming.clear();
        host::settle(state);
    }
}
DEVICE u64 matrices_at(const void *first, u32 along, u32 rows) {
    u64 at = (const u8 *)first - host::shared_memory();
    if (at % 16 || at >> 18) abort();
    return at >> 4 | (u64)(along >> 4) << 16 | (u64)(rows >> 4) << 32;
}
DEVICE void group_fence() {}
DEVICE void group_multiply_add(float (&d)[64], const u32 a[4], u64 b) {
    u32 number = host::block.current / 32, own = host::lane();
    host::Batches &batches = host::batches[number];
    host::Warp &warp = host::block.warps[number];
    if (warp.arrived == 0) batches.open.push_back({});
    host::Product &product = batches.open.back();
    memcpy(product.a[own], a, 16);
    product.d[own] = d;
    product.b = b;
    host::together([](host::Warp &) {});
}
DEVICE void group_commit() {
    host::together([](host::Warp &) {
        host::Batches &batches = host::batches[host::block.current / 32];
        batches.closed.push_back(std::move(batches.open));
        batches.open.clear();
    });
}
template <int LEFT> DEVICE void group_wait() {
    host::together([](host::Warp &) {
        auto &closed = host::batches[host::block.current / 32].closed;
        while (closed.size() > LEFT) {
            for (host::Product &product : closed.front()) host::multiply(product);
            closed.erase(closed.begin());
        }
    });
}
