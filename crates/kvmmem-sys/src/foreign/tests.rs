// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Foreign memory that is here, that vanishes, and that never was.

use std::fs::File;

use super::*;

fn file(len: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("foreign", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    file
}

fn mapped(file: &File, len: u64) -> Foreign {
    let memory = Foreign::reserve(len, 0, true, 0x1000).unwrap();
    memory.place(0, len, file.as_fd(), 0).unwrap();
    memory
}

#[test]
fn what_is_written_is_read() {
    let file = file(0x3000);
    let memory = mapped(&file, 0x3000);
    let pattern: Vec<u8> = (0..0x3000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    for (offset, len) in [(0, 0x3000), (1, 200), (0xfff, 2), (0x2fff, 1), (0x3000, 0), (0x800, 64)]
    {
        memory.write(0, &[0xee; 0x3000]).unwrap();
        memory.write(offset, &pattern[..len]).unwrap();
        let mut all = [0; 0x3000];
        memory.read(0, &mut all).unwrap();
        let start = usize::try_from(offset).unwrap();
        assert_eq!(all[start..start + len], pattern[..len]);
        assert!(all[..start].iter().chain(&all[start + len..]).all(|&byte| byte == 0xee));
        let mut part = vec![0; len];
        memory.read(offset, &mut part).unwrap();
        assert_eq!(part, pattern[..len]);
    }
    memory.write_word(8, 0x0123_4567_89ab_cdef_u64).unwrap();
    assert_eq!(memory.read_word::<u64>(8).unwrap(), 0x0123_4567_89ab_cdef);
    assert_eq!(memory.read_word::<u32>(8).unwrap(), 0x89ab_cdef);
    assert_eq!(memory.read_word::<u16>(10).unwrap(), 0x89ab);
    memory.write_word(9, 0x11_u8).unwrap();
    assert_eq!(memory.read_word::<u8>(8).unwrap(), 0xef);
    assert_eq!(memory.read_word::<u16>(8).unwrap(), 0x11ef);
}

#[test]
fn write_combining_memory_is_read_by_lines() {
    let file = file(0x3000);
    let memory = mapped(&file, 0x3000).write_combining();
    let pattern: Vec<u8> = (0..0x3000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    memory.write(0, &pattern).unwrap();
    for offset in [0usize, 1, 63, 64, 65, 0xfff, 0x2f80] {
        for len in [0, 1, 2, 63, 64, 65, 127, 128] {
            let mut bytes = vec![0xee; len + 1];
            memory.read(offset as u64, &mut bytes[..len]).unwrap();
            assert_eq!(bytes[..len], pattern[offset..offset + len], "{offset:#x} {len}");
            assert_eq!(bytes[len], 0xee);
        }
    }
    file.set_len(0x1000).unwrap();
    for start in [0xf00usize, 0xf41, 0xfff] {
        let mut bytes = [0xee; 0x200];
        let lost = memory.read(start as u64, &mut bytes);
        assert_eq!(lost, Err(ForeignError::Lost { offset: 0x1000 }));
        assert_eq!(bytes[..0x1000 - start], pattern[start..0x1000]);
    }
}

#[test]
fn a_page_that_vanishes_is_lost_to_the_byte() {
    let file = file(0x3000);
    let memory = mapped(&file, 0x3000);
    memory.write(0, &[7; 0x3000]).unwrap();
    file.set_len(0x1000).unwrap();
    let starts = [0u64, 0xf00, 0xfc0, 0xfc1, 0xfe0, 0xfff, 0x1000, 0x1001];
    // In blocks and by string instructions.
    for (start, len) in starts.into_iter().flat_map(|start| [(start, 0x180), (start, 0x800)]) {
        let lost = ForeignError::Lost { offset: start.max(0x1000) };
        let mut buf = vec![0; len];
        let fits = usize::try_from(0x1000u64.saturating_sub(start)).unwrap().min(buf.len());
        let result = memory.read(start, &mut buf);
        assert_eq!(result, if fits == buf.len() { Ok(()) } else { Err(lost) }, "{start:#x}");
        assert!(
            buf[..fits].iter().all(|&byte| byte == 7) && buf[fits..].iter().all(|&byte| byte == 0)
        );
        let result = memory.write(start, &buf);
        assert_eq!(result, if fits == buf.len() { Ok(()) } else { Err(lost) }, "{start:#x}");
    }
    assert_eq!(memory.read_word::<u64>(0x1008), Err(ForeignError::Lost { offset: 0x1008 }));
    assert_eq!(memory.read_word::<u8>(0x2fff), Err(ForeignError::Lost { offset: 0x2fff }));
    assert_eq!(memory.write_word(0x1008, 1u32), Err(ForeignError::Lost { offset: 0x1008 }));
    assert_eq!(memory.read_word::<u64>(0xff8), Ok(u64::from_ne_bytes([7; 8])));
    file.set_len(0x3000).unwrap();
    assert_eq!(memory.read_word::<u64>(0x1008), Ok(0));
}

#[test]
fn many_threads_lose_it_at_once() {
    let file = file(0x40_0000);
    let memory = mapped(&file, 0x40_0000);
    // Each reader has read once before the page goes.
    let reading = std::sync::Barrier::new(5);
    let lost = std::thread::scope(|scope| {
        let reader = || {
            let mut buf = vec![0; 0x40_0000];
            let first = memory.read(0, &mut buf);
            reading.wait();
            first.err().or_else(|| (0..100_000).find_map(|_| memory.read(0, &mut buf).err()))
        };
        let readers: Vec<_> = (0..4).map(|_| scope.spawn(reader)).collect();
        reading.wait();
        memory.clear(0x20_0000, 0x1000).unwrap();
        readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>()
    });
    assert_eq!(lost, [Some(ForeignError::Lost { offset: 0x20_0000 }); 4]);
}

#[test]
fn a_thread_that_blocked_the_signal_is_served() {
    let memory = Foreign::reserve(0x1000, 0, false, 0x1000).unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // SAFETY: the set is filled in before it is used, and the mask is this thread's alone.
            unsafe {
                let mut all = std::mem::zeroed();
                libc::sigfillset(&raw mut all);
                libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, std::ptr::null_mut());
            }
            assert_eq!(memory.read(0, &mut [0]), Err(ForeignError::Lost { offset: 0 }));
        });
    });
}

