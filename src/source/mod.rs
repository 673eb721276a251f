//! Where weights come from: every container is reduced to tensors at byte offsets of files, read by rows.
//!
//! | kind | what is opened | where the bytes lie |
//! |---|---|---|
//! | safetensors | one file | in the file |
//! | Hugging Face | a directory: `model.safetensors.index.json`, `model.safetensors`, or the one `*.safetensors` | in the shards |
//! | npy, npz | an array, a zip of arrays | in the file; deflated members in an unlinked temporary file |
//! | GGUF | one file, or the first of several parts of a model | in the files |
//! | JSON bundle | `{"tensors": [{"name", "shape", "data"}]}` | in an unlinked temporary file |
//!
//! [`Source`] is one concrete type rather than a trait: once the headers are read nothing is left that differs. Opening
//! reads headers (and the few numbers that say how quantized matrices of other tools lie, see [`Packed`]), checks every size before it allocates for it, and follows no link out of the model. Pickles
//! (`.bin`, `.pt`) are programs and never read; the error says how to convert them.
//!
//! ```no_run
//! let source = tenpak::source::open("model".as_ref(), &tenpak::source::Options::default())?;
//! for (index, tensor) in source.tensors().iter().enumerate() {
//!     let (rows, _) = tensor.matrix();
//!     let bytes = source.read_rows(index, 0, rows)?;
//!     assert_eq!(bytes.len() as u64, tensor.info().bytes());
//! }
//! # Ok::<(), tenpak::Error>(())
//! ```

#![forbid(unsafe_code)]

mod bundle;
mod conv1d;
mod detect;
mod directory;
mod gguf;
mod json;
mod npy;
mod npz;
mod packed;
mod rows;
mod safetensors;
mod side;

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::file::{Access, Block, InputFile};
use crate::limits::{self, Limits};
use crate::tensor::TensorInfo;
pub(crate) use directory::{HEADER_FILE, INDEX, member, open_shards};
pub(crate) use json::parse_file;
pub use packed::Packed;
pub(crate) use packed::Unheld;
use rows::{Order, Place, Store};
pub(crate) use safetensors::plain as plain_safetensors;
pub(crate) use side::side_files;

/// The `quant_method` of a `config.json` whose weights are compressed.
pub(crate) const METHOD: &str = "tenpak";

/// How a source is opened.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// How the bytes of its files are reached.
    pub access: Access,
    /// What its headers may ask for.
    pub limits: Limits,
}

/// The container that weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// One `.safetensors` file.
    Safetensors,
    /// A Hugging Face model directory of `.safetensors` files.
    HuggingFace,
    /// A numpy `.npz` archive.
    Npz,
    /// One numpy `.npy` array.
    Npy,
    /// A JSON bundle of tensors.
    JsonBundle,
    /// A GGUF file, or several that are one model.
    Gguf,
}

impl Kind {
    /// The name in reports.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Safetensors => "safetensors",
            Self::HuggingFace => "huggingface",
            Self::Npz => "npz",
            Self::Npy => "npy",
            Self::JsonBundle => "json",
            Self::Gguf => "gguf",
        }
    }
}

/// Opens the checkpoint at `path`, whose kind is told by what the path is and by how the file begins.
///
/// # Errors
/// [`Error::Io`] when something cannot be read, [`Error::Corrupt`] when a file contradicts itself,
/// [`Error::Unsupported`] when it is of a kind or dtype that is not read, [`Error::Invalid`] when the path is not a
/// checkpoint, [`Error::Limit`] when a header asks for more than `options.limits`.
pub fn open(path: &Path, options: &Options) -> Result<Source> {
    detect::open(path, options)
}

/// A file that weights are read from, as provenance records it.
#[derive(Debug)]
pub struct SourceFile {
    name: String,
    file: InputFile,
}

impl SourceFile {
    fn new(file: InputFile) -> Self {
        let name = file.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
        Self { name, file }
    }

    /// The name without its directory.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file itself.
    #[must_use]
    pub fn file(&self) -> &InputFile {
        &self.file
    }

    pub(crate) fn into_file(self) -> InputFile {
        self.file
    }

    /// BLAKE3 of the whole file; costs no further read when the tensors were read in order and entirely.
    ///
    /// # Errors
    /// Those of [`InputFile::read`].
    pub fn digest(&self) -> Result<blake3::Hash> {
        self.file.digest()
    }
}

