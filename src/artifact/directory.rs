//! The directory form: an artifact as a safetensors checkpoint of its planes, laid out as Hugging Face does it.
//!
//! | file | what |
//! |---|---|
//! | `model.safetensors`, or shards and their index | the planes: `P.codes`, `P.high_codes`, `P.scales`, `P.offsets`, `P.zero_points`, `P.row_scales` for a tensor `P.weight`; raw tensors as they are |
//! | `config.json` | the source's, with a `quantization_config` that says what was done to which tensor |
//! | `tenpak.json` | the header of the equivalent single file, byte for byte |
//! | settings and tokenizer | the attached files, byte for byte |
//! | `README.md` | a model card |
//!
//! With `tenpak.json` nothing is lost: checksums, provenance and identity hold, and the single file can be made again.
//! Without it, as other programs write such a directory, what it holds is read from `quantization_config` and the
//! headers of the shards, and checksums are computed when it is opened.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::marker::PhantomData;
use std::path::Path;

use serde::Deserialize;

use super::attached::AttachedFile;
use super::checksum::Checksums;
use super::coded::{self, Coding};
use super::config::{self, CONFIG};
use super::entry::{ALIGN, CHUNK, Entry, PlaneEntry, align};
use super::header::{Header, Provenance};
use super::map::ArtifactFile;
use super::store::{Content, Directory, Place, Store};
use super::writer::place;
use super::{HEADER_FILE, HEADER_SUM};
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::file::{Access, InputFile};
use crate::layout::{Layout, Plane};
use crate::limits::Limits;
use crate::location;
use crate::source::{self, METHOD, Options, Source, SourceTensor};
use crate::tensor::{DType, TensorInfo};

/// The value of `format`.
const FORMAT: u64 = 1;

/// A plane as a tensor of a shard.
#[derive(Debug)]
pub(crate) struct Stored {
    /// Name, dtype and shape in the shard.
    pub info: TensorInfo,
    /// Number of the tensor that it belongs to.
    pub tensor: usize,
    /// Number of the plane.
    pub plane: usize,
    /// What its offset in a shard is a multiple of.
    pub width: u64,
}

/// The tensors of the shards, in the order of the artifact.
///
/// # Errors
/// [`Error::Invalid`] when two would have one name, or one a name that safetensors reserves or that is too long.
pub(crate) fn stored(entries: &[Entry]) -> Result<Vec<Stored>> {
    let mut all = Vec::with_capacity(entries.len() * 2);
    for (tensor, entry) in entries.iter().enumerate() {
        for (plane, place) in entry.planes().iter().enumerate() {
            let (info, width) = as_tensor(entry, place)?;
            all.push(Stored { info, tensor, plane, width });
        }
    }
    let mut names = HashMap::with_capacity(all.len());
    for s in &all {
        let own = entries[s.tensor].info().name();
        if s.info.name() == "__metadata__" {
            return Err(Error::invalid(format!("a tensor is called '{own}', which safetensors reserves; rename it")));
        }
        if let Some(other) = names.insert(s.info.name(), own) {
            return Err(Error::invalid(format!(
                "tensors '{other}' and '{own}' would both be stored as '{}' in a directory; rename one, or write one \
                 file by an output that ends in .tenpak",
                s.info.name()
            )));
        }
    }
    Ok(all)
}

