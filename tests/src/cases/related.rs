//! ICMP errors of which no connection is known: about packets that were forwarded without one, and those that open one.

use lb_common::{
    proto::{Method, service_flag},
    reason::Reason,
};
use lb_userspace::control::model::ServiceSpec;

use super::{
    errors::{INNER_ROUTER, ROUTER, error_about_tunnel, error_to_service, least_quote},
    persistence::persistent,
    *,
};

pub(super) fn cases(family: Family) -> Vec<Case> {
    let mut cases = Vec::new();
    for method in METHODS {
        cases.extend([
            opens(family, method, TCP),
            opens(family, method, UDP),
            opens_by_template(family, method),
            without_room(family, method),
            one_by_one(family, method),
        ]);
    }
    cases.extend([opens_nothing(family), goes_with_its_connection(family), in_a_tunnel_without_room(family)]);
    cases.push(assured_by_an_answer(family));
    cases
}

/// Client number `number`, as the service sees it.
const fn client(number: u16) -> (Ipv4Addr, u16) {
    (cast::CLIENT, CLIENT_PORT + number)
}

/// The start of what the service has sent client number `number`.
fn reply(family: Family, protocol: Transport, number: u16) -> Vec<u8> {
    let frame = Frame { to: client(number), ttl: 60, ..family.translated_reply() };
    let frame = if protocol == TCP { frame.tcp("A", b"") } else { frame.udp(b"a") };
    frame[..ETHERNET + least_quote(family)].to_vec()
}

/// What a router before client number `number` says about a packet for it.
fn error(family: Family, protocol: Transport, number: u16) -> Vec<u8> {
    error_to_service(family, ROUTER).error(Says::TooBig(1400), &reply(family, protocol, number)[ETHERNET..])
}

/// The error about what client number `number` was sent, as real server number `index` gets it.
fn relayed(family: Family, protocol: Transport, method: Method, (number, index): (u16, u8)) -> Vec<u8> {
    let mut about = reply(family, protocol, number);
    if method == Method::Masq {
        let original = Frame { from: (cast::server(index), PORT), to: client(number), ttl: 60, ..family.reply() };
        let original = if protocol == TCP { original.tcp("A", b"") } else { original.udp(b"a") };
        let checksum = about[ETHERNET + least_quote(family) - 2..].to_vec();
        about = original[..about.len()].to_vec();
        if protocol == UDP {
            // What is quoted of the segment keeps its checksum.
            let end = about.len();
            about[end - 2..].copy_from_slice(&checksum);
        }
    }
    forwarded(method, index, 0, error_to_service(family, ROUTER), |frame| {
        frame.error(Says::TooBig(1400), &about[ETHERNET..])
    })
}

/// The error about what client number `number` was sent reaches real server number `index`.
fn reaches(
    case: Case,
    (protocol, method): (Transport, Method),
    (number, index): (u16, u8),
    counts: impl FnOnce(DestCounts) -> Counts,
) -> Case {
    let family = case.family;
    let received = error(family, protocol, number);
    let counts = counts(DestCounts::input(&received));
    case.arrives(Wire::Outside, received, INSIDE, relayed(family, protocol, method, (number, index)), counts)
}

/// What `build` makes of a packet of client number `number` reaches real server number `index`.
fn sends(
    case: Case,
    method: Method,
    (number, index): (u16, u8),
    build: impl Fn(Frame) -> Vec<u8>,
    counts: impl FnOnce(DestCounts) -> DestCounts,
) -> Case {
    let request = Frame { from: client(number), ..case.family.request() };
    let out = forwarded(method, index, PORT, request, &build);
    let counts = Counts::none().at(index, counts(DestCounts::input(&build(request))));
    case.arrives(Wire::Outside, build(request), INSIDE, out, counts)
}

fn two(family: Family, name: String, protocol: Transport, method: Method) -> Case {
    Case::new(family, name).service(protocol, PORT, &[(1, PORT, method, 1), (0, PORT, method, 1)])
}

