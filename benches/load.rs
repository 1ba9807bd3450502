//! The load that `scripts/bench` and `scripts/soak` put on a tunnel, and the target at its far end.
//!
//! It stands on the standard library alone, with blocking sockets and a thread per connection, so that it is never
//! what is measured. One process is the target; others connect to it through whatever is measured:
//!
//! ```text
//! load serve [ADDRESS]                      prints the address it listens on, and serves until it is killed
//! load to-target ADDRESS BYTES              prints the seconds from the first byte to the target's receipt of the last
//! load from-target ADDRESS BYTES            prints the seconds from the request to the last byte
//! load together ADDRESSES STREAMS SECONDS to|from
//!                                           prints the MB/s of so many streams at once, spread over the addresses
//! load stall ADDRESS reader|target SECONDS  holds a stream whose client, or whose target, never reads; prints `stalled`
//!                                           once that is so. The target hangs up after so long
//! load round-trips ADDRESS COUNT            prints the 50th and the 99th percentile in microseconds, one after another
//! load pace ADDRESS SECONDS [FILE]          the same, of one request every two milliseconds, and the slowest; makes
//!                                           FILE.begun once the forward is open, and ends early when FILE is there
//! load forwards ADDRESS COUNT WORKERS       prints connections per second, each with one request and one reply
//! load forwards-for ADDRESS SECONDS WORKERS the same, for so long
//! load greet                                prints the address it listens on, and says a byte to whoever connects
//! load first-byte ADDRESS COUNT             prints the median of the milliseconds from a new connection to that byte
//! load probe ADDRESS SECONDS                new connections one after another: prints how many, how many failed, and the
//!                                           slowest in milliseconds
//! load hold ADDRESS STREAMS                 streams with a request every 100 ms; prints the time at which each ends
//! load echo ADDRESS SECONDS STREAMS         bytes both ways as fast as they go, each compared; fails if a second passes
//!                                           in which a stream moves nothing; prints the MB/s each way
//! ```
//!
//! A connection begins with one byte that says what it is for. The bulk kinds then carry a number, and a byte of the
//! target's before the clock starts: what opening costs is measured by `forwards`, not here.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// The client sends the announced bytes; the target answers with one when it has them all.
const TO_TARGET: u8 = b'>';
/// The target sends the announced bytes; the client answers with one when it has them all.
const FROM_TARGET: u8 = b'<';
/// The target returns each request, until the client closes.
const ROUND_TRIPS: u8 = b'=';
/// The target sends until it gets a byte, then ends its stream.
const FLOOD: u8 = b'f';
/// The target takes all that comes, and in the end says how much it was.
const SINK: u8 = b's';
/// The target never reads, for the announced number of seconds.
const DEAF: u8 = b'd';
/// The target returns every byte, until the client ends its stream.
const ECHO: u8 = b'e';

