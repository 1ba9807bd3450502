//! The end of a forward's two sides: in order, or so that each peer sees that something broke.

use super::side::{Reader, Writer};
use crate::limits;

/// The two sides of a forward that is over.
#[must_use = "sides that are not left properly look as if the forward had ended well"]
pub struct Remains {
    pub(super) near: Leaving,
    pub(super) far: Leaving,
}

pub(super) struct Leaving {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    /// Whether the forward ended well.
    pub(super) clean: bool,
    /// Whether this side has been told of the end of what it receives, which then was complete.
    pub(super) told: bool,
}

impl Remains {
    /// Closes both sides: in order after a clean end, else so that each peer sees that something broke. May wait a little for
    /// a peer to close first.
    pub async fn leave(self) {
        tokio::join!(self.near.leave(), self.far.leave());
    }
}

impl Leaving {
    async fn leave(self) {
        match (self.reader, self.writer) {
            (Reader::Tcp(reader), Writer::Tcp(writer)) => {
                if !self.clean
                    && !self.told
                    && let Ok(stream) = reader.reunite(writer)
                {
                    // What is incomplete must not look complete: the peer gets a reset. One that was told of the end is left
                    // in peace, since a reset would take from it what it has not read yet. If the socket is beyond even a
                    // reset, there is nobody left to be told.
                    drop(stream.set_zero_linger());
                }
            }
            (Reader::Stream(reader), Writer::Stream(writer)) if !self.clean && !self.told => {
                reader.unsplit(writer).reset();
            }
            (Reader::Channel(mut reader), Writer::Channel(mut writer)) => {
                // The SSH library forgets a channel at once only if the peer closes it first. Whoever opened it does so.
                let patient = self.clean && reader.opened_by_peer();
                if patient && tokio::time::timeout(limits::CLOSE_PATIENCE, reader.closed()).await.is_ok() {
                    writer.peer_closed();
                } else {
                    // First: saying so may take its time, and a channel that is there and not read holds up its session.
                    drop(reader);
                    writer.close().await;
                }
            }
            // A stream or a bridge ends by being dropped, and a side has halves of one kind only.
            _ => {}
        }
    }
}
