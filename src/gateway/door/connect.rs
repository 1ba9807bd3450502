//! The CONNECT door: clients that know no SSH and take a proxy (RFC 9110 §9.3.6) show a token, or the TLS certificate of a
//! principal with the header `Caponier-Agent: ORG/AGENT`, and get a tunnel to one target.
//!
//! Promised: nothing is opened before the token is verified and the broker has allowed and recorded the forward, as at every
//! other door; what follows the request's head is the tunnel's, whatever it looks like, so that nothing is ever parsed as a
//! second request; a refusal is one of the fixed texts in [`reply`], and details (what the clocks say, that a token was
//! withdrawn) are told only to whoever has shown a token whose signature is right. Refusals of the token come after the same
//! delay, whatever was wrong. A token is in no record, no log and no error.
//!
//! What waits on what: one task per connection, on the thread that accepted it, where it stays with its TLS session. It waits
//! for the delay of a refusal, for the broker to come to the forward's end, and, where a refusal was written, a little for the
//! client to have read it.

pub(super) mod reply;

use std::net::SocketAddr;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use jiff::Timestamp;
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use tracing::debug;

use self::reply::Reply;
use crate::audit::{Event, Kind};
use crate::chain::Chain;
use crate::gateway::Gateway;
use crate::gateway::broker::{self, Admission, Answer, Request};
use crate::gateway::mutual::{Visitor, Whose};
use crate::identity::{AgentName, Fingerprint, PrincipalId};
use crate::limits;
use crate::registry::{Refusal, Registry, TokenFlaw};
use crate::secret::Secret;
use crate::target::Target;
use crate::tls::PeerChain;
use crate::token::{Form, Token, Untimely, Verified};
use crate::tunnel::admit::Seat;
use crate::tunnel::admit::penalty::Fault;
use crate::tunnel::http::{self, Head};
use crate::tunnel::splice::Side;
use crate::tunnel::ssh::Public;
use crate::tunnel::stream::Stream;

/// How it came in.
pub(in crate::gateway) struct Arrival {
    /// Where it comes from; behind a balancer, where the balancer says.
    pub(in crate::gateway) address: SocketAddr,
    /// The main listener that it came in by.
    pub(in crate::gateway) listener: usize,
    /// What it has shown in TLS.
    pub(in crate::gateway) shown: Option<PeerChain>,
    /// Kept until it is known who asks.
    pub(in crate::gateway) seat: Seat,
}

/// The kind of door.
const DOOR: &str = "connect";

/// Where a token stands.
const AUTHORIZATION: &str = "proxy-authorization";

/// Where it may stand which agent is meant; beside a certificate alone it must.
const AGENT: &str = "caponier-agent";

/// The user beside a token in a URL.
const USER: &str = "caponier";

