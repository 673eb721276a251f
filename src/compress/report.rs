//! What a run did, or will do, tensor by tensor and in all.

use std::path::PathBuf;

use super::part::Part;
use crate::artifact::Identity;
use crate::artifact::header::Header;
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::error::Result;
use crate::fit::{Method, Rate};
use crate::measure::Distance;
use crate::tensor;

/// What a matrix was before: quantized by another tool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Imported {
    /// The format.
    pub format: &'static str,
    /// Whether its codes and scales are taken over as they are.
    pub taken_over: bool,
}

/// What happened, or will happen, to one tensor.
#[derive(Debug, Clone)]
pub struct TensorReport {
    /// Name.
    pub name: String,
    /// Dtype of the source.
    pub dtype: tensor::DType,
    /// Shape in the source.
    pub shape: Vec<u64>,
    /// Rows and columns of the matrix as a codec sees it.
    pub matrix: (u64, u64),
    /// The codec it is stored with.
    pub codec: &'static Codec,
    /// Bits per weight on disk that were asked for, where the codec leaves them open.
    pub rate: Option<Rate>,
    /// Which planes there are beside the codec's.
    pub extras: Extras,
    /// The most squared error that it may have, where a loss was asked for: the rate is then the least that keeps it.
    pub most_noise: Option<f64>,
    /// Why that codec.
    pub reason: String,
    /// Whether it is not the one that was asked for: rows shorter than a group, scales out of range, non-finite weights.
    pub changed_codec: bool,
    /// How its scales and codes are chosen.
    pub method: Method,
    /// Why that is not what was asked for.
    pub method_reason: Option<String>,
    /// Bytes in the source.
    pub source_bytes: u64,
    /// Bytes of its planes in the file.
    pub stored_bytes: u64,
    /// Bytes of its planes in memory.
    pub memory_bytes: u64,
    /// Distance to the source, where the codec is lossy; `None` before it has been encoded.
    pub distance: Option<Distance>,
    /// Weights that were NaN or infinite and have been replaced.
    pub repaired: u64,
    /// How it was quantized before, where it was.
    pub imported: Option<Imported>,
}

impl TensorReport {
    /// Elements of the tensor.
    #[must_use]
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Says which planes there are beside the codec's, in sizes too.
    pub(super) fn set_extras(&mut self, extras: Extras) -> Result<()> {
        let bytes = |extras: Extras| -> Result<u64> {
            Ok(extras.plane_bytes(self.matrix.0, self.matrix.1)?.iter().map(|(_, bytes)| bytes).sum())
        };
        let (before, after) = (bytes(self.extras)?, bytes(extras)?);
        self.extras = extras;
        self.stored_bytes = self.stored_bytes - before + after;
        self.memory_bytes = self.memory_bytes - before + after;
        Ok(())
    }
}

/// What a run did, or, before anything was written, will do.
#[derive(Debug, Clone)]
pub struct Report {
    /// One line per tensor, in stored order.
    pub tensors: Vec<TensorReport>,
    /// Length of the artifact.
    pub file_bytes: u64,
    /// Bytes of it that weights and header take, attached files left out.
    pub weight_bytes: u64,
    /// Names and lengths of the attached files.
    pub attached: Vec<(String, u64)>,
    /// The files of a directory, with their lengths; empty where the artifact is one file.
    pub files: Vec<(PathBuf, u64)>,
    /// What a reader should know.
    pub notes: Vec<String>,
    /// Identity of the artifact; `None` for a plan.
    pub identity: Option<Identity>,
    /// Which part of an artifact this is, where it is not all of it.
    pub part: Option<Part>,
}

impl Report {
    pub(super) fn new(tensors: Vec<TensorReport>, header: &Header, identity: Option<Identity>) -> Self {
        let file_bytes = header.file_bytes();
        Self {
            tensors,
            file_bytes,
            weight_bytes: file_bytes - header.attached_room(),
            attached: header.files().iter().map(|f| (f.name.to_string(), f.bytes)).collect(),
            files: Vec::new(),
            notes: Vec::new(),
            identity,
            part: None,
        }
    }
}
