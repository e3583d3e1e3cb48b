//! `convert`.

use std::os::unix::process::ExitStatusExt;
use std::process::Command;
use std::time::Duration;

use super::scene::{Scene, tool};

/// Raw and qcow2 images with data, zeroes and nothing in them.
const IMAGES: &[&str] = &[
    "create -q -f raw a.raw 4M",
    "qemu-io -f raw -c 'write -P 1 0 1M' -c 'write -P 2 2M 64k' -c 'write -P 0 2M 16k' -c 'write -P 3 3M 512' a.raw",
    "create -q -f raw small.raw 2M",
    "qemu-io -f raw -c 'write -P 9 0 2M' small.raw",
    "create -q -f raw big.raw 8M",
    "qemu-io -f raw -c 'write -P 8 0 8M' big.raw",
    "create -q -f qcow2 b.qcow2 4M",
    "qemu-io -c 'write -P 3 64k 128k' -c 'write -z 1M 64k' -c 'write -P 5 1M 1k' -c 'write -P 6 4095k 1k' b.qcow2",
    "snapshot -c s1 b.qcow2",
    "qemu-io -c 'write -P 4 64k 64k' b.qcow2",
    "bitmap --add b.qcow2 b0",
    "bitmap --add -g 4k --disable b.qcow2 b1",
    "qemu-io -c 'write -P 4 256k 64k' b.qcow2",
    "create -q -f qcow2 -b b.qcow2 -F qcow2 o.qcow2 6M",
    "qemu-io -c 'write -P 7 0 64k' -c 'write -z 64k 64k' -c 'write -P 7 5M 64k' o.qcow2",
    "convert -c -O qcow2 b.qcow2 c.qcow2",
];

#[test]
fn formats() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "convert -f raw -O raw a.raw 1.raw",
        "convert -f raw a.raw 2.raw",
        "convert -f raw -O qcow2 a.raw 3.qcow2",
        "convert -O raw b.qcow2 4.raw",
        "convert -O qcow2 o.qcow2 5.qcow2",
        "convert -O raw o.qcow2 6.raw",
        "convert -O raw c.qcow2 7.raw",
        "convert -O qcow2 -o compat=0.10 b.qcow2 8.qcow2",
        "convert -O qcow2 -o cluster_size=4k,extended_l2=off b.qcow2 9.qcow2",
        "convert -O qcow2 -o cluster_size=64k,extended_l2=on b.qcow2 10.qcow2",
        "convert -O qcow2 -o size=8M b.qcow2 11.qcow2",
        "convert -O qcow2 -o preallocation=full b.qcow2 12.qcow2",
        "convert -O qcow2 -o preallocation=metadata b.qcow2 13.qcow2",
        "convert -O raw -o preallocation=falloc b.qcow2 14.raw",
        "convert -U b.qcow2 15.raw",
        "convert -O qcow2 a.raw 16.qcow2",
    ]);
    scene.same_images(&["1.raw", "2.raw", "3.qcow2", "4.raw", "5.qcow2", "6.raw", "7.raw", "8.qcow2", "9.qcow2"]);
    scene.same_images(&["10.qcow2", "11.qcow2", "12.qcow2", "13.qcow2", "14.raw", "15.raw", "16.qcow2"]);
}

#[test]
fn ways_of_copying() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "convert -W -f raw -O qcow2 a.raw 1.qcow2",
        "convert -m 1 -f raw -O qcow2 a.raw 2.qcow2",
        "convert -m 16 -W -f raw -O raw a.raw 3.raw",
        "convert -S 0 -f raw -O raw a.raw 4.raw",
        "convert -S 512 -f raw -O qcow2 a.raw 5.qcow2",
        "convert -S 64k -O raw b.qcow2 6.raw",
        "convert -C -f raw -O raw a.raw 7.raw",
        "convert -t none -T none -f raw -O raw a.raw 8.raw",
        "convert -t writethrough -T unsafe -f raw -O raw a.raw 9.raw",
        "convert -r 100M -f raw -O raw a.raw 10.raw",
        "convert -c -f raw -O qcow2 a.raw 11.qcow2",
        "convert -c -W -m 4 -O qcow2 -o compression_type=zstd o.qcow2 12.qcow2",
        "convert -c -O qcow2 -o cluster_size=4k b.qcow2 13.qcow2",
        "convert -O raw a.raw b.qcow2 14.raw",
        "convert -O raw b.qcow2 o.qcow2 15.raw",
        "convert -c -O qcow2 b.qcow2 a.raw o.qcow2 16.qcow2",
        "convert -q -p -f raw -O raw a.raw 17.raw",
        "convert --salvage -O qcow2 b.qcow2 18.qcow2",
        "convert -S 0 -O qcow2 b.qcow2 19.qcow2",
        "convert --image-opts -O raw driver=qcow2,file.filename=b.qcow2 20.raw",
    ]);
    scene.same_images(&[
        "1.qcow2", "2.qcow2", "3.raw", "4.raw", "5.qcow2", "6.raw", "7.raw", "8.raw", "9.raw", "10.raw",
    ]);
    scene.same_images(&["11.qcow2", "12.qcow2", "13.qcow2", "14.raw", "15.raw", "16.qcow2", "17.raw", "18.qcow2"]);
    scene.same_images(&["19.qcow2", "20.raw"]);
}

