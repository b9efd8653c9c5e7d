// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The notes of a process's core, as the kernel writes them (fs/binfmt_elf.c), and its headers.

use kvmmem_linux::UserRegisters;
use kvmmem_linux::maps::MemoryMap;
use kvmmem_linux::tasks::Task;
use kvmmem_memory::PAGE_SIZE;

use super::notes::note;

const NT_PRSTATUS: u32 = 1;
const NT_PRPSINFO: u32 = 3;
const NT_AUXV: u32 = 6;
const NT_FILE: u32 = 0x4649_4c45;

/// A thread, and its registers in user mode where they are known.
pub(super) type Thread = (Task, Option<UserRegisters>);

/// All notes: the leader's status, the process, the auxiliary vector and the mapped files, then the
/// other threads.
pub(super) fn notes(threads: &[Thread], auxv: &[u64], map: &MemoryMap) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, (task, registers)) in threads.iter().enumerate() {
        bytes.extend(note("CORE", NT_PRSTATUS, &prstatus(task, &registers.unwrap_or_default())));
        if number == 0 {
            bytes.extend(note("CORE", NT_PRPSINFO, &prpsinfo(task)));
            bytes.extend(note("CORE", NT_AUXV, &words(auxv)));
            bytes.extend(note("CORE", NT_FILE, &files(map)));
        }
    }
    bytes
}

/// `struct elf_prstatus`, 336 bytes.
fn prstatus(task: &Task, registers: &UserRegisters) -> Vec<u8> {
    // Signals; ids; times.
    let mut status = vec![0; 32];
    status.extend([task.tid, task.ppid.unwrap_or(0), 0, 0].iter().flat_map(|id| id.to_le_bytes()));
    status.extend([0; 64]);
    status.extend(words(&registers.general));
    let UserRegisters { orig_rax, rip, cs, rflags, rsp, ss, fs_base, gs_base, .. } = *registers;
    status.extend(words(&[orig_rax, rip, cs, rflags, rsp, ss, fs_base, gs_base, 0, 0, 0, 0]));
    // No floating point.
    status.extend([0; 8]);
    status
}

/// `struct elf_prpsinfo`, 136 bytes.
fn prpsinfo(task: &Task) -> Vec<u8> {
    const NAME: usize = 16;
    const ARGUMENTS: usize = 80;
    let letter = u8::try_from(task.state).unwrap_or(b'?');
    let number = "RSDTZW"
        .bytes()
        .position(|known| known == letter)
        .and_then(|number| u8::try_from(number).ok());
    let mut info = vec![number.unwrap_or(0), letter, u8::from(letter == b'Z'), 0, 0, 0, 0, 0];
    // Flags; user, group; ids.
    info.extend([0; 8]);
    info.extend(
        [task.uid.unwrap_or(0), task.gid.unwrap_or(0), task.pid, task.ppid.unwrap_or(0), 0, 0]
            .iter()
            .flat_map(|id| id.to_le_bytes()),
    );
    let mut text = |text: &str, len: usize| {
        // The last byte is a zero.
        let bytes = text.bytes().take(len - 1).chain(std::iter::repeat(0)).take(len);
        info.extend(bytes);
    };
    text(&task.comm, NAME);
    text(&task.args.words.join(" "), ARGUMENTS);
    info
}

/// NT_FILE: number of files and unit of offsets, then addresses and offset of each, then the names.
fn files(map: &MemoryMap) -> Vec<u8> {
    let page = PAGE_SIZE as u64;
    let (mut numbers, mut names, mut count) = (Vec::new(), Vec::new(), 0);
    for mapping in &map.mappings {
        let Some(file) = &mapping.file else { continue };
        count += 1;
        numbers.extend([mapping.start, mapping.end, mapping.offset / page]);
        // A name ends at the zero.
        names.extend(file.path.text.bytes().filter(|byte| *byte != 0).chain([0]));
    }
    [words(&[count, page]), words(&numbers), names].concat()
}

fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use kvmmem_linux::maps::{MappedFile, Mapping};
    use kvmmem_linux::tasks::Args;

    use super::*;

    fn task() -> Task {
        Task {
            gva: 0,
            tid: 8,
            pid: 7,
            ppid: Some(1),
            uid: Some(1000),
            euid: Some(1000),
            gid: Some(100),
            state: 'S',
            start: Some(Duration::ZERO),
            comm: "a name that is long".to_owned(),
            is_kernel: false,
            args: Args { words: vec!["one".into(), "two".into()], is_cut: false },
            is_torn: false,
            is_damaged: false,
        }
    }

    #[test]
    fn notes_have_the_layout_of_the_kernels_structures() {
        let registers = UserRegisters {
            rip: 0x40_1000,
            rsp: 0x7ffe_0000,
            fs_base: 0x1234,
            ..Default::default()
        };
        let status = prstatus(&task(), &registers);
        let word =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        assert_eq!((status.len(), status[32], status[36]), (336, 8, 1));
        assert_eq!(
            [128, 152, 168].map(|at| word(&status, 112 + at)),
            [0x40_1000, 0x7ffe_0000, 0x1234]
        );
        let info = prpsinfo(&task());
        assert_eq!((info.len(), info[0], info[1]), (136, 1, b'S'));
        assert_eq!([16, 20, 24, 28].map(|at| info[at]), [0xe8, 100, 7, 1]);
        assert_eq!(&info[40..56], b"a name that is \0");
        assert_eq!(&info[56..64], b"one two\0");
        let file = |text: &str| {
            let mut file = MappedFile::default();
            file.path.text = text.to_owned();
            Some(file)
        };
        let mappings = vec![
            Mapping {
                start: 0x1000,
                end: 0x3000,
                offset: 0x5000,
                file: file("/bin/a"),
                ..Mapping::default()
            },
            Mapping { start: 0x4000, end: 0x5000, ..Mapping::default() },
        ];
        let files = files(&MemoryMap { mappings, is_torn: false, is_cut: false });
        assert_eq!(files, [words(&[1, 0x1000, 0x1000, 0x3000, 5]), b"/bin/a\0".to_vec()].concat());
        let notes = notes(
            &[(task(), None), (task(), Some(registers))],
            &[6, 4096, 0, 0],
            &MemoryMap::default(),
        );
        assert_eq!(notes.len(), 2 * (20 + 336) + (20 + 136) + (20 + 32) + (20 + 16));
    }
}
