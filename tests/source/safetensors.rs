//! One safetensors file, and the ways in which one can lie.

use tempfile::tempdir;
use tenpak::source::{Kind, Options, open};
use tenpak::{DType, Error, Limits};

use crate::build::{f32s, safetensors, with_header, write};
use crate::{ACCESSES, assert_refused, open_default, open_with, read_all, refusal};

#[test]
fn a_sound_file_gives_its_tensors_in_file_order() {
    let dir = tempdir().unwrap();
    let header = r#"{"b":{"dtype":"F16","shape":[2],"data_offsets":[8,12]},"a":{"dtype":"F32","shape":[],"data_offsets":[4,8]},
        "empty":{"dtype":"I64","shape":[0,3],"data_offsets":[0,0]},"c":{"shape":[2,1,2],"dtype":"U8","data_offsets":[0,4]},
        "__metadata__":{"format":"pt"}}"#;
    let path = write(dir.path(), "m.safetensors", with_header(header, b"0123456789ab"));
    for access in ACCESSES {
        let source = open_with(&path, access).unwrap();
        assert_eq!(source.kind(), Kind::Safetensors);
        let names: Vec<_> = source.tensors().iter().map(|t| t.info().name()).collect();
        assert_eq!(names, ["empty", "c", "a", "b"]);
        assert_eq!(source.metadata()["format"], "pt");
        assert!(source.config().is_none());
        assert_eq!(read_all(&source, "c"), b"0123");
        assert_eq!(read_all(&source, "a"), b"4567");
        assert_eq!(read_all(&source, "b"), b"89ab");
        assert_eq!(read_all(&source, "empty"), b"");
        assert_eq!(source.tensors()[1].matrix(), (2, 2));
        assert_eq!(&source.read_rows(1, 1, 1).unwrap()[..], b"23");
        assert!(matches!(source.read_rows(1, 1, 2), Err(Error::Invalid(_))));
        assert!(matches!(source.read_rows(1, u64::MAX, 2), Err(Error::Invalid(_))));
        assert!(matches!(source.read_rows(4, 0, 1), Err(Error::Invalid(_))));
    }
}

