//! A short run of `muster local`: started, watched, hit, finished.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use muster_protocol::record::{SelectionLine, read_all};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::processes::{Process, children_of};

/// Steps of a run.
pub const STEPS: u64 = 80;
/// B.
pub const BATCH_GROUPS: u64 = 8;
/// η.
pub const ASYNC_LEVEL: u64 = 2;
/// Steps of which one is the last before somebody is hit. Many more are left then, since a step may take 20 ms: whoever is
/// hit is still at work.
const HIT_AFTER: std::ops::Range<u64> = 3..30;
/// A step of these runs takes about as long: the moment falls anywhere in it.
const STEP_MS: u64 = 50;
/// How long anything may take on a busy machine before the run counts as stuck.
const PATIENCE: Duration = Duration::from_secs(90);
/// How often files are looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(5);

/// A trainer that takes no step for this long has no batch: its steps take a tenth of this.
const STARVED: Duration = Duration::from_secs(2);

const CONFIG: &str = r#"
[run]
name = "kills"
steps = 80
async_level = 2

[warmup]
hidden = 32
intermediate = 64
layers = 2
heads = 2
kv_heads = 1
stop_accuracy = 0.0

[sampling]
group_size = 4
tokens_max = 12
stop = ["."]

[learner]
batch_groups = 8
checkpoint_every = 20

[learner.train]
updates_per_step = 1
gradient_shards = 2

[local]
seeders = 1

[eval]
every = 1000
samples = 32

[task]
type = "running_sums"

[[reward]]
type = "numeric_match"
name = "correct"
extract = { after_last = "," }
terminator = "."
number = "whole"

# An untrained policy is never right: what its groups differ in is their length.
[[reward]]
type = "length"
name = "short"
unit = "chars"
target = 3
ramp = 12
"#;

/// Each run is seven processes, and these tests are about moments: one at a time.
pub fn one_at_a_time() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A folder with the configuration and a starting policy, made once.
fn start() -> &'static Path {
    static START: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = START.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (warmup, model) = (
            folder.path().join("warmup.toml"),
            folder.path().join("model"),
        );
        fs::write(&warmup, CONFIG).unwrap();
        let made = muster(&["warmup", text(&warmup), "--out", text(&model)])
            .output()
            .unwrap();
        assert!(
            made.status.success(),
            "{}",
            String::from_utf8_lossy(&made.stderr)
        );
        let config = format!("{CONFIG}\n[model]\npath = {:?}\n", text(&model));
        fs::write(folder.path().join("kills.toml"), config).unwrap();
        folder
    });
    folder.path()
}

fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

fn muster(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command
        .args(words)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null());
    command
}

/// A run under way.
pub struct Run {
    folder: tempfile::TempDir,
    parent: Child,
    /// When somebody is hit: after this step, and a little.
    moment: (u64, Duration),
}

impl Run {
    /// Starts a run; `name` and the seed choose the moment.
    pub fn start(name: &str) -> Self {
        let seed: u64 = std::env::var("MUSTER_KILL_SEED").map_or(1, |seed| seed.parse().unwrap());
        let drawn = muster_protocol::id::ContentHash::of(format!("{seed} {name}").as_bytes()).0;
        let step = HIT_AFTER.start + u64::from(drawn[0]) % (HIT_AFTER.end - HIT_AFTER.start);
        let after = Duration::from_millis(u64::from(drawn[1]) % STEP_MS);
        eprintln!("{name} is hit {after:?} after step {step} (MUSTER_KILL_SEED={seed})");
        let folder = tempfile::tempdir().unwrap();
        let parent = launch(folder.path());
        Self {
            folder,
            parent,
            moment: (step, after),
        }
    }

    /// The same command again.
    pub fn start_again(&mut self) {
        self.parent = launch(self.folder.path());
    }

    /// The run directory.
    pub fn dir(&self) -> PathBuf {
        self.folder.path().join("run")
    }

