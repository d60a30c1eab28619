//! A short run of `muster local`: starts it, follows it, signals its processes and waits for its end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use muster_protocol::record::{SelectionLine, read_all};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::{Deadline, TIMEOUT, muster, small_run, starting_from, succeed, text};
use super::processes::{Process, children_of};

pub const STEPS: u64 = 80;
pub const BATCH_GROUPS: u64 = 8;
pub const ASYNC_LEVEL: u64 = 2;
/// Range of the step after which a process is killed. A step may take only 20 ms: with many steps left, the killed process
/// still has work.
const KILL_AFTER: std::ops::Range<u64> = 3..30;
/// A step of these runs takes about as long, so that the moment may fall anywhere within a step.
const STEP_MS: u64 = 50;
/// A trainer that takes no step for this long has no batch: a step takes a tenth of it.
const STARVED_AFTER: Duration = Duration::from_secs(2);

/// Two gradient shards, and a seeder.
const MORE: &str = "
[learner.train]
updates_per_step = 1
gradient_shards = 2

[local]
seeders = 1
";

/// Each run has seven processes and these tests depend on timing, so that only one runs at a time.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder with the configuration and a starting policy, made once.
fn shared_files() -> &'static Path {
    static FILES: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FILES.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (warmup, model) = (
            folder.path().join("warmup.toml"),
            folder.path().join("model"),
        );
        let config = small_run("kills", STEPS, 20) + MORE;
        fs::write(&warmup, &config).unwrap();
        succeed(&mut muster(&[
            "warmup",
            text(&warmup),
            "--out",
            text(&model),
        ]));
        let config = starting_from(&config, &model);
        fs::write(folder.path().join("kills.toml"), config).unwrap();
        folder
    });
    folder.path()
}

/// A run in progress.
pub struct Run {
    folder: tempfile::TempDir,
    parent: Child,
    /// The step and the time after it at which a process is killed.
    moment: (u64, Duration),
}

impl Run {
    /// Starts a run; `name` and the seed determine the moment of the kill.
    pub fn start(name: &str) -> Self {
        let seed: u64 = std::env::var("MUSTER_KILL_SEED").map_or(1, |seed| seed.parse().unwrap());
        let drawn = muster_protocol::id::ContentHash::of(format!("{seed} {name}").as_bytes()).0;
        let step = KILL_AFTER.start + u64::from(drawn[0]) % (KILL_AFTER.end - KILL_AFTER.start);
        let after = Duration::from_millis(u64::from(drawn[1]) % STEP_MS);
        eprintln!("{name} is killed {after:?} after step {step} (MUSTER_KILL_SEED={seed})");
        let folder = tempfile::tempdir().unwrap();
        let parent = launch(folder.path());
        Self {
            folder,
            parent,
            moment: (step, after),
        }
    }

    /// Runs the same command again.
    pub fn start_again(&mut self) {
        self.parent = launch(self.folder.path());
    }

    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// Waits until `has_come`; panics with the last log lines of every process if that takes too long.
    pub fn wait_for(&mut self, event: &str, has_come: impl Fn(&Self) -> bool) {
        let deadline = Deadline::after(TIMEOUT);
        while !has_come(self) {
            if let Some(status) = self.parent.try_wait().unwrap() {
                panic!(
                    "the run ended with {status} before {event}: {}",
                    self.last_lines()
                );
            }
            deadline.pause(|| format!("{event} did not come: {}", self.last_lines()));
        }
    }

    /// Waits for the moment that was drawn from the seed.
    pub fn wait_until_the_chosen_moment(&mut self) {
        let (step, after) = self.moment;
        self.wait_for(&format!("step {step}"), |run| run.steps_taken() >= step);
        std::thread::sleep(after);
    }

    /// Waits until the trainer has no batch, since the workers are stopped, and a seeder holds the newest version.
    pub fn wait_until_the_trainer_starves(&mut self) {
        let mut since = (Instant::now(), 0);
        let deadline = Deadline::after(TIMEOUT);
        loop {
            let now = self.steps_taken();
            if now != since.1 {
                since = (Instant::now(), now);
            }
            let served = format!("serving version={now} ");
            if since.0.elapsed() > STARVED_AFTER && self.log("seeder-1").contains(&served) {
                return;
            }
            deadline.pause(|| format!("the trainer still has batches: {}", self.last_lines()));
        }
    }

