//! Bits dealt out to tensors by what their errors cost the model.
//!
//! To second order, rounding tensor `l` costs the model's loss `α · D(b)`: `D` is its squared error at `b` bits per weight, and
//! `α` the mean squared gradient of its weights, from `tenpak calibrate --fisher`. With so many bits in all the sum is
//! least where a bit buys as much in every tensor; since a bit quarters the error of an entropy coder, that is where
//! `α · D` per weight is the same everywhere, up to tensors that have all that their codes can use. `D` is that of a sample of
//! the rows, see [`Curve`].

use super::{Options, TensorReport, forecast};
use crate::error::Result;
use crate::fit::Rate;
use crate::fit::entropy::Curve;
use crate::source::Source;

/// The tensors that share the bits of a recipe.
pub(super) struct Allocation {
    /// Curve and mean squared gradient of each tensor that takes part.
    parts: Vec<Option<(Curve, f64)>>,
}

impl Allocation {
    /// Samples the tensors of a recipe that allocates; nothing where it does not, or fewer than two tensors can take part.
    ///
    /// # Errors
    /// Whatever is wrong with the source.
    pub(super) fn new(source: &Source, planned: &[TensorReport], options: &Options) -> Result<Option<Self>> {
        if options.recipe.allocates() != Some(true) {
            return Ok(None);
        }
        let mut curves = Vec::with_capacity(planned.len());
        for (index, tensor) in planned.iter().enumerate() {
            let takes_part = forecast::is_open(source, index, options) && gradient(tensor, options).is_some();
            curves.push(if takes_part { forecast::curve(source, index)? } else { None });
        }
        Ok(Self::of(source, &curves, planned, options))
    }

    /// The same for tensors whose curves are known.
    pub(super) fn of(
        source: &Source,
        curves: &[Option<Curve>],
        planned: &[TensorReport],
        options: &Options,
    ) -> Option<Self> {
        let part = |(index, (curve, tensor)): (usize, (&Option<Curve>, &TensorReport))| {
            let open = options.recipe.allocates() == Some(true) && forecast::is_open(source, index, options);
            Some((curve.clone().filter(|_| open)?, gradient(tensor, options)?))
        };
        let parts: Vec<_> = curves.iter().zip(planned).enumerate().map(part).collect();
        (parts.iter().flatten().count() > 1).then_some(Self { parts })
    }

    /// The rates of the tensors that take part, which have `rate` together.
    pub(super) fn rates(&self, rate: Rate) -> Vec<Option<Rate>> {
        let parts = || self.parts.iter().flatten();
        let weights: f64 = parts().map(|(curve, _)| curve.weights()).sum();
        // Never so few bits that streams cannot have them, never more than codes can use.
        let bits = |cost: f64, (curve, gradient): &(Curve, f64)| {
            curve.bits(cost * curve.weights() / gradient).min(curve.most_bits()).clamp(LEAST, Rate::MOST.bits())
        };
        let spent = |cost: f64| parts().map(|part| part.0.weights() * bits(cost, part)).sum::<f64>() / weights;
        // The logarithm of the common cost, halved until the bits are met to within what a rate can say.
        let (mut low, mut high) = (-300.0, 300.0);
        for _ in 0..60 {
            let middle = 0.5 * (low + high);
            if spent(crate::fit::entropy::rate::exp2(middle)) > rate.bits() { low = middle } else { high = middle }
        }
        let cost = crate::fit::entropy::rate::exp2(high);
        // What clamping has left over goes to all alike.
        let left = rate.bits() - spent(cost);
        let settle = |part: &(Curve, f64)| {
            Rate::from_bits((bits(cost, part) + left - 0.0005).clamp(Rate::LEAST.bits(), Rate::MOST.bits())).ok()
        };
        self.parts.iter().map(|part| part.as_ref().and_then(settle)).collect()
    }
}

/// The mean squared gradient of a tensor's weights, where it is known.
pub(super) fn gradient(tensor: &TensorReport, options: &Options) -> Option<f64> {
    let sum = options.stats.as_deref()?.get(&tensor.name)?.fisher()?;
    Some(sum / tensor.elements().max(1) as f64).filter(|&mean| mean > 0.0)
}

/// The fewest bits that a tensor gets beside others that have more.
const LEAST: f64 = 1.0;
