// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views on the host of a target whose VMM keeps its RAM to itself: here, this process.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem::{Access, Event, Range, View, ViewError};
use kvmmem_broker::{Broker, Limits, Server};
use kvmmem_client::admin::{Admin, GrantRequest, NewGrant, Rights, Span};
use kvmmem_client::vmm::{Region, VmIdentity};
use proptest::prelude::*;
use rustix::fs::{Mode, OFlags};
use uuid::Uuid;

const PATIENCE: Duration = Duration::from_secs(60);
const PAGE: u64 = 0x1000;
/// The second region is adjacent to the first, and elsewhere in the VMM.
const SECOND: u64 = 3 << 20;
const SECOND_LEN: u64 = 64 << 10;

struct Host {
    socket: PathBuf,
    broker: Arc<Broker>,
    memory: Vec<u8>,
    vm: u64,
    stop: Option<UnixStream>,
    server: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Host {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("broker.sock");
        // A slow machine is waited for.
        let limits = Limits { confirmation: PATIENCE, ..Limits::default() };
        let server = Server::bind_with(&socket, None, limits).unwrap();
        let broker = Arc::clone(server.service().broker());
        let (stop, stopped) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || server.run(stopped.as_fd()).unwrap());
        let memory = vec![0; usize::try_from(SECOND + SECOND_LEN + PAGE).unwrap()];
        let own = rustix::fs::open("/proc/self/mem", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .unwrap();
        let identity = VmIdentity {
            start_time_ms: 1_700_000_000_000,
            ..VmIdentity::target("target", Uuid::from_bytes([7; 16]))
        };
        let mut host = Self {
            socket,
            broker,
            memory,
            vm: 0,
            stop: Some(stop),
            server: Some(server),
            _directory: directory,
        };
        let registration = identity.registered(host.regions());
        host.vm = host.broker.register_private(registration, own, std::process::id()).unwrap();
        host
    }

    fn regions(&self) -> Vec<Region> {
        let hva = (self.memory.as_ptr().addr() as u64).next_multiple_of(PAGE);
        let region = |gpa, len, offset| Region { gpa, len, offset, file: 0 };
        vec![region(0, SECOND, hva + SECOND_LEN), region(SECOND, SECOND_LEN, hva)]
    }

    fn grant(&self, rights: Rights, spans: Option<Vec<Span>>) -> NewGrant {
        let (target, uses, ttl_ms) = ("target".into(), 1, 60_000);
        let request =
            GrantRequest { target, spans, rights, ttl_ms, uses, holder: None, label: None };
        self.admin().grant(&request).unwrap()
    }

    fn admin(&self) -> Admin {
        let mut admin = Admin::connect(&self.socket).unwrap();
        admin.limit_answers(PATIENCE).unwrap();
        admin
    }

    fn view(&self, rights: Rights) -> (View, u64) {
        let granted = self.grant(rights, None);
        (View::attach_host(&self.socket, &granted.token, Access::Granted).unwrap(), granted.grant)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(server) = self.server.take() {
            server.join().unwrap();
        }
    }
}

#[test]
fn what_is_written_is_read_and_nothing_is_mapped() {
    let host = Host::start();
    let (view, _) = host.view(Rights::ReadWrite);
    let whole = [Range { gpa: 0, len: SECOND }, Range { gpa: SECOND, len: SECOND_LEN }];
    assert_eq!(view.ranges().unwrap(), whole);
    // More than one copy, and across the regions.
    let bytes: Vec<u8> = (0..SECOND).map(|at| (at % 249) as u8).collect();
    view.write_at(PAGE - 3, &bytes).unwrap();
    let mut back = vec![0; bytes.len()];
    view.read_at(PAGE - 3, &mut back).unwrap();
    assert!(back == bytes);
    for gpa in [0, 5, SECOND - 1, SECOND, SECOND + 7] {
        let rest = whole.iter().find(|range| gpa < range.gpa + range.len).unwrap();
        let expected = Range { gpa, len: rest.gpa + rest.len - gpa };
        assert_eq!(view.data_from(gpa).unwrap(), Some(expected));
    }
    assert_eq!(view.data_from(SECOND + SECOND_LEN).unwrap(), None);
    let error = view.map(Range { gpa: 0, len: PAGE }).unwrap_err();
    assert!(matches!(error, ViewError::Private { .. }), "{error}");
    assert_eq!(error.errno(), Some(95));
    let words = error.to_string();
    assert!(
        words.contains("share=on") && words.contains("read_at") && words.contains("at gpa 0x0"),
        "{words}"
    );
    let beyond = view.read_at(SECOND + SECOND_LEN - 1, &mut [0; 2]).unwrap_err();
    assert!(
        matches!(beyond, ViewError::Hole { gpa, .. } if gpa == SECOND + SECOND_LEN),
        "{beyond}"
    );

    // Many pieces in one call.
    let page = |n: u64| n * 7919 % (SECOND + SECOND_LEN - PAGE);
    let mut buffers = vec![[0; 0x1000]; 700];
    let mut pieces: Vec<(u64, &mut [u8])> =
        (0..).map(page).zip(buffers.iter_mut().map(|buffer| &mut buffer[..])).collect();
    view.read_vectored(&mut pieces).unwrap();
    let right = |at: u64| {
        if (PAGE - 3..PAGE - 3 + SECOND).contains(&at) {
            ((at - (PAGE - 3)) % 249) as u8
        } else {
            0
        }
    };
    assert!(
        (0..)
            .map(page)
            .zip(&buffers)
            .all(|(gpa, buffer)| (gpa..).zip(buffer).all(|(at, byte)| *byte == right(at)))
    );
    let (mut one, mut two) = ([0; 8], [0; 8]);
    let error = view
        .read_vectored(&mut [(PAGE, &mut one[..]), (SECOND + SECOND_LEN - 3, &mut two[..])])
        .unwrap_err();
    let hole = SECOND + SECOND_LEN;
    assert!(
        error.piece == 1 && matches!(error.source, ViewError::Hole { gpa, .. } if gpa == hole),
        "{error:?}"
    );
    assert_eq!(one, std::array::from_fn(|n| right(PAGE + n as u64)));

    let granted = host.grant(Rights::ReadWrite, None);
    let reader = View::attach_host(&host.socket, &granted.token, Access::ReadOnly).unwrap();
    reader.read_at(PAGE, &mut [0; 2]).unwrap();
    let written = reader.write_at(PAGE, &[0; 2]);
    assert!(matches!(written, Err(ViewError::ReadOnly { .. })), "{written:?}");
}

