//! Examines an agent without running one: what stands between it and a link, stage by stage, and whether its targets answer.
//!
//! Promised: nothing is changed. The session that shows whether the agent would be let in ends after the gateway's login and
//! in the place of the hello that would make a link of it, so that a running agent keeps its links and the gateway's
//! roster stays as it is. Targets are dialled as for a forward: under a permit of the agent's own allowlist and an entry in
//! a trail, one of the doctor's own; what cannot be recorded is not dialled. Every stage has a deadline, and what a
//! stranger says is bounded.
//!
//! What comes after a broken stage and needs it is skipped. Ways to a gateway are tried in order until one leads there, as an
//! agent does. The clock is compared with what the gateway's HTTP replies say, before TLS judges certificates by it.
//!
//! A dial needs the permit of a principal, and the doctor is none: it takes one for whom the rule is, to see what the rule
//! permits. The record names no principal; its door is [`DOOR`].

mod answer;
pub(super) mod remote;
mod target;

use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use tokio::time::{Instant, timeout};

use super::live::State;
use super::serve::{self, Coming, LinkError};
use super::{Config, Organisation};
use crate::audit::sink::NoNetwork;
use crate::audit::{Side, SinkKind, Sinks, Trail};
use crate::chain::Chain;
use crate::diagnosis::{Examination, Finding, Verdict};
use crate::identity::{AgentName, Credential};
use crate::limits;
use crate::policy::guard::Guard;
use crate::resolve::{self, Resolver};
use crate::target::{Host, Target};
use crate::task::Tasks;
use crate::tls;
use crate::tunnel::connect::http_proxy::HttpProxyError;
use crate::tunnel::connect::url::{GatewayUrl, Transport};
use crate::tunnel::connect::{self, ConnectError};
use crate::tunnel::dial::{Tls, advice};
use crate::tunnel::http::date::{self, Told};
use crate::tunnel::ssh::{RunError, Server};
use crate::tunnel::stream::Stream;
use crate::tunnel::websocket;
use crate::tunnel::wire::{self, Control};

use target::Site;

/// What is to be examined, beside what the configuration says.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Targets besides those that the rules spell out.
    pub targets: Vec<Target>,
    /// The trail to write, in the place of the agent's.
    pub trail: Option<PathBuf>,
    /// How long a stage may take.
    pub patience: Duration,
}

/// The doctor's name in the trail, where a door's would stand.
pub const DOOR: &str = "doctor";

/// Examines the agent that this would configure.
pub async fn examine(config: &Config, asked: &Asked, examination: &mut Examination<'_>) {
    let tasks = Tasks::new();
    let resolver = Arc::new(Resolver::new(&config.resolver, &tasks));
    let state = Arc::new(State::new(config, resolver.clone()));
    keys(config, examination);
    let mut learnt = Vec::new();
    for organisation in &config.organisations {
        for ways in &organisation.gateways {
            let ways: Vec<_> = ways.iter().collect();
            for (at, url) in ways.iter().enumerate() {
                let name = AgentName { organisation: organisation.id.clone(), agent: config.id.clone() };
                let last = at + 1 == ways.len();
                let mut walk = Walk {
                    config,
                    state: &state,
                    organisation,
                    name: &name,
                    url,
                    patience: asked.patience,
                    last,
                    subject: url.to_string(),
                    examination,
                    stages: stages(config, url),
                    tasks: &tasks,
                    learnt: &mut learnt,
                };
                if walk.go().await.is_some() {
                    break;
                }
            }
        }
    }
    if config.organisations.iter().all(|organisation| organisation.gateways.is_empty()) {
        let said = "the agent only listens: orchestrators come to it, and there is no gateway to reach";
        examination.add(Finding::new("gateway", "none", Verdict::Skipped, said));
    }
    // An agent that runs knows them from dialling them.
    for Target { host, port } in config.collectors() {
        if let Host::Name(name) = host
            && let Ok(Ok(found)) = timeout(asked.patience, resolve::lookup(&name)).await
        {
            learnt.extend(found.into_iter().map(|address| SocketAddr::new(address, port)));
        }
    }
    let guard = Guard::new(config.ways_out(), learnt);
    targets(config, asked, &resolver, &guard, examination).await;
    tasks.drain(limits::STOP_GRACE).await;
}

