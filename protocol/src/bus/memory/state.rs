//! The state of the in-memory bus: connections, listeners, and messages under way. It changes only under one lock, which is
//! never held across an await. Messages under way are ordered by arrival time and then by number, so that equal seeds give
//! equal runs.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;

use super::network::{Moved, Network, NetworkFaults, Trace};
use super::request::{ArrivedRequest, ConnectionId, MemoryResponder, ReplySink, ReplyTo};
use super::routes::Routes;
use super::store::{LogStore, QueueStore};
use crate::bus::inbox::{Pushed, Writer};
use crate::bus::{BusError, News, QueueBounds, Request};
use crate::subject::{Log, Queue, Subject};

/// The reply to a request, or why there is none.
pub(super) type Reply = Result<Bytes, BusError>;

/// How a simulated bus behaves.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct MemoryConfig {
    /// Seeds every random draw of the bus.
    pub seed: u64,
    /// What the network does to messages.
    pub faults: NetworkFaults,
    /// Overrides of the queues' own limits.
    pub bounds: QueueBounds,
}

/// Counts of messages since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MemoryCounters {
    /// News that reached a subscriber.
    pub heard: u64,
    /// Requests that reached a server.
    pub asked: u64,
    /// Replies that reached the sender of the request.
    pub answered: u64,
    /// Messages that the network lost, or that went to or from a member that was cut off.
    pub lost: u64,
    /// Messages that the network duplicated.
    pub doubled: u64,
    /// Messages lost because a reader's inbox was full.
    pub overflowed: u64,
    /// Requests dropped because their reply would not go to the sender's own inbox.
    pub refused: u64,
}

pub(super) struct State {
    pub(super) network: Network,
    pub(super) counters: MemoryCounters,
    pub(super) queues: BTreeMap<Queue, QueueStore>,
    pub(super) logs: BTreeMap<Log, LogStore>,
    trace: Trace,
    start: Instant,
    /// Where the servers of requests hand their replies.
    sink: Weak<dyn ReplySink>,
    connections: BTreeMap<ConnectionId, Connection>,
    cut_off: BTreeSet<String>,
    listeners: BTreeMap<u64, Listener>,
    routes: Routes,
    requests: BTreeMap<u64, OpenRequest>,
    under_way: BTreeMap<(Instant, u64), Event>,
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
    inbox: Inbox,
    /// When the last message under way arrives: messages to one listener stay in order.
    last_arrival: Instant,
}

/// Where a listener's messages go.
pub(super) enum Inbox {
    News(Writer<News>),
    Requests(mpsc::Sender<Request>),
}

struct OpenRequest {
    connection: ConnectionId,
    subject: Subject,
    reply: oneshot::Sender<Reply>,
}

/// A message under way.
enum Event {
    News {
        listener: u64,
        news: News,
        hash: blake3::Hash,
    },
    Request {
        subject: Subject,
        payload: Bytes,
        reply_to: ReplyTo,
    },
    Reply {
        number: u64,
        reply: Reply,
    },
}

impl State {
    pub(super) fn new(config: &MemoryConfig, sink: Weak<dyn ReplySink>) -> Self {
        let queue = |queue: &Queue| (*queue, QueueStore::new(config.bounds.of(*queue)));
        let log = |log: &Log| (*log, LogStore::new(log.limits()));
        Self {
            network: Network::new(config.seed, config.faults),
            counters: MemoryCounters::default(),
            queues: Queue::ALL.iter().map(queue).collect(),
            logs: Log::ALL.iter().map(log).collect(),
            trace: Trace::default(),
            start: Instant::now(),
            sink,
            connections: BTreeMap::new(),
            cut_off: BTreeSet::new(),
            listeners: BTreeMap::new(),
            routes: Routes::default(),
            requests: BTreeMap::new(),
            under_way: BTreeMap::new(),
            next_number: 0,
        }
    }

    pub(super) fn trace_hash(&self) -> blake3::Hash {
        self.trace.hash()
    }

    /// Records a durable message in the trace.
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

