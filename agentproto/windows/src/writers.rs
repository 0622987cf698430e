//! VSS writers: which of their components take part in a snapshot, and what they said at its end (agent-protocol.md §9).

use std::collections::BTreeSet;

use stillpoint_agentproto::LunId;
use stillpoint_agentproto::message::{App, AppState, Exclusion, ExclusionKind};

use crate::volumes::Inventory;

/// Class id of the SQL Server writer (MS docs: In-Box VSS Writers and SQL Server's own page).
pub(crate) const SQL_WRITER: u128 = 0xa65f_aa63_5ea8_4ebc_9dbd_a0c4_db26_912a;
/// Class id of the Microsoft Hyper-V VSS Writer.
pub(crate) const HYPERV_WRITER: u128 = 0x6684_1cd4_6ded_4f4b_8f17_fd23_f8dd_c3de;
/// The protocol's limit of a string, in bytes.
const TEXT_MAX: usize = 1024;
/// The protocol's limit of a list.
const LIST_MAX: usize = 256;

/// One component of a writer, from its metadata document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Component {
    /// `VSS_CT_DATABASE` (1) or `VSS_CT_FILEGROUP` (2).
    pub(crate) kind: i32,
    /// Where in the writer's tree; may be empty.
    pub(crate) logical_path: Option<String>,
    /// Its name there.
    pub(crate) name: String,
    /// For people: a VM's name.
    pub(crate) caption: Option<String>,
    /// Whether it may be chosen by itself.
    pub(crate) selectable: bool,
    /// Folders of its files, with environment variables expanded.
    pub(crate) paths: Vec<String>,
}

impl Component {
    fn full_name(&self) -> String {
        match self.logical_path.as_deref().filter(|path| !path.is_empty()) {
            Some(path) => format!("{path}\\{}", self.name),
            None => self.name.clone(),
        }
    }

    fn label(&self) -> &str {
        let caption = self.caption.as_deref().filter(|caption| !caption.is_empty());
        caption.unwrap_or(&self.name)
    }
}

/// A writer, from its metadata document.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Writer {
    /// This run of it.
    pub(crate) instance: u128,
    /// Its class.
    pub(crate) class: u128,
    /// `SqlServerWriter` …
    pub(crate) name: String,
    /// What it can save.
    pub(crate) components: Vec<Component>,
}

impl Writer {
    fn app_kind(&self) -> &'static str {
        match self.class {
            SQL_WRITER => "mssql",
            HYPERV_WRITER => "hyperv-vm",
            _ => "vss-writer",
        }
    }

    fn app(&self, component: &Component, state: AppState, error: Option<String>, lun: Option<LunId>) -> App {
        let instance = match self.class {
            HYPERV_WRITER => component.label().to_owned(),
            _ => self.name.clone(),
        };
        App {
            kind: self.app_kind().to_owned(),
            instance: cut(instance),
            component: Some(cut(component.full_name())),
            version: None,
            state,
            error: error.map(cut),
            lun,
        }
    }
}

/// What `GatherWriterStatus` brought for one writer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct WriterStatus {
    /// Which run of it.
    pub(crate) instance: u128,
    /// Its class.
    pub(crate) class: u128,
    /// Its name.
    pub(crate) name: String,
    /// `VSS_WRITER_STATE`.
    pub(crate) state: i32,
    /// HRESULT; 0 = no failure.
    pub(crate) failure: i32,
}

/// `VSS_WS_STABLE`.
const STABLE: i32 = 1;
/// `VSS_WS_WAITING_FOR_BACKUP_COMPLETE`.
const WAITING_FOR_BACKUP_COMPLETE: i32 = 5;
/// `VSS_WS_FAILED_AT_IDENTIFY` and those after it.
const FAILED: i32 = 6;

