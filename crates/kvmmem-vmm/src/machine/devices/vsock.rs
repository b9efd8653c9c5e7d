// SPDX-License-Identifier: Apache-2.0 OR MIT
//! virtio-vsock (virtio 1.2, 5.10), served by the host kernel's vhost-vsock.

use std::sync::Arc;

use vhost::vhost_kern::vsock::Vsock as VhostVsockBackend;
use vhost::vsock::VhostVsock;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::virtio::{ActivateError, Activation, F_VERSION_1, VirtioDevice};
use crate::limit::warn_limited;

/// What the backend opens.
pub(crate) const DEVICE: &str = "/dev/vhost-vsock";

type Backend = VhostVsockBackend<Arc<GuestMemoryMmap>>;

const QUEUE_SIZE: u16 = 256;

/// The queues that vhost serves: receive and transmit. The third is for events, of which there are
/// none.
const VHOST_QUEUES: usize = 2;

/// Why the vsock device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The device node is missing or not accessible.
    #[error("cannot open /dev/vhost-vsock; is the module vhost_vsock loaded?")]
    Open(#[source] vhost::Error),
    /// vhost refused to work for this process.
    #[error("cannot ask vhost-vsock for its features")]
    Features(#[source] vhost::Error),
    /// The CID is reserved or another machine's.
    #[error("cannot take the vsock CID {cid}; is it another machine's?")]
    Cid {
        /// The CID.
        cid: u32,
        /// Why.
        source: vhost::Error,
    },
}

/// The device.
pub(crate) struct Vsock {
    cid: u32,
    config: [u8; 8],
    memory: Arc<GuestMemoryMmap>,
    features: u64,
    /// Open from the start, so that the CID is taken; a reset of the device opens a new one.
    backend: Option<Backend>,
    /// Whether a driver used `backend`.
    running: bool,
}

impl Vsock {
    /// Opens vhost-vsock and takes `cid`.
    ///
    /// # Errors
    /// [`VsockError`].
    pub(crate) fn open(cid: u32, memory: Arc<GuestMemoryMmap>) -> Result<Self, VsockError> {
        let (backend, features) = open_backend(cid, &memory)?;
        let config = u64::from(cid).to_le_bytes();
        Ok(Self { cid, config, memory, features, backend: Some(backend), running: false })
    }

    fn start(&self, backend: &Backend, activation: &Activation) -> Result<(), ActivateError> {
        let failed = |step| move |source| ActivateError::Vhost { step, source };
        backend.set_features(activation.features).map_err(failed("the features"))?;
        let regions: Vec<VhostUserMemoryRegionInfo> = self
            .memory
            .iter()
            .map(|region| VhostUserMemoryRegionInfo {
                guest_phys_addr: region.start_addr().0,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
                ..Default::default()
            })
            .collect();
        backend.set_mem_table(&regions).map_err(failed("the memory table"))?;
        let parts = activation.queues.iter().zip(&activation.kicks).take(VHOST_QUEUES);
        for (index, (queue, kick)) in parts.enumerate() {
            backend.set_vring_num(index, queue.size()).map_err(failed("a ring's size"))?;
            backend.set_vring_base(index, 0).map_err(failed("a ring's start"))?;
            backend.set_vring_addr(index, &ring(queue)).map_err(failed("a ring's addresses"))?;
            backend
                .set_vring_call(index, activation.interrupt.line())
                .map_err(failed("a ring's interrupt"))?;
            backend.set_vring_kick(index, kick).map_err(failed("a ring's notification"))?;
        }
        backend.start().map_err(failed("to start"))
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE; VHOST_QUEUES + 1]
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn signals_by_itself(&self) -> bool {
        true
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let backend = match self.backend.take() {
            Some(backend) => backend,
            None => open_backend(self.cid, &self.memory).map(|(backend, _)| backend).map_err(
                |error| match error {
                    VsockError::Open(source)
                    | VsockError::Features(source)
                    | VsockError::Cid { source, .. } => {
                        ActivateError::Vhost { step: "a new device after a reset", source }
                    }
                },
            )?,
        };
        let started = self.start(&backend, &activation);
        self.backend = Some(backend);
        self.running = true;
        started
    }

    fn reset(&mut self) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        // A vhost device cannot release its rings: close it. The next driver gets a new one.
        if let Some(backend) = self.backend.take()
            && let Err(error) = backend.stop()
        {
            warn_limited!(error = &error as &dyn std::error::Error, "vhost-vsock did not stop");
        }
    }
}

fn open_backend(cid: u32, memory: &Arc<GuestMemoryMmap>) -> Result<(Backend, u64), VsockError> {
    /// `VIRTIO_VSOCK_F_SEQPACKET` (virtio 1.2, 5.10.3).
    const F_SEQPACKET: u64 = 1 << 1;
    /// What of vhost's features makes sense to a driver behind virtio-mmio.
    const OFFERED: u64 =
        F_SEQPACKET | F_VERSION_1 | 1 << VIRTIO_RING_F_INDIRECT_DESC | 1 << VIRTIO_RING_F_EVENT_IDX;
    let backend = Backend::new(memory.clone()).map_err(VsockError::Open)?;
    backend.set_owner().map_err(VsockError::Features)?;
    let features = backend.get_features().map_err(VsockError::Features)? & OFFERED;
    backend.set_guest_cid(cid.into()).map_err(|source| VsockError::Cid { cid, source })?;
    Ok((backend, features))
}

fn ring(queue: &Queue) -> VringConfigData {
    VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    }
}
