//! The state of the in-memory bus: who is connected, who listens, what is under way. It changes only under one lock that is
//! never held across an await; whatever takes time stands in the agenda, ordered by moment and then by number, so that
//! equal seeds give equal runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::asked::{Asked, MemoryResponder};
use super::network::{Moved, Network, Trace};
use super::routes::Routes;
use super::store::{LogStore, QueueStore};
use super::{MemoryConfig, MemoryCounters, Shared};
use crate::bus::inbox::{Pushed, Writer};
use crate::bus::{BusError, Heard, Request};
use crate::subject::{Log, Queue, Subject};

/// The answer to a request, or why there is none.
pub(super) type Answer = Result<Bytes, BusError>;

/// One connection of a member.
pub(super) type ConnectionId = u64;

pub(super) struct Core {
    pub(super) network: Network,
    pub(super) counters: MemoryCounters,
    pub(super) queues: BTreeMap<Queue, QueueStore>,
    pub(super) logs: BTreeMap<Log, LogStore>,
    trace: Trace,
    start: Instant,
    connections: BTreeMap<ConnectionId, Connection>,
    cut_off: BTreeSet<String>,
    listeners: BTreeMap<u64, Listener>,
    routes: Routes,
    asks: BTreeMap<u64, Ask>,
    agenda: BTreeMap<(Instant, u64), Event>,
    /// Numbers connections, listeners, requests and events alike.
    next_number: u64,
}

struct Connection {
    user: Arc<str>,
    listeners: BTreeSet<u64>,
}

struct Listener {
    connection: ConnectionId,
    pattern: Subject,
    ear: Ear,
    /// When the last message on its way gets here: one connection does not overtake itself.
    last_arrival: Instant,
}

/// What a listener does with what it hears.
pub(super) enum Ear {
    News(Writer<Heard>),
    Serve(mpsc::Sender<Request>),
}

struct Ask {
    connection: ConnectionId,
    subject: Subject,
    answer: oneshot::Sender<Answer>,
}

/// Where an answer goes.
#[derive(Clone)]
pub(super) enum ReplyTo {
    /// To the request with this number, in the own inbox of `user`.
    Ask { number: u64, user: Arc<str> },
    /// To an address that its sender chose.
    Address(Subject),
}

/// A message on its way.
enum Event {
    Heard {
        listener: u64,
        heard: Heard,
        hash: blake3::Hash,
    },
    Asked {
        subject: Subject,
        payload: Bytes,
        reply_to: ReplyTo,
    },
    Answered {
        number: u64,
        answer: Answer,
    },
}

impl Core {
    pub(super) fn new(config: &MemoryConfig) -> Self {
        let queue = |queue: &Queue| (*queue, QueueStore::new(config.bounds.of(*queue)));
        let log = |log: &Log| (*log, LogStore::new(log.limits()));
        Self {
            network: Network::new(config.seed, config.faults),
            counters: MemoryCounters::default(),
            queues: Queue::ALL.iter().map(queue).collect(),
            logs: Log::ALL.iter().map(log).collect(),
            trace: Trace::default(),
            start: Instant::now(),
            connections: BTreeMap::new(),
            cut_off: BTreeSet::new(),
            listeners: BTreeMap::new(),
            routes: Routes::default(),
            asks: BTreeMap::new(),
            agenda: BTreeMap::new(),
            next_number: 0,
        }
    }

    pub(super) fn trace_hash(&self) -> blake3::Hash {
        self.trace.hash()
    }

    /// Writes a durable message into the record.
    pub(super) fn record(&mut self, moved: Moved, subject: &str, number: u64, payload: &[u8]) {
        let hash = blake3::hash(payload);
        self.trace
            .record(moved, subject, number, &hash, self.start.elapsed());
    }

    pub(super) fn connect(&mut self, user: &str) -> ConnectionId {
        let connection = self.number();
        let state = Connection {
            user: Arc::from(user),
            listeners: BTreeSet::new(),
        };
        self.connections.insert(connection, state);
        connection
    }

    /// Ends a connection as the death of its process does.
    pub(super) fn disconnect(&mut self, connection: ConnectionId) {
        let Some(state) = self.connections.remove(&connection) else {
            return;
        };
        for listener in state.listeners {
            self.remove_listener(listener);
        }
        self.asks.retain(|_, ask| ask.connection != connection);
    }

    /// Ends every connection of a member.
    pub(super) fn disconnect_user(&mut self, user: &str) {
        let of_user = self
            .connections
            .iter()
            .filter(|(_, state)| &*state.user == user);
        let connections: Vec<ConnectionId> = of_user.map(|(id, _)| *id).collect();
        for connection in connections {
            self.disconnect(connection);
        }
    }

    pub(super) fn cut_off(&mut self, user: &str) {
        self.cut_off.insert(user.to_owned());
    }

