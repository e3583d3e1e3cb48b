//! Two folders with the same files, and what is run in both.

use std::fmt::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Two folders with the same files. Dropping it fails if anything was different.
pub(crate) struct Scene {
    folder: TempDir,
    failures: String,
}

/// What a program did.
#[derive(PartialEq, Eq)]
pub(crate) struct Done {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Scene {
    /// Both folders hold what `setup` makes: lines for `qemu-img`, or for `qemu-io` if they begin with that.
    pub(crate) fn new(setup: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (theirs, ours) = (folder.path().join("theirs"), folder.path().join("ours"));
        std::fs::create_dir_all(&theirs).unwrap();
        symlink(env!("CARGO_BIN_EXE_trellis-img"), folder.path().join("qemu-img")).unwrap();
        for line in setup {
            let done = run(real(line), &words(line), &theirs);
            assert!(done.code == Some(0), "{line}: {}", done.err);
        }
        let copied = Command::new("cp").args(["-r", "--sparse=always"]).arg(&theirs).arg(&ours).status().unwrap();
        assert!(copied.success());
        // So that both take the same room.
        std::fs::remove_dir_all(&theirs).unwrap();
        let copied = Command::new("cp").args(["-r", "--sparse=always"]).arg(&ours).arg(&theirs).status().unwrap();
        assert!(copied.success());
        // What they take is known once it is on the disk.
        for entry in std::fs::read_dir(&theirs).unwrap() {
            std::fs::File::open(entry.unwrap().path()).unwrap().sync_all().unwrap();
        }
        Self { folder, failures: String::new() }
    }

    pub(crate) fn theirs(&self) -> PathBuf {
        self.folder.path().join("theirs")
    }

    pub(crate) fn ours(&self) -> PathBuf {
        self.folder.path().join("ours")
    }

    /// Runs lines of both programs, which have to do the same.
    pub(crate) fn same(&mut self, lines: &[&str]) -> &mut Self {
        for line in lines {
            let (theirs, ours) = self.both(line);
            let (theirs, ours) = (masked(theirs), masked(ours));
            if theirs != ours {
                let _ =
                    writeln!(self.failures, "$ {line}\n{}{}", shown("qemu-img", &theirs), shown("trellis-img", &ours));
            }
        }
        self
    }

    /// Runs lines that only read, of both programs on the same files: even the room that these take is the same.
    pub(crate) fn same_reads(&mut self, lines: &[&str]) -> &mut Self {
        let ours = self.folder.path().join("qemu-img");
        for line in lines {
            let (words, folder) = (words(line), self.theirs());
            let theirs = run("qemu-img", &words, &folder);
            let ours = run(ours.to_str().unwrap(), &words, &folder);
            if theirs != ours {
                self.differ(line, &theirs, &ours);
            }
        }
        self
    }

    fn differ(&mut self, line: &str, theirs: &Done, ours: &Done) {
        let (theirs, ours) = (shown("qemu-img", theirs), shown("trellis-img", ours));
        let _ = writeln!(self.failures, "$ {line}\n{theirs}{ours}");
    }

    /// Runs lines of both programs, which end with the same code; `why` they do not say the same.
    pub(crate) fn same_code(&mut self, why: &str, lines: &[&str]) -> &mut Self {
        for line in lines {
            let (theirs, ours) = self.both(line);
            if theirs.code != ours.code {
                let _ =
                    writeln!(self.failures, "$ {line}\n{}{}", shown("qemu-img", &theirs), shown("trellis-img", &ours));
            }
            assert!(masked(theirs) != masked(ours), "{line}: it is the same now, though it should not: {why}");
        }
        self
    }

    /// Runs a line of both programs, which end with the same code; they may say it in other words.
    pub(crate) fn same_code_at_least(&mut self, line: &str) -> &mut Self {
        let (theirs, ours) = self.both(line);
        if theirs.code != ours.code {
            self.differ(line, &theirs, &ours);
        }
        self
    }

