//! The preamble and the header: the only parser and the only printer.
//!
//! Whatever a [`Header`] holds has been validated: codecs exist, planes have the bytes that codec and shape give, lie
//! in order and inside the file, names are unique. Nobody checks twice. Parsing streams from the file and printing
//! streams against it, so that the text of a header is never in memory as a whole.

use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, BufReader, Read, Write};

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::codec::Codec;
use crate::codecs;
use crate::compress::Nonfinite;
use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::layout::Plane;
use crate::limits::{self, Limits};
use crate::tensor::{DType, TensorInfo};

/// First bytes of an artifact: not text, and broken by every kind of newline or 7-bit conversion.
pub const MAGIC: [u8; 8] = *b"\x89TNPK\r\n\x1a";
/// The version this build writes, and the highest that it reads.
pub const VERSION: u32 = 1;
/// Flag bit of a delta.
pub const FLAG_DELTA: u32 = 1;
/// Bytes of the preamble, and the alignment of planes.
pub const ALIGN: u64 = 64;
/// Bytes of a plane that share a checksum.
pub const CHUNK: u64 = 4 << 20;

/// BLAKE3-256 of something, printed as hex.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Identity(pub [u8; 32]);

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl From<blake3::Hash> for Identity {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl Serialize for Identity {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&blake3::Hash::from_bytes(self.0).to_hex())
    }
}

impl<'de> Deserialize<'de> for Identity {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let hex = String::deserialize(d)?;
        let hash = blake3::Hash::from_hex(&hex).map_err(|_| {
            serde::de::Error::custom(format!("{hex:?} is not a digest, expected 64 lower-case hex digits"))
        })?;
        Ok(hash.into())
    }
}

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

/// One plane of a tensor in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlaneEntry {
    /// Which one.
    pub plane: Plane,
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
    /// CRC32C of each chunk.
    pub crc32c: Box<[u32]>,
    /// BLAKE3-256 of all of it.
    pub blake3: Identity,
}

/// One tensor in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    info: TensorInfo,
    codec: &'static Codec,
    transposed: bool,
    planes: Box<[PlaneEntry]>,
}

impl Entry {
    /// An entry whose planes have not been placed yet: lengths known, offsets and checksums not.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the codec cannot hold the tensor: a lossy codec and integers, a transposed tensor that
    /// is not a matrix, or sizes beyond 63 bits.
    pub(crate) fn unplaced(info: TensorInfo, codec: &'static Codec, transposed: bool) -> Result<Self> {
        let mut entry = Self { info, codec, transposed, planes: Box::default() };
        entry.planes = entry
            .plane_bytes()?
            .into_iter()
            .map(|(plane, bytes)| PlaneEntry {
                plane,
                offset: 0,
                bytes,
                crc32c: vec![0; chunks(bytes)].into(),
                blake3: Identity([0; 32]),
            })
            .collect();
        Ok(entry)
    }

    fn plane_bytes(&self) -> Result<Vec<(Plane, u64)>> {
        let name = self.info.name();
        if self.transposed && (self.info.shape().len() != 2 || self.codec.grouped().is_err()) {
            return Err(Error::invalid(format!(
                "tensor '{name}' of shape {:?} in {} is transposed, which only encoded matrices are",
                self.info.shape(),
                self.codec.id
            )));
        }
        if self.codec.grouped().is_ok() && !self.info.dtype().is_float() {
            return Err(Error::invalid(format!(
                "tensor '{name}' holds {} and codec {} takes floats only, use {}",
                self.info.dtype(),
                self.codec.id,
                codecs::RAW
            )));
        }
        let (rows, cols) = self.matrix();
        self.codec.layout.plane_bytes(self.info.dtype(), rows, cols)
    }

