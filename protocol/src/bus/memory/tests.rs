use std::time::Duration;

use tokio::time::Instant;

use super::*;
use crate::bus::{Enqueued, QueueBounds};
use crate::subject::{Log, Queue, Subjects, Verb};

fn run() -> RunId {
    "r".parse().unwrap()
}

fn text(text: &str) -> Bytes {
    Bytes::copy_from_slice(text.as_bytes())
}

fn faulty(seed: u64) -> MemoryConfig {
    let delay = (Duration::from_millis(1), Duration::from_millis(50));
    let faults = NetworkFaults {
        delay,
        loss: 0.05,
        duplication: 0.05,
        durable_loss: 0.02,
    };
    MemoryConfig {
        seed,
        faults,
        ..MemoryConfig::default()
    }
}

/// Forty workers send requests and listen; dispatch replies, queues and announces. Returns the trace, the virtual time and
/// the counters.
async fn small_swarm(config: MemoryConfig) -> ([u8; 32], Duration, MemoryCounters) {
    let start = Instant::now();
    let bus = MemoryBus::new(&run(), config);
    let subjects = Subjects::of(&run());
    let dispatch = bus.connect("UD", Role::Dispatch);
    let mut requests = dispatch.serve(&subjects.asks(Verb::Lease)).await.unwrap();
    let server = tokio::spawn({
        let (dispatch, subjects) = (dispatch.clone(), subjects.clone());
        async move {
            let mut served = 0u32;
            while let Some(request) = requests.next().await {
                served += 1;
                let queued = dispatch
                    .enqueue(Queue::Intake, &served.to_string(), text("q"))
                    .await;
                request.reply(text(&format!("{served} {queued:?}"))).await;
                if served.is_multiple_of(10) {
                    dispatch
                        .publish(&subjects.news(Log::Versions), text("news"))
                        .await
                        .unwrap();
                }
            }
        }
    });
    let mut workers = Vec::new();
    for number in 0..40 {
        let worker = bus.connect(&format!("U{number}"), Role::Worker);
        let subjects = subjects.clone();
        workers.push(tokio::spawn(async move {
            let mut news = worker
                .subscribe(&subjects.news(Log::Versions))
                .await
                .unwrap();
            let ask = subjects.ask(Verb::Lease, worker.user());
            for _ in 0..25 {
                let asked = worker.request(&ask, text("lease"), Duration::from_secs(30));
                if asked.await.is_err() {
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
            let heard = tokio::time::timeout(Duration::from_secs(1), news.next()).await;
            assert!(heard.is_ok());
        }));
    }
    for worker in workers {
        worker.await.unwrap();
    }
    dispatch.close().await;
    server.await.unwrap();
    (bus.trace_hash(), start.elapsed(), bus.counters())
}

#[tokio::test(start_paused = true)]
async fn equal_seeds_give_equal_traces_and_other_seeds_others() {
    let first = small_swarm(faulty(1)).await;
    assert_eq!(first, small_swarm(faulty(1)).await);
    assert_ne!(first.0, small_swarm(faulty(2)).await.0);
}

#[tokio::test(start_paused = true)]
async fn waiting_costs_only_virtual_time() {
    let begin = std::time::Instant::now();
    let (_, virtual_time, counters) = small_swarm(faulty(3)).await;
    assert!(virtual_time > Duration::from_secs(60), "{virtual_time:?}");
    assert!(begin.elapsed() < Duration::from_secs(20));
    assert!(counters.lost > 0 && counters.doubled > 0, "{counters:?}");
}

#[tokio::test(start_paused = true)]
async fn the_share_of_lost_requests_is_the_configured_one() {
    let faults = NetworkFaults {
        loss: 0.05,
        ..NetworkFaults::default()
    };
    let bus = MemoryBus::new(
        &run(),
        MemoryConfig {
            seed: 4,
            faults,
            ..MemoryConfig::default()
        },
    );
    let subjects = Subjects::of(&run());
    let dispatch = bus.connect("UD", Role::Dispatch);
    let mut requests = dispatch.serve(&subjects.asks(Verb::Latest)).await.unwrap();
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            request.reply(Bytes::new()).await;
        }
    });
    let worker = bus.connect("UW", Role::Worker);
    let ask = subjects.ask(Verb::Latest, "UW");
    let mut timeouts = 0;
    for _ in 0..4_000 {
        let asked = worker
            .request(&ask, Bytes::new(), Duration::from_secs(1))
            .await;
        timeouts += u32::from(matches!(
            asked,
            Err(BusError::Timeout {
                waited_ms: 1_000,
                ..
            })
        ));
    }
    // Lost on the way there or back: 1 - 0.95² = 9.75 % of 4,000, give or take four standard deviations.
    assert!((315..=465).contains(&timeouts), "{timeouts}");
}

