//! Parts of an artifact put together: the directory that a single run writes, byte for byte.
//!
//! What parts lack is what needs all of them: header, index, settings with what was done to every tensor, card. Shards are
//! not read, but for their heads, nor copied where the file system has second names for a file; the one thing in them that
//! changes is the checksum of the header. Everything is checked before anything is written, and until the directory takes
//! the place of the parts they can be merged again.

use std::path::{Path, PathBuf};

use super::OnProgress;
use super::manifest::Manifest;
use super::part::{Part, parts_in};
use crate::artifact::directory::open_part;
use crate::artifact::writer::assembled;
use crate::artifact::{ArtifactFile, HEADER_FILE, Header, Identity, Provenance, SourceFile};
use crate::error::{Error, Result};
use crate::export::hf::{Cut, Plan};
use crate::file::Access;
use crate::limits::Limits;
use crate::location;
use crate::output::{OutputDirectory, preflight};

/// What was put together.
#[derive(Debug)]
pub struct Merged {
    /// How many parts there were.
    pub parts: u32,
    /// The header of the whole.
    pub header: Header,
    /// The files of the directory, with their lengths.
    pub files: Vec<(PathBuf, u64)>,
    /// Bytes of them that weights and header take.
    pub weight_bytes: u64,
    /// What a reader should know.
    pub notes: Vec<String>,
}

/// A part that was found.
struct Found {
    dir: PathBuf,
    manifest: Manifest,
    /// Its shards and the checksum of their header, where it has any.
    opened: Option<(ArtifactFile, String)>,
}

/// Puts the parts in a directory together; they are gone then.
///
/// # Errors
/// [`Error::Invalid`] when parts are missing, are of different runs, or there is anything else in the directory;
/// [`Error::Corrupt`] when a part is not what its manifest says; [`Error::Io`], and whatever `on_progress` returns. The
/// parts are then as they were.
pub fn merge(dir: &Path, on_progress: &mut OnProgress<'_>) -> Result<Merged> {
    location::refuse_url(dir, "putting parts together")?;
    let dir = &*location::resolved(dir)?;
    if dir.join(HEADER_FILE).exists() {
        let what = "is whole: its parts have been put together already, or it never had any";
        return Err(Error::invalid(format!("{} {what}", dir.display())));
    }
    let found = find(dir)?;
    let job = &found[0].manifest.job;
    let cut = cut(&found)?;
    let attached = &found.iter().find_map(|f| f.opened.as_ref()).ok_or_else(|| no_shards(dir))?.0;
    let all: Vec<_> = found.iter().filter_map(|f| f.opened.as_ref()).collect();
    let entries = all.iter().flat_map(|(artifact, _)| artifact.tensors().iter().cloned());
    let metadata = attached.header().metadata().clone();
    let provenance = provenance(&found)?;
    let header = assembled(entries, attached.header().files(), metadata, provenance)?;
    if header.tensors().len() as u64 != job.tensors {
        let what = format!("the parts have {} tensors, expected {}", header.tensors().len(), job.tensors);
        return Err(Error::corrupt(0, format!("{what}; write them again")).in_file(dir));
    }
    let config = crate::export::card::config_index(&header).map(|index| attached.attached(index)).transpose()?;
    let plan = Plan::new(&header, config.as_deref(), &found[0].manifest.model, &cut)?;
    let homes: Vec<_> = found
        .iter()
        .filter_map(|f| Some((f, f.opened.as_ref()?)))
        .flat_map(|(f, (_, own))| f.manifest.shards.iter().map(move |_| (&*f.dir, &**own)))
        .collect();
    preflight(dir, plan.weight_bytes() / 1000)?;
    let out = OutputDirectory::create(dir)?;
    plan.assemble(&out, |shard| homes[shard], |index| Ok(attached.attached(index)?.to_vec()), on_progress)?;
    let files = plan.files().into_iter().map(|(name, bytes)| (dir.join(name), bytes)).collect();
    let weight_bytes = plan.weight_bytes();
    out.commit()?;
    Ok(Merged { parts: found[0].manifest.of, header, files, weight_bytes, notes: plan.notes })
}

