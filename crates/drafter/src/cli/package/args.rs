//! What `package build` takes: flags, and the recipe that they make or change.

use super::CacheArgs;
use crate::package::{
    build::recipe::{AddedFile, Kernel, RECIPE_VERSION, Recipe, Root},
    manifest::Port,
};
use anyhow::bail;
use clap::Args;
use drafter_guest::config::{Check, Hook, Probe};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};

/// What to build. A recipe file says all of it; flags say it without one, or change a recipe.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("source").required(true)
    .args(["recipe", "debian", "directory", "oci"]))]
pub struct BuildArgs {
    /// Name of the package [default: the recipe's, or that of the first Debian package].
    #[arg(long)]
    name: Option<String>,

    /// The package's directory, or a .tar.zst [default: it stays in the cache].
    #[arg(long, short, value_name = "PATH")]
    pub(super) output: Option<PathBuf>,

    /// A recipe file (JSON).
    #[arg(long, short, value_name = "FILE")]
    recipe: Option<PathBuf>,

    /// Debian packages as the root, with all they need.
    #[arg(long, value_name = "PACKAGE", num_args = 1.., value_delimiter = ',')]
    debian: Vec<String>,

    /// A directory as the root.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,

    /// An OCI image layout as the root.
    #[arg(long, value_name = "DIR")]
    oci: Option<PathBuf>,

    /// Which image of the layout, by name or digest.
    #[arg(long, value_name = "NAME", requires = "oci")]
    image: Option<String>,

    /// Keep a Debian package out, with what only it needs.
    #[arg(long, value_name = "PACKAGE")]
    exclude: Vec<String>,

    /// Keep a Debian package in that is left out by default.
    #[arg(long, value_name = "PACKAGE")]
    include: Vec<String>,

    /// Debian package of the kernel [default: linux-image-cloud-amd64].
    #[arg(long, value_name = "PACKAGE")]
    kernel: Option<String>,

    /// Load a further kernel module at boot.
    #[arg(long, value_name = "NAME")]
    module: Vec<String>,

    /// Kernel command line.
    #[arg(long, value_name = "TEXT")]
    command_line: Option<String>,

    /// Add a file: its path here, and in the machine.
    #[arg(long, value_name = "FILE:DEST", value_parser = parse_added)]
    add: Vec<AddedFile>,

    /// Add a variable to the entry point's environment.
    #[arg(long, value_name = "NAME=VALUE", value_parser = parse_variable)]
    env: Vec<(String, String)>,

    /// The entry point, with its arguments, as a shell would split them.
    #[arg(long, value_name = "COMMAND", value_parser = split_words)]
    entry: Option<Words>,

    /// Who the entry point runs as.
    #[arg(long)]
    user: Option<String>,

    /// A port that the machine listens on.
    #[arg(long, value_name = "[NAME=]PORT[/udp]", value_parser = str::parse::<Port>)]
    port: Vec<Port>,

    /// A TCP port that accepts connections when the machine serves.
    #[arg(long, value_name = "PORT")]
    ready_port: Option<u16>,

    /// Command to run before the machine is paused for a move.
    #[arg(long, value_name = "COMMAND", value_parser = split_words)]
    hook_before_suspend: Option<Words>,

    /// Command to run after the machine runs again.
    #[arg(long, value_name = "COMMAND", value_parser = split_words)]
    hook_after_resume: Option<Words>,

    /// Size of the first disk, as in 512M or 2G [default: twice what is in it, at least 512M].
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    size: Option<u64>,

    /// Default memory, as in 256M.
    #[arg(long, value_name = "BYTES", value_parser = parse_size)]
    memory: Option<u64>,

    /// Default number of virtual processors.
    #[arg(long, value_name = "COUNT")]
    vcpus: Option<u32>,

    /// The static guest program [default: beside this program, or in the build tree].
    #[arg(long, value_name = "FILE", env = crate::package::build::GUEST_VARIABLE)]
    pub(super) guest_program: Option<PathBuf>,

    #[command(flatten)]
    pub(super) cache: CacheArgs,
}

/// A command line split into words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Words(Vec<String>);

