//! What two models differ in, tensor by tensor: artifacts or checkpoints in, distances out, nothing decoded twice.
//!
//! Tensors are matched by name. What both artifacts hold in the same bytes is not read at all: their digests say so.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rayon::prelude::*;

use crate::artifact::{ArtifactFile, HEADER_FILE, MAGIC};
use crate::compress::{BLOCK_BYTES, OnProgress, Progress};
use crate::error::{Error, Result};
use crate::file::{Access, InputFile};
use crate::limits::Limits;
use crate::location::{self, Kind};
use crate::measure::Distance;
use crate::source::{self, Source};
use crate::tensor::{self, TensorInfo};

/// An artifact or a checkpoint.
#[derive(Debug)]
pub enum Model {
    /// Planes.
    Artifact(Box<ArtifactFile>),
    /// Tensors.
    Source(Box<Source>),
}

impl Model {
    /// Opens what lies under a path.
    ///
    /// # Errors
    /// Those of [`ArtifactFile::open_with`] and [`source::open`].
    pub fn open(path: &Path, access: Access, limits: &Limits) -> Result<Self> {
        let path = &*location::resolved(path)?;
        let begins = || -> Result<bool> {
            let mut start = [0; MAGIC.len()];
            let file = InputFile::open(path, Access::Read)?;
            Ok(file.len() >= MAGIC.len() as u64 && file.read_into(0, &mut start).map(|()| start == MAGIC)?)
        };
        let named = path.extension().is_some_and(|e| e.eq_ignore_ascii_case("tenpak"));
        let is_artifact = match location::found(path)? {
            _ if named => true,
            Some(Kind::Directory) => location::found(&path.join(HEADER_FILE))? == Some(Kind::File),
            Some(Kind::File) => begins()?,
            None => false,
        };
        if is_artifact {
            return ArtifactFile::open_with(path, access, limits).map(|artifact| Self::Artifact(Box::new(artifact)));
        }
        source::open(path, &source::Options { access, limits: *limits }).map(|source| Self::Source(Box::new(source)))
    }

    fn infos(&self) -> Vec<&TensorInfo> {
        match self {
            Self::Artifact(artifact) => artifact.tensors().iter().map(|entry| entry.info()).collect(),
            Self::Source(source) => source.tensors().iter().map(|tensor| tensor.info()).collect(),
        }
    }

    /// The codec of a tensor; that of a checkpoint has none.
    fn codec(&self, index: usize) -> Option<&'static str> {
        match self {
            Self::Artifact(artifact) => Some(artifact.tensors()[index].codec().id),
            Self::Source(_) => None,
        }
    }

    fn metadata(&self) -> &BTreeMap<String, String> {
        match self {
            Self::Artifact(artifact) => artifact.header().metadata(),
            Self::Source(source) => source.metadata(),
        }
    }

    /// Rows and columns as products see them, and whether they are those of the tensor turned around.
    fn matrix(&self, index: usize) -> (u64, u64, bool) {
        match self {
            Self::Artifact(artifact) => {
                let entry = &artifact.tensors()[index];
                (entry.matrix().0, entry.matrix().1, entry.transposed())
            }
            Self::Source(source) => {
                let tensor = &source.tensors()[index];
                (tensor.matrix().0, tensor.matrix().1, tensor.transposed())
            }
        }
    }

    /// Rows of the matrix from `first` on, decoded.
    fn rows(&self, index: usize, first: u64, out: &mut [f32], cols: u64) -> Result<()> {
        match self {
            Self::Artifact(artifact) => artifact.decode_rows(index, first, out),
            Self::Source(source) => {
                let bytes = source.read_rows(index, first, out.len() as u64 / cols.max(1))?;
                tensor::to_f32(source.tensors()[index].info().dtype(), &bytes, out);
                Ok(())
            }
        }
    }

    /// Bytes of a tensor that is no float.
    fn bytes(&self, index: usize, start: u64, bytes: u64) -> Result<crate::file::Block> {
        match self {
            Self::Artifact(artifact) => artifact.range(index, 0, start, bytes),
            Self::Source(source) => source.read_bytes(index, start, bytes),
        }
    }
}

/// What a tensor differs in.
#[derive(Debug, Clone, PartialEq)]
pub enum Difference {
    /// Every weight is the same.
    Same,
    /// Weights differ, so far.
    Values(Distance),
    /// Integers or booleans differ.
    Bytes,
    /// Shapes differ, or one is floating-point and the other is not.
    Shape,
    /// Only the first model has it.
    OnlyFirst,
    /// Only the second model has it.
    OnlySecond,
}

/// One side of a tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Side {
    /// Name, dtype and shape.
    pub info: TensorInfo,
    /// The codec, of a tensor of an artifact.
    pub codec: Option<&'static str>,
}

/// A tensor in both models, or in one.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// In the first model.
    pub first: Option<Side>,
    /// In the second model.
    pub second: Option<Side>,
    /// What differs.
    pub difference: Difference,
}

