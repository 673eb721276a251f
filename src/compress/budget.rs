//! A loss that was asked for, dealt out to the tensors whose rate is open.
//!
//! The file is smallest where a bit buys as much everywhere. For an entropy coder that is where all weights have the same
//! mean squared error, whatever tensor they are in, save those that have no more power than that (reverse water-filling).
//! Each tensor is quantized at the least rate that keeps its share; what one leaves over, or lacks, the next ones get.

use super::{Options, TensorReport, forecast, rated};
use crate::coding::context::log2;
use crate::error::{Error, Result};
use crate::fit::Rate;
use crate::source::Source;

/// What is left of a loss that was asked for.
pub(super) struct Budget {
    most: f64,
    /// `None` for tensors that take no part.
    parts: Vec<Option<Part>>,
    /// Sum of the shares of tensors still to come.
    to_come: f64,
    /// Squared error that they may have.
    left: f64,
    /// Sums over the tensors that are done.
    noise: f64,
    signal: f64,
    /// The tensor that exceeded its share most, and by what.
    worst: Option<(String, f64)>,
    /// Bits that the last tensor took beside those that its loss alone asks for.
    offset: f64,
}

/// A tensor that takes part.
#[derive(Clone, Copy)]
struct Part {
    /// Sum of squares.
    power: f64,
    /// Squared error at the common level.
    share: f64,
}

impl Budget {
    /// Deals out the loss that the recipe asks for, after a look at all weights of the tensors that take part; nothing where
    /// none is asked for.
    ///
    /// # Errors
    /// [`Error::Invalid`] when no tensor takes part; whatever is wrong with the source.
    pub(super) fn new(source: &Source, planned: &[TensorReport], options: &Options) -> Result<Option<Self>> {
        let Some(most) = options.recipe.loss() else { return Ok(None) };
        let most = most.nmse();
        let mut powers = Vec::with_capacity(planned.len());
        for (index, tensor) in planned.iter().enumerate() {
            let open = tensor.rate.is_some() && forecast::is_open(source, index, options);
            powers.push(if open { Some((tensor.elements() as f64, rated::power(source, index)?)) } else { None });
        }
        if powers.iter().all(Option::is_none) {
            return Err(Error::invalid(format!(
                "a loss of at most {most:e} is asked for, but no tensor has a codec whose size is open, as ecu_v1 is; \
                 choose it for some"
            )));
        }
        let left = most * powers.iter().flatten().map(|(_, power)| power).sum::<f64>();
        let level = level(powers.iter().flatten().copied().collect(), left);
        let part = |(weights, power): (f64, f64)| Part { power, share: power.min(level * weights) };
        let parts: Vec<_> = powers.into_iter().map(|powers| powers.map(part)).collect();
        let to_come = parts.iter().flatten().map(|part| part.share).sum();
        Ok(Some(Self { most, parts, to_come, left, noise: 0.0, signal: 0.0, worst: None, offset: 0.0 }))
    }

    /// Tells a tensor the most squared error that it may have, and the rate at which to begin.
    ///
    /// # Errors
    /// [`Error::Invalid`] when nothing is left.
    pub(super) fn tell(&self, index: usize, planned: &mut TensorReport) -> Result<()> {
        let Some(Part { power, share }) = self.parts[index] else { return Ok(()) };
        if share > 0.0 && self.left <= 0.0 {
            return Err(self.unreachable());
        }
        let most = if share > 0.0 { self.left * (share / self.to_come) } else { 0.0 };
        planned.most_noise = Some(most);
        if most > 0.0 {
            let bits = 0.5 * log2(power / most) + self.offset;
            planned.rate = Some(Rate::from_bits(bits.clamp(Rate::LEAST.bits(), Rate::MOST.bits()))?);
        }
        Ok(())
    }

    /// Takes note of what a tensor has become.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it takes no part and loses more than is asked for by itself.
    pub(super) fn spend(&mut self, index: usize, done: &TensorReport) -> Result<()> {
        let Some(distance) = &done.distance else {
            self.to_come -= self.parts[index].map_or(0.0, |part| part.share);
            return Ok(());
        };
        let Some(Part { share, .. }) = self.parts[index] else {
            if distance.nmse() > self.most {
                return Err(Error::invalid(format!(
                    "tensor '{}' loses {:.3e} in {}, at most {:e} is asked for; keep it raw with --exclude, or give it \
                     another codec with --role or --rule",
                    done.name,
                    distance.nmse(),
                    done.codec.id,
                    self.most
                )));
            }
            return Ok(());
        };
        self.to_come -= share;
        self.left -= distance.noise;
        self.noise += distance.noise;
        self.signal += distance.signal;
        if let Some(rate) = done.rate
            && distance.noise > 0.0
        {
            self.offset = rate.bits() - 0.5 * log2(distance.signal / distance.noise);
        }
        let over = distance.noise - share;
        if over > 0.0 && self.worst.as_ref().is_none_or(|(_, most)| over > *most) {
            self.worst = Some((done.name.clone(), over));
        }
        Ok(())
    }

    /// Checks what all tensors have come to.
    ///
    /// # Errors
    /// [`Error::Invalid`] when they lose more than is asked for.
    pub(super) fn check(&self) -> Result<()> {
        if self.noise > self.most * self.signal { Err(self.unreachable()) } else { Ok(()) }
    }

    fn unreachable(&self) -> Error {
        let worst =
            self.worst.as_ref().map_or(String::new(), |(name, _)| format!("keep '{name}' raw with --exclude, or "));
        Error::invalid(format!(
            "a loss of at most {:e} is asked for, but 8-bit codes lose {:.3e} at their best; {worst}ask for more",
            self.most,
            self.noise / self.signal
        ))
    }
}

/// The mean squared error of every weight at which tensors of these numbers of weights and powers lose `noise` together.
fn level(mut tensors: Vec<(f64, f64)>, mut noise: f64) -> f64 {
    tensors.retain(|(_, power)| *power > 0.0);
    tensors.sort_by(|a, b| (a.1 / a.0).total_cmp(&(b.1 / b.0)));
    let mut weights: f64 = tensors.iter().map(|(weights, _)| weights).sum();
    for (count, power) in tensors {
        if noise / weights <= power / count {
            return noise / weights;
        }
        noise -= power;
        weights -= count;
    }
    0.0
}

#[cfg(test)]
mod tests {
    use super::level;

    #[test]
    fn tensors_below_the_level_lose_all_they_have_and_the_rest_the_same_per_weight() {
        let tensors = vec![(10.0, 1.0), (20.0, 40.0), (5.0, 0.0), (40.0, 400.0)];
        for noise in [0.5, 1.0, 7.0, 30.0, 100.0, 300.0] {
            let level = level(tensors.clone(), noise);
            let lost: f64 = tensors.iter().map(|(weights, power)| (level * weights).min(*power)).sum();
            assert!((lost - noise).abs() <= 1e-12 * noise, "{lost} is not {noise}");
        }
    }
}
