//! One connection after its handshake: a task that reads frames, a task that writes what waits.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use membership::frame::{Channel, HEADER_BYTES, Header};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};

use super::queue::Queue;
use super::{Loss, Shared, Who};

/// Read buffer in bytes: many small frames with one system call.
const READ_BUFFER_BYTES: usize = 64 << 10;
/// A write buffer that has grown beyond this is given back.
const KEEP_BUFFER_BYTES: usize = 1 << 20;

/// Reads frames until the connection ends; says how it ended.
pub(super) async fn read_frames<S: AsyncRead>(shared: &Shared, peer: Who, stream: ReadHalf<S>) -> Loss {
    let mut stream = BufReader::with_capacity(READ_BUFFER_BYTES, stream);
    let mut bytes = [0; HEADER_BYTES];
    loop {
        if let Err(error) = stream.read_exact(&mut bytes).await {
            return Loss::of(&error);
        }
        let header = match Header::decode(&bytes) {
            Ok(header) => header,
            Err(error) => return Loss::Garbage(error.to_string()),
        };
        if (header.sender, header.incarnation) != peer {
            return Loss::Garbage(format!("a frame in the name of node {}", header.sender));
        }
        if header.channel == Channel::Handshake {
            return Loss::Garbage(String::from("a second handshake"));
        }
        if let Err(error) = shared.clock.receive(header.clock) {
            return Loss::Garbage(error.to_string());
        }
        // At most 1 MiB, and only for a peer that has proven its key.
        let mut payload = vec![0; header.length as usize];
        if let Err(error) = stream.read_exact(&mut payload).await {
            return Loss::of(&error);
        }
        shared.stats.frames_received.fetch_add(1, Ordering::Relaxed);
        if let Err(why) = shared.handler.frame(peer, header, payload) {
            return Loss::Garbage(why);
        }
    }
}

/// Writes what waits until the connection ends; says how it ended.
pub(super) async fn write_frames<S: AsyncWrite>(
    shared: &Shared,
    queue: &Arc<Queue>,
    mut stream: WriteHalf<S>,
) -> Loss {
    let mut buffer = Vec::new();
    loop {
        let Some(frames) = queue.take(&mut buffer).await else {
            return Loss::Closed(String::from("too much waits for this peer"));
        };
        let written = async {
            stream.write_all(&buffer).await?;
            stream.flush().await
        };
        if let Err(error) = written.await {
            return Loss::of(&error);
        }
        shared.stats.frames_sent.fetch_add(frames, Ordering::Relaxed);
        shared.stats.batches_sent.fetch_add(1, Ordering::Relaxed);
        buffer.clear();
        if buffer.capacity() > KEEP_BUFFER_BYTES {
            buffer = Vec::new();
        }
    }
}

impl Loss {
    fn of(error: &io::Error) -> Loss {
        match error.kind() {
            io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                Loss::Timeout
            }
            io::ErrorKind::InvalidData => Loss::Garbage(error.to_string()),
            _ => Loss::Reset,
        }
    }
}
