//! The package of the demonstration: the repository's Redis recipe with the oracle added.

use super::screen::Screen;
use crate::table::bytes;
use anyhow::{Context as _, anyhow};
use drafter::package::{
    BuildRequest, Built, Cache, Origin, Progress,
    build::{
        self, Recipe, find_guest_program,
        recipe::{AddedFile, Mode},
    },
};
use std::path::PathBuf;

const RECIPE: &str = include_str!("../../../../packages/redis.json");

/// Where the oracle is in the machine.
pub(super) const ORACLE: &str = "/usr/bin/oracle";

/// Builds the package, or finds it in the user's cache.
pub(super) fn build(screen: &Screen) -> anyhow::Result<Built> {
    let request = BuildRequest {
        recipe: recipe(oracle_program()?)?,
        guest_program: find_guest_program()?,
        cache: Cache::default_for_user(),
        output: None,
    };
    build::build(&request, &mut |progress| screen.update(&sentence(&progress)))
        .context("building the Redis package")
}

/// What was built, in a few words.
pub(super) fn describe(built: &Built) -> String {
    let origin = match built.origin {
        Origin::Cache => "from the cache",
        Origin::Made => "made",
    };
    let id = built.package.id().to_string();
    let size = built.package.sizes().map_or_else(|_| String::new(), |(_, size)| bytes(size));
    format!("{origin}, {size}, id {}", id.get(..12).unwrap_or(&id))
}

fn recipe(oracle: PathBuf) -> anyhow::Result<Recipe> {
    let mut recipe: Recipe =
        serde_json::from_str(RECIPE).context("reading the recipe packages/redis.json")?;
    recipe.name = "redis-demo".into();
    recipe.files.push(AddedFile {
        from: oracle,
        to: ORACLE.into(),
        owner: "root".into(),
        mode: Some(Mode(0o755)),
    });
    Ok(recipe)
}

/// The static program that checks a guest from inside.
fn oracle_program() -> anyhow::Result<PathBuf> {
    crate::programs::oracle().ok_or_else(|| {
        anyhow!(
            "the program that checks the guest from inside is not where the build puts it; \
             scripts/build.sh makes it"
        )
    })
}

fn sentence(progress: &Progress) -> String {
    match progress {
        Progress::Resolving => "asking apt what Redis needs".into(),
        Progress::Downloading { files, bytes: size } => {
            format!("downloading {files} Debian packages, {} (kept in the cache)", bytes(*size))
        }
        Progress::Kernel => "unpacking the kernel and its modules".into(),
        Progress::Root { index, count, name } => {
            format!("filling the root: {name} ({} of {count})", index + 1)
        }
        Progress::Disk { bytes: size } => format!("writing the disk, {}", bytes(*size)),
        Progress::Output => "putting it in place".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_recipe_is_the_repositorys_own_with_the_oracle_added() {
        let plain: Recipe = serde_json::from_str(RECIPE).unwrap();
        let recipe = recipe("/x/oracle".into()).unwrap();
        assert_eq!((&recipe.root, &recipe.entry), (&plain.root, &plain.entry));
        assert_eq!(recipe.files.len(), plain.files.len() + 1);
        assert_eq!(recipe.files.last().unwrap().to, ORACLE);
    }
}
