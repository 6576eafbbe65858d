//! Three nodes in one process: real cores, sockets, slots, register and locks, on an image file.

use std::collections::BTreeSet;
use std::sync::mpsc::{Receiver, Sender as StdSender, channel};
use std::time::{Duration, Instant as StdInstant};

use membership::NamingDatabase;
use storage_control::mkfs::{self, PrepareOptions};
use storage_control::{Device, FileDevice, OpenAs, TestRuntime, block_on};

use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, PartialEq, Eq)]
enum News {
    View(Generation, BTreeSet<u16>),
    Fenced(u16, u64),
    Recovered(u16, u64),
    Replayed(u16),
    Made(u16),
    Dlm(u16, Vec<u8>),
    Closed,
}

/// Greets every other member from within `install_view`, as the lock manager does.
struct Daemon {
    me: NodeId,
    news: Mutex<StdSender<News>>,
    wire: Mutex<Wire>,
}

enum Wire {
    Early(Vec<(NodeId, Generation)>),
    Open(std::sync::Weak<Cluster>),
}

fn greet(cluster: &Cluster, to: NodeId, generation: Generation) {
    cluster.send_dlm(to, generation, format!("hello in {generation}").as_bytes());
}

impl Daemon {
    fn tell(&self, news: News) {
        let _ = self.news.lock().send(news);
    }
}

impl ClusterHooks for Daemon {
    fn install_view(&self, view: Arc<View>) {
        self.tell(News::View(view.generation, view.members.keys().map(|node| node.0).collect()));
        for other in view.members.keys().filter(|node| **node != self.me) {
            match &mut *self.wire.lock() {
                Wire::Early(early) => early.push((*other, view.generation)),
                Wire::Open(cluster) => {
                    if let Some(cluster) = cluster.upgrade() {
                        greet(&cluster, *other, view.generation);
                    }
                }
            }
        }
    }
    fn fenced(&self, node: NodeId, incarnation: Incarnation) {
        self.tell(News::Fenced(node.0, incarnation.0));
    }
    fn recovered(&self, node: NodeId, incarnation: Incarnation) {
        self.tell(News::Recovered(node.0, incarnation.0));
    }
    fn replay(&self, journal: u16) -> BoxFuture<Result<(), String>> {
        self.tell(News::Replayed(journal));
        Box::pin(std::future::ready(Ok(())))
    }
    fn make_journal(&self, index: u16) -> BoxFuture<Result<(), String>> {
        self.tell(News::Made(index));
        Box::pin(std::future::ready(Ok(())))
    }
    fn dlm_frame(&self, from: NodeId, payload: &[u8]) -> Result<(), String> {
        self.tell(News::Dlm(from.0, payload.to_vec()));
        Ok(())
    }
    fn journal_tail(&self) -> Clock {
        Clock(5)
    }
    fn suspended(&self, _suspended: bool) {}
    fn closed(&self, _reason: &str) {
        self.tell(News::Closed);
    }
}

struct Image(PathBuf);

