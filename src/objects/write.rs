//! Objects out: whole or not at all, and what makes a directory a model after all the rest of it.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use object_store::path::Path as Key;
use object_store::{ObjectStore, ObjectStoreExt, PutMode, PutMultipartOptions, PutOptions, PutPayload};
use tokio::task::JoinSet;

use super::connection::{store, wait};
use super::refusal;
use super::url::{Scheme, Url};
use crate::error::{Error, Result};
use crate::output::{exists, read_exact_at};

/// Bytes that go up in one request; longer files go in parts.
const ONE_REQUEST: u64 = 16 << 20;

/// Bytes of a part, unless there would be too many.
const PART: u64 = 8 << 20;

/// The most parts; some stores take 10000.
const PARTS: u64 = 9000;

/// Parts under way at once.
const AT_ONCE: usize = 4;

/// Files by which programs find a model: they come after all others, and in this order.
const LAST: [&str; 4] = ["model.onnx", crate::source::INDEX, "config.json", crate::source::HEADER_FILE];

/// Why an object was not written.
enum Failure {
    /// Nothing is there that was not there before.
    Refused(object_store::Error),
    /// The same, but parts that nobody can read are still stored.
    LeftParts(object_store::Error),
    /// Something else arrived than what was sent, and was removed.
    Removed(object_store::Error),
    /// All was sent, and then the store did not say that it is there.
    Unseen(object_store::Error),
}

impl Failure {
    /// The error, and what it leaves of an object of `len` bytes.
    fn told(&self, len: u64) -> (&object_store::Error, String) {
        let before = format!("the {len} bytes were not written, and what was there before is as it was");
        match self {
            Self::Refused(error) => (error, before),
            Self::LeftParts(error) => {
                let what = "but parts of it that nobody can read are still stored: have the store give up uploads that were begun";
                (error, format!("{before}, {what}"))
            }
            Self::Removed(error) => {
                (error, "what arrived was removed again, and what was there before is gone".to_owned())
            }
            Self::Unseen(error) => {
                (error, format!("all {len} bytes were sent, but may not be there: look before you send them again"))
            }
        }
    }
}

impl Url {
    /// Checks that an object can be written.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is there and `force` is not set, or the URL is none to write to; [`Error::Io`].
    pub fn check_file(&self, force: bool) -> Result<()> {
        self.check_store()?;
        if self.is_folder {
            return Err(Error::invalid(format!("output {self} ends in a slash, expected the name of an object")));
        }
        if !force && self.look()?.is_some() {
            return Err(exists(&self.path()));
        }
        Ok(())
    }

    /// Checks that there is nothing yet where a directory is to be written.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is, or the URL is none to write to; [`Error::Io`].
    pub fn check_directory(&self) -> Result<()> {
        self.check_store()?;
        if self.key.as_ref().is_empty() {
            return Err(Error::invalid(format!("output {self} is a whole store, expected a name in it")));
        }
        match self.kind()? {
            None => Ok(()),
            Some(_) => Err(Error::invalid(format!(
                "output {self} exists, and no store can replace a directory in one step, with --force neither; remove it or \
                 choose another name"
            ))),
        }
    }

    fn check_store(&self) -> Result<()> {
        if self.scheme == Scheme::Http {
            return Err(Error::invalid(format!(
                "output {self}: web servers are only read from; write to s3://, gs://, az:// or a local path"
            )));
        }
        Ok(())
    }

