//! Load, processor time and memory of this machine, from `/proc`. A figure that the system does not give is `None`.

use std::fs;

#[cfg(target_os = "linux")]
use nix::sys::prctl::set_thp_disable;

/// Column of `/proc/stat` after the word `cpu` with the time that a hypervisor gave to other machines.
const STEAL_COLUMN: usize = 7;
/// Columns of `/proc/stat` that add up to all time; later columns are parts of these.
const TIME_COLUMNS: usize = 8;

/// Processes that ran or waited to run, mean of the last minute.
pub fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Time of all processors since the machine started, in the kernel's ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuTime {
    steal: u64,
    all: u64,
}

impl CpuTime {
    pub fn now() -> Option<Self> {
        Self::parse(&fs::read_to_string("/proc/stat").ok()?)
    }

    fn parse(stat: &str) -> Option<Self> {
        let columns = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks = columns.split_whitespace().map(|column| column.parse().ok());
        let ticks: Vec<u64> = ticks.take(TIME_COLUMNS).collect::<Option<_>>()?;
        Some(Self {
            steal: *ticks.get(STEAL_COLUMN)?,
            all: ticks.iter().sum(),
        })
    }

    /// Share of the time since `before` that a hypervisor gave to other machines, from 0 to 1.
    pub fn steal_since(&self, before: &Self) -> f64 {
        let all = self.all.saturating_sub(before.all);
        self.steal.saturating_sub(before.steal) as f64 / all.max(1) as f64
    }
}

/// Bytes of memory available without swapping.
pub fn memory_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}

/// Largest resident memory of this process so far, in bytes.
pub fn peak_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}

/// Turns huge pages off for this process. The allocator asks for them, and the first byte written takes a whole one. They raised
/// a worker's peak memory by 10 to 100 % and did not speed it up.
pub fn small_pages() {
    // A kernel that does not know the request costs memory, nothing else.
    #[cfg(target_os = "linux")]
    set_thp_disable(true).ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steal_is_a_share_of_the_time_between_two_looks() {
        let before = CpuTime::parse("cpu  10 0 10 70 0 0 0 10 5 5\ncpu0 1 2\n").unwrap();
        let after = CpuTime::parse("cpu  40 0 20 100 0 0 0 40 9 9\n").unwrap();
        assert!((after.steal_since(&before) - 0.3).abs() < 1e-12);
        assert_eq!(after.steal_since(&after), 0.0);
    }

    #[test]
    fn a_system_that_counts_otherwise_gives_no_figure() {
        assert_eq!(CpuTime::parse(""), None);
        assert_eq!(CpuTime::parse("cpu  1 2 3"), None);
        assert_eq!(CpuTime::parse("cpu  a b c d e f g h"), None);
    }
}
