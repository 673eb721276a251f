//! Promises of products on graphics devices: every layout and shape within the bound, by every path, and no call that
//! goes wrong takes the program with it.
//!
//! A device is needed: where there is none these tests fail, because a test that is passed over promises nothing. Mesa's
//! software driver will do. A driver's complaint about a call is an error of that call, so that any of them fails a test.

mod arrays;
mod attention;
#[path = "../attention/expected.rs"]
mod cached;
mod calls;
mod decode;
mod devices;
mod expected;
mod extras;
#[path = "../matrices/mod.rs"]
mod matrices;
mod products;

use matrices::Stream;
