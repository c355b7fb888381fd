//! The schedulers: section 3.

use std::{collections::BTreeMap, net::IpAddr};

use super::spec::{DestId, Director, Packet, ServiceKey};

/// Where the scheduler of a service stands.
#[derive(Clone, Debug, Default)]
pub(crate) struct Standing {
    rr: Option<DestId>,
    wrr: Wrr,
    buckets: Vec<Option<DestId>>,
    /// What lblc and lblcr remember of the addresses that packets are sent to.
    cache: BTreeMap<IpAddr, Cached>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Wrr {
    current: Option<DestId>,
    threshold: u32,
    step: u32,
    top: u32,
}

#[derive(Clone, Debug)]
struct Cached {
    /// One for lblc; the newest first for lblcr.
    dests: Vec<DestId>,
    used: u64,
    changed: u64,
}

/// What has become of the destinations of a service.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Added,
    Edited,
    /// It was the one at this place.
    Deleted(usize),
}

/// Buckets of dh and sh, slots of mh and wdh.
const BUCKETS: usize = 256;
const SLOTS: usize = 4093;

/// After how many seconds without use lblc and lblcr forget an address, and after how many without change lblcr takes a
/// destination from it.
const CACHED_S: u64 = 86_400;

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// Section 3.0.
fn hash32(value: u32, bits: u32) -> usize {
    (value.wrapping_mul(0x61c8_8647) >> (32 - bits)) as usize
}

/// Section 3.0.
fn fold(address: IpAddr) -> u32 {
    match address {
        IpAddr::V4(address) => u32::from_be_bytes(address.octets()),
        IpAddr::V6(address) => {
            let words = address.octets();
            words.chunks(4).fold(0, |sum, word| sum ^ u32::from_be_bytes([word[0], word[1], word[2], word[3]]))
        }
    }
}

/// Section 3.11: SipHash-1-3 of a number, with both halves of the key alike.
fn sip(key: u64, x: u32) -> u64 {
    let mut v0 = 0x736f_6d65_7073_6575 ^ key;
    let mut v1 = 0x646f_7261_6e64_6f6d ^ key;
    let mut v2 = 0x6c79_6765_6e65_7261 ^ key;
    let mut v3 = 0x7465_6462_7974_6573 ^ key;
    let b = 4 << 56 | u64::from(x);
    v3 ^= b;
    for round in 0..4 {
        if round == 1 {
            v0 ^= b;
            v2 ^= 0xff;
        }
        v0 = v0.wrapping_add(v1);
        v1 = v1.rotate_left(13) ^ v0;
        v0 = v0.rotate_left(32);
        v2 = v2.wrapping_add(v3);
        v3 = v3.rotate_left(16) ^ v2;
        v0 = v0.wrapping_add(v3);
        v3 = v3.rotate_left(21) ^ v0;
        v2 = v2.wrapping_add(v1);
        v1 = v1.rotate_left(17) ^ v2;
        v2 = v2.rotate_left(32);
    }
    u64::from((v0 ^ v1 ^ v2 ^ v3) as u32)
}

const KEY_1: u64 = 2_654_435_761;
const KEY_2: u64 = 2_654_446_892;

impl Director {
    // What changes do to schedulers, section 3.0.

    /// Begins anew.
    pub(crate) fn init_scheduler(&mut self, key: ServiceKey) {
        let (step, top) = self.step_and_top(key);
        let wrr = Wrr { current: None, threshold: top, step, top };
        let buckets = self.fill(key);
        if let Some(service) = self.services.get_mut(&key) {
            service.standing = Standing { rr: None, wrr, buckets, cache: BTreeMap::new() };
        }
    }

