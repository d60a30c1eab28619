//! The folder that a model is written to.

use anyhow::{Result, bail};

/// Refuses a folder that holds a model: if this command broke off, the folder would hold parts of two models.
pub(super) fn refuse_model(folder: &std::path::Path) -> Result<()> {
    for name in [
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
    ] {
        if folder.join(name).try_exists().unwrap_or(false) {
            bail!(
                "{} holds a model already: name a new folder",
                folder.display()
            );
        }
    }
    Ok(())
}
