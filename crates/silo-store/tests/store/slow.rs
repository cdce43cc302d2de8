//! A store whose answers come at once and whose bytes come slowly.

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, stream::BoxStream};
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, memory::InMemory,
    path::Path,
};
use silo_store::{Limits, Objects};
use std::{fmt, sync::Arc, time::Duration};

/// Sends a KiB at a time, and waits before each.
#[derive(Debug)]
struct Trickle(InMemory, Duration);

impl fmt::Display for Trickle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Trickle")
    }
}

#[async_trait]
impl ObjectStore for Trickle {
    async fn put_opts(&self, path: &Path, payload: PutPayload, o: PutOptions) -> Result<PutResult> {
        self.0.put_opts(path, payload, o).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        o: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.0.put_multipart_opts(path, o).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        let found = self.0.get_opts(path, options).await?;
        let head = GetResult {
            payload: GetResultPayload::Stream(futures::stream::empty().boxed()),
            meta: found.meta.clone(),
            range: found.range.clone(),
            attributes: found.attributes.clone(),
            extensions: found.extensions.clone(),
        };
        let (bytes, pause) = (found.bytes().await?, self.1);
        let parts: Vec<Bytes> = bytes.chunks(1024).map(Bytes::copy_from_slice).collect();
        let parts = futures::stream::iter(parts).then(move |part| async move {
            tokio::time::sleep(pause).await;
            Ok(part)
        });
        Ok(GetResult { payload: GetResultPayload::Stream(parts.boxed()), ..head })
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        self.0.delete_stream(paths)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let pause = self.1;
        let slowly = self.0.list(prefix).then(move |meta| async move {
            tokio::time::sleep(pause).await;
            meta
        });
        slowly.boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.0.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.0.copy_opts(from, to, options).await
    }
}

#[test]
fn what_comes_slowly_and_no_slower_than_the_limits_allow_is_read_and_listed_in_the_end() {
    // Twenty KiB take 600 ms: twice as fast as the slowest that is allowed, and longer than one
    // request without the time for its bytes.
    let limits = Limits {
        request: Duration::from_millis(500),
        slowest: 16 << 10,
        attempts: 3,
        pause: Duration::from_millis(1),
    };
    let store = Arc::new(Trickle(InMemory::new(), Duration::from_millis(30)));
    let objects = Objects::with_backend(store, "folder", "trickle", limits).unwrap();
    let content = Bytes::from(vec![7; 20 << 10]);
    let names: Vec<String> = (0..20).map(|number| format!("things/{number:02}")).collect();
    objects.write(names.iter().map(|name| (name.clone(), content.clone())).collect()).unwrap();
    let read = objects.read(&names[..1], 1 << 20).unwrap();
    assert_eq!(read[0].as_ref(), Some(&content));
    assert_eq!(objects.list("things").unwrap(), names);
}
