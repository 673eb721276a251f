//! Values of keys, as GGUF writes them.

/// A value.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    I32s(Vec<i32>),
    F32s(Vec<f32>),
}

/// The number of an array's type.
const ARRAY: u32 = 9;

impl Value {
    /// The number of the type, of the elements where this is an array.
    fn kind(&self) -> u32 {
        match self {
            Self::U32(_) => 4,
            Self::I32s(_) => 5,
            Self::F32(_) | Self::F32s(_) => 6,
            Self::Bool(_) => 7,
            Self::Text(_) | Self::Texts(_) => 8,
        }
    }

    /// Writes type and value.
    pub fn write(&self, out: &mut Vec<u8>) {
        let array = |out: &mut Vec<u8>, count: usize| {
            out.extend(ARRAY.to_le_bytes());
            out.extend(self.kind().to_le_bytes());
            out.extend((count as u64).to_le_bytes());
        };
        match self {
            Self::Texts(texts) => {
                array(out, texts.len());
                texts.iter().for_each(|text| string(out, text));
            }
            Self::I32s(numbers) => {
                array(out, numbers.len());
                out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
            }
            Self::F32s(numbers) => {
                array(out, numbers.len());
                out.extend(numbers.iter().flat_map(|n| n.to_le_bytes()));
            }
            one => {
                out.extend(self.kind().to_le_bytes());
                match one {
                    Self::U32(n) => out.extend(n.to_le_bytes()),
                    Self::F32(n) => out.extend(n.to_le_bytes()),
                    Self::Bool(yes) => out.push(u8::from(*yes)),
                    Self::Text(text) => string(out, text),
                    Self::Texts(_) | Self::I32s(_) | Self::F32s(_) => {}
                }
            }
        }
    }
}

/// Writes a length and the bytes of a text.
pub(super) fn string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
