//! Frames that are cut short, lie about their lengths, or are random: nothing crashes, nothing unsound is forwarded, and
//! everything that is not forwarded counts under exactly one reason.

use lb_common::{proto::Method, reason::Reason, sctp::chunk};
use lb_userspace::control::model::Transport;
use proptest::{prelude::*, strategy::ValueTree as _};
use xdpvs_tests::{
    cases::{self, Case},
    cast,
    executor::{Counts, Executor, Host, Kernel, Outcome, SMALL_TABLE, Verdict, Wire},
    family::Family,
    frames::{ETHERNET, Frame},
    world::{dest, scheduled},
};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;

fn be16(bytes: &[u8], offset: usize) -> usize {
    bytes.get(offset..offset + 2).map_or(0, |word| usize::from(u16::from_be_bytes([word[0], word[1]])))
}

/// The one's complement sum of a header.
fn header_sum(header: &[u8]) -> u32 {
    let sum = header.chunks(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]]))).sum::<u32>();
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) + (sum >> 16)
}

/// Puts the right checksum into the IP header of a frame, as far as there is one.
fn mend(frame: &mut [u8]) {
    const IPV4: usize = Family::Four.header();
    if Family::of(frame) != Some(Family::Four) {
        return;
    }
    let Some(first) = frame.get(ETHERNET) else { return };
    let end = ETHERNET + 4 * usize::from(first & 0xf);
    let Some(header) = frame.get_mut(ETHERNET..end).filter(|header| header.len() >= IPV4) else { return };
    header[10..12].fill(0);
    let sum = header_sum(header) as u16;
    header[10..12].copy_from_slice(&(!sum).to_be_bytes());
}

/// Whether a director may forward a frame at all: written from the RFCs, not from the code under test.
fn is_sound(frame: &[u8]) -> bool {
    let Some(family) = Family::of(frame) else { return false };
    if frame.len() < ETHERNET + family.header() || frame[0] & 1 != 0 {
        return false;
    }
    let ip = &frame[ETHERNET..];
    let (version, header, total, protocol) = match family {
        Family::Four => (4, 4 * usize::from(ip[0] & 0xf), be16(ip, 2), ip[9]),
        Family::Six => (6, family.header(), family.header() + be16(ip, 4), ip[6]),
    };
    if ip[0] >> 4 != version || header < family.header() || header > total || total > ip.len() {
        return false;
    }
    if family == Family::Four && (be16(ip, 6) & 0x3fff != 0 || header_sum(&ip[..header]) != 0xffff) {
        return false;
    }
    let least = match protocol {
        TCP | UDP | SCTP => usize::from(transport(protocol).0),
        other if other == family.icmp() => 8 + family.header() + 8,
        _ => return false,
    };
    total - header >= least
}

/// How many bytes a transport header has at the least, and where in it a length stands.
fn transport(protocol: u8) -> (u16, usize) {
    match protocol {
        TCP => (20, 12),
        UDP => (8, 4),
        // The common header and that of a chunk.
        SCTP => (16, 14),
        _ => panic!("no transport protocol of services"),
    }
}

/// Whether what became of a frame may become of it.
fn check(frame: &[u8], outcome: &Outcome, counts: &Counts) -> Result<(), String> {
    let stopped = counts.reasons.values().sum::<i64>();
    let sound = is_sound(frame);
    let fault = match outcome.verdict {
        Verdict::Drop | Verdict::Pass if stopped != 1 => "counted under no reason, or several",
        Verdict::Drop | Verdict::Pass if !sound && outcome.frame != frame => "unsound, and changed",
        Verdict::HandOver(..) if stopped != 1 => "counted under no reason, or several",
        Verdict::HandOver(..) | Verdict::Transmit | Verdict::Redirect(_) if !sound => "unsound, and forwarded",
        Verdict::Transmit | Verdict::Redirect(_) if stopped > counts.icmp_sent => "forwarded, and counted as stopped",
        Verdict::HandOver(..) | Verdict::Transmit | Verdict::Redirect(_) if !has_right_checksum(&outcome.frame) => {
            "forwarded with a wrong checksum"
        }
        _ if !sound && !counts.dests.values().all(|dest| dest.packets_in == 0 && dest.packets_out == 0) => {
            "unsound, and counted as traffic"
        }
        _ => return Ok(()),
    };
    Err(format!("{fault}: {frame:02x?}\n{outcome:?}\n{counts:?}"))
}

