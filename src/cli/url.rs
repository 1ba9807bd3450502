//! `caponier url`: a signed URL, by which a client that takes an HTTPS proxy reaches targets behind an agent.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::Context;
use clap::ArgGroup;
use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use super::{Exit, ExitWith, print};
use crate::identity::{AgentName, PrincipalId, PrivateKey};
use crate::limits::TOKEN_LIFE_MAX;
use crate::secret::Secret;
use crate::target::Target;
use crate::token::Claims;

/// Print an HTTPS proxy's URL with a signed token in it, which lets whoever has it use one agent for a time.
#[derive(Debug, clap::Args)]
#[command(
    group(ArgGroup::new("signer").required(true).args(["key", "identity"])),
    after_help = "\
Example:
  caponier url acme/prod-eu --gateway gateway.example.com --principal ci --key token.key --target api.internal:6443
  caponier url acme/prod-eu --gateway gateway.example.com:443 --principal alice --identity ~/.ssh/id_ed25519 --ttl 8h

  HTTPS_PROXY=$(caponier url acme/prod-eu --gateway gateway.example.com --principal ci --key token.key) terraform apply
  curl --proxy-cacert gateway-ca.pem --proxy \"$(caponier url …)\" https://api.internal:6443/version
  HTTPS_PROXY=$(caponier url …) REQUESTS_CA_BUNDLE=both-cas.pem python3 job.py   # requests; urllib would not use TLS

The URL is a secret: whoever reads it can use it until it expires or is revoked. Keep it out of command lines, logs and \
histories. The registry has the public half of --key in organisations/ORG/token-keys, with the principals that it may sign \
for; of --identity it has the public half among the principal's own keys. To revoke a URL, list its id (--json prints it as \
jti) in revoked_tokens beside the key."
)]
pub struct Args {
    /// The agent.
    #[arg(value_name = "ORG/AGENT")]
    agent: AgentName,
    /// The gateway, as clients reach it: HOST[:PORT], port 443 unless given.
    #[arg(long, value_name = "HOST[:PORT]")]
    gateway: Gateway,
    /// On whose behalf it may be used: a principal of the agent's organisation.
    #[arg(long, value_name = "PRINCIPAL")]
    principal: PrincipalId,
    /// A private key that is registered to sign tokens (Ed25519).
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// In place of that, a private SSH key of the principal itself.
    #[arg(long, short, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// A target that it may be used for; left out, all that the principal is granted. May be given several times.
    #[arg(long = "target", value_name = "HOST:PORT")]
    targets: Vec<Target>,
    /// How long it is good, as 30m, 12h or 7d; at most 30d.
    #[arg(long, value_name = "TIME", default_value = "1h")]
    ttl: Life,
    /// Print a JSON object with the URL, the token's id and when it expires.
    #[arg(long)]
    json: bool,
}

/// Where the gateway is.
#[derive(Debug, Clone)]
struct Gateway(Target);

impl FromStr for Gateway {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let with_port = text.parse::<Target>();
        let without = || format!("{text}:443").parse::<Target>();
        with_port
            .or_else(|error| without().map_err(|_| error))
            .map(Self)
            .map_err(|error| format!("expected HOST or HOST:PORT, with IPv6 addresses in brackets: {error}"))
    }
}

/// How long a token is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Life(SignedDuration);

impl FromStr for Life {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "expected a number and a unit, as in 90s, 30m, 12h or 7d".to_owned();
        let at = text.len().checked_sub(1).filter(|at| text.is_char_boundary(*at)).ok_or_else(form)?;
        let (number, unit) = text.split_at(at);
        let seconds: u64 = match unit {
            "s" => 1,
            "m" => 60,
            "h" => 3600,
            "d" => 24 * 3600,
            _ => return Err(form()),
        };
        // `u64::from_str` takes a leading '+'.
        if !number.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(form());
        }
        let number: u64 = number.parse().map_err(|_| form())?;
        let life = number.checked_mul(seconds).filter(|life| (1..=TOKEN_LIFE_MAX.as_secs()).contains(life));
        let life = life.and_then(|life| i64::try_from(life).ok());
        life.map(|life| Self(SignedDuration::from_secs(life))).ok_or_else(|| {
            format!("a token is good for some time, and at most for {} days", TOKEN_LIFE_MAX.as_secs() / 86_400)
        })
    }
}

/// Runs the command.
///
/// # Errors
/// If the key cannot be read, or cannot sign such a token.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    const WHAT: &str = "could not make a URL";
    let read = |file| PrivateKey::read(file).context(WHAT).exit_with(Exit::Usage);
    let targets = (!args.targets.is_empty()).then_some(args.targets);
    let claims = Claims::new(args.principal, args.agent, targets, Timestamp::now(), args.ttl.0);
    let claims = claims.context(WHAT).exit_with(Exit::Usage)?;
    // clap has made sure that there is one of them.
    let token = match (&args.key, &args.identity) {
        (Some(file), _) => claims.sign(&read(file)?),
        (None, Some(file)) => claims.sign_with_ssh(&read(file)?),
        (None, None) => return Err(anyhow::anyhow!("either --key or --identity is needed")).exit_with(Exit::Usage),
    };
    let token = token.context(WHAT).exit_with(Exit::Usage)?;
    let url = Secret::new(format!("https://caponier:{}@{}", token.text().expose(), args.gateway.0));
    // A terminal, a pipe: in any case somebody's eyes. That this cannot be said is no reason to fail.
    let _ = writeln!(
        io::stderr(),
        "caponier: this URL is a secret: whoever has it acts as {} until {}",
        claims.principal,
        claims.expires
    );
    let answer = if args.json {
        let object = json!({
            "url": url.expose(),
            "jti": claims.id.as_str(),
            "expires": claims.expires.to_string(),
            "key": token.key().to_string(),
        });
        Secret::new(format!("{object:#}\n"))
    } else {
        Secret::new(format!("{}\n", url.expose()))
    };
    print(answer.expose())?;
    Ok(Exit::Done.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_have_a_number_and_a_unit() {
        for (text, seconds) in [("90s", 90), ("30m", 1800), ("1h", 3600), ("7d", 604_800), ("30d", 2_592_000)] {
            assert_eq!(text.parse(), Ok(Life(SignedDuration::from_secs(seconds))), "{text}");
        }
        for text in
            ["", "h", "1", "0s", "31d", "+1h", "-1h", "1.5h", "1 h", "1h30m", "1w", "1é", "99999999999999999999d"]
        {
            assert!(text.parse::<Life>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_gateway_is_at_port_443_unless_it_says_otherwise() {
        for (text, expected) in [
            ("gateway.example.com", "gateway.example.com:443"),
            ("gateway.example.com:8443", "gateway.example.com:8443"),
            ("192.0.2.1", "192.0.2.1:443"),
            ("[2001:db8::1]", "[2001:db8::1]:443"),
            ("[2001:db8::1]:8443", "[2001:db8::1]:8443"),
        ] {
            assert_eq!(text.parse::<Gateway>().map(|gateway| gateway.0.to_string()).as_deref(), Ok(expected));
        }
        for text in ["", "https://gateway", "a b", "gateway:0", "gateway:443:1", "user@gateway", "gateway/path"] {
            assert!(text.parse::<Gateway>().is_err(), "{text}");
        }
    }
}