/// A tensor of a source.
#[derive(Debug, Clone)]
pub struct SourceTensor {
    info: TensorInfo,
    place: Place,
    transposed: bool,
    packed: Option<Arc<Packed>>,
}

impl SourceTensor {
    fn new(info: TensorInfo, store: Store, offset: u64, order: Order) -> Self {
        Self { info, place: Place { store, offset, order }, transposed: false, packed: None }
    }

    /// Name, dtype and shape as the checkpoint states them; of a quantized matrix those of its weights, in F32.
    #[must_use]
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// The number of the file that holds the tensor, and where it begins there; only of containers without a spool.
    pub(crate) fn place(&self) -> (usize, u64) {
        match self.place.store {
            Store::File(index) => (index, self.place.offset),
            Store::Spool => unreachable!("safetensors files are read in place"),
        }
    }

    /// How another tool has quantized it, where one has.
    #[must_use]
    pub fn packed(&self) -> Option<&Packed> {
        self.packed.as_deref()
    }

    /// The same tensor as a matrix with its two dimensions swapped.
    fn turned(&self) -> Self {
        Self { transposed: true, ..self.clone() }
    }

    /// Whether the checkpoint holds the weight as `[in, out]`, so that the matrix view swaps its two dimensions.
    #[must_use]
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// Rows and columns of the matrix view: [`TensorInfo::matrix`], or `[out, in]` of a transposed tensor.
    #[must_use]
    pub fn matrix(&self) -> (u64, u64) {
        let (rows, cols) = self.info.matrix();
        if self.transposed { (cols, rows) } else { (rows, cols) }
    }
}

/// An opened checkpoint: what it holds, and its weights by rows.
#[derive(Debug)]
pub struct Source {
    kind: Kind,
    files: Vec<SourceFile>,
    attached: Vec<SourceFile>,
    spool: Option<InputFile>,
    tensors: Vec<SourceTensor>,
    config: Option<serde_json::Value>,
    metadata: BTreeMap<String, String>,
    activation_stats: BTreeMap<String, Vec<f32>>,
    notes: Vec<String>,
}

impl Source {
    fn new(kind: Kind, files: Vec<SourceFile>, tensors: Vec<SourceTensor>) -> Self {
        let (metadata, activation_stats) = (BTreeMap::new(), BTreeMap::new());
        let (attached, notes) = (Vec::new(), Vec::new());
        Self { kind, files, attached, spool: None, tensors, config: None, metadata, activation_stats, notes }
    }

    /// Checks what no container can check alone, and marks the weights that are stored `[in, out]`.
    fn finish(mut self, limits: &Limits) -> Result<Self> {
        let method = self.config.as_ref().and_then(|c| c.get("quantization_config")?.get("quant_method")?.as_str());
        if method == Some(METHOD) {
            return Err(compressed());
        }
        limits::check("tensors of a checkpoint", limits.tensors, self.tensors.len() as u64)?;
        packed::understand(&mut self)?;
        if self.is_quantized() {
            self.attached = side::unquantized(std::mem::take(&mut self.attached))?;
        }
        let mut names = HashSet::with_capacity(self.tensors.len());
        if let Some(twice) = self.tensors.iter().find(|t| !names.insert(t.info.name())) {
            return Err(duplicate(twice.info.name()));
        }
        for index in conv1d::transposed(self.config.as_ref(), &self.tensors) {
            if let Some(packed) = self.tensors[index].packed() {
                return Err(Error::unsupported(format!(
                    "tensor {} is a Conv1D quantized as {}, which is not read; quantize the original checkpoint with tenpak",
                    quoted(self.tensors[index].info.name()),
                    packed.format()
                )));
            }
            self.tensors[index].transposed = true;
        }
        Ok(self)
    }

    /// The container.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The tensors in the order in which reading them is fastest: shards by name, then by offset; members and bundle
    /// entries as they stand in their container.
    #[must_use]
    pub fn tensors(&self) -> &[SourceTensor] {
        &self.tensors
    }

    /// The files that the weights come from; for a container that had to be unpacked, the container.
    #[must_use]
    pub fn files(&self) -> &[SourceFile] {
        &self.files
    }

    pub(crate) fn into_files(self) -> Vec<InputFile> {
        self.files.into_iter().map(SourceFile::into_file).collect()
    }

    /// The files of a Hugging Face directory that are carried along with its weights: settings and tokenizer, by name.
    #[must_use]
    pub fn attached(&self) -> &[SourceFile] {
        &self.attached
    }

