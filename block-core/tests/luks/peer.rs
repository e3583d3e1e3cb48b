//! The others, and us, as these tests use them: one passphrase a slot, small disks.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::rc::Rc;
use std::sync::Arc;

use block_core::catalog;
use block_core::codec::SecretBytes;
use block_core::codec::secret::{Encoding, Secret};
use block_core::graph::{Graph, WriteFlags};
use block_core::rt::run_control;
use serde_json::{Value, json};

use crate::bench::{READER, add, attach, enter, flush, io_thread, on, range, read, write, writer};
use crate::random::Random;

/// Bytes of the disks here.
pub(crate) const SIZE: usize = 1 << 20;
/// What opens slot 0.
pub(crate) const WORD: &str = "correct horse";
/// How others name the secret with it.
pub(crate) const OBJECT: &str = "secret,id=word,data=correct horse";

/// Runs a program that may hang; what it prints, and whether it was content.
pub(crate) fn output(program: &str, arguments: &[&str]) -> Output {
    let output = Command::new("timeout").args(["120", program]).args(arguments).output();
    output.unwrap_or_else(|error| panic!("{program}: {error}"))
}

/// The same for what has to succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A folder with images.
pub(crate) struct Place(tempfile::TempDir);

impl Place {
    pub(crate) fn new() -> Self {
        Self(tempfile::tempdir_in("/dev/shm").unwrap())
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.path().join(name).to_str().unwrap().to_owned()
    }

    /// A file with these bytes.
    pub(crate) fn with(&self, name: &str, bytes: &[u8]) -> String {
        std::fs::write(self.path().join(name), bytes).unwrap();
        self.file(name)
    }

    /// A file of zeroes.
    pub(crate) fn empty(&self, name: &str, size: u64) -> String {
        let path: PathBuf = self.path().join(name);
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        self.file(name)
    }
}

/// Bytes that do not compress.
pub(crate) fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut random = Random(seed * 2 + 1);
    (0..len).map(|_| random.below(256) as u8).collect()
}

/// The options of a node over an image.
pub(crate) fn node(path: &str, secret: &str) -> Value {
    let file = json!({ "driver": "file", "filename": path });
    json!({ "driver": "luks", "node-name": "disk", "key-secret": secret, "file": file })
}

pub(crate) fn detached(path: &str, header: &str, secret: &str) -> Value {
    let mut options = node(path, secret);
    options["header"] = json!({ "driver": "file", "filename": header });
    options
}

/// A graph that knows these secrets: `s0`, `s1`, ….
pub(crate) fn graph(words: &[&str]) -> Rc<Graph> {
    let graph = Graph::new(Arc::new(|_| ()));
    for (number, word) in words.iter().enumerate() {
        let secret = Secret::new(SecretBytes::new(word.as_bytes().to_vec()), Encoding::Raw).unwrap();
        graph.objects().insert(&format!("s{number}"), Arc::new(secret));
    }
    graph
}

/// Opens a disk and reads all of it; `words` are the secrets, the first of which the options name.
pub(crate) fn contents(options: &Value, words: &[&str]) -> Result<Vec<u8>, String> {
    run_control(async |_| {
        let graph = graph(words);
        let node = add(&graph, options.clone()).await?;
        let port = attach(&graph, node, READER).await?;
        let thread = io_thread();
        let bytes = on(&thread, &port.handle(), async |lane| {
            let size = lane.geometry(&enter(&lane).await).size;
            read(&lane, range(0, size)).await.map_err(|error| error.to_string())
        })
        .await;
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
        bytes
    })
}

/// Only opens it.
pub(crate) fn opens(options: &Value, words: &[&str]) -> Result<(), String> {
    run_control(async |_| {
        let graph = graph(words);
        let node = add(&graph, options.clone()).await?;
        graph.permit().remove(node).await.unwrap();
        Ok(())
    })
}

/// Writes here and there, and does the same to `model`, which is what the disk has.
pub(crate) fn scribble(options: &Value, words: &[&str], model: &mut Vec<u8>, seed: u64) {
    let before = model.clone();
    *model = run_control(async |_| {
        let graph = graph(words);
        let node = add(&graph, options.clone()).await.unwrap();
        let port = attach(&graph, node, writer()).await.unwrap();
        let thread = io_thread();
        let model = on(&thread, &port.handle(), async move |lane| {
            let (mut model, mut random) = (before, Random(seed * 2 + 1));
            for round in 0..40 {
                let len = if round % 8 == 0 { 300_000 } else { 1 + random.below(20_000) as usize };
                let len = len.min(model.len());
                let start = random.below((model.len() - len + 1) as u64) as usize;
                let bytes = noise(seed + round, len);
                let flags = WriteFlags { fua: round % 3 == 0, ..WriteFlags::default() };
                write(&lane, start as u64, &bytes, flags).await.unwrap();
                model[start..start + len].copy_from_slice(&bytes);
            }
            flush(&lane).await.unwrap();
            model
        })
        .await;
        port.detach(&mut graph.permit()).await;
        graph.permit().remove(node).await.unwrap();
        model
    });
}

/// `blockdev-create`.
pub(crate) fn create(options: &Value, words: &[&str]) -> Result<(), String> {
    run_control(async |_| {
        let graph = graph(words);
        let options = qmp::schema::from_value(options.clone()).map_err(|error: qmp::Error| error.desc)?;
        catalog::create(&graph, options).await.map_err(|error| error.full())
    })
}

/// What QEMU reads in an image.
pub(crate) fn by_qemu(place: &Place, image_opts: &str) -> Vec<u8> {
    let out = place.file("by-qemu.raw");
    let source = format!("driver=luks,key-secret=word,{image_opts}");
    run("qemu-img", &["convert", "--object", OBJECT, "--image-opts", &source, "-O", "raw", &out]);
    let bytes = std::fs::read(&out).unwrap();
    std::fs::remove_file(out).unwrap();
    bytes
}

/// The node's part of `query-named-block-nodes`.
pub(crate) fn described(options: &Value, words: &[&str]) -> Value {
    run_control(async |_| {
        let graph = graph(words);
        let node = add(&graph, options.clone()).await.unwrap();
        let info = graph.info(node).await.unwrap();
        assert!(info.encrypted);
        graph.permit().remove(node).await.unwrap();
        info.specific.unwrap()
    })
}
