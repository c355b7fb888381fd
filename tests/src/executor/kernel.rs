//! The director in the kernel: loaded as `xdpvs up` loads it, in a network namespace with real routes and neighbours.
//!
//! Frames reach its program by `BPF_PROG_TEST_RUN`, without an interface under it. Of a redirect the kernel then reports
//! the fact, but not the interface, which the host's executor checks.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use aya::{
    maps::{Array, Map, MapData},
    programs::{TestRun as _, TestRunOptions, Xdp},
};
use aya_obj::programs::XdpAttachType;
use lb_common::{
    abi::DestCpuRecord,
    flow::{Bucket4, Bucket6},
    jiffies::Jiffies,
};
use lb_userspace::{
    control::{
        change::Change,
        shared::{Counters, Shared},
        state::ip,
    },
    datapath::{
        load,
        memory::Access,
        object::{map, program},
        open::{self, Maps, PerCpu},
        pace::Pace,
        place::{Place, remove_tree},
        run::{Control, Ending},
        sizes::Capacity,
    },
    error::Error,
    netlink::interface,
};

use crate::{
    bulk::Bulk,
    cast::{self, special},
    executor::{DESTS, Executor, Outcome, SERVERS, SERVICES, Verdict, Wire, mtu},
    family::{self, Family},
    lab::{self, End, NetNs, cable},
};

/// A director in the kernel, as seen from a thread in its network namespace.
pub struct Kernel<'a> {
    namespace: &'a NetNs,
    /// When time began, for changes.
    begun: Instant,
    /// Whether the host forwards.
    forwarding: bool,
    place: Place,
    maps: Maps,
    counters: KernelCounters,
    reasons: PerCpu<u64>,
    limiter: Array<MapData, [u32; 16]>,
    control: Control,
    program: Xdp,
    /// Indices of the interfaces, in the order of [`Wire::ALL`].
    wires: [u32; 3],
}

/// The pins of an instance, removed when dropped.
struct Pins(Place);

impl Drop for Pins {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next run.
        let _ = remove_tree(&self.0.directory());
    }
}

struct KernelCounters(PerCpu<DestCpuRecord>);

impl Counters for KernelCounters {
    fn read(&self, dest: u32) -> Result<[u64; 5], Error> {
        let cpus = self.0.get(dest)?;
        Ok(std::array::from_fn(|counter| cpus.iter().map(|cpu| cpu.counters[counter]).sum()))
    }

    fn clear(&mut self, dest: u32) -> Result<(), Error> {
        self.0.set_all(dest, bytemuck::Zeroable::zeroed())
    }
}

/// A director in the kernel, as pins in a BPF file system, and its network namespace. Gone when dropped.
pub struct Site {
    namespace: NetNs,
    pins: Pins,
    flow_buckets: u32,
}

impl Site {
    /// Makes a director with a flow table of this many buckets. Its ageing timer does not run.
    ///
    /// # Errors
    ///
    /// When the kernel refuses something: all of this needs root.
    pub fn new(role: &str, flow_buckets: u32) -> Result<Self> {
        lab::require_root()?;
        let namespace = NetNs::new(role)?;
        build(&namespace)?;
        lab::sweep_instances(INSTANCES)?;
        let place = Place::find(&format!("{INSTANCES}{}-{role}", std::process::id()))?;
        let pins = Pins(place.clone());
        let lock = place.lock()?;
        // Ten entries make a bucket, of which six are in use when the table is as full as it is made for.
        let capacity = Capacity { flows: flow_buckets * 6, flows6: flow_buckets * 6, services: SERVICES, dests: DESTS };
        load::create(&place, &lock, &capacity)?;
        Ok(Self { namespace, pins, flow_buckets })
    }

    /// Where the pins are.
    pub fn place(&self) -> &Place {
        &self.pins.0
    }

    /// Buckets of its flow table.
    pub fn flow_buckets(&self) -> u32 {
        self.flow_buckets
    }

    /// Opens the pins for as long as `work` lasts, on a thread in the network namespace.
    ///
    /// # Errors
    ///
    /// When they cannot be opened.
    pub fn enter<T: Send>(&self, work: impl FnOnce(&mut Kernel<'_>) -> T + Send) -> Result<T> {
        self.namespace.enter(|| -> Result<T> {
            let mut kernel = Kernel::open(&self.namespace, &self.pins.0)?;
            anyhow::ensure!(kernel.flows().len() == self.flow_buckets as usize, "a table of another size");
            Ok(work(&mut kernel))
        })?
    }
}

impl Kernel<'_> {
    /// Makes a director with a flow table of this many buckets, lets `work` use it, and removes it.
    ///
    /// # Errors
    ///
    /// When the kernel refuses something: all of this needs root.
    pub fn with<T: Send>(role: &str, flow_buckets: u32, work: impl FnOnce(&mut Kernel<'_>) -> T + Send) -> Result<T> {
        Site::new(role, flow_buckets)?.enter(work)
    }
}

/// How long a sweep of the ageing timer may take that is under way at once.
const AGEING_LIMIT: Duration = Duration::from_secs(10);

/// What the names of the instances of these tests begin with.
const INSTANCES: &str = "cases-";

impl<'a> Kernel<'a> {
    fn open(namespace: &'a NetNs, place: &Place) -> Result<Self> {
        let pin = place.directory().join("maps").join(map::LIMITER);
        let index = |name| -> Result<u32> { Ok(interface(name)?.index) };
        Ok(Self {
            namespace,
            begun: Instant::now(),
            forwarding: true,
            place: place.clone(),
            maps: Maps::open(place, Access::Write)?,
            counters: KernelCounters(open::dest_cpus(place)?),
            reasons: open::reasons(place)?,
            limiter: Map::Array(MapData::from_pin(pin)?).try_into()?,
            control: Control::open(place)?,
            program: Xdp::from_pin(place.programs()?.join(program::XDPVS), XdpAttachType::Interface)?,
            wires: [index("lo")?, index("outside")?, index("inside")?],
        })
    }

