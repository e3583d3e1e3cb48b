//! `trellis-io` beside `qemu-io` 10.0.2: each case runs both on copies of the same images and compares exit code, both
//! outputs (times and speeds masked) and the images that are left. What is meant to be different is in docs/trellis-io.md
//! and is tested in `differences.rs`.
#![expect(clippy::unwrap_used, reason = "a test says by failing what was missing")]

mod differences;
mod encrypted;
mod support;

use self::support::Bench;

/// Runs every line of commands by both on fresh images.
fn alike(options: &[&str], image: &str, lines: &[&[&str]]) {
    let bench = Bench::new();
    for commands in lines {
        let mut arguments: Vec<&str> = options.to_vec();
        arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
        if !image.is_empty() {
            arguments.push(image);
        }
        bench.same(&arguments, "");
    }
}

const RAW: &[&str] = &["-f", "raw"];
const QCOW2: &[&str] = &["-f", "qcow2"];

#[test]
fn reads_and_writes() {
    alike(
        RAW,
        "a.raw",
        &[
            &["write -P 1 0 4k", "read -P 1 0 4k", "read -P 2 0 4k", "read -v 0 32", "read -vq 4080 32"],
            &["write -C 0 1k", "read -C 0 1k", "read -qC 0 1", "read -vC 0 16", "read -v 16 40", "read -v 0x10 0x10"],
            &["write 0 0", "read 0 0", "write 512 513", "write 1 2", "read 1 2", "write -q 0 1k", "read -q 0 1k"],
            &["write 1M 1", "read 1M 1", "read 2M 512", "write 9223372036854775807 512", "writev 1M 1", "readv 1M 1k"],
            &["read -P 0x41 0 1", "write -P 0x41 0 10", "read -P 65 0 10", "write -P 0101 0 10", "read -P 65 0 10"],
            &["write -P 65 0 10", "read -P 65 -s 2 0 10", "read -P 65 -l 4 0 10", "read -P 65 -s 2 -l 4 0 12"],
            &["write -P 65 0 10", "read -P 65 -s 8 -l 4 0 12", "read -P 0 -s 10 0 12", "read -P 1 -s 10 0 10"],
            &["write -s pattern 0 20", "read -v 0 20", "write -s nofile 0 20", "write -s /dev/null 0 20"],
            &["write -f 0 4k", "write -r 0 4k", "read -r 0 4k", "write -p 0 4k", "read -p 0 4k", "writev -f 0 1k"],
            &[
                "write -z 0 4k",
                "write -zu 0 4k",
                "write -zn 0 4k",
                "write -znu 0 4k",
                "write -zf 0 4k",
                "write -z 1 4k",
            ],
            &["write -znu 0 3G", "write -zn 0 3G"],
            &[
                "write -c 0 4k",
                "write -cz 0 4k",
                "write -b 0 4k",
                "read -b 0 4k",
                "write -bc 0 4k",
                "write -bP 1 0 512",
            ],
            &["writev -P 3 0 1k 2k", "readv -P 3 0 1k 2k", "readv -v 0 16 16", "readv -P 4 0 1k", "writev 0 512 513"],
            &["writev 0 0", "writev -q 0 0 0", "writev 0 1 2 3", "writev -r 0 1k", "readv -C 0 1k"],
            &["read 0.5k 1", "read 1b 1", "read +1 1", "read  0   1", "read 1k 010", "read -- 0 1", "read 0 1 -q"],
            &["write -P 0 0 1M", "read 0 1M", "read 0 1537", "read 0 1023k", "write 0 700k", "length"],
            &["read -P 1 -P 0 0 1", "read -CC 0 1", "read -P 1 -q 0 1", "read -P 1 -q 4 1"],
            &["r 0 1", "w 0 512", "f", "t 1M", "l", "i", "d 0 1", "a 0", "c"],
        ],
    );
}

