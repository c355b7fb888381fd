//! Clients and real servers that speak a small protocol over real sockets.
//!
//! A request is the number of bytes that are wanted (eight bytes, big endian), then any bytes, up to the end of the stream
//! or datagram. The answer is the number of the server (one byte), a digest of the bytes of the request (eight bytes, big
//! endian), and as many bytes as were wanted, of which each side knows what they are.
//!
//! Not every kernel has SCTP, so its packets are made here: one with an INIT that carries the request, one with an INIT ACK
//! that carries the answer.

use std::{
    hash::{DefaultHasher, Hasher as _},
    io::{ErrorKind, Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU16, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lb_common::sctp::chunk;
use nix::sys::{
    socket::{
        self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, recvfrom, sendto,
        setsockopt, socket, sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};

use crate::{frames::sctp, lab::NetNs};

/// How long a client waits for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// How long a server waits before it looks whether it is to end.
const TURN: Duration = Duration::from_millis(50);
/// The largest datagram of the tests, with room to spare.
const DATAGRAM: usize = 4096;

/// `len` bytes that everybody knows.
pub fn pattern(len: usize) -> Vec<u8> {
    (0u32..).map(|i| (i.wrapping_mul(0x9e37_79b1) >> 24) as u8).take(len).collect()
}

fn digest(bytes: &[u8]) -> [u8; 8] {
    let mut hasher = DefaultHasher::new();
    hasher.write(bytes);
    hasher.finish().to_be_bytes()
}

fn answer(number: u8, request: &[u8]) -> Option<Vec<u8>> {
    let (wanted, sent) = request.split_first_chunk()?;
    Some([&[number], &digest(sent)[..], &pattern(u64::from_be_bytes(*wanted) as usize)].concat())
}

fn request(sent: &[u8], wanted: usize) -> Vec<u8> {
    [&(wanted as u64).to_be_bytes(), sent].concat()
}

/// The number of the server that gave this answer.
fn check(answer: &[u8], sent: &[u8], wanted: usize) -> Result<u8> {
    let (number, rest) = answer.split_first().context("an empty answer")?;
    let (seen, got) = rest.split_first_chunk::<8>().context("a short answer")?;
    ensure!(*seen == digest(sent), "the server got other bytes than were sent");
    ensure!(got.len() == wanted, "{} bytes came instead of {wanted}", got.len());
    ensure!(got == pattern(wanted), "other bytes came than the server sent");
    Ok(*number)
}

/// A real server. It ends when this is dropped.
#[derive(Debug)]
pub struct Server {
    end: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Server {
    /// Starts a server for TCP, UDP and SCTP that calls itself `number`, at this address of a namespace. It is the one that
    /// clients get answers to datagrams from.
    ///
    /// # Errors
    ///
    /// When the address cannot be had.
    pub fn start(namespace: &NetNs, address: SocketAddr, number: u8) -> Result<Self> {
        let (listener, socket, raw) = namespace.enter(|| {
            let raw = sctp_socket(address, TURN)?;
            bind(raw.as_raw_fd(), &host(address))?;
            anyhow::Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?, raw))
        })??;
        listener.set_nonblocking(true)?;
        socket.set_read_timeout(Some(TURN))?;
        let end = Arc::new(AtomicBool::new(false));
        let (tcp_end, udp_end, sctp_end) = (Arc::clone(&end), Arc::clone(&end), Arc::clone(&end));
        let tcp = thread::spawn(move || serve_streams(&listener, number, &tcp_end));
        let udp = thread::spawn(move || serve_datagrams(&socket, number, &udp_end));
        let sctp = thread::spawn(move || serve_associations(&raw, address, number, &sctp_end));
        Ok(Self { end, threads: vec![tcp, udp, sctp] })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A server that panicked has failed its clients, who say so.
            let _ = thread.join();
        }
    }
}

fn serve_streams(listener: &TcpListener, number: u8, end: &AtomicBool) {
    while !end.load(Ordering::Relaxed) {
        match listener.accept() {
            Ok((stream, _)) => {
                thread::spawn(move || serve_stream(stream, number));
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => thread::sleep(Duration::from_millis(1)),
            Err(error) => panic!("accept: {error}"),
        }
    }
}

/// Serves one client. What goes wrong is the client's to notice.
fn serve_stream(mut stream: TcpStream, number: u8) -> Option<()> {
    stream.set_nonblocking(false).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    let mut request = Vec::new();
    stream.read_to_end(&mut request).ok()?;
    stream.write_all(&answer(number, &request)?).ok()
}

fn serve_datagrams(socket: &UdpSocket, number: u8, end: &AtomicBool) {
    let mut buffer = [0; DATAGRAM];
    while !end.load(Ordering::Relaxed) {
        if let Ok((len, client)) = socket.recv_from(&mut buffer)
            && let Some(answer) = answer(number, &buffer[..len])
        {
            // A client that is gone needs no answer.
            let _ = socket.send_to(&answer, client);
        }
    }
}

/// A socket for SCTP packets of the family of `address`, which waits for none longer than `patience`.
fn sctp_socket(address: SocketAddr, patience: Duration) -> Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::Sctp)?;
    let patience = TimeVal::milliseconds(i64::try_from(patience.as_millis())?);
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    Ok(socket)
}

