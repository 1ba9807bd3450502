//! Certificate authorities of a test, and what they sign: in files of a folder, as OpenSSL would leave them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use caponier::identity::Fingerprint;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CertifiedIssuer, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, KeyIdMethod, KeyPair, KeyUsagePurpose, RevokedCertParams, SanType, SerialNumber,
};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// An authority.
pub(crate) struct Authority {
    dir: PathBuf,
    issuer: CertifiedIssuer<'static, KeyPair>,
}

/// What a certificate will say.
#[derive(Debug, Clone)]
pub(crate) struct Leaf {
    /// DNS names, addresses, or URIs.
    pub(crate) names: Vec<String>,
    pub(crate) common: String,
    pub(crate) serial: u64,
    pub(crate) begin: SystemTime,
    pub(crate) end: SystemTime,
    /// Whether it is good for servers alone.
    pub(crate) for_servers: bool,
}

impl Leaf {
    /// One that counts for a day, for this name.
    pub(crate) fn new(name: &str, serial: u64) -> Self {
        let now = SystemTime::now();
        let (begin, end) = (now - DAY, now + DAY);
        Self { names: vec![name.to_owned()], common: "x".to_owned(), serial, begin, end, for_servers: false }
    }

    /// One that is over.
    pub(crate) fn expired(self) -> Self {
        Self { begin: SystemTime::now() - 2 * DAY, end: SystemTime::now() - DAY, ..self }
    }

    /// One whose time will come.
    pub(crate) fn early(self) -> Self {
        Self { begin: SystemTime::now() + DAY, end: SystemTime::now() + 2 * DAY, ..self }
    }

    /// One that ends so soon.
    pub(crate) fn ending_in(self, left: Duration) -> Self {
        Self { end: SystemTime::now() + left, ..self }
    }
}

impl Authority {
    /// Makes one, with its certificate in `NAME.pem` of a folder.
    pub(crate) fn new(dir: &Path, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        Self::of(dir, name, CertifiedIssuer::self_signed(authority(name), key).expect("an authority"))
    }

    /// Makes one below this one.
    pub(crate) fn below(&self, name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let issuer = CertifiedIssuer::signed_by(authority(name), key, &self.issuer).expect("an authority");
        Self::of(&self.dir, name, issuer)
    }

    fn of(dir: &Path, name: &str, issuer: CertifiedIssuer<'static, KeyPair>) -> Self {
        fs::write(dir.join(format!("{name}.pem")), issuer.pem()).expect("written");
        Self { dir: dir.to_owned(), issuer }
    }

    /// Its certificate.
    pub(crate) fn pem(&self) -> String {
        self.issuer.pem()
    }

    /// Signs a certificate for a new key: `NAME.pem` and `NAME.key` of the folder, which take the place of what is there at
    /// once, the key first. Returns the certificate's fingerprint.
    pub(crate) fn sign(&self, name: &str, leaf: &Leaf) -> String {
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, leaf.common.as_str());
        params.subject_alt_names = leaf.names.iter().map(|name| alternative(name)).collect();
        params.serial_number = Some(SerialNumber::from(leaf.serial));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        if !leaf.for_servers {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.not_before = leaf.begin.into();
        params.not_after = leaf.end.into();
        let key = KeyPair::generate().expect("a key");
        let certificate = params.signed_by(&key, &self.issuer).expect("a certificate");
        self.put(&format!("{name}.key"), &key.serialize_pem());
        self.put(&format!("{name}.pem"), &certificate.pem());
        Fingerprint::of(certificate.der()).to_string()
    }

    /// Revokes these serial numbers, and no others, in `NAME.crl`, which ends then.
    pub(crate) fn revoke(&self, name: &str, serials: &[u64], end: SystemTime) -> String {
        let revoked = |serial: &u64| RevokedCertParams {
            serial_number: SerialNumber::from(*serial),
            revocation_time: (SystemTime::now() - DAY).into(),
            reason_code: None,
            invalidity_date: None,
        };
        let list = CertificateRevocationListParams {
            this_update: (SystemTime::now() - DAY).into(),
            next_update: end.into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: serials.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let text = list.signed_by(&self.issuer).expect("a list").pem().expect("PEM");
        self.put(&format!("{name}.crl"), &text);
        text
    }

    /// A file that is there whole or not at all.
    fn put(&self, name: &str, text: &str) {
        let fresh = self.dir.join(format!("{name}.new"));
        fs::write(&fresh, text).expect("written");
        fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).expect("permissions");
        fs::rename(&fresh, self.dir.join(name)).expect("renamed");
    }
}

fn authority(name: &str) -> CertificateParams {
    let mut params = CertificateParams::new(Vec::new()).expect("parameters");
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn alternative(name: &str) -> SanType {
    match name.parse() {
        Ok(address) => SanType::IpAddress(address),
        Err(_) if name.contains("://") => SanType::URI(name.try_into().expect("a URI")),
        Err(_) => SanType::DnsName(name.try_into().expect("a name")),
    }
}
