//! One numpy array: magic, version, header length, a Python dictionary, and the elements.
//!
//! ```text
//! \x93NUMPY | major u8 | minor u8 | length u16 (version 1) or u32 | {'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }
//! ```
//!
//! The dictionary is read here: the grammar of a header that is accepted is small, while a general parser of Python
//! literals recurses as deep as the file likes, and multiplies dimensions unchecked.

use std::io::Read;
use std::path::Path;

use crate::error::{Error, Result, try_zeroed};
use crate::file::InputFile;
use crate::limits::{self, Limits};
use crate::tensor::{DType, TensorInfo};

use super::rows::{Order, Store};
use super::{Kind, Options, Source, SourceFile, SourceTensor, quoted};

/// Every header that numpy itself would read is shorter.
const HEADER_BYTES: u64 = 64 << 10;

/// Opens the array at `path`; its name is the file's, without the extension.
pub(super) fn open(path: &Path, options: &Options) -> Result<Source> {
    let file = InputFile::open(path, options.access)?;
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    let array = read_header(&mut file.stream()?, file.len(), &name, &options.limits)
        .and_then(|array| array.check_length(file.len()))
        .map_err(|e| e.in_file(path))?;
    file.observe(0, &file.read(0, usize::try_from(array.data).expect("a header that was read"))?);
    let tensor = SourceTensor::new(array.info, Store::File(0), array.data, array.order);
    Source::new(Kind::Npy, vec![SourceFile::new(file)], vec![tensor]).finish(&options.limits)
}

/// What a header says, checked.
#[derive(Debug)]
pub(super) struct Array {
    /// Name, dtype and shape.
    pub(super) info: TensorInfo,
    /// Which index runs fastest.
    pub(super) order: Order,
    /// Bytes before the first element.
    pub(super) data: u64,
}

impl Array {
    /// Refuses an array that does not fill its `len` bytes exactly.
    pub(super) fn check_length(self, len: u64) -> Result<Self> {
        let found = len - self.data;
        if found == self.info.bytes() {
            return Ok(self);
        }
        Err(Error::corrupt(
            self.data,
            format!(
                "{found} bytes follow the header of array {}, but its shape {:?} of {} takes {}: it is cut off or not one \
                 array",
                quoted(self.info.name()),
                self.info.shape(),
                self.info.dtype(),
                self.info.bytes()
            ),
        ))
    }
}

/// Reads the header of an array of `available` bytes in all, and leaves `stream` at its first element.
pub(super) fn read_header(stream: &mut impl Read, available: u64, name: &str, limits: &Limits) -> Result<Array> {
    let cut_off = || Error::corrupt(0, format!("array {} ends within its header: it is cut off", quoted(name)));
    let mut fill = |bytes: &mut [u8]| {
        stream.read_exact(bytes).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => cut_off(),
            _ => Error::corrupt(0, format!("the header of array {} cannot be read: {e}", quoted(name))),
        })
    };
    let mut start = [0; 8];
    fill(&mut start)?;
    if !start.starts_with(b"\x93NUMPY") {
        return Err(Error::corrupt(0, format!("array {} does not begin as a .npy file does", quoted(name))));
    }
    let (before, length) = match (start[6], start[7]) {
        (1, 0) => {
            let mut length = [0; 2];
            fill(&mut length)?;
            (10, u64::from(u16::from_le_bytes(length)))
        }
        (2 | 3, 0) => {
            let mut length = [0; 4];
            fill(&mut length)?;
            (12, u64::from(u32::from_le_bytes(length)))
        }
        (major, minor) => {
            let name = quoted(name);
            return Err(Error::unsupported(format!(
                "array {name} is of .npy version {major}.{minor}, expected 1.0 to 3.0: save it again with numpy.save"
            )));
        }
    };
    if length > available.saturating_sub(before) {
        return Err(cut_off());
    }
    limits::check("bytes of a .npy header", limits.header_bytes.min(HEADER_BYTES), length)?;
    let mut text = try_zeroed(usize::try_from(length).expect("checked against the limit"), || "a header".to_owned())?;
    fill(&mut text)?;

    let header = Header::parse(&text).map_err(|wrong| match wrong {
        Wrong::Syntax(at) => Error::corrupt(
            before + at as u64,
            format!(
                "the header of array {} is wrong here, expected {{'descr': …, 'fortran_order': …, 'shape': …}}",
                quoted(name)
            ),
        ),
        Wrong::Structured => Error::unsupported(format!(
            "array {} has structured elements: save each field as an array of its own",
            quoted(name)
        )),
    })?;
    let dtype = dtype(&header.descr, name)?;
    let info = TensorInfo::within(limits, name, dtype, header.shape)?;
    let order = match (header.fortran_order, info.shape().len()) {
        (false, _) | (true, 0 | 1) => Order::C,
        (true, 2) => Order::Fortran,
        (true, dims) => {
            return Err(Error::unsupported(format!(
                "array {} of {dims} dimensions is in Fortran order: save numpy.ascontiguousarray of it",
                quoted(name)
            )));
        }
    };
    Ok(Array { info, order, data: before + length })
}