    /// Name, dtype and shape of the source tensor.
    #[must_use]
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// The codec.
    #[must_use]
    pub fn codec(&self) -> &'static Codec {
        self.codec
    }

    /// Whether the matrix is the transpose of the source tensor.
    #[must_use]
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// The planes, in stored order.
    #[must_use]
    pub fn planes(&self) -> &[PlaneEntry] {
        &self.planes
    }

    pub(crate) fn planes_mut(&mut self) -> &mut [PlaneEntry] {
        &mut self.planes
    }

    /// Rows and columns of the stored matrix.
    #[must_use]
    pub fn matrix(&self) -> (u64, u64) {
        if let (true, &[rows, cols]) = (self.transposed, self.info.shape()) { (cols, rows) } else { self.info.matrix() }
    }

    /// Bytes of all planes, padding not counted.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.planes.iter().map(|p| p.bytes).sum()
    }

    /// Average cost of a weight of this tensor, everything in its planes counted.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        self.stored_bytes() as f64 * 8.0 / (self.info.elements() as f64).max(1.0)
    }

    /// Whether both entries hold the same content under the same name.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        self.info == other.info
            && self.codec == other.codec
            && self.transposed == other.transposed
            && self.planes.iter().zip(&other.planes).all(|(a, b)| a.blake3 == b.blake3)
    }
}

/// How many checksums a plane has.
#[must_use]
pub(crate) fn chunks(bytes: u64) -> usize {
    usize::try_from(bytes.div_ceil(CHUNK)).unwrap_or(usize::MAX)
}

/// `at` rounded up to the alignment.
#[must_use]
pub(crate) const fn align(at: u64) -> u64 {
    at.div_ceil(ALIGN) * ALIGN
}

/// Everything an artifact says about itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    metadata: BTreeMap<String, String>,
    provenance: Provenance,
    delta: Option<Delta>,
    identity: Identity,
    tensors: Vec<Entry>,
    /// Indices of `tensors`, sorted by name.
    by_name: Vec<u32>,
}

impl Header {
    /// A header of placed entries; computes the identity.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a duplicate name, [`Error::Limit`] for too many tensors.
    pub(crate) fn new(
        limits: &Limits,
        metadata: BTreeMap<String, String>,
        provenance: Provenance,
        delta: Option<Delta>,
        tensors: Vec<Entry>,
    ) -> Result<Self> {
        limits::check("number of tensors", limits.tensors, tensors.len() as u64)?;
        let count = u32::try_from(tensors.len()).map_err(|_| Error::invalid("more than 2^32 tensors"))?;
        let mut by_name: Vec<u32> = (0..count).collect();
        by_name.sort_unstable_by_key(|&i| tensors[i as usize].info.name());
        for pair in by_name.windows(2) {
            let name = tensors[pair[0] as usize].info.name();
            if name == tensors[pair[1] as usize].info.name() {
                return Err(Error::invalid(format!("tensor '{name}' occurs twice")));
            }
        }
        Ok(Self { identity: identity(tensors.iter()), metadata, provenance, delta, tensors, by_name })
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

    /// The index of the tensor with this name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        let at = self.by_name.binary_search_by_key(&name, |&i| self.tensors[i as usize].info.name()).ok()?;
        Some(self.by_name[at] as usize)
    }

    /// Where the header begins: behind the last plane.
    #[must_use]
    pub(crate) fn start(&self) -> u64 {
        self.tensors.iter().flat_map(|t| &t.planes).map(|p| align(p.offset + p.bytes)).max().unwrap_or(ALIGN).max(ALIGN)
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
}

/// Digest of the logical content of `tensors`.
pub(crate) fn identity<'a>(tensors: impl ExactSizeIterator<Item = &'a Entry>) -> Identity {
    let mut hasher = blake3::Hasher::new();
    let text = |hasher: &mut blake3::Hasher, s: &str| {
        hasher.update(&(s.len() as u64).to_le_bytes()).update(s.as_bytes());
    };
    hasher.update(b"tenpak identity 1").update(&(tensors.len() as u64).to_le_bytes());
    for tensor in tensors {
        text(&mut hasher, tensor.info.name());
        text(&mut hasher, tensor.info.dtype().name());
        hasher.update(&(tensor.info.shape().len() as u64).to_le_bytes());
        for dim in tensor.info.shape() {
            hasher.update(&dim.to_le_bytes());
        }
        hasher.update(&[u8::from(tensor.transposed)]);
        text(&mut hasher, tensor.codec.id);
        for plane in &tensor.planes {
            hasher.update(&plane.blake3.0);
        }
    }
    hasher.finalize().into()
}

