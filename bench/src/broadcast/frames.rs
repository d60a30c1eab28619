//! Raw frames of a network device, for the path that delays and drops packets between the hosts of a broadcast.

use std::fs;
use std::io;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd;

#[cfg(target_os = "linux")]
use nix::errno::Errno;
use nix::libc;
use socket2::Socket;
#[cfg(target_os = "linux")]
use socket2::{Domain, SockAddr, SockAddrStorage, Type};

/// A socket that takes every frame that reaches the network device `device` and sends whole ones from it. Each is behind the
/// ten bytes in which the kernel says what is still to be summed (`virtio_net_hdr`). Needs the right to raw sockets.
#[cfg(target_os = "linux")]
pub(super) fn frames(device: &str) -> io::Result<Socket> {
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
pub(super) fn frames(_device: &str) -> io::Result<Socket> {
    Err(io::ErrorKind::Unsupported.into())
}

/// Whether a device or a socket had no room left for what was sent.
pub(super) fn is_full_queue(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock || error.raw_os_error() == Some(libc::ENOBUFS)
}
