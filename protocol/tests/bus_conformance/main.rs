//! The behaviours of every bus: each runs on the bus in memory (virtual time) and on a real NATS server, started for each test.
//! Without a server program the tests fail and name the command that installs it; they are never skipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    unreachable_pub
)]

mod asking;
mod harness;
mod queues;
mod refusals;
mod trouble;

/// Runs each behaviour on both buses.
macro_rules! on_both_buses {
    ($($part:ident: $($behaviour:ident),+ $(,)?;)+) => {
        mod memory {
            $(mod $part {
                $(#[tokio::test(start_paused = true)]
                async fn $behaviour() {
                    crate::$part::$behaviour(&crate::harness::MemoryHarness::open()).await;
                })+
            })+
        }
        mod nats {
            $(mod $part {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $behaviour() {
                    crate::$part::$behaviour(&crate::harness::NatsHarness::open().await).await;
                })+
            })+
        }
    };
}

on_both_buses! {
    asking:
        a_request_is_answered_by_its_server,
        a_request_goes_to_one_of_its_servers,
        a_request_without_a_server_fails_at_once,
        a_request_without_a_reply_times_out,
        a_large_reply_arrives_whole,
        news_reaches_every_subscriber,
        calls_on_a_closed_connection_fail_and_its_readers_end;
    queues:
        a_queue_is_delivered_in_order,
        taking_waits_for_the_first_message_only,
        taking_leaves_the_rest_to_other_readers,
        a_key_is_stored_once,
        an_acknowledged_message_is_gone,
        an_unacknowledged_message_comes_back,
        a_message_that_is_given_back_comes_again_after_its_delay,
        a_renewed_message_stays_with_its_reader,
        a_reclaim_brings_every_message_back_and_voids_earlier_deliveries,
        a_full_queue_refuses_until_there_is_room,
        creating_streams_again_keeps_their_messages,
        a_log_is_read_in_order,
        a_long_log_is_read_quickly,
        a_writer_that_was_overtaken_is_fenced_off;
    refusals:
        a_volunteer_cannot_touch_queues_and_logs,
        a_volunteer_sends_requests_only_in_its_own_name,
        a_volunteer_cannot_listen_to_others,
        a_volunteer_cannot_spread_news,
        a_reply_goes_only_to_the_senders_own_inbox,
        a_message_that_is_too_large_is_refused_before_it_is_sent,
        a_key_that_a_header_cannot_carry_is_refused;
    trouble:
        an_outage_loses_nothing_that_was_acknowledged,
        subscriptions_and_servers_survive_an_outage,
        a_call_under_way_at_an_outage_fails_as_transient;
}