impl WriterStatus {
    /// What is wrong with it; `fine` says which states are good.
    fn trouble(&self, fine: impl Fn(i32) -> bool) -> Option<String> {
        let failure = (self.failure != 0).then(|| hresult(self.failure));
        if self.failure == 0 && fine(self.state) {
            return None;
        }
        let state = state_name(self.state);
        Some(failure.map_or_else(|| format!("is {state}"), |why| format!("is {state}: {why}")))
    }

    /// After `DoSnapshotSet`, before `BackupComplete`: why its data in the snapshot cannot be trusted.
    pub(crate) fn trouble_at_end(&self) -> Option<String> {
        self.trouble(|state| matches!(state, STABLE | WAITING_FOR_BACKUP_COMPLETE))
    }

    /// After `PrepareForBackup`: a writer that has failed already spares everybody the freeze.
    pub(crate) fn trouble_at_begin(&self) -> Option<String> {
        self.trouble(|state| state > 0 && state < FAILED)
    }
}

/// A component that takes part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Selected {
    /// Index into the writers.
    pub(crate) writer: usize,
    /// Index into its components.
    pub(crate) component: usize,
    /// The LUN that it lies on when it is one only.
    pub(crate) lun: Option<LunId>,
}

/// What takes part, and what does not and why.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Selection {
    /// All writers.
    pub(crate) writers: Vec<Writer>,
    /// What is added to the set.
    pub(crate) selected: Vec<Selected>,
    /// What is left out.
    pub(crate) exclusions: Vec<Exclusion>,
}

/// Which applications the operator wants to take part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// SQL Server.
    pub(crate) mssql: bool,
    /// Hyper-V.
    pub(crate) hyperv: bool,
    /// Its writer: not when its VMs have checkpoints with memory.
    pub(crate) hyperv_writer: bool,
}

/// Chooses the components whose files lie on the LUNs. One with files elsewhere too cannot be consistent in this snapshot.
pub(crate) fn select(
    writers: Vec<Writer>,
    inventory: &Inventory,
    luns: &[LunId],
    wanted: Wanted,
) -> Selection {
    let mut selection = Selection::default();
    for (index, writer) in writers.iter().enumerate() {
        let mut added = BTreeSet::new();
        for (number, component) in writer.components.iter().enumerate() {
            if writer.class == HYPERV_WRITER && wanted.hyperv && !wanted.hyperv_writer {
                continue;
            }
            let place = place_of(component, inventory, luns);
            let switched_off = match writer.class {
                SQL_WRITER if !wanted.mssql => Some("the feature mssql is off at this agent"),
                HYPERV_WRITER if !wanted.hyperv => Some("the feature hyperv is off at this agent"),
                _ => None,
            };
            match (place, switched_off) {
                (Place::Elsewhere, _) => {}
                (Place::Here(_) | Place::Spread(_), Some(why)) => {
                    selection.exclude(writer, component, why.to_owned());
                }
                (Place::Spread(other), None) => {
                    let why =
                        format!("it has files on {other}, which is not on this LUN: move it to one LUN");
                    selection.exclude(writer, component, why);
                }
                (Place::Here(lun), None) => {
                    // What cannot be chosen by itself comes with the one above it.
                    let chosen = selectable_above(writer, number);
                    if added.insert(chosen) {
                        selection.selected.push(Selected {
                            writer: index,
                            component: chosen,
                            lun,
                        });
                    }
                }
            }
        }
    }
    selection.writers = writers;
    selection
}

enum Place {
    /// Nothing of it is on the LUNs.
    Elsewhere,
    /// All of it is; on that one LUN.
    Here(Option<LunId>),
    /// A part of it is; so is that place.
    Spread(String),
}

fn place_of(component: &Component, inventory: &Inventory, luns: &[LunId]) -> Place {
    let mut here = BTreeSet::new();
    let mut other = None;
    for path in &component.paths {
        let volume = inventory.volume_of(path);
        match volume.filter(|volume| volume.luns.iter().any(|lun| luns.contains(lun))) {
            Some(volume) => here.extend(volume.luns.iter().copied()),
            None => other = other.or_else(|| Some(path.clone())),
        }
    }
    match (here.len(), other) {
        (0, _) => Place::Elsewhere,
        (_, Some(other)) => Place::Spread(other),
        (1, None) => Place::Here(here.first().copied()),
        (_, None) => Place::Here(None),
    }
}

