//! Crowds of peers in virtual time, over the very decisions that drive real connections: who knows whom, the fetcher's plan,
//! the seeder's uploads. Links have rates and a delay; a host sends one shard at a time, to whoever has waited longest. What
//! a peer keeps does not grow with the crowd.
#![allow(clippy::unwrap_used, clippy::print_stdout)]

use std::collections::VecDeque;

use muster_broadcaster::store::bitmap::Bitmap;
use muster_broadcaster::swarm::plan::{
    Action, FetchPlan, Patience, PeerReply, PeerRequest, ShardVerdict,
};
use muster_broadcaster::swarm::uploads::{
    SendOutcome, Sharing, UploadDecision, Uploads, WantedShard,
};
use muster_broadcaster::transport::wire::{Chooser, RequestId};
use muster_dispatch::overlay::partners;
use muster_protocol::id::{ObjectId, PeerId};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

const OBJECT: ObjectId = ObjectId([9; 32]);
const SHARD_BYTES: u32 = 64 << 10;
/// 64 KiB at 20 Mbit/s.
const SHARD_US: u64 = 26_214;
/// From one host to another.
const DELAY_US: u64 = 10_000;
/// A host looks at its plan at most this often.
const TICK_US: u64 = 10_000;

/// Most requests that may ever wait at a host, whatever the size of the crowd.
const QUEUE_MAX: usize = 32;
/// A slice of time, and how many are looked ahead: a minute, longer than anybody waits.
const SLICE_US: u64 = 1_000;
const SLICES: u64 = 60_000;

/// What happens to a host.
#[derive(Debug)]
enum Event {
    /// It looks at its plan.
    Wake,
    /// It is asked something.
    Asked { by: u32, request: u32, wish: Wish },
    /// It has sent what it was sending.
    Sent,
    /// It is answered.
    Told { from: u32, request: u32, what: What },
}

#[derive(Debug)]
enum Wish {
    Have,
    Shard(u32),
    AnyBut(Vec<u8>),
}

#[derive(Debug)]
enum What {
    Held(Vec<u8>),
    Shard(u32),
    Busy(u32),
    Missing,
}

struct Host {
    /// `None` when it has everything.
    plan: Option<FetchPlan>,
    held: Bitmap,
    uploads: Uploads,
    queue: VecDeque<(u32, u32, Wish)>,
    is_sending: bool,
    down_free_us: u64,
    wakes_at_us: u64,
    finished_us: u64,
    sent: u64,
}

/// What is going to happen: a ring of slices of time, each a list in the order in which it was filled. Within a slice the
/// order is not that of time, which is less than what a real machine's scheduler does to it.
struct Agenda {
    ring: Vec<VecDeque<(u64, u32, Event)>>,
    slice: u64,
    count: usize,
}

impl Default for Agenda {
    fn default() -> Self {
        Self {
            ring: (0..SLICES).map(|_| VecDeque::new()).collect(),
            slice: 0,
            count: 0,
        }
    }
}

impl Agenda {
    fn add(&mut self, at_us: u64, host: u32, event: Event) {
        let slice = (at_us / SLICE_US).clamp(self.slice, self.slice + SLICES - 1);
        self.ring[(slice % SLICES) as usize].push_back((at_us, host, event));
        self.count += 1;
    }

    fn next(&mut self) -> Option<(u64, u32, Event)> {
        self.count = self.count.checked_sub(1)?;
        loop {
            match self.ring[(self.slice % SLICES) as usize].pop_front() {
                None => self.slice += 1,
                next => return next,
            }
        }
    }
}

struct Crowd {
    now_us: u64,
    agenda: Agenda,
    hosts: Vec<Host>,
    shards: u32,
    unfinished: u32,
    queue_max: usize,
}

fn name(host: u32) -> PeerId {
    let mut key = [0; 32];
    key[..4].copy_from_slice(&host.to_be_bytes());
    PeerId(key)
}

fn number(peer: &PeerId) -> u32 {
    u32::from_be_bytes([peer.0[0], peer.0[1], peer.0[2], peer.0[3]])
}

impl Host {
    fn new(host: u32, shards: u32, plan: FetchPlan) -> Self {
        let (held, sharing) = match host {
            0 => (Bitmap::full(shards), Sharing::FirstCopies),
            _ => (Bitmap::empty(shards), Sharing::OnDemand),
        };
        Self {
            plan: (host > 0).then_some(plan),
            held,
            uploads: Uploads::new(sharing),
            queue: VecDeque::new(),
            is_sending: false,
            down_free_us: 0,
            wakes_at_us: u64::MAX,
            finished_us: 0,
            sent: 0,
        }
    }
}

