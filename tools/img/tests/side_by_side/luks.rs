//! Secrets, and disks that they open: luks. `cryptsetup` is asked too.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use super::scene::Scene;

/// Two encrypted images, one with data, and the same data in the open.
const IMAGES: &[&str] = &[
    "create -q -f raw a.raw 1M",
    "qemu-io -f raw -c 'write -P 1 0 128k' -c 'write -P 2 512k 64k' -c 'write -P 3 1023k 512' a.raw",
    "convert @s -O luks -o key-secret=s,iter-time=10 a.raw a.luks",
    "create -q @s -f luks -o key-secret=s,iter-time=10,cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv e.luks 1M",
];

/// `cryptsetup` finds that the passphrase opens the image.
fn opens(image: &Path, passphrase: &str) -> bool {
    let mut child = Command::new("cryptsetup")
        .args(["open", "--type", "luks", "--test-passphrase", "--key-file", "-"])
        .arg(image)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Who refuses the image does not read it.
    let _ = child.stdin.take().unwrap().write_all(passphrase.as_bytes());
    child.wait().unwrap().success()
}

#[test]
fn secrets_are_taken_and_refused() {
    let mut scene = Scene::new(IMAGES);
    for folder in [scene.theirs(), scene.ours()] {
        std::fs::write(folder.join("pw"), "hello").unwrap();
        std::fs::write(folder.join("pw64"), "aGVsbG8=\n").unwrap();
    }
    // "hello" under a key, made with openssl: see the unit test of the library.
    let wrapped = "map --output json --object secret,id=k,data=0123456789abcdef0123456789abcdef --object \
                   secret,id=s,keyid=k,iv=AAECAwQFBgcICQoLDA0ODw==,format=base64,data=MYNSl5uYV6V9tOH5RSXtDA== \
                   --image-opts luks:a.luks";
    scene.same(&[
        wrapped,
        "map --output json --object secret,id=s,file=pw --image-opts luks:a.luks",
        "map --output json --object secret,id=s,file=pw64,format=base64 --image-opts luks:a.luks",
        "map --output json --object qom-type=secret,id=s,data=hello --image-opts luks:a.luks",
        "map --output json @wrong --image-opts luks:a.luks",
        "create --object secret,id=s x.raw 1M",
        "create --object secret,data=x x.raw 1M",
        "create --object nosuch,id=s x.raw 1M",
        "create --object throttle-group,id=s,nosuch=1 x.raw 1M",
        "create @s @s x.raw 1M",
        "create --object secret,id=s,file=pw,data=x x.raw 1M",
        "create --object secret,id=1s,file=pw x.raw 1M",
        "create --object secret,id=s,format=nope,data=x x.raw 1M",
        "create --object secret,id=s,data=x,keyid=k x.raw 1M",
        "create --object secret_keyring,id=s x.raw 1M",
        "create --object secret_keyring,id=s,serial=x x.raw 1M",
        "create --object secret_keyring,id=s,serial=99999999 x.raw 1M",
        "create @s --object throttle-group,id=t,x-bps-total=1000 x.raw 1M",
    ]);
    scene.same_code("why a file cannot be read is said by the kernel", &["create --object secret,id=s,file=none x 1M"]);
    scene.codes("what is no base64 is refused", 0, 1, &["create --object secret,id=s,data=xyz,format=base64 x.raw 1M"]);
    scene.same_code(
        "what stands behind a comma may be the rest of a secret",
        &["create --object secret,id=s,data=x,nosuch=1 x.raw 1M", "create --object secret,id=s,nosuch=1 x.raw 1M"],
    );
    scene.codes(
        "images refer to nothing of that kind",
        0,
        1,
        &["create --object authz-simple,id=a,identity=x x.raw 1M"],
    );
    scene.codes("bench takes objects too", 1, 0, &["bench -c 4 @s --image-opts luks:a.luks"]);
}

