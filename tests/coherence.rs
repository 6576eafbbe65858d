//! Strict coherence: an operation on one node has returned, then another node looks, and must see it.
//!
//! One thread does both, so the order is certain. The nodes change places each round; one stale answer fails.

mod common;

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::Barrier;

use common::{Lab, Plan, check, path};

const NODES: usize = 3;
const ROUNDS: u64 = 150;

/// Runs `round(lab, number, acting node, looking node)` with the nodes changing places, then checks the filesystem.
fn rounds(setup: impl FnOnce(&Lab), mut round: impl FnMut(&Lab, u64, usize, usize)) {
    let mut lab = Plan::nodes(NODES).size("128M").start();
    setup(&lab);
    for r in 0..ROUNDS {
        let a = r as usize % NODES;
        round(&lab, r, a, (a + 1) % NODES);
    }
    lab.assert_clean();
}

/// The same over one open handle of the file `f` on each node.
fn handles(initial: &[u8], mut round: impl FnMut(&Lab, u64, &File, &File)) {
    let mut lab = Plan::nodes(NODES).size("128M").start();
    fs::write(lab.path(0, "f"), initial).expect("setup");
    let open: Vec<File> = (0..NODES).map(|n| read_write(&lab.path(n, "f"))).collect();
    for r in 0..ROUNDS {
        let a = r as usize % NODES;
        round(&lab, r, &open[a], &open[(a + 1) % NODES]);
    }
    drop(open);
    lab.assert_clean();
}

fn read_write(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).expect("open")
}

fn block(value: u64, len: usize) -> Vec<u8> {
    value.to_le_bytes().repeat(len / 8)
}

fn exists(path: PathBuf) -> bool {
    match fs::symlink_metadata(&path) {
        Ok(_) => true,
        Err(e) if e.kind() == io::ErrorKind::NotFound => false,
        Err(e) => panic!("{}: {e}", path.display()),
    }
}

fn listed(dir: PathBuf, name: &str) -> bool {
    fs::read_dir(dir).expect("readdir").any(|e| e.expect("entry").file_name() == name)
}

#[test]
fn what_was_written_before_close_is_read_after_open() {
    rounds(
        |lab| fs::write(lab.path(0, "f"), b"").expect("setup"),
        |lab, r, a, b| {
            let want = block(r + 1, 512 + (r as usize % 7) * 512);
            fs::write(lab.path(a, "f"), &want).expect("write");
            assert!(fs::read(lab.path(b, "f")).expect("read") == want, "round {r}");
        },
    );
}

#[test]
fn contents_are_seen_through_open_handles() {
    handles(&block(0, 4096), |_, r, a, b| {
        let (want, mut got) = (block(r + 1, 4096), vec![0; 4096]);
        a.write_all_at(&want, 0).expect("write");
        b.read_exact_at(&mut got, 0).expect("read");
        assert!(got == want, "round {r}");
    });
}

#[test]
fn writes_to_parts_of_one_page_are_all_kept() {
    let mut want = vec![0u8; 4096];
    handles(&[0; 4096], |_, r, a, b| {
        let at = (r as usize * 13) % 4088;
        want[at..at + 8].copy_from_slice(&(r + 1).to_le_bytes());
        a.write_all_at(&(r + 1).to_le_bytes(), at as u64).expect("write");
        let mut got = vec![0; 4096];
        b.read_exact_at(&mut got, 0).expect("read");
        assert!(got == want, "round {r}");
    });
}

#[test]
fn a_grown_size_is_seen_by_stat_and_fstat() {
    handles(b"", |lab, r, a, b| {
        a.write_all_at(&[1; 100], r * 100).expect("write");
        let by_path = fs::metadata(lab.path((r as usize + 1) % NODES, "f")).expect("stat").len();
        let by_handle = b.metadata().expect("fstat").len();
        assert_eq!((by_path, by_handle), (r * 100 + 100, r * 100 + 100), "round {r}");
    });
}