/// The first 64 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Preamble {
    pub flags: u32,
    pub header_bytes: u64,
    pub file_bytes: u64,
    pub header_crc32c: u32,
}

impl Preamble {
    pub fn print(&self) -> [u8; 64] {
        let mut out = [0; 64];
        out[..8].copy_from_slice(&MAGIC);
        out[8..12].copy_from_slice(&VERSION.to_le_bytes());
        out[12..16].copy_from_slice(&self.flags.to_le_bytes());
        out[16..24].copy_from_slice(&self.header_bytes.to_le_bytes());
        out[24..32].copy_from_slice(&self.file_bytes.to_le_bytes());
        out[32..36].copy_from_slice(&self.header_crc32c.to_le_bytes());
        let crc = crc32c::crc32c(&out[..60]);
        out[60..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    fn read(file: &InputFile, limits: &Limits) -> Result<Self> {
        let mut bytes = [0; 64];
        let have = usize::try_from(file.len().min(64)).expect("at most 64");
        file.read_into(0, &mut bytes[..have])?;
        if have < 8 || bytes[..8] != MAGIC {
            return Err(Error::corrupt(0, "this is not a tenpak artifact: the magic bytes are missing"));
        }
        if have < 64 {
            return Err(Error::corrupt(have as u64, "truncated: the file ends inside its 64-byte preamble"));
        }
        let u32_at = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let crc = crc32c::crc32c(&bytes[..60]);
        if u32_at(60) != crc {
            return Err(Error::corrupt(60, format!("preamble checksum is {:08x}, expected {crc:08x}", u32_at(60))));
        }
        if u32_at(8) != VERSION {
            return Err(Error::unsupported(format!(
                "artifact version {} is not known, this build reads version {VERSION}; upgrade tenpak",
                u32_at(8)
            )));
        }
        let flags = u32_at(12);
        if flags & !FLAG_DELTA != 0 {
            return Err(Error::unsupported(format!(
                "the artifact needs features {:#x}, this build knows {FLAG_DELTA:#x}; upgrade tenpak",
                flags & !FLAG_DELTA
            )));
        }
        if bytes[36..60] != [0; 24] {
            return Err(Error::corrupt(36, "reserved bytes of the preamble are not zero"));
        }
        let preamble = Self { flags, header_bytes: u64_at(16), file_bytes: u64_at(24), header_crc32c: u32_at(32) };
        match preamble.file_bytes.cmp(&file.len()) {
            std::cmp::Ordering::Less => Err(Error::corrupt(
                preamble.file_bytes,
                format!("trailing data: the file has {} bytes, expected {}", file.len(), preamble.file_bytes),
            )),
            std::cmp::Ordering::Greater => Err(Error::corrupt(
                file.len(),
                format!("truncated: the file has {} bytes, expected {}", file.len(), preamble.file_bytes),
            )),
            std::cmp::Ordering::Equal => Ok(()),
        }?;
        limits::check("bytes of the header", limits.header_bytes, preamble.header_bytes)?;
        if preamble.header_bytes > file.len() - 64 {
            return Err(Error::corrupt(
                16,
                format!("a header of {} bytes in a file of {}", preamble.header_bytes, file.len()),
            ));
        }
        Ok(preamble)
    }

    fn header(&self, file: &InputFile, limits: &Limits) -> Result<Header> {
        let start = self.file_bytes - self.header_bytes;
        let section = || BufReader::with_capacity(64 << 10, Section { file, at: start, end: self.file_bytes });
        let mut crc = 0;
        let mut reader = section();
        loop {
            let bytes = io::BufRead::fill_buf(&mut reader).map_err(|e| Error::io(file.path(), e))?;
            if bytes.is_empty() {
                break;
            }
            crc = crc32c::crc32c_append(crc, bytes);
            let n = bytes.len();
            io::BufRead::consume(&mut reader, n);
        }
        if crc != self.header_crc32c {
            return Err(Error::corrupt(
                start,
                format!("header checksum is {crc:08x}, expected {:08x}", self.header_crc32c),
            ));
        }
        let bad = |what: String| Error::corrupt(start, format!("header: {what}"));
        let parsed: HeaderIn = serde_json::from_reader(section()).map_err(|e| bad(e.to_string()))?;
        let header = parsed.check(limits, start, self.flags)?;
        let mut compare = Compare { expected: section(), at: start };
        let printed = header.print(&mut compare);
        // White space behind the object is no part of what is printed.
        if printed.is_err() || compare.at != self.file_bytes {
            let what = "header: not in canonical form, expected it as this program prints it";
            return Err(Error::corrupt(compare.at, what));
        }
        Ok(header)
    }
}

/// A part of a file as a stream.
struct Section<'a> {
    file: &'a InputFile,
    at: u64,
    end: u64,
}

impl Read for Section<'_> {
    fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let n = usize::try_from((self.end - self.at).min(out.len() as u64)).expect("at most the length of a slice");
        self.file.read_into(self.at, &mut out[..n]).map_err(io::Error::other)?;
        self.at += n as u64;
        Ok(n)
    }
}

