//! Leases in an SQLite file: for hosts that share a disk, or for one host that keeps its state in
//! SQLite anyway. Not on NFS, whose locks SQLite does not trust.
//!
//! One table of cells. A write is one transaction that begins by locking the file (`BEGIN IMMEDIATE`)
//! and ends when the disk has it (`synchronous = EXTRA`, rollback journal), so that a crash leaves the
//! old record or the new one. Every call has a connection of its own, which waits at most the limit
//! for others.

use super::{Cells, Key, MAX_CELL, StoreError, Swap};
use rusqlite::{
    Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior, params,
};
use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Connections that are kept for the next call.
const KEPT: usize = 4;

/// Leases in an SQLite file.
pub struct SqliteStore {
    path: PathBuf,
    limit: Duration,
    idle: Mutex<Vec<Connection>>,
}

impl SqliteStore {
    /// Opens the file, or makes it (mode 0600); a call waits at most `limit` for other processes, twice
    /// (once for the lock, once for readers to let it commit).
    ///
    /// # Errors
    /// The file cannot be made, or is no SQLite database.
    pub fn open(path: &Path, limit: Duration) -> Result<Self, String> {
        let told = |e: &dyn std::fmt::Display| format!("open {}: {e}", path.display());
        // SQLite would make it readable for all.
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| told(&e))?;
        let idle = Mutex::new(Vec::new());
        let store = Self { path: path.to_owned(), limit, idle };
        let connection = store.connect().map_err(|e| told(&e))?;
        connection
            .execute_batch(
                "CREATE TABLE IF NOT EXISTS cells (key TEXT PRIMARY KEY, content BLOB NOT NULL) \
                 STRICT, WITHOUT ROWID",
            )
            .map_err(|e| told(&e))?;
        store.keep(connection);
        Ok(store)
    }

    fn connect(&self) -> rusqlite::Result<Connection> {
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let connection = Connection::open_with_flags(&self.path, flags)?;
        connection.busy_timeout(self.limit)?;
        // Whatever mode somebody has left the file in: one that syncs each commit.
        connection.query_row("PRAGMA journal_mode = DELETE", [], |_| Ok(()))?;
        connection.execute_batch("PRAGMA synchronous = EXTRA")?;
        Ok(connection)
    }

    fn keep(&self, connection: Connection) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < KEPT {
            idle.push(connection);
        }
    }

    fn with<T>(
        &self,
        key: &Key,
        what: &str,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T>,
    ) -> Result<T, StoreError> {
        let kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let done = match kept {
            Some(connection) => Ok(connection),
            None => self.connect(),
        }
        .and_then(|mut connection| {
            let result = work(&mut connection)?;
            // One that failed is closed.
            self.keep(connection);
            Ok(result)
        });
        done.map_err(|e| StoreError::Unavailable {
            of: key.clone(),
            operation: format!("{what} {}", self.place(key)),
            detail: e.to_string(),
        })
    }
}

fn content(connection: &Connection, key: &str) -> rusqlite::Result<Option<Vec<u8>>> {
    // What is too long is cut where it shows that it is.
    connection
        .query_row(
            "SELECT substr(content, 1, ?2) FROM cells WHERE key = ?1",
            params![key, MAX_CELL as i64 + 1],
            |row| row.get(0),
        )
        .optional()
}

fn replace(
    transaction: &Transaction<'_>,
    key: &str,
    expected: Option<&[u8]>,
    new: &[u8],
) -> rusqlite::Result<Swap> {
    let there = content(transaction, key)?;
    if there.as_deref() != expected {
        return Ok(Swap::Found(there));
    }
    transaction.execute(
        "INSERT INTO cells (key, content) VALUES (?1, ?2) \
         ON CONFLICT (key) DO UPDATE SET content = excluded.content",
        params![key, new],
    )?;
    Ok(Swap::Done)
}

impl Cells for SqliteStore {
    fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, StoreError> {
        self.with(key, "read", |connection| content(connection, &key.path()))
    }

    fn swap(&self, key: &Key, expected: Option<&[u8]>, new: &[u8]) -> Result<Swap, StoreError> {
        self.with(key, "write", |connection| {
            let transaction =
                connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let swapped = replace(&transaction, &key.path(), expected, new)?;
            transaction.commit()?;
            Ok(swapped)
        })
    }

    fn place(&self, key: &Key) -> String {
        format!("{} in {}", key.path(), self.path.display())
    }
}
