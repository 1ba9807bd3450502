use super::{Proxy, intake::Entrance};
use crate::tunnel::stream::Stream;
use std::sync::Arc;
pub(super) async fn serve(_: Arc<Proxy>, _: Stream, _: Entrance) {}