/// The agent's own keys and certificates, and those that may log in.
fn keys(config: &Config, examination: &mut Examination<'_>) {
    let now = Timestamp::now();
    let mut closed = Vec::new();
    for organisation in &config.organisations {
        for one in &organisation.orchestrators {
            if let Err(why) = one.window.at(now) {
                closed.push(format!("orchestrator key {} of {}: {why}", one.key.fingerprint(), organisation.id));
            }
        }
        for one in &organisation.authorities {
            if let Err(why) = one.window.at(now) {
                closed.push(format!("orchestrator CA {} of {}: {why}", one.key.fingerprint(), organisation.id));
            }
        }
    }
    let mut warnings = config.certificate_warnings(now);
    warnings.append(&mut closed);
    let subject = format!("agent {}", config.id);
    let key = config.key.public().fingerprint();
    examination.add(match warnings.is_empty() {
        true => Finding::new("keys", &subject, Verdict::Ok, &format!("the host key is {key}; nothing ends soon")),
        false => Finding::new("keys", &subject, Verdict::Warning, &warnings.join("; "))
            .advising("renew what ends, or take it out of the configuration; then run this again"),
    });
}

/// The stages on the way to a gateway.
fn stages(config: &Config, url: &GatewayUrl) -> Vec<&'static str> {
    let connecting = if config.egress.proxy_to(url.target()).is_some() { "proxy" } else { "tcp" };
    let mut stages = vec!["dns", connecting, "clock"];
    if url.transport().is_tls() {
        stages.push("tls");
    }
    if url.transport().is_websocket() {
        stages.push("websocket");
    }
    stages.extend(["ssh", "key", "organisation"]);
    stages
}

/// What was seen at a stage that is in order, or nearly.
struct Seen {
    verdict: Verdict,
    evidence: String,
    next: String,
}

impl Seen {
    fn well(evidence: impl Into<String>) -> Self {
        Self { verdict: Verdict::Ok, evidence: evidence.into(), next: String::new() }
    }
}

/// What is wrong at a stage, and what to do about it.
struct Fault {
    evidence: String,
    next: String,
}

impl Fault {
    fn new(evidence: impl Into<String>, next: impl Into<String>) -> Self {
        Self { evidence: evidence.into(), next: next.into() }
    }
}

/// One way to a gateway, walked stage by stage.
struct Walk<'a, 'b> {
    config: &'a Config,
    state: &'a Arc<State>,
    organisation: &'a Organisation,
    name: &'a AgentName,
    url: &'a GatewayUrl,
    patience: Duration,
    /// Whether no other way is tried after this one.
    last: bool,
    subject: String,
    examination: &'a mut Examination<'b>,
    /// Those that are still to come.
    stages: Vec<&'static str>,
    tasks: &'a Tasks,
    /// Addresses of gateways and proxies, which no forward may reach.
    learnt: &'a mut Vec<SocketAddr>,
}

impl Walk<'_, '_> {
    /// Walks it; `None` where it does not lead to the end.
    async fn go(&mut self) -> Option<()> {
        let (config, url) = (self.config, self.url);
        let to = url.target();
        let proxy = config.egress.proxy_to(to).map(|proxy| proxy.endpoint.clone());
        let dialled = proxy.clone().unwrap_or_else(|| to.clone());
        let addresses = self.step(look_up(&dialled, proxy.is_some())).await?;
        self.learnt.extend(addresses);
        let mut learnt = Vec::new();
        let connecting = async {
            let connected = connect::connect(to, &config.egress, |addresses| learnt.extend_from_slice(addresses)).await;
            let connection = connected.map_err(|error| connect_fault(&error, to))?;
            let evidence = match &proxy {
                Some(proxy) => format!("proxy {proxy} made a tunnel to {to}"),
                None => format!("connected to {to}"),
            };
            Ok(((connection.stream, connection.head), Seen::well(evidence)))
        };
        let connected = self.step(connecting).await;
        self.learnt.extend(learnt);
        let (mut stream, mut head) = connected?;
        self.step(self.clock()).await?;
        if url.transport().is_tls() {
            let tls = self.state.way(&self.name.organisation).tls;
            stream = self.step(secure(url, tls, stream, &head)).await?;
        }
        if url.transport().is_websocket() {
            let upgrading = async {
                let upgraded = websocket::connect(stream, to, url.path(), head).await;
                let socket = upgraded.map_err(|error| {
                    let next = "see that the path of the URL leads to the gateway, and that what stands between passes \
                                WebSocket on";
                    Fault::new(Chain(&error).to_string(), next)
                })?;
                Ok((Stream::layered(socket), Seen::well("the gateway agreed to a WebSocket")))
            };
            stream = self.step(upgrading).await?;
            head = Bytes::new();
        }
        self.log_in(stream, head).await
    }

