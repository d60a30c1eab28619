//! `muster doctor`: checks line by line whether this machine can run Muster, and says how to mend what is missing.

mod speed;

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::available_parallelism;

use anyhow::{Context, Result, bail};
use clap::Args;
use serde::Serialize;

use muster_protocol::nats_server;

use self::speed::Speed;
use crate::machine::disk_free;
use muster_monitor::machine::{load_average, memory_available};
use muster_monitor::output::say;
use muster_monitor::text::short;

/// On fewer cores the processes of the quickstart wait for each other.
const CORES_MIN: usize = 2;
/// Twice the memory that the quickstart's seven processes take.
const MEMORY_MIN: u64 = 1 << 30;
/// Several times the size of a run directory of the quickstart with all its rollouts.
const DISK_MIN: u64 = 1 << 30;

#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// The nats-server program to use instead of the one on the PATH or in .venv
    #[arg(long, value_name = "FILE")]
    nats_server: Option<PathBuf>,
    /// Also measure memory, arithmetic and decoding speed; takes a few seconds
    #[arg(long)]
    speed: bool,
    /// Print JSON lines
    #[arg(long)]
    json: bool,
}

/// How much a finding matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Good,
    /// Muster runs, but slower or with less convenience.
    Lacking,
    /// Muster cannot run.
    Bad,
}

/// The result of one check.
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

/// Makes all checks and prints a line for each.
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
    if args.speed {
        let speed = Speed::measure()?;
        say(&if args.json {
            serde_json::to_string(&speed)?
        } else {
            speed.line()
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
        // The error itself says what to do.
        Err(error) => Finding {
            state: State::Bad,
            ..Finding::good("nats-server", error.to_string())
        },
    }
}

/// The program's `--version` output, on one line.
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
        Err(error) => Finding::good("cores", format!("not known ({error})"))
            .not(State::Lacking, "Muster uses one thread"),
    }
}

fn memory(available: Option<u64>) -> Finding {
    let Some(bytes) = available else {
        return Finding::good("memory", "not known".to_owned()).not(
            State::Lacking,
            "check that 1 GB is free before you start a run",
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
                    "a run needs 1 GB: free some space, or choose another disk with --dir",
                )
            } else {
                finding
            }
        }
        Err(error) => Finding::good("disk", format!("{}: {error}", here.display()))
            .not(State::Bad, "change to a folder that exists and can be read"),
    }
}

/// Checks that a process may listen on 127.0.0.1, as the members of a local run do.
fn ports() -> Finding {
    match TcpListener::bind((Ipv4Addr::LOCALHOST, 0)) {
        Ok(_) => Finding::good("ports", "free ones on 127.0.0.1".to_owned()),
        Err(error) => Finding::good("ports", format!("none on 127.0.0.1 ({error})")).not(
            State::Bad,
            "allow programs to listen on 127.0.0.1; the members of a local run connect through it",
        ),
    }
}

/// Checks the Python environment that `./setup` makes if the PATH has no NATS server.
fn python(here: &Path) -> Finding {
    let program = here.join(".venv/bin/python");
    if program.is_file() {
        let found = format!("{} ({})", program.display(), version(&program));
        return Finding::good("python", found);
    }
    Finding::good("python", format!("no .venv in {}", here.display())).not(
        State::Lacking,
        "./setup needs it to fetch a NATS server; not needed if the PATH has one",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_thing_is_named_with_its_remedy() {
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
    fn a_good_finding_is_one_line() {
        assert_eq!(
            memory(Some(8 << 30)).line(),
            "ok   memory       8.59GB available"
        );
        assert_eq!(ports().state, State::Good);
    }
}