/// All that differs.
#[derive(Debug, Clone, PartialEq)]
pub struct Differences {
    /// Every tensor, in the order of the first model, then those of the second alone.
    pub tensors: Vec<Tensor>,
    /// Keys of the metadata whose texts differ, or that only one model has.
    pub metadata: Vec<String>,
}

impl Differences {
    /// Whether every tensor is the same and has the same dtype and codec, and metadata agree.
    #[must_use]
    pub fn none(&self) -> bool {
        self.metadata.is_empty() && self.tensors.iter().all(|t| t.difference == Difference::Same && t.first == t.second)
    }
}

/// Compares two models. The squares of the first are what distances are relative to.
///
/// # Errors
/// [`Error::Invalid`] for a delta; those of reading; and whatever `on_progress` returns.
pub fn compare(first: &Model, second: &Model, on_progress: &mut OnProgress<'_>) -> Result<Differences> {
    for model in [first, second] {
        if let Model::Artifact(artifact) = model {
            artifact.refuse_delta()?;
        }
    }
    let (ours, theirs) = (first.infos(), second.infos());
    let places: HashMap<&str, usize> = theirs.iter().enumerate().map(|(i, info)| (info.name(), i)).collect();
    let side = |model: &Model, info: &TensorInfo, index| Side { info: info.clone(), codec: model.codec(index) };
    let total = ours.iter().map(|info| info.bytes()).sum();
    let (mut done, mut tensors) = (0, Vec::with_capacity(ours.len()));
    for (index, info) in ours.iter().enumerate() {
        let other = places.get(info.name()).copied();
        let difference = match other {
            None => Difference::OnlyFirst,
            Some(other) => one((first, index), (second, other), &mut || {
                on_progress(Progress { done, total, tensor: info.name() })
            })?,
        };
        done += info.bytes();
        on_progress(Progress { done, total, tensor: info.name() })?;
        let second = other.map(|other| side(second, theirs[other], other));
        tensors.push(Tensor { first: Some(side(first, info, index)), second, difference });
    }
    let known: HashMap<&str, ()> = ours.iter().map(|info| (info.name(), ())).collect();
    for (index, info) in theirs.iter().enumerate().filter(|(_, info)| !known.contains_key(info.name())) {
        let second = Some(side(second, info, index));
        tensors.push(Tensor { first: None, second, difference: Difference::OnlySecond });
    }
    let (a, b) = (first.metadata(), second.metadata());
    let mut metadata: Vec<String> =
        a.keys().chain(b.keys()).filter(|key| a.get(*key) != b.get(*key)).cloned().collect();
    metadata.sort();
    metadata.dedup();
    Ok(Differences { tensors, metadata })
}

/// What one tensor differs in.
fn one(first: (&Model, usize), second: (&Model, usize), tick: &mut dyn FnMut() -> Result<()>) -> Result<Difference> {
    let ((a, i), (b, j)) = (first, second);
    if let (Model::Artifact(a), Model::Artifact(b)) = (a, b)
        && a.tensors()[i].same_content(&b.tensors()[j])
    {
        return Ok(Difference::Same);
    }
    let (own, other) = (a.infos()[i].clone(), b.infos()[j].clone());
    let (rows, cols, transposed) = a.matrix(i);
    let comparable = own.dtype().is_float() == other.dtype().is_float();
    if own.shape() != other.shape() || !comparable || b.matrix(j) != (rows, cols, transposed) {
        return Ok(Difference::Shape);
    }
    if !own.dtype().is_float() {
        if own.dtype() != other.dtype() {
            return Ok(Difference::Shape);
        }
        let mut at = 0;
        while at < own.bytes() {
            let n = BLOCK_BYTES.min(own.bytes() - at);
            if *a.bytes(i, at, n)? != *b.bytes(j, at, n)? {
                return Ok(Difference::Bytes);
            }
            at += n;
            tick()?;
        }
        return Ok(Difference::Same);
    }
    let width = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
    let block = (BLOCK_BYTES / 4 / cols.max(1)).max(1);
    let (mut distance, mut at) = (Distance::default(), 0);
    let (mut x, mut y) = (Vec::new(), Vec::new());
    // Weights that are not numbers are the same where their bits are.
    let mut odd = false;
    while at < rows && cols > 0 {
        let count = usize::try_from(block.min(rows - at)).expect("a block fits memory");
        x.resize(count * width, 0.0);
        y.resize(count * width, 0.0);
        a.rows(i, at, &mut x, cols)?;
        b.rows(j, at, &mut y, cols)?;
        for (x, y) in x.iter_mut().zip(&mut y).filter(|(x, y)| !(x.is_finite() && y.is_finite())) {
            odd |= x.to_bits() != y.to_bits();
            (*x, *y) = (0.0, 0.0);
        }
        let parts: Vec<Distance> =
            x.par_chunks(PART).zip(y.par_chunks(PART)).map(|(x, y)| Distance::between(x, y)).collect();
        parts.iter().for_each(|part| distance.merge(part));
        at += count as u64;
        tick()?;
    }
    Ok(match distance.noise > 0.0 {
        true => Difference::Values(distance),
        false if odd => Difference::Bytes,
        false => Difference::Same,
    })
}

/// Weights that one task compares.
const PART: usize = 1 << 16;
