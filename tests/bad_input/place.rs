//! Folders to spoil: a configuration, a starting policy and a finished run, each made once and copied.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::command::muster;

/// How long a short run may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A configuration that is right.
pub const CONFIG: &str = r#"
[run]
name = "bad"
steps = 1
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

[learner.train]
updates_per_step = 1

[eval]
samples = 32

[task]
type = "running_sums"

[[reward]]
type = "length"
name = "short"
unit = "chars"
target = 3
ramp = 12
"#;

/// A folder of one test.
pub struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, content: &str) -> PathBuf {
        let path = self.path(name);
        fs::write(&path, content).unwrap();
        path
    }

    /// The right configuration, starting from `model`.
    pub fn config_with(&self, model: &Path) -> String {
        format!("{CONFIG}\n[model]\npath = {:?}\n", text(model))
    }

    /// A starting policy to spoil.
    pub fn copy_of_the_model(&self) -> PathBuf {
        let path = self.path("model");
        copy(model(), &path);
        path
    }
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary folders have plain names")
}

/// Copies the files of a folder.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// A file's lines.
pub fn lines(path: &Path) -> usize {
    fs::read_to_string(path).map_or(0, |text| text.lines().count())
}

/// A starting policy, made once.
pub fn model() -> &'static Path {
    static MADE: OnceLock<(Place, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let place = Place::new();
        let (config, path) = (place.write("config.toml", CONFIG), place.path("model"));
        succeed(&["warmup", text(&config), "--out", text(&path)]);
        (place, path)
    });
    path
}

/// The directory of a run that has ended well, made once.
pub fn finished_run() -> &'static Path {
    static MADE: OnceLock<(Place, PathBuf)> = OnceLock::new();
    let (_, path) = MADE.get_or_init(|| {
        let place = Place::new();
        let config = place.write("config.toml", &place.config_with(model()));
        let path = place.path("run");
        succeed(&["local", text(&config), "--dir", text(&path), "--quiet"]);
        (place, path)
    });
    path
}

fn succeed(words: &[&str]) {
    let output = muster(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?} said {said}");
}

/// A command that goes on while the test does something to it.
pub struct Background {
    child: Child,
}

impl Background {
    pub fn start(words: &[&str]) -> Self {
        let child = muster(words).stdout(Stdio::null()).spawn().unwrap();
        Self { child }
    }

    /// Waits until `reached`.
    pub fn wait_for(&mut self, what: &str, reached: impl Fn() -> bool) {
        let start = Instant::now();
        while !reached() {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none(), "ended before {what}: {ended:?}");
            assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Waits for its good end.
    pub fn finish(&mut self) {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                assert!(status.success(), "it ended with {status}");
                return;
            }
            assert!(start.elapsed() < PATIENCE, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
        }
    }
}
