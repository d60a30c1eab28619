//! A member's client of dispatch: it signs requests, checks that dispatch signed the reply, and returns the reply as a value.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use serde_bytes::ByteBuf;

use crate::bus::{BusError, SharedBus};
use crate::envelope::{EnvelopeError, Signed, Statement, open, seal};
use crate::id::{PeerId, PolicyVersion, RunId};
use crate::identity::Identity;
use crate::limits::PROTOCOL_VERSION;
use crate::message::ask::{Ask, Reply};
use crate::message::control::ControlState;
use crate::message::descriptor::Descriptor;
use crate::message::version::Announcement;
use crate::subject::Subjects;

/// How long a reply may take: dispatch makes a submission durable before it replies.
const REPLY_TIMEOUT: Duration = Duration::from_secs(5);
/// First pause after a transient failure; it doubles up to [`RETRY_MS_MAX`].
const RETRY_MS_MIN: u64 = 50;
const RETRY_MS_MAX: u64 = 2_000;

/// Why a request got no usable reply.
#[derive(Debug, thiserror::Error)]
pub enum DispatchClientError {
    #[error(transparent)]
    Bus(#[from] BusError),
    #[error("the reply of dispatch cannot be used: {0}")]
    Envelope(#[from] EnvelopeError),
    /// Another identity signed the reply.
    #[error("the reply is signed by {found}, not by the run's dispatch {expected}")]
    Impostor { found: PeerId, expected: PeerId },
    #[error("the run's descriptor is signed by {found}, these credentials trust {expected}")]
    WrongLearner { found: PeerId, expected: PeerId },
    #[error("dispatch refused: {0}")]
    Refused(String),
    #[error(
        "the run serves the protocol versions {0:?}, this build speaks {PROTOCOL_VERSION}: upgrade muster"
    )]
    UpgradeRequired(Vec<u16>),
    /// The reply does not fit the request.
    #[error("dispatch sent a reply that does not fit the request: upgrade muster")]
    Unexpected,
}

impl DispatchClientError {
    /// Whether the same request may succeed later.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Bus(error) if error.is_transient())
    }
}

struct Inner {
    bus: SharedBus,
    identity: Identity,
    run: RunId,
    subjects: Subjects,
    learner: PeerId,
    dispatch: OnceLock<PeerId>,
    sequence: AtomicU64,
}

/// One member's client. Clones are cheap and share its connection.
#[derive(Clone)]
pub struct DispatchClient {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for DispatchClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "DispatchClient({:?} in {})",
            self.inner.identity, self.inner.run
        )
    }
}

impl DispatchClient {
    /// `learner` is the root of trust in the member's credentials.
    pub fn new(bus: SharedBus, identity: Identity, run: RunId, learner: PeerId) -> Self {
        let subjects = Subjects::of(&run);
        let (dispatch, sequence) = (OnceLock::new(), AtomicU64::new(0));
        Self {
            inner: Arc::new(Inner {
                bus,
                identity,
                run,
                subjects,
                learner,
                dispatch,
                sequence,
            }),
        }
    }

    pub fn bus(&self) -> &SharedBus {
        &self.inner.bus
    }

    pub fn identity(&self) -> &Identity {
        &self.inner.identity
    }

    pub fn run(&self) -> &RunId {
        &self.inner.run
    }

    pub fn subjects(&self) -> &Subjects {
        &self.inner.subjects
    }

    /// The root of trust: signs the descriptor, versions and batches.
    pub fn learner(&self) -> PeerId {
        self.inner.learner
    }

    /// Signs a statement of this member under its next sequence number.
    ///
    /// # Errors
    /// When the statement breaks its own rules.
    pub fn sign<T: Statement>(&self, body: T) -> Result<Signed<T>, EnvelopeError> {
        let sequence = self.inner.sequence.fetch_add(1, Ordering::Relaxed) + 1;
        seal(&self.inner.identity, &self.inner.run, sequence, body)
    }

