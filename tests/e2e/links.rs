//! Links and forwards under what wears them out, run as the built program.
//!
//! The study of the SSH library (§7.1) lists eight ways in which a pump over its channels fails. Where each is tested, and
//! what fails when the library is used as it stands:
//!
//! | Item | The library alone fails in | Ours holds in |
//! |---|---|---|
//! | 1. a stalled reader, a second channel and keepalives | `pumps::naively_a_stalled_reader_holds_up_the_whole_session` | `tunnel::splice::tests::regression_russh_window_on_arrival_a_stalled_reader_blocks_nobody`, `pumps::a_stalled_reader_leaves_the_keepalives_answered`, `flow::a_stream_that_nobody_reads_hinders_no_other` |
//! | 2. an echo saturated both ways | `pumps::naively_an_echo_saturated_both_ways_stops_for_ever` | `tunnel::splice::tests::regression_russh_mutual_block_an_echo_saturated_both_ways_never_stops`, [`an_echo_saturated_both_ways_goes_on_through_every_door`], `scripts/soak` |
//! | 3. gateway pump between two sessions, both ways | | `flow::a_saturated_echo_loses_nothing_at_either_door`, [`an_echo_saturated_both_ways_goes_on_through_every_door`] |
//! | 4. 16 bulk channels each way over a narrow stream | `pumps::naively_bulk_both_ways_over_a_narrow_stream_stops_for_ever` | `pumps::sixteen_bulk_channels_each_way_pass_a_narrow_stream` |
//! | 5. memory over many short channels | | [`twelve_thousand_short_forwards_leave_nothing_behind`], `scripts/soak` |
//! | 6. a close while the writer waits | `pumps::naively_a_writer_without_window_waits_on_after_the_close` | `pumps::a_writer_without_window_or_credit_ends_with_its_channel_and_with_its_session`, `raw::links::a_close_ends_a_forward_whose_sender_waits_for_credit_or_window` |
//! | 7. new keys under 8 uploads, far away | | [`new_keys_under_eight_uploads_from_far_away_lose_nothing`], `pumps::a_gateway_that_changes_keys_under_eight_uploads_loses_nothing`, `pumps::an_agent_that_changes_keys_under_eight_uploads_loses_nothing` |
//! | 8. a pending open is given up | `pumps::naively_an_open_that_is_given_up_stays_open_at_the_other_end` | `pumps::an_open_that_is_given_up_is_closed_when_it_is_granted`, `raw::links::clients_that_leave_before_the_answer_leave_nothing_behind`, [`clients_that_come_and_go_at_once_leave_nothing_behind`] |

use std::fs;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use caponier::limits;
use caponier::task::Tasks;
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Child;
use tokio::time::sleep;

use crate::harness::{
    AGENT, Program, Side, Site, caponier, connect, echo, echoes, eventually, free_port, listen, read_to_end, run,
    within,
};
use crate::pumps::carry;

type Reader = Box<dyn AsyncRead + Send + Unpin>;
type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// The doors of a site to one target, and what holds them open.
struct Doors {
    local: SocketAddr,
    ssh: (Program, SocketAddr),
    ours: (Program, SocketAddr),
    target: SocketAddr,
}

/// Each way in, by name.
const DOORS: [&str; 4] = ["loopback", "ssh -L", "ssh -W", "caponier forward"];

impl Doors {
    /// To the target of the site's first loopback door.
    async fn open(site: &Site, target: SocketAddr) -> Self {
        let port = free_port();
        let mut ours = caponier();
        ours.args(["forward", "--gateway", &format!("ssh://{}", site.address), "--agent", AGENT]);
        ours.arg("--identity").arg(site.path().join("provisioner"));
        ours.arg("--known-hosts").arg(site.path().join("known_hosts"));
        ours.args(["-L", &format!("{port}:{target}")]);
        let mut ours = site.background("forward", ours);
        ours.says("listening 127.").await;
        let ssh = site.local_forward(target).await;
        Self { local: site.doors[0], ssh, ours: (ours, SocketAddr::from(([127, 0, 0, 1], port))), target }
    }

