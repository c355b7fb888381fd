//! From the words of an ipvsadm command line to what is to be done (`docs/ipvs.md`, sections 10.1 to 10.5).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use lb_common::proto::{Method, Scheduler, sched_flag};
use lb_userspace::control::model::{Netmask, Transport};

use super::{
    Stop,
    names::Names,
    options::{self, Command, DEFINITIONS, Kind, Kinds, Tag, Tunnel},
    popt::{Bad, Given, Reader},
};

/// Longest timeout, in seconds: 31 days.
const MAX_TIMEOUT: i64 = 86_400 * 31;
/// The timeout of a persistent service that none is given for, in seconds.
const PERSISTENT_TIMEOUT: u32 = 360;
/// Bytes of a scheduler's name that are kept.
const SCHEDULER_NAME: usize = 15;
/// The scheduler of a service that none is given for.
const DEFAULT_SCHEDULER: &str = "wlc";

/// What a command line says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Parsed {
    Help,
    Version,
    Run(Box<Request>),
    /// The options are none: what is said about that.
    Unreadable(String),
}

/// What tells services apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Identity {
    /// Packets to this address and port.
    Address(Transport, SocketAddr),
    /// Packets with this firewall mark.
    Mark(u32),
}

/// What is to be done, with what.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Request {
    pub(super) command: Command,
    /// The kinds of options given.
    pub(super) kinds: Kinds,
    pub(super) service: Option<Identity>,
    /// Whether the service is one of IPv6.
    pub(super) ipv6: bool,
    pub(super) scheduler: String,
    /// Flags of the scheduler, [`sched_flag`].
    pub(super) sched_flags: u32,
    /// How long clients are remembered, in seconds, if the service is persistent.
    pub(super) persistence: Option<u32>,
    /// Which clients are taken for one, if not each for itself.
    pub(super) netmask: Option<Netmask>,
    /// The real server, whose port is the service's unless the method translates it.
    pub(super) server: Option<SocketAddr>,
    pub(super) method: Method,
    pub(super) tunnel: Tunnel,
    pub(super) weight: u32,
    /// Upper and lower threshold, 0 for none.
    pub(super) thresholds: [u32; 2],
    /// tcp, tcpfin and udp timeout in seconds, 0 to leave one as it is.
    pub(super) timeouts: [u32; 3],
}

/// Makes sense of the words after the program's name.
///
/// # Errors
///
/// What ipvsadm says, and its exit code.
pub(super) fn parse(program: &str, words: &[String], names: &dyn Names) -> Result<Parsed, Stop> {
    if words.is_empty() {
        return parse(program, &["-L".to_owned()], names);
    }
    let try_help = || try_help(program);
    let mut reader = Reader::new(&DEFINITIONS, words);
    let first = reader.option().and_then(Result::ok).ok_or_else(try_help)?;
    let command = match first.tag {
        Tag::Help => return Ok(Parsed::Help),
        Tag::Version => return Ok(Parsed::Version),
        Tag::Command(command) => command,
        _ => return Err(try_help()),
    };
    check_daemon_role(command, first.argument.as_deref())?;
    let mut line = Line::new(command, names);
    while let Some(option) = reader.option() {
        match option {
            Ok(option) => line.take(&option)?,
            Err(Bad(word, text)) => return Ok(Parsed::Unreadable(format!("{word}: {text}"))),
        }
    }
    let mut leftover = reader.leftover().iter();
    if command == Command::Timeouts {
        for timeout in &mut line.request.timeouts {
            let word = leftover.next().ok_or_else(|| Stop::misuse("--set option requires 3 timeout values"))?;
            *timeout = timeout_value(word, 0)?;
        }
    }
    if let Some(word) = leftover.next() {
        return Err(Stop::misuse(format!("unexpected argument {word}")));
    }
    line.finish().map(|request| Parsed::Run(Box::new(request)))
}

/// What is said about a line that is no command.
pub(super) fn try_help(program: &str) -> Stop {
    Stop::refusal(format!("Try `{program} -h' or '{program} --help' for more information."))
}