    /// Waits until `reached`, and fails with what everybody last said if that takes too long.
    pub fn wait_for(&mut self, what: &str, reached: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !reached(self) {
            if let Some(status) = self.parent.try_wait().unwrap() {
                panic!(
                    "waited for {what}, but the run ended with {status}: {}",
                    self.last_words()
                );
            }
            assert!(
                start.elapsed() < PATIENCE,
                "waited {PATIENCE:?} for {what}: {}",
                self.last_words()
            );
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits for the moment that the seed chose.
    pub fn wait_until_the_chosen_moment(&mut self) {
        let (step, after) = self.moment;
        self.wait_for(&format!("step {step}"), |run| run.steps_taken() >= step);
        std::thread::sleep(after);
    }

    /// Waits until workers that were stopped leave the trainer without a batch, and a seeder holds the newest version.
    pub fn wait_until_the_trainer_starves(&mut self) {
        let mut since = (Instant::now(), 0);
        let start = Instant::now();
        loop {
            let now = self.steps_taken();
            if now != since.1 {
                since = (Instant::now(), now);
            }
            let served = format!("serving version={now} ");
            if since.0.elapsed() > STARVED && self.log("seeder-1").contains(&served) {
                return;
            }
            assert!(start.elapsed() < PATIENCE, "{}", self.last_words());
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Sends the parent a signal.
    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid()), signal).unwrap();
    }

    fn pid(&self) -> i32 {
        i32::try_from(self.parent.id()).unwrap()
    }

    /// Everybody under the parent.
    pub fn children(&self) -> Vec<Process> {
        children_of(self.pid())
    }

    /// The process that plays a part now, waited for if it is being started.
    pub fn process(&mut self, name: &str) -> Process {
        let credentials = format!("/{name}.json");
        let plays = |process: &Process| match name {
            "nats-server" => process.words.iter().any(|word| word.ends_with("nats.conf")),
            _ => process
                .words
                .iter()
                .any(|word| word.ends_with(&credentials)),
        };
        self.wait_for(name, |run| run.children().iter().any(plays));
        self.children().into_iter().find(plays).unwrap()
    }

    /// Waits for the parent's end.
    pub fn wait_for_end(&mut self, limit: Duration) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.parent.try_wait().unwrap() {
                return status;
            }
            assert!(
                start.elapsed() < limit,
                "the parent has not ended after {limit:?}: {}",
                self.last_words()
            );
            std::thread::sleep(LOOK_AGAIN);
        }
    }

    /// Waits for the run's own good end.
    pub fn finish(&mut self) {
        let children = self.children();
        let status = self.wait_for_end(PATIENCE);
        assert!(
            status.success(),
            "the run ended with {status}: {}",
            self.last_words()
        );
        super::processes::wait_until_gone(&children, Duration::from_secs(1));
    }

    /// What the parent printed on stderr so far.
    pub fn stderr(&self) -> String {
        read(&self.folder.path().join("stderr"))
    }

    /// What a process has printed so far.
    pub fn log(&self, name: &str) -> String {
        read(&self.dir().join("logs").join(format!("{name}.log")))
    }

    fn last_words(&self) -> String {
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

    /// Tickets that ended without being trained, as far as selections.jsonl knows.
    pub fn tickets_freed(&self) -> u64 {
        let lines = read(&self.dir().join("selections.jsonl"));
        let freed = |line: &&str| {
            let trained = line.contains(r#""fate":"trained""#);
            line.ends_with('}') && !trained && !line.contains(r#""fate":"duplicate""#)
        };
        lines.lines().filter(freed).count() as u64
    }

    /// Tickets that ended, as far as selections.jsonl knows.
    pub fn tickets_ended(&self) -> BTreeSet<u64> {
        let path = self.dir().join("selections.jsonl");
        let lines = read_all::<SelectionLine>(&path).unwrap();
        lines.iter().map(|line| line.ticket.0).collect()
    }

    /// Tickets of which dispatch has logged `what`.
    pub fn tickets_in_log(&self, what: &str) -> BTreeSet<u64> {
        let log = self.log("dispatch");
        let ticket = |line: &str| -> Option<u64> {
            let rest = line.split(&format!(": {what} ticket=")).nth(1)?;
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
        // The parent alone: its children go with it.
        if matches!(self.parent.try_wait(), Ok(None)) {
            self.parent.kill().unwrap();
            self.parent.wait().unwrap();
        }
    }
}

fn launch(folder: &Path) -> Child {
    let stderr = fs::File::create(folder.join("stderr")).unwrap();
    let config = start().join("kills.toml");
    let dir = folder.join("run");
    let words = ["local", text(&config), "--dir", text(&dir), "--quiet"];
    muster(&words)
        .env(
            "MUSTER_LOG",
            "warn,muster=info,muster_dispatch=debug,muster_learner=debug,muster_rollout=info,muster_rewards=info",
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
