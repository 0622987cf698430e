//! Portals: listening, accepting, and the limits for those who have not logged in yet.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::registry::PortalView;
use super::{Daemon, session};

/// Connections that have not logged in, from one source. A host that boots logs in to a few dozen targets at once.
const PENDING_PER_SOURCE: usize = 64;
/// Connections that have not logged in, in all.
const PENDING: usize = 512;
/// Waiting connections that the kernel keeps for us.
const BACKLOG: i32 = 1024;
/// After a failed accept (no file descriptors left) the next try waits: otherwise the loop would spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// A peer that vanished without a word is noticed by the kernel after about 30 s + 3 × 10 s, whatever iSCSI does.
const KEEPALIVE: Duration = Duration::from_secs(30);

/// The connections that have not logged in.
///
/// When there are too many, the oldest goes and the new one gets its place: a login takes milliseconds, and whoever floods the
/// portal with connections pushes out its own. Refusing the new ones would let it lock everybody out.
#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<Seats>);

#[derive(Debug, Default)]
struct Seats {
    last: u64,
    /// By source, oldest first.
    taken: HashMap<IpAddr, BTreeMap<u64, CancellationToken>>,
    /// Discovery sessions: number of the seat, and how to end it.
    discoveries: HashMap<DiscoveryName, (u64, CancellationToken)>,
}

/// What makes a discovery session one of its kind (RFC 7143 §7.4.2): a new one of the same name takes the place of the old.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DiscoveryName {
    /// InitiatorName in lower case.
    pub(crate) initiator: String,
    /// The initiator's part of the session's identity.
    pub(crate) isid: [u8; 6],
    /// Where it leads to.
    pub(crate) place: DiscoveryPlace,
}

/// See [`DiscoveryName`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) enum DiscoveryPlace {
    /// No target was named: our address counts.
    Portal(SocketAddr),
    /// A target was named, in lower case: it and its portal group count, as in a normal session.
    Target(String, u16),
}

impl Seats {
    fn len(&self) -> usize {
        self.taken.values().map(BTreeMap::len).sum()
    }

    /// Sends the oldest connection of this source away.
    fn oust(&mut self, source: IpAddr) {
        let Some(seats) = self.taken.get_mut(&source) else {
            return;
        };
        if let Some((_, seat)) = seats.pop_first() {
            seat.cancel();
        }
        if seats.is_empty() {
            self.taken.remove(&source);
        }
    }

    /// The source that has most connections.
    fn greediest(&self) -> Option<IpAddr> {
        let most = self.taken.iter().max_by_key(|(_, seats)| seats.len());
        most.map(|(source, _)| *source)
    }
}

/// One connection that has not logged in; gives its place back when dropped.
#[derive(Debug)]
pub(crate) struct PendingSeat {
    pending: Arc<Pending>,
    source: IpAddr,
    number: u64,
    taken: CancellationToken,
    replaced: CancellationToken,
    discovery: Option<DiscoveryName>,
    shutdown: CancellationToken,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, Seats> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn seat(self: &Arc<Self>, peer: IpAddr, shutdown: &CancellationToken) -> PendingSeat {
        let source = source(peer);
        let taken = shutdown.child_token();
        let mut seats = self.lock();
        if seats
            .taken
            .get(&source)
            .is_some_and(|here| here.len() >= PENDING_PER_SOURCE)
        {
            seats.oust(source);
        } else if seats.len() >= PENDING
            && let Some(greediest) = seats.greediest()
        {
            seats.oust(greediest);
        }
        seats.last += 1;
        let number = seats.last;
        seats
            .taken
            .entry(source)
            .or_default()
            .insert(number, taken.clone());
        drop(seats);
        PendingSeat {
            pending: Arc::clone(self),
            source,
            number,
            taken,
            replaced: CancellationToken::new(),
            discovery: None,
            shutdown: shutdown.clone(),
        }
    }
}

/// One host, as far as that can be told: an IPv6 host has a whole /64 to choose addresses from.
fn source(peer: IpAddr) -> IpAddr {
    match peer.to_canonical() {
        IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into(),
        four => four,
    }
}

impl PendingSeat {
    /// It is this discovery session from now on; the one that was is over.
    pub(crate) fn discovers(&mut self, name: DiscoveryName) {
        let mut seats = self.pending.lock();
        let mine = (self.number, self.replaced.clone());
        if let Some((_, old)) = seats.discoveries.insert(name.clone(), mine) {
            old.cancel();
        }
        self.discovery = Some(name);
    }

    /// A normal session of this name begins: a discovery session that has it is over.
    pub(crate) fn replaces_discovery(&self, name: &DiscoveryName) {
        if let Some((_, old)) = self.pending.lock().discoveries.remove(name) {
            old.cancel();
        }
    }

    /// Resolves when the connection has to go, with the reason.
    pub(crate) async fn taken(&self) -> &'static str {
        tokio::select! {
            () = self.taken.cancelled() => {}
            () = self.replaced.cancelled() => return "its initiator has begun the session anew",
        }
        if self.shutdown.is_cancelled() {
            "the daemon stops"
        } else {
            "it did not log in while many others came"
        }
    }
}

