//! Tracing spans that carry the ids of one datum through every process of a run.
//!
//! Every process names a span's fields alike and writes an id in one form: a ticket and a version as numbers, a lease, a
//! group and a worker as the first eight hexadecimal digits ([`LeaseId::short`], [`GroupHash::short`], [`PeerId::short`]).
//! So `grep ID DIR/logs/*` finds what every process logged about one group. An event outside of these spans uses the same
//! field names: `ticket`, `lease`, `group`, `version`, `worker`.

use tracing::{Span, info_span};

use crate::id::{GroupHash, PolicyVersion};
use crate::message::lease::Lease;

/// The life of a lease in one process.
pub fn lease(lease: &Lease) -> Span {
    info_span!(
        "lease",
        ticket = lease.ticket.id.0,
        lease = lease.id.short(),
        version = lease.version.version.0,
        worker = lease.worker.short(),
    )
}

/// The life of a group, the answer to `lease`, in one process.
pub fn group(group: &GroupHash, lease: &Lease) -> Span {
    info_span!(
        "group",
        ticket = lease.ticket.id.0,
        lease = lease.id.short(),
        group = group.short(),
        version = lease.version.version.0,
        worker = lease.worker.short(),
    )
}

/// The life of a version in one process.
pub fn version(version: PolicyVersion) -> Span {
    info_span!("version", version = version.0)
}

#[cfg(test)]
mod tests {
    use crate::testing;

    #[test]
    fn an_id_in_a_span_is_the_one_that_events_write() {
        let lease = testing::lease(testing::ticket());
        assert_eq!(lease.id.short().len(), 8);
        assert!(lease.id.to_string().starts_with(&lease.id.short()));
    }
}
