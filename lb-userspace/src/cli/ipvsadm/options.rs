//! Which options ipvsadm has, and which go together.

use super::{
    Stop,
    popt::{Argument, Definition},
};

/// A command of ipvsadm.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Command {
    Add,
    Edit,
    Delete,
    Flush,
    AddDest,
    EditDest,
    DeleteDest,
    List,
    Zero,
    Timeouts,
    StartDaemon,
    StopDaemon,
    Restore,
    Save,
}

impl Command {
    /// The command's name in messages.
    const fn name(self) -> &'static str {
        match self {
            Self::Add => "add-service",
            Self::Edit => "edit-service",
            Self::Delete => "delete-service",
            Self::Flush => "flush",
            Self::AddDest => "add-server",
            Self::EditDest => "edit-server",
            Self::DeleteDest => "delete-server",
            Self::List => "list",
            Self::Zero => "zero",
            Self::Timeouts => "set",
            Self::StartDaemon => "start-daemon",
            Self::StopDaemon => "stop-daemon",
            Self::Restore => "restore",
            Self::Save => "save",
        }
    }
}

macro_rules! kinds {
    ($($variant:ident = $name:literal,)+) => {
        /// What an option is about; several spellings may be of one kind. In the order in which ipvsadm looks at them.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        pub(super) enum Kind { $($variant,)+ }

        impl Kind {
            const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The kind's name in messages.
            const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }
        }
    };
}

kinds! {
    Numeric = "numeric",
    Connection = "connection",
    Service = "service-address",
    Scheduler = "scheduler",
    Persistent = "persistent",
    Netmask = "netmask",
    Server = "real-server",
    Forward = "forwarding-method",
    Weight = "weight",
    Upper = "u-threshold",
    Lower = "l-threshold",
    McastInterface = "mcast-interface",
    Timeout = "timeout",
    Daemon = "daemon",
    Stats = "stats",
    Rate = "rate",
    Thresholds = "thresholds",
    PersistentConn = "persistent-conn",
    NoSort = "nosort",
    SyncId = "syncid",
    Exact = "exact",
    Ops = "ops",
    Engine = "pe",
    SchedFlags = "sched-flags",
    TunInfo = "tun-info",
    TunType = "tun-type",
    TunPort = "tun-port",
    TunNoCsum = "tun-nocsum",
    TunCsum = "tun-csum",
    TunRemCsum = "tun-remcsum",
    SyncMaxLen = "sync-maxlen",
    McastGroup = "mcast-group",
    McastPort = "mcast-port",
    McastTtl = "mcast-ttl",
}

/// The kinds of options that a command line has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) struct Kinds(u64);

impl Kinds {
    /// Whether an option of this kind was given.
    pub(super) const fn has(self, kind: Kind) -> bool {
        self.0 >> kind as u32 & 1 != 0
    }

    /// Whether an option of any of these kinds was given.
    pub(super) fn has_any(self, kinds: &[Kind]) -> bool {
        kinds.iter().any(|kind| self.has(*kind))
    }

    /// Notes that an option of this kind was given.
    ///
    /// # Errors
    ///
    /// When there was one before.
    pub(super) fn add(&mut self, kind: Kind) -> Result<(), Stop> {
        if self.has(kind) {
            return Err(Stop::misuse(format!("multiple '{}' options specified", kind.name())));
        }
        self.0 |= 1 << kind as u32;
        Ok(())
    }
}

/// How a kind of options goes with a command, or with a type of tunnel.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Rule {
    Required,
    Free,
    /// At most one of all that have this rule.
    Exclusive,
    Illegal,
}

