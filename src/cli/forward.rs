//! `caponier forward`: local listeners that lead to targets behind an agent.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;
use clap::ArgGroup;
use tokio::net::TcpListener;
use tracing::{Level, info};

use super::{Exit, ExitWith, egress, running};
use crate::client::{self, Config, Forward, Front, Pin, Server, User};
use crate::identity::{AgentName, Fingerprint, PrincipalId, PrivateKey};
use crate::limits;
use crate::target::{Host, Target};
use crate::task::Tasks;
use crate::telemetry;
use crate::tunnel::connect::url::GatewayUrl;

/// Listen on local ports and forward their connections to targets behind an agent or any SSH bastion, until SIGTERM or
/// SIGINT.
#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("pin").required(true).args(["known_hosts", "host_key"])),
    group(ArgGroup::new("way").required(true).args(["gateway", "ssh_host"])),
    after_help = "\
Example:
  caponier forward --gateway ssh://gateway.example.com --agent acme/prod-eu --identity ~/.ssh/provisioner \\
      --known-hosts ~/.ssh/known_hosts -L 5432:orders.db.internal:5432
  caponier forward --ssh-host bastion.example.com --ssh-user acme --identity ~/.ssh/provisioner \\
      --host-key-fingerprint SHA256:nThbg6kXUpJWGl7E1IGOCspRomTxdCARLviKw6E5SY8 \\
      -L 5432:orders.db.internal:5432

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
    /// An OpenSSH known_hosts file that has the server's host key, or a CA that vouches for it (@cert-authority).
    #[arg(long, value_name = "FILE")]
    known_hosts: Option<PathBuf>,
    /// The server's host key, by its fingerprint.
    #[arg(long = "host-key-fingerprint", alias = "host-key", value_name = "SHA256:…")]
    host_key: Option<Fingerprint>,
    /// Listen on PORT (0: any free one) of BIND, a loopback address (127.0.0.1 unless given), and forward to HOST:HOSTPORT. May
    /// be given several times.
    #[arg(short = 'L', value_name = "[BIND:]PORT:HOST:HOSTPORT", required = true)]
    listen: Vec<Listen>,
    #[command(flatten)]
    egress: egress::Args,
}

/// What `-L` says.
#[derive(Debug, Clone)]
struct Listen {
    address: SocketAddr,
    target: Target,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "expected [BIND:]PORT:HOST:HOSTPORT, with IPv6 addresses in brackets".to_owned();
        let (bind, rest) = if let Some(rest) = text.strip_prefix('[') {
            let (bind, rest) = rest.split_once("]:").ok_or_else(form)?;
            (Some(bind), rest)
        } else {
            // PORT comes first or second: it is the first part that is a number.
            let (first, rest) = text.split_once(':').ok_or_else(form)?;
            if first.parse::<u16>().is_ok() { (None, text) } else { (Some(first), rest) }
        };
        let (port, target) = rest.split_once(':').ok_or_else(form)?;
        let port: u16 = port.parse().map_err(|_| form())?;
        let bind: IpAddr = match bind {
            None | Some("localhost") => Ipv4Addr::LOCALHOST.into(),
            Some(bind) => bind.parse().map_err(|_| "BIND must be an address or localhost".to_owned())?,
        };
        if !bind.is_loopback() {
            return Err("BIND must be a loopback address: whoever can reach it would act in your name".to_owned());
        }
        let target = target.parse().map_err(|error| format!("{error}"))?;
        Ok(Self { address: SocketAddr::new(bind, port), target })
    }
}

/// Runs the command.
///
/// # Errors
/// If the server does not let us in, or a port cannot be listened on.
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
    let (egress, tls) = (args.egress.egress()?, args.egress.tls(&server)?);
    let config = Config { server, key, pin, egress, tls };
    telemetry::start(telemetry::Format::Text, Level::INFO);
    running::block_on(async |stop| {
        let mut forwards = Vec::new();
        for Listen { address, target } in args.listen {
            let listener =
                TcpListener::bind(address).await.with_context(|| format!("could not listen on {address}"))?;
            forwards.push(Forward { listener, front: Front::Fixed(target) });
        }
        let tasks = Tasks::new();
        let session = client::connect(&config, &tasks).await?;
        for forward in &forwards {
            info!("listening on {} for {}", forward.listener.local_addr()?, forward.front);
        }
        client::forward(config, session, forwards, &tasks, &stop).await;
        tasks.drain(limits::STOP_GRACE).await;
        Ok(())
    })?;
    Ok(Exit::Done.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listens_on_loopback_only() {
        for (text, address, target) in [
            ("5432:db.internal:5432", "127.0.0.1:5432", "db.internal:5432"),
            ("0:db.internal:5432", "127.0.0.1:0", "db.internal:5432"),
            ("127.0.0.2:5432:db.internal:5432", "127.0.0.2:5432", "db.internal:5432"),
            ("localhost:1:10.0.0.1:2", "127.0.0.1:1", "10.0.0.1:2"),
            ("[::1]:5432:[2001:db8::1]:5432", "[::1]:5432", "[2001:db8::1]:5432"),
        ] {
            let listen: Listen = text.parse().expect(text);
            assert_eq!((listen.address.to_string().as_str(), listen.target.to_string().as_str()), (address, target));
        }
        for text in [
            "",
            "5432",
            "5432:db",
            "0.0.0.0:1:db:2",
            "[::]:1:db:2",
            "x:1:db:2",
            "1:2130706433:2",
            "70000:db:1",
            "1:db:0",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
    }
}
