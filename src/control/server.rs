//! The daemon's side of the control socket.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use storage_control::BoxFuture;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::{MAX_REQUEST, Reply, Request};

/// Connections served at once; more wait in the listener's queue.
const MAX_CONNECTIONS: usize = 32;
/// A client that starts a frame must finish it within this time.
const FRAME_WITHIN: Duration = Duration::from_secs(10);

/// What answers requests.
pub(crate) trait Handler: Send + Sync + 'static {
    fn handle(&self, request: Request) -> BoxFuture<Reply>;
}

/// The running service.
pub(crate) struct Served {
    in_hand: Arc<Semaphore>,
}

impl Served {
    /// Waits until every request that was taken in hand is answered, at most for `limit`.
    pub(crate) async fn drain(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.in_hand.acquire_many(MAX_CONNECTIONS as u32)).await;
    }
}

/// Listens at `socket`, replacing what a dead daemon left there; the caller holds the run directory's lock.
/// Serves as long as the tokio runtime lives.
pub(crate) fn serve(socket: &Path, handler: Arc<dyn Handler>) -> io::Result<Served> {
    match std::fs::remove_file(socket) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    let listener = UnixListener::bind(socket)?;
    let in_hand = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    tokio::spawn(accept(listener, handler, Arc::clone(&in_hand)));
    Ok(Served { in_hand })
}

async fn accept(listener: UnixListener, handler: Arc<dyn Handler>, in_hand: Arc<Semaphore>) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let (handler, in_hand) = (Arc::clone(&handler), Arc::clone(&in_hand));
                tokio::spawn(async move {
                    if let Err(e) = converse(stream, &*handler, &in_hand).await {
                        tracing::debug!("control connection ended: {e}");
                    }
                    drop(slot);
                });
            }
            Err(e) => {
                tracing::warn!("control socket: {e}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Answers one request after the other until the client goes or says something that is no request.
async fn converse(mut stream: UnixStream, handler: &dyn Handler, in_hand: &Semaphore) -> io::Result<()> {
    let uid = stream.peer_cred()?.uid();
    // SAFETY: geteuid takes nothing and cannot fail.
    if uid != 0 && uid != unsafe { libc::geteuid() } {
        return answer(&mut stream, &refused("only root and the daemon's own user may ask")).await;
    }
    loop {
        let mut length = [0; 4];
        match stream.read_exact(&mut length).await {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            Err(e) => return Err(e),
        }
        let length = u32::from_le_bytes(length);
        if length > MAX_REQUEST {
            let why = format!("a request of {length} bytes is too long: the limit is {MAX_REQUEST}");
            return answer(&mut stream, &refused(&why)).await;
        }
        let mut body = vec![0; length as usize];
        match tokio::time::timeout(FRAME_WITHIN, stream.read_exact(&mut body)).await {
            Ok(read) => drop(read?),
            Err(_) => {
                return answer(&mut stream, &refused("the request did not arrive in full in time")).await;
            }
        }
        let _in_hand = in_hand.acquire().await;
        match serde_json::from_slice(&body) {
            Ok(request) => answer(&mut stream, &handler.handle(request).await).await?,
            Err(e) => {
                return answer(&mut stream, &refused(&format!("not a request of this version: {e}"))).await;
            }
        }
    }
}

fn refused(why: &str) -> Reply {
    Reply::Refused(why.to_string())
}

async fn answer(stream: &mut UnixStream, reply: &Reply) -> io::Result<()> {
    let body = serde_json::to_vec(reply)?;
    let length = u32::try_from(body.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_le_bytes()).await?;
    stream.write_all(&body).await
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::super::{Client, ClientError};
    use super::*;

    struct Echo;

    impl Handler for Echo {
        fn handle(&self, request: Request) -> BoxFuture<Reply> {
            Box::pin(async move {
                match request {
                    Request::Status {} => Reply::Done(serde_json::json!("fine")),
                    _ => Reply::Refused("no".into()),
                }
            })
        }
    }

    fn with_server(name: &str, test: impl FnOnce(&Path) + Send + 'static) {
        let socket = std::env::temp_dir().join(format!("matrix-control-{}-{name}", std::process::id()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.expect("runtime").block_on(async {
            serve(&socket, Arc::new(Echo)).expect("listen");
            let path = socket.clone();
            tokio::task::spawn_blocking(move || test(&path)).await.expect("test body");
        });
        std::fs::remove_file(&socket).expect("remove");
    }

    /// Sends raw bytes and gives back the text of the reply.
    fn raw(socket: &Path, bytes: &[u8]) -> String {
        let mut stream = std::os::unix::net::UnixStream::connect(socket).expect("connect");
        stream.write_all(bytes).expect("send");
        stream.shutdown(std::net::Shutdown::Write).expect("shutdown");
        let mut reply = Vec::new();
        // The end may be a reset: the server leaves unread what follows a frame that is too long.
        let _ = stream.read_to_end(&mut reply);
        String::from_utf8_lossy(reply.get(4..).unwrap_or_default()).into_owned()
    }

    #[test]
    fn a_request_gets_its_reply() {
        with_server("reply", |socket| {
            let mut client = Client::connect(socket, Some(Duration::from_secs(5))).expect("connect");
            assert_eq!(client.peer_pid().expect("pid"), std::process::id() as i32);
            assert_eq!(client.ask::<String>(&Request::Status {}).expect("status"), "fine");
            let refusal = client.ask::<String>(&Request::Hello {});
            assert!(matches!(refusal, Err(ClientError::Refused(why)) if why == "no"));
        });
    }

    #[test]
    fn hostile_frames_get_an_error_reply() {
        with_server("hostile", |socket| {
            assert!(raw(socket, &[0xff; 8]).contains("too long"));
            assert!(raw(socket, &[&4u32.to_le_bytes()[..], b"null"].concat()).contains("not a request"));
            let unknown = br#"{"request":"format-everything"}"#;
            let frame = [&(unknown.len() as u32).to_le_bytes()[..], unknown].concat();
            assert!(raw(socket, &frame).contains("not a request"));
            let extra = br#"{"request":"status","x":1}"#;
            let frame = [&(extra.len() as u32).to_le_bytes()[..], extra].concat();
            assert!(raw(socket, &frame).contains("refused"));
        });
    }
}