/// Counts what is written.
struct Count(u64);

impl Write for Count {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Fails when what is written is not what is expected.
struct Compare<R> {
    expected: R,
    at: u64,
}

impl<R: Read> Write for Compare<R> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut buffer = [0; 256];
        for part in bytes.chunks(buffer.len()) {
            let expected = &mut buffer[..part.len()];
            self.expected.read_exact(expected)?;
            if expected != part {
                return Err(io::Error::other("the header is not canonical"));
            }
            self.at += part.len() as u64;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
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
}

struct HeaderOut<'a>(&'a Header);

impl Serialize for HeaderOut<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let Header { metadata, provenance, delta, identity, tensors, by_name: _ } = self.0;
        HeaderFields { metadata, provenance, delta, identity: *identity, tensors }.serialize(s)
    }
}

/// The header as parsed, not yet checked.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct HeaderIn {
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    provenance: Provenance,
    #[serde(default)]
    delta: Option<Delta>,
    identity: Identity,
    tensors: EntriesIn,
}

impl HeaderIn {
    fn check(self, limits: &Limits, start: u64, flags: u32) -> Result<Header> {
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
        if let Some(delta) = &self.delta {
            delta.check_runs(tensors.len() as u64).map_err(|what| bad(format!("delta: {what}")))?;
        }
        self.provenance.nonfinite.parse::<Nonfinite>().map_err(blame)?;
        let mut at = ALIGN;
        for tensor in &tensors {
            TensorInfo::within(limits, tensor.info.name(), tensor.info.dtype(), tensor.info.shape().to_vec())
                .map_err(blame)?;
            for plane in &tensor.planes {
                if plane.offset != at {
                    let name = tensor.info.name();
                    return Err(bad(format!(
                        "plane {} of tensor '{name}' at byte {}, expected {at}",
                        plane.plane.name(),
                        plane.offset
                    )));
                }
                at = plane
                    .offset
                    .checked_add(plane.bytes)
                    .filter(|&end| end <= start)
                    .map(align)
                    .ok_or_else(|| bad(format!("planes reach beyond the header, which begins at byte {start}")))?;
            }
        }
        let identity = self.identity;
        let header = Header::new(limits, self.metadata, self.provenance, self.delta, tensors).map_err(blame)?;
        if header.start() != start {
            return Err(bad(format!("it begins at byte {start}, expected {}", header.start())));
        }
        if header.identity != identity {
            return Err(bad(format!("identity is {identity}, the tensors give {}", header.identity)));
        }
        Ok(header)
    }
}

/// An entry as it stands in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryJson {
    name: String,
    dtype: String,
    #[serde(deserialize_with = "short")]
    shape: Vec<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    transposed: bool,
    codec: String,
    #[serde(deserialize_with = "short")]
    planes: Vec<PlaneJson>,
}

/// The most dimensions or planes that an entry may list, whatever the limits: no codec has more than three planes.
const SHORT: usize = 16;

/// Reads an array of at most [`SHORT`] elements, so that a hostile one takes no memory.
fn short<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    struct Elements<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "an array of at most {SHORT}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut all = Vec::new();
            while let Some(element) = seq.next_element()? {
                if all.len() == SHORT {
                    return Err(serde::de::Error::invalid_length(SHORT + 1, &self));
                }
                all.push(element);
            }
            Ok(all)
        }
    }
    d.deserialize_seq(Elements(std::marker::PhantomData))
}

