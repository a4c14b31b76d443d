//! Bodies of requests to the server.
#![no_main]

use libfuzzer_sys::fuzz_target;
use liger_serve::check_body;

fuzz_target!(|data: &[u8]| {
    let (&kind, body) = data.split_first().unwrap_or((&0, &[]));
    let _ = check_body(body, kind % 2 == 1, "model");
});
