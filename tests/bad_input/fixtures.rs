//! What the tests damage: a configuration, a starting policy and a finished run, each made once and copied.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::OnceLock;

use super::harness::{
    Deadline, TIMEOUT, copy_files, muster, refusal, small_run, starting_from, succeed, text,
};

/// A valid configuration of one step.
pub fn config() -> String {
    small_run("bad", 1, 20) + "\n[learner.train]\nupdates_per_step = 1\n"
}

/// The valid configuration, starting from `model`.
pub fn config_with(model: &Path) -> String {
    starting_from(&config(), model)
}

/// The folder of one test.
pub struct TestDir(tempfile::TempDir);

impl TestDir {
    pub fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// A copy of the starting policy, for a test to damage.
    pub fn copy_of_the_model(&self) -> PathBuf {
        let path = self.path("model");
        copy_files(model(), &path);
        path
    }
}

/// A starting policy, made once.
pub fn model() -> &'static Path {
    static MADE: OnceLock<(TestDir, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let dir = TestDir::new();
        let (config, path) = (dir.write("config.toml", &config()), dir.path("model"));
        succeed(&mut muster(&[
            "warmup",
            text(&config),
            "--out",
            text(&path),
        ]));
        (dir, path)
    });
    path
}

/// The directory of a run that finished, made once.
pub fn finished_run() -> &'static Path {
    static MADE: OnceLock<(TestDir, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let dir = TestDir::new();
        let config = dir.write("config.toml", &config_with(model()));
        let path = dir.path("run");
        succeed(&mut muster(&[
            "local",
            text(&config),
            "--dir",
            text(&path),
            "--quiet",
        ]));
        (dir, path)
    });
    path
}

/// The sentence with which a command refuses; it prints nothing on standard output.
pub fn refused(arguments: &[&str]) -> String {
    refused_after(arguments, || true)
}

/// The sentence with which a command ends after `damage`, which is called until it returns true.
pub fn refused_after(arguments: &[&str], mut damage: impl FnMut() -> bool) -> String {
    let mut command = muster(arguments);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let deadline = Deadline::after(TIMEOUT);
    while !damage() {
        let ended = child.try_wait().unwrap();
        assert!(ended.is_none(), "{arguments:?} ended before the damage");
        deadline.pause(|| format!("{arguments:?} is not ready for the damage"));
    }
    let output = child.wait_with_output().unwrap();
    let printed = &output.stdout;
    assert!(
        printed.is_empty(),
        "{arguments:?} printed results: {printed:?}"
    );
    let sentence = refusal(&output);
    assert!(!sentence.starts_with(char::is_uppercase), "{sentence}");
    sentence
}

/// Checks that a command line is refused as wrong usage.
pub fn usage_error(arguments: &[&str]) {
    let output = muster(arguments).output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{arguments:?}");
    assert!(output.stdout.is_empty());
}
