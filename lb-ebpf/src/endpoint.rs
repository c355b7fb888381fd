//! Finding out what an address and port is to the director.

use lb_common::abi::{ENDPOINT_PROBES, EndpointKey4, Target};

use crate::tables::Tables;

/// What is known of the endpoint `key`; an empty target when nothing is.
#[inline(always)]
pub fn find4(tables: &impl Tables, key: EndpointKey4) -> Target {
    Target(tables.hide(look_up(tables, key).0))
}

#[inline(always)]
fn look_up(tables: &impl Tables, key: EndpointKey4) -> Target {
    let buckets = tables.endpoint_buckets();
    let mut index = key.bucket(&tables.seed(), buckets);
    for _ in 0..ENDPOINT_PROBES {
        let Some(bucket) = tables.endpoints4(index) else { break };
        for endpoint in &bucket.endpoints {
            if let Some(target) = endpoint.find(key) {
                return target;
            }
        }
        if bucket.endpoints.iter().any(lb_common::abi::Endpoint4::is_virgin) {
            break;
        }
        index = (index + 1) & (buckets - 1);
    }
    Target::default()
}
