//! Finds a user by name or number in the machine's own `/etc/passwd` and `/etc/group`.
//!
//! By hand, because a static binary cannot load the C library's name services, and because the
//! machine's files are the only truth here.

use crate::sys::Ids;

/// Somebody a process can run as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) ids: Ids,
    pub(crate) home: String,
    pub(crate) name: String,
}

/// Finds who `spec` means (`name`, `name:group`, `uid`, `uid:gid`; empty is root) in the machine's
/// files. The error is a sentence.
pub(crate) fn find(spec: &str) -> Result<User, String> {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    resolve(spec, &read("/etc/passwd"), &read("/etc/group"))
}

fn resolve(spec: &str, passwd: &str, group: &str) -> Result<User, String> {
    let spec = if spec.is_empty() { "0" } else { spec };
    let (user, wanted_group) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (spec, None),
    };
    let number = user.parse::<u32>().ok();
    let known = passwd
        .lines()
        .filter_map(Account::parse)
        .find(|account| account.name == user || (number.is_some() && number == Some(account.uid)));
    let account = match (known, number) {
        (Some(account), _) => account,
        (None, Some(uid)) => Account { name: user, uid, gid: uid, home: "/" },
        (None, None) => return Err(format!("the machine's /etc/passwd has no user \"{user}\"")),
    };
    let groups: Vec<(&str, u32, &str)> = group.lines().filter_map(parse_group).collect();
    let gid = match wanted_group {
        None => account.gid,
        Some(wanted) => groups
            .iter()
            .find(|(name, _, _)| *name == wanted)
            .map(|(_, gid, _)| *gid)
            .or_else(|| wanted.parse().ok())
            .ok_or_else(|| format!("the machine's /etc/group has no group \"{wanted}\""))?,
    };
    let mut member_of = vec![gid];
    for (_, id, members) in groups {
        if members.split(',').any(|member| member == account.name) && !member_of.contains(&id) {
            member_of.push(id);
        }
    }
    Ok(User {
        ids: Ids { uid: account.uid, gid, groups: member_of },
        home: account.home.to_owned(),
        name: account.name.to_owned(),
    })
}

/// What we need of a line of `/etc/passwd`.
struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: &'a str,
}

impl<'a> Account<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut fields = line.split(':');
        let name = fields.next()?;
        let uid = fields.nth(1)?.parse().ok()?;
        let gid = fields.next()?.parse().ok()?;
        let home = fields.nth(1).filter(|home| home.starts_with('/')).unwrap_or("/");
        Some(Self { name, uid, gid, home })
    }
}

fn parse_group(line: &str) -> Option<(&str, u32, &str)> {
    let mut fields = line.split(':');
    let name = fields.next()?;
    let gid = fields.nth(1)?.parse().ok()?;
    Some((name, gid, fields.next().unwrap_or("")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/bash\n\
        redis:x:101:103:Redis,,,:/var/lib/redis:/usr/sbin/nologin\nbroken line\n";
    const GROUP: &str = "root:x:0:\nssl:x:110:www,redis\nredis:x:103:\nlog:x:4:redis\n";

    fn ids(spec: &str) -> (u32, u32, Vec<u32>) {
        let user = resolve(spec, PASSWD, GROUP).unwrap();
        (user.ids.uid, user.ids.gid, user.ids.groups)
    }

    #[test]
    fn a_name_gives_its_own_group_and_every_group_it_is_a_member_of() {
        assert_eq!(ids("redis"), (101, 103, vec![103, 110, 4]));
        assert_eq!(ids("101"), ids("redis"));
        assert_eq!(resolve("redis", PASSWD, GROUP).unwrap().home, "/var/lib/redis");
    }

    #[test]
    fn a_group_after_a_colon_replaces_the_first_group() {
        assert_eq!(ids("redis:ssl"), (101, 110, vec![110, 4]));
        assert_eq!(ids("redis:7"), (101, 7, vec![7, 110, 4]));
    }

    #[test]
    fn nothing_means_root_even_without_files() {
        assert_eq!(ids(""), (0, 0, vec![0]));
        assert_eq!(resolve("", "", "").unwrap().ids, Ids { uid: 0, gid: 0, groups: vec![0] });
    }

    #[test]
    fn numbers_need_no_entry_and_names_do() {
        assert_eq!(ids("4000"), (4000, 4000, vec![4000]));
        assert!(resolve("nobody", PASSWD, GROUP).unwrap_err().contains("no user \"nobody\""));
        assert!(resolve("redis:x", PASSWD, GROUP).unwrap_err().contains("no group \"x\""));
    }
}