#[tokio::test(start_paused = true)]
async fn a_repeated_write_whose_confirmation_was_lost_is_recognised() {
    let faults = NetworkFaults {
        durable_loss: 0.3,
        ..NetworkFaults::default()
    };
    let bus = MemoryBus::new(
        &run(),
        MemoryConfig {
            seed: 5,
            faults,
            ..MemoryConfig::default()
        },
    );
    let trainer = bus.connect("UT", Role::Trainer);
    let mut recognised = 0;
    for number in 1..=100u64 {
        let sequence = loop {
            let key = format!("step-{number}");
            match trainer
                .append(Log::Batches, &key, Some(number - 1), Bytes::new())
                .await
            {
                Ok(Enqueued::Stored(sequence)) => break sequence,
                Ok(Enqueued::Duplicate(sequence)) => {
                    recognised += 1;
                    break sequence;
                }
                Err(error) => assert!(error.is_transient(), "{error}"),
            }
        };
        assert_eq!(sequence, number);
    }
    assert!(recognised > 10, "{recognised}");
}

#[tokio::test(start_paused = true)]
async fn a_dead_reader_holds_its_deliveries_until_the_queues_wait_is_over() {
    let ack_wait = Duration::from_secs(30);
    let bounds = QueueBounds {
        ack_wait: Some(ack_wait),
        messages_max: None,
    };
    let bus = MemoryBus::new(
        &run(),
        MemoryConfig {
            bounds,
            ..MemoryConfig::default()
        },
    );
    let first = bus.connect("UD", Role::Dispatch);
    first
        .enqueue(Queue::Tickets, "1", text("ticket"))
        .await
        .unwrap();
    let held = first.take(Queue::Tickets, 1, Duration::ZERO).await.unwrap();
    bus.disconnect("UD");
    assert!(matches!(held[0].ack().await, Err(BusError::Closed(_))));
    assert!(matches!(
        first.queue_state(Queue::Tickets).await,
        Err(BusError::Closed(_))
    ));

    let second = bus.connect("UD", Role::Dispatch);
    let start = Instant::now();
    let again = second.take(Queue::Tickets, 1, ack_wait * 2).await.unwrap();
    assert_eq!((again[0].delivered, start.elapsed()), (2, ack_wait));
}

#[tokio::test(start_paused = true)]
async fn a_dropped_connection_neither_listens_nor_serves() {
    let bus = MemoryBus::new(&run(), MemoryConfig::default());
    let subjects = Subjects::of(&run());
    let dispatch = bus.connect("UD", Role::Dispatch);
    let mut requests = dispatch.serve(&subjects.asks(Verb::Latest)).await.unwrap();
    let mut news = dispatch
        .subscribe(&subjects.news(Log::Control))
        .await
        .unwrap();
    drop(dispatch);
    assert!(requests.next().await.is_none());
    assert!(news.next().await.is_none());
    let worker = bus.connect("UW", Role::Worker);
    let ask = subjects.ask(Verb::Latest, "UW");
    let asked = worker.request(&ask, Bytes::new(), Duration::from_secs(1));
    assert!(matches!(asked.await, Err(BusError::NoResponders { .. })));
}

#[tokio::test(start_paused = true)]
async fn news_arrives_in_the_order_in_which_it_was_sent() {
    let delay = (Duration::from_millis(1), Duration::from_millis(100));
    let faults = NetworkFaults {
        delay,
        ..NetworkFaults::default()
    };
    let bus = MemoryBus::new(
        &run(),
        MemoryConfig {
            faults,
            ..MemoryConfig::default()
        },
    );
    let subject = Subjects::of(&run()).news(Log::Versions);
    let trainer = bus.connect("UT", Role::Trainer);
    let worker = bus.connect("UW", Role::Worker);
    let mut news = worker.subscribe(&subject).await.unwrap();
    for number in 0..200u8 {
        trainer
            .publish(&subject, Bytes::from(vec![number]))
            .await
            .unwrap();
    }
    for number in 0..200u8 {
        assert_eq!(news.next().await.unwrap().payload[0], number);
    }
}
