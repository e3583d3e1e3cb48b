//! Which formats images can be made in, and with which options, in the order in which `qemu-img` shows these.

use super::{Described, Kind};

/// A format that images can be made in.
#[derive(Debug)]
pub(super) struct Format {
    pub(super) name: &'static str,
    pub(super) options: &'static [Described],
    /// Images can stand on others.
    pub(super) stands: bool,
}

pub(super) const FORMATS: &[Format] = &[
    Format { name: "raw", options: &[SIZE], stands: false },
    Format { name: "file", options: &[SIZE, FILE[0], FILE[1], FILE[2]], stands: false },
    Format { name: "luks", options: LUKS, stands: false },
    Format { name: "qcow2", options: QCOW2, stands: true },
];

impl Format {
    /// Its options, those for its file behind its own.
    pub(super) fn all(&self) -> impl Iterator<Item = &'static Described> + use<> {
        self.options.iter().chain(if self.name == "file" { &[] } else { FILE }).filter({
            let own = self.options;
            // A format has its own way to make room.
            move |one| own.iter().find(|other| other.name == one.name).is_none_or(|other| std::ptr::eq(*one, other))
        })
    }
}

const fn option(name: &'static str, kind: Kind, help: &'static str) -> Described {
    Described { name, kind, default: None, help }
}

const fn text(name: &'static str, help: &'static str) -> Described {
    option(name, Kind::Text, help)
}

const SIZE: Described = option("size", Kind::Size, "Bytes of the disk");
const PREALLOCATION: Described = text("preallocation", "How much is allocated at once: off, metadata, falloc, full");

/// Options of the file that an image is in.
const FILE: &[Described] = &[
    PREALLOCATION,
    option("nocow", Kind::Switch, "No copy-on-write, on btrfs"),
    option("extent_size_hint", Kind::Size, "Bytes that the file system allocates at a time, on XFS; 0: as it likes"),
];

const KEY_SECRET: &str = "Id of the secret that will open the image";
const CIPHER_ALG: &str = "The cipher and its key's bits: aes-256";
const CIPHER_MODE: &str = "The cipher's mode: xts, cbc, ecb";
const IVGEN_ALG: &str = "What a sector begins with: plain64, plain, essiv";
const IVGEN_HASH_ALG: &str = "The hash for essiv";
const HASH_ALG: &str = "The hash for keys that are derived";
const ITER_TIME: &str = "Milliseconds that one try of a passphrase takes";

const LUKS: &[Described] = &[
    SIZE,
    text("key-secret", KEY_SECRET),
    text("cipher-alg", CIPHER_ALG),
    text("cipher-mode", CIPHER_MODE),
    text("ivgen-alg", IVGEN_ALG),
    text("ivgen-hash-alg", IVGEN_HASH_ALG),
    text("hash-alg", HASH_ALG),
    option("iter-time", Kind::Number, ITER_TIME),
    option("detached-header", Kind::Switch, "The file is the header alone, of a disk elsewhere"),
];

const QCOW2: &[Described] = &[
    option("encryption", Kind::Switch, "The old encryption, which is not made any more"),
    text("encrypt.format", "How the disk is encrypted: luks"),
    text("encrypt.key-secret", KEY_SECRET),
    text("encrypt.cipher-alg", CIPHER_ALG),
    text("encrypt.cipher-mode", CIPHER_MODE),
    text("encrypt.ivgen-alg", IVGEN_ALG),
    text("encrypt.ivgen-hash-alg", IVGEN_HASH_ALG),
    text("encrypt.hash-alg", HASH_ALG),
    option("encrypt.iter-time", Kind::Number, ITER_TIME),
    Described { name: "cluster_size", kind: Kind::Size, default: Some("65536"), help: "Bytes of a cluster" },
    Described { name: "extended_l2", kind: Kind::Switch, default: Some("off"), help: "Clusters have subclusters" },
    PREALLOCATION,
    Described {
        name: "compression_type",
        kind: Kind::Text,
        default: Some("zlib"),
        help: "How clusters are compressed: zlib, zstd",
    },
    SIZE,
    text("compat", "Version of the format: 0.10 (v2), 1.1 (v3)"),
    text("backing_file", "What the image stands on"),
    text("backing_fmt", "The format of that"),
    text("data_file", "Another file for the data"),
    option("data_file_raw", Kind::Switch, "That file is a raw disk by itself"),
    Described {
        name: "lazy_refcounts",
        kind: Kind::Switch,
        default: Some("off"),
        help: "Refcounts may be written late",
    },
    Described { name: "refcount_bits", kind: Kind::Number, default: Some("16"), help: "Bits of a refcount" },
];

/// The members of `BlockdevCreateOptionsQcow2` that are said so.
pub(super) const QCOW2_MEMBERS: &[(&str, &str)] = &[
    ("cluster_size", "cluster-size"),
    ("extended_l2", "extended-l2"),
    ("preallocation", "preallocation"),
    ("compression_type", "compression-type"),
    ("backing_file", "backing-file"),
    ("backing_fmt", "backing-fmt"),
    ("data_file_raw", "data-file-raw"),
    ("lazy_refcounts", "lazy-refcounts"),
    ("refcount_bits", "refcount-bits"),
];

/// The members of `QCryptoBlockCreateOptionsLUKS`; in qcow2 `encrypt.` stands before them.
pub(super) const LUKS_MEMBERS: &[&str] =
    &["key-secret", "cipher-alg", "cipher-mode", "ivgen-alg", "ivgen-hash-alg", "hash-alg", "iter-time"];
