//! QEMU's command line: a pure function of the machine's shape and of the names under which QEMU
//! finds what it was given. Nothing here touches the host.

use crate::driver::{Accelerator, DiskKind, DriverError, MachineShape, Start};
use serde_json::json;

/// The name of the guest channel's port, as the agent in the guest looks for it.
const GUEST_PORT: &str = "drafter.agent";
const MACHINE_TYPE: &str = "microvm";
const MIB: u64 = 1 << 20;
/// PCI slots: what every machine has comes first, disks after it, so that adding one moves none.
pub(super) const FIRST_DISK_SLOT: usize = 8;
const MOST_DISKS: usize = 16;
const MOST_VCPUS: u32 = 64;
/// Entries of a vhost-user disk's queues; the server takes requests of 126 parts (seg_max).
const QUEUE_SIZE: u32 = 128;
/// Id of the object that can hold what the guest sends.
pub(super) const HOLD: &str = "hold";
/// Id of the object that holds it further, until the instant of which it is can be gone back to.
pub(super) const SEALED: &str = "sealed";

/// What QEMU was given, by the names under which it finds it.
#[derive(Clone, Debug)]
pub(super) struct Given {
    pub(super) accelerator: Accelerator,
    /// Bytes for translated code.
    pub(super) translation_cache: u64,
    /// Path of the memory, the kernel and the initramfs.
    pub(super) memory: String,
    pub(super) kernel: String,
    pub(super) initramfs: String,
    /// Numbers of descriptors: the tap, three listening sockets, the console's log.
    pub(super) tap: Option<i32>,
    pub(super) qmp: i32,
    pub(super) guest: i32,
    pub(super) console: i32,
    pub(super) console_log: i32,
    /// A path per disk.
    pub(super) disks: Vec<String>,
}

/// Refuses a shape that this driver cannot build, with what would be right.
pub(super) fn check(
    shape: &MachineShape,
    disk_sockets: usize,
    has_tap: bool,
) -> Result<(), DriverError> {
    let name_fits = (1..=64).contains(&shape.name.len())
        && shape.name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
        && !shape.name.starts_with('.');
    let disk_name_fits = |name: &String| silo::device::DeviceName::new(name).is_some();
    let problem = if !name_fits {
        "its name must be 1 to 64 letters, digits, \"-\", \"_\" or \".\", and not start with \".\""
            .to_owned()
    } else if shape.machine_type != MACHINE_TYPE {
        format!(
            "machine type \"{}\" is unknown here; this driver builds {MACHINE_TYPE}",
            shape.machine_type
        )
    } else if !(1..=MOST_VCPUS).contains(&shape.vcpus) {
        format!("{} virtual processors; it must have 1 to {MOST_VCPUS}", shape.vcpus)
    } else if shape.memory_bytes < 64 * MIB || !shape.memory_bytes.is_multiple_of(MIB) {
        format!("{} bytes of memory; it must be 64 MiB or more, in whole MiB", shape.memory_bytes)
    } else if shape.tsc_khz == 0 {
        "its clock rate is 0; take tsc_khz from the facts of the host where it boots".into()
    } else if shape.disks.len() > MOST_DISKS || !shape.disks.iter().all(disk_name_fits) {
        format!("it may have {MOST_DISKS} disks, named by letters, digits and \"-\"")
    } else if shape.disks.len() != disk_sockets {
        format!("it has {} disks and {disk_sockets} sockets were given for them", shape.disks.len())
    } else if shape.network.is_some() != has_tap {
        "a network needs a tap, and a tap needs a network".into()
    } else {
        return Ok(());
    };
    Err(DriverError::Invalid { machine: shape.name.clone(), detail: problem })
}

/// The kernel's command line: what the platform needs, then what the package wants.
fn kernel_arguments(shape: &MachineShape, accelerator: Accelerator) -> String {
    // A reset ends the machine (-no-reboot), so a panic does too.
    let mut line = "console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on".to_owned();
    if accelerator == Accelerator::Tcg {
        // Without the rate the kernel calibrates against a timer and hangs when the host is busy;
        // speculation attacks do not reach through a translator.
        line += " tsc=reliable no_timer_check mitigations=off";
        line += &format!(" tsc_early_khz={}", shape.tsc_khz);
    }
    if !shape.command_line.is_empty() {
        line.push(' ');
        line += &shape.command_line;
    }
    line
}

