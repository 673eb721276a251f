//! Caches of keys and values in memory that Python holds, for the reasons that `gemm.rs` gives; planes of several
//! sequences, blocks on pages of a pool. `python/tenpak/torch/_kv.py` is the one place that calls these.

#![expect(unsafe_code, reason = "memory whose address and length the caller vouches for")]

use pyo3::prelude::*;
use serde_json::{Value, json};

use super::artifact::fill;
use super::cuda::{CudaDevice, step_json};
use super::gemm::{Memory, bytes, bytes_mut, computed, with_floats};
use crate::attention::{Attend, BLOCK, KvFormat, KvPages, KvPlane, KvView, attend_view};
use crate::error::{Error, Result};
use crate::gemm::cuda::cache::{AttendCall, Attention, Mask, Numbers, Places, append_step, recall_step};
use crate::gemm::cuda::plan::Hardware;
use crate::tensor::DType;

/// Heads, channels of each, bits of keys and of values.
type Format = (usize, usize, u32, u32);
/// Address and bytes of each part: planes in the order of [`KvPlane::ALL`], pages, lengths.
type Parts = [(u64, usize); 8];
/// Address of the first number, and numbers between neighbours along sequences, heads and tokens.
type Spread = (u64, [u64; 3]);

fn format_of((heads, dim, key_bits, value_bits): Format) -> Result<KvFormat> {
    KvFormat::new(heads, dim, key_bits, value_bits)
}

/// Planes, pages and lengths.
type Words<'a> = ([&'a [u32]; 6], &'a [i32], &'a [i32]);

/// Parts of a cache on the CPU as numbers.
///
/// # Safety
/// As [`bytes`], for every part.
unsafe fn parts<'a>(parts: &Parts) -> Result<Words<'a>> {
    // SAFETY: the caller vouches for the memory.
    let part = |at: usize| unsafe { bytes((usize::try_from(parts[at].0).expect("an address"), parts[at].1)) };
    let odd = |_| Error::invalid("a part of a cache that is not whole words, expected as tenpak makes them");
    let mut planes: [&[u32]; 6] = [&[]; 6];
    for (at, plane) in planes.iter_mut().enumerate() {
        *plane = bytemuck::try_cast_slice(part(at)).map_err(odd)?;
    }
    let table = |at| bytemuck::try_cast_slice(part(at)).map_err(odd);
    Ok((planes, table(6)?, table(7)?))
}

/// Each sequence's tokens, its pages, and where its tails begin.
fn sequences<'a>(pages: &'a [i32], lengths: &[i32]) -> Result<Vec<(usize, &'a [i32])>> {
    let columns = pages.len().checked_div(lengths.len()).unwrap_or(0);
    if columns * lengths.len() != pages.len() {
        return Err(Error::invalid(format!("a table of {} pages for {} sequences", pages.len(), lengths.len())));
    }
    let length =
        |&length: &i32| usize::try_from(length).map_err(|_| Error::invalid(format!("a sequence of {length} tokens")));
    lengths.iter().enumerate().map(|(i, of)| Ok((length(of)?, &pages[i * columns..][..columns]))).collect()
}

/// The part of a plane of tails that is one sequence's.
fn own_tail(format: &KvFormat, plane: KvPlane, sequence: usize) -> std::ops::Range<usize> {
    let words = format.heads() * format.plane_words(plane);
    sequence * words..(sequence + 1) * words
}

fn check_tails(format: &KvFormat, planes: &[&[u32]; 6], sequences: usize) -> Result<()> {
    for plane in [KvPlane::KeyTail, KvPlane::ValueTail] {
        let (found, expected) = (planes[plane as usize].len(), own_tail(format, plane, sequences).start);
        if found != expected {
            return Err(Error::invalid(format!(
                "tails of {found} words for {sequences} sequences, expected {expected}"
            )));
        }
    }
    Ok(())
}

fn view<'a>(
    format: &KvFormat,
    mut planes: [&'a [u32]; 6],
    sequence: usize,
    (len, pages): (usize, &'a [i32]),
) -> Result<KvView<'a>> {
    for plane in [KvPlane::KeyTail, KvPlane::ValueTail] {
        planes[plane as usize] = &planes[plane as usize][own_tail(format, plane, sequence)];
    }
    KvView::new(*format, len, planes, Some(pages))
}

