//! The few methods of the vSphere API that the agent needs, by their names there (vSphere Web Services API 6.5 and later).

use std::collections::HashMap;
use std::time::Duration;

use super::soap::{Ref, Soap, SoapError, fault, missing};
use super::xml::{Element, escape};

/// How long one WaitForUpdatesEx may wait, in seconds. A vCenter may end longer ones by itself.
const WAIT_S: u32 = 10;
/// Objects in one page of an answer.
const PAGE: u32 = 500;
/// Pages of one answer: as many VMs as a vCenter can have.
const PAGES_MAX: usize = 200;

/// An object and those of the asked properties that are set.
#[derive(Debug, Clone)]
pub(crate) struct Object {
    /// What.
    pub(crate) this: Ref,
    /// By their paths.
    pub(crate) props: HashMap<String, Element>,
}

impl Object {
    /// A property.
    pub(crate) fn prop(&self, path: &str) -> Option<&Element> {
        self.props.get(path)
    }

    /// Its text.
    pub(crate) fn text(&self, path: &str) -> String {
        self.prop(path)
            .map(|value| value.text.trim().to_owned())
            .unwrap_or_default()
    }

    /// What it refers to.
    pub(crate) fn reference(&self, path: &str) -> Option<Ref> {
        self.prop(path).and_then(Ref::of)
    }

    /// A list of references.
    pub(crate) fn references(&self, path: &str) -> Vec<Ref> {
        let of_list = |list: &Element| list.children.iter().filter_map(Ref::of).collect();
        self.prop(path).map(of_list).unwrap_or_default()
    }
}

/// How a task ended: its result, or its fault.
pub(crate) type Ended = Result<Option<Ref>, SoapError>;

impl Soap {
    /// Every object of a type in the inventory.
    pub(crate) async fn find_all(&mut self, kind: &str, paths: &[&str]) -> Result<Vec<Object>, SoapError> {
        let manager = self.service("viewManager")?;
        let root = self.service("rootFolder")?;
        let args = format!(
            "{}<type>{kind}</type><recursive>true</recursive>",
            root.arg("container")
        );
        let answer = self.read("CreateContainerView", &manager, &args).await?;
        let view = answer.child("returnval").and_then(Ref::of);
        let view = view.ok_or_else(|| missing("CreateContainerView", "view"))?;
        let select = format!(
            "{}<skip>true</skip><selectSet xsi:type=\"TraversalSpec\"><type>ContainerView</type><path>view</path><skip>false</skip>\
             </selectSet>",
            view.arg("obj")
        );
        let found = self
            .retrieve(kind, paths, &format!("<objectSet>{select}</objectSet>"))
            .await;
        if let Err(error) = self.call("DestroyView", &view, "").await {
            tracing::debug!(%error, "a view is left to the end of the session");
        }
        found
    }

