//! Bad files by name: each is made by a few lines, and reading it ends in the error that stands beside it.
//!
//! Among them is one for each known class of bugs of loaders: sizes beyond the file (CVE-2026-7482), products that
//! overflow, offsets that point back, counts and lengths without end, indexes and links that leave the directory, names
//! that occur twice, archives that unpack to more than they say. What is wrong with an artifact is told by rule in
//! `tests/hostile_headers.rs`.

use std::io::{Cursor, Write as _};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use tenpak::artifact::delta::materialize;
use tenpak::artifact::{ArtifactFile, verify};
use tenpak::recipe::Recipe;
use tenpak::source::{self, Options};
use tenpak::stats::Stats;
use tenpak::{DType, Error};
use zip::CompressionMethod::{self, Deflated, Stored};
use zip::write::SimpleFileOptions;

use crate::format::{Artifact, Delta, Entry, File, Plane};
use crate::gguf::gguf;
use crate::reached;
use crate::support::{Folder, Tensor, codec, safetensors};

/// How a file is read.
#[derive(Clone, Copy)]
enum Reader {
    Artifact,
    Source,
    Stats,
    Recipe,
    /// As the delta of `base.tenpak`.
    Delta,
}

/// A bad file: its name, how it is read, how it is made in a folder, and what the error says.
struct Case(&'static str, Reader, Box<dyn Fn(&Folder) -> PathBuf>, &'static str);

#[derive(Default)]
struct Cases(Vec<Case>);

impl Cases {
    /// A file of these bytes.
    fn file(
        &mut self,
        name: &'static str,
        reader: Reader,
        file: &'static str,
        bytes: impl AsRef<[u8]>,
        says: &'static str,
    ) {
        let bytes = bytes.as_ref().to_vec();
        self.0.push(Case(name, reader, Box::new(move |folder| folder.write(file, &bytes)), says));
    }

    /// A directory, or whatever else takes more than one file.
    fn made(
        &mut self,
        name: &'static str,
        reader: Reader,
        make: impl Fn(&Folder) -> PathBuf + 'static,
        says: &'static str,
    ) {
        self.0.push(Case(name, reader, Box::new(make), says));
    }
}

/// Reads everything of a file.
fn read(reader: Reader, path: &Path, folder: &Folder) -> tenpak::Result<()> {
    match reader {
        Reader::Artifact => {
            let artifact = ArtifactFile::open(path)?;
            if let Some(problem) = verify::verify(&artifact, |_| Ok(()))?.problems.into_iter().next() {
                return Err(Error::corrupt(problem.at, problem.what));
            }
            Ok(())
        }
        Reader::Source => {
            let source = source::open(path, &Options::default())?;
            for (index, tensor) in source.tensors().iter().enumerate() {
                source.read_rows(index, 0, tensor.matrix().0)?;
            }
            Ok(())
        }
        Reader::Stats => {
            let stats = Stats::open(path, &Options::default())?;
            for name in ["a", "a.weight"] {
                stats.get(name).map(|moments| moments.second_moment()).transpose()?;
                stats.get(name).map(|moments| moments.mean_abs()).transpose()?;
            }
            Ok(())
        }
        Reader::Recipe => Recipe::from_toml(&String::from_utf8_lossy(&std::fs::read(path).unwrap())).map(drop),
        Reader::Delta => {
            let base = ArtifactFile::open(folder.path("base.tenpak"))?;
            let delta = ArtifactFile::open(path)?;
            materialize(&base, &[delta], &folder.path("out.tenpak"), true, &mut |_| Ok(())).map(drop)
        }
    }
}

fn base() -> Artifact {
    let names = ["a", "b", "c"];
    Artifact::new(names.iter().map(|name| Entry::raw(name, DType::U8, &[1], name.as_bytes())).collect())
}