#[test]
fn bytes_behind_the_old_end_are_read() {
    handles(b"", |_, r, a, b| {
        a.write_all_at(&(r + 1).to_le_bytes(), r * 8).expect("write");
        let mut got = [0; 8];
        assert_eq!(b.read_at(&mut got, r * 8).expect("read"), 8, "round {r}");
        assert_eq!(u64::from_le_bytes(got), r + 1);
    });
}

#[test]
fn a_cut_file_is_read_as_cut() {
    handles(b"", |_, r, a, b| {
        b.write_all_at(&block(r + 1, 4096), 0).expect("write");
        let mut got = vec![9; 4096];
        a.read_exact_at(&mut got, 0).expect("read");
        a.set_len(100).expect("truncate");
        assert_eq!(b.read_at(&mut got, 0).expect("read"), 100, "round {r}");
        a.set_len(0).expect("truncate");
        assert_eq!(b.metadata().expect("fstat").len(), 0, "round {r}");
    });
}

#[test]
fn a_mapping_for_reading_shows_what_was_written_elsewhere() {
    let mut lab = Plan::nodes(NODES).size("128M").start();
    fs::write(lab.path(0, "f"), block(0, 4096)).expect("setup");
    let maps: Vec<Mapping> =
        (0..NODES).map(|n| Mapping::of(&File::open(lab.path(n, "f")).expect("open"))).collect();
    for r in 0..ROUNDS {
        let (a, b) = (r as usize % NODES, (r as usize + 1) % NODES);
        fs::OpenOptions::new()
            .write(true)
            .open(lab.path(a, "f"))
            .and_then(|f| f.write_all_at(&block(r + 1, 4096), 0))
            .expect("write");
        assert_eq!(maps[b].first_word(), r + 1, "round {r}");
    }
    drop(maps);
    lab.assert_clean();
}

/// One page of a file, mapped shared and read-only.
struct Mapping(*mut libc::c_void);

impl Mapping {
    fn of(file: &File) -> Mapping {
        // SAFETY: a new mapping of an open file; nothing else refers to its addresses.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, file.as_raw_fd(), 0)
        };
        assert_ne!(at, libc::MAP_FAILED);
        Mapping(at)
    }

    fn first_word(&self) -> u64 {
        // SAFETY: the page is mapped while `self` lives and is aligned for a word.
        unsafe { self.0.cast::<u64>().read_volatile() }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps what `of` mapped.
        unsafe { libc::munmap(self.0, 4096) };
    }
}

#[test]
fn a_created_file_can_be_opened() {
    rounds(
        |_| {},
        |lab, r, a, b| {
            let name = format!("f{r}");
            fs::write(lab.path(a, &name), b"new").expect("create");
            assert_eq!(fs::read(lab.path(b, &name)).expect("open"), b"new", "round {r}");
        },
    );
}

#[test]
fn a_name_seen_missing_appears_when_created() {
    rounds(
        |_| {},
        |lab, r, a, b| {
            let name = format!("f{r}");
            assert!(!exists(lab.path(b, &name)));
            File::create_new(lab.path(a, &name)).expect("create");
            assert!(exists(lab.path(b, &name)), "round {r}");
        },
    );
}

#[test]
fn a_listing_shows_creations_and_removals() {
    rounds(
        |_| {},
        |lab, r, a, b| {
            let name = format!("f{r}");
            assert!(!listed(lab.at(b), &name));
            File::create_new(lab.path(a, &name)).expect("create");
            assert!(listed(lab.at(b), &name), "round {r}");
            fs::remove_file(lab.path(a, &name)).expect("unlink");
            assert!(!listed(lab.at(b), &name), "round {r}");
        },
    );
}

#[test]
fn a_removed_file_is_gone() {
    rounds(
        |_| {},
        |lab, r, a, b| {
            let name = format!("f{r}");
            File::create_new(lab.path(a, &name)).expect("create");
            assert!(exists(lab.path(b, &name)));
            fs::remove_file(lab.path(a, &name)).expect("unlink");
            assert!(!exists(lab.path(b, &name)), "round {r}");
            assert!(File::open(lab.path(b, &name)).is_err(), "round {r}");
        },
    );
}