/// MS docs, "Selectability for Backup": a component that is not selectable comes with its nearest selectable ancestor; without
/// one it has to be added itself.
fn selectable_above(writer: &Writer, number: usize) -> usize {
    let Some(component) = writer
        .components
        .get(number)
        .filter(|component| !component.selectable)
    else {
        return number;
    };
    let mine = component.full_name();
    let is_above =
        |other: &Component| other.selectable && mine.starts_with(&format!("{}\\", other.full_name()));
    let above = writer
        .components
        .iter()
        .enumerate()
        .filter(|(_, other)| is_above(other));
    above
        .max_by_key(|(_, other)| other.full_name().len())
        .map_or(number, |(index, _)| index)
}

impl Selection {
    fn exclude(&mut self, writer: &Writer, component: &Component, why: String) {
        if self.exclusions.len() < LIST_MAX {
            let what = component.label();
            self.exclusions.push(Exclusion {
                kind: ExclusionKind::Application,
                subject: cut(format!("{} {what}", writer.name)),
                reason: cut(why),
                lun: None,
            });
        }
    }

    /// The parts of one selected component.
    pub(crate) fn parts(&self, selected: &Selected) -> Option<(&Writer, &Component)> {
        let writer = self.writers.get(selected.writer)?;
        Some((writer, writer.components.get(selected.component)?))
    }

    /// All that takes part, in one state.
    pub(crate) fn apps(&self, state: AppState) -> Vec<App> {
        let parts = self.selected.iter().filter_map(|selected| {
            let (writer, component) = self.parts(selected)?;
            Some(writer.app(component, state, None, selected.lun))
        });
        parts.take(LIST_MAX).collect()
    }

    /// The verdict on each: one failed writer fails all its components.
    pub(crate) fn verdicts(&self, statuses: &[WriterStatus]) -> Vec<App> {
        let parts = self.selected.iter().filter_map(|selected| {
            let (writer, component) = self.parts(selected)?;
            let status = statuses.iter().find(|status| status.instance == writer.instance);
            let error = match status {
                Some(status) => status.trouble_at_end(),
                None => Some("the writer is gone: it gave no status after the freeze".to_owned()),
            };
            let state = if error.is_some() {
                AppState::Failed
            } else {
                AppState::Thawed
            };
            Some(writer.app(component, state, error, selected.lun))
        });
        parts.take(LIST_MAX).collect()
    }
}

/// The first writer, of all of them, that did not come through. Also one that has nothing on the LUN: VSS froze it, too, and §9
/// asks that *every* writer is well.
pub(crate) fn first_trouble(statuses: &[WriterStatus]) -> Option<String> {
    statuses.iter().find_map(|status| {
        let trouble = status.trouble_at_end()?;
        Some(cut(format!("the VSS writer {} {trouble}", status.name)))
    })
}

fn state_name(state: i32) -> &'static str {
    match state {
        1 => "STABLE",
        2 => "WAITING_FOR_FREEZE",
        3 => "WAITING_FOR_THAW",
        4 => "WAITING_FOR_POST_SNAPSHOT",
        5 => "WAITING_FOR_BACKUP_COMPLETE",
        6 => "FAILED_AT_IDENTIFY",
        7 => "FAILED_AT_PREPARE_BACKUP",
        8 => "FAILED_AT_PREPARE_SNAPSHOT",
        9 => "FAILED_AT_FREEZE",
        10 => "FAILED_AT_THAW",
        11 => "FAILED_AT_POST_SNAPSHOT",
        12 => "FAILED_AT_BACKUP_COMPLETE",
        13 => "FAILED_AT_PRE_RESTORE",
        14 => "FAILED_AT_POST_RESTORE",
        15 => "FAILED_AT_BACKUPSHUTDOWN",
        _ => "in an unknown state",
    }
}

