//! JSON of any length and any hostility in bounded memory.
//!
//! serde_json streams, but grows with the longest string or number it meets, and skips unknown values however deep. The
//! [`Guard`] stands before it and counts nesting and token lengths byte by byte, so that one rule covers every field,
//! known or not.

use std::io::{self, BufReader, Read};
use std::path::Path;

use serde::de::DeserializeSeed;

use crate::error::{Error, Result};
use crate::file::InputFile;
use crate::limits::{self, Limits};

/// Longer than any sensible number, shorter than anything that hurts.
const NUMBER_BYTES: u64 = 4096;

/// A reader that refuses nesting and tokens beyond the limits.
struct Guard<R> {
    inner: R,
    limits: Limits,
    depth: u64,
    token: u64,
    in_string: bool,
    escaped: bool,
}

impl<R: Read> Read for Guard<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        for &byte in &buffer[..count] {
            self.step(byte).map_err(io::Error::other)?;
        }
        Ok(count)
    }
}

impl<R> Guard<R> {
    fn step(&mut self, byte: u8) -> Result<()> {
        self.token += 1;
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => (self.in_string, self.token) = (false, 0),
                _ => {}
            }
            return limits::check("bytes of a JSON string", self.limits.header_bytes, self.token);
        }
        match byte {
            b'"' => (self.in_string, self.token) = (true, 0),
            b'[' | b'{' => (self.depth, self.token) = (self.depth + 1, 0),
            b']' | b'}' => (self.depth, self.token) = (self.depth.saturating_sub(1), 0),
            b',' | b':' | b' ' | b'\n' | b'\r' | b'\t' => self.token = 0,
            _ => {}
        }
        limits::check("nesting of JSON", self.limits.json_depth, self.depth)?;
        limits::check("bytes of a JSON number", NUMBER_BYTES, self.token)
    }
}

/// Reads one JSON value and nothing after it from `reader`.
pub(super) fn parse<'de, S: DeserializeSeed<'de>>(
    reader: impl Read,
    limits: &Limits,
    seed: S,
) -> serde_json::Result<S::Value> {
    let guard = Guard { inner: reader, limits: *limits, depth: 0, token: 0, in_string: false, escaped: false };
    let mut json = serde_json::Deserializer::from_reader(BufReader::with_capacity(64 << 10, guard));
    let value = seed.deserialize(&mut json)?;
    json.end()?;
    Ok(value)
}

/// Reads a whole small JSON file, `what` naming its size in the error of one that is not small.
pub(crate) fn parse_file<'de, S: DeserializeSeed<'de>>(
    file: &InputFile,
    what: &'static str,
    most: u64,
    limits: &Limits,
    seed: S,
) -> Result<S::Value> {
    limits::check(what, most, file.len()).map_err(|e| e.in_file(file.path()))?;
    parse(file.stream()?, limits, seed).map_err(|e| lift_at(e, file).in_file(file.path()))
}

/// Turns a JSON error of `file` into the error that caused it, at its byte.
pub(super) fn lift_at(error: serde_json::Error, file: &InputFile) -> Error {
    let (line, column) = (error.line(), error.column());
    let at = file.stream().and_then(|s| byte_of(s, line, column).map_err(|e| Error::io(file.path(), e)));
    lift(error, file.path(), at.unwrap_or(0))
}

/// Turns a JSON error at byte `at` into the error that caused it.
pub(super) fn lift(error: serde_json::Error, path: &Path, at: u64) -> Error {
    if !error.is_io() {
        return Error::corrupt(at, format!("the JSON is wrong here: {error}"));
    }
    io::Error::from(error).downcast::<Error>().unwrap_or_else(|e| Error::io(path, e))
}

