//! caponier: a bastion-style SSH tunnel service.
//!
//! An **agent** inside a private network dials out to a **gateway**; people and jobs outside reach the few **targets**
//! that the network's owner allows, as **forwards** over that **link**. The agent makes the TCP connection and is the
//! SSH server on it; the gateway is the SSH client, and logs in. Both sides decide about every forward, and both
//! record it. README.md says how to use it, SECURITY.md what is promised to whom.
//!
//! # The way of a forward
//!
//! ```text
//! principal          gateway                                          agent                         target
//!    │  SSH door,      │  broker: decide → record → (pick a link → ask) │                               │
//!    │  loopback door  │ ───────────── direct-tcpip on the link ──────► │  serve: who asks → could any  │
//!    │ ──────────────► │                                                │  rule allow it → resolve →    │
//!    │                 │                                                │  decide → record → dial ────► │
//!    │ ◄═══ splice ═══►│ ◄════════════════ credit ═════════════════════►│ ◄═════════ splice ═══════════►│
//!    │                 │  record the end                                │  record the end               │
//! ```
//!
//! `gateway::broker` is the only way at the gateway, whatever the door; `agent::forward` the only one at the agent. Each
//! reads from top to bottom like the line above. `client` is the principal's end of the same: `caponier forward` and
//! `caponier provision` are clients of the SSH door, of an agent that listens, or of any SSH server that forwards. Who
//! comes to an agent that listens has no gateway before it: `agent::serve` is then all of the way.
//!
//! What comes before is the same at the SSH door and at an agent's listener: `tunnel::admit` gives a stranger a seat
//! and a turn and remembers what its address did wrong, `tunnel::proxied` believes balancers, `registry` or
//! `agent::live` says who a key or a certificate is. `reload` brings the configurations, `registry::file` the registry,
//! and each change has all that runs decided again.
//!
//! # The map
//!
//! A module imports only from rows below its own, or from its own subtree. `tests/layering.rs` reads `src/` and holds
//! it to that, and to the fences: which crate may be named where.
//!
//! | Row | Modules | What is there |
//! |---|---|---|
//! | 6 | [`cli`] | one file per command; exit codes; the only place for `anyhow` and `clap` |
//! | 5 | [`config`], [`telemetry`] | configuration files into the `Config`s of the parts; logs and the export of traces, set up once |
//! | 4 | [`agent`], [`gateway`], [`client`], [`proxy`] | the four programs; none imports another |
//! | 3 | [`service`], above [`tunnel`] | what the programs that run for long have in common: beginning, reloading, ending |
//! | 3 | [`tunnel`] | TCP, CONNECT and the PROXY protocol, first bytes and heads of HTTP, admission, SSH in both roles, the wire, the splice, heads of trails that go over a link |
//! | 2 | [`audit`], [`registry`], [`provision`] | the trail, its collectors, and reading and verifying it; who exists, who certifies, what expires, how keys come and go; databases and roles |
//! | 2 | [`health`] | whether a program lives and is ready, its metrics, over HTTP and in a file |
//! | 1 | [`policy`], [`resolve`], [`tls`], [`postgres`] | decisions; names to addresses; TLS at both ends; safe SQL |
//! | 1 | [`reload`], [`token`] | configurations that are read again when their files change; signed tokens |
//! | 0 | [`document`], above [`identity`] | reading TOML with all its faults; ids, keys and OpenSSH certificates |
//! | 0 | [`drain`], beside [`document`]; [`systemd`], beside [`identity`] | the stages of a stop; telling the service manager |
//! | 0 | [`target`], [`network`], [`secret`], [`limits`], [`backoff`], [`rate`] | the rest of the vocabulary |
//! | 0 | `delegate` | streams that are another stream and a little more |
//! | 0 | [`diagnosis`] | what an examination has found, for people and for programs |
//! | 0 | [`chain`], [`task`], [`metrics`], [`trace`] | printing causes; owning tasks; what the process counts about itself, and traces on their way out |
//!
//! Strings from outside end in `config`, `document`, `registry::file`, `tunnel::wire` and the doors: below them there
//! are only values that have been checked (`Target`, `AgentName`, `Fingerprint`).
//!
//! # Invariants
//!
//! What holds everywhere, and what a change must keep:
//!
//! * **No stream without a permit.** A decision yields a permit (`policy::rule::Permit` at the agent,
//!   `policy::grant::Pass` at the gateway) with private fields that cannot be copied, and opening consumes it. The
//!   address that was checked is the one that is dialled.
//! * **No stream without an audit entry, and an entry always ends.** `audit::Trail::open` returns after the write of
//!   the record has returned. The place of the ending is reserved then; dropping an `audit::Entry` records it as
//!   abandoned; what a crash left open is closed by the next start.
//! * **`policy`, `backoff`, `rate`, `provision::plan` and `tunnel::wire` do no I/O and never `await`.** They can be tested as
//!   tables and properties, and are. The table of `gateway::roster` is asked and changed without waiting, too; only
//!   the links that it hands out wait.
//! * **Every queue, map, wait and retry has a bound from [`limits`]**, with its reason. A full queue is an outcome
//!   with a name. What an operator may set stands in `gateway::Limits` and `agent::Limits`, asked for at the moment of
//!   use, and in a refusal under its key's name.
//! * **Every task is owned by a [`task::Tasks`] and awaited in the drain.** `tokio::spawn` and unbounded channels are
//!   lint errors.
//! * **What leaves a door is one of a fixed set of texts**: "not allowed" or "not available". The true reason goes
//!   into the trail.
//! * **Secrets do not print.** They are `secret::Secret`s, whose `Debug` hides them; errors say what was tried, what
//!   failed and what to do.
//!
//! Absent on purpose: shells, commands, file transfer, remote forwarding, and any way to change an agent's rules or
//! keys over a link. There is no `unsafe`.
//!
//! # Tasks, and what each waits on
//!
//! An SSH session of the library and the tasks that use its channels must share a thread; `tunnel::ssh` says why. So
//! there are several threads with a runtime each ([`task::Crew`]), and a task stays on the thread of whoever spawned
//! it. The first is the main thread: it accepts, and has all that belongs to no session. A gateway hands each
//! connection, still raw, to the thread that carries the fewest forwards, where it lives for good with its tasks; an
//! agent has a thread per link as far as there are processors, and does as a gateway where it listens. Where a
//! forward's door session and its link live on different threads, each has half of the forward, and a `tunnel::bridge`
//! lies between. Blocking work has threads of its own: the trail's writer, reading the registry, the system's resolver.
//! After the drain all tasks end when the stop token of their `Tasks` fires, and are awaited for
//! [`limits::STOP_GRACE`]; then the threads are joined, and the trail is closed.
//!
//! **Signals** (`cli::running`): one task waits for SIGTERM and SIGINT. In the two services the first begins the drain
//! ([`drain`]), the second cuts what still runs, a third ends the process; in the other commands the first fires the
//! stop token, and a second ends the process. Where a service manager watches, another task tells it at intervals that
//! all threads get to everything.
//!
//! **The drain** is no task of its own: `gateway::run` and `agent::run` wait, when it has begun, for whoever accepts,
//! then for the last forward, the deadline or the second signal, and then a little for the goodbyes.
//!
//! **The trail's writer** (`audit::writer`), a blocking task: waits for its queue, numbers all that is in it, writes it to the
//! required sinks of this machine and waits for those over a network, then answers everybody who waits. It is the last to
//! end. Each sink that is not required has a thread (`audit::lane`) or task (`audit::sink`), which waits for its own queue and for
//! the sink; a thread that hangs in a write is left behind at the end. A file that is synchronised at intervals has a thread
//! for that while it lasts (`audit::syncer`), so that nobody waits for the disk. Beside the writer one task wakes it every
//! [`limits::TRAIL_RETRY`], has forwards that last say how far they are, and notices a write that hangs; another (`audit::watch_failure`) waits for the sink
//! to have failed for [`limits::TRAIL_FAILURE_GRACE`], and then cuts the forwards that run.
//!
//! **The trail's collectors** (`audit::sink::deliver`), a task for each sink over a network: waits for a batch of records or for
//! the collector to hang up, for a connection, for what was sent to be taken, each under a deadline, and after a failure for a
//! jittered time that grows to [`limits::SINK_RETRY_CAP`]. It ends when the writer gives nothing more and all is sent, or at
//! the stop.
//!
//! **Traces** (`telemetry::otlp`), where a collector is configured: waits for forwards that have ended, and for the collector,
//! under a deadline. Another task beside it (`telemetry::tell`) says at intervals which log lines were left out.
//!
//! **The SSH session**: one task of the library per session. It waits for its socket and its own queue. Our handlers in
//! it wait for nothing; an open is handed over through a bounded queue. It never stops reading because it writes:
//! `tunnel::transport` keeps what the socket does not take, and cuts what keeps it busy without any use. It ends when
//! its stream is cut.
//!
//! **Reloading** (`agent::follow`, `gateway::follow`): waits for SIGHUP, or for the files of the configuration to have
//! changed and come to rest, at which it looks every second ([`reload::sources`]); then for the configuration to be
//! read on a blocking thread; takes it over in one step that does not wait, and waits for the trail to have that on
//! record.
//!
//! **Agent: keeping time** (`agent::keep_time`): waits for the next moment at which a rule or an orchestrator's key
//! begins or ceases to hold, looks at the clock every [`limits::CLOCK_LOOK`] besides, and then has everything that runs
//! judged again.
//!
//! **Agent: keeping linked** (`agent::dial`), one per organisation and gateway: waits for a link to be made, then for
//! it to end, to be worn, to be superseded by another process with its name, to be asked for anew by its gateway (which
//! may be going away), or to be made with a key or name that is no longer the agent's; after a failure for a jittered
//! time that grows to [`limits::RECONNECT_CAP`], or for another configuration. It ends when the agent drains; its link
//! does so with the last forward. A link that was replaced has a task that counts it and waits for its end.
//!
//! **Agent: a link** (`agent::serve`), one per link: waits for opens from the session's queue, for the configuration to
//! drop its gateway or its key, and for the stop. A link that is replaced goes on until the gateway ends it, after its
//! last forward, or until far too many opens have come. Its control channel has a task that waits for messages, and for
//! the drain, of which it tells the gateway.
//!
//! **Agent: a lookup** (`resolve`): of configured servers a task for each question, which waits for their answers until
//! its time is over; whoever asks the same meanwhile waits for the same task. The DNS library has a task for each
//! server and protocol, which waits for questions, and goes with the resolver. The system's resolver has a thread for
//! each name, which nobody can stop.
//!
//! **Agent: the listener** (`agent::listen`), if there is one: waits for connections until the drain or the
//! configuration withdraws it. One task per connection waits for the identification string, a place among the
//! handshakes, its turn and the login under one deadline, then for opens, for the configuration to drop its key or
//! network, for its last forward in a drain, and for the stop.
//!
//! **Agent: an examination** over a link (`agent::doctor`), one at a time, where the owner permits it: waits for its targets one
//! after another, each under a deadline, then for the control channel to take the report. `caponier doctor` itself is no task:
//! it is the command.
//!
//! **Agent: a forward**, one each: waits for the lookup, for the trail, for the connect, then moves bytes until both
//! ends are done, the link is gone, the configuration no longer allows it, the trail has failed too long, or the stop.
//!
//! **Gateway: accepting** (`gateway::intake`), one per listener: waits for connections until the drain, and gives each
//! a seat or turns it away. One task per connection, on a thread of the crew, waits for its first bytes and for what they begin
//! (`gateway::arrive`): a TLS handshake, for which it waits for a place and its turn; the head of a request, which is answered or
//! becomes a tunnel or a WebSocket; the identification string. Then it waits for a place among the handshakes and its turn
//! again, and becomes a link or a door session.
//!
//! **Gateway: a link**, on from there: handshake, login and hello under one deadline; then it waits for the session's
//! end, for the registry to drop its key or the configuration its organisation, for its TLS certificate to be good no more
//! where one is wanted (and tells the agent of a changed login key meanwhile, and why it gets no more forwards), for its last forward once it was retired or one of the two ends
//! drains, for a message that breaks the protocol, or for the stop. Of several links of an agent the least loaded gets
//! a forward; of several processes with one replica name the one that was started last (`gateway::roster`). What befell
//! an agent's links is remembered for the operator (`gateway::lapses`).
//!
//! **Heads of the trail on a link** (`tunnel::anchors`), at both ends, beside whoever reads its control channel: waits for a new
//! head of its own trail and the time at which it may be sent, for a head or an answer of the other end, for the trail to
//! have on record what it heard, and ends with the control channel. Where the link ends in order, the gateway has it wait first
//! for the trail to write a head of what happened last and for the agent's answer to that, two seconds at the most; an agent
//! that goes away, or has been told that the gateway does, waits for a head of its own trail before it answers.
//!
//! **Gateway: a door session** (`gateway::door`): waits for the login under a deadline, then for opens, for the
//! registry to drop the guest or the clock to end its certificate, for the configuration to drop its network, for its
//! last forward in a drain, and for the stop. The loopback door waits for a place, then for a connection, until the
//! drain.
//!
//! **Gateway: a forward** (`gateway::broker`), one each: waits for the trail, for a link where there is none, for an
//! agent's answer, or another's after it, all under one deadline; then moves bytes until both ends are done, or the
//! registry, the configuration, the trail, the session or the stop says otherwise. Where its link lives on another
//! thread, a second task there waits for the answer and moves the bytes of the target's half, and the first one waits
//! for its end.
//!
//! **Gateway: the registry** (`registry::file`): waits for the file system to tell of a change, or for the clock;
//! reads on a blocking thread. Another task waits for what it reports, and records it.
//!
//! **Keys that come to their end** (`agent::expiries`, `gateway::expiries`): one task on each side waits for the next
//! key to come near its end, and for another state; a second one at the gateway for its own certificates, a third for
//! client CAs and their lists (`gateway::mutual`); a link's control channel does the same for its agent's key.
//!
//! **Health and metrics** (`health`), where the configuration opens them: one task per listener waits for connections, and gives each
//! to a task that answers one question under a deadline; one writes the health file.
//!
//! **Gateway: the admin socket** (`gateway::admin`): waits for questions, each answered in a task under a deadline. What it tells of
//! forwards is kept by `gateway::forwards`, and looked at in small pieces.
//!
//! **Network proxy: accepting** (`proxy::intake`), one per listener: waits for connections until the drain, or until the
//! configuration withdraws it, and gives each a place and a seat or turns it away. One task per connection, on a thread of
//! the crew, waits for TLS with the client and the head of its first request under a deadline, then for the trail and the
//! upstream, then moves bytes until both ends are done, the configuration or the end of a certificate says otherwise, or the
//! stop. In the mode `reverse` the connection to the upstream has a task of its own, which ends with it.
//!
//! **Client** (`client`): one task per local listener waits for connections; one per connection waits under a deadline
//! for what it asks for, where the listener leaves that to it (`client::front`), then for the session, made anew if it
//! was lost or its gateway goes away, and moves bytes. A single connection over standard input and output is no task, nor
//! is a provisioning run: both are the command itself. A command that runs inside is waited for beside the signals, which
//! it gets (`cli::forward`).

pub mod agent;
pub mod audit;
pub mod backoff;
pub mod chain;
pub mod cli;
pub mod client;
pub mod config;
mod delegate;
pub mod diagnosis;
pub mod document;
pub mod drain;
pub mod gateway;
pub mod health;
pub mod identity;
pub mod limits;
pub mod metrics;
pub mod network;
pub mod policy;
pub mod postgres;
pub mod provision;
pub mod proxy;
pub mod rate;
pub mod registry;
pub mod reload;
pub mod resolve;
pub mod secret;
pub mod service;
pub mod systemd;
pub mod target;
pub mod task;
pub mod telemetry;
pub mod tls;
pub mod token;
pub mod trace;
pub mod tunnel;