/// The arguments after the program's name. The same shape gives the same devices in the same
/// places on every host: saved state depends on it.
pub(super) fn arguments(shape: &MachineShape, given: &Given, start: Start) -> Vec<String> {
    let mut line = Line::default();
    line.flag("-S"); // stands still until `cont`
    line.flag("-nodefaults");
    line.flag("-no-user-config");
    line.flag("-no-reboot");
    line.option("-name", format!("guest={},debug-threads=on", shape.name));
    line.option("-display", "none");
    line.option(
        "-sandbox",
        "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
    );
    match given.accelerator {
        Accelerator::Tcg => {
            let cache = given.translation_cache.div_ceil(MIB);
            line.option("-accel", format!("tcg,thread=multi,tb-size={cache}"));
            line.option("-cpu", "max"); // what the translator offers, whatever the host
        }
        Accelerator::Kvm => {
            line.option("-accel", "kvm");
            line.option("-cpu", "host,migratable=on");
        }
    }
    line.option("-smp", shape.vcpus.to_string());
    let memory = shape.memory_bytes / MIB;
    line.option("-m", format!("{memory}M"));
    line.option(
        "-object",
        format!("memory-backend-file,id=ram0,size={memory}M,mem-path={},share=on", given.memory),
    );
    // Without the description of itself the state is a sixth shorter; only debuggers read it.
    line.option(
        "-M",
        "microvm,x-option-roms=off,isa-serial=on,rtc=on,pcie=on,memory-backend=ram0,\
         suppress-vmdesc=on",
    );
    line.option("-kernel", &given.kernel);
    line.option("-initrd", &given.initramfs);
    line.option("-append", kernel_arguments(shape, given.accelerator));

    line.socket("qmp", given.qmp, "");
    line.option("-mon", "chardev=qmp,mode=control");
    line.option("-add-fd", format!("fd={},set=1,opaque=console-log", given.console_log));
    line.socket("console", given.console, ",logfile=/dev/fdset/1,logappend=on");
    line.option("-serial", "chardev:console");
    line.socket("guest", given.guest, "");
    // Two ports: number 0 is reserved for consoles. Every further one is two queues of state.
    line.option("-device", "virtio-serial-pci,id=serial0,disable-legacy=on,max_ports=2,addr=2");
    line.option(
        "-device",
        format!("virtserialport,bus=serial0.0,nr=1,chardev=guest,name={GUEST_PORT}"),
    );
    if let (Some(network), Some(tap)) = (&shape.network, given.tap) {
        let mac = network.mac.map(|byte| format!("{byte:02x}")).join(":");
        line.option("-netdev", format!("tap,id=n0,fd={tap},vhost=off"));
        line.option(
            "-device",
            format!(
                "virtio-net-pci,id=net0,netdev=n0,disable-legacy=on,mac={mac},host_mtu={},\
                 romfile=,addr=1",
                network.mtu
            ),
        );
        // An interval (µs) longer than anybody waits: what is held goes when we say. What the guest
        // sends passes the filters in the reverse order of their making.
        for id in [SEALED, HOLD] {
            line.option(
                "-object",
                format!("filter-buffer,id={id},netdev=n0,queue=rx,interval=4000000000,status=off"),
            );
        }
    }
    for (index, (name, path)) in shape.disks.iter().zip(&given.disks).enumerate() {
        match shape.disk_kind {
            DiskKind::Nbd => line.nbd_disk(index, name, path),
            DiskKind::VhostUserBlk => line.vhost_user_disk(index, path, shape.vcpus),
        }
    }
    if start == Start::Incoming {
        line.option("-incoming", "defer");
    }
    line.0
}

/// The disk's place in the shape, from the id of its device or node in an event.
pub(super) fn disk_index(id: &str) -> Option<usize> {
    let digits = id
        .rsplit('/')
        .find_map(|part| part.strip_prefix("disk").or_else(|| part.strip_prefix("blk")))?;
    digits.parse().ok()
}

#[derive(Default)]
struct Line(Vec<String>);

impl Line {
    fn flag(&mut self, name: &str) {
        self.0.push(name.to_owned());
    }

    fn option(&mut self, name: &str, value: impl Into<String>) {
        self.0.push(name.to_owned());
        self.0.push(value.into());
    }

