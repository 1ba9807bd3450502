//! Buffers for reading, of one size, that a thread uses over and over.
//!
//! Promised: who waits for bytes needs no buffer while it waits, so that memory goes with what is under way and not with
//! what is open; and a buffer that goes round costs neither an allocation nor the clearing of its memory. A thread keeps
//! [`limits::POOLED`] of them; what exceeds that is freed.
//!
//! What waits on what: nothing here does.

use std::cell::RefCell;
use std::ops::{Deref, DerefMut};

use bytes::Bytes;

use crate::limits;

thread_local! {
    static POOL: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

/// A buffer of [`limits::CHUNK`] bytes, with whatever its last user left in it. Dropped, it goes back to the pool of the
/// thread that drops it.
pub struct Buffer(Box<[u8]>);

impl Buffer {
    /// One from the pool, or a new one.
    #[must_use]
    pub fn take() -> Self {
        let pooled = POOL.try_with(|pool| pool.borrow_mut().pop()).ok().flatten();
        Self(pooled.unwrap_or_else(|| vec![0; limits::CHUNK].into_boxed_slice()))
    }

    /// The first `filled` bytes. Few are copied, so that they do not keep a whole buffer from being used.
    #[must_use]
    pub fn into_bytes(self, filled: usize) -> Bytes {
        if filled <= limits::CHUNK / 16 {
            return Bytes::copy_from_slice(&self[..filled]);
        }
        Bytes::from_owner(self).slice(..filled)
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut self.0);
        // The pool of a thread that is ending is gone already.
        let _ = POOL.try_with(|pool| {
            let mut pool = pool.borrow_mut();
            if pool.len() < limits::POOLED {
                pool.push(buffer);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pooled() -> usize {
        POOL.with(|pool| pool.borrow().len())
    }

    #[test]
    fn a_buffer_goes_round_and_no_more_are_kept_than_the_bound() {
        assert_eq!(pooled(), 0);
        let first = Buffer::take();
        let place = first.as_ptr();
        let bytes = first.into_bytes(limits::CHUNK);
        let clone = bytes.clone();
        drop(bytes);
        assert_eq!(pooled(), 0, "a clone still needs it");
        drop(clone);
        assert_eq!(pooled(), 1);
        assert_eq!(Buffer::take().as_ptr(), place);
        let many: Vec<Buffer> = (0..limits::POOLED + 10).map(|_| Buffer::take()).collect();
        assert_eq!(pooled(), 0);
        drop(many);
        assert_eq!(pooled(), limits::POOLED);
    }

    #[test]
    fn few_bytes_keep_no_buffer() {
        let mut buffer = Buffer::take();
        buffer[..3].copy_from_slice(b"abc");
        let before = pooled();
        let bytes = buffer.into_bytes(3);
        assert_eq!(pooled(), before + 1);
        assert_eq!(bytes, &b"abc"[..]);
        assert!(Buffer::take().into_bytes(0).is_empty());
    }
}
