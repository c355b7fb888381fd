//! The same over IPv6.

use std::net::{IpAddr, Ipv6Addr, TcpStream, UdpSocket};

use lb_userspace::realserver::Method;
use xdpvs_tests::cast::{
    self,
    six::{DIRECTOR_INSIDE, VIP, server},
};

use super::{
    Client, Duration, Instant, Lab, Mode, delivered, failed, fs, line, listen, outcome, program, silent, talk,
};

const SECOND_VIP: Ipv6Addr = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, 0x10);
/// An address of the server's own with the same group for neighbour solicitations as [`VIP`]: it hears them.
const NAMESAKE: Ipv6Addr = Ipv6Addr::new(0xfd00, 2, 0, 0, 0, 0, 0, 9);

#[test]
fn down_undoes_what_up_did() {
    for method in [Method::Dr, Method::Tun] {
        let lab = Lab::with_six();
        lab.set("eth0.rp_filter", "1");
        let before = lab.dump();
        assert_eq!(lab.up("eth0", VIP, method).unwrap(), Vec::<String>::new());
        let lo = lab.server.ip("address show dev lo").unwrap();
        assert!(lo.contains("inet6 fd00:9::9/128 scope global deprecated"), "{lo}");
        let settings = ["eth0.arp_ignore", "eth0.arp_announce", "eth0.rp_filter"].map(|name| lab.get(name));
        assert_eq!(settings, ["0", "0", "1"], "they are for IPv4");
        assert_eq!(lab.program("eth0").is_some(), method == Method::Tun);
        assert_eq!(lab.down("eth0", VIP).unwrap(), Vec::<String>::new());
        lab.assert_untouched(&before);
    }
}

