//! Arrays and archives of arrays.

use tempfile::tempdir;
use tenpak::DType;
use tenpak::source::Kind;
use zip::CompressionMethod::{Deflated, Stored};

use crate::build::{central_header, f32s, npy, write, zip};
use crate::{ACCESSES, assert_refused, open_default, open_with, read_all, refusal};

#[test]
fn an_array_is_read_in_place_with_its_digest() {
    let dir = tempdir().unwrap();
    let data = f32s((0..6).map(|i| i as f32));
    let bytes = npy("'<f4'", false, "(2, 3)", &data);
    let path = write(dir.path(), "weights.npy", &bytes);
    for access in ACCESSES {
        let source = open_with(&path, access).unwrap();
        assert_eq!(source.kind(), Kind::Npy);
        assert_eq!((source.tensors()[0].info().name(), source.tensors()[0].matrix()), ("weights", (2, 3)));
        assert_eq!(read_all(&source, "weights"), data);
        assert_eq!(&source.read_rows(0, 1, 1).unwrap()[..], &data[12..]);
        assert_eq!(source.files()[0].digest().unwrap(), blake3::hash(&bytes));
    }
}

#[test]
fn numpy_dtypes_become_ours() {
    let dir = tempdir().unwrap();
    let table = [
        ("<f8", DType::F64),
        ("<f4", DType::F32),
        ("<f2", DType::F16),
        ("<i8", DType::I64),
        ("<i4", DType::I32),
        ("<i2", DType::I16),
        ("|i1", DType::I8),
        ("<u8", DType::U64),
        ("<u4", DType::U32),
        ("<u2", DType::U16),
        ("|u1", DType::U8),
        ("|b1", DType::Bool),
    ];
    for (descr, dtype) in table {
        let data = vec![1; usize::try_from(dtype.size()).unwrap()];
        let path = write(dir.path(), "x.npy", npy(&format!("'{descr}'"), false, "()", &data));
        let source = open_default(&path).unwrap();
        assert_eq!(source.tensors()[0].info().dtype(), dtype, "{descr}");
        assert_eq!(read_all(&source, "x"), data);
    }
}

#[test]
fn fortran_matrices_keep_their_shape_and_values() {
    let dir = tempdir().unwrap();
    // Element (r, c) of 2 x 3 is 10 r + c; columns lie one after another.
    let data = f32s([0.0, 10.0, 1.0, 11.0, 2.0, 12.0]);
    let members = [
        ("w.npy", npy("'<f4'", true, "(2, 3)", &data)),
        ("v.npy", npy("'<f4'", true, "(6,)", &data)),
        ("h.c_fc.weight.npy", npy("'<f4'", true, "(2, 3)", &data)),
        ("h.c_fc.bias.npy", npy("'<f4'", false, "(3,)", &data[..12])),
    ];
    let members = members.each_ref().map(|(name, bytes)| (*name, bytes.as_slice()));
    for method in [Stored, Deflated] {
        let path = write(dir.path(), "m.npz", zip(&members, method));
        for access in ACCESSES {
            let source = open_with(&path, access).unwrap();
            assert_eq!(source.tensors()[0].info().shape(), [2, 3]);
            assert_eq!(read_all(&source, "w"), f32s([0.0, 1.0, 2.0, 10.0, 11.0, 12.0]));
            assert_eq!(read_all(&source, "v"), data);
            // Transposed twice: the stored order is the matrix view.
            assert!(source.tensors()[2].transposed());
            assert_eq!(source.tensors()[2].matrix(), (3, 2));
            assert_eq!(read_all(&source, "h.c_fc.weight"), data);
        }
    }
    let path = write(dir.path(), "cube.npy", npy("'<f4'", true, "(1, 2, 3)", &data));
    assert_refused(&path, &["Fortran order", "numpy.ascontiguousarray"]);
}

