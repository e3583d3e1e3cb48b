//! Which thread serves which queue of an export.

use std::rc::Rc;

use qmp::{Error, Result};

use super::options::{CommonOptions, VhostUserBlkOptions, VirtQueueMapping};
use crate::object::{IoThreadObject, IoThreadOptions, Objects};

/// The thread of each queue, in order: those that were named, or one of the export's own.
pub(super) fn of_queues(
    objects: &Objects,
    common: &CommonOptions,
    own: &VhostUserBlkOptions,
) -> Result<Vec<Rc<IoThreadObject>>> {
    let queues = usize::from(own.num_queues);
    match (&common.iothread, &own.iothread_vq_mapping) {
        (Some(_), Some(_)) => Err(Error::generic("'iothread' and 'iothread-vq-mapping' exclude each other")),
        (Some(name), None) => Ok(vec![find(objects, name)?; queues]),
        (None, Some(mapping)) => mapped(objects, mapping, queues),
        (None, None) => {
            let thread = Rc::new(IoThreadObject::start(common.id.clone(), IoThreadOptions::default())?);
            Ok(vec![thread; queues])
        }
    }
}

fn mapped(objects: &Objects, mapping: &[VirtQueueMapping], queues: usize) -> Result<Vec<Rc<IoThreadObject>>> {
    let threads = mapping.iter().map(|entry| find(objects, &entry.iothread)).collect::<Result<Vec<_>>>()?;
    let places = places(mapping, queues)?;
    Ok(places.into_iter().map(|place| threads[place].clone()).collect())
}

/// For each queue the index of its entry.
fn places(mapping: &[VirtQueueMapping], queues: usize) -> Result<Vec<usize>> {
    if mapping.is_empty() {
        return Err(Error::generic("'iothread-vq-mapping' names no IOThread"));
    }
    for (at, entry) in mapping.iter().enumerate() {
        if mapping[..at].iter().any(|before| before.iothread == entry.iothread) {
            return Err(Error::generic(format!("'iothread-vq-mapping' names IOThread '{}' twice", entry.iothread)));
        }
    }
    match mapping.iter().filter(|entry| entry.vqs.is_some()).count() {
        0 => Ok((0..queues).map(|queue| queue % mapping.len()).collect()),
        with if with == mapping.len() => listed(mapping, queues),
        _ => Err(Error::generic("either all entries of 'iothread-vq-mapping' have 'vqs', or none has")),
    }
}

fn listed(mapping: &[VirtQueueMapping], queues: usize) -> Result<Vec<usize>> {
    let mut places = vec![None; queues];
    for (at, entry) in mapping.iter().enumerate() {
        for queue in entry.vqs.iter().flatten() {
            let place = places.get_mut(usize::from(*queue)).ok_or_else(|| {
                Error::generic(format!("'iothread-vq-mapping' names queue {queue}, but num-queues is {queues}"))
            })?;
            if place.replace(at).is_some() {
                return Err(Error::generic(format!("'iothread-vq-mapping' names queue {queue} twice")));
            }
        }
    }
    let missing = |queue| Error::generic(format!("'iothread-vq-mapping' leaves out queue {queue}"));
    places.into_iter().enumerate().map(|(queue, place)| place.ok_or_else(|| missing(queue))).collect()
}

fn find(objects: &Objects, name: &str) -> Result<Rc<IoThreadObject>> {
    objects.iothread(name).ok_or_else(|| Error::generic(format!("iothread \"{name}\" not found")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(iothread: &str, vqs: Option<&[u16]>) -> VirtQueueMapping {
        VirtQueueMapping { iothread: iothread.to_owned(), vqs: vqs.map(<[u16]>::to_vec) }
    }

    #[test]
    fn queues_are_dealt_out_in_turn_or_as_listed() {
        let dealt = places(&[entry("a", None), entry("b", None)], 5).unwrap();
        assert_eq!(dealt, [0, 1, 0, 1, 0]);
        let listed = places(&[entry("a", Some(&[2, 0])), entry("b", Some(&[1]))], 3).unwrap();
        assert_eq!(listed, [0, 1, 0]);
    }

    #[test]
    fn each_queue_has_one_thread() {
        let refused = |mapping: &[VirtQueueMapping]| places(mapping, 2).unwrap_err().desc;
        assert!(refused(&[]).contains("no IOThread"));
        assert!(refused(&[entry("a", None), entry("a", None)]).contains("'a' twice"));
        assert!(refused(&[entry("a", Some(&[0, 1])), entry("b", None)]).contains("or none"));
        assert!(refused(&[entry("a", Some(&[0, 2]))]).contains("num-queues is 2"));
        assert!(refused(&[entry("a", Some(&[0, 0]))]).contains("queue 0 twice"));
        assert!(refused(&[entry("a", Some(&[0]))]).contains("leaves out queue 1"));
    }
}
