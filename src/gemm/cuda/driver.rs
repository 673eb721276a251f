//! The CUDA driver: the few calls that are made, each checked, none before its library is known to be there.

#![expect(unsafe_code, reason = "calls of the driver, which trusts its callers")]

use std::ffi::{CString, c_int, c_void};
use std::sync::OnceLock;

use cudarc::driver::result::{self, DriverError, function, module};
use cudarc::driver::sys::{
    self, CUcontext, CUdevice_attribute_enum as Attribute, CUfunction, CUfunction_attribute_enum as FunctionAttribute,
    CUresult,
};

use super::plan::Step;
use crate::error::{DeviceError, Error, Result};

/// What runs the kernels of a device in order.
pub use cudarc::driver::sys::CUstream as Stream;
/// An address on a device.
pub type Address = sys::CUdeviceptr;

/// Whether there is a driver; asked once.
///
/// # Errors
/// [`DeviceError::NotFound`], with what to do.
pub fn start() -> Result<()> {
    static STARTED: OnceLock<Result<(), String>> = OnceLock::new();
    let start = || {
        // SAFETY: loads NVIDIA's library, whose initialisation has no requirements.
        if !unsafe { sys::is_culib_present() } {
            return Err("no CUDA driver was found, expected libcuda.so.1; install NVIDIA's driver for this GPU, or \
                        multiply on the CPU"
                .to_owned());
        }
        result::init().map_err(|error| {
            format!("the CUDA driver could not start: {}; check `nvidia-smi`, or multiply on the CPU", text(error))
        })
    };
    STARTED.get_or_init(start).clone().map_err(|what| Error::Device(DeviceError::NotFound(what)))
}

/// What the driver says about an error.
fn text(error: DriverError) -> String {
    let name = error.error_name().ok().and_then(|name| name.to_str().ok()).unwrap_or("an unknown error");
    let explained = error.error_string().ok().and_then(|text| text.to_str().ok()).unwrap_or("");
    format!("{name}, {explained}")
}

/// The driver's answer about `bytes` bytes on a device.
fn checked<T>(answer: Result<T, DriverError>, device: &str, what: &str, bytes: u64) -> Result<T> {
    answer.map_err(|error| match error.0 {
        CUresult::CUDA_ERROR_OUT_OF_MEMORY => Error::OutOfMemory { what: format!("{what} on device {device}"), bytes },
        _ => Error::Device(DeviceError::Failed { device: device.to_owned(), what: format!("{what}: {}", text(error)) }),
    })
}

/// How many devices the driver shows.
///
/// # Errors
/// As [`start`].
pub fn devices() -> Result<usize> {
    start()?;
    let number = checked(result::device::get_count(), "cuda", "counting devices", 0)?;
    Ok(usize::try_from(number).unwrap_or(0))
}

/// A device as its driver describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Described {
    /// The N of `cuda:N`.
    pub index: usize,
    /// The name that the driver gives it.
    pub name: String,
    /// Compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub multiprocessors: usize,
    /// Bytes of shared memory that a block may have at most.
    pub shared_bytes: usize,
    /// Bytes of memory.
    pub memory_bytes: u64,
}

/// Describes a device.
///
/// # Errors
/// As [`start`], and [`DeviceError::NotFound`] when there are fewer.
pub fn describe(index: usize) -> Result<Described> {
    let there = devices()?;
    let device = format!("cuda:{index}");
    if index >= there {
        let found = if there == 0 { "none".to_owned() } else { format!("cuda:0 to cuda:{}", there - 1) };
        return Err(Error::Device(DeviceError::NotFound(format!(
            "there is no device {device}, found {found}; `tenpak devices` lists them"
        ))));
    }
    let ordinal = c_int::try_from(index).expect("fewer than there are");
    let handle = checked(result::device::get(ordinal), &device, "opening it", 0)?;
    let attribute = |attribute: Attribute| {
        // SAFETY: the handle came from the driver.
        let value = unsafe { result::device::get_attribute(handle, attribute) };
        checked(value, &device, "asking for an attribute", 0).map(|value| u32::try_from(value).unwrap_or(0))
    };
    // SAFETY: the handle came from the driver.
    let memory = unsafe { result::device::total_mem(handle) };
    Ok(Described {
        index,
        name: checked(result::device::get_name(handle), &device, "asking for its name", 0)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize,
        shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        memory_bytes: checked(memory, &device, "asking for its memory", 0)? as u64,
    })
}

/// The context of a device that all libraries of a process share, PyTorch among them. It is kept for the life of the
/// process, as they do.
#[derive(Debug)]
pub struct Context {
    context: CUcontext,
    device: String,
}

// SAFETY: a context is the driver's, which any thread may use after making it current.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// A kernel on a device, there as long as the process.
#[derive(Debug, Clone, Copy)]
pub struct Function(CUfunction);

// SAFETY: a function is the driver's, never unloaded, and may be launched from any thread.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

