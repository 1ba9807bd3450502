//! Reaching a target: one connection, to one of the addresses that were permitted (RFC 8305, "happy eyeballs").
//!
//! Promised: only addresses of the permit are ever connected to, each at most once, and none that has been taken back by the
//! time of its turn; a connection to one that was taken back while it was made is not kept. The next one is tried when the last
//! has not answered for [`limits::CONNECT_STAGGER`] or one has failed; the first connection that is made is the only one that
//! stays.

use std::io;
use std::net::SocketAddr;

use tokio::net::TcpStream;

use crate::limits;
use crate::policy::rule::Permit;
use crate::resolve::Family;
use crate::task::staggered;
use crate::tunnel::connect;

/// Connects to the target: to its addresses in the permit's order, or with the families taking turns as in `turns`. Those that
/// were refused would otherwise leave one family behind the other. Before and after each attempt `still` says whether the
/// address is permitted as yet.
///
/// # Errors
/// If no address answers: what became of each. The kind is that of the last one.
pub(super) async fn reach(
    permit: Permit,
    turns: Option<Family>,
    still: impl Fn(SocketAddr) -> bool,
) -> io::Result<(TcpStream, SocketAddr)> {
    let check = |address| if still(address) { Ok(()) } else { Err((address, io::Error::other(TakenBack))) };
    let attempt = async |address: SocketAddr| {
        check(address)?;
        let stream = connect::dial(address).await.map_err(|error| (address, error))?;
        check(address)?;
        Ok((stream, address))
    };
    let addresses = match turns {
        Some(family) => family.arrange(permit.addresses()),
        None => permit.addresses().to_vec(),
    };
    let attempts: Vec<_> = addresses.into_iter().map(attempt).collect();
    staggered(limits::CONNECT_STAGGER, limits::CONNECTS_AT_ONCE, attempts).await.map_err(told)
}

/// Why an address was left out that was permitted at first.
#[derive(Debug, thiserror::Error)]
#[error("no longer allowed")]
struct TakenBack;

fn told(mut failures: Vec<(SocketAddr, io::Error)>) -> io::Error {
    let kind = failures.last().map_or(io::ErrorKind::NotFound, |(_, error)| error.kind());
    match failures.pop() {
        Some((_, only)) if failures.is_empty() => only,
        Some(last) => {
            failures.push(last);
            let each: Vec<_> = failures.iter().map(|(address, error)| format!("{address}: {error}")).collect();
            io::Error::new(kind, each.join("; "))
        }
        None => kind.into(),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use jiff::Timestamp;
    use tokio::net::TcpListener;

    use super::*;
    use crate::identity::Principal;
    use crate::policy::guard::Guard;
    use crate::policy::rule::Allowlist;

    /// Addresses of loopback, with one port among them all.
    fn local(last: u8, port: u16) -> SocketAddr {
        (Ipv4Addr::new(127, 0, 0, last), port).into()
    }

    fn permit(rule: &str, resolved: &[SocketAddr]) -> Permit {
        let within = rule.parse().expect(rule);
        let rule = crate::policy::rule::Rule {
            name: "db".to_owned(),
            reach: crate::policy::rule::Reach::Hosts {
                hosts: vec!["db.internal".parse().expect("a pattern")],
                within: vec![within],
            },
            ports: vec![resolved[0].port().try_into().expect("a port")],
            principals: None,
            window: crate::policy::window::Window::default(),
        };
        let target = format!("db.internal:{}", resolved[0].port()).parse().expect("a target");
        let allowlist = Allowlist::new(vec![rule]).expect("rules");
        let principal = Principal::Named("ci".parse().expect("an id"));
        let decision = allowlist.decide(&principal, &target, resolved, &Guard::default(), Timestamp::now());
        decision.into_result().expect("a permit")
    }

    #[tokio::test]
    async fn the_one_that_answers_is_connected_to_and_nothing_that_was_refused() {
        let refused = TcpListener::bind(local(2, 0)).await.expect("a listener");
        let port = refused.local_addr().expect("its address").port();
        let good = TcpListener::bind(local(4, port)).await.expect("a listener");
        let addresses = [local(2, port), local(3, port), local(4, port), local(5, port)];
        let permit = permit("127.0.0.4/30", &[&addresses[2..], &addresses[..2]].concat());
        assert_eq!(permit.refused(), &addresses[..2]);
        let (stream, address) = reach(permit, Some(Family::Any), |_| true).await.expect("a connection");
        assert_eq!((stream.peer_addr().expect("its peer"), address), (addresses[2], addresses[2]));
        let (_, peer) = good.accept().await.expect("accepted");
        assert_eq!(peer, stream.local_addr().expect("its address"));
        let knocked = tokio::time::timeout(std::time::Duration::ZERO, refused.accept()).await;
        assert!(knocked.is_err(), "a refused address was connected to");
    }

    /// Before its turn: it is not knocked at. While it is connected to: the connection is given up for the next one.
    #[tokio::test]
    async fn an_address_that_is_taken_back_meanwhile_is_left_for_the_next() {
        let first = TcpListener::bind(local(2, 0)).await.expect("a listener");
        let port = first.local_addr().expect("its address").port();
        let _second = TcpListener::bind(local(3, port)).await.expect("a listener");
        let addresses = [local(2, port), local(3, port)];
        for (times, knocks) in [(0, false), (1, true)] {
            let asked = std::cell::Cell::new(0);
            let still = |address| address != addresses[0] || asked.replace(asked.get() + 1) < times;
            let reached = reach(permit("127.0.0.0/29", &addresses), None, still).await;
            assert_eq!(reached.expect("the other one").1, addresses[1], "{times}");
            let knocked = tokio::time::timeout(std::time::Duration::ZERO, first.accept()).await;
            assert_eq!(knocked.is_ok(), knocks, "{times}");
            let error = reach(permit("127.0.0.0/29", &addresses), None, |_| false).await.expect_err("none is allowed");
            assert!(error.to_string().contains("127.0.0.3") && error.to_string().contains("no longer"), "{error}");
        }
    }

    #[tokio::test]
    async fn what_became_of_each_address_is_told() {
        let nobody = TcpListener::bind(local(1, 0)).await.expect("a listener").local_addr().expect("its address");
        let addresses = [local(1, nobody.port()), local(2, nobody.port())];
        let error = reach(permit("127.0.0.0/30", &addresses), None, |_| true).await.expect_err("nobody listens");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        let told = error.to_string();
        assert!(addresses.iter().all(|address| told.contains(&format!("{address}: "))), "{told}");
        let error = reach(permit("127.0.0.0/30", &addresses[..1]), None, |_| true).await.expect_err("nobody listens");
        assert!(!error.to_string().contains("127.0.0.1"), "{error}");
    }
}
