//! A host as a real server: what `up` changes, that it works, and that `down` undoes it.

#[path = "realserver/six.rs"]
mod six;

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsRawFd as _, OwnedFd},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, Instant},
};

use aya::{
    EbpfLoader,
    programs::{Xdp, XdpMode, xdp::XdpLinkId},
};
use etherparse::{IpNumber, Ipv4Header, Ipv6Header, NetSlice, PacketBuilder, SlicedPacket, TransportSlice};
use lb_userspace::{
    datapath::object,
    netlink::{self, Mode},
    realserver::{self, Error, Method, Status, Up, record},
};
use nix::sys::{
    socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, recv, sendto, setsockopt, socket,
        sockopt,
    },
    time::{TimeVal, TimeValLike as _},
};
use xdpvs_tests::{
    cast::{self, CLIENT, DIRECTOR_INSIDE, DIRECTOR_INSIDE_MAC, VIP, server, server_mac},
    lab::{self, End, NetNs},
    program,
};

const SECOND_VIP: Ipv4Addr = Ipv4Addr::new(10, 9, 9, 10);

/// A real server, and the network it is in.
struct Lab {
    server: NetNs,
    peer: NetNs,
    /// The number of the server's namespace.
    cookie: u64,
}

impl Lab {
    fn new() -> Self {
        lab::require_root().unwrap();
        let server = NetNs::new("server").unwrap();
        let cookie = server.enter(|| record::namespace().unwrap()).unwrap();
        let lab = Self { server, peer: NetNs::new("peer").unwrap(), cookie };
        for namespace in [&lab.server, &lab.peer] {
            // Addresses that come and go by themselves would differ from dump to dump.
            namespace.sysctl("net.ipv6.conf.all.disable_ipv6", "1").unwrap();
            namespace.sysctl("net.ipv6.conf.default.disable_ipv6", "1").unwrap();
        }
        lab.cable("eth0");
        lab.server.ip("address add 10.2.0.11/24 dev eth0").unwrap();
        lab.peer.ip("address add 10.2.0.1/24 dev eth0").unwrap();
        lab
    }

