//! Judges each message of a frontend before the protocol engine sees it.
//!
//! The engine ends the connection over anything it does not like, so everything is validated here, and what the engine
//! cannot do, or what needs none of its state, is answered here. Pure but for looking at descriptors: a message and what
//! came before it in, a verdict (`verdict.rs`) out; `session.rs` carries it out.

use super::backend::PROTOCOL_FEATURES;
use super::config_space::{CONFIG_LEN, F_LOG_ALL, F_PROTOCOL_FEATURES, F_VERSION_1, WRITEBACK};
use super::descriptors::{Received, is_eventfd, is_pipe, is_unix_stream};
use super::memory::{DirtyLog, Quota, SharedFile, SharedMap};
use super::message::{Kind, u32_at, u64_at};
use super::regions::{MAX_SLOTS, MAX_TABLE, REGION_LEN, Refusal, Region, Regions};
use super::ring::{MAX_SIZE, part_sizes};
use super::verdict::{Effect, Verdict};
use super::wire::Message;

const P_REPLY_ACK: u64 = 1 << 3;
const P_BACKEND_REQ: u64 = 1 << 5;
const P_INBAND: u64 = 1 << 14;
const NO_FD: u64 = 1 << 8;
const LOG_FLAG: u32 = 1;

#[derive(Clone, Copy, Debug, Default)]
struct Ring {
    size: u16,
    kick: bool,
    enabled: bool,
}

impl Ring {
    fn runs(self) -> bool {
        self.kick && self.enabled
    }
}

/// What a session has said so far. Starts anew with each connection.
pub(super) struct Filter {
    offered: u64,
    acked: Option<u64>,
    protocol: u64,
    rings: Vec<Ring>,
    regions: Regions,
    quota: Quota,
    /// One past the last guest address that the log covers.
    log_covers: Option<u64>,
}

impl Filter {
    /// A device that offers these feature bits and has this many queues; what it maps counts for `quota`.
    pub(super) fn new(offered: u64, queues: usize, quota: Quota) -> Self {
        Self {
            offered,
            acked: None,
            protocol: 0,
            rings: vec![Ring::default(); queues],
            regions: Regions::new(quota.clone()),
            quota,
            log_covers: None,
        }
    }

    /// True where the frontend waits for an acknowledgement of `message`. Ask after [`Filter::judge`].
    pub(super) fn wants_ack(&self, message: &Message) -> bool {
        // With the message that negotiates acknowledgements one can be asked for already.
        let negotiating = message.request == Kind::SET_PROTOCOL_FEATURES as u32
            && message.body.len() == 8
            && u64_at(&message.body, 0) & P_REPLY_ACK != 0;
        message.need_reply && (self.protocol & P_REPLY_ACK != 0 || negotiating)
    }

    /// Judges the next message and takes from it the descriptors that nobody is to get.
    pub(super) fn judge(&mut self, message: &mut Message, config: &[u8; CONFIG_LEN]) -> Verdict {
        let Some(kind) = Kind::of(message.request) else { return Verdict::Refuse("the request is not one of a disk") };
        if !kind.takes_len(message.body.len()) {
            return Verdict::Drop("a message has a body of the wrong length");
        }
        if kind.needs().is_some_and(|bit| self.protocol & (1 << bit) == 0) {
            return Verdict::Refuse("a request needs a protocol feature that was not negotiated");
        }
        let verdict = match kind {
            Kind::SET_MEM_TABLE => self.set_mem_table(message),
            _ => self.judge_kind(kind, &message.body, &mut message.fds, config),
        };
        verdict.unwrap_or_else(Verdict::Refuse)
    }

