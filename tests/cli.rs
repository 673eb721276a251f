//! What the command line promises: exit codes, what is printed where, and that the sample model survives every verb.

#![cfg(unix)]

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use support::{Folder, Tensor};
use tenpak::{DType, codecs};

/// The sample model of the repository.
const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tiny-books");

fn tenpak() -> Command {
    Command::new(assert_cmd::cargo::cargo_bin!("tenpak"))
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A folder in which command lines run.
struct Shell(Folder);

impl Shell {
    fn new() -> Self {
        Self(Folder::new())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path(name)
    }

    /// Runs words separated by spaces.
    fn output(&self, line: &str) -> Output {
        tenpak().current_dir(self.path("")).args(line.split(' ')).output().unwrap()
    }

    /// Standard output of a command that must end with this code, and standard error where it must be 2.
    fn run(&self, line: &str, code: i32) -> String {
        let output = self.output(line);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{line}\n{out}\n{err}");
        if code == 2 {
            assert!(out.is_empty(), "{line}: {out}");
            return err;
        }
        assert!(err.is_empty(), "{line}: progress or errors in a pipe: {err:?}");
        out
    }

    fn json(&self, line: &str, code: i32) -> serde_json::Value {
        serde_json::from_str(&self.run(&format!("{line} --format json"), code)).unwrap()
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap()
    }
}

fn weights() -> Vec<Tensor> {
    let name = |i: u64| format!("layers.{i}.mlp.up_proj.weight");
    (0..3).map(|i| Tensor::random(&name(i), DType::F32, &[32, 64], i)).collect()
}

#[test]
fn every_verb_does_its_work_and_exits_with_0() {
    let shell = Shell::new();
    shell.0.checkpoint("m.safetensors", &weights());
    let mut variant = weights();
    variant[1] = Tensor::random(&variant[1].name, DType::F32, &[32, 64], 9);
    shell.0.checkpoint("v.safetensors", &variant);
    assert!(shell.run("compress m.safetensors -o m.tenpak", 0).contains("wrote m.tenpak"));
    assert!(shell.run("inspect m.tenpak", 0).contains("3 tensors"));
    assert!(shell.run("inspect m.tenpak --tensor layers.1.mlp.up_proj.weight", 0).contains("matrix  32 x 64"));
    assert!(shell.run("verify m.tenpak", 0).starts_with("sound:"));
    assert!(shell.run("decompress m.tenpak -o back.safetensors", 0).contains("wrote back.safetensors"));
    assert!(shell.run("delta --base m.tenpak v.safetensors -o d.tenpak", 0).contains("1 tensors changed, 2 unchanged"));
    assert!(shell.run("inspect d.tenpak", 0).contains("delta    of base"));
    assert!(shell.run("materialize --base m.tenpak --delta d.tenpak -o v.tenpak", 0).contains("wrote v.tenpak"));
    shell.run("compress v.safetensors -o direct.tenpak", 0);
    assert!(shell.bytes("v.tenpak") == shell.bytes("direct.tenpak"));
    assert!(shell.run("bench m.safetensors --codec int4_g8_v1", 0).contains("int4_g8_v1"));
    assert!(shell.run("--help", 0).contains("exit codes"));
    assert!(shell.run("--version", 0).contains(env!("CARGO_PKG_VERSION")));
}

#[test]
fn every_verb_prints_json_of_its_schema() {
    let shell = Shell::new();
    shell.0.checkpoint("m.safetensors", &weights());
    for (line, schema) in [
        ("codecs", "tenpak.codecs/1"),
        ("compress m.safetensors -o m.tenpak", "tenpak.compress/1"),
        ("inspect m.tenpak", "tenpak.inspect/1"),
        ("verify m.tenpak", "tenpak.verify/1"),
        ("decompress m.tenpak -o back.npz", "tenpak.decompress/1"),
        ("delta --base m.tenpak m.safetensors -o d.tenpak", "tenpak.delta/1"),
        ("materialize --base m.tenpak --delta d.tenpak -o again.tenpak", "tenpak.materialize/1"),
        ("export m.tenpak --to hf -o hf", "tenpak.export/1"),
        ("export hf --to tenpak -o back.tenpak", "tenpak.export/1"),
        ("verify hf", "tenpak.verify/1"),
        ("inspect hf", "tenpak.inspect/1"),
        ("compress m.safetensors -o direct", "tenpak.compress/1"),
        ("bench m.safetensors --codec int8_sym_v1", "tenpak.bench/1"),
        ("bench m.safetensors --codec int8_sym_v1 --device cpu", "tenpak.bench/1"),
    ] {
        assert_eq!(shell.json(line, 0)["schema"], schema, "{line}");
    }
    assert!(shell.bytes("m.tenpak") == shell.bytes("again.tenpak"));
    assert!(shell.bytes("m.tenpak") == shell.bytes("back.tenpak"));
    assert!(shell.bytes("hf/model.safetensors") == shell.bytes("direct/model.safetensors"));
}

#[test]
fn the_name_of_the_output_says_which_form_is_written() {
    let shell = Shell::new();
    let dry = shell.run(&format!("compress {SAMPLE} -o hf --dry-run"), 0);
    assert!(dry.contains("would write hf") && dry.contains("tenpak.json"), "{dry}");
    assert!(shell.0.names().is_empty());
    assert!(shell.run(&format!("compress {SAMPLE} -o hf --max-shard-size 300000"), 0).contains("wrote hf: "));
    assert!(shell.run(&format!("compress {SAMPLE} -o m.TENPAK"), 0).contains("wrote m.TENPAK: "));
    assert!(shell.path("hf/model.safetensors.index.json").is_file() && shell.path("m.TENPAK").is_file());
    assert!(shell.run("export hf --to tenpak -o back.tenpak --dry-run", 0).contains("would write back.tenpak: "));
    assert!(shell.run("export hf --to tenpak -o back.tenpak", 0).contains("wrote back.tenpak: "));
    assert!(shell.bytes("m.TENPAK") == shell.bytes("back.tenpak"));
    shell.run("export hf --to hf -o one", 0);
    shell.run("export back.tenpak --to hf -o one --force", 0);
    for (line, says) in [
        ("export hf --to tenpak -o other", "does not end in .tenpak"),
        ("export hf --to hf -o one", "exists"),
        ("export hf --to hf -o hf --force", "holds the input"),
        ("compress hf -o again.tenpak", "tenpak decompress"),
        (&*format!("verify {SAMPLE}"), "tenpak compress"),
    ] {
        let message = shell.run(line, 2);
        assert!(message.contains(says), "{line}: {message}");
    }
    assert!(shell.run("export hf --to ggml -o x", 2).contains("possible values: hf, tenpak"));
    let mut bytes = shell.bytes("one/tokenizer.json");
    bytes[0] ^= 1;
    shell.0.write("one/tokenizer.json", bytes);
    assert!(shell.run("verify one", 1).contains("damaged at byte 0: file 'tokenizer.json', chunk 0: checksum"));
}

#[test]
fn a_json_bundle_is_compressed_with_input_output_and_codec() {
    let shell = Shell::new();
    let data: Vec<f32> = (0..2048_u16).map(|i| f32::from(i % 50) / 10.0).collect();
    shell.0.write("m.json", format!(r#"{{"tensors":[{{"name":"w","shape":[32,64],"data":{data:?}}}]}}"#));
    shell.run("compress --input m.json --output m.tenpak --codec int4_g8_fp16_v1", 0);
    assert_eq!(shell.json("inspect m.tenpak", 0)["tensors"][0]["codec"], "int4_g8_fp16_v1");
}

#[test]
fn what_cannot_be_done_exits_with_2_and_says_why_in_one_line() {
    let shell = Shell::new();
    shell.0.checkpoint("m.safetensors", &weights());
    shell.run("compress m.safetensors -o m.tenpak", 0);
    let known = codecs::all().iter().map(|c| c.id).collect::<Vec<_>>().join(", ");
    for (line, says) in [
        ("compress nowhere.safetensors -o x.tenpak", "nowhere.safetensors: No such file"),
        ("compress m.safetensors -o x.tenpak --codec int3_v1", "unknown codec 'int3_v1'"),
        ("compress m.safetensors -o x.tenpak --codec int3_v1", &known),
        ("compress m.safetensors -o m.tenpak", "exists; choose another name or pass --force"),
        ("compress m.safetensors -o m.safetensors --force", "is the input"),
        ("compress m.tenpak -o x.tenpak", "compressed tenpak artifact"),
        ("compress m.safetensors -o x.tenpak --rule nothing", "expected the form"),
        ("inspect m.tenpak --tensor nothing", "has no tensor 'nothing'"),
        ("verify m.safetensors", "not a tenpak artifact"),
        ("verify nowhere.tenpak", "No such file"),
        ("decompress m.tenpak -o x.gguf", "expected .safetensors, .npz, .json, or a directory"),
        ("decompress m.tenpak -o x.npz --dtype I8", "choose a float dtype"),
        ("materialize --base m.tenpak --delta m.tenpak -o x.tenpak", "expected a delta"),
    ] {
        let message = shell.run(line, 2);
        assert!(message.starts_with("tenpak: ") && message.lines().count() == 1, "{line}: {message}");
        assert!(message.contains(says), "{line}: {message}");
    }
    for line in ["compress", "frobnicate", "compress m.safetensors", "verify m.tenpak --format xml"] {
        assert!(shell.run(line, 2).contains("error:"), "{line}");
    }
    assert_eq!(shell.0.names(), ["m.safetensors", "m.tenpak"]);
}

#[test]
fn verify_exits_with_1_and_lists_each_bad_chunk_and_with_2_when_the_header_is_bad() {
    let shell = Shell::new();
    shell.0.checkpoint("m.safetensors", &weights());
    shell.run("compress m.safetensors -o m.tenpak --codec int4_g8_v1", 0);
    let planes = shell.json("inspect m.tenpak", 0)["tensors"][1]["planes"].clone();
    let sound = shell.bytes("m.tenpak");
    let mut bytes = sound.clone();
    for plane in [0, 2] {
        bytes[usize::try_from(planes[plane]["offset"].as_u64().unwrap()).unwrap() + 5] ^= 4;
    }
    shell.0.write("m.tenpak", &bytes);
    let report = shell.run("verify m.tenpak", 1);
    let listed: Vec<_> = report.lines().filter(|line| line.starts_with("damaged at byte")).collect();
    assert_eq!(listed.len(), 2, "{report}");
    assert!(listed[0].contains("'layers.1.mlp.up_proj.weight', plane codes, chunk 0"), "{report}");
    assert!(listed[1].contains("plane offsets, chunk 0"), "{report}");
    let json = shell.json("verify m.tenpak", 1);
    assert_eq!((&json["sound"], json["problems"].as_array().unwrap().len()), (&false.into(), 2));
    assert!(shell.run("decompress m.tenpak -o x.npz", 2).contains("checksum"));

    bytes = sound;
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    shell.0.write("m.tenpak", &bytes);
    assert!(shell.run("verify m.tenpak", 2).contains("header checksum"));
    assert_eq!(shell.0.names(), ["m.safetensors", "m.tenpak"]);
}

#[test]
fn a_dry_run_is_exact_to_the_byte_and_writes_nothing() {
    let shell = Shell::new();
    shell.0.checkpoint("m.safetensors", &weights());
    for codec in codecs::all() {
        let line = format!("compress m.safetensors -o {}.tenpak --codec {}", codec.id, codec.id);
        let planned = shell.json(&format!("{line} --dry-run"), 0);
        assert!(!shell.path(&format!("{}.tenpak", codec.id)).exists());
        let done = shell.json(&line, 0);
        assert_eq!(planned["file_bytes"], done["file_bytes"], "{}", codec.id);
        assert_eq!(done["file_bytes"], shell.bytes(&format!("{}.tenpak", codec.id)).len(), "{}", codec.id);
    }
    assert!(shell.run("compress m.safetensors --dry-run", 0).contains("would write an artifact"));
}

#[test]
fn quiet_prints_nothing_and_force_replaces() {
    let shell = Shell::new();
    shell.0.checkpoint("m.safetensors", &weights());
    assert_eq!(shell.run("compress m.safetensors -o m.tenpak --quiet", 0), "");
    for verb in ["inspect m.tenpak -q", "verify m.tenpak -q", "codecs -q", "decompress m.tenpak -o m.npz -q"] {
        assert_eq!(shell.run(verb, 0), "", "{verb}");
    }
    shell.run("compress m.safetensors -o m.tenpak --codec int8_sym_v1", 2);
    shell.run("compress m.safetensors -o m.tenpak --codec int8_sym_v1 --force", 0);
    assert_eq!(shell.json("inspect m.tenpak", 0)["tensors"][0]["codec"], "int8_sym_v1");
}

#[test]
fn threads_and_access_change_no_byte() {
    let shell = Shell::new();
    let big = Tensor::random("w.up_proj.weight", DType::BF16, &[300, 2048], 1);
    shell.0.checkpoint("m.safetensors", &[big]);
    shell.run("compress m.safetensors -o 0.tenpak", 0);
    for (name, options) in [("1", "--threads 1"), ("2", "--threads 2"), ("3", "--threads 3 --mmap"), ("4", "--mmap")] {
        shell.run(&format!("compress m.safetensors -o {name}.tenpak {options}"), 0);
        assert!(shell.bytes("0.tenpak") == shell.bytes(&format!("{name}.tenpak")), "{options}");
        shell.run(&format!("decompress {name}.tenpak -o {name}.npz {options}"), 0);
        assert!(shell.bytes("1.npz") == shell.bytes(&format!("{name}.npz")), "{options}");
    }
}

#[test]
fn codecs_lists_the_registry_and_completions_know_every_verb() {
    let shell = Shell::new();
    let list = shell.run("codecs", 0);
    let listed: Vec<_> = list.lines().skip(1).map(|line| line.split(' ').next().unwrap()).collect();
    assert_eq!(listed, codecs::all().iter().map(|c| c.id).collect::<Vec<_>>());
    for name in ["bash", "zsh", "fish"] {
        let script = shell.run(&format!("completions {name}"), 0);
        for verb in [
            "compress",
            "decompress",
            "inspect",
            "verify",
            "bench",
            "delta",
            "export",
            "materialize",
            "merge-index",
            "codecs",
            "devices",
        ] {
            assert!(script.contains(verb), "{verb} in {name}");
        }
    }
    assert!(shell.run("completions tcsh", 2).contains("possible values"));
}

#[test]
fn the_manual_has_a_page_for_every_verb_with_all_its_options() {
    let shell = Shell::new();
    let help = shell.run("--help", 0);
    let verbs = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // Lines that go on with a description begin further to the right.
    let verbs = verbs.filter_map(|line| line.strip_prefix("  ")).filter(|line| !line.starts_with(' '));
    let verbs: Vec<_> = verbs.filter_map(|line| line.split(' ').next()).filter(|verb| *verb != "help").collect();
    assert!(verbs.contains(&"compress") && verbs.contains(&"man"), "{help}");
    shell.run("man pages", 0);
    let page = |name: &str| String::from_utf8(shell.bytes(&format!("pages/{name}.1"))).unwrap().replace('\\', "");
    assert!(page("tenpak").contains("tenpak-compress(1)"));
    for verb in &verbs {
        let (page, help) = (page(&format!("tenpak-{verb}")), shell.run(&format!("{verb} --help"), 0));
        for option in help.split(|c: char| c.is_whitespace() || "[],'`.<>".contains(c)).filter(|w| w.starts_with("--"))
        {
            assert!(page.contains(option.split('=').next().unwrap()), "{option} of {verb} is not in {page}");
        }
    }
    assert_eq!(std::fs::read_dir(shell.path("pages")).unwrap().count(), verbs.len() + 1);
    assert!(shell.run("man pages", 2).contains("exists"));
    shell.run("man pages --force", 0);
}

#[test]
fn diff_exits_with_0_where_nothing_differs_and_with_1_and_says_what() {
    let shell = Shell::new();
    let run = |line: &str, code| shell.json(line, code);
    shell.run(&format!("compress {SAMPLE} -o a.tenpak --codec int4_g32_fp16_v1"), 0);
    shell.run("export a.tenpak --to hf -o a-hf", 0);
    assert!(shell.run("diff a.tenpak a-hf", 0).contains("38 of 38 tensors are the same"));
    assert!(shell.run(&format!("diff {SAMPLE} {SAMPLE} --all"), 0).contains("model.norm.weight"));

    // Against the source: the loss that compress reported.
    let compressed = shell.json(&format!("compress {SAMPLE} -o b.tenpak --codec int4_g32_fp16_v1"), 0);
    let report = run(&format!("diff {SAMPLE} a.tenpak"), 1);
    let row = |report: &serde_json::Value, name: &str| {
        report["tensors"].as_array().unwrap().iter().find(|t| t["name"] == name).unwrap().clone()
    };
    let name = "model.layers.2.mlp.down_proj.weight";
    assert_eq!(row(&report, name)["loss"], row(&compressed, name)["loss"]);
    assert_eq!(row(&report, name)["second"]["codec"], "int4_g32_fp16_v1");
    assert_eq!(row(&report, "model.norm.weight")["status"], "stored", "raw in the artifact, the same weights");

    // Against another codec, and decoded.
    shell.run(&format!("compress {SAMPLE} -o c.tenpak --codec int8_sym_v1"), 0);
    let text = shell.run("diff a.tenpak c.tenpak", 1);
    assert!(
        text.contains("int4_g32_fp16_v1 > int8_sym_v1") && text.contains("10 of 38 tensors are the same"),
        "{text}"
    );
    shell.run("decompress a.tenpak -o a.safetensors --dtype F32", 0);
    let decoded = run("diff a.tenpak a.safetensors", 1);
    assert_eq!(row(&decoded, name)["status"], "stored");

    // Shapes, bytes, and tensors of one side.
    let of = |name: &str, dtype, shape: Vec<u64>, bytes| Tensor { name: name.into(), dtype, shape, bytes };
    let f32s = |name: &str, shape: Vec<u64>, value: f32| {
        let count = shape.iter().product::<u64>();
        of(name, DType::F32, shape, (0..count).flat_map(|_| value.to_le_bytes()).collect())
    };
    for (file, shape, name, last) in [("x.safetensors", vec![2, 3], "b", 1), ("y.safetensors", vec![3, 2], "c", 2)] {
        let (a, own, n) = (f32s("a", shape, 1.0), f32s(name, vec![4], 1.0), f32s("n", vec![1], f32::NAN));
        shell.0.checkpoint(file, &[a, own, of("i", DType::U8, vec![2], vec![1, last]), n]);
    }
    let report = run("diff x.safetensors y.safetensors", 1);
    let status = |name: &str| row(&report, name)["status"].as_str().unwrap().to_owned();
    assert_eq!(["a", "b", "c", "i", "n"].map(status), ["shape", "only_first", "only_second", "values", "same"]);
    assert!(shell.run("diff x.safetensors none.safetensors", 2).contains("none.safetensors"));
}

#[test]
fn devices_lists_the_processor_and_says_whether_this_build_knows_graphics_devices() {
    let shell = Shell::new();
    // Drivers of graphics devices print what they like to standard error.
    let run = |line: &str| {
        let output = shell.output(line);
        assert_eq!(output.status.code(), Some(0), "{line}: {}", text(&output.stderr));
        text(&output.stdout)
    };
    let report: serde_json::Value = serde_json::from_str(&run("devices --format json")).unwrap();
    assert_eq!(report["schema"], "tenpak.devices/1");
    assert_eq!(report["cpu"]["float32"][0], "portable");
    assert_eq!(report.get("wgpu").is_some(), cfg!(feature = "wgpu"));
    let list = run("devices");
    assert!(list.contains("portable"), "{list}");
    match report.get("wgpu").and_then(|devices| devices.as_array()) {
        None => assert!(list.contains("--features wgpu"), "{list}"),
        Some(devices) if devices.is_empty() => assert!(list.contains("mesa-vulkan-drivers"), "{list}"),
        Some(devices) => {
            assert!(devices.iter().all(|device| list.contains(device["name"].as_str().unwrap())), "{list}");
        }
    }
    assert_eq!(report.get("cuda").is_some(), cfg!(feature = "cuda"));
    match report.get("cuda") {
        None => assert!(list.contains("--features cuda"), "{list}"),
        Some(cuda) => {
            // What is missing says what to do about it.
            for missing in cuda["missing"].as_array().unwrap() {
                assert!(list.contains(missing.as_str().unwrap()), "{list}");
            }
            let devices = cuda["devices"].as_array().unwrap();
            assert!(!devices.is_empty() || list.contains("multiply on the CPU"), "{list}");
        }
    }
}

#[test]
fn bench_counts_what_lies_beyond_the_codes_as_compress_does() {
    let shell = Shell::new();
    // Two of these weights are beyond 127 steps of any step that 4.5 bits allow.
    let weight = |i: usize| if i % 5000 == 77 { 300.0 } else { ((i * 7919 % 1000) as f32 - 500.0) / 500.0 };
    let bytes = (0..64 * 128).flat_map(|i| weight(i).to_le_bytes()).collect();
    let name = "layers.0.mlp.up_proj.weight";
    shell
        .0
        .checkpoint("m.safetensors", &[Tensor { name: name.into(), dtype: DType::F32, shape: vec![64, 128], bytes }]);
    let compressed = shell.json("compress m.safetensors -o m.tenpak --codec ecu_v1 --target-bits 4.5", 0);
    let planes = shell.json("inspect m.tenpak", 0)["tensors"][0]["planes"].clone();
    assert!(planes.as_array().unwrap().iter().any(|plane| plane["plane"] == "outlier_values"), "{planes}");
    let bench = shell.json("bench m.safetensors --codec ecu_v1", 0);
    assert_eq!(bench["codecs"][0]["loss"], compressed["tensors"][0]["loss"]);
    assert_eq!(bench["codecs"][0]["size"]["bytes"], compressed["tensors"][0]["stored_bytes"]);
}

#[test]
fn bench_measures_a_device_where_one_is_named_and_refuses_unknown_ones() {
    let shell = Shell::new();
    shell.0.checkpoint("m.safetensors", &weights());
    let bench = |device: &str| format!("bench m.safetensors --codec int4_g8_v1 --codec ecu_v1 --device {device}");
    let table = shell.run(&bench("cpu"), 0);
    assert!(table.contains("x · w") && table.contains("GB/s that cpu decodes"), "{table}");
    assert!(!shell.run("bench m.safetensors --codec int4_g8_v1", 0).contains("x · w"));
    for name in ["gpu", "wgpu0", "CPU"] {
        assert!(shell.run(&bench(name), 2).contains("expected cpu, wgpu, wgpu:N, cuda or cuda:N"), "{name}");
    }
    let said = text(&shell.output(&bench("wgpu:99")).stderr);
    if cfg!(feature = "wgpu") {
        // What there is instead, or how to get one.
        assert!(said.contains("wgpu:99") && said.contains("wgpu:0") || said.contains("mesa-vulkan-drivers"), "{said}");
    } else {
        assert!(said.contains("--features wgpu"), "{said}");
    }
    // One of NVIDIA's that nobody has: what there is instead, what to install, or how to build.
    let refused = shell.output(&bench("cuda:99"));
    let said = text(&refused.stderr);
    assert_eq!(refused.status.code(), Some(2), "{said}");
    if cfg!(feature = "cuda") {
        let driver = said.contains("install NVIDIA's driver") || said.contains("check `nvidia-smi`");
        assert!(driver && said.contains("multiply on the CPU") || said.contains("no device cuda:99, found"), "{said}");
    } else {
        assert!(said.contains("--features cuda"), "{said}");
    }
    assert!(shell.run("bench --help", 0).contains("cuda:N"));
}

/// The variables are those of the loader of Vulkan drivers.
#[test]
#[cfg(all(feature = "wgpu", target_os = "linux"))]
fn devices_says_how_to_get_one_where_there_is_none() {
    let run = |line: &str| {
        let hidden = [("VK_DRIVER_FILES", "/nonexistent"), ("VK_ICD_FILENAMES", "/nonexistent")];
        tenpak().envs(hidden).args(line.split(' ')).output().unwrap()
    };
    let none = |line: &str| {
        let output = run(line);
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let refused = run("bench m.safetensors --device wgpu");
    assert!(refused.status.code() == Some(2) && text(&refused.stderr).contains("mesa-vulkan-drivers"));
    assert!(none("devices").contains("mesa-vulkan-drivers"));
    let report: serde_json::Value = serde_json::from_str(&none("devices --format json")).unwrap();
    assert_eq!(report["wgpu"], serde_json::json!([]));
}

#[test]
fn a_closed_pipe_is_no_error() {
    let shell = Shell::new();
    for line in ["codecs", "completions bash", "--help"] {
        let mut child = tenpak()
            .current_dir(shell.path(""))
            .args(line.split(' '))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), text(&output.stderr)), (Some(0), String::new()), "{line}");
    }
}

/// Length of a file whose compression takes long enough to be stopped: zeros, so that it takes no room on the disk.
const LONG: u64 = 4 << 30;

/// Writes a safetensors file of one tensor of zeros.
fn zeros(path: &Path, bytes: u64) {
    let header =
        format!("{{\"w\":{{\"dtype\":\"F32\",\"shape\":[{},1024],\"data_offsets\":[0,{bytes}]}}}}", bytes / 4096);
    let mut start = (header.len() as u64).to_le_bytes().to_vec();
    start.extend(header.as_bytes());
    fs::write(path, &start).unwrap();
    fs::OpenOptions::new().write(true).open(path).unwrap().set_len(start.len() as u64 + bytes).unwrap();
}

#[test]
fn a_signal_stops_the_work_at_once_and_leaves_nothing() {
    let shell = Shell::new();
    zeros(&shell.path("m.safetensors"), LONG);
    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        for (existing, target) in [(None, "m.tenpak"), (Some("older"), "m.tenpak"), (None, "directory")] {
            existing.iter().for_each(|bytes| drop(shell.0.write("m.tenpak", bytes)));
            let child = tenpak()
                .current_dir(shell.path(""))
                .args(["compress", "m.safetensors", "-o", target, "--force", "--codec", "int4_opt_v1"])
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            // Until it has begun to write: a nameless file of its own is open.
            let start = Instant::now();
            while !writes(child.id()) {
                assert!(start.elapsed() < Duration::from_secs(20));
                std::thread::sleep(Duration::from_millis(5));
            }
            let sent = Instant::now();
            let kill = Command::new("sh").args(["-c", &format!("kill -{signal} {}", child.id())]).status().unwrap();
            assert!(kill.success());
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{signal}: {}", text(&output.stderr));
            assert!(sent.elapsed() < Duration::from_secs(5), "{signal} took {:?}", sent.elapsed());
            match existing {
                Some(bytes) => assert_eq!(shell.bytes("m.tenpak"), bytes.as_bytes()),
                None => assert!(!shell.path(target).exists()),
            }
            assert!(shell.0.names().iter().all(|name| !name.starts_with('.')), "{:?}", shell.0.names());
            drop(fs::remove_file(shell.path("m.tenpak")));
        }
    }
}

