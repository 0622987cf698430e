//! Reads the log of `recorder/recorder.c` and works out what a power cut could have left at any point of it.
//!
//! The model is the pessimistic one of POSIX, not that of one file system:
//!
//! - Data: each 4 KiB page of a file holds, after a cut, the version of the last completed sync of that file or any
//!   later one, each page by itself. A sync covers what was logged before it *began*, once it has *ended*.
//! - Length: the same, one version for the file; pages beyond it are gone.
//! - Names: each directory keeps its entries of the last fsync of that directory and any prefix of the later changes.
//!   A file whose name was not made durable is gone, whatever was synced into it.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use stillpoint_snapshot::sim::{Loss, Medium, Rng};

type Inode = usize;

/// One record of the log.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Open {
        fd: i32,
        flags: u64,
        path: PathBuf,
    },
    Close {
        fd: i32,
    },
    Write {
        fd: i32,
        offset: u64,
        durable: bool,
        data: Vec<u8>,
    },
    Truncate {
        fd: i32,
        len: u64,
    },
    SyncBegin {
        fd: i32,
        token: u64,
    },
    SyncEnd {
        token: u64,
        good: bool,
    },
    Punch {
        fd: i32,
        offset: u64,
        len: u64,
    },
    Allocate {
        fd: i32,
        len: u64,
    },
    Rename {
        /// Both names exist and change places.
        exchange: bool,
        from: PathBuf,
        to: PathBuf,
    },
    Unlink {
        path: PathBuf,
    },
    Mkdir {
        path: PathBuf,
    },
    Rmdir {
        path: PathBuf,
    },
    Dup {
        fd: i32,
        copy: i32,
    },
    FileRange,
}

/// Reads a whole log. Panics on what the recorder does not follow: a replay of it would prove nothing.
pub(crate) fn read_log(path: &Path) -> Vec<Event> {
    let bytes = fs::read(path).expect("the log of the recorder");
    let mut events = Vec::new();
    let mut at = 0;
    while at + 32 <= bytes.len() {
        let word = |i: usize| u64::from_le_bytes(bytes[at + i..at + i + 8].try_into().unwrap());
        let op = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let fd = i32::from_le_bytes(bytes[at + 4..at + 8].try_into().unwrap());
        let (a, b, len) = (word(8), word(16), word(24) as usize);
        let Some(text) = bytes.get(at + 32..at + 32 + len) else {
            break;
        };
        at += 32 + len;
        let name = || PathBuf::from(std::str::from_utf8(text).expect("paths of the test are UTF-8"));
        events.push(match op {
            1 => Event::Open {
                fd,
                flags: a,
                path: name(),
            },
            2 => Event::Close { fd },
            3 => Event::Write {
                fd,
                offset: a,
                durable: b != 0,
                data: text.to_vec(),
            },
            4 => Event::Truncate { fd, len: a },
            5 => Event::SyncBegin { fd, token: a },
            6 => Event::SyncEnd {
                token: a,
                good: b != 0,
            },
            7 => Event::Punch {
                fd,
                offset: a,
                len: b,
            },
            8 => Event::Allocate { fd, len: a },
            9 => {
                let cut = text.iter().position(|&byte| byte == 0).expect("two paths");
                let part = |bytes: &[u8]| PathBuf::from(std::str::from_utf8(bytes).unwrap());
                Event::Rename {
                    exchange: a & 2 != 0,
                    from: part(&text[..cut]),
                    to: part(&text[cut + 1..]),
                }
            }
            10 => Event::Unlink { path: name() },
            11 => Event::Mkdir { path: name() },
            12 => Event::Rmdir { path: name() },
            13 => Event::Dup { fd, copy: a as i32 },
            14 => Event::FileRange,
            _ => panic!(
                "the recorder does not follow {op}: {}",
                String::from_utf8_lossy(text)
            ),
        });
    }
    events
}

#[derive(Clone, Debug)]
enum NameChange {
    Set(String, Inode),
    Remove(String),
    Move(String, String, Inode),
    Swap([(String, Inode); 2]),
}

/// What a disk may hold of one file or directory.
#[derive(Default)]
struct Node {
    is_dir: bool,
    medium: Medium,
    entries: BTreeMap<String, Inode>,
    durable_entries: BTreeMap<String, Inode>,
    pending_entries: Vec<(u64, NameChange)>,
}

fn apply(entries: &mut BTreeMap<String, Inode>, change: &NameChange) {
    match change {
        NameChange::Set(name, inode) => drop(entries.insert(name.clone(), *inode)),
        NameChange::Remove(name) => drop(entries.remove(name)),
        NameChange::Swap(both) => entries.extend(both.iter().cloned()),
        NameChange::Move(from, to, inode) => {
            entries.remove(from);
            entries.insert(to.clone(), *inode);
        }
    }
}

impl Node {
    /// Everything that was done before `marks` (of the names, of the data) is on the disk now.
    fn make_durable(&mut self, marks: (u64, u64)) {
        self.medium.make_durable(marks.1);
        let covered = self.pending_entries.partition_point(|(when, _)| *when <= marks.0);
        for (_, change) in self.pending_entries.drain(..covered) {
            apply(&mut self.durable_entries, &change);
        }
    }
}

/// The file system below one directory, as far as a log was followed.
pub(crate) struct FileSystem {
    root: PathBuf,
    nodes: Vec<Node>,
    open: HashMap<i32, Inode>,
    syncs: HashMap<u64, (Inode, (u64, u64))>,
    now: u64,
}

