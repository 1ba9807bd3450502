//! Telling the service manager how the program is (sd_notify(3)), where one listens.
//!
//! Promised: nothing here waits or fails. Without `NOTIFY_SOCKET` all of it does nothing. The message is one datagram of
//! `NAME=VALUE` lines; what could not be sent is only logged, since the program goes on all the same.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tracing::{debug, warn};

use crate::limits;
use crate::task::Crew;

/// The service manager, as far as it listens. Clones share the socket.
#[derive(Debug, Clone)]
pub struct Supervisor {
    socket: Option<Arc<(UnixDatagram, SocketAddr)>>,
    watchdog: Option<Duration>,
    crew: Arc<OnceLock<Crew>>,
}

impl Supervisor {
    /// Nobody listens.
    #[must_use]
    pub fn none() -> Self {
        Self { socket: None, watchdog: None, crew: Arc::default() }
    }

    /// Who listens according to the environment: `NOTIFY_SOCKET`, `WATCHDOG_USEC` and `WATCHDOG_PID`.
    #[must_use]
    pub fn from_environment() -> Self {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Self {
        let Some(path) = variable("NOTIFY_SOCKET").filter(|path| !path.is_empty()) else { return Self::none() };
        let socket = match open(&path) {
            Ok(socket) => socket,
            Err(error) => {
                debug!(%error, ?path, "the service manager's socket cannot be used");
                return Self::none();
            }
        };
        let number = |name: &str| variable(name)?.to_str()?.parse::<u64>().ok();
        // The variables may be meant for another process that has started this one.
        let ours = variable("WATCHDOG_PID").is_none()
            || number("WATCHDOG_PID").is_some_and(|pid| pid == u64::from(std::process::id()));
        let watchdog = number("WATCHDOG_USEC").filter(|&within| ours && within > 0).map(Duration::from_micros);
        Self { socket: Some(Arc::new(socket)), watchdog, crew: Arc::default() }
    }

    /// How often [`Supervisor::alive`] is to be called, if at all: twice in the time that the service manager allows.
    #[must_use]
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog.map(|within| within / 2)
    }

    /// The program does its work from now on.
    pub fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={status}"));
    }

    /// A configuration is being read again; [`Supervisor::reloaded`] is to follow.
    pub fn reloading(&self) {
        // Asked for by the kind of service that systemd itself sends the signal to; others pass it over.
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={}", now.tv_sec * 1_000_000 + now.tv_nsec / 1_000));
    }

    /// The configuration that was read again is in force, or was refused.
    pub fn reloaded(&self) {
        self.send("READY=1");
    }

    /// The program ends, which may take as long as `left`: it is not to be killed before.
    pub fn draining(&self, status: &str, left: Duration) {
        let within = left + limits::DRAIN_PROGRESS + limits::STOP_GRACE * 3;
        self.send(&format!("STOPPING=1\nSTATUS={status}\nEXTEND_TIMEOUT_USEC={}", within.as_micros()));
    }

    /// From now on the program lives only while all threads of `crew` do their work.
    pub fn watch(&self, crew: Crew) {
        // There is but one crew in a program.
        drop(self.crew.set(crew));
    }

    /// Says that the program is not stuck, if all its threads answer within `limit`. Returns whether they did.
    pub async fn alive(&self, limit: Duration) -> bool {
        let answers = match self.crew.get() {
            Some(crew) => crew.answers(limit).await,
            None => true,
        };
        if answers {
            self.send("WATCHDOG=1");
        } else {
            warn!("a thread does not get to its work");
        }
        answers
    }

    fn send(&self, message: &str) {
        let Some(socket) = &self.socket else { return };
        if let Err(error) = socket.0.send_to_addr(message.as_bytes(), &socket.1) {
            debug!(%error, "the service manager could not be told");
        }
    }
}

fn open(path: &OsStr) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match path.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        [b'/', ..] => SocketAddr::from_pathname(path)?,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supervisor(variables: &[(&str, &OsStr)]) -> Supervisor {
        Supervisor::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn says_nothing_where_nobody_listens() {
        for path in ["", "relative", "vsock:2:1"] {
            let supervisor = supervisor(&[("NOTIFY_SOCKET", OsStr::new(path)), ("WATCHDOG_USEC", OsStr::new("1000"))]);
            assert!(supervisor.socket.is_none() && supervisor.watchdog().is_none(), "{path}");
        }
        let absent = supervisor(&[("NOTIFY_SOCKET", OsStr::new("/nonexistent/socket"))]);
        absent.ready("nobody hears this");
    }

    #[tokio::test]
    async fn datagrams_are_as_the_service_manager_reads_them() {
        let dir = tempfile::tempdir().expect("a folder");
        let path = dir.path().join("notify");
        let heard = UnixDatagram::bind(&path).expect("a socket");
        heard.set_read_timeout(Some(Duration::from_secs(10))).expect("a timeout");
        let supervisor = supervisor(&[("NOTIFY_SOCKET", path.as_os_str()), ("WATCHDOG_USEC", OsStr::new("30000000"))]);
        assert_eq!(supervisor.watchdog(), Some(Duration::from_secs(15)));
        supervisor.ready("listening");
        supervisor.alive(Duration::from_secs(10)).await;
        let (crew, threads) = Crew::start("test", 2, Duration::from_secs(10)).expect("a crew");
        supervisor.watch(crew.clone());
        let (release, busy) = std::sync::mpsc::sync_channel::<()>(0);
        crew.workers()[1].spawn(&crate::task::Tasks::new(), async move { busy.recv().is_err() });
        supervisor.alive(Duration::from_millis(20)).await;
        drop(release);
        threads.end(Duration::from_secs(10)).await.expect("ended");
        supervisor.reloading();
        supervisor.reloaded();
        supervisor.draining("draining: 1", Duration::from_secs(20));
        let next = || {
            let mut buffer = [0; 256];
            let length = heard.recv(&mut buffer).expect("a datagram");
            String::from_utf8(buffer[..length].to_vec()).expect("text")
        };
        assert_eq!(next(), "READY=1\nSTATUS=listening");
        assert_eq!(next(), "WATCHDOG=1");
        let reloading = next();
        let since = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").expect("when it began");
        assert!(since.parse::<u64>().expect("a number") > 0, "{since}");
        assert_eq!(next(), "READY=1");
        assert_eq!(next(), "STOPPING=1\nSTATUS=draining: 1\nEXTEND_TIMEOUT_USEC=60000000");
    }

    #[test]
    fn a_watchdog_is_kept_only_by_the_process_it_is_meant_for() {
        let watchdog = |pid: &str, within: &str| {
            let variables = [
                ("NOTIFY_SOCKET", OsStr::new("/nonexistent")),
                ("WATCHDOG_PID", OsStr::new(pid)),
                ("WATCHDOG_USEC", OsStr::new(within)),
            ];
            supervisor(&variables).watchdog()
        };
        let own = std::process::id().to_string();
        assert_eq!(watchdog(&own, "2000000"), Some(Duration::from_secs(1)));
        for (pid, within) in [("1", "2000000"), ("x", "2000000"), (&own, "0"), (&own, "soon")] {
            assert_eq!(watchdog(pid, within), None, "{pid} {within}");
        }
    }
}