#[test]
fn what_leaves_the_stretch_is_refused() {
    let file = file(0x2000);
    let memory = mapped(&file, 0x2000);
    let outside = |offset, len| Err(ForeignError::Outside { offset, len, size: 0x2000 });
    assert_eq!(memory.read(0x2000, &mut [0]), outside(0x2000, 1));
    assert_eq!(memory.write(u64::MAX, &[0, 0]), outside(u64::MAX, 2));
    assert_eq!(memory.read_word::<u64>(0x1ff9), outside(0x1ff9, 8).map(|()| 0));
    assert_eq!(memory.read_word::<u32>(2), Err(ForeignError::Unaligned { offset: 2, size: 4 }));
    for (offset, len) in
        [(0x2000, 0x1000), (0x1000, 0x2000), (!0xfff, 0x1000), (1, 0x1000), (0, 1), (0, 0)]
    {
        assert_eq!(
            memory.place(offset, len, file.as_fd(), 0),
            Err(Errno::INVAL),
            "{offset:#x} {len:#x}"
        );
    }
    for len in [0, 1, 0x1001, u64::MAX, !0xfff] {
        assert!(Foreign::reserve(len, 0, false, 0x1000).is_err(), "{len:#x}");
    }
    let memory = Foreign::reserve(0x1000, 0, false, 0x1000).unwrap();
    memory.place(0, 0x1000, file.as_fd(), 0).unwrap();
    assert_eq!(memory.write(0, &[1]), Err(ForeignError::ReadOnly));
    assert_eq!(memory.write_word(0, 1u64), Err(ForeignError::ReadOnly));
}

#[test]
fn large_pages_fit() {
    for (len, like, alignment) in [
        (0x1000, 0x1234_5000, 0x1000),
        (2 << 20, 0x1234_5000, 2 << 20),
        (3 << 30, 0xabc0_1000, 1 << 30),
    ] {
        let memory = Foreign::reserve(len, like, true, 0x1000).unwrap();
        assert_eq!(memory.address() as u64 % alignment, like % alignment);
        assert_eq!(memory.len(), len);
        assert_eq!(memory.read(len - 1, &mut [0]), Err(ForeignError::Lost { offset: len - 1 }));
    }
}

