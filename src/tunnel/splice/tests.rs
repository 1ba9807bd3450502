//! Tests of the module above.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

use super::*;
use crate::identity::{Algorithm, PrivateKey, PublicKey};
use crate::task::{Crew, Tasks, Threads, Worker};
use crate::tunnel::ssh::{self, Client, ClientOptions, Flow, Login, Opening, Running, ServerOptions};
use crate::tunnel::transport::Control;
use crate::tunnel::wire;

const DEADLINE: Duration = Duration::from_secs(180);

struct Everybody;

impl Login for Everybody {
    fn offered(&mut self, _user: &str, _key: &PublicKey) -> bool {
        true
    }
    fn verified(&mut self, _user: &str, _key: &PublicKey) -> bool {
        true
    }
    fn unfit(&mut self, _user: &str, _why: &'static str) {}
}

/// A session between two of our ends, over a stream.
struct Session {
    client: Client,
    opens: mpsc::Receiver<Opening>,
    far_control: Control,
    _running: Running,
    tasks: Tasks,
    flow: Flow,
}

impl Session {
    async fn over<S>(near: S, far: S, flow: Flow) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let tasks = Tasks::new();
        let key = PrivateKey::generate(Algorithm::Ed25519);
        let server = ServerOptions {
            line: "SSH-2.0-caponier_1".to_owned(),
            said: false,
            head: Bytes::new(),
            key: key.clone(),
            certificate: None,
            control_channel: false,
            keepalive: limits::LINK_KEEPALIVE,
            keepalive_max: 1,
            flow,
            channels: limits::CHANNELS_PER_LINK,
            opens: limits::PENDING_OPENS_PER_LINK,
        };
        let client = ClientOptions {
            line: "SSH-2.0-caponier_1 client",
            said: false,
            head: Bytes::new(),
            host_key: Box::new(|_| true),
            host_certificate: None,
            keepalive: limits::LINK_KEEPALIVE,
            flow,
            report: Arc::new(|violation| panic!("{violation:?}")),
        };
        let (server, stranger) = tokio::join!(ssh::serve(far, server, Everybody, &tasks), ssh::connect(near, client));
        let server = server.expect("served");
        let far_control = server.control.clone();
        let (opens, _, running) = server.split();
        let client = stranger.expect("connected").login("acme", &key, &tasks, 64).await.expect("logged in");
        Self { client, opens, far_control, _running: running, tasks, flow }
    }

    async fn new(flow: Flow) -> Self {
        let (near, far) = tokio::io::duplex(64 * 1024);
        Self::over(near, far, flow).await
    }

    /// A forward through the session: what the principal holds, what the target holds, and how it ends on either side.
    async fn forward(&mut self) -> Forward {
        self.forward_from(None).await
    }

    /// A forward whose principal's side lives on `thread`, where that is given, and not on the session's.
    async fn forward_from(&mut self, thread: Option<&Worker>) -> Forward {
        self.forward_within(Bounds::default(), thread).await
    }

    async fn forward_within(&mut self, bounds: Bounds, thread: Option<&Worker>) -> Forward {
        let target = "db:1".parse().expect("a target");
        let opened = self.client.open(&target, "127.0.0.1", None);
        let accepted = async { self.opens.recv().await.expect("an open").accept(self.flow).await };
        let (near_channel, far_channel) = tokio::join!(opened, accepted);
        let (principal, near) = sockets().await;
        let (target, far) = sockets().await;
        let (near_stop, far_stop) = (CancellationToken::new(), CancellationToken::new());
        let run = |near: Side, far: Side, stop: CancellationToken| {
            self.tasks.spawn(async move {
                let (end, remains) = splice(near, far, &Counters::default(), Bounds::default(), &stop).await;
                remains.leave().await;
                end
            })
        };
        let near_channel = Side::Channel(near_channel.expect("opened"));
        let counters = Arc::new(Counters::default());
        let mut other_half = None;
        let near_end = match thread {
            None => {
                let (stop, counters) = (near_stop.clone(), counters.clone());
                self.tasks.spawn(async move {
                    let (end, remains) = splice(Side::Tcp(near), near_channel, &counters, bounds, &stop).await;
                    remains.leave().await;
                    end
                })
            }
            Some(thread) => {
                let (side, across) = across(counters.clone());
                other_half = Some(self.tasks.spawn(across.run(near_channel)));
                let near = near.into_std().expect("raw");
                let (stop, counters) = (near_stop.clone(), counters.clone());
                thread.spawn(&self.tasks, async move {
                    let near = Side::Tcp(TcpStream::from_std(near).expect("registered"));
                    let (end, remains) = splice(near, side, &counters, bounds, &stop).await;
                    remains.leave().await;
                    end
                })
            }
        };
        let far_end = run(Side::Channel(far_channel.expect("accepted")), Side::Tcp(far), far_stop.clone());
        Forward { principal, target, near_end, other_half, far_end, near_stop, counters }
    }
}