    /// Every file that is read, so that none of them is chosen as an output.
    pub fn inputs(&self) -> impl Iterator<Item = &InputFile> {
        self.files.iter().chain(&self.attached).map(SourceFile::file)
    }

    /// `config.json` of the directory, or beside a single `.safetensors` file.
    #[must_use]
    pub fn config(&self) -> Option<&serde_json::Value> {
        self.config.as_ref()
    }

    /// `__metadata__` of the safetensors files; where shards disagree, the first one's value.
    #[must_use]
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// `activation_stats` of a JSON bundle: finite numbers, one per input channel of the tensor that they are named for.
    #[must_use]
    pub fn activation_stats(&self) -> &BTreeMap<String, Vec<f32>> {
        &self.activation_stats
    }

    /// What a reader of it should know: what of the checkpoint is not taken over, and why.
    #[must_use]
    pub fn notes(&self) -> &[String] {
        &self.notes
    }

    /// Whether some of its matrices are quantized already.
    #[must_use]
    pub fn is_quantized(&self) -> bool {
        self.tensors.iter().any(|tensor| tensor.packed.is_some())
    }

    /// Little-endian elements, in the stored dtype, of `rows` rows of the matrix view of tensor number `tensor`.
    ///
    /// Rows that lie one after another in a mapped file come without a copy. Of a transposed tensor no more is in memory than
    /// the rows asked for and one bounded window; many rows at a time are read faster than few.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such tensor or row or the rows exceed this machine's address space, and
    /// those of [`InputFile::read`].
    pub fn read_rows(&self, tensor: usize, first_row: u64, rows: u64) -> Result<Block> {
        let wanted = self.tensor(tensor)?;
        match &wanted.packed {
            Some(packed) => packed.rows(self, &wanted.info, first_row, rows).map(Block::Owned),
            None => self.stored(wanted, first_row, rows),
        }
    }

    /// The planes of `rows` rows of a tensor in one of the codecs that may hold it as it is, or why that codec does not.
    pub(crate) fn read_planes(
        &self,
        tensor: usize,
        codec: &'static Codec,
        first_row: u64,
        rows: u64,
    ) -> Result<Result<Vec<Vec<u8>>, Unheld>> {
        let wanted = self.tensor(tensor)?;
        let packed = wanted.packed.as_ref().ok_or_else(|| Error::invalid("the tensor is not quantized"))?;
        packed.planes(self, &wanted.info, codec, (first_row, rows))
    }

    /// Rows of a tensor as it lies in its file.
    fn stored(&self, tensor: &SourceTensor, first_row: u64, rows: u64) -> Result<Block> {
        rows::read(self.file_of(tensor), tensor, first_row, rows)
    }

    /// Little-endian elements, in the stored dtype, `bytes` of them from byte `start` on, of tensor number `tensor` in
    /// its own C order: what a tensor that is kept as it is consists of.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no such tensor or the range leaves it, and those of [`InputFile::read`].
    pub fn read_bytes(&self, tensor: usize, start: u64, bytes: u64) -> Result<Block> {
        let wanted = self.tensor(tensor)?;
        match &wanted.packed {
            Some(packed) => packed.bytes(self, &wanted.info, start, bytes).map(Block::Owned),
            None => rows::read_bytes(self.file_of(wanted), wanted, start, bytes),
        }
    }

    fn tensor(&self, tensor: usize) -> Result<&SourceTensor> {
        let count = self.tensors.len();
        let none = || Error::invalid(format!("there is no tensor number {tensor}, the checkpoint has {count}"));
        self.tensors.get(tensor).ok_or_else(none)
    }

    fn file_of(&self, tensor: &SourceTensor) -> &InputFile {
        match tensor.place.store {
            Store::File(index) => &self.files[index].file,
            Store::Spool => self.spool.as_ref().expect("only containers with a spool file place tensors there"),
        }
    }
}

/// The error of a directory that is compressed already.
fn compressed() -> Error {
    Error::unsupported(
        "this is a compressed tenpak directory, not a checkpoint: run tenpak decompress on it first, or tenpak export to \
         convert it",
    )
}

/// The error of a name that occurs twice.
fn duplicate(name: &str) -> Error {
    Error::invalid(format!("tensor {} occurs twice, expected unique names: rename or remove one", quoted(name)))
}

/// Text of a file, fit for a message: short, and without control characters.
fn quoted(text: &str) -> String {
    const MOST: usize = 100;
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("'{}'", text.escape_debug()),
    }
}
