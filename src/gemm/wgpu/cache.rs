//! Caches of keys and values on a device, and attention over them.
//!
//! Tokens are quantized on the processor, where they come from, so that their bytes are those of [`crate::attention`] whatever the
//! device, and what goes there is a quarter of what it would be. What the processor holds stays there: a device that was
//! lost, or a cache that outgrew its buffers, is filled from it again. Buffers double when they are full, up to what a
//! kernel sees at once; beyond that [`LoadedCache::attend`] says so.

use std::sync::{Arc, Mutex, PoisonError};

use wgpu::{BindGroup, BindGroupDescriptor, BindGroupEntry, Buffer, BufferDescriptor, BufferUsages};

use super::Wgpu;
use super::adapter::WORKGROUPS;
use super::device::Device;
use super::planes::PIECE;
use super::record::Recording;
use crate::attention::{Attend, BLOCK, KvCache, KvFormat, KvPlane};
use crate::error::{Error, Result};

/// Blocks that a cache has room for at least.
const LEAST: usize = 8;

/// Channels of a head that the memory of a workgroup has room for.
const CHANNELS: usize = 512;

/// Tokens that a workgroup takes at once.
const TILE: usize = 128;

/// Workgroups that keep any device busy.
const BUSY: usize = 512;

/// A cache of keys and values on a graphics device.
#[derive(Debug)]
pub struct LoadedCache {
    backend: Wgpu,
    tokens: KvCache,
    resident: Mutex<Option<Resident>>,
}

/// What of a cache is on a device.
#[derive(Debug)]
struct Resident {
    device: Arc<Device>,
    /// In the order of [`KvPlane::ALL`].
    buffers: Vec<Buffer>,
    group: BindGroup,
    /// Blocks that there is room for.
    capacity: usize,
    /// Tokens that are there.
    len: usize,
}

impl LoadedCache {
    pub(super) fn new(backend: &Wgpu, tokens: KvCache) -> Result<Self> {
        let channels = tokens.format().head_dim();
        if channels > CHANNELS {
            return Err(Error::unsupported(format!(
                "heads of {channels} channels, expected at most {CHANNELS} on a graphics device; attend on the CPU"
            )));
        }
        let loaded = Self { backend: backend.clone(), tokens, resident: Mutex::default() };
        let device = backend.device()?;
        device.watched("a cache of keys and values", loaded.tokens.bytes() as u64, || loaded.on(&device))?;
        Ok(loaded)
    }

    /// The tokens, as the processor holds them.
    #[must_use]
    pub fn tokens(&self) -> &KvCache {
        &self.tokens
    }

    /// Adds tokens, as [`KvCache::append`]; they go to the device with the next call that needs them.
    ///
    /// # Errors
    /// As [`KvCache::append`].
    pub fn append(&mut self, keys: &[f32], values: &[f32]) -> Result<()> {
        self.tokens.append(keys, values)
    }