fn artifacts(cases: &mut Cases) {
    use Reader::Artifact as Read;
    let weights: Vec<f32> = (0..63).map(|i| (i % 7) as f32 - 3.0).collect();
    let sample = || {
        let mut artifact = Artifact::new(vec![
            Entry::encoded("w", &[3, 21], false, codec("int4_g8_fp16_v1"), &weights),
            Entry::raw("r", DType::I32, &[3], &[7; 12]),
        ]);
        let bytes = b"{}".to_vec();
        artifact.files.push(Plane { name: "config.json".to_owned(), bytes, ..Plane::default() });
        artifact
    };
    let mut content = |name, says, change: &dyn Fn(&mut Artifact)| {
        let mut artifact = sample();
        change(&mut artifact);
        cases.file(name, Read, "m.tenpak", artifact.bytes(), says);
    };
    content("plane longer than the file (CVE-2026-7482)", "its shape give", &|a| {
        a.tensors[1].planes[0].len = Some(1 << 40)
    });
    content("plane longer than its tensor", "its shape give", &|a| a.tensors[1].planes[0].bytes.resize(16, 0));
    content("plane shorter than its tensor", "its shape give", &|a| a.tensors[0].planes[0].bytes.truncate(9));
    content("plane that begins in the preamble", "at byte 0, expected 64", &|a| {
        a.tensors[0].planes[0].offset = Some(0)
    });
    content("plane that begins in another", "at byte 64, expected 256", &|a| a.tensors[1].planes[0].offset = Some(64));
    content("plane at the last offset", "at byte 18446744073709551615, expected", &|a| {
        a.tensors[1].planes[0].offset = Some(u64::MAX)
    });
    content("product of dimensions over 63 bits", "2^63", &|a| a.tensors[1].shape = vec![1 << 32, 1 << 32]);
    content("product of dimensions that wraps to the right size", "2^63", &|a| {
        a.tensors[1].shape = vec![1 << 32, 1 << 32, 3];
    });
    content("a thousand dimensions", "an array of at most 16", &|a| a.tensors[1].shape = vec![1; 1000]);
    content("two tensors of one name", "occurs twice", &|a| a.tensors[1].name = "w".into());
    content("terminal escape in a name", "control character", &|a| a.tensors[1].name = "\u{1b}[2J".into());
    content("name of two kilobytes", "bytes of a tensor name", &|a| a.tensors[1].name = "n".repeat(2048));
    content("unknown codec", "unknown codec 'int3_v9'", &|a| a.tensors[0].codec = "int3_v9".into());
    content("unknown dtype", "unknown dtype 'F4'", &|a| a.tensors[0].dtype = "F4".into());
    content("attached file with a path", "config.json", &|a| a.files[0].name = "../config.json".into());
    content("attached program", "m.py", &|a| a.files[0].name = "m.py".into());
    content("attached file longer than the file", "expected 2147483648 hex digits", &|a| {
        a.files[0].len = Some(1 << 50)
    });
    content("attached file of a gigabyte", "expected 2048 hex digits", &|a| a.files[0].len = Some(1 << 30));
    content("scale that is infinite", "a value is inf", &|a| {
        a.tensors[0].planes[1].bytes[..2].copy_from_slice(&[0, 0x7c])
    });
    content("scale that is NaN", "a value is NaN", &|a| a.tensors[0].planes[1].bytes[..2].copy_from_slice(&[1, 0x7e]));
    content("bits that no weight uses", "unused bits", &|a| a.tensors[0].planes[0].bytes[11] |= 0xf0);
    content("another model's identity", "identity is", &|a| a.identity = Some("0".repeat(64)));
    content("checksum of another chunk", "checksum is", &|a| a.tensors[1].planes[0].crc32c = Some("00000000".into()));
    content("digest of another plane", "identity", &|a| {
        let identity = a.identity();
        a.tensors[1].planes[0].blake3 = Some("0".repeat(64));
        a.identity = Some(identity);
    });
    let mut file = |name, says, change: &dyn Fn(&mut File)| {
        let mut file = sample().file();
        change(&mut file);
        cases.file(name, Read, "m.tenpak", file.bytes(), says);
    };
    file("header longer than the file", "in a file of", &|f| f.header_bytes = 1 << 20);
    file("header over the limit", "bytes of the header", &|f| f.header_bytes = 1 << 40);
    file("version of the future", "version 9 is not known", &|f| f.version = 9);
    file("feature of the future", "features 0x80", &|f| f.flags = 0x80);
    file("more bytes than it says", "trailing data", &|f| f.file_bytes = Some(512));
    file("fewer bytes than it says", "truncated", &|f| f.file_bytes = Some(1 << 30));
    file("header of nested lists", "header", &|f| *f = f.clone().header("[".repeat(100_000)));
    file("header that is no JSON", "header", &|f| *f = f.clone().header("provenance = 1"));
    file("number with a sign", "header", &|f| *f = f.clone().edit("\"shape\":[3]", "\"shape\":[-3]"));
    file("number beyond 64 bits", "header", &|f| {
        *f = f.clone().edit("\"shape\":[3]", "\"shape\":[36893488147419103232]")
    });
    file("key twice", "duplicate field", &|f| {
        *f = f.clone().edit("\"dtype\":\"I32\"", "\"dtype\":\"I32\",\"dtype\":\"I32\"")
    });
    cases.file("magic alone", Read, "m.tenpak", b"\x89TNPK\r\n\x1a", "truncated");
    cases.file("nothing", Read, "m.tenpak", b"", "magic bytes are missing");
    cases.file(
        "text",
        Read,
        "m.tenpak",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n",
        "not a tenpak artifact",
    );
    let mut newline = sample().bytes();
    newline.remove(5);
    cases.file("sent as text", Read, "m.tenpak", newline, "magic");
    let whole = sample().bytes();
    cases.file("half", Read, "m.tenpak", &whole[..whole.len() / 2], "truncated");
}

