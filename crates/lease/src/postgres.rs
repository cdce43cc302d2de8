//! Leases in a table of PostgreSQL (9.5 and later).
//!
//! A swap is one statement, which is a transaction of its own: an `UPDATE` that names the expected
//! content, or an `INSERT` that gives way. PostgreSQL locks the row, and looks at it again after it has
//! waited for another, so one of many wins; and an answer comes when the log is on disk. That needs what
//! each new connection makes sure of: `synchronous_commit` on, `fsync` on, read committed, and a server
//! that takes writes (a standby's rows are old).
//!
//! Every call has a connection of its own, kept for the next one if it went well.

use super::{
    Key, MAX_CELL, Swap,
    address::{NO_PASSWORDS, Options, secret},
    remote::{Backend, Failure, chain},
    tls,
};
use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};
use tokio::task::AbortHandle;
use tokio_postgres::{
    Client, Config, NoTls,
    config::{Host, LoadBalanceHosts, SslMode, TargetSessionAttrs},
    error::SqlState,
    types::Type,
};
use tokio_postgres_rustls::MakeRustlsConnect;

/// Connections that are kept for the next call.
const KEPT: usize = 4;

/// Longest time for a connection to come about.
const CONNECT: Duration = Duration::from_secs(1);

const TABLE: &str = "CREATE TABLE IF NOT EXISTS architect_leases \
                     (key text PRIMARY KEY, content bytea NOT NULL)";

/// Makes sure of what the module's comment says, and tells whether the server syncs its log.
const PREPARE: &str = "SELECT current_setting('fsync'), \
    set_config('statement_timeout', $1, false), \
    set_config('default_transaction_isolation', 'read committed', false), \
    set_config('synchronous_commit', CASE WHEN current_setting('synchronous_commit') \
        IN ('off', 'local') THEN 'on' ELSE current_setting('synchronous_commit') END, false)";

const READ: &str = "SELECT substring(content FROM 1 FOR $2) FROM architect_leases WHERE key = $1";

/// A connection, which ends with this.
struct Session {
    client: Client,
    task: AbortHandle,
}

impl Drop for Session {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A table in a database.
pub(crate) struct Postgres {
    config: Config,
    /// `None` for Unix sockets, and where the address says so.
    tls: Option<MakeRustlsConnect>,
    password_file: Option<PathBuf>,
    /// For messages.
    shown: String,
    limit: Duration,
    idle: Mutex<Vec<Session>>,
}

impl Postgres {
    /// Makes no connection yet. `address` is as in libpq, without a password; `sslmode` is `require`
    /// (which verifies the server's name, as `verify-full` does) or `disable`; `sslrootcert`, `sslcert`,
    /// `sslkey` and `password_file` name files. Statements end after `limit`.
    pub(crate) fn new(
        address: &str,
        password: Option<&str>,
        limit: Duration,
    ) -> Result<Self, String> {
        let (place, query) = address.split_once('?').unwrap_or((address, ""));
        let mut options = Options::parse(query)?;
        let encrypted = match options.take("sslmode") {
            None | Some("require" | "verify-full") => true,
            Some("disable") => false,
            Some(other) => {
                return Err(format!(
                    "sslmode={other} lets somebody in between choose; use verify-full or disable"
                ));
            }
        };
        let authority = options.take("sslrootcert").map(PathBuf::from);
        let own = match (options.take("sslcert"), options.take("sslkey")) {
            (Some(cert), Some(key)) => Some((PathBuf::from(cert), PathBuf::from(key))),
            (None, None) => None,
            _ => return Err("sslcert= and sslkey= go together".to_owned()),
        };
        let password_file = options.take("password_file").map(PathBuf::from);
        let rest: Vec<String> = options.rest().iter().map(|(n, v)| format!("{n}={v}")).collect();
        let config: Result<Config, _> = format!("{place}?{}", rest.join("&")).parse();
        let mut config = config.map_err(|e| chain(&e))?;
        if config.get_password().is_some() {
            return Err(NO_PASSWORDS.to_owned());
        }
        let unix = config.get_hosts().iter().filter(|host| matches!(host, Host::Unix(_))).count();
        let hosts = config.get_hosts().len();
        if hosts == 0 && config.get_hostaddrs().is_empty() {
            return Err("it names no host: postgres://user@host/database".to_owned());
        }
        if unix != 0 && unix != hosts {
            return Err("Unix sockets and other hosts do not go together".to_owned());
        }
        let encrypted = encrypted && unix == 0;
        let tls = if encrypted {
            let files = tls::Files { authority, own };
            Some(MakeRustlsConnect::new(tls::client(&files)?))
        } else {
            None
        };
        let shown = shown(&config);
        config
            .ssl_mode(if encrypted { SslMode::Require } else { SslMode::Disable })
            // A standby's rows are old.
            .target_session_attrs(TargetSessionAttrs::ReadWrite)
            // Otherwise one that hangs would be asked first, again and again.
            .load_balance_hosts(LoadBalanceHosts::Random)
            .connect_timeout(CONNECT)
            .tcp_user_timeout(limit);
        if config.get_application_name().is_none() {
            config.application_name("architect");
        }
        if let Some(password) = password {
            config.password(password);
        }
        let idle = Mutex::new(Vec::new());
        Ok(Self { config, tls, password_file, shown, limit, idle })
    }

