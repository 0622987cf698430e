//! SOAP calls of the vSphere API (vim25) in one session, and what can be refused.

use secrecy::{ExposeSecret, SecretString};

use super::http::{Connection, HttpError};
use super::thumbprint::Thumbprint;
use super::xml::{Element, XmlError, escape};

/// How often a call that changes nothing is tried.
const READ_TRIES: usize = 3;

/// What came of a call instead of its answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum SoapError {
    /// No answer.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// An answer that cannot be read.
    #[error("{method}: {source}")]
    Xml {
        /// What was asked.
        method: String,
        /// Why.
        source: XmlError,
    },
    /// The vCenter refused.
    #[error("the vCenter refused {method}: {kind}{}", if .text.is_empty() { String::new() } else { format!(" ({})", .text) })]
    Fault {
        /// What was asked.
        method: String,
        /// The fault's type (`ResourceInUse`, `InvalidState` …), which the API's documentation explains.
        kind: String,
        /// For people.
        text: String,
    },
    /// An answer without what it has to contain.
    #[error("{method}: the answer has no {what}")]
    Missing {
        /// What was asked.
        method: String,
        /// What is not there.
        what: String,
    },
}

impl SoapError {
    /// Is it this fault?
    pub(crate) fn is(&self, wanted: &str) -> bool {
        matches!(self, Self::Fault { kind, .. } if kind == wanted)
    }

    /// May the call have been carried out all the same?
    pub(crate) fn is_unknown(&self) -> bool {
        matches!(
            self,
            Self::Http(HttpError::Lost { .. }) | Self::Xml { .. } | Self::Missing { .. }
        )
    }
}

/// A reference to something in the inventory.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
pub(crate) struct Ref {
    /// `VirtualMachine`, `HostSystem` …
    pub(crate) kind: String,
    /// `vm-41`.
    pub(crate) id: String,
}

impl Ref {
    /// Reads `<x type="HostSystem">host-1</x>`.
    pub(crate) fn of(element: &Element) -> Option<Self> {
        // A property's value says its type in an attribute `type` beside `xsi:type="ManagedObjectReference"`.
        let kind = element.of.clone()?;
        Some(Self {
            kind,
            id: element.text.trim().to_owned(),
        })
    }

    /// As an argument of a call.
    pub(crate) fn arg(&self, name: &str) -> String {
        format!(
            "<{name} type=\"{}\">{}</{name}>",
            escape(&self.kind),
            escape(&self.id)
        )
    }
}

impl std::fmt::Display for Ref {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.id)
    }
}

/// Where, as whom, and which certificate.
#[derive(Clone)]
pub(crate) struct Access {
    /// `HOST:PORT`.
    pub(crate) host: String,
    /// The account.
    pub(crate) user: String,
    /// Its password.
    pub(crate) password: SecretString,
    /// The certificate that an operator confirmed.
    pub(crate) thumbprint: Thumbprint,
}

/// A session. One call at a time.
pub(crate) struct Soap {
    access: Access,
    connection: Option<Connection>,
    cookie: Option<String>,
    content: Option<Element>,
}

impl Soap {
    /// Connects and logs in.
    pub(crate) async fn login(access: Access) -> Result<Self, SoapError> {
        let mut soap = Self {
            access,
            connection: None,
            cookie: None,
            content: None,
        };
        soap.begin().await?;
        Ok(soap)
    }

    /// A singleton of the vCenter, by the name of its field in ServiceContent.
    pub(crate) fn service(&self, name: &str) -> Result<Ref, SoapError> {
        let found = self
            .content
            .as_ref()
            .and_then(|content| content.child(name))
            .and_then(Ref::of);
        found.ok_or_else(|| SoapError::Missing {
            method: "RetrieveServiceContent".to_owned(),
            what: name.to_owned(),
        })
    }

    /// What product answers.
    pub(crate) fn product(&self) -> String {
        let about = self.content.as_ref().and_then(|content| content.child("about"));
        let name = about.and_then(|about| about.text_of("fullName"));
        name.unwrap_or("a vCenter without a name").to_owned()
    }

    async fn begin(&mut self) -> Result<(), SoapError> {
        self.cookie = None;
        let instance = Ref {
            kind: "ServiceInstance".to_owned(),
            id: "ServiceInstance".to_owned(),
        };
        let answer = self.once("RetrieveServiceContent", &instance, "").await?;
        self.content = answer.child("returnval").cloned();
        let manager = self.service("sessionManager")?;
        let args = format!(
            "<userName>{}</userName><password>{}</password>",
            escape(&self.access.user),
            escape(self.access.password.expose_secret())
        );
        self.once("Login", &manager, &args).await.map(drop)
    }