    pub(crate) fn dests_changed(&mut self, key: ServiceKey, change: Change) {
        let (step, top) = self.step_and_top(key);
        let refill = match self.services.get(&key).map_or("", |service| service.spec.scheduler) {
            "dh" => change != Change::Edited,
            "sh" | "mh" | "wdh" => true,
            _ => false,
        };
        let buckets = if refill { Some(self.fill(key)) } else { None };
        let Some(service) = self.services.get_mut(&key) else { return };
        let standing = &mut service.standing;
        if let Some(buckets) = buckets {
            standing.buckets = buckets;
        }
        if service.spec.scheduler == "wrr" {
            let wrr = &mut standing.wrr;
            (wrr.current, wrr.step, wrr.top) = (None, step, top);
            if wrr.threshold > top || wrr.threshold == 0 {
                wrr.threshold = top;
            } else if step > 1 {
                wrr.threshold = wrr.threshold / step * step + 1;
            }
        }
        if let Change::Deleted(place) = change
            && standing.rr.is_some_and(|last| !service.dests.contains(&last))
        {
            standing.rr = place.checked_sub(1).map(|before| service.dests[before]);
        }
    }

    fn weights(&self, key: ServiceKey) -> Vec<u32> {
        let dests = self.services.get(&key).map_or(&[][..], |service| &service.dests);
        dests.iter().map(|dest| self.weight(*dest)).collect()
    }

    fn step_and_top(&self, key: ServiceKey) -> (u32, u32) {
        let weights = self.weights(key);
        let step = weights.iter().copied().fold(0, gcd).max(1);
        (step, weights.iter().copied().max().unwrap_or(0).saturating_sub(step - 1))
    }

    fn fill(&self, key: ServiceKey) -> Vec<Option<DestId>> {
        let Some(service) = self.services.get(&key) else { return Vec::new() };
        let list = &service.dests;
        let turns: Vec<DestId> = match service.spec.scheduler {
            "dh" => list.clone(),
            "sh" => {
                let times = |dest: &DestId| vec![*dest; self.weight(*dest).clamp(1, 256) as usize];
                list.iter().flat_map(times).collect()
            }
            "mh" => return self.maglev(list, |dest| self.dests[dest].last_weight),
            // Ours: a destination of weight 0 has no slots.
            "wdh" => return self.maglev(list, |dest| self.weight(dest)),
            _ => return Vec::new(),
        };
        turns.iter().copied().cycle().take(if turns.is_empty() { 0 } else { BUCKETS }).map(Some).collect()
    }

    fn maglev(&self, list: &[DestId], weight: impl Fn(DestId) -> u32) -> Vec<Option<DestId>> {
        let weights = || list.iter().map(|dest| weight(*dest));
        let common = weights().fold(0, gcd);
        if common == 0 {
            return Vec::new();
        }
        let greatest = weights().max().unwrap_or(0) / common;
        let shift = (32 - greatest.leading_zeros()).saturating_sub(6);
        let mut slots = vec![None; SLOTS];
        let mut positions: Vec<(usize, usize, u32)> = list
            .iter()
            .map(|dest| {
                let server = self.dests[*dest].server;
                let x = fold(server.ip()).wrapping_add(server.port().into());
                let offset = sip(KEY_1, x) as usize % SLOTS;
                let skip = sip(KEY_2, x) as usize % (SLOTS - 1) + 1;
                let turns = if weight(*dest) == 0 { 0 } else { ((weight(*dest) / common) >> shift).max(1) };
                (offset, skip, turns)
            })
            .collect();
        let mut filled = 0;
        loop {
            for (dest, (position, skip, turns)) in list.iter().zip(&mut positions) {
                for _ in 0..*turns {
                    while slots[*position].is_some() {
                        *position = (*position + *skip) % SLOTS;
                    }
                    slots[*position] = Some(*dest);
                    filled += 1;
                    if filled == SLOTS {
                        return slots;
                    }
                }
            }
        }
    }

    // Choices.

    fn weight(&self, dest: DestId) -> u32 {
        self.dests[dest].spec.weight
    }

    fn active(&self, dest: DestId) -> u64 {
        self.dests[dest].active.into()
    }

    /// Whether a destination takes new connections.
    fn usable(&self, dest: DestId) -> bool {
        self.weight(dest) > 0 && self.dests[dest].available && !self.dests[dest].overloaded
    }

    /// Connections of a destination as lc and wlc count them.
    fn overhead(&self, dest: DestId) -> u64 {
        256 * self.active(dest) + u64::from(self.dests[dest].total)
    }