fn check_daemon_role(command: Command, role: Option<&str>) -> Result<(), Stop> {
    let text = match command {
        Command::StartDaemon => "illegal start-daemon parameter specified",
        Command::StopDaemon => "illegal start_daemon specified",
        _ => return Ok(()),
    };
    match role {
        Some("master" | "backup") => Ok(()),
        _ => Err(Stop::misuse(text)),
    }
}

/// A command line as far as it has been read.
struct Line<'a> {
    request: Request,
    names: &'a dyn Names,
    /// Whether an address of the service known so far is an IPv6 address.
    ipv6: bool,
    /// The port of the service known so far.
    port: u16,
    sched_flags: String,
}

impl<'a> Line<'a> {
    fn new(command: Command, names: &'a dyn Names) -> Self {
        let request = Request {
            command,
            kinds: Kinds::default(),
            service: None,
            ipv6: false,
            scheduler: String::new(),
            sched_flags: 0,
            persistence: None,
            netmask: None,
            server: None,
            method: Method::Route,
            tunnel: Tunnel::Ipip,
            weight: 1,
            thresholds: [0; 2],
            timeouts: [0; 3],
        };
        Self { request, names, ipv6: false, port: 0, sched_flags: String::new() }
    }

    fn take(&mut self, option: &Given<Tag>) -> Result<(), Stop> {
        let value = option.argument.as_deref().unwrap_or_default();
        match option.tag {
            Tag::Command(_) | Tag::Help | Tag::Version => {
                Err(Stop::misuse(format!("invalid option `{}'", option.word)))
            }
            Tag::TcpService => self.service(Transport::Tcp, value),
            Tag::UdpService => self.service(Transport::Udp, value),
            Tag::SctpService => self.service(Transport::Sctp, value),
            Tag::Mark => self.mark(value),
            Tag::Ipv6 if matches!(self.request.service, Some(Identity::Mark(_))) => {
                self.becomes_ipv6();
                Ok(())
            }
            Tag::Ipv6 => Err(Stop::misuse("-6 used before -f\n")),
            Tag::Gatewaying => self.forward(Method::Route),
            Tag::Masquerading => self.forward(Method::Masq),
            Tag::Tunneling => self.forward(Method::Tunnel),
            Tag::Sort => Ok(()),
            Tag::Kind(kind) => {
                self.request.kinds.add(kind)?;
                self.valued(kind, option.argument.as_deref())
            }
        }
    }

    fn service(&mut self, transport: Transport, value: &str) -> Result<(), Stop> {
        self.request.kinds.add(Kind::Service)?;
        let (address, port) = host_and_port(value, Some(transport), self.names)
            .ok_or_else(|| Stop::misuse("illegal virtual server address[:port] specified"))?;
        self.port = port.unwrap_or(0);
        if address.is_ipv6() {
            self.becomes_ipv6();
        }
        self.request.service = Some(Identity::Address(transport, SocketAddr::new(address, self.port)));
        Ok(())
    }

    /// The service is one of IPv6. A netmask that came before was none for it, and is forgotten.
    fn becomes_ipv6(&mut self) {
        self.ipv6 = true;
        self.request.netmask = None;
    }

    fn mark(&mut self, value: &str) -> Result<(), Stop> {
        self.request.kinds.add(Kind::Service)?;
        let mark = number(value).and_then(|mark| u32::try_from(mark).ok()).filter(|mark| *mark != 0);
        let mark = mark.ok_or_else(|| Stop::misuse(format!("invalid fwmark value `{value}' specified")))?;
        self.request.service = Some(Identity::Mark(mark));
        Ok(())
    }

    fn forward(&mut self, method: Method) -> Result<(), Stop> {
        self.request.kinds.add(Kind::Forward)?;
        self.request.method = method;
        Ok(())
    }

