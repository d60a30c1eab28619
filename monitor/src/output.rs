//! Results on stdout. A reader that has gone (`| head`) is an error and not a panic.

use std::io::{self, Write as _};

use anyhow::{Context, Result};

/// Prints a line of a result.
///
/// # Errors
/// Stdout is closed.
pub fn say(line: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")
        .and_then(|()| stdout.flush())
        .context("stdout cannot be written, so the rest of the result is lost")
}
