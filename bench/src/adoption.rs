//! `muster-bench adoption`: measures the cost of new weights for a worker that goes on answering. An engine decodes like a
//! worker's. Meanwhile a whole version, and then a delta, arrives from a peer with a limited uplink, is checked, prepared, and
//! adopted between two steps. The tokens per second are compared with those just before the transfer, and the longest step around
//! the adoption with the usual one.
//!
//! The peer and the worker share this machine's processors, so the peer's work slows the worker.

use std::num::{NonZeroU64, NonZeroUsize};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use clap::Args;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use muster_broadcaster::codec::delta::encode;
use muster_broadcaster::store::object::describe_object;
use muster_broadcaster::version::adopt::{Held, Opened, fetch};
use muster_broadcaster::version::state::describe_state;
use muster_broadcaster::{Swarm, SwarmConfig};
use muster_policy::{
    Config, Device, Engine, EngineConfig, GenerationRequest, KernelSet, Policy, Sampling, Threads,
};
use muster_protocol::clock::SystemClock;
use muster_protocol::envelope::seal;
use muster_protocol::id::{DescriptorHash, Generation, PolicyVersion, RunId, StateRoot};
use muster_protocol::identity::{Identity, MachineSeed};
use muster_protocol::message::version::{Content, Object, Version, state_root};

use crate::policy::known;
use crate::shape::{Shape, Stored};
use muster_monitor::machine::load_average;
use muster_monitor::output::say;

/// Bytes per second of 1 Mbit/s.
const MBIT: NonZeroU64 = NonZeroU64::new(125_000).unwrap();
/// Tokens of each prompt and of each answer.
const PROMPT: usize = 16;
const ANSWER: usize = 64;
/// One weight in this many changes by a unit in the last place, as in a step at a small learning rate.
const MOVED: usize = 100;

#[derive(Debug, Args)]
pub(super) struct AdoptionArgs {
    /// The model's shape; its weights are random
    #[arg(long, value_enum, default_value = "135m")]
    shape: Shape,
    /// Number of rows that decode together
    #[arg(long, value_name = "N", default_value = "8")]
    rows: NonZeroUsize,
    /// Uplink in Mbit/s of the peer that has the new weights
    #[arg(long, value_name = "MBIT", default_value = "100")]
    up: NonZeroU64,
    /// Seconds of decoding before each transfer
    #[arg(long, value_name = "S", default_value = "10")]
    quiet: NonZeroU64,
    /// Number of rounds
    #[arg(long, value_name = "N", default_value = "3")]
    rounds: NonZeroUsize,
    /// Folder of the models that the bench makes
    #[arg(long, value_name = "DIR", default_value = "runs/bench/models")]
    dir: PathBuf,
}

pub(super) async fn run(args: AdoptionArgs) -> Result<()> {
    let folder = known(args.shape, Stored::Bf16, &args.dir)?;
    let config = Config::parse(&std::fs::read_to_string(folder.join("config.json"))?)?;
    let before = Bytes::from(std::fs::read(folder.join("model.safetensors"))?);
    let after = Bytes::from(moved(&before)?);
    let (tracker, shutdown) = (TaskTracker::new(), CancellationToken::new());
    let lab = Lab::new(before, after)?;
    let engine = Running::start(&config, &lab.images[0], args.rows)?;
    say(&format!(
        "{} rows; weights {:.0} MB, delta {:.2} MB, from a peer with {} Mbit/s; load {:.1}",
        args.rows,
        lab.images[0].len() as f64 / 1e6,
        lab.objects[2].bytes as f64 / 1e6,
        args.up,
        load_average().unwrap_or(f64::NAN),
    ))?;
    for round in 1..=args.rounds.get() {
        for delta in [false, true] {
            let what = if delta { "delta" } else { "anchor" };
            tokio::time::sleep(Duration::from_secs(args.quiet.get())).await;
            let quiet = engine.steps();
            // Each round has new peers, which hold nothing.
            let seeder = peer(1, Some(args.up), (&tracker, &shutdown)).await?;
            let worker = peer(2, None, (&tracker, &shutdown)).await?;
            worker.add_peer(identity(1).peer_id(), seeder.peer_record());
            let (opened, parent) = lab.announce(&seeder, delta).await?;
            engine.steps();
            let begun = Instant::now();
            let held = fetch(&worker, opened, parent.as_ref()).await?;
            let fetched = (begun.elapsed(), engine.steps());
            let policy = engine.prepare(held.image.clone()).await?;
            engine.adopt(policy, (2 * round + usize::from(delta)) as u64)?;
            // Waits until answers begun under the old weights have ended.
            tokio::time::sleep(Duration::from_secs_f64(
                quiet.usual_seconds() * ANSWER as f64,
            ))
            .await;
            let taken = (begun.elapsed(), engine.steps());
            report(what, &quiet, &fetched, &taken)?;
        }
    }
    shutdown.cancel();
    tracker.close();
    tracker.wait().await;
    Ok(())
}

