//! Planes of outliers whose coding leans on other planes: which codes stand at the ends, and how long a step of a row is.
//!
//! They are read in blocks of rows, as codes are, so that rows are decoded without those before them: counts say
//! which outliers are those of a block.

use std::borrow::Cow;
use std::ops::Range;

use half::f16;
use rayon::prelude::*;

use super::coded::{self, Coded, Coding, Known, Read};
use super::entry::Entry;
use crate::coding::ends::{Codes, Columns};
use crate::coding::tail::{self, Steps};
use crate::error::{Error, Result};
use crate::layout::{Layout, Plane};

/// Blocks that are read together.
const TOGETHER: usize = 32;

/// The planes that are leaned on.
struct Matrix<'a> {
    entry: &'a Entry,
    read: &'a Read<'a>,
    rows: usize,
    cols: usize,
    /// Bytes of a row of codes.
    stride: usize,
    counts: Vec<u32>,
}

/// The error of a plane that another one leans on.
fn in_plane(kind: Plane, error: Error) -> Error {
    match error {
        Error::Corrupt { what, .. } => Error::corrupt(0, format!("plane {}: {what}", kind.name())),
        error => error,
    }
}

fn too_large(_: std::num::TryFromIntError) -> Error {
    Error::invalid("the plane is larger than memory")
}

impl<'a> Matrix<'a> {
    fn new(entry: &'a Entry, read: &'a Read<'a>) -> Result<Self> {
        let (rows, cols) = entry.matrix();
        let (rows, cols) = (usize::try_from(rows).map_err(too_large)?, usize::try_from(cols).map_err(too_large)?);
        let Layout::Grouped(layout) = &entry.codec().layout else {
            return Err(Error::invalid("a raw tensor has no outliers"));
        };
        let mut matrix = Self { entry, read, rows, cols, stride: layout.code_stride(cols), counts: Vec::new() };
        let counts = matrix.part(Plane::OutlierCounts, 0..4 * rows)?;
        matrix.counts = counts.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
        let sum: u64 = matrix.counts.iter().map(|&count| u64::from(count)).sum();
        let most = matrix.counts.iter().copied().max().unwrap_or_default();
        if sum != entry.extras().outliers || most as usize > cols {
            return Err(Error::corrupt(0, "counts do not add up to the number of outliers"));
        }
        Ok(matrix)
    }

    /// Which plane of the entry this is.
    fn index(&self, kind: Plane) -> Option<usize> {
        self.entry.planes().iter().position(|place| place.plane == kind)
    }

    /// A part of another plane as it is in memory; of a plane that is not there, nothing.
    fn part(&self, kind: Plane, bytes: Range<usize>) -> Result<Vec<u8>> {
        let Some(plane) = self.index(kind) else { return Ok(Vec::new()) };
        coded::range(self.entry, plane, bytes.start as u64, bytes.len() as u64, None, self.read)
            .map_err(|e| in_plane(kind, e))
    }

