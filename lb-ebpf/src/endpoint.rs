//! Finding out what an address and port is to the director.

use lb_common::abi::{ENDPOINT_PROBES, EndpointKey, Target};

use crate::tables::Endpoints;

/// What is known of the endpoint `key`; an empty target when nothing is.
#[inline(always)]
pub fn find<K: EndpointKey>(tables: &impl Endpoints<K>, key: K) -> Target {
    Target(tables.hide(look_up(tables, key).0))
}

#[inline(always)]
fn look_up<K: EndpointKey>(tables: &impl Endpoints<K>, key: K) -> Target {
    let buckets = tables.endpoint_buckets();
    let mut index = key.bucket(&tables.seed(), buckets);
    for _ in 0..ENDPOINT_PROBES {
        let Some(bucket) = tables.endpoint_bucket(index) else { break };
        for endpoint in &bucket.endpoints {
            if let Some(target) = endpoint.find(key) {
                return target;
            }
        }
        if bucket.endpoints.iter().any(lb_common::abi::Endpoint::is_virgin) {
            break;
        }
        index = (index + 1) & (buckets - 1);
    }
    Target::default()
}
