// SPDX-License-Identifier: Apache-2.0 OR MIT
//! virtio-blk (virtio 1.2, 5.2): a raw image, served by one thread.
//!
//! Data is copied through a buffer of the VMM; there is never a reference into guest memory. The
//! driver is untrusted: each request in the queue ends with a status, or is dropped with a warning.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT, Reader, Writer};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::virtio::{ActivateError, Activation, Interrupt, VirtioDevice};
use crate::config::DiskConfig;
use crate::limit::warn_limited;

const SECTOR_BYTES: u64 = 512;
const QUEUE_SIZE: u16 = 256;
const BUFFER_BYTES: usize = 64 << 10;

/// The disk.
pub(crate) struct Block {
    image: Arc<Image>,
    /// `struct virtio_blk_config` up to `seg_max`.
    config: [u8; 16],
    worker: Option<Worker>,
}

impl Block {
    /// Opens the image.
    ///
    /// # Errors
    /// When it cannot be opened or has no size.
    pub(crate) fn open(config: &DiskConfig) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).write(!config.read_only).open(&config.path)?;
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR_BYTES;
        let mut space = [0; 16];
        // Capacity in sectors, then size_max (not offered), then seg_max: all of the queue but
        // header and status.
        space[..8].copy_from_slice(&sectors.to_le_bytes());
        space[12..].copy_from_slice(&u32::from(QUEUE_SIZE - 2).to_le_bytes());
        let image = Image { file, sectors, read_only: config.read_only };
        Ok(Self { image: Arc::new(image), config: space, worker: None })
    }
}

impl VirtioDevice for Block {
    fn id(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn features(&self) -> u64 {
        let read_only = if self.image.read_only { 1 << VIRTIO_BLK_F_RO } else { 0 };
        read_only
            | 1 << VIRTIO_BLK_F_FLUSH
            | 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, kicks, interrupt, .. } = activation;
        let (Some(queue), Some(kick)) = (queues.into_iter().next(), kicks.into_iter().next())
        else {
            return Err(ActivateError::Queue { index: 0 });
        };
        let quit = Arc::new(AtomicBool::new(false));
        let wake = kick.try_clone()?;
        let mut server = Server {
            image: self.image.clone(),
            memory,
            queue,
            kick,
            interrupt,
            quit: quit.clone(),
        };
        let thread =
            std::thread::Builder::new().name("block".into()).spawn(move || server.run())?;
        self.worker = Some(Worker { quit, wake, thread });
        Ok(())
    }

    fn reset(&mut self) {
        if let Some(Worker { quit, wake, thread }) = self.worker.take() {
            quit.store(true, Ordering::SeqCst);
            let _ = wake.write(1);
            let _ = thread.join();
        }
    }
}

struct Worker {
    quit: Arc<AtomicBool>,
    wake: EventFd,
    thread: JoinHandle<()>,
}

/// The image behind a disk.
struct Image {
    file: File,
    sectors: u64,
    read_only: bool,
}

/// The thread that serves the queue.
struct Server {
    image: Arc<Image>,
    memory: Arc<GuestMemoryMmap>,
    queue: Queue,
    kick: EventFd,
    interrupt: Interrupt,
    quit: Arc<AtomicBool>,
}

/// Status byte of a request that failed.
struct RequestError(u32);

impl From<io::Error> for RequestError {
    fn from(_: io::Error) -> Self {
        Self(VIRTIO_BLK_S_IOERR)
    }
}

impl Server {
    fn run(&mut self) {
        while !self.quit.load(Ordering::SeqCst) {
            // What was put in the queue before the driver's first notification is served as well.
            let mut used = false;
            while let Some(chain) = self.next_chain() {
                let head = chain.head_index();
                let written = self.serve(chain);
                if head >= self.queue.size() {
                    warn_limited!(head, "an invalid block request was dropped");
                } else if let Err(error) = self.queue.add_used(&*self.memory, head, written) {
                    warn_limited!(%error, "a block request could not be completed");
                }
                used = true;
                if self.quit.load(Ordering::SeqCst) {
                    return;
                }
            }
            if used {
                self.interrupt.signal_used();
            }
            if let Err(error) = wait(&self.kick) {
                warn_limited!(%error, "the block device stops");
                return;
            }
        }
    }

    /// The next request; none as well when the driver's index makes no sense.
    fn next_chain(&mut self) -> Option<DescriptorChain<Arc<GuestMemoryMmap>>> {
        match self.queue.iter(self.memory.clone()) {
            Ok(mut chains) => chains.next(),
            Err(error) => {
                warn_limited!(%error, "a block device's queue is broken");
                None
            }
        }
    }

