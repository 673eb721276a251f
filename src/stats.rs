//! The statistics file: what flows into the linear layers of a model, as `tenpak calibrate` wrote it.
//!
//! It is safetensors; a weight `W` of `cols` inputs `x` has these tensors, of which only the first must be there:
//!
//! | tensor | dtype, shape | what |
//! |---|---|---|
//! | `W.mean_sq` | F32 `[cols]` | mean `x²` |
//! | `W.tokens` | I64 `[]` | how many vectors were seen; taken for many where it is missing |
//! | `W.second_moment` | F32 `[cols, cols]` | mean `x xᵀ` |
//! | `W.mean_abs` | F32 `[cols]` | mean `|x|`; the root of the mean square where it is missing |
//! | `W.fisher` | F64 `[]` | sum over the weights of the squared gradient of the loss |
//! | `W.fisher_rows`, `W.fisher_cols` | | for other uses; only their names are looked at |
//!
//! Opening validates and indexes: whoever asks later gets moments for a name, or nothing. Second moments stay on disk
//! until they are asked for. The `activation_stats` of a JSON bundle are the same thing: mean squares by name.

use std::collections::BTreeMap;
use std::path::Path;

use crate::error::{Error, Result};
use crate::source::{self, Source};
use crate::tensor::{DType, to_f32};

/// The ends of the names, longest first where one ends in another.
const KINDS: [&str; 7] = ["mean_sq", "tokens", "second_moment", "mean_abs", "fisher", "fisher_rows", "fisher_cols"];

/// Statistics of the inputs of linear layers, by the names of their weights.
#[derive(Debug)]
pub struct Stats {
    /// What they are called in messages.
    name: String,
    source: Option<Source>,
    weights: BTreeMap<String, Weight>,
}

/// What is known of the inputs of one weight.
#[derive(Debug, Default)]
struct Weight {
    mean_sq: Vec<f32>,
    tokens: Option<u64>,
    /// The number of the tensor in the file.
    second_moment: Option<usize>,
    /// The same.
    mean_abs: Option<usize>,
    fisher: Option<f64>,
}

/// The moments of the inputs of one weight.
#[derive(Debug, Clone, Copy)]
pub struct Moments<'a> {
    stats: &'a Stats,
    name: &'a str,
    weight: &'a Weight,
}

impl Stats {
    /// Opens a statistics file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Corrupt`] as for any safetensors file; [`Error::Invalid`] naming the tensor where
    /// one is not a statistic, or has another dtype or shape, or a number that is negative or not finite.
    pub fn open(path: &Path, options: &source::Options) -> Result<Self> {
        let source = source::plain_safetensors(path, options)?;
        let weights = index(&source).map_err(|e| e.in_file(path))?;
        Ok(Self { name: path.display().to_string(), source: Some(source), weights })
    }

    /// The `activation_stats` of a JSON bundle, taken for mean squares; nothing where it has none.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the tensor where a number is negative.
    pub fn of_bundle(source: &Source) -> Result<Option<Self>> {
        let given = source.activation_stats();
        let mut weights = BTreeMap::new();
        for (name, numbers) in given {
            check(&format!("activation_stats of '{name}'"), numbers)?;
            weights.insert(name.clone(), Weight { mean_sq: numbers.clone(), ..Weight::default() });
        }
        let name = "activation_stats of the bundle".to_owned();
        Ok((!given.is_empty()).then_some(Self { name, source: None, weights }))
    }

    /// What the statistics are called in messages: the path, or what they came with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file, where the statistics have one of their own.
    pub fn file(&self) -> Option<&source::SourceFile> {
        self.source.as_ref().and_then(|source| source.files().first())
    }

    /// Whether any weight has a second moment.
    #[must_use]
    pub fn has_second_moments(&self) -> bool {
        self.weights.values().any(|weight| weight.second_moment.is_some())
    }

    /// Whether any weight has squared gradients.
    #[must_use]
    pub fn has_gradients(&self) -> bool {
        self.weights.values().any(|weight| weight.fisher.is_some())
    }

