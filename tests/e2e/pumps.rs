//! Sessions between two ends in this process, over streams of the test's making: what the SSH library alone does there
//! (the control experiments, named `naively_…`), and what ours does. `links.rs` has the table that says which item each
//! test stands for.
//!
//! A session and all that uses its channels share the test's one thread, as `tunnel::ssh` demands.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use caponier::audit::Counters;
use caponier::identity::{Algorithm, PrivateKey, PublicKey};
use caponier::limits;
use caponier::task::Tasks;
use caponier::tunnel::splice::{Bounds, End, Side, splice};
use caponier::tunnel::ssh::{self, Client, ClientOptions, Flow, Login, Opening, Running, ServerOptions};
use caponier::tunnel::wire;
use russh::keys::PublicKeyOrCertificate;
use russh::server::{Auth, ChannelOpenHandle, Msg, Session};
use russh::{Channel, ChannelMsg};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::harness::within;

/// After this long without a byte, a pump has stopped. Ours are given twenty times as much.
const STUCK: Duration = Duration::from_secs(3);

// ---------------------------------------------------------------------------------------------------------------------
// The SSH library alone.

/// Lets everybody in, accepts every channel, and hands it to the test.
struct Library {
    channels: mpsc::Sender<Channel<Msg>>,
}

impl russh::server::Handler for Library {
    type Error = russh::Error;

    async fn auth_none(&mut self, _: &str) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn auth_publickey(&mut self, _: &str, _: russh::server::VerifiedPublicKey<'_>) -> Result<Auth, Self::Error> {
        Ok(Auth::Accept)
    }

    async fn channel_open_direct_tcpip(
        &mut self,
        channel: Channel<Msg>,
        _: &str,
        port: u32,
        _: &str,
        _: u32,
        reply: ChannelOpenHandle,
        _: &mut Session,
    ) -> Result<(), Self::Error> {
        let channels = self.channels.clone();
        Tasks::new().spawn(async move {
            // A port that says how late the answer comes.
            sleep(Duration::from_millis(u64::from(port))).await;
            reply.accept().await;
            channels.send(channel).await.expect("the test takes channels");
        });
        Ok(())
    }
}

/// The client's side of it; counts key exchanges.
#[derive(Default, Clone)]
struct Exchanges(Arc<AtomicUsize>);

impl russh::client::Handler for Exchanges {
    type Error = russh::Error;

    async fn check_server_key(&mut self, _: &PublicKeyOrCertificate) -> Result<bool, Self::Error> {
        Ok(true)
    }