impl Crowd {
    /// Host 0 has everything.
    fn new(peers: u32, shards: u32, seed: u64) -> Self {
        let mut rng = ChaCha12Rng::seed_from_u64(seed);
        let count = peers as usize + 1;
        let hosts = (0..=peers).map(|host| {
            let nothing = Bitmap::empty(shards);
            let mut plan = FetchPlan::new(SHARD_BYTES, nothing, Patience::default(), rng.random());
            for other in partners(count, host as usize) {
                plan.add_source(name(other as u32), 0);
            }
            Host::new(host, shards, plan)
        });
        let mut crowd = Self {
            now_us: 0,
            agenda: Agenda::default(),
            hosts: hosts.collect(),
            shards,
            unfinished: peers,
            queue_max: 0,
        };
        (1..=peers).for_each(|host| crowd.wake(host, u64::from(host) % 20 * 1_000));
        crowd
    }

    fn at(&mut self, at_us: u64, host: u32, event: Event) {
        self.agenda.add(at_us, host, event);
    }

    fn tell(&mut self, host: u32, from: u32, request: u32, what: What) {
        let told = Event::Told {
            from,
            request,
            what,
        };
        self.at(self.now_us + DELAY_US, host, told);
    }

    fn wake(&mut self, host: u32, at_us: u64) {
        let wakes_at_us = &mut self.hosts[host as usize].wakes_at_us;
        if at_us < *wakes_at_us {
            *wakes_at_us = at_us;
            self.at(at_us, host, Event::Wake);
        }
    }

    fn run(&mut self, until_us: u64) {
        while self.unfinished > 0 && self.now_us <= until_us {
            let Some((at_us, host, event)) = self.agenda.next() else {
                return;
            };
            self.now_us = self.now_us.max(at_us);
            self.happen(host, event);
        }
    }

    fn happen(&mut self, host: u32, event: Event) {
        match event {
            Event::Wake if self.hosts[host as usize].wakes_at_us > self.now_us => {}
            Event::Wake => {
                self.hosts[host as usize].wakes_at_us = u64::MAX;
                self.act(host);
            }
            Event::Asked {
                by,
                request,
                wish: Wish::Have,
            } => {
                let held = self.hosts[host as usize].held.as_bytes().to_vec();
                self.tell(by, host, request, What::Held(held));
            }
            Event::Asked { by, request, wish } => {
                let queue = &mut self.hosts[host as usize].queue;
                queue.push_back((by, request, wish));
                self.queue_max = self.queue_max.max(queue.len());
                self.send_next(host);
            }
            Event::Sent => {
                self.hosts[host as usize].is_sending = false;
                self.send_next(host);
            }
            Event::Told {
                from,
                request,
                what,
            } => self.take(host, from, RequestId(request), what),
        }
    }

    /// Answers whoever has waited longest, until a shard is on its way.
    fn send_next(&mut self, host: u32) {
        let now_ms = self.now_us / 1_000;
        while !self.hosts[host as usize].is_sending {
            let Some((by, request, wish)) = self.hosts[host as usize].queue.pop_front() else {
                return;
            };
            match self.decide(host, by, &wish, now_ms) {
                UploadDecision::Missing => self.tell(by, host, request, What::Missing),
                UploadDecision::Busy { retry_ms, .. } => {
                    self.tell(by, host, request, What::Busy(retry_ms as u32));
                }
                UploadDecision::Send { shard } => self.send(host, by, request, shard),
            }
        }
    }

    fn decide(&mut self, host: u32, by: u32, wish: &Wish, now_ms: u64) -> UploadDecision {
        let sender = &mut self.hosts[host as usize];
        let except = match wish {
            Wish::AnyBut(except) => Bitmap::from_bytes(except, self.shards),
            Wish::Shard(_) | Wish::Have => None,
        };
        let wanted = match (wish, &except) {
            (Wish::Shard(shard), _) => WantedShard::Shard(*shard),
            (_, Some(except)) => WantedShard::AnyBut(except),
            (_, None) => return UploadDecision::Missing,
        };
        let (uploads, held) = (&mut sender.uploads, &sender.held);
        uploads.decide(now_ms, name(by), OBJECT, held, wanted)
    }

