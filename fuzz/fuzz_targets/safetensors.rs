#![no_main]
#[path = "../targets.rs"]
#[expect(dead_code, reason = "each program is one target")]
mod targets;
libfuzzer_sys::fuzz_target!(|bytes: &[u8]| targets::safetensors(bytes));
