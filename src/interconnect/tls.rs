//! Mutual TLS with pinned keys.
//!
//! A peer is believed if, and only if, the SHA-256 of its certificate is one that a view or a claimed slot names,
//! and it proves that it has the private key. Names, chains and validity dates in the certificate mean nothing: a
//! wrong clock cannot cut a node off, and removal takes effect with the view. TLS 1.3 only.

use std::collections::BTreeMap;
use std::sync::Arc;

use membership::Fingerprint;
use parking_lot::RwLock;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, ring, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, ServerConfig,
    SignatureScheme,
};

use super::Who;
use super::key::NodeKey;

/// The name in every node's certificate. Nobody checks it.
pub(super) const NAME: &str = "matrix";

/// SHA-256 of a certificate.
pub(super) fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    let digest = ::ring::digest::digest(&::ring::digest::SHA256, certificate);
    digest.as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// The keys that are accepted now, and whose they are.
#[derive(Debug, Default)]
pub(super) struct Trust(RwLock<BTreeMap<Fingerprint, Who>>);

impl Trust {
    pub(super) fn set(&self, accepted: BTreeMap<Fingerprint, Who>) {
        *self.0.write() = accepted;
    }

    pub(super) fn whose(&self, fingerprint: &Fingerprint) -> Option<Who> {
        self.0.read().get(fingerprint).copied()
    }
}

/// Why a key is refused that is in no slot and no view.
pub(super) const UNKNOWN_KEY: &str = "its key stands in no slot that was looked at";

/// What ended a handshake.
pub(super) fn reason(error: &std::io::Error) -> String {
    let refused = Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure);
    match error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) {
        Some(inner) if *inner == refused => String::from(UNKNOWN_KEY),
        Some(_) | None => error.to_string(),
    }
}

/// Accepts what [`Trust`] accepts, and one key alone where it is known who must answer.
#[derive(Debug)]
struct Pinned {
    trust: Arc<Trust>,
    only: Option<Fingerprint>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl Pinned {
    fn check(&self, certificate: &CertificateDer<'_>) -> Result<(), Error> {
        let fingerprint = fingerprint(certificate);
        let wanted = self.only.is_none_or(|only| only == fingerprint);
        if wanted && self.trust.whose(&fingerprint).is_some() {
            return Ok(());
        }
        Err(Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure))
    }

    fn never_tls12(&self) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General(String::from("TLS 1.2 is not spoken here")))
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.check(certificate).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.never_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Pinned {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        certificate: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.check(certificate).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.never_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

fn pinned(trust: &Arc<Trust>, only: Option<Fingerprint>) -> Arc<Pinned> {
    let algorithms = provider().signature_verification_algorithms;
    Arc::new(Pinned { trust: Arc::clone(trust), only, algorithms })
}

/// For connections that come in.
pub(super) fn server(key: &NodeKey, trust: &Arc<Trust>) -> Result<ServerConfig, Error> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(pinned(trust, None))
        .with_single_cert(key.chain(), key.private())?;
    // No sessions are resumed: every connection proves its key anew.
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// For a connection to the one peer that has this key.
pub(super) fn client(key: &NodeKey, trust: &Arc<Trust>, peer: Fingerprint) -> Result<ClientConfig, Error> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(pinned(trust, Some(peer)))
        .with_client_auth_cert(key.chain(), key.private())?;
    config.resumption = rustls::client::Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}
