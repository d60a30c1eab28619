//! Which worker gets which ticket, and the lease that binds them.

use muster_protocol::id::{LeaseId, PeerId, TicketId, UnixMillis};
use muster_protocol::message::ask::WaitReason;
use muster_protocol::message::control::Phase;
use muster_protocol::message::lease::{Lease, NumericClass, RolloutRange, WeightsRule};
use muster_protocol::message::version::VersionRef;
use muster_protocol::seed::{SeedBinding, lease_seed};

use super::Dispatch;
use crate::conduct::Pause;
use crate::tickets::TicketStage;
use crate::waiting::{RETRY_MS_MAX, Wait};

impl Dispatch {
    /// Leases the next ticket to a worker that holds `held`, with an unpredictable `nonce`.
    ///
    /// # Errors
    /// Why there is nothing for it now.
    pub(crate) fn lease(
        &mut self,
        worker: PeerId,
        held: VersionRef,
        class: NumericClass,
        now: UnixMillis,
        nonce: [u8; 32],
    ) -> Result<Lease, Wait> {
        let newest = self.may_lease(&worker, held, class, now)?;
        let Some(ticket) = self
            .tickets
            .next_open(held.version, newest.version)
            .cloned()
        else {
            let reason = match self.tickets.any_open() {
                true if held.version < newest.version => WaitReason::VersionTooOld,
                _ if self.tickets_wanted().is_empty() => WaitReason::Backpressure,
                _ => WaitReason::NothingOpen,
            };
            return Err(self.waiting_workers.wait(worker, reason, now));
        };
        self.waiting_workers.leave(&worker);
        let id = lease_id(&ticket.id, &nonce);
        let submission = self.conduct.lease_given(worker, id);
        let binding = SeedBinding {
            run: &self.config.run,
            epoch: self.generation,
            worker: &worker,
            version: held.version,
            submission,
        };
        let seed = lease_seed(&binding, &nonce);
        let deadline = now.plus(self.config.lease_ms);
        self.tickets.advance(
            ticket.id,
            TicketStage::Leased {
                lease: id,
                worker,
                deadline,
            },
        );
        let rollouts = RolloutRange {
            first: 0,
            count: ticket.group_size,
        };
        let (epoch, version) = (self.generation, held);
        let weights = match self.trusted.contains(&worker) {
            true => WeightsRule::InFlight,
            false => WeightsRule::Drain,
        };
        Ok(Lease {
            id,
            ticket,
            worker,
            version,
            weights,
            class,
            rollouts,
            epoch,
            submission,
            nonce,
            seed,
            deadline,
        })
    }

    fn may_lease(
        &mut self,
        worker: &PeerId,
        held: VersionRef,
        class: NumericClass,
        now: UnixMillis,
    ) -> Result<VersionRef, Wait> {
        let reason = match (self.version(), self.phase) {
            (None, _) => Some(WaitReason::Starting),
            (_, Phase::Paused) => Some(WaitReason::Paused),
            _ if !self.config.classes.contains(&class) => Some(WaitReason::NothingOpen),
            _ if !self.versions.contains(&held) => Some(WaitReason::VersionTooOld),
            _ => None,
        };
        if let Some(reason) = reason {
            return Err(self.waiting_workers.wait(*worker, reason, now));
        }
        match self.conduct.pause(worker, now) {
            None => self.version().ok_or(Wait {
                retry_ms: RETRY_MS_MAX,
                reason: WaitReason::Starting,
            }),
            Some(Pause::Busy) => {
                let reason = WaitReason::Backpressure;
                Err(self.waiting_workers.wait(*worker, reason, now))
            }
            Some(Pause::Until(until)) => Err(Wait::until(until, now, WaitReason::CoolDown)),
            Some(Pause::Quarantined) => Err(Wait {
                retry_ms: 60_000,
                reason: WaitReason::CoolDown,
            }),
        }
    }
}

fn lease_id(ticket: &TicketId, nonce: &[u8; 32]) -> LeaseId {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"muster-lease-id-v1\0");
    hasher.update(&ticket.0.to_le_bytes());
    hasher.update(nonce);
    let mut id = [0u8; 16];
    id.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    LeaseId(id)
}