    async fn kex_done(
        &mut self,
        _: Option<&[u8]>,
        _: &russh::Names,
        _: &mut russh::client::Session,
    ) -> Result<(), Self::Error> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

type Channels = mpsc::Receiver<Channel<Msg>>;

/// Runs the library as a server; what arrives there.
async fn library_server(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    config: russh::server::Config,
) -> Channels {
    let config = russh::server::Config {
        keys: vec![PrivateKey::generate(Algorithm::Ed25519).as_ssh().as_ref().clone()],
        auth_rejection_time: Duration::ZERO,
        ..config
    };
    let (sender, channels) = mpsc::channel(1_024);
    let running = russh::server::run_stream(Arc::new(config), stream, Library { channels: sender }).await;
    let running = running.expect("a session");
    Tasks::new().spawn(async move { drop(running.await) });
    channels
}

/// Runs the library as a client that needs no key.
async fn stranger(stream: DuplexStream) -> russh::client::Handle<Exchanges> {
    let config = Arc::new(russh::client::Config::default());
    let mut client = russh::client::connect_stream(config, stream, Exchanges::default()).await.expect("connected");
    assert!(client.authenticate_none("acme").await.expect("a login").success());
    client
}

/// Both ends of a session of the library's.
async fn library(size: usize) -> (russh::client::Handle<Exchanges>, Channels) {
    let (near, far) = tokio::io::duplex(size);
    let channels = library_server(far, russh::server::Config::default());
    let client = stranger(near);
    let (channels, client) = tokio::join!(channels, client);
    (client, channels)
}

/// A channel between them.
async fn channel(
    client: &russh::client::Handle<Exchanges>,
    channels: &mut Channels,
) -> (Channel<russh::client::Msg>, Channel<Msg>) {
    let opened = client.channel_open_direct_tcpip("db", 0, "127.0.0.1", 1);
    let (near, far) = within("a channel", async { tokio::join!(opened, channels.recv()) }).await;
    (near.expect("opened"), far.expect("accepted"))
}

/// Whether `moved` stands still for [`STUCK`] before `done` has ended.
async fn stops(moved: &AtomicUsize, done: &JoinHandle<()>) -> bool {
    let deadline = Instant::now() + crate::harness::PATIENCE;
    loop {
        let before = moved.load(Ordering::Relaxed);
        sleep(STUCK).await;
        if done.is_finished() {
            return false;
        }
        if moved.load(Ordering::Relaxed) == before {
            return true;
        }
        assert!(Instant::now() < deadline, "it neither stops nor ends");
    }
}

#[tokio::test]
async fn naively_a_stalled_reader_holds_up_the_whole_session() {
    let (client, mut channels) = library(64 * 1024).await;
    let (stalled, mut unread) = channel(&client, &mut channels).await;
    let (beside, mut served) = channel(&client, &mut channels).await;
    beside.data_bytes(&b"before"[..]).await.expect("sent");
    assert!(matches!(within("a word", served.wait()).await, Some(ChannelMsg::Data { .. })));
    let chunk = Bytes::from(vec![7; 32 * 1024]);
    while timeout(STUCK, stalled.data_bytes(chunk.clone())).await.is_ok() {}
    let word = async {
        beside.data_bytes(&b"beside"[..]).await.expect("sent");
        served.wait().await
    };
    tokio::pin!(word);
    assert!(timeout(STUCK, &mut word).await.is_err(), "the library no longer holds up a session for one reader");
    // It was that reader, and nothing else.
    let reading = async { while unread.wait().await.is_some() {} };
    tokio::select! {
        () = reading => panic!("the channel has ended"),
        word = within("the word", word) => assert!(matches!(word, Some(ChannelMsg::Data { .. }))),
    }
}

#[tokio::test]
async fn naively_an_echo_saturated_both_ways_stops_for_ever() {
    let (client, mut channels) = library(4 * 1024).await;
    let (near, far) = channel(&client, &mut channels).await;
    let tasks = Tasks::new();
    // The pump as everybody writes it at first, between the channel and a target that returns what it gets.
    let (mut target, mut target_end) = sockets().await;
    tasks.spawn(async move { tokio::io::copy_bidirectional(&mut far.into_stream(), &mut target_end).await });
    tasks.spawn(async move {
        let (mut reader, mut writer) = target.split();
        tokio::io::copy(&mut reader, &mut writer).await
    });
    let moved = Arc::new(AtomicUsize::new(0));
    let (mut reader, mut writer) = tokio::io::split(near.into_stream());
    tasks.spawn(async move {
        let chunk = vec![7; 64 * 1024];
        while writer.write_all(&chunk).await.is_ok() {}
    });
    let done = tasks.spawn({
        let moved = moved.clone();
        async move {
            let mut buffer = vec![0; 64 * 1024];
            while let Ok(count @ 1..) = reader.read(&mut buffer).await {
                if moved.fetch_add(count, Ordering::Relaxed) > MUCH {
                    return;
                }
            }
        }
    });
    assert!(stops(&moved, &done).await, "the library no longer stops: {} bytes", moved.load(Ordering::Relaxed));
}

#[tokio::test]
async fn naively_bulk_both_ways_over_a_narrow_stream_stops_for_ever() {
    let (client, mut channels) = library(64 * 1024).await;
    let tasks = Tasks::new();
    let moved = Arc::new(AtomicUsize::new(0));
    let (mut pairs, mut all) = (Vec::new(), Vec::new());
    for _ in 0..BULK {
        pairs.push(channel(&client, &mut channels).await);
    }
    for (near, far) in pairs {
        for (mut reader, mut writer) in [halves(near.into_stream()), halves(far.into_stream())] {
            tasks.spawn(async move {
                let chunk = vec![7; 64 * 1024];
                while writer.write_all(&chunk).await.is_ok() {}
            });
            let moved = moved.clone();
            all.push(tasks.spawn(async move {
                let (mut buffer, mut count) = (vec![0; 64 * 1024], 0);
                while count < MUCH / BULK {
                    let Ok(read @ 1..) = reader.read(&mut buffer).await else { return };
                    count += read;
                    moved.fetch_add(read, Ordering::Relaxed);
                }
            }));
        }
    }
    let done = tasks.spawn(async move {
        for task in all {
            task.await.expect("ran");
        }
    });
    assert!(stops(&moved, &done).await, "the library no longer stops: {} bytes", moved.load(Ordering::Relaxed));
}

type Halves = (Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>);

fn halves(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Halves {
    let (reader, writer) = tokio::io::split(stream);
    (Box::new(reader), Box::new(writer))
}

#[tokio::test]
async fn naively_a_writer_without_window_waits_on_after_the_close() {
    let (near, far) = tokio::io::duplex(64 * 1024);
    let config = russh::server::Config { window_size: 0, ..russh::server::Config::default() };
    let client = stranger(near);
    let (mut channels, client) = tokio::join!(library_server(far, config), client);
    let (near, far) = channel(&client, &mut channels).await;
    let (mut reader, writer) = near.split();
    let tasks = Tasks::new();
    let writing = tasks.spawn(async move { writer.data_bytes(vec![7; 1_024]).await });
    far.close().await.expect("closed");
    while !matches!(within("the close", reader.wait()).await, Some(ChannelMsg::Close) | None) {}
    sleep(STUCK).await;
    assert!(!writing.is_finished(), "the library now wakes a writer at the close");
}

#[tokio::test]
async fn naively_an_open_that_is_given_up_stays_open_at_the_other_end() {
    let (client, mut channels) = library(64 * 1024).await;
    let open = client.channel_open_direct_tcpip("db", 300, "127.0.0.1", 1);
    assert!(timeout(Duration::from_millis(100), open).await.is_err(), "the answer comes later");
    let mut leaked = within("the channel", channels.recv()).await.expect("accepted");
    assert!(timeout(STUCK, leaked.wait()).await.is_err(), "the library now closes what nobody waits for");
}

// ---------------------------------------------------------------------------------------------------------------------
// Ours.

/// Far more than all windows, queues and buffers on the way together.
const MUCH: usize = 64 << 20;

/// Channels of the item "16 bulk channels each way".
const BULK: usize = 16;

struct Everybody;

impl Login for Everybody {
    fn offered(&mut self, _: &str, _: &PublicKey) -> bool {
        true
    }
    fn verified(&mut self, _: &str, _: &PublicKey) -> bool {
        true
    }
    fn unfit(&mut self, _: &str, _: &'static str) {}
}

/// The server's end of ours.
struct Served {
    opens: mpsc::Receiver<Opening>,
    control: caponier::tunnel::transport::Control,
    _running: Running,
}

async fn serve<S>(stream: S, flow: Flow, keepalive: Duration, tasks: &Tasks) -> Served
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let options = ServerOptions {
        line: "SSH-2.0-caponier_1".to_owned(),
        said: false,
        head: Bytes::new(),
        key: PrivateKey::generate(Algorithm::Ed25519),
        certificate: None,
        control_channel: false,
        keepalive,
        keepalive_max: 1,
        flow,
        channels: limits::CHANNELS_PER_LINK,
        opens: limits::PENDING_OPENS_PER_LINK,
    };
    let server = ssh::serve(stream, options, Everybody, tasks).await.expect("served");
    let control = server.control.clone();
    let (opens, _, running) = server.split();
    Served { opens, control, _running: running }
}

async fn enter<S>(stream: S, flow: Flow, keepalive: Duration, tasks: &Tasks) -> Client
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let client = ClientOptions {
        line: "SSH-2.0-caponier_1 client",
        said: false,
        head: Bytes::new(),
        host_key: Box::new(|_| true),
        host_certificate: None,
        keepalive,
        flow,
        report: Arc::new(|violation| panic!("{violation:?}")),
    };
    let stranger = ssh::connect(stream, client).await.expect("connected");
    let key = PrivateKey::generate(Algorithm::Ed25519);
    stranger.login("acme", &key, tasks, limits::PENDING_OPENS_PER_LINK).await.expect("logged in")
}

/// A session between two of our ends.
struct Ours {
    client: Client,
    served: Served,
    flow: Flow,
    tasks: Tasks,
}

impl Ours {
    async fn over<S>(near: S, far: S, flow: Flow, keepalive: Duration) -> Self
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let tasks = Tasks::new();
        let (served, client) = tokio::join!(serve(far, flow, keepalive, &tasks), enter(near, flow, keepalive, &tasks));
        Self { client, served, flow, tasks }
    }