/// The host in an address: raw sockets know no ports.
fn host(address: SocketAddr) -> SockaddrStorage {
    SockaddrStorage::from(SocketAddr::new(address.ip(), 0))
}

/// The ports of an intact SCTP packet that begins with a chunk of this type, and what the chunk carries.
fn carried(packet: &[u8], kind: u8) -> Option<([u16; 2], &[u8])> {
    let (header, _) = packet.split_first_chunk::<16>()?;
    let word = |place: usize| u16::from_be_bytes([header[place], header[place + 1]]);
    let value = packet.get(16..usize::from(word(14)) + 12)?;
    let ports = [word(0), word(2)];
    (packet == sctp(ports[0], ports[1], &[(kind, value)])).then_some((ports, value))
}

/// The next SCTP packet that comes, if one does, with the address of its sender.
fn next_packet(socket: &OwnedFd, buffer: &mut [u8]) -> Option<(usize, usize, SockaddrStorage)> {
    let (len, sender) = recvfrom::<SockaddrStorage>(socket.as_raw_fd(), buffer).ok()?;
    let sender = sender?;
    // IPv4 shows its header.
    let start = if sender.as_sockaddr_in().is_some() { usize::from(buffer[0] & 0xf) * 4 } else { 0 };
    Some((start, len, sender))
}

fn serve_associations(socket: &OwnedFd, address: SocketAddr, number: u8, end: &AtomicBool) {
    let mut buffer = [0; DATAGRAM];
    while !end.load(Ordering::Relaxed) {
        if let Some((start, len, mut client)) = next_packet(socket, &mut buffer)
            && let Some(([from, to], request)) = carried(&buffer[start..len], chunk::INIT)
            && to == address.port()
            && let Some(answer) = answer(number, request)
        {
            if let Some(client6) = client.as_sockaddr_in6() {
                client = host(SocketAddr::new(client6.ip().into(), 0));
            }
            // A client that is gone needs no answer.
            let packet = sctp(to, from, &[(chunk::INIT_ACK, &answer)]);
            let _ = sendto(socket.as_raw_fd(), &packet, &client, MsgFlags::empty());
        }
    }
}

/// Asks a service with one SCTP packet from a port of its own. Returns the number of the server.
///
/// To be called in the client's namespace.
///
/// # Errors
///
/// When no answer comes, or a byte is not what it should be.
pub fn ask_sctp(service: SocketAddr, sent: &[u8], wanted: usize) -> Result<u8> {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    let port = NEXT.fetch_add(1, Ordering::Relaxed);
    let socket = sctp_socket(service, PATIENCE)?;
    socket::connect(socket.as_raw_fd(), &host(service))?;
    let packet = sctp(port, service.port(), &[(chunk::INIT, &request(sent, wanted))]);
    sendto(socket.as_raw_fd(), &packet, &host(service), MsgFlags::empty()).context("send the request")?;
    let mut buffer = [0; DATAGRAM];
    let (start, len, _) = next_packet(&socket, &mut buffer).context("wait for the answer")?;
    let (ports, answer) = carried(&buffer[start..len], chunk::INIT_ACK).context("a broken answer")?;
    ensure!(ports == [service.port(), port], "an answer between the ports {ports:?}");
    check(answer, sent, wanted)
}

