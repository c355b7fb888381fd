//! Where packets go: neighbours, routes, and the director itself.

use std::net::{Ipv4Addr, SocketAddr};

use lb_common::{proto::Method, reason::Reason};

use super::*;
use crate::cast::special;

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([
            unknown_neighbour(family, method),
            no_route(family, method),
            one_armed(family, method),
            forwarding_off(family, method),
        ]);
        cases.push(loopback_client_of_a_remote_server(family, method));
    }
    cases.extend([
        unknown_router_of_the_client(family),
        client_without_a_route(family),
        local_server(family, Method::Route),
        local_server(family, Method::Tunnel),
        local_masqueraded_server(family, cast::server(special::LOCAL), Reason::LocalMasquerade),
        local_masqueraded_server(family, Ipv4Addr::LOCALHOST, Reason::LoopbackDestination),
        all_on_the_loopback_interface(family),
    ]);
    cases
}

/// A case with one TCP service, at [`PORT`], of this real server.
fn of_server(family: Family, index: u8, name: &str, method: Method) -> Case {
    Case::new(family, format!("{method}: {name}")).service(TCP, PORT, &[(index, PORT, method, 1)])
}

/// The network layer is as the server is to get it; the rest is the host's.
fn unknown_neighbour(family: Family, method: Method) -> Case {
    let index = special::UNRESOLVED;
    let mut case = of_server(family, index, "an unknown neighbour", method);
    for (flags, counts) in [("S", DestCounts::default().opening_active()), ("A", DestCounts::default())] {
        let request = family.request().tcp(flags, b"");
        let input = DestCounts::input(&request);
        let counts = DestCounts { packets_in: input.packets_in, bytes_in: input.bytes_in, ..counts };
        case = case.arrives(
            Wire::Outside,
            request,
            Verdict::HandOver(Wire::Inside, cast::server(index)),
            forwarded(method, index, PORT, family.request(), |frame| frame.tcp(flags, b"")),
            Counts::of(Reason::NeighbourUnknown).at(index, counts),
        );
    }
    case
}

fn no_route(family: Family, method: Method) -> Case {
    let index = special::UNREACHABLE;
    let case = of_server(family, index, "no route", method);
    let request = family.request().tcp("S", b"");
    case.answers(
        Wire::Outside,
        request.clone(),
        Verdict::Transmit,
        error_for_client(family, Says::HostUnreachable, &request),
        Counts::answered(Reason::NoRoute).at(index, DestCounts::input(&request).opening_active()),
    )
}

/// Client and server by one interface.
fn one_armed(family: Family, method: Method) -> Case {
    let index = special::ONE_ARMED;
    let mut case = of_server(family, index, "one arm", method);
    let build = |frame: Frame| {
        let mut frame = frame;
        if frame.macs.0 == cast::DIRECTOR_INSIDE_MAC {
            frame.macs.0 = cast::DIRECTOR_OUTSIDE_MAC;
        }
        frame.tcp("S", b"")
    };
    let out = match method {
        Method::Tunnel => {
            let inner = build(Frame { ttl: 63, ..family.request() });
            let outer = family.frame(
                (cast::DIRECTOR_OUTSIDE_MAC, cast::server_mac(index)),
                (cast::DIRECTOR_OUTSIDE, 0),
                (cast::server(index), 0),
            );
            Frame { id: 0, ttl: 63, ..outer }.packet(family.in_ip(), &inner[ETHERNET..])
        }
        _ => forwarded(method, index, PORT, family.request(), build),
    };
    let counts = DestCounts::input(&build(family.request())).opening_active();
    case =
        case.arrives(Wire::Outside, build(family.request()), Verdict::Transmit, out, Counts::none().at(index, counts));
    if method == Method::Masq {
        let macs = (cast::server_mac(index), cast::DIRECTOR_OUTSIDE_MAC);
        let reply = Frame { macs, from: (cast::server(index), PORT), ..family.reply() };
        let counts = Counts::none().at(index, DestCounts::output(&reply.tcp("SA", b"")));
        let out = family.translated_reply().tcp("SA", b"");
        case = case.arrives(Wire::Outside, reply.tcp("SA", b""), Verdict::Transmit, out, counts);
    }
    case
}

/// The kernel answers no question about routes then, and the packet's sender is not to blame.
fn forwarding_off(family: Family, method: Method) -> Case {
    let case = of_server(family, 0, "forwarding is off", method).forwarding(false);
    let request = family.request().tcp("S", b"");
    let counts = Counts::of(Reason::ForwardingOff).at(0, DestCounts::input(&request).opening_active());
    let case = case.arrives(Wire::Outside, request.clone(), Verdict::Drop, request, counts).forwarding(true);
    let build = |frame: Frame| frame.tcp("A", b"");
    passes(case, method, family.request(), build, DestCounts::input(&build(family.request())))
}

/// Addresses of the loopback net do not belong on a wire.
fn loopback_client_of_a_remote_server(family: Family, method: Method) -> Case {
    let request = Frame { from: (Ipv4Addr::LOCALHOST, CLIENT_PORT), ..family.request() };
    of_server(family, 0, "a loopback client of a remote server", method)
        .stops(Wire::Outside, request.tcp("S", b""), Reason::SourceAddress)
        .stops(Wire::Outside, request.tcp("S", b""), Reason::SourceAddress)
}