    async fn connect(&self) -> Result<Session, Failure> {
        let mut config = self.config.clone();
        if let Some(path) = &self.password_file {
            config.password(secret(path).map_err(Failure::Refused)?);
        }
        let session = match &self.tls {
            Some(tls) => {
                let (client, connection) = config.connect(tls.clone()).await.map_err(failure)?;
                // Its error is told to whoever waits for an answer.
                let task = tokio::spawn(async move { drop(connection.await) }).abort_handle();
                Session { client, task }
            }
            None => {
                let (client, connection) = config.connect(NoTls).await.map_err(failure)?;
                let task = tokio::spawn(async move { drop(connection.await) }).abort_handle();
                Session { client, task }
            }
        };
        let limit = format!("{}ms", self.limit.as_millis().max(1));
        let row = session.client.query_typed_one(PREPARE, &[(&limit, Type::TEXT)]).await;
        let row = row.map_err(failure)?;
        let syncs: &str = row.try_get(0).map_err(failure)?;
        if syncs != "on" {
            return Err(Failure::Refused(
                "the server runs with fsync = off: a lease that was given could be forgotten; \
                 set it to on"
                    .to_owned(),
            ));
        }
        Ok(session)
    }

    fn kept(&self) -> Option<Session> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|session| !session.client.is_closed());
        idle.pop()
    }

    /// A connection that was not given back has failed, or was given up, and ends.
    fn keep(&self, session: Session) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push(session);
        }
    }

    async fn session(&self) -> Result<Session, Failure> {
        match self.kept() {
            Some(session) => Ok(session),
            None => self.connect().await,
        }
    }

    /// What to say of a statement's error; makes the table if that is what is missing.
    async fn mended(&self, session: &Session, error: tokio_postgres::Error) -> Failure {
        if error.code() != Some(&SqlState::UNDEFINED_TABLE) {
            return failure(error);
        }
        let Err(error) = session.client.batch_execute(TABLE).await else {
            return Failure::silent("its table was just made");
        };
        match error.code() {
            // Somebody else makes it at the same moment.
            Some(&SqlState::UNIQUE_VIOLATION | &SqlState::DUPLICATE_TABLE) => {
                Failure::silent(chain(&error))
            }
            _ => Failure::Refused(format!(
                "there is no table architect_leases, and it cannot be made here ({}); as somebody who \
                 may: {TABLE}; GRANT SELECT, INSERT, UPDATE ON architect_leases TO this role",
                said(&error)
            )),
        }
    }
}

fn shown(config: &Config) -> String {
    let host = |(at, host): (usize, &Host)| {
        let ports = config.get_ports();
        let port = ports.get(at).or_else(|| ports.first()).copied().unwrap_or(5432);
        match host {
            Host::Tcp(name) => format!("{name}:{port}"),
            Host::Unix(path) => format!("{} (port {port})", path.display()),
        }
    };
    let hosts: Vec<String> = config.get_hosts().iter().enumerate().map(host).collect();
    let user = config.get_user().map_or_else(String::new, |user| format!("{user}@"));
    let database = config.get_dbname().or(config.get_user()).unwrap_or("");
    format!("postgres://{user}{}/{database}", hosts.join(","))
}

/// An error of the server in one line, or of the connection.
fn said(error: &tokio_postgres::Error) -> String {
    match error.as_db_error() {
        Some(db) => format!("{} ({})", db.message(), db.code().code()),
        None => chain(error),
    }
}

