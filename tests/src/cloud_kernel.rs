//! The kernel that guests boot: Debian's cloud kernel, as `.ci/setup` unpacked it, and its loadable modules.
//!
//! Nothing here fetches or installs: a machine that lacks the kernel is told which command brings it.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

/// An unpacked kernel package.
pub struct CloudKernel {
    image: PathBuf,
    modules: PathBuf,
}

impl CloudKernel {
    /// The kernel in `$TRELLIS_CACHE`, which is `/var/cache/trellis` unless set.
    ///
    /// # Panics
    /// Where there is none, naming the command that brings it.
    #[must_use]
    pub fn find() -> Self {
        let tree = cache().join("kernel");
        let only = |folder: &str| fs::read_dir(tree.join(folder)).ok()?.next()?.ok().map(|entry| entry.path());
        let release = only("lib/modules");
        let Some(modules) = release else {
            panic!("no guest kernel in {}: run `.ci/setup`, which brings it", tree.display());
        };
        let release = modules.file_name().expect("a folder has a name").to_string_lossy().into_owned();
        Self { image: tree.join(format!("boot/vmlinuz-{release}")), modules }
    }

    /// The file that a boot loader takes.
    #[must_use]
    pub fn image(&self) -> PathBuf {
        self.image.clone()
    }

    /// What has to be loaded for `names` to work, as (file name, bytes) in the order of loading. Names that are
    /// built into the kernel need nothing.
    ///
    /// # Panics
    /// Where a name is neither a module nor built in.
    #[must_use]
    pub fn modules(&self, names: &[&str]) -> Vec<(String, Vec<u8>)> {
        let mut paths: Vec<String> = Vec::new();
        for name in names {
            for path in self.load_order(name) {
                if !paths.contains(&path) {
                    paths.push(path);
                }
            }
        }
        paths.iter().map(|path| (file_name(path).to_owned(), self.unpacked(path))).collect()
    }

    fn load_order(&self, name: &str) -> Vec<String> {
        // One line a module, "path: dependency dependency", the nearest dependency first.
        let listed = self.list("modules.dep").lines().find_map(|line| {
            let (path, needs) = line.split_once(':')?;
            is_module(path, name).then(|| needs.split_whitespace().rev().chain([path]).map(str::to_owned).collect())
        });
        if let Some(paths) = listed {
            return paths;
        }
        let built_in = self.list("modules.builtin").lines().any(|path| is_module(path, name));
        assert!(built_in, "the guest kernel has no '{name}', neither as a module nor built in");
        Vec::new()
    }

    fn list(&self, name: &str) -> String {
        let path = self.modules.join(name);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("reading {}: {error}; run `.ci/setup`", path.display()))
    }

    fn unpacked(&self, module: &str) -> Vec<u8> {
        let output = Command::new("xz").arg("-dc").arg(self.modules.join(module)).output();
        let output = output.expect("xz starts (`.ci/setup` installs it)");
        assert!(output.status.success(), "unpacking {module}: {}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }
}

/// Where `.ci/setup` puts what tests need and no package installs.
#[must_use]
pub fn cache() -> PathBuf {
    std::env::var_os("TRELLIS_CACHE").map_or_else(|| PathBuf::from("/var/cache/trellis"), PathBuf::from)
}

fn is_module(path: &str, name: &str) -> bool {
    file_name(path).replace('-', "_") == name
}

fn file_name(path: &str) -> &str {
    let name = path.rsplit('/').next().unwrap_or(path);
    name.split('.').next().unwrap_or(name)
}
