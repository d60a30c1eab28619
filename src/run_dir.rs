//! The run directory: the paths of its files, its lock, its configuration and its members' secrets.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use muster_protocol::credentials::{Credentials, Member, Roster};
use muster_protocol::id::PeerId;
use muster_protocol::identity::MachineSeed;
use muster_protocol::subject::Role;

use crate::config::RunConfig;
use crate::machine;

/// The paths of a run directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
}

/// A run directory's lock: while it is held, no other process runs the directory.
#[derive(Debug)]
pub struct RunLock {
    /// The system holds the lock as long as this file is open.
    _file: fs::File,
}

impl RunDir {
    /// The run directory at `root`.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The resolved configuration.
    pub fn config(&self) -> PathBuf {
        self.root.join("config.toml")
    }

    /// The starting policy.
    pub fn model(&self) -> PathBuf {
        self.root.join("model")
    }

    /// The lab's members.
    pub fn roster(&self) -> PathBuf {
        self.root.join("roster.json")
    }

    /// The versions that have a checkpoint, in order.
    pub fn checkpoint_versions(&self) -> Result<Vec<u64>> {
        let folder = self.root.join("checkpoints");
        let mut versions = Vec::new();
        for entry in folder
            .read_dir()
            .with_context(|| format!("{} cannot be read", folder.display()))?
        {
            let name = entry
                .with_context(|| format!("{} cannot be read", folder.display()))?
                .file_name();
            // A checkpoint that is being written has another name.
            versions.extend(name.to_str().and_then(|name| name.parse::<u64>().ok()));
        }
        versions.sort_unstable();
        Ok(versions)
    }

    /// A member's secret.
    pub fn credentials(&self, name: &str) -> PathBuf {
        self.root.join("credentials").join(format!("{name}.json"))
    }

    /// The output of a process of the run.
    pub fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    /// The NATS server's folder.
    pub fn nats(&self) -> PathBuf {
        self.root.join("nats")
    }

    /// The file that the process that runs the directory locks.
    fn lock_path(&self) -> PathBuf {
        self.root.join("local.pid")
    }

    /// Locks the directory for this process until the lock is dropped.
    ///
    /// # Errors
    /// Another process runs the directory, or the folder cannot be written.
    pub fn lock(&self) -> Result<RunLock> {
        fs::create_dir_all(&self.root).with_context(|| {
            format!(
                "{} cannot be made: check its permissions and the free space",
                self.root.display()
            )
        })?;
        let path = self.lock_path();
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        let file = options.open(&path).with_context(|| {
            format!(
                "{} cannot be written: check its permissions and the free space",
                path.display()
            )
        })?;
        let locked = machine::lock_file(&file)
            .with_context(|| format!("{} cannot be locked", path.display()))?;
        if let Err(holder) = locked {
            let holder = holder.map_or_else(String::new, |pid| format!(" {pid}"));
            bail!(
                "{dir} is being run by process{holder}: watch it with `muster status --run {dir}`, end it with `muster ctl \
                 stop --run {dir}`, or choose another --dir",
                dir = self.root.display()
            );
        }
        file.set_len(0)
            .and_then(|()| writeln!(&file, "{}", std::process::id()))
            .with_context(|| {
                format!(
                    "{} cannot be written: check its permissions and the free space",
                    path.display()
                )
            })?;
        Ok(RunLock { _file: file })
    }