    /// A forward through it, as gateway and agent make one.
    async fn forward(&mut self) -> Forward {
        let target = "db:1".parse().expect("a target");
        let opened = self.client.open(&target, "127.0.0.1", None);
        let accepted = async { self.served.opens.recv().await.expect("an open").accept(self.flow).await };
        let (near_channel, far_channel) = within("a channel", async { tokio::join!(opened, accepted) }).await;
        let (principal, near) = sockets().await;
        let (target, far) = sockets().await;
        let near_channel = Side::Channel(near_channel.expect("opened"));
        let near_end = pump(&self.tasks, Side::Tcp(near), near_channel);
        let far_end = pump(&self.tasks, Side::Channel(far_channel.expect("accepted")), Side::Tcp(far));
        Forward { principal, target, near_end, far_end }
    }
}

struct Forward {
    principal: TcpStream,
    target: TcpStream,
    near_end: JoinHandle<End>,
    far_end: JoinHandle<End>,
}

fn pump(tasks: &Tasks, near: Side, far: Side) -> JoinHandle<End> {
    tasks.spawn(async move {
        let (end, remains) =
            splice(near, far, &Counters::default(), Bounds::default(), &CancellationToken::new()).await;
        remains.leave().await;
        end
    })
}

async fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bound");
    let address = listener.local_addr().expect("an address");
    let (one, other) = tokio::join!(TcpStream::connect(address), listener.accept());
    (one.expect("connected"), other.expect("accepted").0)
}

