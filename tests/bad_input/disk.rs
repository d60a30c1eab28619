//! A small file system in memory that a test can fill. Without the permission to mount one, the test runs itself again as
//! root of a user namespace.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A mounted tmpfs of a few bytes; dropping it unmounts it.
pub struct SmallDisk {
    folder: tempfile::TempDir,
}

/// Set inside the user namespace, where a failing mount fails the test.
const IN_NAMESPACE: &str = "MUSTER_TEST_IN_NAMESPACE";

/// Runs the body of the test `name` on a disk of `bytes`.
pub fn on_small_disk(name: &str, bytes: usize, body: impl FnOnce(&SmallDisk)) {
    if let Some(disk) = SmallDisk::mounted(bytes) {
        return body(&disk);
    }
    assert!(
        std::env::var_os(IN_NAMESPACE).is_none(),
        "a file system cannot be mounted, not even in a user namespace: run the tests as root"
    );
    let status = Command::new("unshare")
        .args(["--user", "--map-root-user", "--mount"])
        .arg(std::env::current_exe().unwrap())
        .args([name, "--exact", "--nocapture"])
        .env(IN_NAMESPACE, "1")
        .status()
        .expect("unshare (util-linux) is needed to mount a small disk without being root");
    assert!(status.success(), "{name} failed in a user namespace");
}

impl SmallDisk {
    /// Mounts a file system; `None` if this user may not.
    fn mounted(bytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={bytes}");
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "tmpfs"])
            .arg(folder.path())
            .output()
            .expect("mount (util-linux) is needed to fill up a small disk");
        mounted.status.success().then_some(Self { folder })
    }

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
