//! The interconnect: one connection between every two members, TCP with mutual TLS, always on.
//!
//! Always:
//! - Only a peer whose key the view or a claimed slot names, and that writes to the same disk, gets a frame through,
//!   and only under its own name and incarnation.
//! - Frames to a peer arrive in order or the connection is lost; what is lost is lost together with it, and the
//!   handler is told. Frames for a member that is not connected wait for its next connection, in order.
//! - Of the lock messages made under one generation, a peer gets a beginning or all, over one connection: where it ended
//!   between them, the rest does not follow on the next. Frames of an earlier connection come before it or not at all.
//! - Everything a peer can make us keep is bounded: frames, queues, handshakes under way.
//!
//! One thread with a tokio runtime of its own drives all of it; the handler is called in that thread and must not
//! block. Of two members the one with the higher slot dials.

mod handshake;
mod key;
mod link;
mod queue;
#[cfg(test)]
mod tests;
mod tls;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use membership::Fingerprint;
use membership::frame::{Channel, Header, MAX_PAYLOAD_BYTES};
use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use storage_control::{Generation, Incarnation, LamportClock, NodeId};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore, watch};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use uuid::Uuid;

pub(crate) use handshake::{Nonce, SameMedium};
pub(crate) use key::NodeKey;
use queue::Queue;
use tls::Trust;

/// One incarnation of one node.
pub(crate) type Who = (NodeId, Incarnation);

/// A connection that is not complete by then is given up.
const SETUP_TIMEOUT: Duration = Duration::from_secs(3);
/// The first try to dial again comes after this, later ones after twice the last, up to the next line.
const FIRST_RETRY: Duration = Duration::from_millis(20);
/// Longest pause between two tries to dial.
const LAST_RETRY: Duration = Duration::from_millis(1_000);
/// Bytes without an answer for so long end a connection.
const USER_TIMEOUT: Duration = Duration::from_secs(4);
/// Connections that may be in their handshake at once.
const MAX_HANDSHAKES: usize = 64;

/// How a connection ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    /// The peer's end is gone: its process, or its host's refusal.
    Reset,
    /// No answer in time.
    Timeout,
    /// It sent what no correct node sends.
    Garbage(String),
    /// Closed from here.
    Closed(String),
}

/// Takes what comes in. Called in the interconnect's thread: must not block, may send.
pub(crate) trait Handler: Send + Sync + 'static {
    /// A frame of a connected peer. `Err`: it is garbage, the connection is closed for it.
    fn frame(&self, from: Who, header: Header, payload: Vec<u8>) -> Result<(), String>;
    /// From here on frames of this incarnation may come.
    fn connected(&self, peer: Who);
    /// Its connection has ended; frames on their way are lost.
    fn disconnected(&self, peer: Who, loss: &Loss);
    /// Somebody showed a key that is not accepted: a stranger, or a node whose new slot was not looked at yet.
    fn unknown_key(&self);
}

/// A peer to be connected with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Peer {
    pub(crate) who: Who,
    pub(crate) addr: SocketAddr,
    pub(crate) fingerprint: Fingerprint,
    /// Whether this side dials.
    pub(crate) dial: bool,
}

/// What the interconnect is started with.
pub(crate) struct Setup {
    pub(crate) me: Who,
    pub(crate) matrix: Uuid,
    pub(crate) key: NodeKey,
    /// Bound and listening already: its address is in the slot.
    pub(crate) listener: std::net::TcpListener,
    pub(crate) clock: Arc<LamportClock>,
    pub(crate) medium: Arc<dyn SameMedium>,
    pub(crate) handler: Arc<dyn Handler>,
}

/// Counters since the start.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    pub(crate) frames_sent: AtomicU64,
    /// Writes to sockets: frames that went together count once.
    pub(crate) batches_sent: AtomicU64,
    pub(crate) frames_received: AtomicU64,
}