#[test]
fn images_are_made() {
    let mut scene = Scene::new(IMAGES);
    let lines = [
        "create @s -f luks -o key-secret=s,iter-time=10 1.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=10,cipher-alg=aes-128,cipher-mode=xts,hash-alg=sha512 2.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256 3.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=10,cipher-alg=serpent-256,ivgen-alg=plain,hash-alg=sha1 4.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=10,cipher-alg=twofish-256,cipher-mode=cbc,ivgen-alg=plain64 5.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=10,cipher-mode=ecb 6.luks 1M",
        "create @s -q -f luks -o key-secret=s,iter-time=10,size=1000 7.luks",
        "create @s -f luks -o key-secret=s,iter-time=10,preallocation=full 8.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=10,preallocation=metadata 9.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=10 10.luks 0",
    ];
    scene.same(&lines);
    for name in 1..=10 {
        let name = format!("{name}.luks");
        scene.same(&[&format!("info @s --image-opts luks:{name}"), &format!("resize @s --image-opts luks:{name} 2M")]);
        // Not every kernel has all ciphers.
        let (theirs, ours) = (opens(&scene.theirs().join(&name), "hello"), opens(&scene.ours().join(&name), "hello"));
        assert!(ours == theirs && (ours || !name.starts_with(['1', '2', '3'])), "{name}: {theirs} {ours}");
        assert!(!opens(&scene.ours().join(&name), "world"), "{name}: cryptsetup opens it with anything");
    }
    scene.same(&[
        "create -f luks x.luks 1M",
        "create -f luks -o key-secret=t x.luks 1M",
        "create @s -f luks -o key-secret=s,cipher-alg=nope x.luks 1M",
        "create @s -f luks -o key-secret=s,hash-alg=nope x.luks 1M",
        "create @s -f luks -o key-secret=s,iter-time=x x.luks 1M",
        "create @s -f luks -o key-secret=s x.luks",
        "create @s -f luks -o nosuch=s x.luks 1M",
        "create @s -f luks -b a.raw -F raw -o key-secret=s x.luks",
        "create @s -f luks -o key-secret=s,iter-time=10 none/x.luks 1M",
        "create -f qcow2 -u -b json:{\"driver\":\"luks\",\"file\":\"x\"} -F luks x.qcow2 1M",
    ]);
    scene.same_code(
        "what cannot be is said in our words",
        &[
            "create @s -f luks -o key-secret=s,iter-time=-1 x.luks 1M",
            "create @s -f luks -o key-secret=s,cipher-alg=cast5-128,cipher-mode=xts x.luks 1M",
            "create @s -f luks -o key-secret=s,cipher-alg=3des x.luks 1M",
            "create @s -f luks -o key-secret=s x.luks 7E",
        ],
    );
    scene.codes(
        "a passphrase that costs nothing to try, and hashes that are broken, are refused",
        0,
        1,
        &[
            "create @s -f luks -o key-secret=s,iter-time=0 x.luks 1M",
            "create @s -f luks -o key-secret=s,hash-alg=md5 x.luks 1M",
        ],
    );
    let ours = scene.ours_says("create -q @s -f luks -o key-secret=s,iter-time=20001 x.luks 1M");
    assert!(ours.code == Some(1) && !scene.ours().join("x.luks").exists(), "{}", ours.err);
    scene.same_code("help texts are our own", &["create -f luks -o help", "amend -f luks -o help"]);
    // What is refused for its secret leaves what was there.
    scene.same(&["create -q -f raw kept.raw 1M"]);
    for line in ["create -q -f luks -o key-secret=t kept.raw 1M", "create -q -f luks kept.raw 2M"] {
        let (_, ours) = scene.both(line);
        assert_eq!(ours.code, Some(1), "{line}");
    }
    assert_eq!(std::fs::metadata(scene.ours().join("kept.raw")).unwrap().len(), 1 << 20);
}

/// The header alone, which qemu-img 10.0.2 lists among its options and then refuses.
#[test]
fn headers_may_be_apart() {
    let mut scene = Scene::new(IMAGES);
    let why = "qemu-img does not know its own option";
    scene.codes(why, 1, 0, &["create @s -f luks -o key-secret=s,iter-time=10,detached-header=on h.luks"]);
    scene.codes(why, 1, 0, &["measure @s -O luks --size 1G -o key-secret=s,detached-header=on"]);
    // A header has no disk that could be copied to.
    scene.same_code(
        "it is said before anything is made",
        &["convert @s -O luks -o key-secret=s,detached-header=on a.raw x"],
    );
    let (header, disk) = (scene.ours().join("h.luks"), scene.ours().join("disk"));
    assert!(opens(&header, "hello"));
    std::fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let (header, disk) = (header.to_str().unwrap(), disk.to_str().unwrap());
    let both = format!("driver=luks,key-secret=s,header.driver=file,header.filename={header},file.filename={disk}");
    scene.same(&[
        &format!("convert @s -n --target-image-opts a.raw {both}"),
        &format!("compare @s --image-opts {both} driver=raw,file.filename=a.raw"),
        &format!("info @s --output json --image-opts {both}"),
    ]);
}

