//! From one form of an artifact to another, its planes as they are, or to the checkpoint of another engine.

use std::path::{Path, PathBuf};

use super::engine::{self, Awq, CompressedTensors, Format, Gptq, Holds, Mlx};
use super::{Exported, Options, card, decompress, gguf, hf, onnx};
use crate::artifact::{ArtifactFile, HEADER_FILE, Writer};
use crate::compress::{OnProgress, Progress};
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::location;
use crate::output::{self, OutputDirectory, preflight};

/// What an artifact is converted to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum To {
    /// A Hugging Face directory of safetensors.
    Hf,
    /// One file.
    Tenpak,
    /// A Hugging Face directory of decoded weights.
    Safetensors,
    /// compressed-tensors, `pack-quantized`: vLLM, SGLang, transformers.
    CompressedTensors,
    /// GPTQ: GPTQModel, vLLM, SGLang, transformers.
    Gptq,
    /// AWQ: AutoAWQ, vLLM, SGLang, transformers.
    Awq,
    /// MLX, affine.
    Mlx,
    /// GGUF, one file: llama.cpp.
    Gguf,
    /// ONNX, a graph for each matrix: onnxruntime.
    Onnx,
}

impl To {
    /// Every target, with its name.
    pub const ALL: &[(&'static str, Self)] = &[
        ("hf", Self::Hf),
        ("tenpak", Self::Tenpak),
        ("safetensors", Self::Safetensors),
        ("compressed-tensors", Self::CompressedTensors),
        ("gptq", Self::Gptq),
        ("awq", Self::Awq),
        ("mlx", Self::Mlx),
        ("gguf", Self::Gguf),
        ("onnx", Self::Onnx),
    ];

    /// The name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, to)| *to == self).map_or("", |(name, _)| name)
    }

    /// How the engine lays matrices out, where this is the checkpoint of one.
    fn format(self) -> Option<&'static dyn Format> {
        match self {
            Self::Hf | Self::Tenpak | Self::Safetensors | Self::Gguf | Self::Onnx => None,
            Self::CompressedTensors => Some(&CompressedTensors),
            Self::Gptq => Some(&Gptq),
            Self::Awq => Some(&Awq),
            Self::Mlx => Some(&Mlx),
        }
    }

    /// Which matrices the target holds, where it is the format of an engine.
    pub(super) fn holds(self) -> Option<&'static dyn Holds> {
        match self {
            Self::Gguf => Some(&gguf::Gguf),
            Self::Onnx => Some(&onnx::Onnx),
            _ => self.format().map(|format| format as &dyn Holds),
        }
    }

    /// Refuses an output that cannot be written, or not replaced.
    pub(super) fn check<'a>(
        self,
        target: &Path,
        force: bool,
        inputs: impl IntoIterator<Item = &'a InputFile>,
    ) -> Result<()> {
        let mark = match self {
            Self::Tenpak => {
                check_name(target)?;
                return output::refuse_input(target, inputs);
            }
            Self::Gguf => {
                check_gguf(target)?;
                return output::refuse_input(target, inputs);
            }
            Self::Hf => HEADER_FILE,
            Self::Onnx => onnx::MARK,
            Self::Safetensors | Self::CompressedTensors | Self::Gptq | Self::Awq | Self::Mlx => engine::MARK,
        };
        OutputDirectory::check(target, force, mark, inputs)
    }

    /// The form that the name of an output asks for: a file where it ends in `.tenpak`, otherwise a directory.
    #[must_use]
    pub fn of(target: &Path) -> Self {
        if target.extension().is_some_and(|e| e.eq_ignore_ascii_case("tenpak")) { Self::Tenpak } else { Self::Hf }
    }
}

impl std::str::FromStr for To {
    type Err = Error;

    fn from_str(s: &str) -> Result<Self> {
        let known = || Self::ALL.iter().map(|(name, _)| *name).collect::<Vec<_>>().join(" or ");
        let found = Self::ALL.iter().find(|(name, _)| *name == s).map(|(_, to)| *to);
        found.ok_or_else(|| Error::invalid(format!("unknown export target '{s}', expected {}", known())))
    }
}

/// How to convert.
#[derive(Debug, Clone, Copy)]
pub struct Conversion {
    /// To which form.
    pub to: To,
    /// Replace an existing output.
    pub force: bool,
    /// Most bytes of one shard of a directory, as headers foretell them; a tensor's planes stay together.
    pub max_shard_bytes: u64,
    /// Quantize anew, from their decoded weights, matrices that an engine has no layout for.
    pub allow_requantize: bool,
}

