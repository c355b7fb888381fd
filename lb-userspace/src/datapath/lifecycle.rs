//! Starting and ending an instance, each as a whole or not at all.

use std::fmt;

use crate::{
    control::session::Session,
    datapath::{
        attach::{self, Outcome, Plan, Wish},
        forwarding,
        load::{self, Programs},
        pace::Pace,
        place::{Lock, Place},
        sizes::Capacity,
    },
    error::{Error, with_causes},
};

/// What an instance is to be like.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Request {
    /// Names of the interfaces to attach to.
    pub interfaces: Vec<String>,
    /// How the programs are to run on them.
    pub wish: Wish,
    /// IPv4 connections to make room for, 1,000 to 16,777,216.
    pub flows: Option<u32>,
    /// IPv6 connections to make room for, 1,000 to 16,777,216.
    pub flows6: Option<u32>,
    /// Services to make room for, 1 to 65,536.
    pub services: Option<u32>,
    /// Destinations to make room for, 1 to 262,144.
    pub dests: Option<u32>,
    /// Milliseconds in which the flow table is looked at for connections that are over, 10 to 60,000.
    pub sweep_ms: Option<u32>,
}

impl Request {
    /// The sizes of a new instance.
    fn capacity(&self) -> Capacity {
        let default = Capacity::default();
        let flows = self.flows.unwrap_or(default.flows);
        Capacity {
            flows,
            flows6: self.flows6.unwrap_or_else(|| Capacity::flows6_for(flows)),
            services: self.services.unwrap_or(default.services),
            dests: self.dests.unwrap_or(default.dests),
        }
    }

    /// Refuses what a running instance would have to be made anew for.
    fn check(&self, session: &Session) -> Result<(), Error> {
        let instance = session.maps().instance();
        for (option, wanted, found) in [
            ("flows", self.flows, instance.max_flows),
            ("flows6", self.flows6, instance.max_flows6),
            ("services", self.services, instance.services),
            ("dests", self.dests, instance.dests),
        ] {
            if wanted.is_some_and(|wanted| wanted != found) {
                return Err(Error::Capacity { name: session.place().name().to_owned(), option, found });
            }
        }
        Ok(())
    }

    /// The pace of ageing, if one is wanted, in flow tables of `buckets` buckets for `flows` connections.
    fn pace(&self, buckets: u32, flows: u32) -> Result<Option<Pace>, Error> {
        let Some(sweep_ms) = self.sweep_ms else { return Ok(None) };
        let pace = Pace::new(buckets, sweep_ms);
        let shortest = Pace::shortest_ms(buckets);
        pace.map(Some).ok_or(Error::Sweep { wanted: sweep_ms, flows, shortest })
    }
}

/// What the user should know although nothing has failed.
#[derive(Debug)]
pub enum Notice {
    /// The programs run in the kernel's receive path, because the driver has not taken them.
    Generic {
        /// The interface.
        interface: String,
        /// The kernel's answer.
        why: String,
    },
    /// An interface that the instance was attached to is no more.
    Gone {
        /// The interface.
        interface: String,
    },
}

impl fmt::Display for Notice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Generic { interface, why } => write!(
                f,
                "{interface}: the driver does not run XDP programs ({why}); using generic mode, which is much slower"
            ),
            Self::Gone { interface } => write!(f, "{interface}: gone, or taken by another XDP program; left out"),
        }
    }
}

/// Starts the instance at `place`; or, if it runs, gives it this program's data plane and more interfaces, without harm
/// to connections and packets.
///
/// # Errors
///
/// When the request cannot be met: nothing has changed then.
pub fn up(place: &Place, request: &Request) -> Result<Vec<Notice>, Error> {
    let lock = place.lock()?;
    if place.exists() { renew(place, &lock, request) } else { start(place, &lock, request) }
}

fn start(place: &Place, lock: &Lock, request: &Request) -> Result<Vec<Notice>, Error> {
    // Of an instance that does not exist nothing is linked: the plan is about the interfaces named.
    let plans = attach::plan(place, &request.interfaces, request.wish)?;
    let capacity = request.capacity();
    let pace = request.pace(capacity.flow_buckets() + capacity.flow_buckets6(), capacity.flows + capacity.flows6)?;
    let mut programs = load::create(place, lock, &capacity)?;
    let started = attach_each(place, &mut programs, plans.iter(), request.wish).and_then(|notices| {
        forwarding::switch_on(place)?;
        load::start_ageing(place, Session::open(place)?.maps(), pace)?;
        Ok(notices)
    });
    started.inspect_err(|_| {
        // The first failure is the one to tell; what this leaves, `down` removes.
        let _ = end(place, lock);
    })
}

fn renew(place: &Place, lock: &Lock, request: &Request) -> Result<Vec<Notice>, Error> {
    let mut session = Session::open(place)?;
    session.recover(lock)?;
    request.check(&session)?;
    let instance = session.maps().instance();
    let pace = request.pace(instance.buckets(), instance.max_flows + instance.max_flows6)?;
    let plans = attach::plan(place, &request.interfaces, request.wish)?;
    let mut programs = load::replace(place, lock, session.maps())?;
    let (linked, new): (Vec<&Plan>, Vec<&Plan>) = plans.iter().partition(|plan| plan.is_linked());
    // What may be refused comes first: then nothing runs the new programs that cannot be taken back.
    let attached = attach_each(place, &mut programs, new.iter().copied(), request.wish)
        .and_then(|notices| forwarding::switch_on(place).map(|()| notices));
    let mut notices = attached.inspect_err(|_| {
        for plan in &new {
            let _ = attach::detach(place, plan.name());
        }
        let _ = load::discard_newest(place, lock);
    })?;
    notices.extend(attach_each(place, &mut programs, linked.into_iter(), request.wish)?);
    load::start_ageing(place, session.maps(), pace)?;
    load::retire(place, lock)?;
    Ok(notices)
}

fn attach_each<'a>(
    place: &Place,
    programs: &mut Programs,
    plans: impl Iterator<Item = &'a Plan>,
    wish: Wish,
) -> Result<Vec<Notice>, Error> {
    let mut notices = Vec::new();
    for plan in plans {
        let interface = plan.name().to_owned();
        match attach::attach(place, programs, plan, wish)? {
            Outcome::Attached => {}
            Outcome::FellBack(why) => notices.push(Notice::Generic { interface, why: with_causes(&why) }),
            Outcome::Gone => notices.push(Notice::Gone { interface }),
        }
    }
    Ok(notices)
}

/// Ends the instance at `place`, whatever version of this program has made it.
///
/// # Errors
///
/// [`Error::NotRunning`].
pub fn down(place: &Place) -> Result<(), Error> {
    let lock = place.lock()?;
    if !place.exists() {
        load::remove(place, &lock)?;
        return Err(Error::NotRunning { name: place.name().to_owned() });
    }
    end(place, &lock)
}

fn end(place: &Place, lock: &Lock) -> Result<(), Error> {
    attach::detach_all(place)?;
    forwarding::restore(place)?;
    load::remove(place, lock)
}