/// Adds tokens to every sequence: keys and values are arrays of `dtype`, `[sequences, tokens, heads, channels]`; the lengths
/// are those before.
#[pyfunction]
pub(super) fn kv_append(
    py: Python<'_>,
    format: Format,
    of: Parts,
    keys: Memory,
    values: Memory,
    dtype: &str,
    tokens: usize,
) -> PyResult<()> {
    computed(py, tokens < BLOCK, || {
        let (format, dtype): (_, DType) = (format_of(format)?, dtype.parse()?);
        // SAFETY: `_kv.py` holds all of them for the length of this call.
        let ((planes, pages, lengths), keys, values) = unsafe { (parts(&of)?, bytes(keys), bytes(values)) };
        let all = sequences(pages, lengths)?;
        check_tails(&format, &planes, all.len())?;
        with_floats(dtype, keys, |keys| {
            with_floats(dtype, values, |values| {
                let size = tokens * format.token();
                if keys.len() != size * all.len() || values.len() != keys.len() {
                    return Err(Error::invalid("keys and values that are not as many as the tokens"));
                }
                for (sequence, &(len, pages)) in all.iter().enumerate() {
                    let planes = KvPlane::ALL.map(|plane| {
                        let (at, bytes) = of[plane as usize];
                        // SAFETY: as above; `_kv.py` declares that the planes are written, nothing here reads them meanwhile,
                        // and whole words were found there above.
                        let bytes = unsafe { bytes_mut((usize::try_from(at).expect("an address"), bytes)) };
                        let words: &mut [u32] = bytemuck::cast_slice_mut(bytes);
                        if plane.is_tail() { &mut words[own_tail(&format, plane, sequence)] } else { words }
                    });
                    let these = sequence * size..(sequence + 1) * size;
                    KvPages { format, planes, pages }.append(len, &keys[these.clone()], &values[these])?;
                }
                Ok(())
            })
        })
    })
}

/// Attention of `m` tokens of queries of every sequence: queries and results are arrays of `dtype`,
/// `[sequences, m, heads of queries, channels]`, the mask bytes, `[sequences, m, tokens]`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the parameters of attention")]
pub(super) fn kv_attend(
    py: Python<'_>,
    format: Format,
    of: Parts,
    q: Memory,
    mask: Option<Memory>,
    out: Memory,
    dtype: &str,
    m: usize,
    scale: f32,
    causal: bool,
) -> PyResult<()> {
    computed(py, false, || {
        let (format, dtype): (_, DType) = (format_of(format)?, dtype.parse()?);
        // SAFETY: `_kv.py` holds all of them for the length of this call, and has just made `out`.
        let ((planes, pages, lengths), q, mask, out) =
            unsafe { (parts(&of)?, bytes(q), mask.map(|mask| bytes(mask)), bytes_mut(out)) };
        let all = sequences(pages, lengths)?;
        check_tails(&format, &planes, all.len())?;
        with_floats(dtype, q, |q| {
            fill(dtype, out, |out| {
                let size = q.len().checked_div(all.len()).unwrap_or(0);
                let mask_size = mask.map_or(0, <[u8]>::len).checked_div(all.len()).unwrap_or(0);
                for (sequence, &of) in all.iter().enumerate() {
                    let view = view(&format, planes, sequence, of)?;
                    let these = sequence * size..(sequence + 1) * size;
                    // A mask has a column for each token of the longest sequence.
                    let own: Option<Vec<u8>> = mask.map(|mask| {
                        let rows = mask[sequence * mask_size..][..mask_size].chunks((mask_size / m.max(1)).max(1));
                        rows.flat_map(|row| &row[..view.len().min(row.len())]).copied().collect()
                    });
                    let options = Attend { scale: Some(scale), causal };
                    attend_view(&view, &q[these.clone()], m, options, own.as_deref(), &mut out[these])?;
                }
                Ok(())
            })
        })
    })
}

/// Keys and values of the first `tokens` of every sequence as arrays of `dtype`, `[sequences, tokens, heads, channels]`;
/// zeros beyond a sequence's length.
#[pyfunction]
pub(super) fn kv_recall(
    py: Python<'_>,
    format: Format,
    of: Parts,
    tokens: usize,
    dtype: &str,
    keys: Memory,
    values: Memory,
) -> PyResult<()> {
    computed(py, tokens < BLOCK, || {
        let (format, dtype): (_, DType) = (format_of(format)?, dtype.parse()?);
        // SAFETY: `_kv.py` holds all of them for the length of this call, and has just made the results.
        let ((planes, pages, lengths), keys, values) = unsafe { (parts(&of)?, bytes_mut(keys), bytes_mut(values)) };
        let all = sequences(pages, lengths)?;
        check_tails(&format, &planes, all.len())?;
        fill(dtype, keys, |keys| {
            fill(dtype, values, |values| {
                let size = tokens * format.token();
                if keys.len() != size * all.len() || values.len() != keys.len() {
                    return Err(Error::invalid("results that are not as many as the tokens"));
                }
                for (sequence, &of) in all.iter().enumerate() {
                    let (these_keys, these_values) = view(&format, planes, sequence, of)?.decode();
                    for (out, numbers) in [(&mut *keys, these_keys), (&mut *values, these_values)] {
                        let out = &mut out[sequence * size..][..size];
                        let there = numbers.len().min(size);
                        out[..there].copy_from_slice(&numbers[..there]);
                        out[there..].fill(0.0);
                    }
                }
                Ok(())
            })
        })
    })
}