    /// The moments of the inputs of a weight; nothing where it is not in the file, or where none were seen: an expert
    /// that no token was sent to.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Moments<'_>> {
        let (name, weight) = self.weights.get_key_value(name)?;
        (weight.tokens != Some(0)).then_some(Moments { stats: self, name, weight })
    }
}

impl Moments<'_> {
    /// The mean square of every input.
    #[must_use]
    pub fn mean_sq(&self) -> &[f32] {
        &self.weight.mean_sq
    }

    /// The sum over the weights of the squared gradient of the loss, where that was calibrated.
    #[must_use]
    pub fn fisher(&self) -> Option<f64> {
        self.weight.fisher
    }

    /// Whether the second moment is there.
    #[must_use]
    pub fn has_second_moment(&self) -> bool {
        self.weight.second_moment.is_some()
    }

    /// Reads the second moment, row by row; nothing where there is none.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::OutOfMemory`].
    pub fn second_moment(&self) -> Result<Option<Vec<f32>>> {
        let (Some(source), Some(index)) = (&self.stats.source, self.weight.second_moment) else { return Ok(None) };
        let what = || format!("the second moment of '{}'", self.name);
        read(source, index, what).map(Some).map_err(|e| e.in_file(&self.stats.name))
    }

    /// Reads the mean magnitude of every input; the root of its mean square where that is not in the file.
    ///
    /// # Errors
    /// [`Error::Io`] when the file cannot be read, [`Error::Invalid`] when a number is negative or not finite.
    pub fn mean_abs(&self) -> Result<Vec<f32>> {
        let (Some(source), Some(index)) = (&self.stats.source, self.weight.mean_abs) else {
            return Ok(self.weight.mean_sq.iter().map(|m| m.sqrt()).collect());
        };
        let what = || format!("'{}.mean_abs'", self.name);
        let numbers = read(source, index, what).and_then(|n| check(&what(), &n).map(|()| n));
        numbers.map_err(|e| e.in_file(&self.stats.name))
    }

    /// Refuses moments of other inputs than those of a matrix of `cols` columns.
    ///
    /// # Errors
    /// [`Error::Invalid`] naming the weight and both numbers.
    pub fn check_cols(&self, cols: u64) -> Result<()> {
        let found = self.weight.mean_sq.len();
        if found as u64 == cols {
            return Ok(());
        }
        Err(Error::invalid(format!(
            "{} has statistics of {found} inputs for '{}', which has {cols}; calibrate this model",
            self.stats.name, self.name
        )))
    }
}

