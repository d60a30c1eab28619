//! The run directory: where each file lies, and how the members' secrets and the configuration get there.

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
    /// Open as long as the lock is held.
    _file: fs::File,
}

impl RunDir {
    /// The run directory at `root`.
    pub fn at(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// Its path.
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

    /// What a process of the run printed.
    pub fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(format!("{name}.log"))
    }

    /// The NATS server's folder.
    pub fn nats(&self) -> PathBuf {
        self.root.join("nats")
    }

    /// The file whose lock belongs to whoever runs the directory.
    fn lock_path(&self) -> PathBuf {
        self.root.join("local.pid")
    }

    /// Makes the directory this process's own until the lock is dropped.
    ///
    /// # Errors
    /// When another process runs it, or the folder cannot be written.
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
    /// When the lock cannot be looked at.
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

    /// The configuration of a run that exists.
    ///
    /// # Errors
    /// When there is none, or it cannot be used.
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

    /// Writes the resolved configuration of a new run, or checks that a run that exists has the same. What may differ is
    /// who takes part on this machine: a run may be resumed with other numbers of workers and critics.
    ///
    /// # Errors
    /// When the run has another configuration, or the folder cannot be written.
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

    /// The members of the run, each with its own secret: those that exist keep theirs, new ones get one.
    ///
    /// # Errors
    /// When a secret cannot be read or written.
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

    /// The run directory that was named, else the only one under `runs/`.
    ///
    /// # Errors
    /// When none was named and there is not just one.
    pub fn named(path: Option<&Path>) -> Result<Self> {
        match path {
            Some(path) => Ok(Self::at(path)),
            None => Self::only_one(),
        }
    }

    /// Who signs the run's versions.
    ///
    /// # Errors
    /// When the roster cannot be read, or has no trainer.
    pub fn learner(&self) -> Result<PeerId> {
        let roster = Roster::load(&self.roster())?;
        let trainer = roster.first(Role::Trainer);
        let missing = || format!("{} names no trainer", self.roster().display());
        Ok(trainer.with_context(missing)?.peer)
    }

    /// The only run under `runs/`.
    ///
    /// # Errors
    /// When there is none, or more than one to choose from.
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
/// When it cannot be written.
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
