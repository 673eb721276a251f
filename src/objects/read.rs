//! Objects by ranges: what is there, how long it is, and its bytes, of one version only.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use object_store::path::Path as Key;
use object_store::{GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt};
use tokio::task::JoinSet;

use super::connection::{begin, store, wait};
use super::refusal;
use super::url::{Scheme, Url};
use crate::error::{Error, Result};
use crate::location::Kind;

/// Bytes at the start of an object that come at once with the first of them that are wanted: what files of weights say of
/// themselves, as a rule. More than this is never kept of one read.
const START: u64 = 64 << 10;

/// Bytes that come at once where short reads follow one another.
const AHEAD: u64 = 1 << 20;

/// Bytes of one request.
const PART: u64 = 4 << 20;

/// Requests under way at once.
const AT_ONCE: usize = 8;

/// How often a part is asked for whose bytes do not come to their end.
const ATTEMPTS: u32 = 4;

/// Files that make a directory a model, where its server lists none.
const MARKS: [&str; 4] = ["config.json", crate::source::INDEX, crate::source::HEADER_FILE, "model.safetensors"];

/// An object, open for reading.
#[derive(Debug)]
pub(crate) struct Object {
    url: Url,
    store: Arc<dyn ObjectStore>,
    meta: ObjectMeta,
    recent: Mutex<Recent>,
}

/// What the last short read has fetched, and where it begins.
#[derive(Debug, Default)]
struct Recent {
    start: u64,
    bytes: Vec<u8>,
}

impl Recent {
    fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }
}

/// Why a part did not come.
enum Failure {
    Changed,
    Refused(object_store::Error),
}

impl Url {
    /// What is there.
    ///
    /// # Errors
    /// [`Error::Io`], also when a server cannot tell.
    pub fn kind(&self) -> Result<Option<Kind>> {
        if !self.is_folder && self.bytes()?.is_some() {
            return Ok(Some(Kind::File));
        }
        if self.scheme == Scheme::Http {
            for mark in MARKS {
                if self.child(mark)?.bytes()?.is_some() {
                    return Ok(Some(Kind::Directory));
                }
            }
            return Ok(None);
        }
        let (store, key) = (store(self)?, self.key.clone());
        let found = wait(async move { store.list_with_delimiter(prefix(&key)).await })?;
        let found = found.map_err(|e| refusal::of(self, &e))?;
        let any = !(found.objects.is_empty() && found.common_prefixes.is_empty());
        Ok(any.then_some(Kind::Directory))
    }

    /// Bytes of the object, where there is one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn bytes(&self) -> Result<Option<u64>> {
        Ok(self.look()?.map(|meta| meta.size))
    }

    /// What the store says of the object, where there is one.
    pub(super) fn look(&self) -> Result<Option<ObjectMeta>> {
        let (store, key) = (store(self)?, self.key.clone());
        match wait(async move { store.head(&key).await })? {
            Ok(meta) => Ok(Some(meta)),
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(e) => Err(refusal::of(self, &e)),
        }
    }

    /// Names and lengths of what lies directly behind a slash; `None` where the server cannot say.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn list(&self) -> Result<Option<Vec<(String, u64)>>> {
        if self.scheme == Scheme::Http {
            return Ok(None);
        }
        let (store, key) = (store(self)?, self.key.clone());
        let found = wait(async move { store.list_with_delimiter(prefix(&key)).await })?;
        let found = found.map_err(|e| refusal::of(self, &e))?;
        let names = found.objects.into_iter().filter(|object| object.location != self.key);
        Ok(Some(names.filter_map(|o| Some((o.location.filename()?.to_owned(), o.size))).collect()))
    }

    /// Opens the object as it is now.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(&self) -> Result<Object> {
        let meta = if self.is_folder { None } else { self.look()? };
        let none = std::io::Error::new(std::io::ErrorKind::NotFound, "there is no such object");
        let meta = meta.ok_or_else(|| Error::io(self.path(), none))?;
        Ok(Object { url: self.clone(), store: store(self)?, meta, recent: Mutex::default() })
    }
}

/// What names begin with; nothing at the root of a store.
fn prefix(key: &Key) -> Option<&Key> {
    Some(key).filter(|key| !key.as_ref().is_empty())
}

impl Object {
    pub fn url(&self) -> &Url {
        &self.url
    }

    pub fn len(&self) -> u64 {
        self.meta.size
    }

