//! A URL of an object: taken apart, and free of secrets, since paths are printed wherever something is said of a file.

use std::fmt;
use std::path::PathBuf;

use object_store::path::Path as Key;

use crate::error::{Error, Result};
use crate::location::decoded;

/// Who understands a URL.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scheme {
    S3,
    Google,
    Azure,
    Http,
}

/// A URL of an object, or of what the names of several begin with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Url {
    pub(super) scheme: Scheme,
    /// Scheme and authority: all that a connection depends on.
    pub(super) origin: String,
    pub(super) key: Key,
    /// Whether it ends in a slash, and so names no object.
    pub(super) is_folder: bool,
    text: String,
}

impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl Url {
    /// Takes apart what stands behind the colon of a known scheme.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no bucket or host, a name has empty parts, or a part of it is a secret.
    pub fn parse(scheme: &str, rest: &str) -> Result<Self> {
        #[cfg(windows)]
        let rest = &*rest.replace('\\', "/");
        let rest = rest.strip_prefix("//").or_else(|| rest.strip_prefix('/')).unwrap_or(rest);
        let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
        let (who, store) = match scheme {
            "s3" => ("bucket", Scheme::S3),
            "gs" => ("bucket", Scheme::Google),
            "http" | "https" => ("host", Scheme::Http),
            _ => ("container", Scheme::Azure),
        };
        // `container@account` is no secret.
        let plain_user = store == Scheme::Azure && !authority.contains(':');
        if authority.contains('@') && !plain_user {
            return Err(Error::invalid(format!(
                "a URL of {scheme}:// has a user or password in it, which would be printed and logged; take them out, {}",
                store.credentials()
            )));
        }
        let origin = format!("{scheme}://{authority}");
        if rest.contains(['?', '#']) {
            return Err(Error::invalid(format!(
                "the URL {}… has a query or fragment, which may be a secret and is not read; take it out, {}, or write %3F and \
                 %23 where the characters are part of a name",
                origin.split(['?', '#']).next().unwrap_or_default(),
                store.credentials()
            )));
        }
        let text = format!("{scheme}://{rest}");
        if authority.is_empty() {
            return Err(Error::invalid(format!("the URL {text} has no {who}, expected {scheme}://{who}/NAME")));
        }
        let key = decoded(path).and_then(|path| Key::parse(path).ok()).ok_or_else(|| {
            Error::invalid(format!(
                "the URL {text} has a part between slashes that is empty, . or .., or a % without digits"
            ))
        })?;
        let is_folder = path.is_empty() || path.ends_with('/');
        Ok(Self { scheme: store, origin, key, is_folder, text })
    }

    /// What the name goes on with behind a slash.
    ///
    /// # Errors
    /// [`Error::Invalid`] when that is no name.
    pub fn child(&self, name: &str) -> Result<Self> {
        let (scheme, rest) = self.text.split_once(':').expect("there is one in every URL");
        Self::parse(scheme, &format!("{}/{}", rest.trim_end_matches('/'), encoded(name)))
    }

    /// It as a path.
    pub(super) fn path(&self) -> PathBuf {
        PathBuf::from(&self.text)
    }
}

/// A name as it stands in a URL.
pub(super) fn encoded(name: &str) -> String {
    name.replace('%', "%25").replace('?', "%3F").replace('#', "%23")
}

impl Scheme {
    /// How to say who one is.
    pub(super) fn credentials(self) -> &'static str {
        match self {
            Self::S3 => {
                "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (and AWS_SESSION_TOKEN, AWS_REGION), or AWS_SKIP_SIGNATURE=true \
                 for a public bucket"
            }
            Self::Google => "set GOOGLE_APPLICATION_CREDENTIALS, or GOOGLE_SKIP_SIGNATURE=true for a public bucket",
            Self::Azure => {
                "set AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN, or \
                 AZURE_SKIP_SIGNATURE=true for a public container"
            }
            Self::Http => "fetch the file by another program where its server wants to know who asks",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Url> {
        let (scheme, rest) = text.split_once(':').unwrap();
        Url::parse(scheme, rest)
    }

    #[test]
    fn urls_are_taken_apart() {
        let cases = [
            ("s3://bucket/models/a%20b/x.safetensors", Scheme::S3, "s3://bucket", "models/a b/x.safetensors"),
            ("s3:/bucket/x", Scheme::S3, "s3://bucket", "x"),
            ("gs://bucket/models/", Scheme::Google, "gs://bucket", "models"),
            ("az://container/x", Scheme::Azure, "az://container", "x"),
            (
                "abfs://container@account.dfs.core.windows.net/x",
                Scheme::Azure,
                "abfs://container@account.dfs.core.windows.net",
                "x",
            ),
            ("https://host:8443/a/b", Scheme::Http, "https://host:8443", "a/b"),
        ];
        for (text, scheme, origin, key) in cases {
            let url = parse(text).unwrap();
            assert_eq!((url.scheme, &*url.origin, url.key.as_ref()), (scheme, origin, key), "{text}");
        }
        assert_eq!(parse("s3://b/a/").unwrap().child("50%?.json").unwrap().to_string(), "s3://b/a/50%25%3F.json");
    }

    #[test]
    fn no_message_has_a_secret_of_a_url() {
        for text in [
            "https://me:hunter2@host/x",
            "https://hunter2@host/x",
            "s3://me:hunter2@bucket/x",
            "az://container:hunter2@account/x",
            "https://host/x?sig=hunter2",
            "https://host?sig=hunter2",
            "s3://bucket/x#hunter2",
        ] {
            let message = parse(text).unwrap_err().to_string();
            assert!(!message.contains("hunter2") && !message.contains("me:"), "{message}");
        }
    }

    #[test]
    fn names_that_no_store_has_are_refused() {
        for text in ["s3:///x", "s3://b/a//b", "s3://b/../x", "s3://b/%2", "s3://b/%ff"] {
            assert!(parse(text).is_err(), "{text}");
        }
    }
}
