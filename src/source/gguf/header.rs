//! The header of a GGUF file: keys that matter here, and tensors with their places, all of it checked.
//!
//! Nothing is allocated that a number of the file asks for: texts and lists are read as they come, or skipped.

use std::collections::BTreeMap;
use std::io::{BufReader, Read};

use super::kind::Kind;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::{self, Limits};
use crate::source::quoted;

/// Where the version stands, before all counts.
const VERSION: u64 = 4;
/// What tensors begin on a multiple of, unless a key says otherwise.
const ALIGNMENT: u64 = 32;
/// The most elements of a list that is kept; the largest vocabularies have a quarter of that.
const TOKENS: u64 = 1 << 20;
/// Lists of lists are this deep at most.
const DEPTH: u32 = 4;

/// The value of a key.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Integer(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    /// A list of a tokenizer.
    Texts(Vec<String>),
    Floats(Vec<f32>),
    Integers(Vec<i32>),
    /// Any other list, and texts that are none, which nothing here depends on.
    Other,
}

/// What is kept of a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keep {
    /// Numbers and short texts.
    Short,
    /// Texts and lists of any length that a header may have: those of a tokenizer.
    All,
}

/// A tensor as the header states it.
#[derive(Debug, Clone)]
pub(super) struct Tensor {
    pub name: String,
    /// Outermost dimension first.
    pub shape: Vec<u64>,
    pub kind: Kind,
    /// Bytes of a row.
    pub row: u64,
    /// Where it begins in the file.
    pub offset: u64,
}

/// What a header says.
#[derive(Debug)]
pub(super) struct Header {
    pub keys: BTreeMap<String, Value>,
    pub tensors: Vec<Tensor>,
}

impl Header {
    /// Reads and checks the header of a file.
    ///
    /// # Errors
    /// [`Error::Corrupt`] when it contradicts itself or the file, [`Error::Unsupported`] for versions and types that are
    /// not read, [`Error::Limit`].
    pub fn read(file: &InputFile, limits: &Limits) -> Result<Self> {
        let stream = BufReader::with_capacity(64 << 10, file.stream()?);
        let mut head = Head { stream, at: 0, file, limits };
        head.skip(VERSION)?;
        let version = head.u32()?;
        if version != 2 && version != 3 {
            let what = if matches!(version.swap_bytes(), 1..=3) {
                "its numbers are big-endian"
            } else {
                "it is another version"
            };
            return Err(Error::unsupported(format!(
                "the file is GGUF of version {version}, expected 2 or 3, little-endian: {what}; convert it anew with llama.cpp"
            )));
        }
        let (tensors, keys) = (head.u64()?, head.u64()?);
        limits::check("tensors of a GGUF file", limits.tensors, tensors)?;
        limits::check("keys of a GGUF file", limits.metadata, keys)?;
        let keys = (0..keys).try_fold(BTreeMap::new(), |mut all, _| {
            let (at, key) = (head.at, head.text(limits.name_bytes)?);
            let kind = head.u32()?;
            let keep = if key.starts_with("tokenizer.") { Keep::All } else { Keep::Short };
            let value = head.value(kind, 0, keep)?;
            match all.insert(key.clone(), value) {
                None => Ok(all),
                Some(_) => Err(Error::corrupt(at, format!("key {} occurs twice", quoted(&key)))),
            }
        })?;
        let alignment = match keys.get("general.alignment") {
            None => ALIGNMENT,
            Some(Value::Integer(n)) if (8..=1 << 20).contains(n) && n.count_ones() == 1 => {
                u64::try_from(*n).unwrap_or(ALIGNMENT)
            }
            Some(other) => {
                let what = format!("general.alignment is {other:?}, expected a power of two from 8 to 2^20");
                return Err(Error::corrupt(0, what));
            }
        };
        let parts = (0..tensors).map(|_| head.tensor()).collect::<Result<Vec<_>>>()?;
        let data = head.at.next_multiple_of(alignment);
        let tensors = place(parts, data, alignment, file.len())?;
        Ok(Self { keys, tensors })
    }
}

/// A header that is read.
struct Head<'a, R> {
    stream: BufReader<R>,
    at: u64,
    file: &'a InputFile,
    limits: &'a Limits,
}