    pub(super) fn heal(&mut self, user: &str) {
        self.cut_off.remove(user);
    }

    /// Refuses a connection that has ended.
    pub(super) fn check(&self, connection: ConnectionId) -> Result<(), BusError> {
        if self.connections.contains_key(&connection) {
            return Ok(());
        }
        Err(BusError::Closed(
            "this connection to the bus is closed: connect again".to_owned(),
        ))
    }

    /// Whether the network reaches this connection.
    pub(super) fn reaches(&self, connection: ConnectionId) -> bool {
        self.connections
            .get(&connection)
            .is_some_and(|state| !self.cut_off.contains(&*state.user))
    }

    pub(super) fn listen(
        &mut self,
        connection: ConnectionId,
        pattern: &Subject,
        ear: Ear,
    ) -> Result<(), BusError> {
        let listener = self.number();
        let Some(state) = self.connections.get_mut(&connection) else {
            return self.check(connection);
        };
        state.listeners.insert(listener);
        self.routes.insert(pattern, listener);
        let last_arrival = self.start;
        let pattern = pattern.clone();
        self.listeners.insert(
            listener,
            Listener {
                connection,
                pattern,
                ear,
                last_arrival,
            },
        );
        Ok(())
    }

    /// Sends news on its way to everybody who listens now.
    pub(super) fn publish(&mut self, subject: &Subject, payload: &Bytes, now: Instant) {
        let hash = blake3::hash(payload);
        for listener in self.routes.matching(subject) {
            self.send_news(listener, subject, payload, hash, now);
        }
    }

    fn send_news(
        &mut self,
        listener: u64,
        subject: &Subject,
        payload: &Bytes,
        hash: blake3::Hash,
        now: Instant,
    ) {
        let Some(state) = self.listeners.get_mut(&listener) else {
            return;
        };
        if matches!(state.ear, Ear::Serve(_)) {
            return;
        }
        let delays = self.network.copies();
        self.counters.count(&delays);
        let mut arrivals = Vec::with_capacity(delays.len());
        for delay in delays {
            state.last_arrival = state.last_arrival.max(now + delay);
            arrivals.push(state.last_arrival);
        }
        for arrival in arrivals {
            let heard = Heard {
                subject: subject.clone(),
                payload: payload.clone(),
            };
            self.schedule(
                arrival,
                Event::Heard {
                    listener,
                    heard,
                    hash,
                },
            );
        }
    }

    /// Opens a request of `connection` and sends it on its way.
    pub(super) fn ask(
        &mut self,
        connection: ConnectionId,
        subject: &Subject,
        payload: &Bytes,
        now: Instant,
    ) -> Result<(u64, oneshot::Receiver<Answer>), BusError> {
        self.check(connection)?;
        let number = self.number();
        let (answer, receiver) = oneshot::channel();
        self.asks.insert(
            number,
            Ask {
                connection,
                subject: subject.clone(),
                answer,
            },
        );
        if let Some(state) = self.connections.get(&connection)
            && self.reaches(connection)
        {
            let reply_to = ReplyTo::Ask {
                number,
                user: state.user.clone(),
            };
            self.send_request(subject, payload, &reply_to, now);
        }
        Ok((number, receiver))
    }

    pub(super) fn send_request(
        &mut self,
        subject: &Subject,
        payload: &Bytes,
        reply_to: &ReplyTo,
        now: Instant,
    ) {
        let delays = self.network.copies();
        self.counters.count(&delays);
        for delay in delays {
            let subject = subject.clone();
            let event = Event::Asked {
                subject,
                payload: payload.clone(),
                reply_to: reply_to.clone(),
            };
            self.schedule(now + delay, event);
        }
    }

    /// Forgets a request that nobody waits for any more.
    pub(super) fn forget_ask(&mut self, number: u64) {
        self.asks.remove(&number);
    }

    /// Sends an answer on its way.
    pub(super) fn answer(&mut self, reply_to: &ReplyTo, answer: &Answer, now: Instant) {
        match (reply_to, answer) {
            (ReplyTo::Address(address), Ok(payload)) => self.publish(address, payload, now),
            (ReplyTo::Address(_), Err(_)) => {}
            (ReplyTo::Ask { number, .. }, answer) => {
                let delays = self.network.copies();
                self.counters.count(&delays);
                for delay in delays {
                    let event = Event::Answered {
                        number: *number,
                        answer: answer.clone(),
                    };
                    self.schedule(now + delay, event);
                }
            }
        }
    }

    fn schedule(&mut self, at: Instant, event: Event) {
        let number = self.number();
        self.agenda.insert((at, number), event);
    }

    /// When the next message arrives.
    pub(super) fn next_arrival(&self) -> Option<Instant> {
        self.agenda.first_key_value().map(|((at, _), _)| *at)
    }