    /// Takes the next stage, which has so long.
    async fn step<T>(&mut self, doing: impl Future<Output = Result<(T, Seen), Fault>>) -> Option<T> {
        let begun = Instant::now();
        let done = timeout(self.patience, doing).await.unwrap_or_else(|_| Err(late(self.patience)));
        self.take(done, begun)
    }

    fn take<T>(&mut self, done: Result<(T, Seen), Fault>, begun: Instant) -> Option<T> {
        let stage = if self.stages.is_empty() { "gateway" } else { self.stages.remove(0) };
        let elapsed_ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        let told = |finding: Finding| Finding { elapsed_ms, ..finding };
        match done {
            Ok((value, Seen { verdict, evidence, next })) => {
                self.examination.add(told(Finding::new(stage, &self.subject, verdict, &evidence).advising(&next)));
                Some(value)
            }
            Err(Fault { evidence, next }) => {
                // Where another way is left, the agent takes that: it is not well, and not broken either.
                let (verdict, evidence) = match self.last {
                    true => (Verdict::Broken, evidence),
                    false => (Verdict::Warning, format!("{evidence}; the next way to this gateway is tried")),
                };
                self.examination.add(told(Finding::new(stage, &self.subject, verdict, &evidence).advising(&next)));
                let why = format!("not looked at, because of {stage}");
                for stage in std::mem::take(&mut self.stages) {
                    self.examination.add(Finding::new(stage, &self.subject, Verdict::Skipped, &why));
                }
                None
            }
        }
    }

    /// What time it is at the gateway: within TLS where TLS is spoken, else in clear, where it answers that it does not answer.
    fn clock(&self) -> impl Future<Output = Result<((), Seen), Fault>> + use<> {
        let (to, egress, transport) = (self.url.target().clone(), self.config.egress.clone(), self.url.transport());
        // The connection that is to become a session waits meanwhile.
        let patience = (self.patience / 2).min(limits::CLOCK_PATIENCE);
        async move {
            let asked = timeout(patience, ask_time(&to, &egress, transport)).await.ok().flatten();
            let now = Timestamp::now();
            let Some(told) = asked else {
                let evidence = "nothing there tells the time, so that this host's clock was not compared";
                return Ok(((), Seen { verdict: Verdict::Skipped, evidence: evidence.into(), next: String::new() }));
            };
            judge_clock(&told, now)
        }
    }

    /// Shakes hands and waits for the gateway's login, then leaves.
    async fn log_in(&mut self, mut stream: Stream, head: Bytes) -> Option<()> {
        let begun = Instant::now();
        let line = wire::agent_line(self.name, &self.config.replica);
        let deadline = begun + self.patience.min(limits::LOGIN_GRACE);
        let state = self.state.clone();
        let coming = async {
            let head = serve::introduce(&mut stream, head, &line, self.url, deadline).await?;
            let bounds = (1, 1);
            let key = &self.config.key;
            let coming = Coming { name: self.name, gateway: self.url, line, head, key, bounds, deadline };
            coming.log_in(stream, move || state.clone(), self.tasks).await
        };
        let key = self.config.key.public();
        let spoken =
            || Ok(((), Seen::well("the gateway speaks caponier's protocol, and proved its end of the key exchange")));
        let known =
            || Ok(((), Seen::well(format!("the gateway accepts the key {} for {}", key.fingerprint(), self.name))));
        let outcome = coming.await;
        let known = known();
        match outcome {
            Ok((server, accepted)) => {
                self.take(spoken(), begun);
                self.take(known, begun);
                let seen = self.welcome(&accepted);
                leave(server).await;
                self.take(Ok(((), seen)), begun)
            }
            Err(error @ LinkError::KeyNotAccepted { .. }) => {
                self.take(spoken(), begun);
                let next = self.registering();
                self.take(Err(Fault::new(Chain(&error).to_string(), next)), begun)
            }
            Err(error @ LinkError::LoginRefused { .. }) => {
                self.take(spoken(), begun);
                self.take(known, begun);
                let next = self.knowing(&error);
                self.take(Err(Fault::new(Chain(&error).to_string(), next)), begun)
            }
            Err(error) => {
                let next = ssh_advice(&error, self.url);
                self.take(Err(Fault::new(Chain(&error).to_string(), next)), begun)
            }
        }
    }

