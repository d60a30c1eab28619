//! Simulates large swarms in virtual time, with the same decisions that drive real connections: the overlay, the download
//! scheduler, the upload scheduler. Links have rates and a delay; a host sends one shard at a time, to the peer that has waited
//! longest. The state of a peer does not grow with the swarm.
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
/// One-way delay between two hosts.
const DELAY_US: u64 = 10_000;
/// Shortest time between two decisions of a host's download scheduler.
const TICK_US: u64 = 10_000;

/// Most requests that may wait at a host, whatever the size of the swarm.
const QUEUE_MAX: usize = 32;
/// The length of a slice of time, and the number of slices in the agenda: together a minute, longer than any host waits.
const SLICE_US: u64 = 1_000;
const SLICES: u64 = 60_000;

/// What happens to a host.
#[derive(Debug)]
enum Event {
    /// Its download scheduler decides.
    Wake,
    /// A request arrives.
    Request {
        from: u32,
        id: u32,
        message: Request,
    },
    /// The shard that it was sending has left.
    Sent,
    /// A reply arrives.
    Reply { from: u32, id: u32, message: Reply },
}

#[derive(Debug)]
enum Request {
    Have,
    Shard(u32),
    AnyBut(Vec<u8>),
}

#[derive(Debug)]
enum Reply {
    Held(Vec<u8>),
    Shard(u32),
    Busy(u32),
    Missing,
}

struct Host {
    /// `None` once it has the whole object.
    plan: Option<FetchPlan>,
    held: Bitmap,
    uploads: Uploads,
    queue: VecDeque<(u32, u32, Request)>,
    is_sending: bool,
    down_free_us: u64,
    wakes_at_us: u64,
    finished_us: u64,
    sent: u64,
}

/// Future events: a ring of slices of time, each a list of events in the order of insertion. Within a slice the order is not
/// that of time; a real machine's scheduler disturbs the order more.
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

struct Simulation {
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

impl Simulation {
    /// Host 0 is the learner and has the whole object.
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
        let mut simulation = Self {
            now_us: 0,
            agenda: Agenda::default(),
            hosts: hosts.collect(),
            shards,
            unfinished: peers,
            queue_max: 0,
        };
        (1..=peers).for_each(|host| simulation.wake(host, u64::from(host) % 20 * 1_000));
        simulation
    }

    fn at(&mut self, at_us: u64, host: u32, event: Event) {
        self.agenda.add(at_us, host, event);
    }

