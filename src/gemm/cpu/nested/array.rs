//! Levels one by one: what any machine can do.

use super::{COLUMNS, Unpacker, each_16};
use crate::layout::LEVELS;

/// Levels in an array.
#[derive(Clone, Copy)]
pub(super) struct Words([u8; LEVELS]);

impl Unpacker for Words {
    #[inline(always)]
    fn new(table: &[u8; LEVELS], _group: usize) -> Self {
        Self(*table)
    }

    #[inline(always)]
    fn unpack<const HIGH: usize, const GROUP: usize>(
        self,
        low: &[u8; 32],
        high: &[u8],
        scales: u32,
        out: &mut [u8; COLUMNS],
    ) {
        // A scale byte has the table above its magnitude, which is one bit wider than a code.
        let tables = each_16::<GROUP>(scales).to_le_bytes().map(|byte| byte >> 1 & (0x30 << HIGH & 0x30));
        for (i, (out, low)) in out.as_chunks_mut::<8>().0.iter_mut().zip(low.as_chunks::<4>().0).enumerate() {
            let above = match HIGH {
                0 => 0,
                1 => u32::from(high[i]),
                _ => u32::from(u16::from_le_bytes([high[2 * i], high[2 * i + 1]])),
            };
            for (j, out) in out.iter_mut().enumerate() {
                let code = low[j / 2] >> (j % 2 * 4) & 15;
                let above = (above >> (j * HIGH)).to_le_bytes()[0] << 4 & ((16 << HIGH) - 16);
                *out = self.0[usize::from(code | above | tables[i / 2])];
            }
        }
    }
}