#[test]
fn what_is_no_command_is_refused_in_the_same_words() {
    alike(
        RAW,
        "a.raw",
        &[
            &["write 0", "write", "write 0 x", "write x 1", "write -1 4", "write 0 -1", "read 0 1 2", "read 1.5 1"],
            &["write 0 9223372036854775807", "write 0 2147483648", "write 0 2147483647", "read 0 3G", "write 0 2G"],
            &["write -Q 0 1", "read -P 256 0 1", "read -P -1 0 1", "read -P x 0 1", "read -P", "read -s 1 0 4"],
            &[
                "read -P 65 -s 11 0 10",
                "read -P 65 -l 11 0 10",
                "read -P 65 -s -1 0 10",
                "read -l 1 0 4",
                "read -l x 0 1",
            ],
            &[
                "write -z -P 1 0 4k",
                "write -u 0 4k",
                "write -n 0 4k",
                "write -bz 0 4k",
                "write -bf 0 4k",
                "write -zr 0 4k",
            ],
            &["write -s f -P 1 0 20", "write -z -s f 0 20", "write -fc 0 4k", "write -i 0 1", "writev -z 0 4k"],
            &[
                "write -c 1 512",
                "write -c 0 1",
                "read -b 1 512",
                "write -c 1 9G",
                "write -zr 0 9G",
                "write -s nofile 0 x",
            ],
            &[
                "writev 0",
                "readv 0",
                "writev 0 x",
                "writev x 1",
                "writev 0 1k -1",
                "readv 0 2147483647 1",
                "writev 0 1G 1G",
            ],
            &[
                "readv -b 0 1",
                "writev -u 0 1",
                "read 1KiB 1",
                "read 1e2 1",
                "read \" 0\" 1",
                "read '0' 1",
                "read\t0\t1",
            ],
            &["read -q -- -1 1", "read 0 -q 1", "read -q0 0 1", "read -a 0 1", "read -h", "read 0"],
            &[
                "flush 1",
                "discard 0",
                "discard x 1",
                "discard 0 x",
                "discard 0 2147483648",
                "discard 0 3G",
                "discard -x 0 1",
            ],
            &["alloc x", "alloc 0 x", "alloc -1", "alloc", "alloc 0 1 2", "map 1", "length 1", "info 1", "close 1"],
            &["truncate x", "truncate -1", "truncate", "truncate -m bogus 1M", "truncate -x 1", "truncate -m"],
            &["truncate -m falloc -m off 3M", "truncate -m falloc", "truncate 8E", "truncate -m off x"],
            &["sleep", "sleep x", "sleep -1", "sleep 1 2", "sleep 10k", "sleep 1.5", "sleep 0x1", "sleep 010"],
            &[
                "help nothing",
                "help read write",
                "bogus",
                "bogus 1 2",
                "",
                "  ",
                "rv 0 1",
                "s",
                "m",
                "b x y",
                "help -x",
            ],
            &["sigraise", "sigraise x", "sigraise 1 2", "break a", "resume", "remove_break", "wait_break a b"],
            &["aio_write 0", "aio_write 0 x", "aio_write x 1", "aio_flush 1", "aio_write -n 0 1", "aio_write -u 0 4k"],
            &["aio_write -z 0 1k 1k", "aio_write -c 0 1k", "aio_read -b 0 1"],
            &[
                "open a.raw",
                "open",
                "open -x a.raw",
                "open a b",
                "open -t bogus a",
                "open -d bogus a",
                "open -i bogus a",
            ],
            &["reopen x", "reopen -rw", "reopen -c bogus", "reopen -r -o read-only=off", "reopen -o bogus=1"],
            &["reopen -c writeback -o cache.direct=on", "reopen -o driver=qcow2", "reopen -o file.filename=b.qcow2"],
            &["zone_report 0 1", "zone_open 0 1", "zone_append 0 512", "zone_append 0 512 512", "zone_report"],
            &["zone_report x 1", "zone_reset 0 1", "zone_finish 0 1", "zone_close 0 1", "zone_open 0 x"],
            &["break pwritev A", "remove_break A", "resume A"],
        ],
    );
}

#[test]
fn without_an_image_there_is_little_to_do() {
    let lines: &[&[&str]] = &[
        &["read 0 1"],
        &["close"],
        &["aio_flush"],
        &["length", "map", "info"],
        &["help quit"],
        &["sleep 1"],
        &["resume x", "reopen -r", "zone_report 0 1"],
        &["open nofile"],
        &["open -f raw a.raw"],
        &["open a.raw", "read 0 1"],
        &["open b.qcow2", "read 0 1", "close", "read 0 1", "open -r b.qcow2", "write 0 1", "close", "close"],
        &["open -o driver=qcow2,file.filename=b.qcow2", "info", "length"],
        &["open -o driver=qcow2 b.qcow2", "length"],
        &["open -o driver=bogus a.raw"],
        &["open -o driver=raw,file.filename=nofile"],
        &["quit", "read 0 1"],
        &["q"],
    ];
    alike(&[], "", &lines.iter().filter(|line| line[0] != "help quit").copied().collect::<Vec<_>>());
}

