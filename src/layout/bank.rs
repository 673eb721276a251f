//! Banks: the levels and multipliers of nested scales.
//!
//! A group of a nested codec has one byte instead of a scale. It says by how much the scale of the row is multiplied, and
//! with which of the bank's tables the codes are read:
//!
//! ```text
//! bits of the byte, low first:  magnitude m (bits + 1) | table (6 - bits) | sign (1)
//! multiplier = ± (m + (step - 1) * max(m - knee, 0))
//! level      = LEVELS[table * 2^bits + code]
//! scale      = multiplier * row_scale
//! weight     = level * scale
//! ```
//!
//! There are always 64 levels, so that one byte shuffle of a register finds them. Levels and multipliers are integers of
//! eight bits, so that products with rounded activations, and sums of them over groups, are integers too. Most groups
//! of a row lie where multipliers are one apart, which is finer than a geometric grid there; the long steps behind the knee
//! are for the few groups of rows with heavy tails.

/// Scales of rows are less than 2^112 in magnitude, so that no multiple of one times a level is infinite.
pub const ROW_SCALE_END: f32 = f32::from_bits((127 + 112) << 23);

/// Levels of a bank.
pub const LEVELS: usize = 64;

/// What codes and scale bytes of a nested codec mean.
#[derive(Debug, PartialEq)]
pub struct Bank {
    bits: u32,
    knee: u8,
    step: u8,
    levels: [i8; LEVELS],
}

impl Bank {
    /// A bank of tables of `2^bits` levels each, whose multipliers are `step` apart beyond `knee`; in a const context an
    /// impossible one does not compile.
    ///
    /// # Panics
    /// When codes have not 4, 5 or 6 bits, a table does not ascend, or a multiplier has more than eight bits.
    #[must_use]
    pub const fn new(bits: u32, knee: u8, step: u8, levels: [i8; LEVELS]) -> Self {
        assert!(bits >= 4 && bits <= 6, "a bank has tables of 16, 32 or 64 levels");
        let mut i = 1;
        while i < LEVELS {
            assert!(i.is_multiple_of(1 << bits) || levels[i - 1] < levels[i], "the levels of a table ascend");
            i += 1;
        }
        let bank = Self { bits, knee, step, levels };
        assert!(step > 0 && knee <= bank.max_magnitude(), "multipliers ascend");
        assert!(bank.integer(bank.max_magnitude()) <= 255, "multipliers have eight bits");
        bank
    }

    /// Bits of a code.
    #[must_use]
    pub const fn bits(&self) -> u32 {
        self.bits
    }

    /// The levels of all tables, one table after the other.
    #[must_use]
    pub const fn levels(&self) -> &[i8; LEVELS] {
        &self.levels
    }

    /// Tables of the bank.
    #[must_use]
    pub const fn tables(&self) -> usize {
        LEVELS >> self.bits
    }

    /// The levels of a scale byte, ascending.
    #[must_use]
    pub fn table(&self, byte: u8) -> &[i8] {
        &self.levels[usize::from(self.high(byte))..][..1 << self.bits]
    }

    /// What a scale byte adds to a code to make the index of a level.
    #[must_use]
    pub const fn high(&self, byte: u8) -> u8 {
        (byte >> 1) & (64 - (1 << self.bits))
    }

    /// The largest magnitude of a scale byte.
    #[must_use]
    pub const fn max_magnitude(&self) -> u8 {
        ((2_u32 << self.bits) - 1).to_le_bytes()[0]
    }

    /// The magnitude up to which it is the multiplier itself.
    #[must_use]
    pub const fn knee(&self) -> u8 {
        self.knee
    }

    /// How far apart multipliers are beyond [`Bank::knee`].
    #[must_use]
    pub const fn step(&self) -> u8 {
        self.step
    }

    /// What a magnitude multiplies by, an integer of eight bits.
    #[must_use]
    pub const fn integer(&self, magnitude: u8) -> u32 {
        magnitude as u32 + (self.step as u32 - 1) * magnitude.saturating_sub(self.knee) as u32
    }

    /// The byte of a sign, a table and a magnitude.
    #[must_use]
    pub const fn byte(&self, negative: bool, table: u8, magnitude: u8) -> u8 {
        (negative as u8) << 7 | table << (self.bits + 1) | magnitude
    }

    /// What the scale of the row is multiplied by; zero has a sign as well.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "an integer of eight bits")]
    pub const fn multiplier(&self, byte: u8) -> f32 {
        let multiplier = self.integer(byte & self.max_magnitude()) as f32;
        if byte >> 7 == 1 { -multiplier } else { multiplier }
    }

    /// The level of an index.
    #[must_use]
    pub fn level(&self, code: u8, byte: u8) -> f32 {
        f32::from(self.levels[usize::from(self.high(byte) | code)])
    }
}

/// The bank of 4-bit codes; see `benches/levels.rs`.
pub static BANK4: Bank = Bank::new(
    4,
    28,
    4,
    [
        -101, -83, -67, -52, -38, -26, -15, -3, 7, 19, 31, 44, 57, 71, 87, 105, -96, -78, -60, -46, -33, -22, -11, 0,
        10, 21, 32, 44, 57, 71, 89, 117, -97, -75, -58, -44, -32, -22, -13, -5, 5, 14, 24, 34, 46, 61, 83, 127, -114,
        -62, -47, -34, -24, -15, -7, 1, 9, 18, 28, 38, 50, 63, 79, 117,
    ],
);

/// The bank of 5-bit codes; see `benches/levels.rs`.
pub static BANK5: Bank = Bank::new(
    5,
    56,
    8,
    [
        -126, -103, -93, -83, -74, -66, -57, -49, -42, -35, -28, -22, -16, -10, -4, 2, 8, 14, 20, 26, 32, 38, 44, 51,
        57, 65, 72, 81, 90, 98, 110, 126, -127, -115, -88, -77, -68, -61, -53, -46, -40, -34, -28, -22, -17, -11, -6,
        -1, 4, 9, 14, 19, 24, 30, 35, 41, 48, 55, 63, 71, 81, 94, 115, 127,
    ],
);

/// The bank of 6-bit codes; see `benches/levels.rs`.
pub static BANK6: Bank = Bank::new(
    6,
    112,
    8,
    [
        -127, -121, -116, -112, -107, -98, -94, -89, -84, -80, -76, -72, -67, -64, -60, -56, -52, -49, -44, -41, -37,
        -33, -30, -26, -23, -19, -16, -12, -9, -6, -2, 1, 4, 7, 10, 13, 17, 20, 24, 27, 30, 33, 37, 40, 44, 47, 51, 54,
        58, 62, 66, 70, 74, 78, 83, 87, 91, 96, 102, 106, 111, 116, 122, 127,
    ],
);