/// The dtype of elements that numpy calls `descr`.
fn dtype(descr: &str, name: &str) -> Result<DType> {
    let refuse = |what: &str| {
        let (name, descr) = (quoted(name), quoted(descr));
        Err(Error::unsupported(format!("array {name} has dtype {descr}: {what}")))
    };
    let (order, rest) = descr.split_at_checked(1).unwrap_or_default();
    let dtype = match rest {
        "f8" => DType::F64,
        "f4" => DType::F32,
        "f2" => DType::F16,
        "i8" => DType::I64,
        "i4" => DType::I32,
        "i2" => DType::I16,
        "i1" => DType::I8,
        "u8" => DType::U64,
        "u4" => DType::U32,
        "u2" => DType::U16,
        "u1" => DType::U8,
        "b1" => DType::Bool,
        "V2" | "V1" => {
            return refuse(
                "numpy cannot tell what these bytes are, bfloat16 and FP8 are saved so; save them with \
                 safetensors.numpy.save_file or as float32",
            );
        }
        _ if rest.starts_with('O') => {
            return refuse("these are pickled Python objects, which are not read; save arrays of numbers");
        }
        _ if rest.starts_with(['U', 'S', 'a']) => return refuse("text is not a weight; save arrays of numbers only"),
        _ => return refuse("it is not read; convert it, for example with astype('float32')"),
    };
    match order {
        "<" => Ok(dtype),
        "|" if dtype.size() == 1 => Ok(dtype),
        ">" if dtype.size() > 1 => refuse("it is big-endian; save array.astype(array.dtype.newbyteorder('<')) instead"),
        _ => refuse("its byte order is not stated; save it again with numpy.save"),
    }
}

/// Why a header cannot be read.
#[derive(Debug, PartialEq)]
enum Wrong {
    /// It is not such a dictionary, as seen at this byte of it.
    Syntax(usize),
    /// `descr` is a list of fields.
    Structured,
}

/// The dictionary.
#[derive(Debug, PartialEq)]
struct Header {
    descr: String,
    fortran_order: bool,
    shape: Vec<u64>,
}

impl Header {
    fn parse(text: &[u8]) -> Result<Self, Wrong> {
        let mut p = Parser { text, at: 0 };
        let (mut descr, mut fortran_order, mut shape) = (None, None, None);
        p.expect(b'{')?;
        while !p.accept(b'}') {
            let key_at = p.at;
            let key = p.string()?;
            p.expect(b':')?;
            let fresh = match key.as_str() {
                "descr" if p.peek() == Some(b'[') => return Err(Wrong::Structured),
                "descr" => descr.replace(p.string()?).is_none(),
                "fortran_order" => fortran_order.replace(p.boolean()?).is_none(),
                "shape" => shape.replace(p.tuple()?).is_none(),
                _ => false,
            };
            if !fresh {
                return Err(Wrong::Syntax(key_at));
            }
            if !p.accept(b',') {
                p.expect(b'}')?;
                break;
            }
        }
        let end = p.at;
        match (descr, fortran_order, shape) {
            (Some(descr), Some(fortran_order), Some(shape)) if p.peek().is_none() => {
                Ok(Self { descr, fortran_order, shape })
            }
            _ => Err(Wrong::Syntax(end)),
        }
    }
}

