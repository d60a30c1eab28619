//! Work queues and logs.

use std::time::Duration;

use bytes::Bytes;
use muster_protocol::bus::{Bus, BusError, Delivery, Enqueued, StreamState};
use muster_protocol::subject::{Log, Queue};
use tokio::time::{Instant, sleep};

use crate::harness::{ACK_WAIT, AT_ONCE, Harness, MESSAGES_MAX, TestMember, bytes};

const PATIENCE: Duration = Duration::from_secs(10);

async fn fill(bus: &dyn Bus, queue: Queue, count: u64) {
    for number in 1..=count {
        let enqueued = bus
            .enqueue(queue, &format!("key-{number}"), bytes(number))
            .await;
        assert_eq!(enqueued, Ok(Enqueued::Stored(number)));
    }
}

async fn take_one(bus: &dyn Bus, queue: Queue, wait: Duration) -> Delivery {
    let mut taken = bus.take(queue, 1, wait).await.unwrap();
    assert_eq!(taken.len(), 1);
    taken.remove(0)
}

async fn take_none(bus: &dyn Bus, queue: Queue, wait: Duration) {
    let taken = bus.take(queue, 10, wait).await.unwrap();
    assert!(taken.is_empty(), "{taken:?}");
}

pub async fn a_queue_is_delivered_in_order(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Ready, 20).await;
    let mut numbers = Vec::new();
    while numbers.len() < 20 {
        for delivery in trainer.take(Queue::Ready, 7, PATIENCE).await.unwrap() {
            assert_eq!(delivery.payload, bytes(delivery.sequence));
            assert_eq!(delivery.delivered, 1);
            numbers.push(delivery.sequence);
        }
    }
    assert_eq!(numbers, (1..=20).collect::<Vec<_>>());
    assert_eq!(
        trainer.queue_state(Queue::Ready).await.unwrap(),
        StreamState {
            messages: 20,
            last_sequence: 20
        }
    );
    assert_eq!(
        trainer.queue_state(Queue::Intake).await.unwrap(),
        StreamState::default()
    );
}

pub async fn taking_waits_for_the_first_message_only(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let start = Instant::now();
    take_none(&*trainer, Queue::Ready, Duration::from_millis(300)).await;
    assert!(start.elapsed() >= Duration::from_millis(290));
    take_none(&*trainer, Queue::Ready, Duration::ZERO).await;

    let start = Instant::now();
    let waiting = tokio::spawn(async move { trainer.take(Queue::Ready, 100, PATIENCE).await });
    sleep(Duration::from_millis(200)).await;
    fill(&*dispatch, Queue::Ready, 1).await;
    let taken = waiting.await.unwrap().unwrap();
    assert_eq!(taken.len(), 1);
    assert!(
        start.elapsed() < Duration::from_millis(200) + AT_ONCE,
        "{:?}",
        start.elapsed()
    );
}

pub async fn taking_leaves_the_rest_to_other_readers(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Tickets, 5).await;
    let first = dispatch.take(Queue::Tickets, 2, PATIENCE).await.unwrap();
    let others = trainer.take(Queue::Tickets, 10, PATIENCE).await.unwrap();
    assert_eq!((first.len(), others.len()), (2, 3));
    assert!(
        trainer
            .take(Queue::Tickets, 0, PATIENCE)
            .await
            .unwrap()
            .is_empty()
    );
}

pub async fn a_key_is_stored_once(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let first = dispatch.enqueue(Queue::Ready, "lease-1", bytes("a")).await;
    assert_eq!(first, Ok(Enqueued::Stored(1)));
    let again = trainer.enqueue(Queue::Ready, "lease-1", bytes("b")).await;
    assert_eq!(again, Ok(Enqueued::Duplicate(1)));
    let delivery = take_one(&*trainer, Queue::Ready, PATIENCE).await;
    assert_eq!(delivery.payload, bytes("a"));
    delivery.ack().await.unwrap();
    let late = dispatch.enqueue(Queue::Ready, "lease-1", bytes("c")).await;
    assert_eq!(late, Ok(Enqueued::Duplicate(1)));
    let elsewhere = dispatch.enqueue(Queue::Intake, "lease-1", bytes("d")).await;
    assert_eq!(elsewhere, Ok(Enqueued::Stored(1)));
    assert_eq!(trainer.queue_state(Queue::Ready).await.unwrap().messages, 0);
}