    /// Runs lines that one program refuses and the other obeys, `why`: theirs, and ours, end with these codes.
    pub(crate) fn codes(&mut self, why: &str, theirs: i32, ours: i32, lines: &[&str]) -> &mut Self {
        for line in lines {
            let (their, our) = self.both(line);
            let codes = (their.code, our.code);
            if codes != (Some(theirs), Some(ours)) {
                self.differ(&format!("{line} ({why})"), &their, &our);
            }
        }
        self
    }

    /// Images have the same contents in both folders, the same size, and are in order.
    pub(crate) fn same_images(&mut self, names: &[&str]) -> &mut Self {
        for name in names {
            let (theirs, ours) = (self.theirs().join(name), self.ours().join(name));
            let pair = [theirs.to_str().unwrap(), ours.to_str().unwrap()];
            let compared = run("qemu-img", &["compare", pair[0], pair[1]].map(str::to_owned), self.folder.path());
            if compared.code != Some(0) || compared.out.contains("size mismatch") {
                let _ = writeln!(self.failures, "{name}: {}", shown("qemu-img compare", &compared));
            }
            let checked = run("qemu-img", &["check", pair[1]].map(str::to_owned), self.folder.path());
            if !matches!(checked.code, Some(0 | 63)) {
                let _ = writeln!(self.failures, "{name}: {}", shown("qemu-img check", &checked));
            }
        }
        self
    }

    /// Encrypted images of both folders hold the same disk, and are in order. `kind`: `luks` or `crypt`.
    pub(crate) fn same_disks(&mut self, kind: &str, names: &[&str]) -> &mut Self {
        for name in names {
            let (theirs, ours) = (self.theirs().join(name), self.ours().join(name));
            let (theirs, ours) = (theirs.to_str().unwrap(), ours.to_str().unwrap());
            let compared = self.theirs_says(&format!("compare @s --image-opts {kind}:{theirs} {kind}:{ours}"));
            let checked = self.theirs_says(&format!("check @s --image-opts {kind}:{ours}"));
            let is_same = compared.code == Some(0) && !compared.out.contains("size mismatch");
            if !is_same || !matches!(checked.code, Some(0 | 63)) {
                let (compared, checked) = (shown("compare", &compared), shown("check", &checked));
                let _ = writeln!(self.failures, "{name}: {compared}{checked}");
            }
        }
        self
    }

    /// What `qemu-img` says of a line.
    pub(crate) fn theirs_says(&self, line: &str) -> Done {
        run("qemu-img", &words(line), &self.theirs())
    }

    /// What our program says of a line.
    pub(crate) fn ours_says(&self, line: &str) -> Done {
        run(self.folder.path().join("qemu-img").to_str().unwrap(), &words(line), &self.ours())
    }

    /// What our folder's image contains.
    pub(crate) fn contents(&self, name: &str) -> Vec<u8> {
        let to = self.folder.path().join("contents");
        let words = ["convert", "-O", "raw", name, to.to_str().unwrap()].map(str::to_owned);
        assert!(run("qemu-img", &words, &self.ours()).code == Some(0), "{name} cannot be read");
        std::fs::read(to).unwrap()
    }

    /// `qemu-img` finds the same bitmaps in both folders.
    pub(crate) fn same_bitmaps(&mut self, names: &[&str]) -> &mut Self {
        for name in names {
            let words = ["info", name].map(str::to_owned);
            let listed = |done: Done| {
                let lines = done.out.lines().skip_while(|line| !line.contains("bitmaps:"));
                lines.take_while(|line| !line.contains("refcount bits")).map(str::to_owned).collect::<Vec<_>>()
            };
            let theirs = listed(run("qemu-img", &words, &self.theirs()));
            let ours = listed(run("qemu-img", &words, &self.ours()));
            if theirs.is_empty() || theirs != ours {
                let _ = writeln!(self.failures, "bitmaps of {name}: {theirs:?} and {ours:?}");
            }
        }
        self
    }

