//! A longer way: carries connections to another address, and every byte of them later than it came.
//!
//! ```text
//! delay ADDRESS MILLISECONDS      prints the address it listens on, and serves until it is killed
//! ```
//!
//! Each direction of a connection takes half of the added round trip. What is read at once is written so much later,
//! whatever came before or after it: a pipe of a fixed length, without a bandwidth of its own. It stands on the standard
//! library alone. What it holds per direction is bounded by [`BUFFERS`]; when that is full it stops reading, as a long
//! way whose capacity is used up does. `scripts/bench` prints what it carries by itself beside what it measures through it.

use std::error::Error;
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::sync_channel;
use std::time::{Duration, Instant};

/// What one read carries at most.
const BUFFER: usize = 256 * 1024;
/// Buffers of one direction: at full reads 128 MiB, which fills 25 ms at 40 Gbit/s; at small ones 20,000 a second.
const BUFFERS: usize = 512;

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, milliseconds] = &arguments[..] else { return Err("usage: delay ADDRESS MILLISECONDS".into()) };
    let address: SocketAddr = address.parse()?;
    let one_way = Duration::from_secs_f64(milliseconds.parse::<f64>()? / 2e3);
    let listener = TcpListener::bind(("127.0.0.1", 0))?;
    println!("{}", listener.local_addr()?);
    std::thread::scope(|threads| {
        for near in listener.incoming().flatten() {
            threads.spawn(move || carry(&near, address, one_way));
        }
    });
    Ok(())
}

fn carry(near: &TcpStream, address: SocketAddr, one_way: Duration) -> io::Result<()> {
    let far = &TcpStream::connect(address)?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    std::thread::scope(|threads| {
        threads.spawn(move || direction(near, far, one_way));
        direction(far, near, one_way);
    });
    Ok(())
}

/// Carries one direction to its end. A connection that breaks on one side is broken on the other.
fn direction(from: &TcpStream, to: &TcpStream, one_way: Duration) {
    let (sender, arriving) = sync_channel::<(Instant, usize, Vec<u8>)>(BUFFERS);
    let (give_back, free) = sync_channel::<Vec<u8>>(BUFFERS);
    std::thread::scope(move |threads| {
        threads.spawn(move || {
            let written = (|| {
                for (due, length, buffer) in arriving {
                    wait_until(due);
                    (&*to).write_all(&buffer[..length])?;
                    drop(give_back.try_send(buffer));
                }
                to.shutdown(Shutdown::Write)
            })();
            if written.is_err() {
                drop(from.shutdown(Shutdown::Both));
            }
        });
        let mut made = 0;
        loop {
            // Buffers are made as they are needed, and then used again; one whose writer is gone ends the direction.
            let next = if made < BUFFERS { free.try_recv().ok() } else { free.recv().ok() };
            let mut buffer = match next {
                Some(buffer) => buffer,
                None if made < BUFFERS => {
                    made += 1;
                    vec![0; BUFFER]
                }
                None => return,
            };
            match (&*from).read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => {
                    if sender.send((Instant::now() + one_way, length, buffer)).is_err() {
                        return;
                    }
                }
                Err(_) => {
                    drop(to.shutdown(Shutdown::Both));
                    return;
                }
            }
        }
    });
}

#[expect(clippy::disallowed_methods, reason = "to let time pass is all that this program is for")]
fn wait_until(due: Instant) {
    let left = due.saturating_duration_since(Instant::now());
    if !left.is_zero() {
        std::thread::sleep(left);
    }
}
