//! Entry: what the header says of one tensor, checked when it is made, and its JSON.

use std::fmt;

use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::checksum::{chunks, from_hex, to_hex};
use super::coded::{self, Coding};
use super::identity::Identity;
use super::writer::Whole;
use crate::codec::Codec;
use crate::codec::extra::Extras;
use crate::codecs;
use crate::error::{Error, Result};
use crate::fit::{Fit, Rate};
use crate::layout::Plane;
use crate::limits::Limits;
use crate::tensor::{DType, TensorInfo};

/// The alignment of planes.
pub const ALIGN: u64 = 64;
/// Bytes of a plane that share a checksum.
pub const CHUNK: u64 = 4 << 20;

/// One plane of a tensor in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlaneEntry {
    /// Which one.
    pub plane: Plane,
    /// How it lies in the file, where it is not stored as it is.
    pub coding: Option<Coding>,
    /// Where it begins.
    pub offset: u64,
    /// Its length in the file.
    pub bytes: u64,
    /// CRC32C of each chunk in the file.
    pub crc32c: Box<[u32]>,
    /// BLAKE3-256 of all of it, as it is in memory.
    pub blake3: Identity,
}

/// One tensor in the file.
#[derive(Debug, Clone, PartialEq)]
pub struct Entry {
    info: TensorInfo,
    codec: &'static Codec,
    transposed: bool,
    rate: Option<Rate>,
    extras: Extras,
    difference: bool,
    planes: Box<[PlaneEntry]>,
}

impl Entry {
    /// An entry whose planes have not been placed yet: lengths known, offsets and checksums not. It takes no memory that
    /// grows with the shape, which may be anyone's claim.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the codec cannot hold the tensor: a lossy codec and integers, a transposed tensor that
    /// is not a matrix, or sizes beyond 63 bits.
    pub(crate) fn unplaced(info: TensorInfo, codec: &'static Codec, transposed: bool) -> Result<Self> {
        let planes = Box::default();
        Self { info, codec, transposed, rate: None, extras: Extras::NONE, difference: false, planes }
            .with_extras(Extras::NONE)
    }

    /// The same entry with extra planes, none of its planes placed or coded.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the codec stores bytes as they are, or there are more outliers than weights.
    pub(crate) fn with_extras(mut self, extras: Extras) -> Result<Self> {
        self.extras = extras;
        let plane = |(plane, bytes)| PlaneEntry {
            plane,
            coding: None,
            offset: 0,
            bytes,
            crc32c: Box::default(),
            blake3: Identity([0; 32]),
        };
        self.planes = self.plane_bytes()?.into_iter().map(plane).collect();
        Ok(self)
    }

    /// The same entry, at a rate that was asked for.
    ///
    /// # Errors
    /// [`Error::Invalid`] when its codec has a size of its own.
    pub(crate) fn at_rate(mut self, rate: Option<Rate>) -> Result<Self> {
        if let (Some(rate), true) = (rate, self.codec.fit != Fit::Rate) {
            return Err(Error::invalid(format!(
                "tensor '{}' at a rate of {rate} bits, which codec {} does not take",
                self.info.name(),
                self.codec.id
            )));
        }
        self.rate = rate;
        Ok(self)
    }

    /// The same entry as what is added to the base's tensor of the same name, dtype and shape.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the codec stores bytes as they are, the matrix is a transpose, or the dtype is not one that
    /// differences are added in.
    pub(crate) fn into_difference(mut self) -> Result<Self> {
        if self.codec.grouped().is_err() || self.transposed || !takes_difference(self.info.dtype()) {
            return Err(Error::invalid(format!(
                "tensor '{}' is a difference of {} in {}, expected one of F32, F16 or BF16 in a codec of codes, not transposed",
                self.info.name(),
                self.info.dtype(),
                self.codec.id
            )));
        }
        self.difference = true;
        Ok(self)
    }

