//! What a TCP socket can be asked and told that no library asks it: each option a system call and nothing else.

use std::io;
use std::os::fd::AsRawFd;
use std::time::Duration;

use nix::libc;
use tokio::net::TcpStream;

/// Has the system wake a reader only once so many bytes are there, or no more will come (`SO_RCVLOWAT`).
///
/// # Errors
/// When the system refuses.
pub(super) fn set_wakes_at(stream: &TcpStream, bytes: u32) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the socket is open while `stream` is borrowed, and the value is an int of the length that is given.
    #[allow(unsafe_code)]
    let done = unsafe {
        libc::setsockopt(
            stream.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    told(done)
}

/// Place of the shortest round trip (`tcpi_min_rtt`, µs) among the numbers of 32 bits of the system's `struct tcp_info`, which is
/// only ever longer in newer systems.
const MIN_RTT: usize = 37;

/// The shortest time to the other side and back that the system has measured lately (`TCP_INFO`): what waits in queues made the
/// others longer. `None` from a system that does not say.
pub(super) fn shortest_round_trip(stream: &TcpStream) -> Option<Duration> {
    let mut info = [0u32; MIN_RTT + 1];
    let mut length = size_of_val(&info) as libc::socklen_t;
    // SAFETY: the socket is open while `stream` is borrowed, and the system writes at most `length` bytes, of which any are
    // numbers.
    #[allow(unsafe_code)]
    let done = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            info.as_mut_ptr().cast(),
            &raw mut length,
        )
    };
    let is_whole = done == 0 && length as usize == size_of_val(&info);
    // All ones before anything was measured.
    let measured = info
        .last()
        .filter(|micros| is_whole && **micros != u32::MAX);
    measured.map(|micros| Duration::from_micros(u64::from(*micros)))
}

fn told(done: libc::c_int) -> io::Result<()> {
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use super::*;

    async fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).await;
        (dialled.unwrap(), listener.accept().await.unwrap().0)
    }

    /// The second is woken at a hundred bytes, and waits: a new socket is taken for ready until it was tried.
    async fn waiting_pair() -> (TcpStream, TcpStream) {
        let (here, there) = pair().await;
        set_wakes_at(&there, 100).unwrap();
        assert!(there.try_read(&mut [0]).is_err());
        (here, there)
    }

    #[tokio::test]
    async fn a_reader_is_woken_by_enough_bytes_or_the_end_and_not_by_fewer() {
        let (mut here, there) = waiting_pair().await;
        let brief = Duration::from_millis(50);
        here.write_all(&[0; 99]).await.unwrap();
        assert!(timeout(brief, there.readable()).await.is_err());
        here.write_all(&[0; 1]).await.unwrap();
        there.readable().await.unwrap();

        let (mut here, there) = waiting_pair().await;
        here.write_all(&[0; 10]).await.unwrap();
        here.shutdown().await.unwrap();
        there.readable().await.unwrap();
    }

    #[tokio::test]
    async fn the_time_within_a_machine_is_short() {
        let (mut here, mut there) = pair().await;
        here.write_all(&[0; 10_000]).await.unwrap();
        there.read_exact(&mut [0; 10_000]).await.unwrap();
        let round_trip = shortest_round_trip(&here).unwrap();
        assert!(round_trip > Duration::ZERO && round_trip < Duration::from_secs(1));
    }
}
