//! Processes of this machine as `/proc` shows them: finds them by their parent, signals them, searches their memory.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::harness::Deadline;

/// Bytes of memory read at once.
const CHUNK_BYTES: usize = 1 << 20;
/// Bytes of the smallest page of the supported systems.
const PAGE_BYTES: usize = 4 << 10;

/// A process. Its start time tells it from a later process with the same number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    pub parent: i32,
    pub words: Vec<String>,
    started: u64,
}

impl Process {
    /// The process with a number, if it runs; a zombie does not.
    fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name is in parentheses and may hold any text; the numbers follow the last parenthesis.
        let fields: Vec<&str> = stat.rsplit_once(") ")?.1.split(' ').collect();
        let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let words = line
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned());
        let process = Self {
            pid,
            parent: fields.get(1)?.parse().ok()?,
            words: words.collect(),
            started: fields.get(19)?.parse().ok()?,
        };
        let state = *fields.first()?;
        (state != "Z" && state != "X").then_some(process)
    }

    pub fn runs(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.started == self.started)
    }

    pub fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.pid), signal)
            .unwrap_or_else(|error| panic!("{signal} does not reach {self:?}: {error}"));
    }

    /// Names of the members whose secrets are in its memory, as bytes or as hexadecimal digits.
    pub fn secrets_held(&self, secrets: &BTreeMap<String, [u8; 32]>) -> Vec<String> {
        let search = Search::of(secrets);
        let pid = self.pid;
        let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
        let mut memory = fs::File::open(format!("/proc/{pid}/mem"))
            .unwrap_or_else(|error| panic!("the memory of a child cannot be read ({error})"));
        let mut present = fs::File::open(format!("/proc/{pid}/pagemap")).unwrap();
        let mut held = BTreeSet::new();
        let mut chunk = vec![0u8; CHUNK_BYTES];
        for line in maps.lines().filter(|line| line.contains(" rw")) {
            let range = line.split(' ').next().unwrap();
            let (start, end) = range.split_once('-').unwrap();
            let mut at = u64::from_str_radix(start, 16).unwrap();
            let end = u64::from_str_radix(end, 16).unwrap();
            while at < end {
                let length = CHUNK_BYTES.min((end - at) as usize);
                if !any_page_present(&mut present, at, length) {
                    at += length as u64;
                    continue;
                }
                memory.seek(SeekFrom::Start(at)).unwrap();
                // A page that was freed since then is read as empty.
                let read = memory.read(&mut chunk[..length]).unwrap_or(0);
                search.add_found(&chunk[..read], &mut held);
                // Chunks overlap, so that a secret across an edge is seen.
                at += length.saturating_sub(64).max(1).min(length) as u64;
                if length < CHUNK_BYTES {
                    break;
                }
            }
        }
        held.into_iter().collect()
    }
}

/// Whether any page of a range is in memory: allocators reserve far more than they touch.
fn any_page_present(pagemap: &mut fs::File, start: u64, length: usize) -> bool {
    let pages = length.div_ceil(PAGE_BYTES) + 1;
    let mut entries = vec![0u8; 8 * pages];
    pagemap
        .seek(SeekFrom::Start(start / PAGE_BYTES as u64 * 8))
        .unwrap();
    let read = pagemap.read(&mut entries).unwrap_or(0);
    // The two highest bits of an entry: in memory, or swapped out.
    entries[..read].chunks(8).any(|entry| entry[7] & 0xc0 != 0)
}

/// Secrets to look for in one pass, by their first two bytes.
struct Search {
    needles: Vec<(String, Vec<u8>)>,
    begins: Vec<bool>,
}

impl Search {
    fn of(secrets: &BTreeMap<String, [u8; 32]>) -> Self {
        let mut needles = Vec::new();
        let mut begins = vec![false; 1 << 16];
        for (name, secret) in secrets {
            for needle in [secret.to_vec(), hex::encode(secret).into_bytes()] {
                begins[usize::from(u16::from_le_bytes([needle[0], needle[1]]))] = true;
                needles.push((name.clone(), needle));
            }
        }
        Self { needles, begins }
    }

    fn add_found(&self, bytes: &[u8], found: &mut BTreeSet<String>) {
        for (at, pair) in bytes.windows(2).enumerate() {
            if !self.begins[usize::from(u16::from_le_bytes([pair[0], pair[1]]))] {
                continue;
            }
            for (name, needle) in &self.needles {
                if bytes[at..].starts_with(needle) {
                    found.insert(name.clone());
                }
            }
        }
    }
}

/// The processes that a process has started.
pub fn children_of(parent: i32) -> Vec<Process> {
    let entries = fs::read_dir("/proc").unwrap();
    let numbers = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    numbers
        .filter_map(Process::of)
        .filter(|process| process.parent == parent)
        .collect()
}

/// Waits until no process of the list runs.
pub fn wait_until_gone(processes: &[Process], limit: Duration) {
    let deadline = Deadline::after(limit);
    loop {
        let left: Vec<&Process> = processes.iter().filter(|process| process.runs()).collect();
        if left.is_empty() {
            return;
        }
        deadline.pause(|| format!("still running: {left:?}"));
    }
}