    fn judge_kind(
        &mut self,
        kind: Kind,
        body: &[u8],
        fds: &mut Vec<Received>,
        config: &[u8; CONFIG_LEN],
    ) -> Result<Verdict, Refusal> {
        match kind {
            Kind::ADD_MEM_REG => return self.add_region(body, fds),
            Kind::SET_VRING_KICK => return self.set_kick(body, fds),
            Kind::SET_VRING_CALL | Kind::SET_VRING_ERR => return self.set_notifier(body, fds),
            Kind::SET_LOG_BASE => return self.set_log_base(body, fds),
            Kind::SET_BACKEND_REQ_FD => return set_channel(fds),
            // No other message has descriptors; what came along is closed.
            _ => fds.clear(),
        }
        match kind {
            Kind::GET_FEATURES => Ok(number(self.offered)),
            Kind::GET_PROTOCOL_FEATURES => Ok(number(PROTOCOL_FEATURES)),
            Kind::GET_QUEUE_NUM => Ok(number(self.rings.len() as u64)),
            Kind::GET_MAX_MEM_SLOTS => Ok(number(MAX_SLOTS as u64)),
            Kind::SET_FEATURES => self.set_features(u64_at(body, 0)),
            Kind::SET_PROTOCOL_FEATURES => Ok(self.set_protocol_features(u64_at(body, 0))),
            // The session has one owner: whoever is connected. Giving it up changes nothing (deprecated since 2014).
            // The log's eventfd may be signalled, and is not.
            Kind::SET_OWNER | Kind::RESET_OWNER | Kind::SET_LOG_FD => Ok(Verdict::Done),
            Kind::SET_VRING_NUM => self.set_num(body),
            Kind::SET_VRING_BASE => self.set_base(body),
            Kind::SET_VRING_ADDR => self.set_addr(body),
            Kind::GET_VRING_BASE => Ok(self.get_base(body)),
            Kind::SET_VRING_ENABLE => self.set_enable(body),
            Kind::GET_CONFIG => Ok(get_config(body, config)),
            Kind::SET_CONFIG => set_config(body, config),
            Kind::RESET_DEVICE => Ok(self.reset()),
            Kind::REM_MEM_REG => self.remove_region(body),
            Kind::SET_MEM_TABLE
            | Kind::ADD_MEM_REG
            | Kind::SET_VRING_KICK
            | Kind::SET_VRING_CALL
            | Kind::SET_VRING_ERR
            | Kind::SET_LOG_BASE
            | Kind::SET_BACKEND_REQ_FD => unreachable!("returned above"),
        }
    }

    // ---- features -------------------------------------------------------------------------------------------------

    fn set_features(&mut self, bits: u64) -> Result<Verdict, Refusal> {
        if bits & !self.offered != 0 {
            return Err("features were acked that are not offered");
        }
        if bits & F_VERSION_1 == 0 {
            return Err("the driver does not speak virtio 1");
        }
        let changed = self.acked.map_or(u64::MAX, |acked| acked ^ bits);
        if changed & !F_LOG_ALL != 0 && self.rings.iter().any(|ring| ring.runs()) {
            return Err("features cannot change while a ring runs");
        }
        if bits & F_LOG_ALL != 0 && self.log_covers.is_some_and(|covers| covers < self.regions.end()) {
            return Err("the log does not cover guest memory any more");
        }
        self.acked = Some(bits);
        if bits & F_PROTOCOL_FEATURES == 0 {
            self.rings.iter_mut().for_each(|ring| ring.enabled = true);
        }
        Ok(Verdict::Pass)
    }

    fn set_protocol_features(&mut self, bits: u64) -> Verdict {
        let channel = P_BACKEND_REQ | P_REPLY_ACK;
        if bits & P_INBAND != 0 && bits & channel != channel {
            return Verdict::Drop("in-band notifications were acked without what they need");
        }
        if bits & !PROTOCOL_FEATURES != 0 {
            return Verdict::Refuse("protocol features were acked that are not offered");
        }
        self.protocol = bits;
        // The engine has its own, which are all of them: the gates are here.
        Verdict::Done
    }

    fn reset(&mut self) -> Verdict {
        self.acked = None;
        self.rings.iter_mut().for_each(|ring| ring.enabled = false);
        Verdict::Pass
    }

    // ---- memory ---------------------------------------------------------------------------------------------------

    fn set_mem_table(&mut self, message: &mut Message) -> Result<Verdict, Refusal> {
        let Message { body, fds, .. } = message;
        if fds.len() > MAX_TABLE {
            return Ok(Verdict::Drop("a memory table came with too many descriptors"));
        }
        let count = usize::try_from(u32_at(body, 0)).unwrap_or(usize::MAX);
        if count > MAX_TABLE {
            return Err("a memory table has too many regions");
        }
        if body.len() != 8 + count * REGION_LEN {
            return Ok(Verdict::Drop("a memory table has the wrong length"));
        }
        if count == 0 {
            if self.rings.iter().any(|ring| ring.runs()) {
                return Err("memory cannot go away while a ring runs");
            }
            return Ok(Verdict::Unmap(self.regions.take()));
        }
        let mut regions = body[8..].chunks_exact(REGION_LEN).map(Region::parse).collect::<Result<Vec<_>, _>>()?;
        self.inside_log(&regions)?;
        sort(&mut regions, fds)?;
        self.regions.replace(&regions, fds)?;
        // In the only form that the engine takes: by guest address, zeroes in the padding.
        let head = (count as u64).to_ne_bytes();
        *body = head.into_iter().chain(regions.iter().flat_map(Region::bytes)).collect();
        Ok(self.other_memory())
    }

