//! What a connection turns out to be: SSH in clear, in TLS or in a WebSocket, or a request for a tunnel.
//!
//! Promised: all of it happens under the one deadline of the login, and what is kept of a stranger's bytes is bounded; what
//! is spoken is told by the first bytes, in clear and again inside TLS, of which there is one layer; **HTTP in clear is
//! answered 426 and not even read**, save from this host and from balancers that are named as having ended TLS, and of those
//! only with an address of the client's that the balancer has written itself; one request is answered on a connection. TLS
//! handshakes wait for a place and a turn as those of SSH do.
//!
//! What a stranger is told is one of the texts of [`http::Reply`], or a TLS alert, or nothing.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tracing::debug;

use super::intake::{judge, no_seat, turn_away};
use super::{Gateway, mutual};
use crate::audit::{Event, Kind};
use crate::chain::Chain;
use crate::limits;
use crate::task::Worker;
use crate::tls::judge::Flaw;
use crate::tls::{ALPN_HTTP, ALPN_SSH, AcceptError, Acceptor, PeerChain};
use crate::tunnel::admit::penalty::Fault;
use crate::tunnel::admit::{self, GreetError, Greeted, Seat};
use crate::tunnel::http::{self, Reply, Request};
use crate::tunnel::proxied;
use crate::tunnel::sniff::{Protocol, Sniffed, sniff};
use crate::tunnel::stream::Stream;
use crate::tunnel::websocket::Upgrade;
use crate::tunnel::wire;

/// How a connection came in.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entrance {
    /// At which main listener.
    pub(super) listener: usize,
    /// From where.
    pub(super) address: SocketAddr,
    /// Whether that is a balancer, which says in a header before everything else whose connection it is.
    pub(super) balanced: bool,
    /// Whether that is a balancer that ends TLS, which says in each request whose it is.
    pub(super) terminated: bool,
}

impl Entrance {
    /// Whether HTTP is taken in clear: of who is on this host, or of whoever has ended TLS before us.
    fn may_be_clear(&self) -> bool {
        self.terminated || (!self.balanced && self.address.ip().to_canonical().is_loopback())
    }
}

/// What is known of a client by the TLS that it came in by.
#[derive(Debug, Clone, Default)]
pub(super) struct TlsFacts {
    /// What it has shown of itself.
    pub(super) peer: Option<PeerChain>,
}

/// A connection that has said what it wants.
pub(super) struct Arrived {
    /// What carries that, which is not the socket where there is TLS or a WebSocket.
    pub(super) stream: Stream,
    /// Whose it is; behind a balancer, whose the balancer says that it is.
    pub(super) client: SocketAddr,
    /// How it came, as the trail calls it.
    pub(super) transport: &'static str,
    /// What TLS has told, if there is any.
    pub(super) tls: Option<TlsFacts>,
    /// What it wants.
    pub(super) said: Said,
}

/// What a connection wants.
pub(super) enum Said {
    /// An SSH session.
    Ssh(Greeted),
    /// A tunnel.
    Connect(Box<Request>),
}

/// A connection that has yet to say what it wants.
pub(super) struct Arriving<'a> {
    pub(super) gateway: &'a Arc<Gateway>,
    pub(super) worker: &'a Worker,
    pub(super) entrance: Entrance,
    pub(super) deadline: Instant,
    pub(super) seat: &'a Seat,
    pub(super) client: SocketAddr,
    pub(super) tls: Option<TlsFacts>,
}

/// It has been turned away, and that is on record.
struct TurnedAway;

type Step<T> = Result<T, TurnedAway>;

