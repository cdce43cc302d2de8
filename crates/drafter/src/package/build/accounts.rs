//! Users and groups of a root that no installer ever ran in.

use super::recipe::User;

/// Name, user, group, home: the accounts that Debian's packages take for granted, with Debian's
/// numbers (they are in no file of a package; its installation makes them).
const PASSWD: &[(&str, u32, u32, &str)] = &[
    ("root", 0, 0, "/root"),
    ("daemon", 1, 1, "/usr/sbin"),
    ("bin", 2, 2, "/bin"),
    ("sys", 3, 3, "/dev"),
    ("man", 6, 12, "/var/cache/man"),
    ("mail", 8, 8, "/var/mail"),
    ("proxy", 13, 13, "/bin"),
    ("www-data", 33, 33, "/var/www"),
    ("backup", 34, 34, "/var/backups"),
    ("nobody", 65534, 65534, "/nonexistent"),
];

/// As [`PASSWD`].
const GROUPS: &[(&str, u32)] = &[
    ("root", 0),
    ("daemon", 1),
    ("bin", 2),
    ("sys", 3),
    ("adm", 4),
    ("tty", 5),
    ("disk", 6),
    ("mail", 8),
    ("man", 12),
    ("proxy", 13),
    ("www-data", 33),
    ("backup", 34),
    ("shadow", 42),
    ("utmp", 43),
    ("staff", 50),
    ("users", 100),
    ("nogroup", 65534),
];

/// The first number that is given to a user without one.
const FIRST_ID: u32 = 100;

/// The accounts of a root.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Accounts {
    /// Name, user, group, home.
    users: Vec<(String, u32, u32, String)>,
    groups: Vec<(String, u32)>,
}

impl Accounts {
    /// The usual accounts and those of the recipe.
    pub(crate) fn new(users: &[User]) -> Result<Self, String> {
        let own = |(name, uid, gid, home): &(&str, u32, u32, &str)| {
            ((*name).to_owned(), *uid, *gid, (*home).to_owned())
        };
        let mut accounts = Self {
            users: PASSWD.iter().map(own).collect(),
            groups: GROUPS.iter().map(|(name, gid)| ((*name).to_owned(), *gid)).collect(),
        };
        for user in users {
            accounts.add(user)?;
        }
        Ok(accounts)
    }

