//! Entry point of `manyhands`.

use std::process::ExitCode;

/// Gradients and weights come and go by the hundred megabytes; glibc's allocator gives their pages
/// back to the system every time, and every thread waits for that.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    quiet_device_select();
    // Several parts of the program bring a provider of cryptography for TLS; without a word it
    // would be left open which one counts.
    rustls::crypto::ring::default_provider().install_default().ok();
    match manyhands_node::cli::run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Without a desktop session, Mesa's device selection layer complains on standard error that it
/// finds no display. Nothing here draws on one.
#[expect(unsafe_code, reason = "changing the environment is safe before threads exist")]
fn quiet_device_select() {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: the first statement of `main`; no other thread exists.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}