    /// A stream through one of them. Dropping the writer ends it in one direction.
    async fn stream(&self, site: &Site, door: &str) -> (Reader, Writer, Option<Child>) {
        let address = match door {
            "loopback" => self.local,
            "ssh -L" => self.ssh.1,
            "caponier forward" => self.ours.1,
            _ => {
                let mut ssh = site.ssh(&["-W", &self.target.to_string()]);
                let ssh = ssh.kill_on_drop(true).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
                let mut ssh = ssh.spawn().expect("ssh runs");
                let (reader, writer) = (ssh.stdout.take().expect("stdout"), ssh.stdin.take().expect("stdin"));
                return (Box::new(reader), Box::new(writer), Some(ssh));
            }
        };
        let (reader, writer) = connect(address).await.into_split();
        (Box::new(reader), Box::new(writer), None)
    }
}

/// Bytes of which a lost, repeated or swapped piece is seen.
fn bytes(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|i| (i as u8).wrapping_mul(29).wrapping_add(seed) ^ (i >> 8) as u8 ^ (i >> 16) as u8).collect()
}

/// Writes all and ends this direction.
async fn give(mut writer: Writer, sent: &[u8], what: &str) {
    within(what, writer.write_all(sent)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    writer.shutdown().await.unwrap_or_else(|error| panic!("{what}: {error}"));
}

/// Reads to an orderly end.
async fn take(mut reader: impl AsyncRead + Unpin, expected: &[u8], what: &str) {
    let mut heard = Vec::with_capacity(expected.len());
    let read = within(what, reader.read_to_end(&mut heard)).await;
    assert!(read.is_ok(), "{what}: {read:?} after {} of {} bytes", heard.len(), expected.len());
    assert_eq!(heard.len(), expected.len(), "{what}");
    assert!(heard == expected, "{what}: bytes were changed, lost or reordered");
}

/// A listener that the test itself accepts from.
async fn target() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a listener");
    let address = listener.local_addr().expect("its address");
    (listener, address)
}

/// Live forwards over all links, as the gateway tells.
async fn live(site: &Site) -> u64 {
    rows(site).await.iter().filter_map(|row| row["live"].as_u64()).sum()
}

async fn rows(site: &Site) -> Vec<Value> {
    let mut command = caponier();
    let listed = run(command.args(["agents", "--json", "--socket"]).arg(site.admin_socket())).await.done();
    serde_json::from_str(&listed).expect("a list")
}

fn descriptors(program: &Program) -> usize {
    fs::read_dir(format!("/proc/{}/fd", program.pid())).expect("its descriptors").count()
}

/// Resident memory, in KiB.
fn resident(program: &Program) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", program.pid())).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("its memory");
    line.trim().trim_end_matches(" kB").parse().expect("a number")
}

#[tokio::test]
async fn either_half_ends_by_itself_through_every_door_also_for_who_reads_late() {
    let (listener, address) = target().await;
    let site = Site::plan().allow(address).door(address).start().await;
    let doors = Doors::open(&site, address).await;
    // What fits into all that lies between, so that a writer can end before anybody reads; and what does not.
    let (little, much) = (bytes(128 * 1024, 1), bytes(3 << 20, 2));
    // Longer than either side waits for the other to close.
    let late = limits::CLOSE_PATIENCE * 3;
    for door in DOORS {
        // The principal is done first, and the target answers then.
        let what = format!("{door}, the principal ends first");
        let (mut reader, writer, child) = doors.stream(&site, door).await;
        let (stream, _) = within(&what, listener.accept()).await.expect("accepted");
        let (target_reader, target_writer) = stream.into_split();
        tokio::join!(give_and_drop(writer, &much), take(target_reader, &much, &what));
        tokio::join!(give(Box::new(target_writer), &much, &what), take(&mut reader, &much, &what));
        drop((reader, child));

        // The target is done first, and the principal goes on. ssh -W never does: it ends its own direction then.
        if door != "ssh -W" {
            let what = format!("{door}, the target ends first");
            let (mut reader, mut writer, child) = doors.stream(&site, door).await;
            let (stream, _) = within(&what, listener.accept()).await.expect("accepted");
            let (target_reader, target_writer) = stream.into_split();
            tokio::join!(give(Box::new(target_writer), &much, &what), take(&mut reader, &much, &what));
            writer.write_all(&little).await.expect("written");
            let rest = async {
                sleep(late).await;
                give_and_drop(writer, &much).await;
            };
            let all = [&little[..], &much].concat();
            tokio::join!(rest, take(target_reader, &all, &what));
            drop((reader, child));
        }

        // Both are done before the principal reads at all.
        let what = format!("{door}, a principal that reads late");
        let (mut reader, writer, child) = doors.stream(&site, door).await;
        let (stream, _) = within(&what, listener.accept()).await.expect("accepted");
        let (target_reader, target_writer) = stream.into_split();
        tokio::join!(give_and_drop(writer, &little), take(target_reader, &little, &what));
        give(Box::new(target_writer), &little, &what).await;
        sleep(late).await;
        take(&mut reader, &little, &what).await;
        drop((reader, child));

        // Both are done before the target reads at all.
        let what = format!("{door}, a target that reads late");
        let (mut reader, writer, child) = doors.stream(&site, door).await;
        let (stream, _) = within(&what, listener.accept()).await.expect("accepted");
        let (target_reader, target_writer) = stream.into_split();
        give_and_drop(writer, &little).await;
        sleep(late).await;
        tokio::join!(give(Box::new(target_writer), &little, &what), take(&mut reader, &little, &what));
        sleep(late).await;
        take(target_reader, &little, &what).await;
        drop((reader, child));
    }
    for side in [Side::Gateway, Side::Agent] {
        let count = DOORS.len() * 4 - 1;
        eventually("all ended well", async || {
            (site.records(side, &json!({"event": "forward.ended", "reason": "eof"})).len() == count).then_some(())
        })
        .await;
        let (up, down): (u64, u64) = site
            .records(side, &json!({"event": "forward.ended"}))
            .iter()
            .map(|it| (it["to_target"].as_u64().expect("a number"), it["from_target"].as_u64().expect("a number")))
            .fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1));
        let (little, much) = (little.len() as u64, much.len() as u64);
        let (each, further) = (much + 2 * little, much);
        assert_eq!((up, down), (4 * each + 3 * (further + little), 4 * each + 3 * further), "{side:?}");
    }
    drop(doors);
    site.stop().await;
}

