//! `stillpoint-agent vcenter set | test`.

use std::io::{IsTerminal as _, Read as _, Write as _};
use std::path::PathBuf;

use anyhow::Context as _;
use secrecy::SecretString;
use serde_json::json;

use super::http;
use super::inventory::{self, Datastore};
use super::settings::{Settings, VmMode, add_overrides, parse_host, parse_override};
use super::soap::{Access, Soap, SoapError};
use super::thumbprint::Thumbprint;
use crate::config::Config;
use crate::failure::Failure;
use crate::report;

/// Passwords are short.
const PASSWORD_BYTES_MAX: u64 = 1_024;

/// What can be done about the vCenter.
#[derive(clap::Subcommand)]
pub(crate) enum Verb {
    /// Save where the vCenter is, as whom to log in and how to take VM snapshots; it is tried before it is saved
    Set {
        /// Its name or address; port 443 when none is given
        #[arg(value_name = "HOST[:PORT]", value_parser = parse_host)]
        host: String,
        /// The account
        #[arg(long, value_name = "NAME")]
        user: String,
        /// Read the password from this file; from standard input otherwise
        #[arg(long, value_name = "FILE")]
        password_file: Option<PathBuf>,
        /// The SHA-256 fingerprint of its certificate; it is shown and asked for otherwise
        #[arg(long, value_name = "SHA256")]
        fingerprint: Option<Thumbprint>,
        /// How VMs are made consistent [default: as it was, or quiesce]
        #[arg(long, value_enum)]
        mode: Option<VmMode>,
        /// Another mode for one VM, by its name or instance UUID
        #[arg(long = "vm", value_name = "NAME=MODE", value_parser = parse_override)]
        vms: Vec<(String, VmMode)>,
    },
    /// Log in and show which datastores are LUNs of a target
    Test,
}

/// Carries out a verb.
pub(crate) async fn run(json: bool, config: &Config, verb: &Verb) -> anyhow::Result<()> {
    match verb {
        Verb::Set {
            host,
            user,
            password_file,
            fingerprint,
            mode,
            vms,
        } => {
            let before = Settings::load(&config.state_dir).unwrap_or_default();
            let thumbprint = confirm(host, *fingerprint).await?;
            let password = password(password_file.as_deref())?;
            let mut settings = Settings {
                access: Access {
                    host: host.clone(),
                    user: user.clone(),
                    password,
                    thumbprint,
                },
                mode: mode
                    .or(before.as_ref().map(|before| before.mode))
                    .unwrap_or(VmMode::Quiesce),
                overrides: before.map(|before| before.overrides).unwrap_or_default(),
            };
            add_overrides(&mut settings.overrides, vms).map_err(anyhow::Error::msg)?;
            let tried = try_out(&settings).await.context("nothing was saved")?;
            settings.save(&config.state_dir)?;
            tell(json, &settings, &tried)
        }
        Verb::Test => {
            let settings = Settings::load(&config.state_dir)?;
            let settings = settings.ok_or_else(|| {
                Failure::refused(
                    "no_vcenter",
                    "no vCenter is set",
                    "`stillpoint-agent vcenter set` sets one",
                )
            })?;
            let tried = try_out(&settings).await?;
            tell(json, &settings, &tried)
        }
    }
}

/// The operator says that the certificate is the right one: nothing is sent to a vCenter that nobody has confirmed.
async fn confirm(host: &str, given: Option<Thumbprint>) -> anyhow::Result<Thumbprint> {
    let seen = http::look(host).await?;
    match given {
        Some(given) if given == seen => return Ok(seen),
        Some(given) => {
            let message = format!("{host} shows the certificate {seen}, not {given}; nothing was sent to it");
            let hint = "ask who runs the vCenter which is right";
            return Err(Failure::refused("certificate", message, hint).into());
        }
        None => {}
    }
    let question = format!("{host} shows a certificate with the SHA-256 fingerprint\n  {seen}");
    if !std::io::stdin().is_terminal() {
        let hint = format!("compare it with what the vSphere client shows, and say --fingerprint {seen}");
        return Err(Failure::refused("not_confirmed", question, hint).into());
    }
    let mut stderr = std::io::stderr();
    write!(
        stderr,
        "{question}\nIs it the one that the vSphere client shows? [y/N] "
    )?;
    stderr.flush()?;
    let mut answer = String::new();
    std::io::stdin().read_line(&mut answer)?;
    if !["y", "yes"].contains(&answer.trim().to_ascii_lowercase().as_str()) {
        return Err(Failure::refused("not_confirmed", "not confirmed; nothing was saved", "").into());
    }
    Ok(seen)
}