/// Sorts the tensors of a file by the weights that they are of.
fn index(source: &Source) -> Result<BTreeMap<String, Weight>> {
    let mut weights: BTreeMap<String, Weight> = BTreeMap::new();
    let mut others = Vec::new();
    for (index, tensor) in source.tensors().iter().enumerate() {
        let info = tensor.info();
        let (name, kind) = info.name().rsplit_once('.').filter(|(_, kind)| KINDS.contains(kind)).ok_or_else(|| {
            Error::invalid(format!("tensor '{}' is no statistic, expected a file of tenpak calibrate", info.name()))
        })?;
        let wrong = |expected: &str| {
            Error::invalid(format!(
                "tensor '{}' is {} of shape {:?}, expected {expected}",
                info.name(),
                info.dtype(),
                info.shape()
            ))
        };
        match kind {
            "mean_sq" => {
                if info.dtype() != DType::F32 || info.shape().len() != 1 {
                    return Err(wrong("F32 of one dimension"));
                }
                let mean_sq = read(source, index, || format!("'{}'", info.name()))?;
                check(&format!("tensor '{}'", info.name()), &mean_sq)?;
                weights.entry(name.to_owned()).or_default().mean_sq = mean_sq;
            }
            "tokens" => {
                if info.dtype() != DType::I64 || !info.shape().is_empty() {
                    return Err(wrong("I64 without dimensions"));
                }
                let bytes: [u8; 8] = source.read_bytes(index, 0, 8)?[..].try_into().expect("one element");
                let tokens = u64::try_from(i64::from_le_bytes(bytes)).map_err(|_| wrong("a number from 0 up"))?;
                others.push((name.to_owned(), info.name(), Weight { tokens: Some(tokens), ..Weight::default() }));
            }
            "fisher" => {
                if info.dtype() != DType::F64 || !info.shape().is_empty() {
                    return Err(wrong("F64 without dimensions"));
                }
                let bytes: [u8; 8] = source.read_bytes(index, 0, 8)?[..].try_into().expect("one element");
                let sum = f64::from_le_bytes(bytes);
                if !(sum.is_finite() && sum >= 0.0) {
                    return Err(wrong("a finite sum of squares"));
                }
                others.push((name.to_owned(), info.name(), Weight { fisher: Some(sum), ..Weight::default() }));
            }
            "second_moment" => {
                let [rows, cols] = *info.shape() else { return Err(wrong("F32 of two equal dimensions")) };
                if info.dtype() != DType::F32 || rows != cols {
                    return Err(wrong("F32 of two equal dimensions"));
                }
                let weight = Weight { second_moment: Some(index), ..Weight::default() };
                others.push((name.to_owned(), info.name(), weight));
            }
            "mean_abs" => {
                if info.dtype() != DType::F32 || info.shape().len() != 1 {
                    return Err(wrong("F32 of one dimension"));
                }
                let weight = Weight { mean_abs: Some(index), ..Weight::default() };
                others.push((name.to_owned(), info.name(), weight));
            }
            _ => {}
        }
    }
    for (name, tensor, part) in others {
        let weight = weights.get_mut(&name).ok_or_else(|| {
            Error::invalid(format!("there is a tensor '{tensor}', but no '{name}.mean_sq'; calibrate again"))
        })?;
        if let Some(index) = part.second_moment {
            let cols = source.tensors()[index].info().shape()[0];
            if cols != weight.mean_sq.len() as u64 {
                return Err(Error::invalid(format!(
                    "tensor '{tensor}' is of {cols} inputs, but '{name}.mean_sq' of {}; calibrate again",
                    weight.mean_sq.len()
                )));
            }
            weight.second_moment = Some(index);
        }
        if let Some(index) = part.mean_abs {
            let cols = source.tensors()[index].info().shape()[0];
            if cols != weight.mean_sq.len() as u64 {
                return Err(Error::invalid(format!(
                    "tensor '{tensor}' is of {cols} inputs, but '{name}.mean_sq' of {}; calibrate again",
                    weight.mean_sq.len()
                )));
            }
            weight.mean_abs = Some(index);
        }
        weight.tokens = part.tokens.or(weight.tokens);
        weight.fisher = part.fisher.or(weight.fisher);
    }
    Ok(weights)
}

/// Reads a tensor of F32.
fn read(source: &Source, index: usize, what: impl FnOnce() -> String) -> Result<Vec<f32>> {
    let info = source.tensors()[index].info();
    let too_large = || Error::invalid(format!("tensor '{}' is larger than memory", info.name()));
    let elements = usize::try_from(info.elements()).map_err(|_| too_large())?;
    let mut numbers = Vec::new();
    if numbers.try_reserve_exact(elements).is_err() {
        return Err(Error::OutOfMemory { what: what(), bytes: info.bytes() });
    }
    numbers.resize(elements, 0.0);
    // In parts, so that no second copy of a large tensor is in memory.
    const PART: usize = 1 << 20;
    for (part, out) in numbers.chunks_mut(PART).enumerate() {
        let bytes = source.read_bytes(index, (part * PART * 4) as u64, out.len() as u64 * 4)?;
        to_f32(DType::F32, &bytes, out);
    }
    Ok(numbers)
}

/// Refuses numbers that are no means of squares.
fn check(what: &str, numbers: &[f32]) -> Result<()> {
    match numbers.iter().position(|x| !(x.is_finite() && *x >= 0.0)) {
        Some(at) => Err(Error::invalid(format!(
            "number {at} of {what} is {}, expected a finite mean of squares; calibrate again",
            numbers[at]
        ))),
        None => Ok(()),
    }
}
