//! A TCP proxy that can stand still in one direction, or cut a connection at a chosen TLS record: a network that loses the target's
//! word to an agent, or the agent's answer, at the worst moment.
//!
//! Each frame of the agents' protocol travels in a record of its own, so that the n-th record of a direction is a message (or one of
//! the handshake's).

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::scratch::free_port;

/// How long a byte may lie before a held proxy is looked at again.
const POLL: Duration = Duration::from_millis(5);

/// Passes connections on to one port of the loopback. It lives as long as its process: its threads hold no state worth an end.
#[derive(Debug)]
pub struct Proxy {
    port: u16,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    /// What passes is cut at TLS records; otherwise it passes as it comes.
    tls: bool,
    target: AtomicU16,
    held: AtomicBool,
    accepted: AtomicUsize,
    /// Records of the newest connection so far, each way.
    records: [AtomicUsize; 2],
    fault: Mutex<Option<Fault>>,
}

/// A direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// What the dialling side says.
    There,
    /// What it is answered.
    Back,
}

/// What happens once, on the next connection that gets so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// In which direction.
    pub way: Way,
    /// Before which record (from 0).
    pub record: usize,
    /// How long that direction stands still; `None`: the connection is cut, and the record is lost.
    pub stall: Option<Duration>,
}

impl Proxy {
    /// For the agents' lines. Listens; connections are refused until [`Self::lead_to`] was called.
    ///
    /// # Errors
    /// No port is free.
    pub fn start() -> Result<Self> {
        Self::listen(true)
    }

    /// For any protocol: it can stand still, but knows no records to count or to cut at.
    ///
    /// # Errors
    /// No port is free.
    pub fn of_bytes() -> Result<Self> {
        Self::listen(false)
    }

    fn listen(tls: bool) -> Result<Self> {
        let port = free_port()?;
        let listener = TcpListener::bind(("127.0.0.1", port)).context("the proxy's port")?;
        let shared = Arc::new(Shared {
            tls,
            ..Shared::default()
        });
        let proxy = Self {
            port,
            shared: Arc::clone(&shared),
        };
        thread::spawn(move || {
            for client in listener.incoming().flatten() {
                shared.accepted.fetch_add(1, Ordering::Relaxed);
                if let Ok(server) = TcpStream::connect(("127.0.0.1", shared.target.load(Ordering::Relaxed))) {
                    join(client, server, &shared);
                }
            }
        });
        Ok(proxy)
    }

    /// Where new connections go.
    pub fn lead_to(&self, port: u16) {
        self.shared.target.store(port, Ordering::Relaxed);
    }

    /// The port to dial.
    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connections that were dialled so far.
    #[must_use]
    pub fn accepted(&self) -> usize {
        self.shared.accepted.load(Ordering::Relaxed)
    }

    /// Records of the newest connection so far, in that direction.
    #[must_use]
    pub fn records(&self, way: Way) -> usize {
        self.shared.records(way).load(Ordering::SeqCst)
    }

    /// Arms a fault; `None` disarms. Whether the one before had not happened.
    pub fn arm(&self, fault: Option<Fault>) -> bool {
        let mut armed = self.shared.fault.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *armed, fault).is_some()
    }

    /// From now on nothing of what the dialling side says goes through; the answers still do.
    pub fn hold(&self) {
        self.shared.held.store(true, Ordering::Relaxed);
    }

    /// Lets the held bytes go, in order.
    pub fn let_go(&self) {
        self.shared.held.store(false, Ordering::Relaxed);
    }
}

impl Shared {
    fn records(&self, way: Way) -> &AtomicUsize {
        let [there, back] = &self.records;
        match way {
            Way::There => there,
            Way::Back => back,
        }
    }

    /// The fault, if this is its record.
    fn due(&self, way: Way, record: usize) -> Option<Fault> {
        let mut armed = self.fault.lock().unwrap_or_else(PoisonError::into_inner);
        armed.take_if(|fault| fault.way == way && fault.record == record)
    }
}

fn join(client: TcpStream, server: TcpStream, shared: &Arc<Shared>) {
    let (Ok(client_again), Ok(server_again)) = (client.try_clone(), server.try_clone()) else {
        return;
    };
    for way in [Way::There, Way::Back] {
        shared.records(way).store(0, Ordering::SeqCst);
    }
    let (there, back) = (Arc::clone(shared), Arc::clone(shared));
    thread::spawn(move || pump(client, server, &there, Way::There));
    thread::spawn(move || pump(server_again, client_again, &back, Way::Back));
}

fn pump(mut from: TcpStream, mut to: TcpStream, shared: &Shared, way: Way) {
    let mut number = 0;
    let read = if shared.tls { read_record } else { read_some };
    while let Ok(Some(record)) = read(&mut from) {
        while way == Way::There && shared.held.load(Ordering::Relaxed) {
            thread::sleep(POLL);
        }
        match shared.due(way, number) {
            None => {}
            Some(Fault {
                stall: Some(stall), ..
            }) => thread::sleep(stall),
            Some(Fault { stall: None, .. }) => break,
        }
        number += 1;
        shared.records(way).store(number, Ordering::SeqCst);
        if to.write_all(&record).is_err() {
            break;
        }
    }
    to.shutdown(Shutdown::Both).ok();
    from.shutdown(Shutdown::Both).ok();
}

/// One TLS record (RFC 8446 §5.1: type, version, length u16, that many bytes); `None` at the end of the connection.
fn read_record(from: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut record = vec![0; 5];
    match from.read_exact(&mut record) {
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    let length = match record.as_slice() {
        [_, _, _, high, low] => usize::from(u16::from_be_bytes([*high, *low])),
        _ => 0,
    };
    record.resize(5 + length, 0);
    from.read_exact(record.get_mut(5..).unwrap_or_default())?;
    Ok(Some(record))
}

/// What is there; `None` at the end of the connection.
fn read_some(from: &mut TcpStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut bytes = vec![0; 64 << 10];
    let n = from.read(&mut bytes)?;
    bytes.truncate(n);
    Ok((n > 0).then_some(bytes))
}
