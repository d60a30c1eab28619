//! Refusals: permissions that a volunteer does not have, and messages over a bound.

use std::time::Duration;

use bytes::Bytes;
use muster_protocol::bus::BusError;
use muster_protocol::limits::{MANIFEST_BYTES_MAX, PAYLOAD_BYTES_MAX, STATEMENT_BYTES_MAX};
use muster_protocol::subject::{Log, Queue, Subject, Verb};
use tokio::time::{Instant, timeout};

use crate::harness::{AT_ONCE, Harness, NatsHarness, TestMember, bytes, subjects};

const PATIENCE: Duration = Duration::from_secs(10);

fn is_denied<T>(result: &Result<T, BusError>) -> bool {
    matches!(result, Err(BusError::Denied { .. }))
}

fn expect_denied(error: BusError) {
    assert!(matches!(error, BusError::Denied { .. }), "{error:?}");
}

pub async fn a_volunteer_cannot_touch_queues_and_logs(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    dispatch
        .enqueue(Queue::Ready, "a", bytes("a"))
        .await
        .unwrap();
    trainer
        .append(Log::Versions, "v", None, bytes("v"))
        .await
        .unwrap();
    for member in [TestMember::Worker, TestMember::Critic] {
        let volunteer = harness.connect(member).await;
        let start = Instant::now();
        assert!(is_denied(
            &volunteer.enqueue(Queue::Ready, "b", bytes("b")).await
        ));
        assert!(is_denied(
            &volunteer.append(Log::Versions, "w", None, bytes("w")).await
        ));
        assert!(is_denied(&volunteer.take(Queue::Ready, 1, PATIENCE).await));
        assert!(is_denied(&volunteer.reclaim(Queue::Ready).await));
        assert!(is_denied(&volunteer.queue_state(Queue::Ready).await));
        assert!(is_denied(&volunteer.read(Log::Versions, 0, 1).await));
        assert!(is_denied(&volunteer.last(Log::Versions).await));
        assert!(is_denied(&volunteer.create_streams().await));
        assert!(
            start.elapsed() < 4 * AT_ONCE,
            "refusals came late: {:?}",
            start.elapsed()
        );
    }
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap().messages,
        1
    );
    assert_eq!(
        dispatch
            .last(Log::Versions)
            .await
            .unwrap()
            .unwrap()
            .sequence,
        1
    );
}

pub async fn a_volunteer_sends_requests_only_in_its_own_name(harness: &impl Harness) {
    let (dispatch, _) = harness.lab().await;
    let mut requests = dispatch.serve(&subjects().asks(Verb::Lease)).await.unwrap();
    let worker = harness.connect(TestMember::Worker).await;
    let others = subjects().ask(Verb::Lease, &TestMember::OtherWorker.user());
    let start = Instant::now();
    let asked = worker.request(&others, bytes("x"), PATIENCE).await;
    assert_eq!(
        asked,
        Err(BusError::Denied {
            subject: others.to_string()
        })
    );
    // A worker may not send a critic's requests either.
    let critique = subjects().ask(Verb::Critique, worker.user());
    assert!(is_denied(
        &worker.request(&critique, bytes("x"), PATIENCE).await
    ));
    assert!(start.elapsed() < AT_ONCE);
    assert!(
        timeout(Duration::from_millis(300), requests.next())
            .await
            .is_err()
    );
}

pub async fn a_volunteer_cannot_listen_to_others(harness: &impl Harness) {
    let worker = harness.connect(TestMember::Worker).await;
    let other = TestMember::OtherWorker.user();
    let patterns = [
        ">".to_owned(),
        "muster.>".to_owned(),
        "muster.*.news.>".to_owned(),
        subjects().asks(Verb::Submit).to_string(),
        subjects().note(&other).to_string(),
        subjects().note("*").to_string(),
        subjects().queue(Queue::Ready).to_string(),
        format!("_INBOX.{other}.>"),
        "_INBOX.>".to_owned(),
        "_INBOX.*.*".to_owned(),
        format!("_SYNC.{}", worker.user()),
        "$JS.>".to_owned(),
        "$SYS.>".to_owned(),
    ];
    for pattern in patterns {
        let pattern = Subject::from(pattern);
        // The server refuses asynchronously: a late refusal ends the subscription that the call has returned.
        if let Ok(mut subscription) = worker.subscribe(&pattern).await.map_err(expect_denied) {
            let ended = timeout(PATIENCE, subscription.next()).await;
            assert_eq!(ended, Ok(None), "{pattern}");
        }
        if let Ok(mut requests) = worker.serve(&pattern).await.map_err(expect_denied) {
            let ended = timeout(PATIENCE, requests.next()).await;
            assert!(matches!(ended, Ok(None)), "{pattern}");
        }
    }
}

pub async fn a_volunteer_cannot_spread_news(harness: &impl Harness) {
    let worker = harness.connect(TestMember::Worker).await;
    let other = harness.connect(TestMember::OtherWorker).await;
    let subject = subjects().news(Log::Versions);
    let mut news = other.subscribe(&subject).await.unwrap();
    let first = worker.publish(&subject, bytes("lies")).await;
    // The server refuses asynchronously: at the latest the second call fails.
    let second = worker.publish(&subject, bytes("lies")).await;
    assert!(is_denied(&second), "{first:?} {second:?}");
    assert!(
        timeout(Duration::from_millis(300), news.next())
            .await
            .is_err()
    );
}

