//! Key texts taken apart: OpenSSH's one line, and PEM sections (RFC 7468, with the headers of RFC 1421).
//!
//! Promised: a text yields exactly one line or one section, or a reason why not. Nothing here judges keys.

use std::fmt::Display;

use rustls_pki_types::PrivatePkcs8KeyDer;
use rustls_pki_types::pem::PemObject;
use zeroize::{Zeroize, Zeroizing};

use super::KeyError;
use crate::limits::FILE_MAX;

/// The one thing that a text holds.
pub(super) enum Contents<'a> {
    /// An OpenSSH public key.
    Line(Line<'a>),
    /// A PEM section.
    Block(Block<'a>),
}

/// `KIND BASE64 [COMMENT]`.
pub(super) struct Line<'a> {
    /// The kind of key as the line names it.
    pub(super) kind: &'a str,
    base64: &'a str,
}

/// What stands between a BEGIN and its END.
pub(super) struct Block<'a> {
    /// The words after BEGIN.
    pub(super) label: &'a str,
    headers: Vec<&'a str>,
    body: Vec<&'a str>,
}

/// Takes `text` apart.
pub(super) fn read(text: &str) -> Result<Contents<'_>, KeyError> {
    if text.len() as u64 > FILE_MAX {
        return Err(KeyError::TooLarge);
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.trim().is_empty() {
        return Err(KeyError::Empty);
    }
    if text.trim_start().starts_with("PuTTY-User-Key-File-") {
        return Err(KeyError::Form("it is PuTTY's; export it in OpenSSH's form (`puttygen -O private-openssh`)"));
    }
    let (blocks, outside) = sections(text)?;
    let mut lines = outside.iter().filter(|line| !line.is_empty() && !line.starts_with('#'));
    if blocks.is_empty() {
        let Some(first) = lines.next() else {
            return Err(KeyError::Form("it holds comments only"));
        };
        let found = line(first)?;
        let more = lines.count();
        if more > 0 {
            return Err(KeyError::Several(format!("{} lines", more + 1)));
        }
        return Ok(Contents::Line(found));
    }
    // Prose around PEM is allowed (RFC 7468 §5.2), a second key is not.
    let stray = lines.filter(|text| line(text).is_ok()).count();
    // `openssl ecparam -genkey` writes the curve's name before the key, which repeats it.
    let mut blocks: Vec<_> = blocks.into_iter().filter(|block| block.label != "EC PARAMETERS").collect();
    match (blocks.pop(), blocks.is_empty() && stray == 0) {
        (Some(block), true) => Ok(Contents::Block(block)),
        (Some(block), false) => {
            let mut labels: Vec<_> = blocks.iter().chain([&block]).map(|block| printable(block.label)).collect();
            labels.extend((stray > 0).then(|| "an OpenSSH line".to_owned()));
            labels.truncate(4);
            Err(KeyError::Several(labels.join(", ")))
        }
        (None, _) => Err(KeyError::Form("it holds the parameters of a curve, but no key")),
    }
}

/// What may be shown of a word that came from a file.
pub(super) fn printable(word: &str) -> String {
    word.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).take(64).collect()
}

/// What a library says about contents, up to where it quotes them: in a damaged key anything may stand where a name is
/// expected.
pub(in crate::identity) fn unquoted(error: &impl Display) -> String {
    let said = error.to_string();
    let words = said.split(['\'', '"']).next().unwrap_or_default();
    printable(words.trim_end_matches([' ', ':']))
}

impl Line<'_> {
    /// The key in SSH wire form.
    pub(super) fn blob(&self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        decode("an OpenSSH public key", &[self.base64])
    }
}

impl Block<'_> {
    /// What kind of certificate (or request for one) the label names, if it does.
    pub(super) fn certificate(&self) -> Option<&'static str> {
        match self.label {
            "CERTIFICATE" | "X509 CERTIFICATE" | "TRUSTED CERTIFICATE" => Some("an X.509 certificate"),
            "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST" => Some("a request for an X.509 certificate"),
            _ => None,
        }
    }

    /// Whether the label names a private key of any kind.
    pub(super) fn is_private(&self) -> bool {
        self.label.ends_with("PRIVATE KEY")
    }

    /// Whether label or headers (RFC 1421 §4.6.1.1) say that a passphrase is needed.
    pub(super) fn is_encrypted(&self) -> bool {
        self.label.contains("ENCRYPTED")
            || self.headers.iter().any(|header| header.starts_with("Proc-Type:") && header.contains("ENCRYPTED"))
    }

    /// The bytes of the section.
    pub(super) fn der(&self) -> Result<Zeroizing<Vec<u8>>, KeyError> {
        decode(if self.is_private() { "a private key in PEM" } else { "a public key in PEM" }, &self.body)
    }

    /// The section as PEM text under another label, without headers.
    pub(super) fn relabelled(&self, label: &str) -> Zeroizing<String> {
        pem(label, &self.body)
    }
}