impl BuildArgs {
    /// The recipe that the flags make or change.
    pub(super) fn into_recipe(self) -> anyhow::Result<Recipe> {
        let mut recipe = self.base()?;
        if let Some(name) = self.name {
            recipe.name = name;
        }
        if let Root::Debian { exclude, include, .. } = &mut recipe.root {
            exclude.extend(self.exclude);
            include.extend(self.include);
        } else if !self.exclude.is_empty() || !self.include.is_empty() {
            bail!("--exclude and --include are for roots of Debian packages");
        }
        if let Some(kernel) = self.kernel {
            recipe.kernel = Kernel::Debian(kernel);
        }
        recipe.modules.extend(self.module);
        recipe.command_line = self.command_line.unwrap_or(recipe.command_line);
        recipe.files.extend(self.add);
        recipe.ports.extend(self.port);
        recipe.vcpus = self.vcpus.unwrap_or(recipe.vcpus);
        recipe.disk_mib = self.size.map(mebibytes).or(recipe.disk_mib);
        recipe.memory_mib = self.memory.map_or(recipe.memory_mib, mebibytes);
        let entry = &mut recipe.entry;
        entry.argv = self.entry.map(|words| words.0).or_else(|| entry.argv.take());
        entry.user = self.user.or_else(|| entry.user.take());
        entry.env.extend(self.env);
        let hook = |words: Words| Hook { argv: words.0, timeout: Duration::from_secs(10) };
        let hooks = &mut entry.hooks;
        hooks.before_suspend =
            self.hook_before_suspend.map(hook).or_else(|| hooks.before_suspend.take());
        hooks.after_resume = self.hook_after_resume.map(hook).or_else(|| hooks.after_resume.take());
        if let Some(port) = self.ready_port {
            entry.probes.readiness = Some(Probe {
                check: Check::Tcp { port },
                interval: Duration::from_millis(200),
                timeout: Duration::from_secs(1),
            });
        }
        Ok(recipe)
    }

    /// The recipe file, or an empty recipe for the source that the flags name.
    fn base(&self) -> anyhow::Result<Recipe> {
        if let Some(path) = &self.recipe {
            return Ok(Recipe::read(path)?);
        }
        let named_after = |path: &Path| {
            let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
            path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
        };
        let (name, root) = if let Some(path) = &self.directory {
            (named_after(path), Root::Directory { path: path.clone() })
        } else if let Some(layout) = &self.oci {
            let root = Root::Oci { layout: layout.clone(), image: self.image.clone() };
            (named_after(layout), root)
        } else {
            let Some(first) = self.debian.first() else {
                bail!("say what the root is: --recipe, --debian, --directory or --oci");
            };
            let root = Root::Debian {
                packages: self.debian.clone(),
                exclude: Vec::new(),
                include: Vec::new(),
            };
            (first.split('=').next().unwrap_or(first).to_owned(), root)
        };
        let recipe = Recipe::new(name, root);
        debug_assert_eq!(recipe.recipe, RECIPE_VERSION);
        Ok(recipe)
    }
}

fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Reads a number of bytes with an optional K, M, G or T (powers of 1024).
pub(super) fn parse_size(text: &str) -> Result<u64, String> {
    let trimmed = text.trim_end_matches("iB").trim_end_matches('B');
    let (number, shift) = match trimmed.char_indices().last() {
        Some((at, 'K' | 'k')) => (&trimmed[..at], 10),
        Some((at, 'M' | 'm')) => (&trimmed[..at], 20),
        Some((at, 'G' | 'g')) => (&trimmed[..at], 30),
        Some((at, 'T' | 't')) => (&trimmed[..at], 40),
        _ => (trimmed, 0),
    };
    let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(1 << shift));
    bytes.ok_or_else(|| format!("{text:?} is not a size, as in 512M or 2G"))
}

fn parse_added(text: &str) -> Result<AddedFile, String> {
    match text.rsplit_once(':') {
        Some((from, to)) if !from.is_empty() && to.starts_with('/') => Ok(AddedFile {
            from: from.into(),
            to: to.to_owned(),
            owner: "root".to_owned(),
            mode: None,
        }),
        _ => Err(format!("{text:?} is not of the form FILE:/PATH/IN/THE/MACHINE")),
    }
}