fn password(file: Option<&std::path::Path>) -> anyhow::Result<SecretString> {
    let mut text = String::new();
    match file {
        Some(file) => {
            let opened = std::fs::File::open(file).with_context(|| file.display().to_string())?;
            opened
                .take(PASSWORD_BYTES_MAX + 1)
                .read_to_string(&mut text)
                .with_context(|| file.display().to_string())?;
        }
        None if std::io::stdin().is_terminal() => {
            return Err(Failure::usage(
                "the password is not read from a terminal, where it would be shown",
                "say --password-file FILE, or give it on standard input",
            )
            .into());
        }
        None => {
            std::io::stdin()
                .take(PASSWORD_BYTES_MAX + 1)
                .read_to_string(&mut text)
                .context("the password")?;
        }
    }
    let password = text.lines().next().unwrap_or_default();
    if password.is_empty() || text.len() as u64 > PASSWORD_BYTES_MAX {
        return Err(Failure::usage(
            format!("the password has 1 to {PASSWORD_BYTES_MAX} bytes"),
            "in the first line",
        )
        .into());
    }
    let secret = SecretString::from(password);
    zeroize::Zeroize::zeroize(&mut text);
    Ok(secret)
}

struct Tried {
    product: String,
    datastores: Vec<Datastore>,
}

async fn try_out(settings: &Settings) -> anyhow::Result<Tried> {
    let mut soap = Soap::login(settings.access.clone()).await.map_err(explain)?;
    let product = soap.product();
    let datastores = inventory::datastores(&mut soap).await;
    soap.logout().await;
    Ok(Tried {
        product,
        datastores: datastores.map_err(explain)?,
    })
}

fn explain(error: SoapError) -> anyhow::Error {
    match error {
        SoapError::Http(error) => {
            Failure::unreachable(error.to_string(), "`stillpoint-agent vcenter test` tries again").into()
        }
        error => anyhow::Error::msg(super::service::refusal(&error).text),
    }
}

fn tell(json: bool, settings: &Settings, tried: &Tried) -> anyhow::Result<()> {
    let lun_of = |datastore: &Datastore| match datastore.extents.as_slice() {
        [one] => one.clone(),
        several => format!("{} extents", several.len()),
    };
    if json {
        let datastores: Vec<_> = tried.datastores.iter().map(|datastore| json!({
            "name": datastore.name, "extents": datastore.extents, "hosts": datastore.hosts.len(), "vms": datastore.vms.len(),
        })).collect();
        report::print_json(&json!({
            "host": settings.access.host, "user": settings.access.user, "product": tried.product,
            "certificate_sha256": settings.access.thumbprint, "mode": settings.mode, "vms": settings.overrides, "datastores": datastores,
        }))?;
        return Ok(());
    }
    report::print(&format!(
        "{} at {}, as {}",
        tried.product, settings.access.host, settings.access.user
    ))?;
    report::print(&format!("VM snapshots: {}", settings.mode.name()))?;
    for (vm, mode) in &settings.overrides {
        report::print(&format!("  {vm}: {}", mode.name()))?;
    }
    for datastore in &tried.datastores {
        report::print(&format!(
            "datastore {} on {}: {} hosts, {} VMs",
            datastore.name,
            lun_of(datastore),
            datastore.hosts.len(),
            datastore.vms.len()
        ))?;
    }
    Ok(())
}