struct Shared {
    me: Who,
    matrix: Uuid,
    key: NodeKey,
    clock: Arc<LamportClock>,
    medium: Arc<dyn SameMedium>,
    handler: Arc<dyn Handler>,
    trust: Arc<Trust>,
    stats: Stats,
    state: Mutex<State>,
    peers_changed: Notify,
}

#[derive(Default)]
struct State {
    peers: BTreeMap<NodeId, Peer>,
    queues: BTreeMap<Who, Arc<Queue>>,
    links: BTreeMap<NodeId, Link>,
    next_link: u64,
    /// One entry per node that lock messages were sent to.
    dlm_sent: BTreeMap<NodeId, DlmSent>,
}

/// The lock messages to one incarnation of a node.
struct DlmSent {
    to: Incarnation,
    latest: Generation,
    /// Those made under this generation, or before it, no longer go: some were given to a connection that has ended.
    over: Option<Generation>,
}

/// The current connection to a node.
struct Link {
    who: Who,
    number: u64,
    fingerprint: Fingerprint,
    dialled_by: NodeId,
    /// Closed with a reason from here.
    end: watch::Sender<Option<String>>,
}

/// The running interconnect. Dropping it closes every connection and ends its thread.
pub(crate) struct Interconnect {
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
}

impl Interconnect {
    /// Starts the thread. Nobody is trusted yet, nobody dialled.
    pub(crate) fn start(setup: Setup) -> io::Result<Interconnect> {
        let trust = Arc::new(Trust::default());
        let server = tls::server(&setup.key, &trust).map_err(io::Error::other)?;
        setup.listener.set_nonblocking(true)?;
        let shared = Arc::new(Shared {
            me: setup.me,
            matrix: setup.matrix,
            key: setup.key,
            clock: setup.clock,
            medium: setup.medium,
            handler: setup.handler,
            trust,
            stats: Stats::default(),
            state: Mutex::new(State::default()),
            peers_changed: Notify::new(),
        });
        let (stop, mut stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (listener, served) = (setup.listener, Arc::clone(&shared));
        std::thread::Builder::new().name(String::from("matrix-net")).spawn(move || {
            runtime.block_on(async {
                let dialling = tokio::spawn(dial_peers(Arc::clone(&served)));
                let accepting = accept(Arc::clone(&served), listener, TlsAcceptor::from(Arc::new(server)));
                tokio::select! {
                    error = accepting => tracing::error!(%error, "the interconnect's socket failed"),
                    _ = stopped.changed() => {}
                }
                dialling.abort();
            });
            // Dropping the runtime drops every connection: peers see them end at once.
        })?;
        Ok(Interconnect { shared, stop })
    }

    /// Whom to be connected with. Queues of others are dropped, their connections stay while they are trusted.
    pub(crate) fn set_peers(&self, peers: Vec<Peer>) {
        let mut state = self.shared.state.lock();
        let peers: BTreeMap<NodeId, Peer> = peers.into_iter().map(|peer| (peer.who.0, peer)).collect();
        if state.peers == peers {
            return;
        }
        for peer in peers.values() {
            state.queues.entry(peer.who).or_default();
        }
        let State { queues, links, .. } = &mut *state;
        queues.retain(|who, _| {
            peers.get(&who.0).is_some_and(|peer| peer.who == *who)
                || links.get(&who.0).is_some_and(|l| l.who == *who)
        });
        state.peers = peers;
        drop(state);
        self.shared.peers_changed.notify_one();
    }

    /// Which keys are accepted, and whose they are. Connections with other keys are closed.
    pub(crate) fn set_trust(&self, accepted: BTreeMap<Fingerprint, Who>) {
        self.shared.trust.set(accepted);
        let state = self.shared.state.lock();
        for link in state.links.values() {
            if self.shared.trust.whose(&link.fingerprint) != Some(link.who) {
                link.close("its key is no longer accepted");
            }
        }
    }

    /// Sends a frame made under this generation: to a connected node at once, to a member that is not connected when it
    /// is. False: there is no such peer, too much waits for it, or lock messages of this generation were given to a
    /// connection that has ended; that is or will be told, and a new view follows.
    pub(crate) fn send(&self, to: NodeId, channel: Channel, generation: Generation, payload: &[u8]) -> bool {
        assert!(payload.len() <= MAX_PAYLOAD_BYTES, "no message of ours is longer than a frame may be");
        let shared = &*self.shared;
        let queue = {
            let mut state = shared.state.lock();
            let linked = state.links.get(&to).map(|link| link.who);
            let waited = state.peers.get(&to).map(|peer| peer.who);
            // Membership says everything again; old news must not wait for a connection.
            let who = if channel == Channel::Membership { linked } else { waited.or(linked) };
            let Some(who) = who.filter(|who| state.queues.contains_key(who)) else { return false };
            // Noted before it is pushed: the connection may end in between.
            if channel == Channel::Dlm && !state.note_dlm(who, generation) {
                return false;
            }
            Arc::clone(&state.queues[&who])
        };
        let header = Header {
            channel,
            length: payload.len() as u32,
            sender: shared.me.0,
            incarnation: shared.me.1,
            generation,
            clock: shared.clock.now(),
        };
        queue.push(&header, payload)
    }

    /// Closes the connection to a node, if there is one; it may be made anew.
    pub(crate) fn disconnect(&self, node: NodeId, why: &str) {
        if let Some(link) = self.shared.state.lock().links.get(&node) {
            link.close(why);
        }
    }

    /// Frames sent and received.
    pub(crate) fn stats(&self) -> &Stats {
        &self.shared.stats
    }

    /// Who is connected.
    #[cfg(test)]
    fn connected(&self) -> Vec<Who> {
        self.shared.state.lock().links.values().map(|link| link.who).collect()
    }

    /// Closes everything. Does not wait for the thread, which may be in a hook that waits for the caller.
    pub(crate) fn stop(&self) {
        let _ = self.stop.send(true);
    }
}

impl Drop for Interconnect {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Link {
    fn close(&self, why: &str) {
        let _ = self.end.send(Some(why.to_owned()));
    }
}

async fn accept(shared: Arc<Shared>, listener: std::net::TcpListener, acceptor: TlsAcceptor) -> io::Error {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return error,
    };
    let room = Arc::new(Semaphore::new(MAX_HANDSHAKES));
    loop {
        let (stream, from) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors, or a connection that died in the queue: neither ends the service.
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(FIRST_RETRY).await;
                continue;
            }
        };
        let Ok(place) = Arc::clone(&room).try_acquire_owned() else {
            tracing::warn!(%from, "refused: too many handshakes at once");
            continue;
        };
        let (shared, acceptor) = (Arc::clone(&shared), acceptor.clone());
        tokio::spawn(async move {
            let setup = tokio::time::timeout(SETUP_TIMEOUT, take_in(&shared, stream, acceptor)).await;
            drop(place);
            match setup.unwrap_or_else(|_| Err(String::from("the handshake took too long"))) {
                Ok((stream, who, fingerprint)) => run(&shared, stream, who, fingerprint, who.0).await,
                Err(why) if why == tls::UNKNOWN_KEY => {
                    tracing::info!(%from, why, "connection refused");
                    shared.handler.unknown_key();
                }
                Err(why) => tracing::warn!(%from, why, "connection refused"),
            }
        });
    }
}

