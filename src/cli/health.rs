//! `caponier health`: whether a program lives and is ready, for probes that run a command, and for people.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use jiff::Timestamp;

use super::agents::ago;
use super::{Exit, ExitWith, print, running};
use crate::config::{self, Loaded};
use crate::gateway;
use crate::health::ask::{self, Answer, AskError, Question};
use crate::health::{Config, Report};

/// Say whether an agent, gateway or proxy lives and is ready: exit code 0 if it is, 1 if not, 2 for a wrong question.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  caponier health --config /etc/caponier/agent.toml
  caponier health --socket /run/caponier/gateway.sock
  caponier health --url http://127.0.0.1:9465 --live
  caponier health --file /run/caponier/agent.health --json

Where to ask is what the program's configuration opens for that. --config takes the first of these that its file has: the socket \
of [health], the admin socket of a gateway, listen of [health] or else of [metrics], the file of [health]. To be run as the \
program's user, or as root.

Ready is an agent of which each organisation has a link that gets forwards, a gateway that accepts, a proxy whose upstreams answer; \
each with a trail that can be written, and not going away. What is not in order is named, with since when and what to do.
Live is one whose threads get to their work: only for the lack of that it should be restarted.

As a probe of Kubernetes (a dead tunnel is noticed within 45 s):
  livenessProbe:  {exec: {command: [caponier, health, --live, --file, /run/caponier/agent.health]}, timeoutSeconds: 10}
  readinessProbe: {exec: {command: [caponier, health, --file, /run/caponier/agent.health]}, timeoutSeconds: 10}")]
pub struct Args {
    #[command(flatten)]
    place: Place,
    /// Ask only whether it lives.
    #[arg(long)]
    live: bool,
    /// Print the whole answer as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[group(multiple = false)]
struct Place {
    /// The program's configuration, which says where it can be asked.
    #[arg(long, short, value_name = "FILE")]
    config: Option<PathBuf>,
    /// A health socket, or the admin socket of a gateway. Without any of these, /run/caponier/gateway.sock.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A health file.
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// What it listens on, as http://HOST:PORT.
    #[arg(long, value_name = "URL")]
    url: Option<String>,
}

/// Where to ask.
#[derive(Debug, PartialEq, Eq)]
enum Where {
    Port(String, u16),
    Socket(PathBuf),
    Admin(PathBuf),
    File(PathBuf),
}

/// Runs the command.
///
/// # Errors
/// If it is not known how the program is.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    let place = place(&args.place)?;
    let question = if args.live { Question::Live } else { Question::Ready };
    let answer = running::run(async || asked(&place, question).await).context(
        "it is not known whether it is ready, so it counts as not; is it running, is health opened in its configuration, and are you \
         its user?",
    )?;
    let (good, text) = match answer {
        Answer::Live(live) if args.json => (live, format!("{{\"live\":{live}}}\n")),
        Answer::Live(live) => {
            (live, if live { "live\n" } else { "not live: a thread does not get to its work\n" }.to_owned())
        }
        Answer::Report(report) => {
            let good = if args.live { report.live } else { report.ready };
            let text = match (args.json, args.live) {
                (true, _) => format!("{}\n", serde_json::to_string_pretty(&report)?),
                (false, true) => {
                    if good { "live\n" } else { "not live: a thread does not get to its work\n" }.to_owned()
                }
                (false, false) => told(&report, Timestamp::now()),
            };
            (good, text)
        }
    };
    print(&text)?;
    Ok(if good { Exit::Done } else { Exit::Failed }.into())
}

fn place(place: &Place) -> anyhow::Result<Where> {
    if let Some(file) = &place.config {
        return configured(file);
    }
    if let Some(file) = &place.file {
        return Ok(Where::File(file.clone()));
    }
    if let Some(url) = &place.url {
        return port(url).exit_with(Exit::Usage);
    }
    let socket = place.socket.clone();
    Ok(Where::Socket(socket.unwrap_or_else(|| PathBuf::from("/run/caponier/gateway.sock"))))
}

/// The first place that a configuration opens.
fn configured(file: &Path) -> anyhow::Result<Where> {
    let (health, admin) = match config::load(file).exit_with(Exit::Usage)? {
        Loaded::Agent(config, _) => (config.health, None),
        Loaded::Gateway(config, _) => (config.health, config.admin_socket),
        Loaded::Proxy(config, _) => (config.health, None),
        Loaded::Resources(_) => {
            return Err(anyhow::anyhow!("{} configures no program that runs", file.display())).exit_with(Exit::Usage);
        }
    };
    if let Some(first) = first(health, admin) {
        return Ok(first);
    }
    let problem = "opens nothing that could be asked: give [health] with file = \"…\", socket = \"…\" or listen = \"127.0.0.1:9465\"";
    Err(anyhow::anyhow!("{} {problem}", file.display())).exit_with(Exit::Usage)
}

/// Where to ask of all that is open, in the order that the help tells. A port that the system chooses is not known here.
fn first(health: Config, admin: Option<PathBuf>) -> Option<Where> {
    let Config { listen, socket, file, metrics } = health;
    let address = [listen, metrics].into_iter().flatten().find(|address| address.port() != 0);
    let socket = socket.map(Where::Socket);
    socket.or(admin.map(Where::Admin)).or(address.map(at)).or(file.map(Where::File))
}

