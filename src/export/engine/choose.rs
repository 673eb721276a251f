//! What every tensor of an artifact becomes for an engine, and the checks of all that it would reject later.

use std::collections::{BTreeMap, BTreeSet};

use super::{Format, Holds, Scheme};
use crate::artifact::Entry;
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::layout::{Float, Grouped, Layout};
use crate::recipe::Role;

/// What a tensor of the artifact becomes.
pub(in crate::export) enum Become {
    /// An array in the dtype of the source.
    Dense,
    /// The tensors of a format, from the planes as they are or from those of another codec.
    Packed { module: String, layout: Grouped, anew: Option<&'static Codec> },
}

/// Decides what every tensor becomes, and says what a user should know of it.
///
/// # Errors
/// [`Error::Invalid`] for matrices that the format cannot hold, with their number and the reason of the first.
pub(in crate::export) fn choose(
    entries: &[Entry],
    format: &dyn Holds,
    requantize: bool,
) -> Result<(Vec<Become>, Vec<String>)> {
    let (mut becomes, mut notes, mut refused) = (Vec::with_capacity(entries.len()), Vec::new(), Vec::new());
    let mut decoded = 0;
    for entry in entries {
        let info = entry.info();
        let Layout::Grouped(layout) = &entry.codec().layout else {
            becomes.push(Become::Dense);
            continue;
        };
        if !Role::of(info).is_linear() {
            decoded += 1;
            becomes.push(Become::Dense);
            continue;
        }
        let (rows, cols) = sides(entry)?;
        let module = info.name().strip_suffix(".weight").filter(|module| !module.is_empty());
        let turned = entry.transposed() && !format.turns();
        let Some(module) = module.filter(|_| info.shape().len() == 2 && !turned) else {
            let what = if turned { "is a Conv1D" } else { "is no matrix called *.weight" };
            let what = format!("{} {what}, which {} has no layout for", info.name(), format.name());
            if requantize {
                notes.push(format!("decoded: {what}"))
            } else {
                refused.push(what)
            }
            becomes.push(Become::Dense);
            continue;
        };
        let fits = |layout: &Grouped| {
            if layout.group() != 0 && cols % layout.group() != 0 {
                return Some(format!("its {cols} columns are no multiple of the group of {}", layout.group()));
            }
            format.refuses(layout, rows, cols)
        };
        let reason = if entry.extras() == Extras::NONE {
            fits(layout)
        } else {
            Some("it has column scales or outliers".to_owned())
        };
        let anew = format.codecs().iter().filter_map(|id| codecs::get(id).ok());
        let anew = anew.into_iter().find(|codec| codec.grouped().is_ok_and(|layout| fits(layout).is_none()));
        let module = module.to_owned();
        becomes.push(match (reason, anew) {
            (None, _) => Become::Packed { module, layout: *layout, anew: None },
            (Some(reason), Some(codec)) if requantize => {
                notes.push(format!(
                    "{}: {} instead of {}, quantized anew: {reason}",
                    info.name(),
                    codec.id,
                    entry.codec().id
                ));
                Become::Packed { module, layout: *codec.grouped()?, anew: Some(codec) }
            }
            (Some(reason), None) if requantize => {
                notes.push(format!("{}: decoded: {reason}", info.name()));
                Become::Dense
            }
            (Some(reason), _) => {
                refused.push(format!("{} ({}): {reason}", info.name(), entry.codec().id));
                Become::Dense
            }
        });
    }
    if let Some(first) = refused.first() {
        return Err(Error::invalid(format!(
            "{} of {} tensors cannot be expressed exactly as {}, such as {first}; compress with --codec {}, or pass \
             --allow-requantize to quantize them anew from their decoded weights, or to leave them decoded where no codec fits",
            refused.len(),
            entries.len(),
            format.name(),
            format.codecs().join(" or ")
        )));
    }
    if decoded > 0 {
        notes.push(format!("{decoded} embeddings, heads or other tensors are {}", format.others()));
    }
    Ok((becomes, notes))
}

/// Rows and columns in memory.
pub(super) fn sides(entry: &Entry) -> Result<(usize, usize)> {
    let (rows, cols) = entry.matrix();
    let side = |n: u64| {
        usize::try_from(n)
            .map_err(|_| Error::invalid(format!("tensor '{}' is larger than memory", entry.info().name())))
    };
    Ok((side(rows)?, side(cols)?))
}

/// What all quantized matrices have in common.
pub(super) fn scheme(entries: &[Entry], becomes: &[Become], format: &dyn Format) -> Result<Scheme> {
    let mut first: Option<(&Entry, Scheme, Float)> = None;
    for (entry, become_) in entries.iter().zip(becomes) {
        let Become::Packed { layout, .. } = become_ else { continue };
        let (own, scale) = (Scheme::of(layout), layout.scale());
        match first {
            None => first = Some((entry, own, scale)),
            Some((other, known, known_scale)) if (known, known_scale) != (own, scale) => {
                return Err(Error::invalid(format!(
                    "'{}' is in {} and '{}' in {}, but {} has one scheme for all matrices; compress with one codec",
                    other.info().name(),
                    other.codec().id,
                    entry.info().name(),
                    entry.codec().id,
                    format.name()
                )));
            }
            Some(_) => {}
        }
    }
    first.map(|(_, scheme, _)| scheme).ok_or_else(|| {
        Error::invalid(format!(
            "no matrix is quantized, so there is nothing to write as {}; use --to safetensors",
            format.name()
        ))
    })
}

/// Names of projections that engines fuse into one matrix.
const FUSED: &[&[&str]] = &[&["q_proj", "k_proj", "v_proj"], &["gate_proj", "up_proj"], &["w1", "w3"]];

/// Refuses fused projections of which some are quantized and some are not: engines fail on them late, and say little.
pub(super) fn check_fused(entries: &[Entry], becomes: &[Become]) -> Result<()> {
    let mut kinds: BTreeMap<(String, usize), [Option<&str>; 2]> = BTreeMap::new();
    for (entry, become_) in entries.iter().zip(becomes) {
        let name = entry.info().name();
        let Some((parent, leaf)) = name.strip_suffix(".weight").and_then(|module| module.rsplit_once('.')) else {
            continue;
        };
        if let Some(set) = FUSED.iter().position(|set| set.contains(&leaf)) {
            let packed = usize::from(matches!(become_, Become::Packed { .. }));
            kinds.entry((parent.to_owned(), set)).or_default()[packed] = Some(name);
        }
    }
    match kinds.values().find_map(|kinds| Some((kinds[0]?, kinds[1]?))) {
        Some((dense, packed)) => Err(Error::invalid(format!(
            "'{packed}' is quantized and '{dense}' is not, but engines fuse them; compress both with one codec, or neither"
        ))),
        None => Ok(()),
    }
}

/// Modules of matrices that stay as they are, embeddings excepted, and `lm_head`, which tied weights leave out.
pub(super) fn dense_modules(entries: &[Entry], becomes: &[Become]) -> Vec<String> {
    let mut dense: BTreeSet<String> = BTreeSet::new();
    let mut head = true;
    for (entry, become_) in entries.iter().zip(becomes) {
        let info = entry.info();
        let Some(module) = info.name().strip_suffix(".weight") else { continue };
        let is_dense = matches!(become_, Become::Dense);
        head &= is_dense || module != "lm_head";
        if is_dense && info.shape().len() >= 2 && Role::of(info) != Role::Embedding {
            dense.insert(module.to_owned());
        }
    }
    if head {
        dense.insert("lm_head".to_owned());
    }
    dense.into_iter().collect()
}
