//! The grammar of a bundle, one visitor per level; what they find goes to the [`Bundle`].

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::super::json::{Shape, once};
use super::super::quoted;
use super::number::Number;
use super::{Bundle, Spooled};
use crate::error::Error;
use crate::limits;
use crate::tensor::DType;

/// Makes `$seed` parse a JSON object or list with itself as visitor.
macro_rules! parses {
    ($seed:ident, $method:ident, $value:ty) => {
        impl<'de> DeserializeSeed<'de> for $seed<'_> {
            type Value = $value;

            fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<$value, D::Error> {
                json.$method(self)
            }
        }
    };
}

/// The outermost object.
pub(super) struct Top<'a>(pub(super) &'a mut Bundle);

/// The list of tensors.
struct Tensors<'a>(&'a mut Bundle);

/// One tensor.
struct Tensor<'a>(&'a mut Bundle);

/// The numbers of a tensor, of the dtype that they are taken for.
struct Data<'a>(&'a mut Bundle, DType);

/// The statistics by name.
struct Stats<'a>(&'a mut Bundle);

/// The numbers of one name, of which so many may come.
struct Stat(u64);

parses!(Top, deserialize_map, ());
parses!(Tensors, deserialize_seq, ());
parses!(Tensor, deserialize_map, ());
parses!(Data, deserialize_seq, Spooled);
parses!(Stats, deserialize_map, ());

impl<'de> Visitor<'de> for Top<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with the list 'tensors'")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (mut tensors, mut stats) = (None, None);
        while let Some(field) = map.next_key::<String>()? {
            match field.as_str() {
                "tensors" => {
                    once(&mut tensors, "tensors", ())?;
                    map.next_value_seed(Tensors(&mut *self.0))?;
                }
                "activation_stats" => {
                    once(&mut stats, "activation_stats", ())?;
                    map.next_value_seed(Stats(&mut *self.0))?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
            self.0.reading.clear();
        }
        match tensors {
            Some(()) => Ok(()),
            None => Err(self.0.failure.stop(Error::invalid(
                "the JSON has no list 'tensors', expected {\"tensors\": [{\"name\", \"shape\", \"data\"}]}",
            ))),
        }
    }
}

impl<'de> Visitor<'de> for Tensors<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of tensors")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        while list.next_element_seed(Tensor(&mut *self.0))?.is_some() {}
        Ok(())
    }
}

impl<'de> Visitor<'de> for Tensor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with 'name', 'shape' and 'data'")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self(bundle) = self;
        let index = bundle.tensors.len();
        bundle.reading = format!("tensor number {index}");
        let (mut name, mut shape, mut dtype, mut data) = (None, None, None::<DType>, None);
        while let Some(field) = map.next_key::<String>()? {
            match field.as_str() {
                "name" => {
                    let text: String = map.next_value()?;
                    bundle.reading = format!("tensor {}", quoted(&text));
                    once(&mut name, "name", text)?;
                }
                "shape" => once(&mut shape, "shape", map.next_value_seed(Shape(&bundle.limits))?)?,
                "dtype" => {
                    let text: String = map.next_value()?;
                    once(&mut dtype, "dtype", text.parse().map_err(A::Error::custom)?)?;
                }
                "data" => {
                    let taken_for = dtype.or(bundle.known.get(&index).copied()).unwrap_or(DType::F32);
                    once(&mut data, "data", map.next_value_seed(Data(&mut *bundle, taken_for))?)?;
                }
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        let dtype = dtype.unwrap_or(DType::F32);
        bundle.push(name, shape, dtype, data).map_err(|e| bundle.failure.stop(e))
    }
}

impl<'de> Visitor<'de> for Data<'_> {
    type Value = Spooled;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a flat list of numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Spooled, A::Error> {
        let Self(bundle, dtype) = self;
        let size = usize::try_from(dtype.size()).expect("at most 8");
        let mut spooled = Spooled { offset: bundle.written, count: 0, dtype };
        loop {
            bundle.number = Some((spooled.count, dtype));
            let Some(bytes) = list.next_element_seed(Number(dtype))? else { break };
            bundle.write(&bytes[..size]).map_err(|e| bundle.failure.stop(e))?;
            spooled.count += 1;
        }
        bundle.number = None;
        Ok(spooled)
    }
}

impl<'de> Visitor<'de> for Stats<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of lists of finite numbers")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self(bundle) = self;
        // Kept in memory, so the cap on headers is theirs too.
        let mut left = bundle.limits.header_bytes / 4;
        while let Some(name) = map.next_key::<String>()? {
            bundle.reading = format!("the activation statistics of {}", quoted(&name));
            let count = bundle.stats.len() as u64 + 1;
            limits::check("names in activation statistics", bundle.limits.tensors, count)
                .map_err(|e| bundle.failure.stop(e))?;
            let numbers = map.next_value_seed(Stat(left))?;
            let Some(rest) = left.checked_sub(numbers.len() as u64) else {
                let limit = bundle.limits.header_bytes;
                let what = "bytes of activation statistics";
                return Err(bundle.failure.stop(Error::Limit { what, limit, got: limit.saturating_add(1) }));
            };
            left = rest;
            if bundle.stats.contains_key(&name) {
                let what = format!("activation statistics of {} occur twice, expected unique names", quoted(&name));
                return Err(bundle.failure.stop(Error::invalid(what)));
            }
            bundle.stats.insert(name, numbers);
        }
        Ok(())
    }
}

impl<'de> DeserializeSeed<'de> for Stat {
    type Value = Vec<f32>;

    fn deserialize<D: Deserializer<'de>>(self, json: D) -> Result<Vec<f32>, D::Error> {
        json.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Stat {
    type Value = Vec<f32>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of finite numbers")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<f32>, A::Error> {
        let mut numbers = Vec::new();
        // One too many is kept as the sign that there are more.
        while numbers.len() as u64 <= self.0 {
            match list.next_element::<f32>()? {
                Some(number) if number.is_finite() => numbers.push(number),
                Some(number) => return Err(A::Error::custom(format!("{number} is not finite"))),
                None => return Ok(numbers),
            }
        }
        while list.next_element::<IgnoredAny>()?.is_some() {}
        Ok(numbers)
    }
}