#[test]
fn disks_are_copied_and_compared() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "convert @s -O luks -o key-secret=s,iter-time=10 a.raw 1.luks",
        "convert @s --image-opts luks:a.luks 2.raw",
        "convert @s --image-opts -O qcow2 luks:a.luks 3.qcow2",
        "convert @s -n --target-image-opts a.raw luks:e.luks",
        "convert @s @t --image-opts -O luks -o key-secret=t,iter-time=10,cipher-alg=aes-128 luks:a.luks 4.luks",
        "convert @s -n -m 1 -W --image-opts --target-image-opts luks:a.luks luks:1.luks",
        "compare @s --image-opts luks:1.luks driver=raw,file.filename=a.raw",
        "compare @s --image-opts luks:e.luks luks:a.luks",
        "compare @s -s --image-opts luks:e.luks luks:a.luks",
        "convert @s -O luks -o key-secret=s,iter-time=10,preallocation=full a.raw 5.luks",
        "convert -O luks -o iter-time=10 a.raw x.luks",
        "convert -O raw a.luks x.raw",
        "convert @wrong --image-opts luks:a.luks x.raw",
        "convert @s -n -O luks a.raw a.luks",
        "convert @s --target-image-opts a.raw luks:a.luks",
        "convert @s -c -O luks -o key-secret=s a.raw x.luks",
        "convert @s -O luks -B a.raw -F raw -o key-secret=s a.raw x.luks",
        "compare a.luks a.raw",
        "compare @wrong --image-opts luks:a.luks luks:e.luks",
        "dd @s --image-opts bs=64k count=5 skip=1 if=luks:a.luks of=6.raw",
        "dd @s -O luks if=a.raw of=x.luks",
        "bench -c 10 a.luks",
    ]);
    scene.same_disks("luks", &["1.luks", "e.luks", "5.luks", "a.luks"]).same_images(&["2.raw", "3.qcow2", "6.raw"]);
    assert!(opens(&scene.ours().join("4.luks"), "world") && !opens(&scene.ours().join("4.luks"), "hello"));
    // What was never written of a new disk is noise, unless zeroes are written: the zeroes of the source have to be.
    let read = scene.contents("2.raw");
    assert!(
        read[..128 << 10].iter().all(|byte| *byte == 1) && read[128 << 10..512 << 10].iter().all(|byte| *byte == 0)
    );
}

#[test]
fn sizes_and_maps() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "map @s --image-opts luks:a.luks",
        "map @s --output json --image-opts luks:a.luks",
        "map a.luks",
        "check @s --image-opts luks:a.luks",
        "check a.luks",
        "resize @s --image-opts luks:a.luks 2M",
        "resize @s --image-opts luks:a.luks 1M",
        "resize @s --shrink --image-opts luks:a.luks 1M",
        "resize @s --image-opts luks:a.luks +512",
        "resize a.luks 1M",
        "snapshot -l a.luks",
        "snapshot @s -l --image-opts luks:a.luks",
        "rebase -u -b a.raw -F raw a.luks",
        "rebase @s -u -b a.raw -F raw --image-opts luks:a.luks",
        "commit @s --image-opts luks:a.luks",
        "measure --size 1G -O luks",
        "measure @s --size 1G -O luks -o key-secret=s,iter-time=10",
        "measure @s --size 1G -O luks -o key-secret=s,iter-time=10,cipher-alg=aes-128,cipher-mode=cbc",
        "measure @s --size 1G --output json -O luks -o key-secret=s,iter-time=10,cipher-alg=serpent-192",
        "measure @s --size 1024 -O luks -o key-secret=s,iter-time=10",
        "measure @s -O luks -o key-secret=s,iter-time=10 a.raw",
        "measure @s -O luks -o key-secret=s,iter-time=10 --image-opts luks:a.luks",
        "measure @s -O qcow2 --image-opts luks:a.luks",
        "measure -O luks a.luks",
    ]);
    let lines = ["compare @s --image-opts luks:a.luks driver=raw,file.filename=a.raw"];
    scene.same(&lines);
}

#[test]
fn images_stand_on_encrypted_ones() {
    let mut scene = Scene::new(IMAGES);
    scene.same(&[
        "create @s -f qcow2 -F luks -b 'json:{\"driver\":\"luks\",\"key-secret\":\"s\",\"file\":{\"driver\":\"file\",\"filename\":\"a.luks\"}}' o.qcow2",
        "compare @s o.qcow2 a.raw",
        "map @s --output json o.qcow2",
        "create -q -f qcow2 -u -b a.luks -F luks p.qcow2 1M",
        "convert @s -n --target-image-opts a.raw driver=qcow2,file.filename=p.qcow2,backing.driver=luks,backing.key-secret=s,backing.file.filename=e.luks",
        "rebase @s -b '' --image-opts driver=qcow2,file.filename=o.qcow2,backing.driver=luks,backing.key-secret=s,backing.file.filename=a.luks",
        "commit @s -d --image-opts driver=qcow2,file.filename=p.qcow2,backing.driver=luks,backing.key-secret=s,backing.file.filename=e.luks",
        "compare p.qcow2 a.raw",
    ]);
    scene.same_images(&["o.qcow2"]).same_disks("luks", &["a.luks", "e.luks"]);
}

