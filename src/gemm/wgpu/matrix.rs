//! Matrices that the backend has taken, and products with them: single ones, and many in one submission.

use std::borrow::Cow;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};

use super::Wgpu;
use super::cache::LoadedCache;
use super::device::Device;
use super::flight::Flight;
use super::planes::Uploaded;
use super::record::Recording;
use crate::attention::Attend;
use crate::codec::Encoded;
use crate::error::{Error, Result};
use crate::gemm::cpu::{self, extra, reference};
use crate::gemm::{Act, Matrix, Weights, check_sizes};

/// Whose planes a matrix is made of.
#[derive(Debug, Clone)]
pub(super) enum Source<'a> {
    Borrowed(Weights<'a>),
    Owned(Arc<Encoded>),
}

impl Source<'_> {
    fn weights(&self) -> Weights<'_> {
        match self {
            Self::Borrowed(weights) => *weights,
            Self::Owned(encoded) => Weights::from(&**encoded),
        }
    }
}

/// A matrix on a graphics device.
///
/// It remembers whose planes it was made of, and uploads them again when the device was lost.
#[derive(Debug)]
pub struct Loaded<'a> {
    backend: Wgpu,
    source: Source<'a>,
    uploaded: Mutex<Option<Arc<Uploaded>>>,
}

impl<'a> Loaded<'a> {
    pub(super) fn new(backend: &Wgpu, source: Source<'a>) -> Result<Self> {
        let loaded = Self { backend: backend.clone(), source, uploaded: Mutex::default() };
        loaded.on(&backend.device()?)?;
        Ok(loaded)
    }

    /// The planes that the matrix was made of.
    #[must_use]
    pub fn weights(&self) -> Weights<'_> {
        self.source.weights()
    }

    /// The matrix on a device; uploaded where it is not there.
    fn on(&self, device: &Arc<Device>) -> Result<Arc<Uploaded>> {
        let mut uploaded = self.uploaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(there) = uploaded.as_ref().filter(|there| Arc::ptr_eq(&there.device, device)) {
            return Ok(Arc::clone(there));
        }
        let fresh = Arc::new(Uploaded::new(device, &self.weights())?);
        *uploaded = Some(Arc::clone(&fresh));
        Ok(fresh)
    }

    /// Records a product of which neither side is empty.
    fn record(&self, recording: &mut Recording, device: &Arc<Device>, x: &[f32], m: usize, act: Act) -> Result<()> {
        let uploaded = self.on(device)?;
        let weights = self.weights();
        let half = act == Act::F16 && device.half();
        let mut x = Cow::Borrowed(x);
        if weights.extra().column_scales().is_some() {
            weights.extra().scale(x.to_mut());
        }
        // Where the kernel computes with halves, activations become halves on their way there.
        if act != Act::F32 && !half {
            x = Cow::Owned(reference::round_activations(act, &x, weights.cols()));
        }
        recording.multiply(&uploaded, &x, m, half)
    }
}

/// Whether a product has neither activations nor results: then all results are zero.
fn is_empty(weights: &Weights<'_>, m: usize) -> bool {
    m == 0 || weights.rows() == 0 || weights.cols() == 0
}

/// Adds what the extra planes add after the kernels.
fn finish(weights: &Weights<'_>, x: &[f32], m: usize, y: &mut [f32]) -> Result<()> {
    extra::add(weights, x, m, y, cpu::is_small(weights.rows(), weights.cols(), m))
}

impl Matrix for Loaded<'_> {
    fn multiply(&self, x: &[f32], m: usize, act: Act, y: &mut [f32]) -> Result<()> {
        let weights = self.weights();
        check_sizes(&weights, x.len(), m, y.len())?;
        if is_empty(&weights, m) {
            y.fill(0.0);
            return Ok(());
        }
        let device = self.backend.device()?;
        let flight = device.watched("a product", 4 * (x.len() + y.len()) as u64, || {
            let mut recording = Recording::new(&device);
            self.record(&mut recording, &device, x, m, act)?;
            Ok(recording.submit())
        })?;
        flight.wait()?;
        flight.read([&mut *y])?;
        finish(&weights, x, m, y)
    }

    fn decode(&self, out: &mut [f32]) -> Result<()> {
        let weights = self.weights();
        let (rows, cols) = (weights.rows(), weights.cols());
        if rows.checked_mul(cols) != Some(out.len()) {
            return Err(Error::invalid(format!("{} numbers for a {rows} x {cols} matrix", out.len())));
        }
        if out.is_empty() {
            return Ok(());
        }
        let device = self.backend.device()?;
        let flight = device.watched("a decoded matrix", 4 * out.len() as u64, || {
            let mut recording = Recording::new(&device);
            recording.decode(&*self.on(&device)?)?;
            Ok(recording.submit())
        })?;
        flight.wait()?;
        flight.read([&mut *out])?;
        weights.extra().apply(out)
    }
}

/// One part of a [`Batch`], with what is left to do when its results are there.
#[derive(Debug)]
enum Job<'a> {
    /// A product with `m` rows of activations, which are there where extra planes need them again.
    Product { source: Source<'a>, m: usize, x: Vec<f32> },
    /// Attention with so many results.
    Attention(usize),
}

