//! Results on stdout. Whoever reads them may have gone (`| head`), which is an error like any other and no panic.

use std::io::{self, Write as _};

use anyhow::{Context, Result};

/// Prints a line of a result.
///
/// # Errors
/// When stdout takes no more.
pub fn say(line: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{line}")
        .and_then(|()| stdout.flush())
        .context("stdout cannot be written, so the rest of the result is lost")
}
