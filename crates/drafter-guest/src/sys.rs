//! System calls and ioctls that have no safe wrapper in the crates we use.
//!
//! Everything here is a thin call with checked arguments; numbers come from the kernel headers
//! named beside them. All `unsafe` of the crate is in this file.

use nix::{
    sys::socket::{AddressFamily, SockFlag, SockType, socket},
    unistd::Pid,
};
use std::{
    ffi::CStr,
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Command, ExitStatus},
};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Loads a kernel module from an open file. A module that is loaded already is a success.
pub(crate) fn load_module(file: &File) -> io::Result<()> {
    let parameters: &CStr = c"";
    // SAFETY: the descriptor is open for the call's duration and the string ends with NUL.
    let result = check(unsafe {
        libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), parameters.as_ptr(), 0)
    });
    match result {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
        other => other.map(drop),
    }
}

/// A descriptor that becomes readable when process `pid` (a child not yet waited for) ends.
pub(crate) fn pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: plain numbers; the kernel returns a new descriptor that nobody else owns.
    unsafe {
        let fd = check(libc::syscall(libc::SYS_pidfd_open, pid, 0))?;
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}

/// Collects one process that has ended, if there is one: a child, or in process 1 any orphan.
/// Never waits.
pub(crate) fn reap() -> Option<(Pid, ExitStatus)> {
    let mut status = 0;
    // SAFETY: waitpid writes one integer, which outlives the call.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    (pid > 0).then(|| (Pid::from_raw(pid), ExitStatus::from_raw(status)))
}

/// Asks for SIGIO to this process when `file` changes, also when its other end comes or goes.
pub(crate) fn signal_changes(file: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: fcntl on an open descriptor with integer arguments.
    unsafe {
        let fd = file.as_raw_fd();
        check(libc::fcntl(fd, libc::F_SETOWN, libc::getpid()).into())?;
        let flags = check(libc::fcntl(fd, libc::F_GETFL).into())? as i32;
        check(libc::fcntl(fd, libc::F_SETFL, flags | libc::O_ASYNC).into())?;
    }
    Ok(())
}

/// Who a child runs as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// Prepares a child of a process that blocks signals: leads its own process group, has no signal
/// blocked, and runs as `ids` if given.
pub(crate) fn prepare_child(command: &mut Command, ids: Option<Ids>) {
    command.process_group(0);
    let child = move || {
        // SAFETY: between fork and exec only async-signal-safe calls are allowed: these are plain
        // system calls (raw, so that no libc lock is taken) on memory prepared before the fork.
        unsafe {
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            check(
                libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut()).into(),
            )?;
            if let Some(ids) = &ids {
                check(libc::syscall(libc::SYS_setgroups, ids.groups.len(), ids.groups.as_ptr()))?;
                check(libc::syscall(libc::SYS_setgid, ids.gid))?;
                check(libc::syscall(libc::SYS_setuid, ids.uid))?;
            }
        }
        Ok(())
    };
    // SAFETY: the closure does only what is allowed between fork and exec, see above; it neither
    // allocates nor takes a lock.
    unsafe {
        command.pre_exec(child);
    }
}

/// `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of `<linux/random.h>`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

/// Mixes `bytes` into the kernel's random numbers (`random` is one of their devices), credits them, and
/// makes the generator use them now. Needs root.
pub(crate) fn add_entropy(random: &File, bytes: &[u8]) -> io::Result<()> {
    const MOST: usize = 1024;
    /// `struct rand_pool_info` with room for the bytes.
    #[repr(C)]
    struct Pool {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; MOST],
    }
    if bytes.is_empty() || bytes.len() > MOST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut pool = Pool {
        entropy_count: (bytes.len() * 8) as libc::c_int,
        buf_size: bytes.len() as libc::c_int,
        buf: [0; MOST],
    };
    pool.buf[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the struct has the kernel's layout, buf_size bytes of it are initialised, and both
    // live through the calls.
    unsafe {
        check(libc::ioctl(random.as_raw_fd(), RNDADDENTROPY, &raw const pool).into())?;
        check(libc::ioctl(random.as_raw_fd(), RNDRESEEDCRNG).into())?;
    }
    Ok(())
}

/// Numbers of interfaces among which [`Interface::with_address`] looks.
const INDICES: libc::c_int = 16;

/// A network interface of this machine, set up by the ioctls of `netdevice(7)`.
pub(crate) struct Interface {
    socket: OwnedFd,
    name: [libc::c_char; libc::IFNAMSIZ],
}

