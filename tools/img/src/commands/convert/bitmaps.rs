//! Persistent dirty bitmaps that go along with the data.

use block_core::graph::{BitmapAction, BitmapChange, NodeBitmap};
use trellis_image::{Failure, Image, Session, words};

/// Refuses bitmaps that cannot be used, before anything is copied; `skips`: they are left out.
pub(super) fn check(source: &Image, skips: bool) -> Result<(), Failure> {
    let broken = persistent(source).into_iter().find(|bitmap| bitmap.inconsistent).filter(|_| !skips);
    let text = |bitmap: NodeBitmap| {
        format!(
            "Cannot copy inconsistent bitmap '{}'\nTry --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it",
            bitmap.name
        )
    };
    broken.map_or(Ok(()), |bitmap| Err(Failure::new(text(bitmap))))
}

/// The target gets the source's bitmaps, the oldest first, as they have them.
pub(super) async fn copy(session: &Session, source: &Image, target: &Image) -> Result<(), Failure> {
    let (broken, sound): (Vec<_>, Vec<_>) = persistent(source).into_iter().partition(|bitmap| bitmap.inconsistent);
    for NodeBitmap { name, .. } in broken {
        session.complain(&format!("warning: Skipping inconsistent bitmap '{name}'"));
    }
    for bitmap in sound.into_iter().rev() {
        let name = bitmap.name;
        let change = |what| Box::new(BitmapChange { node: target.node, name: name.clone(), what });
        let granularity = Some(bitmap.bits.granularity());
        let add = change(BitmapAction::Add { granularity, recording: false, persistent: true });
        let merge = change(BitmapAction::Merge(vec![(source.node, name.clone())]));
        let failed = |error| Failure::new(format!("Failed to populate bitmap {name}: {}", words(&error)));
        let mut permit = session.graph.permit();
        let doing = |error| Failure::new(format!("Failed to create bitmap {name}: {}", words(&error)));
        permit.transact(vec![add]).await.map_err(doing)?;
        permit.transact(vec![merge]).await.map_err(failed)?;
        if bitmap.recording {
            permit.transact(vec![change(BitmapAction::Enable)]).await.map_err(failed)?;
        }
    }
    Ok(())
}

/// Those that an image stores, the youngest first.
fn persistent(image: &Image) -> Vec<NodeBitmap> {
    image.report().bitmaps.into_iter().filter(|bitmap| bitmap.persistent).collect()
}
