//! What the integration tests share: random weights, checkpoints in temporary directories, and what a refusal is.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use tenpak::artifact::ArtifactFile;
use tenpak::compress::{Nonfinite, Options, Report, compress};
use tenpak::recipe::Recipe;
use tenpak::source::{self, Source};
use tenpak::{Codec, DType, Error, codecs, from_f32, to_f32};

/// The splitmix64 generator: the same numbers on every machine.
pub struct Random(pub u64);

impl Random {
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.bits() % n as u64).unwrap()
    }

    /// A weight of a bell-shaped distribution around zero, as a trained matrix has them.
    pub fn weight(&mut self) -> f32 {
        let bits = self.bits().to_le_bytes();
        let uniform = |pair: &[u8; 2]| f32::from(u16::from_le_bytes(*pair)) / 65_536.0 - 0.5;
        bits.as_chunks::<2>().0.iter().map(uniform).sum::<f32>() * 0.1
    }
}

/// A tensor of a checkpoint.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    pub name: String,
    pub dtype: DType,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

impl Tensor {
    /// A tensor of these weights, rounded to a float dtype.
    pub fn of(name: &str, dtype: DType, shape: &[u64], weights: &[f32]) -> Self {
        let mut bytes = vec![0; weights.len() * usize::try_from(dtype.size()).unwrap()];
        from_f32(dtype, weights, &mut bytes).unwrap();
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }

    /// A tensor of random weights, or of random bits where the dtype is no float.
    pub fn random(name: &str, dtype: DType, shape: &[u64], seed: u64) -> Self {
        let mut random = Random(seed);
        let elements = usize::try_from(shape.iter().product::<u64>()).unwrap();
        if dtype.is_float() {
            let weights: Vec<f32> = (0..elements).map(|_| random.weight()).collect();
            return Self::of(name, dtype, shape, &weights);
        }
        let most = if dtype == DType::Bool { 1 } else { u8::MAX };
        let bytes = (0..elements * usize::try_from(dtype.size()).unwrap())
            .map(|_| random.bits().to_le_bytes()[0] & most)
            .collect();
        Self { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes }
    }

    /// A tensor of random bits: NaN of every kind, infinities and denormals among them.
    pub fn noise(name: &str, dtype: DType, shape: &[u64], seed: u64) -> Self {
        let mut random = Random(seed);
        let mut tensor = Self::random(name, dtype, shape, seed);
        tensor.bytes.iter_mut().for_each(|byte| *byte = random.bits().to_le_bytes()[0]);
        tensor
    }

    /// The elements as weights.
    pub fn weights(&self) -> Vec<f32> {
        let mut weights = vec![0.0; self.bytes.len() / usize::try_from(self.dtype.size()).unwrap()];
        to_f32(self.dtype, &self.bytes, &mut weights);
        weights
    }

    /// Rows and columns of the matrix view.
    pub fn matrix(&self) -> (usize, usize) {
        let dim = |d: &u64| usize::try_from(*d).unwrap();
        self.shape.split_last().map_or((1, 1), |(cols, rows)| (rows.iter().map(dim).product(), dim(cols)))
    }
}

/// Prints tensors as a safetensors file, in this order.
pub fn safetensors(tensors: &[Tensor]) -> Vec<u8> {
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut at = 0;
    for t in tensors {
        let end = at + t.bytes.len();
        let name = serde_json::to_string(&t.name).unwrap();
        let (dtype, shape) = (t.dtype.name(), &t.shape);
        write!(header, ",{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{at},{end}]}}").unwrap();
        at = end;
    }
    header.push('}');
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.into_bytes());
    tensors.iter().for_each(|t| file.extend(&t.bytes));
    file
}

/// A temporary directory, gone with this value.
pub struct Folder(tempfile::TempDir);

impl Folder {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// Writes a file.
    pub fn write(&self, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// Writes a checkpoint.
    pub fn checkpoint(&self, name: &str, tensors: &[Tensor]) -> PathBuf {
        self.write(name, safetensors(tensors))
    }

    /// Everything in it, hidden files too.
    pub fn names(&self) -> Vec<String> {
        let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
        let mut names: Vec<_> = std::fs::read_dir(self.0.path()).unwrap().map(name).collect();
        names.sort();
        names
    }
}

/// The codec for every float tensor.
pub fn with(codec: &'static Codec) -> Options {
    Options::new(Recipe::new(codec).all(true), Nonfinite::Error, false)
}

/// A codec of the registry.
pub fn codec(id: &str) -> &'static Codec {
    codecs::get(id).unwrap()
}

pub fn open_source(path: &Path) -> Source {
    source::open(path, &source::Options::default()).unwrap()
}

/// Compresses a checkpoint.
pub fn pack(input: &Path, output: &Path, options: &Options) -> tenpak::Result<Report> {
    compress(&open_source(input), output, options, &mut |_| Ok(()))
}

/// All weights of a tensor in the order of its matrix.
pub fn decode(artifact: &ArtifactFile, index: usize) -> tenpak::Result<Vec<f32>> {
    let (rows, cols) = artifact.tensors()[index].matrix();
    let mut out = vec![0.0; usize::try_from(rows * cols).unwrap()];
    artifact.decode_rows(index, 0, &mut out)?;
    Ok(out)
}

/// Weights as bits, so that a NaN equals itself and zeros of either sign differ.
pub fn bits(weights: &[f32]) -> Vec<u32> {
    weights.iter().map(|w| w.to_bits()).collect()
}

/// The variant of an error, without the path around it.
pub fn kind(error: &Error) -> &'static str {
    match error.root() {
        Error::Invalid(_) => "invalid",
        Error::Corrupt { .. } => "corrupt",
        Error::Unsupported(_) => "unsupported",
        Error::Limit { .. } => "limit",
        Error::Nonfinite { .. } => "nonfinite",
        Error::OutOfMemory { .. } => "out of memory",
        Error::Interrupted => "interrupted",
        Error::Io { .. } => "io",
        _ => "unknown",
    }
}

/// The message of a refusal of this kind, after checking that it is one sentence that a terminal can show.
pub fn refusal<T>(result: tenpak::Result<T>, expected: &str) -> String {
    let error = result.err().expect("this should have been refused");
    let message = error.to_string();
    assert_eq!(kind(&error), expected, "{message}");
    assert!(!message.contains(char::is_control) && !message.ends_with('.'), "{message:?}");
    message
}

#[test]
fn the_builders_write_what_the_library_reads() {
    let folder = Folder::new();
    let tensors =
        [Tensor::random("a", DType::F16, &[3, 8], 1), Tensor::noise("b", DType::U8, &[5], Random(2).below(9) as u64)];
    let input = folder.checkpoint("model.safetensors", &tensors);
    let output = folder.path("model.tenpak");
    pack(&input, &output, &with(codec(codecs::RAW))).unwrap();
    let artifact = ArtifactFile::open(&output).unwrap();
    assert_eq!(bits(&decode(&artifact, 0).unwrap()), bits(&tensors[0].weights()));
    assert_eq!(tensors[0].matrix(), (3, 8));
    assert!(refusal(pack(&input, &output, &with(codec(codecs::RAW))), "invalid").contains("exists"));
    assert_eq!(folder.names(), ["model.safetensors", "model.tenpak"]);
}
