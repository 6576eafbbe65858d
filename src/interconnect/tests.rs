//! Two or three interconnects on 127.0.0.1, and strangers at the door.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpListener;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};

use storage_control::BoxFuture;

use super::*;

const MATRIX: Uuid = Uuid::from_u128(7);
/// Long enough for a busy machine; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Debug, PartialEq, Eq)]
enum News {
    Connected(Who),
    Disconnected(Who, Loss),
    Frame(Who, Generation, Vec<u8>),
}

struct Reporter(Mutex<Sender<News>>);

impl Handler for Reporter {
    fn frame(&self, from: Who, header: Header, payload: Vec<u8>) -> Result<(), String> {
        if payload == b"nonsense" {
            return Err(String::from("nonsense"));
        }
        let _ = self.0.lock().send(News::Frame(from, header.generation, payload));
        Ok(())
    }

    fn connected(&self, peer: Who) {
        let _ = self.0.lock().send(News::Connected(peer));
    }

    fn disconnected(&self, peer: Who, loss: &Loss) {
        let _ = self.0.lock().send(News::Disconnected(peer, loss.clone()));
    }

    fn unknown_key(&self) {}
}

type Blocks = Arc<Mutex<BTreeMap<NodeId, Nonce>>>;

/// A disk whose blocks all nodes see that have the same map.
struct Disk {
    me: Who,
    blocks: Blocks,
}

impl SameMedium for Disk {
    fn show(&self) -> BoxFuture<Result<Arc<Nonce>, String>> {
        let nonce = *self.blocks.lock().entry(self.me.0).or_insert([self.me.0.0 as u8; 32]);
        Box::pin(std::future::ready(Ok(Arc::new(nonce))))
    }

    fn check(&self, node: NodeId, nonce: Nonce) -> BoxFuture<Result<(), String>> {
        let shown = self.blocks.lock().get(&node) == Some(&nonce);
        let verdict = if shown { Ok(()) } else { Err(String::from("its nonce is not on this disk")) };
        Box::pin(std::future::ready(verdict))
    }
}

struct Node {
    who: Who,
    peer: Peer,
    net: Interconnect,
    news: Receiver<News>,
}

fn who(node: u16) -> Who {
    (NodeId(node), Incarnation(1))
}

fn start_in(node: u16, matrix: Uuid, blocks: &Blocks) -> Node {
    start_with(NodeKey::generate().expect("a key"), node, matrix, blocks)
}

fn start_with(key: NodeKey, node: u16, matrix: Uuid, blocks: &Blocks) -> Node {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its number");
    let fingerprint = key.fingerprint();
    let (sender, news) = channel();
    let net = Interconnect::start(Setup {
        me: who(node),
        matrix,
        key,
        listener,
        clock: Arc::new(LamportClock::default()),
        medium: Arc::new(Disk { me: who(node), blocks: Arc::clone(blocks) }),
        handler: Arc::new(Reporter(Mutex::new(sender))),
    })
    .expect("an interconnect");
    Node { who: who(node), peer: Peer { who: who(node), addr, fingerprint, dial: false }, net, news }
}

fn start(node: u16, blocks: &Blocks) -> Node {
    start_in(node, MATRIX, blocks)
}

/// Everybody trusts everybody; the higher dials.
fn introduce(nodes: &[&Node]) {
    for node in nodes {
        let others = || nodes.iter().filter(|other| other.who != node.who);
        node.net.set_trust(others().map(|other| (other.peer.fingerprint, other.who)).collect());
        node.net.set_peers(others().map(|o| Peer { dial: node.who > o.who, ..o.peer.clone() }).collect());
    }
}

impl Node {
    fn next(&self) -> News {
        self.news.recv_timeout(PATIENCE).expect("news in time")
    }

    fn say(&self, to: &Node, text: &[u8]) -> bool {
        self.net.send(to.who.0, Channel::Dlm, Generation(3), text)
    }
}