    fn welcome(&self, accepted: &Credential) -> Seen {
        let how = match accepted.certificate() {
            Some(_) => "certificate of a CA",
            None => "key",
        };
        let evidence = format!(
            "the gateway logged in for {} with the {how} {}, which this agent's configuration lets in",
            self.organisation.id,
            accepted.key()
        );
        Seen::well(evidence)
    }

    /// What to do where the gateway does not accept the agent's key.
    fn registering(&self) -> String {
        let key = self.config.key.public().to_openssh();
        let name = self.name;
        format!(
            "send the gateway's operator this line: {} They save it as agent.pub and run: caponier keys add --registry DIR \
             agent {name} agent.pub (with --new if {name} is new there). If it is registered there already, ask them under which \
             organisation and agent, whether it has expired or been revoked, and from which addresses it is accepted: \
             auth.refused in their trail says which. Organisation and agent must be called as in agent.id and \
             organisation.id here",
            key.trim()
        )
    }

    /// What to do where the agent does not accept the gateway's login.
    fn knowing(&self, error: &LinkError) -> String {
        let (reason, key) = match error {
            LinkError::LoginRefused { reason, key, .. } => (*reason, key.as_str()),
            _ => ("", ""),
        };
        let id = &self.organisation.id;
        match reason {
            "other_organisation" => format!(
                "the gateway takes this agent for one of another organisation: ask its operator whether {id} is what the \
                 organisation is called there, and whether the login key {key} is that of {id} alone"
            ),
            "expired" | "not_yet_valid" => format!(
                "look at not_before and expires of the [[organisation.orchestrator]] with the key {key}, and ask the \
                 gateway's operator for the key that counts now"
            ),
            _ => format!(
                "ask the gateway's operator, by another way than this, for the login_key of {id}: if it is {key}, add it as \
                 [[organisation.orchestrator]] key; if it is not, somebody else may stand there"
            ),
        }
    }
}

/// Ends a session before it is a link: says in the place of the hello that none is wanted.
async fn leave(server: Server) {
    let switch = server.control.clone();
    let _cut = switch.cut_on_drop();
    let (_opens, control, running) = server.split();
    let goodbye = async {
        let Ok(mut control) = control.await else { return };
        tokio::select! {
            biased;
            () = control.granted.cancelled() => {}
            // It says something before it was granted the channel, or is gone.
            _ = control.channel.reader.next() => return,
        }
        if control.channel.writer.send(Control::Examine.encode()).await.is_err() {
            return;
        }
        // The gateway hangs up when it has read that.
        match running.ended().await {
            Ok(()) | Err(RunError::Closed | RunError::Ssh(_)) => {}
        }
    };
    // A gateway of an earlier version waits for the hello, and sees the connection end.
    drop(timeout(limits::GOODBYE_PATIENCE, goodbye).await);
}

fn late(patience: Duration) -> Fault {
    let seconds = patience.as_secs_f32();
    Fault::new(
        format!("it came to no end within {seconds} s"),
        "see whether what is there is only slow (a larger --timeout), or a firewall drops what is sent to it",
    )
}

/// Looks up whom is dialled: the gateway, or the proxy.
async fn look_up(dialled: &Target, proxied: bool) -> Result<(Vec<SocketAddr>, Seen), Fault> {
    let what = if proxied { "proxy" } else { "gateway" };
    let name = match &dialled.host {
        Host::Address(address) => {
            let evidence = format!("{what} {dialled} is an address: there is nothing to look up");
            return Ok((vec![SocketAddr::new(*address, dialled.port)], Seen::well(evidence)));
        }
        Host::Name(name) => name,
    };
    match resolve::lookup(name).await {
        Ok(addresses) => {
            let shown: Vec<_> = addresses.iter().map(ToString::to_string).collect();
            let evidence = format!("{what} {name} has {}", shown.join(", "));
            let addresses = addresses.into_iter().map(|address| SocketAddr::new(address, dialled.port)).collect();
            Ok((addresses, Seen::well(evidence)))
        }
        Err(error) => {
            let next = format!(
                "see that the {what}'s name is written as its operator gives it, and that this host's resolver \
                 (/etc/resolv.conf) knows it: getent hosts {name}. Where outside names are for the proxy alone to look up, \
                 set agent.proxy"
            );
            Err(Fault::new(Chain(&error).to_string(), next))
        }
    }
}