    /// Serves one request and returns how many bytes were written to guest memory.
    fn serve(&self, chain: DescriptorChain<Arc<GuestMemoryMmap>>) -> u32 {
        let buffers = chain
            .clone()
            .reader(&self.memory)
            .and_then(|reader| chain.writer(&self.memory).map(|writer| (reader, writer)));
        let (mut reader, mut writer) = match buffers {
            Ok(buffers) => buffers,
            Err(error) => {
                warn_limited!(%error, "a malformed block request was dropped");
                return 0;
            }
        };
        let status_at = writer.available_bytes().checked_sub(1);
        let Some(mut status_byte) = status_at.and_then(|at| writer.split_at(at).ok()) else {
            warn_limited!("a block request without room for its status was dropped");
            return 0;
        };
        let status = match self.transfer(&mut reader, &mut writer) {
            Ok(()) => VIRTIO_BLK_S_OK,
            Err(RequestError(status)) => status,
        };
        let status = u8::try_from(status).unwrap_or(u8::MAX);
        let written = writer.bytes_written();
        match status_byte.write_all(&[status]) {
            Ok(()) => u32::try_from(written.saturating_add(1)).unwrap_or(u32::MAX),
            Err(_) => 0,
        }
    }

    fn transfer(
        &self,
        reader: &mut Reader<'_>,
        writer: &mut Writer<'_>,
    ) -> Result<(), RequestError> {
        let kind: u32 = reader.read_obj()?;
        let _reserved: u32 = reader.read_obj()?;
        let sector: u64 = reader.read_obj()?;
        match kind {
            VIRTIO_BLK_T_IN => self.read(sector, writer),
            VIRTIO_BLK_T_OUT => self.write(sector, reader),
            VIRTIO_BLK_T_FLUSH if self.image.read_only => Ok(()),
            VIRTIO_BLK_T_FLUSH => Ok(self.image.file.sync_data()?),
            VIRTIO_BLK_T_GET_ID => {
                let mut id = [0; 20];
                id[..6].copy_from_slice(b"kvmmem");
                let room = writer.available_bytes().min(id.len());
                Ok(writer.write_all(id.get(..room).unwrap_or_default())?)
            }
            _ => Err(RequestError(VIRTIO_BLK_S_UNSUPP)),
        }
    }

    fn read(&self, sector: u64, writer: &mut Writer<'_>) -> Result<(), RequestError> {
        let mut buffer = vec![0; BUFFER_BYTES.min(writer.available_bytes())];
        let mut offset = self.extent(sector, writer.available_bytes())?;
        while writer.available_bytes() > 0 {
            let count = writer.available_bytes().min(buffer.len());
            let part = buffer.get_mut(..count).ok_or(RequestError(VIRTIO_BLK_S_IOERR))?;
            self.image.file.read_exact_at(part, offset)?;
            writer.write_all(part)?;
            offset += count as u64;
            self.check_quit()?;
        }
        Ok(())
    }

    fn write(&self, sector: u64, reader: &mut Reader<'_>) -> Result<(), RequestError> {
        if self.image.read_only {
            return Err(RequestError(VIRTIO_BLK_S_IOERR));
        }
        let mut buffer = vec![0; BUFFER_BYTES.min(reader.available_bytes())];
        let mut offset = self.extent(sector, reader.available_bytes())?;
        while reader.available_bytes() > 0 {
            let count = reader.available_bytes().min(buffer.len());
            let part = buffer.get_mut(..count).ok_or(RequestError(VIRTIO_BLK_S_IOERR))?;
            reader.read_exact(part)?;
            self.image.file.write_all_at(part, offset)?;
            offset += count as u64;
            self.check_quit()?;
        }
        Ok(())
    }

    /// Offset in bytes of `sector`, if `length` bytes from there are whole sectors of the image.
    fn extent(&self, sector: u64, length: usize) -> Result<u64, RequestError> {
        let refused = RequestError(VIRTIO_BLK_S_IOERR);
        let length = length as u64;
        let end = sector.checked_add(length / SECTOR_BYTES);
        if !length.is_multiple_of(SECTOR_BYTES) || end.is_none_or(|end| end > self.image.sectors) {
            return Err(refused);
        }
        sector.checked_mul(SECTOR_BYTES).ok_or(refused)
    }

    fn check_quit(&self) -> Result<(), RequestError> {
        if self.quit.load(Ordering::SeqCst) {
            Err(RequestError(VIRTIO_BLK_S_IOERR))
        } else {
            Ok(())
        }
    }
}

/// Waits for the next notification.
fn wait(kick: &EventFd) -> io::Result<()> {
    loop {
        match kick.read() {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
#[path = "block_tests.rs"]
mod tests;