type ServerStream = tokio_rustls::server::TlsStream<TcpStream>;
type ClientStream = tokio_rustls::client::TlsStream<TcpStream>;

async fn take_in(
    shared: &Shared,
    stream: TcpStream,
    acceptor: TlsAcceptor,
) -> Result<(ServerStream, Who, Fingerprint), String> {
    tune(&stream).map_err(|error| error.to_string())?;
    let mut stream = acceptor.accept(stream).await.map_err(|error| tls::reason(&error))?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let fingerprint = tls::fingerprint(certificate.ok_or("it showed no certificate")?);
    let who = shared.trust.whose(&fingerprint).ok_or(tls::UNKNOWN_KEY)?;
    handshake::shake(&mut stream, shared.me, shared.matrix, who, &*shared.medium).await?;
    Ok((stream, who, fingerprint))
}

/// Keeps one dialling task per peer that this side dials.
async fn dial_peers(shared: Arc<Shared>) {
    let mut tasks: BTreeMap<NodeId, (Peer, tokio::task::JoinHandle<()>)> = BTreeMap::new();
    loop {
        let wanted: Vec<Peer> =
            shared.state.lock().peers.values().filter(|peer| peer.dial).cloned().collect();
        tasks.retain(|_, (peer, task)| {
            let keep = wanted.contains(peer);
            if !keep {
                task.abort();
            }
            keep
        });
        for peer in wanted {
            tasks.entry(peer.who.0).or_insert_with(|| {
                let task = tokio::spawn(keep_dialling(Arc::clone(&shared), peer.clone()));
                (peer, task)
            });
        }
        shared.peers_changed.notified().await;
    }
}

