//! QEMU as a child process, and the shell in the guest at the other end of a virtio port.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use super::initramfs;
use crate::cloud_kernel::CloudKernel;
use crate::lines::{LineError, Lines};
use crate::process::{OwnedChild, wait_for};

/// A running guest with two CPUs; killed when dropped. What its kernel and QEMU said is shown where its test fails.
pub struct Guest {
    qemu: OwnedChild,
    shell: Lines,
    folder: PathBuf,
}

impl Guest {
    /// Boots a guest whose disks `vda`, `vdb`, … are the vhost-user sockets `disks`, each with two queues. Its files
    /// are in `folder`, which takes 200 MB.
    ///
    /// # Panics
    /// Where QEMU is missing or the guest does not come up.
    #[must_use]
    pub fn boot(folder: &Path, disks: &[&Path]) -> Self {
        let said = File::create(folder.join("qemu.log")).expect("the scratch folder is writable");
        let shell = folder.join("shell.sock");
        let mut command = Command::new("qemu-system-x86_64");
        command.args(MACHINE).args(["-serial", &format!("file:{}", folder.join("console.log").display())]);
        command.args(kernel_arguments(folder)).args(shell_arguments(&shell));
        for (number, disk) in disks.iter().enumerate() {
            command.args(disk_arguments(number, disk));
        }
        let mut qemu = OwnedChild::spawn(command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said));

        let shell = wait_for("QEMU's socket of the guest's shell", BOOT_LIMIT, || {
            if let Some(status) = qemu.ended() {
                panic!("QEMU ended at once with {status}; it said:\n{}", log(folder, "qemu.log"));
            }
            Lines::connect(&shell).ok()
        });
        let mut guest = Self { qemu, shell, folder: folder.to_owned() };
        guest.wait_until_ready();
        guest
    }

    /// What `command` printed in the guest.
    ///
    /// # Panics
    /// Where it fails, or takes longer than a minute.
    pub fn run(&mut self, command: &str) -> String {
        self.start(command);
        self.finish(COMMAND_LIMIT)
    }

    /// What `command` printed in the guest, where it has to fail.
    ///
    /// # Panics
    /// Where it succeeds, or takes longer than a minute.
    pub fn run_failing(&mut self, command: &str) -> String {
        self.start(command);
        let (status, output) = self.answer(COMMAND_LIMIT);
        assert_ne!(status, "0", "`{command}` succeeded in the guest; it said:\n{output}");
        output
    }

    /// Starts `command` in the guest; [`Guest::finish`] waits for it.
    ///
    /// # Panics
    /// Where QEMU has gone.
    pub fn start(&mut self, command: &str) {
        self.shell.send(command).expect("QEMU runs");
    }

    /// What the started command printed.
    ///
    /// # Panics
    /// Where it fails, or takes longer than `limit`.
    pub fn finish(&mut self, limit: Duration) -> String {
        let (status, output) = self.answer(limit);
        assert_eq!(status, "0", "the guest's command failed; it said:\n{output}");
        output
    }

    /// Waits until `command` succeeds in the guest.
    ///
    /// # Panics
    /// Where it never does within `limit`.
    pub fn wait_until(&mut self, command: &str, limit: Duration) {
        wait_for(&format!("`{command}` in the guest"), limit, || {
            self.start(command);
            (self.answer(COMMAND_LIMIT).0 == "0").then_some(())
        });
    }

    /// Restarts the guest's kernel in the same QEMU, on the same connections to the server.
    ///
    /// # Panics
    /// Where it does not come up again.
    pub fn reboot(&mut self) {
        self.start("sync; reboot -f");
        self.wait_until_ready();
    }

    /// Ends the guest the way a guest ends itself.
    ///
    /// # Panics
    /// Where QEMU does not end, or ends with a failure.
    pub fn power_off(mut self) {
        self.start("sync; poweroff -f");
        let status = self.qemu.wait(BOOT_LIMIT);
        assert!(status.success(), "QEMU ended with {status}");
    }

    fn wait_until_ready(&mut self) {
        while self.line(BOOT_LIMIT) != "ready" {}
    }

    /// Exit status and output, without empty lines at its end.
    fn answer(&mut self, limit: Duration) -> (String, String) {
        let mut output = String::new();
        loop {
            let line = self.line(limit);
            assert_ne!(line, "ready", "the guest restarted, unasked");
            if let Some(status) = line.strip_prefix("= ") {
                return (status.to_owned(), output.trim_end().to_owned());
            }
            output += line.strip_prefix("| ").unwrap_or_default();
            output.push('\n');
        }
    }

    fn line(&mut self, limit: Duration) -> String {
        match self.shell.next(Instant::now() + limit) {
            Ok(line) => line,
            Err(LineError::TimedOut) => panic!("the guest said nothing for {limit:?}"),
            Err(error) => panic!("the guest's shell is gone: {error:?}"),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for name in ["console.log", "qemu.log"] {
                eprintln!("{name}:\n{}", log(&self.folder, name));
            }
        }
    }
}

fn kernel_arguments(folder: &Path) -> [String; 6] {
    let kernel = CloudKernel::find();
    let archive = folder.join("initramfs.cpio");
    initramfs::write(&archive, &kernel).expect("the scratch folder is writable");
    let (image, archive) = (kernel.image().display().to_string(), archive.display().to_string());
    // A kernel that panics restarts at once, and the test that waits for it says so.
    ["-kernel", &image, "-initrd", &archive, "-append", "console=ttyS0 loglevel=4 panic=1"].map(str::to_owned)
}

fn shell_arguments(socket: &Path) -> [String; 6] {
    let chardev = format!("socket,id=shell,path={},server=on,wait=off", socket.display());
    ["-chardev", &chardev, "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=shell"].map(str::to_owned)
}

fn disk_arguments(number: usize, socket: &Path) -> [String; 4] {
    let chardev = format!("socket,id=disk{number},path={}", socket.display());
    let device = format!("vhost-user-blk-pci,chardev=disk{number},num-queues=2");
    ["-chardev", &chardev, "-device", &device].map(str::to_owned)
}

fn log(folder: &Path, name: &str) -> String {
    String::from_utf8_lossy(&fs::read(folder.join(name)).unwrap_or_default()).into_owned()
}

/// Emulated, since test machines have no KVM. The server reads and writes the guest's memory, so it is shared.
const MACHINE: [&str; 13] = [
    "-machine",
    "q35,accel=tcg,memory-backend=memory",
    "-object",
    "memory-backend-memfd,id=memory,size=768M,share=on",
    "-m",
    "768M",
    "-cpu",
    "max",
    "-smp",
    "2",
    "-nodefaults",
    "-display",
    "none",
];
/// Of the guest, emulated, on a machine that is busy with other tests.
const BOOT_LIMIT: Duration = Duration::from_secs(90);
const COMMAND_LIMIT: Duration = Duration::from_secs(60);
