//! What decompression promises: every form holds the decoded weights, rounded once, and no finite one becomes infinite.

mod support;

use support::{Folder, Tensor, bits, codec, decode, open_source, pack, refusal, with};
use tenpak::artifact::ArtifactFile;
use tenpak::compress::Options;
use tenpak::export::{self, decompress};
use tenpak::{DType, codecs, to_f32};

/// The float dtypes and their largest number.
const LARGEST: &[(DType, f32)] = &[
    (DType::F64, f32::MAX),
    (DType::F32, f32::MAX),
    (DType::F16, 65_504.0),
    (DType::BF16, 3.389_531_4e38),
    (DType::F8E4M3, 448.0),
    (DType::F8E5M2, 57_344.0),
];

fn packed(folder: &Folder, tensors: &[Tensor], codec: &'static tenpak::Codec) -> ArtifactFile {
    let input = folder.checkpoint("m.safetensors", tensors);
    let output = folder.path("m.tenpak");
    pack(&input, &output, &Options { force: true, ..with(codec) }).unwrap();
    ArtifactFile::open(output).unwrap()
}

/// The weights of a tensor in a decompressed form.
fn weights_in(folder: &Folder, form: &str, name: &str) -> (DType, Vec<f32>) {
    let source = open_source(&folder.path(form));
    let index = source.tensors().iter().position(|t| t.info().name() == name).unwrap();
    let info = source.tensors()[index].info();
    let mut weights = vec![0.0; usize::try_from(info.elements()).unwrap()];
    to_f32(info.dtype(), &source.read_bytes(index, 0, info.bytes()).unwrap(), &mut weights);
    (info.dtype(), weights)
}

#[test]
fn no_finite_weight_becomes_infinite_however_large() {
    let folder = Folder::new();
    for codec in codecs::all() {
        for &(dtype, most) in LARGEST {
            // Half of it where the range itself would leave f32.
            let most = if most > 1e38 { most / 4.0 } else { most };
            let weights: Vec<f32> = (0..256_u16).map(|i| most * (f32::from(i % 16) / 7.5 - 1.0)).collect();
            let artifact = packed(&folder, &[Tensor::of("w", dtype, &[2, 128], &weights)], codec);
            let force = export::Options { force: true, ..export::Options::default() };
            decompress(&artifact, &folder.path("back.safetensors"), &force, &mut |_| Ok(())).unwrap();
            let (found, back) = weights_in(&folder, "back.safetensors", "w");
            assert_eq!(found, dtype);
            assert!(back.iter().all(|w| w.is_finite()), "{} of {dtype}", codec.id);
        }
    }
}

#[test]
fn weights_beyond_the_range_of_a_dtype_are_counted_in_a_note() {
    let folder = Folder::new();
    let weights = [1.0, -70_000.0, 65_504.0, 1e9];
    let artifact = packed(&folder, &[Tensor::of("w", DType::F32, &[1, 4], &weights)], codec(codecs::RAW));
    let halves = export::Options { dtype: Some(DType::F16), ..export::Options::default() };
    let exported = decompress(&artifact, &folder.path("back.npz"), &halves, &mut |_| Ok(())).unwrap();
    let note = "w: 2 weights are beyond the range of F16 and were written as its greatest number";
    assert_eq!(exported.notes, [note]);
    assert_eq!(weights_in(&folder, "back.npz", "w").1, [1.0, -65_504.0, 65_504.0, 65_504.0]);
}

#[test]
fn every_form_holds_the_decoded_weights() {
    let folder = Folder::new();
    let tensors: Vec<_> = LARGEST.iter().map(|&(dtype, _)| Tensor::random(dtype.name(), dtype, &[3, 65], 5)).collect();
    for codec in [codec("int4_g8_fp16_v1"), codec("int8_sym_v1"), codec(codecs::RAW)] {
        let artifact = packed(&folder, &tensors, codec);
        for form in ["back.safetensors", "back.npz", "back.json", "back"] {
            let force = export::Options { force: true, ..export::Options::default() };
            let exported = decompress(&artifact, &folder.path(form), &force, &mut |_| Ok(())).unwrap();
            for (index, tensor) in tensors.iter().enumerate() {
                let (found, back) = weights_in(&folder, form, &tensor.name);
                let rounded = Tensor::of("w", found, &tensor.shape, &decode(&artifact, index).unwrap());
                assert_eq!(bits(&back), bits(&rounded.weights()), "{} of {} in {form}", codec.id, tensor.name);
                let noted = exported.notes.iter().any(|note| note.starts_with(&format!("{}:", tensor.name)));
                assert_eq!(found != tensor.dtype, noted, "{} in {form}", tensor.name);
            }
        }
    }
}

#[test]
fn another_dtype_is_given_to_floats_and_to_nothing_else() {
    let folder = Folder::new();
    let tensors = [Tensor::random("w", DType::F32, &[4, 64], 1), Tensor::random("i", DType::I32, &[4], 2)];
    let artifact = packed(&folder, &tensors, codec("int4_g8_v1"));
    for &(dtype, _) in LARGEST {
        let options = export::Options { dtype: Some(dtype), force: true, ..export::Options::default() };
        decompress(&artifact, &folder.path("back.safetensors"), &options, &mut |_| Ok(())).unwrap();
        let (found, back) = weights_in(&folder, "back.safetensors", "w");
        let rounded = Tensor::of("w", dtype, &[4, 64], &decode(&artifact, 0).unwrap());
        assert_eq!((found, bits(&back)), (dtype, bits(&rounded.weights())));
        assert_eq!(weights_in(&folder, "back.safetensors", "i").0, DType::I32);
    }
}

#[test]
fn a_number_that_json_cannot_hold_is_refused_and_leaves_nothing() {
    let folder = Folder::new();
    let artifact = packed(&folder, &[Tensor::of("w", DType::F32, &[3], &[1.0, f32::NAN, 2.0])], codec(codecs::RAW));
    let result = decompress(&artifact, &folder.path("back.json"), &export::Options::default(), &mut |_| Ok(()));
    assert!(refusal(result, "invalid").contains("at index 1 that is not finite"));
    assert_eq!(folder.names(), ["m.safetensors", "m.tenpak"]);
}

#[test]
fn a_damaged_artifact_leaves_no_output_of_any_form() {
    let folder = Folder::new();
    let path = packed(&folder, &[Tensor::random("w", DType::F32, &[4, 64], 1)], codec("int4_g8_v1")).path().to_owned();
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[70] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let artifact = ArtifactFile::open(&path).unwrap();
    for form in ["back.safetensors", "back.npz", "back.json"] {
        refusal(decompress(&artifact, &folder.path(form), &export::Options::default(), &mut |_| Ok(())), "corrupt");
        assert_eq!(folder.names(), ["m.safetensors", "m.tenpak"]);
    }
}
