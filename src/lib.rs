//! tenpak turns a model checkpoint into low-bit weights and runs it.
//!
//! ```text
//! checkpoint --source--> tensor --recipe--> codec --encode--> planes --artifact--> model.tenpak
//!                                                               |                     |
//!                                                        decode / export: safetensors, npz, JSON
//! ```

#![cfg_attr(not(test), warn(clippy::unwrap_used))]

pub mod codec;
pub mod codecs;
mod error;
pub mod file;
pub mod fit;
pub mod layout;
mod limits;
pub mod source;
mod tensor;

pub use codec::{Codec, Encoded};
pub use error::{Error, Result};
pub use limits::Limits;
pub use tensor::{DType, TensorInfo, from_f32, to_f32};