    /// Ends the session; a vCenter keeps only so many.
    pub(crate) async fn logout(mut self) {
        if let Ok(manager) = self.service("sessionManager")
            && let Err(error) = self.once("Logout", &manager, "").await
        {
            tracing::debug!(%error, "the vCenter session ends by itself");
        }
    }

    /// A call that changes nothing: tried again when the connection is lost.
    pub(crate) async fn read(&mut self, method: &str, this: &Ref, args: &str) -> Result<Element, SoapError> {
        let mut tries = 1;
        loop {
            match self.call(method, this, args).await {
                Err(error)
                    if tries < READ_TRIES && matches!(error, SoapError::Http(HttpError::Lost { .. })) =>
                {
                    tracing::debug!(method, %error, "tried again");
                    tries += 1;
                }
                result => return result,
            }
        }
    }

    /// A call that changes something: never sent twice. Whether one without an answer was carried out, the caller looks.
    pub(crate) async fn call(&mut self, method: &str, this: &Ref, args: &str) -> Result<Element, SoapError> {
        match self.once(method, this, args).await {
            // An idle session ends after half an hour; the vCenter has not looked at the call.
            Err(error) if error.is("NotAuthenticated") => {
                self.begin().await?;
                self.once(method, this, args).await
            }
            result => result,
        }
    }

    async fn once(&mut self, method: &str, this: &Ref, args: &str) -> Result<Element, SoapError> {
        if self
            .connection
            .as_ref()
            .is_none_or(|connection| !connection.is_open())
        {
            self.connection = Some(Connection::open(&self.access.host, self.access.thumbprint).await?);
        }
        let body = format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?><soapenv:Envelope xmlns:soapenv=\"http://schemas.xmlsoap.org/soap/envelope/\" \
             xmlns:xsd=\"http://www.w3.org/2001/XMLSchema\" xmlns:xsi=\"http://www.w3.org/2001/XMLSchema-instance\">\
             <soapenv:Body><{method} xmlns=\"urn:vim25\">{}{args}</{method}></soapenv:Body></soapenv:Envelope>",
            this.arg("_this")
        );
        let Some(connection) = &mut self.connection else {
            return Err(missing(method, "connection"));
        };
        // The method's name only: arguments may be secrets.
        tracing::trace!(method, this = %this, "call");
        let answer = connection
            .post("urn:vim25/6.5", self.cookie.as_deref(), body)
            .await;
        let answer = answer.inspect_err(|_| self.connection = None)?;
        if let Some(cookie) = answer.cookie {
            self.cookie = Some(cookie);
        }
        let bad = |source| SoapError::Xml {
            method: method.to_owned(),
            source,
        };
        let envelope = match Element::parse(&answer.body) {
            Ok(envelope) => envelope,
            Err(_) if answer.status != 200 => {
                return Err(fault(method, &format!("HTTP {}", answer.status), ""));
            }
            Err(error) => return Err(bad(error)),
        };
        let body = envelope.child("Body").ok_or_else(|| missing(method, "Body"))?;
        match (body.child("Fault"), body.children.first()) {
            (Some(found), _) => Err(fault_of(method, found)),
            (None, Some(response)) => Ok(response.clone()),
            (None, None) => Err(missing(method, "response")),
        }
    }
}

pub(crate) fn missing(method: &str, what: &str) -> SoapError {
    SoapError::Missing {
        method: method.to_owned(),
        what: what.to_owned(),
    }
}

pub(crate) fn fault(method: &str, kind: &str, text: &str) -> SoapError {
    SoapError::Fault {
        method: method.to_owned(),
        kind: kind.to_owned(),
        text: text.to_owned(),
    }
}

fn fault_of(method: &str, found: &Element) -> SoapError {
    let detail = found.child("detail").and_then(|detail| detail.children.first());
    let named = detail.map(|detail| {
        let element = detail.name.strip_suffix("Fault").unwrap_or(&detail.name);
        detail.kind.clone().unwrap_or_else(|| element.to_owned())
    });
    let text = found.text_of("faultstring").unwrap_or_default();
    fault(
        method,
        &named.unwrap_or_else(|| "a fault without a type".to_owned()),
        text,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_known_by_their_type() {
        let text = r#"<Fault><faultcode>x</faultcode><faultstring>in use</faultstring><detail><Fault xsi:type="ResourceInUse"><name>a</name></Fault></detail></Fault>"#;
        let error = fault_of("UnmountVmfsVolume", &Element::parse(text).expect("XML"));
        assert!(error.is("ResourceInUse") && !error.is_unknown());
        assert_eq!(
            error.to_string(),
            "the vCenter refused UnmountVmfsVolume: ResourceInUse (in use)"
        );
        let text = "<Fault><faultstring/><detail><InvalidLoginFault/></detail></Fault>";
        assert!(fault_of("Login", &Element::parse(text).expect("XML")).is("InvalidLogin"));
    }
}
