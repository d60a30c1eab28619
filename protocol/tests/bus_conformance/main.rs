//! What every bus does: one set of behaviours, run on the bus in memory (virtual time) and on a real NATS server, which is
//! started for each test. Without a server the tests fail and say which command brings it; they are never skipped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    missing_docs,
    unreachable_pub
)]

mod asking;
mod queues;
mod refusals;
mod trouble;
mod venue;

/// Runs each behaviour on both buses.
macro_rules! on_both_buses {
    ($($part:ident: $($behaviour:ident),+ $(,)?;)+) => {
        mod memory {
            $(mod $part {
                $(#[tokio::test(start_paused = true)]
                async fn $behaviour() {
                    crate::$part::$behaviour(&crate::venue::MemoryVenue::open()).await;
                })+
            })+
        }
        mod nats {
            $(mod $part {
                $(#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $behaviour() {
                    crate::$part::$behaviour(&crate::venue::NatsVenue::open().await).await;
                })+
            })+
        }
    };
}

on_both_buses! {
    asking:
        a_question_is_answered_by_who_serves_it,
        a_question_goes_to_one_of_those_who_serve,
        a_question_that_nobody_serves_says_so_at_once,
        a_question_that_is_not_answered_times_out,
        a_large_answer_arrives_whole,
        news_reaches_everybody_who_listens,
        a_closed_connection_says_so_and_its_readers_end;
    queues:
        a_queue_is_handed_out_in_order,
        taking_waits_for_the_first_message_and_for_no_more,
        taking_leaves_the_rest_to_others,
        a_key_is_stored_once,
        an_acknowledged_message_is_gone,
        an_unacknowledged_message_comes_back,
        what_is_given_back_comes_again_after_its_delay,
        a_renewed_message_stays_with_its_reader,
        a_reclaim_brings_everything_back_and_voids_what_was_handed_out,
        a_full_queue_refuses_until_there_is_room,
        making_streams_again_keeps_what_they_hold,
        a_log_is_read_in_order,
        a_long_log_is_read_quickly,
        a_writer_who_was_overtaken_is_fenced_off;
    refusals:
        a_volunteer_cannot_touch_queues_and_logs,
        a_volunteer_asks_in_its_own_name_alone,
        a_volunteer_cannot_listen_to_others,
        a_volunteer_cannot_spread_news,
        an_answer_is_not_published_on_anothers_behalf,
        what_is_too_large_is_refused_before_it_is_sent,
        a_key_that_no_header_carries_is_refused;
    trouble:
        nothing_acknowledged_is_lost_when_the_server_goes_away,
        listeners_and_servers_are_back_after_the_server_was_away,
        a_call_under_way_when_the_server_goes_is_transient;
}