    /// The one with the least overhead for its weight; of equals, the first.
    fn least(&self, dests: &[DestId], overhead: impl Fn(DestId) -> u64) -> Option<DestId> {
        let weight = |dest| u64::from(self.weight(dest));
        dests.iter().copied().reduce(|best, dest| {
            if overhead(best) * weight(dest) > overhead(dest) * weight(best) { dest } else { best }
        })
    }

    fn wlc(&self, dests: &[DestId]) -> Option<DestId> {
        self.least(dests, |dest| self.overhead(dest))
    }

    fn heaviest(&self, dests: impl Iterator<Item = DestId>) -> Option<DestId> {
        dests.reduce(|best, dest| if self.weight(dest) > self.weight(best) { dest } else { best })
    }

    /// The destination for what begins with a packet.
    pub(crate) fn schedule(&mut self, key: ServiceKey, packet: &Packet) -> Option<DestId> {
        let service = self.services.get(&key)?;
        let (scheduler, standing) = (service.spec.scheduler, service.standing.clone());
        let list = service.dests.clone();
        let usable: Vec<DestId> = list.iter().copied().filter(|dest| self.usable(*dest)).collect();
        let shortest = |dests: &[DestId]| self.least(dests, |dest| self.active(dest) + 1);
        match scheduler {
            "rr" => self.rr(key, &list, standing.rr),
            "wrr" => {
                let (picked, wrr) = self.wrr(&list, standing.wrr);
                self.services.get_mut(&key)?.standing.wrr = wrr;
                picked
            }
            "lc" => usable.into_iter().reduce(
                |best, dest| {
                    if self.overhead(best) > self.overhead(dest) { dest } else { best }
                },
            ),
            "wlc" => self.wlc(&usable),
            "sed" => shortest(&usable),
            "nq" => usable.iter().copied().find(|dest| self.active(*dest) == 0).or_else(|| shortest(&usable)),
            "fo" => self.heaviest(usable.into_iter()),
            "ovf" => {
                let has_room = |dest: &DestId| self.active(*dest) <= self.weight(*dest).into();
                self.heaviest(usable.into_iter().filter(has_room))
            }
            "dh" => {
                let bucket = hash32(fold(packet.to.ip()), 8);
                standing.buckets.get(bucket).copied().flatten().filter(|dest| self.usable(*dest))
            }
            "sh" | "mh" | "wdh" => self.hashed(key, packet, &standing.buckets),
            "lblc" | "lblcr" => {
                let (picked, cached) = self.locality(&list, standing.cache.get(&packet.to.ip()), scheduler == "lblcr");
                let cache = &mut self.services.get_mut(&key)?.standing.cache;
                match cached {
                    Some(cached) => cache.insert(packet.to.ip(), cached),
                    None => cache.remove(&packet.to.ip()),
                };
                picked
            }
            other => panic!("no scheduler {other}"),
        }
    }

    fn rr(&mut self, key: ServiceKey, list: &[DestId], last: Option<DestId>) -> Option<DestId> {
        let start = last.and_then(|last| list.iter().position(|dest| *dest == last)).map_or(0, |at| at + 1);
        let picked = (0..list.len()).map(|turn| list[(start + turn) % list.len()]).find(|dest| self.usable(*dest))?;
        self.services.get_mut(&key)?.standing.rr = Some(picked);
        Some(picked)
    }

    fn wrr(&self, list: &[DestId], mut wrr: Wrr) -> (Option<DestId>, Wrr) {
        if wrr.top == 0 {
            return (None, wrr);
        }
        let last = wrr.current;
        let mut after = last.and_then(|last| list.iter().position(|dest| *dest == last)).map_or(0, |at| at + 1);
        let (mut stop, mut last_pass, mut restarted) = (None, false, false);
        loop {
            for &dest in &list[after..] {
                if self.usable(dest) && self.weight(dest) >= wrr.threshold {
                    wrr.current = Some(dest);
                    return (Some(dest), wrr);
                }
                if Some(dest) == stop {
                    wrr.current = Some(dest);
                    return (None, wrr);
                }
            }
            after = 0;
            if wrr.threshold > wrr.step {
                wrr.threshold -= wrr.step;
            } else {
                wrr.threshold = wrr.top;
                if last_pass || last.is_none() {
                    wrr.current = None;
                    return (None, wrr);
                }
                restarted = true;
            }
            last_pass = wrr.threshold <= wrr.step;
            if last_pass && restarted && last.is_some() {
                stop = last;
            }
        }
    }

