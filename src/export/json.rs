//! The JSON bundle: `{"tensors":[{"name","dtype","shape","data":[...]}]}`, numbers in the shortest form that reads back.

use std::io::{BufWriter, Write};
use std::path::Path;

use serde::Serialize;

use super::{Files, Job};
use crate::error::{Error, Result};
use crate::tensor::{DType, to_f32};

/// Writes all tensors into one bundle.
pub(super) fn file(job: &mut Job<'_, '_>, target: &Path) -> Result<Files> {
    let out = job.create(target, 0)?;
    let mut text = BufWriter::with_capacity(1 << 20, out.stream());
    let failed = |e: std::io::Error| Error::io(target, e);
    text.write_all(b"{\"tensors\":[").map_err(failed)?;
    for i in 0..job.artifact.tensors().len() {
        let entry = &job.artifact.tensors()[i];
        let info = entry.info();
        let dtype = job.dtype(entry);
        let head = |text: &mut dyn Write| -> std::io::Result<()> {
            text.write_all(if i == 0 { b"\n{\"name\":" } else { b",\n{\"name\":" })?;
            serde_json::to_writer(&mut *text, info.name())?;
            write!(text, ",\"dtype\":\"{dtype}\",\"shape\":")?;
            serde_json::to_writer(&mut *text, info.shape())?;
            text.write_all(b",\"data\":[")
        };
        head(&mut text).map_err(failed)?;
        let mut at = 0;
        job.source_order(i, dtype, target, &mut |bytes| {
            numbers(&mut text, dtype, bytes, info.name(), &mut at, target)
        })?;
        text.write_all(b"]}").map_err(failed)?;
    }
    text.write_all(b"\n]}\n").map_err(failed)?;
    text.flush().map_err(failed)?;
    drop(text);
    let bytes = out.stream().metadata().map_err(failed)?.len();
    out.commit(bytes)?;
    Ok(vec![(target.to_owned(), bytes)])
}

/// Prints elements, each with a comma before it unless it is the tensor's first.
fn numbers(text: &mut impl Write, dtype: DType, bytes: &[u8], name: &str, at: &mut u64, target: &Path) -> Result<()> {
    /// Prints every element, read as `$ty`.
    macro_rules! print_each {
        ($ty:ty) => {
            for chunk in bytes.as_chunks::<{ size_of::<$ty>() }>().0 {
                number(text, <$ty>::from_le_bytes(*chunk), true, name, at, target)?;
            }
        };
    }
    match dtype {
        DType::F64 => {
            for chunk in bytes.as_chunks::<8>().0 {
                let x = f64::from_le_bytes(*chunk);
                number(text, x, x.is_finite(), name, at, target)?;
            }
        }
        DType::I64 => print_each!(i64),
        DType::I32 => print_each!(i32),
        DType::I16 => print_each!(i16),
        DType::I8 => print_each!(i8),
        DType::U64 => print_each!(u64),
        DType::U32 => print_each!(u32),
        DType::U16 => print_each!(u16),
        DType::U8 | DType::Bool => print_each!(u8),
        DType::F32 | DType::F16 | DType::BF16 | DType::F8E4M3 | DType::F8E5M2 => {
            let element = usize::try_from(dtype.size()).expect("at most 8");
            let mut values = vec![0.0; bytes.len() / element];
            to_f32(dtype, bytes, &mut values);
            for x in values {
                number(text, x, x.is_finite(), name, at, target)?;
            }
        }
    }
    Ok(())
}

fn number<T: Serialize>(
    text: &mut impl Write,
    value: T,
    finite: bool,
    name: &str,
    at: &mut u64,
    target: &Path,
) -> Result<()> {
    if !finite {
        return Err(Error::invalid(format!(
            "tensor '{name}' has a number at index {at} that is not finite, which JSON cannot hold; \
             decompress to .safetensors or .npz"
        )));
    }
    let print = |text: &mut dyn Write| -> std::io::Result<()> {
        if *at > 0 {
            text.write_all(b",")?;
        }
        Ok(serde_json::to_writer(text, &value)?)
    };
    print(text).map_err(|e| Error::io(target, e))?;
    *at += 1;
    Ok(())
}
