//! However hostile a file is, reading it ends in a result or a typed error, and no bit of a weight changes silently.

#![cfg(unix)]

#[path = "support/damage.rs"]
mod damage;
#[path = "support/format.rs"]
mod format;
mod support;

use std::time::Instant;

use damage::{Outcome, Probe};
use format::{Artifact, Delta, Entry, File, Plane};
use rayon::prelude::*;
use support::{Random, Tensor};
use tenpak::{DType, Limits, codecs};

/// Raw and encoded tensors, ragged, transposed and empty, in under 4 KiB.
fn sample() -> Artifact {
    let weights = |name: &str, shape: &[u64]| Tensor::random(name, DType::F32, shape, 3).weights();
    let encoded = |name: &str, shape: &[u64], transposed, id: &str| {
        Entry::encoded(name, shape, transposed, codecs::get(id).unwrap(), &weights(name, shape))
    };
    let mut artifact = Artifact::new(vec![
        encoded("w", &[3, 21], false, "int4_g8_fp16_v1"),
        encoded("z", &[2, 70], false, "int4_zp_g32_fp16_v1"),
        Entry::raw("r", DType::I32, &[3], &[7; 12]),
        encoded("t", &[16, 4], true, "int8_sym_v1"),
        Entry::raw("e", DType::F32, &[0, 4], &[]),
    ]);
    artifact.metadata.push(("format".to_owned(), "pt".to_owned()));
    artifact.files.push(Plane { name: "config.json".to_owned(), bytes: b"{\"a\": 1}".to_vec(), ..Plane::default() });
    artifact
}

fn sample_delta() -> Artifact {
    let base = sample();
    let mut delta = base.clone();
    delta.tensors.truncate(2);
    let result = Artifact::identity_of(delta.tensors.iter().chain(&base.tensors[2..]).collect::<Vec<_>>().into_iter());
    delta.delta = Some(Delta { base: base.identity(), result, runs: vec![(-1, 2), (2, 3)] });
    delta
}

/// An artifact for every codec, one of several tensors, and a delta.
fn small_artifacts() -> Vec<(String, Vec<u8>)> {
    let mut all = vec![("several".to_owned(), sample().bytes()), ("delta".to_owned(), sample_delta().bytes())];
    for codec in codecs::all() {
        let tensor = Tensor::random("w", DType::F32, &[3, 131], 1);
        let entry = match codec.grouped() {
            Ok(_) => Entry::encoded("w", &tensor.shape, false, codec, &tensor.weights()),
            Err(_) => Entry::raw("w", tensor.dtype, &tensor.shape, &tensor.bytes),
        };
        all.push((codec.id.to_owned(), Artifact::new(vec![entry]).bytes()));
    }
    let codes: Vec<u8> = (0..60 * 21_usize).map(|i| [126, 127, 128, 129][i * i % 7 % 4]).collect();
    all.push(("coded".to_owned(), Artifact::new(vec![Entry::coded("w", [60, 21], &codes, 0.5)]).bytes()));
    assert!(all.iter().all(|(_, bytes)| bytes.len() <= 4096));
    all
}

#[test]
fn every_flip_of_one_bit_is_refused() {
    let start = Instant::now();
    let artifacts = small_artifacts();
    let check = |(name, sound): &(String, Vec<u8>)| {
        let probe = Probe::new();
        assert_eq!(probe.read(sound), Outcome::Sound, "{name}");
        for (at, &byte) in sound.iter().enumerate() {
            for bit in 0..8 {
                let outcome = probe.read_with(at, byte ^ (1 << bit), byte);
                assert_ne!(outcome, Outcome::Sound, "{name}: bit {bit} of byte {at}");
            }
        }
        8 * sound.len()
    };
    let flips: usize = artifacts.par_iter().map(check).sum();
    let (count, took) = (artifacts.len(), start.elapsed());
    eprintln!("campaign single flips: {flips} cases, 0 failures; every bit of {count} artifacts, 0 silent, {took:?}");
}

/// Damages small artifacts at random, `rounds` times in all, as `damage` does it; none of them may pass for sound.
fn campaign(name: &str, rounds: usize, damage: fn(&mut [u8], &mut Random)) {
    let start = Instant::now();
    let artifacts = small_artifacts();
    let each = rounds.div_ceil(artifacts.len());
    let check = |(number, (name, sound)): (usize, &(String, Vec<u8>))| {
        let probe = Probe::new();
        let mut random = Random(number as u64);
        for _ in 0..each {
            let mut bytes = sound.clone();
            damage(&mut bytes, &mut random);
            let expected = if bytes == *sound { Outcome::Sound } else { Outcome::Refused };
            assert_eq!(probe.read(&bytes).plain(), expected, "{name}");
        }
    };
    artifacts.par_iter().enumerate().for_each(check);
    let (cases, count) = (each * artifacts.len(), artifacts.len());
    eprintln!("campaign {name}: {cases} cases, 0 failures; 0 silent, {count} artifacts, {:?}", start.elapsed());
}