/// The sections of `text`, and the lines outside of them, all without white space around.
fn sections(text: &str) -> Result<(Vec<Block<'_>>, Vec<&str>), KeyError> {
    const WHAT: &str = "a key in PEM";
    let damaged = |detail: &str| KeyError::Damaged { what: WHAT, detail: detail.into() };
    let (mut blocks, mut outside) = (Vec::new(), Vec::new());
    let mut open: Option<Block<'_>> = None;
    for line in text.lines().map(str::trim) {
        if line.starts_with("---- BEGIN SSH2") {
            return Err(KeyError::Form("it is in the form of RFC 4716; convert it with `ssh-keygen -i -f FILE`"));
        }
        if let Some(rest) = line.strip_prefix("-----BEGIN ") {
            if open.is_some() {
                return Err(damaged("a section begins within another"));
            }
            let label = rest.strip_suffix("-----").filter(|label| !label.contains("--"));
            let label = label.ok_or_else(|| damaged("its BEGIN line goes on: the line breaks may have got lost"))?;
            open = Some(Block { label, headers: Vec::new(), body: Vec::new() });
        } else if let Some(rest) = line.strip_prefix("-----END ") {
            let block = open.take().ok_or_else(|| damaged("an END line without its BEGIN"))?;
            if rest.strip_suffix("-----") != Some(block.label) {
                return Err(damaged("its BEGIN and END lines name different things"));
            }
            blocks.push(block);
        } else if let Some(block) = &mut open {
            // Headers come first, and base64 has no colon.
            if block.body.is_empty() && line.contains(':') {
                block.headers.push(line);
            } else if !line.is_empty() {
                block.body.push(line);
            }
        } else {
            outside.push(line);
        }
    }
    if open.is_some() {
        return Err(damaged("its END line is missing"));
    }
    Ok((blocks, outside))
}

fn line(text: &str) -> Result<Line<'_>, KeyError> {
    let mut words = text.split_ascii_whitespace();
    let (first, second) = (words.next().unwrap_or_default(), words.next());
    match (first, second) {
        (kind, Some(base64)) if is_kind(kind) => Ok(Line { kind, base64 }),
        (kind, None) if is_kind(kind) => {
            Err(KeyError::Damaged { what: "an OpenSSH public key", detail: "there is nothing after its kind".into() })
        }
        _ if text.split_ascii_whitespace().any(is_kind) => Err(KeyError::Form(
            "something stands before the kind of key; options (authorized_keys) and host names (known_hosts) do not \
             belong here",
        )),
        _ => Err(KeyError::Form("expected an OpenSSH key or PEM (`-----BEGIN …`)")),
    }
}

fn is_kind(word: &str) -> bool {
    ["ssh-", "ecdsa-sha2-", "sk-ssh-", "sk-ecdsa-", "rsa-sha2-"].iter().any(|prefix| word.starts_with(prefix))
}

fn decode(what: &'static str, body: &[&str]) -> Result<Zeroizing<Vec<u8>>, KeyError> {
    // Read under a label that the decoder takes for secret, and so decodes in constant time; the label says nothing else.
    let pem = pem("PRIVATE KEY", body);
    match PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()) {
        Ok(mut decoded) => {
            let bytes = Zeroizing::new(decoded.secret_pkcs8_der().to_vec());
            decoded.zeroize();
            Ok(bytes)
        }
        // The decoder's own words may quote the line.
        Err(_) => Err(KeyError::Damaged { what, detail: "its base64 does not decode".into() }),
    }
}

fn pem(label: &str, body: &[&str]) -> Zeroizing<String> {
    let len = body.iter().map(|line| line.len() + 1).sum::<usize>() + 2 * label.len() + 40;
    // Sized beforehand: growing would leave copies of the key behind.
    let mut text = Zeroizing::new(String::with_capacity(len));
    text.push_str("-----BEGIN ");
    text.push_str(label);
    text.push_str("-----\n");
    for line in body {
        text.push_str(line);
        text.push('\n');
    }
    text.push_str("-----END ");
    text.push_str(label);
    text.push_str("-----\n");
    text
}