    /// Copies the bytes from `offset` on, which are all in the object, into `out`.
    ///
    /// # Errors
    /// [`Error::Io`], also when the object was replaced since it was opened.
    pub fn read_into(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        if out.is_empty() {
            return Ok(());
        }
        if out.len() as u64 > START {
            return self.fetch(offset, out);
        }
        let copy = |recent: &Recent, out: &mut [u8]| {
            let at = usize::try_from(offset - recent.start).expect("inside what was fetched");
            out.copy_from_slice(&recent.bytes[at..at + out.len()]);
        };
        let wanted = {
            let recent = self.recent.lock().expect("no holder of the lock panics");
            if recent.start <= offset && end <= recent.end() {
                copy(&recent, out);
                return Ok(());
            }
            let goes_on = !recent.bytes.is_empty() && offset == recent.end();
            match (end <= START, goes_on) {
                (true, _) => 0..START,
                (false, true) => offset..offset + AHEAD,
                (false, false) => offset..end,
            }
        };
        // Others may read meanwhile.
        let len = usize::try_from(wanted.end.min(self.len()) - wanted.start).expect("at most what is read ahead");
        let mut fetched = Recent { start: wanted.start, bytes: vec![0; len] };
        self.fetch(fetched.start, &mut fetched.bytes)?;
        copy(&fetched, out);
        *self.recent.lock().expect("no holder of the lock panics") = fetched;
        Ok(())
    }

    /// Asks for a range in parts, several at once.
    fn fetch(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let end = offset + out.len() as u64;
        let mut rest =
            (0..).map(move |i| offset + i * PART).take_while(move |&at| at < end).map(move |at| at..end.min(at + PART));
        let (store, meta) = (Arc::clone(&self.store), self.meta.clone());
        let (came, parts) = std::sync::mpsc::channel();
        begin(async move {
            let mut under_way = JoinSet::new();
            loop {
                while under_way.len() < AT_ONCE
                    && let Some(range) = rest.next()
                {
                    let (store, meta) = (Arc::clone(&store), meta.clone());
                    under_way.spawn(async move { (range.start, part(&*store, &meta, range).await) });
                }
                let Some(Ok(part)) = under_way.join_next().await else { return };
                if came.send(part).is_err() {
                    // Nobody takes what comes after a failure.
                    return;
                }
            }
        })?;
        let mut copied = 0;
        for (at, part) in parts {
            let bytes = part.map_err(|failure| match failure {
                // An object that is gone was there when it was opened.
                Failure::Changed
                | Failure::Refused(object_store::Error::Precondition { .. } | object_store::Error::NotFound { .. }) => {
                    refusal::changed(&self.url)
                }
                Failure::Refused(e) => refusal::of(&self.url, &e),
            })?;
            let at = usize::try_from(at - offset).expect("inside the range");
            out[at..at + bytes.len()].copy_from_slice(&bytes);
            copied += bytes.len();
        }
        if copied != out.len() {
            return Err(Error::invalid("a part of an object did not come, which is a bug of tenpak"));
        }
        Ok(())
    }
}

/// One part of the version that was opened.
async fn part(store: &dyn ObjectStore, opened: &ObjectMeta, range: Range<u64>) -> Result<Vec<u8>, Failure> {
    let mut attempt = 1;
    loop {
        match attempted(store, opened, range.clone()).await {
            // The store has its own patience with requests; a body that breaks off it takes up again only with an ETag.
            Err(Failure::Refused(object_store::Error::Generic { .. }))
                if attempt < ATTEMPTS && opened.e_tag.is_none() =>
            {
                attempt += 1;
            }
            other => return other,
        }
    }
}

async fn attempted(store: &dyn ObjectStore, opened: &ObjectMeta, range: Range<u64>) -> Result<Vec<u8>, Failure> {
    // A weak tag never matches a condition; it is only compared.
    let if_match = opened.e_tag.clone().filter(|tag| !tag.starts_with("W/"));
    let options = GetOptions { range: Some(GetRange::Bounded(range.clone())), if_match, ..GetOptions::default() };
    let result = store.get_opts(&opened.location, options).await.map_err(Failure::Refused)?;
    let found = &result.meta;
    let same = (found.size, &found.e_tag) == (opened.size, &opened.e_tag)
        && (opened.e_tag.is_some() || found.last_modified == opened.last_modified);
    if !same {
        return Err(Failure::Changed);
    }
    let bytes = result.bytes().await.map_err(Failure::Refused)?;
    if bytes.len() as u64 != range.end - range.start {
        let what = format!("{} bytes came, expected {}", bytes.len(), range.end - range.start);
        return Err(Failure::Refused(object_store::Error::Generic { store: "store", source: what.into() }));
    }
    Ok(bytes.into())
}
