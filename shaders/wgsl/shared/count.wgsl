// Saturation counts of the whole device, by site: eight low words, then eight high words.

@group(0) @binding(1) var<storage, read_write> counters: array<atomic<u32>, 16>;

const SITE_MATMUL: u32 = 0u;
const SITE_NORM: u32 = 1u;
const SITE_ROPE: u32 = 2u;
const SITE_ATTENTION: u32 = 3u;
const SITE_SWIGLU: u32 = 4u;
const SITE_RESIDUAL: u32 = 5u;
const SITE_SEED: u32 = 6u;
const SITE_EMBEDDING: u32 = 7u;

// Adds `count` events; the usual zero costs no atomic.
fn tally(site: u32, count: u32) {
    if (count != 0u) {
        let old = atomicAdd(&counters[site], count);
        if (old + count < old) {
            atomicAdd(&counters[site + 8u], 1u);
        }
    }
}
