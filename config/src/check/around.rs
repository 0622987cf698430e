//! Sections around the LUNs and targets: agents, schedules, web pages, metrics.

use super::{check_lun_names, unique};
use crate::config::{Agents, Consistency, Http, HttpUser, OnFailure, Target, Tls};
use crate::file::reader::Sink;
use crate::file::v1::{self, Place};
use crate::limits;
use crate::problem::Trouble;
use crate::schedule::{Keep, Schedule};

pub(super) fn build_agents(agents: Option<&v1::Agents>, targets: &[Target]) -> Option<Agents> {
    if agents.is_none() && !targets.iter().any(Target::has_agents) {
        return None;
    }
    let listen = agents.and_then(|a| a.listen.as_ref()).map(|l| *l.get_ref());
    Some(Agents {
        listen: listen.unwrap_or_else(|| (std::net::Ipv4Addr::UNSPECIFIED, limits::AGENT_PORT).into()),
        discovery: agents
            .and_then(|a| a.discovery.as_ref())
            .is_some_and(|d| *d.get_ref()),
        on_failure: agents
            .and_then(|a| a.on_failure.as_ref())
            .map_or(OnFailure::Fail, |o| *o.get_ref()),
    })
}

pub(super) fn build_schedule(sink: &mut Sink, schedule: &v1::Schedule, file: &v1::File) -> Schedule {
    let thing = &schedule.place.thing;
    check_lun_names(sink, thing, &schedule.luns, &file.lun_names);
    if schedule.luns.get_ref().is_empty() {
        let trouble = Trouble::new("`luns` is empty", "name at least one LUN, or remove the schedule");
        sink.problem(&schedule.luns.span(), thing, trouble);
    }
    let consistency = schedule
        .consistency
        .as_ref()
        .map_or(Consistency::Crash, |c| *c.get_ref());
    if let Some(written) = schedule
        .consistency
        .as_ref()
        .filter(|c| *c.get_ref() > Consistency::Crash)
    {
        for lun in schedule.luns.get_ref() {
            let name = lun.get_ref();
            let agents = file
                .targets
                .iter()
                .any(|t| t.agents && t.luns.get_ref().iter().any(|l| l.get_ref() == name));
            if !agents && file.lun_names.iter().any(|k| k == name.as_str()) && !sink.damaged {
                let trouble = Trouble::new(
                    format!(
                        "`consistency` is {consistency}, but no target with `agents = true` serves {name}"
                    ),
                    "set `agents = true` on its target, or write `consistency = \"crash\"`",
                );
                sink.problem(&written.span(), thing, trouble);
            }
        }
    }
    if let Some((place, _)) = schedule
        .keep
        .as_ref()
        .filter(|(_, keep)| *keep == Keep::default())
    {
        let trouble = Trouble::new(
            "keeps nothing",
            "write for example { last = 4, daily = 7 }, or remove the key to keep everything",
        );
        sink.problem(&place.at, &place.thing, trouble);
    }
    let (cron_text, cron) = schedule.cron.get_ref().clone();
    Schedule {
        name: schedule.name.get_ref().clone(),
        luns: schedule
            .luns
            .get_ref()
            .iter()
            .map(|l| l.get_ref().clone())
            .collect(),
        cron_text,
        cron,
        timezone: schedule.timezone.as_ref().map(|t| t.get_ref().clone()),
        consistency,
        on_failure: schedule
            .on_failure
            .as_ref()
            .map_or(OnFailure::CrashConsistent, |o| *o.get_ref()),
        keep: schedule.keep.as_ref().map(|(_, keep)| *keep),
        lock: schedule.lock.as_ref().map(|l| *l.get_ref()),
    }
}

pub(super) fn build_http(sink: &mut Sink, http: v1::Http) -> Http {
    let thing = &http.place.thing;
    if !http.listen.get_ref().ip().is_loopback() && (http.tls.is_none() || http.users.is_empty()) {
        let trouble = Trouble::new(
            format!("`listen`: {} is reached from other hosts", http.listen.get_ref()),
            "add `tls` and at least one `[[http.user]]`, or listen on 127.0.0.1",
        );
        sink.problem(&http.listen.span(), thing, trouble);
    }
    unique(
        sink,
        "http.user",
        http.users
            .iter()
            .map(|u| (u.name.get_ref().as_str(), u.name.span())),
    );
    Http {
        listen: http.listen.into_inner(),
        tls: http.tls.map(|t| Tls {
            cert: t.cert,
            key: t.key,
        }),
        users: http
            .users
            .into_iter()
            .map(|u| HttpUser {
                name: u.name.into_inner(),
                role: u.role,
                password_hash: u.password_hash,
            })
            .collect(),
    }
}

/// Two listeners cannot share an address; only `[metrics]` may join `[http]`.
pub(super) fn check_listeners(sink: &mut Sink, file: &v1::File, agents: Option<&Agents>) {
    let mut taken: Vec<(std::net::SocketAddr, String)> = file
        .portals
        .iter()
        .map(|p| (*p.address.get_ref(), p.place.thing.clone()))
        .collect();
    let mut claim = |sink: &mut Sink, address: std::net::SocketAddr, place: &Place| {
        if let Some((_, other)) = taken.iter().find(|(a, _)| *a == address) {
            let trouble = Trouble::new(
                format!("`listen`: {address} is already taken by {other}"),
                "choose another port",
            );
            sink.problem(&place.at, &place.thing, trouble);
        }
        taken.push((address, place.thing.clone()));
    };
    if let (Some(agents), Some(section)) = (agents, &file.agents) {
        claim(sink, agents.listen, &section.place);
    }
    if let Some(http) = &file.http {
        claim(sink, *http.listen.get_ref(), &http.place);
    }
    if let Some(metrics) = &file.metrics
        && file
            .http
            .as_ref()
            .is_none_or(|http| http.listen.get_ref() != metrics.listen.get_ref())
    {
        claim(sink, *metrics.listen.get_ref(), &metrics.place);
    }
}
