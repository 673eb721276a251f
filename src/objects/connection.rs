//! Connections to stores, made by what the environment says, and the one place where this process waits for them.

use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::http::HttpBuilder;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use tokio::runtime::Runtime;

use super::refusal;
use super::url::{Scheme, Url};
use crate::error::{Error, Result};

/// What holds unless the environment says otherwise: a request may take long, but not stand still.
const DEFAULTS: [(&str, &str); 3] =
    [("connect_timeout", "10 seconds"), ("read_timeout", "30 seconds"), ("timeout", "10 minutes")];

/// Threads that wait for stores.
const THREADS: usize = 2;

/// The settings of a connection.
type Settings = Vec<(String, String)>;

/// A connection, and what it was made by.
struct Known {
    origin: String,
    settings: Settings,
    store: Arc<dyn ObjectStore>,
}

/// What this process has for stores.
struct Home {
    process: u32,
    runtime: Runtime,
    /// They stay open between one file and the next.
    stores: Mutex<Vec<Known>>,
}

/// That of this process; a child that was forked has none of its parent's threads and gets its own.
fn home() -> Result<&'static Home> {
    static HOME: Mutex<Option<&'static Home>> = Mutex::new(None);
    let mut home = HOME.lock().expect("no holder of the lock panics");
    let process = std::process::id();
    if let Some(known) = home.filter(|home| home.process == process) {
        return Ok(known);
    }
    // Somebody else in this process may have chosen already.
    drop(rustls::crypto::ring::default_provider().install_default());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    let runtime = runtime.map_err(|e| Error::invalid(format!("threads for object stores cannot be started: {e}")))?;
    let made: &'static Home = Box::leak(Box::new(Home { process, runtime, stores: Mutex::default() }));
    *home = Some(made);
    Ok(made)
}

/// Has work with a store done while this thread goes on.
pub(super) fn begin(work: impl Future<Output = ()> + Send + 'static) -> Result<()> {
    drop(home()?.runtime.spawn(work));
    Ok(())
}

/// Waits for work with a store, which other threads do; any thread may, one of another runtime too.
pub(super) fn wait<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> Result<T> {
    let (done, result) = sync_channel(1);
    begin(async move {
        // Whoever waits is there until something comes.
        drop(done.send(work.await));
    })?;
    result.recv().map_err(|_| Error::invalid("work with an object store broke off, which is a bug of tenpak"))
}

/// The store of a URL.
///
/// # Errors
/// [`Error::Invalid`] when settings are missing or wrong.
pub(super) fn store(url: &Url) -> Result<Arc<dyn ObjectStore>> {
    let home = home()?;
    let settings = settings(url.scheme);
    let mut stores = home.stores.lock().expect("no holder of the lock panics");
    if let Some(known) = stores.iter().find(|known| known.origin == url.origin && known.settings == settings) {
        return Ok(Arc::clone(&known.store));
    }
    // Some builders look for a runtime.
    let inside = home.runtime.enter();
    let store = connect(url, &settings).map_err(|e| refusal::of_settings(url, &e))?;
    drop(inside);
    stores.push(Known { origin: url.origin.clone(), settings, store: Arc::clone(&store) });
    Ok(store)
}

/// What the environment says about a store, in the names of its builder.
pub(super) fn settings(scheme: Scheme) -> Settings {
    let prefix = match scheme {
        Scheme::S3 => "AWS_",
        Scheme::Google => "GOOGLE_",
        Scheme::Azure => "AZURE_",
        Scheme::Http => return Vec::new(),
    };
    let all = std::env::vars_os().filter_map(|(key, value)| Some((key.into_string().ok()?, value.into_string().ok()?)));
    let mut own: Settings =
        all.filter(|(key, _)| key.starts_with(prefix)).map(|(key, value)| (key.to_ascii_lowercase(), value)).collect();
    own.sort();
    own
}

/// A builder with these settings; of those that it does not know it takes no notice, as of any other variable.
macro_rules! built {
    ($builder:ty, $url:expr, $settings:expr) => {{
        let defaults = DEFAULTS.iter().map(|&(key, value)| (key, value));
        let all = defaults.chain($settings.iter().map(|(key, value)| (&**key, &**value)));
        let builder = all.fold(<$builder>::new(), |builder, (key, value)| match key.parse() {
            Ok(key) => builder.with_config(key, value),
            Err(_) => builder,
        });
        Arc::new(builder.with_url(&*$url.origin).with_retry(retry()).build()?)
    }};
}

fn connect(url: &Url, settings: &Settings) -> object_store::Result<Arc<dyn ObjectStore>> {
    Ok(match url.scheme {
        Scheme::S3 => built!(AmazonS3Builder, url, settings),
        Scheme::Google => built!(GoogleCloudStorageBuilder, url, settings),
        Scheme::Azure => built!(MicrosoftAzureBuilder, url, settings),
        Scheme::Http => {
            let options = DEFAULTS.iter().fold(ClientOptions::new().with_allow_http(true), |options, &(key, value)| {
                match key.parse() {
                    Ok(key) => options.with_config(key, value),
                    Err(_) => options,
                }
            });
            Arc::new(
                HttpBuilder::new().with_url(&*url.origin).with_client_options(options).with_retry(retry()).build()?,
            )
        }
    })
}

/// About half a minute of patience.
fn retry() -> RetryConfig {
    let backoff =
        BackoffConfig { init_backoff: Duration::from_millis(100), max_backoff: Duration::from_secs(8), base: 2.0 };
    RetryConfig { backoff, max_retries: 6, retry_timeout: Duration::from_secs(60) }
}
