//! NVRTC, NVIDIA's compiler as a library, loaded when the first kernel is compiled.
//!
//! It needs neither a GPU nor a toolkit: PyTorch brings it, and so does `pip install nvidia-cuda-nvrtc`. It is asked for
//! machine code of the device at hand and not for PTX, which a driver older than NVRTC refuses. cudarc has bindings of its
//! own, but they look for the library by name alone, and wheels put it where the loader does not look.

#![expect(unsafe_code, reason = "functions of a library loaded at run time")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, OnceLock, PoisonError};

use libloading::Library;

use crate::error::{DeviceError, Error, Result};

/// The environment variable that names the library.
pub const PATH_VARIABLE: &str = "TENPAK_NVRTC";

/// What a kernel became.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// What the compiler said.
    pub log: String,
}

type Program = *mut c_void;

/// The functions of the library that are used.
struct Nvrtc {
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    log_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    log: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    cubin_size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
    cubin: unsafe extern "C" fn(Program, *mut c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    version: (c_int, c_int),
    _library: Library,
}

/// Where the library was said to be.
static SAID: Mutex<Option<PathBuf>> = Mutex::new(None);
static LOADED: OnceLock<Nvrtc> = OnceLock::new();

/// Says where the library is, to those who know better than the loader; without effect once it is loaded.
pub fn set_path(path: &Path) {
    *SAID.lock().unwrap_or_else(PoisonError::into_inner) = Some(path.to_owned());
}

fn candidates() -> Vec<PathBuf> {
    let variable = std::env::var_os(PATH_VARIABLE).filter(|path| !path.is_empty()).map(PathBuf::from);
    let said = SAID.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let names: &[&str] = if cfg!(windows) {
        &["nvrtc64_130_0.dll", "nvrtc64_120_0.dll"]
    } else {
        &["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    };
    variable.into_iter().chain(said).chain(names.iter().map(PathBuf::from)).collect()
}

impl Nvrtc {
    fn get() -> Result<&'static Self> {
        if let Some(loaded) = LOADED.get() {
            return Ok(loaded);
        }
        let loaded = Self::load()?;
        Ok(LOADED.get_or_init(|| loaded))
    }

    fn load() -> Result<Self> {
        let mut last = String::new();
        for path in candidates() {
            // SAFETY: the library is NVIDIA's, whose initialisation has no requirements, or one that the user names.
            match unsafe { Library::new(&path) } {
                Ok(library) => return Self::of(library, &path),
                Err(error) => last = error.to_string(),
            }
        }
        Err(Error::Device(DeviceError::NotFound(format!(
            "the compiler of CUDA kernels, NVRTC, was not found ({last}); install it with `pip install \
             nvidia-cuda-nvrtc`, or a CUDA toolkit, and set {PATH_VARIABLE} to the path of libnvrtc.so"
        ))))
    }

    fn of(library: Library, path: &Path) -> Result<Self> {
        let missing = |error: libloading::Error| {
            Error::Device(DeviceError::NotFound(format!(
                "'{}' is no NVRTC that tenpak can use: {error}; install 12.0 or later",
                path.display()
            )))
        };
        macro_rules! function {
            ($name:literal) => {
                // SAFETY: the type is that of NVIDIA's documentation, and `_library` keeps the function.
                *unsafe { library.get($name) }.map_err(missing)?
            };
        }
        let get_version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int = function!(b"nvrtcVersion");
        let mut version = (0, 0);
        // SAFETY: both addresses are those of integers.
        unsafe { get_version(&raw mut version.0, &raw mut version.1) };
        Ok(Self {
            create: function!(b"nvrtcCreateProgram"),
            compile: function!(b"nvrtcCompileProgram"),
            log_size: function!(b"nvrtcGetProgramLogSize"),
            log: function!(b"nvrtcGetProgramLog"),
            cubin_size: function!(b"nvrtcGetCUBINSize"),
            cubin: function!(b"nvrtcGetCUBIN"),
            destroy: function!(b"nvrtcDestroyProgram"),
            version,
            _library: library,
        })
    }
}

/// Major and minor version of the compiler.
///
/// # Errors
/// [`DeviceError::NotFound`] where there is none.
pub fn version() -> Result<(i32, i32)> {
    Ok(Nvrtc::get()?.version)
}

/// Compiles a text for an architecture such as `90a`.
///
/// # Errors
/// [`DeviceError::NotFound`] where there is no compiler, [`DeviceError::Failed`] when it refuses the text.
pub fn compile(name: &str, text: &str, architecture: &str, options: &[&str]) -> Result<Compiled> {
    let nvrtc = Nvrtc::get()?;
    let c = |text: &str| CString::new(text).map_err(|_| Error::invalid("a zero byte in the text of a kernel"));
    let (name_c, text) = (c(name)?, c(text)?);
    let mut all = vec![c(&format!("--gpu-architecture=sm_{architecture}"))?, c("--std=c++17")?];
    for option in options {
        all.push(c(option)?);
    }
    let pointers: Vec<*const c_char> = all.iter().map(|option| option.as_ptr()).collect();
    let failed = |what: String| {
        let device = format!("sm_{architecture}");
        Error::Device(DeviceError::Failed { device, what })
    };
    let mut program: Program = std::ptr::null_mut();
    // SAFETY: both texts end with zero and outlive the program, there are no headers.
    let created = unsafe {
        (nvrtc.create)(&raw mut program, text.as_ptr(), name_c.as_ptr(), 0, std::ptr::null(), std::ptr::null())
    };
    if created != 0 {
        return Err(failed(format!("NVRTC could not begin with kernel {name}, code {created}")));
    }
    let options = c_int::try_from(pointers.len()).expect("a few");
    // SAFETY: the program was made above, and so many options follow.
    let compiled = unsafe { (nvrtc.compile)(program, options, pointers.as_ptr()) };
    let read = |size: unsafe extern "C" fn(Program, *mut usize) -> c_int,
                get: unsafe extern "C" fn(Program, *mut c_char) -> c_int| {
        let mut bytes = 0;
        // SAFETY: the program was made above, and the buffer is as long as the library says.
        unsafe {
            if size(program, &raw mut bytes) != 0 {
                return Vec::new();
            }
            let mut buffer = vec![0_u8; bytes];
            if get(program, buffer.as_mut_ptr().cast()) == 0 { buffer } else { Vec::new() }
        }
    };
    let log = String::from_utf8_lossy(&read(nvrtc.log_size, nvrtc.log)).trim_end_matches('\0').to_owned();
    let cubin = if compiled == 0 { read(nvrtc.cubin_size, nvrtc.cubin) } else { Vec::new() };
    // SAFETY: the program was made above and is not used again.
    unsafe { (nvrtc.destroy)(&raw mut program) };
    if cubin.is_empty() {
        let (major, minor) = nvrtc.version;
        return Err(failed(format!(
            "NVRTC {major}.{minor} could not compile kernel {name} for sm_{architecture}: {}",
            log.lines().find(|line| line.contains("error")).unwrap_or(&log).trim()
        )));
    }
    Ok(Compiled { cubin, log })
}