    /// The process that runs the directory, if one does.
    ///
    /// # Errors
    /// The lock cannot be read.
    pub fn runner(&self) -> Result<Option<u32>> {
        let path = self.lock_path();
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => bail!("{} cannot be read: {error}", path.display()),
        };
        machine::lock_holder(&file)
            .with_context(|| format!("{} cannot be looked at", path.display()))
    }

    /// A version's checkpoint folder.
    pub fn checkpoint(&self, version: u64) -> PathBuf {
        self.root.join("checkpoints").join(version.to_string())
    }

    /// The configuration of an existing run.
    ///
    /// # Errors
    /// The directory has no configuration, or an invalid one.
    pub fn load_config(&self) -> Result<RunConfig> {
        let path = self.config();
        if !path.try_exists().unwrap_or(false) {
            bail!(
                "{} is not a run directory: it has no config.toml",
                self.root.display()
            );
        }
        Ok(RunConfig::load(&path)?)
    }

    /// Writes the resolved configuration of a new run, or checks that an existing run has the same one. Only the section `local`
    /// may differ: a run may be resumed with other numbers of workers and critics.
    ///
    /// # Errors
    /// The run has another configuration, or the folder cannot be written.
    pub fn open(&self, config: &RunConfig) -> Result<()> {
        for folder in ["", "credentials", "logs"] {
            let path = self.root.join(folder);
            fs::create_dir_all(&path).with_context(|| {
                format!(
                    "{} cannot be made: check its permissions and the free space",
                    path.display()
                )
            })?;
        }
        let path = self.config();
        if path.try_exists().unwrap_or(false) {
            let mut before = self.load_config()?;
            before.local = config.local.clone();
            if before.to_toml()? != config.to_toml()? {
                bail!(
                    "{} holds a run with another configuration: start the same one to resume it, or choose another --dir",
                    self.root.display()
                );
            }
        }
        write_whole(&path, config.to_toml()?.as_bytes())
    }

    /// Writes the roster and the members' credentials. Existing members keep their secret, new ones get one.
    ///
    /// # Errors
    /// A secret cannot be read or written.
    pub fn enrol(
        &self,
        config: &RunConfig,
        members: &[(String, Role)],
        nats: &str,
    ) -> Result<Roster> {
        let mut seeds = Vec::new();
        for (name, role) in members {
            let path = self.credentials(name);
            let seed = if path.try_exists().unwrap_or(false) {
                Credentials::load(&path)?.seed
            } else {
                MachineSeed::generate()
            };
            seeds.push((name.clone(), *role, seed));
        }
        let identity = |seed: &MachineSeed| muster_protocol::identity::Identity::from_seed(seed);
        let learner = seeds
            .iter()
            .find(|(_, role, _)| *role == Role::Trainer)
            .map(|(_, _, seed)| identity(seed).peer_id())
            .context("a run needs a trainer")?;
        let mut roster = Roster::default();
        for (name, role, seed) in seeds {
            roster
                .members
                .push(Member::of(&name, role, &identity(&seed)));
            let credentials = Credentials {
                run: config.run.name.clone(),
                role,
                name: name.clone(),
                seed,
                nats: vec![nats.to_owned()],
                learner,
            };
            credentials.save(&self.credentials(&name))?;
        }
        roster.save(&self.roster())?;
        Ok(roster)
    }

    /// The named run directory, else the only one under `runs/`.
    ///
    /// # Errors
    /// No directory is named, and `runs/` has none or several.
    pub fn named(path: Option<&Path>) -> Result<Self> {
        match path {
            Some(path) => Ok(Self::at(path)),
            None => Self::only_one(),
        }
    }

    /// The peer that signs the run's versions.
    ///
    /// # Errors
    /// The roster cannot be read, or has no trainer.
    pub fn learner(&self) -> Result<PeerId> {
        let roster = Roster::load(&self.roster())?;
        let trainer = roster.first(Role::Trainer);
        let missing = || format!("{} names no trainer", self.roster().display());
        Ok(trainer.with_context(missing)?.peer)
    }

    /// The only run under `runs/`.
    ///
    /// # Errors
    /// There is none, or more than one.
    fn only_one() -> Result<Self> {
        let entries =
            fs::read_dir("runs").context("no run was started here: name one with --run")?;
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.context("runs/ cannot be read")?.path();
            if path.join("config.toml").try_exists().unwrap_or(false) {
                found.push(path);
            }
        }
        match found.as_slice() {
            [one] => Ok(Self::at(one)),
            [] => bail!("no run was started here: name one with --run"),
            many => bail!("{} runs are under runs/: name one with --run", many.len()),
        }
    }
}

/// Writes a file whole or not at all.
///
/// # Errors
/// The file cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = path.with_extension("part");
    fs::write(&temporary, bytes)
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| {
            format!(
                "{} cannot be written: check its permissions and the free space",
                path.display()
            )
        })
}
