//! One `.safetensors` file: a length, a JSON header, and the tensors back to back up to the file's end.
//!
//! ```text
//! u64 length | {"__metadata__": {…}, name: {"dtype", "shape", "data_offsets": [begin, end]}, …} | data
//! ```
//!
//! The header is read here rather than by the `safetensors` crate, which keeps the last of two tensors of one name,
//! buffers every field before it looks at the limits, and cannot say which tensor is wrong. Its rules are kept: offsets
//! leave no hole and do not overlap, each tensor is as long as its shape says, and the data ends where the file does.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::de::{DeserializeSeed, IgnoredAny, MapAccess, Visitor};

use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::{self, Limits};
use crate::tensor::{DType, TensorInfo};

use super::json::{self, Failure, Shape, once};
use super::rows::{Order, Store};
use super::{Kind, Options, Source, SourceFile, SourceTensor, directory, duplicate, quoted};

/// Bytes of the length before the header.
const LENGTH_BYTES: u64 = 8;

/// Opens the file at `path`, with the `config.json` beside it.
pub(super) fn open(path: &Path, options: &Options) -> Result<Source> {
    let file = InputFile::open(path, options.access)?;
    let header = read_header(&file, 0, &options.limits).map_err(|e| e.in_file(path))?;
    let mut source = Source::new(Kind::Safetensors, vec![SourceFile::new(file)], header.tensors);
    source.metadata = header.metadata;
    let parent = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    source.config = directory::read_config(parent, &options.limits)?;
    source.finish(&options.limits).map_err(|e| e.in_file(path))
}

/// Opens the file at `path` as nothing but named tensors: whatever lies beside it, none of them is a weight.
pub(crate) fn plain(path: &Path, options: &Options) -> Result<Source> {
    let file = InputFile::open(path, options.access)?;
    let header = read_header(&file, 0, &options.limits).map_err(|e| e.in_file(path))?;
    let mut source = Source::new(Kind::Safetensors, vec![SourceFile::new(file)], header.tensors);
    source.metadata = header.metadata;
    Ok(source)
}

/// What a header says, checked.
#[derive(Debug, Default)]
pub(super) struct Header {
    /// The tensors, by offset.
    pub(super) tensors: Vec<SourceTensor>,
    /// `__metadata__`.
    pub(super) metadata: BTreeMap<String, String>,
}

/// Reads and checks the header of `file`, which is number `store` of its source.
pub(super) fn read_header(file: &InputFile, store: usize, limits: &Limits) -> Result<Header> {
    if file.len() < LENGTH_BYTES {
        return Err(Error::corrupt(
            0,
            format!("a safetensors file has at least {LENGTH_BYTES} bytes, this one {}: fetch it again", file.len()),
        ));
    }
    let mut length = [0; 8];
    file.read_into(0, &mut length)?;
    let length = u64::from_le_bytes(length);
    if length > file.len() - LENGTH_BYTES {
        return Err(Error::corrupt(
            0,
            format!(
                "the header is said to have {length} bytes, but the file has {} after its length: it is cut off or not a \
                 safetensors file",
                file.len() - LENGTH_BYTES
            ),
        ));
    }
    limits::check("bytes of a safetensors header", limits.header_bytes, length)?;
    let too_large = || Error::corrupt(0, format!("a header of {length} bytes exceeds the address space"));
    let block = file.read(0, usize::try_from(LENGTH_BYTES + length).map_err(|_| too_large())?)?;
    let text = &block[8..];
    if text.first() != Some(&b'{') {
        return Err(Error::corrupt(LENGTH_BYTES, "the header does not begin with '{': this is not a safetensors file"));
    }

    let (mut header, mut failure) = (Parsed::default(), Failure::default());
    let result = json::parse(text, limits, Tensors { header: &mut header, failure: &mut failure, limits });
    failure.or(result, |e| {
        let at = json::byte_of(text, e.line(), e.column()).unwrap_or(0);
        json::lift(e, file.path(), LENGTH_BYTES + at)
    })?;
    let data = LENGTH_BYTES + length;
    let tensors = place(header.tensors, data, file.len() - data, store)?;
    file.observe(0, &block);
    Ok(Header { tensors, metadata: header.metadata })
}

