//! The header: what an artifact says about itself, the only parser and the only printer.
//!
//! Whatever a [`Header`] holds has been validated: codecs exist, planes have the bytes that codec and shape give, lie
//! in order and inside the file, names are unique. Nobody checks twice.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};

use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::attached::{self, AttachedFile};
use super::entry::{ALIGN, EntriesIn, Entry, align};
use super::identity::{self, Identity};
use super::preamble::{FLAG_CHECKPOINT, FLAG_CODED, FLAG_DELTA, FLAG_EXTRA, Preamble};
use super::text::{Count, Text};
use crate::codec::extra::Extras;
use crate::compress::Nonfinite;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::{self, Limits};
use crate::tensor::TensorInfo;

/// More than an artifact may be long.
pub(super) const MOST_BYTES: u64 = 1 << 62;

/// A file that was read to make an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceFile {
    /// Name without its directory.
    pub name: String,
    /// Length.
    pub bytes: u64,
    /// Digest of all its bytes.
    pub blake3: Identity,
}

/// Where an artifact came from; nothing in it depends on time or place, so the same inputs give the same bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Name and version of the program.
    pub tool: String,
    /// The recipe, as TOML.
    pub recipe: String,
    /// What was done about weights that are not finite.
    pub nonfinite: String,
    /// The files read.
    pub sources: Vec<SourceFile>,
}

/// What makes an artifact a delta; see [`crate::artifact::delta`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Delta {
    /// Whether base and result are checkpoints, instead of artifacts.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub checkpoint: bool,
    /// Identity of the base.
    pub base: Identity,
    /// Identity of the result.
    pub result: Identity,
    /// Runs of tensors, `first` in the base or -1 for the delta's own.
    pub runs: Vec<(i64, u64)>,
}

impl Delta {
    /// Checks what must hold of the runs of a delta of `own` tensors whatever its base; gives what does not.
    fn check_runs(&self, own: u64) -> Result<(), String> {
        let mut left = own;
        let mut continued = None;
        for &(first, count) in &self.runs {
            if count == 0 {
                return Err(format!("an empty run from {first}"));
            }
            if continued == Some(first) {
                return Err(format!("the run from {first} continues the one before it, expected one run"));
            }
            continued = Some(if first == -1 {
                left = left.checked_sub(count).ok_or_else(|| format!("its runs use more than its {own} tensors"))?;
                -1
            } else if first >= 0 {
                first.checked_add_unsigned(count).ok_or_else(|| format!("a run of {count} tensors from {first}"))?
            } else {
                return Err(format!("a run from {first}, expected -1 or a tensor of the base"));
            });
        }
        if left > 0 { Err(format!("its runs leave {left} of its {own} tensors out")) } else { Ok(()) }
    }
}

/// Everything an artifact says about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    metadata: BTreeMap<String, String>,
    provenance: Provenance,
    delta: Option<Delta>,
    identity: Identity,
    tensors: Vec<Entry>,
    files: Vec<AttachedFile>,
    /// Indices of `tensors`, sorted by name.
    by_name: Vec<u32>,
}

impl Header {
    /// A header of placed entries and files; computes the identity.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a duplicate name or the name of a file, [`Error::Limit`] for too many tensors or files.
    pub(crate) fn new(
        limits: &Limits,
        metadata: BTreeMap<String, String>,
        provenance: Provenance,
        delta: Option<Delta>,
        tensors: Vec<Entry>,
        files: Vec<AttachedFile>,
    ) -> Result<Self> {
        limits::check("number of tensors", limits.tensors, tensors.len() as u64)?;
        limits::check("entries of metadata", limits.metadata, metadata.len() as u64)?;
        attached::check(&files, limits)?;
        let count = u32::try_from(tensors.len()).map_err(|_| Error::invalid("more than 2^32 tensors"))?;
        let mut by_name: Vec<u32> = (0..count).collect();
        by_name.sort_unstable_by_key(|&i| tensors[i as usize].info().name());
        for pair in by_name.windows(2) {
            let name = tensors[pair[0] as usize].info().name();
            if name == tensors[pair[1] as usize].info().name() {
                return Err(Error::invalid(format!("tensor '{name}' occurs twice")));
            }
        }
        Ok(Self { identity: identity::of(tensors.iter()), metadata, provenance, delta, tensors, files, by_name })
    }

    /// Free text carried over from the source.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Where the content came from.
    #[must_use]
    pub fn provenance(&self) -> &Provenance {
        &self.provenance
    }

    /// What makes this a delta, where it is one.
    #[must_use]
    pub fn delta(&self) -> Option<&Delta> {
        self.delta.as_ref()
    }

    /// Digest of the logical content.
    #[must_use]
    pub fn identity(&self) -> Identity {
        self.identity
    }

