// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Loaded modules, as /proc/modules shows them. One whose memory is damaged in part is listed
//! without what cannot be read, and marked as damaged.

mod symbols;

use std::cell::Cell;

use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError, List, Step, Walk};

/// Bytes of a module's name (`MODULE_NAME_LEN`).
const NAME_LEN: u64 = 56;

/// Kinds of memory that a module can have (`MOD_MEM_NUM_TYPES`), and which of them has its text.
const MEMORY_KINDS: u64 = 7;

/// Reference count of an unused module (`MODULE_REF_BASE`).
const REF_BASE: u32 = 1;

/// The most modules that one module is used by.
const MAX_USERS: usize = 4096;

/// The most of all modules together, each read a few times. Modules may share a list in a guest
/// that lies.
const MAX_ALL_USERS: usize = 1 << 16;

/// The most bytes of a module that are read.
const MAX_LEN: u64 = 64 << 10;

/// Reads of a module that changes.
const TRIES: u32 = 3;

/// What a module is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has been loaded.
    Live,
    /// It is being loaded.
    Loading,
    /// It is being removed.
    Unloading,
}

/// A module.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// Where its `struct module` is.
    pub gva: u64,
    /// Its name. What is not UTF-8 is replaced; control characters may be there.
    pub name: String,
    /// Bytes of all its memory.
    pub size: u64,
    /// Where its code is.
    pub base: u64,
    /// Address and bytes of each part of its memory.
    pub parts: Vec<(u64, u64)>,
    /// How often it is used.
    pub references: u32,
    /// The modules that use it, as far as they can be read.
    pub used_by: Vec<String>,
    /// What it is doing.
    pub state: State,
    /// Whether it changed during every read, so that its values may not belong together.
    pub is_torn: bool,
    /// Whether some of it cannot be read.
    pub is_damaged: bool,
}

/// Where everything is.
#[derive(Debug)]
struct Layout {
    len: u64,
    name: u64,
    state: u64,
    refcnt: u64,
    source_list: u64,
    /// In a use of the module: its place in the list, and the user.
    use_list: u64,
    use_source: u64,
    memory: Memory,
}

/// Where a module describes its memory.
#[derive(Debug)]
enum Memory {
    /// Of before 6.4: what is kept, and what is freed after loading.
    Two { core: u64, init: u64, base: u64, size: u64 },
    /// An array; the first element has the text.
    Array { first: u64, each: u64, base: u64, size: u64 },
}

/// The modules, the newest first. It ends after an error.
pub type Modules<'a> = Walk<ModuleSteps<'a>>;

/// The steps of [`Modules`].
#[derive(Debug)]
pub struct ModuleSteps<'a> {
    list: List<'a>,
    reader: Reader<'a>,
}

/// Reads modules by their addresses.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    kernel: &'a Kernel<'a>,
    layout: Layout,
    users_left: Cell<usize>,
}

impl<'a> Modules<'a> {
    /// The modules of a kernel.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let list = kernel.list_of(kernel.symbol("modules")?, "module", "list")?;
        Ok(Self::of(ModuleSteps { list, reader: Reader::new(kernel)? }))
    }
}

impl Step for ModuleSteps<'_> {
    type Item = Module;

    fn step(&mut self) -> Result<Option<Module>, KernelError> {
        while let Some((module, is_torn)) = self.list.next_with(|gva| self.reader.module(gva))? {
            if let Some(module) = module {
                return Ok(Some(Module { is_torn: module.is_torn || is_torn, ..module }));
            }
        }
        Ok(None)
    }
}