impl<R: Read> Head<'_, R> {
    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        self.room(out.len() as u64)?;
        self.stream.read_exact(out).map_err(|e| Error::io(self.file.path(), e))?;
        self.at += out.len() as u64;
        Ok(())
    }

    /// Checks that so many bytes follow, before anything is done with their number.
    fn room(&self, bytes: u64) -> Result<()> {
        limits::check("bytes of a GGUF header", self.limits.header_bytes, self.at.saturating_add(bytes))?;
        if self.at.checked_add(bytes).is_none_or(|end| end > self.file.len()) {
            let left = self.file.len() - self.at;
            let what = format!(
                "the header goes on for {bytes} bytes here, but the file has {left}: it is cut off, fetch it again"
            );
            return Err(Error::corrupt(self.at, what));
        }
        Ok(())
    }

    fn skip(&mut self, bytes: u64) -> Result<()> {
        self.room(bytes)?;
        let skipped = std::io::copy(&mut self.stream.by_ref().take(bytes), &mut std::io::sink());
        let skipped = skipped.map_err(|e| Error::io(self.file.path(), e))?;
        self.at += skipped;
        if skipped == bytes {
            Ok(())
        } else {
            Err(Error::corrupt(self.at, "the file became shorter while it was read"))
        }
    }

    fn u32(&mut self) -> Result<u32> {
        let mut bytes = [0; 4];
        self.fill(&mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn u64(&mut self) -> Result<u64> {
        let mut bytes = [0; 8];
        self.fill(&mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn text(&mut self, most: u64) -> Result<String> {
        let (at, len) = (self.at, self.u64()?);
        self.room(len)?;
        limits::check("bytes of a name in a GGUF file", most, len)?;
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| Error::corrupt(at, "a name is not UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: u32, keep: Keep) -> Result<Value> {
        let at = self.at;
        let Some(size) = size(kind) else {
            return match kind {
                8 if depth > 0 => {
                    let len = self.u64()?;
                    self.skip(len).map(|()| Value::Other)
                }
                8 => {
                    let len = self.u64()?;
                    if keep == Keep::Short && len > self.limits.name_bytes {
                        return self.skip(len).map(|()| Value::Other);
                    }
                    Ok(self.long_text(len)?.map_or(Value::Other, Value::Text))
                }
                9 if depth < DEPTH => {
                    let (of, count) = (self.u32()?, self.u64()?);
                    if depth == 0 && keep == Keep::All && matches!(of, 5 | 6 | 8) && count <= TOKENS {
                        return self.list(of, count);
                    }
                    match size_of_all(of, count) {
                        Some(bytes) => self.skip(bytes)?,
                        // Every element takes at least its length, so that a count beyond the file soon ends.
                        None => (0..count).try_for_each(|_| self.value(of, depth + 1, Keep::Short).map(drop))?,
                    }
                    Ok(Value::Other)
                }
                9 => Err(Error::corrupt(at, format!("lists are nested deeper than {DEPTH}"))),
                other => Err(Error::corrupt(at, format!("a key has the unknown type {other}, expected 0 to 12"))),
            };
        };
        let mut bytes = [0; 8];
        self.fill(&mut bytes[..size])?;
        let unsigned = u64::from_le_bytes(bytes);
        let shift = 64 - 8 * u32::try_from(size).unwrap_or(8);
        let signed = (unsigned << shift).cast_signed() >> shift;
        Ok(match kind {
            0 | 2 | 4 | 10 => Value::Integer(unsigned.into()),
            1 | 3 | 5 | 11 => Value::Integer(signed.into()),
            6 => {
                let single = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                // The shortest number that is this single: 1e-5 and not 9.99999974e-6.
                Value::Float(single.to_string().parse().unwrap_or(f64::from(single)))
            }
            7 => Value::Bool(bytes[0] != 0),
            _ => Value::Float(f64::from_le_bytes(bytes)),
        })
    }

    /// A text of a length that was read; nothing where it is not UTF-8.
    fn long_text(&mut self, len: u64) -> Result<Option<String>> {
        self.room(len)?;
        let len = usize::try_from(len).map_err(|_| Error::corrupt(self.at, "a text is larger than memory"))?;
        let mut bytes = crate::error::try_zeroed(len, || "a text of a GGUF file".to_owned())?;
        self.fill(&mut bytes)?;
        Ok(String::from_utf8(bytes).ok())
    }

    /// The elements of a list of texts or of numbers of four bytes, as they come.
    fn list(&mut self, of: u32, count: u64) -> Result<Value> {
        let mut bytes = [0; 4];
        Ok(match of {
            8 => {
                let mut texts = Vec::new();
                for _ in 0..count {
                    let len = self.u64()?;
                    texts.push(self.long_text(len)?);
                }
                // A token that is no text would shift all that follow.
                texts.into_iter().collect::<Option<Vec<_>>>().map_or(Value::Other, Value::Texts)
            }
            5 => {
                let mut numbers = Vec::new();
                for _ in 0..count {
                    self.fill(&mut bytes)?;
                    numbers.push(i32::from_le_bytes(bytes));
                }
                Value::Integers(numbers)
            }
            _ => {
                let mut numbers = Vec::new();
                for _ in 0..count {
                    self.fill(&mut bytes)?;
                    numbers.push(f32::from_le_bytes(bytes));
                }
                Value::Floats(numbers)
            }
        })
    }

    /// A tensor, its place still that in the data.
    fn tensor(&mut self) -> Result<Tensor> {
        let at = self.at;
        let name = self.text(self.limits.name_bytes)?;
        let dims = self.u32()?;
        limits::check("dimensions of a tensor", self.limits.dims, dims.into())?;
        let mut shape = (0..dims).map(|_| self.u64()).collect::<Result<Vec<_>>>()?;
        shape.reverse();
        let id = self.u32()?;
        let offset = self.u64()?;
        let kind = Kind::of(id).ok_or_else(|| {
            Error::unsupported(format!(
                "tensor {} has type {id} of GGUF, which is not read, expected one of {}; convert the file with llama-quantize \
                 --allow-requantize, or give the checkpoint that it was made from",
                quoted(&name),
                Kind::names()
            ))
        })?;
        let cols = shape.last().copied().unwrap_or(1);
        let row = kind.row_bytes(cols).ok_or_else(|| {
            Error::corrupt(
                at,
                format!("tensor {} has rows of {cols} weights, which fill no whole blocks", quoted(&name)),
            )
        })?;
        Ok(Tensor { name, shape, kind, row, offset })
    }
}

/// Bytes of a value of a type of fixed size.
fn size(kind: u32) -> Option<usize> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

/// Bytes of a list of values of fixed size; more than any file has where they cannot be counted.
fn size_of_all(kind: u32, count: u64) -> Option<u64> {
    size(kind).map(|size| count.saturating_mul(size as u64))
}

/// Checks that the tensors fill the file from `data` on, one after another, and gives them their places in it.
fn place(mut tensors: Vec<Tensor>, data: u64, alignment: u64, len: u64) -> Result<Vec<Tensor>> {
    tensors.sort_by_key(|tensor| tensor.offset);
    let mut end = 0_u64;
    for tensor in &mut tensors {
        let name = quoted(&tensor.name);
        let wrong = |what: String| Err(Error::corrupt(data.saturating_add(tensor.offset), what));
        if tensor.offset != end.next_multiple_of(alignment) {
            let what = if tensor.offset < end { "overlaps the tensor before it" } else { "is not where that one ends" };
            return wrong(format!(
                "tensor {name} begins at offset {} and {what}, expected a multiple of {alignment} from {end} on",
                tensor.offset
            ));
        }
        let rows = tensor
            .shape
            .split_last()
            .map_or(Some(1), |(_, leading)| leading.iter().try_fold(1_u64, |product, &side| product.checked_mul(side)));
        let bytes = rows.and_then(|rows| rows.checked_mul(tensor.row));
        let until = bytes.and_then(|bytes| tensor.offset.checked_add(bytes)).and_then(|until| until.checked_add(data));
        let Some(until) = until.filter(|&until| until <= len) else {
            return wrong(format!(
                "tensor {name} of shape {:?} ends beyond the {len} bytes of the file: it is cut off, fetch it again",
                tensor.shape
            ));
        };
        end = until - data;
        tensor.offset += data;
    }
    Ok(tensors)
}