#[test]
fn random_damage_of_several_bytes_is_refused() {
    campaign("damaged bytes", damage::rounds(12_000), |bytes, random| {
        for _ in 0..=random.below(4) {
            bytes[random.below(bytes.len())] = random.bits().to_le_bytes()[0];
        }
    });
}

#[test]
fn two_flipped_bits_are_refused_wherever_they_are() {
    campaign("double flips", damage::rounds(12_000), |bytes, random| {
        for _ in 0..2 {
            bytes[random.below(bytes.len())] ^= 1 << random.below(8);
        }
    });
}

#[test]
fn a_page_that_is_lost_repeated_or_of_another_file_is_refused() {
    campaign("damaged pages", damage::rounds(12_000), |bytes, random| {
        let page = [64, 512, 4096][random.below(3)].min(bytes.len());
        let at = random.below(bytes.len().div_ceil(page)) * page;
        let end = bytes.len().min(at + page);
        match random.below(3) {
            0 => bytes[at..end].fill(0),
            1 => {
                let from = random.below(bytes.len() - (end - at) + 1);
                bytes.copy_within(from..from + end - at, at);
            }
            _ => bytes[at..end].iter_mut().for_each(|byte| *byte = random.bits().to_le_bytes()[0]),
        }
    });
}

#[test]
fn a_file_cut_off_at_any_length_or_longer_than_it_says_is_refused() {
    let mut cases = 0;
    for (name, sound) in [("several", sample().bytes()), ("delta", sample_delta().bytes())] {
        cases += sound.len() + 4096;
        let probe = Probe::new();
        for len in 0..sound.len() {
            assert!(matches!(probe.read(&sound[..len]), Outcome::Corrupt(_)), "{name} cut off at {len}");
        }
        let mut longer = sound.clone();
        for _ in 1..=4096 {
            longer.push(0);
            let Outcome::Corrupt(what) = probe.read(&longer) else { panic!("{name} of {} bytes", longer.len()) };
            assert!(what.contains("trailing data"), "{what}");
        }
    }
    eprintln!("campaign lengths: {cases} cases, 0 failures; cut off at every byte, longer by 1 to 4096");
}

#[test]
fn sizes_of_nothing_may_be_absurd() {
    let most = 1 << 57;
    for shape in [[0, most], [most, 0]] {
        for dtype in [DType::F64, DType::U8] {
            let entry = Entry::raw("e", dtype, &shape, &[]);
            assert_eq!(Probe::new().read(&Artifact::new(vec![entry]).bytes()), Outcome::Sound, "{shape:?}");
        }
        for codec in codecs::all().iter().filter(|codec| codec.grouped().is_ok()) {
            let mut entry = Entry::encoded("e", &[0, 8], false, codec, &[]);
            entry.shape = shape.to_vec();
            assert_eq!(
                Probe::new().read(&Artifact::new(vec![entry]).bytes()),
                Outcome::Sound,
                "{} {shape:?}",
                codec.id
            );
        }
    }
}

#[test]
fn limits_can_be_raised_and_lowered_by_the_caller() {
    let long = "n".repeat(1025);
    let artifact = Artifact::new(vec![Entry::raw(&long, DType::U8, &[1; 9], &[1])]);
    let probe = Probe::new();
    assert!(matches!(probe.read(&artifact.bytes()), Outcome::Limit(_)));
    let raised = Limits { name_bytes: 1025, dims: 9, ..Limits::DEFAULT };
    assert_eq!(probe.read_within(&artifact.bytes(), &raised), Outcome::Sound);
    let bytes = sample().bytes();
    for (limits, what) in [
        (Limits { tensors: 4, ..Limits::DEFAULT }, "number of tensors is 5, at most 4"),
        (Limits { dims: 1, ..Limits::DEFAULT }, "dimensions of a tensor is 2, at most 1"),
        (Limits { name_bytes: 0, ..Limits::DEFAULT }, "bytes of a tensor name is 1, at most 0"),
        (Limits { files: 0, ..Limits::DEFAULT }, "number of attached files is 1, at most 0"),
        (Limits { file_bytes: 7, ..Limits::DEFAULT }, "bytes of an attached file is 8, at most 7"),
        (Limits { header_bytes: 100, ..Limits::DEFAULT }, "bytes of the header is"),
    ] {
        let Outcome::Limit(message) = probe.read_within(&bytes, &limits) else { panic!("{limits:?}") };
        assert!(message.contains(what), "{message}");
    }
}