/// An HRESULT of VSS for people (MS docs: vsserror.h).
pub(crate) fn hresult(code: i32) -> String {
    let number = code.cast_unsigned();
    let text = match number {
        0x8004_2301 => "VSS_E_BAD_STATE: another backup is under way",
        0x8004_2304 => "VSS_E_PROVIDER_NOT_REGISTERED: run `stillpoint-agent install`",
        0x8004_2306 => "VSS_E_PROVIDER_VETO: the snapshot was given up",
        0x8004_230c => "VSS_E_VOLUME_NOT_SUPPORTED",
        0x8004_230e => "VSS_E_VOLUME_NOT_SUPPORTED_BY_PROVIDER",
        0x8004_2312 => "VSS_E_MAXIMUM_NUMBER_OF_VOLUMES_REACHED",
        0x8004_2313 => "VSS_E_FLUSH_WRITES_TIMEOUT: the volumes are too busy to be flushed",
        0x8004_2314 => "VSS_E_HOLD_WRITES_TIMEOUT: the writes were held for 10 s and let go",
        0x8004_2315 => "VSS_E_UNEXPECTED_WRITER_ERROR",
        0x8004_2316 => "VSS_E_SNAPSHOT_SET_IN_PROGRESS: another program takes a shadow copy now",
        0x8004_2318 => "VSS_E_WRITER_INFRASTRUCTURE",
        0x8004_2319 => "VSS_E_WRITER_NOT_RESPONDING",
        0x8004_231b => "VSS_E_UNSUPPORTED_CONTEXT",
        0x8004_23f0 => "VSS_E_WRITERERROR_INCONSISTENTSNAPSHOT",
        0x8004_23f1 => "VSS_E_WRITERERROR_OUTOFRESOURCES",
        0x8004_23f2 => "VSS_E_WRITERERROR_TIMEOUT: the writer was frozen for 60 s",
        0x8004_23f3 => "VSS_E_WRITERERROR_RETRYABLE: try again",
        0x8004_23f4 => "VSS_E_WRITERERROR_NONRETRYABLE: see the application's own log",
        _ => return format!("error {number:#010x}"),
    };
    format!("{text} ({number:#010x})")
}