    /// Forgets all tokens and keeps their memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        if let Some(resident) = self.resident.get_mut().unwrap_or_else(PoisonError::into_inner) {
            resident.len = 0;
        }
    }

    /// Attention as [`attend`](crate::attention::attend), on the device.
    ///
    /// Its bound is the same with `4 + 2|x|` in place of 8 units for the power of e of a difference `x` of scores, which is
    /// what shaders promise. Results of a query whose scores are not finite are anything.
    ///
    /// # Errors
    /// As [`attend`](crate::attention::attend), and [`Error::OutOfMemory`], [`Error::Device`], and [`Error::Unsupported`] when the cache or
    /// the queries are more than a kernel sees at once.
    pub fn attend(&self, q: &[f32], m: usize, options: Attend, out: &mut [f32]) -> Result<()> {
        options.check(&self.tokens.view(), q.len(), m, out.len())?;
        if q.is_empty() {
            return Ok(());
        }
        let device = self.backend.device()?;
        let flight = device.watched("attention", 8 * q.len() as u64, || {
            let mut recording = Recording::new(&device);
            self.record(&mut recording, &device, q, m, options)?;
            Ok(recording.submit())
        })?;
        flight.wait()?;
        flight.read([&mut *out])
    }

    /// Whether the cache belongs to a backend.
    pub(super) fn is_of(&self, backend: &Wgpu) -> bool {
        self.backend.is(backend)
    }

    /// Records a call that has been checked and has queries.
    pub(super) fn record(
        &self,
        recording: &mut Recording,
        device: &Arc<Device>,
        q: &[f32],
        m: usize,
        options: Attend,
    ) -> Result<()> {
        let call = Call::new(&self.tokens, device, q, m, options)?;
        let group = self.on(device)?;
        recording.attend(&group, self.tokens.format(), &call)
    }

    /// The bindings of the cache on a device, with all tokens there.
    fn on(&self, device: &Arc<Device>) -> Result<BindGroup> {
        let mut resident = self.resident.lock().unwrap_or_else(PoisonError::into_inner);
        let needed = self.tokens.blocks();
        let before = resident.as_ref().map_or(0, |there| there.capacity);
        let there = match resident.take() {
            Some(there) if Arc::ptr_eq(&there.device, device) && there.capacity >= needed => resident.insert(there),
            _ => resident.insert(Resident::new(device, self.tokens.format(), needed, before)?),
        };
        there.fill(&self.tokens);
        Ok(there.group.clone())
    }
}

impl Resident {
    /// Buffers for at least `needed` blocks, and for twice as many as `before` where that is possible.
    fn new(device: &Arc<Device>, format: &KvFormat, needed: usize, before: usize) -> Result<Self> {
        let bytes = |plane| 4 * format.heads() * format.plane_words(plane);
        let (tails, blocks): (Vec<KvPlane>, Vec<KvPlane>) = KvPlane::ALL.into_iter().partition(|plane| plane.is_tail());
        let widest = |planes: Vec<KvPlane>| planes.into_iter().map(bytes).max().unwrap_or(1);
        let most = usize::try_from(device.binding_bytes()).unwrap_or(usize::MAX);
        let (tail, most) = (widest(tails), most / widest(blocks).max(1));
        if most < needed.max(1) || tail as u64 > device.binding_bytes() {
            return Err(Error::unsupported(format!(
                "a cache of {} tokens or more, expected at most {} of {} heads of {} channels that the device sees at once; \
                 attend on the CPU",
                needed * BLOCK,
                most * BLOCK,
                format.heads(),
                format.head_dim()
            )));
        }
        let capacity = needed.max(2 * before).max(LEAST).min(most);
        let buffers: Vec<Buffer> = KvPlane::ALL
            .into_iter()
            .map(|plane| {
                device.raw().create_buffer(&BufferDescriptor {
                    label: Some("cache"),
                    size: (bytes(plane) * if plane.is_tail() { 1 } else { capacity }) as u64,
                    usage: BufferUsages::STORAGE | BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                })
            })
            .collect();
        let entries: Vec<_> = (0..)
            .zip(&buffers)
            .map(|(binding, buffer)| BindGroupEntry { binding, resource: buffer.as_entire_binding() })
            .collect();
        let layout = device.kernels.cache();
        let group =
            device.raw().create_bind_group(&BindGroupDescriptor { label: Some("cache"), layout, entries: &entries });
        Ok(Self { device: Arc::clone(device), buffers, group, capacity, len: 0 })
    }

    /// Uploads the tokens that are not there yet.
    fn fill(&mut self, tokens: &KvCache) {
        let format = tokens.format();
        let (from, to) = (self.len / BLOCK, tokens.blocks());
        // What a tail had of an earlier block is no longer there.
        let in_tail = if from == to { self.len % BLOCK } else { 0 };
        for (plane, buffer) in KvPlane::ALL.into_iter().zip(&self.buffers) {
            let (unit, first, last) = match plane.is_tail() {
                true => (format.heads() * format.tail_words(), in_tail, tokens.len() % BLOCK),
                false => (format.heads() * format.plane_words(plane), from, to),
            };
            if first < last {
                write(&self.device, buffer, unit * first, &tokens.plane(plane)[unit * first..unit * last]);
            }
        }
        self.len = tokens.len();
    }
}