    /// Lets everything arrive that is due.
    pub(super) fn run_due(&mut self, shared: &Arc<Shared>, now: Instant) {
        while let Some(entry) = self.agenda.first_entry() {
            if entry.key().0 > now {
                break;
            }
            match entry.remove() {
                Event::Heard {
                    listener,
                    heard,
                    hash,
                } => self.on_heard(listener, heard, &hash),
                Event::Asked {
                    subject,
                    payload,
                    reply_to,
                } => {
                    self.on_asked(shared, subject, payload, reply_to, now);
                }
                Event::Answered { number, answer } => self.on_answered(number, answer),
            }
        }
    }

    fn on_heard(&mut self, listener: u64, heard: Heard, hash: &blake3::Hash) {
        let Some(state) = self.listeners.get(&listener) else {
            return;
        };
        if !self.reaches(state.connection) {
            self.counters.lost += 1;
            return;
        }
        let at = self.start.elapsed();
        self.trace
            .record(Moved::Heard, heard.subject.as_str(), listener, hash, at);
        self.counters.heard += 1;
        let Ear::News(inbox) = &state.ear else { return };
        match inbox.push(heard) {
            Pushed::Queued => {}
            Pushed::Evicted => self.counters.overflowed += 1,
            Pushed::Unread => self.remove_listener(listener),
        }
    }

    fn on_asked(
        &mut self,
        shared: &Arc<Shared>,
        subject: Subject,
        payload: Bytes,
        reply_to: ReplyTo,
        now: Instant,
    ) {
        let hash = blake3::hash(&payload);
        let listeners = self.routes.matching(&subject);
        let mut servers = Vec::new();
        let mut overhearers = Vec::new();
        for listener in listeners {
            match self.listeners.get(&listener).map(|state| &state.ear) {
                Some(Ear::Serve(inbox)) if inbox.is_closed() => self.remove_listener(listener),
                Some(Ear::Serve(_)) => servers.push(listener),
                Some(Ear::News(_)) => overhearers.push(listener),
                None => {}
            }
        }
        for listener in &overhearers {
            self.send_news(*listener, &subject, &payload, hash, now);
        }
        if servers.is_empty() {
            if overhearers.is_empty() {
                let refusal = Err(BusError::NoResponders {
                    subject: subject.as_str().to_owned(),
                });
                self.answer(&reply_to, &refusal, now);
            }
            return;
        }
        let server = servers[self.network.choose(servers.len())];
        self.hand_over(
            shared,
            server,
            Asked {
                subject,
                payload,
                reply_to,
                hash,
            },
        );
    }

    fn hand_over(&mut self, shared: &Arc<Shared>, server: u64, asked: Asked) {
        let Some(state) = self.listeners.get(&server) else {
            return;
        };
        let Ear::Serve(inbox) = &state.ear else {
            return;
        };
        if !self.reaches(state.connection) {
            self.counters.lost += 1;
            return;
        }
        if !asked.is_from_own_inbox() {
            self.counters.refused += 1;
            return;
        }
        let at = self.start.elapsed();
        self.trace.record(
            Moved::Asked,
            asked.subject.as_str(),
            server,
            &asked.hash,
            at,
        );
        self.counters.asked += 1;
        let responder = MemoryResponder {
            shared: shared.clone(),
            connection: state.connection,
            subject: asked.subject.clone(),
            reply_to: asked.reply_to,
        };
        let request = Request {
            subject: asked.subject,
            payload: asked.payload,
            responder: Box::new(responder),
        };
        if inbox.try_send(request).is_err() {
            self.counters.overflowed += 1;
        }
    }

    fn on_answered(&mut self, number: u64, answer: Answer) {
        let Some(ask) = self.asks.get(&number) else {
            return;
        };
        if !self.reaches(ask.connection) {
            self.counters.lost += 1;
            return;
        }
        let Some(ask) = self.asks.remove(&number) else {
            return;
        };
        let hash = blake3::hash(answer.as_deref().unwrap_or_default());
        let at = self.start.elapsed();
        self.trace
            .record(Moved::Answered, ask.subject.as_str(), number, &hash, at);
        self.counters.answered += 1;
        if ask.answer.send(answer).is_err() {
            tracing::trace!(number, "answer came after its asker had left");
        }
    }

    fn remove_listener(&mut self, listener: u64) {
        let Some(state) = self.listeners.remove(&listener) else {
            return;
        };
        self.routes.remove(&state.pattern, listener);
        if let Some(connection) = self.connections.get_mut(&state.connection) {
            connection.listeners.remove(&listener);
        }
    }

    fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }
}

impl MemoryCounters {
    fn count(&mut self, copies: &[Duration]) {
        match copies.len() {
            0 => self.lost += 1,
            1 => {}
            _ => self.doubled += 1,
        }
    }
}
