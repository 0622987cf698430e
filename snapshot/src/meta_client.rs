//! The one way to the metadata store: a thread of its own owns it (sled must not be called concurrently, and its
//! panics must not take the daemon along). In manual mode the caller's thread does the work, behind a mutex.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{self, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use crate::compact::{CompactState, CompactStep};
use crate::lock::lock;
use crate::meta::{Barrier, Batch, MetaStore, Pair};
use crate::{Error, Result};

/// Name of the threads that run sled: panics there are caught and poison the pool instead of ending the process.
pub const METADATA_THREAD: &str = "stillpoint-meta";

/// Makes the store on the thread that will own it.
pub(crate) type OpenMeta = Box<dyn FnOnce() -> Result<Box<dyn MetaStore>> + Send>;

enum Request {
    Get(Vec<u8>, SyncSender<Result<Option<Vec<u8>>>>),
    Scan(Vec<u8>, Vec<u8>, usize, SyncSender<Result<Vec<Pair>>>),
    Last(Vec<u8>, Vec<u8>, SyncSender<Result<Option<Pair>>>),
    Apply(Batch, SyncSender<Result<()>>),
    Flush(SyncSender<Result<Arc<dyn Barrier>>>),
    Compact(CompactStep, SyncSender<Result<Result<CompactState>>>),
    Size(SyncSender<Result<u64>>),
}

/// The store, and whether it has failed: after the first failure nothing reaches it any more.
struct Guarded {
    store: Box<dyn MetaStore>,
    failed: Option<String>,
}

impl Guarded {
    fn call<T>(&mut self, work: impl FnOnce(&mut dyn MetaStore) -> Result<T>) -> Result<T> {
        if let Some(reason) = &self.failed {
            return Err(Error::Poisoned {
                reason: reason.clone(),
            });
        }
        let store = self.store.as_mut();
        let result = catch_unwind(AssertUnwindSafe(|| work(store))).unwrap_or_else(|panic| {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text
                .or_else(|| panic.downcast_ref::<&str>().copied())
                .unwrap_or("no message");
            Err(Error::corrupt("metadata store", format!("panic: {text}")))
        });
        if let Err(e) = &result {
            self.failed = Some(format!("metadata store: {e}"));
        }
        result
    }

    fn serve(&mut self, request: Request) {
        // A caller that went away does not want its answer.
        match request {
            Request::Get(k, to) => drop(to.send(self.call(|m| m.get(&k)))),
            Request::Scan(a, b, n, to) => drop(to.send(self.call(|m| m.scan(&a, &b, n)))),
            Request::Last(a, b, to) => drop(to.send(self.call(|m| m.last(&a, &b)))),
            Request::Apply(batch, to) => drop(to.send(self.call(|m| m.apply(&batch)))),
            Request::Flush(to) => drop(to.send(self.call(|m| m.flush().map(|()| m.barrier())))),
            Request::Compact(step, to) => drop(to.send(self.call(|m| m.compact(step)))),
            Request::Size(to) => drop(to.send(self.call(|m| m.size_on_disk()))),
        }
    }
}

enum Way {
    Thread {
        requests: Mutex<Option<Sender<Request>>>,
        thread: Mutex<Option<JoinHandle<()>>>,
    },
    Direct(Mutex<Option<Guarded>>),
}

/// Handle of the metadata store.
pub(crate) struct Meta {
    way: Way,
}

fn stopped() -> Error {
    Error::Poisoned {
        reason: "the metadata store is closed".into(),
    }
}

impl Meta {
    /// Opens the store on its own thread, at most `timeout`: a damaged store may loop for ever (measured).
    pub(crate) fn open(open: OpenMeta, timeout: Duration) -> Result<Self> {
        let (requests, inbox) = mpsc::channel::<Request>();
        let (ready, opened) = mpsc::sync_channel(1);
        let thread = std::thread::Builder::new()
            .name(METADATA_THREAD.into())
            .spawn(move || {
                let store = catch_unwind(AssertUnwindSafe(open))
                    .unwrap_or_else(|_| Err(Error::corrupt("metadata store", "panic while opening")));
                let store = match store {
                    Ok(store) => store,
                    Err(e) => return drop(ready.send(Err(e))),
                };
                drop(ready.send(Ok(())));
                let mut guarded = Guarded { store, failed: None };
                while let Ok(request) = inbox.recv() {
                    guarded.serve(request);
                }
                // sled's drop flushes; a panic there must not reach the joining thread.
                drop(catch_unwind(AssertUnwindSafe(move || drop(guarded))));
            })
            .map_err(|e| Error::io("start thread", METADATA_THREAD, e))?;
        match opened.recv_timeout(timeout) {
            Ok(answer) => answer?,
            Err(RecvTimeoutError::Timeout) => {
                return Err(Error::corrupt(
                    "metadata store",
                    format!("not open after {timeout:?}"),
                ));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(stopped()),
        }
        let way = Way::Thread {
            requests: Mutex::new(Some(requests)),
            thread: Mutex::new(Some(thread)),
        };
        Ok(Self { way })
    }

    /// Uses the store on the caller's thread.
    pub(crate) fn direct(store: Box<dyn MetaStore>) -> Self {
        Self {
            way: Way::Direct(Mutex::new(Some(Guarded { store, failed: None }))),
        }
    }

    fn ask<T>(&self, request: impl FnOnce(SyncSender<Result<T>>) -> Request) -> Result<T> {
        let (to, answer) = mpsc::sync_channel(1);
        let request = request(to);
        match &self.way {
            Way::Thread { requests, .. } => {
                lock(requests)
                    .as_ref()
                    .ok_or_else(stopped)?
                    .send(request)
                    .map_err(|_| stopped())?;
            }
            Way::Direct(guarded) => lock(guarded).as_mut().ok_or_else(stopped)?.serve(request),
        }
        answer.recv().unwrap_or_else(|_| Err(stopped()))
    }

    pub(crate) fn get(&self, key: Vec<u8>) -> Result<Option<Vec<u8>>> {
        self.ask(|to| Request::Get(key, to))
    }

    pub(crate) fn scan(&self, from: Vec<u8>, below: Vec<u8>, limit: usize) -> Result<Vec<Pair>> {
        self.ask(|to| Request::Scan(from, below, limit, to))
    }

    pub(crate) fn last(&self, from: Vec<u8>, below: Vec<u8>) -> Result<Option<Pair>> {
        self.ask(|to| Request::Last(from, below, to))
    }

    pub(crate) fn apply(&self, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            Ok(())
        } else {
            self.ask(|to| Request::Apply(batch, to))
        }
    }

    pub(crate) fn compact(&self, step: CompactStep) -> Result<Result<CompactState>> {
        self.ask(|to| Request::Compact(step, to))
    }

    pub(crate) fn size_on_disk(&self) -> Result<u64> {
        self.ask(Request::Size)
    }

    /// Makes everything applied so far durable. The barrier runs on the caller's thread, so that map misses are
    /// served meanwhile.
    pub(crate) fn commit(&self) -> Result<()> {
        // Asked for each time: a compaction puts another file in the place of the log.
        self.ask(Request::Flush)?.sync()
    }

    /// Closes the store and waits for its thread.
    pub(crate) fn close(&self) {
        match &self.way {
            Way::Thread { requests, thread } => {
                drop(lock(requests).take());
                if let Some(thread) = lock(thread).take() {
                    drop(thread.join());
                }
            }
            Way::Direct(guarded) => drop(lock(guarded).take()),
        }
    }
}
