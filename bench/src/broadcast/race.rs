//! A race: starts one process on every host, lets all of them begin at once, and collects what they say.

use std::net::Ipv4Addr;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use muster_protocol::message::version::Object;
use serde::Serialize;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::host::{Counted, Done, OBJECT_FILE, PLAN_FILE, Plan, describe};
use super::net::Net;
use crate::spread::Spread;

/// The rivals, as the repository has them.
const RIVALS: &str = include_str!("../../../tests/reference/broadcast_rivals.py");
/// Longest time for all processes to start, and to end.
const START: Duration = Duration::from_secs(120);
const END: Duration = Duration::from_secs(60);

/// What came of a race.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Finish {
    pub(super) first_seconds: f64,
    pub(super) median_seconds: f64,
    pub(super) last_seconds: f64,
    /// Sent by the first holder.
    pub(super) seeder_bytes: u64,
    /// Received a second time, by all.
    pub(super) twice_bytes: u64,
    /// Of all processes.
    pub(super) cpu_seconds: f64,
    /// Of the process that held most.
    pub(super) memory_peak_bytes: u64,
}

/// Everything that is the same for each contender.
#[derive(Debug)]
pub(super) struct Race<'a> {
    net: &'a Net,
    hosts: usize,
    folder: TempDir,
    patience: Duration,
}

struct Runner {
    number: usize,
    child: Child,
    input: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl<'a> Race<'a> {
    /// Makes the object and writes the plan, which every host reads.
    pub(super) fn prepare(
        net: &'a Net,
        hosts: usize,
        bytes: u64,
        patience_seconds: u64,
        plan: impl FnOnce(Vec<Ipv4Addr>, Object) -> Plan,
    ) -> Result<Self> {
        let folder = TempDir::new()?;
        let bytes = noise(usize::try_from(bytes)?);
        let addresses = (0..hosts).map(|host| net.address(host)).collect();
        let plan = plan(addresses, describe(&bytes)?);
        std::fs::write(folder.path().join(OBJECT_FILE), &bytes)?;
        std::fs::write(folder.path().join(PLAN_FILE), serde_json::to_vec(&plan)?)?;
        Ok(Self {
            net,
            hosts,
            folder,
            patience: Duration::from_secs(patience_seconds),
        })
    }

    /// The swarm as it is shipped.
    pub(super) async fn swarm(&self) -> Result<Finish> {
        let program = std::env::current_exe()?;
        self.run(&program, |host| {
            let number = host.to_string();
            let folder = self.folder.path().display().to_string();
            let words = ["broadcast-host", "--number", &number, "--folder"];
            let mut words: Vec<String> = words.into_iter().map(str::to_owned).collect();
            words.push(folder);
            words
        })
        .await
    }

    /// One of the rivals.
    pub(super) async fn rival(&self, python: &Path, name: &str) -> Result<Finish> {
        let script = self.folder.path().join("rivals.py");
        std::fs::write(&script, RIVALS)?;
        self.run(python, |host| {
            vec![
                script.display().to_string(),
                name.to_owned(),
                host.to_string(),
                self.folder.path().display().to_string(),
            ]
        })
        .await
    }

    async fn run(
        &self,
        program: &Path,
        arguments: impl Fn(usize) -> Vec<String>,
    ) -> Result<Finish> {
        let mut runners = Vec::with_capacity(self.hosts);
        for host in 0..self.hosts {
            runners.push(self.start(host, program, arguments(host))?);
        }
        for runner in &mut runners {
            let line = tokio::time::timeout(START, runner.line());
            line.await.context("a host did not get ready")??;
        }
        for runner in &mut runners {
            runner.input.write_all(b"go\n").await?;
        }
        let finished = tokio::time::timeout(self.patience, finish_all(&mut runners));
        let seconds = finished.await.with_context(|| {
            let seconds = self.patience.as_secs();
            format!("not everybody was done after {seconds} s: give more --patience")
        })??;
        let mut counted = Vec::with_capacity(self.hosts);
        for runner in runners {
            let ending = tokio::time::timeout(END, runner.end());
            counted.push(ending.await.context("a host did not end")??);
        }
        sum_up(seconds, &counted)
    }

    fn start(&self, host: usize, program: &Path, arguments: Vec<String>) -> Result<Runner> {
        let mut child = Command::new("ip")
            .args(["netns", "exec", &self.net.namespace(host)])
            .arg(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot run `ip netns exec`: install iproute2")?;
        let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("host {host} has no pipes");
        };
        Ok(Runner {
            number: host,
            child,
            input,
            lines: BufReader::new(output).lines(),
        })
    }
}

impl Runner {
    async fn line(&mut self) -> Result<String> {
        let line = self.lines.next_line().await?;
        line.with_context(|| format!("host {} ended early: its error is above", self.number))
    }

    async fn end(mut self) -> Result<Counted> {
        drop(self.input);
        let line = self.lines.next_line().await?;
        let line = line.with_context(|| format!("host {} did not say its count", self.number))?;
        self.child.wait().await?;
        Ok(serde_json::from_str(&line)?)
    }
}

/// Seconds that each host but the first took. All are read, whoever is first.
async fn finish_all(runners: &mut [Runner]) -> Result<Vec<f64>> {
    let mut seconds = Vec::with_capacity(runners.len());
    for runner in runners {
        let done: Done = serde_json::from_str(&runner.line().await?)?;
        if runner.number > 0 {
            seconds.push(done.seconds);
        }
    }
    Ok(seconds)
}

fn sum_up(seconds: Vec<f64>, counted: &[Counted]) -> Result<Finish> {
    let seeder = counted.first().context("nobody had anything")?;
    let Spread { median, min, max } = Spread::of(seconds);
    let peaks = counted.iter().map(|counted| counted.memory_peak_bytes);
    Ok(Finish {
        first_seconds: min,
        median_seconds: median,
        last_seconds: max,
        seeder_bytes: seeder.sent_bytes,
        twice_bytes: counted.iter().map(|counted| counted.twice_bytes).sum(),
        cpu_seconds: counted.iter().map(|counted| counted.cpu_seconds).sum(),
        memory_peak_bytes: peaks.max().unwrap_or(0),
    })
}

/// Bytes that nothing compresses (splitmix64).
fn noise(length: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bytes.extend_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}
