//! The runs that the commands look at: one that has finished, one that goes on.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;

use serde_json::Value;

use super::harness::{Deadline, TIMEOUT, lines, muster_in, small_run, stderr, success, text};
use super::muster;

/// `muster local`, with the NATS server that `./setup` installed if it is there.
pub fn local(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = muster_in(folder, &["local"]);
    command.args(arguments);
    let server = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/nats-server");
    if server.is_file() {
        command.arg("--nats-server").arg(server);
    }
    command
}

pub fn json_lines(text: &str) -> Vec<Value> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|error| panic!("{line}: {error}")))
        .collect()
}

/// A folder with a run of four steps in `run`, made once.
pub fn finished() -> &'static Path {
    static FINISHED: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FINISHED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("small.toml"), small_run("small", 4, 2)).unwrap();
        let output = local(folder.path(), &["small.toml", "--dir", "run", "--quiet"]).output();
        let output = output.unwrap();
        assert!(
            output.status.success(),
            "the run failed (is there a NATS server? run ./setup): {}",
            stderr(&output)
        );
        folder
    });
    folder.path()
}

/// The newest checkpoint of [`finished`], pulled into `into`.
pub fn pulled(into: &Path) -> PathBuf {
    let out = into.join("pulled");
    let arguments = ["snapshot", "pull", "--run", "run", "--out", text(&out)];
    success(&muster(finished(), &arguments));
    out
}

/// A run that goes on until it is dropped.
pub struct LiveRun {
    folder: tempfile::TempDir,
    parent: Child,
}

impl LiveRun {
    pub fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = small_run("small", 100_000, 1_000);
        fs::write(folder.path().join("small.toml"), config).unwrap();
        let mut command = local(folder.path(), &["small.toml", "--dir", "run", "--quiet"]);
        let parent = command.stdout(Stdio::null()).spawn().unwrap();
        let run = Self { folder, parent };
        run.wait_for("the first step", || run.steps() > 0);
        run
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn steps(&self) -> usize {
        lines(&self.folder().join("run/metrics.jsonl"))
    }

    pub fn wait_for(&self, event: &str, has_come: impl Fn() -> bool) {
        let deadline = Deadline::after(TIMEOUT);
        while !has_come() {
            deadline
                .pause(|| format!("{event} did not come (is there a NATS server? run ./setup)"));
        }
    }
}

impl Drop for LiveRun {
    fn drop(&mut self) {
        self.parent.kill().ok();
        self.parent.wait().ok();
    }
}