#[test]
fn arrays_of_anything_but_plain_numbers_say_what_to_do() {
    let dir = tempdir().unwrap();
    for (descr, word) in [
        ("'|O'", "pickled Python objects"),
        ("'>f4'", "big-endian"),
        ("'<U5'", "text"),
        ("'|S5'", "text"),
        ("'<c8'", "astype"),
        ("'<M8[ns]'", "astype"),
        ("'<f16'", "astype"),
        ("'|V2'", "safetensors.numpy.save_file"),
        ("'|V1'", "safetensors.numpy.save_file"),
        ("'=f4'", "byte order"),
        ("''", "not read"),
        ("'é'", "not read"),
        ("[('a', '<f4'), ('b', '<i4')]", "structured"),
    ] {
        let path = write(dir.path(), "bad.npy", npy(descr, false, "(1,)", b"01234567"));
        assert_refused(&path, &["bad", word]);
    }
}

#[test]
fn arrays_that_contradict_themselves_are_refused() {
    let dir = tempdir().unwrap();
    let data = f32s([1.0, 2.0]);
    for (shape, word) in [
        ("(3,)", "takes 12"),
        ("(1,)", "takes 4"),
        ("(9223372036854775807, 9223372036854775807)", "2^63"),
        ("(18446744073709551616,)", "is wrong here"),
        ("(-2,)", "is wrong here"),
        ("(1, 1, 1, 1, 1, 1, 1, 1, 2)", "dimensions"),
        ("2", "is wrong here"),
    ] {
        assert_refused(&write(dir.path(), "bad.npy", npy("'<f4'", false, shape, &data)), &[word]);
    }
    let whole = npy("'<f4'", false, "(2,)", &data);
    for len in 6..whole.len() {
        refusal(&write(dir.path(), "bad.npy", &whole[..len]));
    }
    let mut future = whole.clone();
    future[6] = 9;
    assert_refused(&write(dir.path(), "bad.npy", &future), &["version 9.0"]);
    let mut long = b"\x93NUMPY\x02\x00".to_vec();
    long.extend_from_slice(&u32::MAX.to_le_bytes());
    long.extend_from_slice(b"{'descr'");
    assert_refused(&write(dir.path(), "bad.npy", &long), &["cut off"]);
    let deep = "(".repeat(60_000);
    assert_refused(&write(dir.path(), "bad.npy", npy("'<f4'", false, &deep, &data)), &["is wrong here"]);
}

#[test]
fn archives_stored_and_deflated_give_the_same_tensors_and_the_digest_of_the_archive() {
    let dir = tempdir().unwrap();
    let big: Vec<f32> = (0..100_000).map(|i| (i % 977) as f32).collect();
    let (a, b) = (npy("'<f4'", false, "(100, 1000)", &f32s(big.clone())), npy("'|u1'", false, "(3,)", b"xyz"));
    for method in [Stored, Deflated] {
        let bytes = zip(&[("z/layer.weight.npy", &a), ("arr_0.npy", &b)], method);
        let path = write(dir.path(), "m.npz", &bytes);
        for access in ACCESSES {
            let source = open_with(&path, access).unwrap();
            assert_eq!(source.kind(), Kind::Npz);
            let names: Vec<_> = source.tensors().iter().map(|t| t.info().name()).collect();
            assert_eq!(names, ["z/layer.weight", "arr_0"]);
            assert_eq!(read_all(&source, "z/layer.weight"), f32s(big.clone()));
            assert_eq!(read_all(&source, "arr_0"), b"xyz");
            assert_eq!(source.files().len(), 1);
            assert_eq!(source.files()[0].digest().unwrap(), blake3::hash(&bytes));
        }
    }
}

