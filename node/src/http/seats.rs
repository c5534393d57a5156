//! How many connections are open, in all and from one address.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, PoisonError};

/// Most connections at once.
pub const CONNECTIONS_MAX: usize = 256;
/// Most connections at once from one address, so that one machine cannot shut everybody out. The
/// local machine is exempt: a reverse proxy speaks for many.
pub const CONNECTIONS_PER_ADDRESS_MAX: usize = 48;

/// Counts open connections.
#[derive(Debug, Default)]
pub struct Seats {
    taken: Mutex<BTreeMap<IpAddr, usize>>,
}

/// A connection that counts until it is dropped.
#[derive(Debug)]
pub struct Seat {
    seats: Arc<Seats>,
    address: IpAddr,
}

impl Seats {
    /// A seat for a connection from `address`, if there is one.
    pub fn take(self: &Arc<Self>, address: IpAddr) -> Option<Seat> {
        let address = owner(address);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = taken.values().sum();
        let here = taken.get(&address).copied().unwrap_or(0);
        let crowded = !address.is_loopback() && here >= CONNECTIONS_PER_ADDRESS_MAX;
        if total >= CONNECTIONS_MAX || crowded {
            return None;
        }
        taken.insert(address, here + 1);
        Some(Seat { seats: self.clone(), address })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut taken = self.seats.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = taken.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                taken.remove(&self.address);
            }
        }
    }
}

/// Who stands behind an address: one customer usually has a whole /64 of IPv6.
fn owner(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) if !v6.is_loopback() => {
            let [a, b, c, d, ..] = v6.segments();
            Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0).into()
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sit(seats: &Arc<Seats>, address: &str, count: usize) -> Vec<Seat> {
        let address = address.parse().unwrap();
        std::iter::from_fn(|| seats.take(address)).take(count).collect()
    }

    #[test]
    fn seats_of_one_address_are_bounded_and_given_back() {
        let seats = Arc::new(Seats::default());
        let mut a = sit(&seats, "203.0.113.1", usize::MAX);
        assert_eq!(a.len(), CONNECTIONS_PER_ADDRESS_MAX);
        assert_eq!(sit(&seats, "::ffff:203.0.113.1", 1).len(), 0);
        assert_eq!(sit(&seats, "203.0.113.2", 1).len(), 1);
        a.pop();
        assert_eq!(sit(&seats, "203.0.113.1", usize::MAX).len(), 1);
        drop(a);
        assert!(seats.taken.lock().unwrap().is_empty());
    }

    #[test]
    fn seats_of_one_ipv6_network_are_bounded_together() {
        let seats = Arc::new(Seats::default());
        let _a = sit(&seats, "2001:db8::1", usize::MAX);
        assert_eq!(sit(&seats, "2001:db8::2", 1).len(), 0);
        assert_eq!(sit(&seats, "2001:db8:0:1::2", 1).len(), 1);
    }

    #[test]
    fn seats_in_all_are_bounded_for_the_local_machine_too() {
        let seats = Arc::new(Seats::default());
        let all = sit(&seats, "127.0.0.1", usize::MAX);
        assert_eq!(all.len(), CONNECTIONS_MAX);
        assert_eq!(sit(&seats, "203.0.113.1", 1).len(), 0);
    }
}