    /// Sends a request once.
    ///
    /// # Errors
    /// When no usable reply came, or dispatch refused.
    pub async fn ask(&self, ask: Ask) -> Result<Reply, DispatchClientError> {
        let subject = self.inner.subjects.ask(ask.verb(), self.inner.bus.user());
        let request = self.sign(ask)?;
        let bytes = self
            .inner
            .bus
            .request(&subject, request.bytes, REPLY_TIMEOUT)
            .await?;
        let reply = open::<Reply>(bytes, &self.inner.run)?;
        if let Some(expected) = self.inner.dispatch.get()
            && reply.author != *expected
        {
            return Err(DispatchClientError::Impostor {
                found: reply.author,
                expected: *expected,
            });
        }
        match reply.body {
            Reply::Refused { reason } => Err(DispatchClientError::Refused(reason)),
            Reply::UpgradeRequired { served } => Err(DispatchClientError::UpgradeRequired(served)),
            reply => Ok(reply),
        }
    }

    /// Repeats a request after transient failures, with growing pauses, until a reply comes.
    ///
    /// # Errors
    /// When repeating the request cannot help.
    pub async fn ask_until_answered(&self, ask: Ask) -> Result<Reply, DispatchClientError> {
        let mut pause_ms = RETRY_MS_MIN;
        loop {
            match self.ask(ask.clone()).await {
                Err(error) if error.is_transient() => {
                    tracing::debug!(%error, "request repeated");
                    tokio::time::sleep(Duration::from_millis(pause_ms)).await;
                    pause_ms = (pause_ms * 2).min(RETRY_MS_MAX);
                }
                replied => return replied,
            }
        }
    }

    /// Fetches the run's descriptor, signed by the learner that this member trusts. From then on the client accepts replies
    /// only from the dispatch that the descriptor names.
    ///
    /// # Errors
    /// When another learner signed it, or repeating the request cannot help.
    pub async fn descriptor(&self) -> Result<Signed<Descriptor>, DispatchClientError> {
        let Reply::Descriptor(bytes) = self.ask_until_answered(Ask::Descriptor).await? else {
            return Err(DispatchClientError::Unexpected);
        };
        let descriptor = open::<Descriptor>(bytes.into_vec().into(), &self.inner.run)?;
        if descriptor.author != self.inner.learner {
            let (found, expected) = (descriptor.author, self.inner.learner);
            return Err(DispatchClientError::WrongLearner { found, expected });
        }
        let dispatch = *self.inner.dispatch.get_or_init(|| descriptor.body.dispatch);
        if dispatch != descriptor.body.dispatch {
            let found = descriptor.body.dispatch;
            return Err(DispatchClientError::Impostor {
                found,
                expected: dispatch,
            });
        }
        Ok(descriptor)
    }

    /// The newest announced version, if any.
    ///
    /// # Errors
    /// When no usable reply came.
    pub async fn latest(&self) -> Result<Option<Announcement>, DispatchClientError> {
        match self.ask(Ask::Latest { version: None }).await? {
            Reply::Version(announcement) => Ok(announcement),
            _ => Err(DispatchClientError::Unexpected),
        }
    }

    /// The run's state.
    ///
    /// # Errors
    /// When no usable reply came.
    pub async fn control(&self) -> Result<ControlState, DispatchClientError> {
        match self.ask(Ask::Control).await? {
            Reply::Control(state) => Ok(state),
            _ => Err(DispatchClientError::Unexpected),
        }
    }

    /// Signed squashed deltas that start at `from` or later. Offers dispatch this member's own delta, `mine`, at the same time.
    ///
    /// # Errors
    /// When no usable reply came, or dispatch refuses this member's delta.
    pub async fn deltas(
        &self,
        from: PolicyVersion,
        mine: Option<&[u8]>,
    ) -> Result<Vec<bytes::Bytes>, DispatchClientError> {
        let mine = mine.map(|bytes| ByteBuf::from(bytes.to_vec()));
        match self.ask(Ask::Deltas { from, mine }).await? {
            Reply::Deltas(deltas) => Ok(deltas.into_iter().map(|d| d.into_vec().into()).collect()),
            _ => Err(DispatchClientError::Unexpected),
        }
    }

