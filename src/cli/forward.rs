//! `caponier forward`: local listeners that lead to targets behind an agent, a single connection over standard input and
//! output, or a command that runs with them.
//!
//! Waits for the login, and is ready then; after that for SIGTERM or SIGINT, the end of the connection or the command's.

mod inside;
mod listen;
mod stdio;

use std::ffi::OsString;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::ArgGroup;
use jiff::Timestamp;
use serde_json::json;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::Level;

use self::inside::Signals;
use self::listen::{Bind, Listen};
use self::stdio::Stdio;
use super::{Exit, ExitWith, egress, print, running};
use crate::chain::Chain;
use crate::client::{self, Certified, Config, Forward, Front, OpenError, Pin, Server, Session, User};
use crate::identity::{AgentName, Fingerprint, PrincipalId, PrivateKey};
use crate::limits;
use crate::target::{Host, Target};
use crate::task::Tasks;
use crate::telemetry;
use crate::tunnel::connect::url::GatewayUrl;
use crate::tunnel::splice::End;
use crate::tunnel::stream::Stream;

/// Forward connections of local programs to targets behind an agent or any SSH bastion: from local ports, as a SOCKS5 or HTTP
/// proxy on loopback, or over standard input and output. Ends with SIGTERM, SIGINT or the COMMAND that it runs.
#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("pin").required(true).args(["known_hosts", "host_key"])),
    group(ArgGroup::new("way").required(true).args(["gateway", "ssh_host"])),
    group(ArgGroup::new("what").required(true).multiple(true).args(["listen", "forwards", "socks", "http_proxy", "stdio"])),
    after_help = "\
Example:
  caponier forward --gateway ssh://gateway.example.com --agent acme/prod-eu --identity ~/.ssh/provisioner \\
      --known-hosts ~/.ssh/known_hosts -L 5432:orders.db.internal:5432
  caponier forward --ssh-host bastion.example.com --ssh-user acme --identity ~/.ssh/provisioner \\
      --host-key-fingerprint SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8 \\
      -L 5432:orders.db.internal:5432

The ways to the server and to trust it are left out of these (…):
  caponier forward … --http-proxy 8118 -- kubectl --context prod get pods     # see caponier kubeconfig
  caponier forward … --socks 1080                     # curl --proxy socks5h://127.0.0.1:1080 https://wiki.internal
  caponier forward … --forwards databases.txt -- sh -c 'psql -h 127.0.0.1 -p ${CAPONIER_LISTEN_1##*:} orders'
  caponier forward … --certificate ~/.ssh/provisioner-cert.pub -L 5432:orders.db.internal:5432
  ssh -o ProxyCommand='caponier forward … --stdio %h:%p' admin@host.internal

When it is ready, standard output says where it listens, and then so; with --json, as an object in each line:
  listening 127.0.0.1:5432 for orders.db.internal:5432
  listening 127.0.0.1:1080 for socks
  listening 127.0.0.1:8118 for http-proxy
  ready
Nothing but the target's bytes stands there with --stdio, and nothing but the command's with a COMMAND.

A COMMAND finds CAPONIER_LISTEN_1, CAPONIER_LISTEN_2 … (the address for each -L, then for each line of --forwards), \
HTTPS_PROXY and https_proxy (--http-proxy), ALL_PROXY and all_proxy (--socks) in its environment, and gets the signals \
that this program gets. What would lead it past them is taken out: NO_PROXY, and with --socks HTTP_PROXY and HTTPS_PROXY.
Exit codes: the COMMAND's (128 + n where signal n ended it, 127 and 126 where it cannot be found or run), else 0 done, 1 \
failed, 2 usage, 3 the target of --stdio is not allowed.