    /// Lets the ageing timer run.
    ///
    /// # Errors
    ///
    /// When the kernel does not start it.
    pub fn start_ageing(&self) -> Result<(), Error> {
        load::start_ageing(&self.place, &self.maps, None)
    }

    /// The namespace that the director routes in.
    pub fn namespace(&self) -> &NetNs {
        self.namespace
    }

    /// Packets of many clients for the director's program, which come in by `wire`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn bulk(&self, wire: Wire) -> Result<Bulk> {
        let mut bulk = Bulk::new(self.index(wire), 1, &[])?;
        bulk.put(self.program.fd()?)?;
        Ok(bulk)
    }

    /// The instance's maps.
    pub fn maps(&self) -> &Maps {
        &self.maps
    }

    fn index(&self, wire: Wire) -> u32 {
        self.wires[wire as usize]
    }

    fn wire(&self, ifindex: u32) -> Wire {
        let is_it = |wire: &Wire| self.index(*wire) == ifindex;
        Wire::ALL.into_iter().find(is_it).expect("an interface of the director")
    }
}

/// Both ends of every cable are in the one namespace: nobody listens, but routes and neighbours are real.
fn build(namespace: &NetNs) -> Result<()> {
    let end = |name, mac| End { namespace, name, mac, address: None };
    cable(end("outside", cast::DIRECTOR_OUTSIDE_MAC), end("clients", [2, 0, 0, 0, 1, 0]))?;
    cable(end("inside", cast::DIRECTOR_INSIDE_MAC), end("servers", [2, 0, 0, 0, 1, 1]))?;
    namespace.give("outside", cast::DIRECTOR_OUTSIDE, 3)?;
    namespace.give("inside", cast::DIRECTOR_INSIDE, 3)?;
    namespace.give("lo", cast::server(special::LOCAL), 4)?;
    Family::ALL.into_iter().try_for_each(|family| build_family(namespace, family))
}

/// The routing table of packets to [`cast::BARRED_CLIENT`] that are barred.
const BARRED_TABLE: u32 = 77;

fn build_family(namespace: &NetNs, family: Family) -> Result<()> {
    let address = |address| family.address(address);
    namespace.sysctl(&format!("net.{}.conf.lo.forwarding", family.sysctl()), "1")?;
    let neighbour = |address, mac, wire| {
        namespace.ip(&format!("neigh add {address} lladdr {} dev {wire} nud permanent", lab::mac(mac)))
    };
    neighbour(address(cast::CLIENT_GATEWAY), cast::CLIENT_MAC, "outside")?;
    let clients = family.network(cast::CLIENT, 2);
    namespace.ip(&format!("route add {clients} via {}", address(cast::CLIENT_GATEWAY)))?;
    namespace.ip(&format!("route add {} via {}", address(cast::FAR_CLIENT), address(cast::FAR_GATEWAY)))?;
    namespace.ip(&format!("route add unreachable {}", address(cast::LOST_CLIENT)))?;
    let (barred, server) = (address(cast::BARRED_CLIENT), address(cast::server(0)));
    let version = if family == Family::Four { "-4" } else { "-6" };
    namespace.ip(&format!("{version} rule add from {server} to {barred} lookup {BARRED_TABLE}"))?;
    namespace.ip(&format!("route add unreachable {barred} table {BARRED_TABLE}"))?;
    for index in 0..SERVERS {
        let server = address(cast::server(index));
        let mac = cast::server_mac(index);
        match index {
            special::UNRESOLVED | special::LOCAL => {}
            special::UNREACHABLE => drop(namespace.ip(&format!("route add unreachable {server}"))?),
            special::ONE_ARMED => {
                namespace.ip(&format!("route add {server} dev outside"))?;
                neighbour(server, mac, "outside")?;
            }
            special::NARROW | special::TINY => {
                // Locked, or forwarding would go by the interface's MTU.
                namespace.ip(&format!("route add {server} dev inside mtu lock {}", mtu(family, index)))?;
                neighbour(server, mac, "inside")?;
            }
            _ => drop(neighbour(server, mac, "inside")?),
        }
    }
    Ok(())
}

