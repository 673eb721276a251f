// Activations in the order in which tensor cores want them, as halves.
//
// A block of 128 columns is cut in four runs of 32, one for each quarter t of a warp, and a run in four octets w. The
// 16 bytes of (octet w, row r, quarter t) are columns 32 t + 8 w + (0, 4, 1, 5, 2, 6, 3, 7): what a lane of row r
// multiplies the pairs of `octet` with. Vectors stand in the order block of columns, w, r, t, so that lanes read side
// by side.
#pragma once

#include "halves.cuh"

#define BLOCK 128
#define OCTETS (BLOCK / 8)

DEVICE u32 blocks_of(u32 cols) { return (cols + BLOCK - 1) / BLOCK; }

// The vector of octet `o` of a block of columns, of row `r` of `rows`; octets are counted in the order of columns.
DEVICE u32 vector_of(u32 block, u32 o, u32 r, u32 rows) { return ((block * 4 + o % 4) * rows + r) * 4 + o / 4; }
