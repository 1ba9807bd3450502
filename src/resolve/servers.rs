//! DNS servers of the owner's choosing, asked over UDP and, where an answer does not fit there, over TCP.
//!
//! Of the library only its codec and its client are used: what an answer means is read in [`super::answer`], and what is
//! kept of it in [`super::cache`]. Neither the system's configuration nor its hosts file has any part in this.
//!
//! What waits on what: a lookup runs as a task, which waits for a server's answer, asks the next one when there is none for a
//! while or the answer is no use, and ends with its deadline. Whoever asks waits for the task. The library has a task per
//! server and protocol, which waits for requests and ends with the resolver or the stop.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use hickory_resolver::config::{
    ConnectionConfig, NameServerConfig, ProtocolConfig, ResolverOpts, ServerOrderingStrategy,
};
use hickory_resolver::net::runtime::{RuntimeProvider, Spawn, TokioRuntimeProvider};
use hickory_resolver::net::xfer::{DnsHandle, FirstAnswer};
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::op::{DnsRequestOptions, Query, ResponseCode};
use hickory_resolver::proto::rr::Name;
use hickory_resolver::{NameServerPool, PoolContext, TlsConfig};
use tokio::time::timeout;

use super::answer::{self, Answer, AnswerError, Kind, Records};
use super::cache::Cache;
use super::shared::{Owed, Shared, Unanswered};
use crate::limits;
use crate::task::{Tasks, staggered};

/// The servers, and what is known from them. Clones share it.
#[derive(Clone)]
pub(super) struct Servers(Arc<Inner>);

struct Inner {
    pools: Vec<(SocketAddr, NameServerPool<Provider>)>,
    timeout: Duration,
    /// The longest that an answer is kept.
    life: Duration,
    cache: Mutex<Cache<Question, Found>>,
    under_way: Shared<Question, Result<Found, Failure>>,
    tasks: Tasks,
}

type Question = (String, Kind);

/// What the servers know: records, or that there are none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Found {
    Records(Records),
    Nothing { exists: bool },
}

/// Why nothing is known.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// No server gave an answer that could be used; what each did instead.
    Servers(String),
    /// The aliases lead nowhere.
    Aliases,
    Timeout,
    Busy,
    BrokenOff,
}

impl Servers {
    pub(super) fn new(servers: &[SocketAddr], timeout: Duration, life: Duration, tasks: &Tasks) -> Self {
        let mut options = ResolverOpts::default();
        options.timeout = timeout;
        options.max_active_requests = limits::QUERIES_MAX;
        options.server_ordering_strategy = ServerOrderingStrategy::UserProvidedOrder;
        let provider = Provider(tasks.clone());
        let pools = servers.iter().map(|server| {
            let connection = |protocol| {
                let mut connection = ConnectionConfig::new(protocol);
                connection.port = server.port();
                connection
            };
            let connections = vec![connection(ProtocolConfig::Udp), connection(ProtocolConfig::Tcp)];
            let config = NameServerConfig::new(server.ip(), true, connections);
            // Without the library's TLS nothing in it can fail.
            let tls = TlsConfig::new().ok()?;
            let context = Arc::new(PoolContext::new(options.clone(), tls));
            Some((*server, NameServerPool::from_config([config], context, provider.clone())))
        });
        Self(Arc::new(Inner {
            pools: pools.flatten().collect(),
            timeout,
            life,
            cache: Mutex::new(Cache::new(limits::ANSWERS_KEPT)),
            under_way: Shared::new(limits::QUERIES_MAX),
            tasks: tasks.clone(),
        }))
    }

    /// What is known of a name, from the cache or from the servers. The name is in the form of [`answer::spelling`].
    pub(super) async fn find(&self, name: &str, kind: Kind) -> Result<Found, Failure> {
        let question = (name.to_owned(), kind);
        let cached = self.0.cache.lock().unwrap_or_else(PoisonError::into_inner).find(&question, Instant::now());
        if let Some(found) = cached {
            return Ok(found);
        }
        match self.0.under_way.join(&question, |owed| self.begin(owed)).await {
            Ok(found) => found,
            Err(Unanswered::Busy) => Err(Failure::Busy),
            Err(Unanswered::BrokenOff) => Err(Failure::BrokenOff),
        }
    }

    fn begin(&self, owed: Owed<Question, Result<Found, Failure>>) {
        let servers = self.clone();
        let stop = self.0.tasks.stopping().clone();
        self.0.tasks.spawn(async move {
            let (name, kind) = owed.question();
            let work = timeout(servers.0.timeout, servers.follow(name, *kind));
            match stop.run_until_cancelled(work).await {
                Some(Ok(Ok((found, life)))) => {
                    let mut cache = servers.0.cache.lock().unwrap_or_else(PoisonError::into_inner);
                    cache.keep(owed.question().clone(), found.clone(), life, Instant::now());
                    drop(cache);
                    owed.answer(Ok(found));
                }
                Some(Ok(Err(failure))) => owed.answer(Err(failure)),
                Some(Err(_)) => owed.answer(Err(Failure::Timeout)),
                None => {}
            }
        });
    }

