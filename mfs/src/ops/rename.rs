//! `rename`, with `RENAME_NOREPLACE` and `RENAME_EXCHANGE`.
//!
//! A directory that changes its parent takes the rename lock: while one node holds it no directory of the whole
//! tree moves, so that what was found on the way up to the root stays true. Only then can a directory be
//! refused a place below itself. So does a rename that begins again because somebody was in its way: of all who
//! do, one is under way, and they cannot go on refusing each other for ever.

use dlm::Mode;
use lcl::{Guard, Scope};

use super::make::touch_dir;
use super::{Ino, RenameFlags, Result};
use crate::alloc::{Reservation, Want};
use crate::dir::{self, Dirent, Target};
use crate::error::FsError;
use crate::filesystem::{Filesystem, Held, group_of};
use crate::inode::{self, FileType, Needs};
use crate::lock_name::LockName;
use crate::store::Txn;

/// More levels than any path can have.
const MAX_LEVELS: usize = 1 << 20;

#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) dir: Ino,
    pub(super) name: &'a [u8],
}

enum Attempt {
    Done,
    /// Somebody is in the way: to be waited for with nothing held.
    Wait(LockName),
    /// What was found before the locks were taken is no longer so.
    Changed,
}

/// The one or two directories, locked.
struct Dirs {
    from: Held,
    /// `None`: the same.
    to: Option<Held>,
}

impl Dirs {
    fn to(&self) -> &Held {
        self.to.as_ref().unwrap_or(&self.from)
    }

    fn to_mut(&mut self) -> &mut Held {
        self.to.as_mut().unwrap_or(&mut self.from)
    }
}

fn is_dir(entry: &Option<Dirent>) -> bool {
    entry.as_ref().is_some_and(|e| e.kind == FileType::Directory)
}

impl Filesystem {
    pub(super) async fn move_name(&self, from: Place<'_>, to: Place<'_>, flags: RenameFlags) -> Result<()> {
        self.writable()?;
        if flags.no_replace && flags.exchange {
            return Err(FsError::Invalid);
        }
        dir::check_name(from.name)?;
        dir::check_name(to.name)?;
        // Held from the first refusal to the end.
        let mut rename = None;
        loop {
            match self.try_move(from, to, flags, &mut rename).await? {
                Attempt::Done => return Ok(()),
                Attempt::Wait(name) => {
                    self.lock_renames(&mut rename).await?;
                    drop(self.lock(name, Mode::EX, Scope::Process).await?);
                }
                Attempt::Changed => {}
            }
        }
    }

    async fn peek(&self, place: Place<'_>) -> Result<Option<Dirent>> {
        let dir = self.hold(place.dir, Mode::PR).await?;
        dir.as_live_dir()?;
        dir::lookup(&self.store, &dir.dinode, place.name).await
    }

    async fn lock_renames(&self, rename: &mut Option<Guard>) -> Result<()> {
        if rename.is_none() {
            *rename = Some(self.lock(LockName::Rename, Mode::EX, Scope::Process).await?);
        }
        Ok(())
    }

    async fn try_move(
        &self,
        from: Place<'_>,
        to: Place<'_>,
        flags: RenameFlags,
        rename: &mut Option<Guard>,
    ) -> Result<Attempt> {
        let (mut seen_from, mut seen_to) = (None, None);
        if from.dir != to.dir {
            (seen_from, seen_to) = (self.peek(from).await?, self.peek(to).await?);
            if is_dir(&seen_from) || (flags.exchange && is_dir(&seen_to)) {
                self.lock_renames(rename).await?;
                self.refuse_loops(from, to, &seen_from, &seen_to, flags).await?;
            }
        }
        let mut dirs = match self.lock_dirs(from.dir, to.dir).await? {
            Ok(dirs) => dirs,
            Err(busy) => return Ok(Attempt::Wait(busy)),
        };
        let removal = dir::plan_remove(&self.store, &dirs.from.dinode, from.name).await?;
        let target = dir::lookup(&self.store, &dirs.to().dinode, to.name).await?;
        if from.dir != to.dir {
            // Whether the rename lock was needed, and that nothing moves below itself, is known of what was
            // seen only.
            let same = |a: Option<&Dirent>, b: &Option<Dirent>| a.map(|e| e.ino) == b.as_ref().map(|e| e.ino);
            if !same(removal.as_ref().map(|r| &r.dirent), &seen_from) || !same(target.as_ref(), &seen_to) {
                return Ok(Attempt::Changed);
            }
        }
        let removal = removal.ok_or(FsError::NotFound)?;
        if flags.no_replace && target.is_some() {
            return Err(FsError::Exists);
        }
        let Some(target) = target else {
            if flags.exchange {
                return Err(FsError::NotFound);
            }
            let mut source = match self.lock_entries(&removal.dirent, None).await? {
                Ok((source, _)) => source,
                Err(busy) => return Ok(Attempt::Wait(busy)),
            };
            self.move_to_new(&mut dirs, &removal, to.name, &mut source).await?;
            return Ok(Attempt::Done);
        };
        if target.ino == removal.dirent.ino {
            return Ok(Attempt::Done);
        }
        if !flags.exchange {
            match (removal.dirent.kind == FileType::Directory, target.kind == FileType::Directory) {
                (true, false) => return Err(FsError::NotDir),
                (false, true) => return Err(FsError::IsDir),
                (true, true) | (false, false) => {}
            }
        }
        let (mut source, victim) = match self.lock_entries(&removal.dirent, Some(&target)).await? {
            Ok((source, victim)) => (source, victim.expect("two entries were locked")),
            Err(busy) => return Ok(Attempt::Wait(busy)),
        };
        if flags.exchange {
            self.exchange(&mut dirs, from.name, to.name, source, victim).await?;
        } else {
            if victim.dinode.is_dir() && !dir::is_empty(&victim.dinode) {
                return Err(FsError::NotEmpty);
            }
            self.move_over(&mut dirs, &removal, to.name, &mut source, victim).await?;
        }
        Ok(Attempt::Done)
    }