#[test]
fn frames_arrive_in_order_also_those_sent_before_the_connection() {
    let blocks = Arc::default();
    let (a, b) = (start(1, &blocks), start(2, &blocks));
    a.net.set_peers(vec![b.peer.clone()]);
    assert!(a.say(&b, b"early"));
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    assert_eq!(b.next(), News::Connected(a.who));
    (0..1000u32).for_each(|n| assert!(a.say(&b, &n.to_le_bytes())));
    assert_eq!(b.next(), News::Frame(a.who, Generation(3), b"early".to_vec()));
    for n in 0..1000u32 {
        assert_eq!(b.next(), News::Frame(a.who, Generation(3), n.to_le_bytes().to_vec()));
    }
    assert!(b.say(&a, b"thanks"));
    assert_eq!(a.next(), News::Frame(b.who, Generation(3), b"thanks".to_vec()));
    let batches = a.net.stats().batches_sent.load(Ordering::Relaxed);
    assert!(batches <= a.net.stats().frames_sent.load(Ordering::Relaxed));
}

/// Of two parts made under one generation the second says that it was all: it must not arrive without the first.
#[test]
fn what_a_lost_connection_took_part_of_does_not_go_on_with_the_next() {
    let blocks = Arc::default();
    let (a, b) = (start(1, &blocks), start(2, &blocks));
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    assert_eq!(b.next(), News::Connected(a.who));
    let part = |generation, text: &[u8]| a.net.send(b.who.0, Channel::Dlm, Generation(generation), text);
    assert!(part(3, b"first part"));
    a.net.disconnect(b.who.0, "a test");
    assert_eq!(a.next(), News::Disconnected(b.who, Loss::Closed(String::from("a test"))));
    assert!(!part(3, b"last part") && !part(2, b"late"));
    assert!(part(4, b"anew"));
    assert_eq!(a.next(), News::Connected(b.who));
    assert!(!part(3, b"last part, later") && part(4, b"all anew"));
    let news: Vec<News> = std::iter::from_fn(|| Some(b.next()))
        .filter(|news| *news != News::Frame(a.who, Generation(3), b"first part".to_vec()))
        .take(4)
        .collect();
    assert!(matches!(news[0], News::Disconnected(who, _) if who == a.who), "{news:?}");
    assert_eq!(news[1], News::Connected(a.who));
    assert_eq!(news[2], News::Frame(a.who, Generation(4), b"anew".to_vec()));
    assert_eq!(news[3], News::Frame(a.who, Generation(4), b"all anew".to_vec()));
}

