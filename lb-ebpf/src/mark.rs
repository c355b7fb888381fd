//! Which mark a packet has, and which service is for it: the director's own classifier (see [`lb_common::mark`]).

use lb_common::{
    abi::{EndpointKey as _, Target},
    addr::Address,
    mark::{self, RULES, STARTS, Subject},
    reason::Reason,
};

use crate::{
    endpoint,
    env::{Env, Scan},
    packet::Packet,
    parse::{self, Ip},
    pipeline::EndpointOf,
    tables::{Tables, TablesOf},
};

/// The service of a packet's mark.
///
/// Verifier: one word, and no address of any. The [`Target`] that the service is, without what else it is, 0 when there is no
/// service, or all ones when the rules were changed meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Marked(u64);

impl Marked {
    /// There is no service.
    pub const NONE: Self = Self(0);
    const CHANGED: Self = Self(u64::MAX);

    /// The service that an endpoint is.
    #[inline(always)]
    pub const fn of(target: Target) -> Self {
        Self(if target.0 as u32 == 0 { 0 } else { target.0 & (0xffff_ffff | Target::PERSISTENT) })
    }

    /// The index of the view of the service, if there is one.
    ///
    /// # Errors
    ///
    /// [`Reason::ConfigurationChanged`].
    #[inline(always)]
    pub fn view(self) -> Result<Option<u32>, Reason> {
        Ok(self.target()?.view())
    }

    /// The service as an endpoint.
    ///
    /// # Errors
    ///
    /// [`Reason::ConfigurationChanged`].
    #[inline(always)]
    pub const fn target(self) -> Result<Target, Reason> {
        match self {
            Self::CHANGED => Err(Reason::ConfigurationChanged),
            Self(bits) => Ok(Target(bits)),
        }
    }

    /// This as a word.
    #[inline(always)]
    pub const fn bits(self) -> u64 {
        self.0
    }

    /// What these bits stand for.
    #[inline(always)]
    pub const fn from_bits(bits: u64) -> Self {
        Self(bits)
    }
}

/// The service of the mark that the packet has by the rules in force.
#[inline(always)]
pub fn service<I, P, T, E>(packet: &P, tables: &T, env: &E) -> Marked
where
    I: Ip,
    P: Packet,
    T: TablesOf<I::Addr>,
    E: Env,
{
    let Ok((ip, segment)) = parse::whole::<I>(packet) else { return Marked::NONE };
    let subject = Subject::new(ip.source(), segment.destination(), segment.protocol(), env.ingress());
    let Some(mark) = classify::<I::Addr>(tables, env, ip.destination(), subject) else { return Marked::CHANGED };
    if mark == 0 {
        return Marked::NONE;
    }
    Marked::of(endpoint::find(tables, EndpointOf::<I>::mark(mark)))
}

/// The mark of a packet to `destination`, 0 if it has none; `None` when the rules were changed meanwhile.
#[inline(always)]
pub fn classify<A: Address>(tables: &impl Tables, env: &impl Env, destination: A, subject: Subject) -> Option<u32> {
    let marks = tables.marks()?;
    let in_force = marks.in_force.load();
    let first = chain(tables, mark::first_start(in_force, A::FAMILY), destination.halves());
    if first == 0 {
        return Some(0);
    }
    let mut search = Search { tables, subject, next: first, best: NONE };
    env.scan(RULES, &mut search);
    let mark = tables.mark_rule(search.best).map_or(0, |rule| rule.mark.load());
    (marks.begun.load().wrapping_sub(in_force) <= 1).then_some(mark)
}

/// The index of no rule.
const NONE: u32 = u32::MAX;

/// The first rule of the chain for an address, of the starts from index `start` on.
#[inline(always)]
fn chain(tables: &impl Tables, start: u32, address: [u64; 2]) -> u32 {
    let mut found = 0;
    for bit in (0..STARTS.ilog2()).rev() {
        let candidate = found | 1 << bit;
        let Some(piece) = tables.mark_start(start + candidate) else { return 0 };
        // Verifier: hidden, or it would follow every way through the search.
        found = tables.hide(u64::from(found) | piece.is_at_or_before(address) << bit) as u32;
    }
    tables.mark_start(start + found).map_or(0, |piece| piece.first.load())
}

/// Goes along a chain. Chains end by themselves; the number of visits bounds what a chain can cost that is being rewritten.
struct Search<'t, T> {
    tables: &'t T,
    subject: Subject,
    /// The rule to look at next.
    next: u32,
    /// Of the rules that are true, the one added first; [`NONE`] while there is none.
    best: u32,
}

impl<T: Tables> Scan for Search<'_, T> {
    #[inline(always)]
    fn hide(&mut self, hide: impl Fn(u64) -> u64) {
        self.best = hide(self.best.into()) as u32;
    }

    #[inline(always)]
    fn visit(&mut self, _: u32) -> bool {
        let number = self.next;
        let Some(rule) = self.tables.mark_rule(number) else { return false };
        if number < self.best && rule.is_true_of(&self.subject) {
            self.best = number;
        }
        self.next = rule.next.load();
        self.next != 0
    }
}