/// Bytes of which a lost, repeated or swapped piece is seen.
fn bytes(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(31).wrapping_add(seed) ^ (i >> 8) as u8 ^ (i >> 16) as u8).collect()
}

/// Writes `sent` and ends.
async fn give(mut writer: impl AsyncWrite + Unpin, sent: &[u8]) {
    writer.write_all(sent).await.expect("written");
    writer.shutdown().await.expect("shut down");
}

/// Reads to the end.
async fn take(mut reader: impl AsyncRead + Unpin, expected: &[u8]) {
    let mut heard = Vec::with_capacity(expected.len());
    reader.read_to_end(&mut heard).await.expect("read");
    assert_eq!(heard.len(), expected.len());
    assert!(heard == expected, "bytes were changed, lost or reordered");
}

#[tokio::test]
async fn a_stalled_reader_leaves_the_keepalives_answered() {
    // Often enough that a session which answers none is cut many times over while the test looks.
    let keepalive = Duration::from_millis(1_500);
    let (near, far) = tokio::io::duplex(64 * 1024);
    let mut session = Ours::over(near, far, Flow::Credit, keepalive).await;
    let mut stalled = [session.forward().await, session.forward().await];
    let [one, other] = &mut stalled;
    let chunk = vec![7; 64 * 1024];
    for socket in [&mut one.principal, &mut other.target] {
        // Until nothing fits any more: all queues on the way are full.
        while timeout(Duration::from_millis(300), socket.write_all(&chunk)).await.is_ok() {}
    }
    let mut beside = session.forward().await;
    // Nothing is sent but keepalives; then the other forward is used. Time is what is tested here.
    for _ in 0..2 {
        sleep(keepalive * 3).await;
        assert!(!session.client.control().gone().is_cancelled(), "the client's end has ended");
        assert!(!session.served.control.gone().is_cancelled(), "the server's end has ended");
        beside.principal.write_all(b"beside").await.expect("written");
        let mut heard = [0; 6];
        within("a forward beside", beside.target.read_exact(&mut heard)).await.expect("read");
    }
    // What was held back is all there.
    let [one, _] = stalled;
    drop(one.principal);
    let mut heard = Vec::new();
    let mut target = one.target;
    within("what was held back", target.read_to_end(&mut heard)).await.expect("read");
    assert!(!heard.is_empty() && heard.iter().all(|byte| *byte == 7));
}