/// What the XDP program leaves in front of a frame that it hands over: see `lb_ebpf::kernel::Errand`.
const ERRAND: usize = 28;
const ERRAND_MAGIC: u32 = 0x7864_7076;

impl Executor for Kernel<'_> {
    fn name(&self) -> &'static str {
        "in the kernel"
    }

    fn shared(&self) -> Shared<'_> {
        self.maps.shared()
    }

    fn flows(&self) -> &[Bucket4] {
        &self.maps.flows4
    }

    fn flows6(&self) -> &[Bucket6] {
        &self.maps.flows6
    }

    fn ifindex(&self, wire: Wire) -> u32 {
        self.index(wire)
    }

    fn now(&self) -> Jiffies {
        self.control.clock().expect("the control program runs")
    }

    fn change_later(&mut self, later_s: u32, plan: &dyn Fn(&mut Change<'_>)) {
        let now_s = self.begun.elapsed().as_secs() as u32;
        let _lock = self.place.lock().expect("the lock can be taken");
        let mut change =
            Change::begin(self.maps.shared(), &self.counters, now_s + later_s).expect("counters can be read");
        plan(&mut change);
        change.commit(&mut self.counters).expect("there is room");
    }

    fn end_connections(&mut self) {
        self.control.flush(self.maps.instance().buckets(), Ending::All).expect("the control program runs");
    }

    fn age(&mut self) {
        let buckets = self.maps.instance().buckets();
        let sweeps = || open::ageing(&self.place).expect("the pin opens").record.sweeps;
        let quick = Pace::new(buckets, Pace::SWEEP_MIN_MS).expect("the tables are small");
        let quick = Pace { share: u32::MAX, ..quick };
        let before = sweeps();
        self.control.start_ageing(quick).expect("the control program runs");
        let begun = Instant::now();
        while sweeps() < before + 2 {
            assert!(begun.elapsed() < AGEING_LIMIT, "the timer does not run");
            thread::sleep(Duration::from_millis(1));
        }
        // From now on it runs once in a time that no case takes.
        let rare = Pace { interval_ns: 3_600_000_000_000, ..quick };
        self.control.start_ageing(rare).expect("the control program runs");
    }

    fn refill_limiter(&mut self) {
        self.limiter.set(0, [0; 16], 0).expect("the limiter can be written");
    }

    fn wait_for_a_young_second(&self) {
        let hz = self.maps.instance().hz;
        loop {
            if self.now().0.wrapping_sub(self.maps.config[0].clock_skew.load()) % hz < hz / 2 {
                break;
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn set_forwarding(&mut self, on: bool) {
        if on == self.forwarding {
            return;
        }
        self.forwarding = on;
        let value = if on { "1" } else { "0" };
        for family in Family::ALL {
            let name = format!("net.{}.conf.lo.forwarding", family.sysctl());
            self.namespace.sysctl(&name, value).expect("a setting of every kernel");
        }
    }

    fn counter(&self, number: u8) -> u64 {
        self.reasons.get(number.into()).expect("a counter").iter().sum()
    }

    fn traffic(&self, dest: u32) -> [u64; 5] {
        self.counters.read(dest).expect("a destination")
    }

    fn arrive(&mut self, wire: Wire, frame: &[u8]) -> Outcome {
        let mut out = vec![0; 4096];
        // struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
        let context = [0, frame.len() as u32, 0, self.index(wire), 0, 0].map(u32::to_ne_bytes).concat();
        let mut context_out = vec![0; context.len()];
        let result = self
            .program
            .test_run(TestRunOptions {
                data_in: Some(frame),
                data_out: Some(&mut out),
                ctx_in: Some(&context),
                ctx_out: Some(&mut context_out),
                ..TestRunOptions::new()
            })
            .context(wire_context(frame))
            .expect("the kernel runs the program");
        out.truncate(result.data_size_out as usize);
        let word = |bytes: &[u8], index: usize| {
            u32::from_ne_bytes(bytes[4 * index..4 * index + 4].try_into().expect("four bytes"))
        };
        // The data of the answer begins with the metadata, and the frame where the context says.
        let metadata: Vec<u8> = out.drain(..word(&context_out, 0) as usize).collect();
        let verdict = match result.return_value {
            1 => Verdict::Drop,
            2 if metadata.is_empty() => Verdict::Pass,
            2 => {
                assert_eq!((metadata.len(), word(&metadata, 0)), (ERRAND, ERRAND_MAGIC));
                let gateway = ip(word(&metadata, 2), std::array::from_fn(|index| word(&metadata, 3 + index)));
                Verdict::HandOver(self.wire(word(&metadata, 1)), family::member(gateway))
            }
            3 => Verdict::Transmit,
            4 => Verdict::Redirect(None),
            other => panic!("the program returned {other}"),
        };
        Outcome { verdict, frame: out }
    }
}

fn wire_context(frame: &[u8]) -> String {
    format!("a frame of {} bytes", frame.len())
}
