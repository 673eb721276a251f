//! ONNX: for every matrix a graph of one `com.microsoft.MatMulNBits`, which onnxruntime multiplies by as it is stored.
//!
//! A directory of small graphs with the name of their module, all numbers in one file beside them, and a table of what
//! there is. Each graph takes `x`, f32 `[rows, K]`, and gives `y`, f32 `[rows, N]`; `onnx.compose` puts them into the
//! graph of a model. Whole models take another way: onnxruntime-genai's builder makes the graph, out of a directory that
//! was exported as GPTQ or AWQ.
//!
//! | initializer | type | shape |
//! |---|---|---|
//! | `weight` | uint8 | `[N, groups, group * bits / 8]`, low bits first |
//! | `scales` | float | `[N, groups]` |
//! | `zero_points`, if codes have their own | uint8 | `[N, ceil(groups * bits / 8)]`, low bits first |

mod proto;

use std::path::Path;

use prost::Message;
use proto::{Attribute, Graph, Model, Node, Opset, Tensor, Type, ValueInfo};
use serde_json::{Map, Value, json};

use super::engine::{Become, Holds, Matrix, choose, matrix, pretty};
use super::{Exported, Files, card};
use crate::artifact::ArtifactFile;
use crate::compress::{OnProgress, Progress};
use crate::error::{Error, Result};
use crate::layout::{Grouped, Levels};
use crate::output::{OutputDirectory, preflight, write_all_at};

/// The target.
pub(super) struct Onnx;

/// The table of what there is, by which a directory is known for one that may be replaced.
pub(super) const MARK: &str = "matrices.json";
/// The file of all numbers.
const DATA: &str = "matrices.data";
/// What arrays begin on a multiple of: a page, so that they can be mapped.
const ALIGN: u64 = 4096;
/// The version of the file format that has all that is used here, and that readers have known the longest.
const IR_VERSION: i64 = 8;
/// The version of ONNX's own operators, of which none is used.
const OPSET: i64 = 17;
/// The most characters of a module's name, which is the name of a file.
const MAX_NAME: usize = 200;

impl Holds for Onnx {
    fn name(&self) -> &'static str {
        "onnx"
    }

    fn refuses(&self, layout: &Grouped, _: usize, _: usize) -> Option<String> {
        let group = layout.group().is_power_of_two() && (16..=256).contains(&layout.group());
        match (layout.bits(), layout.levels()) {
            (4 | 8, Levels::Signed | Levels::ZeroPoint) if group && layout.offset().is_none() => None,
            _ => Some(
                "only codes of 4 or 8 bits, symmetric or with zero points, in groups of 16, 32, 64, 128 or 256, have a place there"
                    .to_owned(),
            ),
        }
    }

    fn codecs(&self) -> &'static [&'static str] {
        &["int4_zp_g32_fp16_v1"]
    }

    fn others(&self) -> &'static str {
        "left out, since there is a graph for each matrix only; onnxruntime-genai's builder makes that of a model from --to \
         gptq or awq"
    }
}

/// An array of a graph.
struct Array {
    name: &'static str,
    kind: Type,
    dims: Vec<i64>,
    offset: u64,
}

impl Array {
    fn bytes(&self) -> u64 {
        self.kind.size() * self.dims.iter().map(|side| side.unsigned_abs()).product::<u64>()
    }
}

/// A matrix and its graph.
struct Piece {
    entry: usize,
    file: String,
    arrays: Vec<Array>,
    graph: Vec<u8>,
}