    /// Sends the parent a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.parent.id()).unwrap()
    }

    pub fn children(&self) -> Vec<Process> {
        children_of(self.pid())
    }

    /// The process of a role; waits for one that is being started.
    pub fn process(&mut self, name: &str) -> Process {
        let credentials = format!("/{name}.json");
        let has_role = |process: &Process| match name {
            "nats-server" => process.words.iter().any(|word| word.ends_with("nats.conf")),
            _ => process
                .words
                .iter()
                .any(|word| word.ends_with(&credentials)),
        };
        self.wait_for(name, |run| run.children().iter().any(has_role));
        self.children().into_iter().find(has_role).unwrap()
    }

    /// Waits until the parent has ended.
    pub fn wait_for_end(&mut self, limit: Duration) -> ExitStatus {
        let deadline = Deadline::after(limit);
        loop {
            if let Some(status) = self.parent.try_wait().unwrap() {
                return status;
            }
            deadline.pause(|| format!("the parent still runs: {}", self.last_lines()));
        }
    }

    /// Waits until the run has finished successfully.
    pub fn finish(&mut self) {
        let children = self.children();
        let status = self.wait_for_end(TIMEOUT);
        assert!(
            status.success(),
            "the run ended with {status}: {}",
            self.last_lines()
        );
        super::processes::wait_until_gone(&children, Duration::from_secs(1));
    }

    /// Standard error of the parent so far.
    pub fn stderr(&self) -> String {
        read(&self.folder.path().join("stderr"))
    }

    /// Log of a process so far.
    pub fn log(&self, name: &str) -> String {
        read(&self.dir().join("logs").join(format!("{name}.log")))
    }

    fn last_lines(&self) -> String {
        let mut words = format!("the parent: {}", self.stderr());
        for name in [
            "trainer",
            "dispatch",
            "worker-1",
            "worker-2",
            "critic-1",
            "seeder-1",
            "evaluator",
        ] {
            let log = self.log(name);
            let lines: Vec<&str> = log.lines().filter(|line| !line.contains("DEBUG")).collect();
            let last = lines[lines.len().saturating_sub(8)..].join("\n  ");
            words.push_str(&format!("\n{name}:\n  {last}"));
        }
        words
    }

    /// Lines of metrics.jsonl.
    pub fn steps_taken(&self) -> u64 {
        read(&self.dir().join("metrics.jsonl"))
            .matches('\n')
            .count() as u64
    }

    /// The newest version whose full state is on disk.
    pub fn newest_full_state(&self) -> u64 {
        let entries = fs::read_dir(self.dir().join("learner/states")).unwrap();
        let numbers = entries.filter_map(|entry| {
            let name = entry.ok()?.file_name().into_string().ok()?;
            name.strip_suffix(".state")?.parse().ok()
        });
        numbers.max().unwrap_or(0)
    }

    /// Number of tickets that ended without being trained, from selections.jsonl.
    pub fn tickets_freed(&self) -> u64 {
        let lines = read(&self.dir().join("selections.jsonl"));
        let freed = |line: &&str| {
            let trained = line.contains(r#""fate":"trained""#);
            line.ends_with('}') && !trained && !line.contains(r#""fate":"duplicate""#)
        };
        lines.lines().filter(freed).count() as u64
    }

    /// Tickets that ended, from selections.jsonl.
    pub fn tickets_ended(&self) -> BTreeSet<u64> {
        let path = self.dir().join("selections.jsonl");
        let lines = read_all::<SelectionLine>(&path).unwrap();
        lines.iter().map(|line| line.ticket.0).collect()
    }

    /// Tickets for which dispatch has logged `event`.
    pub fn tickets_in_log(&self, event: &str) -> BTreeSet<u64> {
        let log = self.log("dispatch");
        let ticket = |line: &str| -> Option<u64> {
            let rest = line.split(&format!(": {event} ticket=")).nth(1)?;
            rest.split(' ').next()?.parse().ok()
        };
        log.lines().filter_map(ticket).collect()
    }

    /// Every member's seed, by name.
    pub fn secrets(&self) -> BTreeMap<String, [u8; 32]> {
        let entries = fs::read_dir(self.dir().join("credentials")).unwrap();
        let secret = |path: PathBuf| {
            let credentials = muster_protocol::credentials::Credentials::load(&path).unwrap();
            (credentials.name.clone(), *credentials.seed.secret_bytes())
        };
        entries.map(|entry| secret(entry.unwrap().path())).collect()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.folder.disable_cleanup(true);
            eprintln!("the run is kept in {}", self.dir().display());
        }
        // Its children end with the parent.
        if matches!(self.parent.try_wait(), Ok(None)) {
            self.parent.kill().unwrap();
            self.parent.wait().unwrap();
        }
    }
}

fn launch(folder: &Path) -> Child {
    let stderr = fs::File::create(folder.join("stderr")).unwrap();
    let config = shared_files().join("kills.toml");
    let dir = folder.join("run");
    let words = ["local", text(&config), "--dir", text(&dir), "--quiet"];
    muster(&words)
        .env(
            "MUSTER_LOG",
            "warn,muster=info,muster::life=debug,muster_dispatch=debug,muster_learner=debug,muster_rollout=info,muster_rewards=info",
        )
        .process_group(0)
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .unwrap()
}

fn read(path: &Path) -> String {
    fs::read(path).map_or_else(
        |_| String::new(),
        |bytes| String::from_utf8_lossy(&bytes).into_owned(),
    )
}