#[test]
fn a_view_follows_the_ram_and_hears_of_its_end_whatever_it_is_doing() {
    for end in [Event::Revoked, Event::Gone] {
        let host = Host::start();
        let (view, grant) = host.view(Rights::ReadOnly);
        let read = AtomicU64::new(0);
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..3)
                .map(|_| {
                    scope.spawn(|| {
                        let mut bytes = vec![0; 1 << 20];
                        loop {
                            if let Err(error) = view.read_at(0, &mut bytes) {
                                return error;
                            }
                            let mut pieces: Vec<_> =
                                (0..).step_by(5000).zip(bytes.chunks_mut(4096)).collect();
                            if let Err(error) = view.read_vectored(&mut pieces) {
                                return error.source;
                            }
                            read.fetch_add(1, Ordering::Relaxed);
                        }
                    })
                })
                .collect();
            while read.load(Ordering::Relaxed) < 3 {
                std::thread::yield_now();
            }
            // A change is heard of while copies are under way.
            let fewer = vec![host.regions()[0]];
            host.broker.move_ram(host.vm, fewer).unwrap();
            assert_eq!(view.wait(PATIENCE).unwrap(), Some(Event::Changed));
            assert_eq!(view.ranges().unwrap(), [Range { gpa: 0, len: SECOND }]);
            assert!(matches!(
                view.read_at(SECOND, &mut [0]),
                Err(ViewError::Hole { gpa: SECOND, .. })
            ));
            if end == Event::Revoked {
                let revoked = host.admin().revoke(grant).unwrap();
                assert_eq!((revoked.views, revoked.unconfirmed), (1, 0));
            } else {
                host.broker.remove(host.vm);
            }
            assert_eq!(view.wait(PATIENCE).unwrap(), Some(end));
            for reader in readers {
                let error = reader.join().unwrap();
                match end {
                    Event::Revoked => {
                        assert!(matches!(error, ViewError::Revoked { .. }), "{error}")
                    }
                    _ => assert!(matches!(error, ViewError::Gone { .. }), "{error}"),
                }
            }
        });
        assert!(view.ranges().unwrap().is_empty());
        assert!(view.read_at(0, &mut [0]).is_err() && view.data_from(0).is_err());
        view.detach().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    /// Copies through the broker are those of a plain buffer.
    #[test]
    fn copies_are_those_of_a_buffer(
        steps in proptest::collection::vec((0..SECOND + SECOND_LEN, 0usize..20_000, any::<u8>(), any::<bool>()), 1..20),
    ) {
        let host = Host::start();
        let (view, _) = host.view(Rights::ReadWrite);
        let mut model = vec![0u8; usize::try_from(SECOND + SECOND_LEN).unwrap()];
        for (gpa, len, value, write) in steps {
            let at = usize::try_from(gpa).unwrap();
            let is_inside = at + len <= model.len();
            if write {
                let data = vec![value; len];
                let written = view.write_at(gpa, &data);
                prop_assert_eq!(written.is_ok(), is_inside);
                // What there is before the end is written.
                let end = (at + len).min(model.len());
                model[at..end].fill(value);
            } else {
                let mut bytes = vec![0xee; len];
                prop_assert_eq!(view.read_at(gpa, &mut bytes).is_ok(), is_inside);
                if is_inside {
                    prop_assert!(bytes == model[at..at + len]);
                }
            }
        }
    }
}