    fn add_region(&mut self, body: &[u8], fds: &[Received]) -> Result<Verdict, Refusal> {
        let [file] = fds else { return Err("a memory region comes with exactly one descriptor") };
        let region = Region::parse(&body[8..])?;
        self.inside_log(&[region])?;
        self.regions.add(region, file)?;
        Ok(self.other_memory())
    }

    fn remove_region(&mut self, body: &[u8]) -> Result<Verdict, Refusal> {
        self.regions.remove(Region::parse(&body[8..])?)?;
        Ok(self.other_memory())
    }

    fn other_memory(&self) -> Verdict {
        Verdict::PassAfter(Effect::Memory(self.regions.map()))
    }

    /// What is written while logging is on has a bit: whoever adds memory enlarges the log first.
    fn inside_log(&self, regions: &[Region]) -> Result<(), Refusal> {
        let logging = self.acked.is_some_and(|acked| acked & F_LOG_ALL != 0);
        let end = regions.iter().map(Region::end).max().unwrap_or(0);
        if logging && self.log_covers.is_some_and(|covers| covers < end) {
            return Err("the log does not cover guest memory");
        }
        Ok(())
    }

    fn set_log_base(&mut self, body: &[u8], fds: &[Received]) -> Result<Verdict, Refusal> {
        let [file] = fds else { return Err("a log comes with exactly one descriptor") };
        let file = SharedFile::new(file, u64_at(body, 8), u64_at(body, 0))?;
        let log = DirtyLog::new(SharedMap::new(&file, &self.quota)?);
        if log.covers() < self.regions.end() {
            return Err("a log does not cover guest memory");
        }
        self.log_covers = Some(log.covers());
        Ok(Verdict::AnswerAfter(Effect::Log(log), body.to_vec()))
    }

    // ---- rings ----------------------------------------------------------------------------------------------------

    fn ring(&mut self, index: u64) -> Result<(usize, &mut Ring), Refusal> {
        let index = usize::try_from(index).map_err(|_| NO_RING)?;
        Ok((index, self.rings.get_mut(index).ok_or(NO_RING)?))
    }

    fn set_num(&mut self, body: &[u8]) -> Result<Verdict, Refusal> {
        let size = u16::try_from(u32_at(body, 4)).ok().filter(|size| size.is_power_of_two() && *size <= MAX_SIZE);
        let size = size.ok_or("a ring's size is not a power of two up to 32768")?;
        let (_, ring) = self.ring(u64::from(u32_at(body, 0)))?;
        if ring.runs() && ring.size != size {
            return Err("a ring's size cannot change while it runs");
        }
        ring.size = size;
        Ok(Verdict::Pass)
    }

    fn set_base(&mut self, body: &[u8]) -> Result<Verdict, Refusal> {
        let base = u32_at(body, 4);
        let (_, ring) = self.ring(u64::from(u32_at(body, 0)))?;
        if ring.runs() {
            return Err("a ring's base cannot change while it runs");
        }
        if base > u32::from(u16::MAX) {
            return Err("a ring's base has 16 bits");
        }
        Ok(Verdict::Pass)
    }

    fn set_addr(&mut self, body: &[u8]) -> Result<Verdict, Refusal> {
        let flags = u32_at(body, 4);
        let [desc, used, avail, log] = [8, 16, 24, 32].map(|at| u64_at(body, at));
        let (index, ring) = self.ring(u64::from(u32_at(body, 0)))?;
        let [desc_len, avail_len, used_len] = part_sizes(ring.size.max(1));
        if flags & !LOG_FLAG != 0 {
            return Err("a ring's address has unknown flags");
        }
        if desc % 16 != 0 || avail % 2 != 0 || used % 4 != 0 {
            return Err("a part of a ring is misaligned");
        }
        let mapped = [(desc, desc_len), (avail, avail_len), (used, used_len)];
        if !mapped.into_iter().all(|(at, len)| self.regions.holds_user(at, len)) {
            return Err("a part of a ring is outside guest memory");
        }
        let log = (flags & LOG_FLAG != 0).then_some(log);
        if let Some(log) = log {
            let covered = self.log_covers.is_none_or(|end| log.checked_add(used_len).is_some_and(|last| last <= end));
            if !covered || !self.regions.holds_guest(log, used_len) {
                return Err("a used ring is logged outside guest memory or the log");
            }
        }
        Ok(Verdict::PassAfter(Effect::LogUsed(index, log)))
    }

    fn get_base(&mut self, body: &[u8]) -> Verdict {
        let Ok((_, ring)) = self.ring(u64::from(u32_at(body, 0))) else { return Verdict::Drop(NO_RING) };
        ring.kick = false;
        Verdict::Relay
    }