/// What a small request and its reply weigh: about a short SQL statement.
const REQUEST: usize = 64;
/// Large enough that system calls do not decide the result.
const CHUNK: usize = 256 * 1024;
/// A tunnel that moves nothing for so long has failed, and the benchmark with it.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two small requests of a paced client: seldom enough to add no load of its own.
const PACE: Duration = Duration::from_millis(2);
/// Between two requests of a stream that is only held.
const HOLD: Duration = Duration::from_millis(100);
/// What a stream may take to fill every buffer on its way once nobody reads at its end.
const FILL: Duration = Duration::from_millis(1_000);
/// A saturated stream that moves nothing for so long stands still.
const STANDSTILL: Duration = Duration::from_secs(1);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => serve("127.0.0.1:0".parse()?)?,
        ["serve", address] => serve(address.parse()?)?,
        ["to-target", address, bytes] => println!("{:.6}", to_target(address.parse()?, bytes.parse()?)?.as_secs_f64()),
        ["from-target", address, bytes] => {
            println!("{:.6}", from_target(address.parse()?, bytes.parse()?)?.as_secs_f64());
        }
        ["together", addresses, streams, seconds, way] => {
            let addresses = addresses.split(',').map(str::parse).collect::<Result<Vec<SocketAddr>, _>>()?;
            let work = match way {
                "to" => stream_to as fn(SocketAddr, &Barrier, Duration) -> io::Result<(u64, Duration)>,
                "from" => stream_from,
                _ => return Err("the way is to or from".into()),
            };
            println!("{:.1}", together(&addresses, streams.parse()?, duration(seconds)?, work)? / 1e6);
        }
        ["stall", address, "reader", seconds] => stalled_reader(address.parse()?, duration(seconds)?)?,
        ["stall", address, "target", seconds] => stalled_target(address.parse()?, seconds.parse()?)?,
        ["round-trips", address, count] => {
            let times = round_trips(address.parse()?, count.parse()?)?;
            println!("{:.1} {:.1}", micros(percentile(&times, 50)), micros(percentile(&times, 99)));
        }
        ["pace", address, seconds, ref file @ ..] => {
            let times = pace(address.parse()?, duration(seconds)?, file.first().map(Path::new))?;
            let [median, tail, slowest] = [50, 99, 100].map(|percent| micros(percentile(&times, percent)));
            println!("{median:.1} {tail:.1} {slowest:.1}");
        }
        ["forwards", address, count, workers] => {
            println!("{:.1}", forwards(address.parse()?, count.parse()?, None, workers.parse()?)?);
        }
        ["forwards-for", address, seconds, workers] => {
            println!("{:.1}", forwards(address.parse()?, u64::MAX, Some(duration(seconds)?), workers.parse()?)?);
        }
        ["greet"] => greet()?,
        ["first-byte", address, count] => {
            println!("{:.3}", micros(percentile(&first_bytes(address.parse()?, count.parse()?)?, 50)) / 1e3);
        }
        ["probe", address, seconds] => {
            let (count, failed, slowest) = probe(address.parse()?, duration(seconds)?);
            println!("{count} {failed} {:.1}", slowest.as_secs_f64() * 1e3);
        }
        ["hold", address, streams] => hold(address.parse()?, streams.parse()?)?,
        ["echo", address, seconds, streams] => {
            println!("{:.1}", echo(address.parse()?, duration(seconds)?, streams.parse()?)? / 1e6);
        }
        _ => return Err("usage: see the head of benches/load.rs".into()),
    }
    Ok(())
}

fn duration(seconds: &str) -> Result<Duration, std::num::ParseFloatError> {
    seconds.parse().map(Duration::from_secs_f64)
}

fn micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

#[expect(clippy::disallowed_methods, reason = "a pause between requests is part of the load, not a wait for an event")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

// --- the target ---

fn serve(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    println!("{}", listener.local_addr()?);
    std::thread::scope(|threads| {
        for stream in listener.incoming().flatten() {
            // What goes wrong with one connection shows at its other end.
            threads.spawn(move || answer(stream));
        }
    });
    Ok(())
}

/// A target that speaks first, as many servers do.
fn greet() -> io::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    std::thread::scope(|threads| {
        for mut stream in listener.incoming().flatten() {
            threads.spawn(move || {
                stream.write_all(b"!")?;
                stream.read(&mut [0])
            });
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    match byte[0] {
        TO_TARGET => {
            let bytes = read_count(&mut stream)?;
            stream.write_all(b"!")?;
            receive(&mut stream, bytes)?;
            stream.write_all(b".")
        }
        FROM_TARGET => {
            let bytes = read_count(&mut stream)?;
            stream.write_all(b"!")?;
            send(&mut stream, bytes)?;
            stream.read_exact(&mut byte)
        }
        FLOOD => {
            read_count(&mut stream)?;
            stream.write_all(b"!")?;
            flood(&stream)
        }
        SINK => {
            read_count(&mut stream)?;
            stream.write_all(b"!")?;
            let mut chunk = vec![0; CHUNK];
            let mut bytes = 0_u64;
            loop {
                match stream.read(&mut chunk)? {
                    0 => break,
                    read => bytes += read as u64,
                }
            }
            stream.write_all(&bytes.to_be_bytes())
        }
        DEAF => {
            let seconds = read_count(&mut stream)?;
            stream.write_all(b"!")?;
            pause(Duration::from_secs(seconds));
            Ok(())
        }
        ECHO => {
            read_count(&mut stream)?;
            stream.write_all(b"!")?;
            let mut chunk = vec![0; CHUNK];
            loop {
                match stream.read(&mut chunk)? {
                    0 => return stream.shutdown(Shutdown::Write),
                    read => stream.write_all(&chunk[..read])?,
                }
            }
        }
        _ => {
            let mut request = [0; REQUEST];
            loop {
                stream.read_exact(&mut request)?;
                stream.write_all(&request)?;
            }
        }
    }
}

/// Sends until the other end says anything.
fn flood(stream: &TcpStream) -> io::Result<()> {
    let told = AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            drop((&*stream).read(&mut [0]));
            told.store(true, Ordering::Relaxed);
        });
        let chunk = vec![b'x'; CHUNK];
        let mut sent = Ok(());
        while sent.is_ok() && !told.load(Ordering::Relaxed) {
            sent = (&*stream).write_all(&chunk);
        }
        // Without an end of the sending, who waits for that byte would wait for ever.
        stream.shutdown(if sent.is_ok() { Shutdown::Write } else { Shutdown::Both })
    })
}