/// Another thread than the test's.
fn thread() -> (Worker, Threads) {
    let (crew, threads) = Crew::start("test", 2, DEADLINE).expect("a crew");
    (crew.workers()[1].clone(), threads)
}

struct Forward {
    principal: TcpStream,
    target: TcpStream,
    near_end: tokio::task::JoinHandle<End>,
    /// The target's half, where that is another.
    other_half: Option<tokio::task::JoinHandle<()>>,
    far_end: tokio::task::JoinHandle<End>,
    near_stop: CancellationToken,
    counters: Arc<Counters>,
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.expect("connected"), other.expect("accepted").0)
}

async fn within<F: Future>(what: &str, future: F) -> F::Output {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("{what}: nothing within {DEADLINE:?}"))
}

fn bytes(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8).collect()
}

#[tokio::test]
async fn each_half_ends_by_itself() {
    let (thread, _threads) = thread();
    for (flow, thread) in both_flows_and_threads(&thread) {
        let mut session = Session::new(flow).await;
        let mut forward = session.forward_from(thread).await;
        forward.principal.write_all(b"question").await.expect("written");
        forward.principal.shutdown().await.expect("half closed");
        let mut heard = Vec::new();
        within("the question", forward.target.read_to_end(&mut heard)).await.expect("read");
        assert_eq!(heard, b"question");
        forward.target.write_all(b"answer after EOF").await.expect("written");
        forward.target.shutdown().await.expect("closed");
        let mut heard = Vec::new();
        within("the answer", forward.principal.read_to_end(&mut heard)).await.expect("read");
        assert_eq!(heard, b"answer after EOF");
        assert_eq!(within("the near end", forward.near_end).await.expect("ran"), End::Clean);
        assert_eq!(within("the far end", forward.far_end).await.expect("ran"), End::Clean);
        assert_eq!((forward.counters.to_target(), forward.counters.from_target()), (8, 16));
    }
}

fn both_flows_and_threads(thread: &Worker) -> [(Flow, Option<&Worker>); 4] {
    [(Flow::Credit, None), (Flow::Stock, None), (Flow::Credit, Some(thread)), (Flow::Stock, Some(thread))]
}