#[test]
fn archives_that_explode_are_refused() {
    let dir = tempdir().unwrap();
    let zeros = vec![0; 4 << 20];
    let small = npy("'|u1'", false, "(8,)", &zeros);
    let path = write(dir.path(), "bomb.npz", zip(&[("a.npy", &small)], Deflated));
    assert_refused(&path, &["'a'", "takes 8"]);

    // The directory states the size that the shape needs; the data go on.
    let mut lying = zip(&[("a.npy", &small)], Deflated);
    let at = central_header(&lying, 0) + 24;
    let need = u32::try_from(small.len() - zeros.len() + 8).unwrap();
    lying[at..at + 4].copy_from_slice(&need.to_le_bytes());
    assert_refused(&write(dir.path(), "bomb.npz", &lying), &["a.npy", "cannot be unpacked"]);

    // It states more than deflate can do.
    let honest = npy("'|u1'", false, "(4194304,)", &zeros);
    let mut lying = zip(&[("a.npy", &honest)], Deflated);
    let at = central_header(&lying, 0) + 24;
    lying[at..at + 4].copy_from_slice(&u32::MAX.wrapping_sub(1).to_le_bytes());
    assert_refused(&write(dir.path(), "bomb.npz", &lying), &["cannot have 4294967294 bytes"]);

    // Two members share their bytes.
    let mut lying = zip(&[("a.npy", &honest), ("b.npy", &honest)], Deflated);
    let at = central_header(&lying, 1) + 42;
    lying[at..at + 4].copy_from_slice(&0_u32.to_le_bytes());
    assert_refused(&write(dir.path(), "bomb.npz", &lying), &["shares bytes"]);
}

#[test]
fn damaged_archives_are_refused() {
    let dir = tempdir().unwrap();
    let array = npy("'<f4'", false, "(64,)", &f32s((0..64).map(|i| i as f32)));
    for method in [Stored, Deflated] {
        let whole = zip(&[("a.npy", &array)], method);
        for len in 4..whole.len() {
            refusal(&write(dir.path(), "m.npz", &whole[..len]));
        }
    }
    let mut flipped = zip(&[("a.npy", &array)], Deflated);
    let at = central_header(&flipped, 0) + 16;
    flipped[at] ^= 1;
    assert_refused(&write(dir.path(), "m.npz", &flipped), &["a.npy", "cannot be unpacked"]);
    assert_refused(&write(dir.path(), "m.npz", zip(&[("notes.txt", b"hi")], Stored)), &["notes.txt", "numpy.savez"]);
    for pickle in ["data.pkl", "archive/data.pkl"] {
        let path = write(dir.path(), "model.pt", zip(&[(pickle, b"\x80\x02.")], Stored));
        assert_refused(&path, &["pickle", "save_file", "model.pt"]);
    }
}

#[test]
fn a_directory_that_claims_more_members_than_allowed_is_refused_before_room_is_made() {
    let dir = tempdir().unwrap();
    let path = dir.path().join("huge.npz");
    let file = std::fs::File::create(&path).unwrap();
    // Sparse: only the end records take room on the disk.
    let record_at = 1_u64 << 40;
    let (mut record, mut locator, mut end) = (vec![0; 56], vec![0; 20], vec![0xff; 22]);
    record[..4].copy_from_slice(b"PK\x06\x06");
    record[4..12].copy_from_slice(&44_u64.to_le_bytes());
    for at in [24, 32, 40] {
        record[at..at + 8].copy_from_slice(&(1_u64 << 34).to_le_bytes());
    }
    locator[..4].copy_from_slice(b"PK\x06\x07");
    locator[8..16].copy_from_slice(&record_at.to_le_bytes());
    locator[16] = 1;
    end[..8].copy_from_slice(b"PK\x05\x06\0\0\0\0");
    end[20..].fill(0);
    use std::io::{Seek, SeekFrom, Write};
    let mut out = &file;
    out.write_all(b"PK\x03\x04").unwrap();
    out.seek(SeekFrom::Start(record_at)).unwrap();
    out.write_all(&[record, locator, end].concat()).unwrap();
    assert_refused(&path, &["members of a zip archive"]);
}