/// A safetensors file of a header and so many bytes.
fn with_header(header: &str, data: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.resize(file.len() + data, 0);
    file
}

fn safetensors_files(cases: &mut Cases) {
    use Reader::Source as Read;
    let table: &[(&str, &str, usize, &str)] = &[
        (
            "tensor beyond the file (CVE-2026-7482)",
            r#"{"a":{"dtype":"U8","shape":[1000000],"data_offsets":[0,1000000]}}"#,
            8,
            "cut off",
        ),
        ("offsets that point back", r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}}"#, 8, "hole"),
        ("negative offset", r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[-8,0]}}"#, 8, "JSON"),
        (
            "offset beyond 64 bits",
            r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,18446744073709551616]}}"#,
            8,
            "JSON",
        ),
        (
            "offset at the end of 64 bits",
            r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[18446744073709551608,18446744073709551615]}}"#,
            8,
            "hole",
        ),
        (
            "dimensions whose product wraps to the size",
            r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296,8],"data_offsets":[0,8]}}"#,
            8,
            "2^63",
        ),
        (
            "size that is not that of the shape",
            r#"{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,8]}}"#,
            8,
            "takes 32 bytes",
        ),
        (
            "overlapping tensors",
            r#"{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
            8,
            "overlaps",
        ),
        (
            "two tensors of the same bytes",
            r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#,
            8,
            "overlaps",
        ),
        (
            "hole between tensors",
            r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
            8,
            "hole",
        ),
        (
            "bytes behind the last tensor",
            r#"{"a":{"dtype":"U8","shape":[7],"data_offsets":[0,7]}}"#,
            8,
            "follow the last tensor",
        ),
        (
            "tensor of two shapes",
            r#"{"a":{"dtype":"U8","shape":[8],"shape":[4],"data_offsets":[0,8]}}"#,
            8,
            "duplicate field",
        ),
        (
            "tensor twice",
            r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#,
            8,
            "twice",
        ),
        ("dtype of four bits", r#"{"a":{"dtype":"F4","shape":[16],"data_offsets":[0,8]}}"#, 8, "F4"),
        ("dimension that is a fraction", r#"{"a":{"dtype":"U8","shape":[8.0],"data_offsets":[0,8]}}"#, 8, "JSON"),
        (
            "nine dimensions",
            r#"{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,8],"data_offsets":[0,8]}}"#,
            8,
            "dimensions",
        ),
        ("three offsets", r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8,8]}}"#, 8, "JSON"),
        ("no dtype", r#"{"a":{"shape":[8],"data_offsets":[0,8]}}"#, 8, "lacks"),
        ("empty name", r#"{"":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#, 8, "empty name"),
        ("NUL in a name", r#"{"a\u0000b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#, 8, "control character"),
        (
            "metadata of numbers",
            r#"{"__metadata__":{"a":1},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#,
            8,
            "JSON",
        ),
        ("header of a list", "[1]", 8, "begin with '{'"),
        ("header that is not closed", r#"{"a":{"dtype":"U8""#, 8, "JSON"),
    ];
    for (name, header, data, says) in table {
        cases.file(name, Read, "m.safetensors", with_header(header, *data), says);
    }
    cases.file(
        "header of a million brackets",
        Read,
        "m.safetensors",
        with_header(&format!("{{\"a\":{}", "[".repeat(1 << 20)), 0),
        "nesting of JSON",
    );
    cases.file(
        "header length of 2^63",
        Read,
        "m.safetensors",
        [&(1_u64 << 63).to_le_bytes()[..], b"{}"].concat(),
        "cut off",
    );
    cases.file(
        "header length of all bits",
        Read,
        "m.safetensors",
        [&u64::MAX.to_le_bytes()[..], b"{}"].concat(),
        "cut off",
    );
    cases.file("seven bytes", Read, "m.safetensors", [0; 7], "at least 8 bytes");
    cases.file("empty safetensors", Read, "m.safetensors", b"", "empty");
    cases.file("pickle called safetensors", Read, "m.safetensors", b"\x80\x02}q\x00.", "pickle");
    cases.file("pickle", Read, "m.pt", b"PK\x03\x04", "pickle");
    cases.file("HDF5", Read, "m.h5", b"\x89HDF\r\n\x1a\n", "HDF5");
    cases.file(
        "pointer of Git LFS",
        Read,
        "m.safetensors",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345678\n",
        "git lfs pull",
    );
}

const INDEX: &str = "m/model.safetensors.index.json";

fn directories(cases: &mut Cases) {
    use Reader::Source as Read;
    let shard = || safetensors(&[Tensor::random("a", DType::F32, &[2], 1)]);
    let mut index = |name, map: &str, says| {
        let text = format!(r#"{{"weight_map":{map}}}"#);
        cases.made(
            name,
            Read,
            move |folder| {
                folder.write("x.safetensors", shard());
                folder.write("m/sub/x.safetensors", shard());
                folder.write("m/one.safetensors", shard());
                folder.write(INDEX, &text);
                folder.path("m")
            },
            says,
        );
    };
    index("shard above the directory", r#"{"a":"../x.safetensors"}"#, "not one plain name");
    index("shard by an absolute path", r#"{"a":"/etc/hostname"}"#, "not one plain name");
    index("shard in a directory below", r#"{"a":"sub/x.safetensors"}"#, "not one plain name");
    index("shard by a path of Windows", r#"{"a":"..\\x.safetensors"}"#, "not one plain name");
    index("shard that is the directory", r#"{"a":"."}"#, "not one plain name");
    index("shard of no name", r#"{"a":""}"#, "not one plain name");
    index("shard with a NUL", r#"{"a":"one.safetensors\u0000.txt"}"#, "not one plain name");
    index("shard that is a folder", r#"{"a":"sub"}"#, "not a regular file");
    index("shard that is not there", r#"{"a":"two.safetensors"}"#, "missing");
    index("tensor that its shard lacks", r#"{"a":"one.safetensors","b":"one.safetensors"}"#, "not in this shard");
    index("tensor twice in an index", r#"{"a":"one.safetensors","a":"one.safetensors"}"#, "twice");
    index("index of numbers", r#"{"a":1}"#, "JSON");
    index("index of nothing", "{}", "names no tensors");
    index("index of a list", "[]", "JSON");
    let linked = |target: &'static str| {
        move |folder: &Folder| {
            folder.write("secret.safetensors", safetensors(&[Tensor::random("a", DType::F32, &[2], 1)]));
            folder.write("m/config.json", "{}");
            symlink(target, folder.path("m/model.safetensors")).unwrap();
            folder.path("m")
        }
    };
    cases.made("link out of the directory", Read, linked("../secret.safetensors"), "outside the model's directory");
    cases.made("link to a system's file", Read, linked("/proc/self/environ"), "outside the model's directory");
    cases.made("link to nothing", Read, linked("nowhere"), "no such file");
    cases.made("link to itself", Read, linked("model.safetensors"), "symbolic links");
    let config = |text: &'static str| {
        move |folder: &Folder| {
            folder.write("m/config.json", text);
            folder.checkpoint("m/model.safetensors", &[Tensor::random("a", DType::F32, &[2], 1)]);
            folder.path("m")
        }
    };
    cases.made("config that is no JSON", Read, config("{"), "JSON");
    cases.made(
        "config that breaks off in its quantization",
        Read,
        config(r#"{"quantization_config":{"quant_method":["gptq"]},"model_type":"#),
        "JSON",
    );
    cases.made(
        "config of a compressed directory",
        Read,
        config(r#"{"quantization_config":{"quant_method":"tenpak"}}"#),
        "compressed tenpak directory",
    );
    cases.made(
        "config that is a link out",
        Read,
        |folder| {
            folder.write("outside.json", "{}");
            folder.checkpoint("m/model.safetensors", &[Tensor::random("a", DType::F32, &[2], 1)]);
            symlink("../outside.json", folder.path("m/config.json")).unwrap();
            folder.path("m")
        },
        "outside the model's directory",
    );
    cases.made(
        "directory of nothing",
        Read,
        |folder| folder.write("m/README.md", "").parent().unwrap().to_owned(),
        "no weights",
    );
    cases.made(
        "pipe",
        Read,
        |folder| {
            let path = folder.path("m.safetensors");
            assert!(std::process::Command::new("mkfifo").arg(&path).status().unwrap().success());
            path
        },
        "not a regular file",
    );
}

fn ggufs(cases: &mut Cases) {
    use Reader::Source as Read;
    let all = u64::MAX.to_le_bytes();
    let of = |kind: u32, count: u64| [&kind.to_le_bytes()[..], &count.to_le_bytes()].concat();
    let mut file = |name, bytes: Vec<u8>, says| cases.file(name, Read, "m.gguf", bytes, says);
    file(
        "GGUF whose tensor is beyond the file (CVE-2026-7482)",
        gguf(&[], &[("a", &[32, 1 << 20], 2, 0)], 18),
        "cut off",
    );
    file("GGUF whose dimensions overflow", gguf(&[], &[("a", &[1 << 32, 1 << 32, 2], 0, 0)], 32), "cut off");
    file("GGUF whose rows overflow", gguf(&[], &[("a", &[u64::MAX, 1], 0, 0)], 32), "no whole blocks");
    file("GGUF with nine dimensions", gguf(&[], &[("a", &[1; 9], 0, 0)], 32), "dimensions of a tensor");
    file("GGUF offset beyond the file", gguf(&[], &[("a", &[8], 0, 1 << 40)], 32), "is not where that one ends");
    file("GGUF offset at the end of 64 bits", gguf(&[], &[("a", &[8], 0, u64::MAX)], 32), "is not where that one ends");
    file("GGUF tensors that overlap", gguf(&[], &[("a", &[32], 0, 0), ("b", &[8], 0, 32)], 160), "overlaps");
    file("GGUF tensors of one name", gguf(&[], &[("a", &[8], 0, 0), ("a", &[8], 0, 32)], 64), "twice");
    file("GGUF of half a block", gguf(&[], &[("a", &[33], 2, 0)], 64), "no whole blocks");
    file("GGUF of an unknown type", gguf(&[], &[("a", &[8], 99, 0)], 64), "type 99 of GGUF");
    file(
        "GGUF name of 2^64 bytes",
        [&b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..], &all].concat(),
        "bytes of a GGUF header",
    );
    file("GGUF text of 2^64 bytes", gguf(&[("k", 8, &all)], &[], 0), "bytes of a GGUF header");
    file("GGUF list of 2^64 bytes", gguf(&[("k", 9, &of(0, u64::MAX))], &[], 0), "bytes of a GGUF header");
    file("GGUF list of 2^62 numbers", gguf(&[("k", 9, &of(12, 1 << 62))], &[], 0), "bytes of a GGUF header");
    file("GGUF list of 2^64 lists", gguf(&[("k", 9, &of(9, u64::MAX))], &[], 0), "unknown type");
    file("GGUF lists nested a hundred deep", gguf(&[("k", 9, &of(9, 1).repeat(100))], &[], 0), "nested deeper");
    file("GGUF list of an unknown type", gguf(&[("k", 9, &of(77, 1))], &[], 0), "unknown type 77");
    file("GGUF key twice", gguf(&[("k", 4, &[0; 4]), ("k", 4, &[0; 4])], &[], 0), "occurs twice");
    file("GGUF alignment of 0", gguf(&[("general.alignment", 4, &[0; 4])], &[], 0), "general.alignment");
    file("GGUF alignment of 24", gguf(&[("general.alignment", 4, &[24, 0, 0, 0])], &[], 0), "general.alignment");
    file("GGUF alignment of text", gguf(&[("general.alignment", 8, &[0; 8])], &[], 0), "general.alignment");
    let mut counts = gguf(&[], &[], 0);
    counts[8..16].copy_from_slice(&all);
    file("GGUF of 2^64 tensors", counts.clone(), "tensors of a GGUF file");
    counts[8..16].fill(0);
    counts[16..24].copy_from_slice(&all);
    file("GGUF of 2^64 keys", counts, "keys of a GGUF file");
    let mut version = gguf(&[], &[], 0);
    version[4] = 9;
    file("GGUF of version 9", version.clone(), "version 9");
    version[4..8].copy_from_slice(&[0, 0, 0, 3]);
    file("GGUF of big-endian numbers", version, "big-endian");
    file("GGUF magic alone", b"GGUF".to_vec(), "cut off");
    file(
        "GGUF name that is not UTF-8",
        {
            let mut bytes = gguf(&[], &[("aa", &[8], 0, 0)], 32);
            let at = bytes.windows(2).position(|w| w == b"aa").unwrap();
            bytes[at] = 0xff;
            bytes
        },
        "not UTF-8",
    );
}

/// A version 1 npy file.
fn npy(header: &str, data: usize) -> Vec<u8> {
    let mut file = b"\x93NUMPY\x01\0".to_vec();
    file.extend(u16::try_from(header.len() + 1).unwrap().to_le_bytes());
    file.extend(header.bytes());
    file.push(b'\n');
    file.resize(file.len() + data, 0);
    file
}

fn array(descr: &str, shape: &str, data: usize) -> Vec<u8> {
    npy(&format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"), data)
}

/// A zip of members.
fn archive(members: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        writer.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// Changes a field of the central header of member `index`.
fn central(mut archive: Vec<u8>, index: usize, at: usize, value: &[u8]) -> Vec<u8> {
    let heads: Vec<_> = (0..archive.len() - 4).filter(|&at| archive[at..at + 4] == *b"PK\x01\x02").collect();
    archive[heads[index] + at..][..value.len()].copy_from_slice(value);
    archive
}

fn arrays(cases: &mut Cases) {
    use Reader::Source as Read;
    let sound = array("'<f4'", "(2, 3)", 24);
    let mut file = |name, bytes: Vec<u8>, says| cases.file(name, Read, "m.npy", bytes, says);
    file("array beyond the file (CVE-2026-7482)", array("'<f4'", "(1000000,)", 24), "cut off");
    file("array whose dimensions overflow", array("'<f4'", "(4294967296, 4294967296)", 24), "2^63");
    file("array with a negative dimension", array("'<f4'", "(-2, 3)", 24), "header of array");
    file("array of objects", array("'|O'", "(1,)", 8), "pickled Python objects");
    file("array of big-endian numbers", array("'>f4'", "(1,)", 4), "big-endian");
    file("array of records", array("[('a', '<f4')]", "(1,)", 4), "structured");
    file("array with bytes behind it", array("'<f4'", "(1,)", 9), "takes 4");
    file("array without a shape", npy("{'descr': '<f4', 'fortran_order': False}", 4), "header of array");
    file("array whose header is code", npy("__import__('os').system('true')", 4), "header of array");
    file("array whose header is not closed", npy("{'descr': '<f4', 'shape': (1,", 4), "header of array");
    file("array of version 9", b"\x93NUMPY\x09\0\x10\0".to_vec(), "version");
    file("array magic alone", b"\x93NUMPY".to_vec(), "cut off");
    let mut file = |name, bytes: Vec<u8>, says| cases.file(name, Read, "m.npz", bytes, says);
    let bomb = archive(&[("a.npy", &array("'<f4'", "(250000,)", 1_000_000))], Deflated);
    file(
        "archive that declares terabytes",
        central(bomb.clone(), 0, 24, &0xffff_fff0_u32.to_le_bytes()),
        "cannot have",
    );
    file("archive that unpacks to more than it says", central(bomb, 0, 24, &2000_u32.to_le_bytes()), "takes 1000000");
    let stored = archive(&[("a.npy", &sound), ("b.npy", &sound)], Stored);
    file(
        "archive whose member leaves the file",
        central(stored.clone(), 0, 20, &0x7fff_ffff_u32.to_le_bytes()),
        "cut off",
    );
    let size = u32::try_from(sound.len()).unwrap();
    file("archive whose members share bytes", central(stored.clone(), 1, 42, &[0; 4]), "shares bytes");
    file(
        "archive whose member is longer than its array",
        central(stored.clone(), 0, 20, &(size + 4).to_le_bytes()),
        "takes 24",
    );
    file("archive of an encrypted member", central(stored.clone(), 0, 8, &[1, 0]), "encrypted");
    file("archive of an unknown method", central(stored.clone(), 0, 10, &[97, 0]), "not read");
    file("archive cut in half", stored[..stored.len() / 2].to_vec(), "zip directory");
    file("archive of programs", archive(&[("a.py", b"print()")], Stored), "is not a .npy array");
    file("archive of no array", archive(&[("a.npy", b"no array")], Stored), "does not begin as a .npy file");
    file(
        "archive of two arrays of one name",
        {
            let mut bytes = archive(&[("aa.npy", &sound), ("ab.npy", &sound)], Stored);
            for at in 0..bytes.len() - 6 {
                if bytes[at..at + 6] == *b"ab.npy" {
                    bytes[at + 1] = b'a';
                }
            }
            bytes
        },
        "the same name",
    );
    file("archive of an array whose name climbs", archive(&[("\u{1b}../a.npy", &sound)], Stored), "control character");
}

fn bundles(cases: &mut Cases) {
    use Reader::Source as Read;
    let tensor = |fields: &str| format!(r#"{{"tensors":[{{"name":"w",{fields}}}]}}"#);
    let mut file = |name, text: String, says| cases.file(name, Read, "m.json", text, says);
    file("bundle with fewer numbers than it says", tensor(r#""shape":[3],"data":[1]"#), "takes 3");
    file("bundle with more numbers than it says", tensor(r#""shape":[1],"data":[1,2]"#), "takes 1");
    file("bundle whose dimensions overflow", tensor(r#""shape":[4294967296,4294967296],"data":[1]"#), "2^63");
    file("bundle with a negative dimension", tensor(r#""shape":[-1],"data":[1]"#), "tensor");
    file("bundle of NaN", tensor(r#""shape":[1],"data":[NaN]"#), "number 0");
    file("bundle of Infinity", tensor(r#""shape":[1],"data":[Infinity]"#), "number 0");
    file("bundle of a number beyond floats", tensor(r#""shape":[1],"data":[1e999]"#), "out of range");
    file(
        "bundle of a number of a megabyte",
        tensor(&format!(r#""shape":[1],"data":[{}]"#, "1".repeat(1 << 20))),
        "limit exceeded",
    );
    file("bundle of texts", tensor(r#""shape":[1],"data":["1"]"#), "number 0");
    file("bundle of lists of lists", tensor(r#""shape":[1,1],"data":[[1]]"#), "one flat list");
    file("bundle of a million brackets", tensor(&format!(r#""data":{}"#, "[".repeat(1 << 20))), "");
    file("bundle of an unknown dtype", tensor(r#""shape":[1],"dtype":"F4","data":[1]"#), "unknown dtype");
    file("bundle without a shape", tensor(r#""data":[1]"#), "no 'shape'");
    file(
        "bundle of two tensors of one name",
        r#"{"tensors":[{"name":"a","shape":[0],"data":[]},{"name":"a","shape":[0],"data":[]}]}"#.into(),
        "twice",
    );
    file("bundle of two lists", r#"{"tensors":[],"tensors":[]}"#.into(), "duplicate field");
    file("bundle that ends in the middle", r#"{"tensors":[{"name":"a","#.into(), "JSON");
    file("bundle of something else", r#"{"weights":[]}"#.into(), "no list 'tensors'");
}

fn deltas(cases: &mut Cases) {
    use Reader::Delta as Read;
    let make = |change: fn(&mut Artifact)| {
        move |folder: &Folder| {
            folder.write("base.tenpak", base().bytes());
            let mut delta = Artifact::new(vec![Entry::raw("own", DType::U8, &[1], &[5])]);
            let all: Vec<_> = base().tensors.into_iter().chain(delta.tensors.clone()).collect();
            let result = Artifact::identity_of(all.iter());
            delta.delta = Some(Delta { base: base().identity(), result, runs: vec![(0, 3), (-1, 1)] });
            change(&mut delta);
            folder.write("delta.tenpak", delta.bytes())
        }
    };
    fn section(artifact: &mut Artifact) -> &mut Delta {
        artifact.delta.as_mut().unwrap()
    }
    cases.made("delta of another base", Read, make(|a| section(a).base = "1".repeat(64)), "base");
    cases.made("delta of another result", Read, make(|a| section(a).result = "1".repeat(64)), "result is");
    cases.made("delta that takes tensors beyond its base", Read, make(|a| section(a).runs[0].1 = 4), "there are 3");
    cases.made(
        "delta that takes 2^64 tensors",
        Read,
        make(|a| section(a).runs[0].1 = u64::MAX),
        "18446744073709551615",
    );
    cases.made("delta from a negative tensor", Read, make(|a| section(a).runs[0].0 = i64::MIN), "-9223372036854775808");
    cases.made("delta that uses a tensor twice", Read, make(|a| section(a).runs.push((0, 1))), "");
    cases.made(
        "delta that leaves its own tensor out",
        Read,
        make(|a| section(a).runs.truncate(1)),
        "leave 1 of its 1 tensors out",
    );
    cases.made("model in the place of a delta", Read, make(|a| a.delta = None), "delta");
}

fn texts(cases: &mut Cases) {
    let recipes: &[(&str, &str, &str)] = &[
        ("recipe that is no TOML", "codec = ", "not TOML"),
        ("recipe with an unknown key", "codec = \"raw_v1\"\ncodek = 1", "codek"),
        ("recipe without a codec", "all = true", "codec"),
        ("recipe of an unknown codec", "codec = \"int3_v9\"", "int3_v9"),
        ("recipe whose codec is a number", "codec = 4", "codec"),
        ("recipe with an unknown role", "codec = \"raw_v1\"\n[roles]\nhed = \"raw_v1\"", "hed"),
        ("recipe with a pattern that is not closed", "codec = \"raw_v1\"\ninclude = [\"re:(\"]", "re:("),
        ("recipe with a pattern of gigabytes", "codec = \"raw_v1\"\ninclude = [\"re:(a{1000}){1000}{1000}\"]", "re:"),
        ("recipe with a loss that is no number", "codec = \"raw_v1\"\nmax_loss = nan", "max_loss"),
        ("recipe with a share beyond all", "codec = \"raw_v1\"\noutliers = 1e300", "outliers"),
        ("recipe that includes nothing", "codec = \"raw_v1\"\ninclude = []", "is empty"),
    ];
    for (name, text, says) in recipes {
        cases.file(name, Reader::Recipe, "recipe.toml", text, says);
    }
    let stats = |tensors: &[Tensor]| safetensors(tensors);
    let mean = |values: &[f32]| Tensor::of("a.weight.mean_sq", DType::F32, &[values.len() as u64], values);
    let mut file =
        |name, tensors: &[Tensor], says| cases.file(name, Reader::Stats, "s.safetensors", stats(tensors), says);
    file("statistics of NaN", &[mean(&[1.0, f32::NAN])], "a.weight.mean_sq");
    file("statistics below zero", &[mean(&[1.0, -1.0])], "a.weight.mean_sq");
    file("statistics of another dtype", &[Tensor::random("a.weight.mean_sq", DType::F64, &[2], 1)], "a.weight.mean_sq");
    file(
        "statistics of another shape",
        &[mean(&[1.0; 4]), Tensor::of("a.weight.second_moment", DType::F32, &[2, 2], &[1.0; 4])],
        "a.weight.second_moment",
    );
    file("statistics that are a model", &[Tensor::random("a.weight", DType::F32, &[2], 1)], "a.weight");
    file("statistics without a mean", &[Tensor::of("a.weight.mean_abs", DType::F32, &[2], &[1.0; 2])], "mean_sq");
}

#[test]
fn every_bad_file_has_its_error() {
    let mut cases = Cases::default();
    for add in [artifacts, safetensors_files, directories, ggufs, arrays, bundles, deltas, texts] {
        add(&mut cases);
    }
    let cases = cases.0;
    let mut wrong = Vec::new();
    for Case(name, reader, make, says) in &cases {
        let folder = Folder::new();
        let path = make(&folder);
        let said = match read(*reader, &path, &folder) {
            Ok(()) => "nothing, it was read".to_owned(),
            Err(Error::Io { path, source }) => format!("{}: {source}", path.display()).to_lowercase(),
            Err(error) => error.to_string(),
        };
        let plain = said.len() < 4096 && !said.contains(char::is_control) && !said.contains("panicked");
        if !plain
            || !said.contains(says)
            || said.starts_with("nothing")
            || folder.names().contains(&"out.tenpak".to_owned())
        {
            wrong.push(format!("{name}: expected '{says}', found: {said}"));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), cases.len(), wrong.join("\n"));
    let names: std::collections::HashSet<_> = cases.iter().map(|case| case.0).collect();
    assert!(names.len() == cases.len() && cases.len() >= 100);
    reached("bad files", cases.len(), "each its error");
}