fn command_rule(command: Command, kind: Kind) -> Rule {
    use Command as C;
    use Kind as K;
    match (kind, command) {
        (K::Service, C::Add | C::Edit | C::Delete | C::AddDest | C::EditDest | C::DeleteDest) => Rule::Required,
        (K::Service | K::Connection | K::Timeout | K::Daemon, C::List) => Rule::Exclusive,
        (K::Service, C::Zero) => Rule::Free,
        (K::Scheduler | K::Persistent | K::Netmask | K::Ops | K::Engine | K::SchedFlags, C::Add | C::Edit) => {
            Rule::Free
        }
        (K::Server, C::AddDest | C::EditDest | C::DeleteDest) => Rule::Required,
        (
            K::Forward
            | K::Weight
            | K::Upper
            | K::Lower
            | K::TunType
            | K::TunPort
            | K::TunNoCsum
            | K::TunCsum
            | K::TunRemCsum,
            C::AddDest | C::EditDest,
        ) => Rule::Free,
        (K::Numeric, C::List | C::Save) => Rule::Free,
        (
            K::Stats | K::Rate | K::Thresholds | K::PersistentConn | K::NoSort | K::SyncId | K::Exact | K::TunInfo,
            C::List,
        ) => Rule::Free,
        (K::SyncId, C::StartDaemon | C::StopDaemon) => Rule::Free,
        (K::McastInterface | K::SyncMaxLen | K::McastGroup | K::McastPort | K::McastTtl, C::StartDaemon) => Rule::Free,
        _ => Rule::Illegal,
    }
}

/// A type of tunnel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tunnel {
    Ipip,
    Gue,
    Gre,
}

impl Tunnel {
    const fn name(self) -> &'static str {
        match self {
            Self::Ipip => "ipip",
            Self::Gue => "gue",
            Self::Gre => "gre",
        }
    }
}

fn tunnel_rule(tunnel: Tunnel, kind: Kind) -> Rule {
    match (tunnel, kind) {
        (Tunnel::Gue, Kind::TunPort) => Rule::Required,
        (Tunnel::Gue, Kind::TunNoCsum | Kind::TunCsum | Kind::TunRemCsum)
        | (Tunnel::Gre, Kind::TunNoCsum | Kind::TunCsum) => Rule::Exclusive,
        (_, Kind::TunPort | Kind::TunNoCsum | Kind::TunCsum | Kind::TunRemCsum) => Rule::Illegal,
        _ => Rule::Free,
    }
}

/// Refuses options that do not go with the command, or with each other.
pub(super) fn check_command(command: Command, kinds: Kinds) -> Result<(), Stop> {
    check(kinds, |kind| command_rule(command, kind), ("for", "with", &format!("'{}' command", command.name())))
}

/// Refuses options that do not go with the type of tunnel, or with each other.
pub(super) fn check_tunnel(tunnel: Tunnel, kinds: Kinds) -> Result<(), Stop> {
    check(kinds, |kind| tunnel_rule(tunnel, kind), ("for", "with", &format!("'{}' tunnel type", tunnel.name())))
}

fn check(kinds: Kinds, rule: impl Fn(Kind) -> Rule, (required, illegal, what): (&str, &str, &str)) -> Result<(), Stop> {
    let mut exclusive: Option<Kind> = None;
    for &kind in Kind::ALL {
        let name = kind.name();
        match (rule(kind), kinds.has(kind)) {
            (Rule::Required, false) => {
                return Err(Stop::misuse(format!("You need to supply the '{name}' option {required} the {what}")));
            }
            (Rule::Illegal, true) => {
                return Err(Stop::misuse(format!("Illegal '{name}' option {illegal} the {what}")));
            }
            (Rule::Exclusive, true) => match exclusive {
                Some(other) => {
                    let other = other.name();
                    let text = format!("The option '{name}' conflicts with the '{other}' option in the {what}");
                    return Err(Stop::misuse(text));
                }
                None => exclusive = Some(kind),
            },
            _ => {}
        }
    }
    Ok(())
}

/// What an option on the command line is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Tag {
    /// A command, which only the first option can be.
    Command(Command),
    Help,
    Version,
    TcpService,
    UdpService,
    SctpService,
    Mark,
    Ipv6,
    Gatewaying,
    Masquerading,
    Tunneling,
    /// Does nothing.
    Sort,
    /// One whose kind says what it is.
    Kind(Kind),
}

const fn option(long: &'static str, short: Option<char>, argument: Argument, tag: Tag) -> Definition<Tag> {
    Definition { long: Some(long), short, argument, tag }
}

const fn flag(long: &'static str, short: Option<char>, tag: Tag) -> Definition<Tag> {
    option(long, short, Argument::None, tag)
}

const fn value(long: &'static str, short: Option<char>, tag: Tag) -> Definition<Tag> {
    option(long, short, Argument::Required, tag)
}