    /// Takes an option's value. What is only looked at belongs to something xdpvs does not do.
    fn valued(&mut self, kind: Kind, argument: Option<&str>) -> Result<(), Stop> {
        let value = argument.unwrap_or_default();
        let request = &mut self.request;
        let within = |lowest: i64, highest: i64, text: &str| {
            let found = number(value).filter(|number| (lowest..=highest).contains(number));
            found.and_then(|number| u32::try_from(number).ok()).ok_or_else(|| Stop::misuse(text))
        };
        match kind {
            Kind::Scheduler => {
                let end =
                    value.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= SCHEDULER_NAME);
                request.scheduler = value[..end.last().unwrap_or(0)].to_owned();
            }
            Kind::Persistent => {
                let timeout = argument.map_or(Ok(PERSISTENT_TIMEOUT), |value| timeout_value(value, 1))?;
                request.persistence = Some(timeout);
            }
            Kind::Netmask if self.ipv6 => {
                let length = within(1, 128, "illegal ipv6 netmask specified")?;
                request.netmask = Some(Netmask::V6(length as u8));
            }
            Kind::Netmask => {
                let mask = inet_aton(value)
                    .or_else(|| self.names.host(value))
                    .ok_or_else(|| Stop::misuse("illegal virtual server persistent mask specified"))?;
                request.netmask = Some(Netmask::V4(mask));
            }
            Kind::SchedFlags => value.clone_into(&mut self.sched_flags),
            Kind::Server => {
                // As long as there is no service, ports have no names.
                let transport = request.service.map(|service| match service {
                    Identity::Address(transport, _) => transport,
                    Identity::Mark(_) => Transport::Tcp,
                });
                let (address, port) = host_and_port(value, transport, self.names)
                    .ok_or_else(|| Stop::misuse("illegal real server address[:port] specified"))?;
                request.server = Some(SocketAddr::new(address, port.unwrap_or(self.port)));
            }
            Kind::Weight => request.weight = within(0, i32::MAX.into(), "illegal weight specified")?,
            Kind::Upper => request.thresholds[0] = within(0, i32::MAX.into(), "illegal u_threshold specified")?,
            Kind::Lower => request.thresholds[1] = within(0, i32::MAX.into(), "illegal l_threshold specified")?,
            Kind::TunType => {
                request.tunnel = match value {
                    "ipip" => Tunnel::Ipip,
                    "gue" => Tunnel::Gue,
                    "gre" => Tunnel::Gre,
                    _ => return Err(Stop::misuse("illegal tunnel type specified")),
                }
            }
            Kind::TunPort => {
                within(1, 65_535, "illegal tunnel port specified")?;
            }
            Kind::SyncId => {
                within(0, 255, "illegal syncid specified")?;
            }
            Kind::SyncMaxLen => {
                within(1, 65_507, "illegal sync-maxlen specified")?;
            }
            Kind::McastPort => {
                within(1, 65_535, "illegal mcast-port specified")?;
            }
            Kind::McastTtl => {
                within(1, 255, "illegal mcast-ttl specified")?;
            }
            Kind::McastGroup => check_group(value)?,
            _ => {}
        }
        Ok(())
    }

    /// Looks at the line as a whole.
    fn finish(mut self) -> Result<Request, Stop> {
        let request = &mut self.request;
        request.ipv6 = self.ipv6;
        request.sched_flags = flags_of(&request.scheduler, &self.sched_flags)?;
        options::check_command(request.command, request.kinds)?;
        match request.command {
            Command::Add | Command::Edit => finish_service(request)?,
            Command::AddDest | Command::EditDest => finish_server(request, self.ipv6)?,
            Command::List => check_list(request.kinds)?,
            _ => {}
        }
        Ok(self.request)
    }
}

/// The flags that these words name, of the scheduler that has been named, if one has.
fn flags_of(scheduler: &str, words: &str) -> Result<u32, Stop> {
    let mut flags = 0;
    for word in words.split(',').filter(|word| !word.is_empty()) {
        let find = |names: &[(&str, u32)]| names.iter().find(|(name, _)| *name == word).map(|(_, flag)| *flag);
        let of_any = |scheduler| find(sched_flag::names(scheduler));
        let of_this = Scheduler::from_name(scheduler).and_then(of_any);
        flags |= match of_this.or_else(|| find(sched_flag::GENERIC)) {
            Some(flag) => flag,
            None if of_any(Scheduler::Sh).or(of_any(Scheduler::Mh)).is_some() => {
                return Err(Stop::misuse(format!("incompatible scheduler flag `{word}'")));
            }
            None => return Err(Stop::misuse(format!("invalid scheduler flag `{word}'"))),
        };
    }
    Ok(flags)
}

