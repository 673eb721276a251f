//! How the codes of one tensor are chosen: by its codec alone, or with what is known of its inputs.
//!
//! Which way is settled from headers, before anything is written, and every tensor that cannot have what was asked for is
//! named with the reason; statistics of another shape are an error. What a way needs (a factored second moment) is
//! made when the tensor's turn comes, and gone before the next one's.

use crate::codec::reference;
use crate::codec::{self, Codec, PlanesMut};
use crate::error::{Error, Result};
use crate::fit::awq::{Inputs, Moment};
use crate::fit::entropy::{self, Quantized};
use crate::fit::gptq;
use crate::fit::hessian::{Hessian, PANEL};
use crate::fit::weighted::{self, Importance};
use crate::fit::{Fit, Method, OutOfRange, Rate};
use crate::layout::Grouped;
use crate::stats::Stats;

/// What is added to the diagonal of a second moment, relative to its mean. On books5m 0.001, 0.01 and 0.05 differ by less
/// than the error bars of the divergence; more is safer where little text was seen.
const DAMPING: f64 = 0.05;

/// The way of one tensor, and why it is not the one that was asked for.
pub(super) fn method(
    wanted: Method,
    codec: &Codec,
    stats: Option<&Stats>,
    name: &str,
    cols: u64,
) -> Result<(Method, Option<String>)> {
    if !wanted.needs_stats() {
        // A codec with a rate searches for the least squared error by itself.
        return Ok((if codec.fit == Fit::Rate { Method::Codec } else { wanted }, None));
    }
    let stats =
        stats.ok_or_else(|| Error::invalid(format!("fit '{}' needs statistics; pass --stats", wanted.name())))?;
    let Some(moments) = stats.get(name) else {
        return Ok((Method::Codec, Some(format!("no statistics in {}", stats.name()))));
    };
    moments.check_cols(cols)?;
    let short = codec.grouped().is_ok_and(|layout| layout.bits() <= 4);
    if wanted == Method::Awq && !short {
        return Ok(match codec.fit {
            Fit::Rate if moments.has_second_moment() => (Method::Gptq, None),
            _ => (Method::Weighted, None),
        });
    }
    if wanted == Method::Gptq && !moments.has_second_moment() {
        return Ok((Method::Weighted, Some(format!("no second moment in {}", stats.name()))));
    }
    Ok((wanted, None))
}

/// What a way needs.
pub(super) enum Fitting {
    Codec,
    Weighted(Importance),
    Gptq(Box<Hessian>, Importance),
    Awq(Box<Inputs>),
}

impl Fitting {
    /// What the way of a tensor of `cols` columns needs.
    pub(super) fn new(method: Method, stats: Option<&Stats>, name: &str, cols: usize) -> Result<Self> {
        let moments = stats.and_then(|stats| stats.get(name));
        Ok(match (method, moments) {
            (Method::Search, _) => Self::Weighted(Importance::uniform(cols)),
            (Method::Weighted, Some(moments)) => Self::Weighted(Importance::new(moments.mean_sq())),
            (Method::Gptq, Some(moments)) => {
                let importance = Importance::new(moments.mean_sq());
                let moment = moments.second_moment()?.expect("the method was chosen because it is there");
                let hessian = Hessian::new(moment, cols, DAMPING);
                let named = |e| Error::invalid(format!("the second moment of '{name}': {e}"));
                Self::Gptq(Box::new(hessian.map_err(named)?), importance)
            }
            (Method::Awq, Some(moments)) => {
                let moment = moments.second_moment()?.map(|moment| Moment::new(moment, cols, DAMPING));
                let importance = Importance::new(moments.mean_sq());
                Self::Awq(Box::new(Inputs { mean_abs: moments.mean_abs()?, importance, moment }))
            }
            _ => Self::Codec,
        })
    }

    /// How much an error in each column costs, where that is known.
    pub(super) fn importance(&self) -> Option<&Importance> {
        match self {
            Self::Codec => None,
            Self::Weighted(importance) | Self::Gptq(_, importance) => Some(importance),
            Self::Awq(inputs) => Some(&inputs.importance),
        }
    }

    /// Quantizes a whole matrix for a rate.
    pub(super) fn quantize(&self, weights: &[f32], rows: usize, cols: usize, rate: Rate) -> Result<Quantized> {
        let bits = rate.bits();
        match self {
            Self::Codec => entropy::quantize(weights, rows, cols, bits, None),
            Self::Weighted(importance) => entropy::quantize(weights, rows, cols, bits, Some(importance.columns())),
            Self::Awq(inputs) => entropy::quantize(weights, rows, cols, bits, Some(inputs.importance.columns())),
            Self::Gptq(hessian, importance) => entropy::solve(weights, rows, cols, bits, hessian, importance.columns()),
        }
    }

    /// How many rows one task takes.
    pub(super) fn rows_per_task(&self, cols: usize) -> usize {
        if let Self::Gptq(..) = self { PANEL } else { codec::rows_per_task(cols) }
    }

    /// How many rows are worth a block: where a row takes long, no more than keep all threads busy, so that a signal is
    /// soon seen.
    pub(super) fn block_rows(&self, rows: u64) -> u64 {
        if let Self::Gptq(..) = self { rows.min((PANEL * rayon::current_num_threads()) as u64) } else { rows }
    }

    /// Encodes consecutive rows of finite weights into zeroed planes, on this thread.
    pub(super) fn encode_rows(
        &self,
        layout: &Grouped,
        fit: Fit,
        weights: &[f32],
        cols: usize,
        planes: &mut PlanesMut<'_>,
    ) -> Result<(), OutOfRange> {
        match self {
            Self::Codec => codec::encode_rows(layout, fit, weights, cols, planes),
            Self::Weighted(_) | Self::Awq(_) => {
                let importance = self.importance().expect("known where errors are weighted");
                for (r, row) in weights.chunks(cols).enumerate() {
                    let mut place = planes.row(layout, cols, r);
                    let params = weighted::row(fit, layout, row, importance)?;
                    reference::store_row(layout, &params, row, &mut place);
                }
                Ok(())
            }
            Self::Gptq(hessian, importance) => {
                let rows = gptq::solve(layout, fit, hessian, importance, weights, &gptq::Options::default())?;
                gptq::store(layout, &rows, cols, planes);
                Ok(())
            }
        }
    }
}