/// Asks a service over one TCP connection: sends `sent`, wants `wanted` bytes. Returns the number of the server.
///
/// To be called in the client's namespace.
///
/// # Errors
///
/// When the connection does not come about, or a byte is not what it should be.
pub fn ask_tcp(service: SocketAddr, sent: &[u8], wanted: usize) -> Result<u8> {
    ask_on(connect(unspecified(service), service)?, sent, wanted)
}

/// [`ask_tcp`] from this address of the client.
///
/// # Errors
///
/// When the connection does not come about, or a byte is not what it should be.
pub fn ask_tcp_from(client: IpAddr, service: SocketAddr, sent: &[u8], wanted: usize) -> Result<u8> {
    ask_on(connect(client, service)?, sent, wanted)
}

/// Connects to a service from this address of the client. Neither side of the stream waits forever.
///
/// # Errors
///
/// When the address is not the client's, or the connection does not come about.
pub(crate) fn connect(client: IpAddr, service: SocketAddr) -> Result<TcpStream> {
    let family = if service.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let stream = socket::socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    // It holds for connecting, too.
    setsockopt(&stream, sockopt::SendTimeout, &TimeVal::seconds(PATIENCE.as_secs().cast_signed()))?;
    socket::bind(stream.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(client, 0))).context("take the address")?;
    socket::connect(stream.as_raw_fd(), &SockaddrStorage::from(service)).context("connect")?;
    let stream = TcpStream::from(stream);
    stream.set_read_timeout(Some(PATIENCE))?;
    Ok(stream)
}

const fn unspecified(service: SocketAddr) -> IpAddr {
    if service.is_ipv4() { IpAddr::V4(Ipv4Addr::UNSPECIFIED) } else { IpAddr::V6(Ipv6Addr::UNSPECIFIED) }
}

fn ask_on(mut stream: TcpStream, sent: &[u8], wanted: usize) -> Result<u8> {
    stream.write_all(&request(sent, wanted)).context("send the request")?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).context("read the answer")?;
    check(&answer, sent, wanted)
}

/// Asks a service with one datagram from a port of its own. Returns the number of the server.
///
/// To be called in the client's namespace.
///
/// # Errors
///
/// When no answer comes, or a byte is not what it should be.
pub fn ask_udp(service: SocketAddr, sent: &[u8], wanted: usize) -> Result<u8> {
    ask_by(&udp_socket(service)?, sent, wanted)
}

/// [`ask_udp`] from this address of the client.
///
/// # Errors
///
/// When no answer comes, or a byte is not what it should be.
pub fn ask_udp_from(client: IpAddr, service: SocketAddr, sent: &[u8], wanted: usize) -> Result<u8> {
    ask_by(&udp_socket_from(client, service)?, sent, wanted)
}

/// A socket that speaks to a service, from a port of its own in the namespace of the caller.
///
/// # Errors
///
/// When there is none to be had.
pub fn udp_socket(service: SocketAddr) -> Result<UdpSocket> {
    udp_socket_from(unspecified(service), service)
}

fn udp_socket_from(client: IpAddr, service: SocketAddr) -> Result<UdpSocket> {
    let socket = UdpSocket::bind((client, 0))?;
    socket.connect(service)?;
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(socket)
}

/// [`ask_udp`] by a socket that may have asked before. A packet that is lost is not sent again.
///
/// # Errors
///
/// When no answer comes, or a byte is not what it should be.
pub fn ask_by(socket: &UdpSocket, sent: &[u8], wanted: usize) -> Result<u8> {
    socket.send(&request(sent, wanted)).context("send the request")?;
    let mut answer = [0; DATAGRAM];
    let len = socket.recv(&mut answer).context("wait for the answer")?;
    check(&answer[..len], sent, wanted)
}