fn finish_service(request: &mut Request) -> Result<(), Stop> {
    if let Some(Identity::Address(transport, address)) = request.service {
        if address.port() == 0 && !request.kinds.has(Kind::Persistent) {
            return Err(Stop::misuse("Zero port specified for non-persistent service"));
        }
        if request.kinds.has(Kind::Ops) && transport != Transport::Udp {
            return Err(Stop::misuse("One-Packet Scheduling is only for UDP virtual services"));
        }
    }
    if request.scheduler.is_empty() {
        DEFAULT_SCHEDULER.clone_into(&mut request.scheduler);
    }
    Ok(())
}

fn finish_server(request: &mut Request, ipv6: bool) -> Result<(), Stop> {
    use Kind::{TunCsum, TunNoCsum, TunPort, TunRemCsum, TunType};
    if let Some(server) = &mut request.server {
        if let Some(Identity::Address(_, service)) = request.service
            && request.method != Method::Masq
        {
            server.set_port(service.port());
        }
        if server.is_ipv6() != ipv6 && request.method != Method::Tunnel {
            return Err(Stop::misuse("Different address family is allowed only for tunneling servers"));
        }
    }
    if request.method == Method::Tunnel {
        options::check_tunnel(request.tunnel, request.kinds)
    } else if request.kinds.has_any(&[TunType, TunPort, TunNoCsum, TunCsum, TunRemCsum]) {
        Err(Stop::misuse("Tunnel options conflict with forward method"))
    } else {
        Ok(())
    }
}

fn check_list(kinds: Kinds) -> Result<(), Stop> {
    use Kind::{Connection, Daemon, PersistentConn, Rate, Stats, Thresholds, Timeout};
    let conflict = kinds.has_any(&[Connection, Timeout, Daemon]) && kinds.has_any(&[Stats, Rate, Thresholds])
        || kinds.has_any(&[Timeout, Daemon]) && kinds.has(PersistentConn);
    if conflict { Err(Stop::misuse("options conflicts in the list command")) } else { Ok(()) }
}

fn check_group(value: &str) -> Result<(), Stop> {
    if let Ok(address) = value.parse::<Ipv6Addr>() {
        let text = || Stop::misuse(format!("invalid IPv6 mcast-group `{value}'"));
        return if address.is_multicast() { Ok(()) } else { Err(text()) };
    }
    let found = inet_aton(value).filter(Ipv4Addr::is_multicast);
    found.map(|_| ()).ok_or_else(|| Stop::misuse(format!("invalid IPv4 mcast-group `{value}'")))
}

fn timeout_value(word: &str, lowest: i64) -> Result<u32, Stop> {
    let seconds = number(word).filter(|seconds| (lowest..=MAX_TIMEOUT).contains(seconds));
    let seconds = seconds.and_then(|seconds| u32::try_from(seconds).ok());
    seconds.ok_or_else(|| Stop::misuse(format!("invalid timeout value `{word}' specified")))
}

/// A decimal number as `strtol` reads it, if there is nothing else.
fn number(word: &str) -> Option<i64> {
    let word = word.trim_start_matches([' ', '\t', '\n', '\r', '\x0b', '\x0c']);
    word.parse().ok()
}

/// An address and maybe a port, in digits or by name.
fn host_and_port(word: &str, transport: Option<Transport>, names: &dyn Names) -> Option<(IpAddr, Option<u16>)> {
    if word.is_empty() || word.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let port = |word: &str| {
        let digits = number(word).and_then(|port| u16::try_from(port).ok());
        digits.or_else(|| names.port(word, transport?))
    };
    if let Some(rest) = word.strip_prefix('[') {
        let (address, rest) = rest.split_once(']')?;
        let address: Ipv6Addr = address.parse().ok()?;
        return Some((address.into(), Some(port(rest.strip_prefix(':')?)?)));
    }
    if let Ok(address) = word.parse::<Ipv6Addr>() {
        return Some((address.into(), None));
    }
    let (host, after) = word.rsplit_once(':').map_or((word, None), |(host, port)| (host, Some(port)));
    let address = inet_aton(host).or_else(|| names.host(host))?;
    let port = match after {
        Some(word) => Some(port(word)?),
        None => None,
    };
    Some((address.into(), port))
}

