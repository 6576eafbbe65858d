//! The first frames of a connection: who is there, and whether it is on the same disk.
//!
//! After TLS each side says which matrix it is in and which fresh nonce it has just written to its block of the disk; the
//! other reads that block on its own device and answers. No other frame passes before both have answered. A node on a
//! clone or a snapshot of the disk does not get in, whatever key it has.

use std::sync::Arc;

use membership::frame::{Channel, HEADER_BYTES, Header, MAX_PAYLOAD_BYTES};
use storage_control::{BoxFuture, Clock, Generation, NodeId};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use uuid::Uuid;

use super::Who;

/// What a node shows on the disk for the time of its handshakes.
pub(crate) type Nonce = [u8; 32];

/// How the handshake reaches the disk. Both may take a while.
pub(crate) trait SameMedium: Send + Sync + 'static {
    /// Shows a fresh nonce in this node's own block of the disk, as long as the answer is kept.
    fn show(&self) -> BoxFuture<Result<Arc<Nonce>, String>>;
    /// Whether the block of that node shows this nonce, as this node's own device has it.
    fn check(&self, node: NodeId, nonce: Nonce) -> BoxFuture<Result<(), String>>;
}

/// Bytes of a hello: kind, matrix, nonce.
const HELLO_BYTES: usize = 1 + 16 + 32;
/// A hello's first byte.
const HELLO: u8 = 1;
/// A verdict's first byte; an empty reason follows for yes, text for no.
const VERDICT: u8 = 2;
/// Longest reason of a refusal in bytes.
const MAX_REASON: usize = 512;

#[derive(Debug, PartialEq, Eq)]
struct Hello {
    matrix: Uuid,
    nonce: Nonce,
}

impl Hello {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![HELLO];
        bytes.extend_from_slice(self.matrix.as_bytes());
        bytes.extend_from_slice(&self.nonce);
        bytes
    }

    fn decode(bytes: &[u8]) -> Result<Hello, String> {
        if bytes.len() != HELLO_BYTES || bytes[0] != HELLO {
            return Err(String::from("its first frame is no hello"));
        }
        let matrix = Uuid::from_bytes(std::array::from_fn(|i| bytes[1 + i]));
        Ok(Hello { matrix, nonce: std::array::from_fn(|i| bytes[17 + i]) })
    }
}

/// Runs the handshake on a connection whose key is known to be `peer`'s. `Err`: why the connection is not to be used.
pub(super) async fn shake<S>(
    stream: &mut S,
    me: Who,
    matrix: Uuid,
    peer: Who,
    medium: &dyn SameMedium,
) -> Result<(), String>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Kept, and so shown, until the peer has answered.
    let shown = medium.show().await.map_err(|why| format!("this node cannot write its own block: {why}"))?;
    write(stream, me, &Hello { matrix, nonce: *shown }.encode()).await?;
    let hello = Hello::decode(&read(stream, peer).await?)?;
    let verdict = if hello.matrix == matrix {
        medium.check(peer.0, hello.nonce).await
    } else {
        Err(format!("it belongs to matrix {}, this is {matrix}", hello.matrix))
    };
    let mut answer = vec![VERDICT];
    if let Err(why) = &verdict {
        answer.extend(why.bytes().take(MAX_REASON));
    }
    write(stream, me, &answer).await?;
    verdict?;
    let theirs = read(stream, peer).await?;
    match theirs.split_first() {
        Some((&VERDICT, [])) => Ok(()),
        Some((&VERDICT, why)) if why.len() <= MAX_REASON => {
            Err(format!("it refuses this node: {}", String::from_utf8_lossy(why)))
        }
        _ => Err(String::from("its second frame is no verdict")),
    }
}

async fn write<S: AsyncWrite + Unpin>(stream: &mut S, me: Who, payload: &[u8]) -> Result<(), String> {
    let header = Header {
        channel: Channel::Handshake,
        length: payload.len() as u32,
        sender: me.0,
        incarnation: me.1,
        generation: Generation(0),
        clock: Clock(0),
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(payload);
    stream.write_all(&bytes).await.map_err(|error| error.to_string())?;
    stream.flush().await.map_err(|error| error.to_string())
}

async fn read<S: AsyncRead + Unpin>(stream: &mut S, peer: Who) -> Result<Vec<u8>, String> {
    let mut bytes = [0; HEADER_BYTES];
    stream.read_exact(&mut bytes).await.map_err(|error| error.to_string())?;
    let header = Header::decode(&bytes).map_err(|error| error.to_string())?;
    if header.channel != Channel::Handshake || header.length as usize > HELLO_BYTES + MAX_REASON {
        return Err(String::from("it speaks before the handshake is over"));
    }
    const _: () = assert!(HELLO_BYTES + MAX_REASON < MAX_PAYLOAD_BYTES);
    if (header.sender, header.incarnation) != peer {
        return Err(format!(
            "it calls itself node {} incarnation {}, its key belongs to node {} incarnation {}",
            header.sender, header.incarnation, peer.0, peer.1
        ));
    }
    let mut payload = vec![0; header.length as usize];
    stream.read_exact(&mut payload).await.map_err(|error| error.to_string())?;
    Ok(payload)
}
