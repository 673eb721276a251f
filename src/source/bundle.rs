//! A JSON bundle: `{"tensors": [{"name", "shape", "data", "dtype"?}, …], "activation_stats"?: {name: [numbers]}}`.
//!
//! `data` is one flat list in C order. `dtype` (F32 where absent) says what the numbers were, so that a bundle loses
//! nothing. Numbers go to a temporary file while they are parsed; in memory are the names and the statistics.
//!
//! Fields come in any order. A list whose `dtype` follows it is first taken for F32; if that was wrong, the file is
//! parsed once more, now knowing better.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::{self, Limits};
use crate::tensor::{DType, TensorInfo};

use super::json::{self, Failure};
use super::rows::{Order, Store};
use super::{Kind, Options, Source, SourceFile, SourceTensor, quoted};

mod number;
mod visit;

/// Opens the bundle at `path`.
pub(super) fn open(path: &Path, options: &Options) -> Result<Source> {
    let file = InputFile::open(path, options.access)?;
    let mut bundle = parse(&file, HashMap::new(), &options.limits)?;
    if !bundle.corrections.is_empty() {
        let known = std::mem::take(&mut bundle.corrections);
        bundle = parse(&file, known, &options.limits)?;
    }
    let spooled = bundle.out.into_inner().map_err(|e| Error::io(std::env::temp_dir(), e.into_error()))?;
    let spool = InputFile::from_file(path, spooled, options.access)?;
    let mut source = Source::new(Kind::JsonBundle, vec![SourceFile::new(file)], bundle.tensors);
    source.spool = Some(spool);
    source.activation_stats = bundle.stats;
    source.finish(&options.limits).map_err(|e| e.in_file(path))
}

/// Parses the whole file; `known` holds the dtypes of tensors whose field comes too late.
fn parse(file: &InputFile, known: HashMap<usize, DType>, limits: &Limits) -> Result<Bundle> {
    let mut bundle = Bundle::new(known, *limits)?;
    let result = json::parse(file.stream()?, limits, visit::Top(&mut bundle));
    let failure = std::mem::take(&mut bundle.failure);
    failure
        .or(result, |e| match json::lift_at(e, file) {
            Error::Corrupt { at, what } => Error::corrupt(at, bundle.place() + &what),
            other => other,
        })
        .map_err(|e| e.in_file(file.path()))?;
    Ok(bundle)
}

/// What was read of a bundle so far.
struct Bundle {
    limits: Limits,
    tensors: Vec<SourceTensor>,
    names: HashSet<String>,
    stats: BTreeMap<String, Vec<f32>>,
    out: BufWriter<File>,
    written: u64,
    known: HashMap<usize, DType>,
    corrections: HashMap<usize, DType>,
    failure: Failure,
    /// What the parser is in, for its errors.
    reading: String,
    /// Which number of a list that is, and what it is taken for.
    number: Option<(u64, DType)>,
}

/// A list of numbers in the temporary file.
#[derive(Debug, Clone, Copy)]
struct Spooled {
    offset: u64,
    count: u64,
    dtype: DType,
}

impl Bundle {
    fn new(known: HashMap<usize, DType>, limits: Limits) -> Result<Self> {
        let file = tempfile::tempfile().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        Ok(Self {
            limits,
            tensors: Vec::new(),
            names: HashSet::new(),
            stats: BTreeMap::new(),
            out: BufWriter::with_capacity(256 << 10, file),
            written: 0,
            known,
            corrections: HashMap::new(),
            failure: Failure::default(),
            reading: String::new(),
            number: None,
        })
    }

    /// What the parser was in when it stopped, to begin a message with.
    fn place(&self) -> String {
        match self.number {
            Some((index, dtype)) => format!("in {}, number {index} of 'data', taken for {dtype}: ", self.reading),
            None if self.reading.is_empty() => String::new(),
            None => format!("in {}: ", self.reading),
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes).map_err(|e| Error::io(std::env::temp_dir(), e))
    }

    /// Takes a tensor whose fields are all read.
    fn push(
        &mut self,
        name: Option<String>,
        shape: Option<Vec<u64>>,
        dtype: DType,
        data: Option<Spooled>,
    ) -> Result<()> {
        let index = self.tensors.len();
        let absent = |field: &str| {
            let what = match &name {
                Some(name) => format!("tensor {}", quoted(name)),
                None => format!("tensor number {index}"),
            };
            Error::invalid(format!("{what} has no '{field}', expected 'name', 'shape' and 'data'"))
        };
        let shape = shape.ok_or_else(|| absent("shape"))?;
        let data = data.ok_or_else(|| absent("data"))?;
        let name = name.clone().ok_or_else(|| absent("name"))?;
        let info = TensorInfo::within(&self.limits, name, dtype, shape)?;
        if info.elements() != data.count {
            return Err(Error::invalid(format!(
                "tensor {} has {} numbers in 'data', but its shape {:?} takes {}",
                quoted(info.name()),
                data.count,
                info.shape(),
                info.elements()
            )));
        }
        if !self.names.insert(info.name().to_owned()) {
            return Err(super::duplicate(info.name()));
        }
        if data.dtype != dtype {
            self.corrections.insert(index, dtype);
        }
        self.tensors.push(SourceTensor::new(info, Store::Spool, data.offset, Order::C));
        limits::check("tensors of a JSON bundle", self.limits.tensors, self.tensors.len() as u64)
    }
}
