//! A device and its kernels: compiled when they are first needed, then kept in memory and on disk.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use super::driver::{self, Context, Described, Function};
use super::nvrtc;
use super::plan::{Hardware, Problem, Product, STATIC_BYTES, Step};
use super::source::Variant;
use crate::error::{DeviceError, Error, Result};
use crate::gemm::kept;

/// The oldest devices whose instructions the kernels use: bfloats and asynchronous copies came with Ampere.
const OLDEST: (u32, u32) = (8, 0);

/// The devices that have the instructions of `wgmma.cu`; no later ones do.
const HOPPER: (u32, u32) = (9, 0);

/// The environment variable that is `0` where `wgmma.cu` is not wanted, read when a device is opened.
pub const WGMMA_VARIABLE: &str = "TENPAK_WGMMA";

/// A step whose kernel is on the device.
#[derive(Debug, Clone)]
pub(super) struct Ready {
    pub step: Step,
    pub function: Function,
}

/// A product whose kernels are on the device.
#[derive(Debug)]
pub(super) struct ReadyProduct {
    pub plan: Product,
    pub prepare: Option<Ready>,
    pub multiply: Ready,
    pub outliers: Option<Ready>,
}

/// A device that is in use.
#[derive(Debug)]
pub struct Device {
    described: Described,
    architecture: String,
    folder: Option<PathBuf>,
    wgmma: bool,
    pub(super) context: Arc<Context>,
    kernels: Mutex<HashMap<Variant, Function>>,
}

impl Device {
    /// Opens a device.
    ///
    /// # Errors
    /// [`DeviceError::NotFound`] when there is no driver, no such device, or it is too old.
    pub fn open(index: usize) -> Result<Self> {
        let described = driver::describe(index)?;
        let architecture = architecture(&described)?;
        let context = Arc::new(Context::of(index)?);
        let wgmma = described.capability == HOPPER && std::env::var_os(WGMMA_VARIABLE).is_none_or(|value| value != "0");
        Ok(Self { described, architecture, folder: kept::usual_folder(), wgmma, context, kernels: Mutex::default() })
    }

    /// The device, as its driver describes it.
    #[must_use]
    pub fn described(&self) -> &Described {
        &self.described
    }

    /// What plans need to know.
    #[must_use]
    pub fn hardware(&self) -> Hardware {
        Hardware {
            multiprocessors: self.described.multiprocessors.max(1),
            shared_bytes: self.described.shared_bytes.max(2 * STATIC_BYTES),
            wgmma: self.wgmma,
        }
    }

    /// A product with its kernels.
    pub(super) fn ready(&self, problem: &Problem) -> Result<ReadyProduct> {
        let plan = Product::new(problem, self.hardware())?;
        let prepare = plan.prepare.clone().map(|step| self.ready_step(step)).transpose()?;
        let multiply = self.ready_step(plan.multiply.clone())?;
        let outliers = plan.outliers.clone().map(|step| self.ready_step(step)).transpose()?;
        Ok(ReadyProduct { plan, prepare, multiply, outliers })
    }

    /// A step with its kernel.
    pub(super) fn ready_step(&self, step: Step) -> Result<Ready> {
        let function = self.function(&step.variant)?;
        Ok(Ready { step, function })
    }

    fn function(&self, variant: &Variant) -> Result<Function> {
        // Who needs the same one meanwhile waits, which is shorter than to compile it as well.
        let mut kernels = self.kernels.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = kernels.get(variant) {
            return Ok(*found);
        }
        let cubin = self.cubin(variant)?;
        let most = u32::try_from(self.hardware().shared_bytes - STATIC_BYTES).expect("shared memory is small");
        let function = self.context.load(&cubin, &variant.kernel().entry(), most)?;
        kernels.insert(variant.clone(), function);
        Ok(function)
    }

    /// Machine code, from disk where it lies there.
    fn cubin(&self, variant: &Variant) -> Result<Vec<u8>> {
        let text = variant.text();
        let path = self.folder.as_ref().map(|folder| folder.join(key(&text, &self.architecture)));
        if let Some((_, cubin)) = path.as_deref().and_then(kept::read) {
            return Ok(cubin);
        }
        let cubin = nvrtc::compile(variant.kernel().name(), &text, &self.architecture, &[])?.cubin;
        if let Some(path) = path {
            // Where that is not possible, it is compiled again next time.
            let _ = kept::write(&path, blake3::hash(&cubin).as_bytes(), &cubin);
        }
        Ok(cubin)
    }
}

/// The name of a file of machine code: text and constants, architecture and version make it.
#[must_use]
pub fn key(text: &str, architecture: &str) -> String {
    let hash = blake3::hash(format!("{}\n{architecture}\n{text}", env!("CARGO_PKG_VERSION")).as_bytes());
    format!("cuda_sm{architecture}_{}", &hash.to_hex()[..32])
}

/// The architecture that a device's kernels are compiled for.
fn architecture(described: &Described) -> Result<String> {
    let (major, minor) = described.capability;
    if described.capability < OLDEST {
        return Err(Error::Device(DeviceError::NotFound(format!(
            "device cuda:{} ({}) has compute capability {major}.{minor}, expected at least {}.{}; multiply on the CPU, or on \
             a graphics device with wgpu",
            described.index, described.name, OLDEST.0, OLDEST.1
        ))));
    }
    // Hopper's own instructions are those of 9.0a, which later devices do not have.
    Ok(format!("{major}{minor}{}", if described.capability == HOPPER { "a" } else { "" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn described(capability: (u32, u32)) -> Described {
        driver::tests::described(capability)
    }

    #[test]
    fn machine_code_is_kept_under_all_that_it_depends_on() {
        let keys = [key("a", "80"), key("b", "80"), key("a", "90a")];
        assert!(keys[0] != keys[1] && keys[0] != keys[2] && keys[0] == key("a", "80"));
        assert!(keys.iter().all(|key| key.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')), "{keys:?}");
    }

    #[test]
    fn architectures_are_those_of_devices_and_old_ones_are_told_what_to_do() {
        let name = |capability| architecture(&described(capability));
        assert_eq!(name((8, 0)).unwrap(), "80");
        assert_eq!(name((8, 9)).unwrap(), "89");
        assert_eq!(name((9, 0)).unwrap(), "90a");
        assert_eq!(name((10, 0)).unwrap(), "100");
        assert_eq!(name((12, 0)).unwrap(), "120");
        let error = name((7, 5)).unwrap_err().to_string();
        assert!(error.contains("compute capability 7.5, expected at least 8.0; multiply on the CPU"), "{error}");
    }

    #[test]
    fn a_machine_without_a_driver_or_device_gets_an_error_that_says_what_to_do() {
        match Device::open(1000) {
            Err(Error::Device(DeviceError::NotFound(what))) => {
                assert!(what.contains("multiply on the CPU") || what.contains("tenpak devices"), "{what}");
            }
            other => panic!("expected an error, found {other:?}"),
        }
    }
}
