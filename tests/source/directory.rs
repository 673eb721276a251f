//! Model directories, their indexes, and paths that are no checkpoint.

use std::path::Path;

use tempfile::tempdir;
use tenpak::source::Kind;

use crate::build::{f32s, safetensors, write};
use crate::{ACCESSES, assert_refused, open_default, open_with, read_all};

const INDEX: &str = "model.safetensors.index.json";

/// An index of tensors and their shards.
fn index(entries: &[(&str, &str)]) -> String {
    let map: Vec<_> = entries.iter().map(|(name, shard)| format!("{name:?}:{shard:?}")).collect();
    format!(r#"{{"metadata":{{"total_size":1}},"weight_map":{{{}}}}}"#, map.join(","))
}

/// A sound model of two shards.
fn two_shards(dir: &Path) {
    write(dir, "config.json", r#"{"model_type":"llama"}"#);
    write(dir, "model-1.safetensors", safetensors(&[("b", &[2]), ("a", &[3, 2])]));
    write(dir, "model-2.safetensors", safetensors(&[("c", &[4])]));
    let map = [("a", "model-1.safetensors"), ("b", "model-1.safetensors"), ("c", "model-2.safetensors")];
    write(dir, INDEX, index(&map));
}

#[test]
fn shards_are_read_by_name_and_then_by_offset() {
    let dir = tempdir().unwrap();
    two_shards(dir.path());
    for access in ACCESSES {
        let source = open_with(dir.path(), access).unwrap();
        assert_eq!(source.kind(), Kind::HuggingFace);
        assert_eq!(source.tensors().iter().map(|t| t.info().name()).collect::<Vec<_>>(), ["b", "a", "c"]);
        assert_eq!(
            source.files().iter().map(|f| f.name()).collect::<Vec<_>>(),
            ["model-1.safetensors", "model-2.safetensors"]
        );
        assert_eq!(source.config().unwrap()["model_type"], "llama");
        assert_eq!(source.metadata()["format"], "pt");
        assert_eq!(read_all(&source, "a"), f32s((0..6).map(|i| 100.0 + i as f32)));
        assert_eq!(read_all(&source, "c"), f32s((0..4).map(|i| i as f32)));
        for file in source.files() {
            let bytes = std::fs::read(dir.path().join(file.name())).unwrap();
            assert_eq!(file.digest().unwrap(), blake3::hash(&bytes));
        }
    }
}

#[test]
fn without_an_index_the_one_file_is_found() {
    let dir = tempdir().unwrap();
    write(dir.path(), "other.safetensors", safetensors(&[("x", &[1])]));
    assert_eq!(open_default(dir.path()).unwrap().tensors()[0].info().name(), "x");
    write(dir.path(), "another.safetensors", safetensors(&[("y", &[1])]));
    assert_refused(dir.path(), &["2 .safetensors files", INDEX]);
    write(dir.path(), "model.safetensors", safetensors(&[("z", &[1])]));
    assert_eq!(open_default(dir.path()).unwrap().tensors()[0].info().name(), "z");
}

#[test]
fn a_missing_shard_is_named_with_what_it_holds() {
    let dir = tempdir().unwrap();
    two_shards(dir.path());
    std::fs::remove_file(dir.path().join("model-1.safetensors")).unwrap();
    assert_refused(dir.path(), &["model-1.safetensors", "missing", "2 of the model's 3 tensors"]);
}

#[test]
fn an_index_that_disagrees_with_its_shards_is_refused() {
    let (one, two) = ("model-1.safetensors", "model-2.safetensors");
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("a", one), ("c", two)], "'b' is in this shard, but the index does not name it"),
        (&[("a", one), ("b", two), ("c", two)], "'b' is in this shard, but the index puts it in"),
        (&[("a", one), ("b", one), ("c", two), ("d", two)], "'d' is not in this shard"),
        (&[("a", one), ("b", one), ("c", two), ("a", one)], "twice"),
        (&[], "names no tensors"),
    ];
    for (entries, word) in cases {
        let dir = tempdir().unwrap();
        two_shards(dir.path());
        write(dir.path(), INDEX, index(entries));
        assert_refused(dir.path(), &[word]);
    }
    let dir = tempdir().unwrap();
    two_shards(dir.path());
    write(dir.path(), two, safetensors(&[("c", &[4]), ("a", &[3, 2])]));
    assert_refused(dir.path(), &["'a' is in this shard"]);
    for (text, word) in [("{}", "weight_map"), ("[]", "JSON"), (r#"{"weight_map":{"a":1}}"#, "JSON"), ("", "JSON")] {
        write(dir.path(), INDEX, text);
        assert_refused(dir.path(), &[word, INDEX]);
    }
    write(dir.path(), INDEX, format!(r#"{{"metadata":{}"#, "[".repeat(1 << 20)));
    assert_refused(dir.path(), &["nesting of JSON"]);
}

#[test]
fn shard_names_that_are_not_plain_are_refused() {
    let outer = tempdir().unwrap();
    let dir = outer.path().join("model");
    std::fs::create_dir_all(dir.join("sub")).unwrap();
    let shard = safetensors(&[("a", &[1])]);
    let outside = write(outer.path(), "x.safetensors", &shard);
    write(&dir.join("sub"), "x.safetensors", &shard);
    let absolute = outside.to_str().unwrap();
    for name in ["../x.safetensors", absolute, "sub/x.safetensors", "./x", "..", ".", "", "x/", "a\\b", "x\u{0}y"] {
        let map = serde_json::json!({ "weight_map": { "a": name } });
        write(&dir, INDEX, map.to_string());
        assert_refused(&dir, &["not one plain name"]);
    }
    write(&dir, INDEX, index(&[("a", "sub")]));
    assert_refused(&dir, &["not a regular file"]);
}

#[cfg(unix)]
#[test]
fn links_are_followed_within_the_model_and_its_cache_entry_only() {
    use std::os::unix::fs::symlink;
    let outer = tempdir().unwrap();
    let shard = safetensors(&[("a", &[1])]);
    let cache = outer.path().join("hub");
    let entry = cache.join("models--org--name");
    let snapshot = entry.join("snapshots/0123");
    std::fs::create_dir_all(&snapshot).unwrap();
    std::fs::create_dir_all(entry.join("blobs")).unwrap();
    write(&entry.join("blobs"), "abc", &shard);
    write(&entry.join("blobs"), "config", r#"{"model_type":"llama"}"#);
    symlink("../../blobs/abc", snapshot.join("model.safetensors")).unwrap();
    symlink("../../blobs/config", snapshot.join("config.json")).unwrap();
    let source = open_default(&snapshot).unwrap();
    assert_eq!(source.files()[0].name(), "model.safetensors");
    assert!(source.config().is_some());
    assert!(open_default(&snapshot.join("model.safetensors")).unwrap().config().is_some());

    let other = cache.join("models--org--other/blobs");
    std::fs::create_dir_all(&other).unwrap();
    write(&other, "secret", &shard);
    let link = snapshot.join("model.safetensors");
    std::fs::remove_file(&link).unwrap();
    symlink("../../../models--org--other/blobs/secret", &link).unwrap();
    assert_refused(&snapshot, &["outside the model's directory"]);

    let plain = outer.path().join("plain");
    std::fs::create_dir_all(plain.join("blobs")).unwrap();
    write(&plain, "real", &shard);
    symlink("real", plain.join("model.safetensors")).unwrap();
    open_default(&plain).unwrap();
    symlink(entry.join("blobs/config"), plain.join("config.json")).unwrap();
    assert_refused(&plain, &["config.json", "outside the model's directory"]);
    std::fs::remove_file(plain.join("config.json")).unwrap();
    std::fs::remove_file(plain.join("model.safetensors")).unwrap();
    symlink(entry.join("blobs/abc"), plain.join("shard")).unwrap();
    write(&plain, INDEX, index(&[("a", "shard")]));
    assert_refused(&plain, &["shard", "outside the model's directory"]);
    symlink("nowhere", plain.join("broken")).unwrap();
    write(&plain, INDEX, index(&[("a", "broken")]));
    assert_refused(&plain, &["broken"]);
}

#[test]
fn paths_that_are_no_checkpoint_say_so() {
    let dir = tempdir().unwrap();
    assert_refused(&dir.path().join("nothing"), &["nothing"]);
    assert_refused(dir.path(), &["no weights", INDEX, "model.safetensors"]);
    assert_refused(&write(dir.path(), "empty.safetensors", b""), &["empty"]);
    std::fs::remove_file(dir.path().join("empty.safetensors")).unwrap();
    write(dir.path(), "config.json", "{}");
    write(dir.path(), "pytorch_model.bin", b"PK\x03\x04");
    assert_refused(dir.path(), &["pytorch_model.bin", "pickle", "save_file"]);
    assert_refused(&write(dir.path(), "x.dat", b"\x80\x02}q\x00."), &["pickle", "save_file"]);
    assert_refused(&write(dir.path(), "x.pth", b"anything"), &["pickle", "save_file"]);
    assert_refused(&write(dir.path(), "x.h5", b"\x89HDF\r\n\x1a\n"), &["HDF5", "h5py"]);
    assert_refused(&write(dir.path(), "x.gguf", b"GGUF\x03\0\0\0"), &["cut off", "byte 8"]);
    assert_refused(&write(dir.path(), "x.tenpak", b"\x89TNPK\r\n\x1a\x01\0\0\0"), &["tenpak decompress"]);
    assert_refused(&write(dir.path(), "x.txt", b"hello"), &["no known checkpoint"]);
}

#[test]
fn an_index_given_as_the_checkpoint_points_to_its_directory() {
    let dir = tempdir().unwrap();
    two_shards(dir.path());
    assert_refused(&dir.path().join(INDEX), &["directory"]);
}