/// An error about what another director has forwarded gets to a server as the client's next packet does.
fn opens(family: Family, method: Method, protocol: Transport) -> Case {
    let mut case = two(family, format!("{method}: schedule_icmp, {protocol}"), protocol, method);
    case = case.stops(Wire::Outside, error(family, protocol, 0), Reason::Icmp).setting("schedule_icmp", 1);
    let opening = |index| move |counts: DestCounts| Counts::none().at(index, counts.opening_inactive());
    case = reaches(case, (protocol, method), (0, 0), opening(0));
    case = reaches(case, (protocol, method), (0, 0), |counts| Counts::none().at(0, counts));
    case = reaches(case, (protocol, method), (1, 1), opening(1));
    if protocol == TCP {
        let rising = |counts| DestCounts { active: 1, inactive: -1, ..counts };
        case = sends(case, method, (1, 1), |frame| frame.tcp("A", b""), rising);
    } else {
        case = sends(case, method, (1, 1), |frame| frame.udp(b"q"), |counts| counts);
    }
    // Nothing follows for three seconds, and another that they live longer: so it is over, and its entry another's.
    case = case.pass(5).age();
    case = reaches(case, (protocol, method), (0, 0), opening(0));
    case = case.pass(5).age().setting("schedule_icmp", 0);
    case.stops(Wire::Outside, error(family, protocol, 0), Reason::Icmp)
}

/// The template that an error makes is for the client's connections, and the other way round.
fn opens_by_template(family: Family, method: Method) -> Case {
    let mut case = Case::new(family, format!("{method}: schedule_icmp, persistent")).change(move |change| {
        change.add_service(family.key(TCP), persistent(family, 100, 4)).expect("new");
        for index in [1, 0] {
            change.add_dest(family.key(TCP), family.at(index, PORT), dest(method, 1)).expect("new");
        }
    });
    case = case.setting("schedule_icmp", 1);
    case = reaches(case, (TCP, method), (0, 0), |counts| {
        Counts::none().at(0, DestCounts { templates: 1, ..counts.opening_inactive() })
    });
    case = sends(case, method, (1, 0), |frame| frame.tcp("S", b""), DestCounts::opening_active);
    case = reaches(case, (TCP, method), (2, 0), |counts| Counts::none().at(0, counts.opening_inactive()));
    case.shows(["tcp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80"])
}

/// An answer to a client's datagram assures the template, whatever has opened the connection.
fn assured_by_an_answer(family: Family) -> Case {
    let method = Method::Masq;
    let mut case = Case::new(family, "schedule_icmp, persistent datagrams").change(move |change| {
        change.add_service(family.key(UDP), persistent(family, 100, 4)).expect("new");
        change.add_dest(family.key(UDP), family.at(0, PORT), dest(method, 1)).expect("new");
    });
    case = case.setting("schedule_icmp", 1);
    case = reaches(case, (UDP, method), (0, 0), |counts| {
        Counts::none().at(0, DestCounts { templates: 1, ..counts.opening_inactive() })
    });
    case = case.shows(["udp NONE 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80"]);
    case = replies(case, family.reply().udp(b"x"), family.translated_reply().udp(b"x"));
    case.shows(["udp ASSURED 10.1.0.1:0 10.9.9.9:80 10.2.0.11:80"])
}

/// Errors that open none, whatever the setting.
fn opens_nothing(family: Family) -> Case {
    let method = Method::Route;
    let mut case = one(family, "schedule_icmp, errors that open nothing", TCP, method).setting("schedule_icmp", 1);
    let about =
        |frame: Frame| error_to_service(family, ROUTER).error(Says::PortUnreachable, &frame.tcp("A", b"")[ETHERNET..]);
    let reply = family.translated_reply();
    for frame in [
        // From where ip_vs never schedules, of no service, for no client.
        Frame { to: (cast::CLIENT, 20), ..reply },
        Frame { from: (cast::VIP, PORT + 1), ..reply },
        Frame { from: (cast::server(3), PORT), ..reply },
        Frame { to: (Ipv4Addr::new(224, 0, 0, 1), CLIENT_PORT), ..reply },
        Frame { to: (Ipv4Addr::LOCALHOST, CLIENT_PORT), ..reply },
    ] {
        case = case.stops(Wire::Outside, about(frame), Reason::Icmp);
    }
    let udp = reply.udp(b"a");
    case = case.stops(
        Wire::Outside,
        error_to_service(family, ROUTER).error(Says::PortUnreachable, &udp[ETHERNET..]),
        Reason::Icmp,
    );
    if family == Family::Four {
        let mut wrong = error(family, TCP, 7);
        wrong[ETHERNET + 10] ^= 1;
        case = case.stops(Wire::Outside, wrong, Reason::IpChecksum);
    }
    case = case.setting("am_droprate", 1).setting("drop_packet", 3);
    case = case.stops(Wire::Outside, error(family, TCP, 0), Reason::DropPacket).setting("drop_packet", 0);
    case = case.change(move |change| {
        change.edit_dest(family.key(TCP), family.at(0, PORT), dest(method, 0)).expect("there");
    });
    case.stops(Wire::Outside, error(family, TCP, 0), Reason::NoDestination)
}

