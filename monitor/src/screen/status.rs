//! The part of a run's state that its files do not tell: the phase before the first step, and the child processes.

/// Whether a child process is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProcessState {
    /// Started, or not needed to be seen yet.
    Up,
    /// Ended by itself, to be started again.
    Restarting,
    /// Ended as it should.
    Ended,
}

/// A child process as its parent knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    /// Role and number: `rollout-2`.
    pub name: String,
    /// Whether it is there.
    pub state: ProcessState,
    /// How often it was started again.
    pub restarts: u64,
}

/// What the files do not tell.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Status {
    /// Steps that the run will take; `None` while the number does not matter yet.
    pub steps_total: Option<u64>,
    /// What goes on before the first step, in a few words; empty when nothing needs to be said.
    pub phase: String,
    /// The parent's children; empty for a process without any.
    pub processes: Vec<Process>,
}
