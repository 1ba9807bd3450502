//! The ASN.1 structures that hold keys: telling them from each other, and public keys in them read and written.

use russh::keys::EcdsaCurve;
use russh::keys::ssh_key::Mpint;
use russh::keys::ssh_key::public::{EcdsaPublicKey, Ed25519PublicKey, KeyData, RsaPublicKey};
use spki::der::asn1::{AnyRef, BitStringRef, UintRef};
use spki::der::{self, Decode, Encode, Reader, SliceReader, Tag};
use spki::{AlgorithmIdentifierRef, ObjectIdentifier, SubjectPublicKeyInfoRef};

use super::KeyError;
use super::text::printable;

/// What a DER structure seems to be, by the tags of its first elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// `SubjectPublicKeyInfo` (RFC 5280 §4.1).
    Spki,
    /// `RSAPublicKey` (RFC 8017 §A.1.1).
    RsaPublic,
    /// `PrivateKeyInfo` or `OneAsymmetricKey` (RFC 5958 §2).
    Pkcs8,
    /// `EncryptedPrivateKeyInfo` (RFC 5958 §3).
    Pkcs8Encrypted,
    /// `RSAPrivateKey` (RFC 8017 §A.1.2) with two primes.
    RsaPrivate,
    /// OpenSSL's traditional form of a DSA key.
    DsaPrivate,
    /// `ECPrivateKey` (RFC 5915 §3) that names its curve.
    Sec1,
    /// `ECPrivateKey` that spells its curve out, or leaves it out.
    Sec1Explicit,
    /// `Certificate` or `CertificationRequest`.
    Certificate,
    /// None of these.
    Other,
}

/// Says what `der` seems to be.
pub(super) fn shape(der: &[u8]) -> Shape {
    let Ok(elements) = elements(der) else { return Shape::Other };
    let tags: Vec<_> = elements.iter().map(der::Tagged::tag).collect();
    match tags.as_slice() {
        [Tag::Sequence, Tag::BitString] => Shape::Spki,
        [Tag::Sequence, Tag::OctetString] => Shape::Pkcs8Encrypted,
        [Tag::Sequence, Tag::Sequence, Tag::BitString] => Shape::Certificate,
        [Tag::Integer, Tag::Integer] => Shape::RsaPublic,
        [Tag::Integer, Tag::Sequence, Tag::OctetString, ..] => Shape::Pkcs8,
        [Tag::Integer, Tag::OctetString, ..] => {
            let curve =
                elements.get(2).filter(|element| matches!(der::Tagged::tag(*element), Tag::ContextSpecific { .. }));
            match curve.and_then(|element| element.value().first().copied()) {
                Some(OID_TAG) => Shape::Sec1,
                _ => Shape::Sec1Explicit,
            }
        }
        integers if integers.iter().all(|tag| *tag == Tag::Integer) => match integers.len() {
            9 => Shape::RsaPrivate,
            6 => Shape::DsaPrivate,
            _ => Shape::Other,
        },
        _ => Shape::Other,
    }
}

/// Reads a `SubjectPublicKeyInfo`: Ed25519 (RFC 8410), RSA (RFC 3279 §2.3.1), EC on a named curve (RFC 5480).
pub(super) fn read_spki(der: &[u8]) -> Result<KeyData, KeyError> {
    let damaged = |detail: &str| KeyError::Damaged { what: "a public key in PEM", detail: detail.into() };
    let spki = SubjectPublicKeyInfoRef::from_der(der).map_err(|error| damaged(&error.to_string()))?;
    let bits = spki.subject_public_key.as_bytes().ok_or_else(|| damaged("its bits do not fill whole bytes"))?;
    let parameters = spki.algorithm.parameters;
    match spki.algorithm.oid {
        ED25519 if parameters.is_none() => {
            let point = bits.try_into().map_err(|_| damaged("an Ed25519 key has 32 bytes"))?;
            Ok(KeyData::Ed25519(Ed25519PublicKey(point)))
        }
        RSA if parameters.is_none_or(AnyRef::is_null) => read_rsa_public(bits).map(KeyData::Rsa),
        EC => {
            let Some(curve) = parameters.and_then(|any| any.decode_as::<ObjectIdentifier>().ok()) else {
                return Err(KeyError::Algorithm("ECDSA with explicit curve parameters".into()));
            };
            if !CURVES.contains(&curve) {
                return Err(KeyError::Algorithm(name(&curve.to_string())));
            }
            match EcdsaPublicKey::from_sec1_bytes(bits) {
                Ok(key) if oid(key.curve()) == curve => Ok(KeyData::Ecdsa(key)),
                _ => Err(damaged("its point is not one of its curve")),
            }
        }
        ED25519 | RSA => Err(damaged("unexpected parameters")),
        other => Err(KeyError::Algorithm(name(&other.to_string()))),
    }
}