impl Context {
    /// The context of a device.
    ///
    /// # Errors
    /// As [`describe`], and what the driver says.
    pub fn of(index: usize) -> Result<Self> {
        start()?;
        let device = format!("cuda:{index}");
        let ordinal = c_int::try_from(index).map_err(|_| Error::invalid(format!("no driver has a device {device}")))?;
        let handle = checked(result::device::get(ordinal), &device, "opening it", 0)?;
        // SAFETY: the handle came from the driver.
        let context = checked(unsafe { result::primary_ctx::retain(handle) }, &device, "opening its context", 0)?;
        Ok(Self { context, device })
    }

    fn checked<T>(&self, answer: Result<T, DriverError>, what: &str, bytes: usize) -> Result<T> {
        checked(answer, &self.device, what, bytes as u64)
    }

    /// Makes the context that of this thread, where it is not.
    fn enter(&self) -> Result<()> {
        if result::ctx::get_current().ok().flatten() == Some(self.context) {
            return Ok(());
        }
        // SAFETY: the context is kept for the life of the process.
        self.checked(unsafe { result::ctx::set_current(self.context) }, "entering its context", 0)
    }

    /// Loads machine code and finds its kernel.
    ///
    /// # Errors
    /// What the driver says.
    pub fn load(&self, cubin: &[u8], entry: &str, shared: u32) -> Result<Function> {
        self.enter()?;
        let entry = CString::new(entry).expect("a name");
        // SAFETY: the bytes are machine code of a compiler, whole, as the digest beside them says; the driver copies them.
        let loaded = self.checked(unsafe { module::load_data(cubin.as_ptr().cast()) }, "loading a kernel", 0)?;
        // SAFETY: the module was loaded above and is never unloaded.
        let found = self.checked(unsafe { module::get_function(loaded, entry) }, "finding a kernel", 0)?;
        let most = i32::try_from(shared).expect("less than any device has");
        let attribute = FunctionAttribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function was found above.
        let answer = unsafe { function::set_function_attribute(found, attribute, most) };
        self.checked(answer, "asking for shared memory", shared as usize)?;
        Ok(Function(found))
    }

    /// Launches a kernel, without waiting for it.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// The parameters are those of the kernel, in order and of its types, and what they address stays as it is until
    /// the kernel has ended; the stream is one of this device.
    pub unsafe fn launch(&self, function: Function, step: &Step, stream: Stream, of: &mut [*mut c_void]) -> Result<()> {
        self.enter()?;
        let [x, y, z] = step.grid;
        // SAFETY: the caller vouches for the parameters.
        let answer =
            unsafe { result::launch_kernel(function.0, (x, y, z), (step.threads, 1, 1), step.shared, stream, of) };
        self.checked(answer, "launching a kernel", 0)
    }

    /// Fills memory with zeros, without waiting.
    ///
    /// # Errors
    /// What the driver says.
    ///
    /// # Safety
    /// There are so many bytes at the address, and nobody uses them until then.
    pub unsafe fn clear(&self, at: Address, bytes: usize, stream: Stream) -> Result<()> {
        self.enter()?;
        // SAFETY: the caller vouches for the memory.
        self.checked(unsafe { result::memset_d8_async(at, 0, bytes, stream) }, "clearing memory", bytes)
    }

    /// Takes memory.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`].
    pub fn memory(self: &std::sync::Arc<Self>, bytes: usize, what: &str) -> Result<Memory> {
        self.enter()?;
        // SAFETY: no size is zero.
        let at = self.checked(unsafe { result::malloc_sync(bytes.max(16)) }, what, bytes)?;
        Ok(Memory { context: std::sync::Arc::clone(self), at })
    }

    /// Waits for all that was launched.
    ///
    /// # Errors
    /// What went wrong in a kernel.
    pub fn wait(&self) -> Result<()> {
        self.enter()?;
        self.checked(result::ctx::synchronize(), "waiting for a kernel", 0)
    }
}

/// Memory of a device.
#[derive(Debug)]
pub struct Memory {
    context: std::sync::Arc<Context>,
    at: Address,
}

impl Memory {
    /// Its address.
    pub fn at(&self) -> Address {
        self.at
    }

    /// Copies bytes there, and waits.
    ///
    /// # Errors
    /// What the driver says.
    pub fn write(&self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.context.enter()?;
        // SAFETY: memory is taken for what is written to it.
        self.context.checked(unsafe { result::memcpy_htod_sync(self.at, bytes) }, "copying to it", bytes.len())
    }

    /// Copies numbers from there, and waits for them.
    ///
    /// # Errors
    /// What the driver says.
    pub fn read(&self, numbers: &mut [f32]) -> Result<()> {
        self.context.enter()?;
        let bytes = size_of_val(numbers);
        // SAFETY: memory is taken for what is read from it, and any bits are numbers.
        self.context.checked(unsafe { result::memcpy_dtoh_sync(numbers, self.at) }, "copying from it", bytes)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.context.enter().is_ok() {
            // SAFETY: the address came from the driver and is given back once.
            let _ = unsafe { result::free_sync(self.at) };
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn described(capability: (u32, u32)) -> Described {
        Described {
            index: 0,
            name: "a device".to_owned(),
            capability,
            multiprocessors: 100,
            shared_bytes: 100 << 10,
            memory_bytes: 1 << 30,
        }
    }
}
