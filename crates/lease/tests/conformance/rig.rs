//! Each kind of store, made ready for one test.

use crate::api_server::ApiServer;
use lease::Cells;
use lease_testing::{Etcd, Postgres, Security, Server};
use silo_testing::{Moto, S3Server};
use std::{sync::Arc, time::Duration};
use tempfile::TempDir;

/// What a store needs around it.
enum Behind {
    /// Nothing but the folder.
    Files,
    Postgres(Postgres),
    Etcd(Etcd),
    S3(S3Server),
    Moto(#[expect(dead_code, reason = "it ends with this")] Moto),
    Kubernetes(ApiServer),
}

/// A store, empty, that ends with this.
pub(crate) struct Rig {
    behind: Behind,
    address: String,
    /// Of the object stores; everything else is in the address.
    credentials: Vec<(&'static str, String)>,
    _folder: TempDir,
}

impl Rig {
    /// `None` if this computer lacks what it takes, which is said.
    pub(crate) fn start(kind: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path();
        let mut credentials = Vec::new();
        let (behind, address) = match kind {
            "file" => (Behind::Files, path.display().to_string()),
            "sqlite" => (Behind::Files, format!("sqlite:{}/leases", path.display())),
            "postgres" => {
                let server = Postgres::start(path, false)?;
                let address = server.address.clone();
                (Behind::Postgres(server), address)
            }
            "etcd" => {
                let server = Etcd::start(path, Security::None)?;
                let address = server.address.clone();
                (Behind::Etcd(server), address)
            }
            "s3" => {
                let server = S3Server::start(path).unwrap();
                credentials = server.credentials().map(|(n, v)| (n, v.to_owned())).into();
                let address = server.url("leases");
                (Behind::S3(server), address)
            }
            "moto" => {
                let server = Moto::start()?;
                credentials = Moto::CREDENTIALS.map(|(n, v)| (n, v.to_owned())).into();
                let address = server.address("leases");
                (Behind::Moto(server), address)
            }
            "kubernetes" => {
                let server = ApiServer::start(path);
                let address = server.address.clone();
                (Behind::Kubernetes(server), address)
            }
            other => panic!("no store {other}"),
        };
        Some(Self { behind, address, credentials, _folder: folder })
    }

    pub(crate) fn open(&self, limit: Duration) -> Arc<dyn Cells> {
        if self.credentials.is_empty() {
            return lease::open_cells(&self.address, limit).unwrap();
        }
        let pairs = self.credentials.iter().map(|(name, value)| (*name, value.as_str()));
        let environment = bucket::Environment::given(pairs);
        lease::open_bucket(&self.address.parse().unwrap(), &environment, limit).unwrap()
    }

    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    pub(crate) fn credentials(&self) -> impl Iterator<Item = (&str, &str)> {
        self.credentials.iter().map(|(name, value)| (*name, value.as_str()))
    }

    pub(crate) fn s3(&self) -> &S3Server {
        match &self.behind {
            Behind::S3(server) => server,
            _ => panic!("it is no S3 server of ours"),
        }
    }

    pub(crate) fn kubernetes(&self) -> &ApiServer {
        match &self.behind {
            Behind::Kubernetes(server) => server,
            _ => panic!("it is no API server"),
        }
    }

    /// The server's process, where it has one.
    pub(crate) fn server(&mut self) -> &mut Server {
        match &mut self.behind {
            Behind::Postgres(server) => &mut server.server,
            Behind::Etcd(server) => &mut server.server,
            _ => panic!("it has no process"),
        }
    }
}
