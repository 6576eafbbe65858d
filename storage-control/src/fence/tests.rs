use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::*;
use crate::device::Device;
use crate::file_device::{FileDevice, MIN_DEVICE_BYTES, OpenAs};
use crate::gate::Gate;
use crate::medium::WriteLife;
use crate::process::ProcessIdentity;
use crate::runtime::{TestRuntime, block_on};
use crate::slots::tests::{Node, TIMES, World};
use crate::slots::{Claimant, NO_ADDRESS, SlotArea, SlotLocks, Watch, claim};

fn lease(world: &World, node: &Node, times: LeaseTimes) -> Fencer {
    let runtime: Arc<dyn Runtime> = Arc::new(world.runtime.clone());
    let watch = Arc::new(Mutex::new(Watch::new()));
    let method = LeaseExpiry::new(node.area.clone(), watch, times, Arc::clone(&runtime));
    Fencer::new(vec![Box::new(method)], runtime)
}

fn fence(world: &World, fencer: &Fencer, victim: &Node) -> Result<Confirmed, NotFenced> {
    let (fencer, victim) = (fencer.clone(), victim.keeper.record());
    world.runtime.run(async move { fencer.fence(&victim).await })
}

#[test]
fn a_silent_node_is_fenced_after_lease_drift_and_write_life() {
    let world = World::new(1);
    let ((one, _), (victim, _)) = (world.claim("anna"), world.claim("berta"));
    world.renew(&victim).unwrap();
    let begun = world.runtime.now();
    let confirmed = fence(&world, &lease(&world, &one, TIMES), &victim).unwrap();
    assert_eq!(confirmed, Confirmed { method: "lease", proof: Proof::LeaseExpired });
    assert!(world.runtime.now().since(begun) >= TIMES.full_wait().unwrap());
    assert!(world.runtime.now().since(begun) < TIMES.full_wait().unwrap() + Duration::from_secs(2));
}

#[test]
fn a_node_that_renews_is_not_fenced_and_the_waiting_can_be_seen() {
    let world = World::new(1);
    let ((one, _), (victim, _)) = (world.claim("anna"), world.claim("berta"));
    world.keep(&victim);
    let fencer = lease(&world, &one, TIMES);
    let (background, record) = (fencer.clone(), victim.keeper.record());
    let done = Arc::new(Mutex::new(None));
    let result = Arc::clone(&done);
    world.runtime.spawn(Box::pin(async move {
        *result.lock() = Some(background.fence(&record).await);
    }));
    world.runtime.advance(Duration::from_secs(60));
    assert!(done.lock().is_none());
    let waiting = fencer.under_way();
    assert_eq!((waiting.len(), waiting[0].node), (1, victim.keeper.node()));
    victim.stop();
    world.runtime.advance(Duration::from_secs(10));
    assert!(done.lock().as_ref().unwrap().is_ok());
    assert!(fencer.under_way().is_empty());
}

#[test]
fn the_gate_of_the_victim_has_closed_before_its_fence_is_confirmed() {
    for seed in 0..15 {
        let world = World::new(seed);
        let ((one, _), (victim, _)) = (world.claim("anna"), world.claim("berta"));
        world.admit(&victim);
        world.keep(&victim);
        world.runtime.advance(Duration::from_millis(3_000 + world.runtime.random() % 2_000));
        victim.gate.check().unwrap();
        victim.stop();
        fence(&world, &lease(&world, &one, TIMES), &victim).unwrap();
        assert!(victim.gate.check().is_err(), "seed {seed}");
        let until = victim.gate.lease_until().unwrap();
        assert!(world.runtime.now().since(until) >= Duration::from_secs(1), "its last write is over too");
    }
}

#[test]
fn a_node_that_said_it_stopped_or_whose_slot_was_reused_is_fenced_at_once() {
    let world = World::new(1);
    let ((one, _), (victim, _)) = (world.claim("anna"), world.claim("berta"));
    let (keeper, former) = (victim.keeper.clone(), victim.clone());
    world.runtime.run(async move { keeper.release().await }).unwrap();
    let fencer = lease(&world, &one, TIMES);
    assert_eq!(fence(&world, &fencer, &victim).unwrap().proof, Proof::SaidSo);
    world.claim("berta");
    assert_eq!(fence(&world, &fencer, &former).unwrap().proof, Proof::SlotReused);
}