pub async fn an_acknowledged_message_is_gone(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Ready, 2).await;
    let delivery = take_one(&*trainer, Queue::Ready, PATIENCE).await;
    delivery.ack().await.unwrap();
    delivery.ack().await.unwrap();
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap(),
        StreamState {
            messages: 1,
            last_sequence: 2
        }
    );
    let second = take_one(&*trainer, Queue::Ready, PATIENCE).await;
    second.ack().await.unwrap();
    take_none(&*trainer, Queue::Ready, ACK_WAIT + AT_ONCE).await;
}

pub async fn an_unacknowledged_message_comes_back(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Ready, 1).await;
    let start = Instant::now();
    let first = take_one(&*trainer, Queue::Ready, PATIENCE).await;
    let second = take_one(&*dispatch, Queue::Ready, PATIENCE).await;
    assert!(start.elapsed() >= ACK_WAIT, "{:?}", start.elapsed());
    assert_eq!((second.sequence, second.delivered), (1, 2));
    assert_eq!(second.payload, first.payload);
    // The slow reader has done the work all the same.
    first.ack().await.unwrap();
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap().messages,
        0
    );
}

pub async fn a_message_that_is_given_back_comes_again_after_its_delay(harness: &impl Harness) {
    let (dispatch, _) = harness.lab().await;
    fill(&*dispatch, Queue::Tickets, 1).await;
    let delivery = take_one(&*dispatch, Queue::Tickets, PATIENCE).await;
    let start = Instant::now();
    delivery.give_back(Duration::ZERO).await.unwrap();
    let delivery = take_one(&*dispatch, Queue::Tickets, PATIENCE).await;
    assert!(
        start.elapsed() < AT_ONCE && delivery.delivered == 2,
        "{delivery:?}"
    );

    let delay = Duration::from_millis(800);
    let start = Instant::now();
    delivery.give_back(delay).await.unwrap();
    take_none(&*dispatch, Queue::Tickets, Duration::from_millis(200)).await;
    let delivery = take_one(&*dispatch, Queue::Tickets, PATIENCE).await;
    assert!(
        start.elapsed() >= delay && start.elapsed() < ACK_WAIT,
        "{:?}",
        start.elapsed()
    );
    assert_eq!(delivery.delivered, 3);
}

pub async fn a_renewed_message_stays_with_its_reader(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Ready, 1).await;
    let delivery = take_one(&*trainer, Queue::Ready, PATIENCE).await;
    for _ in 0..4 {
        take_none(&*dispatch, Queue::Ready, ACK_WAIT / 2).await;
        delivery.renew().await.unwrap();
    }
    delivery.ack().await.unwrap();
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap().messages,
        0
    );
}

pub async fn a_reclaim_brings_every_message_back_and_voids_earlier_deliveries(
    harness: &impl Harness,
) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Ready, 4).await;
    let before = trainer.take(Queue::Ready, 3, PATIENCE).await.unwrap();
    before[0].ack().await.unwrap();
    let start = Instant::now();
    dispatch.reclaim(Queue::Ready).await.unwrap();
    let after = dispatch.take(Queue::Ready, 10, PATIENCE).await.unwrap();
    assert!(start.elapsed() < AT_ONCE, "{:?}", start.elapsed());
    let numbers: Vec<u64> = after.iter().map(|delivery| delivery.sequence).collect();
    assert_eq!(numbers, [2, 3, 4]);
    for void in [
        before[1].ack().await,
        before[1].renew().await,
        before[2].give_back(Duration::ZERO).await,
    ] {
        assert!(
            matches!(&void, Err(error) if !error.is_transient()),
            "{void:?}"
        );
    }
    assert_eq!(
        dispatch.queue_state(Queue::Ready).await.unwrap().messages,
        3
    );
    after[0].ack().await.unwrap();
    // The earlier process continues with the new reader.
    dispatch
        .enqueue(Queue::Ready, "more", bytes("more"))
        .await
        .unwrap();
    assert_eq!(
        take_one(&*trainer, Queue::Ready, PATIENCE).await.payload,
        bytes("more")
    );
}

pub async fn a_full_queue_refuses_until_there_is_room(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Ready, MESSAGES_MAX).await;
    let refused = dispatch.enqueue(Queue::Ready, "one-more", bytes("x")).await;
    assert_eq!(
        refused,
        Err(BusError::Full {
            queue: "ready".to_owned()
        })
    );
    let known = dispatch.enqueue(Queue::Ready, "key-1", bytes("x")).await;
    assert_eq!(known, Ok(Enqueued::Duplicate(1)));
    take_one(&*trainer, Queue::Ready, PATIENCE)
        .await
        .ack()
        .await
        .unwrap();
    let accepted = dispatch.enqueue(Queue::Ready, "one-more", bytes("x")).await;
    assert_eq!(accepted, Ok(Enqueued::Stored(MESSAGES_MAX + 1)));
}