/// Whether a process has written a block.
fn writes(pid: u32) -> bool {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let written = io.lines().find_map(|line| line.strip_prefix("wchar: ")).and_then(|n| n.parse::<u64>().ok());
    written.unwrap_or(0) > 1 << 20
}

#[test]
fn the_sample_model_comes_back_from_every_form_with_one_identity() {
    let shell = Shell::new();
    let compressed = shell.json(&format!("compress {SAMPLE} -o m.tenpak --codec int4_g8_fp16_v1"), 0);
    assert!(compressed["total"]["x_vs_16bit"].as_f64().unwrap() > 1.0);
    assert_eq!(shell.json("inspect m.tenpak", 0)["identity"], compressed["identity"]);
    assert_eq!(shell.json("verify m.tenpak", 0)["identity"], compressed["identity"]);
    let mut identities = Vec::new();
    for form in ["back.safetensors", "back.npz", "back.json", "back"] {
        shell.run(&format!("decompress m.tenpak -o {form}"), 0);
        assert!(shell.run(&format!("decompress m.tenpak -o {form}"), 2).contains("exists"), "{form}");
        let raw = shell.json(&format!("compress {form} -o {form}.tenpak --codec raw_v1 --all --threads 1"), 0);
        identities.push((form, raw["identity"].as_str().unwrap().to_owned()));
    }
    assert!(identities.iter().all(|(_, identity)| *identity == identities[0].1), "{identities:?}");
}

#[test]
fn the_sample_model_kept_raw_is_the_sample_model() {
    let shell = Shell::new();
    shell.run(&format!("compress {SAMPLE} -o m.tenpak --codec raw_v1 --all"), 0);
    shell.run("decompress m.tenpak -o back.safetensors", 0);
    let original = fs::read(Path::new(SAMPLE).join("model.safetensors")).unwrap();
    let back = shell.bytes("back.safetensors");
    let [original, back] = [&original, &back].map(|bytes| safetensors::SafeTensors::deserialize(bytes).unwrap());
    assert_eq!(original.len(), back.len());
    assert!(original.iter().all(|(name, tensor)| tensor == back.tensor(name).unwrap()));
    shell.run("decompress m.tenpak -o shards --max-shard-size 400000", 0);
    let index: serde_json::Value = serde_json::from_slice(&shell.bytes("shards/model.safetensors.index.json")).unwrap();
    assert!(index["weight_map"].as_object().unwrap().len() > 10);
    let [one, many] = ["back.safetensors", "shards"].map(|input| {
        let line = format!("compress {input} -o {input}.raw.tenpak --codec raw_v1 --all");
        shell.json(&line, 0)["identity"].clone()
    });
    assert_eq!(one, many);
}