fn has_right_checksum(frame: &[u8]) -> bool {
    let header = 4 * usize::from(frame[ETHERNET] & 0xf);
    Family::of(frame) == Some(Family::Six) || header_sum(&frame[ETHERNET..ETHERNET + header]) == 0xffff
}

/// Lets a frame arrive, and checks what becomes of it.
fn arrive(executor: &mut impl Executor, wire: Wire, frame: &[u8]) -> (Outcome, Counts) {
    let before = executor.counts();
    let outcome = executor.arrive(wire, frame);
    let counts = executor.counts().since(&before);
    if let Err(fault) = check(frame, &outcome, &counts) {
        panic!("{}: {fault}", executor.name());
    }
    (outcome, counts)
}

/// The reason for which a frame stops that ends after `len` bytes of the whole `frame`; `None` when only padding is gone.
fn reason_for_cut(frame: &[u8], len: usize) -> Option<Reason> {
    let Some(family) = Family::of(frame).filter(|_| len >= ETHERNET) else { return Some(Reason::NotIp) };
    if frame[0] & 1 != 0 {
        return Some(Reason::NotUnicast);
    }
    let (header, total) = match family {
        Family::Four => (4 * usize::from(frame[ETHERNET] & 0xf), be16(frame, ETHERNET + 2)),
        Family::Six => (family.header(), family.header() + be16(frame, ETHERNET + 4)),
    };
    if len < ETHERNET + header.max(family.header()) {
        return Some(Reason::IpTruncated);
    }
    (len < ETHERNET + total).then_some(Reason::IpTotalLength)
}

/// Every frame of every case, cut at every offset, right before the whole frame arrives.
fn cut_everywhere(executor: &mut impl Executor, cases: &[Case], least: usize, step: usize) -> usize {
    let mut cuts = 0;
    for case in cases {
        cases::rehearse(case, executor, &mut |executor, wire, frame| {
            for len in (least..frame.len()).step_by(step) {
                let Some(reason) = reason_for_cut(frame, len) else { continue };
                let cut = &frame[..len];
                let (outcome, counts) = arrive(executor, wire, cut);
                assert_eq!(
                    (outcome.verdict, counts),
                    (Verdict::Pass, Counts::of(reason)),
                    "{}: {cut:02x?}",
                    case.name()
                );
                cuts += 1;
            }
        });
    }
    cuts
}

#[test]
fn every_frame_cut_at_every_offset_stops_for_one_reason() {
    let cuts = cut_everywhere(&mut Host::new(SMALL_TABLE), &cases::all(), 0, 1);
    assert!(cuts > 50_000, "only {cuts} cuts");
}

#[test]
fn frames_cut_here_and_there_stop_for_one_reason_in_the_kernel() {
    // The kernel runs no program on less than an Ethernet header.
    let cases: Vec<Case> = cases::all().into_iter().step_by(7).collect();
    let work = move |kernel: &mut Kernel<'_>| cut_everywhere(kernel, &cases, ETHERNET, 13);
    let cuts = Kernel::with("cuts", SMALL_TABLE, work).expect("a director in the kernel");
    assert!(cuts > 500, "only {cuts} cuts");
}

