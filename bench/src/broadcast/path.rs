//! The path between hosts: takes every frame at the end of one link and puts it on another some time later, or drops it by
//! chance. A process of its own, in the namespace of the ports.
//!
//! Each way is as long as the other and drops as much. Frames of one link stay in order. Knows nothing of what they carry.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use rand::Rng;
use socket2::Socket;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::frames::{frames, is_full_queue};
use super::net::{Net, destination, port};
use muster_monitor::output::say;

/// Bytes before a frame that say what of it is still to be summed.
const HEAD_BYTES: usize = 10;
/// Largest frame that a host may send, head and all.
const FRAME_BYTES_MAX: usize = 2_048;
/// Frames on their way at most; more are dropped, as a path does that is full.
const FRAMES_MAX: usize = 65_536;
/// Frames taken from one link before others have their turn.
const TURN: usize = 32;
/// What the system may hold of a link for us, bytes: several pauses' worth.
const BUFFER_BYTES: usize = 4 << 20;
/// How long to rest when nothing is due, and so how late a frame may be.
const PAUSE: Duration = Duration::from_micros(200);

/// What `bench broadcast-path` takes.
#[derive(Debug, Args)]
pub(crate) struct PathArgs {
    /// How many hosts there are
    #[arg(long)]
    hosts: usize,
    /// Time from one link to another, milliseconds
    #[arg(long)]
    delay_ms: f64,
    /// Frames that are lost, percent
    #[arg(long)]
    loss_percent: f64,
}

/// A path as it runs; it ends with this.
#[derive(Debug)]
pub(super) struct Path {
    _process: Child,
}

impl Path {
    /// Starts it between the hosts of `net`.
    pub(super) async fn start(
        net: &Net,
        hosts: usize,
        delay_ms: f64,
        loss_percent: f64,
    ) -> Result<Self> {
        let mut process = Command::new("ip")
            .args(["netns", "exec", &net.switch()])
            .arg(std::env::current_exe()?)
            .arg("broadcast-path")
            .args(["--hosts", &hosts.to_string()])
            .args(["--delay-ms", &delay_ms.to_string()])
            .args(["--loss-percent", &loss_percent.to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot run `ip netns exec`: install iproute2")?;
        let output = process.stdout.take().context("the path has no output")?;
        let ready = BufReader::new(output).lines().next_line().await?;
        ready.context("the path between the hosts did not start: its error is above")?;
        Ok(Self { _process: process })
    }
}

/// A frame on its way.
#[derive(Debug)]
struct Frame {
    due: Instant,
    to: usize,
    bytes: Vec<u8>,
}

/// Carries frames until standard input ends.
pub(crate) fn run(args: &PathArgs) -> Result<()> {
    let links = (0..args.hosts).map(|host| link(&port(host)));
    let links: Vec<Socket> = links.collect::<Result<_>>()?;
    say("ready")?;
    let ended = std::thread::spawn(|| std::io::stdin().read_to_end(&mut Vec::new()));
    let delay = Duration::from_secs_f64(args.delay_ms / 1e3);
    let lost = (args.loss_percent / 100.0).clamp(0.0, 1.0);
    let mut chance = rand::rng();
    let (mut flying, mut spare) = (VecDeque::<Frame>::new(), Vec::new());
    while !ended.is_finished() {
        let mut moved = 0;
        for link in &links {
            for _ in 0..TURN {
                let mut bytes: Vec<u8> = spare.pop().unwrap_or_default();
                bytes.resize(FRAME_BYTES_MAX, 0);
                let Some(length) = take(link, &mut bytes)? else {
                    spare.push(bytes);
                    break;
                };
                moved += 1;
                bytes.truncate(length);
                let to = bytes.get(HEAD_BYTES..).and_then(destination);
                match to.filter(|to| *to < links.len()) {
                    Some(to) if flying.len() < FRAMES_MAX && !chance.random_bool(lost) => {
                        let due = Instant::now() + delay;
                        flying.push_back(Frame { due, to, bytes });
                    }
                    _ => spare.push(bytes),
                }
            }
        }
        let now = Instant::now();
        let due = flying.partition_point(|frame| frame.due <= now);
        for frame in flying.drain(..due) {
            moved += 1;
            give(&links[frame.to], &frame.bytes)?;
            spare.push(frame.bytes);
        }
        if moved == 0 {
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

fn link(device: &str) -> Result<Socket> {
    let opened = frames(device).and_then(|socket| {
        socket.set_nonblocking(true)?;
        socket.set_recv_buffer_size(BUFFER_BYTES)?;
        socket.set_send_buffer_size(BUFFER_BYTES)?;
        Ok(socket)
    });
    opened.with_context(|| format!("cannot carry frames of `{device}`"))
}

/// The length of the next frame, if there is one.
fn take(mut link: &Socket, bytes: &mut [u8]) -> Result<Option<usize>> {
    match link.read(bytes) {
        Ok(length) if length == bytes.len() => {
            bail!("a frame of {length} bytes or more is longer than a link carries")
        }
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error).context("cannot take a frame"),
    }
}

/// Puts a frame on a link, which drops it where its queue is full.
fn give(mut link: &Socket, frame: &[u8]) -> Result<()> {
    match link.write(frame) {
        Ok(_) => Ok(()),
        Err(error) if is_full_queue(&error) => Ok(()),
        Err(error) => Err(error).context("cannot give a frame"),
    }
}