fn unknown_router_of_the_client(family: Family) -> Case {
    let case = one(family, "nat: a client behind an unknown router", TCP, Method::Masq);
    let client = (cast::FAR_CLIENT, CLIENT_PORT);
    let request = Frame { from: client, ..family.request() };
    let build = |frame: Frame| frame.tcp("S", b"");
    let input = DestCounts::input(&build(request));
    let hand_over = Verdict::HandOver(Wire::Outside, cast::FAR_GATEWAY);
    let case = passes(case, Method::Masq, request, build, input.opening_active());
    let reply = Frame { to: client, ..family.reply() }.tcp("SA", b"");
    let out = Frame { to: client, ..family.translated_reply() }.tcp("SA", b"");
    let counts = Counts::of(Reason::NeighbourUnknown).at(0, DestCounts::output(&reply));
    let case = case.arrives(Wire::Inside, reply, hand_over, out, counts);
    // An error for it goes the same way, and the packet counts under its own reason.
    let late = build(Frame { ttl: 1, ..request });
    let error = Frame { to: (client.0, 0), ..director_error(family) }.error(Says::TtlExpired, &late[ETHERNET..]);
    case.answers(Wire::Outside, late, hand_over, error, Counts::answered(Reason::TtlExpired).at(0, input))
}

fn client_without_a_route(family: Family) -> Case {
    let case = one(family, "nat: a client without a route", TCP, Method::Masq);
    let client = (cast::LOST_CLIENT, CLIENT_PORT);
    let request = Frame { from: client, ..family.request() };
    let build = |frame: Frame| frame.tcp("S", b"");
    let input = DestCounts::input(&build(request));
    let case = passes(case, Method::Masq, request, build, input.opening_active());
    let case = case.stops(Wire::Inside, Frame { to: client, ..family.reply() }.tcp("SA", b""), Reason::NoRoute);
    // Nor is there one for an error.
    let late = build(Frame { ttl: 1, ..request });
    case.arrives(Wire::Outside, late.clone(), Verdict::Drop, late, Counts::of(Reason::TtlExpired).at(0, input))
}

/// The host gets the packet as it is: the service's address is its own.
fn local_server(family: Family, method: Method) -> Case {
    let index = special::LOCAL;
    let mut case = of_server(family, index, "a server on the director", method);
    for (flags, ttl, counts) in [
        ("S", 64, DestCounts::default().opening_active()),
        ("A", 1, DestCounts::default()),
        ("A", 64, DestCounts::default()),
    ] {
        let request = Frame { ttl, ..family.request() }.tcp(flags, b"");
        let input = DestCounts::input(&request);
        let counts = DestCounts { packets_in: input.packets_in, bytes_in: input.bytes_in, ..counts };
        let counts = Counts::of(Reason::LocalDelivery).at(index, counts);
        case = case.arrives(Wire::Outside, request.clone(), Verdict::Pass, request, counts);
    }
    case
}

/// Its replies would not pass XDP, so nothing is sent to it.
fn local_masqueraded_server(family: Family, server: Ipv4Addr, reason: Reason) -> Case {
    let case = Case::new(family, format!("nat: a server at {} of a client outside", family.address(server))).change(
        move |change| {
            change.add_service(family.key(TCP), scheduled(Scheduler::Rr)).expect("new");
            let address = SocketAddr::new(family.address(server), PORT);
            change.add_dest(family.key(TCP), address, dest(Method::Masq, 1)).expect("new");
        },
    );
    let request = family.request().tcp("S", b"");
    let mut counts = Counts::of(reason);
    counts.dests.insert(server, DestCounts::input(&request).opening_active());
    case.arrives(Wire::Outside, request.clone(), Verdict::Drop, request, counts)
}

/// Client, service and server at different ports of 127.0.0.1, as in the first exercise of many a course.
fn all_on_the_loopback_interface(family: Family) -> Case {
    const HERE: Ipv4Addr = Ipv4Addr::LOCALHOST;
    let frame = family.frame(([0; 6], [0; 6]), (HERE, CLIENT_PORT), (HERE, 8990));
    let case = Case::new(family, "nat: all on the loopback interface").change(move |change| {
        let address = |port| SocketAddr::new(family.address(HERE), port);
        let key = ServiceKey { protocol: TCP, address: address(8990) };
        change.add_service(key, scheduled(Scheduler::Rr)).expect("new");
        change.add_dest(key, address(8998), dest(Method::Masq, 1)).expect("new");
    });
    let counts = |counts: DestCounts| {
        let mut all = Counts::of(Reason::LocalDelivery);
        all.dests.insert(HERE, counts);
        all
    };
    let [request, mapped, reply, translated] =
        [(CLIENT_PORT, 8990), (CLIENT_PORT, 8998), (8998, CLIENT_PORT), (8990, CLIENT_PORT)].map(|(from, to)| Frame {
            from: (HERE, from),
            to: (HERE, to),
            ..frame
        });
    // No hop lies between, so the TTL stays.
    let opening = DestCounts::input(&request.tcp("S", b"")).opening_active();
    let answer = DestCounts::output(&reply.tcp("SA", b""));
    let input = DestCounts::input(&request.tcp("A", b""));
    case.arrives(Wire::Loopback, request.tcp("S", b""), Verdict::Pass, mapped.tcp("S", b""), counts(opening))
        .arrives(Wire::Loopback, reply.tcp("SA", b""), Verdict::Pass, translated.tcp("SA", b""), counts(answer))
        .arrives(Wire::Loopback, request.tcp("A", b""), Verdict::Pass, mapped.tcp("A", b""), counts(input))
}
