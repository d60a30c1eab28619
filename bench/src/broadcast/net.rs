//! Hosts on one machine: a network namespace each, all on one bridge, each with a link shaped in both directions by token
//! bucket filters. Knows nothing of what runs in them. They are gone when [`Net`] is dropped.

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Most hosts: what the addresses below allow is far more than what a machine can play.
pub(super) const HOSTS_MAX: usize = 256;
/// Longest time that a packet may wait at a full link before it is dropped, as a home router does.
const QUEUE_MS: u64 = 50;
/// Where the hosts are, and how many bits of an address say so.
const SUBNET: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 0);
const SUBNET_BITS: u32 = 16;
/// What a link may catch up on at once, as time at its rate: a filter that is woken later than this has lost the difference.
/// With 6 ms a plain connection alone gets 98.7 % of what a link should carry, with 25 ms all of it.
const BURST_MS: u64 = 25;
/// Least bytes that a filter lets through at once: a few segments as the system hands them over.
const BURST_BYTES_MIN: u64 = 16 << 10;
/// Congestion control of connections that do not ask for one, so that it is not this machine's choice: what Linux ships with.
const CONTROL: &str = "cubic";

/// A host's link.
#[derive(Debug, Clone, Copy)]
pub(super) struct Link {
    pub(super) up_mbit: u64,
    pub(super) down_mbit: u64,
}

/// What carries frames from port to port.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Between {
    /// The kernel, at once.
    Bridge,
    /// Nothing yet: somebody takes them from the ports and puts them there.
    Path,
}

/// The hosts.
#[derive(Debug)]
pub(super) struct Net {
    prefix: String,
    hosts: usize,
}

impl Net {
    /// Builds a host for each link.
    pub(super) fn build(links: &[Link], between: Between) -> Result<Self> {
        let net = Self {
            prefix: format!("muster-{}", std::process::id()),
            hosts: links.len(),
        };
        let switch = net.switch();
        ip(&format!("netns add {switch}")).context(
            "hosts are network namespaces, which need root, and `ip` and `tc` of iproute2",
        )?;
        for host in 0..links.len() {
            ip(&format!("netns add {}", net.namespace(host)))?;
        }
        let mut bridge = vec![
            "link add hub type bridge".to_owned(),
            "link set hub up".to_owned(),
        ];
        for host in 0..links.len() {
            let namespace = net.namespace(host);
            let physical = physical(host);
            let master = match between {
                Between::Bridge => " master hub",
                Between::Path => "",
            };
            let port = port(host);
            bridge.extend([
                format!(
                    "link add {port} type veth peer name up0 address {physical} netns {namespace}"
                ),
                format!("link set {port}{master} up"),
            ]);
        }
        batch("ip", &switch, &bridge)?;
        let down = links.iter().enumerate();
        let down = down.map(|(host, link)| shape(&port(host), link.down_mbit));
        batch("tc", &switch, &down.collect::<Vec<_>>())?;
        for (host, link) in links.iter().enumerate() {
            let namespace = net.namespace(host);
            let address = net.address(host);
            let mut up = vec![
                format!("addr add {address}/{SUBNET_BITS} dev up0"),
                "link set up0 up".to_owned(),
                "link set lo up".to_owned(),
                format!(
                    "route replace {SUBNET}/{SUBNET_BITS} dev up0 src {address} congctl {CONTROL}"
                ),
            ];
            if between == Between::Path {
                // Frames as they would be on a wire, since that is what is delayed and lost.
                up.push("link set up0 gso_max_segs 1".to_owned());
            }
            // Asked for on the links, neighbours of many hosts are more than the system's table takes.
            let others = (0..links.len()).filter(|other| *other != host);
            up.extend(others.map(|other| {
                let (address, physical) = (net.address(other), physical(other));
                format!("neigh add {address} lladdr {physical} dev up0 nud permanent")
            }));
            batch("ip", &namespace, &up)?;
            batch("tc", &namespace, &[shape("up0", link.up_mbit)])?;
        }
        Ok(net)
    }

    /// Where a host is reached.
    pub(super) fn address(&self, host: usize) -> Ipv4Addr {
        let number = host as u32 + 1;
        Ipv4Addr::from(u32::from(SUBNET) + (number / 250) * 256 + number % 250 + 1)
    }

    /// The name of a host's namespace, for `ip netns exec`.
    pub(super) fn namespace(&self, host: usize) -> String {
        format!("{}-{host}", self.prefix)
    }

    /// The name of the namespace in which all [`port`]s are.
    pub(super) fn switch(&self) -> String {
        format!("{}-hub", self.prefix)
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        let hosts = (0..self.hosts).map(|host| self.namespace(host));
        for namespace in hosts.chain([self.switch()]) {
            if let Err(error) = ip(&format!("netns del {namespace}")) {
                tracing::debug!(%error, "a namespace was not removed");
            }
        }
    }
}

/// The end of a host's link that is not in the host.
pub(super) fn port(host: usize) -> String {
    format!("port{host}")
}

/// The physical address of a host.
fn physical(host: usize) -> String {
    let [.., high, low] = host.to_be_bytes();
    format!("02:00:00:00:{high:02x}:{low:02x}")
}

/// The host that a frame is for.
pub(super) fn destination(frame: &[u8]) -> Option<usize> {
    match frame.get(..6)? {
        [2, 0, 0, 0, high, low] => Some(usize::from(u16::from_be_bytes([*high, *low]))),
        _ => None,
    }
}

fn shape(device: &str, mbit: u64) -> String {
    let burst = (mbit.saturating_mul(BURST_MS * 1_000) / 8).max(BURST_BYTES_MIN);
    format!("qdisc add dev {device} root tbf rate {mbit}mbit burst {burst} latency {QUEUE_MS}ms")
}

fn ip(line: &str) -> Result<()> {
    let done = Command::new("ip").args(line.split(' ')).output();
    let done = done.context("cannot run `ip`: install iproute2")?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("`ip {line}` failed: {}", said.trim());
    }
    Ok(())
}

/// Runs many lines of `ip` or `tc` in a namespace.
fn batch(tool: &str, namespace: &str, lines: &[String]) -> Result<()> {
    let mut running = Command::new(tool)
        .args(["-n", namespace, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run `{tool}`: install iproute2"))?;
    if let Some(mut input) = running.stdin.take() {
        input.write_all((lines.join("\n") + "\n").as_bytes())?;
    }
    let done = running.wait_with_output()?;
    if !done.status.success() {
        let said = String::from_utf8_lossy(&done.stderr);
        bail!("`{tool}` in {namespace} failed: {}", said.trim());
    }
    Ok(())
}