/// Serves one connection to its end.
pub(in crate::gateway) async fn serve(gateway: Arc<Gateway>, stream: Stream, asked: http::Request, arrival: Arrival) {
    let Arrival { address, listener, shown, seat } = arrival;
    let begun = Instant::now();
    let guest = match authenticate(&gateway, &asked.head, address, listener, shown) {
        Ok(guest) => guest,
        Err(refused) => {
            refused.record(&gateway, address);
            let delay = sleep_until(begun + limits::LOGIN_REFUSAL_DELAY);
            tokio::select! {
                () = delay => {}
                () = seat.lost().cancelled() => return,
                () = gateway.tasks.stopping().cancelled() => return,
            }
            return http::end(stream, refused.reply.text().as_bytes()).await;
        }
    };
    drop(seat);
    let _welcome = gateway.penalties.welcome(address.ip());
    let _present = gateway.drain.greet();
    let withdrawn = CancellationToken::new();
    let by_key = guest.token.as_ref().filter(|token| token.form() == Form::Jwt);
    let request = Request {
        principal: guest.principal.clone(),
        credential: None,
        asserted_by: by_key.map(|token| token.key().to_string()),
        token: guest.token.clone(),
        client_certificate: guest.mark.clone(),
        agent: guest.agent.clone(),
        target: asked.head.target().parse::<Target>(),
        asked: asked.head.target().to_owned(),
        client: address,
        door: DOOR,
        over: None,
        ticket: gateway.drain.admit(),
        withdrawn: Some(withdrawn.clone()),
    };
    let http::Request { head, rest } = asked;
    // With the token in it.
    drop(head);
    let answer = Asking { stream, rest };
    let request = match request.admit(&gateway) {
        Admission::Judge(request) | Admission::Refuse(request) => request,
        Admission::Unheard => {
            let event = guest.about(about(Kind::AuthRefused, address));
            gateway.trail.stranger(event.detail("opens_per_second_per_principal"), "limit");
            return answer.refuse(Public::NotAvailable).await;
        }
    };
    // A client that leaves while it waits is noticed when it is answered: until then it may be about to send.
    let never = CancellationToken::new();
    let forward = broker::forward(&gateway, request, answer, &never);
    tokio::pin!(forward);
    tokio::select! {
        biased;
        () = &mut forward => return,
        () = gateway.state.until(|state| !state.accepts(listener, address.ip())) => {}
        flaw = guest.visitor.unwelcome(&gateway) => debug!(%flaw, "a client's certificate is good no more"),
    }
    withdrawn.cancel();
    forward.await;
}

/// Who asks.
struct Guest {
    principal: PrincipalId,
    agent: AgentName,
    /// What it has shown; without one, it is its certificate alone.
    token: Option<Verified>,
    /// The same as far as TLS goes.
    visitor: Visitor,
    /// What is to be recorded of that.
    mark: Option<String>,
}

impl Guest {
    fn about(&self, event: Event) -> Event {
        let event = event.organisation(&self.agent.organisation).agent(&self.agent.agent).principal(&self.principal);
        match &self.token {
            Some(token) => event.key(token.key()).token(&token.claims().id),
            None => event.client_certificate(self.mark.as_ref()),
        }
    }
}

/// A client that waits for an answer.
struct Asking {
    stream: Stream,
    rest: Bytes,
}

impl Answer for Asking {
    async fn accept(mut self) -> Option<Side> {
        let said = async {
            self.stream.write_all(reply::ESTABLISHED).await?;
            self.stream.flush().await
        };
        match timeout(limits::REFUSED_PATIENCE, said).await {
            Ok(Ok(())) => Some(Side::Stream(self.stream.preceded_by(self.rest))),
            Ok(Err(_)) | Err(_) => {
                debug!("a client of the CONNECT door was gone before it was answered");
                self.stream.reset();
                None
            }
        }
    }

    async fn refuse(self, public: Public) {
        let reply = match public {
            Public::NotAllowed => Reply::NotAllowed,
            Public::Draining => Reply::Draining,
            Public::TimedOut => Reply::TimedOut,
            Public::NotAvailable => Reply::NotAvailable,
        };
        http::end(self.stream, reply.text().as_bytes()).await;
    }
}

/// Who asks, by the token that was shown, or without one by the TLS certificate.
fn authenticate(
    gateway: &Gateway,
    head: &Head,
    address: SocketAddr,
    listener: usize,
    shown: Option<PeerChain>,
) -> Result<Guest, Box<Refused>> {
    let now = Timestamp::now();
    let Some(header) = head.only(AUTHORIZATION) else {
        return match (head.all(AUTHORIZATION).next(), shown, head.only(AGENT)) {
            (None, Some(shown), Some(agent)) => certified(gateway, agent, address, listener, shown, now),
            (None, ..) => Err(Refused::new("token_missing")),
            (Some(_), ..) => Err(Refused::new("token_malformed")),
        };
    };
    let token = verified(gateway, header, address, now)?;
    let claims = token.claims();
    let agent = claims.agent.to_string();
    if head.all(AGENT).any(|other| other != agent) {
        return Err(Refused::new("token_agent").of(&token, Reply::NotAllowed));
    }
    let (principal, agent) = (claims.principal.clone(), claims.agent.clone());
    let whose = Whose::Principal(agent.organisation.clone(), principal.clone());
    let visitor = Visitor { listener, shown, whose };
    match visitor.judge(gateway, now) {
        Ok(shown) => Ok(Guest { principal, agent, token: Some(token), visitor, mark: shown.mark() }),
        Err(flaw) => Err(Refused::new(flaw.as_str()).of(&token, Reply::NotAllowed)),
    }
}