#[test]
fn key_slots_are_changed() {
    let mut scene = Scene::new(IMAGES);
    let slots = "info @s --image-opts luks:a.luks";
    scene.same(&[
        "amend @s @t --image-opts -o state=active,new-secret=t,iter-time=10 luks:a.luks",
        slots,
        "amend @s @t --image-opts -o state=active,new-secret=t,keyslot=5,iter-time=10 luks:a.luks",
        slots,
        "amend @s @t --force --image-opts -o state=active,new-secret=t,keyslot=5,iter-time=10 luks:a.luks",
        "amend @s @t --image-opts -o state=inactive,old-secret=t luks:a.luks",
        slots,
        "amend @s @t --image-opts -o state=active,new-secret=t,keyslot=7,iter-time=10 luks:a.luks",
        "amend @s @t --image-opts -o state=inactive,keyslot=7 luks:a.luks",
        "amend @s @t --image-opts -o state=active,new-secret=t,keyslot=7,iter-time=10 luks:a.luks",
        slots,
        "amend -f luks -o state=active,new-secret=t a.luks",
        "amend @s --image-opts -o state=active luks:a.luks",
        "amend @s @t --image-opts -o new-secret=t luks:a.luks",
        "amend @s --image-opts -o state=nope luks:a.luks",
        "amend @s @t --image-opts -o state=active,new-secret=t,old-secret=s luks:a.luks",
        "amend @s @t --image-opts -o state=inactive,new-secret=t luks:a.luks",
        "amend @s --image-opts -o key-secret=s luks:a.luks",
        "amend @s --image-opts -o size=4M luks:a.luks",
        "amend @s --image-opts -o nosuch=4M luks:a.luks",
        "amend @s --image-opts -o state=active,new-secret=q luks:a.luks",
        "amend @s --image-opts -o state=active,iter-time=x luks:a.luks",
        "amend @s --image-opts -o state=active,keyslot=x luks:a.luks",
        "amend @wrong --image-opts -o state=inactive,keyslot=1 luks:a.luks",
        "amend -o help a.luks",
    ]);
    scene.same_code(
        "what is refused of key slots is said in our words",
        &[
            "amend @s @t --image-opts -o state=active,new-secret=t,keyslot=7,iter-time=10 luks:a.luks",
            "amend @s @t --image-opts -o state=active,new-secret=t,keyslot=9 luks:a.luks",
            "amend @s @t --image-opts -o state=active,new-secret=t,keyslot=-1 luks:a.luks",
            "amend @s --image-opts -o state=inactive luks:a.luks",
            "amend @s --image-opts -o state=inactive,keyslot=0 luks:e.luks",
            "amend @s --image-opts -o state=inactive,old-secret=s luks:e.luks",
        ],
    );
    scene.codes(
        "material that could not be overwritten then is now",
        1,
        0,
        &["amend @s --image-opts -o state=inactive,keyslot=3 luks:a.luks"],
    );
    scene.codes(
        "a passphrase that costs nothing to try is refused",
        0,
        1,
        &["amend @s @t --image-opts -o state=active,new-secret=t,keyslot=2,iter-time=0 luks:a.luks"],
    );
    let ours = scene.ours().join("a.luks");
    assert!(opens(&ours, "hello") && opens(&ours, "world"));
    scene.same(&["amend @s --image-opts --force -o state=inactive,old-secret=s luks:e.luks"]);
    assert!(!opens(&scene.ours().join("e.luks"), "hello"));
    scene.same_disks("luks", &["a.luks"]);
}

/// Of LUKS2, which QEMU takes for raw.
#[test]
fn the_newer_version_is_known() {
    let mut scene = Scene::new(IMAGES);
    for folder in [scene.theirs(), scene.ours()] {
        let image = folder.join("2.luks");
        std::fs::write(folder.join("pw"), "hello").unwrap();
        std::fs::File::create(&image).unwrap().set_len(17 << 20).unwrap();
        let made = Command::new("cryptsetup")
            .args(["luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"])
            .args([image.as_os_str(), folder.join("pw").as_os_str()])
            .status()
            .unwrap();
        assert!(made.success());
    }
    let why = "LUKS2 is opened here";
    scene.codes(why, 1, 0, &["convert @s -n --target-image-opts a.raw luks:2.luks"]);
    let (_, ours) = scene.both("compare @s --image-opts luks:2.luks driver=raw,file.filename=a.raw");
    assert_eq!((ours.code, ours.out.contains("identical")), (Some(0), true), "{}", ours.err);
    let (_, ours) = scene.both("info @s --output json --image-opts luks:2.luks");
    assert!(ours.out.contains("\"version\": 2"), "{}{}", ours.out, ours.err);
    // Its bytes are not taken for those of a disk.
    scene.codes("it is known by its first bytes", 0, 1, &["convert -O raw 2.luks x.raw", "map 2.luks"]);
}
