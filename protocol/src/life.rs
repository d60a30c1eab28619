//! The log target under which all processes tell the life of each group and version.
//!
//! ```ignore
//! debug!(target: life::TARGET, ticket = %lease.ticket.id, lease = %lease.id, worker = %worker.short(), "leased");
//! ```
//!
//! Each stage is one line at `debug`, with those of the fields `ticket`, `lease`, `group` (its short hash), `worker` and
//! `version` that are known. Logs that go to a file hold these lines by default, so that `grep -h 'ticket=41 ' DIR/logs/* | sort`
//! prints one group's life in order.

/// The target of such lines.
pub const TARGET: &str = "muster::life";
