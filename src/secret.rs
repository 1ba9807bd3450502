//! Values that must not be shown, and randomness fit for making them.
//!
//! Promised: neither `Debug` nor an error of ours shows a [`Secret`]; its memory is wiped when it is dropped.

use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;

use zeroize::Zeroize;

/// A value that hides itself from `Debug` and wipes itself on drop. It has no `Display` on purpose.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret<T: Zeroize>(T);

impl<T: Zeroize> Secret<T> {
    /// Takes `value` under protection.
    pub const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value itself, for the one call that needs it.
    pub const fn expose(&self) -> &T {
        &self.0
    }

    /// The value itself, to be completed. Whoever lets it grow leaves a copy behind where it was.
    pub const fn expose_mut(&mut self) -> &mut T {
        &mut self.0
    }
}

impl<T: Zeroize> Drop for Secret<T> {
    fn drop(&mut self) {
        self.0.zeroize();
    }
}

impl<T: Zeroize> fmt::Debug for Secret<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[hidden]")
    }
}

/// Whether a file with a secret in it keeps others out: nobody but its owner has access. A file of root's may be readable
/// by its group as well where this process is not root: so do systemd and Kubernetes hand secrets to a service.
#[must_use]
pub fn is_private(metadata: &Metadata) -> bool {
    keeps_others_out(metadata.mode(), metadata.uid(), rustix::process::geteuid().as_raw())
}

fn keeps_others_out(mode: u32, owner: u32, user: u32) -> bool {
    let handed_over = owner == 0 && user != 0;
    mode & if handed_over { 0o037 } else { 0o077 } == 0
}

/// Fills an array from the operating system's generator.
///
/// # Panics
/// If the operating system has no randomness to give; nothing in this program may go on without.
#[must_use]
pub fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(clippy::expect_used, reason = "a machine without randomness cannot run this program")]
    getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
    bytes
}

/// A random number, for jitter.
#[must_use]
pub fn random_u32() -> u32 {
    u32::from_ne_bytes(random())
}

/// `len` characters drawn uniformly from the 64 that need no escaping in a URL (RFC 3986 §2.3: letters, digits, `-`, `_`):
/// six bits of entropy each.
#[must_use]
pub fn random_url_safe(len: usize) -> Secret<String> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::with_capacity(len);
    while text.len() < len {
        let [byte] = random::<1>();
        text.push(char::from(ALPHABET[usize::from(byte & 63)]));
    }
    Secret::new(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn debug_hides_the_value() {
        let secret = Secret::new("hunter2".to_owned());
        assert_eq!(format!("{secret:?} {:?}", Some(&secret)), "[hidden] Some([hidden])");
    }

    #[test]
    fn files_with_secrets_keep_others_out() {
        for (mode, owner, user, private) in [
            (0o600, 1000, 1000, true),
            (0o400, 1000, 1000, true),
            (0o640, 1000, 1000, false),
            (0o604, 0, 1000, false),
            (0o620, 0, 1000, false),
            (0o660, 0, 1000, false),
            (0o440, 0, 0, false),
            (0o440, 0, 1000, true),
            (0o640, 0, 1000, true),
            (0o100_600, 0, 0, true),
        ] {
            assert_eq!(keeps_others_out(mode, owner, user), private, "{mode:o} of {owner} for {user}");
        }
    }

    #[test]
    fn passwords_are_url_safe_and_differ() {
        let one = random_url_safe(32);
        let two = random_url_safe(32);
        assert_eq!(one.expose().len(), 32);
        assert_ne!(one, two);
        assert!(one.expose().bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_'));
    }
}
