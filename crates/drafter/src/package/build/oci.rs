//! An OCI image layout on disk as the root of a machine (image-spec 1.0: `oci-layout`,
//! `index.json`, `blobs/ALGORITHM/DIGEST`), as `skopeo copy … oci:DIR` or `buildah push` write it.
//!
//! Every blob is checked against the digest that names it, and every layer, unpacked, against the
//! image's own list. Digests name files only as 64 hex digits, so no layout names a path.

use super::{
    debian::hex,
    layer::{Rules, Store, apply},
    tree::{Merge, Tree},
};
use crate::package::{
    compression,
    error::{Attempt, PackageError, Result},
    files,
    manifest::Port,
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::{
    cell::RefCell,
    collections::BTreeMap,
    io::{self, Read},
    path::{Path, PathBuf},
    rc::Rc,
};

/// Largest JSON document in a layout.
const MAX_DOCUMENT: u64 = 4 << 20;

/// An index may name another one; no tool nests deeper than this.
const MAX_NESTING: usize = 4;

/// Padding that may follow the last entry of a layer; more than this is not read, and the digest
/// is wrong then.
const MAX_TRAILER: u64 = 64 << 20;

const REF_NAME: &str = "org.opencontainers.image.ref.name";

#[derive(Deserialize)]
struct Layout {
    #[serde(rename = "imageLayoutVersion")]
    version: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Descriptor {
    #[serde(rename = "mediaType", default)]
    media_type: String,
    digest: String,
    size: u64,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
    platform: Option<Platform>,
}

#[derive(Clone, Debug, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
}

/// An index or an image manifest: they are told apart by what they have.
#[derive(Deserialize)]
struct Document {
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
struct ImageConfig {
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    os: String,
    #[serde(default)]
    config: Option<RunConfig>,
    rootfs: RootFs,
}

#[derive(Deserialize)]
struct RootFs {
    diff_ids: Vec<String>,
}

/// What an image says about running it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub(crate) struct RunConfig {
    pub(crate) user: Option<String>,
    exposed_ports: Option<BTreeMap<String, serde_json::Value>>,
    pub(crate) env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    pub(crate) working_dir: Option<String>,
}

impl RunConfig {
    /// Entry point and its arguments.
    pub(crate) fn argv(&self) -> Vec<String> {
        let parts = [&self.entrypoint, &self.cmd].into_iter().flatten().flatten();
        parts.cloned().collect()
    }

    /// The variables that are of the form `NAME=VALUE`.
    pub(crate) fn variables(&self) -> BTreeMap<String, String> {
        let all = self.env.iter().flatten().filter_map(|line| line.split_once('='));
        all.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    /// The ports it exposes; ranges and unknown protocols are left out.
    pub(crate) fn ports(&self) -> Vec<Port> {
        self.exposed_ports.iter().flatten().filter_map(|(port, _)| port.parse().ok()).collect()
    }
}

/// An image in a layout, chosen and read, its layers not yet.
pub(crate) struct Image {
    dir: PathBuf,
    /// Digest of its manifest.
    pub(crate) digest: String,
    pub(crate) run: RunConfig,
    layers: Vec<(Descriptor, String)>,
}

impl Image {
    /// Chooses the image `reference` (needed only where there are several) for x86-64 Linux.
    pub(crate) fn open(dir: &Path, reference: Option<&str>) -> Result<Self> {
        let wrong = |problem: String| PackageError::Input {
            input: format!("OCI image layout {}", dir.display()),
            problem,
        };
        let read = |name: &str| {
            files::read_bounded(&dir.join(name), MAX_DOCUMENT).map_err(|error| {
                wrong(format!(
                    "is no OCI image layout ({error}); make one with `skopeo copy IMAGE oci:DIR`"
                ))
            })
        };
        let layout: Layout = serde_json::from_slice(&read("oci-layout")?)
            .map_err(|error| wrong(format!("has an oci-layout that cannot be read: {error}")))?;
        if !layout.version.starts_with("1.") {
            return Err(wrong(format!("has version {}, only 1.x is known", layout.version)));
        }
        let index: Document = serde_json::from_slice(&read("index.json")?)
            .map_err(|error| wrong(format!("has an index.json that cannot be read: {error}")))?;
        let mut document = index;
        let mut digest = String::new();
        for level in 0.. {
            let Some(manifests) = document.manifests.take() else { break };
            if level > MAX_NESTING {
                return Err(wrong("has indexes that name each other without end".to_owned()));
            }
            let chosen = choose(&manifests, reference.filter(|_| level == 0)).map_err(wrong)?;
            document = read_document(dir, &chosen)?;
            digest = chosen.digest;
        }
        let (Some(config), Some(layers)) = (document.config, document.layers) else {
            return Err(wrong(format!("names {digest}, which is not an image")));
        };
        let config: ImageConfig = read_document(dir, &config)?;
        if (&*config.os, &*config.architecture) != ("linux", "amd64") {
            let found = format!("{}/{}", config.os, config.architecture);
            return Err(wrong(format!("holds an image for {found}; linux/amd64 is needed")));
        }
        if config.rootfs.diff_ids.len() != layers.len() {
            let counts = (layers.len(), config.rootfs.diff_ids.len());
            return Err(wrong(format!("has {} layers but {} layer digests", counts.0, counts.1)));
        }
        let layers = layers.into_iter().zip(config.rootfs.diff_ids).collect();
        Ok(Self { dir: dir.to_owned(), digest, run: config.config.unwrap_or_default(), layers })
    }

    /// Number of layers.
    pub(crate) fn layers(&self) -> usize {
        self.layers.len()
    }

    /// Applies all layers, lowest first. `progress` gets each layer's number before it is read.
    pub(crate) fn apply(
        &self,
        tree: &mut Tree,
        store: &mut Store,
        progress: &mut dyn FnMut(usize),
    ) -> Result<()> {
        for (index, (layer, diff_id)) in self.layers.iter().enumerate() {
            progress(index);
            if !layer.media_type.contains(".layer.") && !layer.media_type.contains(".rootfs.diff.")
            {
                return Err(PackageError::Input {
                    input: format!("layer {} of {}", layer.digest, self.dir.display()),
                    problem: format!("is of the unknown kind {:?}", layer.media_type),
                });
            }
            let path = blob(&self.dir, &layer.digest)?;
            let attempt = || format!("reading layer {}", path.display());
            check_length(&path, layer)?;
            let packed = Hashing::new(files::open(&path)?);
            let packed_hash = packed.hasher();
            let mut plain = Hashing::new(compression::decoder(packed).attempt(attempt)?);
            let rules =
                Rules { name: &path, merge: Merge::Replace, whiteouts: true, drop: &|_| false };
            let applied = apply(tree, &mut plain, &rules, store);
            // Whatever was wrong with the content: a wrong digest is the better explanation.
            let drained = io::copy(&mut (&mut plain).take(MAX_TRAILER), &mut io::sink());
            let plain_hash = plain.hasher();
            drop(plain);
            if drained.is_ok() {
                expect_digest(&path, &layer.digest, &packed_hash)?;
                expect_digest(&path, diff_id, &plain_hash)?;
            }
            applied?;
            drained.map_err(|error| PackageError::Damaged {
                archive: path.clone(),
                detail: error.to_string(),
            })?;
        }
        Ok(())
    }
}

/// The one image of an index that is meant.
fn choose(manifests: &[Descriptor], reference: Option<&str>) -> Result<Descriptor, String> {
    let fits = |one: &&Descriptor| {
        one.platform.as_ref().is_none_or(|p| (&*p.os, &*p.architecture) == ("linux", "amd64"))
    };
    let name = |one: &Descriptor| one.annotations.get(REF_NAME).cloned();
    let named = |one: &&Descriptor| {
        reference.is_none_or(|wanted| name(one).as_deref() == Some(wanted) || one.digest == wanted)
    };
    let found: Vec<&Descriptor> = manifests.iter().filter(fits).filter(named).collect();
    match (&*found, reference) {
        ([one], _) => Ok((*one).clone()),
        ([], Some(wanted)) => Err(format!("has no image {wanted:?} for linux/amd64")),
        ([], None) => Err("has no image for linux/amd64".to_owned()),
        (several, _) => {
            let names: Vec<String> =
                several.iter().map(|one| name(one).unwrap_or_else(|| one.digest.clone())).collect();
            Err(format!("has several images, name one of them: {}", names.join(", ")))
        }
    }
}

fn read_document<T: serde::de::DeserializeOwned>(dir: &Path, what: &Descriptor) -> Result<T> {
    let path = blob(dir, &what.digest)?;
    check_length(&path, what)?;
    let text = files::read_bounded(&path, MAX_DOCUMENT)?;
    let mut hasher = Sha256::new();
    hasher.update(&text);
    expect_digest(&path, &what.digest, &Rc::new(RefCell::new(hasher)))?;
    serde_json::from_slice(&text).map_err(|error| PackageError::Input {
        input: path.display().to_string(),
        problem: format!("cannot be read: {error}"),
    })
}

fn blob(dir: &Path, digest: &str) -> Result<PathBuf> {
    let hash = digest.strip_prefix("sha256:").filter(|hash| {
        hash.len() == 64 && hash.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    });
    let hash = hash.ok_or_else(|| PackageError::Input {
        input: format!("OCI image layout {}", dir.display()),
        problem: format!("names a blob by {digest:?}; only sha256 with 64 hex digits is known"),
    })?;
    Ok(dir.join("blobs/sha256").join(hash))
}

fn check_length(path: &Path, what: &Descriptor) -> Result<()> {
    let facts =
        std::fs::metadata(path).attempt(|| format!("looking at blob {}", path.display()))?;
    if facts.len() != what.size {
        return Err(PackageError::Damaged {
            archive: path.to_owned(),
            detail: format!("it has {} bytes instead of {}", facts.len(), what.size),
        });
    }
    Ok(())
}

type SharedHasher = Rc<RefCell<Sha256>>;

fn expect_digest(path: &Path, expected: &str, hasher: &SharedHasher) -> Result<()> {
    let found = hex(&hasher.borrow().clone().finalize());
    if expected.strip_prefix("sha256:") == Some(&found) {
        return Ok(());
    }
    Err(PackageError::Digest {
        input: path.display().to_string(),
        expected: expected.to_owned(),
        found,
    })
}

/// Hashes what passes; the hasher can be looked at after the reader went into a decoder.
struct Hashing<R> {
    reader: R,
    hasher: SharedHasher,
}

impl<R> Hashing<R> {
    fn new(reader: R) -> Self {
        Self { reader, hasher: Rc::default() }
    }

    fn hasher(&self) -> SharedHasher {
        Rc::clone(&self.hasher)
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buffer)?;
        self.hasher.borrow_mut().update(&buffer[..count]);
        Ok(count)
    }
}