fn connect_fault(error: &ConnectError, to: &Target) -> Fault {
    let next = match error {
        ConnectError::Resolve { host, .. } => {
            format!("see that {host} is written right, and that this host's resolver knows it")
        }
        ConnectError::Tcp { what, endpoint, .. } => format!(
            "see that the {what} runs and listens at {endpoint}, and ask the network team to let TCP from this host to \
             {endpoint} through; where only a proxy may leave the network, set agent.proxy"
        ),
        ConnectError::ProxyTls { proxy, .. } => format!("see the evidence, and ask the operators of proxy {proxy}"),
        ConnectError::ProxySilent { proxy, .. } => {
            format!(
                "see that agent.proxy has the right scheme and port for {proxy}, and ask its operators whether it works"
            )
        }
        ConnectError::HttpProxy { proxy, source: HttpProxyError::Authentication(wanted), .. } => match wanted.sent {
            false => format!(
                "status 407: proxy {proxy} wants a login. Put user:password for it into a file of mode 0600 and name that in \
                 agent.proxy_credentials_file, or ask its operators to permit CONNECT to {to} without one"
            ),
            true => format!(
                "status 407: proxy {proxy} did not take the login. Correct the user and password that agent.proxy or \
                 agent.proxy_credentials_file gives, or ask its operators for one that works with Basic"
            ),
        },
        ConnectError::HttpProxy { proxy, .. } => {
            format!("ask the operators of proxy {proxy} to permit CONNECT to {to}; its log says why it did not")
        }
        ConnectError::SocksProxy { proxy, .. } => {
            format!("ask the operators of proxy {proxy} to permit connections to {to}; its log says why it did not")
        }
    };
    Fault::new(Chain(error).to_string(), next)
}

/// What the gateway's own HTTP says of the time. No trust is put in it: it is held against a clock, for people to judge.
async fn ask_time(to: &Target, egress: &connect::Egress, transport: Transport) -> Option<Told> {
    let deadline = Instant::now() + limits::EXAMINED_STAGE;
    let connection = connect::connect(to, egress, |_| ()).await.ok()?;
    if transport.is_tls() {
        let (connected, _) = tls::look(&[tls::ALPN_HTTP], &to.host, connection.stream).await.ok()?;
        return date::ask(connected.ok()?, to, deadline).await;
    }
    date::ask(connection.stream.preceded_by(connection.head), to, deadline).await
}

fn judge_clock(told: &Told, now: Timestamp) -> Result<((), Seen), Fault> {
    if let (300..400, Some(place)) = (told.status, &told.location) {
        // A captive portal's time is as good as any; that it is there shows at the next stage.
        let evidence =
            format!("something answers HTTP there with status {} and a way to {place}: a portal?", told.status);
        let next = "open that address in a browser on this network, or ask the network team for a way out without it";
        return Ok(((), Seen { verdict: Verdict::Warning, evidence, next: next.to_owned() }));
    }
    let Some(date) = told.date else {
        let evidence = "the other end does not say what time it is there, so that this host's clock was not compared";
        return Ok(((), Seen { verdict: Verdict::Skipped, evidence: evidence.to_owned(), next: String::new() }));
    };
    let apart = now.duration_since(date);
    let off = apart.unsigned_abs();
    let which = if apart.is_negative() { "behind" } else { "ahead of" };
    let evidence = format!(
        "this host's clock ({}) is {} {which} the gateway's ({date})",
        now.round(jiff::Unit::Second).unwrap_or(now),
        roughly(off)
    );
    if off <= limits::CLOCK_NOTABLE {
        let evidence =
            format!("this host's clock and the gateway's agree within {} s", limits::CLOCK_NOTABLE.as_secs());
        return Ok(((), Seen::well(evidence)));
    }
    let next = "set the clock that is wrong: timedatectl or chronyc tracking shows whether this host follows a time server; \
                ask the gateway's operator about theirs";
    if off > limits::TOKEN_LEEWAY {
        let breaks = format!(
            "{evidence}: certificates and keys near either end of their time are judged wrongly, tokens are refused from {} s \
             on, and the two trails do not line up",
            limits::TOKEN_LEEWAY.as_secs()
        );
        return Err(Fault::new(breaks, next));
    }
    Ok(((), Seen { verdict: Verdict::Warning, evidence, next: next.to_owned() }))
}

