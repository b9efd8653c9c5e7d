// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest's RAM in which a builder wrote a kernel, or several: page tables, note, kallsyms, BTF
//! and a few tasks.
#![allow(dead_code, reason = "each test uses its part")]

pub(crate) mod areas;
pub(crate) mod btf;
pub(crate) mod fs;
pub(crate) mod kallsyms;
pub(crate) mod objects;
pub(crate) mod processes;

use std::sync::RwLock;

use kvmmem_memory::{Memory, MemoryError, Range};

pub(crate) use kallsyms::Layout;

pub(crate) const RELEASE: &str = "6.12.1-test";

/// Bytes of RAM.
pub(crate) const RAM: usize = 16 << 20;

/// What a kernel's image has, in bytes from its begin.
pub(crate) const PAGE_TABLES: u64 = 0x10_0000;
pub(crate) const UTS: u64 = 0x11_0000;
pub(crate) const BANNER: u64 = 0x11_0800;
pub(crate) const JIFFIES: u64 = 0x11_1000;
pub(crate) const TASKS: u64 = 0x11_2000;
pub(crate) const KALLSYMS: u64 = 0x12_0000;
pub(crate) const BTF: u64 = 0x1a_0000;

/// Bytes of the image.
pub(crate) const IMAGE: u64 = 4 << 20;

/// Pids and names of the tasks, that of the idle task first.
pub(crate) const NAMES: [(u32, &str); 4] =
    [(0, "swapper/0"), (1, "init"), (2, "kthreadd"), (77, "exactly15chars!")];

/// Where a kernel is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Place {
    /// Guest-physical and guest-virtual address of the image, multiples of 2 MiB.
    pub(crate) gpa: u64,
    pub(crate) gva: u64,
    /// Of its note, in RAM.
    pub(crate) note: u64,
    pub(crate) layout: Layout,
    pub(crate) five_levels: bool,
}

impl Place {
    pub(crate) const FIRST: Self = Self {
        gpa: 0x40_0000,
        gva: 0xffff_ffff_8120_0000,
        note: 0xf0_0000,
        layout: Layout::AfterIndex,
        five_levels: false,
    };
    pub(crate) const SECOND: Self =
        Self { gpa: 0x80_0000, gva: 0xffff_ffff_9a40_0000, note: 0xe0_0000, ..Self::FIRST };
}

/// Memory that a test can change while it is read.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) ram: RwLock<Vec<u8>>,
    /// Addresses of clocks that tick with each read of them.
    pub(crate) clocks: Vec<u64>,
}

impl Default for Guest {
    fn default() -> Self {
        Self { ram: RwLock::new(vec![0; RAM]), clocks: Vec::new() }
    }
}

impl Memory for Guest {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        if self.clocks.contains(&gpa) {
            let ticks = u64::from_le_bytes(self.bytes(gpa, 8).try_into().unwrap());
            self.put(gpa, &(ticks + 1).to_le_bytes());
        }
        let ram = self.ram.read().unwrap();
        let start = usize::try_from(gpa).unwrap_or(usize::MAX).min(ram.len());
        let place = ram[start..].get(..buf.len());
        buf.copy_from_slice(place.ok_or(MemoryError::Hole { gpa: gpa.max(ram.len() as u64) })?);
        Ok(())
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        Ok(vec![Range { gpa: 0, len: self.ram.read().unwrap().len() as u64 }])
    }
}

impl Guest {
    pub(crate) fn with(places: &[Place]) -> Self {
        let guest = Self::default();
        places.iter().for_each(|place| guest.boot(place));
        guest
    }

