//! What a TCP socket can be asked and told that no library asks it: each option a system call and nothing else.

use std::io;
use std::mem::MaybeUninit;
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

/// The time to the other side and back as the system has measured it so far (`TCP_INFO`): of a new connection, that of its
/// opening packets.
///
/// # Errors
/// When the system refuses.
pub(super) fn round_trip(stream: &TcpStream) -> io::Result<Duration> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the socket is open while `stream` is borrowed, and the system writes at most `length` bytes.
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
    told(done)?;
    // SAFETY: whatever the system did not write is zero, which all of its fields, whole numbers, may be.
    #[allow(unsafe_code)]
    let info = unsafe { info.assume_init() };
    Ok(Duration::from_micros(u64::from(info.tcpi_rtt)))
}

fn told(done: libc::c_int) -> io::Result<()> {
    match done {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;
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
        let (here, there) = pair().await;
        let _open = here;
        let round_trip = round_trip(&there).unwrap();
        assert!(round_trip > Duration::ZERO && round_trip < Duration::from_secs(1));
    }
}