    /// The F32 numbers of a part of another plane.
    fn numbers(&self, kind: Plane, range: Range<usize>) -> Result<Vec<f32>> {
        let bytes = self.part(kind, 4 * range.start..4 * range.end)?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

/// How many outliers rows have.
fn number_of(counts: &[u32]) -> usize {
    counts.iter().map(|&count| count as usize).sum()
}

/// The bytes of one of these planes in pieces of whole blocks, from the block that has outlier `elements.start` on; `take` is
/// given the first outlier of each piece. What is `known` is not decoded again.
///
/// # Errors
/// [`Error::Corrupt`], with the byte of the stream, when it is not that of a plane of this matrix.
pub(super) fn pieces(
    entry: &Entry,
    plane: usize,
    elements: Range<usize>,
    known: Option<Known<'_>>,
    read: &Read<'_>,
    mut take: impl FnMut(usize, &[u8]) -> Result<()>,
) -> Result<()> {
    let matrix = Matrix::new(entry, read)?;
    let place = &entry.planes()[plane];
    let stored = read(plane, 0, place.bytes)?;
    let (rows, cols, stride) = (matrix.rows, matrix.cols, matrix.stride);
    let long =
        entry.extras().elements(Plane::OutlierColumns, rows as u64, cols as u64).is_some_and(|(d, _)| d.size() == 4);
    let coded_columns =
        matrix.index(Plane::OutlierColumns).filter(|&i| entry.planes()[i].coding == Some(Coding::Columns));
    let steps = match place.coding {
        Some(Coding::Tails) => Some(Steps::open(&stored, rows, cols)?),
        _ => None,
    };
    let per_block = coded::rows_per_block(cols);
    let rows_of = |block: usize| block * per_block..((block + 1) * per_block).min(rows);
    // The first outlier of each block, and the end of all.
    let mut starts = vec![0];
    starts.extend(matrix.counts.chunks(per_block).scan(0, |sum, counts| {
        *sum += number_of(counts);
        Some(*sum)
    }));
    let (mut block, end) =
        (starts.partition_point(|&at| at <= elements.start) - 1, starts.partition_point(|&at| at < elements.end));
    let end = end.min(starts.len() - 1);
    if block >= end {
        return Ok(());
    }
    let width = if long { 4 } else { 2 };
    let known_codes = |rows: Range<usize>| known.and_then(|known| coded::part_of(known.codes, &rows, stride));
    let known_columns = |outliers: Range<usize>| {
        known.filter(|_| steps.is_some()).and_then(|known| coded::part_of(known.columns, &outliers, width))
    };
    // Streams are opened once, and only where something of theirs is not known.
    let columns_stream = match (coded_columns, &steps) {
        (Some(columns), Some(_)) if known_columns(starts[block]..starts[end]).is_none() => {
            Some(read(columns, 0, entry.planes()[columns].bytes)?)
        }
        _ => None,
    };
    let columns = match (&columns_stream, &steps, coded_columns) {
        (Some(stream), ..) => Some(Columns::open(stream, rows, cols)?),
        (None, None, Some(_)) => Some(Columns::open(&stored, rows, cols)?),
        _ => None,
    };
    let coded_codes = matrix.index(Plane::Codes).filter(|&i| entry.planes()[i].coding.is_some());
    let of_codes = |e| in_plane(Plane::Codes, e);
    let all_known = known_codes(rows_of(block).start..rows_of(end - 1).end).is_some();
    let codes_stream = coded_codes.filter(|_| !all_known).map(|i| read(i, 0, entry.planes()[i].bytes));
    let codes_stream = codes_stream.transpose().map_err(of_codes)?;
    let all_codes = match (coded_codes, &codes_stream) {
        (Some(i), Some(stream)) => Some(Coded::open(entry, i, stream).map_err(of_codes)?),
        _ => None,
    };
    let column_scales = if steps.is_some() { matrix.numbers(Plane::ColumnScales, 0..cols)? } else { Vec::new() };
    while block < end {
        let last = (block + TOGETHER).min(end);
        let here = rows_of(block).start..rows_of(last - 1).end;
        let outliers = starts[block]..starts[last];
        // What is neither known nor coded is read as it is.
        let plain_codes = match &all_codes {
            None if !all_known => matrix.part(Plane::Codes, here.start * stride..here.end * stride)?,
            _ => Vec::new(),
        };
        let scales = if steps.is_some() { matrix.numbers(Plane::Scales, here.clone())? } else { Vec::new() };
        let plain_columns = match coded_columns {
            Some(_) => Vec::new(),
            None => matrix.part(Plane::OutlierColumns, width * outliers.start..width * outliers.end)?,
        };
        let counts = &*matrix.counts;
        let one = |block: usize| {
            let own = rows_of(block);
            let codes = match (known_codes(own.clone()), &all_codes) {
                (Some(codes), _) => Cow::Borrowed(codes),
                (None, Some(all)) => Cow::Owned(all.block(block).map_err(of_codes)?),
                (None, None) => Cow::Borrowed(&plain_codes[(own.start - here.start) * stride..][..own.len() * stride]),
            };
            let codes = Codes { plane: &codes, stride, cols };
            let counts = &counts[own.clone()];
            let number = starts[block + 1] - starts[block];
            let mut found = Vec::with_capacity(number);
            let own_outliers = starts[block]..starts[block + 1];
            let plain = match coded_columns {
                Some(_) => known_columns(own_outliers),
                None => coded::part_of((outliers.start, &plain_columns), &own_outliers, width),
            };
            match (plain, &columns) {
                (Some(plain), _) if long => {
                    found.extend(plain.as_chunks::<4>().0.iter().map(|bytes| u32::from_le_bytes(*bytes)));
                }
                (Some(plain), _) => {
                    found.extend(plain.as_chunks::<2>().0.iter().map(|bytes| u32::from(u16::from_le_bytes(*bytes))));
                }
                (None, Some(columns)) => columns.decode(block, &codes, counts, &mut found)?,
                (None, None) => return Err(Error::corrupt(0, "columns of outliers end before their counts do")),
            }
            let Some(steps) = &steps else {
                let mut out = Vec::with_capacity(width * number);
                found.iter().for_each(|column| out.extend(&column.to_le_bytes()[..width]));
                return Ok(out);
            };
            let mut numbers = Vec::new();
            steps.decode(block, number, &mut numbers)?;
            let mut out = Vec::with_capacity(2 * number);
            let mut outliers = found.iter().zip(&numbers);
            for (row, &count) in counts.iter().enumerate() {
                let scale = scales[own.start - here.start + row];
                for (&column, &number) in outliers.by_ref().take(count as usize) {
                    let column = column as usize;
                    let Some(&code) = codes.plane[row * stride..][..cols].get(column) else {
                        return Err(Error::corrupt(0, format!("an outlier in column {column} of {cols}")));
                    };
                    let step = column_scales.get(column).map_or(scale, |factor| scale * factor);
                    let value: f16 = tail::value(number, code < 128, step);
                    if !value.is_finite() {
                        return Err(Error::corrupt(
                            0,
                            format!("a value of {number} steps of {step:e}, which no F16 is"),
                        ));
                    }
                    out.extend(value.to_le_bytes());
                }
            }
            Ok(out)
        };
        let parts: Vec<Vec<u8>> = (block..last).into_par_iter().map(one).collect::<Result<_>>()?;
        take(outliers.start, &parts.concat())?;
        block = last;
    }
    Ok(())
}