    /// A real server that speaks IPv6, too.
    fn with_six() -> Self {
        let lab = Self::new();
        for (namespace, address) in [(&lab.server, cast::six::server(0)), (&lab.peer, cast::six::DIRECTOR_INSIDE)] {
            // Neither asks first whether anybody else has its addresses, nor for a router.
            for name in ["all", "eth0", "default"] {
                namespace.sysctl(&format!("net.ipv6.conf.{name}.accept_dad"), "0").unwrap();
                namespace.sysctl(&format!("net.ipv6.conf.{name}.router_solicitations"), "0").unwrap();
            }
            namespace.sysctl("net.ipv6.conf.all.disable_ipv6", "0").unwrap();
            namespace.ip(&format!("address add {address}/64 dev eth0 nodad")).unwrap();
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while lab.server.ip("address").unwrap().contains("tentative") {
            assert!(Instant::now() < deadline, "the server does not get its addresses");
            std::thread::sleep(Duration::from_millis(20));
        }
        lab
    }

    /// Gives an interface of the server another name.
    fn rename(&self, from: &str, to: &str) {
        for words in
            [format!("link set {from} down"), format!("link set {from} name {to}"), format!("link set {to} up")]
        {
            self.server.ip(&words).unwrap();
        }
        self.wait_for_carrier(to);
    }

    /// Waits until an interface of the server says that its cable is in, which takes it a moment.
    fn wait_for_carrier(&self, name: &str) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.server.ip(&format!("link show {name}")).unwrap().contains(" state UP ") {
            assert!(Instant::now() < deadline, "{name} does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn cable(&self, name: &str) {
        let number = name.as_bytes()[name.len() - 1] - b'0';
        let [_, .., last] = server_mac(number);
        let end = |namespace, mac| End { namespace, name, mac, address: None };
        let peer_mac = if number == 0 { DIRECTOR_INSIDE_MAC } else { [2, 0, 0, 0, 0x0e, last] };
        lab::cable(end(&self.server, server_mac(number)), end(&self.peer, peer_mac)).unwrap();
        self.wait_for_carrier(name);
    }

    fn set(&self, name: &str, value: &str) {
        self.server.sysctl(&format!("net.ipv4.conf.{name}"), value).unwrap();
    }

    fn get(&self, name: &str) -> String {
        let path = Path::new("/proc/sys/net/ipv4/conf").join(name.replace('.', "/"));
        self.server.enter(|| fs::read_to_string(path).unwrap().trim().to_owned()).unwrap()
    }

    fn up(&self, name: &str, vip: impl Into<IpAddr>, method: Method) -> Result<Vec<String>, Error> {
        let vip = vip.into();
        self.server.enter(|| realserver::up(name, vip, method)).unwrap()
    }

    fn down(&self, name: &str, vip: impl Into<IpAddr>) -> Result<Vec<String>, Error> {
        let vip = vip.into();
        self.server.enter(|| realserver::down(name, vip)).unwrap()
    }

    fn status(&self) -> Status {
        self.server.enter(|| realserver::status().unwrap()).unwrap()
    }

    /// Everything that `up` may change, as text.
    fn dump(&self) -> String {
        let settings = self
            .server
            .enter(|| {
                let mut found = Vec::new();
                let family = |family| fs::read_dir(format!("/proc/sys/net/{family}/conf")).unwrap().flatten();
                for interface in ["ipv4", "ipv6"].into_iter().flat_map(family) {
                    for file in fs::read_dir(interface.path()).unwrap().flatten() {
                        // Some can only be written.
                        let value = fs::read_to_string(file.path()).unwrap_or_default();
                        found.push(format!("{} {value}", file.path().display()));
                    }
                }
                found.sort();
                found.concat()
            })
            .unwrap();
        let [addresses, links, routes] =
            ["address", "-details link", "route show table all"].map(|words| self.server.ip(words).unwrap());
        addresses + &links + &routes + &settings
    }

    fn record(&self) -> PathBuf {
        Path::new(record::DIRECTORY).join(format!("{}.json", self.cookie))
    }

    fn pins(&self) -> PathBuf {
        Path::new("/sys/fs/bpf/xdpvs-realserver").join(self.cookie.to_string())
    }

    /// The XDP program on an interface of the server.
    fn program(&self, name: &str) -> Option<u32> {
        let interface = self.server.enter(|| netlink::interface(name).unwrap()).unwrap();
        interface.xdp.map(|xdp| xdp.program)
    }

    #[track_caller]
    fn assert_untouched(&self, before: &str) {
        let after = self.dump();
        let changed =
            |a: &str, b: &str| a.lines().find(|line| !b.lines().any(|other| other == *line)).map(str::to_owned);
        let (gone, new) = (changed(before, &after), changed(&after, before));
        assert!(before == after, "changed: gone is {gone:?}, new is {new:?}");
        assert!(!self.record().exists(), "{} is left", self.record().display());
        assert!(!self.record().with_extension("json~").exists());
        assert!(!self.pins().exists(), "{} is left", self.pins().display());
    }

    /// Whether the peer learns the link-layer address of `vip` by asking for it on `name`.
    fn answers(&self, name: &str, vip: impl Into<IpAddr>) -> bool {
        let vip = vip.into();
        let (family, any) = if vip.is_ipv6() { ("ipv6", "[::]:0") } else { ("ipv4", "0.0.0.0:0") };
        self.peer.sysctl(&format!("net.{family}.neigh.{name}.retrans_time_ms"), "50").unwrap();
        self.peer.ip(&format!("neighbour flush dev {name}")).unwrap();
        self.peer.ip(&format!("route replace {vip} dev {name}")).unwrap();
        self.peer
            .enter(|| {
                let socket = UdpSocket::bind(any).unwrap();
                socket.send_to(b"who has it?", (vip, 9)).unwrap();
            })
            .unwrap();
        self.learns(name, vip)
    }

    /// Whether the peer, which asks for `vip` on `name`, gets to know its link-layer address.
    fn learns(&self, name: &str, vip: IpAddr) -> bool {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let entry = self.peer.ip(&format!("neighbour show {vip} dev {name} nud all")).unwrap();
            if entry.contains("lladdr") && !entry.contains("PROBE") {
                return true;
            }
            if entry.contains("FAILED") {
                return false;
            }
            assert!(Instant::now() < deadline, "the peer neither learns nor gives up: {entry}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Lab {
    /// Undoes what a failed test has left; the namespace takes everything else with it.
    fn drop(&mut self) {
        if let Ok(text) = fs::read_to_string(self.record()) {
            if let Ok(found) = serde_json::from_str::<record::Record>(&text) {
                for (site, server) in found.sites.iter().flat_map(|site| site.servers.iter().map(move |s| (site, s))) {
                    let _ = self.server.enter(|| realserver::down(&site.name, server.vip));
                }
            }
            let _ = fs::remove_file(self.record());
        }
    }
}

/// The only line of an error.
#[track_caller]
fn line<T: std::fmt::Debug>(result: Result<T, Error>) -> String {
    let line = result.expect_err("this is to be refused").to_string();
    assert!(!line.contains('\n'), "{line}");
    line
}

#[test]
fn down_undoes_what_up_did() {
    for method in [Method::Dr, Method::Tun] {
        let lab = Lab::new();
        lab.set("eth0.rp_filter", "1");
        let before = lab.dump();
        assert_eq!(lab.up("eth0", VIP, method).unwrap(), Vec::<String>::new());
        assert!(lab.server.ip("address show dev lo").unwrap().contains("inet 10.9.9.9/32 scope global lo\n"));
        assert_eq!(["eth0.arp_ignore", "eth0.arp_announce"].map(|name| lab.get(name)), ["1", "2"]);
        let tunnelled = method == Method::Tun;
        assert_eq!(lab.get("eth0.rp_filter"), if tunnelled { "2" } else { "1" });
        assert_eq!(lab.program("eth0").is_some(), tunnelled);
        assert_eq!(lab.down("eth0", VIP).unwrap(), Vec::<String>::new());
        lab.assert_untouched(&before);
    }
}

#[test]
fn settings_that_are_right_already_are_left_alone() {
    let lab = Lab::new();
    for (name, value) in [
        ("all.arp_ignore", "1"),
        ("eth0.arp_ignore", "0"),
        ("eth0.arp_announce", "2"),
        ("all.rp_filter", "2"),
        ("eth0.rp_filter", "1"),
    ] {
        lab.set(name, value);
    }
    let settings = || ["arp_ignore", "arp_announce", "rp_filter"].map(|name| lab.get(&format!("eth0.{name}")));
    lab.up("eth0", VIP, Method::Tun).unwrap();
    assert_eq!(settings(), ["0", "2", "1"]);
    lab.down("eth0", VIP).unwrap();
    assert_eq!(settings(), ["0", "2", "1"]);
}

#[test]
fn a_strict_filter_on_all_interfaces_is_loosened_on_this() {
    let lab = Lab::new();
    lab.set("all.rp_filter", "1");
    let before = lab.dump();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    assert_eq!(["all.rp_filter", "eth0.rp_filter"].map(|name| lab.get(name)), ["1", "2"]);
    lab.down("eth0", VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn addresses_share_an_interface_until_the_last_is_down() {
    let lab = Lab::new();
    lab.set("eth0.rp_filter", "1");
    lab.server.ip("route add default via 10.2.0.1").unwrap();
    let before = lab.dump();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    let program = lab.program("eth0").expect("attached");
    lab.up("eth0", SECOND_VIP, Method::Tun).unwrap();
    lab.up("eth0", Ipv4Addr::new(10, 9, 9, 11), Method::Dr).unwrap();
    assert_eq!(lab.program("eth0"), Some(program), "the program is shared");
    assert_eq!(lab.status().servers.len(), 3);

    lab.down("eth0", VIP).unwrap();
    assert_eq!(lab.program("eth0"), Some(program));
    assert!(!lab.server.ip("address").unwrap().contains("10.9.9.9/"));
    assert!(lab.server.ip("address").unwrap().contains("10.9.9.10/"));
    let mut client = Client::new(&lab.peer);
    assert!(!client.gets_answered(VIP), "taken off the list");
    let listener = listen(&lab.server, SECOND_VIP);
    assert!(client.gets_answered(SECOND_VIP), "still on the list");
    drop(listener);

    lab.down("eth0", SECOND_VIP).unwrap();
    assert_eq!(lab.program("eth0"), None);
    assert_eq!(["arp_ignore", "rp_filter"].map(|name| lab.get(&format!("eth0.{name}"))), ["1", "1"]);
    lab.down("eth0", Ipv4Addr::new(10, 9, 9, 11)).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn interfaces_share_an_address_until_the_last_is_down() {
    let lab = Lab::new();
    lab.cable("eth1");
    let before = lab.dump();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    lab.up("eth1", VIP, Method::Tun).unwrap();
    assert_ne!(lab.program("eth0"), lab.program("eth1"));
    lab.down("eth0", VIP).unwrap();
    assert!(lab.server.ip("address show dev lo").unwrap().contains("10.9.9.9/32"));
    assert_eq!((lab.program("eth0"), lab.program("eth1").is_some()), (None, true));
    lab.down("eth1", VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn namespaces_know_nothing_of_each_other() {
    let (one, other) = (Lab::new(), Lab::new());
    let before = one.dump();
    one.up("eth0", VIP, Method::Tun).unwrap();
    assert_eq!(line(other.down("eth0", VIP)), "10.9.9.9 has not been set up on eth0: see `xdpvs realserver status`");
    other.up("eth0", VIP, Method::Tun).unwrap();
    one.down("eth0", VIP).unwrap();
    one.assert_untouched(&before);
    assert!(other.program("eth0").is_some());
    other.down("eth0", VIP).unwrap();
}

#[test]
fn an_interface_name_may_hold_a_dot() {
    let lab = Lab::new();
    lab.rename("eth0", "eth0.7");
    let before = lab.dump();
    lab.up("eth0.7", VIP, Method::Tun).unwrap();
    assert!(lab.program("eth0.7").is_some());
    let ignored = Path::new("/proc/sys/net/ipv4/conf/eth0.7/arp_ignore");
    assert_eq!(lab.server.enter(|| fs::read_to_string(ignored).unwrap()).unwrap(), "1\n");
    lab.down("eth0.7", VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn an_interface_that_was_renamed_is_found_again() {
    let lab = Lab::new();
    let before = lab.dump();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    lab.rename("eth0", "lan0");
    lab.down("eth0", VIP).unwrap();
    lab.rename("lan0", "eth0");
    lab.assert_untouched(&before);
}

#[test]
fn a_killed_up_is_undone_by_down() {
    let (four, six) = (IpAddr::from(VIP), IpAddr::from(cast::six::VIP));
    for (vip, method, steps) in
        [(four, Method::Dr, 3), (four, Method::Tun, 5), (six, Method::Dr, 1), (six, Method::Tun, 2)]
    {
        for killed_after in 0..=steps {
            let lab = if vip.is_ipv6() { Lab::with_six() } else { Lab::new() };
            lab.set("eth0.rp_filter", "1");
            let before = lab.dump();
            lab.server
                .enter(|| {
                    let mut up = Up::begin("eth0", vip, method).unwrap();
                    assert_eq!(up.remaining(), steps);
                    for _ in 0..killed_after {
                        up.step().unwrap();
                    }
                })
                .unwrap();
            let advice = lab.status().servers.remove(0).advice;
            assert!(
                advice[0].starts_with("`xdpvs realserver up` was killed: run `xdpvs realserver down eth0"),
                "{advice:?}"
            );
            assert_eq!(
                line(lab.up("eth0", vip, method)),
                format!(
                    "an earlier `xdpvs realserver up` for {vip} on eth0 was killed: run `xdpvs realserver down eth0 --vip \
                     {vip}` first"
                )
            );
            // Another address does not mind, whatever is left of the first.
            lab.up("eth0", SECOND_VIP, Method::Tun).unwrap();
            assert!(lab.program("eth0").is_some());
            lab.down("eth0", SECOND_VIP).unwrap();
            assert_eq!(lab.down("eth0", vip).unwrap(), Vec::<String>::new(), "killed after {killed_after} steps");
            lab.assert_untouched(&before);
        }
    }
}

/// Puts a program of somebody else on an interface, for as long as the returned object lives.
fn occupy(namespace: &NetNs, name: &str) -> (aya::Ebpf, XdpLinkId, u32) {
    namespace
        .enter(|| {
            let mut ebpf = EbpfLoader::new().load(object::REALSERVER).unwrap();
            let xdp: &mut Xdp = ebpf.program_mut(object::realserver::DECAPSULATE).unwrap().try_into().unwrap();
            xdp.load().unwrap();
            let link = xdp.attach(name, XdpMode::Driver).unwrap();
            let id = xdp.info().unwrap().id();
            (ebpf, link, id)
        })
        .unwrap()
}

#[test]
fn an_up_that_fails_undoes_what_it_did() {
    let lab = Lab::new();
    lab.set("eth0.rp_filter", "1");
    let before = lab.dump();
    let mut up = lab.server.enter(|| Up::begin("eth0", VIP.into(), Method::Tun).unwrap()).unwrap();
    // Somebody is quicker.
    let taken = occupy(&lab.server, "eth0");
    lab.server
        .enter(|| {
            while up.remaining() > 1 {
                up.step().unwrap();
            }
            assert!(line(up.step()).starts_with("attach program decapsulate: "));
            up.undo().unwrap();
        })
        .unwrap();
    drop(taken);
    lab.assert_untouched(&before);
}

#[test]
fn what_is_refused_changes_nothing() {
    let lab = Lab::new();
    lab.cable("eth1");
    lab.server.ip("address add 10.9.9.10/24 dev eth1").unwrap();
    lab.server.ip("tuntap add mode tun name tun0").unwrap();
    let mut before = lab.dump();
    for method in [Method::Dr, Method::Tun] {
        let refused = |name: &str, vip| line(lab.up(name, vip, method));
        assert_eq!(refused("eth9", VIP), "no interface `eth9` in this network namespace: see `ip link`");
        assert_eq!(
            refused("lo", VIP),
            "lo receives nothing from a director: name the interface that the packets arrive by, see `ip link`"
        );
        assert_eq!(
            refused("eth0", SECOND_VIP),
            "10.9.9.10 is on eth1, where every ARP request for it is answered: run `ip address del 10.9.9.10/24 dev eth1`"
        );
        assert_eq!(
            refused("eth0", Ipv4Addr::new(224, 0, 0, 1)),
            "224.0.0.1: not an address that a service can have: give one like 192.0.2.10 or 2001:db8::10"
        );
        lab.assert_untouched(&before);

        lab.set("all.arp_ignore", "3");
        assert_eq!(
            refused("eth0", VIP),
            "net.ipv4.conf.all.arp_ignore is 3, with which eth0 answers ARP requests for 10.9.9.9: set it to 0, 1 or 2 with \
             `sysctl -w net.ipv4.conf.all.arp_ignore=0`"
        );
        lab.set("all.arp_ignore", "0");
        lab.assert_untouched(&before);

        lab.server.ip("link set lo down").unwrap();
        assert_eq!(refused("eth0", VIP), "lo is down, so no address on it is answered: run `ip link set lo up`");
        lab.server.ip("link set lo up").unwrap();
        before = lab.dump();
    }
    assert_eq!(
        line(lab.up("tun0", VIP, Method::Tun)),
        "tun0 has no Ethernet frames, which the tunnel program needs: name an interface that has, or use `--method dr`"
    );
    let taken = occupy(&lab.server, "eth0");
    assert_eq!(
        line(lab.up("eth0", VIP, Method::Tun)),
        format!(
            "eth0 already has another XDP program (id {}): detach it first, for example with `ip link set eth0 xdp off`",
            taken.2
        )
    );
    drop(taken);
    assert_eq!(line(lab.down("eth0", VIP)), "10.9.9.9 has not been set up on eth0: see `xdpvs realserver status`");
    lab.assert_untouched(&before);

    lab.up("eth0", VIP, Method::Tun).unwrap();
    let up = lab.dump();
    let written = fs::read_to_string(lab.record()).unwrap();
    for method in [Method::Dr, Method::Tun] {
        assert_eq!(
            line(lab.up("eth0", VIP, method)),
            "10.9.9.9 is already set up on eth0 (tun): run `xdpvs realserver down eth0 --vip 10.9.9.9` first to change it"
        );
    }
    assert_eq!((lab.dump(), fs::read_to_string(lab.record()).unwrap()), (up, written));
    lab.down("eth0", VIP).unwrap();
    lab.assert_untouched(&before);
}

/// A record as an earlier process may have left it.
fn write_record(lab: &Lab, boot: &str, vips: usize) {
    let servers: Vec<_> = (0..vips)
        .map(|number| {
            let vip = Ipv4Addr::from(0x0a09_0000 + number as u32);
            serde_json::json!({"vip": vip, "method": "tun", "complete": true})
        })
        .collect();
    let index = lab.server.enter(|| netlink::interface("eth0").unwrap().index).unwrap();
    let site = serde_json::json!({"name": "eth0", "index": index, "settings": [], "servers": servers});
    let record = serde_json::json!({"boot": boot, "addresses": [], "sites": [site]});
    fs::create_dir_all(record::DIRECTORY).unwrap();
    fs::write(lab.record(), record.to_string()).unwrap();
}

#[test]
fn an_interface_serves_so_many_addresses_and_no_more() {
    let lab = Lab::new();
    let before = lab.dump();
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    write_record(&lab, boot.trim(), 1023);
    // The program is put there for all of them.
    lab.up("eth0", Ipv4Addr::new(10, 9, 200, 1), Method::Tun).unwrap();
    assert_eq!(
        line(lab.up("eth0", Ipv4Addr::new(10, 9, 200, 2), Method::Tun)),
        "eth0 already serves 1024 tunnelled addresses of this family, the most it can: take one down first"
    );
    // Those that only the record knows go as they came.
    let mut found: record::Record = serde_json::from_slice(&fs::read(lab.record()).unwrap()).unwrap();
    found.sites[0].servers.drain(..1023);
    fs::write(lab.record(), serde_json::to_vec(&found).unwrap()).unwrap();
    lab.down("eth0", Ipv4Addr::new(10, 9, 200, 1)).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn a_record_of_an_earlier_boot_is_void() {
    let lab = Lab::new();
    let before = lab.dump();
    write_record(&lab, "00000000-0000-0000-0000-000000000000", 1);
    assert_eq!(lab.status(), Status::default());
    let first = Ipv4Addr::new(10, 9, 0, 0);
    assert_eq!(line(lab.down("eth0", first)), "10.9.0.0 has not been set up on eth0: see `xdpvs realserver status`");
    lab.up("eth0", VIP, Method::Dr).unwrap();
    assert_eq!(lab.status().servers.len(), 1);
    lab.down("eth0", VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn what_dead_namespaces_and_earlier_boots_have_left_is_swept() {
    let (dead, lab) = (Lab::new(), Lab::new());
    dead.up("eth0", VIP, Method::Tun).unwrap();
    dead.server.ip("link del eth0").unwrap();
    let of_earlier_boot =
        Path::new(record::DIRECTORY).join(format!("{}.json", u64::MAX - u64::from(std::process::id())));
    let text = fs::read_to_string(dead.record()).unwrap();
    let text = text.lines().map(|line| if line.contains("boot") { "\"boot\": \"earlier\"," } else { line });
    fs::write(&of_earlier_boot, text.collect::<String>()).unwrap();

    lab.up("eth0", VIP, Method::Tun).unwrap();
    assert!(!of_earlier_boot.exists());
    assert!(!dead.pins().exists(), "{} is left", dead.pins().display());
    // The record is not void: its namespace may live without the interface, and has the address.
    assert!(dead.server.ip("address").unwrap().contains("10.9.9.9/32"));
    dead.down("eth0", VIP).unwrap();
    assert!(!dead.server.ip("address").unwrap().contains("10.9.9.9/32"));
    assert!(!dead.record().exists());
    assert!(lab.program("eth0").is_some(), "what lives stays");
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn a_record_that_cannot_be_understood_is_kept() {
    let lab = Lab::new();
    fs::create_dir_all(record::DIRECTORY).unwrap();
    fs::write(lab.record(), "{}").unwrap();
    let expected = format!(
        "{} cannot be understood (missing field `boot` at line 1 column 2): it was written by another version of xdpvs, use \
         that one to undo it",
        lab.record().display()
    );
    assert_eq!(line(lab.up("eth0", VIP, Method::Dr)), expected);
    assert_eq!(line(lab.down("eth0", VIP)), expected);
    assert_eq!(fs::read_to_string(lab.record()).unwrap(), "{}");
}

#[test]
fn an_interface_made_anew_is_told_apart() {
    let lab = Lab::new();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    lab.server.ip("link del eth0").unwrap();
    lab.cable("eth0");
    lab.server.ip("address add 10.2.0.11/24 dev eth0").unwrap();
    assert_eq!(
        line(lab.up("eth0", SECOND_VIP, Method::Tun)),
        "eth0 is not the interface it was when 10.9.9.9 was set up on it: run `xdpvs realserver down eth0 --vip 10.9.9.9` \
         first"
    );
    assert_eq!(lab.status().tunnels[0].mode, None);
    // The new one has never been touched.
    lab.set("eth0.arp_ignore", "1");
    assert_eq!(lab.down("eth0", VIP).unwrap(), Vec::<String>::new());
    assert_eq!(lab.get("eth0.arp_ignore"), "1");
    assert!(!lab.server.ip("address").unwrap().contains("10.9.9.9"));
    assert!(!lab.record().exists() && !lab.pins().exists());
    lab.up("eth0", VIP, Method::Tun).unwrap();
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn an_address_that_was_there_stays() {
    let lab = Lab::new();
    lab.server.ip("address add 10.9.9.9/32 dev lo").unwrap();
    let before = lab.dump();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    lab.down("eth0", VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn a_setting_that_somebody_else_has_changed_stays() {
    let lab = Lab::new();
    lab.up("eth0", VIP, Method::Dr).unwrap();
    lab.set("eth0.arp_ignore", "2");
    assert_eq!(
        lab.down("eth0", VIP).unwrap(),
        ["net.ipv4.conf.eth0.arp_ignore is 2 and no longer the 1 that was set: left as it is"]
    );
    assert_eq!(["arp_ignore", "arp_announce"].map(|name| lab.get(&format!("eth0.{name}"))), ["2", "0"]);
    assert!(!lab.record().exists());
}

#[test]
fn commands_at_the_same_time_wait_for_each_other() {
    let lab = Lab::new();
    let before = lab.dump();
    let vips: Vec<Ipv4Addr> = (1..=8).map(|last| Ipv4Addr::new(10, 9, 8, last)).collect();
    let all = |work: fn(&Lab, Ipv4Addr)| {
        std::thread::scope(|scope| {
            for vip in &vips {
                let lab = &lab;
                scope.spawn(move || work(lab, *vip));
            }
        });
    };
    all(|lab, vip| assert_eq!(lab.up("eth0", vip, Method::Tun).unwrap(), Vec::<String>::new()));
    assert_eq!(lab.status().servers.len(), vips.len());
    all(|lab, vip| assert_eq!(lab.down("eth0", vip).unwrap(), Vec::<String>::new()));
    lab.assert_untouched(&before);
}

#[test]
fn nobody_learns_the_address_by_arp() {
    let lab = Lab::new();
    lab.cable("eth1");
    lab.server.ip("address add 10.3.0.11/24 dev eth1").unwrap();
    // Without xdpvs everybody does: the question is heard, and answered.
    lab.server.ip("address add 10.9.9.10/32 dev lo").unwrap();
    assert!(lab.answers("eth0", SECOND_VIP));
    lab.up("eth0", VIP, Method::Dr).unwrap();
    assert!(!lab.answers("eth0", VIP));
    assert!(lab.answers("eth0", server(0)), "its own address is answered");

    // The other interface is the operator's, who is told.
    assert!(lab.answers("eth1", VIP));
    assert_eq!(
        lab.status().servers[0].advice,
        ["eth1 answers ARP requests for 10.9.9.9: if the director is reached by it, run `sysctl -w \
             net.ipv4.conf.eth1.arp_ignore=1 net.ipv4.conf.eth1.arp_announce=2`"]
    );

    // Who is asked from the address learns the server's own.
    lab.peer.ip("route del 10.9.9.9/32 dev eth1").unwrap();
    lab.peer.ip("neighbour flush all").unwrap();
    lab.server.ip("neighbour flush all").unwrap();
    lab.server.enter(|| UdpSocket::bind((VIP, 0)).unwrap().send_to(b"hello", (DIRECTOR_INSIDE, 9)).unwrap()).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let learned = loop {
        let learned = lab.peer.ip("neighbour show dev eth0 nud all").unwrap();
        if learned.contains("10.2.0.11 ") {
            break learned;
        }
        assert!(Instant::now() < deadline, "the peer learns nothing: {learned}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(!learned.contains("10.9.9.9"), "{learned}");
    lab.down("eth0", VIP).unwrap();
}

fn listen(namespace: &NetNs, vip: impl Into<IpAddr>) -> TcpListener {
    let vip = vip.into();
    namespace.enter(|| TcpListener::bind((vip, 80)).unwrap()).unwrap()
}

/// The client's address of the family of `vip`.
fn client_of(vip: IpAddr) -> IpAddr {
    if vip.is_ipv6() { cast::six::CLIENT.into() } else { CLIENT.into() }
}

/// The server's address of the family of `vip`.
fn server_of(vip: IpAddr) -> IpAddr {
    if vip.is_ipv6() { cast::six::server(0).into() } else { server(0).into() }
}

/// A client behind a director that tunnels, both made by hand in the peer's namespace.
struct Client {
    /// Send IP packets, of version 4 and of version 6.
    out: [OwnedFd; 2],
    /// Receives IP packets.
    back: OwnedFd,
    port: u16,
}

impl Client {
    fn new(namespace: &NetNs) -> Self {
        let open = |family, kind, protocol| socket(family, kind, SockFlag::SOCK_CLOEXEC, protocol).unwrap();
        let (out, back) = namespace
            .enter(|| {
                let families = [AddressFamily::Inet, AddressFamily::Inet6];
                let out = families.map(|family| open(family, SockType::Raw, SockProtocol::Raw));
                (out, open(AddressFamily::Packet, SockType::Datagram, SockProtocol::EthAll))
            })
            .unwrap();
        setsockopt(&back, sockopt::ReceiveTimeout, &TimeVal::milliseconds(50)).unwrap();
        Self { out, back, port: 40_000 }
    }

    /// Sends a segment to the address, in a tunnel to the server.
    fn send(&self, vip: impl Into<IpAddr>, flags: &str, sequence: u32, acknowledgement: u32, payload: &[u8]) {
        let vip = vip.into();
        let step = match vip {
            IpAddr::V4(vip) => PacketBuilder::ipv4(CLIENT.octets(), vip.octets(), 63),
            IpAddr::V6(vip) => PacketBuilder::ipv6(cast::six::CLIENT.octets(), vip.octets(), 63),
        };
        let mut step = step.tcp(self.port, 80, sequence, 64_240);
        if flags.contains('S') {
            step = step.syn();
        }
        if flags.contains('A') {
            step = step.ack(acknowledgement);
        }
        let mut inner = Vec::new();
        step.write(&mut inner, payload).unwrap();
        let len = inner.len() as u16;
        let (out, outer) = if vip.is_ipv6() {
            let header = Ipv6Header {
                payload_length: len,
                next_header: IpNumber::IPV6,
                hop_limit: 63,
                source: cast::six::DIRECTOR_INSIDE.octets(),
                destination: cast::six::server(0).octets(),
                ..Ipv6Header::default()
            };
            (&self.out[1], header.to_bytes().to_vec())
        } else {
            let (from, to) = (DIRECTOR_INSIDE.octets(), server(0).octets());
            (&self.out[0], Ipv4Header::new(len, 63, IpNumber::IPV4, from, to).unwrap().to_bytes().to_vec())
        };
        let packet = [outer, inner].concat();
        let to = SockaddrStorage::from(SocketAddr::new(server_of(vip), 0));
        assert_eq!(sendto(out.as_raw_fd(), &packet, &to, MsgFlags::empty()).unwrap(), packet.len());
    }

    /// The next segment that the server sends to this client from `vip`: its sequence number and payload.
    fn receive(&self, vip: impl Into<IpAddr>) -> Option<(u32, Vec<u8>)> {
        let vip = vip.into();
        let deadline = Instant::now() + Duration::from_secs(2);
        let mut buffer = [0; 4096];
        while Instant::now() < deadline {
            let Ok(len) = recv(self.back.as_raw_fd(), &mut buffer, MsgFlags::empty()) else { continue };
            let Ok(packet) = SlicedPacket::from_ip(&buffer[..len]) else { continue };
            let (from, to): (IpAddr, IpAddr) = match &packet.net {
                Some(NetSlice::Ipv4(ip)) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
                Some(NetSlice::Ipv6(ip)) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
                _ => continue,
            };
            let Some(TransportSlice::Tcp(segment)) = packet.transport else { continue };
            if (from, to, segment.destination_port()) == (vip, client_of(vip), self.port) {
                return Some((segment.sequence_number(), segment.payload().to_vec()));
            }
        }
        None
    }

    /// Whether the server answers a connection attempt that comes through the tunnel.
    fn gets_answered(&mut self, vip: impl Into<IpAddr>) -> bool {
        let vip = vip.into();
        self.port += 1;
        self.send(vip, "S", 1000, 0, &[]);
        self.receive(vip).is_some()
    }
}

/// Opens a connection through the tunnel, and sends a word each way.
fn talk(lab: &Lab, vip: impl Into<IpAddr>) {
    let vip = vip.into();
    let director: IpAddr = if vip.is_ipv6() { cast::six::DIRECTOR_INSIDE.into() } else { DIRECTOR_INSIDE.into() };
    lab.server.ip(&format!("route replace default via {director}")).unwrap();
    let listener = listen(&lab.server, vip);
    let client = Client::new(&lab.peer);
    client.send(vip, "S", 1000, 0, &[]);
    let (sequence, _) = client.receive(vip).expect("the connection is accepted");
    client.send(vip, "A", 1001, sequence + 1, b"hello");
    let (mut stream, from) = listener.accept().unwrap();
    assert_eq!(from, SocketAddr::new(client_of(vip), 40_000));
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut word = [0; 5];
    stream.read_exact(&mut word).unwrap();
    assert_eq!(&word, b"hello");
    stream.write_all(b"world").unwrap();
    let answer = std::iter::from_fn(|| client.receive(vip)).find(|(_, payload)| !payload.is_empty());
    assert_eq!(answer.map(|(_, payload)| payload).as_deref(), Some(b"world".as_slice()));
}

fn delivered(status: &Status) -> u64 {
    status.tunnels[0].outcomes["delivered"]
}

#[test]
fn a_connection_comes_out_of_the_tunnel() {
    let lab = Lab::new();
    lab.set("eth0.rp_filter", "1");
    lab.up("eth0", VIP, Method::Tun).unwrap();
    talk(&lab, VIP);
    let status = lab.status();
    assert_eq!(status.tunnels[0].mode, Some(Mode::Native));
    assert_eq!(delivered(&status), 2);
    assert_eq!(status.tunnels[0].outcomes.values().sum::<u64>(), 2, "{status}");
    assert_eq!(
        status.servers[0].advice,
        [
            "the MTU of eth0 leaves 1480 bytes for packets in the tunnel: with 1520 on the way from the director, clients \
             need not send smaller ones"
        ]
    );
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn where_the_driver_cannot_the_kernel_does() {
    let lab = Lab::new();
    // A veth interface runs no program in its driver when a frame may be longer than a page.
    for namespace in [&lab.server, &lab.peer] {
        namespace.ip("link set eth0 mtu 9000").unwrap();
    }
    let before = lab.dump();
    let notes = lab.up("eth0", VIP, Method::Tun).unwrap();
    assert!(notes.len() == 1 && notes[0].starts_with("the driver of eth0 does not run XDP programs ("), "{notes:?}");
    talk(&lab, VIP);
    let status = lab.status();
    assert_eq!(status.tunnels[0].mode, Some(Mode::Generic));
    assert_eq!(delivered(&status), 2);
    assert_eq!(status.servers[0].advice, ["the tunnel program runs in generic mode on eth0, which is slower"]);
    lab.server.ip("route del default").unwrap();
    lab.down("eth0", VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn without_the_program_nothing_comes_out() {
    let lab = Lab::new();
    lab.server.ip("route replace default via 10.2.0.1").unwrap();
    lab.up("eth0", VIP, Method::Dr).unwrap();
    let listener = listen(&lab.server, VIP);
    assert!(!Client::new(&lab.peer).gets_answered(VIP));
    drop(listener);
    lab.down("eth0", VIP).unwrap();
}

/// What a command does: its exit code, standard output and standard error.
#[track_caller]
fn outcome(command: &mut Command) -> (Option<i32>, String, String) {
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (status.code(), text(stdout), text(stderr))
}

/// What a command does that succeeds without a word.
fn silent() -> (Option<i32>, String, String) {
    (Some(0), String::new(), String::new())
}

/// What a command does that fails with this line.
fn failed(code: i32, line: &str) -> (Option<i32>, String, String) {
    (Some(code), String::new(), format!("xdpvs: {line}\n"))
}

const UP: [&str; 7] = ["realserver", "up", "eth0", "--vip", "10.9.9.9", "--method", "tun"];
const UP_DR: [&str; 7] = ["realserver", "up", "eth0", "--vip", "10.9.9.9", "--method", "dr"];
const DOWN: [&str; 5] = ["realserver", "down", "eth0", "--vip", "10.9.9.9"];

#[test]
fn the_command_says_what_the_library_does() {
    let lab = Lab::new();
    let before = lab.dump();
    let xdpvs = program::path().unwrap();
    let command = |words: &[&str]| program::command(&lab.server, &xdpvs, words);
    assert_eq!(outcome(&mut command(&UP)), silent());
    assert_eq!(
        outcome(&mut command(&UP)),
        failed(
            1,
            "10.9.9.9 is already set up on eth0 (tun): run `xdpvs realserver down eth0 --vip 10.9.9.9` first to change it"
        )
    );
    let status = program::output(&mut command(&["realserver", "status", "--json"])).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let server = &status["servers"][0];
    assert_eq!(
        (&server["interface"], &server["address"], &server["method"]),
        (&"eth0".into(), &"10.9.9.9".into(), &"tun".into())
    );
    let tunnel = &status["tunnels"][0];
    assert_eq!((&tunnel["mode"], &tunnel["outcomes"]["delivered"]), (&"native".into(), &0.into()));
    let text = program::output(&mut command(&["realserver", "status"])).unwrap();
    assert!(text.starts_with("10.9.9.9 on eth0 (tun)\n  the MTU of eth0 leaves 1480 bytes"), "{text}");
    assert!(text.ends_with("\ntunnel program on eth0 (native)\n"), "{text}");

    lab.set("eth0.arp_ignore", "8");
    let note = "xdpvs: net.ipv4.conf.eth0.arp_ignore is 8 and no longer the 1 that was set: left as it is\n";
    assert_eq!(outcome(&mut command(&DOWN)), (Some(0), String::new(), note.to_owned()));
    lab.set("eth0.arp_ignore", "0");
    lab.assert_untouched(&before);
    let words = ["realserver", "up", "eth0", "--vip", "10.9.9", "--method", "dr"];
    assert_eq!(
        outcome(&mut command(&words)),
        failed(
            2,
            "invalid value '10.9.9' for '--vip <ADDR>': 10.9.9: not an address that a service can have: give one like \
             192.0.2.10 or 2001:db8::10"
        )
    );
}

#[test]
fn without_a_file_system_for_pins_there_is_no_tunnel() {
    let lab = Lab::new();
    let before = lab.dump();
    let xdpvs = program::path().unwrap();
    let command = |words: &[&str]| {
        let mut command = program::command(&lab.server, &xdpvs, words);
        command.env("XDPVS_BPFFS", "/proc");
        command
    };
    assert_eq!(
        outcome(&mut command(&UP)),
        failed(1, "no BPF file system is mounted (looked at /proc): run `mount -t bpf bpf /sys/fs/bpf`")
    );
    lab.assert_untouched(&before);
    assert_eq!(outcome(&mut command(&UP_DR)), silent());
    assert_eq!(outcome(&mut command(&DOWN)), silent());
    lab.assert_untouched(&before);
}

#[test]
fn without_root_nothing_is_done() {
    let lab = Lab::new();
    let before = lab.dump();
    let xdpvs = program::path().unwrap();
    for words in [UP.as_slice(), &UP_DR, &DOWN] {
        let mut command = lab.server.command("setpriv");
        // The one capability is for the directory that the program is in, which may be root's own.
        let identity =
            "--reuid 65534 --regid 65534 --clear-groups --inh-caps -all,+dac_override --ambient-caps +dac_override";
        command.args(identity.split(' ')).arg(&xdpvs).args(words);
        assert_eq!(
            outcome(&mut command),
            failed(1, "permission denied: xdpvs needs root (CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON)")
        );
    }
    lab.assert_untouched(&before);
}

/// A BPF file system of a test's own, unmounted when this is dropped.
struct Bpffs(PathBuf);

impl Bpffs {
    fn mount() -> Self {
        let path = std::env::temp_dir().join(format!("xdpvs-bpffs-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        let mount = Self(path);
        lab::run("mount", &["-t", "bpf", "bpf", &mount.0.to_string_lossy()]).unwrap();
        mount
    }
}

impl Drop for Bpffs {
    fn drop(&mut self) {
        // What cannot be removed now stands in nobody's way: the next run has another name.
        let _ = lab::run("umount", &[&self.0.to_string_lossy()]);
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_namespace_may_be_entered_with_file_systems_of_its_own() {
    let lab = Lab::new();
    let before = lab.dump();
    let xdpvs = program::path().unwrap();
    let bpffs = Bpffs::mount();
    // This hides the file system that is mounted below /sys.
    let command = |words: &[&str]| {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", lab.server.name()]).arg(&xdpvs).args(words).env("XDPVS_BPFFS", &bpffs.0);
        command
    };
    assert_eq!(outcome(&mut command(&UP)), silent());
    assert!(lab.program("eth0").is_some());
    assert!(bpffs.0.join("xdpvs-realserver").join(lab.cookie.to_string()).join("eth0/link").exists());
    assert_eq!(outcome(&mut command(&DOWN)), silent());
    assert_eq!(fs::read_dir(&bpffs.0).unwrap().filter(|entry| entry.as_ref().unwrap().path().is_dir()).count(), 0);
    lab.assert_untouched(&before);
}

#[test]
fn a_killed_command_is_undone_by_another() {
    let lab = Lab::new();
    lab.set("eth0.rp_filter", "1");
    let before = lab.dump();
    let xdpvs = program::path().unwrap();
    for number in 0..16 {
        let mut up = program::command(&lab.server, &xdpvs, &UP).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(3 * number));
        up.kill().unwrap();
        up.wait().unwrap();
        let recorded = lab.record().exists();
        match lab.down("eth0", VIP) {
            Ok(notes) => assert!(recorded && notes.is_empty(), "{notes:?}"),
            Err(error) => assert!(!recorded && matches!(error, Error::NotUp { .. }), "{error}"),
        }
        // It may have been killed while it wrote the record.
        let _ = fs::remove_file(lab.record().with_extension("json~"));
        lab.assert_untouched(&before);
    }
}