#[test]
fn families_share_an_interface_until_the_last_is_down() {
    let lab = Lab::with_six();
    lab.set("eth0.rp_filter", "1");
    lab.server.ip(&format!("route add default via {DIRECTOR_INSIDE}")).unwrap();
    let before = lab.dump();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    let program = lab.program("eth0").expect("attached");
    lab.up("eth0", cast::VIP, Method::Tun).unwrap();
    lab.up("eth0", SECOND_VIP, Method::Tun).unwrap();
    assert_eq!(lab.program("eth0"), Some(program), "the program is shared");

    lab.down("eth0", cast::VIP).unwrap();
    let settings = ["eth0.arp_ignore", "eth0.rp_filter"].map(|name| lab.get(name));
    assert_eq!(settings, ["0", "1"], "no IPv4 address is left that needs them");
    lab.down("eth0", VIP).unwrap();
    assert_eq!(lab.program("eth0"), Some(program));
    let mut client = Client::new(&lab.peer);
    assert!(!client.gets_answered(VIP), "taken off the list");
    let listener = listen(&lab.server, SECOND_VIP);
    assert!(client.gets_answered(SECOND_VIP), "still on the list");
    drop(listener);

    lab.up("eth0", cast::VIP, Method::Tun).unwrap();
    lab.down("eth0", SECOND_VIP).unwrap();
    assert_eq!((lab.program("eth0"), lab.get("eth0.rp_filter").as_str()), (Some(program), "2"));
    lab.down("eth0", cast::VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn what_is_refused_changes_nothing() {
    let lab = Lab::with_six();
    lab.cable("eth1");
    lab.server.ip(&format!("address add {SECOND_VIP}/64 dev eth1 nodad")).unwrap();
    let before = lab.dump();
    for method in [Method::Dr, Method::Tun] {
        let refused = |vip: Ipv6Addr| line(lab.up("eth0", vip, method));
        assert_eq!(
            refused(SECOND_VIP),
            "fd00:9::10 is on eth1, where every neighbour solicitation for it is answered: run `ip address del \
             fd00:9::10/64 dev eth1`"
        );
        for vip in ["ff02::1", "fe80::9", "::1", "::", "::ffff:10.9.9.9"] {
            assert_eq!(
                refused(vip.parse().unwrap()),
                format!("{vip}: not an address that a service can have: give one like 192.0.2.10 or 2001:db8::10")
            );
        }
        lab.assert_untouched(&before);

        lab.server.ip(&format!("neighbour add proxy {VIP} dev eth0")).unwrap();
        assert_eq!(
            refused(VIP),
            "eth0 answers neighbour solicitations for fd00:9::9 in the name of another host: run `ip neighbour del proxy \
             fd00:9::9 dev eth0`"
        );
        lab.server.ip(&format!("neighbour del proxy {VIP} dev eth0")).unwrap();
        lab.assert_untouched(&before);
    }
    for name in ["eth0", "lo"] {
        let setting = format!("net.ipv6.conf.{name}.disable_ipv6");
        lab.server.sysctl(&setting, "1").unwrap();
        let off = lab.dump();
        assert_eq!(
            line(lab.up("eth0", VIP, Method::Tun)),
            format!("IPv6 is off on {name}: run `sysctl -w {setting}=0`")
        );
        lab.assert_untouched(&off);
        lab.server.sysctl(&setting, "0").unwrap();
    }
    lab.server.ip("link set eth0 mtu 1279").unwrap();
    let small = lab.dump();
    assert_eq!(
        line(lab.up("eth0", VIP, Method::Tun)),
        "IPv6 is off on eth0: it needs an MTU of 1280, run `ip link set eth0 mtu 1280`"
    );
    lab.assert_untouched(&small);
}

#[test]
fn a_program_of_another_version_takes_no_new_addresses() {
    let lab = Lab::with_six();
    let before = lab.dump();
    lab.up("eth0", cast::VIP, Method::Tun).unwrap();
    fs::remove_file(lab.pins().join("eth0/VIPS6")).unwrap();
    let up = lab.dump();
    assert_eq!(
        line(lab.up("eth0", VIP, Method::Tun)),
        "the tunnel program on eth0 was put there by another version of xdpvs: take down every address that `xdpvs \
         realserver status` shows on eth0 first"
    );
    assert_eq!(lab.dump(), up);
    lab.down("eth0", cast::VIP).unwrap();
    lab.assert_untouched(&before);
}

#[test]
fn an_address_that_was_there_stays() {
    let lab = Lab::with_six();
    lab.server.ip(&format!("address add {VIP}/128 dev lo")).unwrap();
    let before = lab.dump();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    lab.down("eth0", VIP).unwrap();
    lab.assert_untouched(&before);
}

impl Lab {
    /// Whether the peer, which believes to know the link-layer address of `vip` on eth0, is confirmed when it asks there.
    fn confirms(&self, vip: Ipv6Addr) -> bool {
        let mac = xdpvs_tests::lab::mac(cast::server_mac(0));
        self.peer.ip(&format!("neighbour replace {vip} dev eth0 lladdr {mac} nud probe")).unwrap();
        self.learns("eth0", vip.into())
    }
}

#[test]
fn nobody_learns_the_address_by_neighbour_discovery() {
    let lab = Lab::with_six();
    lab.server.ip(&format!("address add {NAMESAKE}/64 dev eth0 nodad")).unwrap();
    // On the interface it would be told: the question is heard, and answered.
    lab.server.ip(&format!("address add {VIP}/128 dev eth0 nodad")).unwrap();
    assert!(lab.answers("eth0", VIP) && lab.confirms(VIP));
    lab.server.ip(&format!("address del {VIP}/128 dev eth0")).unwrap();

    lab.up("eth0", VIP, Method::Dr).unwrap();
    assert!(!lab.answers("eth0", VIP), "asked by multicast");
    assert!(!lab.confirms(VIP), "asked by unicast");
    assert!(lab.answers("eth0", NAMESAKE), "its own address is answered");
    assert_eq!(lab.status().servers[0].advice, Vec::<String>::new());

    // A proxy answers, and the operator is told.
    lab.server.ip(&format!("neighbour add proxy {VIP} dev eth0")).unwrap();
    for name in ["forwarding", "proxy_ndp"] {
        lab.server.sysctl(&format!("net.ipv6.conf.eth0.{name}"), "1").unwrap();
    }
    assert!(lab.confirms(VIP));
    assert_eq!(
        lab.status().servers[0].advice,
        [
            "eth0 answers neighbour solicitations for fd00:9::9 in the name of another host: if the director is reached by \
             it, run `ip neighbour del proxy fd00:9::9 dev eth0`"
        ]
    );
    lab.server.ip(&format!("neighbour del proxy {VIP} dev eth0")).unwrap();

    // Who is asked from the address learns the server's own.
    lab.peer.ip("neighbour flush all").unwrap();
    lab.server.ip("neighbour flush all").unwrap();
    let hello = || UdpSocket::bind((VIP, 0)).unwrap().send_to(b"hello", (DIRECTOR_INSIDE, 9)).unwrap();
    lab.server.enter(hello).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let mac = xdpvs_tests::lab::mac(cast::server_mac(0));
    let learned = loop {
        let learned = lab.peer.ip("-6 neighbour show dev eth0 nud all").unwrap();
        if learned.contains(&mac) {
            break learned;
        }
        assert!(Instant::now() < deadline, "the peer learns nothing: {learned}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert!(!learned.lines().any(|line| line.contains("fd00:9::9") && line.contains(&mac)), "{learned}");
    lab.down("eth0", VIP).unwrap();
}

/// The address that the server talks from to another that `VIP` would be the closest to.
fn source(lab: &Lab) -> IpAddr {
    let connect = || {
        let socket = UdpSocket::bind("[::]:0").unwrap();
        socket.connect("[fd00:9::8]:9").unwrap();
        socket.local_addr().unwrap().ip()
    };
    lab.server.enter(connect).unwrap()
}

#[test]
fn the_host_starts_no_conversation_from_the_address() {
    let lab = Lab::with_six();
    // As on a host that is reached by several links, and has its address on none of them.
    lab.server.ip(&format!("address del {}/64 dev eth0", server(0))).unwrap();
    lab.server.ip("address add fd00:7::7/128 dev lo").unwrap();
    lab.server.ip("route add default dev eth0").unwrap();
    lab.server.ip("-6 route add default dev eth0").unwrap();
    let own: IpAddr = "fd00:7::7".parse().unwrap();
    assert_eq!(source(&lab), own);
    lab.server.ip(&format!("address add {VIP}/128 dev lo")).unwrap();
    assert_eq!(source(&lab), VIP, "an address like any other would be taken");
    lab.server.ip(&format!("address del {VIP}/128 dev lo")).unwrap();
    lab.up("eth0", VIP, Method::Dr).unwrap();
    assert_eq!(source(&lab), own);
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn a_connection_comes_directly() {
    let lab = Lab::with_six();
    lab.up("eth0", VIP, Method::Dr).unwrap();
    lab.peer.ip(&format!("route add {VIP} via {}", server(0))).unwrap();
    let listener = listen(&lab.server, VIP);
    let client = lab.peer.enter(|| TcpStream::connect_timeout(&(VIP, 80).into(), Duration::from_secs(5))).unwrap();
    let (_, from) = listener.accept().unwrap();
    assert_eq!(from, client.expect("the connection is accepted").local_addr().unwrap());
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn a_connection_comes_out_of_the_tunnel() {
    let lab = Lab::with_six();
    lab.up("eth0", VIP, Method::Tun).unwrap();
    talk(&lab, VIP);
    let status = lab.status();
    assert_eq!(status.tunnels[0].mode, Some(Mode::Native));
    assert_eq!(delivered(&status), 2);
    assert_eq!(status.tunnels[0].outcomes.values().sum::<u64>(), 2, "{status}");
    assert_eq!(
        status.servers[0].advice,
        [
            "the MTU of eth0 leaves 1460 bytes for packets in the tunnel: with 1540 on the way from the director, clients \
             need not send smaller ones"
        ]
    );
    lab.server.sysctl("net.ipv6.conf.eth0.disable_ipv6", "1").unwrap();
    assert_eq!(
        lab.status().servers[0].advice[0],
        "IPv6 is off on eth0: run `sysctl -w net.ipv6.conf.eth0.disable_ipv6=0`"
    );
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn where_the_driver_cannot_the_kernel_does() {
    let lab = Lab::with_six();
    // A veth interface runs no program in its driver when a frame may be longer than a page.
    for namespace in [&lab.server, &lab.peer] {
        namespace.ip("link set eth0 mtu 9000").unwrap();
    }
    assert_eq!(lab.up("eth0", VIP, Method::Tun).unwrap().len(), 1);
    talk(&lab, VIP);
    let status = lab.status();
    assert_eq!((status.tunnels[0].mode, delivered(&status)), (Some(Mode::Generic), 2));
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn without_the_program_nothing_comes_out() {
    let lab = Lab::with_six();
    lab.server.ip(&format!("route replace default via {DIRECTOR_INSIDE}")).unwrap();
    lab.up("eth0", VIP, Method::Dr).unwrap();
    let listener = listen(&lab.server, VIP);
    assert!(!Client::new(&lab.peer).gets_answered(VIP));
    drop(listener);
    lab.down("eth0", VIP).unwrap();
}

#[test]
fn the_command_says_what_the_library_does() {
    let lab = Lab::with_six();
    let before = lab.dump();
    let xdpvs = program::path().unwrap();
    let command = |words: &str| {
        let words: Vec<&str> = words.split(' ').collect();
        program::command(&lab.server, &xdpvs, &words)
    };
    let up = "realserver up eth0 --vip fd00:9:0::9 --method tun";
    assert_eq!(outcome(&mut command(up)), silent());
    assert_eq!(
        outcome(&mut command(up)),
        failed(
            1,
            "fd00:9::9 is already set up on eth0 (tun): run `xdpvs realserver down eth0 --vip fd00:9::9` first to change it"
        )
    );
    let status = program::output(&mut command("realserver status --json")).unwrap();
    let status: serde_json::Value = serde_json::from_str(&status).unwrap();
    let server = &status["servers"][0];
    assert_eq!((&server["address"], &server["method"]), (&"fd00:9::9".into(), &"tun".into()));
    assert_eq!(status["tunnels"][0]["outcomes"]["delivered"], 0);
    let text = program::output(&mut command("realserver status")).unwrap();
    assert!(text.starts_with("fd00:9::9 on eth0 (tun)\n  the MTU of eth0 leaves 1460 bytes"), "{text}");
    assert_eq!(outcome(&mut command("realserver down eth0 --vip fd00:9::9")), silent());
    lab.assert_untouched(&before);
    assert_eq!(
        outcome(&mut command("realserver up eth0 --vip fe80::9 --method dr")),
        failed(
            2,
            "invalid value 'fe80::9' for '--vip <ADDR>': fe80::9: not an address that a service can have: give one like \
             192.0.2.10 or 2001:db8::10"
        )
    );
}
