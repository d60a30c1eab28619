//! Requests, replies and news.

use std::time::Duration;

use bytes::Bytes;
use muster_protocol::bus::{BusError, Requests};
use muster_protocol::limits::CARRIER_BYTES_MAX;
use muster_protocol::subject::{Log, Subject, Verb};
use tokio::time::{Instant, timeout};

use crate::harness::{AT_ONCE, Harness, TestMember, bytes, subjects};

const PATIENCE: Duration = Duration::from_secs(10);

/// Replies to every request with its sender and the number of requests so far.
fn answer_all(mut requests: Requests, name: &'static str) {
    tokio::spawn(async move {
        let mut answered = 0;
        while let Some(request) = requests.next().await {
            answered += 1;
            let answer = format!("{name} {} {answered}", request.user());
            request.reply(bytes(answer)).await;
        }
    });
}

pub async fn a_request_is_answered_by_its_server(harness: &impl Harness) {
    let (dispatch, _) = harness.lab().await;
    let mut requests = dispatch.serve(&subjects().asks(Verb::Lease)).await.unwrap();
    let worker = harness.connect(TestMember::Worker).await;
    let ask = subjects().ask(Verb::Lease, worker.user());
    assert_eq!(worker.user(), TestMember::Worker.user());
    let server = tokio::spawn(async move {
        let request = requests.next().await.unwrap();
        assert_eq!(
            (request.user(), &request.payload),
            (&*TestMember::Worker.user(), &bytes("please"))
        );
        request.reply(bytes("granted")).await;
    });
    let answer = worker
        .request(&ask, bytes("please"), PATIENCE)
        .await
        .unwrap();
    assert_eq!(answer, bytes("granted"));
    server.await.unwrap();
}

pub async fn a_request_goes_to_one_of_its_servers(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let pattern = subjects().asks(Verb::Latest);
    answer_all(dispatch.serve(&pattern).await.unwrap(), "first");
    answer_all(trainer.serve(&pattern).await.unwrap(), "second");
    let worker = harness.connect(TestMember::Worker).await;
    let ask = subjects().ask(Verb::Latest, worker.user());
    let mut highest = [0u32; 2];
    for _ in 0..60 {
        let answer = worker.request(&ask, Bytes::new(), PATIENCE).await.unwrap();
        let answer = String::from_utf8(answer.to_vec()).unwrap();
        let count = answer.rsplit(' ').next().unwrap().parse().unwrap();
        highest[usize::from(answer.starts_with("second"))] = count;
    }
    assert_eq!(highest[0] + highest[1], 60, "a request was delivered twice");
    assert!(highest.iter().all(|count| *count > 5), "{highest:?}");
}

pub async fn a_request_without_a_server_fails_at_once(harness: &impl Harness) {
    let worker = harness.connect(TestMember::Worker).await;
    let ask = subjects().ask(Verb::Lease, worker.user());
    let start = Instant::now();
    let asked = worker.request(&ask, Bytes::new(), PATIENCE).await;
    assert_eq!(
        asked,
        Err(BusError::NoResponders {
            subject: ask.to_string()
        })
    );
    assert!(start.elapsed() < AT_ONCE);
}

pub async fn a_request_without_a_reply_times_out(harness: &impl Harness) {
    let (dispatch, _) = harness.lab().await;
    let requests = dispatch.serve(&subjects().asks(Verb::Lease)).await.unwrap();
    let worker = harness.connect(TestMember::Worker).await;
    let ask = subjects().ask(Verb::Lease, worker.user());
    let start = Instant::now();
    let asked = worker
        .request(&ask, Bytes::new(), Duration::from_millis(300))
        .await;
    let Err(BusError::Timeout { waited_ms, .. }) = asked else {
        panic!("{asked:?}")
    };
    assert!(waited_ms >= 299 && start.elapsed() < AT_ONCE, "{waited_ms}");
    drop(requests);
}

pub async fn a_large_reply_arrives_whole(harness: &impl Harness) {
    let (dispatch, _) = harness.lab().await;
    let mut requests = dispatch
        .serve(&subjects().asks(Verb::Critique))
        .await
        .unwrap();
    let critic = harness.connect(TestMember::Critic).await;
    let ask = subjects().ask(Verb::Critique, critic.user());
    let large = Bytes::from(vec![7; CARRIER_BYTES_MAX]);
    tokio::spawn(async move {
        let request = requests.next().await.unwrap();
        let payload = request.payload.clone();
        request.reply(payload).await;
    });
    assert_eq!(
        critic.request(&ask, large.clone(), PATIENCE).await.unwrap(),
        large
    );
}

pub async fn news_reaches_every_subscriber(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let worker = harness.connect(TestMember::Worker).await;
    let critic = harness.connect(TestMember::Critic).await;
    let version_news = subjects().news(Log::Versions);
    let all_news = Subject::from(version_news.as_str().replace("versions", "*"));
    let mut heard = [
        worker.subscribe(&version_news).await.unwrap(),
        critic.subscribe(&all_news).await.unwrap(),
        dispatch.subscribe(&version_news).await.unwrap(),
    ];
    let mut note = worker
        .subscribe(&subjects().note(worker.user()))
        .await
        .unwrap();
    for number in 0..20 {
        trainer.publish(&version_news, bytes(number)).await.unwrap();
    }
    for subscription in &mut heard {
        for number in 0..20 {
            let news = timeout(PATIENCE, subscription.next())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(
                (news.subject, news.payload),
                (version_news.clone(), bytes(number))
            );
        }
    }
    dispatch
        .publish(&subjects().note(worker.user()), bytes("receipt"))
        .await
        .unwrap();
    assert_eq!(
        timeout(PATIENCE, note.next())
            .await
            .unwrap()
            .unwrap()
            .payload,
        bytes("receipt")
    );
    dispatch
        .publish(&subjects().news(Log::Control), bytes("pause"))
        .await
        .unwrap();
    assert_eq!(
        timeout(PATIENCE, heard[1].next())
            .await
            .unwrap()
            .unwrap()
            .payload,
        bytes("pause")
    );
}

pub async fn calls_on_a_closed_connection_fail_and_its_readers_end(harness: &impl Harness) {
    let (dispatch, _) = harness.lab().await;
    let mut requests = dispatch.serve(&subjects().asks(Verb::Lease)).await.unwrap();
    let mut news = dispatch
        .subscribe(&subjects().news(Log::Versions))
        .await
        .unwrap();
    dispatch.close().await;
    assert!(timeout(AT_ONCE, requests.next()).await.unwrap().is_none());
    assert!(timeout(AT_ONCE, news.next()).await.unwrap().is_none());
    let published = dispatch
        .publish(&subjects().news(Log::Versions), Bytes::new())
        .await;
    assert!(
        matches!(published, Err(BusError::Closed(_))),
        "{published:?}"
    );
    let worker = harness.connect(TestMember::Worker).await;
    let ask = subjects().ask(Verb::Lease, worker.user());
    let asked = worker.request(&ask, Bytes::new(), PATIENCE).await;
    assert!(
        matches!(asked, Err(BusError::NoResponders { .. })),
        "{asked:?}"
    );
}
