//! Writes a version into the run directory: the full state for a restart, and a checkpoint folder.

use bytes::Bytes;

use muster_broadcaster::blocking::off_loop_if_large;
use muster_broadcaster::snapshot::{self, Contents};
use muster_broadcaster::store::disk::Existing;
use muster_protocol::id::PolicyVersion;

use super::announce::Announced;
use super::error::TrainerError;
use super::state::Trainer;

impl Trainer {
    /// Saves the state and writes a folder, if one is due at this step.
    pub(super) async fn checkpoint(
        &mut self,
        step: PolicyVersion,
        announced: &Announced,
    ) -> Result<(), TrainerError> {
        let last = step.0 == self.settings.steps;
        if !last && !step.0.is_multiple_of(self.settings.checkpoint_every.max(1)) {
            return Ok(());
        }
        self.save().await?;
        let image = self.stepper(step)?.image();
        self.write_folder(announced, image).await
    }

    /// Saves the full state, unless the newest version is saved already.
    pub(super) async fn save(&mut self) -> Result<(), TrainerError> {
        let version = self.resolver.version();
        if version == self.saved {
            return Ok(());
        }
        let path = self.archive.state_path(version);
        let saved = self.stepper(version)?.save(&path).await;
        saved.map_err(|source| TrainerError::Step {
            step: version,
            source,
        })?;
        self.saved = version;
        self.archive
            .prune(version, self.descriptor.body.async_level)?;
        Ok(())
    }

    pub(super) async fn write_folder(
        &self,
        announced: &Announced,
        image: Bytes,
    ) -> Result<(), TrainerError> {
        let version = announced.version.clone();
        let folder = self
            .dir
            .join("checkpoints")
            .join(version.body.version.to_string());
        let anchor = match &announced.anchor {
            Some(anchor) => anchor.clone(),
            None => self.announcer.anchor(version.body.version, &image).await?,
        };
        let files = self
            .files
            .iter()
            .map(|file| (file.name.clone(), file.bytes.clone()))
            .collect();
        let run = self.client.run().clone();
        let written = off_loop_if_large(image.len(), move || {
            let contents = Contents {
                run: &run,
                version: &version,
                anchor: &anchor,
                weights: &image,
                files: &files,
                file_bytes_max: snapshot::FILE_BYTES_MAX,
            };
            snapshot::write(&folder, &contents, Existing::Replace)
        });
        written.await??;
        Ok(())
    }
}
