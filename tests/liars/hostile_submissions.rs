//! Messages that no honest worker sends, over a real NATS server: each is refused with one sentence, by dispatch or before
//! it is sent, and dispatch keeps running.

use std::num::NonZeroU64;
use std::time::Duration;

use bytes::Bytes;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use muster_broadcaster::follower::open_announcement;
use muster_protocol::bus::BusError;
use muster_protocol::dispatch_client::{DispatchClient, DispatchClientError};
use muster_protocol::envelope::{EnvelopeError, Invalid, Kind, Signed, Statement, open};
use muster_protocol::limits::{GROUP_BYTES_MAX, PAYLOAD_BYTES_MAX, PROTOCOL_VERSIONS};
use muster_protocol::message::ask::{Ask, Reply};
use muster_protocol::message::group::{FinishReason, Group, Rollout};
use muster_protocol::message::lease::{Lease, NumericClass};
use muster_protocol::message::version::VersionRef;
use muster_protocol::subject::Verb;

use super::plan::{BusKind, Plan, WorkerKind};
use super::start::{small, start};
use super::swarm::Running;

const ANSWER_WAIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(20);
/// A protocol version that does not exist; one byte on the wire.
const UNKNOWN_VERSION: u8 = 9;

/// A group that is signed without being checked, as other software may do.
#[derive(Serialize, Deserialize)]
struct Unchecked(Group);

impl Statement for Unchecked {
    const KIND: Kind = Kind::Group;
    const BYTES_MAX: usize = usize::MAX;

    fn validate(&self) -> Result<(), Invalid> {
        Ok(())
    }
}