impl Arriving<'_> {
    /// Waits for a connection to say what it wants. `None` where it has been turned away, or was a health check.
    pub(super) async fn arrive(mut self, stream: Stream) -> Option<Arrived> {
        self.tell(stream).await.ok()
    }

    async fn tell(&mut self, mut stream: Stream) -> Step<Arrived> {
        let head = if self.entrance.balanced { self.named(&mut stream).await? } else { Bytes::new() };
        // Where nobody is taken in clear, nobody waits for the door's line, and a slow client of TLS is not hurried.
        let clear = !mutual::refuses_clear(&self.gateway.state.current(), self.entrance.listener);
        let mut first = self.sniff(&mut stream, head, clear.then_some(wire::DOOR_LINE)).await?;
        // A balancer's request says whose it is. Anything else from there is its own.
        if self.entrance.terminated && !self.entrance.balanced && first.protocol != Protocol::Http {
            self.is(self.client)?;
        }
        let mut transport = "ssh";
        if first.protocol == Protocol::Tls {
            let alpn;
            // In boxes, as what HTTP takes: most connections need neither, and room for both would be held for each.
            (stream, alpn) = Box::pin(self.secure(stream, first.head)).await?;
            // Whoever has said that it speaks HTTP waits for no line.
            let line = (alpn.as_deref() != Some(ALPN_HTTP)).then_some(wire::DOOR_LINE);
            first = self.sniff(&mut stream, Bytes::new(), line).await?;
            let agreed = match first.protocol {
                Protocol::Tls => return Err(self.refuse_for("tls_in_tls", Fault::Garbage)),
                Protocol::Ssh => ALPN_SSH,
                Protocol::Http => ALPN_HTTP,
            };
            if alpn.is_some_and(|alpn| alpn != agreed) {
                return Err(self.refuse_for("other_protocol_than_agreed", Fault::Garbage));
            }
            transport = "tls";
        }
        if first.protocol == Protocol::Http {
            let request;
            (stream, request) = Box::pin(self.request(stream, first.head)).await?;
            if request.head.method() == "CONNECT" {
                let said = Said::Connect(Box::new(request));
                return Ok(Arrived { stream, client: self.client, transport: "http", tls: self.tls.take(), said });
            }
            stream = Box::pin(self.websocket(stream, request)).await?;
            first = self.sniff(&mut stream, Bytes::new(), Some(wire::DOOR_LINE)).await?;
            if first.protocol != Protocol::Ssh {
                return Err(self.refuse_for("other_protocol_than_agreed", Fault::Garbage));
            }
            transport = if self.tls.is_some() { "wss" } else { "ws" };
        }
        let greeted = admit::greet(&mut stream, first.head, None, self.deadline).await;
        let greeted = greeted.map_err(|error| self.not_greeted(&error))?;
        let said = Said::Ssh(Greeted { said: first.said, ..greeted });
        Ok(Arrived { stream, client: self.client, transport, tls: self.tls.take(), said })
    }

    /// Reads whose connection it is off the header that a balancer begins it with. Yields what follows that.
    async fn named(&mut self, stream: &mut Stream) -> Step<Bytes> {
        let patience = self.deadline.min(Instant::now() + limits::PROXY_HEADER_TIMEOUT);
        match proxied::read(stream, patience).await {
            Ok((Some(named), rest)) => {
                self.is(named)?;
                Ok(rest)
            }
            // Its health check.
            Ok((None, _)) | Err(proxied::ReadError::Closed) => Err(TurnedAway),
            // Not held against its address, which is everybody's.
            Err(error) => Err(self.refuse(&error, "proxy_protocol", None)),
        }
    }

    /// Takes it for this client's from now on, if that may come here.
    fn is(&mut self, client: SocketAddr) -> Step<()> {
        self.client = client;
        let judged = judge(self.gateway, self.entrance.listener, client.ip());
        judged.and_then(|()| self.seat.belongs_to(client.ip()).map_err(no_seat)).map_err(|reason| {
            turn_away(self.gateway, client, reason);
            TurnedAway
        })
    }

    async fn sniff(&self, stream: &mut Stream, head: Bytes, line: Option<&'static str>) -> Step<Sniffed> {
        sniff(stream, head, line, self.deadline).await.map_err(|error| self.not_greeted(&error))
    }

    fn not_greeted(&self, error: &GreetError) -> TurnedAway {
        self.refuse(error, "identification", error.fault())
    }

    /// Shakes hands by TLS. `head` is what was read before.
    async fn secure(&mut self, stream: Stream, head: Bytes) -> Step<(Stream, Option<Vec<u8>>)> {
        let (gateway, listener) = (self.gateway, self.entrance.listener);
        let Some(certificates) = gateway.state.current().certificates.clone() else {
            return Err(self.refuse_for("no_tls_here", Fault::Left));
        };
        // As with SSH: who says nothing costs a seat, and no place.
        let place = timeout_at(self.deadline, gateway.handshakes.begin(self.worker.number(), self.client.ip())).await;
        let Ok(place) = place else {
            debug!("turned a connection away: too many handshakes came before it");
            turn_away(gateway, self.client, "too_many_handshakes");
            return Err(TurnedAway);
        };
        // For each client, since what is asked of it goes by the registry as it is now.
        let acceptor = Acceptor::new(certificates, mutual::client_policy(gateway, listener));
        let accepting = acceptor.accept(stream.preceded_by(head));
        match place.during(timeout_at(self.deadline, accepting)).await {
            Ok(Ok(accepted)) => {
                self.tls = Some(TlsFacts { peer: accepted.peer });
                Ok((Stream::layered(accepted.stream), accepted.alpn))
            }
            Ok(Err((error, stream))) => {
                let reason = error.flaw().map_or("tls_handshake", Flaw::as_str);
                let turned_away = self.refuse(&error, reason, fault(&error));
                // It has been sent an alert, which it may want to read.
                http::end(stream, b"").await;
                Err(turned_away)
            }
            Err(_) => Err(self.refuse_for("tls_timeout", Fault::Timeout)),
        }
    }

    /// Reads a request, and answers all that lead nowhere: in clear, malformed, a balancer's health check.
    async fn request(&mut self, mut stream: Stream, begun: Bytes) -> Step<(Stream, Request)> {
        if self.tls.is_none() && !self.entrance.may_be_clear() {
            let turned_away = self.refuse_for("http_in_clear", Fault::Misconfigured);
            http::answer(stream, Reply::UpgradeRequired).await;
            return Err(turned_away);
        }
        let request = match http::read(&mut stream, begun, self.deadline).await {
            Ok(request) => request,
            Err(error) => {
                let turned_away = self.refuse(&error, "http_head", error.fault());
                if let http::ReadError::Head(error) = error {
                    http::answer(stream, error.reply()).await;
                }
                return Err(turned_away);
            }
        };
        if request.head.method() == "GET" && request.head.target() == HEALTH {
            http::answer(stream, Reply::Well).await;
            return Err(TurnedAway);
        }
        if self.tls.is_none() && self.entrance.terminated {
            let Some(client) = request.head.forwarded_for() else {
                let turned_away = self.refuse_for("forwarded_for", Fault::Garbage);
                http::answer(stream, Reply::BadRequest).await;
                return Err(turned_away);
            };
            self.is(client)?;
        }
        Ok((stream, request))
    }

    /// Goes over to a WebSocket, if the request is for one of ours.
    async fn websocket(&self, stream: Stream, request: Request) -> Step<Stream> {
        let Request { head, rest } = request;
        let upgrade = (head.method() == "GET").then(|| Upgrade::of(|name| head.only(name)));
        let Some(Ok(upgrade)) = upgrade else {
            let turned_away = self.refuse_for("http_not_found", Fault::Left);
            http::answer(stream, Reply::NotFound).await;
            return Err(turned_away);
        };
        match timeout_at(self.deadline, upgrade.accept(stream, rest)).await {
            Ok(Ok(websocket)) => Ok(Stream::layered(websocket)),
            Ok(Err(error)) => Err(self.not_greeted(&GreetError::Io(error))),
            Err(_) => Err(self.not_greeted(&GreetError::Timeout)),
        }
    }

    fn refuse(&self, error: &(dyn Error + 'static), reason: &'static str, fault: Option<Fault>) -> TurnedAway {
        debug!(error = %Chain(error), "turned away a connection");
        if let Some(fault) = fault {
            self.gateway.blame(self.client.ip(), fault);
        }
        let event = Event::new(Kind::AuthRefused).client(self.client).detail(Chain(error));
        self.gateway.trail.stranger(event, reason);
        TurnedAway
    }

    fn refuse_for(&self, reason: &'static str, fault: Fault) -> TurnedAway {
        self.gateway.blame(self.client.ip(), fault);
        turn_away(self.gateway, self.client, reason);
        TurnedAway
    }
}

/// What balancers ask for to see whether the gateway is up.
const HEALTH: &str = "/healthz";

/// What is held against an address for a TLS handshake that failed.
fn fault(error: &AcceptError) -> Option<Fault> {
    match error {
        AcceptError::Closed => Some(Fault::Left),
        AcceptError::Io(_) => None,
        // It does not trust our authority, most likely.
        AcceptError::Refused(_) => Some(Fault::Misconfigured),
        AcceptError::NoCertificate | AcceptError::Certificate(_) => Some(Fault::Refused),
        AcceptError::Protocol(_) => Some(Fault::Garbage),
    }
}
