//! Checkpoints byte by byte.

use std::fmt::Write as _;
use std::io::{Cursor, Write as _};
use std::path::{Path, PathBuf};

use zip::CompressionMethod;
use zip::write::SimpleFileOptions;

/// A new file `name` in `dir` with these bytes.
pub fn write(dir: &Path, name: &str, bytes: impl AsRef<[u8]>) -> PathBuf {
    let path = dir.join(name);
    // Some file systems wait for the disk when a file is truncated and written again.
    let _ = std::fs::remove_file(&path);
    std::fs::write(&path, bytes).unwrap();
    path
}

/// A safetensors file of a header and whatever follows it.
pub fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// A sound safetensors file of F32 tensors, element `i` of tensor `t` being `100 t + i`.
pub fn safetensors(tensors: &[(&str, &[u64])]) -> Vec<u8> {
    let (mut header, mut data) = (r#"{"__metadata__":{"format":"pt"}"#.to_owned(), Vec::new());
    for (t, (name, shape)) in tensors.iter().enumerate() {
        let begin = data.len();
        for i in 0..shape.iter().product::<u64>() {
            data.extend_from_slice(&(100.0 * t as f32 + i as f32).to_le_bytes());
        }
        let end = data.len();
        write!(header, r#","{name}":{{"dtype":"F32","shape":{shape:?},"data_offsets":[{begin},{end}]}}"#).unwrap();
    }
    with_header(&(header + "}"), &data)
}

/// Little-endian bytes of F32 numbers.
pub fn f32s(numbers: impl IntoIterator<Item = f32>) -> Vec<u8> {
    numbers.into_iter().flat_map(f32::to_le_bytes).collect()
}

/// A version 1 npy file.
pub fn npy(descr: &str, fortran: bool, shape: &str, data: &[u8]) -> Vec<u8> {
    let order = if fortran { "True" } else { "False" };
    let mut header = format!("{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}");
    while (10 + header.len() + 1) % 64 != 0 {
        header.push(' ');
    }
    header.push('\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend_from_slice(&u16::try_from(header.len()).unwrap().to_le_bytes());
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    file
}

/// A zip of members.
pub fn zip(members: &[(&str, &[u8])], method: CompressionMethod) -> Vec<u8> {
    let mut writer = zip::ZipWriter::new(Cursor::new(Vec::new()));
    for (name, bytes) in members {
        writer.start_file(*name, SimpleFileOptions::default().compression_method(method)).unwrap();
        writer.write_all(bytes).unwrap();
    }
    writer.finish().unwrap().into_inner()
}

/// Where the central header of member `index` begins.
pub fn central_header(archive: &[u8], index: usize) -> usize {
    let found = archive.windows(4).enumerate().filter(|(_, w)| w == b"PK\x01\x02").map(|(at, _)| at);
    found.collect::<Vec<_>>()[index]
}