    /// The accounts that a root already has, and those of the recipe.
    pub(crate) fn from_files(passwd: &str, group: &str, users: &[User]) -> Result<Self, String> {
        let number = |fields: &[&str], at: usize| fields.get(at)?.parse::<u32>().ok();
        let mut accounts = Self::default();
        for line in passwd.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let (Some(uid), Some(gid)) = (number(&fields, 2), number(&fields, 3)) {
                let home = fields.get(5).copied().unwrap_or("/");
                accounts.users.push((fields[0].to_owned(), uid, gid, home.to_owned()));
            }
        }
        for line in group.lines() {
            let fields: Vec<&str> = line.split(':').collect();
            if let Some(gid) = number(&fields, 2) {
                accounts.groups.push((fields[0].to_owned(), gid));
            }
        }
        for user in users {
            accounts.add(user)?;
        }
        Ok(accounts)
    }

    fn add(&mut self, user: &User) -> Result<(), String> {
        let name = &user.name;
        let good = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"_-".contains(&b);
        if !name.starts_with(|c: char| c.is_ascii_lowercase() || c == '_')
            || name.len() > 32
            || !name.bytes().all(good)
        {
            return Err(format!(
                "{name:?} is not a user name: lower-case letters, digits, _ and -"
            ));
        }
        if !user.home.starts_with('/') || user.home.contains([':', '\n', '\0']) {
            return Err(format!("the home of user {name} is not an absolute path"));
        }
        if self.users.iter().any(|(known, ..)| known == name) {
            return Err(format!("the user {name} is there already"));
        }
        let uid = user.uid.unwrap_or_else(|| self.free_id());
        let gid = match self.groups.iter().find(|(known, _)| known == name) {
            Some((_, gid)) => *gid,
            None => {
                let gid = user.gid.unwrap_or(uid);
                self.groups.push((name.clone(), gid));
                gid
            }
        };
        self.users.push((name.clone(), uid, gid, user.home.clone()));
        Ok(())
    }

    fn free_id(&self) -> u32 {
        let taken = |id: u32| {
            self.users.iter().any(|(_, uid, ..)| *uid == id)
                || self.groups.iter().any(|(_, gid)| *gid == id)
        };
        (FIRST_ID..).find(|id| !taken(*id)).unwrap_or(FIRST_ID)
    }

    /// User and group of an owner given as `name`, `name:group`, `uid` or `uid:gid`.
    pub(crate) fn owner(&self, text: &str) -> Result<(u32, u32), String> {
        let (user, group) = text.split_once(':').map_or((text, None), |(u, g)| (u, Some(g)));
        let (uid, gid) = match user.parse() {
            Ok(uid) => (uid, 0),
            Err(_) => self
                .users
                .iter()
                .find(|(name, ..)| name == user)
                .map(|(_, uid, gid, _)| (*uid, *gid))
                .ok_or_else(|| format!("there is no user {user}; add it to the users"))?,
        };
        let gid = match group {
            None => gid,
            Some(group) => group
                .parse()
                .ok()
                .or_else(|| self.groups.iter().find(|(name, _)| name == group).map(|(_, gid)| *gid))
                .ok_or_else(|| format!("there is no group {group}"))?,
        };
        Ok((uid, gid))
    }

    /// Content of `/etc/passwd`.
    pub(crate) fn passwd(&self) -> String {
        let line = |(name, uid, gid, home): &(String, u32, u32, String)| {
            let shell = if *uid == 0 { "/bin/sh" } else { "/usr/sbin/nologin" };
            format!("{name}:x:{uid}:{gid}:{name}:{home}:{shell}\n")
        };
        self.users.iter().map(line).collect()
    }

    /// Content of `/etc/group`.
    pub(crate) fn group(&self) -> String {
        self.groups.iter().map(|(name, gid)| format!("{name}:x:{gid}:\n")).collect()
    }

    /// Lines for the users of the recipe, for roots that have the files already.
    pub(crate) fn lines_of(&self, users: &[User]) -> (String, String) {
        let wanted = |name: &str| users.iter().any(|user| user.name == name);
        let only = Self {
            users: self.users.iter().filter(|user| wanted(&user.0)).cloned().collect(),
            groups: self.groups.iter().filter(|group| wanted(&group.0)).cloned().collect(),
        };
        (only.passwd(), only.group())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(name: &str, uid: Option<u32>) -> User {
        User { name: name.into(), uid, gid: None, home: "/var/lib/x".into() }
    }

    #[test]
    fn users_get_free_numbers_and_a_group_of_their_own() {
        let accounts = Accounts::new(&[user("a", Some(101)), user("redis", None)]).unwrap();
        assert_eq!(accounts.owner("redis").unwrap(), (102, 102));
        assert_eq!(accounts.owner("redis:tty").unwrap(), (102, 5));
        assert_eq!(accounts.owner("7:8").unwrap(), (7, 8));
        assert!(accounts.passwd().contains("redis:x:102:102:redis:/var/lib/x:/usr/sbin/nologin\n"));
        assert!(accounts.passwd().starts_with("root:x:0:0:root:/root:/bin/sh\n"));
        assert!(accounts.group().contains("redis:x:102:\n"));
    }

    #[test]
    fn accounts_of_an_image_are_kept_and_extended() {
        let passwd = "root:x:0:0::/root:/bin/sh\nredis:x:999:1000::/data:/bin/sh\nbroken\n";
        let group = "root:x:0:\nredis:x:1000:\n";
        let users = [user("app", None)];
        let accounts = Accounts::from_files(passwd, group, &users).unwrap();
        assert_eq!(accounts.owner("redis").unwrap(), (999, 1000));
        let (passwd, group) = accounts.lines_of(&users);
        assert_eq!(passwd, "app:x:100:100:app:/var/lib/x:/usr/sbin/nologin\n");
        assert_eq!(group, "app:x:100:\n");
    }

    #[test]
    fn a_bad_user_is_refused_with_its_reason() {
        for (name, home, part) in [
            ("Root", "/", "user name"),
            ("a:b", "/", "user name"),
            ("a", "b", "home"),
            ("root", "/", "already"),
        ] {
            let bad = User { name: name.into(), uid: None, gid: None, home: home.into() };
            let text = Accounts::new(&[bad]).unwrap_err();
            assert!(text.contains(part), "{text}");
        }
        assert!(Accounts::new(&[]).unwrap().owner("redis").unwrap_err().contains("no user redis"));
    }
}
