//! Long work that is asked how far it has come, or stopped in the middle; and storage that fails.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::info::CHAIN;
use super::scene::{Scene, tool};

/// A commit that takes seconds.
fn slow_commit(scene: &Scene) -> Child {
    let mut command = tool();
    command.args(["commit", "-r", "40k", "c.qcow2"]).current_dir(scene.ours());
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

fn signal(child: &Child, name: &str) {
    assert!(Command::new("kill").args([name, &child.id().to_string()]).status().unwrap().success());
}

/// Waits until nobody has an image locked: the kernel takes the ring of who was killed apart when it finds the time, and
/// its files with that.
fn let_go(scene: &Scene, image: &str) {
    let end = Instant::now() + Duration::from_secs(30);
    while !super::locked::is_free(&scene.ours().join(image)) {
        assert!(Instant::now() < end, "{image} stays locked");
    }
}

/// The child is at work once it has the image locked.
fn at_work(scene: &Scene) {
    while super::locked::is_free(&scene.ours().join("c.qcow2")) {}
    // The first piece is copied at once, and then it waits.
    let (_sender, never) = std::sync::mpsc::channel::<()>();
    let _ = never.recv_timeout(Duration::from_millis(300));
}

#[test]
fn a_signal_asks_how_far_it_has_come() {
    let scene = Scene::new(CHAIN);
    let mut child = slow_commit(&scene);
    at_work(&scene);
    signal(&child, "-USR1");
    let _ = std::sync::mpsc::channel::<()>().1.recv_timeout(Duration::from_millis(200));
    let is_running = child.try_wait().unwrap().is_none();
    signal(&child, "-KILL");
    child.wait().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(is_running, "the signal ended it: {said}");
    assert!(said.starts_with("    (") && said.ends_with("/100%)\n"), "{said}");
}

#[test]
fn who_is_stopped_in_the_middle_leaves_the_disk_as_it_was() {
    for name in ["-INT", "-TERM", "-KILL"] {
        let mut scene = Scene::new(CHAIN);
        let before = scene.contents("c.qcow2");
        let mut child = slow_commit(&scene);
        at_work(&scene);
        signal(&child, name);
        assert!(!child.wait().unwrap().success(), "it had come to its end already");
        ["a.qcow2", "b.qcow2", "c.qcow2"].into_iter().for_each(|image| let_go(&scene, image));
        assert!(scene.contents("c.qcow2") == before, "{name}: the disk is another one");
        // Leaks are no harm.
        for image in ["b.qcow2", "c.qcow2"] {
            let checked = Command::new("qemu-img").args(["check", image]).current_dir(scene.ours()).output().unwrap();
            assert!(
                matches!(checked.status.code(), Some(0 | 3)),
                "{name}: {}",
                String::from_utf8_lossy(&checked.stdout)
            );
        }
        // And it can be done again.
        scene.same(&["commit c.qcow2"]);
        assert!(scene.contents("c.qcow2") == before);
    }
}

#[test]
fn storage_that_fails_has_the_same_code() {
    let failing = |file: &str, format: &str| {
        format!(
            "'json:{{\"driver\":\"{format}\",\"file\":{{\"driver\":\"blkdebug\",\"image\":{{\"driver\":\"file\",\"filename\":\"{file}\"}},\
             \"inject-error\":[{{\"event\":\"none\",\"iotype\":\"read\",\"sector\":128}}]}}}}'"
        )
    };
    let mut scene = Scene::new(CHAIN);
    let why = "what failed is said in our words";
    scene.same_code(
        why,
        &[&format!("compare {} r.raw", failing("r.raw", "raw")), &format!("compare r.raw {}", failing("r.raw", "raw"))],
    );
}

#[test]
fn a_copy_says_how_far_it_has_come() {
    let scene = Scene::new(&["create -q -f raw a.raw 8M", "qemu-io -f raw -c 'write -P 1 0 8M' a.raw"]);
    let mut command = tool();
    command.args(["convert", "-m", "1", "-r", "1M", "-f", "raw", "-O", "raw", "a.raw", "t.raw"]);
    let mut child = command.current_dir(scene.ours()).stderr(Stdio::piped()).spawn().unwrap();
    while !scene.ours().join("t.raw").exists() {}
    for _ in 0..3 {
        let _ = std::sync::mpsc::channel::<()>().1.recv_timeout(Duration::from_millis(300));
        signal(&child, "-USR1");
    }
    let _ = std::sync::mpsc::channel::<()>().1.recv_timeout(Duration::from_millis(300));
    assert!(child.try_wait().unwrap().is_none(), "the signal ended it");
    signal(&child, "-TERM");
    child.wait().unwrap();
    let mut said = String::new();
    child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    let lines: Vec<_> = said.lines().collect();
    assert!(
        !lines.is_empty() && lines.iter().all(|line| line.starts_with("    (") && line.ends_with("/100%)")),
        "{said}"
    );
}

/// Wherever it is stopped, the disk is the same.
#[test]
fn a_rebase_that_is_stopped_loses_nothing() {
    let mut scene = Scene::new(&[
        "create -q -f qcow2 base.qcow2 64M",
        "qemu-io -c 'write -P 1 0 64M' base.qcow2",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
        "qemu-io -c 'write -P 2 1M 1M' top.qcow2",
    ]);
    let before = scene.contents("top.qcow2");
    let image = scene.ours().join("top.qcow2");
    let fresh = std::fs::read(&image).unwrap();
    let mut stopped = 0;
    for (number, name) in ["-INT", "-TERM", "-HUP", "-KILL"].into_iter().cycle().take(16).enumerate() {
        std::fs::write(&image, &fresh).unwrap();
        let mut command = tool();
        command.args(["rebase", "-b", "", "top.qcow2"]).current_dir(scene.ours());
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        while super::locked::is_free(&image) && child.try_wait().unwrap().is_none() {}
        let pause = Duration::from_millis(number as u64 * 4);
        let _ = std::sync::mpsc::channel::<()>().1.recv_timeout(pause);
        if child.try_wait().unwrap().is_none() {
            signal(&child, name);
        }
        stopped += usize::from(!child.wait().unwrap().success());
        let_go(&scene, "top.qcow2");
        assert!(scene.contents("top.qcow2") == before, "{name} after {pause:?}: the disk is another one");
        let checked = Command::new("qemu-img").args(["check", "top.qcow2"]).current_dir(scene.ours()).output().unwrap();
        assert!(matches!(checked.status.code(), Some(0 | 3)), "{}", String::from_utf8_lossy(&checked.stdout));
    }
    assert!(stopped > 3, "only {stopped} of them were stopped");
    scene.same(&["rebase -b '' top.qcow2"]);
    assert!(scene.contents("top.qcow2") == before);
}

#[test]
fn long_work_shows_how_far_it_has_come() {
    let scene = Scene::new(CHAIN);
    for line in [
        "convert -p -O raw c.qcow2 1.raw",
        "compare -p c.qcow2 c.qcow2",
        "rebase -p -b a.qcow2 -F qcow2 c.qcow2",
        "amend -p -o lazy_refcounts=on a.qcow2",
        "commit -p b.qcow2",
    ] {
        let (theirs, ours) = scene.both(line);
        for done in [&theirs, &ours] {
            let shown = done.out.starts_with("    (0.00/100%)\r") && done.out.contains("    (100.00/100%)\r");
            assert!(done.code == Some(0) && shown, "{line}: {:?} {}", done.out, done.err);
        }
    }
}

/// How often an image is let go and taken again while a line runs, as far as somebody sees who looks at it all the time.
fn gaps(scene: &Scene, line: &str) -> usize {
    let image = scene.ours().join("c.qcow2");
    let words = line.split(' ').map(|word| word.trim_matches('\''));
    let mut child = tool().args(words).current_dir(scene.ours()).spawn().unwrap();
    let mut seen = vec![true];
    while child.try_wait().unwrap().is_none() {
        // The kernel's list is read in pieces, and may lack one.
        let is_free = (0..4).all(|_| super::locked::is_free(&image));
        if seen.last() != Some(&is_free) {
            seen.push(is_free);
        }
    }
    assert!(child.wait().unwrap().success(), "{line}");
    seen.windows(3).filter(|window| *window == [false, true, false]).count()
}

/// From the first look at the disk until it stands on another one nobody else can come to it.
#[test]
fn a_rebase_keeps_its_lock() {
    let scene = Scene::new(CHAIN);
    let mut amended = 0;
    for number in 0..10 {
        let base = if number % 2 == 0 { "a.qcow2" } else { "b.qcow2" };
        assert_eq!(gaps(&scene, &format!("rebase -b {base} -F qcow2 c.qcow2")), 0);
        assert_eq!(gaps(&scene, &format!("rebase -u -b {base} -F qcow2 c.qcow2")), 0);
        // Here it is let go, which is seen.
        let switch = if number % 2 == 0 { "on" } else { "off" };
        amended += gaps(&scene, &format!("amend -o lazy_refcounts={switch} c.qcow2"));
    }
    assert!(amended > 0, "whoever looks sees nothing");
}