/// Zeroes that are written like data are compressed like data: an extent of them is larger than a cluster.
#[test]
fn zeroes_are_compressed_too() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "create -q -f raw z.raw 3000k",
        "convert -c -S 0 -f raw -O qcow2 z.raw 1.qcow2",
        "convert -c -S 0 -f raw -O qcow2 a.raw 2.qcow2",
        "convert -c -S 0 -W -m 4 -O qcow2 -o cluster_size=4k b.qcow2 3.qcow2",
        "convert -c -S 0 -B b.qcow2 -F qcow2 -O qcow2 o.qcow2 4.qcow2",
        "create -q -f qcow2 5.qcow2 4M",
        "convert -n -c -S 0 -f raw -O qcow2 a.raw 5.qcow2",
        "convert -c -S 64k -f raw -O qcow2 a.raw 6.qcow2",
    ]);
    let names = ["1.qcow2", "2.qcow2", "3.qcow2", "4.qcow2", "5.qcow2", "6.qcow2"];
    scene.same_images(&names).same_sum_of_maps(&names);
}

#[test]
fn targets_that_are_there() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "convert -n -f raw -O raw a.raw missing.raw",
        "convert -n -f raw -O raw a.raw small.raw",
        "convert -n -f raw -O raw a.raw big.raw",
        "convert -n -O qcow2 small.raw c.qcow2",
        "create -q -f qcow2 t.qcow2 4M",
        "convert -n --target-is-zero -O qcow2 b.qcow2 t.qcow2",
        "create -q -f raw z.raw 8M",
        "convert -n --target-image-opts b.qcow2 driver=raw,file.filename=z.raw",
        "convert -n -o size=1M -O qcow2 b.qcow2 t.qcow2",
        "convert --target-is-zero -O raw b.qcow2 x.raw",
        "convert --target-image-opts -O raw b.qcow2 driver=raw,file.filename=x.raw",
        "convert --target-image-opts b.qcow2 driver=raw,file.filename=x.raw",
        "convert --target-image-opts -n -O raw b.qcow2 driver=raw,file.filename=z.raw",
    ]);
    scene.same_images(&["small.raw", "big.raw", "c.qcow2", "t.qcow2", "z.raw"]);
}

#[test]
fn targets_over_another_image() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "convert -B b.qcow2 -F qcow2 -O qcow2 o.qcow2 1.qcow2",
        "convert -o backing_file=b.qcow2,backing_fmt=qcow2 -O qcow2 o.qcow2 2.qcow2",
        "convert -c -B b.qcow2 -F qcow2 -O qcow2 o.qcow2 3.qcow2",
        "create -q -f qcow2 -b b.qcow2 -F qcow2 4.qcow2 6M",
        "convert -n -B b.qcow2 -F qcow2 -O qcow2 o.qcow2 4.qcow2",
        "convert -B b.qcow2 -O qcow2 o.qcow2 x.qcow2",
        "convert -B b.qcow2 -F qcow2 -O raw o.qcow2 x.raw",
        "convert -B b.qcow2 -F qcow2 -O qcow2 a.raw b.qcow2 x.qcow2",
        "convert -F qcow2 -O qcow2 o.qcow2 x.qcow2",
        "convert -B nofile -F qcow2 -O qcow2 o.qcow2 x.qcow2",
    ]);
    scene.same_images(&["1.qcow2", "2.qcow2", "3.qcow2", "4.qcow2"]);
}

