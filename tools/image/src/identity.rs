//! Which file a name leads to: links and other ways of writing a name come to the same.

use std::os::unix::fs::MetadataExt;

use block_core::rt::blocking;

use crate::image::Image;

/// The device and the inode of a file.
pub type Identity = (u64, u64);

/// What a name leads to; `None`: nothing that could be asked. Waits for the file system.
fn identity_now(name: &str) -> Option<Identity> {
    std::fs::metadata(name).ok().map(|found| (found.dev(), found.ino()))
}

/// What a name leads to; `None`: nothing that could be asked.
pub async fn identity(name: &str) -> Option<Identity> {
    let name = name.to_owned();
    blocking(move || identity_now(&name)).await
}

/// The name leads to the same file as one of the others, which is there.
pub async fn is_any_of(name: &str, others: &[String]) -> bool {
    let (name, others) = (name.to_owned(), others.to_vec());
    let found = blocking(move || {
        let own = identity_now(&name);
        own.is_some() && others.iter().any(|other| identity_now(other) == own)
    });
    found.await
}

/// The names of all files that an image is made of.
pub(crate) async fn files_of(image: &Image) -> Vec<String> {
    let mut names = Vec::new();
    for node in image.graph().nodes() {
        names.extend(image.graph().info(node.id).await.map(|info| info.filename));
    }
    names.retain(|name| !name.is_empty());
    names
}
