//! What becomes of a damaged artifact: it is opened, verified and decoded entirely.

use std::fs::File;
use std::os::unix::fs::FileExt;

use tenpak::artifact::{ArtifactFile, verify};
use tenpak::file::Access;
use tenpak::{Error, Limits};

/// How reading ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    Sound,
    Refused,
    Corrupt(String),
    Unsupported(String),
    Limit(String),
    /// The header is sound, a plane is not.
    Damaged(String),
}

impl Outcome {
    /// Whether it was refused, whatever the reason.
    pub fn plain(&self) -> Self {
        if *self == Self::Sound { Self::Sound } else { Self::Refused }
    }
}

/// How many cases a random campaign has: what `TENPAK_CAMPAIGN` says, or this many.
pub fn rounds(default: usize) -> usize {
    std::env::var("TENPAK_CAMPAIGN").map_or(default, |count| count.parse().expect("TENPAK_CAMPAIGN is a number"))
}

/// A file that is written over and read again and again.
pub struct Probe(tempfile::NamedTempFile);

impl Probe {
    pub fn new() -> Self {
        Self(tempfile::NamedTempFile::new().unwrap())
    }

    fn file(&self) -> &File {
        self.0.as_file()
    }

    /// Writes these bytes and reads them.
    pub fn read(&self, bytes: &[u8]) -> Outcome {
        self.read_within(bytes, &Limits::DEFAULT)
    }

    pub fn read_within(&self, bytes: &[u8], limits: &Limits) -> Outcome {
        self.file().set_len(bytes.len() as u64).unwrap();
        self.file().write_all_at(bytes, 0).unwrap();
        self.outcome(limits)
    }

    /// Reads what was written last, with one byte changed.
    pub fn read_with(&self, at: usize, byte: u8, before: u8) -> Outcome {
        self.file().write_all_at(&[byte], at as u64).unwrap();
        let outcome = self.outcome(&Limits::DEFAULT);
        self.file().write_all_at(&[before], at as u64).unwrap();
        outcome
    }

    fn outcome(&self, limits: &Limits) -> Outcome {
        let refused = |e: Error| {
            let message = e.to_string();
            assert!(!message.contains(char::is_control) && !message.ends_with('.'), "{message:?}");
            assert!(message.len() < 4096, "a message of {} bytes", message.len());
            match e.root() {
                Error::Corrupt { .. } => Outcome::Corrupt(message),
                Error::Unsupported(_) => Outcome::Unsupported(message),
                Error::Limit { .. } => Outcome::Limit(message),
                _ => panic!("not an error of a file: {message}"),
            }
        };
        let artifact = match ArtifactFile::open_with(self.0.path(), Access::Read, limits) {
            Ok(artifact) => artifact,
            Err(e) => return refused(e),
        };
        let problems = verify::verify(&artifact, |_| Ok(())).unwrap().problems;
        for (index, entry) in artifact.tensors().iter().enumerate() {
            let (rows, cols) = entry.matrix();
            let mut out = vec![0.0; usize::try_from(rows * cols).unwrap()];
            match artifact.decode_rows(index, 0, &mut out) {
                // What verification finds beyond checksums does not stop decoding.
                Ok(()) => {}
                Err(e) if problems.is_empty() => panic!("verified, but not decoded: {e}"),
                Err(e) => return refused(e),
            }
        }
        for file in artifact.files() {
            match artifact.read_file(&file.name) {
                Ok(_) => {}
                Err(e) if problems.is_empty() => panic!("verified, but not read: {e}"),
                Err(e) => return refused(e),
            }
        }
        problems.first().map_or(Outcome::Sound, |p| Outcome::Damaged(p.what.clone()))
    }
}

#[test]
fn a_probe_tells_every_outcome_from_another() {
    let probe = Probe::new();
    let Outcome::Corrupt(what) = probe.read(b"\x89TNPK\r\n\x1aand no more") else { panic!() };
    assert!(what.contains("truncated"), "{what}");
    assert_eq!(probe.read(b"").plain(), Outcome::Refused);
    assert_ne!(probe.read_with(0, 0, 1), Outcome::Sound);
    let outcomes = [Outcome::Unsupported, Outcome::Limit, Outcome::Damaged].map(|make| make(String::new()).plain());
    assert!(outcomes.iter().all(|outcome| *outcome == Outcome::Refused));
    assert_eq!(Outcome::Sound.plain(), Outcome::Sound);
    assert!(std::env::var_os("TENPAK_CAMPAIGN").is_some() || rounds(3) == 3);
}