impl FileSystem {
    /// `root` exists, is empty and durable.
    pub(crate) fn new(root: &Path) -> Self {
        let top = Node {
            is_dir: true,
            ..Node::default()
        };
        Self {
            root: root.to_owned(),
            nodes: vec![top],
            open: HashMap::new(),
            syncs: HashMap::new(),
            now: 0,
        }
    }

    fn create(&mut self, is_dir: bool) -> Inode {
        self.nodes.push(Node {
            is_dir,
            ..Node::default()
        });
        self.nodes.len() - 1
    }

    fn lookup(&self, path: &Path) -> Option<Inode> {
        let below = path
            .strip_prefix(&self.root)
            .expect("recorded paths are below the root");
        below.iter().try_fold(0, |inode, name| {
            self.nodes[inode].entries.get(name.to_str()?).copied()
        })
    }

    fn change_entry(&mut self, path: &Path, change: impl FnOnce(String) -> NameChange) {
        let parent = self
            .lookup(path.parent().expect("not the root"))
            .expect("the directory is known");
        let change = change(name_of(path));
        let now = self.now;
        let node = &mut self.nodes[parent];
        apply(&mut node.entries, &change);
        node.pending_entries.push((now, change));
    }

    /// Follows one event.
    pub(crate) fn apply(&mut self, event: &Event) {
        self.now += 1;
        match event {
            Event::Open { fd, flags, path } => {
                let inode = self.lookup(path).unwrap_or_else(|| {
                    assert!(
                        flags & 0o100 != 0,
                        "{} was opened but never created",
                        path.display()
                    );
                    let inode = self.create(false);
                    self.change_entry(path, |name| NameChange::Set(name, inode));
                    inode
                });
                if flags & 0o1000 != 0 {
                    self.nodes[inode].medium.set_len(0);
                }
                self.open.insert(*fd, inode);
            }
            Event::Close { fd } => drop(self.open.remove(fd)),
            Event::Dup { fd, copy } => {
                let inode = self.open[fd];
                self.open.insert(*copy, inode);
            }
            Event::Write {
                fd,
                offset,
                durable,
                data,
            } => {
                let medium = &mut self.nodes[self.open[fd]].medium;
                medium.write(*offset, data);
                if *durable {
                    medium.make_range_durable(*offset, data.len() as u64);
                }
            }
            Event::Truncate { fd, len } => self.nodes[self.open[fd]].medium.set_len(*len),
            Event::Punch { fd, offset, len } => self.nodes[self.open[fd]].medium.punch(*offset, *len),
            Event::Allocate { fd, len } => {
                let medium = &mut self.nodes[self.open[fd]].medium;
                medium.set_len(medium.len().max(*len));
            }
            Event::SyncBegin { fd, token } => {
                let inode = self.open[fd];
                self.syncs
                    .insert(*token, (inode, (self.now, self.nodes[inode].medium.mark())));
            }
            Event::SyncEnd { token, good } => {
                let (inode, marks) = self.syncs.remove(token).expect("a sync ends once");
                if *good {
                    self.nodes[inode].make_durable(marks);
                }
            }
            Event::Rename { exchange, from, to } => {
                let inode = self.lookup(from).expect("the renamed file is known");
                assert_eq!(
                    from.parent(),
                    to.parent(),
                    "a rename across directories is not modelled"
                );
                if *exchange {
                    let other = self
                        .lookup(to)
                        .expect("the file that it changes places with is known");
                    self.change_entry(from, |name| {
                        NameChange::Swap([(name, other), (name_of(to), inode)])
                    });
                } else {
                    self.change_entry(from, |name| NameChange::Move(name, name_of(to), inode));
                }
            }
            Event::Unlink { path } | Event::Rmdir { path } => self.change_entry(path, NameChange::Remove),
            Event::Mkdir { path } => {
                let inode = self.create(true);
                self.change_entry(path, |name| NameChange::Set(name, inode));
            }
            Event::FileRange => {}
        }
    }

    /// Writes what a power cut here could leave into the empty directory `to`.
    pub(crate) fn image(&self, to: &Path, loss: Loss, rng: &mut Rng) {
        self.image_of(0, to, loss, rng);
    }

    fn image_of(&self, inode: Inode, to: &Path, loss: Loss, rng: &mut Rng) {
        let node = &self.nodes[inode];
        let mut entries = node.durable_entries.clone();
        for (_, change) in node
            .pending_entries
            .iter()
            .take(rng.kept(node.pending_entries.len(), loss))
        {
            apply(&mut entries, change);
        }
        for (name, inode) in entries {
            let path = to.join(name);
            if self.nodes[inode].is_dir {
                fs::create_dir(&path).expect("a directory of the image");
                self.image_of(inode, &path, loss, rng);
            } else {
                write_file(&path, &self.nodes[inode].medium.after_cut(loss, rng));
            }
        }
    }

    /// The file at `path` as the process saw it.
    pub(crate) fn content(&self, path: &Path) -> Vec<u8> {
        let Some(inode) = self.lookup(path) else {
            return Vec::new();
        };
        let medium = &self.nodes[inode].medium;
        let mut bytes = vec![0; medium.len() as usize];
        assert_eq!(medium.read(0, &mut bytes), bytes.len());
        bytes
    }
}

fn name_of(path: &Path) -> String {
    path.file_name()
        .and_then(|name| name.to_str())
        .expect("a name")
        .to_owned()
}

fn write_file(path: &Path, medium: &Medium) {
    let mut file = fs::File::create_new(path).expect("a file of the image");
    for (offset, bytes) in medium.extents() {
        file.seek(SeekFrom::Start(offset)).expect("seek");
        file.write_all(bytes).expect("write of the image");
    }
    file.set_len(medium.len()).expect("length of the image");
}
