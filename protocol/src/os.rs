//! Direct calls to the operating system: a child that dies with its parent, and signals.

use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, waitid};
use nix::unistd::{Pid, getpid};

/// Makes the system send SIGTERM to the child of `command` when the thread that starts it ends. Keeps the terminal's Ctrl-C
/// from the child, so that the parent can stop it after the processes that use it. Only Linux can tie a child to its parent;
/// elsewhere the child survives a parent that is killed.
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
        // If the parent died before the call above, the signal would never come.
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

/// Sends a signal to a child that was not waited for yet.
pub(crate) fn signal(pid: u32, signal: Signal) -> Result<(), Errno> {
    kill(Pid::from_raw(pid.cast_signed()), signal)
}

/// Waits until the child has ended but does not reap it, so that its process id stays its own.
pub(crate) fn wait_for_end(pid: u32) -> Result<(), Errno> {
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    loop {
        match waitid(Id::Pid(Pid::from_raw(pid.cast_signed())), flags) {
            Err(Errno::EINTR) => {}
            ended => return ended.map(|_| ()),
        }
    }
}
