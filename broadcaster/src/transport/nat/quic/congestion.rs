//! The congestion control of a QUIC connection: BBR until the path turns out to be short, then CUBIC, as over TCP. See
//! [`LONG_PATH`].

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use iroh::endpoint::{Controller, ControllerFactory, ControllerMetrics, RttEstimator};
use noq_proto::congestion::{Bbr3Config, CubicConfig};

use crate::transport::interface::LONG_PATH;

/// Makes a congestion controller for each path.
#[derive(Debug)]
pub(super) struct ByPath;

impl ControllerFactory for ByPath {
    fn build(self: Arc<Self>, now: Instant, mtu: u16) -> Box<dyn Controller> {
        Box::new(Chosen::new(now, mtu))
    }
}

/// The congestion controller of one path.
#[derive(Debug)]
struct Chosen {
    real: Box<dyn Controller>,
    mtu: u16,
    is_short: bool,
}

impl Chosen {
    fn new(now: Instant, mtu: u16) -> Self {
        Self {
            real: Arc::new(Bbr3Config::default()).build(now, mtu),
            mtu,
            is_short: false,
        }
    }

    /// Takes note of the shortest time to the other side and back so far. One that waited in queues may look long and be short.
    fn measured(&mut self, now: Instant, round_trip: Duration) {
        if !self.is_short && round_trip < LONG_PATH {
            self.is_short = true;
            self.real = Arc::new(CubicConfig::default()).build(now, self.mtu);
        }
    }
}

impl Controller for Chosen {
    fn on_sent(&mut self, now: Instant, bytes: u64, largest: u64) {
        self.real.on_sent(now, bytes, largest);
    }

    fn on_packet_sent(&mut self, now: Instant, bytes: u16, number: u64) {
        self.real.on_packet_sent(now, bytes, number);
    }

    fn on_cwnd_limited(&mut self) {
        self.real.on_cwnd_limited();
    }

    fn on_ack(
        &mut self,
        now: Instant,
        sent: Instant,
        bytes: u64,
        number: u64,
        is_all_sent: bool,
        rtt: &RttEstimator,
    ) {
        self.measured(now, rtt.min());
        self.real.on_ack(now, sent, bytes, number, is_all_sent, rtt);
    }

    fn on_end_acks(
        &mut self,
        now: Instant,
        in_flight: u64,
        is_all_sent: bool,
        largest: Option<u64>,
    ) {
        self.real.on_end_acks(now, in_flight, is_all_sent, largest);
    }

    fn on_congestion_event(
        &mut self,
        now: Instant,
        sent: Instant,
        is_persistent: bool,
        is_ecn: bool,
        lost_bytes: u64,
        largest_lost: u64,
    ) {
        let real = &mut self.real;
        real.on_congestion_event(now, sent, is_persistent, is_ecn, lost_bytes, largest_lost);
    }

    fn on_packet_lost(&mut self, bytes: u16, number: u64, now: Instant) {
        self.real.on_packet_lost(bytes, number, now);
    }

    fn on_spurious_congestion_event(&mut self) {
        self.real.on_spurious_congestion_event();
    }

    fn on_mtu_update(&mut self, mtu: u16) {
        self.mtu = mtu;
        self.real.on_mtu_update(mtu);
    }

    fn on_ack_frequency_update(&mut self, threshold: u64, delay_max: Duration) {
        self.real.on_ack_frequency_update(threshold, delay_max);
    }

    fn window(&self) -> u64 {
        self.real.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.real.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        Box::new(Self {
            real: self.real.clone_box(),
            ..*self
        })
    }

    fn initial_window(&self) -> u64 {
        self.real.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self.real.into_any()
    }
}

#[cfg(test)]
mod tests {
    use noq_proto::congestion::{Bbr3, Cubic};

    use super::*;

    #[test]
    fn a_path_is_long_until_one_packet_came_back_soon_and_then_short_for_good() {
        let mut control = Chosen::new(Instant::now(), 1_200);
        let real = |control: &Chosen| control.clone_box().into_any();
        control.measured(Instant::now(), Duration::from_millis(80));
        assert!(real(&control).is::<Bbr3>());
        control.measured(Instant::now(), LONG_PATH - Duration::from_millis(1));
        assert!(real(&control).is::<Cubic>());
        control.measured(Instant::now(), LONG_PATH);
        assert!(real(&control).is::<Cubic>());
    }
}