#[tokio::test]
async fn sixteen_bulk_channels_each_way_pass_a_narrow_stream() {
    for flow in [Flow::Credit, Flow::Stock] {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let mut session = Ours::over(near, far, flow, limits::LINK_KEEPALIVE).await;
        let (up, down) = (Arc::new(bytes(MUCH / BULK, 3)), Arc::new(bytes(MUCH / BULK, 5)));
        let mut all = Vec::new();
        for _ in 0..BULK {
            let forward = session.forward().await;
            let (up, down) = (up.clone(), down.clone());
            all.push(session.tasks.spawn(async move {
                let (principal_reader, principal_writer) = forward.principal.into_split();
                let (target_reader, target_writer) = forward.target.into_split();
                tokio::join!(
                    give(principal_writer, &up),
                    give(target_writer, &down),
                    take(principal_reader, &down),
                    take(target_reader, &up),
                );
                assert_eq!(forward.near_end.await.expect("ran"), End::Clean);
                assert_eq!(forward.far_end.await.expect("ran"), End::Clean);
            }));
        }
        for one in all {
            within("a bulk channel", one).await.expect("ran");
        }
    }
}

#[tokio::test]
async fn a_writer_without_window_or_credit_ends_with_its_channel_and_with_its_session() {
    // What the peer lets us send: nothing at all, or as much as nobody gives credit for. And what it then does.
    for (flow, window) in [(Flow::Stock, 0), (Flow::Credit, limits::WINDOW_OURS)] {
        for closes in [true, false] {
            let tasks = Tasks::new();
            let (near, far) = tokio::io::duplex(64 * 1024);
            let config = russh::server::Config { window_size: window, ..russh::server::Config::default() };
            let (far, network) = cut_stream(far);
            let (mut channels, client) =
                tokio::join!(library_server(far, config), enter(near, flow, limits::LINK_KEEPALIVE, &tasks));
            let target = "db:1".parse().expect("a target");
            let (near, far) = tokio::join!(client.open(&target, "127.0.0.1", None), channels.recv());
            let (near, far) = (near.expect("opened"), far.expect("accepted"));
            let (mut principal, near_end) = sockets().await;
            let ended = pump(&tasks, Side::Tcp(near_end), Side::Channel(near));
            let chunk = vec![7; 64 * 1024];
            while timeout(Duration::from_millis(300), principal.write_all(&chunk)).await.is_ok() {}
            assert!(!ended.is_finished(), "it waits");
            match closes {
                true => far.close().await.expect("closed"),
                false => network.cancel(),
            }
            let end = within("the end of the pump", ended).await.expect("ran");
            assert!(matches!(end, End::FarBroke(_)), "{flow:?}, closed: {closes}: {end:?}");
            let read = within("the principal's end", principal.read(&mut [0])).await;
            assert!(read.is_err(), "what was cut looks like an orderly end: {read:?}");
        }
    }
}

/// A stream that ends when the token fires.
fn cut_stream(stream: DuplexStream) -> (DuplexStream, CancellationToken) {
    let (mut inner, outer) = tokio::io::duplex(64 * 1024);
    let cut = CancellationToken::new();
    let mut stream = stream;
    Tasks::new().spawn({
        let cut = cut.clone();
        async move {
            tokio::select! {
                _ = tokio::io::copy_bidirectional(&mut stream, &mut inner) => {}
                () = cut.cancelled() => {}
            }
        }
    });
    (outer, cut)
}

/// A stream whose bytes arrive so much later at the other end, both ways, whatever their number.
fn far_away(delay: Duration) -> (DuplexStream, DuplexStream) {
    let (near, near_end) = tokio::io::duplex(1 << 20);
    let (far_end, far) = tokio::io::duplex(1 << 20);
    let (near_reader, near_writer) = tokio::io::split(near_end);
    let (far_reader, far_writer) = tokio::io::split(far_end);
    let network = Tasks::new();
    network.spawn(carry(near_reader, far_writer, delay));
    network.spawn(carry(far_reader, near_writer, delay));
    (near, far)
}