/// Writes all and drops the writer, which is how a program's standard input ends.
async fn give_and_drop(mut writer: Writer, sent: &[u8]) {
    writer.write_all(sent).await.expect("written");
    writer.flush().await.expect("flushed");
    drop(writer);
}

#[tokio::test]
async fn an_echo_saturated_both_ways_goes_on_through_every_door() {
    let target = echo().await;
    let site = Site::plan().allow(target).door(target).start().await;
    let doors = Doors::open(&site, target).await;
    // More than all windows, credit and buffers on the way together; first each alone, then all together on one link.
    let sent = Arc::new(bytes(24 << 20, 3));
    for door in DOORS {
        let (reader, writer, _child) = doors.stream(&site, door).await;
        tokio::join!(give_and_drop(writer, &sent), take(reader, &sent, door));
    }
    let tasks = Tasks::new();
    let mut all = Vec::new();
    for door in DOORS.into_iter().chain(DOORS) {
        let (reader, writer, child) = doors.stream(&site, door).await;
        let sent = sent.clone();
        all.push(tasks.spawn(async move {
            tokio::join!(give_and_drop(writer, &sent[..8 << 20]), take(reader, &sent[..8 << 20], door));
            drop(child);
        }));
    }
    for one in all {
        one.await.expect("ran");
    }
    drop(doors);
    site.stop().await;
}

