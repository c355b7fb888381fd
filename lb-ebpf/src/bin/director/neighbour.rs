//! Behind the XDP program, on the way into the host's stack: sends on what XDP could not, for want of a link-layer
//! address.

use aya_ebpf::{
    bindings::{TC_ACT_UNSPEC, bpf_redir_neigh, bpf_redir_neigh__bindgen_ty_1},
    helpers::generated::bpf_redirect_neigh,
    macros::classifier,
    programs::TcContext,
};
use lb_ebpf::kernel::Errand;

/// Runs the errand that the XDP program left in front of a packet, and leaves all other packets alone.
#[classifier]
pub(crate) fn neighbour(ctx: TcContext) -> i32 {
    let Some(errand) = errand(&ctx) else { return TC_ACT_UNSPEC };
    let mut gateway = bpf_redir_neigh {
        nh_family: errand.family,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: errand.gateway },
    };
    // SAFETY: a helper call with a struct of the size given.
    unsafe { bpf_redirect_neigh(errand.ifindex, &raw mut gateway, size_of::<bpf_redir_neigh>() as i32, 0) as i32 }
}

#[inline(always)]
fn errand(ctx: &TcContext) -> Option<Errand> {
    // SAFETY: the kernel keeps the context valid while the program runs.
    let (meta, data) = unsafe {
        let skb = ctx.skb.skb;
        ((&raw const (*skb).data_meta).read_volatile() as usize, (&raw const (*skb).data).read_volatile() as usize)
    };
    if meta + size_of::<Errand>() > data {
        return None;
    }
    // SAFETY: the bounds have been checked, and metadata is aligned to four bytes.
    let errand = unsafe { (meta as *const Errand).read() };
    (errand.magic == Errand::MAGIC).then_some(errand)
}
