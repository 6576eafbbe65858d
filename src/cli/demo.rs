//! `matrix demo`: a cluster on this host to try things in; nothing of it stays behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::{Context, Failure, mkfs, size, umount};
use crate::daemon::{self, MountOptions, MountRequest, registry};

#[derive(Args)]
pub(super) struct DemoArgs {
    /// How many nodes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u16).range(1..=64))]
    nodes: u16,
    /// Where to put the image and the mounts [default: a new directory under the temporary one]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Size of the image
    #[arg(long, default_value = "2G", value_parser = size::parse)]
    size: u64,
}

pub(super) fn run(args: DemoArgs) -> Result<ExitCode, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("demo")?;
    let mut demo = Demo::lay_out(args.dir)?;
    let result = runtime.block_on(async {
        let mut end = End::watch()?;
        demo.start(args.nodes, args.size, &mut end)?;
        demo.explain();
        end.wait().await;
        Ok(())
    });
    println!("\nCleaning up ...");
    demo.clean_up();
    result.map(|()| ExitCode::SUCCESS)
}

/// What ends the demo: an interrupt, a termination, or the end of standard input.
struct End {
    interrupt: Signal,
    terminate: Signal,
    hang_up: Signal,
    input: tokio::sync::oneshot::Receiver<()>,
}

impl End {
    fn watch() -> Result<End, Failure> {
        let (at_end, input) = tokio::sync::oneshot::channel();
        // The thread may stay in its read when a signal comes first; it ends with the process.
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut std::io::stdin().lock(), &mut std::io::sink());
            let _ = at_end.send(());
        });
        Ok(End {
            interrupt: signal(SignalKind::interrupt()).context("demo")?,
            terminate: signal(SignalKind::terminate()).context("demo")?,
            hang_up: signal(SignalKind::hangup()).context("demo")?,
            input,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
            _ = self.hang_up.recv() => {}
            _ = &mut self.input => {}
        }
    }
}

/// What the demo made, so that it can be taken away again.
struct Demo {
    dir: PathBuf,
    made_dir: bool,
    mounts: Vec<PathBuf>,
}

impl Demo {
    fn lay_out(dir: Option<PathBuf>) -> Result<Demo, Failure> {
        let dir =
            dir.unwrap_or_else(|| std::env::temp_dir().join(format!("matrix-demo-{}", std::process::id())));
        let dir = std::path::absolute(&dir).context(dir.display())?;
        let made_dir = !dir.exists();
        fs::create_dir_all(&dir).context(dir.display())?;
        let dir = fs::canonicalize(&dir).context(dir.display())?;
        let demo = Demo { dir, made_dir, mounts: Vec::new() };
        if demo.image().exists() {
            return Err(Failure::new(format!(
                "{}: a demo is or was here: end it, remove the directory, or choose another --dir",
                demo.dir.display()
            )));
        }
        Ok(demo)
    }

    fn image(&self) -> PathBuf {
        self.dir.join("disk.img")
    }

    fn start(&mut self, nodes: u16, size: u64, end: &mut End) -> Result<(), Failure> {
        let plan = mkfs::Plan { size: Some(size), label: "demo", ..mkfs::Plan::plain() };
        mkfs::make(&self.image(), &plan)?;
        for node in (1..=nodes).map(|n| format!("n{n}")) {
            if end.input.try_recv().is_ok() {
                return Err(Failure::new("standard input closed before the demo was ready"));
            }
            let dir = self.dir.join(&node);
            let run_dir = self.dir.join("run").join(&node);
            fs::create_dir_all(&dir).context(dir.display())?;
            daemon::RunDir::new(&run_dir).create().context(run_dir.display())?;
            self.mounts.push(dir.clone());
            daemon::launch(&MountRequest {
                device: self.image(),
                dir,
                node,
                run_dir,
                listen: Some(([127, 0, 0, 1], 0).into()),
                options: MountOptions::default(),
            })?;
        }
        Ok(())
    }

    fn explain(&self) {
        let program = std::env::current_exe().unwrap_or_else(|_| "matrix".into());
        let (matrix, dir) = (program.display(), self.dir.display());
        let last = self.mounts.len();
        println!("{last} nodes share one filesystem on {}:", self.image().display());
        for mount in &self.mounts {
            let pid = registry::find(mount).and_then(|e| e.run_dir().live_pid());
            println!("  {}  (daemon {})", mount.display(), pid.map_or("?".to_string(), |p| p.to_string()));
        }
        println!("\nTry, in another terminal:");
        println!("  echo hello > {dir}/n1/greeting; cat {dir}/n{last}/greeting");
        println!("  {matrix} status {dir}/n1");
        println!("  {matrix} locks {dir}/n1");
        println!("  kill -9 $(cat {dir}/run/n1/matrix.pid); ls {dir}/n{last}; {matrix} status {dir}/n{last}");
        println!(
            "  {matrix} mount {dir}/disk.img {dir}/n1 --node n1 --run-dir {dir}/run/n1 --listen 127.0.0.1:0"
        );
        println!("\nCtrl-C or the end of standard input unmounts everything and removes what the demo made.");
    }

    /// Unmounts and removes all that was made; says what could not be.
    fn clean_up(&self) {
        for mount in &self.mounts {
            if let Err(failure) = umount::unmount(mount, true)
                && failure.code != super::EXIT_NOT_MOUNTED
            {
                eprintln!("matrix: {}", failure.message);
            }
            let _ = fs::remove_dir(mount);
        }
        let _ = fs::remove_file(self.image());
        remove_tree(&self.dir.join("run"));
        if self.made_dir {
            let _ = fs::remove_dir(&self.dir);
        }
    }
}

fn remove_tree(dir: &Path) {
    if let Err(e) = fs::remove_dir_all(dir)
        && e.kind() != std::io::ErrorKind::NotFound
    {
        eprintln!("matrix: {}: {e}", dir.display());
    }
}