fn places(of: &Parts) -> Places {
    let [a, b, c, d, e, f, pages, lengths] = *of;
    Places { planes: [a, b, c, d, e, f], pages, lengths }
}

fn numbers((at, strides): Spread) -> Numbers {
    Numbers { at, strides }
}

/// Launches the adding of `count` tokens to every sequence; the lengths are those before.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the parameters of a kernel")]
pub(super) fn cuda_kv_append(
    py: Python<'_>,
    device: &CudaDevice,
    format: Format,
    of: Parts,
    keys: Spread,
    values: Spread,
    dtype: &str,
    count: usize,
    stream: u64,
) -> PyResult<()> {
    computed(py, true, || {
        let tokens = [numbers(keys), numbers(values)];
        // SAFETY: the caller holds tensors at these addresses until the stream has come past.
        unsafe { device.0.append(&format_of(format)?, &places(&of), tokens, count, dtype.parse()?, stream) }
    })
}

/// Bytes of workspace of attention: `sizes` are sequences, tokens of queries, heads of queries for each of keys and
/// values, and tokens of the longest sequence.
#[pyfunction]
pub(super) fn cuda_kv_attend_bytes(
    py: Python<'_>,
    device: &CudaDevice,
    format: Format,
    sizes: (usize, usize, usize, usize),
    dtype: &str,
) -> PyResult<usize> {
    let mut bytes = 0;
    computed(py, true, || {
        bytes = device.0.attend_bytes(&attention(format, sizes, dtype)?)?;
        Ok(())
    })?;
    Ok(bytes)
}

/// Launches attention; `mask` is an address, zero for none, and its strides.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the parameters of a kernel")]
pub(super) fn cuda_kv_attend(
    py: Python<'_>,
    device: &CudaDevice,
    format: Format,
    of: Parts,
    sizes: (usize, usize, usize, usize),
    q: Spread,
    mask: (u64, [u64; 2]),
    dtype: &str,
    scale: f32,
    causal: bool,
    workspace: u64,
    out: u64,
    stream: u64,
) -> PyResult<()> {
    computed(py, true, || {
        let mask = Mask { at: mask.0, strides: mask.1 };
        let call = AttendCall { q: numbers(q), mask, scale, causal, workspace, out };
        // SAFETY: the caller holds tensors at these addresses until the stream has come past.
        unsafe { device.0.attend(&attention(format, sizes, dtype)?, &places(&of), &call, stream) }
    })
}

/// Launches what makes numbers of the first `tokens` of every sequence, `[sequences, heads, tokens, channels]`.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "the parameters of a kernel")]
pub(super) fn cuda_kv_recall(
    py: Python<'_>,
    device: &CudaDevice,
    format: Format,
    of: Parts,
    tokens: usize,
    dtype: &str,
    keys: u64,
    values: u64,
    stream: u64,
) -> PyResult<()> {
    computed(py, true, || {
        // SAFETY: the caller holds tensors at these addresses until the stream has come past.
        unsafe { device.0.recall(&format_of(format)?, &places(&of), tokens, dtype.parse()?, [keys, values], stream) }
    })
}

fn attention(
    format: Format,
    (sequences, m, per_head, longest): (usize, usize, usize, usize),
    dtype: &str,
) -> Result<Attention> {
    Ok(Attention { format: format_of(format)?, numbers: dtype.parse()?, sequences, m, per_head, longest })
}

/// How a device with so many multiprocessors and bytes of shared memory would add `count` tokens to a cache, attend to it
/// and make numbers of it, as JSON.
#[pyfunction]
pub(super) fn cuda_cache_plan(
    py: Python<'_>,
    format: Format,
    sizes: (usize, usize, usize, usize),
    count: usize,
    dtype: &str,
    multiprocessors: usize,
    shared_bytes: usize,
) -> PyResult<String> {
    let mut plan = Value::Null;
    computed(py, true, || {
        let of = attention(format, sizes, dtype)?;
        let attended = of.plan(Hardware { multiprocessors, shared_bytes, wgmma: false })?;
        plan = json!({
            "append": step_json(&append_step(&of.format, of.numbers, of.sequences, count)?),
            "attend": step_json(&attended.attend),
            "merge": attended.merge.as_ref().map(step_json),
            "recall": step_json(&recall_step(&of.format, of.numbers, of.sequences, of.longest)?),
            "workspace": attended.workspace_bytes,
        });
        Ok(())
    })?;
    Ok(plan.to_string())
}