#[tokio::test]
async fn twelve_thousand_short_forwards_leave_nothing_behind() {
    // Says one byte; on `t` it ends first, else it waits for the client to.
    let target = listen(async |mut stream| {
        let Ok(word) = stream.read_u8().await else { return };
        drop(stream.write_u8(word).await);
        if word != b't' {
            drop(stream.read_u8().await);
        }
    })
    .await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let (ssh, through_ssh) = site.local_forward(target).await;
    let door = site.doors[0];
    let tasks = Tasks::new();
    let churn = async |count: usize| {
        let mut all = Vec::new();
        for worker in 0..12 {
            // A quarter of them on one session of a stock client.
            let address = if worker % 4 == 0 { through_ssh } else { door };
            all.push(tasks.spawn(async move {
                for number in 0..count / 12 {
                    let first = if number % 2 == 0 { b't' } else { b'c' };
                    let mut stream = TcpStream::connect(address).await.expect("connected");
                    stream.write_u8(first).await.expect("written");
                    assert_eq!(within("an answer", stream.read_u8()).await.expect("an answer"), first);
                    if first == b't' {
                        assert_eq!(read_to_end(&mut stream).await, b"");
                    }
                }
            }));
        }
        for one in all {
            one.await.expect("ran");
        }
    };
    // The bound: from the first quarter to the end, a fifth and two megabytes. A leak of the library's kind, some three
    // kilobytes for each channel, would be twenty-seven.
    let all = 6 * limits::OPENS_PER_LINK as usize;
    let (gateway, agent) = (site.program(Side::Gateway).pid(), site.program(Side::Agent).pid());
    let idle = [Side::Gateway, Side::Agent].map(|side| descriptors(site.program(side)));
    churn(all / 4).await;
    let before = [Side::Gateway, Side::Agent].map(|side| resident(site.program(side)));
    churn(all / 4 * 3).await;
    assert_eq!((site.program(Side::Gateway).pid(), site.program(Side::Agent).pid()), (gateway, agent));
    eventually("no forward is left", async || (live(&site).await == 0).then_some(())).await;
    // Links were replaced on the way, and the replaced ones are gone.
    eventually("one link is left", async || (rows(&site).await.len() == 1).then_some(())).await;
    assert!(site.records(Side::Gateway, &json!({"event": "link.up"})).len() >= 3);
    for ((side, before), idle) in [Side::Gateway, Side::Agent].into_iter().zip(before).zip(idle) {
        let after = resident(site.program(side));
        assert!(after <= before / 5 * 6 + 2 * 1024, "{side:?}: {after} KiB after {all}, {before} KiB after a quarter");
        eventually(&format!("{side:?} has let go of its descriptors"), async || {
            (descriptors(site.program(side)) <= idle + 2).then_some(())
        })
        .await;
        let ended = eventually(&format!("{side:?} has recorded all endings"), async || {
            let ended = site.records(side, &json!({"event": "forward.ended"}));
            (ended.len() >= all).then_some(ended)
        })
        .await;
        assert_eq!(ended.len(), all, "{side:?}");
        // A client that hangs up after both have said all they had ends it in order, whoever was first.
        let broken: Vec<_> = ended.iter().filter(|it| it["reason"] != "eof").collect();
        assert!(broken.is_empty(), "{side:?}: {} of {all} did not end in order: {}", broken.len(), broken[0]);
    }
    drop(ssh);
    site.stop().await;
}

#[tokio::test]
async fn clients_that_come_and_go_at_once_leave_nothing_behind() {
    let connected = Arc::new(AtomicUsize::new(0));
    let target = listen({
        let connected = connected.clone();
        move |mut stream: TcpStream| {
            let connected = connected.clone();
            async move {
                connected.fetch_add(1, Ordering::Relaxed);
                drop(tokio::io::copy(&mut stream, &mut tokio::io::sink()).await);
                connected.fetch_sub(1, Ordering::Relaxed);
            }
        }
    })
    .await;
    let mut site = Site::plan().allow(target).door(target).start().await;
    let (ssh, through_ssh) = site.local_forward(target).await;
    let idle = [Side::Gateway, Side::Agent].map(|side| descriptors(site.program(side)));
    for round in 0..400 {
        let stream = connect(if round % 2 == 0 { site.doors[0] } else { through_ssh }).await;
        if round % 4 < 2 {
            stream.set_zero_linger().expect("set");
        }
        drop(stream);
    }
    eventually("no forward is left", async || (live(&site).await == 0).then_some(())).await;
    eventually("the targets are let go", async || (connected.load(Ordering::Relaxed) == 0).then_some(())).await;
    for (side, idle) in [Side::Gateway, Side::Agent].into_iter().zip(idle) {
        eventually(&format!("{side:?} has let go of its descriptors"), async || {
            (descriptors(site.program(side)) <= idle).then_some(())
        })
        .await;
    }
    echoes_nothing(&site).await;
    drop(ssh);
    site.stop().await;
}

/// A new forward is carried; the target says nothing.
async fn echoes_nothing(site: &Site) {
    let mut stream = connect(site.doors[0]).await;
    stream.write_all(b"still served").await.expect("written");
    stream.shutdown().await.expect("ended");
    assert_eq!(read_to_end(stream).await, b"");
}

/// A way to `to` on which every byte is so late, each way.
async fn far_away(to: SocketAddr, delay: Duration) -> SocketAddr {
    listen(move |stream: TcpStream| async move {
        let Ok(onward) = TcpStream::connect(to).await else { return };
        let ((near_reader, near_writer), (far_reader, far_writer)) = (stream.into_split(), onward.into_split());
        tokio::join!(carry(near_reader, far_writer, delay), carry(far_reader, near_writer, delay));
    })
    .await
}

