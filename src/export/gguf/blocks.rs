//! Matrices as GGUF lays them out: blocks of 32 weights, rows in the order of the engine.

use super::Type;
use crate::export::engine::Matrix;
use crate::tensor::DType;

/// Weights of a block.
pub(super) const BLOCK: usize = 32;

/// The blocks of a matrix, row after row.
pub(super) fn blocks(matrix: &Matrix<'_>, kind: Type) -> Vec<u8> {
    let layout = matrix.layout;
    let (stride, groups) = (layout.code_stride(matrix.cols), layout.groups(matrix.cols));
    let mut out = Vec::with_capacity(usize::try_from(kind.bytes((matrix.rows * matrix.cols) as u64)).unwrap_or(0));
    for row in 0..matrix.rows {
        let codes = &matrix.codes()[row * stride..][..stride];
        for block in 0..matrix.cols / BLOCK {
            let group = row * groups + block * BLOCK / layout.group();
            out.extend_from_slice(&matrix.scales()[2 * group..][..2]);
            if kind == Type::Q4_1 {
                out.extend_from_slice(&matrix.offsets()[2 * group..][..2]);
            }
            if kind == Type::Q8_0 {
                // Levels, in two's complement.
                out.extend(codes[block * BLOCK..][..BLOCK].iter().map(|code| code ^ 0x80));
            } else {
                // The first half of the block lies in the low bits, the second in the high ones; ours alternate.
                let pairs = &codes[block * BLOCK / 2..][..BLOCK / 2];
                let code = |i: usize| pairs[i / 2] >> (4 * (i % 2)) & 15;
                out.extend((0..BLOCK / 2).map(|i| code(i) | code(i + BLOCK / 2) << 4));
            }
        }
    }
    out
}

/// Rows of heads in the order of rotary embeddings that turn neighbours: row `2 j + t` of a head is row `t * half + j`.
pub(super) fn reordered(bytes: Vec<u8>, rows: u64, heads: Option<u64>) -> Vec<u8> {
    let Some(heads) = heads else { return bytes };
    let (rows, heads) = (usize::try_from(rows).unwrap_or(1), usize::try_from(heads).unwrap_or(1));
    let (width, half) = (bytes.len() / rows.max(1), rows / heads / 2);
    let mut out = Vec::with_capacity(bytes.len());
    for head in 0..heads {
        for j in 0..half {
            for t in 0..2 {
                out.extend_from_slice(&bytes[(head * 2 * half + t * half + j) * width..][..width]);
            }
        }
    }
    out
}

/// A matrix `[in, out]` as `[out, in]`.
pub(super) fn turned(bytes: &[u8], shape: &[u64], dtype: DType) -> Vec<u8> {
    let element = usize::try_from(dtype.size()).expect("at most 8");
    let cols = shape.last().map_or(1, |&cols| usize::try_from(cols).unwrap_or(1)).max(1);
    let rows = bytes.len() / element / cols;
    let mut out = Vec::with_capacity(bytes.len());
    for col in 0..cols {
        for row in 0..rows {
            out.extend_from_slice(&bytes[(row * cols + col) * element..][..element]);
        }
    }
    out
}