    /// Properties of these objects, which are all of one type. One that is gone is not in the answer.
    pub(crate) async fn properties(&mut self, of: &[Ref], paths: &[&str]) -> Result<Vec<Object>, SoapError> {
        let Some(first) = of.first() else {
            return Ok(Vec::new());
        };
        let set = |list: &[Ref]| {
            list.iter()
                .map(|one| format!("<objectSet>{}</objectSet>", one.arg("obj")))
                .collect::<String>()
        };
        match self.retrieve(&first.kind, paths, &set(of)).await {
            // One that has just gone fails the whole question: ask for each alone.
            Err(error) if error.is("ManagedObjectNotFound") && of.len() > 1 => {
                let mut found = Vec::new();
                for one in of {
                    match self
                        .retrieve(&one.kind, paths, &set(std::slice::from_ref(one)))
                        .await
                    {
                        Ok(objects) => found.extend(objects),
                        Err(error) if error.is("ManagedObjectNotFound") => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(found)
            }
            Err(error) if error.is("ManagedObjectNotFound") => Ok(Vec::new()),
            result => result,
        }
    }

    async fn retrieve(
        &mut self,
        kind: &str,
        paths: &[&str],
        objects: &str,
    ) -> Result<Vec<Object>, SoapError> {
        const METHOD: &str = "RetrievePropertiesEx";
        let collector = self.service("propertyCollector")?;
        let args = format!(
            "<specSet>{}{objects}</specSet><options><maxObjects>{PAGE}</maxObjects></options>",
            prop_set(kind, paths)
        );
        let mut answer = self.read(METHOD, &collector, &args).await?;
        let mut found = Vec::new();
        for _ in 0..PAGES_MAX {
            // No object at all is an answer without a value.
            let Some(result) = answer.child("returnval") else {
                return Ok(found);
            };
            found.extend(result.all("objects").filter_map(object));
            let Some(token) = result.text_of("token") else {
                return Ok(found);
            };
            let args = format!("<token>{}</token>", escape(token));
            answer = self
                .call("ContinueRetrievePropertiesEx", &collector, &args)
                .await?;
        }
        Err(missing(METHOD, "end"))
    }

    /// Starts a task.
    pub(crate) async fn start(&mut self, method: &str, this: &Ref, args: &str) -> Result<Ref, SoapError> {
        let answer = self.call(method, this, args).await?;
        answer
            .child("returnval")
            .and_then(Ref::of)
            .ok_or_else(|| missing(method, "task"))
    }

    /// Starts a task and waits for its end.
    pub(crate) async fn run(&mut self, method: &str, this: &Ref, args: &str, limit: Duration) -> Ended {
        let task = self.start(method, this, args).await?;
        let deadline = tokio::time::Instant::now() + limit;
        loop {
            if let Some((_, end)) = self.wait_any(std::slice::from_ref(&task)).await?.pop() {
                return end;
            }
            if tokio::time::Instant::now() >= deadline {
                if let Err(error) = self.call("CancelTask", &task, "").await {
                    tracing::debug!(%error, "a task cannot be cancelled");
                }
                return Err(fault(
                    method,
                    "Timedout",
                    &format!("not done within {} s", limit.as_secs()),
                ));
            }
        }
    }

    /// Waits until some of these tasks have ended, or for a while.
    pub(crate) async fn wait_any(&mut self, tasks: &[Ref]) -> Result<Vec<(Ref, Ended)>, SoapError> {
        const PATHS: [&str; 3] = ["info.state", "info.result", "info.error"];
        let now = self.properties(tasks, &PATHS).await?;
        let gone = tasks
            .iter()
            .filter(|task| !now.iter().any(|object| object.this == **task));
        let gone: Vec<_> = gone
            .map(|task| (task.clone(), Err(fault("Task", "ManagedObjectNotFound", ""))))
            .collect();
        let mut done: Vec<_> = now.iter().filter_map(ended).collect();
        done.extend(gone);
        if !done.is_empty() || tasks.is_empty() {
            return Ok(done);
        }
        let collector = self.service("propertyCollector")?;
        let objects: String = tasks
            .iter()
            .map(|task| format!("<objectSet>{}</objectSet>", task.arg("obj")))
            .collect();
        let spec = format!(
            "<spec>{}{objects}</spec><partialUpdates>false</partialUpdates>",
            prop_set("Task", &PATHS[..1])
        );
        let filter = self.call("CreateFilter", &collector, &spec).await?;
        let filter = filter.child("returnval").and_then(Ref::of);
        let filter = filter.ok_or_else(|| missing("CreateFilter", "filter"))?;
        let waited = self.wait_update(&collector).await;
        if let Err(error) = self.call("DestroyPropertyFilter", &filter, "").await {
            tracing::debug!(%error, "a filter is left to the end of the session");
        }
        waited?;
        // What has changed is read as at the beginning: one way to look at a task, whatever the update said.
        Ok(self
            .properties(tasks, &PATHS)
            .await?
            .iter()
            .filter_map(ended)
            .collect())
    }

    /// The first answer tells how things stand, the next one waits for a change.
    async fn wait_update(&mut self, collector: &Ref) -> Result<(), SoapError> {
        let mut version = String::new();
        for _ in 0..2 {
            let args = format!(
                "<version>{}</version><options><maxWaitSeconds>{WAIT_S}</maxWaitSeconds></options>",
                escape(&version)
            );
            let answer = self.call("WaitForUpdatesEx", collector, &args).await?;
            let Some(update) = answer.child("returnval") else {
                break;
            };
            let over = |element: &&Element| {
                element.name == "val" && matches!(element.text.trim(), "success" | "error")
            };
            if update.walk().iter().any(over) {
                break;
            }
            version = update.text_of("version").unwrap_or_default().to_owned();
        }
        Ok(())
    }

    /// Files of a datastore below its root, by `[datastore] path`: those of these patterns.
    pub(crate) async fn search(
        &mut self,
        browser: &Ref,
        datastore: &str,
        patterns: &[&str],
        limit: Duration,
    ) -> Result<Vec<String>, SoapError> {
        const METHOD: &str = "SearchDatastoreSubFolders_Task";
        let patterns: String = patterns
            .iter()
            .map(|pattern| format!("<matchPattern>{}</matchPattern>", escape(pattern)))
            .collect();
        let args = format!(
            "<datastorePath>{}</datastorePath><searchSpec>{patterns}</searchSpec>",
            escape(&format!("[{datastore}]"))
        );
        let task = self.start(METHOD, browser, &args).await?;
        let deadline = tokio::time::Instant::now() + limit;
        while self.wait_any(std::slice::from_ref(&task)).await?.is_empty() {
            if tokio::time::Instant::now() >= deadline {
                return Err(fault(
                    METHOD,
                    "Timedout",
                    &format!("not done within {} s", limit.as_secs()),
                ));
            }
        }
        let found = self
            .properties(
                std::slice::from_ref(&task),
                &["info.state", "info.result", "info.error"],
            )
            .await?;
        let object = found.first().ok_or_else(|| missing(METHOD, "task"))?;
        if let Some((_, end)) = ended(object) {
            end?;
        }
        let mut files = Vec::new();
        for folder in object
            .prop("info.result")
            .map(|list| list.children.as_slice())
            .unwrap_or_default()
        {
            let path = folder.text_of("folderPath").unwrap_or_default();
            for file in folder.all("file").filter_map(|file| file.text_of("path")) {
                let gap = if path.ends_with(['/', ']']) && !path.ends_with(']') {
                    ""
                } else {
                    "/"
                };
                let gap = if path.ends_with(']') { " " } else { gap };
                files.push(format!("{path}{gap}{file}"));
            }
        }
        Ok(files)
    }
}

fn prop_set(kind: &str, paths: &[&str]) -> String {
    let paths: String = paths
        .iter()
        .map(|path| format!("<pathSet>{path}</pathSet>"))
        .collect();
    format!("<propSet><type>{kind}</type><all>false</all>{paths}</propSet>")
}

fn object(element: &Element) -> Option<Object> {
    let this = element.child("obj").and_then(Ref::of)?;
    let props = element.all("propSet").filter_map(|set| {
        let name = set.text_of("name")?.to_owned();
        Some((name, set.child("val")?.clone()))
    });
    Some(Object {
        this,
        props: props.collect(),
    })
}

/// The end of a task, when it has one.
fn ended(task: &Object) -> Option<(Ref, Ended)> {
    let end = match task.text("info.state").as_str() {
        "success" => Ok(task.reference("info.result")),
        "error" => {
            let error = task.prop("info.error");
            let kind = error
                .and_then(|error| error.child("fault"))
                .and_then(|fault| fault.kind.clone());
            let text = error
                .and_then(|error| error.text_of("localizedMessage"))
                .unwrap_or_default();
            Err(fault(
                "the task",
                kind.as_deref().unwrap_or("a fault without a type"),
                text,
            ))
        }
        _ => return None,
    };
    Some((task.this.clone(), end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_ends_with_its_result_or_its_fault() {
        let task = |state: &str, rest: &str| {
            let text = format!(
                "<objects><obj type=\"Task\">task-1</obj><propSet><name>info.state</name><val>{state}</val></propSet>{rest}</objects>"
            );
            object(&Element::parse(&text).expect("XML")).expect("an object")
        };
        assert!(ended(&task("running", "")).is_none());
        let result = "<propSet><name>info.result</name><val type=\"VirtualMachine\" xsi:type=\"ManagedObjectReference\">vm-7</val></propSet>";
        let (_, end) = ended(&task("success", result)).expect("an end");
        assert_eq!(end.expect("success").expect("a result").id, "vm-7");
        let error = "<propSet><name>info.error</name><val><fault xsi:type=\"FileNotFound\"/><localizedMessage>gone</localizedMessage></val></propSet>";
        let (_, end) = ended(&task("error", error)).expect("an end");
        assert!(end.expect_err("a fault").is("FileNotFound"));
    }
}