const FROM_CLIENT: ([u8; 6], [u8; 6]) = (cast::CLIENT_MAC, cast::DIRECTOR_OUTSIDE_MAC);
const REQUEST: Frame = Frame::new(FROM_CLIENT, (cast::CLIENT, 40_000), (cast::VIP, 80));
const ELSEWHERE: Frame = Frame::new(FROM_CLIENT, (cast::CLIENT, 40_000), (cast::DIRECTOR_OUTSIDE, 80));

/// A director with a service by every method over both families, and a connection to each.
fn busy(executor: &mut impl Executor) {
    executor.reset();
    for (family, (port, method)) in
        Family::ALL.into_iter().flat_map(|family| (80..).zip(Method::ALL).map(move |service| (family, service)))
    {
        for protocol in [Transport::Tcp, Transport::Udp, Transport::Sctp] {
            let key = family.service(protocol, port);
            executor.change(&|change| {
                change.add_service(key, scheduled(lb_common::proto::Scheduler::Rr)).expect("new");
                change.add_dest(key, family.at(0, port), dest(*method, 1)).expect("new");
            });
        }
        let request = Frame { family, to: (cast::VIP, port), ..REQUEST };
        for frame in [
            request.tcp("S", b""),
            request.udp(b"x"),
            request.sctp(&[(chunk::INIT, b"")]),
            request.sctp(&[(chunk::INIT, b"")]),
        ] {
            let (outcome, _) = arrive(executor, Wire::Outside, &frame);
            assert!(matches!(outcome.verdict, Verdict::Redirect(_)));
        }
    }
}

/// What is to become of a frame whose header says something that is not so.
struct Lie {
    /// The frame; its header checksum is right.
    frame: Vec<u8>,
    /// Why it stops; `None` when it is forwarded, for ip_vs forwards it too.
    reason: Option<Reason>,
}

fn lie(frame: &[u8], change: impl Fn(&mut Vec<u8>), reason: impl Into<Option<Reason>>) -> Lie {
    let mut frame = frame.to_vec();
    change(&mut frame);
    mend(&mut frame);
    Lie { frame, reason: reason.into() }
}

fn set16(frame: &mut [u8], offset: usize, value: u16) {
    frame[offset..offset + 2].copy_from_slice(&value.to_be_bytes());
}

fn lies4() -> Vec<Lie> {
    let mut lies = Vec::new();
    for (service, frame) in [
        (true, REQUEST.tcp("A", b"sixteen bytes ..")),
        (true, REQUEST.udp(b"sixteen bytes ..")),
        (true, REQUEST.sctp(&[(chunk::DATA, b"sixteen bytes ..")])),
        (false, ELSEWHERE.tcp("A", b"sixteen bytes ..")),
        (false, ELSEWHERE.udp(b"sixteen bytes ..")),
        (false, ELSEWHERE.sctp(&[(chunk::DATA, b"sixteen bytes ..")])),
    ] {
        let (first, total) = (ETHERNET, ETHERNET + 2);
        let len = (frame.len() - ETHERNET) as u16;
        let truncated = if service { Reason::TransportTruncated } else { Reason::NotService };
        let (least, length) = transport(frame[ETHERNET + 9]);
        for version in (0..16).filter(|version| *version != 4) {
            lies.push(lie(&frame, |frame| frame[first] = version << 4 | 5, Reason::IpVersion));
        }
        for words in 0..5 {
            lies.push(lie(&frame, |frame| frame[first] = 0x40 | words, Reason::IpHeaderLength));
        }
        for words in 6..16u16 {
            // The transport header begins later, or the IP header ends behind the packet.
            let header = 4 * words;
            let reason = match () {
                () if header > len => Reason::IpTruncated,
                () if len - header < least => truncated,
                // Other bytes are other ports.
                () => Reason::NotService,
            };
            lies.push(lie(&frame, |frame| frame[first] = 0x40 | words as u8, reason));
            // In a longer frame the header ends within it, but behind the packet.
            let padded = |frame: &mut Vec<u8>| {
                frame.resize(frame.len() + 60, 0);
                frame[first] = 0x40 | words as u8;
            };
            lies.push(lie(&frame, padded, if header > len { Reason::IpTotalLength } else { reason }));
        }
        for said in (0..20).chain([len + 1, len + 2, 1500, 0x7fff, 0x8000, 0xffff]) {
            lies.push(lie(&frame, |frame| set16(frame, total, said), Reason::IpTotalLength));
        }
        for said in 20..20 + least {
            lies.push(lie(&frame, |frame| set16(frame, total, said), truncated));
        }
        if service {
            // What is behind the end that the header says is padding. It is forwarded with the packet.
            for said in 20 + least..len {
                lies.push(lie(&frame, |frame| set16(frame, total, said), None));
            }
            // Lengths of the transport header are the server's business, as for ip_vs.
            for value in [0, 4, 8, 15] {
                let offset = ETHERNET + 20 + length;
                lies.push(lie(&frame, |frame| frame[offset] = value << 4, None));
            }
        }
    }
    // ICMP: too short for a header, and an error that quotes less than a header.
    for len in 0..28 {
        lies.push(lie(&REQUEST.packet(Family::Four.icmp(), &[3; 28][..len]), |_| (), Reason::Icmp));
    }
    lies
}

