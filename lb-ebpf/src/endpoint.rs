//! Finding out what an address and port is to the director.

use lb_common::{
    abi::{ENDPOINT_PROBES, EndpointKey, Target, port_protocol},
    addr::{Address, Port},
    proto::Protocol,
    sync::opaque,
};

use crate::tables::{Endpoints, TablesOf};

/// What is known of the endpoint `key`; an empty target when nothing is.
#[inline(always)]
pub fn find<K: EndpointKey>(tables: &impl Endpoints<K>, key: K) -> Target {
    Target(tables.hide(look_up(tables, key, ENDPOINT_PROBES.into()).0))
}

/// [`find`] as a function of its own, for paths that have little stack and much time.
#[inline(never)]
fn find_apart<A: Address>(tables: &impl TablesOf<A>, addr: A, port_protocol: u32) -> Target {
    let key = A::Endpoint::from_raw(addr, port_protocol);
    // Verifier: opaque, for it cannot follow what the compiler else makes of the loop.
    Target(tables.hide(look_up(tables, key, opaque(ENDPOINT_PROBES.into())).0))
}

/// The port of FTP's control connections.
pub const FTP: Port = Port::new(21);
/// The port that FTP servers open data connections from.
pub const FTP_DATA: Port = Port::new(20);
/// Stands for every port of an address that no other endpoint has.
const ANY: Port = Port::new(0);
/// The first port that is none of the system's: clients open FTP's data connections to such.
const UNPRIVILEGED: u16 = 1024;

/// Whether a data connection of FTP may be to this port.
#[inline(always)]
pub fn is_ftp_data(port: Port) -> bool {
    port == FTP_DATA || port.number() >= UNPRIVILEGED
}

/// How a packet has come to a service.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum By {
    /// By the service's own address and port.
    Itself,
    /// As a data connection of the FTP service at its address.
    Ftp,
    /// As one to a port of its address that no other service has.
    All,
    /// By the mark that the packet has.
    Mark,
}

/// What the endpoint at `port` of `addr` is to the director: what it is itself, or else that of the FTP service or the service
/// for all ports that it belongs to (`docs/ipvs.md`, section 2.1).
#[inline(always)]
pub fn serving<A: Address>(tables: &impl TablesOf<A>, addr: A, port: Port, protocol: Protocol) -> (Target, By) {
    let bits = serving_apart(tables, addr, port_protocol(port, protocol));
    let by = match bits >> BY {
        0 => By::Itself,
        1 => By::Ftp,
        // None comes from there by a mark.
        _ => By::All,
    };
    (Target(bits & ((1 << BY) - 1)), by)
}

/// Where [`serving_apart`] says how.
const BY: u32 = 48;

/// [`serving`], as bits. A function of its own: it would else take up stack of its caller.
#[inline(never)]
fn serving_apart<A: Address>(tables: &impl TablesOf<A>, addr: A, port_protocol: u32) -> u64 {
    let itself = find_apart(tables, addr, port_protocol);
    // A service that was here has left connections, not the port.
    if itself.view().is_some() {
        return itself.0;
    }
    let (target, by) = any_port(tables, addr, port_protocol);
    target.0 | (by as u64) << BY
}

/// The FTP service or the service for all ports that a port of `addr`, which no other service has, belongs to: see
/// [`port_protocol`].
#[inline(always)]
pub fn any_port<A: Address>(tables: &impl TablesOf<A>, addr: A, port_protocol: u32) -> (Target, By) {
    const PORT: u32 = 0xffff;
    let at = |port: Port| find_apart(tables, addr, u32::from(port.raw()) | port_protocol & !PORT);
    let port = Port::from_raw((port_protocol & PORT) as u16);
    let mut former = Target::default();
    if port_protocol >> 16 == Protocol::Tcp as u32 && is_ftp_data(port) {
        let ftp = at(FTP);
        if ftp.view().is_some() {
            return (ftp, By::Ftp);
        }
        former = ftp;
    }
    let all = at(ANY);
    if all.is_service() { (all, By::All) } else { (former, By::Ftp) }
}

#[inline(always)]
fn look_up<K: EndpointKey>(tables: &impl Endpoints<K>, key: K, probes: u64) -> Target {
    let buckets = tables.endpoint_buckets();
    let mut index = key.bucket(&tables.seed(), buckets);
    for _ in 0..probes {
        let Some(bucket) = tables.endpoint_bucket(index) else { break };
        for endpoint in &bucket.endpoints {
            if let Some(target) = endpoint.find(key) {
                return target;
            }
        }
        if bucket.endpoints.iter().any(lb_common::abi::Endpoint::is_virgin) {
            break;
        }
        index = (index + 1) & (buckets - 1);
    }
    Target::default()
}
