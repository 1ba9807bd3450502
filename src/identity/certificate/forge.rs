//! Certificates for tests, good save for what a test changes.

use russh::keys::ssh_key::certificate::{Builder, CertType};

use super::{Certificate, CertificateError, Kind};
use crate::identity::{Algorithm, PrivateKey, PublicKey};

/// What a CA is asked to sign.
#[derive(Clone)]
pub(crate) struct Forge {
    pub(crate) authority: PrivateKey,
    pub(crate) subject: PublicKey,
    pub(crate) kind: Kind,
    pub(crate) serial: u64,
    pub(crate) key_id: String,
    pub(crate) principals: Vec<String>,
    pub(crate) valid_after: u64,
    pub(crate) valid_before: u64,
    pub(crate) options: Vec<(String, String)>,
    pub(crate) extensions: Vec<(String, String)>,
}

impl Forge {
    /// A user's certificate for these principals, good from 1000 to 2000 seconds.
    pub(crate) fn new(authority: &PrivateKey, principals: &[&str]) -> Self {
        Self {
            authority: authority.clone(),
            subject: PrivateKey::generate(Algorithm::Ed25519).public(),
            kind: Kind::User,
            serial: 7,
            key_id: "somebody".to_owned(),
            principals: principals.iter().map(|&principal| principal.to_owned()).collect(),
            valid_after: 1000,
            valid_before: 2000,
            options: Vec::new(),
            extensions: vec![("permit-port-forwarding".to_owned(), String::new())],
        }
    }

    pub(crate) fn whole(&self) -> russh::keys::Certificate {
        let subject = self.subject.as_ssh().clone();
        let mut builder = Builder::new([7; 16], subject, self.valid_after, self.valid_before).expect("a validity");
        builder.serial(self.serial).expect("a serial number");
        builder.key_id(self.key_id.as_str()).expect("a key id");
        let kind = if self.kind == Kind::User { CertType::User } else { CertType::Host };
        builder.cert_type(kind).expect("a type");
        builder.all_principals_valid().expect("no principals");
        for principal in &self.principals {
            builder.valid_principal(principal.as_str()).expect("a principal");
        }
        for (name, data) in &self.options {
            builder.critical_option(name.as_str(), data.as_str()).expect("an option");
        }
        for (name, data) in &self.extensions {
            builder.extension(name.as_str(), data.as_str()).expect("an extension");
        }
        builder.sign(self.authority.as_ssh().as_ref()).expect("a certificate")
    }

    pub(crate) fn try_sign(&self) -> Result<Certificate, CertificateError> {
        Certificate::from_ssh(&self.whole())
    }

    pub(crate) fn sign(&self) -> Certificate {
        self.try_sign().expect("a certificate that could count")
    }
}