/// The files that [`convert`] would write, with their lengths.
///
/// # Errors
/// Those of [`convert`] that can be known without reading planes.
pub fn plan(artifact: &ArtifactFile, target: &Path, how: &Conversion) -> Result<Exported> {
    artifact.refuse_delta()?;
    match how.to {
        To::Hf => {
            let plan = directory(artifact, how)?;
            let files = plan.files().into_iter().map(|(name, bytes)| (target.join(name), bytes)).collect();
            Ok(Exported { files, notes: plan.notes })
        }
        To::Tenpak => {
            check_name(target)?;
            Ok(Exported { files: vec![(target.to_owned(), artifact.header().file_bytes())], notes: Vec::new() })
        }
        To::Gguf => {
            check_gguf(target)?;
            let plan = gguf::Plan::new(artifact, how.allow_requantize)?;
            Ok(Exported { files: vec![(target.to_owned(), plan.bytes())], notes: plan.notes })
        }
        To::Onnx => Ok(onnx::Plan::new(artifact, how.allow_requantize)?.foretold(target)),
        To::Safetensors => Err(Error::invalid("what decoding writes is not foretold; leave --dry-run out")),
        To::CompressedTensors | To::Gptq | To::Awq | To::Mlx => {
            let plan = checkpoint(artifact, how)?;
            let files = plan.files().into_iter().map(|(name, bytes)| (target.join(name), bytes)).collect();
            Ok(Exported { files, notes: plan.notes })
        }
    }
}

/// Writes an artifact in another form.
///
/// # Errors
/// [`Error::Invalid`] for a delta, an output that exists or is an input, names that collide in a directory, or a file
/// whose name does not end in `.tenpak`; [`Error::Corrupt`] when the artifact is damaged; [`Error::Io`]; and whatever
/// `on_progress` returns. Nothing is left behind.
pub fn convert(
    artifact: &ArtifactFile,
    target: &Path,
    how: &Conversion,
    on_progress: &mut OnProgress<'_>,
) -> Result<Exported> {
    artifact.refuse_delta()?;
    let target = &*location::resolved(target)?;
    match how.to {
        To::Hf => {
            how.to.check(target, how.force, artifact.inputs())?;
            let mut plan = directory(artifact, how)?;
            preflight(target, plan.bytes())?;
            let notes = std::mem::take(&mut plan.notes);
            Ok(Exported { files: plan.write(artifact, target, on_progress)?, notes })
        }
        To::Tenpak => {
            how.to.check(target, how.force, artifact.inputs())?;
            Ok(Exported { files: vec![file(artifact, target, how.force, on_progress)?], notes: Vec::new() })
        }
        To::Gguf => {
            how.to.check(target, how.force, artifact.inputs())?;
            gguf::Plan::new(artifact, how.allow_requantize)?.write(artifact, target, how.force, on_progress)
        }
        To::Onnx => {
            how.to.check(target, how.force, artifact.inputs())?;
            onnx::Plan::new(artifact, how.allow_requantize)?.write(artifact, target, on_progress)
        }
        To::Safetensors => {
            if target.extension().is_some() {
                let form = "a directory has no extension, and tenpak decompress writes single files";
                return Err(Error::invalid(format!("output {} has an extension; {form}", target.display())));
            }
            let options = Options { dtype: None, force: how.force, max_shard_bytes: how.max_shard_bytes };
            decompress(artifact, target, &options, on_progress)
        }
        To::CompressedTensors | To::Gptq | To::Awq | To::Mlx => {
            how.to.check(target, how.force, artifact.inputs())?;
            checkpoint(artifact, how)?.write(artifact, target, on_progress)
        }
    }
}

/// What a checkpoint of an engine consists of.
fn checkpoint(artifact: &ArtifactFile, how: &Conversion) -> Result<engine::Plan<'static>> {
    let format = how.to.format().ok_or_else(|| Error::invalid(format!("{} is no engine's format", how.to.name())))?;
    engine::Plan::new(artifact, format, how.allow_requantize, how.max_shard_bytes)
}

/// What a directory of the artifact consists of.
fn directory(artifact: &ArtifactFile, how: &Conversion) -> Result<hf::Plan> {
    let config = card::config_index(artifact.header()).map(|index| artifact.attached(index)).transpose()?;
    let model = card::model_name(config.as_deref(), artifact.path());
    let cut = hf::Cut::of(artifact.tensors(), how.max_shard_bytes)?;
    hf::Plan::new(artifact.header(), config.as_deref(), &model, &cut)
}

/// Writes one file.
fn file(
    artifact: &ArtifactFile,
    target: &Path,
    force: bool,
    on_progress: &mut OnProgress<'_>,
) -> Result<(PathBuf, u64)> {
    let header = artifact.header();
    let mut writer = Writer::create(target, force)?;
    writer.output().preflight(header.file_bytes())?;
    let total = header.content_bytes() - header.attached_bytes();
    let mut done = 0;
    for (index, entry) in artifact.tensors().iter().enumerate() {
        writer.copy(artifact, index, &mut |bytes| {
            done += bytes;
            on_progress(Progress { done, total, tensor: entry.info().name() })
        })?;
    }
    writer.attach_all(artifact)?;
    let written = writer.finish(header.metadata().clone(), header.provenance().clone(), None)?;
    Ok((target.to_owned(), written.file_bytes))
}

/// A file of another name would not be taken for GGUF.
fn check_gguf(target: &Path) -> Result<()> {
    if target.extension().is_some_and(|e| e.eq_ignore_ascii_case("gguf")) {
        return Ok(());
    }
    Err(Error::invalid(format!("output {} does not end in .gguf, as one file of it does", target.display())))
}

/// A file of another name would not be taken for one.
fn check_name(target: &Path) -> Result<()> {
    if To::of(target) == To::Tenpak {
        return Ok(());
    }
    Err(Error::invalid(format!("output {} does not end in .tenpak, as one file does", target.display())))
}