/// With the table full of established connections, an error goes where the packets go that it is about.
fn without_room(family: Family, method: Method) -> Case {
    let mut case = one(family, format!("{method}: errors without room for a connection"), TCP, method);
    for number in 0..20 {
        case = sends(case, method, (number, 0), |frame| frame.tcp("S", b""), DestCounts::opening_active);
        case = sends(case, method, (number, 0), |frame| frame.tcp("A", b""), |counts| counts);
    }
    for schedules in [0, 1] {
        case = case.setting("schedule_icmp", schedules);
        case = if method == Method::Masq {
            case.stops(Wire::Outside, error(family, TCP, 20), Reason::Icmp)
        } else {
            reaches(case, (TCP, method), (20, 0), |counts| Counts { stateless: 1, ..Counts::none() }.at(0, counts))
        };
    }
    // As soon as there is room, nothing is known.
    case = case.setting("schedule_icmp", 0).pass(902).age();
    case.stops(Wire::Outside, error(family, TCP, 20), Reason::Icmp)
}

/// Which server that is does not depend on what directors count.
fn goes_with_its_connection(family: Family) -> Case {
    let method = Method::Route;
    let dests: Vec<_> = (0..5).map(|index| (index, PORT, method, 1)).collect();
    let mut case = Case::new(family, "errors without room go with their connection").service(TCP, PORT, &dests);
    for number in 0..20 {
        for flags in ["S", "A"] {
            case = case.leaves(Frame { from: client(number), ..family.request() }.tcp(flags, b""));
        }
    }
    for number in 20..40 {
        let request = Frame { from: client(number), ..family.request() };
        case = case.together(vec![request.tcp("S", b""), request.tcp("A", b""), error(family, TCP, number)]);
    }
    case
}

/// Of a service whose datagrams are scheduled one by one nothing is known of any; an error is scheduled like one if it may be.
fn one_by_one(family: Family, method: Method) -> Case {
    let spec = ServiceSpec { flags: service_flag::ONE_PACKET, ..scheduled(Scheduler::Rr) };
    let mut case = Case::new(family, format!("{method}: schedule_icmp, one-packet scheduling")).change(move |change| {
        change.add_service(family.key(UDP), spec).expect("new");
        change.add_dest(family.key(UDP), family.at(0, PORT), dest(method, 1)).expect("new");
    });
    case = case.stops(Wire::Outside, error(family, UDP, 0), Reason::Icmp).setting("schedule_icmp", 1);
    if method == Method::Masq {
        // What the client has got was never translated.
        return case.stops(Wire::Outside, error(family, UDP, 0), Reason::Icmp);
    }
    reaches(case, (UDP, method), (0, 0), |counts| Counts { stateless: 1, ..Counts::none() }.at(0, counts))
}

/// The client is told what is said of its packets in a tunnel, although they are of no connection.
fn in_a_tunnel_without_room(family: Family) -> Case {
    let method = Method::Tunnel;
    let mut case = one(family, "errors about a tunnel without room for a connection", TCP, method);
    let build = |frame: Frame| frame.tcp("A", b"");
    let request = Frame { from: client(20), ..family.request() };
    let sent = forwarded(method, 0, PORT, request, build);
    let inner = build(Frame { ttl: 63, ..request });
    let least = least_quote(family);
    let received = |header| error_about_tunnel(family, INNER_ROUTER, header, &sent, least);
    let header = Says::TtlExpired.header(family);
    case = case.stops(Wire::Inside, received(header), Reason::Icmp);
    for number in 0..20 {
        case = sends(case, method, (number, 0), |frame| frame.tcp("S", b""), DestCounts::opening_active);
        case = sends(case, method, (number, 0), |frame| frame.tcp("A", b""), |counts| counts);
    }
    let counts = Counts { icmp_sent: 1, ..Counts::none() };
    let out = director_error(family).error(Says::TtlExpired, &inner[ETHERNET..ETHERNET + least]);
    case = case.answers(Wire::Inside, received(header), OUTSIDE, out, counts);
    // Another server's tunnel.
    let other = forwarded(method, 1, PORT, request, build);
    let frame = error_about_tunnel(family, INNER_ROUTER, header, &other, least);
    case.stops(Wire::Inside, frame, Reason::Icmp)
}