/// A plane as it stands in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlaneJson {
    plane: String,
    offset: u64,
    bytes: u64,
    crc32c: String,
    blake3: Identity,
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let plane = |p: &PlaneEntry| PlaneJson {
            plane: p.plane.name().into(),
            offset: p.offset,
            bytes: p.bytes,
            crc32c: p.crc32c.iter().map(|crc| format!("{crc:08x}")).collect(),
            blake3: p.blake3,
        };
        EntryJson {
            name: self.info.name().into(),
            dtype: self.info.dtype().name().into(),
            shape: self.info.shape().into(),
            transposed: self.transposed,
            codec: self.codec.id.into(),
            planes: self.planes.iter().map(plane).collect(),
        }
        .serialize(s)
    }
}

/// The entries of a header, and what was wrong with the first bad one.
struct EntriesIn {
    entries: Vec<Entry>,
    error: Option<Error>,
}

impl<'de> Deserialize<'de> for EntriesIn {
    /// Builds each entry at once, so that a header of many tensors is in memory once, in its compact form.
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = EntriesIn;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of tensors")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<EntriesIn, A::Error> {
                let mut all = EntriesIn { entries: Vec::new(), error: None };
                while let Some(json) = seq.next_element::<EntryJson>()? {
                    if all.error.is_none() {
                        match json.build() {
                            Ok(entry) => all.entries.push(entry),
                            Err(e) => all.error = Some(e),
                        }
                    }
                }
                Ok(all)
            }
        }
        d.deserialize_seq(Entries)
    }
}

impl EntryJson {
    fn build(self) -> Result<Entry> {
        let dtype = DType::ALL.iter().copied().find(|d| d.name() == self.dtype).ok_or_else(|| {
            Error::unsupported(format!("tensor '{}' has the unknown dtype '{}'; upgrade tenpak", self.name, self.dtype))
        })?;
        let codec = codecs::get(&self.codec)?;
        // The caller's limits are applied by `HeaderIn::check`; here only what no limit may lift.
        let lifted = Limits { dims: u64::MAX, name_bytes: u64::MAX, ..Limits::DEFAULT };
        let info = TensorInfo::within(&lifted, self.name, dtype, self.shape)?;
        let mut entry = Entry { info, codec, transposed: self.transposed, planes: Box::default() };
        let expected = entry.plane_bytes()?;
        let name = entry.info.name();
        let wanted: Vec<_> = expected.iter().map(|(plane, bytes)| (plane.name(), *bytes)).collect();
        let found: Vec<_> = self.planes.iter().map(|p| (p.plane.as_str(), p.bytes)).collect();
        if found != wanted {
            return Err(Error::invalid(format!(
                "tensor '{name}' has planes {found:?}, codec {} and its shape give {wanted:?}",
                codec.id
            )));
        }
        let place = |(json, (plane, bytes)): (PlaneJson, (Plane, u64))| {
            let crc32c = parse_crcs(&json.crc32c, bytes).ok_or_else(|| {
                Error::invalid(format!(
                    "plane {} of tensor '{name}' has {} digits of checksums, expected {} hex digits",
                    plane.name(),
                    json.crc32c.len(),
                    chunks(bytes).saturating_mul(8)
                ))
            })?;
            Ok(PlaneEntry { plane, bytes, offset: json.offset, crc32c, blake3: json.blake3 })
        };
        let planes = self.planes.into_iter().zip(expected).map(place).collect::<Result<_>>()?;
        entry.planes = planes;
        Ok(entry)
    }
}

/// Eight hex digits for every chunk of a plane of `bytes`.
fn parse_crcs(hex: &str, bytes: u64) -> Option<Box<[u32]>> {
    if hex.len() != chunks(bytes).checked_mul(8)? || !hex.is_ascii() {
        return None;
    }
    (0..hex.len()).step_by(8).map(|at| u32::from_str_radix(&hex[at..at + 8], 16).ok()).collect()
}
