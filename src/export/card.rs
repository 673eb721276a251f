//! The model card of a directory: what Hugging Face shows of it, and how to load it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use crate::artifact::header::Header;
use crate::artifact::{Entry, config, directory::json};
use crate::location::{self, Kind};
use crate::report::Sizes;
use crate::tensor::DType;

/// What a model is called: as its config says, or else like the directory or file that it lies in.
pub(crate) fn model_name(config: Option<&[u8]>, path: &Path) -> String {
    #[derive(serde::Deserialize)]
    struct Name {
        #[serde(rename = "_name_or_path")]
        name: Option<String>,
    }
    let from_config = config.and_then(|text| serde_json::from_slice::<Name>(text).ok()?.name);
    // A path of somebody's machine says no more than its last part.
    let own = from_config.filter(|name| !name.is_empty()).map(|name| {
        let is_path = name.starts_with(['/', '.', '~']) || name.contains('\\');
        if is_path { name.rsplit(['/', '\\']).find(|part| !part.is_empty()).unwrap_or(&name).to_owned() } else { name }
    });
    own.unwrap_or_else(|| {
        let path = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let parts = path.iter().filter_map(|part| part.to_str());
        // An entry of the Hugging Face cache.
        if let Some(cached) = parts.rev().find_map(|part| part.strip_prefix("models--")) {
            return cached.replace("--", "/");
        }
        let is_directory = location::kind(&path).is_ok_and(|kind| kind == Kind::Directory);
        let name = if is_directory { path.file_name() } else { path.file_stem() };
        name.map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
    })
}

/// The attached config of an artifact, among files that `read` gives by number.
pub(crate) fn config_index(header: &Header) -> Option<usize> {
    header.files().iter().position(|file| *file.name == *config::CONFIG)
}

/// The card of a model in the format of another engine.
pub(super) fn of_engine(name: &str, header: &Header, format: &str) -> String {
    let plain = |text: &str| text.replace(|c: char| c.is_control() || c == '`', " ");
    format!(
        "---\nbase_model: {}\nbase_model_relation: quantized\ntags:\n- {format}\n- quantized\n---\n\n\
         # {} as {format}\n\n\
         Written by {} from weights with the identity\n`{}`.\n",
        json(name),
        plain(name),
        plain(&header.provenance().tool),
        header.identity()
    )
}

/// The card of a model that is called `name`.
pub(super) fn text(name: &str, header: &Header) -> String {
    let entries = header.tensors();
    let half = sixteen_bits(entries);
    let mut rows: BTreeMap<&str, (u64, u64, u64)> = BTreeMap::new();
    let mut all = (0, 0, 0);
    for entry in entries {
        let row = rows.entry(entry.codec().id).or_default();
        for sums in [row, &mut all] {
            sums.0 += 1;
            sums.1 += entry.info().elements();
            sums.2 += entry.stored_bytes();
        }
    }
    let plain = |text: &str| text.replace(|c: char| c.is_control() || c == '`', " ");
    let mut out = format!(
        "---\nbase_model: {}\nbase_model_relation: quantized\nlibrary_name: transformers\ntags:\n- tenpak\n- quantized\n---\n\n\
         # {} in low-bit weights\n\n\
         Quantized by {}; `tenpak verify` checks every byte. Identity of the weights:\n`{}`\n\n\
         | codec | tensors | weights | bytes | bits/weight | x vs FP32 | x vs {half} |\n\
         |---|---:|---:|---:|---:|---:|---:|\n",
        json(name),
        plain(name),
        plain(&header.provenance().tool),
        header.identity()
    );
    for (id, (count, weights, bytes)) in rows.into_iter().chain([("all", all)]) {
        let sizes = Sizes::new(weights, bytes);
        writeln!(
            out,
            "| {id} | {count} | {weights} | {bytes} | {:.3} | {:.2} | {:.2} |",
            sizes.bits_per_weight, sizes.x_vs_fp32, sizes.x_vs_16bit
        )
        .expect("a string takes it");
    }
    out += "\n`transformers` reads these weights once tenpak is imported; without the import it would start from random \
            ones:\n\n```python\nimport tenpak\nfrom transformers import AutoModelForCausalLM\n\n\
            model = AutoModelForCausalLM.from_pretrained(\"path/to/this/directory\")\n```\n";
    if !header.provenance().recipe.is_empty() {
        let recipe = header.provenance().recipe.replace("```", "'''");
        write!(out, "\n## Recipe\n\n```toml\n{recipe}```\n").expect("a string takes it");
    }
    out
}

/// The 16-bit dtype that most weights of the source have.
fn sixteen_bits(entries: &[Entry]) -> &'static str {
    let count = |dtype: DType| -> u64 {
        entries.iter().map(Entry::info).filter(|info| info.dtype() == dtype).map(|info| info.elements()).sum()
    };
    match (count(DType::F16), count(DType::BF16)) {
        (0, 0) => "16-bit",
        (f16, bf16) if f16 > bf16 => "F16",
        _ => "BF16",
    }
}