fn read_count(stream: &mut TcpStream) -> io::Result<u64> {
    let mut count = [0; 8];
    stream.read_exact(&mut count)?;
    Ok(u64::from_be_bytes(count))
}

// --- the load ---

fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// A bulk connection whose target has said that it is there.
fn announce(address: SocketAddr, kind: u8, count: u64) -> io::Result<TcpStream> {
    let mut stream = connect(address)?;
    let mut head = vec![kind];
    head.extend(count.to_be_bytes());
    stream.write_all(&head)?;
    stream.read_exact(&mut [0])?;
    Ok(stream)
}

fn to_target(address: SocketAddr, bytes: u64) -> io::Result<Duration> {
    let mut stream = announce(address, TO_TARGET, bytes)?;
    let began = Instant::now();
    send(&mut stream, bytes)?;
    stream.read_exact(&mut [0])?;
    Ok(began.elapsed())
}

fn from_target(address: SocketAddr, bytes: u64) -> io::Result<Duration> {
    let mut stream = announce(address, FROM_TARGET, bytes)?;
    let began = Instant::now();
    receive(&mut stream, bytes)?;
    let elapsed = began.elapsed();
    stream.write_all(b".")?;
    Ok(elapsed)
}

/// Bytes per second of all streams. Each has a connection of its own, and all begin together.
fn together(
    addresses: &[SocketAddr],
    streams: usize,
    time: Duration,
    work: fn(SocketAddr, &Barrier, Duration) -> io::Result<(u64, Duration)>,
) -> io::Result<f64> {
    let start = Barrier::new(streams);
    let done = std::thread::scope(|threads| {
        let start = &start;
        let running: Vec<_> = addresses
            .iter()
            .cycle()
            .take(streams)
            .map(|address| threads.spawn(move || work(*address, start, time)))
            .collect();
        running.into_iter().map(joined).collect::<io::Result<Vec<_>>>()
    })?;
    let bytes: u64 = done.iter().map(|(bytes, _)| bytes).sum();
    let time = done.iter().map(|(_, time)| *time).max().unwrap_or_default();
    Ok(bytes as f64 / time.as_secs_f64())
}

/// Counts what has come when the time is over, and then lets the stream run dry, so that it leaves nothing behind that
/// would disturb the next.
fn stream_from(address: SocketAddr, start: &Barrier, time: Duration) -> io::Result<(u64, Duration)> {
    let opened = announce(address, FLOOD, 0);
    start.wait();
    let mut stream = opened?;
    let began = Instant::now();
    let mut chunk = vec![0; CHUNK];
    let mut bytes = 0;
    while began.elapsed() < time {
        match stream.read(&mut chunk)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => bytes += read as u64,
        }
    }
    let elapsed = began.elapsed();
    stream.write_all(b".")?;
    while stream.read(&mut chunk)? > 0 {}
    Ok((bytes, elapsed))
}

/// Counts what the target has got, until it has it all.
fn stream_to(address: SocketAddr, start: &Barrier, time: Duration) -> io::Result<(u64, Duration)> {
    let opened = announce(address, SINK, 0);
    start.wait();
    let mut stream = opened?;
    let began = Instant::now();
    let chunk = vec![b'x'; CHUNK];
    let mut sent = 0;
    while began.elapsed() < time {
        stream.write_all(&chunk)?;
        sent += chunk.len() as u64;
    }
    stream.shutdown(Shutdown::Write)?;
    let bytes = read_count(&mut stream)?;
    if bytes != sent {
        return Err(io::Error::other(format!("sent {sent} bytes, and {bytes} arrived")));
    }
    Ok((bytes, began.elapsed()))
}

