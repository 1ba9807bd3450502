//! Whom a configuration trusts to certify servers: the authorities of some files, or the system's.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use crate::limits::FILE_MAX;

/// Why no TLS configuration could be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The file of certificate authorities could not be read.
    #[error("could not read the certificate authorities in {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The file is not a list of PEM certificates.
    #[error("{} is not a file of PEM certificates (BEGIN CERTIFICATE)", path.display())]
    Pem {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls_pki_types::pem::Error,
    },
    /// A certificate in the file cannot be one of an authority.
    #[error("certificate {number} in {} cannot be used as an authority", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
        /// Which one, counted from 1.
        number: usize,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// The file holds no certificate.
    #[error("{} holds no PEM certificate (BEGIN CERTIFICATE)", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// The system has no certificate authorities.
    #[error("this system has no certificate authorities; install them (ca-certificates), or name a ca_file")]
    NoSystemRoots,
    /// The provider does not offer what we ask for.
    #[error("could not set TLS up")]
    Library(#[source] rustls::Error),
}

/// The authorities in all of `files`, or without one the system's.
pub(super) fn roots(files: &[impl AsRef<Path>]) -> Result<RootCertStore, TlsError> {
    if files.is_empty() {
        return system_roots();
    }
    let mut all = RootCertStore::empty();
    for file in files {
        all.roots.extend(roots_of(file.as_ref())?.roots);
    }
    Ok(all)
}

fn roots_of(path: &Path) -> Result<RootCertStore, TlsError> {
    let unreadable = |source| TlsError::Read { path: path.to_owned(), source };
    let mut text = Vec::new();
    File::open(path).and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut text)).map_err(unreadable)?;
    if text.len() as u64 > FILE_MAX {
        return Err(unreadable(io::Error::other("it is larger than any such file")));
    }
    let mut roots = RootCertStore::empty();
    for (index, certificate) in CertificateDer::pem_slice_iter(&text).enumerate() {
        let certificate = certificate.map_err(|source| TlsError::Pem { path: path.to_owned(), source })?;
        roots.add(certificate).map_err(|source| TlsError::Certificate {
            path: path.to_owned(),
            number: index + 1,
            source,
        })?;
    }
    if roots.is_empty() { Err(TlsError::Empty { path: path.to_owned() }) } else { Ok(roots) }
}

fn system_roots() -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    // A system's store may hold a few that are out of date or odd; they are left out, the rest counts.
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    if roots.is_empty() { Err(TlsError::NoSystemRoots) } else { Ok(roots) }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn authority() -> String {
        let key = rcgen::KeyPair::generate().expect("key");
        let mut params = rcgen::CertificateParams::new(Vec::new()).expect("params");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.self_signed(&key).expect("certificate").pem()
    }

    #[test]
    fn refuses_files_that_hold_no_authority() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("ca.pem");
        assert!(matches!(roots(&[&path]), Err(TlsError::Read { .. })));
        fs::write(&path, "").expect("write");
        assert!(matches!(roots(&[&path]), Err(TlsError::Empty { .. })));
        fs::write(&path, "ssh-ed25519 AAAA").expect("write");
        assert!(matches!(roots(&[&path]), Err(TlsError::Empty { .. })));
        fs::write(&path, authority().replace("END CERTIFICATE", "END")).expect("write");
        assert!(matches!(roots(&[&path]), Err(TlsError::Pem { .. } | TlsError::Empty { .. })));
        fs::write(&path, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").expect("write");
        assert!(matches!(roots(&[&path]), Err(TlsError::Certificate { number: 1, .. })));
        fs::write(&path, vec![b'a'; FILE_MAX as usize + 1]).expect("write");
        assert!(matches!(roots(&[&path]), Err(TlsError::Read { .. })));
    }

    #[test]
    fn takes_every_authority_of_a_file() {
        let dir = tempfile::tempdir().expect("directory");
        let path = dir.path().join("ca.pem");
        fs::write(&path, format!("{}{}", authority(), authority())).expect("write");
        assert_eq!(roots_of(&path).expect("roots").len(), 2);
        assert_eq!(roots(&[&path, &path]).expect("roots").len(), 4);
    }
}