impl<'a> Reader<'a> {
    pub(crate) fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        Ok(Self { kernel, layout: Layout::new(kernel)?, users_left: Cell::new(MAX_ALL_USERS) })
    }

    /// The module at an address; `None` where it is not complete yet.
    pub(crate) fn module(&self, gva: u64) -> Result<Option<Module>, KernelError> {
        let (mut module, mut is_torn) = (None, false);
        for _ in 0..TRIES {
            let bytes = self.bytes(gva)?;
            module = self.describe(gva, &bytes)?;
            let again = self.bytes(gva)?;
            is_torn = self.describe(gva, &again)? != module;
            if !is_torn {
                break;
            }
        }
        Ok(module.map(|module| Module { is_torn, ..module }))
    }

    fn bytes(&self, gva: u64) -> Result<Bytes, KernelError> {
        Bytes::read(self.kernel, gva, self.layout.len)
    }

    fn describe(&self, gva: u64, bytes: &Bytes) -> Result<Option<Module>, KernelError> {
        let layout = &self.layout;
        let state = match bytes.u32(layout.state) {
            0 => State::Live,
            1 => State::Loading,
            2 => State::Unloading,
            // Not formed yet; /proc leaves it out.
            3 => return Ok(None),
            _ => return Err(KernelError::Malformed { what: "the module".to_owned(), gva }),
        };
        let name = bytes.string(layout.name, NAME_LEN);
        // Without a state and a name it is nothing that can be listed.
        if name.is_empty() || !bytes.has(layout.state, 4) {
            return Err(KernelError::Malformed { what: "the module".to_owned(), gva });
        }
        let (used_by, users_end) = self.users(gva)?;
        let parts = layout.memory.of(bytes);
        let base = parts.first().map_or(0, |(base, _)| *base);
        let size = parts.iter().map(|(_, size)| size).sum();
        Ok(Some(Module {
            gva,
            name,
            size,
            base,
            parts,
            references: bytes.u32(layout.refcnt).saturating_sub(REF_BASE),
            used_by,
            state,
            is_torn: false,
            is_damaged: !bytes.is_whole() || users_end.is_some() || base == 0,
        }))
    }

    /// The modules that use one, and why there are not more if its list is damaged.
    fn users(&self, gva: u64) -> Result<(Vec<String>, Option<KernelError>), KernelError> {
        let mut users = Vec::new();
        for node in self.kernel.list(gva.wrapping_add(self.layout.source_list)) {
            if users.len() >= MAX_USERS {
                return Err(KernelError::TooMuch { what: "4,096 users of a module" });
            }
            let left = self.users_left.get().checked_sub(1);
            self.users_left
                .set(left.ok_or(KernelError::TooMuch { what: "65,536 users of modules" })?);
            match node.and_then(|node| self.user(node)) {
                Ok(user) => users.push(user),
                Err(error) if error.is_local() => return Ok((users, Some(error))),
                Err(error) => return Err(error),
            }
        }
        Ok((users, None))
    }

    /// The name of a user, by its node.
    fn user(&self, node: u64) -> Result<String, KernelError> {
        let at = node.wrapping_sub(self.layout.use_list).wrapping_add(self.layout.use_source);
        let user = self.kernel.read_u64(at)?;
        let mut name = Bytes::zeroed(NAME_LEN);
        self.kernel.read(user.wrapping_add(self.layout.name), name.as_mut())?;
        match name.string(0, NAME_LEN) {
            name if name.is_empty() => {
                Err(KernelError::Malformed { what: "the module".to_owned(), gva: user })
            }
            name => Ok(name),
        }
    }
}

impl Layout {
    fn new(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let module = |member| kernel.offset("module", member);
        let used = |member| kernel.offset("module_use", member);
        let memory = Memory::new(kernel)?;
        let mut layout = Self {
            len: 0,
            name: module("name")?,
            state: module("state")?,
            refcnt: module("refcnt")?,
            source_list: module("source_list")?,
            use_list: used("source_list")?,
            use_source: used("source")?,
            memory,
        };
        let ends =
            [layout.name + NAME_LEN, layout.state + 4, layout.refcnt + 4, layout.memory.end()];
        layout.len = ends.into_iter().max().unwrap_or(0).min(MAX_LEN);
        Ok(layout)
    }
}

impl Memory {
    fn new(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let module = |member| kernel.offset("module", member);
        if let Ok(first) = module("mem") {
            let memory = |member| kernel.offset("module_memory", member);
            let (base, size) = (memory("base")?, memory("size")?);
            return Ok(Self::Array { first, each: kernel.size_of("module_memory")?, base, size });
        }
        let layout = |member| kernel.offset("module_layout", member);
        let (core, init) = (module("core_layout")?, module("init_layout")?);
        Ok(Self::Two { core, init, base: layout("base")?, size: layout("size")? })
    }

    /// Address and bytes of each part, of the text first.
    fn of(&self, module: &Bytes) -> Vec<(u64, u64)> {
        let part = |at: u64, base: u64, size: u64| {
            (module.u64(at + base), u64::from(module.u32(at + size)))
        };
        match *self {
            Self::Two { core, init, base, size } => {
                [core, init].map(|at| part(at, base, size)).into()
            }
            Self::Array { first, each, base, size } => {
                (0..MEMORY_KINDS).map(|kind| part(first + kind * each, base, size)).collect()
            }
        }
    }

    fn end(&self) -> u64 {
        match *self {
            Self::Two { core, init, base, size } => core.max(init) + base.max(size) + 8,
            Self::Array { first, each, .. } => first + MEMORY_KINDS * each,
        }
    }
}