    pub(crate) fn put(&self, gpa: u64, bytes: &[u8]) {
        let at = usize::try_from(gpa).unwrap();
        self.ram.write().unwrap()[at..at + bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn put_word(&self, gpa: u64, word: u64) {
        self.put(gpa, &word.to_le_bytes());
    }

    pub(crate) fn bytes(&self, gpa: u64, len: usize) -> Vec<u8> {
        let at = usize::try_from(gpa).unwrap();
        self.ram.read().unwrap()[at..at + len].to_vec()
    }

    /// Writes a kernel.
    pub(crate) fn boot(&self, place: &Place) {
        self.boot_with(place, &btf::kernel(), Vec::new());
    }

    /// Writes a kernel with these types, and with more symbols, or others in place of its own.
    pub(crate) fn boot_with(&self, place: &Place, blob: &[u8], more: Vec<kallsyms::Entry>) {
        let Place { gpa, gva, layout, .. } = *place;
        self.map(place);
        self.put(gpa + UTS, b"Linux");
        self.put(gpa + UTS + 130, RELEASE.as_bytes());
        self.put(gpa + BANNER, format!("Linux version {RELEASE} (build@test)\n").as_bytes());
        self.put_word(gpa + JIFFIES, 4_294_892_296);
        self.tasks(place);
        self.put(gpa + BTF, blob);
        let mut symbols = vec![
            ('T', "_stext".to_owned(), gva),
            ('D', "swapper_pg_dir".to_owned(), gva + PAGE_TABLES),
            ('D', "init_uts_ns".to_owned(), gva + UTS),
            ('D', "linux_banner".to_owned(), gva + BANNER),
            ('D', "jiffies_64".to_owned(), gva + JIFFIES),
            ('D', "init_task".to_owned(), gva + TASKS),
            ('d', "prb".to_owned(), gva + JIFFIES + 8),
            ('R', "__start_BTF".to_owned(), gva + BTF),
            ('R', "__stop_BTF".to_owned(), gva + BTF + blob.len() as u64),
        ];
        symbols.extend((0..2600).map(|n| ('t', format!("filler_{n}"), gva + 0x1000 + 16 * n)));
        symbols.retain(|(_, name, _)| more.iter().all(|(_, other, _)| other != name));
        symbols.extend(more);
        symbols.sort_by_key(|(.., address)| *address);
        symbols.insert(
            0,
            (
                'A',
                "fixed_percpu_data".to_owned(),
                if layout == Layout::FromPlace { gva } else { 0 },
            ),
        );
        let keys = kallsyms::write(self, place, &symbols);
        let five = u8::from(place.five_levels);
        let text = format!(
            "OSRELEASE={RELEASE}\nBUILD-ID={gva:x}0000\nSYMBOL(init_uts_ns)={:x}\nOFFSET(uts_namespace.name)=0\n\
             SYMBOL(swapper_pg_dir)={:x}\nSYMBOL(_stext)={gva:x}\nSYMBOL(mem_section)=ffff8f317ffd9000\n\
             SYMBOL(prb)={:x}\n{keys}NUMBER(phys_base)={}\nNUMBER(pgtable_l5_enabled)={five}\nNUMBER(sme_mask)=0\n",
            gva + UTS,
            gva + PAGE_TABLES,
            gva + JIFFIES + 8,
            (gpa + 0xffff_ffff_8000_0000).wrapping_sub(gva).cast_signed(),
        );
        let len = u32::try_from(text.len()).unwrap();
        self.put(place.note, &[11, len, 0].map(u32::to_le_bytes).concat());
        self.put(place.note + 12, b"VMCOREINFO\0\0");
        self.put(place.note + 24, text.as_bytes());
    }

    /// Maps the image by pages of 2 MiB.
    fn map(&self, Place { gpa, gva, five_levels, .. }: &Place) {
        let mut table = gpa + PAGE_TABLES;
        let levels = if *five_levels { 5 } else { 4 };
        // The last GiB, for fixed addresses (level2_fixmap_pgt).
        self.put_word(table + (levels - 3) * 0x1000 + 511 * 8, (gpa + PAGE_TABLES + 0x8000) | 3);
        for level in (3..=levels).rev() {
            self.put_word(table + (gva >> (12 + 9 * (level - 1)) & 511) * 8, (table + 0x1000) | 3);
            table += 0x1000;
        }
        for page in 0..IMAGE >> 21 {
            let at = gva + (page << 21);
            self.put_word(table + (at >> 21 & 511) * 8, (gpa + (page << 21)) | 0x83);
        }
    }

    /// Writes a ring of tasks: `list_head` first, pid at 24, name at 32.
    fn tasks(&self, Place { gpa, gva, .. }: &Place) {
        let at = |n: usize| TASKS + 64 * (n % NAMES.len()) as u64;
        for (n, (pid, name)) in NAMES.iter().enumerate() {
            self.put_word(gpa + at(n), gva + at(n + 1));
            self.put_word(gpa + at(n) + 8, gva + at(n + NAMES.len() - 1));
            self.put(gpa + at(n) + 24, &pid.to_le_bytes());
            self.put(gpa + at(n) + 28, &[0b1011_0100]);
            self.put(gpa + at(n) + 32, name.as_bytes());
        }
    }
}