    /// The same entry for a tensor of another dtype.
    pub(crate) fn in_dtype(mut self, dtype: DType) -> Result<Self> {
        self.info = TensorInfo::new(self.info.name(), dtype, self.info.shape().to_vec())?;
        Ok(self)
    }

    /// Whether it is added to the base's tensor, instead of standing for one.
    #[must_use]
    pub fn is_difference(&self) -> bool {
        self.difference
    }

    /// Whether it means nothing without the base.
    #[must_use]
    pub fn needs_base(&self) -> bool {
        self.difference || self.planes.iter().any(|plane| plane.coding == Some(Coding::Words))
    }

    /// Says that a plane lies in the file in a coding, as so many bytes.
    ///
    /// # Errors
    /// [`Error::Invalid`] when the plane has no such coding, or a coded plane no such length.
    pub(crate) fn set_coding(&mut self, plane: usize, coding: Coding, bytes: u64) -> Result<()> {
        let (kind, plain) = self.plane_bytes()?[plane];
        let wrong = if coding.takes(&self.codec.layout, kind, self.info.dtype()) {
            coding.check(plain, bytes).err()
        } else {
            Some(format!("coding {}, which a plane of {} does not take", coding.id(), self.codec.id))
        };
        if let Some(wrong) = wrong {
            let (kind, name) = (kind.name(), self.info.name());
            return Err(Error::invalid(format!("plane {kind} of tensor '{name}' has {wrong}")));
        }
        (self.planes[plane].coding, self.planes[plane].bytes) = (Some(coding), bytes);
        Ok(())
    }

    /// Bytes of every plane in memory.
    fn plane_bytes(&self) -> Result<Vec<(Plane, u64)>> {
        let name = self.info.name();
        if self.transposed && (self.info.shape().len() != 2 || self.codec.grouped().is_err()) {
            return Err(Error::invalid(format!(
                "tensor '{name}' of shape {:?} in {} is transposed, which only encoded matrices are",
                self.info.shape(),
                self.codec.id
            )));
        }
        if self.codec.grouped().is_ok() && !self.info.dtype().is_float() {
            return Err(Error::invalid(format!(
                "tensor '{name}' holds {} and codec {} takes floats only, use {}",
                self.info.dtype(),
                self.codec.id,
                codecs::RAW
            )));
        }
        let (rows, cols) = self.matrix();
        let mut planes = self.codec.layout.plane_bytes(self.info.dtype(), rows, cols)?;
        if self.extras != Extras::NONE {
            let of = |e| Error::invalid(format!("tensor '{name}': {e}"));
            self.codec.grouped().map_err(of)?;
            planes.extend(self.extras.plane_bytes(rows, cols).map_err(of)?);
        }
        Ok(planes)
    }