    /// The rename lock is held: what is above what stays so.
    async fn refuse_loops(
        &self,
        from: Place<'_>,
        to: Place<'_>,
        source: &Option<Dirent>,
        target: &Option<Dirent>,
        flags: RenameFlags,
    ) -> Result<()> {
        if let Some(source) = source
            && source.kind == FileType::Directory
            && self.is_above(Ino(source.ino), to.dir).await?
        {
            return Err(FsError::Invalid);
        }
        if let Some(target) = target
            && target.kind == FileType::Directory
            && self.is_above(Ino(target.ino), from.dir).await?
        {
            return Err(if flags.exchange { FsError::Invalid } else { FsError::NotEmpty });
        }
        Ok(())
    }

    /// Whether the directory is `below` or on the way from it to the root.
    async fn is_above(&self, dir: Ino, below: Ino) -> Result<bool> {
        let mut at = below;
        for _ in 0..MAX_LEVELS {
            if at == dir {
                return Ok(true);
            }
            if at == self.root_ino() {
                return Ok(false);
            }
            let held = self.hold(at, Mode::PR).await?;
            held.as_live_dir()?;
            at = Ino(held.dinode.parent);
        }
        Err(FsError::corrupt("directory", below.block(), "it has no way to the root"))
    }

    /// Locks both in number order, the second by try: one may be above the other.
    async fn lock_dirs(&self, from: Ino, to: Ino) -> Result<std::result::Result<Dirs, LockName>> {
        if from == to {
            let from = self.hold(from, Mode::EX).await?;
            from.as_live_dir()?;
            return Ok(Ok(Dirs { from, to: None }));
        }
        let (first, second) = if from < to { (from, to) } else { (to, from) };
        let held_first = self.hold(first, Mode::EX).await?;
        held_first.as_live_dir()?;
        let name = LockName::Inode(second.0);
        let Some(guard) = self.try_lock(name, Mode::EX, Scope::Process).await? else { return Ok(Err(name)) };
        let held_second = self.with_dinode(second, guard).await?;
        held_second.as_live_dir()?;
        let (from, to) = if from < to { (held_first, held_second) } else { (held_second, held_first) };
        Ok(Ok(Dirs { from, to: Some(to) }))
    }

    /// Locks what the entries name, in number order, the second by try.
    async fn lock_entries(
        &self,
        source: &Dirent,
        target: Option<&Dirent>,
    ) -> Result<std::result::Result<(Held, Option<Held>), LockName>> {
        let Some(target) = target else { return Ok(Ok((self.hold_entry(source, Mode::EX).await?, None))) };
        let (first, second) = if source.ino < target.ino { (source, target) } else { (target, source) };
        let held_first = self.hold_entry(first, Mode::EX).await?;
        let name = LockName::Inode(second.ino);
        let guard: Option<Guard> = self.try_lock(name, Mode::EX, Scope::Process).await?;
        let Some(guard) = guard else { return Ok(Err(name)) };
        let held_second = self.with_dinode_of(second, guard).await?;
        Ok(Ok(if source.ino < target.ino {
            (held_first, Some(held_second))
        } else {
            (held_second, Some(held_first))
        }))
    }

    /// The new name does not exist.
    async fn move_to_new(
        &self,
        dirs: &mut Dirs,
        removal: &dir::Removal,
        new_name: &[u8],
        source: &mut Held,
    ) -> Result<()> {
        let needs =
            dir::insert_needs(&dirs.to().dinode) + Needs { meta: 0, credits: dir::REMOVE_CREDITS + 3 };
        let near = group_of(&self.geometry, dirs.to().ino());
        let mut reservation = self.alloc.reserve(Want { meta: needs.meta, near, ..Want::default() }).await?;
        let inode = source.inode.clone();
        let _edit = inode.edit.write().await;
        self.read_again(source).await?;
        let mut txn = self.store.begin(needs.credits + reservation.credits()).await?;
        let result = async {
            let target = Target::of(&source.dinode);
            let to = &mut dirs.to_mut().dinode;
            dir::insert(&self.store, &mut txn, &mut reservation, to, new_name, target).await?;
            dir::remove(&self.store, &mut txn, None, &mut dirs.from.dinode, removal).await?;
            move_links(dirs, source);
            self.write_moved(&mut txn, dirs, source).await
        }
        .await;
        self.changed_by_move(&txn, dirs, source);
        self.finish(txn, result)
    }

