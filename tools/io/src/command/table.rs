//! All commands: how they are called, how many words they take, what they need, and what there is to say.

/// What a command is about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Spec {
    pub(crate) name: &'static str,
    /// A shorter name.
    pub(super) alias: Option<&'static str>,
    /// What stands behind the name, as help has it.
    pub(super) arguments: Option<&'static str>,
    pub(crate) summary: &'static str,
    /// Words behind the name, at the least and at the most.
    pub(super) least: usize,
    pub(super) most: Option<usize>,
    pub(crate) needs: Needs,
    /// What `help name` says besides.
    pub(crate) help: &'static str,
}

/// What a command needs before it is read any further.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Needs {
    Nothing,
    /// An open image.
    File,
    /// One that may be written.
    Write,
    /// One that may be given another size.
    Resize,
}

/// In the order in which help lists them.
pub(crate) static COMMANDS: &[Spec] = &[
    Spec {
        name: "abort",
        alias: None,
        arguments: None,
        summary: "simulate a program crash using abort(3)",
        least: 0,
        most: Some(0),
        needs: Needs::Nothing,
        help: "Ends the program at once, as a crash would: nothing is closed or flushed.",
    },
    Spec {
        name: "aio_flush",
        alias: None,
        arguments: None,
        summary: "completes all outstanding aio requests",
        least: 0,
        most: Some(0),
        needs: Needs::File,
        help: "Waits until all asynchronous requests are over.",
    },
    Spec {
        name: "aio_read",
        alias: None,
        arguments: Some("[-Ciqrv] [-P pattern] off len [len..]"),
        summary: "asynchronously reads a number of bytes",
        least: 2,
        most: None,
        needs: Needs::File,
        help: "Begins to read and comes back at once; `aio_flush` waits for the end. What goes wrong is printed,\n\
           and does not count as a failure of this program.\n\
           \x20-C  one line of numbers: bytes, requests, time, bytes and requests per second\n\
           \x20-i  an invalid request, which is not sent\n\
           \x20-P  compare each byte with this one\n\
           \x20-q  say nothing of what went well\n\
           \x20-r  accepted; all buffers are alike\n\
           \x20-v  print the bytes",
    },
    Spec {
        name: "aio_write",
        alias: None,
        arguments: Some("[-Cfiqruz] [-P pattern] off len [len..]"),
        summary: "asynchronously writes a number of bytes",
        least: 2,
        most: None,
        needs: Needs::Write,
        help: "Begins to write and comes back at once; `aio_flush` waits for the end. What goes wrong is printed,\n\
           and does not count as a failure of this program.\n\
           \x20-C  one line of numbers: bytes, requests, time, bytes and requests per second\n\
           \x20-f  stable before it is over\n\
           \x20-i  an invalid request, which is not sent\n\
           \x20-P  fill the buffer with this byte instead of 0xcd\n\
           \x20-q  say nothing of what went well\n\
           \x20-r  accepted; all buffers are alike\n\
           \x20-u  with -z: the space may be freed\n\
           \x20-z  zeroes, without sending them",
    },
    Spec {
        name: "alloc",
        alias: Some("a"),
        arguments: Some("offset [count]"),
        summary: "checks if offset is allocated in the file",
        least: 1,
        most: Some(2),
        needs: Needs::File,
        help: "How many of the bytes (512 if none are given) this image has itself.",
    },
    Spec {
        name: "break",
        alias: None,
        arguments: Some("event tag"),
        summary: "sets a breakpoint on event and tags the stopped request as tag",
        least: 2,
        most: Some(2),
        needs: Needs::File,
        help: "The next request that comes to the event waits there. Needs a blkdebug node.",
    },
    Spec {
        name: "close",
        alias: Some("c"),
        arguments: None,
        summary: "close the current open file",
        least: 0,
        most: Some(0),
        needs: Needs::File,
        help: "Ends the use of the image; what was written is in its file then.",
    },
    Spec {
        name: "discard",
        alias: Some("d"),
        arguments: Some("[-Cq] off len"),
        summary: "discards a number of bytes at a specified offset",
        least: 2,
        most: None,
        needs: Needs::Write,
        help: "The bytes are not needed any more.\n\
           \x20-C  one line of numbers: bytes, requests, time, bytes and requests per second\n\
           \x20-q  say nothing of what went well",
    },
    Spec {
        name: "flush",
        alias: Some("f"),
        arguments: None,
        summary: "flush all in-core file state to disk",
        least: 0,
        most: Some(0),
        needs: Needs::File,
        help: "What was written is on the disk afterwards.",
    },
    Spec {
        name: "help",
        alias: Some("?"),
        arguments: Some("[command]"),
        summary: "help for one or all commands",
        least: 0,
        most: Some(1),
        needs: Needs::Nothing,
        help: "What commands there are, or what one of them does.",
    },
    Spec {
        name: "info",
        alias: Some("i"),
        arguments: None,
        summary: "prints information about the current file",
        least: 0,
        most: Some(0),
        needs: Needs::File,
        help: "The format, and what the image says of itself.",
    },
    Spec {
        name: "length",
        alias: Some("l"),
        arguments: None,
        summary: "gets the length of the current file",
        least: 0,
        most: Some(0),
        needs: Needs::File,
        help: "The size of the disk.",
    },
    Spec {
        name: "map",
        alias: None,
        arguments: Some(""),
        summary: "prints the allocated areas of a file",
        least: 0,
        most: Some(0),
        needs: Needs::File,
        help: "Which parts of the disk this image has itself, and which it has not.",
    },
    Spec {
        name: "open",
        alias: Some("o"),
        arguments: Some("[-rsCnkU] [-t cache] [-d discard] [-o options] [path]"),
        summary: "open the file specified by path",
        least: 1,
        most: None,
        needs: Needs::Nothing,
        help: "Opens an image for the commands that follow.\n\
           \x20-C  copy what is read from below into the image\n\
           \x20-d  what becomes of discards: ignore or unmap\n\
           \x20-i  threads, native or io_uring: accepted; the runtime chooses\n\
           \x20-k  short for -i native\n\
           \x20-n  past the host's cache\n\
           \x20-o  options of the image, as in driver=qcow2,lazy-refcounts=on\n\
           \x20-r  only read\n\
           \x20-s  write to an overlay that is thrown away\n\
           \x20-t  how the host caches: none, writeback, unsafe, directsync, writethrough\n\
           \x20-U  whatever other programs do with it",
    },
    Spec {
        name: "quit",
        alias: Some("q"),
        arguments: None,
        summary: "exit the program",
        least: 0,
        most: Some(0),
        needs: Needs::Nothing,
        help: "Ends this program. Its exit code is 1 if a command failed, else 0.",
    },
    Spec {
        name: "read",
        alias: Some("r"),
        arguments: Some("[-abCqrv] [-P pattern [-s off] [-l len]] off len"),
        summary: "reads a number of bytes at a specified offset",
        least: 2,
        most: None,
        needs: Needs::File,
        help: "Reads, and prints how fast that was.\n\
           \x20-b  the machine's state rather than the disk\n\
           \x20-C  one line of numbers: bytes, requests, time, bytes and requests per second\n\
           \x20-l  with -P: compare only as many bytes\n\
           \x20-p  accepted\n\
           \x20-P  compare each byte with this one\n\
           \x20-q  say nothing of what went well\n\
           \x20-r  accepted; all buffers are alike\n\
           \x20-s  with -P: compare from this byte of the buffer on\n\
           \x20-v  print the bytes",
    },
    Spec {
        name: "readv",
        alias: None,
        arguments: Some("[-Cqrv] [-P pattern] off len [len..]"),
        summary: "reads a number of bytes at a specified offset",
        least: 2,
        most: None,
        needs: Needs::File,
        help: "Reads the sum of all lengths in one request.\n\
           \x20-C  one line of numbers: bytes, requests, time, bytes and requests per second\n\
           \x20-P  compare each byte with this one\n\
           \x20-q  say nothing of what went well\n\
           \x20-r  accepted; all buffers are alike\n\
           \x20-v  print the bytes",
    },
    Spec {
        name: "remove_break",
        alias: None,
        arguments: Some("tag"),
        summary: "remove a breakpoint by tag",
        least: 1,
        most: Some(1),
        needs: Needs::File,
        help: "Takes a breakpoint away and lets the request go on that waits there.",
    },
    Spec {
        name: "reopen",
        alias: None,
        arguments: Some("[(-r|-w)] [-c cache] [-o options]"),
        summary: "reopens an image with new options",
        least: 0,
        most: None,
        needs: Needs::File,
        help: "Uses the image with other options from now on.\n\
           \x20-c  how the host caches\n\
           \x20-o  options of the image that change\n\
           \x20-r  only read\n\
           \x20-w  read and write",
    },
    Spec {
        name: "resume",
        alias: None,
        arguments: Some("tag"),
        summary: "resumes the request tagged as tag",
        least: 1,
        most: Some(1),
        needs: Needs::File,
        help: "Lets the request go on that waits under this name.",
    },
    Spec {
        name: "sigraise",
        alias: None,
        arguments: Some("signal"),
        summary: "raises a signal",
        least: 1,
        most: Some(1),
        needs: Needs::Nothing,
        help: "Refused: this program does not send signals to itself. `abort` ends it as a crash would.",
    },
    Spec {
        name: "sleep",
        alias: None,
        arguments: None,
        summary: "waits for the given value in milliseconds",
        least: 1,
        most: Some(1),
        needs: Needs::Nothing,
        help: "Waits; asynchronous requests go on meanwhile.",
    },
    Spec {
        name: "truncate",
        alias: Some("t"),
        arguments: Some("[-m prealloc_mode] off"),
        summary: "truncates the current file at the given offset",
        least: 1,
        most: Some(3),
        needs: Needs::Resize,
        help: "Gives the disk another size.\n\
           \x20-m  how room is made where it grows: off, metadata, falloc, full",
    },
    Spec {
        name: "wait_break",
        alias: None,
        arguments: Some("tag"),
        summary: "waits for the suspension of a request",
        least: 1,
        most: Some(1),
        needs: Needs::File,
        help: "Waits until a request has come to the breakpoint.",
    },
    Spec {
        name: "write",
        alias: Some("w"),
        arguments: Some("[-bcCfnqruz] [-P pattern | -s source_file] off len"),
        summary: "writes a number of bytes at a specified offset",
        least: 2,
        most: None,
        needs: Needs::Write,
        help: "Writes, and prints how fast that was.\n\
           \x20-b  the machine's state rather than the disk\n\
           \x20-c  stored compressed\n\
           \x20-C  one line of numbers: bytes, requests, time, bytes and requests per second\n\
           \x20-f  stable before it is over\n\
           \x20-n  with -z: fail rather than write zeroes one by one\n\
           \x20-p  accepted\n\
           \x20-P  fill the buffer with this byte instead of 0xcd\n\
           \x20-q  say nothing of what went well\n\
           \x20-r  accepted; all buffers are alike\n\
           \x20-s  fill the buffer with the bytes of a file, again and again\n\
           \x20-u  with -z: the space may be freed\n\
           \x20-z  zeroes, without sending them",
    },
    Spec {
        name: "writev",
        alias: None,
        arguments: Some("[-Cfqr] [-P pattern] off len [len..]"),
        summary: "writes a number of bytes at a specified offset",
        least: 2,
        most: None,
        needs: Needs::Write,
        help: "Writes the sum of all lengths in one request.\n\
           \x20-C  one line of numbers: bytes, requests, time, bytes and requests per second\n\
           \x20-f  stable before it is over\n\
           \x20-P  fill the buffer with this byte instead of 0xcd\n\
           \x20-q  say nothing of what went well\n\
           \x20-r  accepted; all buffers are alike",
    },
    Spec {
        name: "zone_append",
        alias: None,
        arguments: Some("offset len [len..]"),
        summary: "append write a number of bytes at a specified offset",
        least: 3,
        most: Some(4),
        needs: Needs::File,
        help: "No driver has zones: this fails, as on a device without them.",
    },
    Spec {
        name: "zone_close",
        alias: None,
        arguments: Some("offset len"),
        summary: "close a range of zones in zone block device",
        least: 2,
        most: Some(2),
        needs: Needs::File,
        help: "No driver has zones: this fails, as on a device without them.",
    },
    Spec {
        name: "zone_finish",
        alias: None,
        arguments: Some("offset len"),
        summary: "finish a range of zones in zone block device",
        least: 2,
        most: Some(2),
        needs: Needs::File,
        help: "No driver has zones: this fails, as on a device without them.",
    },
    Spec {
        name: "zone_open",
        alias: None,
        arguments: Some("offset len"),
        summary: "explicit open a range of zones in zone block device",
        least: 2,
        most: Some(2),
        needs: Needs::File,
        help: "No driver has zones: this fails, as on a device without them.",
    },
    Spec {
        name: "zone_report",
        alias: None,
        arguments: Some("offset number"),
        summary: "report zone information",
        least: 2,
        most: Some(2),
        needs: Needs::File,
        help: "No driver has zones: this fails, as on a device without them.",
    },
    Spec {
        name: "zone_reset",
        alias: None,
        arguments: Some("offset len"),
        summary: "reset a zone write pointer in zone block device",
        least: 2,
        most: Some(2),
        needs: Needs::File,
        help: "No driver has zones: this fails, as on a device without them.",
    },
];
