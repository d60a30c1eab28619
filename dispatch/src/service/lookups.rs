//! Look-ups that change no ticket: versions, peers, squashed deltas, receipts. Whatever is announced can also be asked for.

use bytes::Bytes;
use serde_bytes::ByteBuf;

use muster_protocol::credentials::Member;
use muster_protocol::envelope::open;
use muster_protocol::id::{LeaseId, PeerId, PolicyVersion};
use muster_protocol::limits::{PEERS_MAX, SQUASHED_MAX};
use muster_protocol::message::ask::Reply;
use muster_protocol::message::peer::PeerRecord;
use muster_protocol::message::version::{Object, VersionRef};

use super::requests::refused;
use super::{DispatchService, KnownPeer};
use crate::overlay::partners;

impl DispatchService {
    pub(super) fn on_latest(&self, version: Option<PolicyVersion>) -> Reply {
        let wanted = |known: &VersionRef| version.is_none_or(|wanted| known.version == wanted);
        let found = self
            .announcements
            .iter()
            .rev()
            .find(|(known, _)| wanted(known));
        Reply::Version(found.map(|(_, announcement)| announcement.clone()))
    }

    pub(super) fn on_peers(&mut self, member: &Member, mine: Option<ByteBuf>) -> Reply {
        if let Some(bytes) = mine {
            let bytes = Bytes::from(bytes.into_vec());
            match open::<PeerRecord>(bytes.clone(), &self.run) {
                Ok(record)
                    if record.author == member.peer
                        && record.body.handshake == member.handshake =>
                {
                    let known = KnownPeer {
                        record: bytes,
                        seen: self.clock.now(),
                    };
                    self.peers.insert(member.peer, known);
                }
                Ok(_) => return refused("the peer record is not the asker's own"),
                Err(error) => return refused(error),
            }
        }
        let known: Vec<(&PeerId, &KnownPeer)> = self.peers.iter().collect();
        let found = known.binary_search_by_key(&&member.peer, |(peer, _)| *peer);
        // A member without a record is told of the peer that follows it, and of those that this peer knows.
        let place = found.unwrap_or_else(|next| next % known.len().max(1));
        let next = found.is_err().then_some(place);
        let others = next.into_iter().chain(partners(known.len(), place));
        let records = others.take(PEERS_MAX).filter_map(|other| known.get(other));
        let records = records.map(|(_, known)| ByteBuf::from(known.record.to_vec()));
        Reply::Peers(records.collect())
    }

    pub(super) fn on_deltas(
        &mut self,
        member: &Member,
        from: PolicyVersion,
        mine: Option<ByteBuf>,
    ) -> Reply {
        if let Some(bytes) = mine {
            if !member.role.squashes() {
                let reason = format!("the role {} describes no deltas", member.role);
                return refused(reason);
            }
            let object = match open::<Object>(bytes.into_vec().into(), &self.run) {
                Ok(object) => object,
                Err(error) => return refused(error),
            };
            let versions = self.announcements.iter().map(|(known, _)| *known);
            let versions: Vec<VersionRef> = versions.collect();
            if let Err(unwanted) = self.squashed.describe(member.peer, object, &versions) {
                return refused(unwanted);
            }
        }
        let told = self.squashed.from(from).take(SQUASHED_MAX);
        Reply::Deltas(
            told.map(|object| ByteBuf::from(object.bytes.to_vec()))
                .collect(),
        )
    }

    pub(super) fn on_receipt(&self, leases: &[LeaseId]) -> Reply {
        let known = leases
            .iter()
            .filter_map(|lease| self.receipts.entries.get(lease));
        Reply::Receipts(known.map(|bytes| ByteBuf::from(bytes.to_vec())).collect())
    }
}
