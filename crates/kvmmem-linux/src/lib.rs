// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads a Linux guest from its memory alone, without symbol files: the kernel keeps its own
//! symbols (kallsyms) and types (BTF).
//!
//! The command line uses it for `ps`, `maps`, `files` and others, on running guests and dumps.
//!
//! | what | where it comes from | module |
//! |---|---|---|
//! | release, page tables, places of the rest | the VMCOREINFO note | [`search`], [`vmcoreinfo`] |
//! | the same of a kernel without a note | page tables, symbols | [`kernel`] |
//! | addresses of functions and variables | kallsyms | [`symbols`] |
//! | members of structures | BTF | [`btf`] |
//! | structures, lists, texts | all of these | [`kernel`] |
//! | release, command line, boot time | these, or the note | [`identity`] |
//! | log | the note alone, or structures | [`log`] |
//! | processes and threads | structures | [`tasks`] |
//! | modules | structures | [`modules`] |
//! | open files | structures | [`files`] |
//! | mounts of processes | structures | [`mounts`] |
//! | memory of processes | structures, page tables | [`maps`], [`process`] |
//! | sockets | structures | [`sockets`] |
//! | whether it was tampered with | structures, text | [`integrity`] |
//!
//! ```no_run
//! use kvmmem_linux::{Find, Kernel};
//! use kvmmem_memory::DumpFile;
//!
//! let dump = DumpFile::open("guest.raw".as_ref())?;
//! let kernel = Kernel::find(&dump, Find::default())?;
//! let tasks = kernel.symbol("init_task")? + kernel.offset("task_struct", "tasks")?;
//! for task in kernel.list_of(tasks, "task_struct", "tasks")? {
//!     let task = kernel.object("task_struct", task?)?;
//!     println!("{} {}", task.get("pid")?, String::from_utf8_lossy(task.text("comm")?));
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! The guest is untrusted. Structures may hold anything, and they change while they are read. So
//! every walk is limited, no allocation has a size that only the guest names, and nonsensical
//! numbers are errors. A guest can still present an invented kernel.
//!
//! The library knows no transport: it reads [`kvmmem_memory::Memory`], of a running virtual machine
//! or of a dump file.
#![deny(unsafe_code)]

pub mod btf;
mod budget;
mod bytes;
pub mod files;
pub mod identity;
pub mod integrity;
pub mod kernel;
pub mod log;
pub mod maps;
pub mod modules;
pub mod mounts;
mod name_index;
mod paths;
pub mod process;
pub mod search;
pub mod sockets;
pub mod space;
pub mod symbols;
pub mod tasks;
mod user_registers;
pub mod vmcoreinfo;

pub use kernel::{Find, FindError, Kernel, KernelError, Object};
pub use paths::FilePath;
pub use space::{Space, SpaceError};
pub use user_registers::UserRegisters;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
