//! A size that was asked for, made into the rate that fills it, and a rate into those of the tensors.

use super::allocate::Allocation;
use super::{Options, TensorReport, forecast, planned_header, reports};
use crate::artifact::header::Header;
use crate::error::{Error, Result};
use crate::fit::Rate;
use crate::source::Source;

/// What is kept free per coded tensor: padding behind its planes, and digits of numbers in the header that are longer
/// than planned.
const SPARE: u64 = 192;

/// Options that ask for no size, with the rates that tensors have beside the recipe's.
pub(super) struct Settled {
    pub(super) options: Options,
    pub(super) rates: Vec<Option<Rate>>,
}

impl Settled {
    /// What will happen to each tensor.
    pub(super) fn reports(&self, source: &Source) -> Result<Vec<TensorReport>> {
        reports(source, &self.options, &self.rates)
    }
}

/// The options with the recipe's rate chosen such that the output, whose length `bytes` gives, takes at most what is
/// asked for, where a size is asked for.
///
/// # Errors
/// [`Error::Invalid`] when no tensor takes the recipe's rate, or no rate is low enough; those of `bytes`.
pub(super) fn settled(source: &Source, options: &Options, bytes: impl Fn(&Header) -> Result<u64>) -> Result<Settled> {
    let allocation = Allocation::new(source, &reports(source, options, &[])?, options)?;
    let rates = |rate: Rate| allocation.as_ref().map_or(Vec::new(), |allocation| allocation.rates(rate));
    let Some(most) = options.target_bytes else {
        return Ok(Settled { options: options.clone(), rates: rates(options.recipe.rate()) });
    };
    let at = |rate: Rate| -> Result<(Settled, u64)> {
        let recipe = options.recipe.clone().target_bits(rate);
        let settled =
            Settled { options: Options { recipe, target_bytes: None, ..options.clone() }, rates: rates(rate) };
        let tensors = settled.reports(source)?;
        let coded = tensors.iter().filter(|t| t.rate.is_some()).count() as u64;
        let bytes = bytes(&planned_header(source, &settled.options, &tensors)?)?;
        Ok((settled, bytes + coded * SPARE))
    };
    if !(0..source.tensors().len()).any(|index| forecast::is_open(source, index, options)) {
        return Err(Error::invalid(
            "a size is asked for, but no tensor has a codec whose size is open, as ecu_v1 is; choose it for some",
        ));
    }
    let (mut best, least) = at(Rate::LEAST)?;
    if least > most {
        return Err(Error::invalid(format!(
            "{most} bytes are asked for, but at {} bits per weight the output still takes {least}; ask for more, or \
             choose smaller codecs for embeddings, heads and what is kept raw",
            Rate::LEAST
        )));
    }
    // The greatest rate that fits, in thousandths of a bit.
    let (mut fits, mut beyond) = (Rate::LEAST.thousandths(), Rate::MOST.thousandths() + 1);
    while fits + 1 < beyond {
        let middle = fits.midpoint(beyond);
        let (settled, bytes) = at(Rate::from_thousandths(middle)?)?;
        if bytes <= most {
            (fits, best) = (middle, settled);
        } else {
            beyond = middle;
        }
    }
    Ok(best)
}