#[test]
fn snapshots_and_bitmaps() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "convert -l s1 -O raw b.qcow2 1.raw",
        "convert -l 1 -O raw b.qcow2 2.raw",
        "convert -l snapshot.name=s1 -O raw b.qcow2 3.raw",
        "convert -l snapshot.id=1 -O qcow2 b.qcow2 4.qcow2",
        "convert -l nosuch -O raw b.qcow2 x.raw",
        "convert -f raw -l s1 -O raw a.raw x.raw",
        "convert -l s1 -O raw b.qcow2 b.qcow2 x.raw",
        "convert --bitmaps -O qcow2 b.qcow2 5.qcow2",
        "convert --bitmaps --skip-broken-bitmaps -O qcow2 b.qcow2 6.qcow2",
        "convert --bitmaps -O raw b.qcow2 x.raw",
        "convert --bitmaps -f raw -O qcow2 a.raw x.qcow2",
        "convert --skip-broken-bitmaps -O qcow2 b.qcow2 x.qcow2",
        "convert --bitmaps -O qcow2 b.qcow2 b.qcow2 x.qcow2",
    ]);
    scene.same_images(&["1.raw", "2.raw", "3.raw", "4.qcow2", "5.qcow2", "6.qcow2"]);
    let (theirs, ours) = scene.both("info --output=json 5.qcow2");
    let bitmaps = |text: &str| text.split("\"bitmaps\"").nth(1).unwrap().split("corrupt").next().unwrap().to_owned();
    assert_eq!(bitmaps(&ours.out), bitmaps(&theirs.out));
    assert!(bitmaps(&ours.out).contains("\"b0\"") && bitmaps(&ours.out).contains("\"b1\""));
}

/// Bitmaps of an image that was not closed in good order say nothing.
#[test]
fn inconsistent_bitmaps() {
    let mut scene = Scene::new(IMAGES);
    for side in [scene.theirs(), scene.ours()] {
        // Whoever ends like this leaves the bitmaps marked as being in use.
        let line = "ulimit -c 0; qemu-io -c 'write 0 64k' -c abort b.qcow2";
        let ended = Command::new("bash").args(["-c", line]).current_dir(&side).output().unwrap();
        assert!(!ended.status.success());
        let done = Command::new("qemu-img").args(["bitmap", "--add", "b.qcow2", "good"]).current_dir(&side).output();
        assert!(done.unwrap().status.success());
    }
    scene.same(&[
        "convert --bitmaps -O qcow2 b.qcow2 x.qcow2",
        "convert --bitmaps -c -O qcow2 b.qcow2 x.qcow2",
        "convert --bitmaps --skip-broken-bitmaps -O qcow2 b.qcow2 1.qcow2",
        "create -q -f qcow2 2.qcow2 4M",
        "convert -n --bitmaps -O qcow2 b.qcow2 2.qcow2",
        "convert -n --bitmaps --skip-broken-bitmaps -O qcow2 b.qcow2 2.qcow2",
        "convert -O qcow2 b.qcow2 3.qcow2",
        "measure -O qcow2 b.qcow2",
        "bitmap --clear b.qcow2 b0",
        "bitmap --merge b0 b.qcow2 good",
        "bitmap --remove b.qcow2 b0",
        "convert --bitmaps -O qcow2 b.qcow2 x.qcow2",
        "bitmap --remove b.qcow2 b1",
        "convert --bitmaps -O qcow2 b.qcow2 4.qcow2",
    ]);
    for side in [scene.theirs(), scene.ours()] {
        assert!(!side.join("x.qcow2").exists(), "it is refused before anything is made");
    }
    scene.same_images(&["1.qcow2", "2.qcow2", "3.qcow2", "4.qcow2"]).same_bitmaps(&["1.qcow2", "2.qcow2", "4.qcow2"]);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let lines: Vec<String> = [
        "a.raw",
        "",
        "-f raw -O bogus a.raw x",
        "-f bogus -O raw a.raw x",
        "-f raw -O raw nofile x",
        "-f raw -O raw a.raw nodir/x",
        "-f raw -O raw -c a.raw x",
        "-m 0 a.raw x",
        "-m 17 a.raw x",
        "-m x a.raw x",
        "-m -1 a.raw x",
        "-S x a.raw x",
        "-S 1 a.raw x",
        "-S 511 a.raw x",
        "-S 8E a.raw x",
        "-S -1 a.raw x",
        "-S 2G a.raw x",
        "-r x a.raw x",
        "-r -1 a.raw x",
        "-f raw -t bogus a.raw x",
        "-f raw -T bogus a.raw x",
        "-C -S 4k -f raw a.raw x",
        "-C -c -f raw -O qcow2 a.raw x",
        "-O qcow2 -o bogus=1 b.qcow2 x",
        "-O qcow2 -o cluster_size=x b.qcow2 x",
        "-O qcow2 -c -o preallocation=metadata b.qcow2 x",
        "--image-opts -f qcow2 -O raw driver=qcow2,file.filename=b.qcow2 x",
        "--bogus a b",
        "-Z a b",
        "-m",
        "-n -O raw -f raw a.raw a.raw",
        "-O raw -f raw a.raw ./a.raw",
    ]
    .iter()
    .map(|rest| format!("convert {rest}"))
    .collect();
    let lines: Vec<&str> = lines.iter().map(String::as_str).collect();
    let mut scene = Scene::new(IMAGES);
    scene.same(&lines);
    assert!(!scene.ours().join("x").exists());
}

