//! What is asked of the operating system: how busy and how large the machine is, who holds a file's lock, and a signal to
//! a process. Figures come from /proc where Linux has them; where it does not, one is missing and never made up.

use std::fs::{self, File};
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
#[cfg(target_os = "linux")]
use nix::sys::prctl::set_thp_disable;
use nix::sys::signal::{Signal, kill};
use nix::sys::statvfs::statvfs;
use nix::unistd::Pid;
use socket2::Socket;
#[cfg(target_os = "linux")]
use socket2::{Domain, SockAddr, SockAddrStorage, Type};

/// Where `/proc/stat` has the time that a hypervisor gave to others, after the word `cpu`.
const STEAL_COLUMN: usize = 7;
/// Columns of `/proc/stat` that add up to all time; those behind them are counted in earlier ones already.
const TIME_COLUMNS: usize = 8;

/// Processes that ran or waited to run, mean of the last minute.
pub(crate) fn load_average() -> Option<f64> {
    let text = fs::read_to_string("/proc/loadavg").ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Time of all processors since the machine started, in the kernel's ticks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CpuTime {
    steal: u64,
    all: u64,
}

impl CpuTime {
    /// Up to now.
    pub(crate) fn now() -> Option<Self> {
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

    /// Share of the time since `before` that a hypervisor gave to others.
    pub(crate) fn steal_since(&self, before: &Self) -> f64 {
        let all = self.all.saturating_sub(before.all);
        self.steal.saturating_sub(before.steal) as f64 / all.max(1) as f64
    }
}

/// Bytes of memory that could be had without swapping.
pub(crate) fn memory_available() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}

/// Most bytes of memory that this process has had.
pub(crate) fn peak_memory() -> Option<u64> {
    let text = fs::read_to_string("/proc/self/status").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1 << 10)
}

/// Asks for memory in small pages. The allocator asks for huge ones, each of which is taken whole when its first byte is
/// written: that made a worker's peak a tenth to twice as large and made nothing faster (measured).
pub(crate) fn small_pages() {
    // A kernel that does not know the request costs memory, nothing else.
    #[cfg(target_os = "linux")]
    set_thp_disable(true).ok();
}

/// A socket that takes every frame that reaches the network device `device` and sends whole ones from it. Each is behind the
/// ten bytes in which the kernel says what is still to be summed (`virtio_net_hdr`). Needs the right to raw sockets.
#[cfg(target_os = "linux")]
pub(crate) fn frames(device: &str) -> io::Result<Socket> {
    let index = fs::read_to_string(format!("/sys/class/net/{device}/ifindex"))?;
    let index = index.trim().parse().map_err(io::Error::other)?;
    let protocol = (libc::ETH_P_ALL as u16).to_be();
    // No protocol at first: else frames of other devices come in before the socket is bound.
    let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
    for option in [libc::PACKET_VNET_HDR, libc::PACKET_IGNORE_OUTGOING] {
        let on: libc::c_int = 1;
        // Safety: the option's value is an integer, which is read during the call.
        #[allow(unsafe_code)]
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_PACKET,
                option,
                (&raw const on).cast(),
                size_of_val(&on) as libc::socklen_t,
            )
        };
        Errno::result(done)?;
    }
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol,
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    let mut storage = SockAddrStorage::zeroed();
    // Safety: any address is a view of the storage, and every bit pattern of this one is valid.
    #[allow(unsafe_code)]
    let address = unsafe {
        *storage.view_as::<libc::sockaddr_ll>() = address;
        SockAddr::new(storage, size_of_val(&address) as libc::socklen_t)
    };
    socket.bind(&address)?;
    Ok(socket)
}

/// Only Linux has such sockets.
#[cfg(not(target_os = "linux"))]
pub(crate) fn frames(_device: &str) -> io::Result<Socket> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Whether a device or a socket had no room left for what was sent.
pub(crate) fn is_full_queue(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}

/// Bytes that an ordinary user may still write where `path` lies.
pub(crate) fn disk_free(path: &Path) -> io::Result<u64> {
    let disk = statvfs(path)?;
    // The types differ between systems.
    #[allow(clippy::unnecessary_cast)]
    Ok((disk.blocks_available() as u64).saturating_mul(disk.fragment_size() as u64))
}

/// Takes a file's lock for as long as this process has the file open; says who has it otherwise. It is gone with the
/// process however that ends, so nothing is left to clean up after a kill.
pub(crate) fn lock_file(file: &File) -> io::Result<Result<(), Option<u32>>> {
    match fcntl(file, FcntlArg::F_SETLK(&whole_file())) {
        Ok(_) => Ok(Ok(())),
        Err(Errno::EACCES | Errno::EAGAIN) => Ok(Err(lock_holder(file)?)),
        Err(error) => Err(error.into()),
    }
}

/// The process that holds a file's lock, if another one does.
pub(crate) fn lock_holder(file: &File) -> io::Result<Option<u32>> {
    let mut lock = whole_file();
    fcntl(file, FcntlArg::F_GETLK(&mut lock))?;
    let is_held = lock.l_type != libc::F_UNLCK as libc::c_short;
    Ok(u32::try_from(lock.l_pid).ok().filter(|_| is_held))
}

/// A writer's lock from the first byte to wherever the file ends.
fn whole_file() -> libc::flock {
    libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    }
}

/// Sends a process what Ctrl-C would send it.
pub(crate) fn interrupt(pid: u32) -> io::Result<()> {
    Ok(kill(Pid::from_raw(pid.cast_signed()), Signal::SIGINT)?)
}

/// The children of a process with the words that they were started with.
pub(crate) fn children_of(pid: u32) -> Vec<(u32, Vec<String>)> {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    let mut children = Vec::new();
    // Each thread has its own children, and one that has just ended has none.
    for thread in threads.filter_map(Result::ok) {
        let list = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for child in list.split_whitespace().filter_map(|pid| pid.parse().ok()) {
            let line = fs::read(format!("/proc/{child}/cmdline")).unwrap_or_default();
            let words = line
                .split(|byte| *byte == 0)
                .filter(|word| !word.is_empty());
            let words = words.map(|word| String::from_utf8_lossy(word).into_owned());
            children.push((child, words.collect()));
        }
    }
    children.sort_unstable();
    children
}

/// Muster's folder, whose `.venv` may hold a NATS server: the working directory, or the one that this program was built
/// in when it is called from elsewhere.
pub fn project() -> PathBuf {
    let has_server = |folder: &Path| folder.join(".venv/bin/nats-server").is_file();
    let here = std::env::current_dir().unwrap_or_default();
    let program = std::env::current_exe().unwrap_or_default();
    let above = program
        .ancestors()
        .skip(1)
        .find(|folder| has_server(folder));
    match above {
        Some(folder) if !has_server(&here) => folder.to_owned(),
        _ => here,
    }
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