    /// Ends a connection, as when its process dies.
    pub(super) fn disconnect(&mut self, connection: ConnectionId) {
        let Some(state) = self.connections.remove(&connection) else {
            return;
        };
        for listener in state.listeners {
            self.remove_listener(listener);
        }
        self.requests
            .retain(|_, request| request.connection != connection);
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
        inbox: Inbox,
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
                inbox,
                last_arrival,
            },
        );
        Ok(())
    }

    /// Sends news to every current listener of the subject.
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
        if matches!(state.inbox, Inbox::Requests(_)) {
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
            let news = News {
                subject: subject.clone(),
                payload: payload.clone(),
            };
            self.schedule(
                arrival,
                Event::News {
                    listener,
                    news,
                    hash,
                },
            );
        }
    }

    /// Opens a request of `connection` and sends it.
    pub(super) fn open_request(
        &mut self,
        connection: ConnectionId,
        subject: &Subject,
        payload: &Bytes,
        now: Instant,
    ) -> Result<(u64, oneshot::Receiver<Reply>), BusError> {
        self.check(connection)?;
        let number = self.number();
        let (reply, receiver) = oneshot::channel();
        self.requests.insert(
            number,
            OpenRequest {
                connection,
                subject: subject.clone(),
                reply,
            },
        );
        if let Some(state) = self.connections.get(&connection)
            && self.reaches(connection)
        {
            let reply_to = ReplyTo::Request {
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
            let event = Event::Request {
                subject,
                payload: payload.clone(),
                reply_to: reply_to.clone(),
            };
            self.schedule(now + delay, event);
        }
    }

    /// Forgets a request whose sender stopped waiting.
    pub(super) fn forget_request(&mut self, number: u64) {
        self.requests.remove(&number);
    }

    /// Sends a reply.
    pub(super) fn reply(&mut self, reply_to: &ReplyTo, reply: &Reply, now: Instant) {
        match (reply_to, reply) {
            (ReplyTo::Address(address), Ok(payload)) => self.publish(address, payload, now),
            (ReplyTo::Address(_), Err(_)) => {}
            (ReplyTo::Request { number, .. }, reply) => {
                let delays = self.network.copies();
                self.counters.count(&delays);
                for delay in delays {
                    let event = Event::Reply {
                        number: *number,
                        reply: reply.clone(),
                    };
                    self.schedule(now + delay, event);
                }
            }
        }
    }

    fn schedule(&mut self, at: Instant, event: Event) {
        let number = self.number();
        self.under_way.insert((at, number), event);
    }

    /// When the next message arrives.
    pub(super) fn next_arrival(&self) -> Option<Instant> {
        self.under_way.first_key_value().map(|((at, _), _)| *at)
    }

    /// Delivers every message that is due.
    pub(super) fn run_due(&mut self, now: Instant) {
        while let Some(entry) = self.under_way.first_entry() {
            if entry.key().0 > now {
                break;
            }
            match entry.remove() {
                Event::News {
                    listener,
                    news,
                    hash,
                } => self.on_news(listener, news, &hash),
                Event::Request {
                    subject,
                    payload,
                    reply_to,
                } => self.on_request(subject, payload, reply_to, now),
                Event::Reply { number, reply } => self.on_reply(number, reply),
            }
        }
    }

    fn on_news(&mut self, listener: u64, news: News, hash: &blake3::Hash) {
        let Some(state) = self.listeners.get(&listener) else {
            return;
        };
        if !self.reaches(state.connection) {
            self.counters.lost += 1;
            return;
        }
        let at = self.start.elapsed();
        self.trace
            .record(Moved::News, news.subject.as_str(), listener, hash, at);
        self.counters.heard += 1;
        let Inbox::News(inbox) = &state.inbox else {
            return;
        };
        match inbox.push(news) {
            Pushed::Queued => {}
            Pushed::Evicted => self.counters.overflowed += 1,
            Pushed::Unread => self.remove_listener(listener),
        }
    }

    fn on_request(&mut self, subject: Subject, payload: Bytes, reply_to: ReplyTo, now: Instant) {
        let hash = blake3::hash(&payload);
        let listeners = self.routes.matching(&subject);
        let mut servers = Vec::new();
        let mut overhearers = Vec::new();
        for listener in listeners {
            match self.listeners.get(&listener).map(|state| &state.inbox) {
                Some(Inbox::Requests(inbox)) if inbox.is_closed() => self.remove_listener(listener),
                Some(Inbox::Requests(_)) => servers.push(listener),
                Some(Inbox::News(_)) => overhearers.push(listener),
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
                self.reply(&reply_to, &refusal, now);
            }
            return;
        }
        let server = servers[self.network.choose(servers.len())];
        self.hand_over(
            server,
            ArrivedRequest {
                subject,
                payload,
                reply_to,
                hash,
            },
        );
    }

    fn hand_over(&mut self, server: u64, request: ArrivedRequest) {
        let Some(state) = self.listeners.get(&server) else {
            return;
        };
        let Inbox::Requests(inbox) = &state.inbox else {
            return;
        };
        if !self.reaches(state.connection) {
            self.counters.lost += 1;
            return;
        }
        if !request.replies_to_own_inbox() {
            self.counters.refused += 1;
            return;
        }
        let at = self.start.elapsed();
        self.trace.record(
            Moved::Request,
            request.subject.as_str(),
            server,
            &request.hash,
            at,
        );
        self.counters.asked += 1;
        let responder = MemoryResponder {
            sink: self.sink.clone(),
            connection: state.connection,
            subject: request.subject.clone(),
            reply_to: request.reply_to,
        };
        let request = Request {
            subject: request.subject,
            payload: request.payload,
            responder: Box::new(responder),
        };
        if inbox.try_send(request).is_err() {
            self.counters.overflowed += 1;
        }
    }

    fn on_reply(&mut self, number: u64, reply: Reply) {
        let Some(request) = self.requests.get(&number) else {
            return;
        };
        if !self.reaches(request.connection) {
            self.counters.lost += 1;
            return;
        }
        let Some(request) = self.requests.remove(&number) else {
            return;
        };
        let hash = blake3::hash(reply.as_deref().unwrap_or_default());
        let at = self.start.elapsed();
        self.trace
            .record(Moved::Reply, request.subject.as_str(), number, &hash, at);
        self.counters.answered += 1;
        if request.reply.send(reply).is_err() {
            tracing::trace!(number, "reply came after the sender stopped waiting");
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