fn cut(mut text: String) -> String {
    let mut end = TEXT_MAX.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
    text
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::volumes::tests::{disk, lun, volume};

    pub(crate) const WANTED: Wanted = Wanted {
        mssql: true,
        hyperv: true,
        hyperv_writer: true,
    };

    pub(crate) fn inventory() -> Inventory {
        Inventory {
            disks: vec![disk(1), disk(2)],
            volumes: vec![
                volume(r"C:\", &[]),
                volume(r"S:\", &[lun(1)]),
                volume(r"T:\Two\", &[lun(2)]),
            ],
        }
    }

    pub(crate) fn component(name: &str, selectable: bool, paths: &[&str]) -> Component {
        let (logical_path, name) = match name.rsplit_once('\\') {
            Some((path, name)) => (Some(path.to_owned()), name),
            None => (None, name),
        };
        Component {
            kind: 1,
            logical_path,
            name: name.to_owned(),
            caption: None,
            selectable,
            paths: paths.iter().map(|path| (*path).to_owned()).collect(),
        }
    }

    pub(crate) fn sql(components: Vec<Component>) -> Writer {
        Writer {
            instance: 7,
            class: SQL_WRITER,
            name: "SqlServerWriter".to_owned(),
            components,
        }
    }

    fn names(selection: &Selection) -> Vec<String> {
        let parts = selection.selected.iter().filter_map(|one| selection.parts(one));
        parts.map(|(_, component)| component.full_name()).collect()
    }

    #[test]
    fn what_lies_on_the_lun_takes_part_and_what_is_spread_is_named() {
        let writer = sql(vec![
            component(r"SRV\sales", true, &[r"S:\db", r"s:\log"]),
            component(r"SRV\master", true, &[r"C:\sql"]),
            component(r"SRV\stock", true, &[r"S:\db", r"T:\two\log"]),
        ]);
        let selection = select(vec![writer.clone()], &inventory(), &[lun(1)], WANTED);
        assert_eq!(names(&selection), [r"SRV\sales"]);
        assert_eq!(selection.selected[0].lun, Some(lun(1)));
        let [spread] = selection.exclusions.as_slice() else {
            panic!("{:?}", selection.exclusions)
        };
        assert!(spread.subject.contains("stock") && spread.reason.contains(r"T:\two\log"));
        // With both LUNs in the set it is whole.
        let both = select(vec![writer.clone()], &inventory(), &[lun(1), lun(2)], WANTED);
        assert_eq!(names(&both), [r"SRV\sales", r"SRV\stock"]);
        assert_eq!(both.selected[1].lun, None);
        let off = Wanted {
            mssql: false,
            ..WANTED
        };
        let none = select(vec![writer], &inventory(), &[lun(1)], off);
        assert!(names(&none).is_empty() && none.exclusions.len() == 2);
    }

    #[test]
    fn what_cannot_be_chosen_comes_with_what_is_above_it() {
        let writer = sql(vec![
            component("SRV", true, &[]),
            component(r"SRV\a", false, &[r"S:\a"]),
            component(r"SRV\b", false, &[r"S:\b"]),
            component("lonely", false, &[r"S:\c"]),
            component(r"SRVX\d", false, &[r"S:\d"]),
        ]);
        let selection = select(vec![writer], &inventory(), &[lun(1)], WANTED);
        assert_eq!(names(&selection), ["SRV", "lonely", r"SRVX\d"]);
    }

    #[test]
    fn verdicts_count_no_writer_that_failed_or_went() {
        let writer = sql(vec![component("a", true, &[r"S:\a"])]);
        let selection = select(vec![writer], &inventory(), &[lun(1)], WANTED);
        let status = |state, failure| WriterStatus {
            instance: 7,
            class: SQL_WRITER,
            name: "SqlServerWriter".to_owned(),
            state,
            failure,
        };
        let verdict = |statuses: &[WriterStatus]| selection.verdicts(statuses)[0].clone();
        assert_eq!(verdict(&[status(5, 0)]).state, AppState::Thawed);
        assert_eq!(verdict(&[status(1, 0)]).state, AppState::Thawed);
        for bad in [
            status(9, 0),
            status(3, 0),
            status(0, 0),
            status(5, 0x8004_23f2_u32.cast_signed()),
        ] {
            let app = verdict(std::slice::from_ref(&bad));
            assert_eq!(app.state, AppState::Failed, "{bad:?}");
            assert!(app.error.is_some() && first_trouble(&[bad]).is_some());
        }
        let gone = verdict(&[]);
        assert_eq!(gone.state, AppState::Failed);
        let text = verdict(&[status(10, 0x8004_23f4_u32.cast_signed())])
            .error
            .expect("why");
        assert!(
            text.contains("FAILED_AT_THAW") && text.contains("NONRETRYABLE"),
            "{text}"
        );
    }

    #[test]
    fn a_hyper_v_component_is_shown_as_its_vm() {
        let vm = Component {
            caption: Some("web01".to_owned()),
            ..component("6A1C", true, &[r"S:\vm\web01"])
        };
        let writer = Writer {
            class: HYPERV_WRITER,
            name: "Microsoft Hyper-V VSS Writer".to_owned(),
            ..sql(vec![vm])
        };
        let apps = select(vec![writer], &inventory(), &[lun(1)], WANTED).apps(AppState::Ready);
        assert_eq!(
            (apps[0].kind.as_str(), apps[0].instance.as_str()),
            ("hyperv-vm", "web01")
        );
    }

    #[test]
    fn long_texts_are_cut_between_characters() {
        assert_eq!(cut("ä".repeat(600)).len(), 1024);
        assert_eq!(cut("short".to_owned()), "short");
    }
}
