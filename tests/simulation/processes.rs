//! Starts, kills and restarts the processes of a simulated run.

use std::collections::BTreeMap;

use rand::Rng;
use rand::rngs::StdRng;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use muster_protocol::bus::memory::MemoryBus;

use crate::members::{SPARE_IDENTITIES, SwarmMember, WORKERS_MAX, members};
use crate::schedule::{Event, Node, Schedule};
use crate::swarm::SimulatedSwarm;
use crate::table::seeded_rng;

/// A running process.
struct Process {
    user: String,
    task: JoinHandle<()>,
    shutdown: CancellationToken,
}

impl Process {
    /// Ends the process as SIGKILL does.
    fn kill(self, bus: &MemoryBus) {
        bus.disconnect(&self.user);
        self.task.abort();
        self.shutdown.cancel();
    }
}

/// The running processes, and the identity of each worker.
pub struct Processes<'a> {
    swarm: &'a SimulatedSwarm,
    running: BTreeMap<Node, Process>,
    /// Index of the member of each worker slot; it changes after some deaths.
    identities: Vec<usize>,
    spare: usize,
    started: u64,
    rng: StdRng,
}

impl<'a> Processes<'a> {
    pub fn new(swarm: &'a SimulatedSwarm) -> Self {
        Self {
            swarm,
            running: BTreeMap::new(),
            identities: (0..swarm.scenario.workers).collect(),
            spare: 0,
            started: 0,
            rng: seeded_rng(swarm.scenario.seed, "processes", 0),
        }
    }

    pub fn on_event(&mut self, event: Event, now_ms: u64, schedule: &mut Schedule) {
        match event {
            Event::Start(node) => self.start(node),
            Event::Die(node) => self.die(node, now_ms, schedule),
            Event::BusyWorkerDies { slot } => {
                let slot = self.newest_lessee().unwrap_or(slot);
                self.die(Node::Worker(slot), now_ms, schedule);
            }
            Event::CutOff(node) => self.swarm.bus.cut_off(&self.member(node).user),
            Event::Heal(node) => self.swarm.bus.heal(&self.member(node).user),
        }
    }

    fn member(&self, node: Node) -> &'static SwarmMember {
        match node {
            Node::Dispatch => &members().dispatch,
            Node::Trainer => &members().trainer,
            Node::Critic(number) => &members().critics[number],
            Node::Worker(slot) => &members().workers[self.identities[slot]],
        }
    }

    fn newest_lessee(&self) -> Option<usize> {
        let newest = *self.swarm.observer.observations().lessees.last()?;
        self.identities
            .iter()
            .position(|member| members().workers[*member].identity.peer_id() == newest)
    }

    fn start(&mut self, node: Node) {
        let (swarm, member) = (self.swarm.clone(), self.member(node));
        let shutdown = CancellationToken::new();
        self.started += 1;
        let (start, token) = (self.started, shutdown.clone());
        let task = match node {
            Node::Dispatch => tokio::task::spawn_local(swarm.dispatch(token)),
            Node::Trainer => tokio::task::spawn_local(swarm.trainer(token)),
            Node::Critic(_) => tokio::task::spawn_local(swarm.critic(member, start, token)),
            Node::Worker(_) => tokio::task::spawn_local(swarm.worker(member, start, token)),
        };
        let user = member.user.clone();
        self.running.insert(
            node,
            Process {
                user,
                task,
                shutdown,
            },
        );
    }

    /// Kills a process and schedules its restart; half of the workers restart under another identity.
    fn die(&mut self, node: Node, now_ms: u64, schedule: &mut Schedule) {
        let Some(process) = self.running.remove(&node) else {
            return;
        };
        process.kill(&self.swarm.bus);
        if let Node::Worker(slot) = node
            && self.rng.random::<bool>()
            && self.spare < SPARE_IDENTITIES
        {
            self.identities[slot] = WORKERS_MAX + self.spare;
            self.spare += 1;
        }
        schedule.add(
            now_ms + self.rng.random_range(500..6_000),
            Event::Start(node),
        );
    }
}
