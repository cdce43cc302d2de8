//! The kernel: an ELF image that a microvm can enter, out of what a distribution ships.

use crate::package::{
    compression::{self, Compression},
    error::{PackageError, Result},
};
use object::{
    LittleEndian,
    read::elf::{ElfFile64, FileHeader as _, ProgramHeader as _},
};
use std::{io::Read, path::Path};

/// Largest kernel that is unpacked.
const MAX_KERNEL: u64 = 512 << 20;

/// Offsets and magic of the x86 boot protocol (Documentation/arch/x86/boot.rst), 2.08 and later.
const SETUP_SECTORS: usize = 0x1f1;
const HEADER_MAGIC: usize = 0x202;
const PROTOCOL: usize = 0x206;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
const MIN_PROTOCOL: u16 = 0x0208;

/// The note by which a kernel says where a PVH loader enters it (`XEN_ELFNOTE_PHYS32_ENTRY`).
const PVH_NOTE: (&[u8], u32) = (b"Xen", 18);

/// The ELF kernel within `image`, which is one already, or a bzImage. `path` is for messages.
///
/// # Errors
/// When it is neither, is damaged, or has no entry for a microvm.
pub(crate) fn extract(image: &[u8], path: &Path) -> Result<Vec<u8>> {
    let wrong = |problem: String| PackageError::Input {
        input: format!("kernel {}", path.display()),
        problem,
    };
    let kernel = match image {
        [0x7f, b'E', b'L', b'F', ..] => image.to_vec(),
        _ => unpack(image).map_err(wrong)?,
    };
    let parsed: ElfFile64<'_, LittleEndian> = ElfFile64::parse(&*kernel)
        .map_err(|error| wrong(format!("is not an ELF file: {error}")))?;
    if parsed.elf_header().e_machine(LittleEndian) != object::elf::EM_X86_64 {
        return Err(wrong("is not for x86-64".to_owned()));
    }
    if !has_pvh_entry(&parsed) {
        return Err(wrong(
            "has no PVH entry, by which a microvm starts it; take one built with CONFIG_PVH=y"
                .to_owned(),
        ));
    }
    Ok(kernel)
}

fn unpack(image: &[u8]) -> Result<Vec<u8>, String> {
    if image.get(HEADER_MAGIC..HEADER_MAGIC + 4) != Some(b"HdrS") {
        return Err("is neither an ELF file nor a bzImage".to_owned());
    }
    let truncated = || "is truncated: its payload lies outside the file".to_owned();
    // Everything that is looked at lies below this.
    let header = image.get(..PAYLOAD_LENGTH + 4).ok_or_else(truncated)?;
    let protocol = u16::from_le_bytes([header[PROTOCOL], header[PROTOCOL + 1]]);
    if protocol < MIN_PROTOCOL {
        return Err(format!("has boot protocol {protocol:#x}; 2.08 (Linux 2.6.26) is needed"));
    }
    let sectors = match header[SETUP_SECTORS] {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| header[at + i])) as usize;
    let begin = word(PAYLOAD_OFFSET) + (sectors + 1) * 512;
    let length = word(PAYLOAD_LENGTH);
    let payload = image.get(begin..begin + length).ok_or_else(truncated)?;
    let kind = Compression::of(payload);
    // The build appends the unpacked length, except to gzip, which has it at its end by itself.
    let (data, tail) = payload.split_at(length.checked_sub(4).ok_or_else(truncated)?);
    let declared = u64::from(u32::from_le_bytes([tail[0], tail[1], tail[2], tail[3]]));
    let data = match kind {
        Compression::Gzip => payload,
        Compression::Unknown => {
            return Err(format!(
                "has a payload of an unknown compression (it begins with {:02x?})",
                &payload[..payload.len().min(6)]
            ));
        }
        _ => data,
    };
    if declared > MAX_KERNEL {
        return Err(format!("says that it unpacks to {declared} bytes, more than any kernel has"));
    }
    let mut kernel = Vec::new();
    compression::decoder(data)
        .and_then(|decoder| decoder.take(MAX_KERNEL).read_to_end(&mut kernel))
        .map_err(|error| format!("cannot be unpacked ({kind:?}): {error}"))?;
    if kernel.len() as u64 != declared {
        return Err(format!("unpacks to {} bytes instead of {declared}", kernel.len()));
    }
    Ok(kernel)
}

fn has_pvh_entry(kernel: &ElfFile64<'_, LittleEndian>) -> bool {
    kernel.elf_program_headers().iter().any(|header| {
        let Ok(Some(mut notes)) = header.notes(LittleEndian, kernel.data()) else { return false };
        while let Ok(Some(note)) = notes.next() {
            if (note.name(), note.n_type(LittleEndian).0) == PVH_NOTE {
                return true;
            }
        }
        false
    })
}