    /// Asks, and asks on for what the name stands for, where the server has not done so itself.
    async fn follow(&self, name: &str, kind: Kind) -> Result<(Found, Duration), Failure> {
        let (mut name, mut aliases, mut least) = (name.to_owned(), 0, self.0.life);
        loop {
            let (answer, followed) = self.ask(&name, kind, aliases).await?;
            aliases = followed;
            match answer {
                Answer::Records { records, life } => return Ok((Found::Records(records), least.min(life))),
                Answer::Nothing { exists, life } => {
                    return Ok((Found::Nothing { exists }, least.min(life).min(limits::ABSENCE_KEPT)));
                }
                Answer::Alias { to, life } => {
                    least = least.min(life);
                    name = to;
                }
            }
        }
    }

    /// Asks the servers in their order, the next one when one is silent or of no use.
    async fn ask(&self, name: &str, kind: Kind, aliases: usize) -> Result<(Answer, usize), Failure> {
        let absolute = Name::from_ascii(format!("{name}."))
            .map_err(|_| Failure::Servers(format!("{} is no name that could be asked for", name.escape_debug())))?;
        let attempt = |(server, pool): &(SocketAddr, NameServerPool<Provider>)| {
            let (server, pool) = (*server, pool.clone());
            let query = Query::query(absolute.clone(), kind.record_type());
            async move { ask_one(&pool, query, name, kind, aliases).await.map_err(|error| (server, error)) }
        };
        let attempts: Vec<_> = self.0.pools.iter().map(attempt).collect();
        let asked = staggered(limits::SERVER_PATIENCE, self.0.pools.len(), attempts).await;
        asked.map_err(|failures| {
            if failures.iter().any(|(_, failure)| *failure == Unusable::Answer(AnswerError::Aliases)) {
                return Failure::Aliases;
            }
            let told: Vec<_> = failures.iter().map(|(server, failure)| format!("{server}: {failure}")).collect();
            Failure::Servers(told.join("; "))
        })
    }
}

/// Why a server was of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
enum Unusable {
    #[error("{0}")]
    Answer(AnswerError),
    #[error("it answered {0}")]
    Code(ResponseCode),
    #[error("no answer")]
    Silent,
    #[error("{0}")]
    Other(String),
}

async fn ask_one(
    pool: &NameServerPool<Provider>,
    query: Query,
    name: &str,
    kind: Kind,
    mut aliases: usize,
) -> Result<(Answer, usize), Unusable> {
    let mut options = DnsRequestOptions::default();
    options.use_edns = true;
    match pool.lookup(query, options).first_answer().await {
        Ok(response) => {
            if !matches!(response.response_code, ResponseCode::NoError | ResponseCode::NXDomain) {
                return Err(Unusable::Code(response.response_code));
            }
            let answer = answer::read(&response, name, kind, &mut aliases).map_err(Unusable::Answer)?;
            Ok((answer, aliases))
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => {
            if !answer::is_asked(&[*none.query], name, kind) {
                return Err(Unusable::Answer(AnswerError::Question));
            }
            let life = Duration::from_secs(none.negative_ttl.unwrap_or_default().into());
            Ok((Answer::Nothing { exists: none.response_code != ResponseCode::NXDomain, life }, aliases))
        }
        Err(NetError::Dns(DnsError::ResponseCode(code))) => Err(Unusable::Code(code)),
        Err(NetError::Timeout) => Err(Unusable::Silent),
        Err(NetError::Io(error)) => Err(Unusable::Other(error.to_string())),
        Err(error) => Err(Unusable::Other(error.to_string())),
    }
}

/// Sockets as the library makes them, and its tasks among ours.
#[derive(Clone)]
struct Provider(Tasks);

#[derive(Clone)]
struct Spawner(Tasks);

impl Spawn for Spawner {
    fn spawn_bg(&mut self, future: impl Future<Output = ()> + Send + 'static) {
        let stop = self.0.stopping().clone();
        self.0.spawn(async move { stop.run_until_cancelled(future).await });
    }
}

type Sockets = TokioRuntimeProvider;

impl RuntimeProvider for Provider {
    type Handle = Spawner;
    type Timer = <Sockets as RuntimeProvider>::Timer;
    type Udp = <Sockets as RuntimeProvider>::Udp;
    type Tcp = <Sockets as RuntimeProvider>::Tcp;

    fn create_handle(&self) -> Spawner {
        Spawner(self.0.clone())
    }

    fn connect_tcp(
        &self,
        server: SocketAddr,
        bind: Option<SocketAddr>,
        timeout: Option<Duration>,
    ) -> Pin<Box<dyn Future<Output = io::Result<Self::Tcp>> + Send>> {
        Sockets::default().connect_tcp(server, bind, timeout)
    }

    fn bind_udp(
        &self,
        local: SocketAddr,
        server: SocketAddr,
    ) -> Pin<Box<dyn Future<Output = io::Result<Self::Udp>> + Send>> {
        Sockets::default().bind_udp(local, server)
    }
}