#[test]
fn every_dtype_is_read() {
    let dir = tempdir().unwrap();
    for &dtype in DType::ALL {
        let size = dtype.size();
        let header = format!(r#"{{"x":{{"dtype":"{dtype}","shape":[3],"data_offsets":[0,{}]}}}}"#, 3 * size);
        let data: Vec<u8> = (0..3 * u8::try_from(size).unwrap()).collect();
        let source = open_default(&write(dir.path(), "m.safetensors", with_header(&header, &data))).unwrap();
        assert_eq!(source.tensors()[0].info().dtype(), dtype);
        assert_eq!(read_all(&source, "x"), data);
    }
}

#[test]
fn dtypes_that_are_not_read_are_named_with_their_tensor() {
    let dir = tempdir().unwrap();
    for dtype in ["F4", "F6_E2M3", "C64", "F8_E8M0", "f32"] {
        let header = format!(r#"{{"some.weight":{{"dtype":"{dtype}","shape":[8],"data_offsets":[0,4]}}}}"#);
        let path = write(dir.path(), "m.safetensors", with_header(&header, b"0123"));
        assert!(matches!(open_default(&path).unwrap_err().root(), Error::Unsupported(_)));
        assert_refused(&path, &["some.weight", dtype, "m.safetensors"]);
    }
}

#[test]
fn reading_everything_in_order_gives_the_digest_without_another_read() {
    let dir = tempdir().unwrap();
    let bytes = safetensors(&[("a.weight", &[5, 7]), ("h.c_fc.weight", &[3, 11]), ("h.c_fc.bias", &[11])]);
    let path = write(dir.path(), "m.safetensors", &bytes);
    for access in ACCESSES {
        std::fs::write(&path, &bytes).unwrap();
        let source = open_with(&path, access).unwrap();
        assert!(source.tensors()[1].transposed());
        for (index, tensor) in source.tensors().iter().enumerate() {
            source.read_rows(index, 0, tensor.matrix().0).unwrap();
        }
        std::fs::write(&path, b"gone").unwrap();
        assert_eq!(source.files()[0].digest().unwrap(), blake3::hash(&bytes));
        assert_eq!((source.files()[0].name(), source.files()[0].file().len()), ("m.safetensors", bytes.len() as u64));
    }
}

#[test]
fn the_digest_is_right_in_whatever_order_the_tensors_are_read() {
    let dir = tempdir().unwrap();
    let bytes = safetensors(&[("a", &[5, 7]), ("b", &[4, 4])]);
    let path = write(dir.path(), "m.safetensors", &bytes);
    let source = open_default(&path).unwrap();
    source.read_rows(1, 0, 4).unwrap();
    source.read_rows(0, 0, 2).unwrap();
    source.read_rows(0, 1, 3).unwrap();
    assert_eq!(source.files()[0].digest().unwrap(), blake3::hash(&bytes));
}

#[test]
fn a_transposed_weight_is_gathered_right_for_every_shape_size_and_range() {
    let dir = tempdir().unwrap();
    // [in, out]: small and odd, one wide, columns far apart, and columns longer than any window.
    let shapes = [(5, 7), (1, 9), (9, 1), (33, 65), (70, 2100), (2, 3_000_000)];
    for (inputs, outputs) in shapes {
        for dtype in [DType::U8, DType::BF16, DType::F32, DType::F64] {
            let size = usize::try_from(dtype.size()).unwrap();
            let (len, stride) = (inputs * outputs * size, outputs * size);
            let data: Vec<u8> = (0..len).map(|i| (i.wrapping_mul(2_654_435_761) >> 7).to_le_bytes()[0]).collect();
            let header = format!(
                r#"{{"c_fc.weight":{{"dtype":"{dtype}","shape":[{inputs},{outputs}],"data_offsets":[0,{len}]}}}}"#
            );
            write(dir.path(), "config.json", r#"{"model_type":"gpt2"}"#);
            let path = write(dir.path(), "m.safetensors", with_header(&header, &data));
            for access in ACCESSES {
                let source = open_with(&path, access).unwrap();
                let tensor = &source.tensors()[0];
                assert_eq!((tensor.transposed(), tensor.matrix()), (true, (outputs as u64, inputs as u64)));
                for (first, rows) in
                    [(0, outputs), (outputs / 2, outputs - outputs / 2), (outputs - 1, 1), (outputs, 0)]
                {
                    let got = source.read_rows(0, first as u64, rows as u64).unwrap();
                    let want = (first..first + rows).flat_map(|row| {
                        (0..inputs).flat_map(move |col| (0..size).map(move |b| col * stride + row * size + b))
                    });
                    assert_eq!(got.len(), rows * inputs * size);
                    assert!(
                        got.iter().zip(want).all(|(&g, at)| g == data[at]),
                        "{inputs} x {outputs} {dtype} from {first}, {rows} rows, {access:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_config_beside_a_single_file_decides_about_conv1d() {
    let dir = tempdir().unwrap();
    let path = write(dir.path(), "m.safetensors", safetensors(&[("h.c_fc.weight", &[3, 4]), ("h.c_fc.bias", &[4])]));
    assert!(open_default(&path).unwrap().tensors()[0].transposed());
    write(dir.path(), "config.json", r#"{"model_type":"gpt_bigcode"}"#);
    let source = open_default(&path).unwrap();
    assert!(!source.tensors()[0].transposed());
    assert_eq!(source.config().unwrap()["model_type"], "gpt_bigcode");
    write(dir.path(), "config.json", "{");
    assert_refused(&path, &["config.json", "JSON"]);
    write(dir.path(), "config.json", "[".repeat(100_000));
    assert_refused(&path, &["config.json", "nesting"]);
}

/// Headers of files of eight bytes of data, whether they are sound, and a word of the error.
const HEADERS: &[(&str, Option<&str>)] = &[
    (r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#, None),
    (r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}   "#, None),
    (
        r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"z":{"dtype":"F32","shape":[0],"data_offsets":[8,8]}}"#,
        None,
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
        None,
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[5],"data_offsets":[0,5]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
        Some("overlaps"),
    ),
    (
        r#"{"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[4],"data_offsets":[4,8]}}"#,
        Some("hole"),
    ),
    (r#"{"a":{"dtype":"U8","shape":[7],"data_offsets":[1,8]}}"#, Some("hole")),
    (r#"{"a":{"dtype":"U8","shape":[7],"data_offsets":[0,7]}}"#, Some("follow the last tensor")),
    (r#"{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}"#, Some("cut off")),
    (r#"{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,8]}}"#, Some("takes 32 bytes")),
    (r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[8,0]}}"#, Some("hole")),
    (r#"{"a":{"dtype":"U8","shape":[4294967296,4294967296,8],"data_offsets":[0,8]}}"#, Some("2^63")),
    (r#"{"a":{"dtype":"U8","shape":[-8],"data_offsets":[0,8]}}"#, Some("JSON")),
    (r#"{"a":{"dtype":"U8","shape":[8.0],"data_offsets":[0,8]}}"#, Some("JSON")),
    (r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,18446744073709551616]}}"#, Some("JSON")),
    (r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8,8]}}"#, Some("JSON")),
    (r#"{"a":{"dtype":"U8","shape":[8]}}"#, Some("lacks")),
    (r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}"#, Some("JSON")),
    (r#"{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}} x"#, Some("JSON")),
    (r#"{"a":1}"#, Some("JSON")),
    (r#"["a"]"#, Some("begin with '{'")),
    (r#"{"__metadata__":{"a":1},"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}"#, Some("JSON")),
    (r#"{}"#, Some("follow the last tensor")),
    ("", Some("begin with '{'")),
];

#[test]
fn headers_are_accepted_and_refused_as_the_reference_reader_does() {
    let dir = tempdir().unwrap();
    for (header, word) in HEADERS {
        let bytes = with_header(header, b"01234567");
        assert_eq!(
            ::safetensors::SafeTensors::deserialize(&bytes).is_ok(),
            word.is_none(),
            "the reference on {header}"
        );
        let path = write(dir.path(), "m.safetensors", &bytes);
        match word {
            None => drop(open_default(&path).unwrap()),
            Some(word) => assert_refused(&path, &[word, "m.safetensors"]),
        }
    }
}

#[test]
fn names_that_occur_twice_or_cannot_be_printed_are_refused() {
    let dir = tempdir().unwrap();
    let entry = r#"{"dtype":"U8","shape":[8],"data_offsets":[0,8]}"#;
    for (header, word) in [
        (format!(r#"{{"a":{entry},"a":{entry}}}"#), "twice"),
        (format!(r#"{{"a\u0000":{entry}}}"#), "control character"),
        (format!(r#"{{"":{entry}}}"#), "empty name"),
        (format!(r#"{{"{}":{entry}}}"#, "n".repeat(1025)), "tensor name"),
        (r#"{"a":{"dtype":"U8","dtype":"I8","shape":[8],"data_offsets":[0,8]}}"#.to_owned(), "duplicate field"),
    ] {
        assert_refused(&write(dir.path(), "m.safetensors", with_header(&header, b"01234567")), &[word]);
    }
}

#[test]
fn lengths_are_checked_before_anything_is_allocated_for_them() {
    let dir = tempdir().unwrap();
    for length in [9, 1 << 20, 1 << 40, u64::MAX - 8, u64::MAX] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend_from_slice(b"{      }");
        assert_refused(&write(dir.path(), "m.safetensors", &bytes), &["cut off", &length.to_string()]);
    }
    for len in 1..8 {
        assert_refused(&write(dir.path(), "m.safetensors", vec![0; len]), &["at least 8 bytes"]);
    }
    let path = write(dir.path(), "m.safetensors", safetensors(&[("a", &[2]), ("b", &[2, 1, 1])]));
    let with = |limits| open(&path, &Options { limits, ..Options::default() }).unwrap_err();
    for limits in [
        Limits { header_bytes: 50, ..Limits::DEFAULT },
        Limits { tensors: 1, ..Limits::DEFAULT },
        Limits { dims: 2, ..Limits::DEFAULT },
        Limits { json_depth: 2, ..Limits::DEFAULT },
    ] {
        assert!(matches!(with(limits).root(), Error::Limit { .. }), "{limits:?}: {}", with(limits));
    }
}

#[test]
fn a_deeply_nested_header_is_an_error() {
    let dir = tempdir().unwrap();
    let header = format!(r#"{{"a":{}"#, "[".repeat(1 << 20));
    assert_refused(&write(dir.path(), "m.safetensors", with_header(&header, b"")), &["nesting of JSON"]);
}

#[test]
fn a_file_cut_or_extended_anywhere_is_refused() {
    let dir = tempdir().unwrap();
    let whole = safetensors(&[("a", &[2, 3]), ("b", &[5])]);
    for len in 0..whole.len() {
        refusal(&write(dir.path(), "m.safetensors", &whole[..len]));
    }
    for more in [1, 8, 4096] {
        let extended = [&whole[..], &vec![0; more]].concat();
        assert_refused(&write(dir.path(), "m.safetensors", extended), &["follow the last tensor"]);
    }
    let source = open_default(&write(dir.path(), "m.safetensors", &whole)).unwrap();
    assert_eq!(read_all(&source, "b"), f32s((0..5).map(|i| 100.0 + i as f32)));
}