#[test]
fn asynchronous_requests() {
    alike(
        RAW,
        "a.raw",
        &[
            &["aio_write -P 5 0 4k", "aio_flush", "aio_read -P 5 0 4k", "aio_flush", "aio_read -P 6 0 4k", "aio_flush"],
            &["aio_read -v 0 32", "aio_flush", "aio_write -z 0 4k", "aio_flush", "aio_write -zu 0 4k", "aio_flush"],
            &["aio_write -i 0 1k", "aio_read -i 0 1k", "aio_flush"],
            &["aio_read 1M 1k", "aio_flush", "aio_write 1M 1k", "aio_flush", "aio_write -z 1M 1k", "aio_flush"],
            &["aio_write -f 0 4k", "aio_flush", "aio_read -C 0 4k", "aio_flush", "aio_write -q 0 1k", "aio_flush"],
            &["aio_write -P 1 0 1M", "aio_flush", "aio_read -q -P 1 0 512 512"],
            &["aio_read -P 9 0 1M"],
        ],
    );
}

#[test]
fn the_whole_image() {
    alike(
        RAW,
        "a.raw",
        &[
            &["flush", "discard 0 4k", "discard -q 0 4k", "discard -C 0 4k", "discard 1 1", "discard 1M 1"],
            &["alloc 0", "alloc 0 4k", "alloc 0 1", "alloc 1M", "alloc 1M 1", "alloc 2M 5", "map"],
            &["truncate 2M", "length", "map", "truncate 1M", "length", "truncate -m off 2M", "truncate -m falloc 3M"],
            &["truncate -m full 4M", "length", "info", "truncate 1k 1k", "length", "truncate 0", "length", "map"],
            &["truncate 700", "length", "map", "alloc 0 1k", "alloc 0 512", "write 0 1k", "read 0 700"],
        ],
    );
    alike(
        QCOW2,
        "b.qcow2",
        &[
            &["write 64k 128k", "alloc 0", "alloc 64k", "alloc 64k 64k", "alloc 0 4M", "map", "info", "length"],
            &["write 64k 128k", "discard 64k 64k", "read -P 0 64k 64k", "write -z 192k 64k", "alloc 192k 64k"],
            &["write 0 1M", "write -zu 64k 64k", "map", "write -z 0 1k", "write -zn 0 1k", "write -zn 0 64k"],
            &["write -c 1M 64k", "write -c 1M 32k", "write -c 1 64k", "write -c 2M 128k", "write -C -c 3M 64k", "map"],
            &["truncate 8M", "length", "map", "truncate -m full 16M", "truncate -m metadata 17M", "length"],
            &["truncate 4M", "truncate 1M", "length"],
        ],
    );
    alike(QCOW2, "o.qcow2", &[&["map", "alloc 0 1M", "read -P 7 0 64k", "write 0 512", "map", "read -P 7 512 1k"]]);
    alike(RAW, "b.qcow2", &[&["length", "map", "info"]]);
    alike(
        &["-d", "ignore", "-f", "qcow2"],
        "b.qcow2",
        &[&["write 0 1M", "discard 0 64k", "read -P 0xcd 0 64k", "map"]],
    );
    alike(&["-d", "unmap", "-f", "qcow2"], "b.qcow2", &[&["write 0 1M", "discard 0 64k", "read -P 0 0 64k"]]);
}