A server whose host key is not pinned is never trusted. `ssh-keyscan -p 443 gateway.example.com` prints the line for a \
known_hosts file; compare its fingerprint with the one that the server's operator publishes. A session that was lost is \
made anew with the next connection."
)]
pub struct Args {
    /// The gateway: ssh://HOST[:PORT], tls://HOST[:PORT] or wss://HOST[:PORT][/PATH], port 443 unless given.
    #[arg(long, value_name = "URL", requires = "agent")]
    gateway: Option<GatewayUrl>,
    /// The agent behind which the targets are.
    #[arg(long, value_name = "ORG/AGENT", requires = "gateway")]
    agent: Option<AgentName>,
    /// In place of a gateway and an agent: an SSH bastion, which is an agent that listens or any SSH server that forwards.
    #[arg(long, value_name = "HOST", requires = "ssh_user")]
    ssh_host: Option<Host>,
    /// The bastion's port.
    #[arg(long, value_name = "PORT", requires = "ssh_host", default_value_t = client::SSH_PORT,
        value_parser = clap::value_parser!(u16).range(1..))]
    ssh_port: u16,
    /// The user at the bastion. At an agent that listens it is the organisation.
    #[arg(long, value_name = "USER", requires = "ssh_host")]
    ssh_user: Option<User>,
    /// For whom your key speaks, at an agent that listens and lets it speak for others.
    #[arg(long, value_name = "PRINCIPAL", requires = "ssh_host")]
    principal: Option<PrincipalId>,
    /// Your private key file.
    #[arg(long, short, value_name = "FILE")]
    identity: PathBuf,
    /// An OpenSSH certificate for it (`ssh-keygen -s`), which is shown before the plain key; left out, the one that lies beside
    /// it as KEY-cert.pub, if there is one. It is read again at each login.
    #[arg(long, value_name = "FILE")]
    certificate: Option<PathBuf>,
    /// An OpenSSH known_hosts file that has the server's host key, or a CA that vouches for it (@cert-authority).
    #[arg(long, value_name = "FILE")]
    known_hosts: Option<PathBuf>,
    /// The server's host key, by its fingerprint.
    #[arg(long = "host-key-fingerprint", alias = "host-key", value_name = "SHA256:…")]
    host_key: Option<Fingerprint>,
    /// Listen on PORT (0: any free one) of BIND, a loopback address (127.0.0.1 unless given), and forward to HOST:HOSTPORT. May
    /// be given several times.
    #[arg(short = 'L', value_name = "[BIND:]PORT:HOST:HOSTPORT")]
    listen: Vec<Listen>,
    /// Do as -L says in each line of FILE; what follows a # is a comment.
    #[arg(long, value_name = "FILE")]
    forwards: Option<PathBuf>,
    /// Be a SOCKS5 proxy on PORT (0: any free one) of BIND, a loopback address: without authentication, for CONNECT, with names
    /// that are resolved at the agent (socks5h).
    #[arg(long, value_name = "[BIND:]PORT")]
    socks: Option<Bind>,
    /// Be an HTTP proxy on PORT (0: any free one) of BIND, a loopback address: for CONNECT, which is what clients use for https.
    #[arg(long, value_name = "[BIND:]PORT")]
    http_proxy: Option<Bind>,
    /// Connect standard input and output to HOST:PORT, and end with the connection: a ProxyCommand for ssh.
    #[arg(long, value_name = "HOST:PORT", conflicts_with_all = ["listen", "forwards", "socks", "http_proxy", "json", "command"])]
    stdio: Option<Target>,
    /// Say in JSON when it is ready.
    #[arg(long, conflicts_with = "command")]
    json: bool,
    /// A command to run inside: it is started when all is ready, and its end is the end.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    #[command(flatten)]
    egress: egress::Args,
}

/// Runs the command.
///
/// # Errors
/// If the server does not let us in, a port cannot be listened on, or the target of `--stdio` cannot be had.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let key = PrivateKey::read(&args.identity).exit_with(Exit::Usage)?;
    // clap has made sure that one way is complete, and that there is a pin.
    let server = match (args.gateway, args.agent, args.ssh_host, args.ssh_user) {
        (Some(url), Some(agent), None, None) => Server::Gateway { url, agent },
        (None, None, Some(host), Some(user)) => {
            Server::Bastion { endpoint: Target { host, port: args.ssh_port }, user, principal: args.principal }
        }
        _ => {
            let problem = "either --gateway and --agent are needed, or --ssh-host and --ssh-user";
            return Err(anyhow::anyhow!(problem)).exit_with(Exit::Usage);
        }
    };
    let pin = match (&args.known_hosts, args.host_key) {
        (_, Some(fingerprint)) => Pin::fingerprint(fingerprint),
        (Some(file), None) => Pin::known_hosts(file, server.target()).exit_with(Exit::Usage)?,
        (None, None) => {
            let problem = "either --known-hosts or --host-key-fingerprint is needed";
            return Err(anyhow::anyhow!(problem)).exit_with(Exit::Usage);
        }
    };
    let certificate = certificate(args.certificate, &args.identity, &key, &server)?;
    let (egress, tls) = (args.egress.egress()?, args.egress.tls(&server)?);
    let config = Config { server, key, certificate, pin, egress, tls };
    let mut wanted: Vec<(Bind, Front)> = Vec::new();
    let from_file = args.forwards.as_deref().map(listen::read).transpose().exit_with(Exit::Usage)?.unwrap_or_default();
    let fixed = args.listen.into_iter().chain(from_file);
    wanted.extend(fixed.map(|Listen { bind, target }| (bind, Front::Fixed(target))));
    wanted.extend(args.socks.map(|bind| (bind, Front::Socks)));
    wanted.extend(args.http_proxy.map(|bind| (bind, Front::Http)));
    if wanted.len() > limits::FRONTS_MAX {
        let problem = format!("{} listeners are wanted, and {} is the most", wanted.len(), limits::FRONTS_MAX);
        return Err(anyhow::anyhow!(problem)).exit_with(Exit::Usage);
    }
    telemetry::start(telemetry::Format::Text, Level::INFO);
    match args.stdio {
        Some(target) => over_stdio(&config, &target),
        None if args.command.is_empty() => until_stopped(config, &wanted, args.json),
        None => around(config, &wanted, &args.command),
    }
}