/// Every option of ipvsadm.
pub(super) static DEFINITIONS: [Definition<Tag>; 58] = [
    flag("add-service", Some('A'), Tag::Command(Command::Add)),
    flag("edit-service", Some('E'), Tag::Command(Command::Edit)),
    flag("delete-service", Some('D'), Tag::Command(Command::Delete)),
    flag("clear", Some('C'), Tag::Command(Command::Flush)),
    flag("restore", Some('R'), Tag::Command(Command::Restore)),
    flag("save", Some('S'), Tag::Command(Command::Save)),
    flag("add-server", Some('a'), Tag::Command(Command::AddDest)),
    flag("edit-server", Some('e'), Tag::Command(Command::EditDest)),
    flag("delete-server", Some('d'), Tag::Command(Command::DeleteDest)),
    flag("list", Some('L'), Tag::Command(Command::List)),
    Definition { long: None, short: Some('l'), argument: Argument::None, tag: Tag::Command(Command::List) },
    flag("zero", Some('Z'), Tag::Command(Command::Zero)),
    flag("set", None, Tag::Command(Command::Timeouts)),
    value("start-daemon", None, Tag::Command(Command::StartDaemon)),
    value("stop-daemon", None, Tag::Command(Command::StopDaemon)),
    flag("help", Some('h'), Tag::Help),
    flag("version", Some('v'), Tag::Version),
    value("tcp-service", Some('t'), Tag::TcpService),
    value("udp-service", Some('u'), Tag::UdpService),
    value("sctp-service", None, Tag::SctpService),
    value("fwmark-service", Some('f'), Tag::Mark),
    flag("ipv6", Some('6'), Tag::Ipv6),
    value("scheduler", Some('s'), Tag::Kind(Kind::Scheduler)),
    option("persistent", Some('p'), Argument::Optional, Tag::Kind(Kind::Persistent)),
    value("netmask", Some('M'), Tag::Kind(Kind::Netmask)),
    value("pe", None, Tag::Kind(Kind::Engine)),
    value("sched-flags", Some('b'), Tag::Kind(Kind::SchedFlags)),
    flag("ops", Some('o'), Tag::Kind(Kind::Ops)),
    value("real-server", Some('r'), Tag::Kind(Kind::Server)),
    flag("gatewaying", Some('g'), Tag::Gatewaying),
    flag("masquerading", Some('m'), Tag::Masquerading),
    flag("ipip", Some('i'), Tag::Tunneling),
    value("weight", Some('w'), Tag::Kind(Kind::Weight)),
    value("u-threshold", Some('x'), Tag::Kind(Kind::Upper)),
    value("l-threshold", Some('y'), Tag::Kind(Kind::Lower)),
    value("tun-type", None, Tag::Kind(Kind::TunType)),
    value("tun-port", None, Tag::Kind(Kind::TunPort)),
    flag("tun-nocsum", None, Tag::Kind(Kind::TunNoCsum)),
    flag("tun-csum", None, Tag::Kind(Kind::TunCsum)),
    flag("tun-remcsum", None, Tag::Kind(Kind::TunRemCsum)),
    flag("numeric", Some('n'), Tag::Kind(Kind::Numeric)),
    flag("connection", Some('c'), Tag::Kind(Kind::Connection)),
    flag("timeout", None, Tag::Kind(Kind::Timeout)),
    flag("daemon", None, Tag::Kind(Kind::Daemon)),
    flag("stats", None, Tag::Kind(Kind::Stats)),
    flag("rate", None, Tag::Kind(Kind::Rate)),
    flag("thresholds", None, Tag::Kind(Kind::Thresholds)),
    flag("persistent-conn", None, Tag::Kind(Kind::PersistentConn)),
    flag("tun-info", None, Tag::Kind(Kind::TunInfo)),
    flag("exact", Some('X'), Tag::Kind(Kind::Exact)),
    flag("nosort", None, Tag::Kind(Kind::NoSort)),
    flag("sort", None, Tag::Sort),
    value("mcast-interface", None, Tag::Kind(Kind::McastInterface)),
    value("syncid", None, Tag::Kind(Kind::SyncId)),
    value("sync-maxlen", None, Tag::Kind(Kind::SyncMaxLen)),
    value("mcast-group", None, Tag::Kind(Kind::McastGroup)),
    value("mcast-port", None, Tag::Kind(Kind::McastPort)),
    value("mcast-ttl", None, Tag::Kind(Kind::McastTtl)),
];
