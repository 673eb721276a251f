//! The text of a `config.json`, edited at one field and otherwise left as it is, so that the edit can be taken back byte
//! for byte.

use crate::error::{Error, Result};

/// The file.
pub(crate) const CONFIG: &str = "config.json";

/// The field that says how weights are quantized.
const FIELD: &str = "quantization_config";

/// The same in configs of MLX, beside the former.
const MLX: &str = "quantization";

/// Where that field of the source goes, when it has one already.
const MOVED: &str = "source_quantization_config";

/// A field of the outermost object: where its key begins and ends, and where its value ends.
struct Field {
    key: String,
    start: usize,
    key_end: usize,
    end: usize,
}

/// The text with `value` as its `quantization_config`, or a new text; [`restored`] is the inverse.
///
/// # Errors
/// [`Error::Invalid`] when the text is no JSON object or is such that the edit could not be taken back.
pub(crate) fn quantized(text: Option<&[u8]>, value: &str) -> Result<String> {
    let Some(bytes) = text else { return Ok(format!("{{\n  \"{FIELD}\": {value}\n}}\n")) };
    let text = std::str::from_utf8(bytes).map_err(|e| Error::invalid(format!("{CONFIG} is not UTF-8: {e}")))?;
    let fields = fields(text)?;
    let (at, until, new) = match (fields.iter().find(|f| f.key == FIELD), fields.last()) {
        (Some(own), _) => (own.start, own.key_end, format!("\"{FIELD}\": {value},\n  \"{MOVED}\"")),
        (None, Some(last)) => (last.end, last.end, format!(",\n  \"{FIELD}\": {value}")),
        (None, None) => {
            let inside = text.find('{').map_or(0, |at| at + 1);
            (inside, inside, format!("\"{FIELD}\": {value}"))
        }
    };
    let edited = format!("{}{new}{}", &text[..at], &text[until..]);
    if restored(edited.as_bytes()).is_none_or(|back| back != bytes) {
        return Err(Error::invalid(format!(
            "{CONFIG} has a field '{FIELD}' or '{MOVED}' that cannot be kept beside the one of tenpak; remove it"
        )));
    }
    Ok(edited)
}

/// What [`quantized`] was given; `None` when the text has no such field.
pub(crate) fn restored(text: &[u8]) -> Option<Vec<u8>> {
    let text = std::str::from_utf8(text).ok()?;
    let fields = fields(text).ok()?;
    let at = fields.iter().position(|f| f.key == FIELD)?;
    let own = &fields[at];
    let (from, until, old) = match (fields.get(at + 1), at) {
        (Some(next), _) if next.key == MOVED => (own.start, next.key_end, format!("\"{FIELD}\"")),
        (_, 0) => (own.start, own.end, String::new()),
        (_, _) => (fields[at - 1].end, own.end, String::new()),
    };
    Some(format!("{}{old}{}", &text[..from], &text[until..]).into_bytes())
}

/// The text without its `quantization_config` and what MLX has beside it, or as it is when it has neither.
pub(crate) fn unquantized(bytes: &[u8]) -> Vec<u8> {
    [FIELD, MLX].into_iter().fold(bytes.to_vec(), |text, field| without(&text, field))
}

/// The text without a field, or as it is when it has none of that name.
fn without(bytes: &[u8], field: &str) -> Vec<u8> {
    let Ok(text) = std::str::from_utf8(bytes) else { return bytes.to_vec() };
    let Ok(fields) = fields(text) else { return bytes.to_vec() };
    let Some(at) = fields.iter().position(|f| f.key == field) else { return bytes.to_vec() };
    let own = &fields[at];
    let (from, until) = match (at, fields.get(at + 1)) {
        (0, Some(next)) => (own.start, next.start),
        (0, None) => (own.start, own.end),
        (_, _) => (fields[at - 1].end, own.end),
    };
    [&bytes[..from], &bytes[until..]].concat()
}

