//! `commit`: what an image has goes into what it stands on, and the image is emptied.

use std::time::{Duration, Instant};

use block_core::base::{ByteRange, IoError};
use block_core::graph::{ChildId, NodeId, PermSet, Preallocation, WriteFlags};
use block_core::pipeline::Content;
use block_core::rt::IoBuf;
use trellis_image::args::{Args, Definition, flag, option};
use trellis_image::{
    Disk, Failure, Given, Identity, Image, Outcome, Progress, Session, identity, say, size, strerror, top,
};

use super::common::{
    CACHE, FORMAT, IMAGE_OPTS, OBJECT, PROGRESS, QUIET, cache, closed, given, objects, one_image, open, shows_progress,
};

pub(super) const DEFINITION: Definition = Definition {
    name: "commit",
    about: "Copies what an image has into what it stands on",
    options: &[
        QUIET,
        PROGRESS,
        FORMAT,
        IMAGE_OPTS,
        CACHE,
        flag('d', "drop", "the image is not emptied afterwards"),
        option('b', "base", "BASE", "the layer that gets it all, instead of the next one; the image is not emptied"),
        option('r', "rate", "RATE", "bytes a second at the most"),
        OBJECT,
    ],
    words: "FILENAME",
};

pub(super) async fn run(session: &Session, args: Args) -> Outcome {
    let rate = args.get("rate").map(|word| size::parse_named("rate limit", word)).transpose()?.unwrap_or(0);
    let word = one_image(&args)?;
    objects(session, &args).await?;
    let plain = Given { cache: cache(&args)?, writable: true, ..given(&args, word)? };
    // Which layer gets it is known once the chain is. Whoever uses the image is found when it is opened in earnest.
    let look = Given { writable: false, quiet: true, force_share: true, ..plain.clone() };
    let chain = open(session, &look).await?;
    let depth = depth_of(&chain, args.get("base"), word).await;
    let file = file_of(&chain, *depth.as_ref().unwrap_or(&0)).await;
    let depth = closed(chain, depth).await?;
    let image = open(session, &Given { writable_layer: Some(depth), ..plain }).await?;
    let progress = Progress::begin(session, shows_progress(&args));
    let drops = args.has("drop") || args.has("base");
    // Somebody may have let it stand on another one since.
    let result = match file_of(&image, depth).await == file {
        true => committed(session, &image, depth, rate, drops, &progress).await,
        false => Err(Failure::new(format!("What '{word}' stands on has changed meanwhile"))),
    };
    closed(image, result).await?;
    drop(progress);
    if !args.has("quiet") {
        say("Image committed.\n");
    }
    Ok(0)
}

/// How many layers down the one is that gets it.
async fn depth_of(image: &Image, base: Option<&str>, word: &str) -> Result<usize, Failure> {
    let layers = layers(image);
    if layers.len() < 2 {
        return Err(Failure::new("Image does not have a backing file"));
    }
    let Some(base) = base else { return Ok(1) };
    let canonical = |name: &str| std::fs::canonicalize(name).ok();
    for (depth, layer) in layers.iter().enumerate().skip(1) {
        let info = block_core::catalog::info(image.graph(), *layer).await.unwrap_or_default();
        let recorded = image.graph().info(layers[depth - 1]).await.and_then(|info| info.backing);
        let is_named = recorded.is_some_and(|(name, _)| name == base);
        if is_named
            || info.filename == base
            || canonical(base).is_some_and(|path| canonical(&info.filename) == Some(path))
        {
            return Ok(depth);
        }
    }
    Err(Failure::new(format!("Did not find '{base}' in the backing chain of '{word}'")))
}

/// The file of a layer; `None`: there is none.
async fn file_of(image: &Image, depth: usize) -> Option<Identity> {
    let info = block_core::catalog::info(image.graph(), *layers(image).get(depth)?).await?;
    identity(&info.filename).await
}

