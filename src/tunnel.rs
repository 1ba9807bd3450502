//! What a tunnel is made of, for both its ends.
//!
//! - [`connect`] reaches the other end over TCP, through a proxy if need be, and [`dial`] a gateway by its URL;
//! - [`listen`] waits for the other end, where it is that which dials;
//! - [`outlet`] is the way to the collectors of an audit trail;
//! - [`admit`] decides who may take up a handshake, and tells the peers of a connection apart by their identification;
//! - [`proxied`] reads whose connection a balancer passes on;
//! - [`sniff`] tells SSH, TLS and HTTP apart by the first bytes, and [`http`] reads the head of a request;
//! - [`stream`] is a connection, bare or in layers;
//! - [`websocket`] is one inside of WebSocket messages;
//! - [`transport`] is the byte stream under an SSH session: it can be cut from outside, and tells when the session is gone;
//! - [`ssh`] is the only door to the SSH library: sessions in both roles, channels as streams;
//! - [`wire`] is everything that our two ends say to each other inside of SSH, and [`anchors`] what they say of their trails;
//! - [`splice`] moves the bytes of one forward, and [`bridge`] carries them between two threads;
//! - [`pool`] lends the buffers that what is read goes into.

pub mod admit;
pub mod anchors;
pub mod bridge;
pub mod connect;
pub mod dial;
pub mod http;
pub mod listen;
pub mod outlet;
pub mod pool;
pub mod proxied;
pub mod sniff;
pub mod splice;
pub mod ssh;
pub mod stream;
pub mod transport;
pub mod websocket;
pub mod wire;