#[expect(clippy::needless_pass_by_value, reason = "it is what map_err gives")]
fn failure(error: tokio_postgres::Error) -> Failure {
    let detail = said(&error);
    let refused = match error.code() {
        // Classes of SQLSTATE: wrong password or no entry in pg_hba.conf, no such database, no right
        // or no such table, not supported.
        Some(code) => ["28", "3D", "42", "0A"].iter().any(|class| code.code().starts_with(class)),
        // What the library says when a password is asked for and there is none, and when the server
        // has no TLS.
        None => {
            tls::refused(&error)
                || ["password missing", "does not support TLS", "authentication error"]
                    .iter()
                    .any(|text| detail.contains(text))
        }
    };
    if refused { Failure::Refused(detail) } else { Failure::silent(detail) }
}

async fn content(client: &Client, name: &str) -> Result<Option<Vec<u8>>, tokio_postgres::Error> {
    // What is too long is cut where it shows that it is.
    let bound = MAX_CELL as i32 + 1;
    let row = client.query_typed_opt(READ, &[(&name, Type::TEXT), (&bound, Type::INT4)]).await?;
    row.map(|row| row.try_get(0)).transpose()
}

async fn replace(
    client: &Client,
    name: &str,
    expected: Option<&[u8]>,
    new: &[u8],
) -> Result<bool, tokio_postgres::Error> {
    let changed = match expected {
        Some(there) => {
            client
                .execute_typed(
                    "UPDATE architect_leases SET content = $3 WHERE key = $1 AND content = $2",
                    &[(&name, Type::TEXT), (&there, Type::BYTEA), (&new, Type::BYTEA)],
                )
                .await?
        }
        None => {
            client
                .execute_typed(
                    "INSERT INTO architect_leases (key, content) VALUES ($1, $2) \
                     ON CONFLICT (key) DO NOTHING",
                    &[(&name, Type::TEXT), (&new, Type::BYTEA)],
                )
                .await?
        }
    };
    Ok(changed == 1)
}

impl Backend for Postgres {
    async fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, Failure> {
        let session = self.session().await?;
        match content(&session.client, &key.path()).await {
            Ok(found) => {
                self.keep(session);
                Ok(found)
            }
            Err(e) => Err(self.mended(&session, e).await),
        }
    }

    async fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, Failure> {
        let session = self.session().await?;
        let name = key.path();
        let swapped = match replace(&session.client, &name, expected, new).await {
            Ok(true) => Ok(Swap::Done),
            Ok(false) => content(&session.client, &name).await.map(Swap::Found),
            Err(e) => Err(e),
        };
        match swapped {
            Ok(Swap::Found(found)) if found.as_deref() == expected => {
                // Somebody has put it there in between, by hand.
                Err(Failure::silent("it changed between two looks"))
            }
            Ok(swapped) => {
                self.keep(session);
                Ok(swapped)
            }
            Err(e) => Err(self.mended(&session, e).await),
        }
    }

    fn place(&self, key: &Key) -> String {
        format!("{} in {}", key.path(), self.shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new(address: &str) -> Result<Postgres, String> {
        Postgres::new(address, None, Duration::from_secs(1))
    }

    #[test]
    fn an_address_is_libpqs_without_a_password() {
        let store = new("postgres://me@a:1,b:2/leases?sslmode=disable&password_file=/x").unwrap();
        assert_eq!(store.shown, "postgres://me@a:1,b:2/leases");
        assert!(store.tls.is_none());
        let store = new("postgres://me@%2Frun%2Fpostgresql/leases").unwrap();
        assert!(store.tls.is_none(), "a Unix socket has no TLS");
        for (bad, says) in [
            ("postgres://me:hush@a/b", "password"),
            ("postgres://a/b?password=hush", "password"),
            ("postgres://a/b?sslmode=prefer", "somebody in between"),
            ("postgres://a/b?sslcert=/x", "go together"),
            ("postgres://a/b?sslrootcert=/nowhere", "/nowhere"),
            ("postgres:///b", "no host"),
            ("postgres://a/b?colour=red", "colour"),
        ] {
            let e = new(bad).err().unwrap();
            assert!(e.contains(says) && !e.contains("hush"), "{bad}: {e}");
        }
    }
}
