//! The eBPF objects, embedded in this program.

use aya::include_bytes_aligned;

/// The director's programs and maps.
pub static DIRECTOR: &[u8] = include_bytes_aligned!(env!("XDPVS_DIRECTOR_OBJECT"));

/// The real server's program and maps.
pub static REALSERVER: &[u8] = include_bytes_aligned!(env!("XDPVS_REALSERVER_OBJECT"));

/// Names of programs in [`DIRECTOR`], beside those of its stages ([`lb_common::abi::Stage`]).
pub mod program {
    /// XDP: every frame that arrives.
    pub const XDPVS: &str = "xdpvs";
    /// XDP, never attached: carries out requests of this program.
    pub const CONTROL: &str = "control";
    /// TC ingress: sends on what has no link-layer address yet.
    pub const NEIGHBOUR: &str = "neighbour";
    /// All of them.
    pub const ALL: [&str; 3] = [XDPVS, CONTROL, NEIGHBOUR];
}

/// Name of the map of stages, and of its pin, which stands beside those of the programs in it.
pub const STAGES: &str = "STAGES";

/// Names of maps in [`DIRECTOR`] that an instance has once, and of their pins.
#[expect(
    missing_docs,
    reason = "the values of each are described in lb_common::abi, lb_common::flow and lb_common::mark"
)]
pub mod map {
    pub const INSTANCE: &str = "INSTANCE";
    pub const CONFIG: &str = "CONFIG";
    pub const JOURNAL: &str = "JOURNAL";
    pub const SERVICES: &str = "SERVICES";
    pub const DESTS: &str = "DESTS";
    pub const ENDPOINTS4: &str = "ENDPOINTS4";
    pub const ENDPOINTS6: &str = "ENDPOINTS6";
    pub const VIEWS: &str = "VIEWS";
    pub const SLOTS: &str = "SLOTS";
    pub const CURSORS: &str = "CURSORS";
    pub const CACHE: &str = "CACHE";
    pub const DEST_LOADS: &str = "DEST_LOADS";
    pub const DEST_CPUS: &str = "DEST_CPUS";
    pub const FLOWS4: &str = "FLOWS4";
    pub const FLOWS6: &str = "FLOWS6";
    pub const ADJACENCY: &str = "ADJACENCY";
    pub const ADJACENCY_CPUS: &str = "ADJACENCY_CPUS";
    pub const MARKS: &str = "MARKS";
    pub const MARK_RULES: &str = "MARK_RULES";
    pub const MARK_STARTS: &str = "MARK_STARTS";
    pub const LIMITER: &str = "LIMITER";
    pub const REASONS: &str = "REASONS";
    pub const AGEING: &str = "AGEING";
    pub const UPKEEP: &str = "UPKEEP";
    pub const ESTIMATES: &str = "ESTIMATES";

    /// Every map that is pinned.
    pub const ALL: [&str; 25] = [
        INSTANCE,
        CONFIG,
        JOURNAL,
        SERVICES,
        DESTS,
        ENDPOINTS4,
        ENDPOINTS6,
        VIEWS,
        SLOTS,
        CURSORS,
        CACHE,
        DEST_LOADS,
        DEST_CPUS,
        FLOWS4,
        FLOWS6,
        ADJACENCY,
        ADJACENCY_CPUS,
        MARKS,
        MARK_RULES,
        MARK_STARTS,
        LIMITER,
        REASONS,
        AGEING,
        UPKEEP,
        ESTIMATES,
    ];
}

/// Names in [`REALSERVER`].
pub mod realserver {
    /// XDP: takes packets for virtual addresses out of the tunnel they came through.
    pub const DECAPSULATE: &str = "decapsulate";
    /// Map, and pin: the virtual IPv4 addresses, as they stand in a packet.
    pub const VIPS4: &str = "VIPS4";
    /// Map, and pin: the virtual IPv6 addresses, as they stand in a packet.
    pub const VIPS6: &str = "VIPS6";
    /// Map, and pin: packets for them, by number of [`lb_common::decapsulation::Decapsulation`].
    pub const OUTCOMES: &str = "OUTCOMES";
}