    /// Writes the first `len` bytes of a file as an object, which appears when it is whole; over another only by `force`.
    ///
    /// # Errors
    /// [`Error::Invalid`] when someone else made the object meanwhile, [`Error::Io`]; there is then what was there before, or
    /// the message says what is.
    pub fn put(&self, file: &File, len: u64, force: bool) -> Result<()> {
        let file = file.try_clone().map_err(|e| Error::io(self.path(), e))?;
        let (store, key) = (store(self)?, self.key.clone());
        let outcome = wait(async move {
            send(&store, &key, &file, len, force).await?;
            // Only what the store itself says counts.
            match store.head(&key).await {
                Ok(meta) if meta.size == len => Ok(()),
                Ok(meta) => {
                    let what = format!("{} bytes arrived, {len} were sent", meta.size);
                    drop(store.delete(&key).await);
                    Err(Failure::Removed(object_store::Error::Generic { store: "store", source: what.into() }))
                }
                Err(e) => Err(Failure::Unseen(e)),
            }
        })?;
        outcome.map_err(|failure| {
            let (error, left) = failure.told(len);
            if let object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } = error {
                return exists(&self.path());
            }
            match refusal::of(self, error) {
                Error::Io { path, source } => {
                    let kind = source.kind();
                    Error::io(path, std::io::Error::new(kind, format!("{source}; {left}")))
                }
                other => other,
            }
        })
    }

    /// Writes the files of a local directory as objects behind a slash, those that make it a model last.
    ///
    /// # Errors
    /// Those of [`Url::put`]; what was written by then is removed.
    pub fn put_directory(&self, dir: &Path) -> Result<()> {
        let io = |e| Error::io(dir, e);
        let mut names = Vec::new();
        for entry in std::fs::read_dir(dir).map_err(io)? {
            names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
        }
        let rank = |name: &str| LAST.iter().position(|last| *last == name).map_or(0, |rank| rank + 1);
        names.sort_by(|a, b| (rank(a), a).cmp(&(rank(b), b)));
        let mut written = Vec::new();
        for name in &names {
            let url = self.child(name)?;
            let file = File::open(dir.join(name)).map_err(io)?;
            let len = file.metadata().map_err(io)?.len();
            if let Err(error) = url.put(&file, len, false) {
                return Err(self.taken_back(error, &written, names.len()));
            }
            written.push(url);
        }
        Ok(())
    }

    /// Removes what was written of a directory, and says so with the error that it is for.
    fn taken_back(&self, error: Error, written: &[Self], of: usize) -> Error {
        let remove = |url: &Self| -> Result<bool> {
            let (store, key) = (store(url)?, url.key.clone());
            wait(async move { store.delete(&key).await.is_ok() })
        };
        let left = written.iter().filter(|url| !remove(url).unwrap_or(false)).count();
        let done = written.len();
        let what = match (done, left) {
            (0, _) => format!("none of {of} files was written"),
            (_, 0) => format!("the {done} of {of} files written before were removed again"),
            _ => format!("{left} of the {done} files written before, of {of}, could not be removed: remove {self}"),
        };
        match error {
            Error::Io { path, source } => {
                Error::io(path, std::io::Error::new(source.kind(), format!("{source}; {what}")))
            }
            other => Error::invalid(format!("{other}; {what}")),
        }
    }
}

/// Sends a file: in one request, or in parts that become an object at the end.
async fn send(store: &Arc<dyn ObjectStore>, key: &Key, file: &File, len: u64, force: bool) -> Result<(), Failure> {
    if len <= ONE_REQUEST {
        let mode = if force { PutMode::Overwrite } else { PutMode::Create };
        let payload = read(file, 0, len).map_err(Failure::Refused)?;
        let sent = store.put_opts(key, payload, PutOptions { mode, ..PutOptions::default() }).await;
        return sent.map(drop).map_err(Failure::Refused);
    }
    let mut upload = store.put_multipart_opts(key, PutMultipartOptions::default()).await.map_err(Failure::Refused)?;
    let part = PART.max(len.div_ceil(PARTS).next_multiple_of(1 << 20));
    let sent = async {
        let mut under_way = JoinSet::new();
        let mut at = 0;
        while at < len || !under_way.is_empty() {
            if at < len && under_way.len() < AT_ONCE {
                let n = part.min(len - at);
                under_way.spawn(upload.put_part(read(file, at, n)?));
                at += n;
            } else if let Some(sent) = under_way.join_next().await {
                sent??;
            }
        }
        // Parts know no condition.
        if !force && store.head(key).await.is_ok() {
            let source = "it was made meanwhile".into();
            return Err(object_store::Error::AlreadyExists { path: key.to_string(), source });
        }
        upload.complete().await.map(drop)
    }
    .await;
    let Err(error) = sent else { return Ok(()) };
    Err(match upload.abort().await {
        Ok(()) => Failure::Refused(error),
        Err(_) => Failure::LeftParts(error),
    })
}

/// Bytes of the file as a request takes them.
fn read(file: &File, at: u64, len: u64) -> object_store::Result<PutPayload> {
    let mut bytes = vec![0; usize::try_from(len).expect("at most a part")];
    match read_exact_at(file, at, &mut bytes) {
        Ok(()) => Ok(PutPayload::from(bytes)),
        Err(e) => Err(object_store::Error::Generic { store: "file", source: Box::new(e) }),
    }
}