    /// Signed records of the peers that serve shards. Sends dispatch this member's own record, `mine`, at the same time.
    ///
    /// # Errors
    /// When no usable reply came.
    pub async fn peers(
        &self,
        mine: Option<&[u8]>,
    ) -> Result<Vec<bytes::Bytes>, DispatchClientError> {
        let mine = mine.map(|bytes| ByteBuf::from(bytes.to_vec()));
        match self.ask(Ask::Peers { mine }).await? {
            Reply::Peers(peers) => Ok(peers.into_iter().map(|p| p.into_vec().into()).collect()),
            _ => Err(DispatchClientError::Unexpected),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use tokio::time::Instant;

    use super::*;
    use crate::bus::memory::{MemoryBus, MemoryConfig};
    use crate::id::ContentHash;
    use crate::message::descriptor::Thresholds;
    use crate::message::lease::NumericClass;
    use crate::subject::Role;
    use crate::testing;

    /// A run whose dispatch gives prepared replies.
    struct Run {
        id: RunId,
        bus: MemoryBus,
        learner: Identity,
        dispatch: Identity,
    }

    impl Run {
        fn start() -> Self {
            let id: RunId = "r".parse().unwrap();
            Self {
                bus: MemoryBus::new(&id, MemoryConfig::default()),
                id,
                learner: Identity::generate(),
                dispatch: Identity::generate(),
            }
        }

        fn client(&self) -> DispatchClient {
            let bus = self.bus.connect("UW", Role::Worker);
            let learner = self.learner.peer_id();
            DispatchClient::new(bus, Identity::generate(), self.id.clone(), learner)
        }

        fn descriptor(&self, learner: &Identity, dispatch: &Identity) -> Reply {
            let body = Descriptor {
                architecture: ContentHash([0; 32]),
                tokenizer: ContentHash([0; 32]),
                chat_template: None,
                task: ContentHash([0; 32]),
                rewards: "{}".to_owned(),
                sampling: testing::sampling(),
                group_size: 4,
                async_level: 2,
                same_class: Thresholds::SAME_CLASS,
                cross_class: Thresholds::CROSS_CLASS,
                vocabulary: 16,
                classes: vec![NumericClass::F32Cpu],
                learner: learner.peer_id(),
                dispatch: dispatch.peer_id(),
                from_step: PolicyVersion(0),
                labels: BTreeMap::new(),
            };
            let signed = seal(learner, &self.id, 1, body).unwrap();
            Reply::Descriptor(ByteBuf::from(signed.bytes.to_vec()))
        }

        /// Serves every verb: request number `n` gets reply number `n`, signed by its identity. Returns the requests.
        async fn serve(
            &self,
            replies: Vec<(Identity, Reply)>,
        ) -> tokio::task::JoinHandle<Vec<Ask>> {
            let bus = self.bus.connect("UD", Role::Dispatch);
            let subjects = Subjects::of(&self.id);
            let mut requests = bus.serve(&subjects.all_asks()).await.unwrap();
            let run = self.id.clone();
            tokio::spawn(async move {
                let mut asked = Vec::new();
                for (identity, reply) in replies {
                    let request = requests.next().await.unwrap();
                    asked.push(open::<Ask>(request.payload.clone(), &run).unwrap().body);
                    let reply = seal(&identity, &run, 1, reply).unwrap();
                    request.reply(reply.bytes).await;
                }
                drop(bus);
                asked
            })
        }
    }

    fn paused() -> Reply {
        Reply::Control(ControlState {
            phase: crate::message::control::Phase::Paused,
            ..ControlState::default()
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_reply_is_returned_as_a_value_and_a_refusal_as_an_error() {
        let run = Run::start();
        let dispatch = &run.dispatch;
        let refused = Reply::Refused {
            reason: "lease 7 is over".to_owned(),
        };
        let upgrade = Reply::UpgradeRequired { served: vec![9] };
        let replies = [paused(), refused, upgrade, Reply::Finished];
        let replies = replies.map(|reply| (dispatch.clone(), reply)).to_vec();
        let served = run.serve(replies).await;
        let client = run.client();
        let state = client.control().await.unwrap();
        assert_eq!(state.phase, crate::message::control::Phase::Paused);
        let refused = client.control().await.unwrap_err();
        assert_eq!(refused.to_string(), "dispatch refused: lease 7 is over");
        let upgrade = client.control().await.unwrap_err();
        assert!(matches!(&upgrade, DispatchClientError::UpgradeRequired(served) if *served == [9]));
        // `Finished` is a reply to a request for a lease, not to this one.
        let unexpected = client.control().await.unwrap_err();
        assert!(matches!(unexpected, DispatchClientError::Unexpected));
        assert!(!unexpected.is_transient());
        assert_eq!(served.await.unwrap(), vec![Ask::Control; 4]);
    }

    #[tokio::test(start_paused = true)]
    async fn only_the_dispatch_of_the_descriptor_is_believed() {
        let run = Run::start();
        let stranger = Identity::generate();
        let honest = run.descriptor(&run.learner, &run.dispatch);
        let moved = run.descriptor(&run.learner, &stranger);
        let replies = vec![
            (run.dispatch.clone(), honest),
            (stranger.clone(), paused()),
            (run.dispatch.clone(), paused()),
            (run.dispatch.clone(), moved),
        ];
        let served = run.serve(replies).await;
        let client = run.client();
        client.descriptor().await.unwrap();
        let forged = client.control().await.unwrap_err();
        assert!(
            matches!(forged, DispatchClientError::Impostor { found, .. } if found == stranger.peer_id())
        );
        assert!(client.control().await.is_ok());
        let moved = client.descriptor().await.unwrap_err();
        assert!(matches!(moved, DispatchClientError::Impostor { .. }));
        served.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_descriptor_of_another_learner_is_refused() {
        let run = Run::start();
        let other = Identity::generate();
        let descriptor = run.descriptor(&other, &run.dispatch);
        let served = run.serve(vec![(run.dispatch.clone(), descriptor)]).await;
        let error = run.client().descriptor().await.unwrap_err();
        assert!(
            matches!(error, DispatchClientError::WrongLearner { found, expected }
                if found == other.peer_id() && expected == run.learner.peer_id())
        );
        served.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_is_repeated_until_dispatch_is_there() {
        let run = Run::start();
        let client = run.client();
        let error = client.control().await.unwrap_err();
        assert!(error.is_transient(), "{error}");
        let start = Instant::now();
        let asking = tokio::spawn(async move { client.ask_until_answered(Ask::Control).await });
        tokio::time::sleep(Duration::from_secs(60)).await;
        let served = run.serve(vec![(run.dispatch.clone(), paused())]).await;
        assert_eq!(asking.await.unwrap().unwrap(), paused());
        let latest = Duration::from_secs(60) + Duration::from_millis(RETRY_MS_MAX);
        assert!(start.elapsed() <= latest, "{:?}", start.elapsed());
        served.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_members_own_records_travel_with_its_requests() {
        let run = Run::start();
        let dispatch = &run.dispatch;
        let record = |text: &[u8]| ByteBuf::from(text.to_vec());
        let replies = vec![
            (dispatch.clone(), Reply::Peers(vec![record(b"peer")])),
            (dispatch.clone(), Reply::Deltas(vec![record(b"delta")])),
        ];
        let served = run.serve(replies).await;
        let client = run.client();
        let peers = client.peers(Some(b"mine")).await.unwrap();
        assert_eq!(peers, [bytes::Bytes::from_static(b"peer")]);
        let deltas = client.deltas(PolicyVersion(3), None).await.unwrap();
        assert_eq!(deltas, [bytes::Bytes::from_static(b"delta")]);
        let mine = Some(record(b"mine"));
        let from = PolicyVersion(3);
        let asked = [Ask::Peers { mine }, Ask::Deltas { from, mine: None }];
        assert_eq!(served.await.unwrap(), asked);
    }

    #[test]
    fn statements_of_one_client_are_numbered_from_one() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        let _guard = runtime.enter();
        let client = Run::start().client();
        let numbers = [1, 2, 3].map(|_| client.sign(Ask::Control).unwrap().sequence);
        assert_eq!(numbers, [1, 2, 3]);
    }
}