    /// Name, dtype and shape of the source tensor.
    #[must_use]
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// The codec.
    #[must_use]
    pub fn codec(&self) -> &'static Codec {
        self.codec
    }

    /// Whether the matrix is the transpose of the source tensor.
    #[must_use]
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// The planes, in stored order.
    #[must_use]
    pub fn planes(&self) -> &[PlaneEntry] {
        &self.planes
    }

    pub(crate) fn planes_mut(&mut self) -> &mut [PlaneEntry] {
        &mut self.planes
    }

    /// The bits per weight on disk that were asked for, where the codec leaves them open.
    #[must_use]
    pub fn rate(&self) -> Option<Rate> {
        self.rate
    }

    /// Which planes there are beside the codec's.
    #[must_use]
    pub fn extras(&self) -> Extras {
        self.extras
    }

    /// What it says besides tensor and codec.
    pub(crate) fn how(&self) -> Whole {
        Whole { transposed: self.transposed, rate: self.rate, extras: self.extras }
    }

    /// Whether a plane is coded.
    #[must_use]
    pub fn is_coded(&self) -> bool {
        self.planes.iter().any(|plane| plane.coding.is_some())
    }

    /// Rows and columns of the stored matrix.
    #[must_use]
    pub fn matrix(&self) -> (u64, u64) {
        if let (true, &[rows, cols]) = (self.transposed, self.info.shape()) { (cols, rows) } else { self.info.matrix() }
    }

    /// Bytes of all planes in the file, padding not counted.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.planes.iter().map(|p| p.bytes).sum()
    }

    /// Bytes of all planes in the file as headers foretell them: of planes whose length is open what the rate asks for,
    /// of all others what they take as they are.
    ///
    /// # Errors
    /// Those of [`Entry::unplaced`].
    pub(crate) fn foretold_bytes(&self) -> Result<u64> {
        let entry = Self::unplaced(self.info.clone(), self.codec, self.transposed)?;
        let mut entry = entry.with_extras(self.extras)?.at_rate(self.rate)?;
        coded::plan(&mut entry)?;
        Ok(entry.stored_bytes())
    }

    /// Bytes of a plane in memory.
    #[must_use]
    pub fn plain_bytes(&self, plane: usize) -> u64 {
        match self.planes[plane].coding {
            Some(_) => self.plane_bytes().map_or(0, |planes| planes[plane].1),
            None => self.planes[plane].bytes,
        }
    }

    /// Bytes of all planes in memory.
    #[must_use]
    pub fn memory_bytes(&self) -> u64 {
        (0..self.planes.len()).map(|plane| self.plain_bytes(plane)).sum()
    }

    /// Average cost of a weight of this tensor, everything in its planes counted.
    #[must_use]
    pub fn bits_per_weight(&self) -> f64 {
        self.stored_bytes() as f64 * 8.0 / (self.info.elements() as f64).max(1.0)
    }

    /// Whether both entries hold the same content under the same name.
    #[must_use]
    pub fn same_content(&self, other: &Self) -> bool {
        self.info == other.info
            && self.codec == other.codec
            && self.transposed == other.transposed
            && self.extras == other.extras
            && self.difference == other.difference
            && self.planes.iter().zip(&other.planes).all(|(a, b)| a.blake3 == b.blake3)
    }
}

/// Whether differences are added to tensors of a dtype.
#[must_use]
pub(crate) fn takes_difference(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F16 | DType::BF16)
}

/// `at` rounded up to the alignment.
#[must_use]
pub(crate) const fn align(at: u64) -> u64 {
    at.div_ceil(ALIGN) * ALIGN
}

/// An entry as it stands in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EntryJson {
    name: String,
    dtype: String,
    #[serde(deserialize_with = "short")]
    shape: Vec<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    transposed: bool,
    codec: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rate: Option<u32>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    column_scales: bool,
    #[serde(default, skip_serializing_if = "is_none")]
    outliers: u64,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    difference: bool,
    #[serde(deserialize_with = "short")]
    planes: Vec<PlaneJson>,
}

/// By reference, as serde calls it.
fn is_none(outliers: &u64) -> bool {
    *outliers == 0
}

/// The most dimensions or planes that an entry may list, whatever the limits: no tensor has as many planes.
const SHORT: usize = 16;

/// Reads an array of at most [`SHORT`] elements, so that a hostile one takes no memory.
fn short<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Vec<T>, D::Error> {
    struct Elements<T>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Elements<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "an array of at most {SHORT}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<T>, A::Error> {
            let mut all = Vec::new();
            while let Some(element) = seq.next_element()? {
                if all.len() == SHORT {
                    return Err(serde::de::Error::invalid_length(SHORT + 1, &self));
                }
                all.push(element);
            }
            Ok(all)
        }
    }
    d.deserialize_seq(Elements(std::marker::PhantomData))
}