/// Writes words from number `first` of a buffer on.
fn write(device: &Device, buffer: &Buffer, first: usize, words: &[u32]) {
    for (number, piece) in (0..).zip(bytemuck::cast_slice(words).chunks(PIECE)) {
        device.queue().write_buffer(buffer, (4 * first + number * PIECE) as u64, piece);
        if piece.len() == PIECE {
            // Hands the piece over, so that the next one finds its memory free.
            device.queue().submit([]);
        }
    }
}

/// A call of attention as kernels want it.
#[derive(Debug)]
pub(super) struct Call {
    /// Queries, arranged, each multiplied by the scale of scores.
    pub x: Vec<f32>,
    /// Queries that a workgroup takes: 1, 4 or 8.
    pub tile: u32,
    /// Queries that share a head of keys and values.
    pub rows: usize,
    /// Queries of all heads.
    pub queries: usize,
    /// Into how many runs tokens are divided.
    pub runs: usize,
    /// Numbers of results, those of runs not counted.
    pub results: usize,
    /// What the shader calls `Call`.
    pub words: [usize; 8],
}

impl Call {
    fn new(cache: &KvCache, device: &Device, q: &[f32], m: usize, options: Attend) -> Result<Self> {
        let (dim, kv_heads) = (cache.format().head_dim(), cache.format().heads());
        let queries = q.len() / dim;
        let (heads, rows) = (queries / m, queries / kv_heads);
        let tile = match rows {
            1 => 1,
            2..=4 => 4,
            _ if dim > CHANNELS / 2 => 4,
            _ => 8,
        };
        let tiles_of_rows = rows.div_ceil(tile);
        let wide = dim.next_multiple_of(8);
        let most = usize::try_from(device.binding_bytes()).unwrap_or(usize::MAX) / 4;
        let x_len = kv_heads * tiles_of_rows * tile * wide;
        if x_len.max(q.len()) > most || tiles_of_rows > WORKGROUPS as usize {
            return Err(Error::unsupported(format!(
                "{queries} queries of {dim} channels, expected fewer, as the device sees {most} numbers at once; divide them"
            )));
        }
        // As many runs as keep the device busy, and as their results have room for.
        let tiles = cache.len().div_ceil(TILE);
        let room = (most - q.len()) / (queries * (dim + 2));
        let runs = (BUSY / (kv_heads * tiles_of_rows)).min(room).clamp(1, tiles);
        let tiles_of_run = tiles.div_ceil(runs);
        let runs = tiles.div_ceil(tiles_of_run);
        let per_head = heads / kv_heads;
        let mut x = vec![0.0; x_len];
        let scale = options.scale(dim);
        for (number, query) in q.chunks_exact(dim).enumerate() {
            let (token, head) = (number / heads, number % heads);
            let row = token * per_head + head % per_head;
            // One query is read as it is, several with those of a tile side by side.
            let first = ((head / per_head) * tiles_of_rows + row / tile) * tile * wide + row % tile;
            for (to, from) in x[first..].iter_mut().step_by(tile).zip(query) {
                *to = from * scale;
            }
        }
        let words = [cache.len(), m, per_head, tiles_of_run, runs, usize::from(options.causal), q.len(), 0];
        let tile = u32::try_from(tile).expect("at most 8");
        Ok(Self { x, tile, rows, queries, runs, results: q.len(), words })
    }

    /// Numbers of results, and of what the runs have for each other.
    pub fn numbers(&self, format: &KvFormat) -> usize {
        self.results + if self.runs > 1 { self.runs * self.queries * (format.head_dim() + 2) } else { 0 }
    }
}