fn parse_variable(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is not of the form NAME=VALUE")),
    }
}

/// Splits a command line at blanks; quotes and backslashes work as in a shell, and nothing else
/// does (there is no shell in the machine).
fn split_words(text: &str) -> Result<Words, String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(open), _) if c == open => quote = None,
            (None, '\'' | '"') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None | Some('"'), '\\') => match chars.next() {
                Some(next) => word.get_or_insert_default().push(next),
                None => return Err(format!("{text:?} ends with a backslash")),
            },
            (None, ' ' | '\t' | '\n') => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    if quote.is_some() {
        return Err(format!("{text:?} has a quote that is not closed"));
    }
    words.extend(word);
    if words.first().is_none_or(String::is_empty) {
        return Err("a command needs a program".to_owned());
    }
    Ok(Words(words))
}

#[cfg(test)]
mod tests {
    use super::super::PackageCommand;
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(subcommand)]
        command: PackageCommand,
    }

    fn recipe(arguments: &[&str]) -> anyhow::Result<Recipe> {
        let all = ["test", "build"].iter().chain(arguments);
        match Cli::try_parse_from(all)?.command {
            PackageCommand::Build(args) => args.into_recipe(),
            other => bail!("{other:?}"),
        }
    }

    #[test]
    fn the_commands_are_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_alone_make_a_recipe() {
        let recipe = recipe(&[
            "--debian",
            "redis-server=5:7,redis-tools",
            "--size",
            "1G",
            "--memory",
            "128M",
            "--entry",
            r#"redis-server --save "" 'a b' c\ d"#,
            "--env",
            "A=b=c",
            "--port",
            "redis=6379",
            "--port",
            "53/udp",
            "--add",
            "x:y:/etc/z",
            "--hook-before-suspend",
            "/bin/sync",
            "--ready-port",
            "6379",
            "--exclude",
            "libssl3",
        ])
        .unwrap();
        assert_eq!(recipe.name, "redis-server");
        assert_eq!((recipe.disk_mib, recipe.memory_mib), (Some(1024), 128));
        let argv = recipe.entry.argv.unwrap();
        assert_eq!(argv, ["redis-server", "--save", "", "a b", "c d"]);
        assert_eq!(recipe.entry.env["A"], "b=c");
        assert_eq!(recipe.ports[1].protocol, conduit::Protocol::Udp);
        assert_eq!(recipe.files[0].from, Path::new("x:y"));
        assert_eq!(recipe.entry.hooks.before_suspend.unwrap().argv, ["/bin/sync"]);
        assert_eq!(recipe.entry.probes.readiness.unwrap().check, Check::Tcp { port: 6379 });
    }

    #[test]
    fn a_source_is_required_and_only_one_is_taken() {
        assert!(recipe(&[]).unwrap_err().to_string().contains("--debian"));
        assert!(recipe(&["--debian", "a", "--oci", "b"]).is_err());
        let text = recipe(&["--directory", "/etc", "--exclude", "a"]).unwrap_err().to_string();
        assert!(text.contains("Debian"), "{text}");
    }

    #[test]
    fn the_recipe_of_the_repository_is_valid_and_flags_change_it() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../packages/redis.json");
        let plain = recipe(&["--recipe", path]).unwrap();
        assert_eq!((&*plain.name, plain.memory_mib), ("redis", 256));
        let changed = recipe(&["--recipe", path, "--name", "other", "--memory", "1G"]).unwrap();
        assert_eq!((&*changed.name, changed.memory_mib), ("other", 1024));
        assert_eq!(changed.entry, plain.entry);
    }

    #[test]
    fn sizes_and_commands_that_cannot_be_read_are_refused() {
        assert_eq!(parse_size("512MiB").unwrap(), 512 << 20);
        assert_eq!(parse_size("7").unwrap(), 7);
        for text in ["", "M", "-1", "1X", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
        for text in ["", "  ", "'a", "a\\", "\"\""] {
            assert!(split_words(text).is_err(), "{text}");
        }
    }
}
