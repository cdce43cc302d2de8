//! Kernel modules for the initramfs: which ones, and in which order.
//!
//! What a module needs stands in the module itself (`depends=` in its `.modinfo`), which is what
//! `modules.dep` is made from; Debian ships no `modules.dep` and writes it at installation.

use crate::package::{
    compression,
    error::{Attempt, PackageError, Result},
    files,
};
use object::{LittleEndian, Object as _, ObjectSection as _, read::elf::ElfFile64};
use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::Read,
    path::{Path, PathBuf},
};

/// What every machine needs: PCI, network, disk, guest channel, entropy, and its root.
pub(crate) const REQUIRED: &[&str] =
    &["virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "ext4"];

/// Largest module that is unpacked.
const MAX_MODULE: u64 = 64 << 20;

/// A module, uncompressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its name with underscores.
    pub(crate) name: String,
    pub(crate) content: Vec<u8>,
}

impl Module {
    /// Its file name in the initramfs.
    pub(crate) fn file(&self) -> String {
        format!("{}.ko", self.name)
    }
}

/// The modules of one kernel.
pub(crate) struct ModuleSet {
    dir: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl ModuleSet {
    /// Looks at `dir`, as in `/lib/modules/RELEASE`.
    pub(crate) fn scan(dir: &Path) -> Result<Self> {
        let mut files = BTreeMap::new();
        let mut ahead = vec![dir.join("kernel")];
        while let Some(folder) = ahead.pop() {
            let attempt = || format!("reading directory {}", folder.display());
            for entry in fs::read_dir(&folder).attempt(attempt)? {
                let entry = entry.attempt(attempt)?;
                let kind = entry.file_type().attempt(attempt)?;
                if kind.is_dir() {
                    ahead.push(entry.path());
                } else if let Some(name) = module_name(&entry.path()) {
                    files.insert(name, entry.path());
                }
            }
        }
        let list = dir.join("modules.builtin");
        let text = files::read_bounded(&list, 4 << 20)?;
        let builtin = String::from_utf8_lossy(&text)
            .lines()
            .filter_map(|line| module_name(Path::new(line)))
            .collect();
        Ok(Self { dir: dir.to_owned(), files, builtin })
    }

    /// The modules named by `wanted` and all that they need, each after what it needs; built-in
    /// ones are left out. The order depends on nothing but `wanted` and the modules.
    pub(crate) fn ordered(&self, wanted: &[String]) -> Result<Vec<Module>> {
        let mut order = Vec::new();
        let mut done = BTreeSet::new();
        for name in wanted {
            self.visit(
                &name.replace('-', "_"),
                "the package",
                &mut Vec::new(),
                &mut done,
                &mut order,
            )?;
        }
        Ok(order)
    }

    fn visit(
        &self,
        name: &str,
        wanted_by: &str,
        above: &mut Vec<String>,
        done: &mut BTreeSet<String>,
        order: &mut Vec<Module>,
    ) -> Result<()> {
        if self.builtin.contains(name) || done.contains(name) {
            return Ok(());
        }
        let wrong = |problem: String| PackageError::Input {
            input: format!("kernel modules in {}", self.dir.display()),
            problem,
        };
        if above.iter().any(|module| module == name) {
            return Err(wrong(format!("{} need each other in a circle", above.join(", "))));
        }
        let path = self.files.get(name).ok_or_else(|| {
            wrong(format!(
                "there is no module {name}, which {wanted_by} needs; take another kernel"
            ))
        })?;
        let mut content = Vec::new();
        let read = compression::decoder(files::open(path)?)
            .and_then(|decoder| decoder.take(MAX_MODULE).read_to_end(&mut content));
        read.attempt(|| format!("reading {}", path.display()))?;
        let needs = depends(&content)
            .ok_or_else(|| wrong(format!("{} is not a kernel module", path.display())))?;
        above.push(name.to_owned());
        for need in needs {
            self.visit(&need, name, above, done, order)?;
        }
        above.pop();
        done.insert(name.to_owned());
        order.push(Module { name: name.to_owned(), content });
        Ok(())
    }
}

/// `drivers/net/virtio-net.ko.xz` is the module `virtio_net`.
fn module_name(path: &Path) -> Option<String> {
    let file = path.file_name()?.to_str()?;
    let (name, rest) = file.split_once(".ko")?;
    matches!(rest, "" | ".xz" | ".gz" | ".zst").then(|| name.replace('-', "_"))
}

/// What a module needs; None if it is no module.
fn depends(content: &[u8]) -> Option<Vec<String>> {
    let module: ElfFile64<'_, LittleEndian> = ElfFile64::parse(content).ok()?;
    let info = module.section_by_name(".modinfo")?.data().ok()?;
    let list = info.split(|byte| *byte == 0).find_map(|field| field.strip_prefix(b"depends="));
    let list = String::from_utf8_lossy(list.unwrap_or_default()).into_owned();
    Some(list.split(',').filter(|name| !name.is_empty()).map(|n| n.replace('-', "_")).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A minimal ELF with a `.modinfo` section.
    pub(crate) fn module(depends: &str) -> Vec<u8> {
        let info = format!("license=GPL\0depends={depends}\0name=x\0").into_bytes();
        let names = b"\0.modinfo\0.shstrtab\0";
        let (info_at, names_at) = (64, 64 + info.len());
        let table_at = (names_at + names.len()).next_multiple_of(8);
        let mut file = vec![0u8; table_at + 3 * 64];
        file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(16, &1u16.to_le_bytes());
        put(18, &62u16.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(40, &(table_at as u64).to_le_bytes());
        put(52, &64u16.to_le_bytes());
        put(58, &64u16.to_le_bytes());
        put(60, &3u16.to_le_bytes());
        put(62, &2u16.to_le_bytes());
        put(info_at, &info);
        put(names_at, names);
        for (index, name, kind, at, length) in
            [(1, 1u32, 1u32, info_at, info.len()), (2, 10, 3, names_at, names.len())]
        {
            let section = table_at + index * 64;
            put(section, &name.to_le_bytes());
            put(section + 4, &kind.to_le_bytes());
            put(section + 24, &(at as u64).to_le_bytes());
            put(section + 32, &(length as u64).to_le_bytes());
            put(section + 48, &1u64.to_le_bytes());
        }
        file
    }

    /// A modules directory with the given modules, and `ext4` built in.
    pub(crate) fn modules_dir(dir: &Path, modules: &[(&str, &str)]) {
        fs::create_dir_all(dir.join("kernel/drivers/virtio")).unwrap();
        for (name, depends) in modules {
            let path = dir.join("kernel/drivers/virtio").join(format!("{name}.ko"));
            fs::write(path, module(depends)).unwrap();
        }
        fs::write(dir.join("modules.builtin"), "kernel/fs/ext4/ext4.ko\n").unwrap();
    }

    fn names(dir: &Path, wanted: &[&str]) -> Result<Vec<String>> {
        let wanted: Vec<String> = wanted.iter().map(|name| (*name).to_owned()).collect();
        let ordered = ModuleSet::scan(dir)?.ordered(&wanted)?;
        Ok(ordered.into_iter().map(|module| module.name).collect())
    }

    #[test]
    fn every_module_comes_after_what_it_needs_and_only_once() {
        let dir = tempfile::tempdir().unwrap();
        modules_dir(
            dir.path(),
            &[
                ("virtio_pci", "virtio_pci_modern_dev,virtio,virtio_ring"),
                ("virtio_pci_modern_dev", ""),
                ("virtio", ""),
                ("virtio_ring", "virtio"),
                ("virtio-rng", "virtio,virtio_ring"),
                ("unwanted", ""),
            ],
        );
        assert_eq!(
            names(dir.path(), &["virtio-pci", "virtio_rng", "ext4"]).unwrap(),
            ["virtio_pci_modern_dev", "virtio", "virtio_ring", "virtio_pci", "virtio_rng"]
        );
    }

    #[test]
    fn a_missing_or_circular_need_is_named() {
        let dir = tempfile::tempdir().unwrap();
        modules_dir(dir.path(), &[("a", "b"), ("b", "a"), ("c", "gone")]);
        let text = names(dir.path(), &["a"]).unwrap_err().to_string();
        assert!(text.contains("a, b need each other"), "{text}");
        let text = names(dir.path(), &["c"]).unwrap_err().to_string();
        assert!(text.contains("no module gone, which c needs"), "{text}");
        fs::write(dir.path().join("kernel/d.ko"), b"not a module").unwrap();
        let text = names(dir.path(), &["d"]).unwrap_err().to_string();
        assert!(text.contains("d.ko is not a kernel module"), "{text}");
    }

    #[test]
    fn compressed_modules_are_stored_uncompressed() {
        let dir = tempfile::tempdir().unwrap();
        modules_dir(dir.path(), &[]);
        let packed = zstd::encode_all(&*module(""), 1).unwrap();
        fs::write(dir.path().join("kernel/virtio-x.ko.zst"), packed).unwrap();
        let ordered = ModuleSet::scan(dir.path()).unwrap().ordered(&["virtio_x".into()]).unwrap();
        assert_eq!(ordered[0], Module { name: "virtio_x".into(), content: module("") });
        assert_eq!(ordered[0].file(), "virtio_x.ko");
    }
}