/// The fields of the outermost object.
fn fields(text: &str) -> Result<Vec<Field>> {
    let wrong = |what: String| Error::invalid(format!("{CONFIG} is not a JSON object: {what}"));
    serde_json::from_str::<serde::de::IgnoredAny>(text).map_err(|e| wrong(e.to_string()))?;
    if !text.trim_start().starts_with('{') {
        return Err(wrong("it does not begin with '{'".to_owned()));
    }
    // From here on the text is known to be well formed.
    let (mut fields, mut key, mut depth, mut end, mut at) = (Vec::new(), None, 0, 0, 0);
    let bytes = text.as_bytes();
    while at < bytes.len() {
        let byte = bytes[at];
        let next = if byte == b'"' { string_end(bytes, at) } else { at + 1 };
        match byte {
            b'"' if depth == 1 && key.is_none() => key = Some((at, next)),
            b'{' | b'[' => depth += 1,
            b'}' | b']' => depth -= 1,
            _ => {}
        }
        if (depth == 1 && byte == b',') || depth == 0 {
            if let Some((start, key_end)) = key.take() {
                let key = serde_json::from_str(&text[start..key_end]).map_err(|e| wrong(e.to_string()))?;
                fields.push(Field { key, start, key_end, end });
            }
        } else if !byte.is_ascii_whitespace() {
            end = next;
        }
        at = next;
    }
    Ok(fields)
}

/// Behind the string that begins at `at`.
fn string_end(text: &[u8], mut at: usize) -> usize {
    at += 1;
    while text[at] != b'"' {
        at += if text[at] == b'\\' { 2 } else { 1 };
    }
    at + 1
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXTS: &[&str] = &[
        "{}",
        " { } \n",
        "{\"a\":1}",
        "{\n  \"a\": {\"quantization_config\": [1, \"}\\\"\"]},\n  \"b\": \"{,\"\n}\n",
        "{\"quantization_config\": {\"quant_method\": \"fp8\"}}",
        "{\"a\": 1, \"quantization_config\": {\"x\": [1, 2]} , \"b\": 2}",
        "{\"quantization\\u005fconfig\": 5, \"b\": -0.0}",
    ];

    #[test]
    fn an_edit_is_taken_back_byte_for_byte() {
        for text in TEXTS.iter().filter(|text| !text.contains("u005f")) {
            let edited = quantized(Some(text.as_bytes()), "{\"quant_method\": \"tenpak\"}").unwrap();
            let value: serde_json::Value = serde_json::from_str(&edited).unwrap();
            assert_eq!(value[FIELD]["quant_method"], "tenpak", "{edited}");
            assert_eq!(restored(edited.as_bytes()).unwrap(), text.as_bytes());
            let before: serde_json::Value = serde_json::from_str(text).unwrap();
            assert_eq!(value.get(MOVED), before.get(FIELD));
        }
        assert_eq!(restored(b"{\"a\": 1}"), None);
        assert!(quantized(None, "{}").unwrap().starts_with('{'));
    }

    #[test]
    fn what_cannot_be_taken_back_is_refused() {
        for text in ["[1]", "{", "", "{\"quantization\\u005fconfig\": 5}", "{\"source_quantization_config\": 1}"] {
            let edited = quantized(Some(text.as_bytes()), "{}");
            assert!(edited.is_err() || text.contains("source"), "{text}: {edited:?}");
        }
        assert!(quantized(Some(b"{\"a\":\"\xff\"}"), "{}").is_err());
    }

    #[test]
    fn the_field_is_dropped_and_the_rest_stays() {
        for text in TEXTS {
            let value: serde_json::Value = serde_json::from_slice(&unquantized(text.as_bytes())).unwrap();
            let mut before: serde_json::Value = serde_json::from_str(text).unwrap();
            before.as_object_mut().unwrap().remove(FIELD);
            before.as_object_mut().unwrap().remove(MLX);
            assert_eq!(value, before, "{text}");
        }
        assert_eq!(
            unquantized(b"{\"quantization\": {\"bits\": 4}, \"a\": 1, \"quantization_config\": 5}"),
            b"{\"a\": 1}"
        );
        assert_eq!(unquantized(b"not json"), b"not json");
    }
}
