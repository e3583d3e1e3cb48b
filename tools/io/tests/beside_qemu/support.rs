//! Two folders with the same images, one for each program; what they say, and what they leave.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use tempfile::TempDir;

/// See the module's head.
pub(crate) struct Bench {
    top: TempDir,
}

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Bench {
    pub(crate) fn new() -> Self {
        let top = tempfile::Builder::new().prefix("trellis-io-").tempdir().unwrap();
        for folder in ["origin", "qemu", "ours", "bin"] {
            fs::create_dir(top.path().join(folder)).unwrap();
        }
        // Under this name our messages are QEMU's.
        symlink(env!("CARGO_BIN_EXE_trellis-io"), top.path().join("bin/qemu-io")).unwrap();
        let bench = Self { top };
        bench.make_images();
        bench.refresh();
        bench
    }

    pub(crate) fn path(&self) -> &Path {
        self.top.path()
    }

    fn make_images(&self) {
        let origin = self.path().join("origin");
        fs::write(origin.join("a.raw"), vec![0; 1 << 20]).unwrap();
        fs::write(origin.join("pattern"), "abcdefg").unwrap();
        self.make("qemu-img", "create -q -f qcow2 b.qcow2 4M");
        self.make("qemu-img", "create -q -f qcow2 base.qcow2 4M");
        self.make("qemu-io", "-f qcow2 -c |=write -P 7 0 1M| base.qcow2");
        self.make("qemu-img", "create -q -f qcow2 -b base.qcow2 -F qcow2 o.qcow2");
    }

    /// Runs a program where the images are that both begin with. What stands between bars is one word.
    pub(crate) fn make(&self, program: &str, line: &str) {
        let words = line.split('|').flat_map(|part| match part.strip_prefix('=') {
            Some(whole) => vec![whole],
            None => part.split_whitespace().collect(),
        });
        let ran = Command::new(program).args(words).current_dir(self.path().join("origin")).output().unwrap();
        assert!(ran.status.success(), "{program} {line}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    /// Both have the images as they were in the beginning.
    pub(crate) fn refresh(&self) {
        for side in ["qemu", "ours"] {
            let folder = self.path().join(side);
            fs::remove_dir_all(&folder).unwrap();
            fs::create_dir(&folder).unwrap();
            for file in fs::read_dir(self.path().join("origin")).unwrap() {
                let file = file.unwrap();
                fs::copy(file.path(), folder.join(file.file_name())).unwrap();
            }
        }
    }

    pub(crate) fn run_qemu(&self, arguments: &[&str], typed: &str) -> Ran {
        run(Path::new("qemu-io"), &self.path().join("qemu"), arguments, typed)
    }

    pub(crate) fn run_ours(&self, arguments: &[&str], typed: &str) -> Ran {
        run(&self.path().join("bin/qemu-io"), &self.path().join("ours"), arguments, typed)
    }

    /// Both say the same and leave the same.
    pub(crate) fn same(&self, arguments: &[&str], typed: &str) {
        self.refresh();
        let (theirs, ours) = (self.run_qemu(arguments, typed), self.run_ours(arguments, typed));
        let said = format!("{arguments:?} <<< {typed:?}");
        assert_eq!(ours.masked(), theirs.masked(), "left: ours, right: qemu-io, of {said}");
        let differences = self.differences();
        assert!(differences.is_empty(), "{said}: {}", differences.join("\n"));
    }

    /// What is wrong with the images that we left.
    pub(crate) fn differences_of_check(&self) -> Vec<String> {
        let images = self.images().into_iter().filter(|name| name.ends_with(".qcow2"));
        let check = |name: String| wrong("check", &["-q", "-f", "qcow2"], &[&self.path().join("ours").join(name)]);
        images.filter_map(check).collect()
    }

    fn images(&self) -> Vec<String> {
        let files = fs::read_dir(self.path().join("ours")).unwrap();
        files.map(|file| file.unwrap().file_name().into_string().unwrap()).collect()
    }

    /// What is not the same in the images that both left.
    pub(crate) fn differences(&self) -> Vec<String> {
        let mut found = self.differences_of_check();
        for name in self.images() {
            let (ours, theirs) = (self.path().join("ours").join(&name), self.path().join("qemu").join(&name));
            let format = if name.ends_with(".qcow2") { "qcow2" } else { "raw" };
            found.extend(wrong("compare", &["-f", format, "-F", format], &[&ours, &theirs]));
        }
        found
    }
}

/// What `qemu-img` finds wrong.
fn wrong(command: &str, options: &[&str], images: &[&PathBuf]) -> Option<String> {
    let ran = Command::new("qemu-img").arg(command).args(options).args(images).output().unwrap();
    let said = String::from_utf8_lossy(&ran.stdout) + String::from_utf8_lossy(&ran.stderr);
    let is_good = ran.status.success() && !said.contains("Warning");
    (!is_good).then(|| format!("qemu-img {command} {images:?}: {said}"))
}

fn run(program: &Path, folder: &Path, arguments: &[&str], typed: &str) -> Ran {
    let mut child = Command::new("timeout")
        .arg("20")
        .arg(program)
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Who does not read what is typed is not disturbed by it.
    let _ = child.stdin.take().unwrap().write_all(typed.as_bytes());
    let ran = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ran { code: ran.status.code(), out: text(ran.stdout), err: text(ran.stderr) }
}

impl Ran {
    /// Without times and speeds.
    pub(crate) fn masked(&self) -> Self {
        let out: Vec<_> = self.out.split('\n').map(masked).collect();
        Self { code: self.code, out: out.join("\n"), err: self.err.clone() }
    }
}

fn masked(line: &str) -> String {
    if let Some((bytes, _)) = line.split_once(" ops; ") {
        return format!("{bytes} ops; *");
    }
    match line.split(',').collect::<Vec<_>>()[..] {
        [bytes, ops, time, _, _] if time.contains(':') => format!("{bytes},{ops},*"),
        _ => line.to_owned(),
    }
}
