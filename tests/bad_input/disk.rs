//! A small disk in memory, to be filled. It needs the right to mount: without it the tests that want one say so and pass.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A file system of a few bytes, gone when dropped.
pub struct SmallDisk {
    folder: tempfile::TempDir,
}

impl SmallDisk {
    /// Mounts one, where this user may.
    pub fn new(bytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(folder.path())
            .output();
        if !mounted.is_ok_and(|mounted| mounted.status.success()) {
            eprintln!("not tried: this user may not mount a small file system to fill up");
            return None;
        }
        Some(Self { folder })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    fn ballast(&self) -> PathBuf {
        self.path().join("ballast")
    }

    /// Leaves no byte free.
    pub fn fill(&self) {
        let mut file = fs::File::create(self.ballast()).unwrap();
        let mut piece = 1 << 20;
        while piece > 0 {
            if file.write_all(&vec![0u8; piece]).is_err() {
                piece /= 2;
            }
        }
    }

    /// Frees what [`SmallDisk::fill`] took.
    pub fn empty(&self) {
        fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = Command::new("umount").arg("-l").arg(self.path()).status();
        if !unmounted.is_ok_and(|status| status.success()) {
            eprintln!("{} stays mounted", self.path().display());
        }
    }
}
