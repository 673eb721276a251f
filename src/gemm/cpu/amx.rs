//! AMX: eight registers of 16 x 64 bytes, and one instruction that multiplies two of them, 16 rows in 16 cycles.
//!
//! Rust has no stable intrinsics for them, so the instructions are written out here, and only here. Three things make
//! them sound: an [`Amx`] exists only where processor and operating system have said yes; [`Tiles`] holds the shapes
//! of the registers for as long as a task works, on the thread that it works on, and gives them back at its end; and
//! every method checks that the memory that its tiles cover is that of its slices. Tile registers belong to nobody
//! else: compilers never use them, and a thread of a pool works on one task at a time.

#![expect(unsafe_code, reason = "instructions without intrinsics")]

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows of a tile of sums, and its columns.
pub(super) const SIDE: usize = 16;
/// Words of a full tile.
pub(super) const WORDS: usize = SIDE * SIDE;

/// Proof that tile instructions work in this process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Amx(());

impl Amx {
    /// Tiles of bf16, where this machine multiplies them.
    pub(super) fn bf16() -> Option<Self> {
        Self::detected(22)
    }

    /// Tiles of 8-bit integers, where this machine multiplies them.
    pub(super) fn int8() -> Option<Self> {
        Self::detected(25)
    }

    /// Whether the processor has tiles and what bit `feature` of leaf 7 stands for, and the system lets us use them.
    fn detected(feature: u32) -> Option<Self> {
        static FEATURES: OnceLock<u32> = OnceLock::new();
        let features = *FEATURES.get_or_init(|| {
            const TILE: u32 = 1 << 24;
            let leaves = __cpuid(0).eax;
            let features = if leaves >= 7 { __cpuid_count(7, 0).edx } else { 0 };
            if features & TILE != 0 && system_saves_tiles() && system_permits_tiles() { features } else { 0 }
        });
        (features >> feature & 1 == 1).then_some(Self(()))
    }

    /// Shapes the registers: left factors of 16 rows of `depth` bytes, right factors of `depth / 4` rows of 16 words,
    /// sums of 16 x 16 words.
    pub(super) fn configure(self, depth: u8) -> Tiles {
        assert!(depth.is_multiple_of(4) && (4..=64).contains(&depth), "a row of a tile is 1 to 16 words");
        let mut shapes = Shapes([0; 64]);
        shapes.0[0] = 1; // the only palette
        for register in 0..8 {
            let (rows, bytes) = match register {
                0..4 => (16, 64),
                4..6 => (16, depth),
                _ => (depth / 4, 64),
            };
            shapes.0[16 + 2 * register] = bytes;
            shapes.0[48 + register] = rows;
        }
        // SAFETY: `self` says that tiles work here; the shapes are 64 bytes of a valid palette, as built above.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const shapes, options(nostack, readonly, preserves_flags)) };
        Tiles { depth: usize::from(depth), this_thread: PhantomData }
    }
}

/// What `ldtilecfg` reads.
#[repr(align(64))]
struct Shapes([u8; 64]);

/// Whether the system saves tile registers when it switches threads: bits 17 and 18 of XCR0.
fn system_saves_tiles() -> bool {
    const OSXSAVE: u32 = 1 << 27;
    if __cpuid(1).ecx & OSXSAVE == 0 {
        return false;
    }
    let low: u32;
    // SAFETY: the line above found that the system has enabled this instruction for us.
    unsafe { asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") _, options(nomem, nostack, preserves_flags)) };
    low >> 17 & 3 == 3
}

/// Asks Linux for the right to use tile data in every thread of this process.
#[cfg(target_os = "linux")]
fn system_permits_tiles() -> bool {
    const ARCH_PRCTL: u64 = 158;
    const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
    const XFEATURE_XTILEDATA: u64 = 18;
    let result: u64;
    // SAFETY: arch_prctl(ARCH_REQ_XCOMP_PERM, feature) touches no memory of this process; a kernel that does not know it
    // answers with an error.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => result,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            out("rcx") _,
            out("r11") _,
            options(nostack),
        );
    }
    result == 0
}

/// Other systems have other ways, which nobody has tried.
#[cfg(not(target_os = "linux"))]
fn system_permits_tiles() -> bool {
    false
}

/// Configured tile registers of this thread, released when dropped.
pub(super) struct Tiles {
    depth: usize,
    /// Registers are the thread's own.
    this_thread: PhantomData<*mut ()>,
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: tiles work here, or this would not have been made.
        unsafe { asm!("tilerelease", options(nomem, nostack, preserves_flags)) };
    }
}

