//! Runs the shipped binary as a user does: starts commands, checks how they succeed and refuse, and polls with a bound.
#![allow(dead_code)] // each test binary uses a part of it

use std::ffi::OsStr;
use std::fs;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Time after which a run on a busy machine counts as stuck.
pub const TIMEOUT: Duration = Duration::from_secs(120);
/// Pause between two polls.
const POLL: Duration = Duration::from_millis(5);

/// `muster` with arguments, started in the repository.
pub fn muster<A: AsRef<OsStr>>(arguments: &[A]) -> Command {
    muster_in(Path::new(env!("CARGO_MANIFEST_DIR")), arguments)
}

/// `muster` with arguments, started in `folder`.
pub fn muster_in<A: AsRef<OsStr>>(folder: &Path, arguments: &[A]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_muster"));
    command
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null());
    command
}

/// Runs a command that must succeed and returns its standard output.
pub fn succeed(command: &mut Command) -> String {
    success(&command.output().unwrap())
}

/// Returns the standard output of a command that must have succeeded.
pub fn success(output: &Output) -> String {
    assert!(output.status.success(), "{}", stderr(output));
    String::from_utf8(output.stdout.clone()).unwrap()
}

/// Returns the one sentence with which a command refused, without its `muster: `. Logs may precede it; nothing follows it.
pub fn refusal(output: &Output) -> String {
    let stderr = stderr(output);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(!stderr.contains("panicked"), "{stderr}");
    let sentences: Vec<&str> = stderr
        .lines()
        .filter_map(|line| line.strip_prefix("muster: "))
        .collect();
    let [sentence] = sentences.as_slice() else {
        panic!("{} sentences in place of one: {stderr}", sentences.len());
    };
    assert!(
        stderr.trim_end().ends_with(sentence),
        "text follows the refusal: {stderr}"
    );
    assert!(!sentence.ends_with('.'), "{sentence}");
    (*sentence).to_owned()
}

/// What a command printed on standard error.
pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Bounds a loop that polls for something.
pub struct Deadline {
    started: Instant,
    limit: Duration,
}

impl Deadline {
    pub fn after(limit: Duration) -> Self {
        let started = Instant::now();
        Self { started, limit }
    }

    /// Sleeps until the next poll; panics with `missing` once the limit has passed.
    #[track_caller]
    pub fn pause(&self, missing: impl FnOnce() -> String) {
        if self.started.elapsed() >= self.limit {
            panic!("after {:?}: {}", self.limit, missing());
        }
        std::thread::sleep(POLL);
    }
}

/// A path as an argument or a TOML value.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// Number of lines of a file; 0 if it does not exist yet.
pub fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// Copies the files of a folder.
pub fn copy_files(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// The configuration of a run with a tiny model, whose steps take milliseconds. The untrained policy never answers
/// correctly; the length of its answers gives its groups a signal.
pub fn small_run(name: &str, steps: u64, checkpoint_every: u64) -> String {
    format!(
        r#"
[run]
name = "{name}"
steps = {steps}
async_level = 2
seed = 1

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
checkpoint_every = {checkpoint_every}

[eval]
every = 1000
samples = 32

[task]
type = "running_sums"

[[reward]]
type = "numeric_match"
name = "correct"
extract = {{ after_last = "," }}
terminator = "."
number = "whole"

[[reward]]
type = "length"
name = "short"
unit = "chars"
target = 3
ramp = 12
"#
    )
}

/// The configuration with a model to start from.
pub fn starting_from(config: &str, model: &Path) -> String {
    format!("{config}\n[model]\npath = {:?}\n", text(model))
}