fn lies6() -> Vec<Lie> {
    let family = Family::Six;
    let mut lies = Vec::new();
    for (service, request) in [(true, REQUEST), (false, ELSEWHERE)] {
        let request = Frame { family, ..request };
        for frame in [
            request.tcp("A", b"sixteen bytes .."),
            request.udp(b"sixteen bytes .."),
            request.sctp(&[(chunk::DATA, b"sixteen bytes ..")]),
        ] {
            let (first, payload) = (ETHERNET, ETHERNET + 4);
            let len = (frame.len() - ETHERNET - family.header()) as u16;
            let truncated = if service { Reason::TransportTruncated } else { Reason::NotService };
            let (least, length) = transport(frame[ETHERNET + 6]);
            for version in (0..16).filter(|version| *version != 6) {
                lies.push(lie(&frame, |frame| frame[first] = version << 4, Reason::IpVersion));
            }
            for said in [len + 1, len + 2, 1500, 0x7fff, 0x8000, 0xffff] {
                lies.push(lie(&frame, |frame| set16(frame, payload, said), Reason::IpTotalLength));
            }
            // None at all is what a jumbogram says, whose length is in an option.
            for said in 0..least {
                lies.push(lie(&frame, |frame| set16(frame, payload, said), truncated));
            }
            if service {
                // What is behind the end that the header says is a trailer. It is forwarded with the packet.
                for said in least..len {
                    lies.push(lie(&frame, |frame| set16(frame, payload, said), None));
                }
                // Lengths of the transport header are the server's business, as for ip_vs.
                for value in [0, 4, 8, 15] {
                    let offset = ETHERNET + family.header() + length;
                    lies.push(lie(&frame, |frame| frame[offset] = value << 4, None));
                }
            }
        }
    }
    // ICMP: too short for a header, and an error that quotes less than a header.
    for len in 0..48 {
        lies.push(lie(&Frame { family, ..REQUEST }.packet(family.icmp(), &[1; 48][..len]), |_| (), Reason::Icmp));
    }
    lies
}

fn tell_lies(executor: &mut impl Executor) {
    busy(executor);
    for Lie { frame, reason } in lies4().into_iter().chain(lies6()) {
        let (outcome, mut counts) = arrive(executor, Wire::Outside, &frame);
        counts.dests.clear();
        match reason {
            Some(reason) => {
                let verdict = if Reason::passes(reason as u8) { Verdict::Pass } else { Verdict::Drop };
                assert_eq!((outcome.verdict, counts), (verdict, Counts::of(reason)), "{frame:02x?}");
                assert_eq!(outcome.frame, frame);
            }
            None => {
                assert!(Verdict::redirect(Wire::Inside).is_met_by(outcome.verdict), "{outcome:?}");
                assert_eq!((counts, outcome.frame.len()), (Counts::none(), frame.len()), "{frame:02x?}");
            }
        }
    }
    executor.audit().expect("exact counters");
}