/// All parts, in order.
fn find(dir: &Path) -> Result<Vec<Found>> {
    let limits = &Limits::DEFAULT;
    let mut found: Vec<Found> = Vec::new();
    for path in parts_in(dir)? {
        let manifest = Manifest::read(&path, limits)?;
        let manifest =
            manifest.ok_or_else(|| Error::invalid("has no part.json, write the part again").in_file(&path))?;
        let part = Part::new(manifest.part, manifest.of).map_err(|e| e.in_file(&path))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name != part.directory() {
            let what = format!("part {part} lies here, whose directory is {}; remove or rename it", part.directory());
            return Err(Error::invalid(what).in_file(&path));
        }
        if let Some(first) = found.first() {
            same(first, &manifest, part).map_err(|e| e.in_file(&path))?;
        }
        found.push(Found { dir: path, manifest, opened: None });
    }
    let Some(of) = found.first().map(|f| f.manifest.of) else {
        let how = "write them with tenpak compress --shard";
        return Err(Error::invalid(format!("{} has no parts; {how}", dir.display())));
    };
    let there = |number: &u32| found.iter().any(|f| f.manifest.part == *number);
    let missing: Vec<u32> = (1..=of).filter(|number| !there(number)).collect();
    if let Some(first) = missing.first() {
        let mut names: Vec<String> = missing.iter().take(10).map(u32::to_string).collect();
        if missing.len() > names.len() {
            names.push("…".to_owned());
        }
        return Err(Error::invalid(format!(
            "{} of {of} parts are missing in {}: {}; run tenpak compress --shard {first}/{of} and so on",
            missing.len(),
            dir.display(),
            names.join(", ")
        )));
    }
    for part in found.iter_mut().filter(|f| !f.manifest.shards.is_empty()) {
        part.opened = Some(open_part(&part.dir, Access::Read, limits)?);
    }
    Ok(found)
}

/// Checks that a part is of the same run as another.
fn same(first: &Found, other: &Manifest, part: Part) -> Result<()> {
    let differ =
        if first.manifest.of == other.of { first.manifest.job.differs(&other.job) } else { Some("number of parts") };
    match differ {
        None => Ok(()),
        Some(what) => {
            let from = Part::new(first.manifest.part, first.manifest.of)?;
            Err(Error::invalid(format!(
                "part {part} has another {what} than part {from}; remove the one that is not wanted, or write it again"
            )))
        }
    }
}

/// Where the whole is cut.
fn cut(found: &[Found]) -> Result<Cut> {
    let mut counts = Vec::new();
    for part in found {
        let wrong = |what: String| Error::corrupt(0, format!("{what}; write the part again")).in_file(&part.dir);
        let Manifest { first_shard, shards, job, .. } = &part.manifest;
        if *first_shard != counts.len() as u64 && !shards.is_empty() {
            return Err(wrong(format!("its first shard is number {first_shard}, expected {}", counts.len())));
        }
        let tensors = part.opened.as_ref().map_or(0, |(artifact, _)| artifact.tensors().len() as u64);
        if shards.iter().try_fold(0_u64, |sum, count| sum.checked_add(*count)) != Some(tensors) {
            return Err(wrong(format!("its header has {tensors} tensors, which is not what its manifest says")));
        }
        // Not more than there are tensors, as was just seen.
        counts.extend(shards.iter().map(|&count| usize::try_from(count).unwrap_or(usize::MAX)));
        if counts.len() as u64 > job.shards {
            return Err(wrong(format!("there are more than {} shards", job.shards)));
        }
    }
    Ok(Cut::from_counts(counts))
}

/// Where the content comes from: what all parts say, and the digests that each has.
fn provenance(found: &[Found]) -> Result<Provenance> {
    let Manifest { job, sources, .. } = &found[0].manifest;
    let mut files = Vec::with_capacity(sources.len());
    for (index, file) in sources.iter().enumerate() {
        let digests = found.iter().filter_map(|f| f.manifest.sources.get(index)?.blake3);
        let blake3: Vec<Identity> = digests.collect();
        let [blake3] = &*blake3 else {
            let what =
                format!("{} parts have the digest of '{}', expected one", blake3.len(), file.name.escape_debug());
            return Err(Error::corrupt(0, format!("{what}; write them again")).in_file(&found[0].dir));
        };
        files.push(SourceFile { name: file.name.clone(), bytes: file.bytes, blake3: *blake3 });
    }
    Ok(Provenance {
        tool: job.tool.clone(),
        recipe: job.recipe.clone(),
        nonfinite: job.nonfinite.clone(),
        sources: files,
    })
}

fn no_shards(dir: &Path) -> Error {
    Error::corrupt(0, "no part has a shard, expected at least one; write them again").in_file(dir)
}
