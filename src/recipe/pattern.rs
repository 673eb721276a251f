//! Pattern: a set of tensor names, as a glob or, after `re:`, as a regular expression.
//!
//! A glob matches the whole name, and its `*` crosses dots and slashes, because names nest to different depths in
//! different checkpoints. A regular expression must match from the first character but may stop before the last one,
//! as `re:` does in compressed-tensors, so that the ignore lists of published configs mean here what they mean there.
//! Both match in time linear in the name, whatever the pattern.

use std::fmt;

use globset::{GlobBuilder, GlobMatcher};
use regex::Regex;

use crate::error::{Error, Result};

/// A set of tensor names; two are equal when they are written alike.
#[derive(Clone)]
pub(super) struct Pattern {
    text: String,
    matcher: Matcher,
}

/// What the text was compiled to.
#[derive(Clone)]
enum Matcher {
    Glob(GlobMatcher),
    Regex(Regex),
}

impl Pattern {
    /// Compiles a pattern.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is empty, has control characters, which no name has, or is not well formed.
    pub(super) fn new(text: &str) -> Result<Self> {
        if let Some(c) = text.chars().find(|c| c.is_control()) {
            return Err(Error::invalid(format!("pattern {text:?} has the control character {c:?}, remove it")));
        }
        let matcher = if let Some(expression) = text.strip_prefix("re:") {
            Matcher::Regex(Regex::new(expression).map_err(|error| bad_regex(text, &error))?)
        } else if text.is_empty() {
            return Err(Error::invalid(
                "empty pattern, expected a glob such as '*.down_proj.weight' or 're:' and a regular expression",
            ));
        } else {
            // Both options are spelled out because their defaults differ between platforms.
            let glob = GlobBuilder::new(text).literal_separator(false).backslash_escape(true).build();
            Matcher::Glob(glob.map_err(|error| bad_glob(text, &error))?.compile_matcher())
        };
        Ok(Self { text: text.to_owned(), matcher })
    }

    /// As the user wrote it.
    pub(super) fn text(&self) -> &str {
        &self.text
    }

    /// Whether `name` is in the set.
    pub(super) fn matches(&self, name: &str) -> bool {
        match &self.matcher {
            Matcher::Glob(glob) => glob.is_match(name),
            // The leftmost match starts at 0 exactly when some match does. Wrapping the expression in ^(?:…) instead
            // would change the meaning of one that sets the x flag.
            Matcher::Regex(regex) => regex.find(name).is_some_and(|found| found.start() == 0),
        }
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.text == other.text
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.text, f)
    }
}

fn bad_glob(text: &str, error: &globset::Error) -> Error {
    Error::invalid(format!(
        "pattern '{text}' is not a glob: {}; write \\ before a literal * ? [ ] {{ }} or \\, or use 're:'",
        error.kind()
    ))
}

/// The regex crate draws the pattern with a caret under the mistake; the last line says it in words.
fn bad_regex(text: &str, error: &regex::Error) -> Error {
    let drawing = error.to_string();
    let words = drawing.lines().last().unwrap_or_default();
    Error::invalid(format!(
        "pattern '{text}' is not a regular expression: {}; it must be one of the Rust crate regex, without \
         look-around and back-references",
        words.strip_prefix("error: ").unwrap_or(words).trim()
    ))
}