impl Tiles {
    /// `sums[i][l] = Σ a[i] · b[l]` for two pairs of factors: `a` are 16 rows of levels, `stride` apart, `b` words of four
    /// activations of 16 rows.
    #[inline(always)]
    pub(super) fn multiply_levels(
        &mut self,
        a: [&[i8]; 2],
        stride: usize,
        b: [&[u32]; 2],
        sums: &mut [[i32; WORDS]; 2],
    ) {
        for (a, b) in a.iter().zip(b) {
            assert!(a.len() >= (SIDE - 1) * stride + self.depth && b.len() >= self.depth / 4 * SIDE, "whole tiles");
        }
        // SAFETY: the factors and the sums are as long as the tiles that are loaded and stored, as asserted above.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tileloadd tmm4, [{a0} + {stride}]",
                "tileloadd tmm6, [{b0} + {row}]",
                "tdpbssd tmm0, tmm4, tmm6",
                "tilezero tmm1",
                "tileloadd tmm5, [{a1} + {stride}]",
                "tileloadd tmm7, [{b1} + {row}]",
                "tdpbssd tmm1, tmm5, tmm7",
                "tilestored [{sums} + {row}], tmm0",
                "tilestored [{sums} + {row} + 1024], tmm1",
                a0 = in(reg) a[0].as_ptr(),
                a1 = in(reg) a[1].as_ptr(),
                b0 = in(reg) b[0].as_ptr(),
                b1 = in(reg) b[1].as_ptr(),
                sums = in(reg) sums.as_mut_ptr(),
                stride = in(reg) stride,
                row = in(reg) 64usize,
                out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags),
            );
        }
    }

    /// Adds `a · b` to 32 x 16 sums for each panel, over `steps` tiles of each factor: `a` are 32 rows, in two runs of tiles
    /// of 16, `b` panels of 16 columns. All are pairs of bf16. A tile of sums is contiguous: rows as far apart as those
    /// of a matrix would fall into the same few sets of the cache.
    #[inline(always)]
    pub(super) fn add_bf16<const PANELS: usize>(
        &mut self,
        steps: usize,
        a: [&[u32]; 2],
        b: [&[u32]; PANELS],
        sums: [&mut [f32]; PANELS],
    ) {
        assert!(self.depth == 64 && steps > 0, "pairs fill the rows of a tile");
        assert!(a.iter().chain(&b).all(|factor| factor.len() >= steps * WORDS), "whole tiles");
        assert!(sums.iter().all(|sums| sums.len() >= 2 * WORDS), "two tiles of sums");
        if PANELS == 2 {
            // SAFETY: the loop reads `steps` tiles of each factor and the tiles of sums lie in their slices, as asserted above.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{c0} + {row}]",
                    "tileloadd tmm1, [{c1} + {row}]",
                    "tileloadd tmm2, [{c0} + {row} + 1024]",
                    "tileloadd tmm3, [{c1} + {row} + 1024]",
                    "2:",
                    "tileloadd tmm4, [{a0} + {row}]",
                    "tileloadd tmm6, [{b0} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b1} + {row}]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                    "tileloadd tmm5, [{a1} + {row}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "tdpbf16ps tmm3, tmm5, tmm7",
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "add {b1}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c0} + {row}], tmm0",
                    "tilestored [{c1} + {row}], tmm1",
                    "tilestored [{c0} + {row} + 1024], tmm2",
                    "tilestored [{c1} + {row} + 1024], tmm3",
                    a0 = inout(reg) a[0].as_ptr() => _,
                    a1 = inout(reg) a[1].as_ptr() => _,
                    b0 = inout(reg) b[0].as_ptr() => _,
                    b1 = inout(reg) b[1].as_ptr() => _,
                    c0 = in(reg) sums[0].as_mut_ptr(),
                    c1 = in(reg) sums[1].as_mut_ptr(),
                    row = in(reg) 64usize,
                    steps = inout(reg) steps => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack),
                );
            }
        } else {
            assert!(PANELS == 1, "one or two panels");
            // SAFETY: the loop reads `steps` tiles of each factor and the tiles of sums lie in their slice, as asserted above.
            unsafe {
                asm!(
                    "tileloadd tmm0, [{c0} + {row}]",
                    "tileloadd tmm2, [{c0} + {row} + 1024]",
                    "2:",
                    "tileloadd tmm4, [{a0} + {row}]",
                    "tileloadd tmm6, [{b0} + {row}]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm5, [{a1} + {row}]",
                    "tdpbf16ps tmm2, tmm5, tmm6",
                    "add {a0}, 1024",
                    "add {a1}, 1024",
                    "add {b0}, 1024",
                    "dec {steps}",
                    "jnz 2b",
                    "tilestored [{c0} + {row}], tmm0",
                    "tilestored [{c0} + {row} + 1024], tmm2",
                    a0 = inout(reg) a[0].as_ptr() => _,
                    a1 = inout(reg) a[1].as_ptr() => _,
                    b0 = inout(reg) b[0].as_ptr() => _,
                    c0 = in(reg) sums[0].as_mut_ptr(),
                    row = in(reg) 64usize,
                    steps = inout(reg) steps => _,
                    out("tmm0") _, out("tmm2") _, out("tmm4") _, out("tmm5") _, out("tmm6") _,
                    options(nostack),
                );
            }
        }
    }
}
