//! A TCP proxy that can stand still in one direction: a network that loses the target's word to an agent at the worst moment.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicUsize, Ordering};
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
    target: AtomicU16,
    held: AtomicBool,
    accepted: AtomicUsize,
}

impl Proxy {
    /// Listens; connections are refused until [`Self::lead_to`] was called.
    ///
    /// # Errors
    /// No port is free.
    pub fn start() -> Result<Self> {
        let port = free_port()?;
        let listener = TcpListener::bind(("127.0.0.1", port)).context("the proxy's port")?;
        let shared = Arc::new(Shared::default());
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

    /// From now on nothing of what the dialling side says goes through; the answers still do.
    pub fn hold(&self) {
        self.shared.held.store(true, Ordering::Relaxed);
    }

    /// Lets the held bytes go, in order.
    pub fn let_go(&self) {
        self.shared.held.store(false, Ordering::Relaxed);
    }
}

fn join(client: TcpStream, server: TcpStream, shared: &Arc<Shared>) {
    let (Ok(client_again), Ok(server_again)) = (client.try_clone(), server.try_clone()) else {
        return;
    };
    let held = Arc::clone(shared);
    thread::spawn(move || pump(client, server, Some(&held)));
    thread::spawn(move || pump(server_again, client_again, None));
}

fn pump(mut from: TcpStream, mut to: TcpStream, shared: Option<&Shared>) {
    let mut buffer = vec![0; 65536];
    while let Ok(count) = from.read(&mut buffer) {
        while shared.is_some_and(|shared| shared.held.load(Ordering::Relaxed)) {
            thread::sleep(POLL);
        }
        let sent = buffer
            .get(..count)
            .is_some_and(|bytes| !bytes.is_empty() && to.write_all(bytes).is_ok());
        if !sent {
            break;
        }
    }
    to.shutdown(Shutdown::Both).ok();
    from.shutdown(Shutdown::Both).ok();
}