/// Reads an `RSAPublicKey`.
pub(super) fn read_rsa_public(der: &[u8]) -> Result<RsaPublicKey, KeyError> {
    let read = || -> der::Result<(UintRef<'_>, UintRef<'_>)> {
        AnyRef::from_der(der)?.sequence(|reader| Ok((reader.decode()?, reader.decode()?)))
    };
    let damaged = |detail: String| KeyError::Damaged { what: "an RSA public key", detail };
    let (n, e) = read().map_err(|error| damaged(error.to_string()))?;
    let number = |uint: UintRef<'_>| Mpint::from_positive_bytes(uint.as_bytes());
    RsaPublicKey::new(number(e), number(n)).map_err(|error| damaged(error.to_string()))
}

/// Writes a `SubjectPublicKeyInfo`, for the kinds that have one.
pub(super) fn write_spki(key: &KeyData) -> Option<Vec<u8>> {
    let (oid, parameters, bits) = match key {
        KeyData::Ed25519(key) => (ED25519, None, key.0.to_vec()),
        KeyData::Rsa(key) => {
            let number = |mpint: &Mpint| UintRef::new(mpint.as_positive_bytes()?).and_then(|uint| uint.to_der()).ok();
            let body = [number(key.n())?, number(key.e())?].concat();
            (
                RSA,
                Some(AnyRef::NULL.to_der().ok()?),
                AnyRef::new(Tag::Sequence, &body).and_then(|any| any.to_der()).ok()?,
            )
        }
        KeyData::Ecdsa(key) => (EC, Some(oid(key.curve()).to_der().ok()?), key.as_sec1_bytes().to_vec()),
        _ => return None,
    };
    let parameters = parameters.as_deref().map(AnyRef::from_der).transpose().ok()?;
    let spki = SubjectPublicKeyInfoRef {
        algorithm: AlgorithmIdentifierRef { oid, parameters },
        subject_public_key: BitStringRef::from_bytes(&bits).ok()?,
    };
    spki.to_der().ok()
}

/// A name for the kinds of key that people bring and we refuse; else the object identifier itself.
pub(super) fn name(oid: &str) -> String {
    match oid {
        "1.2.840.10040.4.1" => "ssh-dss (DSA)",
        "1.2.840.113549.1.1.10" => "RSA-PSS",
        "1.3.101.110" => "X25519 (it cannot sign)",
        "1.3.101.111" => "X448 (it cannot sign)",
        "1.3.101.113" => "Ed448",
        "1.3.132.0.10" => "ECDSA on secp256k1",
        other => return printable(&format!("with the object identifier {other}")),
    }
    .to_owned()
}

fn elements(der: &[u8]) -> der::Result<Vec<AnyRef<'_>>> {
    let outer = AnyRef::from_der(der)?;
    der::Tagged::tag(&outer).assert_eq(Tag::Sequence)?;
    let mut reader = SliceReader::new(outer.value())?;
    let mut elements = Vec::new();
    // No structure that we know has more.
    while !reader.is_finished() && elements.len() <= ELEMENTS_MAX {
        elements.push(reader.decode()?);
    }
    Ok(elements)
}

fn oid(curve: EcdsaCurve) -> ObjectIdentifier {
    match curve {
        EcdsaCurve::NistP256 => P256,
        EcdsaCurve::NistP384 => P384,
        EcdsaCurve::NistP521 => P521,
    }
}

const ELEMENTS_MAX: usize = 12;
const OID_TAG: u8 = 6;
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");
const P521: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.35");
const CURVES: [ObjectIdentifier; 3] = [P256, P384, P521];
