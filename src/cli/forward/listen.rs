//! Where to listen, as the command line and a file of forwards say it.

use std::fs::File;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::str::FromStr;

use anyhow::{Context, bail};

use crate::limits;
use crate::target::Target;

/// An address to listen on: `[BIND:]PORT`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bind(pub(super) SocketAddr);

impl FromStr for Bind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "expected [BIND:]PORT, with IPv6 addresses in brackets".to_owned();
        let (bind, port) = match text.rsplit_once(':') {
            None => (None, text),
            Some((bind, port)) => (Some(bind), port),
        };
        if !port.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(form());
        }
        let port = port.parse().map_err(|_| form())?;
        let bind: IpAddr = match bind {
            None | Some("localhost") => Ipv4Addr::LOCALHOST.into(),
            Some(bind) => {
                let bracketed = bind.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                // Without its brackets an IPv6 address would make the port ambiguous.
                let address = if bind.contains(':') { bracketed.ok_or_else(form)? } else { bind };
                address.parse().map_err(|_| "BIND must be an address or localhost".to_owned())?
            }
        };
        if !bind.is_loopback() {
            return Err("BIND must be a loopback address: whoever can reach it would act in your name".to_owned());
        }
        Ok(Self(SocketAddr::new(bind, port)))
    }
}

/// What `-L` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listen {
    pub(super) bind: Bind,
    pub(super) target: Target,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || "expected [BIND:]PORT:HOST:HOSTPORT, with IPv6 addresses in brackets".to_owned();
        // Where the port is that we listen on: after a bracketed address, or the first or second part.
        let begun = match text.strip_prefix('[') {
            Some(rest) => rest.find("]:").ok_or_else(form)? + 3,
            None => {
                let (first, _) = text.split_once(':').ok_or_else(form)?;
                if first.parse::<u16>().is_ok() { 0 } else { first.len() + 1 }
            }
        };
        let length = text[begun..].find(':').ok_or_else(form)?;
        let bind = text[..begun + length].parse()?;
        let target = text[begun + length + 1..].parse().map_err(|error| format!("{error}"))?;
        Ok(Self { bind, target })
    }
}

/// Reads a file of forwards: one `[BIND:]PORT:HOST:HOSTPORT` in each line, empty lines, and comments after `#`.
///
/// # Errors
/// If it cannot be read, with all its faults if it has some.
pub(super) fn read(path: &Path) -> anyhow::Result<Vec<Listen>> {
    let reading = || format!("could not read the file of forwards {}", path.display());
    let mut text = String::new();
    let file = File::open(path).with_context(reading)?;
    file.take(limits::FORWARDS_FILE_MAX + 1).read_to_string(&mut text).with_context(reading)?;
    if text.len() as u64 > limits::FORWARDS_FILE_MAX {
        bail!("the file of forwards {} is longer than {} bytes", path.display(), limits::FORWARDS_FILE_MAX);
    }
    parse(&text).map_err(|faults| {
        let shown = faults.iter().take(limits::FAULTS_MAX).map(|(line, fault)| format!("\n  line {line}: {fault}"));
        anyhow::anyhow!("the file of forwards {} is not well formed:{}", path.display(), shown.collect::<String>())
    })
}

/// All forwards of a file, or all its faults with their lines.
fn parse(text: &str) -> Result<Vec<Listen>, Vec<(usize, String)>> {
    let (mut listens, mut faults) = (Vec::new(), Vec::new());
    for (at, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or_default().trim();
        if line.is_empty() {
            continue;
        }
        match line.parse() {
            Ok(listen) => listens.push(listen),
            Err(fault) => faults.push((at + 1, fault)),
        }
    }
    if listens.is_empty() && faults.is_empty() {
        faults.push((1, "there is no forward in it".to_owned()));
    }
    if faults.is_empty() { Ok(listens) } else { Err(faults) }
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
            assert_eq!((listen.bind.0.to_string().as_str(), listen.target.to_string().as_str()), (address, target));
        }
        for text in [
            "",
            "5432",
            "5432:db",
            "0.0.0.0:1:db:2",
            "[::]:1:db:2",
            "[::1]:db:2",
            "[::1",
            "x:1:db:2",
            "x:",
            "1:2130706433:2",
            "70000:db:1",
            "1:db:0",
        ] {
            assert!(text.parse::<Listen>().is_err(), "{text}");
        }
        for (text, address) in
            [("1080", "127.0.0.1:1080"), ("localhost:0", "127.0.0.1:0"), ("[::1]:1080", "[::1]:1080")]
        {
            assert_eq!(text.parse::<Bind>().map(|bind| bind.0.to_string()).as_deref(), Ok(address));
        }
        for text in ["", "x", "+1", "0.0.0.0:1080", "10.0.0.1:1", "::1:1080", "[::]:1", ":1080", "127.0.0.1:", "70000"]
        {
            assert!(text.parse::<Bind>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_of_forwards_tells_all_its_faults_by_line() {
        let good =
            parse("# databases\n5432:orders.db.internal:5432  # orders\n\n\t[::1]:0:10.0.0.1:1\r\n").expect("good");
        assert_eq!(good.len(), 2);
        let faults = parse("1:db:2\n0.0.0.0:1:db:2\n# fine\nnonsense\n").expect_err("faults");
        assert_eq!(faults.iter().map(|(line, _)| *line).collect::<Vec<_>>(), [2, 4]);
        assert!(parse("# nothing\n").is_err());
    }
}