#[tokio::test]
async fn new_keys_under_eight_uploads_from_far_away_lose_nothing() {
    let (listener, address) = target().await;
    let mut site = Site::plan().allow(address).door(address).start().await;
    let way = far_away(site.address, Duration::from_millis(50)).await;
    let port = free_port();
    let mut ssh = site.background("ssh-far", {
        let mut ssh = site.ssh(&[
            "-v",
            "-N",
            "-L",
            &format!("127.0.0.1:{port}:{address}"),
            "-o",
            &format!("Port={}", way.port()),
            "-o",
            &format!("HostKeyAlias=[{}]:{}", site.address.ip(), site.address.port()),
            "-o",
            "RekeyLimit=1M",
        ]);
        ssh.kill_on_drop(true);
        ssh
    });
    ssh.says("Entering interactive session").await;
    let sent = Arc::new(bytes(3 << 20, 5));
    let back = Arc::new(bytes(1 << 20, 6));
    let tasks = Tasks::new();
    let mut all = Vec::new();
    for _ in 0..8 {
        let (near_reader, near_writer) = connect(SocketAddr::from(([127, 0, 0, 1], port))).await.into_split();
        let (stream, _) = within("a forward", listener.accept()).await.expect("accepted");
        let (far_reader, far_writer) = stream.into_split();
        let (sent, back) = (sent.clone(), back.clone());
        all.push(tasks.spawn(async move {
            tokio::join!(
                give(Box::new(near_writer), &sent, "an upload"),
                take(far_reader, &sent, "an upload"),
                give(Box::new(far_writer), &back, "a download"),
                take(near_reader, &back, "a download"),
            );
        }));
    }
    for one in all {
        one.await.expect("ran");
    }
    let exchanges = ssh.log().matches("SSH2_MSG_NEWKEYS received").count();
    assert!(exchanges >= 8, "only {exchanges} new keys: nothing was tested");
    assert!(!ssh.has_ended(), "the session was cut");
    assert_eq!(site.records(Side::Gateway, &json!({"event": "link.up"})).len(), 1);
    drop(ssh);
    let _ = site.program(Side::Gateway);
    site.stop().await;
}

// ---------------------------------------------------------------------------------------------------------------------
// Peers that vanish without a word.

/// A network of its own, until it is dropped.
pub(crate) struct Network(String);

impl Network {
    /// Needs root, as every firewall does.
    pub(crate) fn make(name: &str) -> Self {
        let name = format!("caponier-{}-{name}", std::process::id());
        command("ip", &["netns", "add", &name]);
        command("ip", &["-n", &name, "link", "set", "lo", "up"]);
        Self(name)
    }

    /// For `ip netns`.
    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    /// Makes it the network of all that is started on this thread from now on.
    fn enter(&self) {
        let file = fs::File::open(format!("/run/netns/{}", self.0)).expect("a network namespace");
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&file), Some(kind)).expect("entered");
    }

    /// Does something short in it: a socket that was made there stays of it.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter();
                work()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// What /etc/hosts is for programs that `ip netns exec` starts.
    pub(crate) fn write_hosts(&self, text: &str) {
        let folder = self.folder();
        fs::create_dir_all(&folder).expect("a folder");
        fs::write(folder.join("hosts"), text).expect("written");
    }

    fn folder(&self) -> PathBuf {
        Path::new("/etc/netns").join(&self.0)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        drop(std::process::Command::new("ip").args(["netns", "delete", &self.0]).status());
        drop(fs::remove_dir_all(self.folder()));
    }
}

fn command(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output();
    let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
    assert!(output.status.success(), "{program} {arguments:?}: {output:?} (is this root?)");
    String::from_utf8(output.stdout).expect("text")
}

/// Runs a test on a thread that has a network of its own.
fn in_a_network<F: Future<Output = ()>>(name: &str, test: impl FnOnce() -> F + Send) {
    let outcome = std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let network = Network::make(name);
            network.enter();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
            runtime.block_on(test());
            drop(network);
        });
        thread.join()
    });
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// The port of an agent's connection to a site's gateway.
fn port_of_link(site: &Site) -> u16 {
    let filter = format!("( dport = :{} )", site.address.port());
    let listed = command("ss", &["-Htn", "state", "established", &filter]);
    let mut lines = listed.lines();
    let line = lines.next().expect("a connection");
    assert_eq!(lines.next(), None, "more than one connection: {listed}");
    let address = line.split_whitespace().nth(2).expect("an address");
    address.parse::<SocketAddr>().expect("an address").port()
}