#[test]
fn huge_pages_are_mapped_whole_and_shown_in_part() {
    use crate::huge::tests::{HUGE, huge_file};
    let Some(file) = huge_file(3) else { return };
    let word = |memory: &Foreign, offset| memory.read_word::<u64>(offset).unwrap();
    for (offset, len) in
        [(0, HUGE), (0x3000, 0x1000), (HUGE - 0x1000, 0x2000), (HUGE + 0x1000, 2 * HUGE - 0x1000)]
    {
        let memory = Foreign::reserve(len, offset, true, HUGE).unwrap();
        assert_eq!(memory.read(0, &mut [0]), Err(ForeignError::Lost { offset: 0 }));
        memory.place(0, len, file.as_fd(), offset).unwrap();
        assert_eq!(memory.len(), len);
        assert_eq!(
            (word(&memory, 0), word(&memory, len - 0x1000)),
            (offset, offset + len - 0x1000)
        );
        assert_eq!(
            memory.read(len, &mut [0]),
            Err(ForeignError::Outside { offset: len, len: 1, size: len })
        );
        memory.write_word(8, offset + 1).unwrap();
        // Not in part, but as a whole.
        if len < HUGE && len > 0x1000 {
            assert_eq!(memory.clear(0, 0x1000), Err(Errno::INVAL));
        }
        assert_eq!(word(&memory, 8), offset + 1);
        memory.clear(0, len).unwrap();
        assert_eq!(memory.read(8, &mut [0]), Err(ForeignError::Lost { offset: 8 }));
        memory.place(0, len, file.as_fd(), offset).unwrap();
        assert_eq!(word(&memory, 8), offset + 1);
    }
}

#[test]
fn huge_pages_never_reach_beyond_the_stretch() {
    use crate::huge::tests::{HUGE, huge_file};
    let Some(file) = huge_file(2) else { return };
    // Neighbours, of which the kernel would take some if it rounded a length up.
    let all = Foreign::reserve(2 * HUGE, 0, true, HUGE).unwrap();
    let small = self::file(2 * HUGE);
    all.place(0, 2 * HUGE, small.as_fd(), 0).unwrap();
    all.write(0x1000, b"mine").unwrap();
    for (offset, len, at) in
        [(0, 0x1000, 0), (0, HUGE, 0x1000), (0x1000, 0x1000, 0x1000), (0, HUGE + 0x1000, 0)]
    {
        assert_eq!(
            all.place(offset, len, file.as_fd(), at),
            Err(Errno::OPNOTSUPP),
            "{offset:#x} {len:#x} {at:#x}"
        );
    }
    let mut bytes = [0; 4];
    all.read(0x1000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"mine");
    // One that was not reserved for huge pages.
    let memory = Foreign::reserve(0x1000, 0, true, 0x1000).unwrap();
    assert_eq!(memory.place(0, 0x1000, file.as_fd(), 0), Err(Errno::OPNOTSUPP));
    // Beside each other, where they fit.
    all.place(HUGE, HUGE, file.as_fd(), 0).unwrap();
    assert_eq!(all.read_word::<u64>(HUGE + 0x1000), Ok(0x1000));
    assert!(
        Foreign::reserve(0x1000, 0, true, 0x1800).is_err()
            && Foreign::reserve(0x1000, 0, true, 0).is_err()
    );
}

/// Flags of the mapping that begins at an address, as /proc/self/smaps has them.
fn flags(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = maps.lines().skip_while(|line| !line.starts_with(&format!("{address:x}-")));
    lines.find(|line| line.starts_with("VmFlags:")).unwrap().to_owned()
}

#[test]
fn core_dumps_have_nothing_of_it() {
    let file = file(0x2000);
    let memory = mapped(&file, 0x2000);
    assert!(flags(memory.address()).contains(" dd"));
    memory.place(0, 0x2000, self::file(0x2000).as_fd(), 0).unwrap();
    assert!(flags(memory.address()).contains(" dd"));
}

#[test]
fn a_file_that_refuses_leaves_what_was_there() {
    let file = file(0x3000);
    let memory = mapped(&file, 0x3000);
    memory.write(0x1000, b"still there").unwrap();
    // It is asked after everything that the kernel knows by itself.
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(memory.place(0x1000, 0x1000, socket.as_fd(), 0).is_err());
    let mut bytes = [0; 11];
    memory.read(0x1000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"still there");
}

#[test]
fn a_child_that_has_none_of_it_keeps_its_own_memory() {
    let file = file(0x2000);
    let memory = mapped(&file, 0x2000);
    memory.keep_from_children().unwrap();
    let address = memory.address();
    // SAFETY: the child calls what is safe after fork alone: system calls, and no allocator.
    let child = unsafe { libc::fork() };
    if child == 0 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let hint = core::ptr::without_provenance_mut(address);
        // SAFETY: it replaces nothing.
        let own = unsafe { libc::mmap(hint, 0x2000, rights, flags, -1, 0) };
        let is_refused = memory.release(0, 0x1000).is_err();
        drop(memory);
        let mut state = [0; 2];
        // SAFETY: one byte is written for each of the two pages.
        let is_mapped = unsafe { libc::mincore(own, 0x2000, state.as_mut_ptr()) } == 0;
        // SAFETY: it ends this process without anything of the test's.
        unsafe { libc::_exit(i32::from(own != hint || !is_refused || !is_mapped)) };
    }
    let mut status = 0;
    // SAFETY: it writes the status.
    assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
    assert_eq!(status, 0);
}