/// A plane of an entry as a tensor, and what its offset is a multiple of.
fn as_tensor(entry: &Entry, place: &PlaneEntry) -> Result<(TensorInfo, u64)> {
    let plane = place.plane;
    let own = entry.info();
    let Layout::Grouped(layout) = &entry.codec().layout else { return Ok((own.clone(), own.dtype().size())) };
    let (rows, cols) = entry.matrix();
    let cols = usize::try_from(cols).map_err(|_| Error::invalid("a row is larger than memory"))?;
    let base = own.name().strip_suffix(".weight").filter(|base| !base.is_empty()).unwrap_or(own.name());
    let name = format!("{base}.{}", plane.name());
    if place.coding.is_some() {
        return Ok((TensorInfo::new(name, DType::U8, vec![place.bytes])?, 1));
    }
    if let Some((dtype, count)) = entry.extras().elements(plane, rows, entry.matrix().1) {
        return Ok((TensorInfo::new(name, dtype, vec![count])?, dtype.size()));
    }
    let (dtype, width) = match plane {
        // Rows of codes are whole words.
        Plane::Codes | Plane::HighCodes => (DType::U8, 4),
        Plane::Scales if layout.bank().is_some() => (DType::U8, 1),
        Plane::Scales | Plane::RowScales => (layout.scale().dtype(), layout.scale().dtype().size()),
        Plane::Offsets => {
            let dtype = layout.offset().map_or(DType::U8, crate::layout::Float::dtype);
            (dtype, dtype.size())
        }
        _ => (DType::U8, 1),
    };
    let stride = entry.codec().layout.stride(plane, own.dtype(), cols) as u64;
    Ok((TensorInfo::new(name, dtype, vec![rows, stride / dtype.size()])?, width))
}

/// The `quantization_config` of these tensors.
pub(crate) fn quantization_config(entries: &[Entry]) -> String {
    let tensors = entries.iter().filter(|e| e.codec().grouped().is_ok()).map(|e| {
        let [name, codec, dtype] = [e.info().name(), e.codec().id, e.info().dtype().name()].map(json);
        let shape = e.info().shape().iter().map(u64::to_string).collect::<Vec<_>>().join(", ");
        let transposed = if e.transposed() { ", \"transposed\": true" } else { "" };
        let codings = e.planes().iter().filter_map(|p| p.coding.map(|c| (p.plane.name(), c.id())));
        let codings =
            codings.map(|(plane, id)| format!("{}: {}", json(plane), json(id))).collect::<Vec<_>>().join(", ");
        let extras = e.extras();
        let scaled = if extras.column_scales { ", \"column_scales\": true" } else { "" };
        let outliers = if extras.outliers > 0 { format!(", \"outliers\": {}", extras.outliers) } else { String::new() };
        let coding = if codings.is_empty() { String::new() } else { format!(", \"coding\": {{{codings}}}") };
        format!("\n      {name}: {{\"codec\": {codec}, \"dtype\": {dtype}, \"shape\": [{shape}]{transposed}{scaled}{outliers}{coding}}}")
    });
    let tensors = tensors.collect::<Vec<_>>().join(",");
    let method = json(METHOD);
    let end = if tensors.is_empty() { "" } else { "\n    " };
    format!("{{\n    \"quant_method\": {method},\n    \"format\": {FORMAT},\n    \"tensors\": {{{tensors}{end}}}\n  }}")
}

