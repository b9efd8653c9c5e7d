// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Command numbers, and which of them this implementation offers.

/// EVENT_REPLY: the tool's answer to an event.
pub const EVENT_REPLY: u16 = 0;
/// EVENT: sent to the tool, never by it.
pub const EVENT: u16 = 1;
/// GET_VERSION: protocol version and optional features.
pub const GET_VERSION: u16 = 2;
/// CHECK_COMMAND: is this command offered?
pub const CHECK_COMMAND: u16 = 3;
/// CHECK_EVENT: is this event offered?
pub const CHECK_EVENT: u16 = 4;
/// GET_GUEST_INFO: number of vCPUs.
pub const GET_GUEST_INFO: u16 = 5;
/// READ_PHYSICAL: at most one page of guest-physical memory.
pub const READ_PHYSICAL: u16 = 17;
/// WRITE_PHYSICAL: at most one page of guest-physical memory.
pub const WRITE_PHYSICAL: u16 = 18;
/// GET_MAP_TOKEN: a token that allows one mapping of this VM's memory.
pub const GET_MAP_TOKEN: u16 = 22;
/// CONTROL_CMD_RESPONSE: switches the replies off and on (batches).
pub const CONTROL_CMD_RESPONSE: u16 = 27;
/// GET_MAX_GFN: the guest frame number after the last backed one.
pub const GET_MAX_GFN: u16 = 29;
/// QUERY_PHYSICAL: the range of backed memory around a guest frame number.
pub const QUERY_PHYSICAL: u16 = 39;

/// Where a command is carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// By the VM as a whole.
    Vm,
    /// By one vCPU: the payload starts with a [`crate::message::VcpuHeader`].
    Vcpu,
    /// Not a command of this numbering.
    Unknown,
}

/// The level of command `id`, whether offered or not.
pub const fn level(id: u16) -> Level {
    match id {
        // EVENT_REPLY, GET_VCPU_INFO, PAUSE_VCPU, CONTROL_EVENTS, CONTROL_CR, CONTROL_MSR,
        // GET_REGISTERS, SET_REGISTERS, GET_CPUID, GET_XSAVE, INJECT_EXCEPTION,
        // GET_MTRR_TYPE
        0 | 6 | 7 | 9 | 10 | 11 | 13..=16 | 19 | 23 => Level::Vcpu,
        // GET_VERSION to GET_GUEST_INFO, CONTROL_VM_EVENTS, memory and page access,
        // CONTROL_CMD_RESPONSE, GET_MAX_GFN, QUERY_PHYSICAL
        2..=5 | 8 | 17 | 18 | 20..=22 | 24..=27 | 29 | 39 => Level::Vm,
        _ => Level::Unknown,
    }
}

/// Whether command `id` is offered; CHECK_COMMAND answers EPERM for the others.
pub const fn is_offered(id: u16) -> bool {
    matches!(
        id,
        GET_VERSION
            | CHECK_COMMAND
            | CHECK_EVENT
            | GET_GUEST_INFO
            | READ_PHYSICAL
            | WRITE_PHYSICAL
            | GET_MAP_TOKEN
            | CONTROL_CMD_RESPONSE
            | GET_MAX_GFN
            | QUERY_PHYSICAL
    )
}
