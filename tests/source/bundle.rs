//! JSON bundles.

use tempfile::tempdir;
use tenpak::source::{Kind, Options, open};
use tenpak::{DType, Error, Limits};

use crate::build::{f32s, write};
use crate::{ACCESSES, assert_refused, open_default, open_with, read_all};

#[test]
fn a_bundle_gives_its_tensors_and_statistics_whatever_the_order_of_fields() {
    let dir = tempdir().unwrap();
    let text = r#"
        {"version": {"any": [1, {"thing": null}]},
         "activation_stats": {"a": [1, 2.5]},
         "tensors": [
            {"data": [1, -2.5, 3e2, 0.1, -0.0, 6], "name": "a", "shape": [2, 3], "note": "x"},
            {"shape": [], "name": "scalar", "data": [7]},
            {"name": "none", "data": [], "shape": [0, 4]}
         ]}"#;
    let path = write(dir.path(), "m.json", text);
    for access in ACCESSES {
        let source = open_with(&path, access).unwrap();
        assert_eq!(source.kind(), Kind::JsonBundle);
        assert_eq!(source.tensors().iter().map(|t| t.info().name()).collect::<Vec<_>>(), ["a", "scalar", "none"]);
        assert_eq!(read_all(&source, "a"), f32s([1.0, -2.5, 300.0, 0.1, -0.0, 6.0]));
        assert_eq!(&source.read_rows(0, 1, 1).unwrap()[..], f32s([0.1, -0.0, 6.0]));
        assert_eq!(read_all(&source, "scalar"), f32s([7.0]));
        assert_eq!(read_all(&source, "none"), b"");
        assert_eq!(source.activation_stats()["a"], [1.0, 2.5]);
        assert_eq!(source.files()[0].digest().unwrap(), blake3::hash(text.as_bytes()));
    }
}