#[tokio::test]
async fn what_breaks_on_one_side_is_reset_on_the_other() {
    let (thread, _threads) = thread();
    for (flow, thread) in both_flows_and_threads(&thread) {
        let mut session = Session::new(flow).await;
        let mut forward = session.forward_from(thread).await;
        forward.target.set_zero_linger().expect("set");
        drop(forward.target);
        let mut buf = [0; 1];
        let error = within("the reset", forward.principal.read(&mut buf)).await.expect_err("no orderly end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(matches!(within("the far end", forward.far_end).await.expect("ran"), End::FarBroke(_)));
        assert!(matches!(within("the near end", forward.near_end).await.expect("ran"), End::FarBroke(_)));
        // And the other way round, with last words that still arrive.
        let mut forward = session.forward_from(thread).await;
        let sent = bytes(300_000, 4);
        forward.principal.write_all(&sent).await.expect("written");
        let mut heard = vec![0; sent.len()];
        within("the last words", forward.target.read_exact(&mut heard)).await.expect("read");
        forward.principal.set_zero_linger().expect("set");
        drop(forward.principal);
        let error = within("the reset", forward.target.read(&mut buf)).await.expect_err("no orderly end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(matches!(within("the far end", forward.far_end).await.expect("ran"), End::NearBroke(_)));
        assert!(matches!(within("the near end", forward.near_end).await.expect("ran"), End::NearBroke(_)));
        assert_eq!((forward.counters.to_target(), forward.counters.from_target()), (300_000, 0));
    }
}

#[tokio::test]
async fn a_lost_session_breaks_the_far_side_on_either_thread() {
    let (thread, _threads) = thread();
    for (flow, thread) in both_flows_and_threads(&thread) {
        let mut session = Session::new(flow).await;
        let mut forward = session.forward_from(thread).await;
        session.client.control().cut();
        let mut buf = [0; 1];
        let error = within("the reset", forward.principal.read(&mut buf)).await.expect_err("no orderly end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert!(matches!(within("the near end", forward.near_end).await.expect("ran"), End::FarBroke(_)));
        assert!(session.client.control().gone().is_cancelled(), "whoever learns the end can tell why");
    }
}

#[tokio::test]
async fn what_is_on_the_bridge_is_not_given_back_as_taken() {
    let (thread, _threads) = thread();
    let mut session = Session::new(Flow::Credit).await;
    let target = "db:1".parse().expect("a target");
    let opened = session.client.open(&target, "127.0.0.1", None);
    let accepted = async { session.opens.recv().await.expect("an open").accept(Flow::Credit).await };
    let (channel, far_channel) = tokio::join!(opened, accepted);
    let mut far_channel = far_channel.expect("accepted");
    let (deaf, near) = tokio::io::duplex(1);
    let counters = Arc::new(Counters::default());
    let (side, across) = across(counters.clone());
    session.tasks.spawn(across.run(Side::Channel(channel.expect("opened"))));
    let stop = CancellationToken::new();
    let near_end = thread.spawn(&session.tasks, {
        let stop = stop.clone();
        async move {
            let (end, remains) = splice(Side::Stream(near.into()), side, &counters, Bounds::default(), &stop).await;
            remains.leave().await;
            end
        }
    });
    let mut sent = 0;
    let sending = async {
        while far_channel.writer.send(Bytes::from_static(&[7; 1000])).await.is_ok() {
            sent += 1000;
        }
    };
    // Credit comes with what is read.
    let reading = async { while far_channel.reader.next().await != Event::Closed {} };
    let both = async { tokio::join!(sending, reading) };
    assert!(tokio::time::timeout(Duration::from_secs(1), both).await.is_err(), "nobody takes it");
    assert!(
        (10_000..=wire::CREDIT_INITIAL).contains(&sent),
        "{sent} bytes are under way to somebody who takes nothing"
    );
    stop.cancel();
    assert_eq!(within("the near end", near_end).await.expect("ran"), End::Stopped);
    drop(deaf);
}

#[tokio::test]
async fn stopping_one_side_resets_both_sockets() {
    let (thread, _threads) = thread();
    for (flow, thread) in both_flows_and_threads(&thread) {
        let mut session = Session::new(flow).await;
        let mut forward = session.forward_from(thread).await;
        forward.near_stop.cancel();
        let mut buf = [0; 1];
        for socket in [&mut forward.principal, &mut forward.target] {
            let error = within("the reset", socket.read(&mut buf)).await.expect_err("no orderly end");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        }
        assert_eq!(within("the near end", forward.near_end).await.expect("ran"), End::Stopped);
    }
}

#[tokio::test]
async fn regression_a_violation_waited_for_a_deaf_principal_on_another_thread() {
    let (thread, _threads) = thread();
    let mut session = Session::new(Flow::Credit).await;
    let target = "db:1".parse().expect("a target");
    let opened = session.client.open(&target, "127.0.0.1", None);
    // A peer that does not keep to credit: it sends as to a stock one.
    let accepted = async { session.opens.recv().await.expect("an open").accept(Flow::Plain).await };
    let (channel, far_channel) = tokio::join!(opened, accepted);
    let mut far_channel = far_channel.expect("accepted");
    let (deaf, near) = tokio::io::duplex(1);
    let (side, across) = across(Arc::new(Counters::default()));
    session.tasks.spawn(across.run(Side::Channel(channel.expect("opened"))));
    let near_end = thread.spawn(&session.tasks, async move {
        let stop = CancellationToken::new();
        let counters = Counters::default();
        splice(Side::Stream(near.into()), side, &counters, Bounds::default(), &stop).await.0
    });
    let flood = async { while far_channel.writer.send(Bytes::from(vec![0; 32 * 1024])).await.is_ok() {} };
    within("the cut", flood).await;
    assert_eq!(within("the near end", near_end).await.expect("ran"), End::FarBroke(io::ErrorKind::InvalidData));
    drop(deaf);
}

#[tokio::test]
async fn bounds_hold_for_a_forward_on_two_threads() {
    let (thread, _threads) = thread();
    let short = Some(Duration::from_secs(2));
    for (bounds, expected) in
        [(Bounds { idle: short, life: None }, End::Idle), (Bounds { idle: None, life: short }, End::Expired)]
    {
        let mut session = Session::new(Flow::Credit).await;
        let mut forward = session.forward_within(bounds, Some(&thread)).await;
        forward.principal.write_all(b"question").await.expect("written");
        let mut heard = [0; 8];
        within("the question", forward.target.read_exact(&mut heard)).await.expect("read");
        let error = within("the reset", forward.target.read(&mut heard)).await.expect_err("no orderly end");
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(within("the near end", forward.near_end).await.expect("ran"), expected);
        assert_eq!(forward.counters.to_target(), 8);
    }
}

#[tokio::test]
async fn stopping_ends_a_forward_between_threads_that_nobody_takes_anything_of() {
    let (thread, _threads) = thread();
    for flow in [Flow::Credit, Flow::Stock] {
        let mut session = Session::new(flow).await;
        let mut forward = session.forward_from(Some(&thread)).await;
        let chunk = vec![7; 64 * 1024];
        for socket in [&mut forward.principal, &mut forward.target] {
            while tokio::time::timeout(Duration::from_millis(200), socket.write_all(&chunk)).await.is_ok() {}
        }
        forward.near_stop.cancel();
        assert_eq!(within("the near end", forward.near_end).await.expect("ran"), End::Stopped);
        let other_half = forward.other_half.expect("two threads");
        within("the other half", other_half).await.expect("what it held is given up once");
        // Its far end is patient with a target; not with one that has gone.
        drop((forward.principal, forward.target));
        within("the far end", forward.far_end).await.expect("ran");
        // And the session is there for others, with all its room.
        within("room", async {
            while session.client.control().is_shut() {
                tokio::task::yield_now().await;
            }
        })
        .await;
        let mut forward = session.forward_from(Some(&thread)).await;
        forward.principal.write_all(b"question").await.expect("written");
        let mut heard = [0; 8];
        within("a forward after it", forward.target.read_exact(&mut heard)).await.expect("read");
    }
}

#[tokio::test]
async fn regression_russh_window_on_arrival_a_stalled_reader_blocks_nobody() {
    let mut session = Session::new(Flow::Credit).await;
    // A target that never reads, and a principal that never reads.
    let mut deaf_target = session.forward().await;
    let mut deaf_principal = session.forward().await;
    let chunk = vec![7; 64 * 1024];
    for socket in [&mut deaf_target.principal, &mut deaf_principal.target] {
        // Until nothing fits any more: all queues on the way are full.
        while tokio::time::timeout(Duration::from_millis(200), socket.write_all(&chunk)).await.is_ok() {}
    }
    let mut forward = session.forward().await;
    let sent = bytes(8 * 1024 * 1024, 3);
    let mut heard = vec![0; sent.len()];
    within("a forward beside stalled ones", async {
        let (written, read) = tokio::join!(forward.principal.write_all(&sent), forward.target.read_exact(&mut heard));
        written.expect("written");
        read.expect("read");
    })
    .await;
    assert!(heard == sent, "bytes were changed, lost or reordered");
}

#[tokio::test]
async fn regression_russh_mutual_block_an_echo_saturated_both_ways_never_stops() {
    let (thread, _threads) = thread();
    for (flow, thread) in both_flows_and_threads(&thread) {
        // Small buffers below, so that both ends have more to write than fits.
        let (near, far) = tokio::io::duplex(4 * 1024);
        let mut session = Session::over(near, far, flow).await;
        let mut forward = session.forward_from(thread).await;
        let echo = session.tasks.spawn(async move {
            let (mut reader, mut writer) = forward.target.split();
            tokio::io::copy(&mut reader, &mut writer).await.expect("echoed");
            writer.shutdown().await.expect("closed");
        });
        let sent = bytes(16 * 1024 * 1024, 5);
        let mut heard = Vec::with_capacity(sent.len());
        let (mut reader, mut writer) = forward.principal.split();
        within("the echo", async {
            tokio::join!(
                async {
                    writer.write_all(&sent).await.expect("written");
                    writer.shutdown().await.expect("closed");
                },
                async { reader.read_to_end(&mut heard).await.expect("read") }
            );
        })
        .await;
        assert!(heard == sent, "bytes were changed, lost or reordered");
        within("the target", echo).await.expect("ran");
    }
}

#[tokio::test]
async fn what_was_sent_before_a_close_is_delivered() {
    let mut session = Session::new(Flow::Stock).await;
    let target = "db:1".parse().expect("a target");
    let opened = session.client.open(&target, "127.0.0.1", None);
    let accepted = async { session.opens.recv().await.expect("an open").accept(Flow::Stock).await };
    let (channel, far_channel) = tokio::join!(opened, accepted);
    let (mut target, far) = sockets().await;
    let far_end = session.tasks.spawn(async move {
        let side = Side::Channel(far_channel.expect("accepted"));
        let (end, remains) =
            splice(side, Side::Tcp(far), &Counters::default(), Bounds::default(), &CancellationToken::new()).await;
        remains.leave().await;
        end
    });
    // As some libraries do: data, EOF and CLOSE in one breath.
    let mut channel = channel.expect("opened");
    let sent = bytes(1024 * 1024, 9);
    channel.writer.send(Bytes::from(sent.clone())).await.expect("sent");
    channel.writer.finish().await.expect("finished");
    channel.writer.close().await;
    let mut heard = vec![0; sent.len()];
    within("the rest", target.read_exact(&mut heard)).await.expect("read");
    assert!(heard == sent, "bytes were changed, lost or reordered");
    drop(target);
    within("the far end", far_end).await.expect("ran");
}

#[tokio::test]
async fn regression_last_words_read_nothing_a_broken_forward_blocks_nobody() {
    let mut session = Session::new(Flow::Credit).await;
    // A target that takes nothing, with more on its way to it than fits anywhere.
    let mut broken = session.forward().await;
    let chunk = vec![7; 64 * 1024];
    while tokio::time::timeout(Duration::from_millis(200), broken.principal.write_all(&chunk)).await.is_ok() {}
    // Its principal goes away, which shows with the first word of the target; the target goes on talking.
    broken.principal.set_zero_linger().expect("set");
    drop(broken.principal);
    broken.target.set_nodelay(true).expect("set");
    for _ in 0..limits::CHANNEL_QUEUE * 4 {
        // Until it is told, at the latest.
        if broken.target.write_all(b"small").await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let mut forward = session.forward().await;
    forward.principal.write_all(b"question").await.expect("written");
    let mut heard = [0; 8];
    within("a forward beside a broken one", forward.target.read_exact(&mut heard)).await.expect("read");
    assert_eq!(&heard, b"question");
}

#[tokio::test]
async fn regression_messages_of_one_byte_cost_a_stock_peer_what_they_cost_us() {
    let mut session = Session::new(Flow::Stock).await;
    let target = "db:1".parse().expect("a target");
    let opened = session.client.open(&target, "127.0.0.1", None);
    let accepted = async { session.opens.recv().await.expect("an open").accept(Flow::Stock).await };
    let (channel, far_channel) = tokio::join!(opened, accepted);
    let (deaf, far) = tokio::io::duplex(1);
    let stop = CancellationToken::new();
    let far_end = session.tasks.spawn({
        let (side, stop) = (Side::Channel(far_channel.expect("accepted")), stop.clone());
        async move {
            let (end, remains) =
                splice(side, Side::Stream(far.into()), &Counters::default(), Bounds::default(), &stop).await;
            remains.leave().await;
            end
        }
    });
    let mut channel = channel.expect("opened");
    let flood = async {
        let mut sent = 0_usize;
        while !session.far_control.is_shut() {
            channel.writer.send(Bytes::from_static(b"x")).await.expect("sent");
            sent += 1;
            assert!(sent < limits::HELD_HIGH / 16, "{sent} messages are held, and it reads on");
        }
    };
    within("the gate", flood).await;
    // What is given up is given back.
    stop.cancel();
    assert_eq!(within("the far end", far_end).await.expect("ran"), End::Stopped);
    within("the gate", async {
        while session.far_control.is_shut() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    drop(deaf);
}

#[tokio::test]
async fn regression_a_thousand_senders_at_once_do_not_cut_their_session() {
    // A network that for a while carries nothing.
    let (near, near_network) = tokio::io::duplex(64 * 1024);
    let (far_network, far) = tokio::io::duplex(64 * 1024);
    let (open, mut opened) = tokio::sync::watch::channel(true);
    let network = Tasks::new();
    let (mut near_reader, mut near_writer) = tokio::io::split(near_network);
    let (mut far_reader, mut far_writer) = tokio::io::split(far_network);
    network.spawn(async move { tokio::io::copy(&mut far_reader, &mut near_writer).await });
    network.spawn(async move {
        let mut bytes = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = near_reader.read(&mut bytes).await {
            drop(opened.wait_for(|open| *open).await);
            far_writer.write_all(&bytes[..read]).await?;
        }
        Ok::<_, io::Error>(())
    });
    let mut session = Session::over(near, far, Flow::Credit).await;
    let mut senders = Vec::new();
    // All that a channel may send at first.
    let sent = wire::CREDIT_INITIAL - wire::message_cost(0);
    for _ in 0..limits::UNSENT_MAX / sent + 200 {
        let target = "db:1".parse().expect("a target");
        let opened = session.client.open(&target, "127.0.0.1", None);
        let accepted = async { session.opens.recv().await.expect("an open").accept(Flow::Credit).await };
        let (channel, far_channel) = tokio::join!(opened, accepted);
        let (channel, mut far_channel) = (channel.expect("opened"), far_channel.expect("accepted"));
        senders.push((
            channel,
            session.tasks.spawn(async move {
                let mut heard = 0;
                while let Event::Data(bytes) = far_channel.reader.next().await {
                    heard += bytes.len();
                }
                drop(far_channel);
                heard
            }),
        ));
    }
    let start = CancellationToken::new();
    let mut all = Vec::new();
    for (mut channel, heard) in senders {
        let start = start.clone();
        let sending = session.tasks.spawn(async move {
            start.cancelled().await;
            channel.writer.send(Bytes::from(vec![7; sent])).await?;
            channel.writer.finish().await?;
            Ok::<_, io::Error>(channel)
        });
        all.push((sending, heard));
    }
    open.send(false).expect("the network is there");
    start.cancel();
    // Until whoever may feed the session has done so.
    tokio::time::sleep(Duration::from_secs(1)).await;
    open.send(true).expect("the network is there");
    for (sending, heard) in all {
        let _channel = within("a sender", sending).await.expect("ran").expect("the session lives");
        assert_eq!(within("a receiver", heard).await.expect("ran"), sent);
    }
}

#[tokio::test]
async fn more_than_the_credit_ends_the_session() {
    let mut session = Session::new(Flow::Credit).await;
    let target = "db:1".parse().expect("a target");
    // A peer that does not keep to credit: it sends as to a stock one.
    session.client.ignore_credit();
    let opened = session.client.open(&target, "127.0.0.1", None);
    let accepted = async { session.opens.recv().await.expect("an open").accept(Flow::Credit).await };
    let (channel, far_channel) = tokio::join!(opened, accepted);
    let (_target, far) = sockets().await;
    let far_end = session.tasks.spawn(async move {
        let side = Side::Channel(far_channel.expect("accepted"));
        splice(side, Side::Tcp(far), &Counters::default(), Bounds::default(), &CancellationToken::new()).await.0
    });
    let mut channel = channel.expect("opened");
    let flood = async { while channel.writer.send(Bytes::from(vec![0; 32 * 1024])).await.is_ok() {} };
    within("the cut", flood).await;
    assert_eq!(within("the far end", far_end).await.expect("ran"), End::NearBroke(io::ErrorKind::InvalidData));
    within("the session's end", session.client.control().gone().cancelled()).await;
}

/// Carries bytes both ways, each of them a few milliseconds late.
fn long_way(network: &Tasks) -> (tokio::io::DuplexStream, tokio::io::DuplexStream) {
    let (near, near_end) = tokio::io::duplex(1024 * 1024);
    let (far_end, far) = tokio::io::duplex(1024 * 1024);
    let (near_reader, near_writer) = tokio::io::split(near_end);
    let (far_reader, far_writer) = tokio::io::split(far_end);
    let carry = async |mut reader: ReadHalf<DuplexStream>, mut writer: WriteHalf<DuplexStream>| {
        let (sender, mut late) = mpsc::channel::<(tokio::time::Instant, Bytes)>(4096);
        tokio::join!(
            async {
                let mut bytes = BytesMut::with_capacity(64 * 1024);
                while let Ok(1..) = reader.read_buf(&mut bytes).await {
                    let due = tokio::time::Instant::now() + Duration::from_millis(5);
                    if sender.send((due, bytes.split().freeze())).await.is_err() {
                        return;
                    }
                }
            },
            async {
                while let Some((due, bytes)) = late.recv().await {
                    tokio::time::sleep_until(due).await;
                    if writer.write_all(&bytes).await.is_err() {
                        return;
                    }
                }
            }
        );
    };
    network.spawn(carry(near_reader, far_writer));
    network.spawn(carry(far_reader, near_writer));
    (near, far)
}

#[tokio::test]
async fn credit_grows_with_the_way_and_within_the_budget() {
    let network = Tasks::new();
    let (near, far) = long_way(&network);
    let mut session = Session::over(near, far, Flow::Credit).await;
    let target = "db:1".parse().expect("a target");
    let opened = session.client.open(&target, "127.0.0.1", None);
    let accepted = async { session.opens.recv().await.expect("an open").accept(Flow::Credit).await };
    let (channel, far_channel) = tokio::join!(opened, accepted);
    let (channel, mut far_channel) = (channel.expect("opened"), far_channel.expect("accepted"));
    let (mut reader, mut writer) = (channel.reader, channel.writer);
    let returns = far_channel.reader.returns();
    let budget = far_channel.reader.control();
    session.tasks.spawn(async move {
        tokio::select! {
            // Credit comes with what is read.
            _ = reader.next() => {}
            () = async { while writer.send(Bytes::from(vec![7; limits::CHUNK])).await.is_ok() {} } => {}
        }
    });
    let mut take = async |megabytes: usize, quick: bool| {
        let mut taken = 0;
        while taken < megabytes << 20 {
            match within("data", far_channel.reader.next()).await {
                Event::Data(bytes) => {
                    taken += bytes.len();
                    returns.taken(bytes.len()).await;
                }
                Event::Starved if quick => returns.grow().await,
                Event::Starved => {}
                event => panic!("{event:?}"),
            }
        }
        far_channel.reader.window()
    };
    assert_eq!(take(1, false).await, wire::CREDIT_INITIAL, "a slow sink gets no more than it takes");
    let grown = take(24, true).await;
    assert!((1 << 20..=limits::CREDIT_MAX).contains(&grown), "a long way gets more: {grown}");
    budget.take_credit(limits::CREDIT_PER_SESSION);
    // Most of what is taken is kept.
    let shrunk = take((3 * limits::CREDIT_MAX) >> 20, true).await;
    assert!((wire::CREDIT_INITIAL..=4 * wire::CREDIT_INITIAL).contains(&shrunk), "what is scarce is shared: {shrunk}");
    budget.put_credit(limits::CREDIT_PER_SESSION);
    assert!(take(24, true).await >= 1 << 20, "and comes back");
    drop((far_channel, returns));
    budget.cut();
    within("the budget", async {
        // All of it is free again when half may be had.
        loop {
            let more = budget.ask_credit(0, limits::CREDIT_PER_SESSION);
            budget.put_credit(more);
            if more == limits::CREDIT_PER_SESSION / 2 {
                return;
            }
            tokio::task::yield_now().await;
        }
    })
    .await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Random sizes, pauses and half-closes both ways, and cuts: what arrives is a prefix of what was sent, and all of it
    /// when both sides ended cleanly.
    #[test]
    fn what_arrives_is_what_was_sent(
        up in proptest::collection::vec(1_usize..200_000, 0..8),
        down in proptest::collection::vec(1_usize..200_000, 0..8),
        cut_after in proptest::option::of(0_usize..400_000),
        pause in 0_u8..3,
        stock in any::<bool>(),
        two_threads in any::<bool>(),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let (thread, _threads) = thread();
            let mut session = Session::new(if stock { Flow::Stock } else { Flow::Credit }).await;
            let forward = session.forward_from(two_threads.then_some(&thread)).await;
            let upward = bytes(up.iter().sum(), 1);
            let downward = bytes(down.iter().sum(), 2);
            let stop = forward.near_stop.clone();
            let talk = async |socket: TcpStream, sizes: &[usize], all: &[u8]| {
                let (mut reader, mut writer) = socket.into_split();
                let mut heard = Vec::new();
                tokio::join!(
                    async {
                        let mut rest = all;
                        for size in sizes {
                            let (chunk, after) = rest.split_at(*size);
                            rest = after;
                            if writer.write_all(chunk).await.is_err() {
                                return;
                            }
                            for _ in 0..pause {
                                tokio::task::yield_now().await;
                            }
                            if cut_after.is_some_and(|cut| all.len() - rest.len() >= cut) {
                                stop.cancel();
                            }
                        }
                        // A reset on the way out is what a cut looks like.
                        drop(writer.shutdown().await);
                    },
                    async {
                        let mut buf = vec![0; 30_000];
                        while let Ok(read @ 1..) = reader.read(&mut buf).await {
                            heard.extend_from_slice(&buf[..read]);
                        }
                    }
                );
                heard
            };
            let (answers, questions) = within("the talk", async {
                tokio::join!(talk(forward.principal, &up, &upward), talk(forward.target, &down, &downward))
            })
            .await;
            let near_end = within("the near end", forward.near_end).await.expect("ran");
            if let Some(other_half) = forward.other_half {
                within("the other half", other_half).await.expect("ran");
            }
            let far_end = within("the far end", forward.far_end).await.expect("ran");
            assert!(upward.starts_with(&questions), "not a prefix of what was sent");
            assert!(downward.starts_with(&answers), "not a prefix of what was sent");
            if near_end == End::Clean && far_end == End::Clean {
                assert_eq!((questions.len(), answers.len()), (upward.len(), downward.len()));
                let counted = (forward.counters.to_target() as usize, forward.counters.from_target() as usize);
                assert_eq!(counted, (upward.len(), downward.len()));
            }
            if cut_after.is_none() {
                assert_eq!((near_end, far_end), (End::Clean, End::Clean));
            }
        });
    }
}

/// A forward between two pipes under these bounds: its two ends, its counters, and how it ends.
fn bounded(bounds: Bounds) -> (DuplexStream, DuplexStream, tokio::task::JoinHandle<End>) {
    let (principal, near) = tokio::io::duplex(64);
    let (target, far) = tokio::io::duplex(64);
    let end = Tasks::new().spawn(async move {
        let stop = CancellationToken::new();
        let counters = Counters::default();
        let (end, remains) =
            splice(Side::Stream(near.into()), Side::Stream(far.into()), &counters, bounds, &stop).await;
        remains.leave().await;
        end
    });
    (principal, target, end)
}

#[tokio::test(start_paused = true)]
async fn an_idle_forward_ends_and_one_that_moves_goes_on() {
    const IDLE: Duration = Duration::from_secs(100);
    let bounds = Bounds { idle: Some(IDLE), life: None };
    let began = Instant::now();
    let (_principal, _target, end) = bounded(bounds);
    assert_eq!(end.await.expect("ran"), End::Idle);
    assert!(began.elapsed() >= IDLE && began.elapsed() <= IDLE + IDLE / 4, "{:?}", began.elapsed());

    // A byte now and then, in either direction, also once the other has ended.
    for half_closed in [false, true] {
        let (mut principal, mut target, mut end) = bounded(bounds);
        if half_closed {
            principal.shutdown().await.expect("shut down");
        }
        for turn in 0..20 {
            tokio::time::sleep(IDLE * 99 / 100).await;
            let (from, to) = match half_closed || turn % 2 == 0 {
                true => (&mut target, &mut principal),
                false => (&mut principal, &mut target),
            };
            from.write_all(b"x").await.expect("still there");
            assert_eq!(to.read_u8().await.expect("still there"), b'x');
        }
        let last = Instant::now();
        assert_eq!((&mut end).await.expect("ran"), End::Idle);
        let (least, most) = (IDLE, IDLE + IDLE / 2);
        assert!(last.elapsed() >= least && last.elapsed() <= most, "{:?} after the last byte", last.elapsed());
    }
}

#[tokio::test(start_paused = true)]
async fn a_forward_that_is_old_enough_ends_however_busy_it_is() {
    const LIFE: Duration = Duration::from_secs(100);
    for idle in [None, Some(Duration::from_secs(7)), Some(LIFE * 2)] {
        let began = Instant::now();
        let (mut principal, mut target, mut end) = bounded(Bounds { idle, life: Some(LIFE) });
        let mut moved = 0_u32;
        let end = loop {
            tokio::select! {
                end = &mut end => break end.expect("ran"),
                () = tokio::time::sleep(Duration::from_secs(1)) => {
                    principal.write_all(b"x").await.expect("still there");
                    target.read_exact(&mut [0]).await.expect("still there");
                    moved += 1;
                }
            }
        };
        assert_eq!((end, began.elapsed(), moved >= 98), (End::Expired, LIFE, true), "{moved} bytes");
    }
}

#[tokio::test(start_paused = true)]
async fn without_bounds_a_forward_idles_as_long_as_it_likes() {
    let (mut principal, mut target, end) = bounded(Bounds::default());
    tokio::time::sleep(Duration::from_secs(365 * 24 * 3600)).await;
    principal.write_all(b"x").await.expect("still there");
    assert_eq!(target.read_u8().await.expect("still there"), b'x');
    drop((principal, target));
    assert_eq!(end.await.expect("ran"), End::Clean);
}

#[tokio::test]
async fn a_forward_that_is_cut_for_its_age_looks_broken_and_what_came_is_a_prefix() {
    let (mut principal, near) = sockets().await;
    let (mut target, far) = sockets().await;
    let bounds = Bounds { idle: None, life: Some(Duration::from_secs(2)) };
    let end = Tasks::new().spawn(async move {
        let stop = CancellationToken::new();
        let (end, remains) = splice(Side::Tcp(near), Side::Tcp(far), &Counters::default(), bounds, &stop).await;
        remains.leave().await;
        end
    });
    let sent = bytes(64 * 1024 * 1024, 11);
    let writing = async { principal.write_all(&sent).await };
    let reading = async {
        let (mut heard, mut buffer) = (0, vec![0; 4096]);
        loop {
            match target.read(&mut buffer).await {
                Ok(0) => panic!("a clean end after {heard} bytes"),
                Ok(count) => {
                    assert!(buffer[..count] == sent[heard..heard + count], "bytes were changed, lost or reordered");
                    heard += count;
                    // Slow enough that it does not end by itself.
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                Err(error) => break (heard, error.kind()),
            }
        }
    };
    let (wrote, (heard, error)) = within("the cut", async { tokio::join!(writing, reading) }).await;
    assert_eq!(wrote.expect_err("cut").kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(error, io::ErrorKind::ConnectionReset);
    assert!(heard > 0 && heard < sent.len());
    assert_eq!(within("its end", end).await.expect("ran"), End::Expired);
}