    fn set_enable(&mut self, body: &[u8]) -> Result<Verdict, Refusal> {
        let on = u32_at(body, 4);
        if self.acked.is_none_or(|acked| acked & F_PROTOCOL_FEATURES == 0) {
            return Err("rings are enabled without asking where protocol features were not acked");
        }
        let (_, ring) = self.ring(u64::from(u32_at(body, 0)))?;
        if on > 1 {
            return Err("a ring is enabled with 1 or disabled with 0");
        }
        ring.enabled = on == 1;
        Ok(Verdict::Pass)
    }

    fn set_kick(&mut self, body: &[u8], fds: &[Received]) -> Result<Verdict, Refusal> {
        let word = u64_at(body, 0);
        let (_, ring) = self.ring(word & 0xff)?;
        if word & NO_FD != 0 {
            return Err("a ring without a kick descriptor would have to be polled");
        }
        let [fd] = fds else { return Ok(Verdict::Drop("a kick came without its descriptor")) };
        if !is_eventfd(fd) {
            return Err("a kick descriptor is no eventfd");
        }
        ring.kick = true;
        Ok(Verdict::Pass)
    }

    fn set_notifier(&mut self, body: &[u8], fds: &[Received]) -> Result<Verdict, Refusal> {
        let word = u64_at(body, 0);
        self.ring(word & 0xff)?;
        match (word & NO_FD != 0, fds) {
            (true, []) => Ok(Verdict::Pass),
            (false, [fd]) if is_eventfd(fd) || is_pipe(fd) => Ok(Verdict::Pass),
            (false, [_]) => Err("a call descriptor is neither an eventfd nor a pipe"),
            _ => Ok(Verdict::Drop("a call came with the wrong number of descriptors")),
        }
    }
}

/// By guest address, each with its descriptor.
fn sort(regions: &mut [Region], fds: &mut Vec<Received>) -> Result<(), Refusal> {
    if regions.len() != fds.len() {
        return Err("memory regions and descriptors do not match");
    }
    let mut pairs: Vec<_> = regions.iter().copied().zip(fds.drain(..)).collect();
    pairs.sort_by_key(|(region, _)| region.gpa);
    for (place, (region, fd)) in regions.iter_mut().zip(pairs) {
        *place = region;
        fds.push(fd);
    }
    Ok(())
}

const NO_RING: Refusal = "there is no such ring";

fn set_channel(fds: &mut Vec<Received>) -> Result<Verdict, Refusal> {
    let (Some(fd), true) = (fds.pop(), fds.is_empty()) else { return Err("a channel is exactly one descriptor") };
    if is_unix_stream(&fd) {
        Ok(Verdict::DoneAfter(Effect::Channel(fd)))
    } else {
        Err("a channel is no unix stream socket")
    }
}

fn number(value: u64) -> Verdict {
    Verdict::Answer(value.to_ne_bytes().to_vec())
}

/// A range outside the config space is answered with an empty body (vhost-user, "GET_CONFIG").
fn get_config(body: &[u8], config: &[u8; CONFIG_LEN]) -> Verdict {
    let Some((from, to)) = config_range(body) else { return Verdict::Drop("a config message lies about its length") };
    match config.get(from..to) {
        Some(data) if !data.is_empty() => Verdict::Answer([&body[..12], data].concat()),
        _ => Verdict::Answer(Vec::new()),
    }
}

/// Whoever asks, and why: only the writeback byte may change.
fn set_config(body: &[u8], config: &[u8; CONFIG_LEN]) -> Result<Verdict, Refusal> {
    let Some((from, to)) = config_range(body) else {
        return Ok(Verdict::Drop("a config message lies about its length"));
    };
    let mut wanted = *config;
    let part = wanted.get_mut(from..to).ok_or("a config change is outside the config space")?;
    part.copy_from_slice(&body[12..]);
    let writeback = wanted[WRITEBACK];
    wanted[WRITEBACK] = config[WRITEBACK];
    if wanted != *config || !(from..to).contains(&WRITEBACK) || writeback > 1 {
        return Err("nothing but the write cache can be configured");
    }
    Ok(Verdict::DoneAfter(Effect::Writeback(writeback == 1)))
}

/// `None` where the message has other data than it says. A range that no usize can hold is an impossible one.
fn config_range(body: &[u8]) -> Option<(usize, usize)> {
    let [offset, size] = [0, 4].map(|at| usize::try_from(u32_at(body, at)).unwrap_or(usize::MAX));
    (body.len() - 12 == size).then(|| (offset, offset.saturating_add(size)))
}

#[cfg(test)]
mod tests;
