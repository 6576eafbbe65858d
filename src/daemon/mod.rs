//! One node's daemon: from the mount request to the end of the mount.
//!
//! A daemon has one mount. It ends in one of two ways: in order (kernel mount gone, everything on disk, locks given
//! up, matrix left, slot released, exit code 0), or by stopping at once (gate closed, kernel connection aborted, the
//! mount left dead so that no program writes below it unaware, exit code 1) when the node may no longer write.

mod hooks;
mod launch;
pub(crate) mod mount_point;
mod node;
mod options;
mod patient;
pub(crate) mod process;
pub(crate) mod registry;
mod run_dir;
mod status;
mod wire;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{mpsc, oneshot};

use crate::control::{self, Handler, Hello, Reply, Request};
use crate::failure::{Context, Failure};
use crate::runtime::{self, RealRuntime};
use launch::Outcome;
use node::{News, Node};

pub(crate) use launch::launch;
pub(crate) use node::read_label;
pub(crate) use options::{AS_ARGUMENTS, MountOptions};
pub(crate) use run_dir::{RUN_ROOT, RunDir};

/// How long a command waits for a daemon's answer about itself.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How long a terminated daemon lets programs close their files before it takes the mount away from them.
const TERMINATE_GRACE: Duration = Duration::from_secs(5);
/// How often a terminated daemon tries again to unmount.
const TERMINATE_RETRY: Duration = Duration::from_millis(250);
/// How long the last reply may take to reach its client.
const LAST_REPLY: Duration = Duration::from_secs(5);

/// Everything a daemon needs to know: the arguments of `matrix mount`, made absolute.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct MountRequest {
    pub(crate) device: PathBuf,
    pub(crate) dir: PathBuf,
    pub(crate) node: String,
    pub(crate) run_dir: PathBuf,
    pub(crate) listen: Option<SocketAddr>,
    pub(crate) options: MountOptions,
}

/// The daemon's process, started by [`launch()`]: tells on standard output how the mount went.
pub(crate) fn main(request: &str) -> Result<ExitCode, Failure> {
    let request: MountRequest = serde_json::from_str(request).context("not a mount request")?;
    detach_from_caller();
    start_log();
    let result = serve(&request, || launch::report(&Outcome::Mounted));
    if let Err(failure) = &result {
        tracing::error!("{}", failure.message);
        launch::report(&Outcome::Refused(failure.message.clone()));
    }
    // The text is in the log already, and standard error is the log.
    Ok(if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The same in the command's own process.
pub(crate) fn foreground(request: &MountRequest) -> Result<ExitCode, Failure> {
    start_log();
    serve(request, || tracing::info!("mounted"))?;
    Ok(ExitCode::SUCCESS)
}

/// Leaves the caller's session, and closes what the caller happened to have open: a descriptor kept by a daemon
/// keeps pipes and mounts of others alive.
fn detach_from_caller() {
    // SAFETY: none of these touches memory; nothing in this process has opened a descriptor above 2 yet.
    unsafe {
        libc::setsid();
        libc::umask(0o077);
        libc::close_range(3, libc::c_uint::MAX, 0);
    }
}

/// Logs to standard error; MATRIX_LOG sets the level, or levels per module as in `info,dlm=debug`. A panic is a broken
/// invariant: the process stops, as if it were killed, before it can write anything more, and the others recover what
/// it had.
fn start_log() {
    use tracing_subscriber::filter::{LevelFilter, Targets};
    use tracing_subscriber::prelude::*;
    let wanted = std::env::var("MATRIX_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    // fuser warns that it cannot unmount what is unmounted already.
    let usual = || Targets::new().with_default(LevelFilter::INFO).with_target("fuser", LevelFilter::ERROR);
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(lines).with(wanted.unwrap_or_else(usual)).init();
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        usual(panic);
        std::process::abort();
    }));
}

/// Mounts, calls `ready`, and serves until the mount has ended.
fn serve(request: &MountRequest, ready: impl FnOnce()) -> Result<(), Failure> {
    let run_dir = RunDir::new(&request.run_dir);
    let at = format!("run directory {}", request.run_dir.display());
    run_dir.create().context(&at)?;
    let Some(lock) = run_dir.claim().context(&at)? else {
        return Err(Failure::new(format!("{at}: another daemon lives there: choose another --run-dir")));
    };
    let tokio = runtime::build().context("cannot start worker threads")?;
    let result = tokio.block_on(live(request, &run_dir, ready));
    // Whatever still runs is of no use any more; a thread that hangs in the device must not hold the process.
    tokio.shutdown_background();
    let _ = std::fs::remove_file(run_dir.control_socket());
    lock.release();
    result
}

/// What the main loop is asked over the control socket.
struct Ask {
    busy_too: bool,
    answer: oneshot::Sender<Reply>,
}