    /// The tensors, in stored order.
    #[must_use]
    pub fn tensors(&self) -> &[Entry] {
        &self.tensors
    }

    /// The attached files, by name.
    #[must_use]
    pub fn files(&self) -> &[AttachedFile] {
        &self.files
    }

    /// The index of the tensor with this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        let at = self.by_name.binary_search_by_key(&name, |&i| self.tensors[i as usize].info().name()).ok()?;
        Some(self.by_name[at] as usize)
    }

    /// Where the header begins: behind the last plane or file.
    #[must_use]
    pub(crate) fn start(&self) -> u64 {
        let planes = self.tensors.iter().flat_map(|t| t.planes()).map(|p| align(p.offset + p.bytes));
        planes.chain(self.files.iter().map(|f| align(f.offset + f.bytes))).max().unwrap_or(ALIGN).max(ALIGN)
    }

    /// Length of the artifact that has this header, in one file.
    #[must_use]
    pub(crate) fn file_bytes(&self) -> u64 {
        self.start() + self.printed_bytes()
    }

    /// Bytes of the attached files.
    #[must_use]
    pub fn attached_bytes(&self) -> u64 {
        self.files.iter().map(|f| f.bytes).sum()
    }

    /// What attached files and the padding behind them take of the file.
    #[must_use]
    pub(crate) fn attached_room(&self) -> u64 {
        self.files.iter().map(|f| align(f.bytes)).sum()
    }

    /// Bytes of all planes and files, padding not counted: what [`verify`](super::verify::verify) reads.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.tensors.iter().map(Entry::stored_bytes).sum::<u64>() + self.attached_bytes()
    }

    /// The flags of the preamble.
    pub(super) fn flags(&self) -> u32 {
        let coded = self.tensors.iter().any(Entry::is_coded);
        let extra = self.tensors.iter().any(|t| t.extras() != Extras::NONE);
        let checkpoint = self.delta.as_ref().is_some_and(|delta| delta.checkpoint);
        (u32::from(self.delta.is_some()) * FLAG_DELTA)
            | (u32::from(checkpoint) * FLAG_CHECKPOINT)
            | (u32::from(coded) * FLAG_CODED)
            | (u32::from(extra) * FLAG_EXTRA)
    }

    /// Writes the canonical JSON.
    pub(crate) fn print(&self, out: impl Write) -> io::Result<()> {
        serde_json::to_writer(out, &HeaderOut(self)).map_err(io::Error::from)
    }

    /// Bytes of the canonical JSON.
    pub(crate) fn printed_bytes(&self) -> u64 {
        let mut count = Count(0);
        self.print(&mut count).expect("counting cannot fail");
        count.0
    }

    /// Reads preamble and header of an artifact and checks everything that they say.
    ///
    /// # Errors
    /// [`Error::Corrupt`], [`Error::Unsupported`] or [`Error::Limit`]; `FORMAT.md` gives the order of the checks.
    pub fn read(file: &InputFile, limits: &Limits) -> Result<Self> {
        Preamble::read(file, limits)?.header(file, limits).map_err(Error::printable)
    }

    /// Reads a file that is nothing but the text of a header; gives the checksum of the text too.
    ///
    /// # Errors
    /// Those of [`Header::read`].
    pub(super) fn read_text(file: &InputFile, limits: &Limits) -> Result<(Self, u32)> {
        limits::check("bytes of the header", limits.header_bytes, file.len())?;
        let text = Text { file, range: 0..file.len(), crc32c: None, ends_planes: false, flags: 0 };
        Ok((text.header(limits).map_err(Error::printable)?, text.crc32c()?))
    }
}

/// The header as printed; the order of the fields is the format's.
#[derive(Serialize)]
struct HeaderFields<'a> {
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    metadata: &'a BTreeMap<String, String>,
    provenance: &'a Provenance,
    #[serde(skip_serializing_if = "Option::is_none")]
    delta: &'a Option<Delta>,
    identity: Identity,
    tensors: &'a [Entry],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    files: &'a [AttachedFile],
}

struct HeaderOut<'a>(&'a Header);

impl Serialize for HeaderOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let Header { metadata, provenance, delta, identity, tensors, files, by_name: _ } = self.0;
        HeaderFields { metadata, provenance, delta, identity: *identity, tensors, files }.serialize(s)
    }
}

/// The header as parsed, not yet checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HeaderIn {
    #[serde(default, deserialize_with = "texts")]
    metadata: BTreeMap<String, String>,
    provenance: Provenance,
    #[serde(default)]
    delta: Option<Delta>,
    identity: Identity,
    tensors: EntriesIn,
    #[serde(default, deserialize_with = "attached::files")]
    files: Vec<AttachedFile>,
}