#[test]
fn numbers_take_the_dtype_that_they_came_from_before_or_after_the_data() {
    let dir = tempdir().unwrap();
    let cases: &[(&str, &str, &[u8])] = &[
        ("F64", "0.1", &0.1_f64.to_le_bytes()),
        ("F32", "16777217", &16_777_216_f32.to_le_bytes()),
        ("F16", "65504", &0x7bff_u16.to_le_bytes()),
        ("BF16", "1.5", &0x3fc0_u16.to_le_bytes()),
        ("F8_E4M3", "448", &[0x7e]),
        ("F8_E5M2", "57344", &[0x7b]),
        ("I64", "-9007199254740993", &(-9_007_199_254_740_993_i64).to_le_bytes()),
        ("U64", "18446744073709551615", &u64::MAX.to_le_bytes()),
        ("I32", "-2147483648", &i32::MIN.to_le_bytes()),
        ("U16", "65535", &u16::MAX.to_le_bytes()),
        ("I8", "-128", &[0x80]),
        ("U8", "255", &[255]),
        ("BOOL", "1", &[1]),
    ];
    for (dtype, number, bytes) in cases {
        for text in [
            format!(r#"{{"tensors":[{{"name":"x","dtype":"{dtype}","shape":[1],"data":[{number}]}}]}}"#),
            format!(r#"{{"tensors":[{{"data":[{number}],"dtype":"{dtype}","name":"x","shape":[1]}}]}}"#),
        ] {
            let source = open_default(&write(dir.path(), "m.json", &text)).unwrap();
            assert_eq!(source.tensors()[0].info().dtype().name(), *dtype);
            assert_eq!(read_all(&source, "x"), *bytes, "{text}");
        }
    }
}

#[test]
fn every_f16_and_many_f32_survive_a_bundle() {
    let dir = tempdir().unwrap();
    let bits: Vec<u16> = (0..=u16::MAX).filter(|&b| half::f16::from_bits(b).is_finite()).collect();
    let list: Vec<_> = bits.iter().map(|&b| half::f16::from_bits(b).to_f32().to_string()).collect();
    let text =
        format!(r#"{{"tensors":[{{"name":"h","dtype":"F16","shape":[{}],"data":[{}]}}]}}"#, bits.len(), list.join(","));
    let source = open_default(&write(dir.path(), "m.json", text)).unwrap();
    assert!(read_all(&source, "h") == bits.iter().flat_map(|b| b.to_le_bytes()).collect::<Vec<_>>());

    let numbers: Vec<f32> =
        (0..200_000_u32).map(|i| f32::from_bits(i.wrapping_mul(2_654_435_761))).filter(|x| x.is_finite()).collect();
    let list: Vec<_> = numbers.iter().map(f32::to_string).collect();
    let text = format!(r#"{{"tensors":[{{"name":"s","shape":[{}],"data":[{}]}}]}}"#, numbers.len(), list.join(","));
    let source = open_default(&write(dir.path(), "m.json", text)).unwrap();
    assert!(read_all(&source, "s") == f32s(numbers));
}

#[test]
fn bundles_that_are_wrong_say_where() {
    let dir = tempdir().unwrap();
    let tensor = |fields: &str| format!(r#"{{"tensors":[{{"name":"w.x",{fields}}}]}}"#);
    let cases: Vec<(String, &[&str])> = vec![
        (tensor(r#""shape":[2],"data":[1,2,3]"#), &["w.x", "3 numbers", "takes 2"]),
        (tensor(r#""shape":[2],"data":[1,NaN]"#), &["w.x", "number 1"]),
        (tensor(r#""shape":[2],"data":[1,null]"#), &["w.x", "number 1"]),
        (tensor(r#""shape":[2],"data":[1,1e39]"#), &["w.x", "number 1", "out of range"]),
        (tensor(r#""shape":[2],"data":[1,1e999]"#), &["w.x", "number 1", "out of range"]),
        (tensor(r#""shape":[1],"dtype":"F16","data":[65520]"#), &["w.x", "number 0", "overflows F16"]),
        (tensor(r#""shape":[1],"data":[65520],"dtype":"F16""#), &["w.x", "number 0", "overflows F16"]),
        (tensor(r#""shape":[1],"dtype":"I8","data":[128]"#), &["w.x", "overflows I8"]),
        (tensor(r#""shape":[1],"dtype":"U8","data":[-1]"#), &["w.x", "overflows U8"]),
        (tensor(r#""shape":[1],"dtype":"I32","data":[1.5]"#), &["w.x", "not written as an integer"]),
        (tensor(r#""shape":[1],"dtype":"F4","data":[1]"#), &["w.x", "unknown dtype 'F4'"]),
        (tensor(r#""shape":[2,1],"data":[[1],[2]]"#), &["w.x", "one flat list"]),
        (tensor(r#""shape":[1],"data":["1"]"#), &["w.x", "number 0"]),
        (tensor(r#""shape":[4294967296,4294967296],"data":[1]"#), &["w.x", "2^63"]),
        (tensor(r#""shape":[-1],"data":[1]"#), &["w.x"]),
        (tensor(r#""data":[1]"#), &["w.x", "no 'shape'"]),
        (tensor(r#""shape":[1]"#), &["w.x", "no 'data'"]),
        (tensor(r#""shape":[1],"data":[1],"data":[2]"#), &["w.x", "duplicate field"]),
        (r#"{"tensors":[{"shape":[1],"data":[1]}]}"#.to_owned(), &["tensor number 0", "no 'name'"]),
        (
            r#"{"tensors":[{"name":"a","shape":[0],"data":[]},{"name":"a","shape":[0],"data":[]}]}"#.to_owned(),
            &["'a'", "twice"],
        ),
        (r#"{"tensors":[],"tensors":[]}"#.to_owned(), &["duplicate field"]),
        (r#"{"weights":[]}"#.to_owned(), &["no list 'tensors'"]),
        (r#"{"tensors":[]} trailing"#.to_owned(), &["JSON"]),
        (r#"{"tensors":["#.to_owned(), &["JSON"]),
        (r#"{"tensors":[],"activation_stats":{"a":[1e39]}}"#.to_owned(), &["statistics of 'a'"]),
        (r#"{"tensors":[],"activation_stats":{"a":[1],"a":[2]}}"#.to_owned(), &["statistics of 'a'", "twice"]),
    ];
    for (text, parts) in cases {
        let path = write(dir.path(), "m.json", &text);
        assert_refused(&path, &["m.json"]);
        assert_refused(&path, parts);
    }
}

#[test]
fn errors_name_the_byte() {
    let dir = tempdir().unwrap();
    let text = "{\"tensors\":\n [{\"name\":\"a\",\n\"shape\":[1],\"data\":[x]}]}";
    let path = write(dir.path(), "m.json", text);
    let Error::Corrupt { at, .. } = *open_default(&path).unwrap_err().root() else { panic!("not corrupt") };
    assert_eq!(at, text.find('x').unwrap() as u64);
}

#[test]
fn nesting_and_tokens_without_bound_are_errors_in_any_field() {
    let dir = tempdir().unwrap();
    let deep = "[".repeat(1 << 20);
    for text in [
        format!(r#"{{"unknown":{deep}"#),
        format!(r#"{{"tensors":[{{"unknown":{deep}"#),
        format!(r#"{{"tensors":{deep}"#),
        format!(r#"{{"tensors":[{{"name":"a","data":{deep}"#),
    ] {
        let path = write(dir.path(), "m.json", text);
        assert!(matches!(open_default(&path).unwrap_err().root(), Error::Limit { .. } | Error::Corrupt { .. }));
    }
    let tight = |limits| Options { limits, ..Options::default() };
    let path = write(dir.path(), "m.json", r#"{"tensors":[],"x":[[[[[1]]]]]}"#);
    let refused = open(&path, &tight(Limits { json_depth: 5, ..Limits::DEFAULT })).unwrap_err();
    assert!(matches!(refused.root(), Error::Limit { limit: 5, .. }), "{refused}");
    let long = format!(r#"{{"tensors":[{{"name":"a","shape":[1],"data":[{}]}}]}}"#, "1".repeat(10_000));
    assert_refused(&write(dir.path(), "m.json", long), &["limit exceeded"]);
    let stats = format!(r#"{{"tensors":[],"activation_stats":{{"a":[{}1]}}}}"#, "1,".repeat(100));
    let path = write(dir.path(), "m.json", stats);
    let refused = open(&path, &tight(Limits { header_bytes: 256, ..Limits::DEFAULT })).unwrap_err();
    assert!(matches!(refused.root(), Error::Limit { .. }), "{refused}");
}

#[test]
fn a_bundle_needs_no_extension() {
    let dir = tempdir().unwrap();
    let path = write(dir.path(), "weights", "  {\"tensors\":[{\"name\":\"a\",\"shape\":[1],\"data\":[1]}]}");
    assert_eq!(open_default(&path).unwrap().tensors()[0].info().dtype(), DType::F32);
}