#[test]
fn lengths_and_versions_that_are_not_so() {
    tell_lies(&mut Host::new(SMALL_TABLE));
}

#[test]
fn lengths_and_versions_that_are_not_so_in_the_kernel() {
    Kernel::with("lies", SMALL_TABLE, |kernel| tell_lies(kernel)).expect("a director in the kernel");
}

/// What is done to a frame: bytes are changed, it is cut, and its header checksum is mended.
type Damage = (Vec<(prop::sample::Index, u8)>, Option<prop::sample::Index>, bool);

fn damaged(frame: &[u8], (bytes, cut, mended): &Damage) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for (index, value) in bytes {
        let index = index.index(frame.len());
        frame[index] = *value;
    }
    if *mended {
        mend(&mut frame);
    }
    if let Some(cut) = cut {
        frame.truncate(cut.index(frame.len()));
    }
    frame
}

fn damage() -> impl Strategy<Value = Damage> {
    // Most of what is looked at is in the headers.
    let byte = (any::<prop::sample::Index>(), any::<u8>());
    (prop::collection::vec(byte, 0..6), prop::option::weighted(0.2, any::<prop::sample::Index>()), any::<bool>())
}

/// Frames of the cases, without the long ones: their payload is not looked at.
fn base_frames() -> Vec<(Wire, Vec<u8>)> {
    let mut frames: Vec<_> = cases::all()
        .iter()
        .flat_map(|case| case.frames().map(|(wire, frame)| (wire, frame.to_vec())).collect::<Vec<_>>())
        .filter(|(_, frame)| frame.len() <= 128)
        .collect();
    frames.sort_by(|a, b| a.1.cmp(&b.1));
    frames.dedup();
    frames
}

#[test]
fn random_damage_does_no_harm() {
    let frames = base_frames();
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::with_cases(2_000)
    });
    // One director for all of it: whatever state it is in, nothing may go wrong.
    let host = std::cell::RefCell::new(Host::new(SMALL_TABLE));
    busy(&mut *host.borrow_mut());
    let strategy = prop::collection::vec((any::<prop::sample::Index>(), damage()), 1..8);
    runner
        .run(&strategy, |hits| {
            let host = &mut *host.borrow_mut();
            for (index, damage) in &hits {
                let (wire, frame) = &frames[index.index(frames.len())];
                let frame = damaged(frame, damage);
                let before = host.counts();
                let outcome = host.arrive(*wire, &frame);
                let counts = host.counts().since(&before);
                prop_assert_eq!(check(&frame, &outcome, &counts), Ok(()));
            }
            prop_assert!(host.audit().is_ok());
            Ok(())
        })
        .expect("no harm");
}

#[test]
fn the_kernel_and_the_host_agree_about_random_damage() {
    let frames = base_frames();
    let work = |kernel: &mut Kernel<'_>| {
        let mut host = Host::new(SMALL_TABLE);
        busy(&mut host);
        busy(kernel);
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        for number in 0..400 {
            let (wire, frame) = &frames[number * 7919 % frames.len()];
            let damage = damage().new_tree(&mut runner).expect("some damage").current();
            let frame = damaged(frame, &damage);
            if frame.len() < ETHERNET {
                continue;
            }
            let (there, counts_there) = arrive(&mut host, *wire, &frame);
            let (here, counts_here) = arrive(kernel, *wire, &frame);
            assert_eq!(counts_here, counts_there, "{frame:02x?}");
            assert!(there.verdict.is_met_by(here.verdict), "{there:?} {here:?} {frame:02x?}");
        }
        kernel.audit().expect("exact counters");
    };
    Kernel::with("damage", SMALL_TABLE, work).expect("a director in the kernel");
}
