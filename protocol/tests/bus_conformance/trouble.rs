//! Behaviour in an outage: the server is killed and restarted on the same store (NATS), or every member is cut off (memory).

use std::time::Duration;

use bytes::Bytes;
use muster_protocol::bus::{BusError, Enqueued, SharedBus};
use muster_protocol::subject::{Log, Queue, Verb};
use tokio::time::{sleep, timeout};

use crate::harness::{ACK_WAIT, Harness, TestMember, bytes, subjects};

const PATIENCE: Duration = Duration::from_secs(20);

/// Repeats a write until it is confirmed, as every writer does.
async fn enqueue_until_confirmed(bus: &SharedBus, key: &str, payload: Bytes) -> Enqueued {
    loop {
        match bus.enqueue(Queue::Ready, key, payload.clone()).await {
            Ok(enqueued) => return enqueued,
            Err(error) => assert!(error.is_transient(), "{error:?}"),
        }
    }
}

/// The same for a log behind its fence.
async fn append_until_confirmed(bus: &SharedBus, number: u64) -> Enqueued {
    loop {
        let key = format!("b{number}");
        match bus
            .append(Log::Batches, &key, Some(number - 1), bytes(number))
            .await
        {
            Ok(appended) => return appended,
            Err(error) => assert!(error.is_transient(), "{error:?}"),
        }
    }
}

pub async fn an_outage_loses_nothing_that_was_acknowledged(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    for number in 1..=10u64 {
        enqueue_until_confirmed(&dispatch, &format!("k{number}"), bytes(number)).await;
        trainer
            .append(
                Log::Batches,
                &format!("b{number}"),
                Some(number - 1),
                bytes(number),
            )
            .await
            .unwrap();
    }
    let held = trainer.take(Queue::Ready, 3, PATIENCE).await.unwrap();
    held[0].ack().await.unwrap();
    // Writes continue during the outage.
    let writer = tokio::spawn({
        let dispatch = dispatch.clone();
        async move {
            for number in 11..=30u64 {
                enqueue_until_confirmed(&dispatch, &format!("k{number}"), bytes(number)).await;
            }
        }
    });
    harness.interrupt().await;
    let away = trainer
        .append(Log::Batches, "b11", Some(10), bytes(11))
        .await;
    assert!(
        matches!(&away, Err(error) if error.is_transient()),
        "{away:?}"
    );
    harness.resume().await;
    timeout(PATIENCE, writer).await.unwrap().unwrap();

    let appended = append_until_confirmed(&trainer, 11).await;
    assert_eq!(appended.sequence(), 11);
    assert_eq!(trainer.read(Log::Batches, 0, 100).await.unwrap().len(), 11);
    assert_eq!(
        enqueue_until_confirmed(&dispatch, "k3", bytes(3)).await,
        Enqueued::Duplicate(3)
    );

    // A restarted reader gets every message that it had not acknowledged, once each.
    trainer.reclaim(Queue::Ready).await.unwrap();
    let mut numbers = Vec::new();
    while numbers.len() < 29 {
        for delivery in trainer.take(Queue::Ready, 100, PATIENCE).await.unwrap() {
            assert_eq!(delivery.payload, bytes(delivery.sequence));
            delivery.ack().await.unwrap();
            numbers.push(delivery.sequence);
        }
    }
    assert_eq!(numbers, (2..=30).collect::<Vec<_>>());
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap().messages,
        0
    );
}

pub async fn subscriptions_and_servers_survive_an_outage(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let worker = harness.connect(TestMember::Worker).await;
    let ask = subjects().ask(Verb::Latest, worker.user());
    let mut news = worker
        .subscribe(&subjects().news(Log::Versions))
        .await
        .unwrap();
    let mut requests = dispatch
        .serve(&subjects().asks(Verb::Latest))
        .await
        .unwrap();
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            request.reply(bytes("latest")).await;
        }
    });
    harness.interrupt().await;
    let away = worker
        .request(&ask, Bytes::new(), Duration::from_millis(500))
        .await;
    assert!(
        matches!(&away, Err(error) if error.is_transient()),
        "{away:?}"
    );
    let away = trainer
        .publish(&subjects().news(Log::Versions), bytes("perhaps"))
        .await;
    assert!(matches!(&away, Err(BusError::Timeout { .. })), "{away:?}");
    harness.resume().await;

    let answered = async {
        while worker
            .request(&ask, Bytes::new(), Duration::from_secs(1))
            .await
            .is_err()
        {
            sleep(Duration::from_millis(50)).await;
        }
    };
    timeout(PATIENCE, answered)
        .await
        .expect("requests are answered again");
    // The worker answered above is connected; the trainer may still be on its way.
    while trainer
        .publish(&subjects().news(Log::Versions), bytes("heard"))
        .await
        .is_err()
    {}
    // The publish that timed out may have been delivered all the same.
    let heard = async { while news.next().await.unwrap().payload != bytes("heard") {} };
    timeout(PATIENCE, heard).await.unwrap();
}

pub async fn a_call_under_way_at_an_outage_fails_as_transient(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let worker = harness.connect(TestMember::Worker).await;
    let _unanswered = dispatch.serve(&subjects().asks(Verb::Lease)).await.unwrap();
    dispatch
        .enqueue(Queue::Tickets, "t", bytes("t"))
        .await
        .unwrap();
    let held = dispatch.take(Queue::Tickets, 1, PATIENCE).await.unwrap();
    let asking = tokio::spawn({
        let worker = worker.clone();
        let ask = subjects().ask(Verb::Lease, worker.user());
        async move {
            worker
                .request(&ask, Bytes::new(), Duration::from_secs(8))
                .await
        }
    });
    let taking = tokio::spawn({
        let trainer = trainer.clone();
        async move { trainer.take(Queue::Ready, 1, Duration::from_secs(8)).await }
    });
    sleep(Duration::from_millis(300)).await;
    harness.interrupt().await;
    let asked = timeout(PATIENCE, asking).await.unwrap().unwrap();
    assert!(
        matches!(&asked, Err(error) if error.is_transient()),
        "{asked:?}"
    );
    match timeout(PATIENCE, taking).await.unwrap().unwrap() {
        Ok(taken) => assert!(taken.is_empty()),
        Err(error) => assert!(error.is_transient(), "{error:?}"),
    }
    let acked = held[0].ack().await;
    assert!(
        matches!(&acked, Err(error) if error.is_transient()),
        "{acked:?}"
    );
    harness.resume().await;
    // The delivery still belongs to this reader: its acknowledgement counts as soon as it reaches the server.
    let settled = async {
        while let Err(error) = held[0].ack().await {
            assert!(error.is_transient(), "{error:?}");
        }
    };
    timeout(PATIENCE, settled).await.unwrap();
    assert_eq!(
        dispatch.queue_state(Queue::Tickets).await.unwrap().messages,
        0
    );
    assert!(
        dispatch
            .take(Queue::Tickets, 1, ACK_WAIT)
            .await
            .unwrap()
            .is_empty()
    );
}