    fn nbd_disk(&mut self, index: usize, name: &str, path: &str) {
        // An error never reaches the guest: the machine stops and the request is tried again.
        let node = json!({
            "driver": "nbd",
            "node-name": format!("disk{index}"),
            "server": { "type": "unix", "path": path },
            "reconnect-delay": 86_400,
            "discard": "unmap",
        });
        self.option("-blockdev", node.to_string());
        // A serial number holds 20 bytes (virtio 1.2, 5.2.6).
        let serial = &name[..name.len().min(20)];
        self.option(
            "-device",
            format!(
                "virtio-blk-pci,id=blk{index},drive=disk{index},serial={serial},disable-legacy=on,\
                 werror=stop,rerror=stop,addr={:#x}",
                FIRST_DISK_SLOT + index
            ),
        );
    }

    /// Serial number and size are the server's to say. It is there before the machine starts; when
    /// it goes away QEMU looks for it every second. What fails there is not QEMU's business: the
    /// server holds such a request until it can be done.
    fn vhost_user_disk(&mut self, index: usize, path: &str, queues: u32) {
        // A comma ends a value unless there are two.
        let path = path.replace(',', ",,");
        self.option("-chardev", format!("socket,id=vu{index},path={path},reconnect=1"));
        self.option(
            "-device",
            format!(
                "vhost-user-blk-pci,id=blk{index},chardev=vu{index},num-queues={queues},\
                 queue-size={QUEUE_SIZE},disable-legacy=on,addr={:#x}",
                FIRST_DISK_SLOT + index
            ),
        );
    }