/// Reads at most as many texts as the default limits allow: as nodes of a map they take far more room than as JSON.
fn texts<'de, D: Deserializer<'de>>(d: D) -> Result<BTreeMap<String, String>, D::Error> {
    struct Texts;
    impl<'de> Visitor<'de> for Texts {
        type Value = BTreeMap<String, String>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of strings")
        }

        fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut texts = BTreeMap::new();
            while let Some((key, value)) = map.next_entry()? {
                if texts.len() as u64 == Limits::DEFAULT.metadata {
                    return Err(serde::de::Error::custom(format!(
                        "limit exceeded: more than {} entries of metadata",
                        Limits::DEFAULT.metadata
                    )));
                }
                texts.insert(key, value);
            }
            Ok(texts)
        }
    }
    d.deserialize_map(Texts)
}

impl HeaderIn {
    /// Checks everything; the header stands at byte `start`, where, if `ends_planes`, the planes and files must end.
    pub fn check(self, limits: &Limits, start: u64, ends_planes: bool, flags: u32) -> Result<Header> {
        let bad = |what: String| Error::corrupt(start, format!("header: {what}"));
        // What the caller of a constructor got wrong, this file got wrong.
        let blame = |e: Error| if let Error::Invalid(what) = e { bad(what) } else { e };
        if let Some(e) = self.tensors.error {
            return Err(blame(e));
        }
        let tensors = self.tensors.entries;
        if self.delta.is_some() != (flags & FLAG_DELTA != 0) {
            return Err(bad("the delta flag and the delta section contradict each other".into()));
        }
        let checkpoint = self.delta.as_ref().is_some_and(|delta| delta.checkpoint);
        if checkpoint != (flags & FLAG_CHECKPOINT != 0) {
            return Err(bad("the flag of deltas of checkpoints and the delta section contradict each other".into()));
        }
        if checkpoint {
            if let Some(pair) = tensors.windows(2).find(|pair| pair[0].info().name() >= pair[1].info().name()) {
                let name = pair[1].info().name();
                return Err(bad(format!("tensor '{name}' stands behind a greater name in a delta of a checkpoint")));
            }
            if let Some(odd) = tensors.iter().find(|t| t.codec().grouped().is_ok() != t.is_difference()) {
                let (name, codec) = (odd.info().name(), odd.codec().id);
                return Err(bad(format!("tensor '{name}' in {codec} stands for weights in a delta of a checkpoint")));
            }
        } else if let Some(entry) = tensors.iter().find(|entry| entry.needs_base()) {
            let name = entry.info().name();
            return Err(bad(format!("tensor '{name}' is a difference, but this is no delta of a checkpoint")));
        }
        // A header without a preamble has no flags.
        if ends_planes && tensors.iter().any(Entry::is_coded) != (flags & FLAG_CODED != 0) {
            return Err(bad("the flag of coded planes and the planes contradict each other".into()));
        }
        if ends_planes && tensors.iter().any(|t| t.extras() != Extras::NONE) != (flags & FLAG_EXTRA != 0) {
            return Err(bad("the flag of extra planes and the planes contradict each other".into()));
        }
        if let Some(delta) = &self.delta {
            delta.check_runs(tensors.len() as u64).map_err(|what| bad(format!("delta: {what}")))?;
        }
        self.provenance.nonfinite.parse::<Nonfinite>().map_err(blame)?;
        attached::check(&self.files, limits).map_err(blame)?;
        let most = if ends_planes { start } else { MOST_BYTES };
        let next = |at: u64, bytes: u64| {
            let end = at.checked_add(bytes).filter(|&end| end <= most).map(align);
            end.ok_or_else(|| bad(format!("planes and files reach beyond the header, which begins at byte {most}")))
        };
        let mut at = ALIGN;
        for tensor in &tensors {
            TensorInfo::within(limits, tensor.info().name(), tensor.info().dtype(), tensor.info().shape().to_vec())
                .map_err(blame)?;
            for plane in tensor.planes() {
                if plane.offset != at {
                    let name = tensor.info().name();
                    return Err(bad(format!(
                        "plane {} of tensor '{name}' at byte {}, expected {at}",
                        plane.plane.name(),
                        plane.offset
                    )));
                }
                at = next(at, plane.bytes)?;
            }
        }
        for file in &self.files {
            if file.offset != at {
                return Err(bad(format!("file '{}' at byte {}, expected {at}", file.name, file.offset)));
            }
            at = next(at, file.bytes)?;
        }
        let identity = self.identity;
        let header = Header::new(limits, self.metadata, self.provenance, self.delta, tensors, self.files);
        let header = header.map_err(blame)?;
        if ends_planes && header.start() != start {
            return Err(bad(format!("it begins at byte {start}, expected {}", header.start())));
        }
        if header.identity != identity {
            return Err(bad(format!("identity is {identity}, the tensors give {}", header.identity)));
        }
        Ok(header)
    }
}