/// Who asks, if a certificate alone says so.
fn certified(
    gateway: &Gateway,
    agent: &str,
    address: SocketAddr,
    listener: usize,
    shown: PeerChain,
    now: Timestamp,
) -> Result<Guest, Box<Refused>> {
    let mark = shown.fingerprint().to_string();
    let refused = |reason: &'static str| {
        let mut refused = Refused::new(reason);
        refused.certificate = Some(mark.clone());
        refused
    };
    let agent: AgentName = agent.parse().map_err(|_| refused("malformed_agent"))?;
    let (state, snapshot) = (gateway.state.current(), gateway.registry.current());
    let mutual = state.mutual(listener).ok_or_else(|| refused("token_missing"))?;
    let (principal, _) = snapshot
        .admits_client_certificate(&agent, mutual, &shown, address.ip(), now)
        .map_err(|refusal| refused(refusal.as_str()))?;
    let whose = Whose::Alone(agent.clone(), principal.clone(), address.ip());
    let visitor = Visitor { listener, shown: Some(shown), whose };
    Ok(Guest { principal, agent, token: None, visitor, mark: Some(mark) })
}

/// The token of a header, if it counts.
fn verified(gateway: &Gateway, header: &str, address: SocketAddr, now: Timestamp) -> Result<Verified, Box<Refused>> {
    let shown = shown(header).ok_or_else(|| Refused::new("token_malformed"))?;
    let token = Token::read(shown.expose()).map_err(|error| Refused::new(error.reason()).because(&error))?;
    let snapshot = gateway.registry.current();
    let key = snapshot.signer(&token.key()).ok_or_else(|| Refused::new("unknown_key").of_key(token.key()))?;
    let verified =
        token.verify(key).map_err(|error| Refused::new(error.reason()).because(&error).of_key(token.key()))?;
    let Err(refusal) = snapshot.admits_token(&verified, address.ip(), now) else { return Ok(verified) };
    let refused = Refused::new(refusal.as_str());
    Err(match refusal {
        Refusal::Token(TokenFlaw::NotYetValid | TokenFlaw::Expired) => match verified.claims().judge_time(now) {
            Err(untimely) => refused.because(&untimely).of(&verified, Reply::untimely(&untimely)),
            Ok(()) => refused.of(&verified, Reply::Refused),
        },
        Refusal::Token(TokenFlaw::Revoked) => refused.of(&verified, Reply::Revoked),
        // The token is good, and so is whoever has signed it: it is not allowed, as any other forward is not.
        Refusal::UnknownAgent | Refusal::NotGranted | Refusal::SourceNetwork => {
            refused.of(&verified, Reply::NotAllowed)
        }
        _ => refused.of(&verified, Reply::Refused),
    })
}

/// The token in a `Proxy-Authorization` header (RFC 9110 §11.7.2): the password of the user `caponier` (RFC 7617), or a bearer
/// (RFC 6750).
fn shown(header: &str) -> Option<Secret<String>> {
    let (scheme, rest) = header.split_once(' ')?;
    let rest = rest.trim_matches(' ');
    if scheme.eq_ignore_ascii_case("bearer") {
        return Some(Secret::new(rest.to_owned()));
    }
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = Secret::new(BASE64_STANDARD.decode(rest).ok()?);
    let (user, password) = std::str::from_utf8(decoded.expose()).ok()?.split_once(':')?;
    (user == USER).then(|| Secret::new(password.to_owned()))
}

