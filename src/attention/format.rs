//! The format of a cache as data: sizes and the constants of kernels derive from it.

use crate::error::{Error, Result};

/// Tokens of a block: those that share the scale and the offset of a channel of their keys.
pub const BLOCK: usize = 32;

/// Channels of a group: those that share the scale and the offset of a token's values.
pub const GROUP: usize = 32;

/// The format of a cache: what each of its planes holds, see the [module](super).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvFormat {
    heads: usize,
    head_dim: usize,
    key_bits: u32,
    value_bits: u32,
}

impl KvFormat {
    /// A cache with so many heads of keys and values, of `head_dim` channels each, in codes of 4 or 8 bits.
    ///
    /// # Errors
    /// [`Error::Invalid`] for no heads, no channels, more of them than 65535, or another width.
    pub fn new(heads: usize, head_dim: usize, key_bits: u32, value_bits: u32) -> Result<Self> {
        const MOST: usize = 65_535;
        if !(1..=MOST).contains(&heads) || !(1..=MOST).contains(&head_dim) {
            return Err(Error::invalid(format!(
                "a cache of {heads} heads of {head_dim} channels, expected 1 to {MOST} of both"
            )));
        }
        for (bits, what) in [(key_bits, "keys"), (value_bits, "values")] {
            if bits != 4 && bits != 8 {
                return Err(Error::invalid(format!("{what} of {bits} bits, expected 4 or 8")));
            }
        }
        Ok(Self { heads, head_dim, key_bits, value_bits })
    }

    /// Heads of keys and values; heads of queries are a multiple of them.
    #[must_use]
    pub const fn heads(&self) -> usize {
        self.heads
    }

    /// Channels of a head.
    #[must_use]
    pub const fn head_dim(&self) -> usize {
        self.head_dim
    }

    /// Bits of a key's code.
    #[must_use]
    pub const fn key_bits(&self) -> u32 {
        self.key_bits
    }

    /// Bits of a value's code.
    #[must_use]
    pub const fn value_bits(&self) -> u32 {
        self.value_bits
    }

    /// Numbers of a token, of keys or of values: `heads * head_dim`.
    #[must_use]
    pub const fn token(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Words of a row of key codes: those of a token and head.
    #[must_use]
    pub const fn key_words(&self) -> usize {
        words(self.head_dim, self.key_bits)
    }

    /// Words of a row of value codes: those of a token and head.
    #[must_use]
    pub const fn value_words(&self) -> usize {
        words(self.head_dim, self.value_bits)
    }

    /// Groups of a token's values of a head; the last one may be ragged.
    #[must_use]
    pub const fn groups(&self) -> usize {
        self.head_dim.div_ceil(GROUP)
    }

    /// Words of a row of a tail: those of a token and head.
    #[must_use]
    pub const fn tail_words(&self) -> usize {
        self.head_dim.div_ceil(2)
    }

    /// Words of each plane: those of one block and head.
    #[must_use]
    pub const fn plane_words(&self, plane: KvPlane) -> usize {
        match plane {
            KvPlane::KeyCodes => BLOCK * self.key_words(),
            KvPlane::KeyParams => self.head_dim,
            KvPlane::ValueCodes => BLOCK * self.value_words(),
            KvPlane::ValueParams => BLOCK * self.groups(),
            KvPlane::KeyTail | KvPlane::ValueTail => BLOCK * self.tail_words(),
        }
    }

    /// Average cost of a number in a long cache, keys and values together.
    #[must_use]
    pub fn bits_per_number(&self) -> f64 {
        let planes = [KvPlane::KeyCodes, KvPlane::KeyParams, KvPlane::ValueCodes, KvPlane::ValueParams];
        let words: usize = planes.iter().map(|&plane| self.plane_words(plane)).sum();
        32.0 * words as f64 / (2 * BLOCK * self.head_dim) as f64
    }

    /// The format as named integers: the only thing that a kernel is told about it.
    #[must_use]
    pub fn constants(&self) -> Vec<(&'static str, u32)> {
        let number = |n: usize| u32::try_from(n).expect("checked by new()");
        vec![
            ("HEADS", number(self.heads)),
            ("HEAD_DIM", number(self.head_dim)),
            ("KEY_BITS", self.key_bits),
            ("VALUE_BITS", self.value_bits),
            ("BLOCK", number(BLOCK)),
            ("GROUP", number(GROUP)),
        ]
    }
}

/// One stored array of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvPlane {
    /// Codes of the keys of whole blocks.
    KeyCodes,
    /// Scale and offset of each channel of a block of keys.
    KeyParams,
    /// Codes of the values of whole blocks.
    ValueCodes,
    /// Scale and offset of each group of a token's values.
    ValueParams,
    /// Keys of the tokens after the last whole block.
    KeyTail,
    /// Their values.
    ValueTail,
}

impl KvPlane {
    /// Every plane, in the order in which kernels bind them.
    pub const ALL: [Self; 6] =
        [Self::KeyCodes, Self::KeyParams, Self::ValueCodes, Self::ValueParams, Self::KeyTail, Self::ValueTail];

    /// Whether it holds tokens after the last whole block, and not blocks.
    #[must_use]
    pub const fn is_tail(self) -> bool {
        matches!(self, Self::KeyTail | Self::ValueTail)
    }
}

const fn words(numbers: usize, bits: u32) -> usize {
    (numbers * bits as usize).div_ceil(32)
}
