// Which rows of activations a tile has: consecutive ones, of one matrix of a stack.
#pragma once

#include "ptx.cuh"

struct Tile {
    u32 expert;
    // The first row and how many there are, none where there is no such tile.
    u32 first, rows;
};

// Tile `number` of tiles of `size` rows. Without `ends` there is one matrix; with them, `ends[e]` is where the rows of
// matrix e end, on the device: so a product can be recorded before anyone knows who gets how many rows.
DEVICE Tile tile_of(const int *ends, u32 experts, u32 m, u32 size, u32 number) {
    if (!ends) {
        u32 first = number * size;
        return {0, first, first < m ? min(size, m - first) : 0};
    }
    u32 begin = 0, before = 0;
    for (u32 e = 0; e < experts; e++) {
        u32 end = min((u32)max(ends[e], 0), m), count = end > begin ? end - begin : 0;
        u32 tiles = (count + size - 1) / size;
        if (number < before + tiles) {
            u32 first = (number - before) * size;
            return {e, begin + first, min(size, count - first)};
        }
        before += tiles;
        begin = max(begin, end);
    }
    return {0, 0, 0};
}