async fn live(request: &MountRequest, run_dir: &RunDir, ready: impl FnOnce()) -> Result<(), Failure> {
    let runtime = Arc::new(RealRuntime::start(tokio::runtime::Handle::current()).context("timer thread")?);
    let mut terminate = Terminate::watch()?;
    let (tell, mut news) = mpsc::unbounded_channel();
    let node = tokio::select! {
        started = Node::start(request, runtime, tell) => Arc::new(started?),
        () = terminate.asked() => return Err(Failure::new("terminated while mounting")),
    };
    let (ask, mut asked) = mpsc::channel(1);
    let desk = Arc::new(Desk { node: Arc::clone(&node), request: request.clone(), ask });
    let served = control::serve(&run_dir.control_socket(), desk).context("control socket")?;
    let entry = registry::Entry {
        dir: request.dir.clone(),
        run_dir: request.run_dir.clone(),
        device: request.device.clone(),
        node: request.node.clone(),
    };
    registry::add(&entry).context("registry of mounts")?;
    ready();

    let answer = loop {
        tokio::select! {
            Some(news) = news.recv() => match news {
                News::Unmounted => break None,
                News::MustStop(why) => {
                    node.abandon(&why);
                    return Err(Failure::new(format!("stopped: {why}")));
                }
            },
            () = terminate.asked() => {
                tracing::info!("terminated: unmounting");
                end_mount(&node).await;
                break None;
            }
            Some(ask) = asked.recv() => match node.unmount(ask.busy_too).await {
                Ok(()) => break Some(ask.answer),
                Err(e) => drop(ask.answer.send(Reply::Refused(why_busy(&request.dir, &e)))),
            },
        }
    };
    let stopped = node.stop().await;
    registry::remove(&request.dir, &request.run_dir);
    if let Some(answer) = answer {
        let _ = answer.send(match &stopped {
            Ok(()) => Reply::Done(serde_json::Value::Null),
            Err(failure) => Reply::Refused(failure.message.clone()),
        });
        served.drain(LAST_REPLY).await;
    }
    stopped
}

/// Unmounts for a termination: politely at first, then whoever uses it.
async fn end_mount(node: &Node) {
    let end = tokio::time::Instant::now() + TERMINATE_GRACE;
    while tokio::time::Instant::now() < end {
        if node.unmount(false).await.is_ok() {
            return;
        }
        tokio::time::sleep(TERMINATE_RETRY).await;
    }
    if let Err(e) = node.unmount(true).await {
        tracing::warn!("cannot take the mount out of the tree: {e}");
    }
}

fn why_busy(dir: &std::path::Path, error: &std::io::Error) -> String {
    if error.raw_os_error() != Some(libc::EBUSY) {
        return format!("cannot unmount: {error}");
    }
    let users = mount_point::users(dir);
    let by = if users.is_empty() { String::new() } else { format!(" by {}", users.join(", ")) };
    format!("in use{by}: end that first, or use --force")
}

/// SIGTERM, SIGINT or SIGHUP: all mean an orderly end.
struct Terminate {
    signals: [Signal; 3],
}

impl Terminate {
    fn watch() -> Result<Terminate, Failure> {
        let on = |kind| signal(kind).context("signals");
        Ok(Terminate {
            signals: [on(SignalKind::terminate())?, on(SignalKind::interrupt())?, on(SignalKind::hangup())?],
        })
    }

    async fn asked(&mut self) {
        let [a, b, c] = &mut self.signals;
        tokio::select! {
            _ = a.recv() => {}
            _ = b.recv() => {}
            _ = c.recv() => {}
        }
    }
}

/// Answers the control socket.
struct Desk {
    node: Arc<Node>,
    request: MountRequest,
    ask: mpsc::Sender<Ask>,
}

impl Handler for Desk {
    fn handle(&self, request: Request) -> storage_control::BoxFuture<Reply> {
        let reply = |value: serde_json::Result<serde_json::Value>| match value {
            Ok(value) => Reply::Done(value),
            Err(e) => Reply::Refused(format!("the answer cannot be written: {e}")),
        };
        let (node, ask) = (Arc::clone(&self.node), self.ask.clone());
        let hello = Hello {
            pid: std::process::id(),
            device: self.request.device.clone(),
            dir: self.request.dir.clone(),
            node: self.request.node.clone(),
        };
        Box::pin(async move {
            match request {
                Request::Hello {} => reply(serde_json::to_value(hello)),
                Request::Status {} => reply(serde_json::to_value(node.status())),
                Request::Locks { inode, waiting } => reply(serde_json::to_value(node.locks(inode, waiting))),
                Request::Unmount { busy_too } => {
                    let (answer, answered) = oneshot::channel();
                    if ask.send(Ask { busy_too, answer }).await.is_err() {
                        return Reply::Refused("the daemon is ending".into());
                    }
                    answered.await.unwrap_or_else(|_| Reply::Refused("the daemon is ending".into()))
                }
            }
        })
    }
}
