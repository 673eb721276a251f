//! Damage anywhere in a file of any kind ends in a result or an error.

use tempfile::tempdir;
use zip::CompressionMethod::{Deflated, Stored};

use crate::build::{f32s, npy, safetensors, write, zip};
use crate::{ACCESSES, open_with};

#[test]
fn every_flipped_bit_and_extreme_byte_ends_in_a_result_or_an_error() {
    let dir = tempdir().unwrap();
    let array = npy("'<f4'", true, "(2, 3)", &f32s((0..6).map(|i| i as f32)));
    let bundle = br#"{"tensors":[{"name":"a.c_fc.weight","dtype":"F16","shape":[2,1],"data":[1,-2.5e1]}],"activation_stats":{"a":[1]}}"#;
    let files = [
        ("m.safetensors", safetensors(&[("h.c_fc.weight", &[2, 3]), ("h.c_fc.bias", &[3])])),
        ("m.npy", array.clone()),
        ("stored.npz", zip(&[("a.npy", &array), ("b.npy", &array)], Stored)),
        ("deflated.npz", zip(&[("a.npy", &array), ("b.npy", &array)], Deflated)),
        ("m.json", bundle.to_vec()),
    ];
    for (name, whole) in files {
        let mut opened = 0;
        for at in 0..whole.len() {
            for change in [1, 2, 4, 8, 16, 32, 64, 128, whole[at], !whole[at]] {
                let mut damaged = whole.clone();
                damaged[at] ^= change;
                let path = write(dir.path(), name, &damaged);
                let Ok(source) = open_with(&path, ACCESSES[at % 2]) else { continue };
                opened += 1;
                for (index, tensor) in source.tensors().iter().enumerate() {
                    let (rows, _) = tensor.matrix();
                    if let Ok(block) = source.read_rows(index, 0, rows) {
                        assert_eq!(block.len() as u64, tensor.info().bytes());
                    }
                }
                assert_eq!(source.files()[0].digest().unwrap(), blake3::hash(&damaged));
            }
        }
        assert!(opened > 0, "{name}: some damage, as in a weight, cannot be seen here");
    }
}