/// The byte of a line and column that both count from one.
pub(super) fn byte_of(reader: impl Read, line: usize, column: usize) -> io::Result<u64> {
    let (mut at, mut newlines_left) = (0, line.saturating_sub(1));
    let mut bytes = BufReader::with_capacity(64 << 10, reader).bytes();
    while newlines_left > 0 {
        let Some(byte) = bytes.next() else { break };
        at += 1;
        newlines_left -= usize::from(byte? == b'\n');
    }
    Ok(at + (column as u64).saturating_sub(1))
}

/// Lets an [`Error`] pass through serde, which knows only text: the error waits here until the parser has returned.
#[derive(Debug, Default)]
pub(super) struct Failure(Option<Error>);

impl Failure {
    /// Keeps `error` and gives the parser a reason to stop.
    pub(super) fn stop<E: serde::de::Error>(&mut self, error: Error) -> E {
        let text = E::custom(&error);
        self.0 = Some(error);
        text
    }

    /// The result of a parser that may have been stopped.
    pub(super) fn or<T>(
        self,
        result: serde_json::Result<T>,
        lift: impl FnOnce(serde_json::Error) -> Error,
    ) -> Result<T> {
        match self.0 {
            Some(error) => Err(error),
            None => result.map_err(lift),
        }
    }
}

/// Refuses a field that came before.
pub(super) fn once<T, E: serde::de::Error>(slot: &mut Option<T>, field: &'static str, value: T) -> Result<(), E> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(E::duplicate_field(field)),
    }
}

/// A dimension list of at most as many dimensions as the limits allow.
pub(super) struct Shape<'a>(pub(super) &'a Limits);

impl<'de> DeserializeSeed<'de> for Shape<'_> {
    type Value = Vec<u64>;

    fn deserialize<D: serde::Deserializer<'de>>(self, json: D) -> Result<Vec<u64>, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> serde::de::Visitor<'de> for Shape<'_> {
    type Value = Vec<u64>;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a list of dimensions")
    }

    fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut list: A) -> Result<Vec<u64>, A::Error> {
        let mut shape = Vec::new();
        // One dimension too many is kept for `TensorInfo` to refuse, the others are only read.
        while shape.len() as u64 <= self.0.dims {
            let Some(dim) = list.next_element()? else { return Ok(shape) };
            shape.push(dim);
        }
        while list.next_element::<serde::de::IgnoredAny>()?.is_some() {}
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use std::marker::PhantomData;

    use serde::de::IgnoredAny;

    use super::*;

    fn ignore(text: &str, limits: &Limits) -> Result<()> {
        parse(text.as_bytes(), limits, PhantomData::<IgnoredAny>).map(|_| ()).map_err(|e| lift(e, Path::new("x"), 0))
    }

    #[test]
    fn nesting_is_refused_one_level_beyond_the_limit() {
        let limits = Limits { json_depth: 5, ..Limits::DEFAULT };
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        ignore(&nested(5), &limits).unwrap();
        assert!(matches!(ignore(&nested(6), &limits), Err(Error::Limit { limit: 5, got: 6, .. })));
        ignore(r#"["[[[[[[[[", "\"[[[[[[["]"#, &limits).unwrap();
    }

    #[test]
    fn strings_and_numbers_of_unbounded_length_are_refused() {
        let limits = Limits { header_bytes: 100, ..Limits::DEFAULT };
        assert!(matches!(ignore(&format!("[\"{}\"]", "x".repeat(200)), &limits), Err(Error::Limit { .. })));
        assert!(matches!(ignore(&"1".repeat(5000), &limits), Err(Error::Limit { .. })));
    }

    #[test]
    fn what_follows_the_value_is_refused() {
        assert!(matches!(ignore("{} {}", &Limits::DEFAULT), Err(Error::Corrupt { .. })));
    }

    #[test]
    fn lines_and_columns_become_bytes() {
        assert_eq!(byte_of(&b"{\n\n  x"[..], 3, 3).unwrap(), 5);
        assert_eq!(byte_of(&b"{ x"[..], 1, 3).unwrap(), 2);
    }
}