/// Reads the few Python literals that a header is made of.
struct Parser<'a> {
    text: &'a [u8],
    at: usize,
}

impl Parser<'_> {
    fn peek(&mut self) -> Option<u8> {
        while self.text.get(self.at).is_some_and(u8::is_ascii_whitespace) {
            self.at += 1;
        }
        self.text.get(self.at).copied()
    }

    fn accept(&mut self, byte: u8) -> bool {
        let found = self.peek() == Some(byte);
        self.at += usize::from(found);
        found
    }

    fn expect(&mut self, byte: u8) -> Result<(), Wrong> {
        if self.accept(byte) { Ok(()) } else { Err(Wrong::Syntax(self.at)) }
    }

    fn string(&mut self) -> Result<String, Wrong> {
        let quote = self.peek().filter(|b| matches!(b, b'\'' | b'"')).ok_or(Wrong::Syntax(self.at))?;
        let rest = &self.text[self.at + 1..];
        let len = rest.iter().position(|&b| b == quote || b == b'\\').ok_or(Wrong::Syntax(self.at))?;
        // No name that is accepted needs an escape.
        let text = std::str::from_utf8(&rest[..len]).ok().filter(|_| rest[len] == quote);
        let text = text.ok_or(Wrong::Syntax(self.at))?.to_owned();
        self.at += len + 2;
        Ok(text)
    }

    fn boolean(&mut self) -> Result<bool, Wrong> {
        self.peek();
        let rest = &self.text[self.at..];
        let (value, len) = match rest {
            _ if rest.starts_with(b"True") => (true, 4),
            _ if rest.starts_with(b"False") => (false, 5),
            _ => return Err(Wrong::Syntax(self.at)),
        };
        self.at += len;
        Ok(value)
    }

    fn tuple(&mut self) -> Result<Vec<u64>, Wrong> {
        self.expect(b'(')?;
        let mut shape = Vec::new();
        while !self.accept(b')') {
            shape.push(self.integer()?);
            if !self.accept(b',') {
                self.expect(b')')?;
                break;
            }
        }
        Ok(shape)
    }

    fn integer(&mut self) -> Result<u64, Wrong> {
        self.peek();
        let digits = self.text[self.at..].iter().take_while(|b| b.is_ascii_digit()).count();
        let text = str::from_utf8(&self.text[self.at..self.at + digits]).expect("digits are ASCII");
        let value = text.parse().map_err(|_| Wrong::Syntax(self.at))?;
        self.at += digits;
        // Python 2 wrote long integers so.
        self.at += usize::from(self.text.get(self.at) == Some(&b'L'));
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_numpy_writes_them() {
        let header = Header::parse(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }      \n").unwrap();
        assert_eq!(header, Header { descr: "<f4".into(), fortran_order: false, shape: vec![2, 3] });
        let header = Header::parse(b"{\"shape\":(5L,),\"fortran_order\":True,\"descr\":\"|b1\"}").unwrap();
        assert_eq!(header, Header { descr: "|b1".into(), fortran_order: true, shape: vec![5] });
        assert!(Header::parse(b"{'descr': '<f4', 'fortran_order': False, 'shape': ()}").unwrap().shape.is_empty());
        let structured = b"{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (2,)}";
        assert_eq!(Header::parse(structured), Err(Wrong::Structured));
    }

    #[test]
    fn a_header_cut_anywhere_is_refused() {
        let whole = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }";
        for len in 0..whole.len() {
            assert!(matches!(Header::parse(&whole[..len]), Err(Wrong::Syntax(_))), "{len}");
        }
    }

    #[test]
    fn other_dictionaries_are_refused() {
        for text in [
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, -3)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), 'more': 1}",
            "{'descr': '<f4', 'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)}",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3)} x",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (2, 3)}",
            "{'descr': '<f4', 'shape': (2, 3)}",
            "((((((((((((",
        ] {
            assert!(matches!(Header::parse(text.as_bytes()), Err(Wrong::Syntax(_))), "{text}");
        }
    }
}
