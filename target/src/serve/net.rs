//! Portals: listening, accepting, and the limits for those who have not logged in yet.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream};

use super::registry::PortalView;
use super::{Daemon, session};

/// Connections that have not logged in, from one address. A host that boots logs in to a few dozen targets at once.
const PENDING_PER_SOURCE: usize = 64;
/// Connections that have not logged in, in all.
const PENDING: usize = 512;
/// Waiting connections that the kernel keeps for us.
const BACKLOG: i32 = 1024;
/// After a failed accept (no file descriptors left) the next try waits: otherwise the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer that vanished without a word is noticed by the kernel after about 30 s + 3 × 10 s, whatever iSCSI does.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// Counts the connections that have not logged in.
#[derive(Debug, Default)]
pub(crate) struct Pending {
    by_source: Mutex<HashMap<IpAddr, usize>>,
}

/// One connection that has not logged in; gives its place back when dropped.
#[derive(Debug)]
pub(crate) struct PendingSeat {
    pending: Arc<Pending>,
    source: IpAddr,
}

impl Pending {
    fn seat(self: &Arc<Self>, source: IpAddr) -> Option<PendingSeat> {
        let source = source.to_canonical();
        let mut by_source = self.by_source.lock().unwrap_or_else(PoisonError::into_inner);
        let total: usize = by_source.values().sum();
        let here = by_source.entry(source).or_default();
        if total >= PENDING || *here >= PENDING_PER_SOURCE {
            if *here == 0 {
                by_source.remove(&source);
            }
            return None;
        }
        *here += 1;
        Some(PendingSeat {
            pending: Arc::clone(self),
            source,
        })
    }
}

impl Drop for PendingSeat {
    fn drop(&mut self) {
        let mut by_source = self
            .pending
            .by_source
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(here) = by_source.get_mut(&self.source) {
            *here -= 1;
            if *here == 0 {
                by_source.remove(&self.source);
            }
        }
    }
}

/// Binds every portal, so that a port that is taken is an error at start and not later.
///
/// # Errors
/// Names the portal that could not be opened, and why.
pub(crate) fn bind(portals: &[stillpoint_config::Portal]) -> anyhow::Result<Vec<(TcpListener, PortalView)>> {
    portals.iter().map(bind_one).collect()
}

fn bind_one(portal: &stillpoint_config::Portal) -> anyhow::Result<(TcpListener, PortalView)> {
    use socket2::{Domain, Protocol, Socket, Type};
    let address = portal.address;
    let open = || -> std::io::Result<TcpListener> {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_reuse_address(true)?;
        if address.is_ipv6() {
            // "[::]" and "0.0.0.0" may both be portals: the first must not take the second's place.
            socket.set_only_v6(true)?;
        }
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        TcpListener::from_std(socket.into())
    };
    let listener = open().with_context(|| {
        format!(
            "portal {address} cannot be opened: is another target running there (`ss -ltnp 'sport = :{}'`), and is the address \
             one of this host's?",
            address.port()
        )
    })?;
    let view = PortalView {
        address,
        group: portal.group,
        advertise: portal.advertise.clone(),
    };
    Ok((listener, view))
}

/// Accepts connections on one portal until the daemon stops.
pub(crate) async fn serve(daemon: Arc<Daemon>, listener: TcpListener, portal: PortalView) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = daemon.shutdown.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => take(&daemon, stream, peer, &portal),
            Err(error) => {
                tracing::warn!(portal = %portal.address, %error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn take(daemon: &Arc<Daemon>, stream: TcpStream, peer: SocketAddr, portal: &PortalView) {
    let Some(seat) = daemon.pending.seat(peer.ip()) else {
        tracing::debug!(%peer, "connection closed: too many that have not logged in");
        return;
    };
    let prepared = stream.set_nodelay(true).and_then(|()| {
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(Duration::from_secs(10))
            .with_retries(3);
        socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        stream.local_addr()
    });
    match prepared {
        Ok(local) => {
            let task = session::run(Arc::clone(daemon), stream, peer, local, portal.group, seat);
            daemon.tracker.spawn(task);
        }
        Err(error) => tracing::debug!(%peer, %error, "connection lost at once"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_limited_by_source_and_given_back() {
        let pending = Arc::new(Pending::default());
        let one: IpAddr = "192.0.2.1".parse().unwrap();
        let mut seats: Vec<_> = (0..PENDING_PER_SOURCE)
            .map(|_| pending.seat(one).expect("a seat"))
            .collect();
        assert!(
            pending.seat(one).is_none(),
            "one source has taken all of its seats"
        );
        assert!(
            pending.seat("::ffff:192.0.2.1".parse().unwrap()).is_none(),
            "the same source, mapped to IPv6"
        );
        assert!(
            pending.seat("192.0.2.2".parse().unwrap()).is_some(),
            "another source is not affected"
        );
        seats.pop();
        assert!(pending.seat(one).is_some(), "a seat was given back");
        seats.clear();
        assert!(
            pending.by_source.lock().unwrap().is_empty(),
            "nothing is kept of sources that are gone"
        );
    }

    #[test]
    fn seats_are_limited_in_all() {
        let pending = Arc::new(Pending::default());
        let source = |i: usize| IpAddr::from([10, 0, (i / 256) as u8, (i % 256) as u8]);
        let seats: Vec<_> = (0..PENDING)
            .map(|i| pending.seat(source(i)).expect("a seat"))
            .collect();
        assert!(pending.seat(source(PENDING)).is_none());
        assert_eq!(
            pending.by_source.lock().unwrap().len(),
            PENDING,
            "a refused source leaves no entry"
        );
        drop(seats);
    }
}
