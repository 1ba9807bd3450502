//! A command that runs inside a tunnel: it starts when the tunnel is ready, and its end is the tunnel's.
//!
//! Promised: it gets the signals that we get, once each; its exit code is ours.

use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use rustix::process::{Pid, Signal, getpgrp, kill_process};
use rustix::termios::tcgetpgrp;
use tokio::process::{Child, Command};
use tokio::signal::unix::{self, SignalKind, signal};
use tracing::{debug, warn};

use crate::client::Front;

/// The signals that end programs.
pub(super) struct Signals {
    terminate: unix::Signal,
    interrupt: unix::Signal,
    hang_up: unix::Signal,
    quit: unix::Signal,
}

impl Signals {
    /// From now on they come here.
    ///
    /// # Errors
    /// If they cannot be had.
    pub(super) fn take() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
            quit: signal(SignalKind::quit())?,
        })
    }

    /// The next one.
    pub(super) async fn next(&mut self) -> Signal {
        tokio::select! {
            _ = self.terminate.recv() => Signal::TERM,
            _ = self.interrupt.recv() => Signal::INT,
            _ = self.hang_up.recv() => Signal::HUP,
            _ = self.quit.recv() => Signal::QUIT,
        }
    }
}

/// Starts the command, with where we listen in its environment.
///
/// # Errors
/// If it cannot be started.
pub(super) fn start(command: &[OsString], fronts: &[(SocketAddr, Front)]) -> io::Result<Child> {
    let (program, arguments) = command.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    let mut child = Command::new(program);
    child.args(arguments);
    for name in displaced(fronts) {
        child.env_remove(name);
    }
    child.envs(environment(fronts));
    child.spawn()
}

/// What a command must not inherit, where it is to go through our proxies: programs would go by it before they go by those, as it
/// says how this host reaches what is outside.
fn displaced(fronts: &[(SocketAddr, Front)]) -> impl Iterator<Item = &'static str> {
    let has = |wanted: Front| fronts.iter().any(|(_, front)| *front == wanted);
    let (http, socks) = (has(Front::Http), has(Front::Socks));
    let lists = (http || socks).then_some(["NO_PROXY", "no_proxy"]);
    // These are for one scheme each, and so count before ALL_PROXY.
    let clear = socks.then_some(["HTTP_PROXY", "http_proxy"]);
    let secure = socks.then_some(["HTTPS_PROXY", "https_proxy"]);
    [lists, clear, secure].into_iter().flatten().flatten()
}

/// What tells a command where we listen.
fn environment(fronts: &[(SocketAddr, Front)]) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    let mut fixed = 0;
    for (address, front) in fronts {
        match front {
            Front::Fixed(_) => {
                fixed += 1;
                variables.push((format!("CAPONIER_LISTEN_{fixed}"), address.to_string()));
            }
            // Programs differ in which of the two they read.
            Front::Http => variables
                .extend(["HTTPS_PROXY", "https_proxy"].map(|name| (name.to_owned(), format!("http://{address}")))),
            Front::Socks => variables
                .extend(["ALL_PROXY", "all_proxy"].map(|name| (name.to_owned(), format!("socks5h://{address}")))),
        }
    }
    variables
}

/// Waits for the command's end, and passes signals on to it meanwhile.
///
/// # Errors
/// If its end cannot be learned.
pub(super) async fn ended(child: &mut Child, signals: &mut Signals) -> io::Result<ExitStatus> {
    loop {
        tokio::select! {
            biased;
            status = child.wait() => return status,
            signal = signals.next() => pass_on(child, signal),
        }
    }
}

fn pass_on(child: &Child, signal: Signal) {
    let typed = matches!(signal, Signal::INT | Signal::QUIT);
    // What is typed at a terminal goes to the command as well as to us, and twice would be once too often.
    if typed && in_foreground() {
        debug!(?signal, "the terminal has told the command as well");
        return;
    }
    let Some(pid) = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())) else { return };
    if let Err(error) = kill_process(pid, signal) {
        warn!(%error, ?signal, "could not pass a signal on to the command");
    }
}

/// Whether what is typed at our terminal goes to us.
fn in_foreground() -> bool {
    File::open("/dev/tty").is_ok_and(|terminal| tcgetpgrp(&terminal).is_ok_and(|group| group == getpgrp()))
}

/// The exit code that tells of a command's end, as shells say it.
pub(super) fn code(status: ExitStatus) -> u8 {
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    u8::try_from(code).unwrap_or(1)
}

/// The exit code of a command that a signal has kept from starting.
pub(super) fn stopped(signal: Signal) -> u8 {
    u8::try_from(128 + signal.as_raw()).unwrap_or(1)
}

/// The exit code of a command that cannot be started, as shells, env(1) and timeout(1) have it.
pub(super) fn not_started(error: &io::Error) -> u8 {
    if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_learns_where_to_connect() {
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let target = Front::Fixed("db.internal:5432".parse().expect("a target"));
        let fronts = [(at(1), target.clone()), (at(2), Front::Socks), (at(3), target), (at(4), Front::Http)];
        let told: Vec<_> = environment(&fronts).into_iter().map(|(name, value)| format!("{name}={value}")).collect();
        assert_eq!(
            told,
            [
                "CAPONIER_LISTEN_1=127.0.0.1:1",
                "ALL_PROXY=socks5h://127.0.0.1:2",
                "all_proxy=socks5h://127.0.0.1:2",
                "CAPONIER_LISTEN_2=127.0.0.1:3",
                "HTTPS_PROXY=http://127.0.0.1:4",
                "https_proxy=http://127.0.0.1:4",
            ]
        );
    }

    #[test]
    fn nothing_inherited_leads_a_command_past_our_proxies() {
        let at = SocketAddr::from(([127, 0, 0, 1], 1));
        let target = Front::Fixed("db.internal:5432".parse().expect("a target"));
        let all = ["NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"];
        for (fronts, gone) in [
            (vec![target.clone()], &all[..0]),
            (vec![target, Front::Http], &all[..2]),
            (vec![Front::Socks], &all[..]),
            (vec![Front::Socks, Front::Http], &all[..]),
        ] {
            let fronts: Vec<_> = fronts.into_iter().map(|front| (at, front)).collect();
            assert_eq!(displaced(&fronts).collect::<Vec<_>>(), gone, "{fronts:?}");
        }
    }

    #[test]
    fn ends_are_told_as_shells_do() {
        assert_eq!([0, 3 << 8, 15, 9].map(|raw| code(ExitStatus::from_raw(raw))), [0, 3, 143, 137]);
    }
}