/// Checks that the tensors fill the `available` bytes from `data` on, one after another.
fn place(
    mut entries: Vec<(TensorInfo, [u64; 2])>,
    data: u64,
    available: u64,
    store: usize,
) -> Result<Vec<SourceTensor>> {
    entries.sort_by_key(|&(_, offsets)| offsets);
    let mut end_of_last = 0;
    let mut tensors = Vec::with_capacity(entries.len());
    for (info, [begin, end]) in entries {
        let wrong = |what: String| Err(Error::corrupt(data.saturating_add(begin), what));
        let name = quoted(info.name());
        if begin != end_of_last {
            let what = if begin < end_of_last { "overlaps the tensor before it" } else { "leaves a hole before it" };
            return wrong(format!("tensor {name} begins at offset {begin} and {what}, expected offset {end_of_last}"));
        }
        if end < begin || end - begin != info.bytes() {
            return wrong(format!(
                "tensor {name} lies at offsets {begin} to {end}, but its shape {:?} of {} takes {} bytes",
                info.shape(),
                info.dtype(),
                info.bytes()
            ));
        }
        if end > available {
            return wrong(format!(
                "tensor {name} ends at offset {end}, but the file has {available} bytes of data: it is cut off, fetch it \
                 again"
            ));
        }
        end_of_last = end;
        tensors.push(SourceTensor::new(info, Store::File(store), data + begin, Order::C));
    }
    if end_of_last != available {
        return Err(Error::corrupt(
            data + end_of_last,
            format!("{} bytes follow the last tensor, expected the end of the file", available - end_of_last),
        ));
    }
    Ok(tensors)
}

/// The header as it stands in the file.
#[derive(Default)]
struct Parsed {
    tensors: Vec<(TensorInfo, [u64; 2])>,
    metadata: BTreeMap<String, String>,
}

/// Reads the header's outer object.
struct Tensors<'a> {
    header: &'a mut Parsed,
    failure: &'a mut Failure,
    limits: &'a Limits,
}

impl<'de> DeserializeSeed<'de> for Tensors<'_> {
    type Value = ();

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<(), D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tensors<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors by name")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut names = HashSet::new();
        while let Some(name) = map.next_key::<String>()? {
            if !names.insert(name.clone()) {
                return Err(self.failure.stop(duplicate(&name)));
            }
            if name == "__metadata__" {
                self.header.metadata = map.next_value::<Option<BTreeMap<String, String>>>()?.unwrap_or_default();
                continue;
            }
            let entry = map.next_value_seed(EntrySeed(self.limits))?;
            match entry.check(name, self.limits) {
                Ok(tensor) => self.header.tensors.push(tensor),
                Err(e) => return Err(self.failure.stop(e)),
            }
            let count = self.header.tensors.len() as u64;
            if let Err(e) = limits::check("tensors of a safetensors file", self.limits.tensors, count) {
                return Err(self.failure.stop(e));
            }
        }
        Ok(())
    }
}

/// The fields of one tensor, as they stand in the header.
#[derive(Default)]
struct Entry {
    dtype: Option<String>,
    shape: Option<Vec<u64>>,
    offsets: Option<[u64; 2]>,
}

impl Entry {
    fn check(self, name: String, limits: &Limits) -> Result<(TensorInfo, [u64; 2])> {
        let (Some(dtype), Some(shape), Some(offsets)) = (self.dtype, self.shape, self.offsets) else {
            let name = quoted(&name);
            return Err(Error::corrupt(
                LENGTH_BYTES,
                format!("tensor {name} lacks one of 'dtype', 'shape' and 'data_offsets' in the header"),
            ));
        };
        let known = DType::ALL.iter().copied().find(|d| d.name() == dtype);
        let Some(dtype) = known else { return Err(unknown_dtype(&name, &dtype)) };
        Ok((TensorInfo::within(limits, name, dtype, shape)?, offsets))
    }
}

/// The error of a dtype that is not read.
fn unknown_dtype(name: &str, dtype: &str) -> Error {
    let known: Vec<_> = DType::ALL.iter().map(|d| d.name()).collect();
    Error::unsupported(format!(
        "tensor {} has dtype {}, which is not read; convert it to one of {}",
        quoted(name),
        quoted(dtype),
        known.join(", ")
    ))
}

/// Reads the fields of one tensor.
struct EntrySeed<'a>(&'a Limits);

impl<'de> DeserializeSeed<'de> for EntrySeed<'_> {
    type Value = Entry;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Entry, D::Error> {
        json.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for EntrySeed<'_> {
    type Value = Entry;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with 'dtype', 'shape' and 'data_offsets'")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entry, A::Error> {
        let mut entry = Entry::default();
        while let Some(field) = map.next_key::<String>()? {
            match field.as_str() {
                "dtype" => once(&mut entry.dtype, "dtype", map.next_value()?)?,
                "shape" => once(&mut entry.shape, "shape", map.next_value_seed(Shape(self.0))?)?,
                "data_offsets" => once(&mut entry.offsets, "data_offsets", map.next_value()?)?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(entry)
    }
}
