//! A member's credentials, in a file with mode 0600, and the lab's list of members.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::id::{PeerId, RunId};
use crate::identity::{Identity, MachineSeed};
use crate::subject::Role;

/// Why a file of credentials or members was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("credentials {path} cannot be read: {source}; check the path and the file's owner")]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} cannot be written: {source}; free space or check its permissions")]
    Write {
        path: PathBuf,
        source: std::io::Error,
    },
    #[error("{path} is not a {what} file: {problem}; get a new copy from the run's lab")]
    Malformed {
        path: PathBuf,
        /// The kind of file that was expected.
        what: &'static str,
        problem: String,
    },
    #[error("other users can read the credentials {path} (mode {mode:o}): run chmod 600 {path}")]
    Exposed { path: PathBuf, mode: u32 },
}

/// A member's credentials.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub run: RunId,
    pub role: Role,
    /// A name for people.
    pub name: String,
    pub seed: MachineSeed,
    /// Addresses of NATS servers.
    pub nats: Vec<String>,
    /// Signs the run's descriptor, versions and batches: the root of trust.
    pub learner: PeerId,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct CredentialsFile {
    run: RunId,
    role: Role,
    name: String,
    nats: Vec<String>,
    learner: PeerId,
    seed: String,
}

impl Credentials {
    pub fn identity(&self) -> Identity {
        Identity::from_seed(&self.seed)
    }

    /// Reads a credentials file.
    ///
    /// # Errors
    /// When the file cannot be read, is malformed, or other users can read it.
    pub fn load(path: &Path) -> Result<Self, CredentialsError> {
        refuse_exposed(path)?;
        let file: CredentialsFile = read_json(path, "credentials")?;
        let mut seed = [0u8; 32];
        hex::decode_to_slice(&file.seed, &mut seed).map_err(|_| CredentialsError::Malformed {
            path: path.to_owned(),
            what: "credentials",
            problem: "seed is not 64 hexadecimal digits".to_owned(),
        })?;
        Ok(Self {
            run: file.run,
            role: file.role,
            name: file.name,
            seed: MachineSeed::from_bytes(seed),
            nats: file.nats,
            learner: file.learner,
        })
    }

    /// Writes the file whole or not at all, readable by its owner only.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), CredentialsError> {
        let file = CredentialsFile {
            run: self.run.clone(),
            role: self.role,
            name: self.name.clone(),
            nats: self.nats.clone(),
            learner: self.learner,
            seed: hex::encode(self.seed.secret_bytes()),
        };
        write_json(path, &file, 0o600)
    }
}

/// A member as the lab knows it: the three public keys bound into one identity.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Member {
    /// A name for people.
    pub name: String,
    pub role: Role,
    /// The NATS user.
    pub user: String,
    /// The statement key.
    pub peer: PeerId,
    /// The handshake key.
    pub handshake: PeerId,
}

impl Member {
    pub fn of(name: &str, role: Role, identity: &Identity) -> Self {
        Self {
            name: name.to_owned(),
            role,
            user: identity.login_user(),
            peer: identity.peer_id(),
            handshake: identity.handshake_id(),
        }
    }
}

/// The lab's list of members.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Roster {
    /// In order of admission.
    pub members: Vec<Member>,
}

impl Roster {
    pub fn by_user(&self, user: &str) -> Option<&Member> {
        self.members.iter().find(|member| member.user == user)
    }

    pub fn by_peer(&self, peer: &PeerId) -> Option<&Member> {
        self.members.iter().find(|member| member.peer == *peer)
    }

    /// The first member with this role.
    pub fn first(&self, role: Role) -> Option<&Member> {
        self.members.iter().find(|member| member.role == role)
    }

    /// Reads the list.
    ///
    /// # Errors
    /// When it cannot be read or is malformed.
    pub fn load(path: &Path) -> Result<Self, CredentialsError> {
        read_json(path, "roster")
    }

    /// Writes the list, whole or not at all.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn save(&self, path: &Path) -> Result<(), CredentialsError> {
        write_json(path, self, 0o644)
    }
}

fn read_json<T: for<'de> Deserialize<'de>>(
    path: &Path,
    what: &'static str,
) -> Result<T, CredentialsError> {
    let text = fs::read_to_string(path).map_err(|source| CredentialsError::Read {
        path: path.to_owned(),
        source,
    })?;
    serde_json::from_str(&text).map_err(|error| CredentialsError::Malformed {
        path: path.to_owned(),
        what,
        problem: error.to_string(),
    })
}

fn write_json<T: Serialize>(path: &Path, value: &T, mode: u32) -> Result<(), CredentialsError> {
    let write = || -> std::io::Result<()> {
        let temporary = path.with_extension("tmp");
        let mut options = fs::OpenOptions::new();
        options.write(true).create(true).truncate(true);
        restrict(&mut options, mode);
        let mut file = options.open(&temporary)?;
        file.write_all(serde_json::to_string_pretty(value)?.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| CredentialsError::Write {
        path: path.to_owned(),
        source,
    })
}

#[cfg(unix)]
fn restrict(options: &mut fs::OpenOptions, mode: u32) {
    use std::os::unix::fs::OpenOptionsExt;
    options.mode(mode);
}

#[cfg(not(unix))]
fn restrict(_options: &mut fs::OpenOptions, _mode: u32) {}

#[cfg(unix)]
fn refuse_exposed(path: &Path) -> Result<(), CredentialsError> {
    use std::os::unix::fs::PermissionsExt;
    let metadata = fs::metadata(path).map_err(|source| CredentialsError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mode = metadata.permissions().mode() & 0o777;
    if mode & 0o077 != 0 {
        return Err(CredentialsError::Exposed {
            path: path.to_owned(),
            mode,
        });
    }
    Ok(())
}

#[cfg(not(unix))]
fn refuse_exposed(_path: &Path) -> Result<(), CredentialsError> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        Credentials {
            run: "r".parse().unwrap(),
            role: Role::Worker,
            name: "worker-1".to_owned(),
            seed: MachineSeed::from_bytes([5; 32]),
            nats: vec!["nats://127.0.0.1:4222".to_owned()],
            learner: PeerId([9; 32]),
        }
    }

    #[test]
    fn a_credentials_file_is_read_back_and_refused_when_other_users_can_read_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("worker.creds");
        credentials().save(&path).unwrap();
        let loaded = Credentials::load(&path).unwrap();
        assert_eq!(
            loaded.identity().peer_id(),
            credentials().identity().peer_id()
        );

        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let error = Credentials::load(&path).unwrap_err().to_string();
        assert!(error.contains("chmod 600"), "{error}");
    }

    #[test]
    fn a_mistyped_key_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("worker.creds");
        credentials().save(&path).unwrap();
        let text = fs::read_to_string(&path)
            .unwrap()
            .replace("\"role\"", "\"rolle\"");
        fs::write(&path, text).unwrap();
        assert!(
            Credentials::load(&path)
                .unwrap_err()
                .to_string()
                .contains("rolle")
        );
    }
}