async fn keep_dialling(shared: Arc<Shared>, peer: Peer) {
    let mut pause = FIRST_RETRY;
    loop {
        if shared.state.lock().links.get(&peer.who.0).is_some_and(|link| link.who == peer.who) {
            // Connected by the other side: look again now and then whether it still is.
            tokio::time::sleep(LAST_RETRY / 5).await;
            continue;
        }
        let setup = tokio::time::timeout(SETUP_TIMEOUT, reach_out(&shared, &peer)).await;
        match setup.unwrap_or_else(|_| Err(String::from("no answer in time"))) {
            Ok(stream) => {
                pause = FIRST_RETRY;
                // In a task of its own: a connection outlives the wish to dial.
                let (shared, peer) = (Arc::clone(&shared), peer.clone());
                let link = tokio::spawn(async move {
                    run(&shared, stream, peer.who, peer.fingerprint, shared.me.0).await;
                });
                let _ = link.await;
            }
            Err(why) => tracing::debug!(node = %peer.who.0, addr = %peer.addr, why, "not connected"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LAST_RETRY);
    }
}

async fn reach_out(shared: &Shared, peer: &Peer) -> Result<ClientStream, String> {
    let stream = TcpStream::connect(peer.addr).await.map_err(|error| error.to_string())?;
    tune(&stream).map_err(|error| error.to_string())?;
    let config =
        tls::client(&shared.key, &shared.trust, peer.fingerprint).map_err(|error| error.to_string())?;
    let name = ServerName::try_from(tls::NAME).map_err(|error| error.to_string())?;
    let connector = TlsConnector::from(Arc::new(config));
    let mut stream = connector.connect(name, stream).await.map_err(|error| error.to_string())?;
    handshake::shake(&mut stream, shared.me, shared.matrix, peer.who, &*shared.medium).await?;
    Ok(stream)
}

fn tune(stream: &TcpStream) -> io::Result<()> {
    let socket = socket2::SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_user_timeout(Some(USER_TIMEOUT))?;
    let keepalive = socket2::TcpKeepalive::new().with_time(Duration::from_secs(2));
    socket.set_tcp_keepalive(&keepalive.with_interval(Duration::from_secs(1)).with_retries(2))
}

/// Serves a connection from its handshake to its end.
async fn run<S: AsyncRead + AsyncWrite>(
    shared: &Shared,
    stream: S,
    who: Who,
    fingerprint: Fingerprint,
    dialled_by: NodeId,
) {
    let (end, mut ended) = watch::channel(None);
    let Some((number, queue, replaced)) = shared.enter(who, fingerprint, dialled_by, end) else {
        return; // both sides dialled, the other connection stays
    };
    if let Some(old) = replaced {
        shared.handler.disconnected(old, &Loss::Closed(String::from("replaced by a new connection")));
    }
    tracing::info!(node = %who.0, incarnation = %who.1, "connected");
    shared.handler.connected(who);
    let (reading, writing) = tokio::io::split(stream);
    // The close first: once another connection is the current one, nothing more is read here, not even what is buffered.
    // All run in one thread, so it cannot become current while this reads.
    let loss = tokio::select! {
        biased;
        reason = closed_here(&mut ended) => Loss::Closed(reason),
        loss = link::read_frames(shared, who, reading) => loss,
        loss = link::write_frames(shared, &queue, writing) => loss,
    };
    if !shared.leave(who, number) {
        return; // replaced: the handler was told then
    }
    match &loss {
        Loss::Garbage(why) => tracing::warn!(node = %who.0, why, "closed: the peer sent garbage"),
        other => tracing::info!(node = %who.0, loss = ?other, "disconnected"),
    }
    shared.handler.disconnected(who, &loss);
}

async fn closed_here(ended: &mut watch::Receiver<Option<String>>) -> String {
    match ended.wait_for(Option::is_some).await {
        Ok(reason) => reason.clone().unwrap_or_default(),
        Err(_) => String::from("the connection was forgotten"),
    }
}

impl Shared {
    /// Makes a connection the current one of its node, unless a better one is there. Also says whose it replaces.
    fn enter(
        &self,
        who: Who,
        fingerprint: Fingerprint,
        dialled_by: NodeId,
        end: watch::Sender<Option<String>>,
    ) -> Option<(u64, Arc<Queue>, Option<Who>)> {
        let mut state = self.state.lock();
        let old = state.links.get(&who.0);
        // The same side dialled again: it knows that the old one is dead. Different sides: the higher one's stays.
        let stays = |old: &Link| old.who.1 > who.1 || (old.who == who && old.dialled_by > dialled_by);
        if old.is_some_and(stays) {
            return None;
        }
        let replaced = old.map(|old| {
            old.close("replaced by a new connection");
            old.who
        });
        if let Some(old) = replaced {
            state.renew_queue(old);
        }
        state.next_link += 1;
        let number = state.next_link;
        state.links.insert(who.0, Link { who, number, fingerprint, dialled_by, end });
        let queue = Arc::clone(state.queues.entry(who).or_default());
        Some((number, queue, replaced))
    }

    /// False if another connection has taken its place already.
    fn leave(&self, who: Who, number: u64) -> bool {
        let mut state = self.state.lock();
        if state.links.get(&who.0).is_none_or(|link| link.number != number) {
            return false;
        }
        state.links.remove(&who.0);
        state.renew_queue(who);
        true
    }
}

impl State {
    /// What waited belongs to the lost connection; what comes from now on waits for the next.
    fn renew_queue(&mut self, who: Who) {
        if let Some(sent) = self.dlm_sent.get_mut(&who.0).filter(|sent| sent.to == who.1) {
            sent.over = Some(sent.latest);
        }
        if self.peers.get(&who.0).is_some_and(|peer| peer.who == who) {
            self.queues.insert(who, Arc::default());
        } else {
            self.queues.remove(&who);
        }
    }

    /// Whether a lock message of this generation may still go to this peer; notes that it does.
    ///
    /// A report is several frames, and only the last says that it is complete: it must not arrive on a new connection
    /// after the others went with the old one.
    fn note_dlm(&mut self, (node, incarnation): Who, generation: Generation) -> bool {
        let new = DlmSent { to: incarnation, latest: generation, over: None };
        let sent = match self.dlm_sent.entry(node) {
            Entry::Occupied(entry) if entry.get().to == incarnation => entry.into_mut(),
            Entry::Occupied(mut entry) => {
                entry.insert(new);
                entry.into_mut()
            }
            Entry::Vacant(entry) => entry.insert(new),
        };
        sent.latest = sent.latest.max(generation);
        sent.over.is_none_or(|over| generation > over)
    }
}