impl Drop for PendingSeat {
    fn drop(&mut self) {
        let mut seats = self.pending.lock();
        if let Some(name) = &self.discovery
            && seats
                .discoveries
                .get(name)
                .is_some_and(|(number, _)| *number == self.number)
        {
            seats.discoveries.remove(name);
        }
        if let Some(here) = seats.taken.get_mut(&self.source) {
            here.remove(&self.number);
            if here.is_empty() {
                seats.taken.remove(&self.source);
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
    let seat = daemon.pending.seat(peer.ip(), &daemon.shutdown);
    let prepared = stream.set_nodelay(true).and_then(|()| {
        let keepalive = socket2::TcpKeepalive::new()
            .with_time(KEEPALIVE)
            .with_interval(Duration::from_secs(10))
            .with_retries(3);
        socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive)?;
        let local = stream.local_addr()?;
        // It leaves this runtime's poller for that of its own thread.
        Ok((stream.into_std()?, local))
    });
    match prepared {
        Ok((stream, local)) => {
            let place = daemon.reactors.place();
            let (handle, group, daemon) = (place.handle().clone(), portal.group, Arc::clone(daemon));
            let tracker = daemon.tracker.clone();
            let serve = async move {
                match TcpStream::from_std(stream) {
                    Ok(stream) => session::run(daemon, stream, peer, local, group, place, seat).await,
                    Err(error) => tracing::warn!(%peer, %error, "connection cannot be served"),
                }
            };
            tracker.spawn_on(serve, &handle);
        }
        Err(error) => tracing::debug!(%peer, %error, "connection lost at once"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn one_source_pushes_out_its_own_oldest() {
        let (pending, shutdown) = (Arc::new(Pending::default()), CancellationToken::new());
        let other = pending.seat(address("192.0.2.2"), &shutdown);
        let mut seats: Vec<_> = (0..PENDING_PER_SOURCE)
            .map(|_| pending.seat(address("192.0.2.1"), &shutdown))
            .collect();
        let ousted = |seats: &[PendingSeat]| seats.iter().filter(|seat| seat.taken.is_cancelled()).count();
        assert_eq!(ousted(&seats), 0);
        seats.push(pending.seat(address("::ffff:192.0.2.1"), &shutdown));
        assert!(seats[0].taken.is_cancelled(), "the same source, mapped to IPv6");
        assert_eq!(ousted(&seats), 1);
        assert!(!other.taken.is_cancelled(), "another source is not affected");
        // Those that went were counted out at once; that they are dropped later changes nothing.
        assert_eq!(pending.lock().len(), PENDING_PER_SOURCE + 1);
        drop(seats.remove(0));
        assert_eq!(pending.lock().len(), PENDING_PER_SOURCE + 1);
        seats.clear();
        drop(other);
        assert!(
            pending.lock().taken.is_empty(),
            "nothing is kept of sources that are gone"
        );
    }

    #[test]
    fn in_all_the_greediest_source_makes_room() {
        let (pending, shutdown) = (Arc::new(Pending::default()), CancellationToken::new());
        let quiet = pending.seat(address("2001:db8:1::1"), &shutdown);
        let flood: Vec<_> = (0..PENDING - 1)
            .map(|i| {
                pending.seat(
                    address(&format!("2001:db8:2:{:x}::{:x}", i / 32, i + 1)),
                    &shutdown,
                )
            })
            .collect();
        let late = pending.seat(address("198.51.100.1"), &shutdown);
        assert_eq!(pending.lock().len(), PENDING);
        assert!(!quiet.taken.is_cancelled() && !late.taken.is_cancelled());
        assert_eq!(flood.iter().filter(|seat| seat.taken.is_cancelled()).count(), 1);
    }

    #[test]
    fn a_discovery_session_begun_anew_replaces_the_old_one_of_its_name() {
        let (pending, shutdown) = (Arc::new(Pending::default()), CancellationToken::new());
        let name = |isid: u8, place: &DiscoveryPlace| DiscoveryName {
            initiator: "iqn.2026-11.test:a".to_owned(),
            isid: [isid; 6],
            place: place.clone(),
        };
        let here = DiscoveryPlace::Portal("192.0.2.1:3260".parse().unwrap());
        let there = DiscoveryPlace::Portal("192.0.2.9:3260".parse().unwrap());
        let named = DiscoveryPlace::Target("iqn.2026-11.test:disk".to_owned(), 1);
        let open = |isid, place| {
            let mut seat = pending.seat(address("198.51.100.1"), &shutdown);
            seat.discovers(name(isid, place));
            seat
        };
        let first = open(1, &here);
        let others = [open(2, &here), open(1, &there), open(1, &named)];
        assert!(
            !first.replaced.is_cancelled(),
            "another ISID, portal, or a target's name"
        );
        let again = open(1, &here);
        assert!(first.replaced.is_cancelled() && !again.replaced.is_cancelled());
        drop(first);
        let third = open(1, &here);
        assert!(
            again.replaced.is_cancelled(),
            "the end of the first forgot nothing of the second"
        );
        let normal = pending.seat(address("198.51.100.1"), &shutdown);
        normal.replaces_discovery(&name(1, &named));
        let ended: Vec<bool> = others.iter().map(|seat| seat.replaced.is_cancelled()).collect();
        assert_eq!(ended, [false, false, true]);
        drop((others, again, third));
        assert!(pending.lock().discoveries.is_empty());
    }

    #[test]
    fn a_stop_takes_every_seat() {
        let (pending, shutdown) = (Arc::new(Pending::default()), CancellationToken::new());
        let seat = pending.seat(address("2001:db8::1"), &shutdown);
        shutdown.cancel();
        assert!(seat.taken.is_cancelled());
    }
}