    /// sh and mh by the client; wdh, which is ours, like mh with its fallback by the address that the packet is sent to.
    fn hashed(&self, key: ServiceKey, packet: &Packet, buckets: &[Option<DestId>]) -> Option<DestId> {
        let spec = &self.services.get(&key)?.spec;
        if buckets.is_empty() {
            return None;
        }
        let port = if spec.with_port { packet.from.port() } else { 0 };
        let x = match spec.scheduler {
            "wdh" => fold(packet.to.ip()),
            _ => fold(packet.from.ip()).wrapping_add(port.into()),
        };
        let probes: Vec<usize> = if spec.scheduler == "sh" {
            let first = hash32(x, 8);
            [first].into_iter().chain((0..BUCKETS).map(|k| (2 * first + k) % BUCKETS)).collect()
        } else {
            let slot = |offset: usize| sip(KEY_1, x.wrapping_add(offset as u32)) as usize % SLOTS;
            let first = slot(0);
            // Computed as they are asked for, there are so many.
            let falls_back = spec.fallback || spec.scheduler == "wdh";
            let others = if falls_back { SLOTS } else { 0 };
            return [first]
                .into_iter()
                .chain((0..others).map(|k| slot((k + first) % SLOTS)))
                .filter_map(|slot| buckets[slot])
                .find(|dest| self.usable(*dest));
        };
        let probes = if spec.fallback { &probes[..] } else { &probes[..1] };
        probes.iter().filter_map(|probe| buckets[*probe]).find(|dest| self.usable(*dest))
    }

    /// lblc and lblcr, sections 3.13 and 3.14: the destination, and what is remembered then. Ours forget an address exactly a
    /// day after it was last used, whereas ip_vs looks every half an hour.
    fn locality(&self, list: &[DestId], known: Option<&Cached>, replicated: bool) -> (Option<DestId>, Option<Cached>) {
        let day = CACHED_S * super::spec::HZ;
        let mut cached = known.filter(|known| self.now < known.used + day).cloned();
        let is_overloaded = |dest: DestId| {
            self.active(dest) > self.weight(dest).into()
                && list.iter().any(|other| 2 * self.active(*other) < self.weight(*other).into())
        };
        if let Some(cached) = &mut cached {
            cached.used = self.now;
            let best = if replicated {
                let set: Vec<DestId> = cached.dests.iter().copied().filter(|dest| self.usable(*dest)).collect();
                self.wlc(&set)
            } else {
                // Thresholds do not count.
                cached.dests.first().copied().filter(|dest| self.dests[*dest].available && self.weight(*dest) > 0)
            };
            if replicated && cached.dests.len() > 1 && self.now > cached.changed + day {
                let weight = |dest| u64::from(self.weight(dest));
                let most = cached.dests.iter().copied().filter(|dest| weight(*dest) > 0).reduce(|most, dest| {
                    if self.overhead(most) * weight(dest) < self.overhead(dest) * weight(most) { dest } else { most }
                });
                cached.dests.retain(|dest| Some(*dest) != most);
                cached.changed = self.now;
            }
            if let Some(best) = best.filter(|best| !is_overloaded(*best)) {
                return (Some(best), Some(cached.clone()));
            }
        }
        let usable: Vec<DestId> = list.iter().copied().filter(|dest| self.usable(*dest)).collect();
        let Some(picked) = self.wlc(&usable) else { return (None, cached) };
        let fresh = Cached { dests: vec![picked], used: self.now, changed: self.now };
        let cached = match cached {
            Some(mut cached) if replicated => {
                if !cached.dests.contains(&picked) {
                    cached.dests.insert(0, picked);
                    cached.changed = self.now;
                }
                cached
            }
            _ => fresh,
        };
        (Some(picked), Some(cached))
    }
}