    /// As many bytes are in the images themselves in both folders, by `qemu-img map`.
    pub(crate) fn same_sum_of_maps(&mut self, names: &[&str]) -> &mut Self {
        for name in names {
            let words = ["map", "--output", "json", name].map(str::to_owned);
            let own = |done: Done| {
                let own =
                    done.out.lines().filter(|line| line.contains("\"depth\": 0, \"present\": true")).map(|line| {
                        let len = line.split("\"length\": ").nth(1).unwrap().split(',').next().unwrap();
                        len.parse::<u64>().unwrap()
                    });
                own.sum::<u64>()
            };
            let theirs = own(run("qemu-img", &words, &self.theirs()));
            let ours = own(run("qemu-img", &words, &self.ours()));
            if theirs != ours {
                let _ = writeln!(self.failures, "{name} has {theirs} bytes of its own in theirs, {ours} in ours");
            }
        }
        self
    }

    pub(crate) fn both(&self, line: &str) -> (Done, Done) {
        let words = words(line);
        let ours = self.folder.path().join("qemu-img");
        (run("qemu-img", &words, &self.theirs()), run(ours.to_str().unwrap(), &words, &self.ours()))
    }
}

impl Drop for Scene {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(self.failures.is_empty(), "\n{}", self.failures);
        }
    }
}

/// The program that a line of a set-up is for.
fn real(line: &str) -> &'static str {
    if line.starts_with("qemu-io ") { "qemu-io" } else { "qemu-img" }
}

/// A line's words; `''` is an empty one, and what stands between quotes is one.
fn words(line: &str) -> Vec<String> {
    let line = line.strip_prefix("qemu-io ").unwrap_or(line);
    let mut words = Vec::new();
    for (number, part) in line.split('\'').enumerate() {
        match number % 2 {
            0 => words.extend(part.split_whitespace().flat_map(expanded)),
            _ => words.push(part.to_owned()),
        }
    }
    words
}

/// `@s`, `@t`, `@wrong`: secrets; `luks:x`, `crypt:x`: encrypted images that `s` opens.
fn expanded(word: &str) -> Vec<String> {
    let secret = |definition: &str| vec!["--object".to_owned(), format!("secret,{definition}")];
    match word {
        "@s" => secret("id=s,data=hello"),
        "@t" => secret("id=t,data=world"),
        "@wrong" => secret("id=s,data=wrong"),
        word => {
            let word = word.replacen("luks:", "driver=luks,key-secret=s,file.filename=", 1);
            vec![word.replacen("crypt:", "driver=qcow2,encrypt.key-secret=s,file.filename=", 1)]
        }
    }
}

fn run(program: &str, words: &[String], folder: &Path) -> Done {
    let done = Command::new("timeout")
        .args(["60", program])
        .args(words)
        .current_dir(folder)
        .env("TZ", "UTC")
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Done { code: done.status.code(), out: text(done.stdout), err: text(done.stderr) }
}

/// Without what time decides, or the file system, or where which cluster found room.
fn masked(done: Done) -> Done {
    let line = |line: &str| {
        let words: Vec<_> = line
            .split_inclusive(' ')
            .map(|word| {
                let plain = word.trim_end_matches([' ', ',']);
                let is_date = plain.len() == 10 && plain.as_bytes()[4] == b'-' && plain.as_bytes()[7] == b'-';
                let is_time = plain.len() == 8 && plain.as_bytes()[2] == b':' && plain.as_bytes()[5] == b':';
                if is_date || is_time { word.replace(plain, "WHEN") } else { word.to_owned() }
            })
            .collect();
        let line = words.concat();
        if line.starts_with("Run completed in ") {
            return "Run completed".to_owned();
        }
        let is_moment =
            ["uuid", "iters", "\"date-sec\"", "\"date-nsec\"", "\"actual-size\"", "disk size", "file length"]
                .iter()
                .any(|name| line.contains(name));
        if is_moment { line.split(':').next().unwrap_or_default().to_owned() } else { line }
    };
    let text = |text: &str| text.lines().map(line).collect::<Vec<_>>().join("\n");
    Done { code: done.code, out: text(&done.out), err: text(&done.err) }
}

fn shown(program: &str, done: &Done) -> String {
    format!("--- {program}: {:?}\n{}{}\n", done.code, done.out, done.err)
}

/// The program, which signals reach even if whoever runs the tests ignores them, as a shell's background jobs do.
pub(crate) fn tool() -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal=HUP,INT,TERM", env!("CARGO_BIN_EXE_trellis-img")]);
    command
}