fn roughly(off: Duration) -> String {
    match off.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

/// TLS with the gateway, as the agent makes it; and who stands there, if it is not the gateway.
async fn secure(url: &GatewayUrl, tls: Option<Tls>, stream: Stream, head: &Bytes) -> Result<(Stream, Seen), Fault> {
    let to = url.target();
    if !head.is_empty() {
        let evidence = format!("{to} speaks before it is spoken to, which no TLS server does");
        return Err(Fault::new(evidence, "if that is SSH in clear on purpose, write ssh:// in the gateway's URL"));
    }
    let Some(tls) = tls else {
        return Err(Fault::new("no certificate authorities were read", "name their file in tls_ca_file"));
    };
    let http = url.transport().is_websocket();
    let alpn: &'static [&'static [u8]] = if http { &[tls::ALPN_HTTP] } else { &[tls::ALPN_SSH] };
    let options = tls::ClientOptions { alpn, ..tls.options().clone() };
    let own = !options.ca_files.is_empty();
    let seeing = tls::connect_seeing(&options, &to.host, stream).await;
    let (connected, shown) = seeing.map_err(|error| {
        Fault::new(Chain(&error).to_string(), "see that the file in tls_ca_file is there and holds the authorities")
    })?;
    let who = shown.as_ref().map(|shown| format!(" ({shown})")).unwrap_or_default();
    match connected {
        Ok(secured) => {
            let mut verdict = Verdict::Ok;
            let (mut evidence, mut next) = (String::from("verified"), String::new());
            if let Some(shown) = &shown {
                evidence = format!("verified for {}: {shown}, good until {}", to.host, shown.ends);
                if let Some(left) = answer::ending(shown, Timestamp::now()) {
                    verdict = Verdict::Warning;
                    evidence = format!("{evidence}; it {left}");
                    "tell the gateway's operator to renew its certificate".clone_into(&mut next);
                }
            }
            if verdict == Verdict::Ok && !http && secured.alpn() != Some(tls::ALPN_SSH) {
                verdict = Verdict::Warning;
                evidence.push_str("; the other end did not agree to speak caponier/1 inside");
                next = format!(
                    "a middlebox or balancer may end TLS on the way: see that this is the gateway's own certificate{who}"
                );
            }
            Ok((Stream::layered(secured), Seen { verdict, evidence, next }))
        }
        Err(error @ tls::ConnectError::Untrusted { .. }) => {
            let evidence =
                format!("a middlebox ends TLS here, or the gateway's authority is not known: {}{who}", Chain(&error));
            Err(Fault::new(evidence, advice(&error, to, own)))
        }
        Err(error) => Err(Fault::new(format!("{}{who}", Chain(&error)), advice(&error, to, own))),
    }
}

fn ssh_advice(error: &LinkError, url: &GatewayUrl) -> String {
    let to = url.target();
    match error {
        LinkError::Greet { .. } => format!(
            "see that a caponier gateway answers at {to}: a captive portal, an inspecting proxy or another server speaks there; \
             ask the network team for an exclusion for {to}, or the gateway's operator for a tls:// or wss:// way"
        ),
        LinkError::NotAGateway { .. } => {
            format!("see that {to} is the gateway's address and port, and not that of a host's own sshd")
        }
        LinkError::LoginTimeout { .. } => {
            format!("ask the gateway's operator whether {to} is overloaded; something between may hold the bytes back")
        }
        LinkError::Dial { .. }
        | LinkError::Handshake { .. }
        | LinkError::KeyNotAccepted { .. }
        | LinkError::LoginRefused { .. }
        | LinkError::Trail(_) => {
            format!(
                "see that both ends are of one major version (caponier --version), and that nothing between changes bytes to {to}"
            )
        }
    }
}

