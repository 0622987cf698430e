//! `stillpoint trace`: writes what the daemon records.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt as _;

use serde_json::{Value, json};

use super::args::{Global, Trace};
use super::show::details;
use super::{client, err, print};
use crate::serve::control::api::{Refusal, Request, TraceRequest};

pub(crate) fn run(global: &Global, options: &Trace) -> Result<(), Refusal> {
    let to_stdout = options.out.as_os_str() == "-";
    let request = Request::Trace(TraceRequest {
        session: options.session,
        payload: options.payload,
        max_bytes: options.max_size.bytes(),
        seconds: options.duration.map(|duration| duration.as_secs()),
    });
    // Opened with the first piece: a session that does not exist leaves no empty file, and an older recording as it was.
    let mut file: Option<Box<dyn Write>> = None;
    let mut failed = None;
    let answer = client::ask(
        global,
        &request,
        |_| {},
        |streamed| {
            let client::Streamed::Data(bytes) = streamed else {
                return Ok(());
            };
            let out = match &mut file {
                Some(out) => out,
                None => file.insert(open(options, to_stdout).inspect_err(|e| failed = Some(e.to_string()))?),
            };
            // Whole blocks at once: whoever stops the recording leaves a file that can be read.
            let written = out.write_all(&bytes).and_then(|()| out.flush());
            written.inspect_err(|e| failed = Some(e.to_string()))
        },
    )?;
    match failed {
        // As in `stillpoint trace 3 --out - | head`.
        Some(_) if to_stdout => return Ok(()),
        Some(why) => {
            return Err(Refusal::failed(
                "not_written",
                format!("{} cannot be written ({why})", options.out.display()),
                "choose another --out",
            ));
        }
        None => {}
    }
    if to_stdout {
        if !global.quiet {
            err(&details(&answer));
        }
        return Ok(());
    }
    print(
        global,
        &with_file(answer, &options.out.display().to_string()),
        details,
    )
}

/// It may hold what only the initiator should see: nobody else may read a new one.
fn open(options: &Trace, to_stdout: bool) -> std::io::Result<Box<dyn Write>> {
    if to_stdout {
        return Ok(Box::new(std::io::stdout()));
    }
    let file = File::options()
        .create(true)
        .truncate(true)
        .write(true)
        .mode(0o600)
        .open(&options.out)?;
    Ok(Box::new(file))
}

fn with_file(mut answer: Value, file: &str) -> Value {
    if let Some(object) = answer.as_object_mut() {
        object.insert("file".to_owned(), json!(file));
    }
    answer
}
