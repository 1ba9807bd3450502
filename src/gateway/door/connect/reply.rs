//! What the CONNECT door says: fixed texts, of which two say besides what the clocks do.

use jiff::Timestamp;

/// The tunnel is there. Everything that follows it is the target's.
pub(super) const ESTABLISHED: &[u8] = b"HTTP/1.1 200 Connection established\r\n\r\n";

/// Why there is no tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::gateway::door) enum Reply {
    /// No token was shown.
    Missing,
    /// What was shown does not count: altered, unknown, malformed, of another organisation.
    Refused,
    /// The token is not good yet. Told only if its signature is right.
    NotYet {
        /// When it begins.
        begins: Timestamp,
        /// What the gateway's clock says.
        now: Timestamp,
    },
    /// The token is good no more. Told only if its signature is right.
    Expired {
        /// When it ended.
        expires: Timestamp,
        /// What the gateway's clock says.
        now: Timestamp,
    },
    /// The token was withdrawn. Told only if its signature is right.
    Revoked,
    /// A policy says no, or there is no such agent.
    NotAllowed,
    /// This gateway goes away.
    Draining,
    /// Nobody has answered in time.
    TimedOut,
    /// Anything else.
    NotAvailable,
}

impl Reply {
    /// The status, the word and the sentence.
    fn parts(self) -> (&'static str, &'static str, String) {
        const NEEDED: &str = "407 Proxy Authentication Required";
        let (status, word, sentence) = match self {
            Self::Missing => (
                NEEDED,
                "token_required",
                "show a token (`caponier url` makes one), as the password of the user caponier",
            ),
            Self::Refused => (NEEDED, "token_refused", "what was shown does not count here"),
            Self::Revoked => (NEEDED, "token_revoked", "the token was revoked"),
            Self::NotYet { begins, now } => {
                let sentence = format!("the token is not valid before {begins}; this gateway's clock says {now}");
                return (NEEDED, "token_not_yet_valid", sentence);
            }
            Self::Expired { expires, now } => {
                let sentence = format!("the token expired at {expires}; this gateway's clock says {now}");
                return (NEEDED, "token_expired", sentence);
            }
            Self::NotAllowed => ("403 Forbidden", "not_allowed", "not allowed"),
            Self::NotAvailable => ("502 Bad Gateway", "not_available", "not available"),
            Self::Draining => ("503 Service Unavailable", "draining", "this gateway goes away; try again"),
            Self::TimedOut => ("504 Gateway Timeout", "timed_out", "not available in time"),
        };
        (status, word, sentence.to_owned())
    }

    /// The whole of it.
    pub(in crate::gateway::door) fn text(self) -> String {
        let (status, word, sentence) = self.parts();
        // None of them has a character that JSON would escape.
        let body = format!("{{\"error\":\"{word}\",\"message\":\"{sentence}\"}}\n");
        let challenge = if status.starts_with("407") {
            "Proxy-Authenticate: Basic realm=\"caponier\"\r\nProxy-Authenticate: Bearer realm=\"caponier\"\r\n"
        } else {
            ""
        };
        let length = body.len();
        format!(
            "HTTP/1.1 {status}\r\n{challenge}Content-Type: application/json\r\nContent-Length: {length}\r\nCache-Control: \
             no-store\r\nConnection: close\r\n\r\n{body}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reply_is_whole_and_closes() {
        let (begins, now) = (Timestamp::UNIX_EPOCH, Timestamp::UNIX_EPOCH);
        for (reply, status, word) in [
            (Reply::Missing, 407, "token_required"),
            (Reply::Refused, 407, "token_refused"),
            (Reply::Revoked, 407, "token_revoked"),
            (Reply::NotYet { begins, now }, 407, "token_not_yet_valid"),
            (Reply::Expired { expires: begins, now }, 407, "token_expired"),
            (Reply::NotAllowed, 403, "not_allowed"),
            (Reply::NotAvailable, 502, "not_available"),
            (Reply::Draining, 503, "draining"),
            (Reply::TimedOut, 504, "timed_out"),
        ] {
            let text = reply.text();
            let (head, body) = text.split_once("\r\n\r\n").expect("a head");
            assert!(head.starts_with(&format!("HTTP/1.1 {status} ")), "{text}");
            assert_eq!(head.contains("Proxy-Authenticate: Basic realm="), status == 407, "{text}");
            assert!(head.contains("Connection: close"), "{text}");
            assert!(head.contains(&format!("Content-Length: {}\r\n", body.len())), "{text}");
            let body: serde_json::Value = serde_json::from_str(body).expect("JSON");
            assert_eq!(body["error"], word);
            assert_eq!(body.as_object().map(serde_json::Map::len), Some(2));
        }
    }
}