#[test]
fn ways_of_opening() {
    let both: &[&[&str]] = &[&["read 0 512", "write 0 512", "length"]];
    for options in [
        &["-r", "-f", "raw"][..],
        &["-s", "-f", "raw"],
        &["-n", "-f", "raw"],
        &["-n", "-m", "-f", "raw"],
        &["-C", "-f", "raw"],
        &["-C", "-r", "-f", "raw"],
        &["-U", "-f", "raw"],
        &["-U", "-r", "-f", "raw"],
        &["-t", "none", "-f", "raw"],
        &["-t", "unsafe", "-f", "raw"],
        &["-t", "directsync", "-f", "raw"],
        &["-t", "writethrough", "-f", "raw"],
        &["-t", "bogus", "-f", "raw"],
        &["-d", "bogus", "-t", "bogus"],
        &["-d", "unmap", "-f", "raw"],
        &["-i", "bogus", "-f", "raw"],
        &["-i", "threads", "-f", "raw"],
        &["-k", "-f", "raw"],
        &["-k", "-n", "-f", "raw"],
        &["-f", "bogus"],
        &["-f", "qcow2"],
        &[],
    ] {
        alike(options, "a.raw", both);
    }
    alike(&[], "b.qcow2", both);
    alike(&["-f", "raw"], "nofile", both);
    alike(&["-f", "raw"], "/tmp", both);
    alike(&["-s", "-r", "-f", "qcow2"], "b.qcow2", &[&["info"]]);
    alike(&["-s"], "b.qcow2", &[&["write 0 64k", "read -P 0xcd 0 64k", "map", "info"]]);
    alike(&["-C", "-f", "qcow2"], "o.qcow2", &[&["info", "map", "read -P 7 0 64k", "map"]]);
    let options = "driver=raw,file.filename=a.raw";
    alike(&["--image-opts"], options, &[&["read 0 512", "write 0 1", "info"]]);
    alike(&["--image-opts", "-f", "raw"], options, &[&["read 0 512"]]);
    alike(&["--image-opts"], "driver=bogus", &[&["read 0 512"]]);
    alike(&["--image-opts"], "driver=raw,file.filename=nofile", &[&["read 0 512"]]);
    alike(&[], "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"a.raw\"}}", &[&["read 0 512"]]);
    let throttled = "driver=throttle,throttle-group=x,file.driver=raw,file.file.driver=file,file.file.filename=a.raw";
    alike(&["--object", "throttle-group,id=x", "--image-opts"], throttled, &[&["read 0 512", "write 0 1k"]]);
    alike(&["--object", "bogus,id=x", "-f", "raw"], "a.raw", &[&["read 0 512"]]);
}

/// Whatever stands above it: what was taken for raw cannot be made an image that names a file. An overlay can.
#[test]
fn a_guessed_disk_does_not_become_an_image() {
    let bench = Bench::new();
    let mut start = b"QFI\xfb\0\0\0\x03".to_vec();
    start.resize(512, 0);
    std::fs::write(bench.path().join("origin/start"), start).unwrap();
    for options in [&["-C"][..], &[], &["-s"], &["-C", "-s"], &["-C", "-t", "none"], &["-C", "-f", "raw"]] {
        let write = ["-c", "write -s start 0 512", "-c", "write -s start 512 512", "a.raw"];
        bench.same(&[options, &write].concat(), "");
    }
}

#[test]
fn options_may_be_written_in_many_ways() {
    let bench = Bench::new();
    for arguments in [
        &["-clength", "-fraw", "a.raw"][..],
        &["--cmd=length", "--format", "raw", "a.raw"],
        &["--cm", "length", "--form=raw", "a.raw"],
        &["--read-only", "-f", "raw", "-c", "write 0 1", "a.raw"],
        &["a.raw", "-f", "raw", "-c", "length"],
        &["-rfraw", "a.raw", "-c", "length"],
    ] {
        bench.same(arguments, "");
    }
}

#[test]
fn the_prompt() {
    let bench = Bench::new();
    for typed in [
        "",
        "quit\n",
        "length\n",
        "length\nlength",
        "bogus\n",
        "read 0 1\nwrite 0 1\n\nread -P 1 0 1\nquit\nread 0 1\n",
    ] {
        bench.same(&["-f", "raw", "a.raw"], typed);
    }
    bench.same(&[], "length\n");
}

#[test]
fn reopening() {
    alike(
        QCOW2,
        "b.qcow2",
        &[
            &["reopen -r", "write 0 1k", "reopen -w", "write 0 1k", "reopen -c none", "write 0 1k", "reopen"],
            &["reopen -o lazy-refcounts=on", "write 0 64k", "reopen -o driver=qcow2,lazy-refcounts=off", "write 0 64k"],
            &["reopen -o discard=unmap", "reopen -c unsafe", "reopen -c directsync", "write 0 1k", "map"],
        ],
    );
    alike(&["-r", "-f", "raw"], "a.raw", &[&["write 0 1", "reopen -w", "write 0 1", "reopen -r", "write 0 1"]]);
    alike(RAW, "a.raw", &[&["reopen -o size=1024", "length", "reopen -o size=512", "length", "reopen -o driver=raw"]]);
}

