//! From a checkpoint to an engine's format at once, through an artifact that nobody sees and that is gone afterwards.

use std::path::Path;

use tempfile::TempDir;

use super::convert::Conversion;
use crate::artifact::ArtifactFile;
use crate::codec::Codec;
use crate::codecs;
use crate::compress::{self, Nonfinite, OnProgress, Quantized, compress};
use crate::difference::Model;
use crate::error::{Error, Result};
use crate::file::Access;
use crate::layout::{Layout, ROW};
use crate::limits::Limits;
use crate::location;
use crate::output;
use crate::recipe::{Recipe, Role};
use crate::source::Source;

/// An artifact to export; one that is only passed through is gone with this.
#[derive(Debug)]
pub struct Exporting {
    /// The artifact.
    pub artifact: ArtifactFile,
    _folder: Option<TempDir>,
}

/// Opens what is to be exported. A checkpoint is compressed for an engine: linear weights in `codec`, or in the first of
/// the format's whose groups divide all rows, everything else as it is. That artifact lies beside `target` until it is
/// dropped.
///
/// # Errors
/// [`Error::Invalid`] for a codec of an artifact's, or for a checkpoint where the target is no engine's format, exists or is
/// the checkpoint; those of opening and of [`compress()`].
pub fn exporting(
    input: &Path,
    access: Access,
    target: &Path,
    how: &Conversion,
    codec: Option<&'static Codec>,
    on_progress: &mut OnProgress<'_>,
) -> Result<Exporting> {
    let source = match Model::open(input, access, &Limits::DEFAULT)? {
        Model::Source(source) => source,
        Model::Artifact(_) if codec.is_some() => {
            let what = "is an artifact, whose codes stay as they are; leave --codec out, or export the checkpoint";
            return Err(Error::invalid(format!("{} {what}", input.display())));
        }
        Model::Artifact(artifact) => return Ok(Exporting { artifact: *artifact, _folder: None }),
    };
    let Some(held) = how.to.holds() else {
        return Err(Error::invalid(format!(
            "{} is a checkpoint and '{}' a form of artifacts; run tenpak compress first",
            input.display(),
            how.to.name()
        )));
    };
    how.to.check(target, how.force, source.inputs())?;
    let keep = codec.is_none() && keeps(&source, how.allow_requantize)?;
    let codec = match codec {
        Some(codec) => codec,
        None => fitting(&source, held.codecs())?,
    };
    let raw = codecs::get(codecs::RAW)?;
    let mut recipe = Recipe::new(codec);
    for role in [Role::Embedding, Role::Head, Role::Router] {
        recipe = recipe.role(role, raw)?;
    }
    let quantized = if keep { Quantized::Keep } else { Quantized::wanted(true, how.allow_requantize) };
    let folder = output::folder_beside(target)?;
    // Models are called as their file where their config gives no name.
    let home = match location::url(input)? {
        Some(_) => input.to_owned(),
        None => std::fs::canonicalize(location::resolved(input)?).map_err(|e| Error::io(input, e))?,
    };
    let path = folder.path().join(home.file_stem().unwrap_or_default()).with_extension("tenpak");
    let options = compress::Options::new(recipe, Nonfinite::Error, false).for_quantized(&source, quantized)?;
    let report = compress(&source, &path, &options, on_progress)?;
    if let Some(lost) = report.tensors.iter().find(|t| keep && t.imported.is_some_and(|i| !i.taken_over)) {
        // What headers could not tell.
        return Err(inexact(&lost.name, &lost.reason));
    }
    Ok(Exporting { artifact: ArtifactFile::open(&path)?, _folder: Some(folder) })
}

/// Whether the matrices of a checkpoint that is quantized already are taken over as they are: all of them, or none where they
/// may be quantized again.
///
/// # Errors
/// [`Error::Invalid`] when some cannot be taken over, and may not be quantized again.
fn keeps(source: &Source, requantize: bool) -> Result<bool> {
    let packed = source.tensors().iter().filter_map(|tensor| Some((tensor, tensor.packed()?)));
    match packed.clone().find(|(_, packed)| packed.codecs().is_empty()) {
        Some(_) if requantize => Ok(false),
        Some((tensor, packed)) => Err(inexact(tensor.info().name(), packed.why())),
        None => Ok(packed.count() > 0),
    }
}

/// The error of a quantized matrix that would come out dense.
fn inexact(name: &str, why: &str) -> Error {
    Error::invalid(format!(
        "tensor '{name}' is quantized already, and cannot be expressed exactly: {why}; pass --codec and --allow-requantize to \
         quantize its decoded weights anew"
    ))
}

/// The first codec whose groups divide the rows of all linear weights, or the last one, of which the reason of a
/// refusal then speaks.
fn fitting(source: &Source, ids: &[&str]) -> Result<&'static Codec> {
    let mut last = Err(Error::invalid("no codec to choose from"));
    for id in ids {
        let codec = codecs::get(id)?;
        let linear = source.tensors().iter().filter(|tensor| Role::of(tensor.info()).is_linear());
        let divides = |cols: u64| match &codec.layout {
            Layout::Grouped(layout) => layout.group() == ROW || cols.is_multiple_of(layout.group() as u64),
            Layout::Raw => true,
        };
        if linear.into_iter().all(|tensor| divides(tensor.matrix().1)) {
            return Ok(codec);
        }
        last = Ok(codec);
    }
    last
}
