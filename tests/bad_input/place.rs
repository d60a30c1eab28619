//! Folders to spoil: a configuration, a starting policy and a finished run, each made once and copied.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::command::muster;

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

/// Runs a command that is to end well.
pub fn succeed(words: &[&str]) {
    let output = muster(words).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?} said {said}");
}