impl Interface {
    /// An interface by name.
    pub(crate) fn open(name: &str) -> io::Result<Self> {
        let mut padded = [0; libc::IFNAMSIZ];
        if name.is_empty() || name.len() >= libc::IFNAMSIZ {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for (to, from) in padded.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        Ok(Self { socket, name: padded })
    }

    /// The interface that has `address`, among the first that this machine made.
    pub(crate) fn with_address(address: Ipv4Addr) -> io::Result<Option<Self>> {
        let mut found = Self::open("lo")?;
        for index in 1..=INDICES {
            let ifru = libc::__c_anonymous_ifr_ifru { ifru_ifindex: index };
            let mut request = found.request(ifru);
            // Numbers of interfaces have gaps.
            if found.ioctl(libc::SIOCGIFNAME, &mut request).is_err() {
                continue;
            }
            found.name = request.ifr_name;
            // With an address in it, it is told whether the interface has that one; else its first.
            let ifru = libc::__c_anonymous_ifr_ifru { ifru_addr: sockaddr(address) };
            let mut request = found.request(ifru);
            if found.ioctl(libc::SIOCGIFADDR, &mut request).is_err() {
                continue;
            }
            // SAFETY: SIOCGIFADDR has just filled this member of the union.
            let has = unsafe { request.ifr_ifru.ifru_addr }.sa_data;
            // The first two bytes are the port.
            if has[2..6] == sockaddr(address).sa_data[2..6] {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }

    /// What it is called.
    pub(crate) fn name(&self) -> String {
        let bytes = self.name.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0);
        String::from_utf8_lossy(&bytes.collect::<Vec<_>>()).into_owned()
    }

    fn request(&self, ifr_ifru: libc::__c_anonymous_ifr_ifru) -> libc::ifreq {
        libc::ifreq { ifr_name: self.name, ifr_ifru }
    }

    fn ioctl(&self, what: libc::c_ulong, request: &mut libc::ifreq) -> io::Result<()> {
        // SAFETY: the request is a whole ifreq that outlives the call; the calls used here read
        // it or write within it.
        unsafe { check(libc::ioctl(self.socket.as_raw_fd(), what, &raw mut *request).into()) }
            .map(drop)
    }

    /// Switches the interface on.
    pub(crate) fn up(&self) -> io::Result<()> {
        let mut request = self.request(libc::__c_anonymous_ifr_ifru { ifru_flags: 0 });
        self.ioctl(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS has just filled this member of the union.
        unsafe {
            request.ifr_ifru.ifru_flags |= libc::IFF_UP as libc::c_short;
        }
        self.ioctl(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Sets the MTU.
    pub(crate) fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let ifru = libc::__c_anonymous_ifr_ifru { ifru_mtu: mtu.into() };
        self.ioctl(libc::SIOCSIFMTU, &mut self.request(ifru))
    }

    /// Gives the interface `address` with a /32 mask.
    pub(crate) fn set_address(&self, address: Ipv4Addr) -> io::Result<()> {
        let ifru = libc::__c_anonymous_ifr_ifru { ifru_addr: sockaddr(address) };
        self.ioctl(libc::SIOCSIFADDR, &mut self.request(ifru))?;
        let mask = sockaddr(Ipv4Addr::BROADCAST);
        let ifru = libc::__c_anonymous_ifr_ifru { ifru_netmask: mask };
        self.ioctl(libc::SIOCSIFNETMASK, &mut self.request(ifru))?;
        // The kernel has guessed a broadcast address from the class of the address; another
        // machine may have it as its own.
        let none = sockaddr(Ipv4Addr::UNSPECIFIED);
        let ifru = libc::__c_anonymous_ifr_ifru { ifru_broadaddr: none };
        self.ioctl(libc::SIOCSIFBRDADDR, &mut self.request(ifru))
    }

    /// A route to the one host `to`, directly on this interface's link.
    pub(crate) fn add_host_route(&self, to: Ipv4Addr) -> io::Result<()> {
        self.add_route(to, Ipv4Addr::BROADCAST, None)
    }

    /// The route to everywhere else, by `gateway`.
    pub(crate) fn add_default_route(&self, gateway: Ipv4Addr) -> io::Result<()> {
        self.add_route(Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED, Some(gateway))
    }

    fn add_route(&self, to: Ipv4Addr, mask: Ipv4Addr, by: Option<Ipv4Addr>) -> io::Result<()> {
        let mut name = self.name;
        // SAFETY: rtentry is plain integers, addresses and pointers: all zero is a valid value.
        let mut route: libc::rtentry = unsafe { std::mem::zeroed() };
        route.rt_dst = sockaddr(to);
        route.rt_genmask = sockaddr(mask);
        route.rt_flags = libc::RTF_UP;
        if mask == Ipv4Addr::BROADCAST {
            route.rt_flags |= libc::RTF_HOST;
        }
        if let Some(gateway) = by {
            route.rt_gateway = sockaddr(gateway);
            route.rt_flags |= libc::RTF_GATEWAY;
        }
        route.rt_dev = name.as_mut_ptr();
        // SAFETY: route and the name it points to outlive the call; the name ends with NUL,
        // because `open` took at most IFNAMSIZ - 1 bytes.
        let result = unsafe {
            check(libc::ioctl(self.socket.as_raw_fd(), libc::SIOCADDRT, &raw const route).into())
        };
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other.map(drop),
        }
    }
}

/// `struct in6_rtmsg` of `<linux/ipv6_route.h>`; libc's has private fields.
#[repr(C)]
struct RouteV6 {
    to: libc::in6_addr,
    from: libc::in6_addr,
    gateway: libc::in6_addr,
    kind: u32,
    to_length: u16,
    from_length: u16,
    metric: u32,
    info: libc::c_ulong,
    flags: u32,
    interface: libc::c_int,
}

const _: () = assert!(size_of::<RouteV6>() == size_of::<libc::in6_rtmsg>());

impl Interface {
    fn index(&self) -> io::Result<libc::c_int> {
        let ifru = libc::__c_anonymous_ifr_ifru { ifru_ifindex: 0 };
        let mut request = self.request(ifru);
        self.ioctl(libc::SIOCGIFINDEX, &mut request)?;
        // SAFETY: SIOCGIFINDEX has just filled this member of the union.
        Ok(unsafe { request.ifr_ifru.ifru_ifindex })
    }

    /// An ioctl of IPv6 sockets with a struct of its own.
    fn ioctl_v6<T>(what: libc::c_ulong, request: &T) -> io::Result<()> {
        let socket =
            socket(AddressFamily::Inet6, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
        // SAFETY: the callers below give the struct that the call reads, whole and alive.
        let result = unsafe {
            check(libc::ioctl(socket.as_raw_fd(), what, std::ptr::from_ref(request)).into())
        };
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Gives the interface the IPv6 address with a /128 mask.
    pub(crate) fn set_address_v6(&self, address: Ipv6Addr) -> io::Result<()> {
        let request = libc::in6_ifreq {
            ifr6_addr: in6(address),
            ifr6_prefixlen: 128,
            ifr6_ifindex: self.index()?,
        };
        Self::ioctl_v6(libc::SIOCSIFADDR, &request)
    }

    /// Takes an IPv6 address from the interface, if it has it.
    pub(crate) fn remove_address_v6(&self, address: Ipv6Addr) -> io::Result<()> {
        let request = libc::in6_ifreq {
            ifr6_addr: in6(address),
            ifr6_prefixlen: 128,
            ifr6_ifindex: self.index()?,
        };
        match Self::ioctl_v6(libc::SIOCDIFADDR, &request) {
            Err(error) if error.raw_os_error() == Some(libc::EADDRNOTAVAIL) => Ok(()),
            other => other,
        }
    }

    /// The IPv6 route to everywhere else, by a gateway on this interface's link.
    pub(crate) fn add_default_route_v6(&self, gateway: Ipv6Addr) -> io::Result<()> {
        let any = in6(Ipv6Addr::UNSPECIFIED);
        let request = RouteV6 {
            to: any,
            from: any,
            gateway: in6(gateway),
            kind: 0,
            to_length: 0,
            from_length: 0,
            // The kernel's own default.
            metric: 1024,
            info: 0,
            flags: (libc::RTF_UP | libc::RTF_GATEWAY).into(),
            interface: self.index()?,
        };
        Self::ioctl_v6(libc::SIOCADDRT, &request)
    }
}

fn in6(address: Ipv6Addr) -> libc::in6_addr {
    libc::in6_addr { s6_addr: address.octets() }
}

/// An address in the form of `sockaddr_in`, inside the generic struct that the ioctls take.
fn sockaddr(address: Ipv4Addr) -> libc::sockaddr {
    let mut data = [0 as libc::c_char; 14];
    // sockaddr_in: two bytes of port, then the address in network order.
    for (to, from) in data[2..6].iter_mut().zip(address.octets()) {
        *to = from as libc::c_char;
    }
    libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: data }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_lies_where_sockaddr_in_has_it() {
        let plain = sockaddr(Ipv4Addr::new(169, 254, 1, 1));
        // SAFETY: both structs are 16 bytes of plain data with the family first.
        let inet: libc::sockaddr_in = unsafe { std::mem::transmute(plain) };
        assert_eq!(i32::from(inet.sin_family), libc::AF_INET);
        assert_eq!(inet.sin_addr.s_addr.to_be(), 0xa9fe_0101);
        assert_eq!(inet.sin_port, 0);
    }

    #[test]
    fn a_prepared_child_leads_its_group_and_can_be_ended_by_a_signal_that_we_block() {
        let mut blocked = nix::sys::signal::SigSet::empty();
        blocked.add(nix::sys::signal::Signal::SIGTERM);
        blocked.thread_block().unwrap();
        let mut command = Command::new("sleep");
        command.arg("30");
        prepare_child(&mut command, None);
        let mut child = command.spawn().unwrap();
        let pid = Pid::from_raw(child.id() as i32);
        assert_eq!(nix::unistd::getpgid(Some(pid)).unwrap(), pid);
        let watch = pidfd(child.id()).unwrap();
        nix::sys::signal::killpg(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let mut fds = [nix::poll::PollFd::new(
            std::os::fd::AsFd::as_fd(&watch),
            nix::poll::PollFlags::POLLIN,
        )];
        assert_eq!(nix::poll::poll(&mut fds, 10_000u16).unwrap(), 1, "pidfd tells of the end");
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
    }

    #[test]
    fn an_interface_name_that_is_too_long_is_refused() {
        assert!(Interface::open("a-name-of-16-byt").is_err());
        assert!(Interface::open("").is_err());
    }
}