/// What is asked of both sides of a link whose packets are dropped.
const NOTICED: Duration = Duration::from_secs(45);

#[test]
fn a_link_whose_packets_are_dropped_is_noticed_and_made_anew() {
    in_a_network("drop", || async {
        // Packets lost both ways; and on the way from the agent alone, which hears all that its gateway says.
        tokio::join!(black_hole(&["--sport", "--dport"]), black_hole(&["--sport"]), black_hole(&["--dport"]));
    });
}

async fn black_hole(dropped: &[&str]) {
    let target = echo().await;
    let flood = listen(async |mut stream: TcpStream| {
        let chunk = [b'x'; 16_384];
        while stream.write_all(&chunk).await.is_ok() {
            // At a pace that tests beside this one can live with.
            sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    let site = Site::plan().allow(target).allow(flood).door(target).door(flood).start().await;
    // One that is silent, one that sends, and one that is sent to.
    let mut idle = connect(site.doors[0]).await;
    echoes(&mut idle, b"before").await;
    let mut receiving = connect(site.doors[1]).await;
    within("a byte", receiving.read_u8()).await.expect("read");
    let mut sending = connect(site.doors[0]).await;
    echoes(&mut sending, b"before").await;
    let port = port_of_link(&site).to_string();
    for direction in dropped {
        command("iptables", &["-A", "INPUT", "-p", "tcp", direction, &port, "-j", "DROP"]);
    }
    let began = jiff::Timestamp::now();
    let (mut reader, mut writer) = sending.into_split();
    // The system tells of a reset once: to the next write or the next read, after which a read finds the end.
    let told = AtomicBool::new(false);
    let sending = async {
        loop {
            if let Err(error) = writer.write_all(&[7; 1_024]).await {
                return told.store(error.kind() == ErrorKind::ConnectionReset, Ordering::Relaxed);
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    let cut = async |stream: &mut (dyn AsyncRead + Send + Unpin), told: &AtomicBool| {
        let mut buffer = vec![0; 65_536];
        loop {
            match stream.read(&mut buffer).await {
                Ok(0) if told.load(Ordering::Relaxed) => return,
                Ok(0) => panic!("what was cut looks like an orderly end"),
                Ok(_) => {}
                Err(_) => return,
            }
        }
    };
    let nobody = AtomicBool::new(false);
    within("the end of the forwards", async {
        tokio::join!(cut(&mut idle, &nobody), cut(&mut receiving, &nobody), cut(&mut reader, &told), sending);
    })
    .await;
    let noticed = async |side: Side| {
        eventually(&format!("{side:?} has noticed"), async || {
            let ended = site.records(side, &json!({"event": "forward.ended"}));
            (ended.len() == 3).then_some(ended)
        })
        .await
    };
    for side in [Side::Gateway, Side::Agent] {
        let ended = noticed(side).await;
        assert!(ended.iter().all(|it| it["reason"] == "link_lost"), "{dropped:?}, {side:?}: {ended:#?}");
        // By the records' own times: how soon this test gets to see them is another matter on a busy machine.
        for record in &ended {
            let time: jiff::Timestamp = record["time"].as_str().expect("a time").parse().expect("a time");
            let took = time.duration_since(began).unsigned_abs();
            assert!(took < NOTICED, "{dropped:?}, {side:?}: {took:?}");
        }
        let down = site.record(side, json!({"event": "link.down"})).await;
        assert_eq!(down["reason"], "lost", "{dropped:?}, {side:?}: {down}");
    }
    eventually("another link", async || {
        (site.records(Side::Gateway, &json!({"event": "link.up"})).len() == 2).then_some(())
    })
    .await;
    eventually("a new forward", async || {
        let mut stream = connect(site.doors[0]).await;
        stream.write_all(b"after").await.ok()?;
        let mut back = [0; 5];
        stream.read_exact(&mut back).await.ok()?;
        (&back == b"after").then_some(())
    })
    .await;
    for side in [Side::Gateway, Side::Agent] {
        let kinds = ["forward.failed", "forward.abandoned", "peer.violation"];
        let wrong: Vec<_> = kinds.iter().flat_map(|kind| site.records(side, &json!({"event": kind}))).collect();
        assert!(wrong.is_empty(), "{dropped:?}, {side:?}: {wrong:#?}");
    }
    site.stop().await;
}
