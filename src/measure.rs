//! How far decoded weights are from the original ones.

/// Sums over pairs of original and decoded weights; add them up over blocks, tensors and models.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Distance {
    /// Pairs.
    pub weights: u64,
    /// Sum of squares of the originals.
    pub signal: f64,
    /// Sum of squared differences.
    pub noise: f64,
    /// Largest difference.
    pub max: f64,
}

impl Distance {
    /// The distance between two runs of weights.
    ///
    /// Sums are taken over sixteen lanes in a fixed order, so that they are the same on every machine.
    ///
    /// # Panics
    /// When the runs differ in length: a bug of the caller.
    #[must_use]
    pub fn between(original: &[f32], decoded: &[f32]) -> Self {
        const LANES: usize = 16;
        assert_eq!(original.len(), decoded.len(), "weights without a partner");
        let mut signal = [0.0_f64; LANES];
        let mut noise = [0.0_f64; LANES];
        let mut max = [0.0_f64; LANES];
        let mut add = |lane: usize, w: f32, d: f32| {
            let w = f64::from(w);
            let e = (w - f64::from(d)).abs();
            signal[lane] += w * w;
            noise[lane] += e * e;
            max[lane] = if e > max[lane] { e } else { max[lane] };
        };
        let (whole, rest) = original.as_chunks::<LANES>();
        let (whole_decoded, rest_decoded) = decoded.as_chunks::<LANES>();
        for (w, d) in whole.iter().zip(whole_decoded) {
            for lane in 0..LANES {
                add(lane, w[lane], d[lane]);
            }
        }
        for (lane, (&w, &d)) in rest.iter().zip(rest_decoded).enumerate() {
            add(lane, w, d);
        }
        Self {
            weights: original.len() as u64,
            signal: signal.iter().sum(),
            noise: noise.iter().sum(),
            max: max.iter().copied().fold(0.0, f64::max),
        }
    }

    /// Takes in another distance.
    pub fn merge(&mut self, other: &Self) {
        self.weights += other.weights;
        self.signal += other.signal;
        self.noise += other.noise;
        self.max = self.max.max(other.max);
    }

    /// Normalised mean squared error, `|W - D|^2 / |W|^2`; zero where there is no noise.
    #[must_use]
    pub fn nmse(&self) -> f64 {
        if self.noise == 0.0 { 0.0 } else { self.noise / self.signal }
    }

    /// Signal to noise in dB; infinite where there is no noise.
    #[must_use]
    pub fn snr_db(&self) -> f64 {
        -10.0 * self.nmse().log10()
    }

    /// Root of the mean squared difference.
    #[must_use]
    pub fn rms(&self) -> f64 {
        if self.weights == 0 { 0.0 } else { (self.noise / self.weights as f64).sqrt() }
    }
}
