//! What goes over a connection, recorded on the way.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};

use caponier::task::Tasks;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// All bytes of one direction of one connection.
type Record = Arc<Mutex<Vec<u8>>>;

/// A relay that hands on all connections of a listener, and keeps every byte. It ends with the test.
pub(crate) struct Wire {
    /// Where it listens.
    pub(crate) address: SocketAddr,
    records: Arc<Mutex<Vec<Record>>>,
    _tasks: Tasks,
}

impl Wire {
    /// Hands on what comes to `listener`, which may be of another network, to `onward`.
    pub(crate) fn relay(listener: std::net::TcpListener, onward: SocketAddr) -> Self {
        listener.set_nonblocking(true).expect("not blocking");
        let listener = TcpListener::from_std(listener).expect("a listener");
        let address = listener.local_addr().expect("its address");
        let (records, tasks) = (Arc::<Mutex<Vec<Record>>>::default(), Tasks::new());
        let (kept, inner) = (records.clone(), tasks.clone());
        tasks.spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let [there, back] = [(); 2].map(|()| Record::default());
                kept.lock().unwrap_or_else(PoisonError::into_inner).extend([there.clone(), back.clone()]);
                inner.spawn(async move {
                    let Ok(far) = TcpStream::connect(onward).await else { return };
                    let ((near_reader, near_writer), (far_reader, far_writer)) = (near.into_split(), far.into_split());
                    tokio::join!(copy(near_reader, far_writer, &there), copy(far_reader, near_writer, &back));
                });
            }
        });
        Self { address, records, _tasks: tasks }
    }

    /// Like [`Self::relay`], at a loopback address of this network.
    pub(crate) fn before(onward: SocketAddr) -> Self {
        Self::relay(std::net::TcpListener::bind("127.0.0.1:0").expect("a listener"), onward)
    }

    /// Whether these bytes were ever seen, whole and in one direction.
    pub(crate) fn shows(&self, wanted: &str) -> bool {
        self.any(|record| record.windows(wanted.len()).any(|window| window == wanted.as_bytes()))
    }

    /// Whether more than that many bytes went over one connection in one direction.
    pub(crate) fn carried(&self, count: usize) -> bool {
        self.any(|record| record.len() > count)
    }

    fn any(&self, holds: impl Fn(&[u8]) -> bool) -> bool {
        let records = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.iter().any(|record| holds(&record.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

/// Recorded before it is handed on: whoever sees an effect of bytes finds them in the record.
async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, record: &Record) {
    let mut buffer = vec![0; 16 * 1024];
    while let Ok(count @ 1..) = from.read(&mut buffer).await {
        record.lock().unwrap_or_else(PoisonError::into_inner).extend(&buffer[..count]);
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
    drop(to.shutdown().await);
}