/// The first connection has much under way when the same node makes another: all that is in between is lost.
#[test]
fn nothing_of_a_replaced_connection_comes_after_the_new_one() {
    let directory = std::env::temp_dir().join(format!("matrix-replaced-{}", std::process::id()));
    std::fs::create_dir_all(&directory).expect("a directory");
    let blocks = Arc::default();
    let a = start(1, &blocks);
    let [b, again] = [(); 2].map(|()| {
        let key = NodeKey::load_or_create(&directory).expect("a key");
        start_with(key, 2, MATRIX, &blocks)
    });
    std::fs::remove_dir_all(&directory).expect("clean up");
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    assert_eq!(b.next(), News::Connected(a.who));
    b.net.set_peers(vec![Peer { dial: false, ..a.peer.clone() }]); // it would replace the other one in its turn
    let (net, to) = (&b.net, a.who.0);
    std::thread::scope(|scope| {
        // Until it hears that its connection is gone.
        scope.spawn(|| while net.send(to, Channel::Dlm, Generation(3), b"old") {});
        std::thread::sleep(Duration::from_millis(50));
        again.net.set_trust([(a.peer.fingerprint, a.who)].into());
        again.net.set_peers(vec![Peer { dial: true, ..a.peer.clone() }]);
        assert_eq!(again.next(), News::Connected(a.who));
        assert!(again.say(&a, b"new"));
        let old = News::Frame(b.who, Generation(3), b"old".to_vec());
        let mut rest = std::iter::from_fn(|| Some(a.next())).skip_while(|news| *news == old);
        let loss = Loss::Closed(String::from("replaced by a new connection"));
        assert_eq!(rest.next(), Some(News::Disconnected(b.who, loss)));
        assert_eq!(rest.next(), Some(News::Connected(b.who)));
        assert_eq!(rest.next(), Some(News::Frame(b.who, Generation(3), b"new".to_vec())));
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(a.news.try_recv().is_err());
}

#[test]
fn lock_messages_go_on_to_another_incarnation_and_where_none_was_lost() {
    let mut state = State::default();
    let (old, new) = (who(1), (NodeId(1), Incarnation(2)));
    assert!(state.note_dlm(old, Generation(5)) && state.note_dlm(old, Generation(4)));
    state.renew_queue(new); // nothing has gone there
    assert!(state.note_dlm(old, Generation(5)));
    state.renew_queue(old);
    assert!(!state.note_dlm(old, Generation(5)) && state.note_dlm(old, Generation(6)));
    assert!(state.note_dlm(new, Generation(5)), "nothing was lost on the way to this one");
}

#[test]
fn a_stopped_peer_is_noticed_at_once_and_its_heir_connects() {
    let blocks = Arc::default();
    let (a, b) = (start(1, &blocks), start(2, &blocks));
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    let begin = std::time::Instant::now();
    b.net.stop();
    assert_eq!(a.next(), News::Disconnected(b.who, Loss::Reset));
    assert!(begin.elapsed() < Duration::from_secs(2), "no time-out was waited for");
    let heir = start(2, &blocks);
    introduce(&[&a, &heir]);
    assert_eq!(a.next(), News::Connected(heir.who));
}

#[test]
fn a_peer_that_sends_garbage_is_cut_off_with_the_reason() {
    let blocks = Arc::default();
    let (a, b) = (start(1, &blocks), start(2, &blocks));
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    assert_eq!(b.next(), News::Connected(a.who));
    b.say(&a, b"nonsense");
    assert_eq!(a.next(), News::Disconnected(b.who, Loss::Garbage(String::from("nonsense"))));
}

#[test]
fn a_key_that_no_view_names_gets_nothing_through() {
    let blocks = Arc::default();
    let (a, b, stranger) = (start(1, &blocks), start(2, &blocks), start(3, &blocks));
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    stranger.net.set_trust([(a.peer.fingerprint, a.who)].into());
    stranger.net.set_peers(vec![Peer { dial: true, ..a.peer.clone() }]);
    assert!(stranger.news.recv_timeout(Duration::from_millis(500)).is_err());
    assert_eq!(a.net.connected(), [b.who]);
}

#[test]
fn a_removed_member_is_disconnected_with_the_view() {
    let blocks = Arc::default();
    let (a, b) = (start(1, &blocks), start(2, &blocks));
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    a.net.set_peers(Vec::new());
    a.net.set_trust(BTreeMap::new());
    let loss = Loss::Closed(String::from("its key is no longer accepted"));
    assert_eq!(a.next(), News::Disconnected(b.who, loss));
}

#[test]
fn a_clone_of_the_disk_is_refused() {
    let (a, clone) = (start(1, &Arc::default()), start(2, &Arc::default()));
    introduce(&[&a, &clone]);
    assert!(a.news.recv_timeout(Duration::from_millis(500)).is_err());
    assert!(a.net.connected().is_empty() && clone.net.connected().is_empty());
}

#[test]
fn a_node_of_another_matrix_is_refused() {
    let blocks = Arc::default();
    let (a, foreign) = (start(1, &blocks), start_in(2, Uuid::from_u128(8), &blocks));
    introduce(&[&a, &foreign]);
    assert!(a.news.recv_timeout(Duration::from_millis(500)).is_err());
    assert!(a.net.connected().is_empty() && foreign.net.connected().is_empty());
}

#[test]
fn strangers_without_tls_cannot_wedge_the_door() {
    let blocks = Arc::default();
    let (a, b) = (start(1, &blocks), start(2, &blocks));
    let mut strangers = Vec::new();
    for n in 0..8u8 {
        let mut stranger = std::net::TcpStream::connect(a.peer.addr).expect("the port is open");
        stranger.write_all(&[n; 300]).expect("it can be written to");
        strangers.push(stranger);
    }
    introduce(&[&a, &b]);
    assert_eq!(a.next(), News::Connected(b.who));
    for mut stranger in strangers {
        stranger.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut answer = Vec::new();
        // An alert or nothing, then the end.
        let _ = stranger.read_to_end(&mut answer);
        assert!(answer.len() < 100);
    }
}

#[test]
fn three_nodes_are_all_connected_once() {
    let blocks = Arc::default();
    let nodes = [start(1, &blocks), start(2, &blocks), start(3, &blocks)];
    introduce(&nodes.each_ref());
    for node in &nodes {
        let connected: BTreeSet<Who> = (0..2)
            .map(|_| match node.next() {
                News::Connected(who) => who,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(connected.len(), 2);
    }
}