fn report(
    what: &str,
    quiet: &Steps,
    (fetch_time, fetching): &(Duration, Steps),
    (whole_time, taking): &(Duration, Steps),
) -> Result<()> {
    let share = |steps: &Steps| 100.0 * steps.rate() / quiet.rate();
    say(&format!(
        "{what:<7} quiet {:>5.0} tokens/s; while it comes ({:.1} s) {:>5.1} %, while it is taken over ({:.1} s) {:>5.1} %; \
         swap {:.1} ms; longest step {:.0}, {:.0} and {:.0} ms",
        quiet.rate(),
        fetch_time.as_secs_f64(),
        share(fetching),
        (*whole_time - *fetch_time).as_secs_f64(),
        share(taking),
        taking.swap.as_secs_f64() * 1e3,
        quiet.longest_ms(),
        fetching.longest_ms(),
        taking.longest_ms(),
    ))
}

/// The learner's side: two versions, and the objects that lead to them.
struct Lab {
    images: [Bytes; 2],
    /// Anchors of both versions, the delta from the first to the second.
    objects: [Object; 3],
    delta: Bytes,
    versions: [Version; 2],
}

impl Lab {
    fn new(before: Bytes, after: Bytes) -> Result<Self> {
        let threads = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let delta = Bytes::from(encode(&before, &after, threads)?.bytes);
        let versions = [version(1, &before)?, version(2, &after)?];
        let [from, to] = [versions[0].root, versions[1].root];
        let anchor = |root: StateRoot, number: u64, bytes: &Bytes| {
            describe_object(Content::Anchor { root }, PolicyVersion(number), bytes)
        };
        Ok(Self {
            objects: [
                anchor(from, 1, &before)?,
                anchor(to, 2, &after)?,
                describe_object(Content::Delta { from, to }, PolicyVersion(2), &delta)?,
            ],
            images: [before, after],
            delta,
            versions,
        })
    }

    /// Offers the second version whole, or as a delta from the first. Returns its announcement.
    async fn announce(&self, seeder: &Swarm, delta: bool) -> Result<(Opened, Option<Held>)> {
        let run: RunId = "bench".parse()?;
        let object = &self.objects[1 + usize::from(delta)];
        let bytes = if delta { &self.delta } else { &self.images[1] };
        seeder.offer(object, bytes.clone()).await?;
        let signed = |version: usize| seal(&identity(0), &run, 1, self.versions[version].clone());
        let opened = Opened {
            version: signed(1)?,
            objects: vec![seal(&identity(0), &run, 2, object.clone())?],
            files: Vec::new(),
        };
        let parent = Held {
            version: signed(0)?,
            anchor: None,
            objects: Vec::new(),
            files: Vec::new(),
            image: self.images[0].clone(),
        };
        Ok((opened, delta.then_some(parent)))
    }
}

fn version(number: u64, image: &[u8]) -> Result<Version> {
    let (parameters, part) = describe_state(image)?;
    Ok(Version {
        descriptor: DescriptorHash([0; 32]),
        generation: Generation(1),
        version: PolicyVersion(number),
        parent: None,
        parameters,
        parts: vec![part],
        root: state_root(&[part]),
        files: Vec::new(),
    })
}

/// The same safetensors file with some bf16 weights changed by a unit in the last place.
fn moved(image: &[u8]) -> Result<Vec<u8>> {
    let (head, _) = image.split_first_chunk().context("an empty image")?;
    let first = 8 + usize::try_from(u64::from_le_bytes(*head))?;
    let mut moved = image.to_vec();
    let weights = moved.get_mut(first..).context("an image without weights")?;
    weights
        .chunks_exact_mut(2)
        .step_by(MOVED)
        .for_each(|weight| weight[0] ^= 1);
    Ok(moved)
}

async fn peer(
    number: u8,
    up_mbit: Option<NonZeroU64>,
    (tracker, shutdown): (&TaskTracker, &CancellationToken),
) -> Result<Swarm> {
    let config = SwarmConfig {
        upload_bytes_per_second: up_mbit.map(|mbit| mbit.saturating_mul(MBIT)),
        ..SwarmConfig::default()
    };
    let clock = Arc::new(SystemClock);
    Ok(Swarm::start(config, identity(number), clock, tracker, shutdown.clone()).await?)
}

