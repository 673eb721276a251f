//! Matrices that the backend has taken: their planes on the device, and products with numbers that come from the host.

#![expect(unsafe_code, reason = "launches with memory that is held here")]

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::device::{Device, ReadyProduct};
use super::driver::{Address, Memory};
use super::launch::{Extra, Operands, Planes};
use super::plan::Problem;
use crate::error::{Error, Result};
use crate::gemm::cpu::{self, extra, reference};
use crate::gemm::{Act, Matrix, Weights, check_sizes};
use crate::tensor::DType;

/// Most plans that a matrix remembers.
const PLANS: usize = 256;

/// A matrix on a CUDA device, its planes as they are stored: kernels need no other order.
#[derive(Debug)]
pub struct Loaded<'a> {
    device: Arc<Device>,
    weights: Weights<'a>,
    planes: Planes,
    plans: Mutex<HashMap<(usize, bool), Arc<ReadyProduct>>>,
    _memory: Vec<Memory>,
}

impl<'a> Loaded<'a> {
    pub(super) fn new(device: &Arc<Device>, weights: &Weights<'a>) -> Result<Self> {
        let all = weights.planes();
        let mut memory = Vec::new();
        let mut addresses = Vec::new();
        // In stored order; a plane that a layout does not have is empty.
        for plane in [all.codes, all.high_codes, all.scales, all.addends, all.row_scales] {
            if plane.is_empty() && weights.rows() > 0 && weights.cols() > 0 {
                continue;
            }
            // Words of 32 bits are read whole.
            let held = device.context.memory(plane.len().next_multiple_of(16), "a matrix")?;
            held.write(plane)?;
            addresses.push(held.at());
            memory.push(held);
        }
        let layout = weights.layout();
        let planes = if weights.rows() == 0 || weights.cols() == 0 {
            Planes::default()
        } else {
            Planes::new(layout, weights.rows(), weights.cols(), &addresses)?
        };
        Ok(Self { device: Arc::clone(device), weights: *weights, planes, plans: Mutex::default(), _memory: memory })
    }

    fn ready(&self, problem: &Problem) -> Result<Arc<ReadyProduct>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (problem.m, problem.exact);
        if let Some(found) = plans.get(&key) {
            return Ok(Arc::clone(found));
        }
        let fresh = Arc::new(self.device.ready(problem)?);
        if plans.len() >= PLANS {
            plans.clear();
        }
        plans.insert(key, Arc::clone(&fresh));
        Ok(fresh)
    }

    fn operands(&self, x: Address, y: Address, workspace: Address) -> Operands {
        Operands { planes: self.planes, extra: Extra::default(), ends: 0, x, y, workspace }
    }
}

impl Matrix for Loaded<'_> {
    fn multiply(&self, x: &[f32], m: usize, act: Act, y: &mut [f32]) -> Result<()> {
        let weights = &self.weights;
        check_sizes(weights, x.len(), m, y.len())?;
        let (rows, cols) = (weights.rows(), weights.cols());
        if m == 0 || rows == 0 || cols == 0 {
            y.fill(0.0);
            return Ok(());
        }
        let mut scaled = Cow::Borrowed(x);
        if weights.extra().column_scales().is_some() {
            weights.extra().scale(scaled.to_mut());
        }
        if act != Act::F32 {
            scaled = Cow::Owned(reference::round_activations(act, &scaled, cols));
        }
        // What was rounded to 8 bits is a multiple of a number in f32, which halves cannot hold.
        let exact = matches!(act, Act::F32 | Act::Int8);
        let layout = *weights.layout();
        let problem =
            Problem { layout, rows, cols, experts: 1, m, numbers: DType::F32, exact, aligned: true, outliers: false };
        let ready = self.ready(&problem)?;
        let context = &self.device.context;
        let (from, to) = (context.memory(4 * x.len(), "activations")?, context.memory(4 * y.len(), "results")?);
        let workspace = context.memory(ready.plan.workspace.bytes, "a product")?;
        from.write(bytemuck::cast_slice(&scaled))?;
        let operands = self.operands(from.at(), to.at(), workspace.at());
        // SAFETY: all memory is held until the wait, and as long as the problem makes it.
        unsafe { self.device.multiply(&ready, &problem, &operands, std::ptr::null_mut())? };
        context.wait()?;
        to.read(y)?;
        extra::add(weights, x, m, y, cpu::is_small(rows, cols, m))
    }

    fn decode(&self, out: &mut [f32]) -> Result<()> {
        let (rows, cols) = (self.weights.rows(), self.weights.cols());
        if rows.checked_mul(cols) != Some(out.len()) {
            return Err(Error::invalid(format!("{} numbers for a {rows} x {cols} matrix", out.len())));
        }
        if out.is_empty() {
            return Ok(());
        }
        let context = &self.device.context;
        let to = context.memory(4 * out.len(), "a decoded matrix")?;
        let operands = self.operands(0, to.at(), 0);
        // SAFETY: the memory is held until the wait, and is as long as the matrix.
        unsafe {
            self.device.decode(self.weights.layout(), &operands, 0, rows, DType::F32, std::ptr::null_mut())?;
        }
        context.wait()?;
        to.read(out)?;
        self.weights.extra().apply(out)
    }
}
