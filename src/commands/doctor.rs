//! `muster doctor`: whether this machine has what Muster needs, line by line, with the way out where it has not.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use muster_protocol::nats_server;

use crate::machine::disk_free;
use muster_monitor::machine::{load_average, memory_available};
use muster_monitor::output::say;
use muster_monitor::text::short;

/// Cores below which the swarm of the quickstart takes its turns on one.
const CORES_MIN: usize = 2;
/// Memory that the quickstart's seven processes take, twice over.
const MEMORY_MIN: u64 = 1 << 30;
/// Room for a run of the quickstart with all its rollouts, several times over.
const DISK_MIN: u64 = 1 << 30;

/// What `doctor` takes.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The nats-server program, instead of the one found
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    /// As it should be.
    Good,
    /// Muster runs without it.
    Lacking,
    /// Muster does not run without it.
    Bad,
}

/// A thing looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Finding {
    what: &'static str,
    state: State,
    found: String,
    way_out: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: String) -> Self {
        Self {
            what,
            state: State::Good,
            found,
            way_out: None,
        }
    }

    fn not(self, state: State, way_out: &str) -> Self {
        let way_out = Some(way_out.to_owned());
        Self {
            state,
            way_out,
            ..self
        }
    }

    fn line(&self) -> String {
        let mark = match self.state {
            State::Good => "ok  ",
            State::Lacking => "note",
            State::Bad => "BAD ",
        };
        let way_out = match &self.way_out {
            Some(way_out) => format!(": {way_out}"),
            None => String::new(),
        };
        format!("{mark} {:<12} {}{way_out}", self.what, self.found)
    }
}

/// Looks at everything.
pub fn run(args: &DoctorArgs) -> Result<()> {
    let here = std::env::current_dir().context("the working directory is not known")?;
    let findings = [
        server(args.nats_server.as_deref(), &crate::machine::project()),
        cores(),
        memory(memory_available()),
        disk(&here),
        ports(),
        python(&here),
    ];
    for finding in &findings {
        say(&if args.json {
            serde_json::to_string(finding)?
        } else {
            finding.line()
        })?;
    }
    let bad: Vec<&str> = findings
        .iter()
        .filter(|finding| finding.state == State::Bad)
        .map(|finding| finding.what)
        .collect();
    if bad.is_empty() {
        return Ok(());
    }
    bail!(
        "Muster does not run here yet ({}): follow the lines marked BAD",
        bad.join(", ")
    )
}

fn server(named: Option<&Path>, here: &Path) -> Finding {
    match nats_server::program(named, here) {
        Ok(path) => Finding::good(
            "nats-server",
            format!("{} ({})", path.display(), version(&path)),
        ),
        // Its own sentence names the way out.
        Err(error) => Finding {
            state: State::Bad,
            ..Finding::good("nats-server", error.to_string())
        },
    }
}

/// What a program says of its version, on one line.
fn version(program: &Path) -> String {
    let ran = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    match ran {
        Ok(output) => {
            muster_monitor::text::printable(String::from_utf8_lossy(&output.stdout).trim(), 80)
        }
        Err(error) => error.to_string(),
    }
}

fn cores() -> Finding {
    let load = load_average().map_or_else(String::new, |load| format!(", load {load:.2}"));
    match available_parallelism() {
        Ok(cores) => {
            let finding = Finding::good("cores", format!("{cores}{load}"));
            if cores.get() < CORES_MIN {
                finding.not(
                    State::Lacking,
                    "the quickstart is measured on 2; expect it to take twice as long",
                )
            } else {
                finding
            }
        }
        Err(error) => Finding::good("cores", format!("not known ({error})")).not(
            State::Lacking,
            "the work is shared out as if there were one",
        ),
    }
}

fn memory(available: Option<u64>) -> Finding {
    let Some(bytes) = available else {
        return Finding::good("memory", "not known".to_owned()).not(
            State::Lacking,
            "see that 1 GB is free before a run is started",
        );
    };
    let finding = Finding::good("memory", format!("{}B available", short(bytes as f64)));
    if bytes < MEMORY_MIN {
        return finding.not(
            State::Bad,
            "a swarm on one machine needs 1 GB: end other programs",
        );
    }
    finding
}

fn disk(here: &Path) -> Finding {
    match disk_free(here) {
        Ok(bytes) => {
            let found = format!("{}B free in {}", short(bytes as f64), here.display());
            let finding = Finding::good("disk", found);
            if bytes < DISK_MIN {
                finding.not(
                    State::Bad,
                    "a run needs 1 GB: free some, or start runs elsewhere with --dir",
                )
            } else {
                finding
            }
        }
        Err(error) => Finding::good("disk", format!("{}: {error}", here.display()))
            .not(State::Bad, "work in a folder that can be used"),
    }
}

/// Whether a process may listen where the members of a local run do.
fn ports() -> Finding {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, 0)) {
        Ok(_) => Finding::good("ports", "free ones on 127.0.0.1".to_owned()),
        Err(error) => Finding::good("ports", format!("none on 127.0.0.1 ({error})")).not(
            State::Bad,
            "allow programs to listen there; members of a run talk over it",
        ),
    }
}

/// The environment that `./setup` makes where no server was on the PATH.
fn python(here: &Path) -> Finding {
    let program = here.join(".venv/bin/python");
    if program.is_file() {
        let found = format!("{} ({})", program.display(), version(&program));
        return Finding::good("python", found);
    }
    Finding::good("python", format!("no .venv in {}", here.display())).not(
        State::Lacking,
        "needed only to fetch a NATS server with ./setup where the PATH has none",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_its_way_out() {
        let folder = tempfile::tempdir().unwrap();
        let nowhere = folder.path().join("nowhere");
        let found = server(Some(&nowhere), folder.path());
        assert_eq!(found.state, State::Bad);
        assert!(found.line().contains("run ./setup"), "{}", found.line());
        assert_eq!(disk(&nowhere).state, State::Bad);
        assert_eq!(memory(Some(1 << 20)).state, State::Bad);
        assert_eq!(memory(None).state, State::Lacking);
        assert_eq!(python(folder.path()).state, State::Lacking);
    }

    #[test]
    fn what_is_there_is_told_in_one_line() {
        assert_eq!(
            memory(Some(8 << 30)).line(),
            "ok   memory       8.59GB available"
        );
        assert_eq!(ports().state, State::Good);
    }
}