/// One direction of a long way.
pub(crate) async fn carry(mut reader: impl AsyncRead + Unpin, mut writer: impl AsyncWrite + Unpin, delay: Duration) {
    let (sender, mut late) = mpsc::channel::<(Instant, Bytes)>(16_384);
    tokio::join!(
        async move {
            let mut bytes = BytesMut::with_capacity(64 * 1024);
            while let Ok(1..) = reader.read_buf(&mut bytes).await {
                if sender.send((Instant::now() + delay, bytes.split().freeze())).await.is_err() {
                    return;
                }
                bytes.reserve(64 * 1024);
            }
        },
        async move {
            while let Some((due, bytes)) = late.recv().await {
                tokio::time::sleep_until(due).await;
                if writer.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            drop(writer.shutdown().await);
        }
    );
}

/// The library in the place of a gateway, with a window as wide as ours.
async fn library_client(stream: DuplexStream, exchanges: Exchanges) -> russh::client::Handle<Exchanges> {
    let config = russh::client::Config { window_size: limits::WINDOW_OURS, ..russh::client::Config::default() };
    let mut client = russh::client::connect_stream(Arc::new(config), stream, exchanges).await.expect("connected");
    let key = Arc::new(PrivateKey::generate(Algorithm::Ed25519).as_ssh().as_ref().clone());
    let key = russh::keys::PrivateKeyWithHashAlg::new(key, None);
    assert!(client.authenticate_publickey("acme", key).await.expect("a login").success());
    client
}

/// Sends on a channel of the library's as one of our ends does: within its credit.
async fn send_with_credit(channel: &mut Channel<russh::client::Msg>, sent: &[u8]) {
    let (mut credit, mut rest) = (wire::CREDIT_INITIAL, sent);
    while !rest.is_empty() {
        let fit = credit.saturating_sub(wire::message_cost(0)).min(rest.len()).min(32 * 1024);
        if fit < rest.len().min(4 * 1024) {
            channel.extended_data_bytes(wire::CREDIT_TYPE, wire::credit(wire::NO_CREDIT)).await.expect("asked");
            match channel.wait().await {
                Some(ChannelMsg::ExtendedData { data, ext: wire::CREDIT_TYPE }) => {
                    credit += wire::parse_credit(&data).expect("credit");
                }
                Some(ChannelMsg::Data { .. } | ChannelMsg::WindowAdjusted { .. }) => {}
                other => panic!("no credit, but {other:?}"),
            }
            continue;
        }
        let (now, later) = rest.split_at(fit);
        channel.data_bytes(Bytes::copy_from_slice(now)).await.expect("sent");
        credit -= wire::message_cost(fit);
        rest = later;
    }
    channel.eof().await.expect("ended");
}

#[tokio::test]
async fn a_gateway_that_changes_keys_under_eight_uploads_loses_nothing() {
    let tasks = Tasks::new();
    let (near, far) = far_away(Duration::from_millis(50));
    let exchanges = Exchanges::default();
    let client = library_client(near, exchanges.clone());
    let (mut served, client) = tokio::join!(serve(far, Flow::Credit, limits::LINK_KEEPALIVE, &tasks), client);
    let sent = Arc::new(bytes(6 << 20, 7));
    let mut all = Vec::new();
    for _ in 0..8 {
        let opened = client.channel_open_direct_tcpip("db", 1, "127.0.0.1", 1);
        let accepted = async { served.opens.recv().await.expect("an open").accept(Flow::Credit).await };
        let (near, far) = within("a channel", async { tokio::join!(opened, accepted) }).await;
        let (mut near, far) = (near.expect("opened"), far.expect("accepted"));
        let (target, far_end) = sockets().await;
        drop(pump(&tasks, Side::Channel(far), Side::Tcp(far_end)));
        let sent = sent.clone();
        all.push(tasks.spawn(async move {
            tokio::join!(take(target, &sent), send_with_credit(&mut near, &sent));
        }));
    }
    // Again and again, for as long as there is something to upload.
    let (before, finished) = (exchanges.0.load(Ordering::Relaxed), CancellationToken::new());
    let changing = async {
        while !finished.is_cancelled() {
            let seen = exchanges.0.load(Ordering::Relaxed);
            client.rekey_soon().await.expect("asked");
            while exchanges.0.load(Ordering::Relaxed) == seen && !finished.is_cancelled() {
                sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let uploading = async {
        for upload in all {
            within("an upload", upload).await.expect("ran");
        }
        finished.cancel();
    };
    tokio::join!(changing, uploading);
    let exchanges = exchanges.0.load(Ordering::Relaxed) - before;
    assert!(exchanges >= 3, "only {exchanges} new keys: nothing was tested");
}

#[tokio::test]
async fn an_agent_that_changes_keys_under_eight_uploads_loses_nothing() {
    let tasks = Tasks::new();
    let (near, far) = far_away(Duration::from_millis(50));
    let few = 1 << 20;
    let config = russh::server::Config {
        window_size: limits::WINDOW_OURS,
        limits: russh::Limits { rekey_write_limit: few, rekey_read_limit: few, rekey_time_limit: limits::REKEY_TIME },
        ..russh::server::Config::default()
    };
    let (mut channels, client) =
        tokio::join!(library_server(far, config), enter(near, Flow::Credit, limits::LINK_KEEPALIVE, &tasks));
    let (up, down) = (Arc::new(bytes(4 << 20, 7)), Arc::new(bytes(1 << 20, 9)));
    let mut all = Vec::new();
    for _ in 0..8 {
        let target = "db:1".parse().expect("a target");
        let opened = client.open(&target, "127.0.0.1", None);
        let (near, far) = within("a channel", async { tokio::join!(opened, channels.recv()) }).await;
        let (near, mut far) = (near.expect("opened"), far.expect("accepted"));
        let (principal, near_end) = sockets().await;
        drop(pump(&tasks, Side::Tcp(near_end), Side::Channel(near)));
        let (up, down) = (up.clone(), down.clone());
        all.push(tasks.spawn(async move {
            let (reader, writer) = principal.into_split();
            // The agent's end, by hand: it returns all credit at once, and sends what it may by the credit it gets.
            let agent = async {
                let (mut heard, mut credit, mut rest, mut over) = (Vec::new(), wire::CREDIT_INITIAL, &down[..], false);
                while !over || !rest.is_empty() {
                    let fit = credit.saturating_sub(wire::message_cost(0)).min(rest.len()).min(16 * 1024);
                    if fit > 0 && (fit == rest.len() || fit >= 4 * 1024) {
                        far.data_bytes(Bytes::copy_from_slice(&rest[..fit])).await.expect("sent");
                        (credit, rest) = (credit - wire::message_cost(fit), &rest[fit..]);
                        if rest.is_empty() {
                            far.eof().await.expect("ended");
                        }
                        continue;
                    }
                    match far.wait().await {
                        Some(ChannelMsg::Data { data }) => {
                            heard.extend_from_slice(&data);
                            // Three times the cost: as a receiver does that finds the way long.
                            let more = wire::credit(3 * wire::message_cost(data.len()));
                            far.extended_data_bytes(wire::CREDIT_TYPE, more).await.expect("given");
                        }
                        Some(ChannelMsg::ExtendedData { data, ext: wire::CREDIT_TYPE }) => {
                            credit += wire::parse_credit(&data).expect("credit");
                        }
                        Some(ChannelMsg::Eof) => over = true,
                        Some(_) => {}
                        None => panic!("the channel has ended"),
                    }
                }
                assert!(heard == *up, "bytes were changed, lost or reordered");
            };
            tokio::join!(give(writer, &up), take(reader, &down), agent);
        }));
    }
    for upload in all {
        within("an upload", upload).await.expect("ran");
    }
    assert!(!client.control().gone().is_cancelled());
}

#[tokio::test]
async fn an_open_that_is_given_up_is_closed_when_it_is_granted() {
    let tasks = Tasks::new();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (mut channels, client) = tokio::join!(
        library_server(far, russh::server::Config::default()),
        enter(near, Flow::Credit, limits::LINK_KEEPALIVE, &tasks)
    );
    // More than may be under way at once: what is given up must give its place back, too.
    let late = "db:300".parse().expect("a target");
    for _ in 0..2 {
        let opens = async {
            for _ in 0..limits::PENDING_OPENS_PER_LINK {
                let open = client.open(&late, "127.0.0.1", None);
                assert!(timeout(Duration::from_millis(1), open).await.is_err(), "the answer comes later");
            }
        };
        let closes = async {
            for _ in 0..limits::PENDING_OPENS_PER_LINK {
                let mut channel = channels.recv().await.expect("accepted");
                while !matches!(channel.wait().await, Some(ChannelMsg::Close) | None) {}
            }
        };
        within("all that was given up is closed", async { tokio::join!(opens, closes) }).await;
    }
    let soon = "db:1".parse().expect("a target");
    let (opened, _channel) =
        within("another open", async { tokio::join!(client.open(&soon, "127.0.0.1", None), channels.recv()) }).await;
    drop(opened.expect("opened"));
    within("no task is left", async {
        while !tasks.is_empty() {
            sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn credit_that_is_begged_for_without_an_end_is_answered_a_few_times() {
    let tasks = Tasks::new();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let client = library_client(near, Exchanges::default());
    let (mut served, client) = tokio::join!(serve(far, Flow::Credit, limits::LINK_KEEPALIVE, &tasks), client);
    let mut budget = 0;
    for _ in 0..16 {
        let opened = client.channel_open_direct_tcpip("db", 1, "127.0.0.1", 1);
        let accepted = async { served.opens.recv().await.expect("an open").accept(Flow::Credit).await };
        let (near, far) = within("a channel", async { tokio::join!(opened, accepted) }).await;
        let (near, far) = (near.expect("opened"), far.expect("accepted"));
        let (mut target, far_end) = sockets().await;
        drop(pump(&tasks, Side::Channel(far), Side::Tcp(far_end)));
        let (mut reader, writer) = near.split();
        let (mut answers, mut given) = (0_usize, wire::CREDIT_INITIAL);
        let begging = async {
            for _ in 0..2_000 {
                let beg = writer.extended_data_bytes(wire::CREDIT_TYPE, wire::credit(wire::NO_CREDIT));
                beg.await.expect("begged");
            }
            writer.eof().await.expect("ended");
        };
        let answering = async {
            // The target sees the end behind all of it, and says a word that comes behind all answers.
            take(&mut target, b"").await;
            target.write_all(b"!").await.expect("written");
        };
        within("the begging", async { tokio::join!(begging, answering) }).await;
        while let Some(message) = within("the answers", reader.wait()).await {
            match message {
                ChannelMsg::ExtendedData { data, ext: wire::CREDIT_TYPE } => {
                    answers += 1;
                    given += wire::parse_credit(&data).expect("credit");
                }
                ChannelMsg::Data { .. } => break,
                _ => {}
            }
        }
        assert!(given <= limits::CREDIT_MAX, "{given} bytes of credit");
        assert!(answers <= 32, "{answers} answers");
        budget += given;
        // It stays open, and keeps what it has.
        tasks.spawn(async move {
            std::future::pending::<()>().await;
            drop((reader, writer, target));
        });
    }
    // What channels begin with is had beside the budget of the session.
    let most = limits::CREDIT_PER_SESSION + 16 * wire::CREDIT_INITIAL;
    assert!(budget <= most, "{budget} bytes of credit on one session");
    assert!(!served.control.gone().is_cancelled(), "begging is no crime");
}
#[tokio::test]
async fn the_credit_of_a_session_is_within_its_budget_however_many_channels_come_late() {
    let tasks = Tasks::new();
    let (near, far) = tokio::io::duplex(64 * 1024);
    let client = library_client(near, Exchanges::default());
    let (mut served, client) = tokio::join!(serve(far, Flow::Credit, limits::LINK_KEEPALIVE, &tasks), client);
    let (mut kept, mut budget) = (Vec::new(), 0);
    for number in 0..1_024 {
        let opened = client.channel_open_direct_tcpip("db", 1, "127.0.0.1", 1);
        let accepted = async { served.opens.recv().await.expect("an open").accept(Flow::Credit).await };
        let (near, far) = within("a channel", async { tokio::join!(opened, accepted) }).await;
        let (near, far) = (near.expect("opened"), far.expect("accepted"));
        budget += wire::CREDIT_INITIAL;
        let (target, far_end) = tokio::io::duplex(64);
        drop(pump(&tasks, Side::Channel(far), Side::Stream(far_end.into())));
        let (mut reader, writer) = near.split();
        // The first few take all there is to be had.
        for _ in 0..if number < 16 { 12 } else { 0 } {
            let beg = writer.extended_data_bytes(wire::CREDIT_TYPE, wire::credit(wire::NO_CREDIT));
            beg.await.expect("begged");
            match timeout(Duration::from_millis(100), reader.wait()).await {
                Ok(Some(ChannelMsg::ExtendedData { data, ext: wire::CREDIT_TYPE })) => {
                    budget += wire::parse_credit(&data).expect("credit");
                }
                Ok(Some(_)) => {}
                Ok(None) => panic!("the channel has ended"),
                Err(_) => break,
            }
        }
        kept.push((reader, writer, target));
    }
    assert!(!served.control.gone().is_cancelled());
    let most = limits::CREDIT_PER_SESSION;
    assert!(budget <= most, "a peer may send {budget} bytes that nobody takes, {} over the budget", budget - most);
}
