//! Reads the server's log and output for its complaints.

use std::fs;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::Path;

/// The part of a log's end that is searched for a complaint.
const LOG_TAIL_BYTES: u64 = 16 << 10;

pub(super) fn is_port_taken(complaint: &str) -> bool {
    complaint.contains("address already in use")
}

pub(super) fn is_disk_full(complaint: &str) -> bool {
    complaint.contains("no space left on device")
}

/// The end of a log, at most [`LOG_TAIL_BYTES`] and not before `start`. A log shorter than `start` was rotated: it counts
/// from its beginning.
pub(super) fn tail(log: &Path, start: u64) -> io::Result<String> {
    let mut file = fs::File::open(log)?;
    let length = file.metadata()?.len();
    let start = if start > length { 0 } else { start };
    file.seek(SeekFrom::Start(
        start.max(length.saturating_sub(LOG_TAIL_BYTES)),
    ))?;
    let mut tail = Vec::new();
    file.take(LOG_TAIL_BYTES).read_to_end(&mut tail)?;
    Ok(String::from_utf8_lossy(&tail).into_owned())
}

/// The last fatal or error line of a log, without its number, time and level. A line about a client's connection is not the
/// server's complaint, and may quote the client.
pub(super) fn last_complaint(log: &str) -> Option<String> {
    let complaint = |line: &str| {
        let words = line
            .split_once("[FTL]")
            .or_else(|| line.split_once("[ERR]"))?
            .1;
        (!line.contains(" - cid:")).then(|| words.trim().to_owned())
    };
    log.lines().rev().find_map(complaint)
}

/// The last line that the server printed before it opened its log.
pub(super) fn first_words(output: &str) -> Option<String> {
    let line = output
        .lines()
        .rev()
        .find_map(|line| line.strip_prefix("nats-server:"))?;
    Some(line.trim().to_owned())
}
