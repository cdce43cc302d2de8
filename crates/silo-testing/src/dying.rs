//! A store in memory whose client dies at a chosen request: that request takes effect or not, and
//! all after it fail. What is in the store then is what a killed uploader leaves behind.

use async_trait::async_trait;
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicI64, Ordering},
    },
};

/// How the client dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Death {
    /// The last request did not reach the store.
    Before,
    /// It took effect, but the answer did not come back.
    After,
}

/// See the module. Clones share the content, and each has its own death.
#[derive(Debug)]
pub struct Dying {
    store: Arc<InMemory>,
    /// Requests left to live for.
    left: AtomicI64,
    death: Death,
}

impl fmt::Display for Dying {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Dying({})", self.store)
    }
}

/// What a request meets.
enum Meets {
    Life,
    LastBreath,
    Death,
}

impl Dying {
    /// A client of `store` that dies at request `at`, counted from 0; never if that is `None`.
    #[must_use]
    pub fn new(store: Arc<InMemory>, at: Option<u32>, death: Death) -> Arc<Self> {
        let left = AtomicI64::new(at.map_or(i64::MAX, i64::from));
        Arc::new(Self { store, left, death })
    }

    /// Whether it has died.
    #[must_use]
    pub fn is_dead(&self) -> bool {
        self.left.load(Ordering::Relaxed) < 0
    }

    fn meet(&self) -> Meets {
        match self.left.fetch_sub(1, Ordering::Relaxed) {
            1.. => Meets::Life,
            0 if self.death == Death::After => Meets::LastBreath,
            _ => Meets::Death,
        }
    }

    /// An error that nobody repeats: a dead client does not.
    fn dead() -> Error {
        Error::NotSupported { source: "the client was killed".into() }
    }

    fn end<T>(meets: &Meets, result: Result<T>) -> Result<T> {
        match meets {
            Meets::Life => result,
            Meets::LastBreath | Meets::Death => Err(Self::dead()),
        }
    }
}

#[async_trait]
impl ObjectStore for Dying {
    async fn put_opts(&self, path: &Path, payload: PutPayload, o: PutOptions) -> Result<PutResult> {
        match self.meet() {
            Meets::Death => Err(Self::dead()),
            meets => Self::end(&meets, self.store.put_opts(path, payload, o).await),
        }
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        o: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.store.put_multipart_opts(path, o).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        match self.meet() {
            Meets::Death => Err(Self::dead()),
            meets => Self::end(&meets, self.store.get_opts(path, options).await),
        }
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        match self.meet() {
            Meets::Death => paths.map(|_| Err(Self::dead())).boxed(),
            Meets::LastBreath => self.store.delete_stream(paths).map(|_| Err(Self::dead())).boxed(),
            Meets::Life => self.store.delete_stream(paths),
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.meet() {
            Meets::Life => self.store.list(prefix),
            Meets::LastBreath | Meets::Death => {
                futures::stream::once(async { Err(Self::dead()) }).boxed()
            }
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.store.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.store.copy_opts(from, to, options).await
    }
}