/// An address to connect to, for one that is listened on.
fn at(address: SocketAddr) -> Where {
    let ip = match address.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    let host = if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() };
    Where::Port(host, address.port())
}

fn port(url: &str) -> anyhow::Result<Where> {
    let wanted = "a URL such as http://127.0.0.1:9465 is wanted: http, a host, a port";
    let Some(rest) = url.strip_prefix("http://") else { bail!("{wanted}") };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let (host, port) = authority.rsplit_once(':').context(wanted)?;
    let port = port.parse().ok().filter(|port| *port > 0).context(wanted)?;
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':' | '%');
    if host.is_empty() || !bare.chars().all(fits) {
        bail!("{wanted}");
    }
    Ok(Where::Port(host.to_owned(), port))
}

async fn asked(place: &Where, question: Question) -> anyhow::Result<Answer> {
    match place {
        Where::Port(host, port) => Ok(ask::port(host, *port, question).await?),
        Where::File(path) => Ok(Answer::Report(Box::new(ask::file(path)?))),
        Where::Admin(path) => Ok(Answer::Report(Box::new(gateway::health(path).await?))),
        Where::Socket(path) => match ask::socket(path, question).await {
            // What hangs up on HTTP may be an admin socket.
            Err(AskError::Http { .. }) => Ok(Answer::Report(Box::new(gateway::health(path).await?))),
            answered => Ok(answered?),
        },
    }
}

/// What a person reads.
fn told(report: &Report, now: Timestamp) -> String {
    let mut text = format!("{}: {}\n", report.side, if report.ready { "ready" } else { "not ready" });
    for part in &report.parts {
        let mark = if part.ready { "ok" } else { "NOT OK" };
        // Writing to a text cannot fail.
        let _ = write!(text, "  {mark:<6}  {}", part.name().escape_debug());
        if let Some(since) = part.since {
            let _ = write!(text, ", for {}", ago(&since.to_string(), now));
        }
        if !part.detail.is_empty() {
            let _ = write!(text, ": {}", part.detail.escape_debug());
        }
        text.push('\n');
        if !part.advice.is_empty() {
            let _ = writeln!(text, "          what to do: {}", part.advice.escape_debug());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Part;

    #[test]
    fn places_are_taken_in_the_order_that_the_help_tells() {
        let at = |port| Some(SocketAddr::from(([127, 0, 0, 1], port)));
        let mut health = Config { listen: at(1), socket: Some("s".into()), file: Some("f".into()), metrics: at(2) };
        let mut admin = Some(PathBuf::from("a"));
        let port = |port| Some(Where::Port("127.0.0.1".to_owned(), port));
        let mut places = Vec::new();
        places.push(first(health.clone(), admin.clone()));
        health.socket = None;
        places.push(first(health.clone(), admin.clone()));
        admin = None;
        places.push(first(health.clone(), admin.clone()));
        health.listen = at(0);
        places.push(first(health.clone(), admin.clone()));
        health.metrics = None;
        places.push(first(health.clone(), admin.clone()));
        health.file = None;
        places.push(first(health, admin));
        let socket = Some(Where::Socket("s".into()));
        let wanted = [socket, Some(Where::Admin("a".into())), port(1), port(2), Some(Where::File("f".into())), None];
        assert_eq!(places, wanted);
        let help = <Args as clap::Args>::augment_args(clap::Command::new("health")).render_long_help().to_string();
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        let (_, order) = help.split_once("the first of these").expect("the order");
        let told: Vec<_> =
            ["the socket of [health]", "the admin socket", "listen of [health]", "of [metrics]", "the file of"]
                .into_iter()
                .map(|words| order.find(words).unwrap_or_else(|| panic!("{words}: {order}")))
                .collect();
        assert!(told.is_sorted(), "{told:?}");
    }

    #[test]
    fn urls_are_http_with_a_port() {
        let at = |host: &str, port| Some(Where::Port(host.to_owned(), port));
        for (url, expected) in [
            ("http://127.0.0.1:9465", at("127.0.0.1", 9465)),
            ("http://[::1]:9465/readyz", at("[::1]", 9465)),
            ("http://pod.example:1?verbose", at("pod.example", 1)),
            ("https://127.0.0.1:9465", None),
            ("http://127.0.0.1", None),
            ("http://127.0.0.1:0", None),
            ("http://:9465", None),
            ("http://a b:1", None),
            ("http://user@host:1", None),
            ("http://x\r\ny:1", None),
            ("127.0.0.1:9465", None),
        ] {
            assert_eq!(port(url).ok(), expected, "{url}");
        }
    }

    #[test]
    fn what_is_wrong_is_told_with_since_when_and_what_to_do() {
        let now: Timestamp = "2026-11-21T10:00:00Z".parse().expect("a time");
        let links = Part::failing("links", "no usable link: \u{1b}[2J", "look at the log").of("acme");
        let report = Report {
            side: "agent".to_owned(),
            version: "1".to_owned(),
            pid: 1,
            time: now,
            live: true,
            ready: false,
            parts: vec![Part::ready("trail"), links.since("2026-11-21T09:58:30Z".parse().ok())],
        };
        assert_eq!(
            told(&report, now),
            "agent: not ready\n  ok      trail\n  NOT OK  links acme, for 90s: no usable link: \\u{1b}[2J\n          what to \
             do: look at the log\n"
        );
    }
}