    fn send(&mut self, host: u32, by: u32, request: u32, shard: u32) {
        let now_us = self.now_us;
        let sender = &mut self.hosts[host as usize];
        let (uploads, now_ms) = (&mut sender.uploads, now_us / 1_000);
        uploads.finish(now_ms, &name(by), &OBJECT, shard, SendOutcome::Sent);
        sender.is_sending = true;
        sender.sent += 1;
        self.at(now_us + SHARD_US, host, Event::Sent);
        let receiver = &mut self.hosts[by as usize];
        receiver.down_free_us = receiver.down_free_us.max(now_us) + SHARD_US;
        let there_us = receiver.down_free_us + DELAY_US;
        let told = Event::Told {
            from: host,
            request,
            what: What::Shard(shard),
        };
        self.at(there_us, by, told);
    }

    fn take(&mut self, host: u32, from: u32, request: RequestId, what: What) {
        let chooser = match from {
            0 => Chooser::Holder,
            _ => Chooser::Asker,
        };
        let receiver = &mut self.hosts[host as usize];
        let answer = match what {
            What::Held(shards) => PeerReply::Held {
                request,
                shards,
                chooser,
            },
            What::Shard(shard) => {
                receiver.held.insert(shard);
                PeerReply::Shard {
                    request,
                    shard,
                    verdict: ShardVerdict::Good,
                }
            }
            What::Busy(retry_ms) => PeerReply::Busy {
                request,
                retry_ms,
                holders: Vec::new(),
            },
            What::Missing => PeerReply::Missing { request },
        };
        let Some(plan) = &mut receiver.plan else {
            return;
        };
        plan.on_answer(name(from), answer, self.now_us / 1_000);
        if plan.is_finished() {
            receiver.finished_us = self.now_us;
            receiver.plan = None;
            self.unfinished -= 1;
        } else {
            self.wake(host, self.now_us + TICK_US);
        }
    }

    fn act(&mut self, host: u32) {
        let now_ms = self.now_us / 1_000;
        let Some(plan) = &mut self.hosts[host as usize].plan else {
            return;
        };
        let actions = plan.decide(now_ms);
        let wakes_at_ms = plan.wake_at_ms(now_ms);
        for action in actions {
            let Action::PeerRequest {
                source,
                request: RequestId(request),
                ask,
            } = action
            else {
                continue;
            };
            let wish = match ask {
                PeerRequest::Have => Wish::Have,
                PeerRequest::Shard(shard) => Wish::Shard(shard),
                PeerRequest::AnyBut(except) => Wish::AnyBut(except.as_bytes().to_vec()),
            };
            let asked = Event::Asked {
                by: host,
                request,
                wish,
            };
            self.at(self.now_us + DELAY_US, number(&source), asked);
        }
        if let Some(at_ms) = wakes_at_ms {
            self.wake(host, (1_000 * at_ms).max(self.now_us + TICK_US));
        }
    }

    /// When the last peer was done, in times of the bound: the seeder's uplink and each downlink busy without a pause.
    fn last(&self) -> f64 {
        let last = self.hosts[1..].iter().map(|host| host.finished_us).max();
        let bound_us = u64::from(self.shards) * SHARD_US;
        last.unwrap() as f64 / bound_us as f64
    }
}

fn race(peers: u32, shards: u32, bound: f64) {
    let mut crowd = Crowd::new(peers, shards, 1);
    crowd.run(u64::from(shards) * SHARD_US * 4);
    let (left, sent) = (crowd.unfinished, crowd.hosts[0].sent);
    println!(
        "{peers} peers, {shards} shards: last at {:.2} of the bound, {left} left, the seeder sent {:.2}, longest queue {}",
        crowd.last(),
        sent as f64 / f64::from(shards),
        crowd.queue_max
    );
    assert_eq!(left, 0, "of {peers} peers, after 4 times the bound");
    assert!(crowd.last() <= bound, "{:.2} of the bound", crowd.last());
    assert!(
        crowd.queue_max <= QUEUE_MAX,
        "{} requests wait",
        crowd.queue_max
    );
}

#[test]
fn sixteen_peers_that_all_know_one_another_finish_near_the_bound() {
    race(16, 512, 1.15);
}

#[test]
fn a_thousand_peers_that_know_eight_others_each_finish_near_the_bound() {
    race(1_000, 256, 1.35);
}

#[test]
#[ignore = "takes a minute: run with --ignored"]
fn ten_thousand_peers_that_know_eight_others_each_finish_near_the_bound() {
    race(10_000, 384, 1.3);
}
