//! The registry: one entry per codec id, data only.
//!
//! Ids are looked up here and never parsed. An entry, a golden file under `tests/golden/` and a line in the changelog
//! are all that an ordinary codec needs: sizes, kernels, tests, tables and the Python module follow from the entry.
//! Encoders may be retired, decoders never.

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::fit::Fit::{self, AbsMax, MinMax, Nested, Rate, Search, ZeroPoint as MinMaxZero};
use crate::layout::Float::{F16, F32};
use crate::layout::Levels::{Bank, Signed, Table, Unsigned, ZeroPoint};
use crate::layout::{BANK4, BANK5, BANK6, Grouped, Layout, NF4, ROW};

macro_rules! codecs {
    ($($id:ident: { $bits:expr, $levels:expr, $group:expr, $scale:expr, $offset:expr, $fit:expr }),* $(,)?) => {
        static CODECS: &[Codec] = &[
            Codec { id: "raw_v1", layout: Layout::Raw, fit: Fit::Exact },
            $(Codec {
                id: stringify!($id),
                layout: Layout::Grouped(const { Grouped::new($bits, $levels, $group, $scale, $offset) }),
                fit: $fit,
            }),*
        ];
    };
}

codecs! {
    //  id                     bits  levels      group  scale offset     fit
    int4_g8_v1:              { 4, Unsigned,       8,    F32, Some(F32), MinMax },
    int4_g8_fp16_v1:         { 4, Unsigned,       8,    F16, Some(F16), MinMax },
    int4_g16_v1:             { 4, Unsigned,      16,    F32, Some(F32), MinMax },
    int4_g16_fp16_v1:        { 4, Unsigned,      16,    F16, Some(F16), MinMax },
    int4_g32_fp16_v1:        { 4, Unsigned,      32,    F16, Some(F16), MinMax },
    int4_g128_fp16_v1:       { 4, Unsigned,     128,    F16, Some(F16), MinMax },
    int4_g256_fp16_v1:       { 4, Unsigned,     256,    F16, Some(F16), MinMax },
    int4_g512_fp16_v1:       { 4, Unsigned,     512,    F16, Some(F16), MinMax },
    int4_g2048_fp16_v1:      { 4, Unsigned,    2048,    F16, Some(F16), MinMax },
    int4_g4096_fp16_v1:      { 4, Unsigned,    4096,    F16, Some(F16), MinMax },
    int4_opt_v1:             { 4, Unsigned,      16,    F16, Some(F16), Search },
    int4_opt_llama_v1:       { 4, Unsigned,       8,    F16, Some(F16), Search },
    int8_sym_v1:             { 8, Signed,       ROW,    F32, None,      AbsMax },
    int4_sym_g32_fp16_v1:    { 4, Signed,        32,    F16, None,      AbsMax },
    int4_sym_g64_fp16_v1:    { 4, Signed,        64,    F16, None,      AbsMax },
    int4_sym_g128_fp16_v1:   { 4, Signed,       128,    F16, None,      AbsMax },
    int4_zp_g32_fp16_v1:     { 4, ZeroPoint,     32,    F16, None,      MinMaxZero },
    int4_zp_g64_fp16_v1:     { 4, ZeroPoint,     64,    F16, None,      MinMaxZero },
    int4_zp_g128_fp16_v1:    { 4, ZeroPoint,    128,    F16, None,      MinMaxZero },
    int8_sym_g32_fp16_v1:    { 8, Signed,        32,    F16, None,      AbsMax },
    int8_sym_g128_fp16_v1:   { 8, Signed,       128,    F16, None,      AbsMax },
    int4_k32_v1:             { 4, Bank(&BANK4),  32,    F32, None,      Nested },
    int4_k16_v1:             { 4, Bank(&BANK4),  16,    F32, None,      Nested },
    int5_k32_v1:             { 5, Bank(&BANK5),  32,    F32, None,      Nested },
    int5_k16_v1:             { 5, Bank(&BANK5),  16,    F32, None,      Nested },
    int6_k16_v1:             { 6, Bank(&BANK6),  16,    F32, None,      Nested },
    nf4_g64_fp16_v1:         { 4, Table(&NF4),   64,    F16, None,      AbsMax },
    ecu_v1:                  { 8, Signed,       ROW,    F32, None,      Rate },
}

/// The id of the codec of linear weights where none is asked for: at 4.5 bits on disk, without calibration, it loses a third of
/// what the best codec of a fixed size loses at 5.
pub const DEFAULT: &str = ANY_RATE;
/// The id of the codec of layers that are quantized where they stand and never lie on disk: there sizes are those in memory,
/// which [`DEFAULT`] does not make small.
pub const DEFAULT_IN_MEMORY: &str = "int4_g32_fp16_v1";
/// The id of the codec that keeps the source's bytes.
pub const RAW: &str = "raw_v1";
/// The id of the codec for embeddings, heads and rows shorter than a group.
pub const INT8_ROW: &str = "int8_sym_v1";
/// The id of the codec of which any size on disk can be asked.
pub const ANY_RATE: &str = "ecu_v1";

/// Every codec, in the order of the documentation.
#[must_use]
pub fn all() -> &'static [Codec] {
    CODECS
}

/// The codec with this id.
///
/// # Errors
/// [`Error::Unsupported`] naming the id and the ids of this build.
pub fn get(id: &str) -> Result<&'static Codec> {
    CODECS.iter().find(|codec| codec.id == id).ok_or_else(|| {
        let known: Vec<_> = CODECS.iter().map(|codec| codec.id).collect();
        Error::unsupported(format!(
            "unknown codec '{id}', this build of tenpak {} knows {}; check the spelling or upgrade",
            env!("CARGO_PKG_VERSION"),
            known.join(", ")
        ))
    })
}

/// The codec with the same codes whose scales and offsets are F32, or `raw_v1` where there is none: what a tensor is
/// stored with when its scales leave the range of F16.
#[must_use]
pub fn wider(codec: &Codec) -> &'static Codec {
    let twin = |g: &Grouped| Grouped::new(g.bits(), g.levels(), g.group(), F32, g.offset().map(|_| F32));
    let wide = match &codec.layout {
        Layout::Grouped(g) if g.scale() == F16 => Some(Layout::Grouped(twin(g))),
        _ => None,
    };
    CODECS.iter().find(|c| Some(c.layout) == wide).unwrap_or(&CODECS[0])
}