/// A string as JSON.
pub(crate) fn json(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// Opens the artifact in a directory.
///
/// # Errors
/// [`Error::Invalid`] when it is not compressed, [`Error::Corrupt`] when files are missing or contradict each other.
pub(super) fn open(path: &Path, access: Access, limits: &Limits) -> Result<ArtifactFile> {
    let options = Options { access, limits: *limits };
    match source::member(path, HEADER_FILE)? {
        Some(header) => {
            let file = InputFile::open(header, Access::Read)?;
            let (artifact, own, found) = described(path, &file, &options)?;
            if let Some(found) = found.filter(|found| *found != own) {
                let what =
                    format!("its checksum is {own}, the shards say '{}'; fetch both again", found.escape_debug());
                return Err(Error::corrupt(0, what).in_file(file.path()));
            }
            Ok(artifact)
        }
        None => undescribed(path, &options),
    }
}

/// Opens a part of an artifact and gives the checksum of its header, which its shards need not have any more.
///
/// # Errors
/// Those of opening any directory; [`Error::Corrupt`] when there is no header.
pub(crate) fn open_part(path: &Path, access: Access, limits: &Limits) -> Result<(ArtifactFile, String)> {
    let missing = || Error::corrupt(0, format!("{HEADER_FILE} is missing; write the part again")).in_file(path);
    let header = InputFile::open(source::member(path, HEADER_FILE)?.ok_or_else(missing)?, Access::Read)?;
    let (artifact, own, _) = described(path, &header, &Options { access, limits: *limits })?;
    Ok((artifact, own))
}

/// A directory with its header, the checksum of the header, and what the shards say it is.
fn described(path: &Path, file: &InputFile, options: &Options) -> Result<(ArtifactFile, String, Option<String>)> {
    let (header, crc) = Header::read_text(file, &options.limits).map_err(|e| e.in_file(file.path()))?;
    let source = source::open_shards(path, options)?;
    let found = source.metadata().get(HEADER_SUM).cloned();
    let places = places(header.tensors(), &source).map_err(|e| e.in_file(path))?;
    let mut attached = Vec::new();
    for entry in header.files() {
        let found = source::member(path, &entry.name)?.ok_or_else(|| {
            let what = format!("file '{}' is missing, which {HEADER_FILE} lists; fetch it", entry.name);
            Error::corrupt(0, what).in_file(path)
        })?;
        attached.push(content(&entry.name, InputFile::open(found, options.access)?, &options.limits)?);
    }
    Ok((build(path, header, source, places, attached)?, format!("{crc:08x}"), found))
}

/// The content of an attached file: of `config.json`, what it was before it said how weights are quantized.
fn content(name: &str, file: InputFile, limits: &Limits) -> Result<Content> {
    if name != CONFIG {
        return Ok(Content::File(Box::new(file)));
    }
    crate::limits::check("bytes of config.json", limits.header_bytes, file.len())
        .map_err(|e| e.in_file(file.path()))?;
    let text = file.read(0, usize::try_from(file.len()).expect("below the limit"))?;
    let path = file.path().to_owned();
    Ok(match config::restored(&text) {
        Some(bytes) => Content::Restored { path, bytes },
        None => Content::File(Box::new(file)),
    })
}

/// Puts together what was found.
fn build(
    path: &Path,
    header: Header,
    source: Source,
    places: Box<[[Place; super::store::PLANES]]>,
    attached: Vec<Content>,
) -> Result<ArtifactFile> {
    let shards: Vec<InputFile> = source.into_files();
    let mut others: HashSet<&str> = header.files().iter().map(|f| &*f.name).collect();
    others.extend([CONFIG, source::INDEX, "README.md"]);
    let lengths = location::lengths(path, &[&[HEADER_FILE], &*others.into_iter().collect::<Vec<_>>()].concat())?;
    let weight_bytes = shards.iter().map(InputFile::len).sum::<u64>() + lengths[0];
    let bytes = weight_bytes + lengths[1..].iter().sum::<u64>();
    let path = path.to_owned();
    let directory = Directory { path, shards, places, attached, weight_bytes, bytes };
    Ok(ArtifactFile::new(Store::Directory(directory), header))
}

/// Where each plane lies, after checking that the shards hold exactly the planes of these entries.
fn places(entries: &[Entry], source: &Source) -> Result<Box<[[Place; super::store::PLANES]]>> {
    let mut found: HashMap<&str, &SourceTensor> = source.tensors().iter().map(|t| (t.info().name(), t)).collect();
    if found.len() != source.tensors().len() {
        return Err(Error::corrupt(0, "a tensor occurs twice in its shards; fetch the directory again"));
    }
    let mut places = vec![[Place::default(); super::store::PLANES]; entries.len()];
    for wanted in stored(entries)? {
        let info = &wanted.info;
        let Some(tensor) = found.remove(info.name()) else {
            return Err(Error::corrupt(
                0,
                format!("tensor '{}' is missing from the shards; fetch them again", info.name()),
            ));
        };
        if tensor.info() != info {
            return Err(Error::corrupt(
                0,
                format!(
                    "tensor '{}' is {} of shape {:?}, expected {} of {:?}; fetch the directory again",
                    info.name(),
                    tensor.info().dtype(),
                    tensor.info().shape(),
                    info.dtype(),
                    info.shape()
                ),
            ));
        }
        let (shard, offset) = tensor.place();
        let shard = u32::try_from(shard).map_err(|_| Error::invalid("more than 2^32 shards"))?;
        places[wanted.tensor][wanted.plane] = Place { shard, offset };
    }
    if let Some(name) = found.keys().min() {
        let what = format!("tensor '{}' is in the shards, but nothing says what it is", name.escape_debug());
        return Err(Error::corrupt(0, what));
    }
    Ok(places.into())
}

/// The fields of `config.json` that tell whether weights are compressed.
#[derive(Deserialize)]
struct Method {
    quantization_config: Option<MethodName>,
}

#[derive(Deserialize)]
struct MethodName {
    quant_method: Option<String>,
}

/// The same, once they are known to be ours.
#[derive(Deserialize)]
struct Config {
    quantization_config: Quantization,
}

#[derive(Deserialize)]
struct Quantization {
    format: u64,
    #[serde(default)]
    tensors: BTreeMap<String, Tensor>,
}

#[derive(Deserialize)]
struct Tensor {
    codec: String,
    dtype: String,
    shape: Vec<u64>,
    #[serde(default)]
    transposed: bool,
    #[serde(default)]
    column_scales: bool,
    #[serde(default)]
    outliers: u64,
    /// Planes and their codings.
    #[serde(default)]
    coding: BTreeMap<String, String>,
}

/// A directory without a header.
fn undescribed(path: &Path, options: &Options) -> Result<ArtifactFile> {
    let limits = &options.limits;
    let plain = || {
        Error::invalid(
            "this directory is not compressed: it has no tenpak.json and its config.json no quantization_config of \
             tenpak; run tenpak compress on it first",
        )
        .in_file(path)
    };
    let file = InputFile::open(source::member(path, CONFIG)?.ok_or_else(plain)?, Access::Read)?;
    let what = "bytes of config.json";
    let method: Method = source::parse_file(&file, what, limits.header_bytes, limits, PhantomData)?;
    if method.quantization_config.and_then(|q| q.quant_method).as_deref() != Some(METHOD) {
        return Err(plain());
    }
    let config: Config = source::parse_file(&file, what, limits.header_bytes, limits, PhantomData)?;
    let quantization = config.quantization_config;
    if quantization.format != FORMAT {
        return Err(Error::unsupported(format!(
            "format {} of quantization_config is not known, this build reads format {FORMAT}; upgrade tenpak",
            quantization.format
        ))
        .in_file(file.path()));
    }
    let source = source::open_shards(path, options)?;
    let entries = entries(quantization.tensors, &source, limits).map_err(|e| e.printable().in_file(file.path()))?;
    let places = places(&entries, &source).map_err(|e| e.printable().in_file(path))?;
    let (entries, end) = measured(entries, &places, &source)?;
    let (files, attached) = files(path, end, options)?;
    let metadata = source.metadata().iter().filter(|(key, _)| *key != HEADER_SUM);
    let metadata = metadata.map(|(key, value)| (key.clone(), value.clone())).collect();
    let provenance = Provenance {
        tool: "unknown".to_owned(),
        recipe: String::new(),
        nonfinite: "error".to_owned(),
        sources: Vec::new(),
    };
    let header = Header::new(limits, metadata, provenance, None, entries, files).map_err(|e| e.in_file(path))?;
    build(path, header, source, places, attached)
}

/// The entries that a config and the shards give, in the order in which their first planes lie; not placed.
fn entries(quantized: BTreeMap<String, Tensor>, source: &Source, limits: &Limits) -> Result<Vec<Entry>> {
    let at: HashMap<&str, usize> = source.tensors().iter().enumerate().map(|(i, t)| (t.info().name(), i)).collect();
    let mut known = HashSet::new();
    let mut all = Vec::new();
    for (name, tensor) in quantized {
        let dtype = DType::ALL.iter().copied().find(|d| d.name() == tensor.dtype).ok_or_else(|| {
            Error::unsupported(format!("tensor '{name}' has the unknown dtype '{}'; upgrade tenpak", tensor.dtype))
        })?;
        let info = TensorInfo::within(limits, name, dtype, tensor.shape)?;
        let extras = Extras { column_scales: tensor.column_scales, outliers: tensor.outliers };
        let mut entry = Entry::unplaced(info, codecs::get(&tensor.codec)?, tensor.transposed)?.with_extras(extras)?;
        let names = stored(std::slice::from_ref(&entry))?;
        for (plane, id) in &tensor.coding {
            let coding = Coding::get(id)?;
            let index = entry.planes().iter().position(|place| place.plane.name() == plane).ok_or_else(|| {
                Error::invalid(format!(
                    "tensor '{}' has a coding of '{}', which is no plane of {}",
                    entry.info().name(),
                    plane.escape_debug(),
                    entry.codec().id
                ))
            })?;
            // A plane that is not there is found, with its name, when planes are looked for.
            if let Some(&found) = at.get(names[index].info.name()) {
                entry.set_coding(index, coding, source.tensors()[found].info().bytes())?;
            }
        }
        let mut first = usize::MAX;
        for s in stored(std::slice::from_ref(&entry))? {
            // A plane that is not there is found, with its name, when planes are looked for.
            first = first.min(at.get(s.info.name()).copied().unwrap_or(usize::MAX));
            known.insert(s.info.name().to_owned());
        }
        all.push((first, entry));
    }
    for (index, tensor) in source.tensors().iter().enumerate() {
        if !known.contains(tensor.info().name()) {
            all.push((index, Entry::unplaced(tensor.info().clone(), codecs::get(codecs::RAW)?, false)?));
        }
    }
    all.sort_by_key(|(first, _)| *first);
    Ok(all.into_iter().map(|(_, entry)| entry).collect())
}

/// Gives entries their places in the equivalent single file, and the checksums of the planes; and where they end.
fn measured(
    entries: Vec<Entry>,
    places: &[[Place; super::store::PLANES]],
    source: &Source,
) -> Result<(Vec<Entry>, u64)> {
    let mut end = ALIGN;
    let mut all = Vec::with_capacity(entries.len());
    for (entry, places) in entries.into_iter().zip(places) {
        let mut entry = place(entry, end)?;
        for (plane, at) in entry.planes_mut().iter_mut().zip(places) {
            let file = source.files()[at.shard as usize].file();
            let mut sums = Checksums::default();
            while sums.seen() < plane.bytes {
                let len = usize::try_from(CHUNK.min(plane.bytes - sums.seen())).expect("at most a chunk");
                sums.observe(&file.read(at.offset + sums.seen(), len)?);
            }
            (plane.crc32c, plane.blake3) = sums.finish();
            end = align(plane.offset + plane.bytes);
        }
        for index in 0..entry.planes().len() {
            if entry.planes()[index].coding.is_some() {
                let digest = coded::digest(
                    &entry,
                    index,
                    &|plane, start, bytes| {
                        let len = usize::try_from(bytes);
                        let len = len.map_err(|_| Error::invalid("the plane is larger than memory"))?;
                        source.files()[places[plane].shard as usize].file().read(places[plane].offset + start, len)
                    },
                    |_, _| Ok(()),
                );
                let path = source.files()[places[index].shard as usize].file().path();
                entry.planes_mut()[index].blake3 = digest.map_err(|e| e.in_file(path))?;
            }
        }
        all.push(entry);
    }
    Ok((all, end))
}

/// The side files of a directory as attached files, the first one at `end`.
fn files(path: &Path, mut end: u64, options: &Options) -> Result<(Vec<AttachedFile>, Vec<Content>)> {
    let (mut files, mut contents) = (Vec::new(), Vec::new());
    for side in source::side_files(path, options)? {
        let name = side.name().to_owned();
        let content = content(&name, side.into_file(), &options.limits)?;
        let bytes = match &content {
            Content::File(file) => file.len(),
            Content::Restored { bytes, .. } => bytes.len() as u64,
        };
        crate::limits::check("bytes of an attached file", options.limits.file_bytes, bytes)?;
        let mut sums = Checksums::default();
        match &content {
            Content::File(file) => sums.observe(&file.read(0, usize::try_from(bytes).expect("below the limit"))?),
            Content::Restored { bytes, .. } => sums.observe(bytes),
        }
        let (crc32c, blake3) = sums.finish();
        files.push(AttachedFile { name: name.into(), offset: end, bytes, crc32c, blake3 });
        end = align(end + bytes);
        contents.push(content);
    }
    Ok((files, contents))
}