#[test]
fn where_nothing_bounds_a_write_the_lease_fences_nobody() {
    let world = World::new(1);
    let ((one, _), (victim, _)) = (world.claim("anna"), world.claim("berta"));
    let fencer = lease(&world, &one, LeaseTimes { write_life: WriteLife::Unbounded });
    let error = fence(&world, &fencer, &victim).unwrap_err();
    assert!(error.to_string().contains("--io-timeout"), "{error}");
    assert!(fencer.can_fence(&victim.keeper.record()).is_err());
    assert!(fencer.protection()[0].1.starts_with("nothing"));
}

#[test]
fn an_observer_that_cannot_see_the_slots_confirms_nothing() {
    let world = World::new(1);
    let ((one, _), (victim, _)) = (world.claim("anna"), world.claim("berta"));
    let fencer = lease(&world, &one, TIMES);
    let (background, record) = (fencer.clone(), victim.keeper.record());
    let done = Arc::new(Mutex::new(None));
    let result = Arc::clone(&done);
    world.device.inject(|_| crate::mem_device::Fault::Errno(libc::EIO));
    world.runtime.spawn(Box::pin(async move {
        *result.lock() = Some(background.fence(&record).await);
    }));
    world.runtime.advance(Duration::from_secs(60));
    assert!(done.lock().is_none());
    world.device.inject_nothing();
    world.runtime.advance(TIMES.full_wait().unwrap() - Duration::from_secs(1));
    assert!(done.lock().is_none(), "the window starts when the stall is over");
    world.runtime.advance(Duration::from_secs(4));
    assert!(done.lock().is_some());
}

// From here on with real files, locks and processes.

const CHILD_IMAGE: &str = "MATRIX_TEST_CHILD_IMAGE";

/// A node with a real file. What must live as long as it does is in here.
struct RealNode {
    device: FileDevice,
    area: SlotArea,
    record: SlotRecord,
}

fn claim_on(image: &Path, name: &str) -> RealNode {
    let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
    let device = FileDevice::open(image, OpenAs::default()).unwrap();
    let gate = Gate::new(Arc::new(device.clone()), Arc::clone(&runtime));
    let label = block_on(crate::Label::read(&device)).unwrap();
    let area = SlotArea::new(&gate, label, runtime);
    let who = Claimant {
        node_name: name.into(),
        host_name: "here".into(),
        process: ProcessIdentity::current().unwrap(),
        address: NO_ADDRESS,
        fingerprint: [0; 32],
    };
    let times = LeaseTimes { write_life: device.medium().write_life(None) };
    let locks: Arc<dyn SlotLocks> = Arc::new(device.clone());
    let claimed = block_on(claim(&area, &gate, &locks, who, times)).unwrap();
    RealNode { device, area, record: claimed.keeper.record() }
}

fn image_in(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("image");
    let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
    let file = FileDevice::create(&path, 2 * MIN_DEVICE_BYTES, OpenAs::default()).unwrap();
    let device: Arc<dyn Device> = Arc::new(file.clone());
    let times = LeaseTimes { write_life: file.medium().write_life(None) };
    let options = Default::default();
    block_on(async {
        let label =
            crate::mkfs::prepare(&device, &file, times, &runtime, &options, &|_| Vec::new()).await.unwrap();
        crate::mkfs::finish(&*device, &file, times, &*runtime, &label).await.unwrap();
    });
    path
}

/// Not a test of its own: the process that the tests below start. It claims a slot, says so, and waits.
#[test]
fn child_process_that_holds_a_slot() {
    let Some(image) = std::env::var_os(CHILD_IMAGE) else { return };
    let node = claim_on(Path::new(&image), "child");
    println!("\nclaimed {}", node.record.node);
    std::io::stdout().flush().unwrap();
    let _ = std::io::stdin().read(&mut [0]);
}

