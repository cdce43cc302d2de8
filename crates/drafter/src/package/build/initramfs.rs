//! The initramfs: an uncompressed cpio archive ("newc"), the same bytes for the same content.
//!
//! Uncompressed, because unpacking it in a translated guest costs more than reading it.

use super::modules::Module;

/// The guest program, run by the kernel as the first process.
const INIT: &str = "init";

/// Directories that the init mounts things on.
const DIRECTORIES: &[&str] = &["dev", "modules", "newroot", "proc", "sys"];

/// The major and minor number of `/dev/console`, which the kernel opens for the init before it
/// runs, so before anything is mounted on `/dev`.
const CONSOLE: (u32, u32) = (5, 1);

/// Name, type and mode, device number, content.
type Entry<'a> = (String, u32, (u32, u32), &'a [u8]);

/// The initramfs with `guest` as `/init`, and `modules` in this order.
pub(crate) fn make(guest: &[u8], modules: &[Module]) -> Vec<u8> {
    let order: String = modules.iter().map(|module| module.file() + "\n").collect();
    let mut entries: Vec<Entry<'_>> = vec![
        ("dev/console".into(), 0o020_600, CONSOLE, b""),
        (INIT.into(), 0o100_755, (0, 0), guest),
        ("modules/order".into(), 0o100_644, (0, 0), order.as_bytes()),
    ];
    entries.extend(DIRECTORIES.iter().map(|dir| ((*dir).into(), 0o040_755, (0, 0), &b""[..])));
    entries.extend(
        modules
            .iter()
            .map(|m| (format!("modules/{}", m.file()), 0o100_644, (0, 0), m.content.as_slice())),
    );
    // By name: a directory comes before what it holds.
    entries.sort();
    let mut archive = Vec::new();
    for (index, (name, mode, device, content)) in entries.into_iter().enumerate() {
        append(&mut archive, index as u32 + 1, &name, mode, device, content);
    }
    append(&mut archive, 0, "TRAILER!!!", 0, (0, 0), b"");
    archive.resize(archive.len().next_multiple_of(512), 0);
    archive
}

fn append(
    archive: &mut Vec<u8>,
    inode: u32,
    name: &str,
    mode: u32,
    device: (u32, u32),
    content: &[u8],
) {
    let links = if mode & 0o170_000 == 0o040_000 { 2 } else { 1 };
    let fields = [
        inode,
        mode,
        0, // uid
        0, // gid
        links,
        0, // mtime
        content.len() as u32,
        0, // major and minor of the device that holds it
        0,
        device.0,
        device.1,
        name.len() as u32 + 1,
        0, // checksum, unused in this variant
    ];
    archive.extend(b"070701");
    archive.extend(fields.iter().flat_map(|field| format!("{field:08x}").into_bytes()));
    archive.extend(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn modules() -> Vec<Module> {
        let module = |name: &str| Module { name: name.into(), content: name.as_bytes().to_vec() };
        vec![module("virtio"), module("ab")]
    }

    #[test]
    fn the_first_bytes_are_those_of_the_format() {
        let archive = make(b"guest", &modules());
        let begin = b"070701\
            00000001000041ed00000000000000000000000200000000\
            000000000000000000000000000000000000000000000004\
            00000000dev\0\0\0";
        assert_eq!(&archive[..begin.len()], begin);
        assert!(archive.len().is_multiple_of(512));
        let trailer = archive.windows(10).rposition(|w| w == b"TRAILER!!!").unwrap();
        assert!(archive[trailer + 10..].iter().all(|byte| *byte == 0));
    }

    /// Reads an archive as the kernel does: name, mode, content.
    fn read_back(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut entries = Vec::new();
        loop {
            let header = std::str::from_utf8(&archive[..110]).unwrap();
            assert_eq!(&header[..6], "070701");
            let field = |index: usize| {
                u32::from_str_radix(&header[6 + index * 8..14 + index * 8], 16).unwrap()
            };
            let (mode, bytes, name) = (field(1), field(6) as usize, field(11) as usize);
            let begin = (110 + name).next_multiple_of(4);
            let text = String::from_utf8(archive[110..110 + name - 1].to_vec()).unwrap();
            if text == "TRAILER!!!" {
                return entries;
            }
            entries.push((text, mode, archive[begin..begin + bytes].to_vec()));
            archive = &archive[(begin + bytes).next_multiple_of(4)..];
        }
    }

    #[test]
    fn the_archive_reads_back_sorted_with_the_modules_order_kept() {
        let entries = read_back(&make(b"guest", &modules()));
        let names: Vec<&str> = entries.iter().map(|(name, ..)| &**name).collect();
        assert_eq!(
            names,
            [
                "dev",
                "dev/console",
                "init",
                "modules",
                "modules/ab.ko",
                "modules/order",
                "modules/virtio.ko",
                "newroot",
                "proc",
                "sys"
            ]
        );
        let find = |name: &str| entries.iter().find(|entry| entry.0 == name).unwrap();
        assert_eq!(find("modules/order").2, b"virtio.ko\nab.ko\n");
        assert_eq!((find("init").1, &*find("init").2), (0o100_755, &b"guest"[..]));
        assert_eq!(find("modules/ab.ko").2, b"ab");
        assert_eq!(find("dev/console").1, 0o020_600);
    }
}