/// Asks for a flood and never reads it.
fn stalled_reader(address: SocketAddr, time: Duration) -> io::Result<()> {
    let stream = announce(address, FLOOD, 0)?;
    pause(FILL);
    println!("stalled");
    pause(time);
    drop(stream);
    Ok(())
}

/// Sends to a target that never reads, for as long as anything is taken.
fn stalled_target(address: SocketAddr, seconds: u64) -> io::Result<()> {
    let mut stream = announce(address, DEAF, seconds)?;
    stream.set_write_timeout(Some(FILL))?;
    let chunk = vec![b'x'; CHUNK];
    let mut told = false;
    loop {
        match stream.write(&chunk) {
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                if !told {
                    println!("stalled");
                    told = true;
                }
            }
            // The target has hung up; or the door has given it up, which it may after a while.
            Err(error) if told => {
                println!("ended: {error}");
                return Ok(());
            }
            Err(error) => return Err(error),
        }
    }
}

/// A connection for small requests, with the first ones behind it: they also open the forward.
fn requests(address: SocketAddr) -> io::Result<TcpStream> {
    let mut stream = connect(address)?;
    stream.write_all(&[ROUND_TRIPS])?;
    for _ in 0..10 {
        request(&mut stream)?;
    }
    Ok(stream)
}

fn request(stream: &mut TcpStream) -> io::Result<Duration> {
    let mut request = [7; REQUEST];
    let began = Instant::now();
    stream.write_all(&request)?;
    stream.read_exact(&mut request)?;
    Ok(began.elapsed())
}

/// The times of so many requests, in order.
fn round_trips(address: SocketAddr, count: usize) -> io::Result<Vec<Duration>> {
    let mut stream = requests(address)?;
    let mut times = (0..count.max(1)).map(|_| request(&mut stream)).collect::<io::Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok(times)
}

fn pace(address: SocketAddr, time: Duration, end: Option<&Path>) -> io::Result<Vec<Duration>> {
    let mut stream = requests(address)?;
    if let Some(end) = end {
        std::fs::write(end.with_extension("begun"), "")?;
    }
    let began = Instant::now();
    let mut times = vec![request(&mut stream)?];
    while began.elapsed() < time && !end.is_some_and(Path::exists) {
        pause(PACE);
        times.push(request(&mut stream)?);
    }
    times.sort_unstable();
    Ok(times)
}

fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted[(sorted.len() - 1) * percent / 100]
}

/// One forward: opened, one request, one reply, closed.
fn forward(address: SocketAddr) -> io::Result<()> {
    let mut stream = connect(address)?;
    stream.write_all(&[&[ROUND_TRIPS][..], &[7; REQUEST]].concat())?;
    stream.read_exact(&mut [0; REQUEST])
}