pub async fn creating_streams_again_keeps_their_messages(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    fill(&*dispatch, Queue::Intake, 2).await;
    trainer
        .append(Log::Versions, "v0", Some(0), bytes("v0"))
        .await
        .unwrap();
    let held = take_one(&*dispatch, Queue::Intake, PATIENCE).await;
    let (first, second) = tokio::join!(dispatch.create_streams(), trainer.create_streams());
    first.and(second).unwrap();
    held.ack().await.unwrap();
    assert_eq!(
        dispatch.queue_state(Queue::Intake).await.unwrap().messages,
        1
    );
    assert_eq!(
        dispatch.last(Log::Versions).await.unwrap().unwrap().payload,
        bytes("v0")
    );
}

pub async fn a_log_is_read_in_order(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    assert_eq!(dispatch.last(Log::Fates).await.unwrap(), None);
    assert_eq!(dispatch.read(Log::Fates, 0, 10).await.unwrap(), []);
    for number in 1..=30u64 {
        let appended = trainer
            .append(Log::Fates, &format!("f{number}"), None, bytes(number))
            .await;
        assert_eq!(appended, Ok(Enqueued::Stored(number)));
    }
    let records = dispatch.read(Log::Fates, 7, 10).await.unwrap();
    let numbers: Vec<u64> = records.iter().map(|record| record.sequence).collect();
    assert_eq!(numbers, (8..=17).collect::<Vec<_>>());
    assert!(
        records
            .iter()
            .all(|record| record.payload == bytes(record.sequence))
    );
    assert_eq!(
        dispatch
            .read(Log::Fates, 28, usize::MAX)
            .await
            .unwrap()
            .len(),
        2
    );
    assert_eq!(dispatch.read(Log::Fates, 30, 10).await.unwrap(), []);
    assert_eq!(dispatch.read(Log::Fates, u64::MAX, 10).await.unwrap(), []);
    assert_eq!(
        dispatch.last(Log::Fates).await.unwrap().unwrap().sequence,
        30
    );
    assert_eq!(dispatch.last(Log::Control).await.unwrap(), None);
}

pub async fn a_long_log_is_read_quickly(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let payload = Bytes::from(vec![1; 300]);
    for chunk in 0..30u64 {
        let appends = (1..=100u64).map(|number| {
            let (trainer, payload, key) = (trainer.clone(), payload.clone(), chunk * 100 + number);
            async move {
                trainer
                    .append(Log::Fates, &key.to_string(), None, payload)
                    .await
            }
        });
        for appended in futures_util::future::join_all(appends).await {
            appended.unwrap();
        }
    }
    let start = Instant::now();
    let records = dispatch.read(Log::Fates, 0, usize::MAX).await.unwrap();
    let elapsed = start.elapsed();
    eprintln!("3,000 records read in {elapsed:?}");
    assert!(records.iter().map(|record| record.sequence).eq(1..=3_000));
    assert!(elapsed < Duration::from_secs(3), "{elapsed:?}");
}

pub async fn a_writer_that_was_overtaken_is_fenced_off(harness: &impl Harness) {
    let (dispatch, trainer) = harness.lab().await;
    let first = trainer
        .append(Log::Batches, "step-1", Some(0), bytes("mine"))
        .await;
    assert_eq!(first, Ok(Enqueued::Stored(1)));
    // A writer whose confirmation was lost repeats the call, and learns that its record is stored.
    let again = trainer
        .append(Log::Batches, "step-1", Some(0), bytes("mine"))
        .await;
    assert_eq!(again, Ok(Enqueued::Duplicate(1)));
    dispatch
        .append(Log::Batches, "other", Some(1), bytes("other"))
        .await
        .unwrap();
    let overtaken = trainer
        .append(Log::Batches, "step-2", Some(1), bytes("mine"))
        .await;
    let fenced = BusError::Fenced {
        log: "batches".to_owned(),
        expected: 1,
        found: 2,
    };
    assert_eq!(overtaken, Err(fenced));
    assert_eq!(
        trainer.last(Log::Batches).await.unwrap().unwrap().payload,
        bytes("other")
    );
    let other = harness.connect(TestMember::Trainer).await;
    assert_eq!(
        other
            .append(Log::Batches, "step-2", Some(2), bytes("x"))
            .await,
        Ok(Enqueued::Stored(3))
    );
}
