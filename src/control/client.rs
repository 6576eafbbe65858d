//! The command line's side of the control socket: blocking, one request per connection.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde::de::DeserializeOwned;
use thiserror::Error;

use super::{MAX_REPLY, Reply, Request};

/// Why a request got no answer that counts.
#[derive(Debug, Error)]
pub(crate) enum ClientError {
    /// No daemon listens: it is dead or was never started.
    #[error("no daemon answers at {path}: {source}")]
    NoDaemon { path: String, source: io::Error },
    /// The connection broke or the wait ended.
    #[error("the daemon did not answer: {0}")]
    Broken(#[from] io::Error),
    /// The daemon said no.
    #[error("{0}")]
    Refused(String),
    /// The daemon's reply makes no sense to this version.
    #[error("the daemon's answer cannot be read ({0}): are both the same version?")]
    Strange(String),
}

/// A connection to one daemon.
pub(crate) struct Client {
    stream: UnixStream,
}

impl Client {
    /// Connects to the daemon that listens at `socket`; waits at most `patience` for each answer.
    pub(crate) fn connect(socket: &Path, patience: Option<Duration>) -> Result<Client, ClientError> {
        let stream = UnixStream::connect(socket)
            .map_err(|source| ClientError::NoDaemon { path: socket.display().to_string(), source })?;
        stream.set_read_timeout(patience)?;
        stream.set_write_timeout(patience)?;
        Ok(Client { stream })
    }

    /// The pid of the process that listens.
    pub(crate) fn peer_pid(&self) -> io::Result<i32> {
        let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
        let mut len = size_of::<libc::ucred>() as libc::socklen_t;
        // SAFETY: `cred` and `len` are valid for writes of `len` bytes over the call.
        let done = unsafe {
            libc::getsockopt(
                self.stream.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERCRED,
                (&raw mut cred).cast(),
                &raw mut len,
            )
        };
        if done == 0 { Ok(cred.pid) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends `request` and reads what the daemon answers to it.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T, ClientError> {
        let body = serde_json::to_vec(request).map_err(|e| ClientError::Strange(e.to_string()))?;
        self.stream.write_all(&(body.len() as u32).to_le_bytes())?;
        self.stream.write_all(&body)?;
        let mut length = [0; 4];
        self.stream.read_exact(&mut length)?;
        let length = u32::from_le_bytes(length);
        if length > MAX_REPLY {
            return Err(ClientError::Strange(format!("{length} bytes")));
        }
        let mut reply = vec![0; length as usize];
        self.stream.read_exact(&mut reply)?;
        match serde_json::from_slice(&reply).map_err(|e| ClientError::Strange(e.to_string()))? {
            Reply::Done(value) => {
                serde_json::from_value(value).map_err(|e| ClientError::Strange(e.to_string()))
            }
            Reply::Refused(why) => Err(ClientError::Refused(why)),
        }
    }
}
