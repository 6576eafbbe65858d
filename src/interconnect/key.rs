//! A node's key pair: made once, kept in the run directory, never on the shared disk.
//!
//! The private key is readable by its owner alone. What others pin is the SHA-256 of the certificate around the
//! public key; the certificate says nothing else that anybody believes.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use membership::Fingerprint;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

/// Private key, PKCS#8.
const KEY_FILE: &str = "node.key";
/// The certificate, DER.
const CERT_FILE: &str = "node.crt";

/// A node's key and certificate.
#[derive(Debug)]
pub(crate) struct NodeKey {
    certificate: CertificateDer<'static>,
    private: PrivatePkcs8KeyDer<'static>,
}

impl NodeKey {
    /// The pair in this directory, made anew where there is none.
    pub(crate) fn load_or_create(directory: &Path) -> io::Result<NodeKey> {
        let (key_path, cert_path) = (directory.join(KEY_FILE), directory.join(CERT_FILE));
        match (fs::read(&key_path), fs::read(&cert_path)) {
            (Ok(private), Ok(certificate)) => {
                Ok(NodeKey { certificate: certificate.into(), private: private.into() })
            }
            (Err(error), _) | (_, Err(error)) if error.kind() != io::ErrorKind::NotFound => Err(error),
            // One without the other is of no use: a start was interrupted here.
            (Ok(_) | Err(_), Ok(_) | Err(_)) => {
                let key = NodeKey::generate()?;
                write_new(&key_path, 0o600, key.private.secret_pkcs8_der())?;
                write_new(&cert_path, 0o644, &key.certificate)?;
                Ok(key)
            }
        }
    }

    /// A fresh pair, nowhere stored.
    pub(crate) fn generate() -> io::Result<NodeKey> {
        let pair = rcgen::KeyPair::generate().map_err(io::Error::other)?;
        let parameters =
            rcgen::CertificateParams::new(vec![String::from(super::tls::NAME)]).map_err(io::Error::other)?;
        let certificate = parameters.self_signed(&pair).map_err(io::Error::other)?;
        Ok(NodeKey { certificate: certificate.der().clone(), private: pair.serialize_der().into() })
    }

    /// What the node publishes in its slot, and others pin.
    pub(crate) fn fingerprint(&self) -> Fingerprint {
        super::tls::fingerprint(&self.certificate)
    }

    pub(super) fn chain(&self) -> Vec<CertificateDer<'static>> {
        vec![self.certificate.clone()]
    }

    pub(super) fn private(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.private.clone_key())
    }
}

/// Writes a file that is complete or not there.
fn write_new(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let draft = path.with_extension("new");
    let _ = fs::remove_file(&draft);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&draft)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_key_is_made_once_and_nobody_else_reads_it() {
        let directory = std::env::temp_dir().join(format!("matrix-key-{}", std::process::id()));
        fs::create_dir_all(&directory).expect("a directory");
        let made = NodeKey::load_or_create(&directory).expect("a key");
        let loaded = NodeKey::load_or_create(&directory).expect("the same key");
        assert_eq!(made.fingerprint(), loaded.fingerprint());
        let mode = fs::metadata(directory.join(KEY_FILE)).expect("a key file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        fs::remove_dir_all(&directory).expect("clean up");
    }
}