    fn reply(&mut self, host: u32, from: u32, id: u32, message: Reply) {
        let reply = Event::Reply { from, id, message };
        self.at(self.now_us + DELAY_US, host, reply);
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
            self.process(host, event);
        }
    }

    fn process(&mut self, host: u32, event: Event) {
        match event {
            Event::Wake if self.hosts[host as usize].wakes_at_us > self.now_us => {}
            Event::Wake => {
                self.hosts[host as usize].wakes_at_us = u64::MAX;
                self.act(host);
            }
            Event::Request {
                from,
                id,
                message: Request::Have,
            } => {
                let held = self.hosts[host as usize].held.as_bytes().to_vec();
                self.reply(from, host, id, Reply::Held(held));
            }
            Event::Request { from, id, message } => {
                let queue = &mut self.hosts[host as usize].queue;
                queue.push_back((from, id, message));
                self.queue_max = self.queue_max.max(queue.len());
                self.send_next(host);
            }
            Event::Sent => {
                self.hosts[host as usize].is_sending = false;
                self.send_next(host);
            }
            Event::Reply { from, id, message } => self.receive(host, from, RequestId(id), message),
        }
    }

    /// Answers the longest-waiting requests until a shard is being sent.
    fn send_next(&mut self, host: u32) {
        let now_ms = self.now_us / 1_000;
        while !self.hosts[host as usize].is_sending {
            let Some((by, id, message)) = self.hosts[host as usize].queue.pop_front() else {
                return;
            };
            match self.decide(host, by, &message, now_ms) {
                UploadDecision::Missing => self.reply(by, host, id, Reply::Missing),
                UploadDecision::Busy { retry_ms, .. } => {
                    self.reply(by, host, id, Reply::Busy(retry_ms as u32));
                }
                UploadDecision::Send { shard } => self.send(host, by, id, shard),
            }
        }
    }

    fn decide(&mut self, host: u32, by: u32, request: &Request, now_ms: u64) -> UploadDecision {
        let sender = &mut self.hosts[host as usize];
        let except = match request {
            Request::AnyBut(except) => Bitmap::from_bytes(except, self.shards),
            Request::Shard(_) | Request::Have => None,
        };
        let wanted = match (request, &except) {
            (Request::Shard(shard), _) => WantedShard::Shard(*shard),
            (_, Some(except)) => WantedShard::AnyBut(except),
            (_, None) => return UploadDecision::Missing,
        };
        let (uploads, held) = (&mut sender.uploads, &sender.held);
        uploads.decide(now_ms, name(by), OBJECT, held, wanted)
    }

    fn send(&mut self, host: u32, by: u32, id: u32, shard: u32) {
        let now_us = self.now_us;
        let sender = &mut self.hosts[host as usize];
        let (uploads, now_ms) = (&mut sender.uploads, now_us / 1_000);
        uploads.finish(now_ms, &name(by), &OBJECT, shard, SendOutcome::Sent);
        sender.is_sending = true;
        sender.sent += 1;
        self.at(now_us + SHARD_US, host, Event::Sent);
        let receiver = &mut self.hosts[by as usize];
        receiver.down_free_us = receiver.down_free_us.max(now_us) + SHARD_US;
        let arrives_us = receiver.down_free_us + DELAY_US;
        let reply = Event::Reply {
            from: host,
            id,
            message: Reply::Shard(shard),
        };
        self.at(arrives_us, by, reply);
    }

    fn receive(&mut self, host: u32, from: u32, request: RequestId, message: Reply) {
        let chooser = match from {
            0 => Chooser::Holder,
            _ => Chooser::Asker,
        };
        let receiver = &mut self.hosts[host as usize];
        let reply = match message {
            Reply::Held(shards) => PeerReply::Held {
                request,
                shards,
                chooser,
            },
            Reply::Shard(shard) => {
                receiver.held.insert(shard);
                PeerReply::Shard {
                    request,
                    shard,
                    verdict: ShardVerdict::Good,
                }
            }
            Reply::Busy(retry_ms) => PeerReply::Busy {
                request,
                retry_ms,
                holders: Vec::new(),
            },
            Reply::Missing => PeerReply::Missing { request },
        };
        let Some(plan) = &mut receiver.plan else {
            return;
        };
        plan.on_reply(name(from), reply, self.now_us / 1_000);
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
            let Action::Send {
                peer,
                id: RequestId(id),
                request,
            } = action
            else {
                continue;
            };
            let message = match request {
                PeerRequest::Have => Request::Have,
                PeerRequest::Shard(shard) => Request::Shard(shard),
                PeerRequest::AnyBut(except) => Request::AnyBut(except.as_bytes().to_vec()),
            };
            let request = Event::Request {
                from: host,
                id,
                message,
            };
            self.at(self.now_us + DELAY_US, number(&peer), request);
        }
        if let Some(at_ms) = wakes_at_ms {
            self.wake(host, (1_000 * at_ms).max(self.now_us + TICK_US));
        }
    }

    /// When the last peer finished, as a multiple of the lower bound: the learner's uplink and each downlink busy all the time.
    fn last(&self) -> f64 {
        let last = self.hosts[1..].iter().map(|host| host.finished_us).max();
        let bound_us = u64::from(self.shards) * SHARD_US;
        last.unwrap() as f64 / bound_us as f64
    }
}

fn race(peers: u32, shards: u32, bound: f64) {
    let mut simulation = Simulation::new(peers, shards, 1);
    simulation.run(u64::from(shards) * SHARD_US * 4);
    let (left, sent) = (simulation.unfinished, simulation.hosts[0].sent);
    println!(
        "{peers} peers, {shards} shards: last at {:.2} of the bound, {left} left, the learner sent {:.2}, longest queue {}",
        simulation.last(),
        sent as f64 / f64::from(shards),
        simulation.queue_max
    );
    assert_eq!(left, 0, "of {peers} peers, after 4 times the bound");
    assert!(
        simulation.last() <= bound,
        "{:.2} of the bound",
        simulation.last()
    );
    assert!(
        simulation.queue_max <= QUEUE_MAX,
        "{} requests wait",
        simulation.queue_max
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