/// An IPv4 address in any of the forms that `inet_aton` takes: one to four numbers, decimal, octal or hexadecimal, the
/// last of which fills what is left of the address.
fn inet_aton(word: &str) -> Option<Ipv4Addr> {
    let part = |part: &str| {
        if !part.starts_with(|c: char| c.is_ascii_digit()) {
            return None;
        }
        match part.strip_prefix("0x").or_else(|| part.strip_prefix("0X")) {
            Some(digits) => u32::from_str_radix(digits, 16).ok(),
            None if part.len() > 1 && part.starts_with('0') => u32::from_str_radix(part, 8).ok(),
            None => part.parse().ok(),
        }
    };
    let parts = word.split('.').map(part).collect::<Option<Vec<u32>>>()?;
    let (last, bytes) = parts.split_last()?;
    let room = 32 - 8 * u32::try_from(bytes.len()).ok().filter(|bytes| *bytes < 4)?;
    if bytes.iter().any(|byte| *byte > 255) || u64::from(*last) >> room != 0 {
        return None;
    }
    let high = bytes.iter().fold(0u64, |address, byte| address << 8 | u64::from(*byte)) << room;
    u32::try_from(high | u64::from(*last)).ok().map(Ipv4Addr::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Knows two names.
    struct Hosts;

    impl Names for Hosts {
        fn host(&self, name: &str) -> Option<Ipv4Addr> {
            (name == "web").then_some(Ipv4Addr::new(10, 0, 0, 7))
        }

        fn port(&self, name: &str, transport: Transport) -> Option<u16> {
            (name == "syslog" && transport == Transport::Udp).then_some(514)
        }

        fn host_at(&self, address: IpAddr) -> String {
            address.to_string()
        }

        fn service_at(&self, port: u16, _: Transport) -> String {
            port.to_string()
        }
    }

    fn read(line: &str) -> Result<Parsed, Stop> {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse("ipvsadm", &words, &Hosts)
    }

    fn request(line: &str) -> Request {
        match read(line) {
            Ok(Parsed::Run(request)) => *request,
            other => panic!("{line}: {other:?}"),
        }
    }

    fn tcp(address: &str) -> Option<Identity> {
        Some(Identity::Address(Transport::Tcp, address.parse().expect("an address")))
    }

    #[test]
    fn a_service_has_wlc_unless_another_is_named() {
        let add = request("-A -t 10.9.9.9:80");
        assert_eq!((add.command, add.service, add.scheduler.as_str()), (Command::Add, tcp("10.9.9.9:80"), "wlc"));
        assert_eq!(request("-A -t 10.9.9.9:80 -s=rr").scheduler, "rr");
        assert_eq!(request("-A -t 10.9.9.9:80 -s sixteen-letters-").scheduler, "sixteen-letters");
        assert_eq!(
            request("-A -u web:syslog").service,
            Some(Identity::Address(Transport::Udp, ([10, 0, 0, 7], 514).into()))
        );
        assert_eq!(request("-A -f 7").service, Some(Identity::Mark(7)));
    }

    #[test]
    fn a_netmask_is_for_the_family_known_by_then() {
        let netmask = |line| request(line).netmask;
        assert_eq!(netmask("-A -f 7 -p -M 24"), Some(Netmask::V4([0, 0, 0, 24].into())));
        assert_eq!(netmask("-A -f 7 -6 -p -M 24"), Some(Netmask::V6(24)));
        assert_eq!(netmask("-A -f 7 -p -M 24 -6"), None);
        assert_eq!(netmask("-A -p -M 24 -t [::1]:80"), None);
        assert_eq!(netmask("-A -p -M 24 -t 1.2.3.4:80"), Some(Netmask::V4([0, 0, 0, 24].into())));
    }

    #[test]
    fn only_masquerading_translates_ports() {
        let server = |line| request(line).server.map(|server| server.to_string());
        assert_eq!(server("-a -t 1.2.3.4:80 -r 1.2.3.5:8080 -m").as_deref(), Some("1.2.3.5:8080"));
        assert_eq!(server("-a -t 1.2.3.4:80 -r 1.2.3.5:8080").as_deref(), Some("1.2.3.5:80"));
        assert_eq!(server("-a -t 1.2.3.4:80 -r 1.2.3.5:8080 -i").as_deref(), Some("1.2.3.5:80"));
        assert_eq!(server("-a -t 1.2.3.4:80 -r 1.2.3.5 -m").as_deref(), Some("1.2.3.5:80"));
        assert_eq!(server("-a -f 3 -r 1.2.3.5:8080").as_deref(), Some("1.2.3.5:8080"));
        // The service's port is not known yet where it stands behind.
        assert_eq!(server("-a -r 1.2.3.5 -m -t 1.2.3.4:80").as_deref(), Some("1.2.3.5:0"));
    }

    #[test]
    fn no_words_list_and_bundles_too() {
        assert_eq!(read(""), read("-L"));
        assert_eq!(read("-Ln"), read("-l --numeric"));
        assert!(request("-Lnc").kinds.has_any(&[Kind::Connection]));
        assert_eq!(request("--set 900 0 300").timeouts, [900, 0, 300]);
        assert_eq!(read("-h"), Ok(Parsed::Help));
        assert_eq!(read("--version"), Ok(Parsed::Version));
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_ipvsadms_words() {
        let try_help = "Try `ipvsadm -h' or 'ipvsadm --help' for more information.";
        for (line, code, text) in [
            ("garbage", 255, try_help),
            ("-n", 255, try_help),
            ("--bogus", 255, try_help),
            ("-n -L", 255, try_help),
            ("--start-daemon", 255, try_help),
            ("--start-daemon x", 2, "illegal start-daemon parameter specified"),
            ("--stop-daemon x", 2, "illegal start_daemon specified"),
            ("-L garbage", 2, "unexpected argument garbage"),
            ("-L --bogus", 255, "--bogus: unknown option"),
            ("-A -t", 255, "-t: missing argument"),
            ("-Lnx", 255, "-Lnx: missing argument"),
            ("-A -E", 2, "invalid option `-E'"),
            ("-A -t 80", 2, "illegal virtual server address[:port] specified"),
            ("-A -t 10.0.0.256:80", 2, "illegal virtual server address[:port] specified"),
            ("-A -t [::1]", 2, "illegal virtual server address[:port] specified"),
            ("-A -t 1.2.3.4:syslog", 2, "illegal virtual server address[:port] specified"),
            ("-A -t 1.2.3.4", 2, "Zero port specified for non-persistent service"),
            ("-A -t 1.2.3.4:80 -t 1.2.3.4:80", 2, "multiple 'service-address' options specified"),
            ("-A -t 1.2.3.4:80 -o", 2, "One-Packet Scheduling is only for UDP virtual services"),
            ("-A --sctp-service 1.2.3.4:80 -o", 2, "One-Packet Scheduling is only for UDP virtual services"),
            ("-A --sctp-service 1.2.3.4", 2, "Zero port specified for non-persistent service"),
            ("-A -t 1.2.3.4:80 -p 0", 2, "invalid timeout value `0' specified"),
            ("-A -t 1.2.3.4:80 -p -5", 255, "-5: unknown option"),
            ("-A -t 1.2.3.4:80 -b sh-port", 2, "incompatible scheduler flag `sh-port'"),
            ("-A -t 1.2.3.4:80 -b x", 2, "invalid scheduler flag `x'"),
            ("-A -t 1.2.3.4 -b sh-port", 2, "incompatible scheduler flag `sh-port'"),
            ("-A -b mh-port -s sh", 2, "incompatible scheduler flag `mh-port'"),
            ("-A -t [::1]:80 -M 129", 2, "illegal ipv6 netmask specified"),
            ("-A -t 1.2.3.4:80 -M nohost", 2, "illegal virtual server persistent mask specified"),
            ("-A -6 -f 3", 2, "-6 used before -f\n"),
            ("-A -f 0", 2, "invalid fwmark value `0' specified"),
            ("-A", 2, "You need to supply the 'service-address' option for the 'add-service' command"),
            ("-D -t 1.2.3.4:80 -s rr", 2, "Illegal 'scheduler' option with the 'delete-service' command"),
            ("-C -n", 2, "Illegal 'numeric' option with the 'flush' command"),
            ("-a -t 1.2.3.4:80", 2, "You need to supply the 'real-server' option for the 'add-server' command"),
            ("-a -t 1.2.3.4:80 -r x", 2, "illegal real server address[:port] specified"),
            ("-a -r 1.2.3.4:syslog -u 1.2.3.4:80", 2, "illegal real server address[:port] specified"),
            ("-a -t 1.2.3.4:80 -r 1.2.3.4 -g -m", 2, "multiple 'forwarding-method' options specified"),
            ("-a -t 1.2.3.4:80 -r 1.2.3.4 -w -1", 2, "illegal weight specified"),
            ("-a -t 1.2.3.4:80 -r 1.2.3.4 -x -1", 2, "illegal u_threshold specified"),
            ("-a -t 1.2.3.4:80 -r ::1", 2, "Different address family is allowed only for tunneling servers"),
            (
                "-a -t 1.2.3.4:80 -r ::1 --tun-type gre",
                2,
                "Different address family is allowed only for tunneling servers",
            ),
            ("-a -t 1.2.3.4:80 -r 1.2.3.4 --tun-type gre", 2, "Tunnel options conflict with forward method"),
            (
                "-a -t 1.2.3.4:80 -r 1.2.3.4 -i --tun-type gue",
                2,
                "You need to supply the 'tun-port' option for the 'gue' tunnel type",
            ),
            (
                "-a -t 1.2.3.4:80 -r 1.2.3.4 -i --tun-type gre --tun-csum --tun-nocsum",
                2,
                "The option 'tun-csum' conflicts with the 'tun-nocsum' option in the 'gre' tunnel type",
            ),
            ("-a -t 1.2.3.4:80 -r 1.2.3.4 -i --tun-port 3", 2, "Illegal 'tun-port' option with the 'ipip' tunnel type"),
            (
                "-L -c -t 1.2.3.4:80",
                2,
                "The option 'service-address' conflicts with the 'connection' option in the 'list' command",
            ),
            ("-Ln -c --stats", 2, "options conflicts in the list command"),
            ("--set 1 2", 2, "--set option requires 3 timeout values"),
            ("--set 1 2 3 4", 2, "unexpected argument 4"),
            ("--set 1 2 2678401", 2, "invalid timeout value `2678401' specified"),
            ("--set -1 2 3", 255, "-1: unknown option"),
        ] {
            let refused = match read(line) {
                Ok(Parsed::Unreadable(text)) => Err(Stop::refusal(text)),
                other => other,
            };
            assert_eq!(refused, Err(Stop { text: text.into(), code }), "{line}");
        }
    }

    #[test]
    fn an_address_may_be_written_in_many_ways() {
        for (word, address) in [
            ("1.2.3.4", Some([1, 2, 3, 4])),
            ("1.2.3", Some([1, 2, 0, 3])),
            ("1.2", Some([1, 0, 0, 2])),
            ("24", Some([0, 0, 0, 24])),
            ("0x7f.1", Some([127, 0, 0, 1])),
            ("010.0.0.1", Some([8, 0, 0, 1])),
            ("1.256", Some([1, 0, 1, 0])),
            ("4294967295", Some([255; 4])),
            ("4294967296", None),
            ("1.2.3.256", None),
            ("256.1", None),
            ("1.2.3.4.5", None),
            ("1..2", None),
            ("", None),
            ("+1.2.3.4", None),
        ] {
            assert_eq!(inet_aton(word), address.map(Ipv4Addr::from), "{word}");
        }
    }
}