/// The certificate to show. One that is of no use is a fault where it was asked for, and only told where it lies beside the key.
fn certificate(
    given: Option<PathBuf>,
    identity: &Path,
    key: &PrivateKey,
    server: &Server,
) -> anyhow::Result<Option<Certified>> {
    let asked_for = given.is_some();
    let Some(certified) = given.map(Certified::at).or_else(|| Certified::beside(identity)) else { return Ok(None) };
    match certified.read(&key.public(), server, Timestamp::now()) {
        Ok(certificate) => {
            if let Some(doubt) = client::doubt(&certificate, server) {
                eprintln!("caponier: warning: {doubt}");
            }
            Ok(Some(certified))
        }
        Err(error) if asked_for => Err(error).exit_with(Exit::Usage),
        Err(error) => {
            eprintln!("caponier: warning: passed over, and the plain key shown: {}", Chain(&error));
            // It may be renewed before the next login.
            Ok(Some(certified))
        }
    }
}

/// Forwards until a signal comes.
fn until_stopped(config: Config, wanted: &[(Bind, Front)], json: bool) -> anyhow::Result<ExitCode> {
    running::block_on(async |stop| {
        let tasks = Tasks::new();
        let Some(ready) = stop.run_until_cancelled(Ready::make(&config, wanted, &tasks)).await else {
            bail!("stopped before it was ready");
        };
        let ready = ready?;
        print(&ready.line(json))?;
        client::forward(config, ready.session, ready.forwards, &tasks, &stop).await;
        tasks.drain(limits::STOP_GRACE).await;
        Ok(())
    })?;
    Ok(Exit::Done.into())
}

/// Forwards for as long as a command runs.
fn around(config: Config, wanted: &[(Bind, Front)], command: &[OsString]) -> anyhow::Result<ExitCode> {
    let code = running::run(async || {
        let mut signals = Signals::take().context("could not listen for signals")?;
        let (tasks, stop) = (Tasks::new(), CancellationToken::new());
        let ready = tokio::select! {
            ready = Ready::make(&config, wanted, &tasks) => ready?,
            signal = signals.next() => return Ok(inside::stopped(signal)),
        };
        let mut child = match inside::start(command, &ready.fronts) {
            Ok(child) => child,
            Err(error) => {
                eprintln!("error: could not run {}: {error}", command[0].display());
                ready.session.close().await;
                return Ok(inside::not_started(&error));
            }
        };
        let forwarding = client::forward(config, ready.session, ready.forwards, &tasks, &stop);
        let ending = async {
            let status = inside::ended(&mut child, &mut signals).await;
            stop.cancel();
            status
        };
        let ((), status) = tokio::join!(forwarding, ending);
        tasks.drain(limits::STOP_GRACE).await;
        Ok(inside::code(status.context("could not learn how the command has ended")?))
    })?;
    Ok(code.into())
}

/// Connects standard input and output to a target, until both are done.
fn over_stdio(config: &Config, target: &Target) -> anyhow::Result<ExitCode> {
    running::block_on(async |stop| {
        let tasks = Tasks::new();
        let Some(session) = stop.run_until_cancelled(client::connect(config, &tasks)).await else {
            bail!("stopped before it was connected");
        };
        let session = session?;
        let stdio = Stdio::take().context("standard input and output cannot be used")?;
        let carried = session.carry(target, Stream::layered(stdio), &stop).await;
        session.close().await;
        tasks.drain(limits::STOP_GRACE).await;
        match carried {
            Ok(End::Clean) => Ok(Exit::Done.into()),
            Ok(End::Stopped) => bail!("stopped before the connection was over"),
            Ok(End::NearBroke(kind)) => bail!("standard input or output broke: {}", io::Error::from(kind)),
            Ok(_) => bail!("the connection to {target} broke"),
            Err(error @ OpenError::NotAllowed { .. }) => Err(error).exit_with(Exit::Refused),
            Err(error) => Err(error.into()),
        }
    })
}

/// All that is needed to forward.
struct Ready {
    session: Session,
    forwards: Vec<Forward>,
    /// Where they listen.
    fronts: Vec<(SocketAddr, Front)>,
}

impl Ready {
    /// Listens and logs in. A port that cannot be had is known before anybody is bothered.
    async fn make(config: &Config, wanted: &[(Bind, Front)], tasks: &Tasks) -> anyhow::Result<Self> {
        let (mut forwards, mut fronts) = (Vec::new(), Vec::new());
        for (Bind(address), front) in wanted {
            let listener =
                TcpListener::bind(address).await.with_context(|| format!("could not listen on {address}"))?;
            fronts.push((listener.local_addr()?, front.clone()));
            forwards.push(Forward { listener, front: front.clone() });
        }
        let session = client::connect(config, tasks).await?;
        Ok(Self { session, forwards, fronts })
    }

    /// What says so, in a form that programs may rely on.
    fn line(&self, json: bool) -> String {
        let listening = self.fronts.iter().map(|(address, front)| match json {
            true => {
                format!("{}\n", json!({"event": "listening", "address": address.to_string(), "for": front.to_string()}))
            }
            false => format!("listening {address} for {front}\n"),
        });
        let ready = if json { format!("{}\n", json!({"event": "ready"})) } else { "ready\n".to_owned() };
        listening.chain([ready]).collect()
    }
}
