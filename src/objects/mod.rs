//! Object stores: a URL in; sizes, names and ranges of bytes out; local files in, whole objects out.
//!
//! | URL | store | settings, from the environment |
//! |---|---|---|
//! | `s3://BUCKET/KEY` | S3 and what speaks like it | `AWS_*`: keys, `AWS_REGION`, `AWS_ENDPOINT_URL`, `AWS_ALLOW_HTTP`, … |
//! | `gs://BUCKET/KEY` | Google Cloud Storage | `GOOGLE_*` |
//! | `az://CONTAINER/KEY`, `abfs://…` | Azure Blob Storage | `AZURE_*` |
//! | `http://HOST/PATH`, `https://…` | any web server that gives ranges; read only, and nothing in it can be listed | |
//!
//! An object is what it was when it was opened: every later read asks for that version by its ETag and compares what comes
//! back, so that an object that was replaced meanwhile is an error and never a mixture. Outputs lie in a local file until
//! they are whole, and appear in the store in one step. All waiting for stores is in this module; the rest of the crate
//! does not know of futures.
//!
//! Without the feature `objects` no URL can be had, and so nothing else asked for.

#![forbid(unsafe_code)]

#[cfg(not(feature = "objects"))]
mod absent;
#[cfg(feature = "objects")]
mod connection;
#[cfg(feature = "objects")]
mod read;
#[cfg(feature = "objects")]
mod refusal;
#[cfg(feature = "objects")]
mod url;
#[cfg(feature = "objects")]
mod write;

#[cfg(not(feature = "objects"))]
pub(crate) use absent::{Object, Url};
#[cfg(feature = "objects")]
pub(crate) use read::Object;
#[cfg(feature = "objects")]
pub(crate) use url::Url;
