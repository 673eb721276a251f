//! What a store says when it refuses, in one sentence and without what nobody else may know.

use std::io;

use object_store::Error as Refused;

use super::connection;
use super::url::Url;
use crate::error::Error;

/// Characters of what a server says that are repeated.
const MOST: usize = 300;

/// The error of a request about an object.
pub(super) fn of(url: &Url, error: &Refused) -> Error {
    let (kind, what) = match error {
        Refused::NotFound { .. } => (io::ErrorKind::NotFound, "there is no such object".to_owned()),
        Refused::PermissionDenied { .. } | Refused::Unauthenticated { .. } => (
            io::ErrorKind::PermissionDenied,
            format!("the store refuses access: {}; {}", cause(url, error), url.scheme.credentials()),
        ),
        Refused::NotSupported { .. } | Refused::NotImplemented { .. } => (
            io::ErrorKind::Unsupported,
            format!("the server cannot do this: {}; copy the file to a local directory", cause(url, error)),
        ),
        other => {
            let what = cause(url, other);
            // Where no key is set, a machine of the store's owner is asked for one, and elsewhere nobody answers.
            let lost = connection::settings(url.scheme).is_empty();
            let remedy = if lost { url.scheme.credentials() } else { "check the connection and try again" };
            (io::ErrorKind::Other, format!("the store did not answer as expected: {what}; {remedy}"))
        }
    };
    Error::io(url.path(), io::Error::new(kind, what))
}

/// The error of settings that make no connection.
pub(super) fn of_settings(url: &Url, error: &Refused) -> Error {
    Error::invalid(format!(
        "{url}: the settings make no connection: {}; {}",
        cause(url, error),
        url.scheme.credentials()
    ))
}

/// The error of an object that is not what it was when it was opened.
pub(super) fn changed(url: &Url) -> Error {
    Error::io(url.path(), io::Error::other("the object was replaced while it was read; start again"))
}

/// What lies at the bottom of an error.
pub(super) fn cause(url: &Url, error: &Refused) -> String {
    let mut bottom: &dyn std::error::Error = error;
    while let Some(below) = bottom.source() {
        bottom = below;
    }
    let text = plain(&bottom.to_string());
    let settings = connection::settings(url.scheme);
    let secrets = settings.iter().filter(|(key, value)| {
        value.len() > 3
            && ["key", "secret", "token", "sas", "password", "credential", "account"].iter().any(|s| key.contains(s))
    });
    secrets.fold(text, |text, (_, secret)| text.replace(&**secret, "…"))
}

/// Code and message of an answer in XML, and of any other text its beginning; no query of a URL in either.
fn plain(text: &str) -> String {
    let tag = |name: &str| {
        let (_, rest) = text.split_once(&format!("<{name}>"))?;
        rest.split_once(&format!("</{name}>")).map(|(content, _)| content.trim().to_owned())
    };
    let text = match (tag("Code"), tag("Message")) {
        (Some(code), Some(message)) => format!("{code}: {message}"),
        (Some(code), None) => code,
        _ => text.to_owned(),
    };
    let mut words = Vec::new();
    for word in text.split_whitespace() {
        let word = word.split_once('?').map_or(word, |(before, _)| if before.contains('/') { before } else { word });
        let word = match word.split_once("://") {
            Some((scheme, rest)) => {
                let (authority, path) = rest.split_once('/').unwrap_or((rest, ""));
                let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
                format!("{scheme}://{host}/{path}")
            }
            None => word.to_owned(),
        };
        words.push(word);
    }
    let text: String = words.join(" ").chars().filter(|c| !c.is_control()).collect();
    match text.char_indices().nth(MOST) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.trim_end_matches(['.', ':', ' ']).to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn what_a_server_says_is_cut_to_what_may_be_known() {
        let xml = "Server returned non-2xx status code: 403 Forbidden: <Error><Code>SignatureDoesNotMatch</Code><Message>wrong \
                   key.</Message><StringToSign>hunter2</StringToSign></Error>";
        assert_eq!(plain(xml), "SignatureDoesNotMatch: wrong key");
        assert_eq!(plain("at https://me:hunter2@host/a?sig=hunter2 it broke"), "at https://host/a it broke");
        assert!(plain(&"x".repeat(9999)).len() < 400);
    }
}