pub async fn a_reply_goes_only_to_the_senders_own_inbox(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let mut requests = dispatch.serve(&subjects().asks(Verb::Lease)).await.unwrap();
    let mut overheard = trainer
        .subscribe(&subjects().asks(Verb::Submit))
        .await
        .unwrap();
    let worker = TestMember::Worker.user();
    let ask = subjects().ask(Verb::Lease, &worker);
    let others = [
        subjects().ask(Verb::Submit, &TestMember::OtherWorker.user()),
        subjects().queue(Queue::Ready),
        subjects().news(Log::Versions),
        Subject::from(format!("_INBOX.{}.x", TestMember::OtherWorker.user())),
        Subject::from(format!("_INBOX.{worker}x.y")),
    ];
    for reply in others {
        harness
            .publish_with_reply(TestMember::Worker, &ask, reply, bytes("forged"))
            .await;
    }
    let own = Subject::from(format!("_INBOX.{worker}.x"));
    harness
        .publish_with_reply(TestMember::Worker, &ask, own, bytes("honest"))
        .await;
    let request = timeout(PATIENCE, requests.next()).await.unwrap().unwrap();
    assert_eq!(request.payload, bytes("honest"));
    request.reply(bytes("answer")).await;
    assert!(
        timeout(Duration::from_millis(300), overheard.next())
            .await
            .is_err()
    );
    assert!(
        timeout(Duration::from_millis(300), requests.next())
            .await
            .is_err()
    );
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap().messages,
        0
    );
}

pub async fn a_message_that_is_too_large_is_refused_before_it_is_sent(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let over = |limit: usize| Bytes::from(vec![0; limit + 1]);
    let news = subjects().news(Log::Versions);
    let results = [
        dispatch.publish(&news, over(PAYLOAD_BYTES_MAX)).await,
        dispatch
            .request(&news, over(PAYLOAD_BYTES_MAX), PATIENCE)
            .await
            .map(|_| ()),
        dispatch
            .enqueue(Queue::Tickets, "t", over(STATEMENT_BYTES_MAX))
            .await
            .map(|_| ()),
        trainer
            .append(Log::Batches, "b", None, over(MANIFEST_BYTES_MAX))
            .await
            .map(|_| ()),
    ];
    for result in results {
        assert!(
            matches!(result, Err(BusError::TooLarge { .. })),
            "{result:?}"
        );
    }
    // The connection survives, and a message of exactly the bound is stored.
    let largest = Bytes::from(vec![0; MANIFEST_BYTES_MAX]);
    trainer
        .append(Log::Batches, "b", None, largest.clone())
        .await
        .unwrap();
    assert_eq!(
        dispatch.last(Log::Batches).await.unwrap().unwrap().payload,
        largest
    );
    let ticket = Bytes::from(vec![0; STATEMENT_BYTES_MAX]);
    dispatch.enqueue(Queue::Tickets, "t", ticket).await.unwrap();
}

pub async fn a_key_that_a_header_cannot_carry_is_refused(harness: &impl Harness) {
    let (dispatch, _) = harness.lab().await;
    for key in ["", "a b", "a\r\nNats-Rollup: all", "ü", &"k".repeat(257)] {
        let enqueued = dispatch.enqueue(Queue::Ready, key, bytes("x")).await;
        assert!(matches!(enqueued, Err(BusError::Server(_))), "{enqueued:?}");
        assert!(
            dispatch
                .append(Log::Fates, key, None, bytes("x"))
                .await
                .is_err()
        );
    }
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap().messages,
        0
    );
}

/// Refusals that only a real server has.
mod of_the_server {
    use muster_protocol::bus::nats::{NatsBus, NatsConfig};
    use muster_protocol::identity::Identity;

    use super::*;
    use crate::harness::run;

    async fn refusal(config: NatsConfig) -> String {
        let start = Instant::now();
        let error = NatsBus::connect(config).await.unwrap_err();
        assert!(
            start.elapsed() < Duration::from_secs(5),
            "{:?}",
            start.elapsed()
        );
        assert!(matches!(error, BusError::Closed(_)), "{error:?}");
        error.to_string()
    }

    #[tokio::test]
    async fn refused_credentials_are_named_with_the_way_out() {
        let harness = NatsHarness::open().await;
        let stranger = Identity::generate();
        let sentence = refusal(harness.bus_config(&stranger)).await;
        assert!(sentence.contains(&stranger.login_user()), "{sentence}");
        assert!(
            sentence.contains(harness.url()) && sentence.contains("ask the run's lab"),
            "{sentence}"
        );
    }

    #[tokio::test]
    async fn an_address_that_answers_nothing_is_named_with_the_way_out() {
        let seed = Identity::generate().login_seed().unwrap();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let silent = format!("nats://me:secret@{}", listener.local_addr().unwrap());
        for url in [
            "nats://127.0.0.1:1",
            "nats://no-such-host.invalid:4222",
            &silent,
        ] {
            let sentence = refusal(NatsConfig::new(url, &run(), &seed, "test")).await;
            assert!(
                sentence.contains("no NATS server answers at nats://"),
                "{sentence}"
            );
            assert!(
                sentence.contains("start it") && !sentence.contains("secret"),
                "{sentence}"
            );
        }
        let sentence = refusal(NatsConfig::new("nats://:::", &run(), &seed, "test")).await;
        assert!(sentence.contains("nats://host:4222"), "{sentence}");
        let sentence = refusal(NatsConfig::new(
            "nats://127.0.0.1:1",
            &run(),
            "SUNKEY",
            "test",
        ))
        .await;
        assert!(sentence.contains("credentials"), "{sentence}");
    }
}
