//! Finds the NATS server program: the named one, else one on the PATH, else the one that `./setup` installed.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::error::NatsServerError;

/// Batched reads of a log came with 2.11.
const VERSION_MIN: (u32, u32) = (2, 11);
const NAME: &str = "nats-server";
/// Where `./setup` installs it, below the project's folder.
const IN_PROJECT: &str = ".venv/bin/nats-server";

/// A suitable server.
///
/// * `named` — the user's choice: used or refused, never replaced
/// * `search_path` — the folders of `PATH`
/// * `project` — the folder that holds `.venv`
pub(super) fn find(
    named: Option<&Path>,
    search_path: &[PathBuf],
    project: &Path,
) -> Result<PathBuf, NatsServerError> {
    if let Some(named) = named {
        return check(named).map(|()| named.to_owned());
    }
    let on_path = search_path.iter().map(|folder| folder.join(NAME));
    let mut unsuitable = None;
    for candidate in on_path.chain([project.join(IN_PROJECT)]) {
        if !candidate.is_file() {
            continue;
        }
        match check(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(error) => unsuitable = unsuitable.or(Some(error)),
        }
    }
    Err(unsuitable.unwrap_or(NatsServerError::Missing))
}

fn check(path: &Path) -> Result<(), NatsServerError> {
    let unusable = |reason: String| NatsServerError::Unusable {
        path: path.to_owned(),
        reason,
    };
    let ran = Command::new(path)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    let output = ran.map_err(|error| unusable(error.to_string()))?;
    let said = String::from_utf8_lossy(&output.stdout);
    let version = parse_version(&said)
        .ok_or_else(|| unusable(format!("its version reads `{}`", said.trim())))?;
    if version < VERSION_MIN {
        let version = format!("{}.{}", version.0, version.1);
        return Err(NatsServerError::TooOld {
            path: path.to_owned(),
            version,
        });
    }
    Ok(())
}

/// Major and minor number of `nats-server: v2.15.1`.
fn parse_version(said: &str) -> Option<(u32, u32)> {
    let version = said
        .trim()
        .strip_prefix("nats-server:")?
        .trim()
        .trim_start_matches('v');
    let mut numbers = version.split('.').map(|number| number.parse().ok());
    Some((numbers.next()??, numbers.next()??))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A program that only prints a version.
    fn fake(folder: &Path, name: &str, version: &str) -> PathBuf {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(
            &path,
            format!("#!/bin/sh\necho 'nats-server: v{version}'\n"),
        )
        .unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    #[test]
    fn a_version_is_read_and_anything_else_refused() {
        assert_eq!(parse_version("nats-server: v2.15.1\n"), Some((2, 15)));
        assert_eq!(parse_version("nats-server: v2.12.0-beta.1"), Some((2, 12)));
        assert_eq!(parse_version("hello"), None);
        assert_eq!(parse_version(""), None);
    }

    #[test]
    fn a_server_on_the_path_that_is_too_old_is_passed_over_for_the_projects() {
        let folder = tempfile::tempdir().unwrap();
        let old = fake(folder.path(), "nats-server", "2.9.10");
        let search_path = [folder.path().to_owned()];
        let refused = find(None, &search_path, folder.path())
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("2.9") && refused.contains("./setup"),
            "{refused}"
        );

        let ours = fake(folder.path(), IN_PROJECT, "2.15.1");
        assert_eq!(find(None, &search_path, folder.path()).unwrap(), ours);
        assert!(find(Some(&old), &search_path, folder.path()).is_err());
    }

    #[test]
    fn a_missing_server_names_the_command_that_installs_it() {
        let folder = tempfile::tempdir().unwrap();
        let error = find(None, &[], folder.path()).unwrap_err().to_string();
        assert!(error.contains("./setup"), "{error}");
        let named = folder.path().join("nowhere");
        let error = find(Some(&named), &[], folder.path())
            .unwrap_err()
            .to_string();
        assert!(error.contains("nowhere"), "{error}");
    }
}