struct ChildNode(Child);

impl ChildNode {
    fn start(image: &Path) -> ChildNode {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "fence::tests::child_process_that_holds_a_slot", "--nocapture"])
            .env(CHILD_IMAGE, image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut lines = lines.map_while(Result::ok);
        assert!(lines.any(|line| line.starts_with("claimed")), "the child claims a slot");
        ChildNode(child)
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: plain integers; the child is ours and not yet waited for.
        assert_eq!(unsafe { libc::kill(self.0.id() as libc::pid_t, signal) }, 0);
    }
}

impl Drop for ChildNode {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn prover(node: &RealNode) -> SameHostProof {
    let runtime: Arc<dyn Runtime> = Arc::new(TestRuntime::new());
    let locks: Arc<dyn SlotLocks> = Arc::new(node.device.clone());
    SameHostProof::new(node.area.clone(), locks, runtime, node.record.node).unwrap()
}

fn child_record(node: &RealNode) -> SlotRecord {
    let look = block_on(node.area.look()).unwrap();
    look.records().find(|record| record.node_name == "child").unwrap().clone()
}

#[test]
fn a_killed_process_of_this_host_is_proven_dead_when_its_lock_falls() {
    let dir = tempfile::tempdir().unwrap();
    let image = image_in(dir.path());
    let (node, mut child) = (claim_on(&image, "prover"), ChildNode::start(&image));
    let victim = child_record(&node);
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    let confirmed = block_on(prover(&node).fence(&victim)).unwrap();
    assert_eq!(confirmed, Confirmed { method: "same host", proof: Proof::ProcessGone });
    // Its slot is free for its next incarnation, without a wait.
    let again = claim_on(&image, "child");
    assert_eq!((again.record.node, again.record.incarnation.0), (victim.node, victim.incarnation.0 + 1));
    assert_eq!(block_on(prover(&node).fence(&victim)).unwrap().proof, Proof::SlotReused);
}

#[test]
fn a_stopped_process_of_this_host_is_killed_first() {
    let dir = tempfile::tempdir().unwrap();
    let image = image_in(dir.path());
    let (node, mut child) = (claim_on(&image, "prover"), ChildNode::start(&image));
    child.signal(libc::SIGSTOP);
    let confirmed = block_on(prover(&node).fence(&child_record(&node))).unwrap();
    assert_eq!(confirmed.proof, Proof::ProcessGone);
    use std::os::unix::process::ExitStatusExt;
    assert_eq!(child.0.wait().unwrap().signal(), Some(libc::SIGKILL));
}

#[test]
fn a_process_with_the_same_pid_but_another_start_is_not_killed() {
    let dir = tempfile::tempdir().unwrap();
    let image = image_in(dir.path());
    let (node, mut child) = (claim_on(&image, "prover"), ChildNode::start(&image));
    let mut victim = child_record(&node);
    victim.process.start_time += 1;
    let error = block_on(prover(&node).fence(&victim)).unwrap_err();
    assert!(matches!(error, FenceError::Failed(_)), "{error}");
    assert!(child.0.try_wait().unwrap().is_none(), "the child lives");
}

#[test]
fn the_proof_does_not_apply_to_another_boot_or_another_file_or_oneself() {
    let dir = tempfile::tempdir().unwrap();
    let image = image_in(dir.path());
    let node = claim_on(&image, "prover");
    let other = SlotRecord { node: NodeId(9), ..node.record.clone() };
    let elsewhere = ProcessIdentity { boot_id: [0; 16], ..other.process };
    let copy = crate::FileIdentity { ino: 0, ..other.file };
    let victims = [
        node.record.clone(),
        SlotRecord { process: elsewhere, ..other.clone() },
        SlotRecord { file: copy, ..other },
    ];
    for victim in victims {
        let result = block_on(prover(&node).fence(&victim));
        assert!(matches!(result, Err(FenceError::NotApplicable(_))), "{result:?}");
    }
}
