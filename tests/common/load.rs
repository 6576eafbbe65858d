//! Work that goes on in a node's own directory while others are killed, stopped or cut off.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// A writer that creates, fsyncs and removes files in one directory until it is told to stop or fails.
pub struct Load {
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
    thread: Option<JoinHandle<Report>>,
}

/// What a load did.
#[derive(Debug)]
pub struct Report {
    /// Numbers of the files that were fsynced, directory included, and not removed since
    pub kept: Vec<u64>,
    /// The longest operation
    pub longest: Duration,
    /// What ended the load early
    pub error: Option<io::Error>,
}

/// Every this many files one is fsynced and kept.
const KEEP_EVERY: u64 = 8;

impl Load {
    /// Starts writing in `dir`, which is made.
    pub fn start(dir: PathBuf) -> Load {
        fs::create_dir_all(&dir).expect("the load's directory");
        let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (Arc::clone(&stop), Arc::clone(&done));
        let thread = std::thread::spawn(move || {
            let mut report = Report { kept: Vec::new(), longest: Duration::ZERO, error: None };
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                let start = Instant::now();
                if let Err(e) = step(&dir, number, &mut report.kept) {
                    report.error = Some(e);
                    break;
                }
                report.longest = report.longest.max(start.elapsed());
                counted.fetch_add(1, Ordering::Relaxed);
            }
            report
        });
        Load { stop, done, thread: Some(thread) }
    }

    /// Steps done so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Waits until `more` further steps are done.
    #[track_caller]
    pub fn advance(&self, more: u64) {
        let goal = self.done() + more;
        super::wait_until("the load goes on", super::SOON, || {
            self.done() >= goal || self.thread.as_ref().is_some_and(JoinHandle::is_finished)
        });
    }

    /// Ends the load and tells what it did.
    pub fn finish(mut self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().expect("finished once").join().expect("the load does not panic")
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn step(dir: &Path, number: u64, kept: &mut Vec<u64>) -> io::Result<()> {
    let path = dir.join(format!("f{number}"));
    let mut file = File::create_new(&path)?;
    file.write_all(&content(number))?;
    if number.is_multiple_of(KEEP_EVERY) {
        file.sync_all()?;
        File::open(dir)?.sync_all()?;
        kept.push(number);
    } else {
        drop(file);
        fs::remove_file(&path)?;
    }
    Ok(())
}

fn content(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(64 + (number as usize % 7) * 900)
}

/// Every file that was fsynced in `dir` is there with its content.
#[track_caller]
pub fn assert_kept(dir: &Path, kept: &[u64]) {
    for number in kept {
        let found = fs::read(dir.join(format!("f{number}"))).unwrap_or_else(|e| panic!("f{number}: {e}"));
        assert!(found == content(*number), "f{number} has another content");
    }
}