/// Waits for the first version and returns the newest.
pub async fn newest(client: &DispatchClient) -> VersionRef {
    client.descriptor().await.unwrap();
    loop {
        if let Ok(Some(announcement)) = client.latest().await {
            let opened = open_announcement(client, &announcement).unwrap();
            return opened.version.body.reference();
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// Requests leases until `client` gets one.
async fn lease(client: &DispatchClient) -> Signed<Lease> {
    loop {
        let ask = Ask::Lease {
            held: newest(client).await,
            class: NumericClass::F32Cpu,
            rollouts_max: 8,
        };
        if let Ok(Reply::Leases(mut leases)) = client.ask(ask).await {
            return open(leases.remove(0).into_vec().into(), client.run()).unwrap();
        }
        tokio::time::sleep(PAUSE).await;
    }
}

/// A well-formed group for a lease, whose answers repeat one token up to the limit.
fn group(lease: &Lease, logprobs: Vec<f32>) -> Group {
    let ticket = &lease.ticket;
    let tokens = vec![2; ticket.sampling.tokens_max as usize];
    let rollout = Rollout::single_turn(
        ticket.prompt.clone(),
        tokens,
        lease.version.version,
        logprobs,
        FinishReason::Length,
    );
    Group {
        lease: lease.id,
        ticket: ticket.id,
        version: lease.version,
        class: lease.class,
        rollouts: vec![rollout; lease.rollouts.count as usize],
        commitments: Vec::new(),
    }
}

async fn submit(
    client: &DispatchClient,
    lease: &Signed<Lease>,
    group: &Bytes,
) -> Result<Reply, DispatchClientError> {
    let bytes = |bytes: &Bytes| ByteBuf::from(bytes.to_vec());
    let (lease, group) = (bytes(&lease.bytes), bytes(group));
    client.ask(Ask::Submit { lease, group }).await
}

/// Sends bytes of one's own change where submissions go.
async fn send(client: &DispatchClient, payload: Bytes) -> Result<Reply, BusError> {
    let subject = client.subjects().ask(Verb::Submit, client.bus().user());
    let answer = client.bus().request(&subject, payload, ANSWER_WAIT).await?;
    Ok(open::<Reply>(answer, client.run()).unwrap().body)
}

#[track_caller]
fn assert_sentence(text: &str, words: &str) {
    println!("refused: {text}");
    assert!(text.contains(words), "{text:?} does not say {words:?}");
    let one_line = !text.contains('\n') && !text.ends_with('.') && text.len() < 400;
    assert!(one_line, "{text:?} is not one sentence");
}

#[track_caller]
fn assert_refused(answer: Result<Reply, DispatchClientError>, words: &str) {
    match answer {
        Err(DispatchClientError::Refused(reason)) => assert_sentence(&reason, words),
        other => panic!("answered {other:?} where {words:?} was expected"),
    }
}

fn flipped(bytes: &Bytes) -> Bytes {
    let mut bytes = bytes.to_vec();
    let last = bytes.len() - 1; // the signature is at the end
    bytes[last] ^= 1;
    bytes.into()
}

fn of_another_version(bytes: &Bytes) -> Bytes {
    let mut bytes = bytes.to_vec();
    bytes[0] = UNKNOWN_VERSION; // the version is the first byte
    bytes.into()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_submissions_are_answered_with_one_sentence_and_dispatch_keeps_running() {
    let mut config = small();
    config.run.steps = NonZeroU64::MAX;
    let plan = Plan {
        bus: BusKind::Nats,
        workers: vec![WorkerKind::Honest, WorkerKind::Absent, WorkerKind::Absent],
        ..Plan::new(config, start())
    };
    let mut running = Running::start(plan).await;
    let (mallory, other) = (running.client("worker-2"), running.client("worker-3"));
    let mine = lease(&mallory).await;
    let length = mine.body.ticket.sampling.tokens_max as usize;
    let honest = group(&mine.body, vec![-1.0; length]);
    let forged = |group: Group| mallory.sign(Unchecked(group)).unwrap().bytes;

    let mut nan = vec![-1.0; length];
    nan[3] = f32::NAN;
    let nan = group(&mine.body, nan);
    let local = mallory.sign(nan.clone()).map(drop).unwrap_err();
    assert_sentence(
        &local.to_string(),
        "rollout_logprobs hold NaN at position 3",
    );
    let answer = submit(&mallory, &mine, &forged(nan)).await;
    assert_refused(answer, "rollout_logprobs hold NaN at position 3");

    let short = group(&mine.body, vec![-1.0; length - 2]);
    let answer = submit(&mallory, &mine, &forged(short)).await;
    assert_refused(
        answer,
        &format!("rollout_logprobs are {} for {length} tokens", length - 2),
    );

    let answer = submit(&mallory, &mine, &forged(large(&mine.body))).await;
    assert_refused(
        answer,
        &format!("over the limit of {GROUP_BYTES_MAX} bytes for Group"),
    );
    let too_large = send(&mallory, vec![0; PAYLOAD_BYTES_MAX + 1].into()).await;
    assert!(
        matches!(too_large, Err(BusError::TooLarge { .. })),
        "{too_large:?}"
    );
    assert_sentence(&too_large.unwrap_err().to_string(), "over the limit of");

    let signed = forged(honest.clone());
    let answer = submit(&mallory, &mine, &flipped(&signed)).await;
    assert_refused(answer, "does not verify");
    let answer = submit(&mallory, &mine, &of_another_version(&signed)).await;
    assert_refused(answer, "protocol version 9 is not served here");

    let theirs = lease(&other).await;
    let stolen = forged(group(&theirs.body, vec![-1.0; length]));
    assert_refused(
        submit(&mallory, &theirs, &stolen).await,
        "its lease belongs to",
    );

    let ask = |group: &Bytes| Ask::Submit {
        lease: ByteBuf::from(mine.bytes.to_vec()),
        group: ByteBuf::from(group.to_vec()),
    };
    let question = mallory.sign(ask(&signed)).unwrap().bytes;
    match send(&mallory, of_another_version(&question)).await.unwrap() {
        Reply::UpgradeRequired { served } => assert_eq!(served, PROTOCOL_VERSIONS),
        answer => panic!("an unknown protocol version was answered {answer:?}"),
    }
    let garbage = [&question[..1], b"garbage"].concat(); // the first byte is the protocol version
    for (payload, words) in [
        (flipped(&question), "does not verify"),
        (garbage.into(), "message cannot be decoded"),
        (Bytes::new(), "message cannot be decoded"),
        (
            other.sign(ask(&signed)).unwrap().bytes,
            "signed by another key",
        ),
    ] {
        match send(&mallory, payload).await.unwrap() {
            Reply::Refused { reason } => assert_sentence(&reason, words),
            answer => panic!("answered {answer:?} where {words:?} was expected"),
        }
    }
    let overlong = mallory.sign(Ask::Submit {
        lease: ByteBuf::new(),
        group: ByteBuf::from(noise(6 << 20)),
    });
    match overlong.map(drop) {
        Err(error @ EnvelopeError::TooLarge { .. }) => {
            assert_sentence(&error.to_string(), "send a smaller one");
        }
        other => panic!("a message over its limit was signed: {other:?}"),
    }

    // The lease is still valid, so that its group is accepted.
    let answer = submit(&mallory, &mine, &signed).await.unwrap();
    assert!(matches!(answer, Reply::Accepted { .. }), "{answer:?}");
    let steps = running.progress().await.steps;
    running
        .wait_for("three steps after the last refusal", |progress| {
            progress.steps >= steps + 3
        })
        .await;
    running.stop().await;
}

/// A group whose envelope exceeds the limit of a group but not that of a request.
fn large(lease: &Lease) -> Group {
    let count = GROUP_BYTES_MAX / 4 + 10_000;
    let bits = noise(4 * count);
    let logprobs = bits
        .chunks_exact(4)
        .map(|bits| f32::from_le_bytes([bits[0], bits[1], bits[2], bits[3]]));
    let rollout = Rollout::single_turn(
        lease.ticket.prompt.clone(),
        vec![2; 4],
        lease.version.version,
        logprobs.collect(),
        FinishReason::Length,
    );
    Group {
        rollouts: vec![rollout],
        ..group(lease, Vec::new())
    }
}

/// Random bytes, which do not compress.
fn noise(count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    rand::rngs::StdRng::seed_from_u64(5).fill(bytes.as_mut_slice());
    bytes
}