impl Job<'_> {
    /// How many results there are, and how many of them come from the device.
    fn results(&self) -> (usize, usize) {
        match self {
            Self::Product { source, m, .. } => {
                let weights = source.weights();
                let all = m * weights.rows();
                (all, if is_empty(&weights, *m) { 0 } else { all })
            }
            Self::Attention(all) => (*all, *all),
        }
    }
}

/// Products and attention that are submitted together: the device is asked once for all of them.
#[derive(Debug)]
pub struct Batch<'a> {
    backend: Wgpu,
    device: Arc<Device>,
    recording: Recording,
    jobs: Vec<Job<'a>>,
}

impl<'a> Batch<'a> {
    pub(super) fn new(backend: &Wgpu) -> Result<Self> {
        let device = backend.device()?;
        let recording = Recording::new(&device);
        Ok(Self { backend: backend.clone(), device, recording, jobs: Vec::new() })
    }

    /// Adds the product of a matrix with `m` rows of activations, which are copied; its number is how many there were.
    ///
    /// # Errors
    /// [`Error::Invalid`] when `x` is not `m * k` numbers or the matrix is another backend's, [`Error::OutOfMemory`],
    /// [`Error::Device`].
    pub fn multiply(&mut self, matrix: &Loaded<'a>, x: &[f32], m: usize, act: Act) -> Result<usize> {
        let weights = matrix.weights();
        let results = m.saturating_mul(weights.rows());
        check_sizes(&weights, x.len(), m, results)?;
        if !matrix.backend.is(&self.backend) {
            return Err(Error::invalid(
                "the matrix was taken by another backend than the batch, expected the same one",
            ));
        }
        if !is_empty(&weights, m) {
            let Self { device, recording, .. } = self;
            let bytes = (x.len() as u64).saturating_add(results as u64).saturating_mul(4);
            device.watched("a product", bytes, || matrix.record(recording, device, x, m, act))?;
        }
        let x = if weights.extra().has_outliers() { x.to_vec() } else { Vec::new() };
        self.jobs.push(Job::Product { source: matrix.source.clone(), m, x });
        Ok(self.jobs.len() - 1)
    }

    /// Adds attention over a cache as it is, see [`LoadedCache::attend`]; its number is how many there were.
    ///
    /// # Errors
    /// As [`LoadedCache::attend`], and [`Error::Invalid`] when the cache is another backend's.
    pub fn attend(&mut self, cache: &'a LoadedCache, q: &[f32], m: usize, options: Attend) -> Result<usize> {
        options.check(&cache.tokens().view(), q.len(), m, q.len())?;
        if !cache.is_of(&self.backend) {
            return Err(Error::invalid("the cache was taken by another backend than the batch, expected the same one"));
        }
        if !q.is_empty() {
            let Self { device, recording, .. } = self;
            device.watched("attention", 8 * q.len() as u64, || cache.record(recording, device, q, m, options))?;
        }
        self.jobs.push(Job::Attention(q.len()));
        Ok(self.jobs.len() - 1)
    }

    /// Submits the products.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn submit(self) -> Result<Pending<'a>> {
        let Self { device, recording, jobs, .. } = self;
        let flight = device.watched("products", 0, || Ok(recording.submit()))?;
        Ok(Pending { flight: Some(flight), jobs })
    }
}

/// The results of a [`Batch`] that are on their way: wait for them, or await them on any executor.
#[derive(Debug)]
#[must_use = "the results are read by waiting for them"]
pub struct Pending<'a> {
    /// Nothing once the results were given out.
    flight: Option<Flight>,
    jobs: Vec<Job<'a>>,
}

impl Pending<'_> {
    /// Waits for the results of all parts of the batch, in their order.
    ///
    /// # Errors
    /// [`Error::Device`] when the device is lost, [`Error::Invalid`] for an outlier beyond its row.
    pub fn wait(mut self) -> Result<Vec<Vec<f32>>> {
        self.flight.as_ref().map_or(Ok(()), Flight::wait)?;
        self.results()
    }

    fn results(&mut self) -> Result<Vec<Vec<f32>>> {
        let jobs = std::mem::take(&mut self.jobs);
        let mut results: Vec<_> = jobs.iter().map(|job| vec![0.0; job.results().0]).collect();
        if let Some(flight) = self.flight.take() {
            let filled = jobs.iter().zip(&mut results).filter(|(job, _)| job.results().1 > 0);
            flight.read(filled.map(|(_, y)| y.as_mut_slice()))?;
        }
        for (job, y) in jobs.iter().zip(&mut results) {
            if let Job::Product { source, m, x } = job {
                finish(&source.weights(), x, *m, y)?;
            }
        }
        Ok(results)
    }
}

impl Future for Pending<'_> {
    type Output = Result<Vec<Vec<f32>>>;

    /// # Panics
    /// When it is polled again after its results were given out.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let flight = self.flight.as_mut().expect("results are given out once");
        match flight.poll(context) {
            Poll::Ready(Ok(())) => Poll::Ready(self.results()),
            Poll::Ready(Err(e)) => Poll::Ready(Err(e)),
            Poll::Pending => Poll::Pending,
        }
    }
}
