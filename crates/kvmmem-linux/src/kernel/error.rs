// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why something of a kernel could not be read.

use std::sync::Arc;

use crate::btf::{BtfError, MemberError};
use crate::space::SpaceError;
use crate::symbols::TableError;

/// Something of a kernel could not be read.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The note lacks what leads to the kernel's page tables.
    #[error("the kernel's VMCOREINFO note does not say where its page tables are")]
    Note,
    /// Memory could not be read.
    #[error("cannot read gva {gva:#x}")]
    Read {
        /// First address of what was to be read.
        gva: u64,
        /// Why.
        #[source]
        source: Box<SpaceError>,
    },
    /// There are no symbols.
    #[error("the kernel's symbols cannot be read")]
    Symbols(#[source] Arc<TableError>),
    /// The kernel has no symbol of this name.
    #[error("this kernel has no symbol {name}; data symbols need CONFIG_KALLSYMS_ALL")]
    NoSymbol {
        /// The name.
        name: String,
    },
    /// The kernel does not describe its types.
    #[error(
        "this kernel was built without CONFIG_DEBUG_INFO_BTF: of its structures only the log can be read"
    )]
    NoTypes,
    /// The description of the types cannot be used.
    #[error("the kernel's types cannot be read")]
    Types(#[source] Arc<BtfError>),
    /// The kernel has no type or enumerator of this name.
    #[error("this kernel has no type or enumerator {name} with a value or size")]
    NoType {
        /// The name.
        name: String,
    },
    /// A structure has no such member.
    #[error(transparent)]
    Member(#[from] MemberError),
    /// A number in a structure makes no sense.
    #[error("{what} at gva {gva:#x} makes no sense")]
    Malformed {
        /// What it is.
        what: String,
        /// Where it is.
        gva: u64,
    },
    /// What the guest names is more than is read.
    #[error(
        "the guest names more than {what}: its structures are damaged, or it has too much for one listing"
    )]
    TooMuch {
        /// How much.
        what: &'static str,
    },
    /// There is no such process.
    #[error("the guest has no process {pid}")]
    NoProcess {
        /// Its id.
        pid: u32,
    },
    /// A process without memory of its own.
    #[error("process {pid} has no memory: it is a thread of the kernel, or has ended")]
    NoMemory {
        /// Its id.
        pid: u32,
    },
    /// A list does not come back to its head.
    #[error("the list at gva {head:#x} is damaged: a node of it points to {next:#x}")]
    Broken {
        /// Its head.
        head: u64,
        /// The invalid pointer.
        next: u64,
    },
    /// A list is endless, or longer than any list of a kernel.
    #[error(
        "the list at gva {head:#x} does not end: its nodes form a loop, or are more than {limit}"
    )]
    Endless {
        /// Its head.
        head: u64,
        /// How many nodes were followed.
        limit: usize,
    },
}

impl KernelError {
    pub(crate) fn read(gva: u64, source: SpaceError) -> Self {
        Self::Read { gva, source: Box::new(source) }
    }

    /// Whether it is about one structure, so that others may be read.
    pub fn is_local(&self) -> bool {
        let is_damage = matches!(
            self,
            Self::Read { .. } | Self::Malformed { .. } | Self::Broken { .. } | Self::Endless { .. }
        );
        is_damage && !self.is_final()
    }

    /// Whether nothing of the guest can be read any more, so that a reader must stop.
    pub fn is_final(&self) -> bool {
        use kvmmem_memory::paging::WalkError::{Page, Table};
        matches!(self, Self::Read { source, .. }
            if matches!(&**source, Page { source, .. } | Table { source, .. } if !source.is_local()))
    }
}