#[test]
fn requests_that_are_made_to_wait() {
    let options = "driver=blkdebug,image.driver=qcow2,image.file.driver=file,image.file.filename=b.qcow2";
    alike(
        &["--image-opts"],
        options,
        &[
            &["break pwritev A", "aio_write 0 4k", "wait_break A", "resume A", "aio_flush", "remove_break A"],
            &["break pwritev A", "aio_write 0 4k", "wait_break A", "remove_break A", "aio_flush"],
            &["break pwritev A", "remove_break A", "aio_write 0 4k", "aio_flush", "resume A", "remove_break A"],
            &["break bogus x", "resume Z", "remove_break Z"],
        ],
    );
}

#[test]
fn a_difference_is_noticed() {
    let bench = Bench::new();
    let qemu = bench.run_qemu(&["-f", "raw", "-c", "write -P 1 0 4k", "a.raw"], "");
    let ours = bench.run_ours(&["-f", "raw", "-c", "write -P 2 0 4k", "a.raw"], "");
    assert_eq!(qemu.masked(), ours.masked());
    assert!(bench.differences().iter().any(|difference| difference.contains("a.raw")));
    let ours = bench.run_ours(&["-f", "raw", "-c", "write -P 1 0 8k", "a.raw"], "");
    assert_ne!(qemu.masked(), ours.masked());
    assert!(bench.run_ours(&["-f", "raw", "-c", "read -P 9 0 4k", "a.raw"], "").code.unwrap() == 1);
}

/// Every number that a command takes, at its ends and beyond.
#[test]
fn numbers_beyond_all_measure() {
    let commands = [
        "read @ 512",
        "read 0 @",
        "read -P @ 0 512",
        "read -P 0 -s @ 0 512",
        "read -P 0 -l @ 0 512",
        "readv 0 @",
        "readv @ 512 512",
        "write @ 512",
        "write 0 @",
        "write -P @ 0 512",
        "write -z @ 512",
        "writev 0 @",
        "writev 0 512 @",
        "discard @ 512",
        "discard 0 @",
        "alloc @",
        "alloc 0 @",
        "zone_report @ 1",
    ];
    let numbers = [
        "-1",
        "-0",
        "1",
        "2147483137",
        "2147483648",
        "9223372036854775295",
        "9223372036854775296",
        "9223372036854775807",
        "9223372036854775808",
        "18446744073709551615",
        "18446744073709551616",
        "8E",
        "0x",
        "1e3",
        "nan",
    ];
    let bench = Bench::new();
    for number in numbers {
        for (options, image) in [(RAW, "a.raw"), (QCOW2, "b.qcow2")] {
            let commands = commands.map(|command| command.replace('@', number));
            let mut arguments = options.to_vec();
            arguments.extend(commands.iter().flat_map(|command| ["-c", command]));
            arguments.push(image);
            bench.same(&arguments, "");
            // Sizes that are too large are refused in other words.
            let truncate = format!("truncate {number}");
            let arguments = [options, &["-c", &truncate, "-c", "length", image]].concat();
            let (theirs, ours) = (bench.run_qemu(&arguments, ""), bench.run_ours(&arguments, ""));
            assert_eq!((ours.code, ours.out), (theirs.code, theirs.out), "{image}: {truncate}");
        }
    }
}

/// Nobody listens, and what is typed has no end.
#[test]
fn who_does_not_listen_is_no_reason_to_stop() {
    let bench = Bench::new();
    let folder = bench.path().join("ours");
    let run = |arguments: &[&str]| {
        let full = || std::fs::File::options().write(true).open("/dev/full").unwrap();
        let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_trellis-io"));
        command.args(arguments).current_dir(&folder).stdin(std::process::Stdio::null()).stdout(full()).stderr(full());
        command.status().unwrap().code()
    };
    assert_eq!(run(&["-f", "raw", "-c", "bogus", "a.raw"]), Some(1));
    assert_eq!(run(&["-f", "raw", "-c", "write -s none 0 512", "a.raw"]), Some(1));
    assert_eq!(run(&["-f", "raw", "-c", "read -v 0 512", "a.raw"]), Some(0));
    assert_eq!(run(&["--bogus"]), Some(1));
    // A gigabyte without the end of a line, with less memory than that.
    let line = "ulimit -v 600000; head -c 1G /dev/zero | $0 -f raw a.raw >/dev/null 2>&1";
    let mut command = std::process::Command::new("bash");
    let status = command.args(["-c", line, env!("CARGO_BIN_EXE_trellis-io")]).current_dir(&folder).status();
    assert_eq!(status.unwrap().code(), Some(1));
}
