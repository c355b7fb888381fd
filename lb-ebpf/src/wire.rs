//! The types that may be read from and written to the bytes of a packet.

use network_types::{
    eth::EthHdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

/// A type that any bytes are a value of, without padding.
///
/// # Safety
///
/// Every bit pattern of the type's size must be a value, and the type must have no padding bytes.
pub unsafe trait Wire: Copy {
    /// The value with these bytes, which are as many as the type has.
    #[cfg(not(target_arch = "bpf"))]
    fn from_bytes(bytes: &[u8]) -> Self {
        assert_eq!(bytes.len(), size_of::<Self>());
        // SAFETY: the length has been checked, and any bytes are a value.
        unsafe { bytes.as_ptr().cast::<Self>().read_unaligned() }
    }

    /// Writes the value's bytes, which are as many as there is room for.
    #[cfg(not(target_arch = "bpf"))]
    fn to_bytes(self, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), size_of::<Self>());
        // SAFETY: the length has been checked, and a value has no padding.
        unsafe { bytes.as_mut_ptr().cast::<Self>().write_unaligned(self) };
    }
}

macro_rules! wire {
    ($($type:ty),+ $(,)?) => {$(
        // SAFETY: integers, or `repr(C)` structs of integers and byte arrays without padding.
        unsafe impl Wire for $type {}
    )+};
}

wire!(u8, u16, u32, u64, EthHdr, Ipv4Hdr, Ipv6Hdr, UdpHdr);

// SAFETY: an array has no padding of its own.
unsafe impl<T: Wire, const N: usize> Wire for [T; N] {}

/// The 32-bit words of an IPv4 header without options, as they stand in the packet.
#[inline(always)]
pub fn words(header: &Ipv4Hdr) -> [u32; 5] {
    const _: () = assert!(size_of::<Ipv4Hdr>() == size_of::<[u32; 5]>());
    // SAFETY: both types are 20 bytes of plain data; the copy needs no alignment.
    unsafe { core::mem::transmute_copy(header) }
}