/// The image's node and those that it stands on.
fn layers(image: &Image) -> Vec<NodeId> {
    let next = |node: &NodeId| image.graph().child_node(*node, "backing");
    std::iter::successors(Some(image.node), next).collect()
}

async fn committed(
    session: &Session,
    image: &Image,
    depth: usize,
    rate: u64,
    drops: bool,
    progress: &Progress,
) -> Result<(), Failure> {
    let layers = layers(image);
    let base = *layers.get(depth).ok_or_else(|| Failure::new("Image does not have a backing file"))?;
    let graph = image.graph();
    let base_size = graph.node(base).map_or(0, |report| report.geometry.size);
    if base_size < image.size() {
        graph.permit().resize(base, image.size(), Preallocation::Off).await?;
    }
    let edges: Option<Vec<ChildId>> = layers[..depth - 1].iter().map(|layer| graph.child(*layer, "backing")).collect();
    let below = image.enter(base, PermSet::CONSISTENT_READ | PermSet::WRITE).await?;
    let copy = Copy { image: image.disk(), base: below.disk(), edges: edges.unwrap_or_default(), size: image.size() };
    let result = copy.run(session, rate, progress).await;
    below.release().await;
    result?;
    if !drops {
        graph.permit().empty(image.node).await?;
    }
    Ok(())
}

struct Copy {
    image: Disk,
    base: Disk,
    /// From the image down to the layer above the base.
    edges: Vec<ChildId>,
    size: u64,
}

impl Copy {
    async fn run(&self, session: &Session, rate: u64, progress: &Progress) -> Result<(), Failure> {
        let failed = |error: IoError| Failure::new(format!("Block job failed: {}", strerror(error)));
        let (begun, mut copied, mut at) = (Instant::now(), 0, 0);
        while at < self.size {
            progress.at(at, self.size);
            let rest = ByteRange::between(at, self.size).expect("it has been compared above");
            let (above, len) = self.above_base(rest).await.map_err(failed)?;
            let part = rest.split(len).0;
            let part = if above { self.copy(part).await.map_err(failed)? } else { part };
            if above && rate > 0 {
                copied += part.len();
                session.local.sleep_until(begun + time_for(copied, rate)).await;
            }
            at = part.end();
        }
        self.base.flush().await.map_err(failed)?;
        progress.at(1, 1);
        Ok(())
    }

    /// Whether the first bytes are in a layer above the base, and how many.
    async fn above_base(&self, at: ByteRange) -> Result<(bool, u64), IoError> {
        let pin = self.image.enter().await;
        let top = top(&pin);
        let bottom = self.edges.iter().fold(top, |node, edge| node.below(*edge));
        top.allocated_down_to(bottom, at).await
    }

    /// Copies the first bytes of a range.
    async fn copy(&self, at: ByteRange) -> Result<ByteRange, IoError> {
        let status = self.image.status(at).await?;
        let part = at.split(status.len).0;
        if matches!(status.content, Content::Zero | Content::Absent) {
            let flags = WriteFlags { may_unmap: true, ..WriteFlags::default() };
            self.base.write_zeroes(part, flags).await?;
            return Ok(part);
        }
        let part = part.split(STEP).0;
        let buf = IoBuf::private(part.len())?;
        self.image.read(part, buf.clone()).await?;
        self.base.write(part, buf, WriteFlags::default()).await?;
        Ok(part)
    }
}

/// How long so many bytes take. `rate`: in a second, at least 1.
fn time_for(bytes: u64, rate: u64) -> Duration {
    let nanos = u128::from(bytes) * NANOS / u128::from(rate);
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}

const NANOS: u128 = 1_000_000_000;
/// Bytes that are copied at once.
const STEP: u64 = 2 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_disks_are_limited_to_their_end() {
        assert_eq!(time_for(1 << 20, 1 << 21), Duration::from_millis(500));
        assert_eq!(time_for(40 << 40, 1 << 30), Duration::from_secs(40 << 10));
        assert_eq!(time_for(u64::MAX, 1), Duration::from_nanos(u64::MAX));
    }
}
