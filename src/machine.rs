//! The operating system's services for commands: free disk space, file locks, signals, child processes.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;

/// Bytes that an ordinary user may still write on the disk of `path`.
pub(crate) fn disk_free(path: &Path) -> io::Result<u64> {
    let disk = statvfs(path)?;
    // The fields' types differ between systems.
    #[allow(clippy::unnecessary_cast)]
    Ok((disk.blocks_available() as u64).saturating_mul(disk.fragment_size() as u64))
}

/// Takes a file's lock for as long as this process has the file open, or returns the id of the process that holds it. The system
/// releases the lock when the process ends, even by a kill.
pub(crate) fn lock_file(file: &File) -> io::Result<Result<(), Option<u32>>> {
    match fcntl(file, FcntlArg::F_SETLK(&whole_file())) {
        Ok(_) => Ok(Ok(())),
        Err(Errno::EACCES | Errno::EAGAIN) => Ok(Err(lock_holder(file)?)),
        Err(error) => Err(error.into()),
    }
}

/// The other process that holds a file's lock, if there is one.
pub(crate) fn lock_holder(file: &File) -> io::Result<Option<u32>> {
    let mut lock = whole_file();
    fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
    let is_held = lock.l_type != libc::F_UNLCK as libc::c_short;
    Ok(u32::try_from(lock.l_pid).ok().filter(|_| is_held))
}

/// A write lock on the whole file.
fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Sends SIGINT to a process, like Ctrl-C.
pub(crate) fn interrupt(pid: u32) -> io::Result<()> {
    Ok(kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT)?)
}

/// The children of a process with their command lines.
pub(crate) fn children_of(pid: u32) -> Vec<(u32, Vec<String>)> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let mut children = Vec::new();
    // Each thread has its own list of children; the list of a thread that has just ended is missing.
    for thread in threads.filter_map(Result::ok) {
        let list = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in list.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let line = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            let words = line
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty());
            let words = words.map(|word| String::from_utf8_lossy(word).into_owned());
            children.push((child, words.collect()));
        }
    }
    children.sort_unstable();
    children
}

/// Muster's folder, whose `.venv` may hold a NATS server: the working directory, or else the folder above this program.
pub fn project() -> PathBuf {
    let has_server = |folder: &Path| folder.join(".venv/bin/nats-server").is_file();
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    let above = program
        .ancestors()
        .skip(1)
        .find(|folder| has_server(folder));
    match above {
        Some(folder) if !has_server(&here) => folder.to_owned(),
        _ => here,
    }
}