#[test]
fn a_renamed_file_has_its_new_name_only() {
    rounds(
        |_| {},
        |lab, r, a, b| {
            let (old, new) = (format!("f{r}"), format!("g{r}"));
            File::create_new(lab.path(a, &old)).expect("create");
            assert!(exists(lab.path(b, &old)) && !exists(lab.path(b, &new)));
            fs::rename(lab.path(a, &old), lab.path(a, &new)).expect("rename");
            assert!(!exists(lab.path(b, &old)) && exists(lab.path(b, &new)), "round {r}");
        },
    );
}

#[test]
fn a_replaced_file_is_read_as_the_new_one() {
    rounds(
        |lab| fs::write(lab.path(0, "f"), block(0, 4096)).expect("setup"),
        |lab, r, a, b| {
            fs::read(lab.path(b, "f")).expect("read");
            let (want, temporary) = (block(r + 1, 4096), lab.path(a, &format!("t{r}")));
            fs::write(&temporary, &want).expect("write");
            fs::rename(&temporary, lab.path(a, "f")).expect("rename");
            assert!(fs::read(lab.path(b, "f")).expect("read") == want, "round {r}");
        },
    );
}

#[test]
fn directories_come_and_go() {
    rounds(
        |_| {},
        |lab, r, a, b| {
            let name = format!("d{r}");
            assert!(!exists(lab.path(b, &name)));
            fs::create_dir(lab.path(a, &name)).expect("mkdir");
            fs::write(lab.path(b, &format!("{name}/x")), b"in it").expect("create in it");
            let error = fs::remove_dir(lab.path(a, &name)).expect_err("not empty");
            assert_eq!(error.raw_os_error(), Some(libc::ENOTEMPTY), "round {r}");
            fs::remove_file(lab.path(a, &format!("{name}/x"))).expect("unlink");
            fs::remove_dir(lab.path(a, &name)).expect("rmdir");
            assert!(!exists(lab.path(b, &name)), "round {r}");
        },
    );
}

#[test]
fn link_counts_follow() {
    rounds(
        |lab| fs::write(lab.path(0, "f"), b"x").expect("setup"),
        |lab, r, a, b| {
            let links = || fs::metadata(lab.path(b, "f")).expect("stat").nlink();
            fs::hard_link(lab.path(a, "f"), lab.path(a, &format!("l{r}"))).expect("link");
            assert_eq!(links(), 2, "round {r}");
            fs::remove_file(lab.path(a, &format!("l{r}"))).expect("unlink");
            assert_eq!(links(), 1, "round {r}");
        },
    );
}

#[test]
fn a_swapped_symlink_is_followed_to_its_new_target() {
    rounds(
        |lab| symlink("start", lab.path(0, "cur")).expect("setup"),
        |lab, r, a, b| {
            fs::read_link(lab.path(b, "cur")).expect("readlink");
            let (want, temporary) = (format!("target{r}"), lab.path(a, &format!("t{r}")));
            symlink(&want, &temporary).expect("symlink");
            fs::rename(&temporary, lab.path(a, "cur")).expect("rename");
            assert_eq!(path(&fs::read_link(lab.path(b, "cur")).expect("readlink")), want, "round {r}");
        },
    );
}

#[test]
fn modes_and_times_follow() {
    handles(b"x", |lab, r, a, b| {
        let (acting, looking) = (r as usize % NODES, (r as usize + 1) % NODES);
        let mode = 0o600 + (r as u32 % 64);
        fs::set_permissions(lab.path(acting, "f"), fs::Permissions::from_mode(mode)).expect("chmod");
        assert_eq!(fs::metadata(lab.path(looking, "f")).expect("stat").mode() & 0o7777, mode, "round {r}");
        let time = 1_000_000_000 + r as i64;
        let times = [libc::timespec { tv_sec: time, tv_nsec: 5 }; 2];
        // SAFETY: an open descriptor and an array of two times.
        check(unsafe { libc::futimens(a.as_raw_fd(), times.as_ptr()) }).expect("futimens");
        let seen = b.metadata().expect("fstat");
        assert_eq!((seen.mtime(), seen.mtime_nsec()), (time, 5), "round {r}");
    });
}