/// A plane as it stands in JSON.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PlaneJson {
    plane: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    coding: Option<String>,
    offset: u64,
    bytes: u64,
    crc32c: String,
    blake3: Identity,
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        let plane = |p: &PlaneEntry| PlaneJson {
            plane: p.plane.name().into(),
            coding: p.coding.map(|coding| coding.id().into()),
            offset: p.offset,
            bytes: p.bytes,
            crc32c: to_hex(&p.crc32c),
            blake3: p.blake3,
        };
        EntryJson {
            name: self.info.name().into(),
            dtype: self.info.dtype().name().into(),
            shape: self.info.shape().into(),
            transposed: self.transposed,
            codec: self.codec.id.into(),
            rate: self.rate.map(Rate::thousandths),
            column_scales: self.extras.column_scales,
            outliers: self.extras.outliers,
            difference: self.difference,
            planes: self.planes.iter().map(plane).collect(),
        }
        .serialize(s)
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        EntryJson::deserialize(d)?.build().map_err(serde::de::Error::custom)
    }
}

/// The entries of a header, and what was wrong with the first bad one.
pub(super) struct EntriesIn {
    pub entries: Vec<Entry>,
    pub error: Option<Error>,
}

impl<'de> Deserialize<'de> for EntriesIn {
    /// Builds each entry at once, so that a header of many tensors is in memory once, in its compact form.
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = EntriesIn;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an array of tensors")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<EntriesIn, A::Error> {
                let mut all = EntriesIn { entries: Vec::new(), error: None };
                while let Some(json) = seq.next_element::<EntryJson>()? {
                    if all.error.is_none() {
                        match json.build() {
                            Ok(entry) => all.entries.push(entry),
                            Err(e) => all.error = Some(e),
                        }
                    }
                }
                Ok(all)
            }
        }
        d.deserialize_seq(Entries)
    }
}

impl EntryJson {
    fn build(self) -> Result<Entry> {
        let dtype = DType::ALL.iter().copied().find(|d| d.name() == self.dtype).ok_or_else(|| {
            Error::unsupported(format!("tensor '{}' has the unknown dtype '{}'; upgrade tenpak", self.name, self.dtype))
        })?;
        let codec = codecs::get(&self.codec)?;
        // The caller's limits are applied by `HeaderIn::check`; here only what no limit may lift.
        let lifted = Limits { dims: u64::MAX, name_bytes: u64::MAX, ..Limits::DEFAULT };
        let info = TensorInfo::within(&lifted, self.name, dtype, self.shape)?;
        let extras = Extras { column_scales: self.column_scales, outliers: self.outliers };
        let mut entry = Entry::unplaced(info, codec, self.transposed)?
            .with_extras(extras)?
            .at_rate(self.rate.map(Rate::from_thousandths).transpose()?)?;
        if self.difference {
            entry = entry.into_difference()?;
        }
        for (index, plane) in self.planes.iter().enumerate().take(entry.planes.len()) {
            if let Some(id) = &plane.coding {
                entry.set_coding(index, Coding::get(id)?, plane.bytes)?;
            }
        }
        let Entry { info, planes, .. } = &mut entry;
        let name = info.name();
        let wanted: Vec<_> = planes.iter().map(|p| (p.plane.name(), p.bytes)).collect();
        let found: Vec<_> = self.planes.iter().map(|p| (p.plane.as_str(), p.bytes)).collect();
        if found != wanted {
            return Err(Error::invalid(format!(
                "tensor '{name}' has planes {found:?}, codec {} and its shape give {wanted:?}",
                codec.id
            )));
        }
        for (json, place) in self.planes.into_iter().zip(planes) {
            place.crc32c = from_hex(&json.crc32c, place.bytes).ok_or_else(|| {
                Error::invalid(format!(
                    "plane {} of tensor '{name}' has {} digits of checksums, expected {} hex digits",
                    json.plane,
                    json.crc32c.len(),
                    chunks(place.bytes).saturating_mul(8)
                ))
            })?;
            (place.offset, place.blake3) = (json.offset, json.blake3);
        }
        Ok(entry)
    }
}
