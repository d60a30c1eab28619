//! What is asked of the operating system directly: a child that dies with its parent, and signals.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getpid};

/// Makes the child of `command` receive SIGTERM when the thread that starts it ends, and keeps the terminal's Ctrl-C from
/// it, so that it is stopped after those who use it. Only Linux can tie a child to its parent; elsewhere a parent that is
/// killed leaves it behind.
pub(crate) fn tie_to_parent(command: &mut Command) {
    command.process_group(0);
    #[cfg(target_os = "linux")]
    die_with_parent(command, getpid());
}

#[cfg(target_os = "linux")]
#[allow(unsafe_code)]
fn die_with_parent(command: &mut Command, parent: Pid) {
    let tie = move || {
        nix::sys::prctl::set_pdeathsig(Signal::SIGTERM)?;
        // The parent may have died before the call above: then nobody would ever send the signal.
        if nix::unistd::getppid() != parent {
            return Err(Errno::ECHILD.into());
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe calls are allowed. `tie` makes two system calls, prctl and
    // getppid, and allocates nothing: an `io::Error` made from an errno holds the number alone.
    unsafe {
        command.pre_exec(tie);
    }
}

/// Sends a signal to a child that has not been waited for yet.
pub(crate) fn signal(pid: u32, signal: Signal) -> Result<(), Errno> {
    kill(Pid::from_raw(pid.cast_signed()), signal)
}

/// Returns when the child has ended, and leaves it to be waited for, so that its number cannot be another process's yet.
pub(crate) fn wait_for_end(pid: u32) -> Result<(), Errno> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    loop {
        match waitid(Id::Pid(Pid::from_raw(pid.cast_signed())), flags) {
            Err(Errno::EINTR) => {}
            ended => return ended.map(|_| ()),
        }
    }
}
