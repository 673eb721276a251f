//! Rows of the matrix view of a tensor, whatever the order in which the file holds them.
//!
//! A C-order tensor holds its rows one after another, and a range of rows is one range of the file. A transposed view
//! (Conv1D), or a Fortran-order array, holds its columns one after another instead; both at once cancel out. For those,
//! the wanted part of each stored column is gathered, a bounded window of stored columns at a time.

use crate::error::{Error, Result, try_zeroed};
use crate::file::{Block, InputFile};

use super::{SourceTensor, quoted};

/// The most that is held besides the rows asked for.
const WINDOW: u64 = 4 << 20;

/// Below this distance between two wanted pieces, reading what lies between them costs less than a second call.
const SPARSE: u64 = 4096;

/// Side of the square in which a window is transposed: a source and a target tile fit the first-level cache.
const TILE: usize = 32;

/// Which of a source's files holds a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Store {
    /// One of its files, by number.
    File(usize),
    /// Its temporary file.
    Spool,
}

/// Which index runs fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    /// The last one.
    C,
    /// The first one; only for matrices.
    Fortran,
    /// The last one, but rows lie as neighbours that belong to the two halves of a head, each half having so many rows: row
    /// `t * half + j` of a head is stored as its row `2 j + t`. Elements of a vector are rows of their own.
    Heads(u64),
}

/// Where the elements of a tensor are.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// In which file.
    pub(super) store: Store,
    /// At which byte the first element is.
    pub(super) offset: u64,
    /// How the others follow.
    pub(super) order: Order,
}

/// Reads `rows` rows of the matrix view of `tensor` from `file`.
pub(super) fn read(file: &InputFile, tensor: &SourceTensor, first_row: u64, rows: u64) -> Result<Block> {
    let (all_rows, cols) = tensor.matrix();
    if first_row.checked_add(rows).is_none_or(|end| end > all_rows) {
        return Err(Error::invalid(format!(
            "{rows} rows from row {first_row} on are wanted of tensor {}, which has {all_rows}",
            quoted(tensor.info.name())
        )));
    }
    let size = tensor.info.dtype().size();
    // Part of a tensor whose size was checked, so the products fit 63 bits.
    let len = usize::try_from(rows * cols * size).map_err(|_| {
        Error::invalid(format!(
            "{rows} rows of tensor {} exceed the address space, read fewer at a time",
            quoted(tensor.info.name())
        ))
    })?;
    let Place { offset, order, .. } = tensor.place;
    if let (Order::Heads(half), true) = (order, len > 0) {
        let vector = tensor.info.shape().len() == 1;
        let (first, count, row) = if vector { (0, cols, size) } else { (first_row, rows, cols * size) };
        let mut out = try_zeroed(len, || format!("rows of tensor {}", quoted(tensor.info.name())))?;
        for (row_number, out) in (first..first + count).zip(out.chunks_mut(size_in_memory(row))) {
            let (head, within) = (row_number / (2 * half), row_number % (2 * half));
            let stored = head * 2 * half + 2 * (within % half) + within / half;
            file.read_into(offset + stored * row, out)?;
        }
        return Ok(Block::Owned(out));
    }
    if len == 0 || tensor.transposed == (order == Order::Fortran) {
        let start = if len == 0 { 0 } else { offset + first_row * cols * size };
        let block = file.read(start, len)?;
        file.observe(start, &block);
        return Ok(block);
    }
    let mut out = try_zeroed(len, || format!("rows of tensor {}", quoted(tensor.info.name())))?;
    let columns = Columns { offset, count: cols, rows: all_rows, size };
    columns.gather(file, first_row, rows, &mut out)?;
    Ok(Block::Owned(out))
}