fn forwards(address: SocketAddr, count: u64, time: Option<Duration>, workers: usize) -> io::Result<f64> {
    let (taken, done) = (AtomicU64::new(0), AtomicU64::new(0));
    let began = Instant::now();
    let worker = || {
        while taken.fetch_add(1, Ordering::Relaxed) < count && time.is_none_or(|time| began.elapsed() < time) {
            forward(address)?;
            done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    std::thread::scope(|threads| {
        let running: Vec<_> = (0..workers).map(|_| threads.spawn(worker)).collect();
        running.into_iter().try_for_each(joined)
    })?;
    Ok(done.into_inner() as f64 / began.elapsed().as_secs_f64())
}

/// What passes between a new connection and the target's first byte on it, sorted.
fn first_bytes(address: SocketAddr, count: usize) -> io::Result<Vec<Duration>> {
    let mut times = Vec::new();
    for _ in 0..count {
        let began = Instant::now();
        let mut stream = connect(address)?;
        stream.read_exact(&mut [0])?;
        times.push(began.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

fn probe(address: SocketAddr, time: Duration) -> (u64, u64, Duration) {
    let (mut count, mut failed, mut slowest) = (0, 0, Duration::ZERO);
    let began = Instant::now();
    while began.elapsed() < time {
        let opened = Instant::now();
        count += 1;
        match forward(address) {
            Ok(()) => slowest = slowest.max(opened.elapsed()),
            Err(error) => {
                eprintln!("after {:.3} s: {error}", began.elapsed().as_secs_f64());
                failed += 1;
            }
        }
        pause(PACE);
    }
    (count, failed, slowest)
}

/// Prints `open` once all streams are, then `ended NUMBER MILLISECONDS`, in Unix time, as each ends.
fn hold(address: SocketAddr, streams: usize) -> io::Result<()> {
    let held = (0..streams).map(|_| requests(address)).collect::<io::Result<Vec<_>>>()?;
    // Whether a stream ends is the tunnel's affair here, however long a reply takes.
    held.iter().try_for_each(|stream| stream.set_read_timeout(None))?;
    println!("open");
    std::thread::scope(|threads| {
        for (number, mut stream) in held.into_iter().enumerate() {
            threads.spawn(move || {
                while request(&mut stream).is_ok() {
                    pause(HOLD);
                }
                let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
                println!("ended {number} {}", now.as_millis());
            });
        }
    });
    Ok(())
}

/// Bytes per second each way. Every stream is a sequence of its own, so that bytes of another are noticed, too.
fn echo(address: SocketAddr, time: Duration, streams: u64) -> io::Result<f64> {
    let began = Instant::now();
    let bytes = std::thread::scope(|threads| {
        let running: Vec<_> = (1..=streams).map(|seed| threads.spawn(move || echoed(address, time, seed))).collect();
        running.into_iter().map(joined).sum::<io::Result<u64>>()
    })?;
    Ok(bytes as f64 / began.elapsed().as_secs_f64())
}

fn echoed(address: SocketAddr, time: Duration, seed: u64) -> io::Result<u64> {
    let stream = &announce(address, ECHO, 0)?;
    stream.set_read_timeout(Some(STANDSTILL))?;
    stream.set_write_timeout(Some(STANDSTILL))?;
    let sender = move || -> io::Result<u64> {
        let began = Instant::now();
        let mut chunk = vec![0; CHUNK];
        let mut sent = 0;
        while began.elapsed() < time {
            fill(&mut chunk, sent, seed);
            (&*stream).write_all(&chunk)?;
            sent += CHUNK as u64;
        }
        stream.shutdown(Shutdown::Write)?;
        Ok(sent)
    };
    std::thread::scope(|threads| {
        let sender = threads.spawn(sender);
        let (mut chunk, mut expected) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut got = 0_u64;
        let compared = loop {
            // Whole chunks are compared, and each must come within a second of the one before at the latest.
            let mut filled = 0;
            while filled < CHUNK {
                match (&*stream).read(&mut chunk[filled..]) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) => {
                        drop(stream.shutdown(Shutdown::Both));
                        return Err(io::Error::other(format!("nothing came back for a second: {error}")));
                    }
                }
            }
            if filled == 0 {
                break Ok(got);
            }
            fill(&mut expected, got, seed);
            if chunk[..filled] != expected[..filled] {
                drop(stream.shutdown(Shutdown::Both));
                break Err(io::Error::other(format!("what came back differs after {got} bytes")));
            }
            got += filled as u64;
        }?;
        let sent = joined(sender)?;
        if sent != compared {
            return Err(io::Error::other(format!("sent {sent} bytes, and {compared} came back")));
        }
        Ok(compared)
    })
}

/// The bytes of a sequence from `at` on; both are multiples of eight.
fn fill(chunk: &mut [u8], at: u64, seed: u64) {
    for (word, number) in chunk.chunks_exact_mut(8).zip(at / 8..) {
        word.copy_from_slice(&(number ^ (seed << 56)).wrapping_mul(0x9E37_79B9_7F4A_7C15).to_le_bytes());
    }
}

// --- both ---

fn joined<T>(thread: std::thread::ScopedJoinHandle<'_, io::Result<T>>) -> io::Result<T> {
    thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
}

fn send(stream: &mut TcpStream, mut bytes: u64) -> io::Result<()> {
    let chunk = vec![b'x'; CHUNK];
    while bytes > 0 {
        let next = bytes.min(CHUNK as u64);
        stream.write_all(&chunk[..next as usize])?;
        bytes -= next;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, mut bytes: u64) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    while bytes > 0 {
        let next = bytes.min(CHUNK as u64) as usize;
        let read = stream.read(&mut chunk[..next])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        bytes -= read as u64;
    }
    Ok(())
}
