//! What dispatch has counted since its start. Logged once a minute and at the end.

/// Counters of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Metrics {
    /// Tickets put into their queue.
    pub(crate) tickets_issued: u64,
    /// Leases given to workers. A ticket whose lease ran out is leased again.
    pub(crate) leases_given: u64,
    /// Groups that passed admission, before they are durable. A group whose way to the queue failed is counted again.
    pub(crate) groups_admitted: u64,
    /// Groups that admission or the critics rejected, and groups whose critics did not agree.
    pub(crate) groups_rejected: u64,
    /// Groups given to critics.
    pub(crate) reviews_assigned: u64,
    /// Verdicts recorded, repeated ones included.
    pub(crate) verdicts_recorded: u64,
    /// Verdicts refused: not asked for, late, without the audit drawn, or not fitting their group.
    pub(crate) verdicts_refused: u64,
    /// Groups in the ready queue, from where the trainer takes them.
    pub(crate) groups_ready: u64,
    /// Faults of workers and critics decided by this process.
    pub(crate) faults: u64,
}
