//! What is asked of a trail, as arguments.

use anyhow::bail;
use jiff::civil::{Date, DateTime};
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp, ToSpan};

use crate::audit::read::filter::{Filter, What};
use crate::cli::{Exit, ExitWith};

/// Which records are wanted. All demands have to be met.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "Which records")]
pub(super) struct Wanted {
    /// Not before this: `2h` (ago; s, m, h, d or w), `today`, `yesterday`, `2026-11-21`, `2026-11-21T08:30` (these in UTC), or
    /// with an offset, `2026-11-21T08:30:00+01:00`.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    since: Option<Timestamp>,
    /// Before this, in the same forms.
    #[arg(long, value_name = "TIME", value_parser = moment)]
    until: Option<Timestamp>,
    /// On behalf of this principal.
    #[arg(long, value_name = "NAME")]
    principal: Option<String>,
    /// Of this organisation.
    #[arg(long, value_name = "NAME")]
    organisation: Option<String>,
    /// Of this agent: AGENT, or ORGANISATION/AGENT.
    #[arg(long, value_name = "AGENT")]
    agent: Option<String>,
    /// To this target: its host, or HOST:PORT, as it was asked for.
    #[arg(long, value_name = "TARGET")]
    target: Option<String>,
    /// From this address, with or without its port.
    #[arg(long, value_name = "ADDRESS")]
    client: Option<String>,
    /// With this key, by its fingerprint: the one that was shown, that of who asserted the principal, of the CA, or of the TLS
    /// certificate.
    #[arg(long, value_name = "FINGERPRINT")]
    key: Option<String>,
    /// This forward, by either side's id of it.
    #[arg(long, value_name = "ID")]
    forward: Option<String>,
    /// This event, as in `link.*`.
    #[arg(long, value_name = "EVENT")]
    event: Option<String>,
    /// For this reason.
    #[arg(long, value_name = "WORD")]
    reason: Option<String>,
    /// In the trail of this side: gateway, agent or proxy.
    #[arg(long, value_name = "SIDE")]
    side: Option<String>,
}

impl Wanted {
    /// The filter that asks for this.
    ///
    /// # Errors
    /// If nothing can be what is asked for.
    pub(super) fn filter(&self) -> anyhow::Result<Filter> {
        if let (Some(since), Some(until)) = (self.since, self.until)
            && since >= until
        {
            let bail = || -> anyhow::Result<()> { bail!("--since {since} is not before --until {until}") };
            bail().exit_with(Exit::Usage)?;
        }
        let mut filter = Filter::default().between(self.since, self.until);
        for (what, pattern) in [
            (What::Principal, &self.principal),
            (What::Organisation, &self.organisation),
            (What::Agent, &self.agent),
            (What::Target, &self.target),
            (What::Client, &self.client),
            (What::Key, &self.key),
            (What::Forward, &self.forward),
            (What::Event, &self.event),
            (What::Reason, &self.reason),
            (What::Side, &self.side),
        ] {
            if let Some(pattern) = pattern {
                filter = filter.demand(what, pattern);
            }
        }
        Ok(filter)
    }
}

fn moment(text: &str) -> Result<Timestamp, String> {
    moment_at(text, Timestamp::now())
}

/// Reads a time, which may be relative to `now`.
fn moment_at(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    let wrong = || {
        "a time such as 2h (ago), today, yesterday, 2026-11-21, 2026-11-21T08:30 (UTC) or 2026-11-21T08:30:00+01:00 is wanted"
            .to_owned()
    };
    if let Ok(time) = text.parse::<Timestamp>() {
        return Ok(time);
    }
    let utc = |day: DateTime| day.to_zoned(TimeZone::UTC).map(|time| time.timestamp()).map_err(|_| wrong());
    let today = now.to_zoned(TimeZone::UTC).date();
    match text {
        "now" => return Ok(now),
        "today" => return utc(today.at(0, 0, 0, 0)),
        "yesterday" => return utc(today.checked_sub(1.day()).map_err(|_| wrong())?.at(0, 0, 0, 0)),
        _ => {}
    }
    if let Some(unit) = text.chars().last().filter(|last| "smhdw".contains(*last)) {
        if let Ok(number) = text[..text.len() - 1].parse::<u32>() {
            let seconds = match unit {
                's' => 1,
                'm' => 60,
                'h' => 3_600,
                'd' => 86_400,
                _ => 604_800,
            };
            return now.checked_sub(SignedDuration::from_secs(i64::from(number) * seconds)).map_err(|_| wrong());
        }
    }
    if let Ok(day) = text.parse::<Date>()
        && text.len() == 10
    {
        return utc(day.at(0, 0, 0, 0));
    }
    // Anything that goes on after the time would be taken for an offset, and left out.
    let plain = text.bytes().all(|byte| byte.is_ascii_digit() || b"-:.T ".contains(&byte));
    match text.parse::<DateTime>() {
        Ok(time) if plain && text.len() > 10 => utc(time),
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_read_in_many_forms() {
        let now: Timestamp = "2026-11-21T20:05:06.700Z".parse().expect("a time");
        for (text, time) in [
            ("now", "2026-11-21T20:05:06.7Z"),
            ("today", "2026-11-21T00:00:00Z"),
            ("yesterday", "2026-11-20T00:00:00Z"),
            ("30s", "2026-11-21T20:04:36.7Z"),
            ("90m", "2026-11-21T18:35:06.7Z"),
            ("2h", "2026-11-21T18:05:06.7Z"),
            ("1d", "2026-11-20T20:05:06.7Z"),
            ("2w", "2026-11-07T20:05:06.7Z"),
            ("2026-11-01", "2026-11-01T00:00:00Z"),
            ("2026-11-01T08:30", "2026-11-01T08:30:00Z"),
            ("2026-11-01 08:30:15", "2026-11-01T08:30:15Z"),
            ("2026-11-01T08:30:15.250Z", "2026-11-01T08:30:15.25Z"),
            ("2026-11-01T08:30:15+01:00", "2026-11-01T07:30:15Z"),
        ] {
            assert_eq!(moment_at(text, now).map(|time| time.to_string()), Ok(time.to_owned()), "{text}");
        }
        for text in [
            "",
            "2",
            "h",
            "-2h",
            "2y",
            "2.5h",
            "tomorrow",
            "2026-13-01",
            "2026-11-01T25:00",
            "99999999999999999999d",
            "ä",
        ] {
            assert!(moment_at(text, now).is_err(), "{text}");
        }
    }
}
