//! The load that `scripts/bench` puts on a tunnel, and the target at its far end.
//!
//! It stands on the standard library alone, with blocking sockets and a thread per connection, so that it is never
//! what is measured. One process is the target; others connect to it through whatever is measured:
//!
//! ```text
//! load serve                          prints the address it listens on, and serves until it is killed
//! load to-target ADDRESS BYTES        prints the seconds from the first byte to the target's receipt of the last
//! load from-target ADDRESS BYTES      prints the seconds from the request to the last byte
//! load round-trips ADDRESS COUNT      prints the 50th and the 99th percentile in microseconds, one after another
//! load forwards ADDRESS COUNT WORKERS prints connections per second, each with one request and one reply
//! ```
//!
//! A connection begins with one byte that says what it is for. The two bulk kinds then carry the number of bytes, and
//! a byte of the target's before the clock starts: what opening costs is measured by `forwards`, not here.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// The client sends the announced bytes; the target answers with one when it has them all.
const TO_TARGET: u8 = b'>';
/// The target sends the announced bytes; the client answers with one when it has them all.
const FROM_TARGET: u8 = b'<';
/// The target returns each request, until the client closes.
const ROUND_TRIPS: u8 = b'=';

/// What a small request and its reply weigh: about a short SQL statement.
const REQUEST: usize = 64;
/// Large enough that system calls do not decide the result.
const CHUNK: usize = 256 * 1024;
/// A tunnel that moves nothing for so long has failed, and the benchmark with it.
const PATIENCE: Duration = Duration::from_secs(30);

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["serve"] => serve()?,
        ["to-target", address, bytes] => println!("{:.6}", to_target(address.parse()?, bytes.parse()?)?.as_secs_f64()),
        ["from-target", address, bytes] => {
            println!("{:.6}", from_target(address.parse()?, bytes.parse()?)?.as_secs_f64());
        }
        ["round-trips", address, count] => {
            let (median, tail) = round_trips(address.parse()?, count.parse()?)?;
            println!("{:.1} {:.1}", median.as_secs_f64() * 1e6, tail.as_secs_f64() * 1e6);
        }
        ["forwards", address, count, workers] => {
            println!("{:.1}", forwards(address.parse()?, count.parse()?, workers.parse()?)?);
        }
        _ => {
            return Err(
                "usage: load serve | to-target | from-target | round-trips | forwards; see scripts/bench".into()
            );
        }
    }
    Ok(())
}

// --- the target ---

fn serve() -> io::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    println!("{}", listener.local_addr()?);
    std::thread::scope(|threads| {
        for stream in listener.incoming().flatten() {
            // What goes wrong with one connection shows at its other end.
            threads.spawn(move || answer(stream));
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
        _ => {
            let mut request = [0; REQUEST];
            loop {
                stream.read_exact(&mut request)?;
                stream.write_all(&request)?;
            }
        }
    }
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
fn announce(address: SocketAddr, kind: u8, bytes: u64) -> io::Result<TcpStream> {
    let mut stream = connect(address)?;
    let mut head = vec![kind];
    head.extend(bytes.to_be_bytes());
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

fn round_trips(address: SocketAddr, count: usize) -> io::Result<(Duration, Duration)> {
    let mut stream = connect(address)?;
    stream.write_all(&[ROUND_TRIPS])?;
    let mut request = [7; REQUEST];
    let mut once = || {
        let began = Instant::now();
        stream.write_all(&request)?;
        stream.read_exact(&mut request)?;
        Ok(began.elapsed())
    };
    // The first ones also open the forward, and are not counted.
    (0..10).try_for_each(|_| once().map(drop))?;
    let mut times = (0..count.max(1)).map(|_| once()).collect::<io::Result<Vec<_>>>()?;
    times.sort_unstable();
    Ok((times[(times.len() - 1) / 2], times[(times.len() - 1) * 99 / 100]))
}

fn forwards(address: SocketAddr, count: u64, workers: usize) -> io::Result<f64> {
    let taken = AtomicU64::new(0);
    let worker = || {
        while taken.fetch_add(1, Ordering::Relaxed) < count {
            let mut stream = connect(address)?;
            stream.write_all(&[&[ROUND_TRIPS][..], &[7; REQUEST]].concat())?;
            stream.read_exact(&mut [0; REQUEST])?;
        }
        Ok(())
    };
    let began = Instant::now();
    std::thread::scope(|threads| {
        let running: Vec<_> = (0..workers).map(|_| threads.spawn(worker)).collect();
        running
            .into_iter()
            .try_for_each(|each| each.join().unwrap_or_else(|_| Err(io::Error::other("a worker panicked"))))
    })?;
    Ok(count as f64 / began.elapsed().as_secs_f64())
}

// --- both ---

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