/// Numbers at which arithmetic goes wrong.
const EDGES: [u64; 10] = [0, 1, 63, 64, 1 << 20, 1 << 31, 1 << 60, (1 << 63) - 1, 1 << 63, u64::MAX];

/// Changes one thing, so that everything else, checksums and identity too, still holds.
fn mutate(artifact: &mut Artifact, random: &mut Random) {
    let count = artifact.tensors.len();
    if count == 0 {
        return artifact.metadata.clear();
    }
    let at = random.below(count);
    let edge = EDGES[random.below(EDGES.len())];
    let small = random.below(80) as u64;
    let tensor = &mut artifact.tensors[at];
    match random.below(18) {
        0 => tensor.dtype = DType::ALL[random.below(DType::ALL.len())].name().to_owned(),
        1 => tensor.shape.push(edge),
        2 => drop(tensor.shape.pop()),
        3 => tensor.shape.iter_mut().for_each(|d| *d = edge),
        4 => tensor.shape.iter_mut().for_each(|d| *d = small),
        5 => tensor.codec = codecs::all()[random.below(codecs::all().len())].id.to_owned(),
        6 => tensor.transposed = !tensor.transposed,
        7 => tensor.shape.reverse(),
        8 => tensor.name = ["", "w", "a\u{7f}", "\u{202e}é", "../x"][random.below(5)].to_owned(),
        9 => drop(tensor.planes.pop()),
        10 => tensor.planes.reverse(),
        11 => tensor.planes.iter_mut().for_each(|p| p.offset = Some(edge)),
        12 => tensor.planes.iter_mut().for_each(|p| p.len = Some(edge)),
        13 => tensor.planes.iter_mut().for_each(|p| p.bytes.resize(random.below(200), 0x5a)),
        14 => artifact.tensors.swap(0, at),
        15 => artifact.tensors.truncate(at),
        16 => {
            let name = ["a.json", "config.json", "tokenizer.model", "../x.json", "x.py"][random.below(5)].to_owned();
            let (offset, len) =
                (Some(edge).filter(|_| small.is_multiple_of(2)), Some(edge).filter(|_| small.is_multiple_of(3)));
            artifact.files.push(Plane { name, bytes: vec![7; random.below(90)], offset, len, ..Plane::default() });
        }
        _ => {
            let runs = (0..random.below(4)).map(|_| (edge.cast_signed().wrapping_sub(1), small)).collect();
            artifact.delta = Some(Delta { base: artifact.identity(), result: artifact.identity(), runs });
        }
    }
}

/// Changes bytes of the header's text.
fn scribble(file: File, random: &mut Random) -> File {
    let mut text = file.header.clone();
    let at = random.below(text.len());
    let end = (at + 1 + random.below(12)).min(text.len());
    let digits = text[at..].iter().position(u8::is_ascii_digit).map(|from| at + from);
    match (random.below(5), digits) {
        (0, Some(from)) => {
            let until = text[from..].iter().position(|b| !b.is_ascii_digit()).map_or(text.len(), |n| from + n);
            text.splice(from..until, EDGES[random.below(EDGES.len())].to_string().into_bytes());
        }
        (1, _) => drop(text.drain(at..end)),
        (2, _) => {
            let again = text[at..end].to_vec();
            text.splice(at..at, again);
        }
        (3, _) => text.insert(at, b"{}[],:\"\\ -e.0\xff"[random.below(14)]),
        _ => text[at] = random.bits().to_le_bytes()[0],
    }
    file.header(text)
}

#[test]
fn mutated_headers_with_correct_checksums_end_in_a_result_or_an_error() {
    let start = Instant::now();
    let rounds = damage::rounds(60_000);
    let tasks = 16;
    let task = |task: usize| {
        let probe = Probe::new();
        let mut random = Random(task as u64);
        let (sample, delta) = (sample(), sample_delta());
        let mut sound = 0;
        for _ in 0..rounds / tasks {
            let mut artifact = if random.below(4) == 0 { delta.clone() } else { sample.clone() };
            for _ in 0..random.below(3) {
                mutate(&mut artifact, &mut random);
            }
            let mut file = artifact.file();
            for _ in 0..random.below(3) {
                file = scribble(file, &mut random);
            }
            sound += usize::from(probe.read(&file.bytes()) == Outcome::Sound);
        }
        sound
    };
    let sound: usize = (0..tasks).into_par_iter().map(task).sum();
    assert!(sound > 0, "some mutations change nothing that matters");
    eprintln!("campaign headers: {rounds} cases, 0 failures; {sound} of them sound, {:?}", start.elapsed());
}