/// Checks that a program runs in a root that has no libraries yet: ELF, x86-64, static.
pub(crate) fn check_static(program: &[u8], path: &Path) -> Result<()> {
    let wrong = |problem: &str| PackageError::Input {
        input: format!("guest program {}", path.display()),
        problem: format!(
            "{problem}; build it with CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS=\"-C \
             target-feature=+crt-static\" cargo build -p drafter-guest --profile guest --target \
             x86_64-unknown-linux-gnu"
        ),
    };
    let parsed: ElfFile64<'_, LittleEndian> =
        ElfFile64::parse(program).map_err(|_| wrong("is not a 64-bit ELF program"))?;
    if parsed.elf_header().e_machine(LittleEndian) != object::elf::EM_X86_64 {
        return Err(wrong("is not for x86-64"));
    }
    let interpreter = object::elf::PT_INTERP;
    if parsed.elf_program_headers().iter().any(|h| h.p_type(LittleEndian) == interpreter) {
        return Err(wrong("is dynamically linked, and the initramfs has no libraries"));
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::package::compression::lz4_legacy;

    /// A minimal ELF with one PT_NOTE of the given note.
    pub(crate) fn elf(note: (&[u8], u32)) -> Vec<u8> {
        let mut file = vec![0u8; 64 + 56];
        file[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(16, &2u16.to_le_bytes());
        put(18, &62u16.to_le_bytes());
        put(20, &1u32.to_le_bytes());
        put(32, &64u64.to_le_bytes());
        put(52, &64u16.to_le_bytes());
        put(54, &56u16.to_le_bytes());
        put(56, &1u16.to_le_bytes());
        let name = [note.0, b"\0"].concat();
        let mut content = Vec::new();
        content.extend((name.len() as u32).to_le_bytes());
        content.extend(4u32.to_le_bytes());
        content.extend(note.1.to_le_bytes());
        content.extend(&name);
        content.resize(content.len().next_multiple_of(4), 0);
        content.extend(0x100_0000u32.to_le_bytes());
        put(64, &4u32.to_le_bytes());
        put(64 + 8, &120u64.to_le_bytes());
        put(64 + 32, &(content.len() as u64).to_le_bytes());
        put(64 + 48, &4u64.to_le_bytes());
        file.extend(content);
        file
    }

    /// A kernel that a microvm could enter.
    pub(crate) fn vmlinux() -> Vec<u8> {
        elf(PVH_NOTE)
    }

    fn bzimage(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0u8; 1024];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MAGIC..HEADER_MAGIC + 4].copy_from_slice(b"HdrS");
        image[PROTOCOL..PROTOCOL + 2].copy_from_slice(&0x20fu16.to_le_bytes());
        image[PAYLOAD_OFFSET..PAYLOAD_OFFSET + 4].copy_from_slice(&16u32.to_le_bytes());
        let length = payload.len() as u32;
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length.to_le_bytes());
        image.extend([0x90; 16]);
        image.extend(payload);
        image
    }

    fn with_length(mut packed: Vec<u8>, length: usize) -> Vec<u8> {
        packed.extend((length as u32).to_le_bytes());
        packed
    }

    fn problem(image: &[u8]) -> String {
        extract(image, Path::new("vmlinuz")).unwrap_err().to_string()
    }

    #[test]
    fn the_kernel_comes_out_of_a_bzimage_whatever_its_compression() {
        use std::io::Write;
        let kernel = vmlinux();
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        gzip.write_all(&kernel).unwrap();
        let lz4 = with_length(lz4_legacy(&kernel), kernel.len());
        let zstd = with_length(zstd::encode_all(&*kernel, 1).unwrap(), kernel.len());
        for payload in [gzip.finish().unwrap(), lz4, zstd] {
            assert_eq!(extract(&bzimage(&payload), Path::new("vmlinuz")).unwrap(), kernel);
        }
        assert_eq!(extract(&kernel, Path::new("vmlinux")).unwrap(), kernel);
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_its_reason() {
        let kernel = vmlinux();
        let lz4 = with_length(lz4_legacy(&kernel), kernel.len());
        let image = bzimage(&lz4);
        assert!(problem(b"hello").contains("neither an ELF file nor a bzImage"));
        assert!(problem(&image[..image.len() - 9]).contains("truncated"));
        assert!(problem(&bzimage(b"who knows what this is")).contains("unknown compression"));
        assert!(problem(&bzimage(&with_length(lz4_legacy(&kernel), 7))).contains("instead of 7"));
        assert!(problem(&elf((b"GNU", 1))).contains("PVH"));
        let huge = bzimage(&with_length(lz4_legacy(&kernel), usize::MAX));
        assert!(problem(&huge).contains("more than any kernel"));
        for end in 0..image.len() {
            assert!(extract(&image[..end], Path::new("vmlinuz")).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn a_program_that_needs_libraries_is_no_guest_program() {
        let mut program = vmlinux();
        check_static(&program, Path::new("guest")).unwrap();
        program[64] = 3;
        let text = check_static(&program, Path::new("guest")).unwrap_err().to_string();
        assert!(text.contains("dynamically linked") && text.contains("crt-static"), "{text}");
    }
}
