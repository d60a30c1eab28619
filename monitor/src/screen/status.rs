//! The part of a run's state that its files do not tell: the phase before the first step, and the child processes.

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    Up,
    /// Failed, and waits for its restart.
    Restarting,
    /// Exited with success.
    Ended,
}

/// A child process as its parent knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Role and number: `worker-2`.
    pub name: String,
    pub state: ProcessState,
    pub restarts: u64,
}

/// The state of a run that is not in its files.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// Steps that the run will take; `None` while the number does not matter yet.
    pub steps_total: Option<u64>,
    /// The activity before the first step, in a few words; empty if there is none to report.
    pub phase: String,
    /// The parent's children.
    pub processes: Vec<Process>,
}