/// What a directory consists of.
pub(super) struct Plan {
    becomes: Vec<Become>,
    pieces: Vec<Piece>,
    texts: [(&'static str, Vec<u8>); 2],
    /// Bytes of [`DATA`].
    data: u64,
    notes: Vec<String>,
}

impl Plan {
    /// # Errors
    /// [`Error::Invalid`] for matrices that cannot be held, with their reasons, for names that no file can have, and for a
    /// model without quantized matrices.
    pub fn new(artifact: &ArtifactFile, requantize: bool) -> Result<Self> {
        let entries = artifact.tensors();
        let (becomes, notes) = choose(entries, &Onnx, requantize)?;
        let (mut pieces, mut table, mut data) = (Vec::new(), Map::new(), 0u64);
        for (index, (entry, become_)) in entries.iter().zip(&becomes).enumerate() {
            let Become::Packed { module, layout, .. } = become_ else { continue };
            let file = file_name(module)?;
            let (rows, cols) = entry.matrix();
            let mut arrays = arrays(layout, rows, cols)?;
            for array in &mut arrays {
                array.offset = data.next_multiple_of(ALIGN);
                data = array.offset + array.bytes();
            }
            let graph = graph(module, layout, rows, cols, &arrays)?.encode_to_vec();
            table.insert(
                module.clone(),
                json!({
                    "file": file,
                    "K": cols,
                    "N": rows,
                    "bits": layout.bits(),
                    "block_size": layout.group(),
                    "zero_points": layout.levels() == Levels::ZeroPoint,
                }),
            );
            pieces.push(Piece { entry: index, file, arrays, graph });
        }
        if pieces.is_empty() {
            return Err(Error::invalid("no matrix is quantized, so there is nothing to write as onnx"));
        }
        let text = card::config_index(artifact.header()).map(|index| artifact.attached(index)).transpose()?;
        let model = card::model_name(text.as_deref(), artifact.path());
        let table = json!({ "data": DATA, "operator": "com.microsoft.MatMulNBits", "matrices": Value::Object(table) });
        let texts = [
            (MARK, pretty(&table)?),
            ("README.md", card::of_engine(&model, artifact.header(), Onnx.name()).into_bytes()),
        ];
        Ok(Self { becomes, pieces, texts, data, notes })
    }

    /// Names and lengths of all files.
    fn lengths(&self) -> Vec<(&str, u64)> {
        let graphs = self.pieces.iter().map(|piece| (&*piece.file, piece.graph.len() as u64));
        let texts = self.texts.iter().map(|(name, text)| (*name, text.len() as u64));
        std::iter::once((DATA, self.data)).chain(graphs).chain(texts).collect()
    }

    /// What [`Plan::write`] writes.
    pub fn foretold(&self, target: &Path) -> Exported {
        let files: Files = self.lengths().into_iter().map(|(name, bytes)| (target.join(name), bytes)).collect();
        Exported { files, notes: self.notes.clone() }
    }

    /// Writes the directory.
    pub fn write(&self, artifact: &ArtifactFile, target: &Path, on_progress: &mut OnProgress<'_>) -> Result<Exported> {
        let exported = self.foretold(target);
        preflight(target, exported.files.iter().map(|(_, bytes)| bytes).sum())?;
        let out = OutputDirectory::create(target)?;
        let bytes_of = |piece: &Piece| artifact.tensors()[piece.entry].info().bytes();
        let total = self.pieces.iter().map(bytes_of).sum();
        let data = out.file(DATA)?;
        let mut done = 0;
        for piece in &self.pieces {
            let Become::Packed { layout, anew, .. } = &self.becomes[piece.entry] else { continue };
            let matrix = matrix(artifact, piece.entry, layout, *anew)?;
            for (array, bytes) in piece.arrays.iter().zip(contents(&matrix)) {
                write_all_at(&data, array.offset, &bytes).map_err(|e| Error::io(target.join(DATA), e))?;
            }
            let io = |e| Error::io(target.join(&piece.file), e);
            write_all_at(&out.file(&piece.file)?, 0, &piece.graph).map_err(io)?;
            done += bytes_of(piece);
            on_progress(Progress { done, total, tensor: artifact.tensors()[piece.entry].info().name() })?;
        }
        for (name, text) in &self.texts {
            write_all_at(&out.file(name)?, 0, text).map_err(|e| Error::io(target.join(name), e))?;
        }
        out.commit()?;
        Ok(exported)
    }
}

/// The file of a module's graph.
fn file_name(module: &str) -> Result<String> {
    if module.len() <= MAX_NAME && !module.contains(['/', '\\', ':']) && !module.contains(char::is_control) {
        return Ok(format!("{module}.onnx"));
    }
    Err(Error::invalid(format!(
        "no file can be called as the module '{module}': onnx has one for each, with names of at most {MAX_NAME} characters \
         without / \\ and :; rename the tensor"
    )))
}

/// Rows or columns as ONNX counts them.
fn side(n: u64) -> Result<i64> {
    i64::try_from(n).map_err(|_| Error::invalid("a matrix has more than 2^63 rows or columns"))
}

/// The arrays of a matrix, all at the start of the file.
fn arrays(layout: &Grouped, rows: u64, cols: u64) -> Result<Vec<Array>> {
    let (group, bits) = (layout.group() as u64, u64::from(layout.bits()));
    let (rows, groups) = (side(rows)?, cols / group);
    let array = |name, kind, dims| Array { name, kind, dims, offset: 0 };
    let mut arrays = vec![
        array("weight", Type::Uint8, vec![rows, side(groups)?, side(group * bits / 8)?]),
        array("scales", Type::Float, vec![rows, side(groups)?]),
    ];
    if layout.levels() == Levels::ZeroPoint {
        arrays.push(array("zero_points", Type::Uint8, vec![rows, side((groups * bits).div_ceil(8))?]));
    }
    Ok(arrays)
}

/// Their bytes, in the same order. Codes and zero points are ours: rows are whole words, since groups are.
fn contents(matrix: &Matrix<'_>) -> Vec<Vec<u8>> {
    let layout = matrix.layout;
    let count = matrix.rows * layout.groups(matrix.cols);
    let scales = (0..count).flat_map(|i| layout.scale().load(matrix.scales(), i).to_le_bytes()).collect();
    let mut all = vec![matrix.codes().to_vec(), scales];
    if layout.levels() == Levels::ZeroPoint {
        all.push(matrix.offsets().to_vec());
    }
    all
}

fn graph(module: &str, layout: &Grouped, rows: u64, cols: u64, arrays: &[Array]) -> Result<Model> {
    let (n, k) = (side(rows)?, side(cols)?);
    let node = Node {
        input: std::iter::once("x").chain(arrays.iter().map(|array| array.name)).map(str::to_owned).collect(),
        output: vec!["y".to_owned()],
        name: module.to_owned(),
        op_type: "MatMulNBits".to_owned(),
        attribute: vec![
            Attribute::int("K", k),
            Attribute::int("N", n),
            Attribute::int("bits", i64::from(layout.bits())),
            Attribute::int("block_size", side(layout.group() as u64)?),
        ],
        domain: "com.microsoft".to_owned(),
    };
    let tensor =
        |array: &Array| Tensor::external(array.name, array.kind, array.dims.clone(), DATA, array.offset, array.bytes());
    let graph = Graph {
        node: vec![node],
        name: module.to_owned(),
        initializer: arrays.iter().map(tensor).collect(),
        input: vec![ValueInfo::rows("x", k)],
        output: vec![ValueInfo::rows("y", n)],
    };
    Ok(Model {
        ir_version: IR_VERSION,
        producer_name: env!("CARGO_PKG_NAME").to_owned(),
        graph: Some(graph),
        opset_import: vec![
            Opset { domain: String::new(), version: OPSET },
            Opset { domain: "com.microsoft".to_owned(), version: 1 },
        ],
    })
}