/// The targets: under permits of the configuration's allowlists, and entries in a trail.
async fn targets(
    config: &Config,
    asked: &Asked,
    resolver: &Arc<Resolver>,
    guard: &Guard,
    examination: &mut Examination<'_>,
) {
    let writer = Tasks::new();
    let opening = timeout(asked.patience, trail(config, asked, &writer)).await;
    let (trail, place) = match opening.unwrap_or_else(|_| {
        let Fault { evidence, .. } = late(asked.patience);
        let next = "see whether the file system of the trail answers: a network mount whose server is away holds up whoever asks \
                    it; or name another file: --trail FILE";
        Err(("-".to_owned(), Fault::new(evidence, next)))
    }) {
        Ok(trail) => trail,
        Err((subject, Fault { evidence, next })) => {
            examination.add(Finding::new("trail", &subject, Verdict::Broken, &evidence).advising(&next));
            let why = "not looked at, because of trail: what cannot be recorded is not dialled";
            return examination.add(Finding::new("target", "all", Verdict::Skipped, why));
        }
    };
    let uid = rustix::process::geteuid().as_raw();
    let recorded = format!(
        "the dials of this examination are recorded there, by uid {uid}; whether the agent's user can write the agent's own was \
         not tried"
    );
    examination.add(Finding::new("trail", &place, Verdict::Ok, &recorded));
    for organisation in &config.organisations {
        let site = Site {
            organisation: &organisation.id,
            agent: &config.id,
            replica: &config.replica,
            allow: &organisation.allow,
            resolver,
            guard,
            trail: &trail,
            patience: asked.patience,
        };
        target::examine(&site, &asked.targets, |outcome| examination.add(outcome.told())).await;
    }
    let closed = match timeout(asked.patience, trail.close()).await {
        Ok(closed) => closed.map_err(|error| Chain(&error).to_string()),
        Err(_) => Err(late(asked.patience).evidence),
    };
    if let Err(evidence) = closed {
        let next = "see that the disk of the trail has room and can be written";
        examination.add(Finding::new("trail", &place, Verdict::Broken, &evidence).advising(next));
    }
    writer.drain(limits::STOP_GRACE).await;
}

/// The trail to write: the one that was asked for, or one beside the agent's. Never the agent's own: an agent that starts
/// meanwhile would find it taken, it would belong to whoever runs the doctor if it was not there yet, and its heads are signed by
/// a key that is for the agent alone.
async fn trail(config: &Config, asked: &Asked, writer: &Tasks) -> Result<(Trail, String), (String, Fault)> {
    let own = config.audit.list.iter().find_map(|sink| match &sink.kind {
        SinkKind::File { path, .. } => Some(path.clone()),
        SinkKind::Stdout | SinkKind::Syslog(_) | SinkKind::Https(_) => None,
    });
    let beside = own.map(|own| {
        let mut beside = own.into_os_string();
        beside.push(".doctor");
        PathBuf::from(beside)
    });
    let Some(path) = asked.trail.clone().or(beside) else {
        let next = "name a file for what this examination dials: --trail FILE";
        let fault = Fault::new("the agent's trail is no file, and nothing is dialled that is not recorded", next);
        return Err(("none".to_owned(), fault));
    };
    let subject = path.display().to_string();
    let (owns, wanted): (Vec<_>, _) = (config.audit.files().map(PathBuf::from).collect(), path.clone());
    let own = writer.spawn_blocking(move || owns.iter().any(|own| is_same(own, &wanted))).await;
    // Where that cannot be told, it is taken for the agent's.
    if own.unwrap_or(true) {
        let next = "name another file: --trail FILE, or leave it out";
        return Err((subject, Fault::new("that is the agent's own trail, which the agent alone writes", next)));
    }
    match Trail::start(Sinks::file(path), Side::Agent, Arc::new(NoNetwork), writer).await {
        Ok(trail) => Ok((trail, subject)),
        Err(error) => {
            let next = format!(
                "see that {subject} can be written by this user and its disk has room, as the agent needs it too; or name another \
                 file: --trail FILE"
            );
            Err((subject, Fault::new(Chain(&error).to_string(), next)))
        }
    }
}

/// Whether these are one file, which need not be there yet; a trail is not reached through a symbolic link.
fn is_same(one: &Path, other: &Path) -> bool {
    let whole = |path: &Path| {
        let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        Some((parent.canonicalize().ok()?, path.file_name()?.to_owned()))
    };
    one == other || whole(one).is_some_and(|one| whole(other) == Some(one))
}