/// Why nobody was let in.
struct Refused {
    reason: &'static str,
    detail: String,
    reply: Reply,
    /// The key that the token names.
    key: Option<Fingerprint>,
    /// The token, where its signature is right.
    token: Option<Verified>,
    /// The certificate, where it was that which was to count.
    certificate: Option<String>,
}

impl Refused {
    fn new(reason: &'static str) -> Box<Self> {
        let reply = if reason == "token_missing" { Reply::Missing } else { Reply::Refused };
        Box::new(Self { reason, detail: String::new(), reply, key: None, token: None, certificate: None })
    }

    fn because(mut self: Box<Self>, error: &(dyn std::error::Error + 'static)) -> Box<Self> {
        self.detail = Chain(error).to_string();
        self
    }

    fn of_key(mut self: Box<Self>, key: Fingerprint) -> Box<Self> {
        self.key = Some(key);
        self
    }

    /// Of a token that is known to be somebody's.
    fn of(mut self: Box<Self>, token: &Verified, reply: Reply) -> Box<Self> {
        (self.key, self.token, self.reply) = (Some(token.key()), Some(token.clone()), reply);
        self
    }

    fn record(&self, gateway: &Gateway, address: SocketAddr) {
        debug!(reason = self.reason, "refused at the CONNECT door");
        let fault = match (&self.token, self.reason) {
            (Some(_), _) => Fault::Misconfigured,
            // Many clients ask without one first, and bring it when they are told to.
            (None, "token_missing") => Fault::Left,
            (None, _) => Fault::Refused,
        };
        gateway.blame(address.ip(), fault);
        let mut event = about(Kind::AuthRefused, address).detail(&self.detail);
        if let Some(key) = self.key {
            event = event.key(key);
        }
        if let Some(token) = &self.token {
            let claims = token.claims();
            event = event.organisation(&claims.agent.organisation).agent(&claims.agent.agent);
            event = event.principal(&claims.principal).token(&claims.id);
        }
        event = event.client_certificate(self.certificate.as_ref());
        gateway.trail.stranger(event, self.reason);
    }
}

fn about(kind: Kind, address: SocketAddr) -> Event {
    Event::new(kind).client(address).door(DOOR)
}

impl Reply {
    fn untimely(untimely: &Untimely) -> Self {
        match *untimely {
            Untimely::NotYet { begins, now } => Self::NotYet { begins, now },
            Untimely::Expired { expires, now } => Self::Expired { expires, now },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn basic(text: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(text))
    }

    #[test]
    fn a_token_is_the_password_of_one_user_or_a_bearer() {
        for (header, token) in [
            (basic("caponier:a.b.c"), Some("a.b.c")),
            (basic("caponier:a:b"), Some("a:b")),
            (basic("caponier:"), Some("")),
            (basic("caponier:a.b.c").replace("Basic", "bAsIc"), Some("a.b.c")),
            ("Bearer a.b.c".to_owned(), Some("a.b.c")),
            ("bearer  a.b.c ".to_owned(), Some("a.b.c")),
            (basic("Caponier:a.b.c"), None),
            (basic("admin:a.b.c"), None),
            (basic(":a.b.c"), None),
            (basic("caponier"), None),
            (basic("caponier:a.b.c").replace('=', ""), None),
            ("Basic caponier:a.b.c".to_owned(), None),
            (format!("Basic {}", BASE64_STANDARD.encode(b"caponier:\xff")), None),
            ("Digest username=\"caponier\"".to_owned(), None),
            ("Negotiate AAAA".to_owned(), None),
            ("a.b.c".to_owned(), None),
            ("Bearer".to_owned(), None),
            ("Basic".to_owned(), None),
            (String::new(), None),
        ] {
            let shown = shown(&header);
            assert_eq!(shown.as_ref().map(|shown| shown.expose().as_str()), token, "{header}");
        }
    }
}