    fn socket(&mut self, id: &str, descriptor: i32, more: &str) {
        self.option("-chardev", format!("socket,id={id},fd={descriptor},server=on,wait=off{more}"));
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::driver::NetworkShape;
    use std::net::Ipv4Addr;

    /// A small machine with everything.
    pub(in super::super) fn shape() -> MachineShape {
        MachineShape {
            name: "redis-1".into(),
            machine_type: "microvm".into(),
            vcpus: 2,
            memory_bytes: 256 * MIB,
            command_line: "drafter.host=redis-1".into(),
            network: Some(NetworkShape {
                address: Ipv4Addr::new(10, 0, 0, 2),
                address_v6: None,
                mac: [2, 0, 0, 0, 0, 0xfe],
                mtu: 1400,
            }),
            disks: vec!["root".into(), "data-1".into()],
            disk_kind: DiskKind::Nbd,
            tsc_khz: 2_700_000,
        }
    }

    fn given(accelerator: Accelerator) -> Given {
        Given {
            accelerator,
            translation_cache: 256 * MIB,
            memory: "/proc/self/fd/10".into(),
            kernel: "/proc/self/fd/11".into(),
            initramfs: "/proc/self/fd/12".into(),
            tap: Some(13),
            qmp: 14,
            guest: 15,
            console: 16,
            console_log: 17,
            disks: vec!["/proc/self/fd/18/a,b.sock".into(), "/proc/self/fd/19/d.sock".into()],
        }
    }

    #[test]
    fn a_machine_with_everything_has_this_command_line() {
        let line = arguments(&shape(), &given(Accelerator::Tcg), Start::Incoming).join(" ");
        let expected = "\
            -S -nodefaults -no-user-config -no-reboot -name guest=redis-1,debug-threads=on \
            -display none \
            -sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny \
            -accel tcg,thread=multi,tb-size=256 -cpu max -smp 2 -m 256M \
            -object memory-backend-file,id=ram0,size=256M,mem-path=/proc/self/fd/10,share=on \
            -M microvm,x-option-roms=off,isa-serial=on,rtc=on,pcie=on,memory-backend=ram0,suppress-vmdesc=on \
            -kernel /proc/self/fd/11 -initrd /proc/self/fd/12 \
            -append console=ttyS0 quiet reboot=t panic=-1 random.trust_cpu=on tsc=reliable \
            no_timer_check mitigations=off tsc_early_khz=2700000 drafter.host=redis-1 \
            -chardev socket,id=qmp,fd=14,server=on,wait=off -mon chardev=qmp,mode=control \
            -add-fd fd=17,set=1,opaque=console-log \
            -chardev socket,id=console,fd=16,server=on,wait=off,logfile=/dev/fdset/1,logappend=on \
            -serial chardev:console -chardev socket,id=guest,fd=15,server=on,wait=off \
            -device virtio-serial-pci,id=serial0,disable-legacy=on,max_ports=2,addr=2 \
            -device virtserialport,bus=serial0.0,nr=1,chardev=guest,name=drafter.agent \
            -netdev tap,id=n0,fd=13,vhost=off \
            -device virtio-net-pci,id=net0,netdev=n0,disable-legacy=on,mac=02:00:00:00:00:fe,host_mtu=1400,romfile=,addr=1 \
            -object filter-buffer,id=sealed,netdev=n0,queue=rx,interval=4000000000,status=off \
            -object filter-buffer,id=hold,netdev=n0,queue=rx,interval=4000000000,status=off \
            -blockdev {\"discard\":\"unmap\",\"driver\":\"nbd\",\"node-name\":\"disk0\",\"reconnect-delay\":86400,\"server\":{\"path\":\"/proc/self/fd/18/a,b.sock\",\"type\":\"unix\"}} \
            -device virtio-blk-pci,id=blk0,drive=disk0,serial=root,disable-legacy=on,werror=stop,rerror=stop,addr=0x8 \
            -blockdev {\"discard\":\"unmap\",\"driver\":\"nbd\",\"node-name\":\"disk1\",\"reconnect-delay\":86400,\"server\":{\"path\":\"/proc/self/fd/19/d.sock\",\"type\":\"unix\"}} \
            -device virtio-blk-pci,id=blk1,drive=disk1,serial=data-1,disable-legacy=on,werror=stop,rerror=stop,addr=0x9 \
            -incoming defer";
        assert_eq!(line, expected);
    }

    #[test]
    fn a_vhost_user_disk_has_a_queue_for_each_processor_and_lies_where_any_disk_would() {
        let shape = MachineShape { disk_kind: DiskKind::VhostUserBlk, ..shape() };
        let line = arguments(&shape, &given(Accelerator::Tcg), Start::Incoming).join(" ");
        let expected = "\
            -chardev socket,id=vu0,path=/proc/self/fd/18/a,,b.sock,reconnect=1 \
            -device vhost-user-blk-pci,id=blk0,chardev=vu0,num-queues=2,queue-size=128,disable-legacy=on,addr=0x8 \
            -chardev socket,id=vu1,path=/proc/self/fd/19/d.sock,reconnect=1 \
            -device vhost-user-blk-pci,id=blk1,chardev=vu1,num-queues=2,queue-size=128,disable-legacy=on,addr=0x9 \
            -incoming defer";
        assert!(line.ends_with(expected), "{line}");
        assert!(!line.contains("-blockdev"), "{line}");
    }

    #[test]
    fn a_shape_from_before_there_were_two_kinds_of_disks_means_nbd() {
        let mut old = serde_json::to_value(shape()).unwrap();
        assert_eq!(old["disk_kind"], "nbd");
        old.as_object_mut().unwrap().remove("disk_kind");
        assert_eq!(serde_json::from_value::<MachineShape>(old).unwrap(), shape());
    }

    #[test]
    fn under_kvm_the_guest_keeps_its_own_clock_and_mitigations() {
        let line = arguments(&shape(), &given(Accelerator::Kvm), Start::Boot).join(" ");
        assert!(line.contains("-accel kvm -cpu host,migratable=on"));
        assert!(!line.contains("tsc_early_khz") && !line.contains("mitigations"));
        assert!(!line.contains("-incoming"));
    }

    #[test]
    fn a_shape_that_cannot_be_built_is_refused_with_a_sentence() {
        check(&shape(), 2, true).unwrap();
        type Spoil = fn(&mut MachineShape);
        let cases: [(&str, Spoil); 8] = [
            ("name", |s| s.name = "a,b".into()),
            ("name", |s| s.name = "../x".into()),
            ("microvm", |s| s.machine_type = "q35".into()),
            ("processors", |s| s.vcpus = 0),
            ("whole MiB", |s| s.memory_bytes += 1),
            ("clock rate", |s| s.tsc_khz = 0),
            ("disks", |s| s.disks[0] = "a,b".into()),
            ("tap", |s| s.network = None),
        ];
        for (words, spoil) in cases {
            let mut spoiled = shape();
            spoil(&mut spoiled);
            let error = check(&spoiled, 2, true).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        }
        assert!(check(&shape(), 1, true).unwrap_err().to_string().contains("1 sockets"));
    }

    #[test]
    fn a_disk_is_known_by_the_names_that_qemu_uses_for_it() {
        assert_eq!(disk_index("/machine/peripheral/blk1/virtio-backend"), Some(1));
        assert_eq!(disk_index("disk0"), Some(0));
        assert_eq!(disk_index("net0"), None);
    }
}