/// Reads a range of bytes of `tensor` in its own C order, whatever the order of the file.
pub(super) fn read_bytes(file: &InputFile, tensor: &SourceTensor, start: u64, bytes: u64) -> Result<Block> {
    if start.checked_add(bytes).is_none_or(|end| end > tensor.info.bytes()) {
        return Err(Error::invalid(format!(
            "bytes {start} to {start}+{bytes} are wanted of tensor {}, which has {}",
            quoted(tensor.info.name()),
            tensor.info.bytes()
        )));
    }
    let len = usize::try_from(bytes).map_err(|_| Error::invalid("the range exceeds the address space"))?;
    if len == 0 || tensor.place.order == Order::C {
        let at = if len == 0 { 0 } else { tensor.place.offset + start };
        let block = file.read(at, len)?;
        file.observe(at, &block);
        return Ok(block);
    }
    // Another order: the rows that hold the range, less what lies before it.
    let row_bytes = tensor.info.matrix().1 * tensor.info.dtype().size();
    let untransposed = SourceTensor { transposed: false, ..tensor.clone() };
    let first = start / row_bytes;
    let rows = read(file, &untransposed, first, (start + bytes).div_ceil(row_bytes) - first)?;
    let skip = size_in_memory(start - first * row_bytes);
    Ok(Block::Owned(rows[skip..skip + len].to_vec()))
}

/// A matrix that is stored column after column.
struct Columns {
    offset: u64,
    count: u64,
    rows: u64,
    size: u64,
}

impl Columns {
    /// Gathers rows into `out`, which has room for exactly them.
    fn gather(&self, file: &InputFile, first_row: u64, rows: u64, out: &mut [u8]) -> Result<()> {
        let stride = self.rows * self.size;
        // Very long columns are cut, so that even a part of one never exceeds the window.
        let piece_rows = rows.min((WINDOW / self.size).max(1));
        let mut done = 0;
        while done < rows {
            let now = piece_rows.min(rows - done);
            let piece = now * self.size;
            let at = self.offset + (first_row + done) * self.size;
            let packed = (stride >= SPARSE && piece <= stride / 2) || stride > WINDOW;
            let step = if packed { piece } else { stride };
            let many = (WINDOW / step).clamp(1, self.count);
            let mut column = 0;
            let mut pieces = Vec::new();
            while column < self.count {
                let columns = many.min(self.count - column);
                let start = at + column * stride;
                let span = size_in_memory((columns - 1) * step + piece);
                let window;
                let bytes = if packed && columns > 1 {
                    if pieces.is_empty() {
                        pieces = try_zeroed(span, || "a window of a transposed tensor".to_owned())?;
                    }
                    for (index, part) in pieces[..span].chunks_exact_mut(size_in_memory(piece)).enumerate() {
                        file.read_into(start + index as u64 * stride, part)?;
                    }
                    &pieces[..span]
                } else {
                    window = file.read(start, span)?;
                    file.observe(start, &window);
                    &window[..]
                };
                let target = Target {
                    row_stride: size_in_memory(self.count * self.size),
                    row: size_in_memory(done),
                    column: size_in_memory(column),
                };
                let (now, columns) = (size_in_memory(now), size_in_memory(columns));
                let step = size_in_memory(step);
                match self.size {
                    1 => target.transpose::<1>(bytes, step, now, columns, out),
                    2 => target.transpose::<2>(bytes, step, now, columns, out),
                    4 => target.transpose::<4>(bytes, step, now, columns, out),
                    _ => target.transpose::<8>(bytes, step, now, columns, out),
                }
                column += columns as u64;
            }
            done += now;
        }
        Ok(())
    }
}

/// Where a window lands among the rows asked for.
struct Target {
    row_stride: usize,
    row: usize,
    column: usize,
}

impl Target {
    /// Copies `rows x columns` elements of `N` bytes; column `c` begins at byte `c * step` of `window`.
    fn transpose<const N: usize>(&self, window: &[u8], step: usize, rows: usize, columns: usize, out: &mut [u8]) {
        for first_column in (0..columns).step_by(TILE) {
            for first_row in (0..rows).step_by(TILE) {
                for row in first_row..rows.min(first_row + TILE) {
                    let target = (self.row + row) * self.row_stride + self.column * N;
                    for column in first_column..columns.min(first_column + TILE) {
                        let from = column * step + row * N;
                        let to = target + column * N;
                        out[to..to + N].copy_from_slice(&window[from..from + N]);
                    }
                }
            }
        }
    }
}

/// A size that is at most that of the output or of the window.
fn size_in_memory(bytes: u64) -> usize {
    usize::try_from(bytes).expect("no larger than a buffer that exists, or than the window")
}