fn identity(number: u8) -> Identity {
    Identity::from_seed(&MachineSeed::from_bytes([number + 1; 32]))
}

/// The engine's steps in an interval.
#[derive(Debug, Default)]
struct Steps {
    tokens: u64,
    seconds: Vec<f64>,
    /// Time to replace the weights.
    swap: Duration,
}

impl Steps {
    fn rate(&self) -> f64 {
        self.tokens as f64 / self.seconds.iter().sum::<f64>().max(f64::MIN_POSITIVE)
    }

    fn longest_ms(&self) -> f64 {
        self.seconds.iter().copied().fold(0.0, f64::max) * 1e3
    }

    fn usual_seconds(&self) -> f64 {
        self.seconds.iter().sum::<f64>() / self.seconds.len().max(1) as f64
    }
}

/// The report of the engine's thread after each step, and after a change of weights.
enum Event {
    Stepped { tokens: u64, seconds: f64 },
    Swapped(Duration),
}

/// An engine on its own thread that always has requests, like a worker's.
struct Running {
    config: Config,
    policies: Sender<(Policy, u64)>,
    events: Receiver<Event>,
}

impl Running {
    fn start(config: &Config, image: &Bytes, rows: NonZeroUsize) -> Result<Self> {
        let policy = policy(config, image)?;
        let (policies, inbox) = channel();
        let (says, events) = channel();
        let engine = EngineConfig {
            slots: rows,
            ..EngineConfig::default()
        };
        std::thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || {
                let engine = Engine::new(policy, 1, &engine).map_err(Into::into);
                let ended = engine.and_then(|engine| decode(engine, rows.get(), &inbox, &says));
                if let Err(error) = ended {
                    tracing::error!(%error, "the engine has ended");
                }
            })?;
        Ok(Self {
            config: config.clone(),
            policies,
            events,
        })
    }

    /// The steps since the last call.
    fn steps(&self) -> Steps {
        let mut steps = Steps::default();
        for event in self.events.try_iter() {
            match event {
                Event::Stepped { tokens, seconds } => {
                    steps.tokens += tokens;
                    steps.seconds.push(seconds);
                }
                Event::Swapped(took) => steps.swap = took,
            }
        }
        steps
    }

    /// Prepares new weights like a worker, on a blocking thread.
    async fn prepare(&self, image: Bytes) -> Result<Policy> {
        let config = self.config.clone();
        tokio::task::spawn_blocking(move || policy(&config, &image)).await?
    }

    fn adopt(&self, policy: Policy, version: u64) -> Result<()> {
        let ended = |_| anyhow!("the engine has ended: its error is above");
        self.policies.send((policy, version)).map_err(ended)
    }
}

fn policy(config: &Config, image: &[u8]) -> Result<Policy> {
    let (kernels, threads) = (KernelSet::Fused, Threads::one());
    Ok(Policy::for_inference(
        config,
        image,
        kernels,
        &Device::Cpu,
        &threads,
    )?)
}

/// Decodes until the receiver of reports is dropped.
fn decode(
    mut engine: Engine,
    rows: usize,
    inbox: &Receiver<(Policy, u64)>,
    says: &Sender<Event>,
) -> Result<()> {
    let mut number = 0;
    let mut before = engine.stats().decoded_tokens;
    loop {
        let told = match inbox.try_recv() {
            Ok((policy, version)) => {
                let begun = Instant::now();
                engine.swap(policy, version)?;
                says.send(Event::Swapped(begun.elapsed()))
            }
            Err(TryRecvError::Empty) => Ok(()),
            Err(TryRecvError::Disconnected) => return Ok(()),
        };
        while engine.queued() < rows {
            engine.submit(vec![request(number)])?;
            number += 1;
        }
        let begun = Instant::now();
        engine.step()?;
        let seconds = begun.elapsed().as_secs_f64();
        let decoded = engine.stats().decoded_tokens;
        let tokens = decoded - before;
        before = decoded;
        if told
            .and_then(|()| says.send(Event::Stepped { tokens, seconds }))
            .is_err()
        {
            return Ok(());
        }
    }
}

/// Answers of all lengths up to [`ANSWER`], so that rows end at different times.
fn request(number: usize) -> GenerationRequest {
    let prompt: Vec<u32> = (0..PROMPT)
        .map(|at| ((number * 7 + at) % 29) as u32)
        .collect();
    let sampling = Sampling::Prescribed {
        seed: [1; 32],
        rollout: number as u32,
        temperature: 1.0,
    };
    GenerationRequest::new(prompt.into(), 1 + number * 37 % ANSWER, [].into(), sampling)
}