#[test]
fn all_nodes_report_the_same_times_after_a_write() {
    handles(b"x", |lab, r, a, _| {
        a.write_all_at(b"y", r).expect("write");
        let seen: Vec<_> = (0..NODES)
            .map(|n| {
                let m = fs::metadata(lab.path(n, "f")).expect("stat");
                (m.len(), m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec(), m.ino())
            })
            .collect();
        assert!(seen.iter().all(|s| *s == seen[0]), "round {r}: {seen:?}");
    });
}

#[test]
fn extended_attributes_follow() {
    handles(b"x", |_, r, a, b| {
        let (value, name) = (r.to_le_bytes(), c"user.k");
        // SAFETY: an open descriptor, a zero-terminated name and a value of the length given.
        let set = unsafe { libc::fsetxattr(a.as_raw_fd(), name.as_ptr(), value.as_ptr().cast(), 8, 0) };
        check(set).expect("fsetxattr");
        let mut got = [0u8; 8];
        // SAFETY: as above, with a buffer of the length given.
        let len = unsafe { libc::fgetxattr(b.as_raw_fd(), name.as_ptr(), got.as_mut_ptr().cast(), 8) };
        assert_eq!((len, got), (8, value), "round {r}");
    });
}

#[test]
fn a_file_removed_elsewhere_stays_usable_while_open() {
    rounds(
        |_| {},
        |lab, r, a, b| {
            let name = format!("f{r}");
            let options = OpenOptions::new().read(true).write(true).create_new(true).clone();
            let file = options.open(lab.path(a, &name)).expect("create");
            file.write_all_at(&block(r, 4096), 0).expect("write");
            fs::remove_file(lab.path(b, &name)).expect("unlink elsewhere");
            file.write_all_at(&block(r + 1, 4096), 4096).expect("write after the unlink");
            let mut got = vec![0; 8192];
            file.read_exact_at(&mut got, 0).expect("read after the unlink");
            assert!(got == [block(r, 4096), block(r + 1, 4096)].concat(), "round {r}");
            file.sync_all().expect("fsync after the unlink");
            assert_eq!(file.metadata().expect("fstat").len(), 8192, "round {r}");
        },
    );
}

/// All nodes try at once; exactly one wins.
fn race(prepare: impl Fn(&Lab, u64), attempt: impl Fn(&Lab, u64, usize) -> bool + Sync) {
    let mut lab = Plan::nodes(NODES).size("128M").start();
    for r in 0..ROUNDS {
        prepare(&lab, r);
        let start = Barrier::new(NODES);
        let winners = std::thread::scope(|scope| {
            let tries: Vec<_> = (0..NODES)
                .map(|n| {
                    let (lab, start, attempt) = (&lab, &start, &attempt);
                    scope.spawn(move || {
                        start.wait();
                        attempt(lab, r, n)
                    })
                })
                .collect();
            tries.into_iter().map(|t| t.join().expect("no panic")).filter(|won| *won).count()
        });
        assert_eq!(winners, 1, "round {r}");
    }
    lab.assert_clean();
}

#[test]
fn one_node_wins_an_exclusive_creation() {
    race(|_, _| {}, |lab, r, n| File::create_new(lab.path(n, &format!("x{r}"))).is_ok());
}

#[test]
fn one_node_wins_a_mkdir() {
    race(|_, _| {}, |lab, r, n| fs::create_dir(lab.path(n, &format!("x{r}"))).is_ok());
}

#[test]
fn one_node_wins_a_link() {
    race(
        |lab, r| {
            (0..NODES)
                .for_each(|n| drop(File::create_new(lab.path(0, &format!("s{r}.{n}"))).expect("source")))
        },
        |lab, r, n| fs::hard_link(lab.path(n, &format!("s{r}.{n}")), lab.path(n, &format!("x{r}"))).is_ok(),
    );
}

#[test]
fn one_node_wins_a_rename() {
    race(
        |lab, r| drop(File::create_new(lab.path(0, &format!("s{r}"))).expect("source")),
        |lab, r, n| fs::rename(lab.path(n, &format!("s{r}")), lab.path(n, &format!("w{n}.{r}"))).is_ok(),
    );
}