impl Image {
    fn new(name: &str) -> Image {
        let directory = std::env::temp_dir().join(format!("matrix-cluster-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).expect("a directory");
        let image = Image(directory);
        let device = FileDevice::create(image.path(), 64 << 20, OpenAs::default()).expect("an image");
        let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
        let times = LeaseTimes { write_life: device.medium().write_life(None) };
        let shared: Arc<dyn Device> = Arc::new(device.clone());
        let disk1: DeviceName = "disk1".parse().expect("a name");
        let body = |label: &Label| {
            let names = NamingDatabase::of_one(disk1.clone(), label.device, label.device_blocks);
            membership::codec::encode_view(&View::empty(1, names))
        };
        let options = PrepareOptions { text: String::new(), io_timeout: None, force: false };
        block_on(async {
            let label =
                mkfs::prepare(&shared, &device, times, &runtime, &options, &body).await.expect("prepared");
            mkfs::finish(&*shared, &device, times, &*runtime, &label).await.expect("finished");
        });
        image
    }

    fn path(&self) -> PathBuf {
        self.0.join("image")
    }

    fn start(&self, name: &str) -> Node {
        self.start_with(name, FenceChoice::All)
    }

    fn start_with(&self, name: &str, fence: FenceChoice) -> Node {
        let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
        let device = FileDevice::open(self.path(), OpenAs::default()).expect("the image");
        let label = block_on(Label::read(&device)).expect("a label");
        device.set_urgent_below(label.quorum.end());
        let gate = Gate::new(Arc::new(device.clone()), Arc::clone(&runtime));
        let write_life = device.medium().write_life(label.io_timeout);
        let storage = Storage { gate, label, locks: Arc::new(device), write_life };
        let run_dir = self.0.join(name);
        std::fs::create_dir_all(&run_dir).expect("a run directory");
        let config = Config {
            name: name.to_owned(),
            listen: "127.0.0.1:0".parse().expect("an address"),
            advertise: None,
            run_dir,
            device: None,
            fence,
        };
        let claimed = block_on(claim(storage, config, Arc::default(), runtime)).expect("a slot");
        let me = (claimed.node().0, claimed.incarnation().0);
        let (sender, news) = channel();
        let wire = Mutex::new(Wire::Early(Vec::new()));
        let daemon = Arc::new(Daemon { me: NodeId(me.0), news: Mutex::new(sender), wire });
        let cluster = Arc::new(claimed.join(Arc::clone(&daemon) as Arc<dyn ClusterHooks>).expect("threads"));
        let before = std::mem::replace(&mut *daemon.wire.lock(), Wire::Open(Arc::downgrade(&cluster)));
        if let Wire::Early(early) = before {
            early.into_iter().for_each(|(to, generation)| greet(&cluster, to, generation));
        }
        Node { me, cluster, news }
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

struct Node {
    me: (u16, u64),
    cluster: Arc<Cluster>,
    news: Receiver<News>,
}

impl Node {
    /// Killed: with the last handle to the device the lock of its slot falls.
    fn abandon(self) {
        self.cluster.abandon();
    }

    fn admitted(&self) -> u16 {
        block_on(self.cluster.admitted()).expect("admitted")
    }

    /// Skips news until this; fails when it does not come.
    fn until(&self, wanted: &News) {
        let end = StdInstant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            let left = end.saturating_duration_since(StdInstant::now());
            let Ok(news) = self.news.recv_timeout(left) else {
                panic!("{wanted:?} did not come, but {seen:?}; {:?}", self.cluster.shown.lock());
            };
            if news == *wanted {
                return;
            }
            seen.push(news);
        }
    }

    fn until_members(&self, members: &[u16]) {
        let wanted: BTreeSet<u16> = members.iter().copied().collect();
        let end = StdInstant::now() + PATIENCE;
        loop {
            let left = end.saturating_duration_since(StdInstant::now());
            match self.news.recv_timeout(left) {
                Ok(News::View(_, found)) if found == wanted => return,
                Ok(_) => {}
                Err(_) => panic!("members {wanted:?} did not come; {:?}", self.cluster.shown.lock()),
            }
        }
    }
}

#[test]
fn three_nodes_form_join_talk_die_come_back_and_leave() {
    let image = Image::new("life");
    let a = image.start("a");
    assert_eq!((a.me, a.admitted()), ((0, 1), 0));
    a.until_members(&[0]);

    let b = image.start("b");
    a.until(&News::Made(1));
    assert_eq!((b.me, b.admitted()), ((1, 1), 1));
    let c = image.start("c");
    assert_eq!((c.me, c.admitted()), ((2, 1), 2));
    for node in [&a, &b, &c] {
        node.until_members(&[0, 1, 2]);
    }
    let generation =
        a.cluster.shown.lock().register.as_ref().map(|(_, view)| view.generation).unwrap_or_default();
    c.cluster.send_dlm(NodeId(1), generation, b"lock");
    b.until(&News::Dlm(2, b"lock".to_vec()));

    // Killed: the connection ends, the lock of its slot falls.
    let killed = StdInstant::now();
    c.abandon();
    a.until(&News::Replayed(2));
    a.until(&News::Recovered(2, 1));
    b.until(&News::Fenced(2, 1));
    b.until(&News::Recovered(2, 1));
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(2), "recovery took {took:?}");

    let c = image.start("c");
    assert_eq!((c.me, c.admitted()), ((2, 2), 2));
    a.until_members(&[0, 1, 2]);

    block_on(b.cluster.leave()).expect("left");
    a.until_members(&[0, 2]);
    block_on(a.cluster.leave()).expect("the ADM leaves");
    c.until_members(&[2]);
    block_on(c.cluster.leave()).expect("the last one leaves");

    // Nobody was fenced: the next one is in at once, its journal clean.
    let a = image.start("a");
    assert_eq!((a.me, a.admitted()), ((0, 2), 0));
    assert!(a.news.try_iter().all(|news| !matches!(news, News::Replayed(_))));
    a.abandon();
}

/// The lock layer reports to a new member from within `install_view`: once these reports were dropped, because the
/// interconnect did not know the member yet, and the new masters waited for them for ever.
#[test]
fn what_is_sent_from_within_install_view_arrives() {
    let image = Image::new("greet");
    let nodes = ["a", "b", "c"].map(|name| {
        let node = image.start(name);
        node.admitted();
        node
    });
    let generation = nodes[2].cluster.shown.lock().register.as_ref().map(|(_, view)| view.generation);
    let hello = format!("hello in {}", generation.expect("a view")).into_bytes();
    for node in &nodes {
        let mut greeted = BTreeSet::new();
        while greeted.len() < 2 {
            match node.news.recv_timeout(PATIENCE).expect("a greeting in time") {
                News::Dlm(from, text) if text == hello => assert!(greeted.insert(from)),
                _ => {}
            }
        }
    }
    nodes.into_iter().for_each(|node| node.abandon());
}

#[test]
fn the_adm_is_killed_and_another_takes_over() {
    let image = Image::new("adm");
    let a = image.start("a");
    a.admitted();
    let b = image.start("b");
    b.admitted();
    let killed = StdInstant::now();
    a.abandon();
    b.until(&News::Replayed(0));
    b.until(&News::Recovered(0, 1));
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    b.abandon();
}

#[test]
fn all_are_killed_and_the_next_recovers_everything() {
    let image = Image::new("all");
    let nodes = ["a", "b", "c"].map(|name| {
        let node = image.start(name);
        node.admitted();
        node
    });
    nodes.into_iter().for_each(|node| node.abandon());
    std::thread::sleep(Duration::from_millis(300)); // the kernel's part of a kill
    let b = image.start("b");
    assert_eq!(b.me, (1, 2));
    b.admitted();
    let replayed: BTreeSet<u16> = b
        .news
        .try_iter()
        .filter_map(|news| if let News::Replayed(index) = news { Some(index) } else { None })
        .collect();
    assert_eq!(replayed, [0, 1, 2].into());
    b.abandon();
}

#[test]
fn without_the_proof_a_killed_node_is_fenced_by_its_lease() {
    let image = Image::new("lease");
    let a = image.start_with("a", FenceChoice::LeaseOnly);
    a.admitted();
    let b = image.start_with("b", FenceChoice::LeaseOnly);
    b.admitted();
    b.abandon();
    a.until(&News::Recovered(1, 1));
    a.abandon();
}