#[test]
fn differences() {
    let mut scene = Scene::new(IMAGES);
    scene.codes(
        "compressed clusters are replaced",
        1,
        0,
        &["convert --target-is-zero -n -c -O qcow2 -f raw a.raw c.qcow2"],
    );
    scene.same_code("our own words", &["convert -O qcow2 -o help"]);
    scene
        .same_code("the inner parameter is said in one message", &["convert -l snapshot.bogus=1 -O raw b.qcow2 x.raw"]);
}

/// A source of 4 MiB that fails at 1 MiB, as a line's words.
const BROKEN: &str = "driver=blkdebug,image.driver=raw,image.file.driver=file,image.file.filename=a.raw,\
                      inject-error.0.event=read_aio,inject-error.0.sector=2048,inject-error.0.iotype=read";

#[test]
fn a_source_that_cannot_be_read_fails_the_copy() {
    let mut scene = Scene::new(&["create -q -f raw a.raw 4M", "qemu-io -f raw -c 'write -P 1 0 4M' a.raw"]);
    let broken = BROKEN.replace("event=read_aio,", "event=none,");
    let line = format!("convert -m 1 -q --image-opts -O raw {broken} 1.raw");
    let (theirs, ours) = scene.both(&line);
    assert_eq!((ours.code, theirs.code), (Some(1), Some(1)));
    assert!(ours.err.contains("error while reading at byte 0: Input/output error"), "{}", ours.err);
    assert!(!scene.ours().join("1.raw").exists(), "half a copy must not look whole");
    // What can be read of it is there, and it is said what is not.
    let line = format!("convert --salvage --image-opts -O raw {broken} 2.raw");
    let (theirs, ours) = scene.both(&line);
    assert_eq!((ours.code, theirs.code), (Some(0), Some(0)), "{}", ours.err);
    assert_eq!(ours.err, theirs.err);
    scene.same_images(&["2.raw"]);
}

#[test]
fn a_target_without_space_fails_the_copy() {
    let scene = Scene::new(&["create -q -f raw a.raw 4M", "qemu-io -f raw -c 'write -P 1 0 4M' a.raw"]);
    let full = "driver=blkdebug,image.driver=raw,image.file.driver=file,image.file.filename=t.raw,\
                inject-error.0.event=none,inject-error.0.sector=4096,inject-error.0.iotype=write,inject-error.0.errno=28";
    for side in [scene.theirs(), scene.ours()] {
        std::fs::File::create(side.join("t.raw")).unwrap().set_len(4 << 20).unwrap();
    }
    let line = format!("convert -f raw -n --target-is-zero --target-image-opts a.raw {full}");
    let (theirs, ours) = scene.both(&line);
    assert_eq!((ours.code, &ours.err), (theirs.code, &theirs.err));
    assert!(ours.err.contains("error while writing at byte 2097152: No space left on device"), "{}", ours.err);
}

/// Whoever is interrupted leaves nothing that looks whole.
#[test]
fn an_interrupted_copy_leaves_no_target() {
    let scene = Scene::new(&["create -q -f raw a.raw 64M", "qemu-io -f raw -c 'write -P 1 0 64M' a.raw"]);
    let folder = scene.ours();
    for signal in ["INT", "TERM"] {
        let mut child = tool()
            .args(["convert", "-r", "4M", "-f", "raw", "-O", "qcow2", "a.raw", "t.qcow2"])
            .current_dir(&folder)
            .spawn()
            .unwrap();
        let target = folder.join("t.qcow2");
        let begun = std::time::Instant::now();
        while !std::fs::metadata(&target).is_ok_and(|found| found.len() > 1 << 20) {
            assert!(begun.elapsed() < Duration::from_secs(30), "the copy does not begin");
            std::thread::yield_now();
        }
        let killed = Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap();
        assert!(killed.success());
        let status = child.wait().unwrap();
        let expected = if signal == "INT" { 130 } else { 143 };
        assert_eq!((status.code(), status.signal()), (Some(expected), None));
        assert!(!target.exists());
    }
}

#[test]
fn progress_is_shown() {
    let scene = Scene::new(IMAGES);
    let (theirs, ours) = scene.both("convert -p -f raw -O raw a.raw 1.raw");
    for done in [&theirs, &ours] {
        assert!(
            done.out.starts_with("    (0.00/100%)\r") && done.out.ends_with("    (100.00/100%)\r\n"),
            "{:?}",
            done.out
        );
    }
}
