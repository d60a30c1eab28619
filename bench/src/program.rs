//! The programs that measurements start.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The path of `muster-bench` itself.
pub(super) fn own() -> Result<PathBuf> {
    std::env::current_exe().context("this program's own path is not known")
}

/// The absolute path of the named `muster` program, else of the one beside `muster-bench`.
pub(super) fn muster(named: Option<&Path>) -> Result<PathBuf> {
    let program = match named {
        Some(path) => std::path::absolute(path)?,
        None => own()?.with_file_name("muster"),
    };
    if !program.is_file() {
        bail!(
            "{} is missing: build it with `cargo build --release`, or name it with --muster",
            program.display()
        );
    }
    Ok(program)
}