    /// The new name exists and loses its inode.
    async fn move_over(
        &self,
        dirs: &mut Dirs,
        removal: &dir::Removal,
        new_name: &[u8],
        source: &mut Held,
        mut victim: Held,
    ) -> Result<()> {
        let slot = self.orphan_slot_for(&victim);
        let mut reservation = self.reserve_slot(slot.as_ref()).await?;
        let (one, two) = (source.inode.clone(), victim.inode.clone());
        let _edits = if one.ino < two.ino {
            (one.edit.write().await, two.edit.write().await)
        } else {
            (two.edit.write().await, one.edit.write().await)
        };
        self.read_again(source).await?;
        self.read_again(&mut victim).await?;
        let credits = dir::REMOVE_CREDITS
            + dir::REPLACE_CREDITS
            + 4
            + slot.as_ref().map_or(0, |slot| slot.needs().credits)
            + reservation.as_ref().map_or(0, Reservation::credits);
        let mut txn = self.store.begin(credits).await?;
        let result = async {
            let target = Target::of(&source.dinode);
            dir::replace(&self.store, &mut txn, &mut dirs.to_mut().dinode, new_name, target).await?;
            dir::remove(&self.store, &mut txn, None, &mut dirs.from.dinode, removal).await?;
            move_links(dirs, source);
            dirs.to_mut().dinode.nlink -= u32::from(victim.dinode.is_dir());
            self.touch_inode(&mut victim, self.now());
            self.drop_name(&mut txn, &mut victim, slot, reservation.as_mut()).await?;
            self.write_moved(&mut txn, dirs, source).await
        }
        .await;
        self.changed(&txn, &victim.inode);
        self.changed_by_move(&txn, dirs, source);
        self.finish(txn, result)?;
        self.reap_if_orphan(&victim);
        Ok(())
    }

    async fn exchange(
        &self,
        dirs: &mut Dirs,
        name: &[u8],
        new_name: &[u8],
        mut one: Held,
        mut two: Held,
    ) -> Result<()> {
        let (a, b) = (one.inode.clone(), two.inode.clone());
        let _edits = if a.ino < b.ino {
            (a.edit.write().await, b.edit.write().await)
        } else {
            (b.edit.write().await, a.edit.write().await)
        };
        self.read_again(&mut one).await?;
        self.read_again(&mut two).await?;
        let mut txn = self.store.begin(2 * dir::REPLACE_CREDITS + 4).await?;
        let result = async {
            let (first, second) = (Target::of(&one.dinode), Target::of(&two.dinode));
            dir::replace(&self.store, &mut txn, &mut dirs.to_mut().dinode, new_name, first).await?;
            dir::replace(&self.store, &mut txn, &mut dirs.from.dinode, name, second).await?;
            move_links(dirs, &mut one);
            if let Some(to) = &mut dirs.to
                && two.dinode.is_dir()
            {
                two.dinode.parent = dirs.from.dinode.ino;
                dirs.from.dinode.nlink += 1;
                to.dinode.nlink -= 1;
            }
            self.touch_inode(&mut two, self.now());
            inode::write(&mut txn, &two.dinode).await?;
            self.write_moved(&mut txn, dirs, &mut one).await
        }
        .await;
        self.changed(&txn, &two.inode);
        self.changed_by_move(&txn, dirs, &one);
        self.finish(txn, result)
    }

    async fn write_moved(&self, txn: &mut Txn, dirs: &mut Dirs, source: &mut Held) -> Result<()> {
        let now = self.now();
        touch_dir(&mut dirs.from.dinode, now);
        inode::write(txn, &dirs.from.dinode).await?;
        if let Some(to) = &mut dirs.to {
            touch_dir(&mut to.dinode, now);
            inode::write(txn, &to.dinode).await?;
        }
        self.touch_inode(source, now);
        inode::write(txn, &source.dinode).await
    }

    fn changed_by_move(&self, txn: &Txn, dirs: &Dirs, source: &Held) {
        self.changed(txn, &source.inode);
        self.changed(txn, &dirs.from.inode);
        self.changed(txn, &dirs.to().inode);
    }
}

/// A directory that changes its parent takes its `..` along.
fn move_links(dirs: &mut Dirs, source: &mut Held) {
    if let Some(to) = &mut dirs.to
        && source.dinode.is_dir()
    {
        source.dinode.parent = to.dinode.ino;
        dirs.from.dinode.nlink -= 1;
        to.dinode.nlink += 1;
    }
}
