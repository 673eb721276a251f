//! tenpak turns a model checkpoint into low-bit weights and runs it.
//!
//! ```text
//! checkpoint --source--> tensor --recipe--> codec --encode--> planes --artifact--> model.tenpak
//!                                                               |                     |
//!                                                          decode, gemm            export: safetensors, npz, JSON, directory
//! ```
//!
//! [`source::open`] reads a checkpoint, [`compress::compress`] writes an [`artifact`], [`artifact::ArtifactFile`] reads
//! it back, [`export::decompress`] turns it into a checkpoint again and [`export::convert`] into its other form.
//! [`gemm`] multiplies with planes as they are, and [`attention`] is over keys and values that are quantized as they come.

pub mod artifact;
pub mod attention;
pub mod bench;
#[cfg(feature = "cli")]
pub mod cli;
pub mod codec;
pub mod codecs;
pub mod coding;
pub mod compress;
pub mod difference;
mod error;
pub mod export;
pub mod file;
pub mod fit;
pub mod gemm;
mod gguf;
pub mod layout;
mod limits;
mod location;
pub mod measure;
mod objects;
pub mod output;
#[cfg(feature = "python")]
mod python;
pub mod recipe;
pub mod report;
pub mod source;
pub mod stats;
mod tensor;

pub use codec::{Codec, Encoded};
pub use error::{DeviceError, Error, Result};
pub use limits::Limits;
pub use tensor::{DType, TensorInfo, from_f32, to_f32};
