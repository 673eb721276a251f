//! The tensors that quantized matrices consist of: found by the module's name, checked, and put together.

use std::collections::HashMap;

use super::super::{Source, SourceTensor, quoted};
use super::{Packed, Scheme};
use crate::error::{Error, Result};
use crate::tensor::{DType, TensorInfo};

/// The dtypes of scales and offsets.
pub(super) const FLOATS: &[DType] = &[DType::F16, DType::BF16, DType::F32];

/// What becomes of a tensor of the checkpoint.
#[derive(Debug, Clone)]
enum Fate {
    /// It is a tensor of the model.
    Stays,
    /// It is a part of a matrix.
    Part,
    /// The matrix stands in its place.
    Matrix(SourceTensor),
}

/// The tensors of a checkpoint, by name.
pub(super) struct Parts<'s> {
    pub source: &'s Source,
    places: HashMap<&'s str, usize>,
    fates: Vec<Fate>,
}

/// What became of the tensors.
pub(super) struct Understood(Vec<Fate>);

impl<'s> Parts<'s> {
    pub fn new(source: &'s Source) -> Self {
        let places = source.tensors.iter().enumerate().map(|(i, t)| (t.info().name(), i)).collect();
        Self { source, places, fates: vec![Fate::Stays; source.tensors.len()] }
    }

    /// The names of modules that have a tensor with this end, in the order of the checkpoint.
    pub fn modules(&self, end: &str) -> Vec<&'s str> {
        let names = self.source.tensors.iter().map(|t| t.info().name());
        names.filter_map(|name| name.strip_suffix(end)).filter(|module| !module.is_empty()).collect()
    }

    /// A tensor of a module, where there is one.
    pub fn find(&self, module: &str, end: &str) -> Option<&'s SourceTensor> {
        self.places.get(&*format!("{module}{end}")).map(|&index| &self.source.tensors[index])
    }

    /// A tensor of a module.
    pub fn need(&self, module: &str, end: &str) -> Result<&'s SourceTensor> {
        self.find(module, end).ok_or_else(|| {
            let (name, matrix) = (format!("{module}{end}"), format!("{module}.weight"));
            Error::invalid(format!(
                "tensor {} is missing, a part of the quantized matrix {}; fetch the checkpoint again",
                quoted(&name),
                quoted(&matrix)
            ))
        })
    }

    /// Says that these tensors of a module are parts of the matrix `info`, the first one's place being the matrix's.
    pub fn put(&mut self, module: &str, ends: &[&str], info: TensorInfo, packed: Packed) {
        let mut packed = Some((info, packed));
        for end in ends {
            let Some(&index) = self.places.get(&*format!("{module}{end}")) else { continue };
            self.fates[index] = match packed.take() {
                Some((info, packed)) => Fate::Matrix(self.source.tensors[index].packed_as(info, packed)),
                None => Fate::Part,
            };
        }
    }

    /// Says that a tensor of a module is a part of what stands elsewhere.
    pub fn drop(&mut self, module: &str, end: &str) {
        if let Some(&index) = self.places.get(&*format!("{module}{end}")) {
            self.fates[index] = Fate::Part;
        }
    }

    /// What has become of all tensors.
    pub fn understood(self) -> Understood {
        Understood(self.fates)
    }
}

impl Understood {
    /// Puts matrices in the place of their parts.
    pub fn apply(self, source: &mut Source) {
        let tensors = std::mem::take(&mut source.tensors);
        source.tensors = tensors
            .into_iter()
            .zip(self.0)
            .filter_map(|(tensor, fate)| match fate {
                Fate::Stays => Some(tensor),
                Fate::Part => None,
                Fate::Matrix(matrix) => Some(matrix),
            })
            .collect();
    }
}

/// Checks that a tensor has one of these dtypes, and this shape.
pub(super) fn check(tensor: &SourceTensor, dtypes: &[DType], shape: &[u64]) -> Result<()> {
    let info = tensor.info();
    if dtypes.contains(&info.dtype()) && info.shape() == shape {
        return Ok(());
    }
    let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
    Err(Error::invalid(format!(
        "tensor {} is {} of shape {:?}, expected {} of shape {shape:?} beside the other parts of its matrix; fetch the \
         checkpoint again, or quantize the model anew",
        quoted(info.name()),
        info.dtype(),
        info.shape(),
        names.join(" or ")
    )))
}

/// The two sides of a tensor that must be a matrix of one of these dtypes.
pub(super) fn sides(tensor: &SourceTensor, dtypes: &[DType]) -> Result<[u64; 2]> {
    let info = tensor.info();
    match info.shape() {
        &[rows, cols] if dtypes.contains(&info.dtype()) && rows > 0 && cols > 0 => Ok([rows, cols]),
        shape => {
            let names: Vec<_> = dtypes.iter().map(|dtype| dtype.name()).collect();
            Err(Error::invalid(format!(
                "tensor {} is {} of shape {shape:?}, expected a matrix of {}; fetch the checkpoint again, or quantize the model anew",
                quoted(info.name()),
                info.dtype(),
                names.join(" or ")
            )))
        }
    }
}

/// The error of a matrix whose parts cannot be put together.
pub(super) fn wrong(module: &str, what: impl std::fmt::Display) -> Error {
    let name = format!("{module}.weight");
    Error::invalid(format!("quantized matrix {}: {what}; quantize the model anew", quoted(&name)))
}

/// The group of a matrix of `cols` columns in `groups` groups, which the config calls `said`.
pub(super) fn group(module: &str, cols: u64, groups: u64, said: &[i64]) -> Result<usize> {
    if groups == 1 && (said.is_empty() || said.iter().any(|&size| size <= 0)) {
        return Ok(crate::layout::ROW);
    }
    let fits = |size: i64| u64::try_from(size).is_ok_and(|size| size > 0 && cols.div_ceil(size) == groups);
    if let Some(&size) = said.iter().find(|&&size| fits(size)) {
        return usize::try_from(size).map_err(|_| wrong(module, "its groups are longer than memory"));
    }
    if groups > 0 && cols.is_multiple_of(groups) && said.is_empty() {
        return usize::try_from(cols / groups).map_err(|_| wrong(module, "its groups are longer than memory"));
    }
    Err(wrong(
        module,
        format!("its {cols} columns have scales of {groups} groups, but the config says groups of {said:?}"),
    ))
}

/// The logical tensor of a module.
pub(super) fn logical(module: &str, shape: Vec<u64>) -> Result<TensorInfo> {
    TensorInfo::new(format!("{module}.weight"), DType::F32, shape)
}

/// A matrix of one scheme.
pub(super) fn scheme(bits: u32, levels: super::Levels, group: usize) -> Scheme {
    Scheme { bits, levels, group }
}
