// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel with sockets, system calls, interrupts, modules, and tasks that have pids. Structures
//! have the members that are read, and places of this file's own.

use super::btf::Builder;
use super::{Guest, Place};

/// Where objects begin, and how many bytes they have; places are from there.
pub(crate) const OBJECTS: u64 = 0x20_0000;
pub(crate) const LEN: u64 = 0xc000;

pub(crate) const CALLS: u64 = 0;
pub(crate) const IDT: u64 = 0x1000;
pub(crate) const HASHINFO: u64 = 0x2000;
pub(crate) const EHASH: u64 = 0x2100;
const LHASH: u64 = 0x2200;
pub(crate) const UDP: u64 = 0x2300;
const UDP_HASH: u64 = 0x2400;
pub(crate) const RAW: [u64; 2] = [0x2800, 0x3000];
const NET: u64 = 0x3800;
pub(crate) const NETS: u64 = 0x3900;
pub(crate) const UNIX_COUNT: u64 = 0x3940;
pub(crate) const UNIX: u64 = 0x4000;
const SOCKS: u64 = 0x5000;
const FILES: u64 = 0x6000;
const ADDRESSES: u64 = 0x6800;
const MODULES: u64 = 0x7000;
const KSET: u64 = 0x7800;
const KOBJECTS: u64 = 0x7900;
const TASKS: u64 = 0x8000;
const SIGNALS: u64 = 0x9000;
const PIDS: u64 = 0x9800;
pub(crate) const NODES: u64 = 0xa000;
const PID_NAMESPACE: u64 = 0xb000;
const MODULE_LIST: u64 = 0xb100;
const MODULE_KSET: u64 = 0xb200;
const MODULE_SYMBOLS: u64 = 0xb300;

/// Where the dispatcher is in the image, and its handlers.
pub(crate) const DISPATCHER: u64 = 0xd000;
const HANDLERS: u64 = 0x1000;
/// The stubs of interrupts, of 8 bytes each.
const STUBS: u64 = 0xc000;
/// After the text, as it is freed.
const EARLY: u64 = 0xf_8000;

/// The number of the namespace.
pub(crate) const NETNS: u32 = 4_026_531_840;

/// Pids of the processes after the idle one; the last has a thread with the pid after its own.
pub(crate) const TASK_PIDS: [u32; 3] = [1, 70, 4000];

/// Where something is in RAM.
pub(crate) fn at(place: &Place, object: u64) -> u64 {
    place.gpa + OBJECTS + object
}

/// Of the task with a number: 0 is idle, then the processes, then the thread.
pub(crate) fn task(number: u64) -> u64 {
    TASKS + number * 0x200
}

/// Of the module with a number.
pub(crate) fn module(number: u64) -> u64 {
    MODULES + number * 0x200
}

/// Gives the module with a number a name, and symbols of its own, each of an object.
pub(crate) fn name_module(
    guest: &Guest,
    place: &Place,
    number: u64,
    name: &str,
    symbols: &[(&str, u64)],
) {
    let writer = Writer { guest, place: *place };
    let at = module(number);
    writer.bytes(at + 0x20, &[0; 56]);
    writer.bytes(at + 0x20, name.as_bytes());
    writer.pointer(at + 0x98, MODULE_SYMBOLS);
    let (table, names) = (MODULE_SYMBOLS + 0x100, MODULE_SYMBOLS + 0x400);
    writer.pointer(MODULE_SYMBOLS, table);
    writer.half(MODULE_SYMBOLS + 8, 1 + u32::try_from(symbols.len()).unwrap());
    writer.pointer(MODULE_SYMBOLS + 16, names);
    // The first symbol is empty, as in each ELF file.
    let mut end = 1;
    for ((name, object), symbol) in symbols.iter().zip((table + 24..).step_by(24)) {
        writer.half(symbol, end);
        writer.pointer(symbol + 8, *object);
        writer.bytes(names + u64::from(end), name.as_bytes());
        end += u32::try_from(name.len()).unwrap() + 1;
    }
}

/// Of the socket with a number.
pub(crate) fn sock(number: u64) -> u64 {
    SOCKS + number * 0x100
}

/// Links of tasks and modules to those before and after them.
pub(crate) const TASK_LIST: u64 = 0;
pub(crate) const LIST: u64 = 8;
pub(crate) const KOBJECT: u64 = KOBJECTS;

struct Writer<'a> {
    guest: &'a Guest,
    place: Place,
}

impl Writer<'_> {
    fn gva(&self, object: u64) -> u64 {
        self.place.gva + OBJECTS + object
    }

    fn word(&self, object: u64, word: u64) {
        self.guest.put_word(at(&self.place, object), word);
    }

    fn half(&self, object: u64, half: u32) {
        self.bytes(object, &half.to_le_bytes());
    }

    fn bytes(&self, object: u64, bytes: &[u8]) {
        self.guest.put(at(&self.place, object), bytes);
    }

    fn pointer(&self, object: u64, to: u64) {
        self.word(object, self.gva(to));
    }

    /// A ring of list heads.
    fn ring(&self, nodes: &[u64]) {
        for (n, node) in nodes.iter().enumerate() {
            self.pointer(*node, nodes[(n + 1) % nodes.len()]);
            self.pointer(node + 8, nodes[(n + nodes.len() - 1) % nodes.len()]);
        }
    }
}

/// A guest with such a kernel.
pub(crate) fn guest(place: &Place) -> Guest {
    let guest = Guest::default();
    boot(&guest, place);
    guest
}

/// Writes the kernel.
pub(crate) fn boot(guest: &Guest, place: &Place) {
    let writer = Writer { guest, place: *place };
    let symbol = |name: &str, object: u64| ('D', name.to_owned(), writer.gva(object));
    let mut symbols = vec![
        symbol("sys_call_table", CALLS),
        symbol("ia32_sys_call_table", CALLS + 0x100),
        symbol("idt_table", IDT),
        symbol("tcp_hashinfo", HASHINFO),
        symbol("udp_table", UDP),
        symbol("raw_v4_hashinfo", RAW[0]),
        symbol("raw_v6_hashinfo", RAW[1]),
        symbol("net_namespace_list", NETS),
        symbol("unix_nr_socks", UNIX_COUNT),
        symbol("init_task", TASKS),
        symbol("init_pid_ns", PID_NAMESPACE),
        symbol("modules", MODULE_LIST),
        symbol("module_kset", MODULE_KSET),
    ];
    let text = |name: &str, at: u64| ('T', name.to_owned(), place.gva + at);
    symbols.extend([
        text("x64_sys_call", DISPATCHER),
        text("after", DISPATCHER + 0x40),
        text("_etext", 0xf_0000),
    ]);
    symbols.extend([text("entry_SYSCALL_64", 0xe000), text("early_idt_handler_array", EARLY)]);
    symbols.push(text("irq_entries_start", STUBS));
    symbols.push(text("__x64_sys_ni_syscall", HANDLERS + 16 * 99));
    let calls = ["read", "write", "open", "close", "stat"];
    symbols.extend(
        (0..)
            .zip(calls)
            .map(|(number, name)| text(&format!("__x64_sys_{name}"), HANDLERS + 16 * number)),
    );
    symbols.extend((0..32).map(|vector| match vector {
        14 => text("asm_exc_page_fault", HANDLERS + 16 * vector),
        _ => text(&format!("asm_exc_{vector}"), HANDLERS + 16 * vector),
    }));
    guest.boot_with(place, &types(), symbols);
    entries(&writer);
    sockets(&writer);
    modules(&writer);
    tasks(&writer);
}

fn entries(writer: &Writer<'_>) {
    let place = &writer.place;
    // Compare, call and return; the last is a jump.
    let mut code = Vec::new();
    for (number, opcode) in [0xe8, 0xe8, 0xe9].into_iter().enumerate() {
        code.extend([0x83, 0xff, u8::try_from(number).unwrap(), opcode]);
        let next = DISPATCHER + code.len() as u64 + 4;
        let target = HANDLERS + 16 * number as u64;
        code.extend(u32::try_from(target.wrapping_sub(next) & 0xffff_ffff).unwrap().to_le_bytes());
        code.push(0xc3);
    }
    code.resize(0x40, 0xcc);
    writer.guest.put(place.gpa + DISPATCHER, &code);
    for number in 0..5 {
        writer.word(CALLS + 8 * number, place.gva + HANDLERS + 16 * number);
    }
    for vector in (0..0x30).filter(|vector| *vector != 9) {
        // Exceptions have functions, interrupts stubs between two symbols.
        let target = match vector {
            30 => EARLY + 13 * vector,
            0..32 => HANDLERS + 16 * vector,
            _ => STUBS + 8 * vector,
        };
        let target = place.gva + target;
        let [a, b, c, d, high @ ..] = target.to_le_bytes();
        writer.bytes(IDT + 16 * vector, &[a, b, 0x10, 0, 0, 0x8e, c, d]);
        writer.bytes(IDT + 16 * vector + 8, &high);
    }
}

/// Number of a socket, its bucket's place, state, family, ports here and there.
struct Sock(u64, u64, u8, u16, u16, u16);

fn sockets(writer: &Writer<'_>) {
    writer.pointer(HASHINFO, EHASH);
    writer.half(HASHINFO + 8, 7);
    writer.pointer(HASHINFO + 16, LHASH);
    writer.half(HASHINFO + 24, 3);
    for bucket in 0..8 {
        writer.word(EHASH + 8 * bucket, bucket << 1 | 1);
    }
    for bucket in 0..4 {
        writer.word(LHASH + 16 * bucket + 8, (bucket + (1 << 29)) << 1 | 1);
    }
    writer.pointer(UDP, UDP_HASH);
    writer.half(UDP + 8, 3);
    writer.ring(&[NETS, NET]);
    writer.half(NET + 16, NETNS);
    writer.pointer(NET + 24, HASHINFO);
    writer.pointer(NET + 32, UNIX);
    let all = [
        // A connection between the first two, a third one in a chain with the first, a listener.
        Sock(0, EHASH + 8 * 2, 1, 2, 4321, 51440),
        Sock(1, EHASH + 8 * 5, 1, 2, 51440, 4321),
        Sock(2, EHASH + 8 * 2, 6, 2, 4321, 51441),
        Sock(3, LHASH + 16 + 8, 10, 10, 4322, 0),
        Sock(4, UDP_HASH + 16 * 3, 7, 2, 5353, 0),
        Sock(5, RAW[0] + 8 * 200, 7, 2, 253, 0),
        Sock(6, UNIX + 8 * 511, 10, 1, 0, 0),
        Sock(7, UNIX + 8 * 3, 1, 1, 0, 0),
        Sock(8, UNIX + 8 * 3, 1, 1, 0, 0),
    ];
    for Sock(number, bucket, state, family, local, peer) in all {
        let sock = sock(number);
        let first = writer.guest.bytes(at(&writer.place, bucket), 8);
        writer.bytes(sock, &first);
        writer.pointer(bucket, sock);
        writer.bytes(sock + 16, &family.to_le_bytes());
        writer.bytes(sock + 18, &[state]);
        writer.bytes(sock + 20, &local.to_le_bytes());
        writer.bytes(sock + 22, &peer.to_be_bytes());
        writer.pointer(sock + 24, NET);
        if family == 2 {
            writer.bytes(sock + 32, &[127, 0, 0, 1, 127, 0, 0, 2]);
        }
        if family == 10 {
            writer.bytes(sock + 64 + 15, &[1]);
        }
        let file = FILES + 0x80 * number;
        writer.pointer(sock + 0x80, file);
        writer.half(sock + 0x88, 1000 + u32::try_from(number).unwrap());
        writer.bytes(sock + 0x8c, &[1]);
        writer.word(file + 0x40, 300 + number);
    }
    // The listener is bound to a file, its client is not accepted, and that one has the listener's
    // name.
    writer.pointer(sock(6) + 0x90, ADDRESSES);
    writer.pointer(sock(8) + 0x90, ADDRESSES);
    writer.word(sock(8) + 0x80, 0);
    writer.pointer(sock(7) + 0x98, sock(8));
    writer.pointer(sock(8) + 0x98, sock(7));
    writer.half(ADDRESSES, 2 + 6 + 1);
    writer.bytes(ADDRESSES + 4, b"\x01\0/tmp/s\0");
}

fn modules(writer: &Writer<'_>) {
    let nodes = [0, 1, 2].map(|number| module(number) + LIST);
    writer.ring(&[MODULE_LIST, nodes[0], nodes[1], nodes[2]]);
    writer.pointer(MODULE_KSET, KSET);
    // The last is built in.
    let objects = [0, 1, 2, 3].map(|number| KOBJECTS + 0x40 * number);
    writer.ring(&[KSET, objects[0], objects[1], objects[2], objects[3]]);
    for (number, name) in ["one", "two", "three"].iter().enumerate() {
        let number = number as u64;
        writer.bytes(module(number) + 0x20, name.as_bytes());
        writer.word(module(number) + 0xa0, 0xffff_ffff_c000_0000 + number * 0x1000);
        writer.half(module(number) + 0xa8, 0x1000);
        writer.ring(&[module(number) + 0x88]);
        writer.pointer(KOBJECTS + 0x40 * number + 16, module(number));
    }
}

fn tasks(writer: &Writer<'_>) {
    let leaders = [0, 1, 2, 3].map(task);
    writer.ring(&leaders);
    // Two levels of nodes.
    writer.word(PID_NAMESPACE, writer.gva(NODES) | 2);
    writer.bytes(NODES, &[6]);
    for number in 0..5u64 {
        let (task, signal) = (task(number), SIGNALS + 0x40 * number.min(3));
        let pid = match number {
            0 => 0,
            4 => TASK_PIDS[2] + 1,
            _ => TASK_PIDS[usize::try_from(number).unwrap() - 1],
        };
        let tgid = if number == 4 { pid - 1 } else { pid };
        writer.half(task + 24, pid);
        writer.half(task + 28, tgid);
        writer.bytes(task + 32, format!("task-{pid}").as_bytes());
        writer.pointer(task + 48, signal);
        match number {
            3 => writer.ring(&[signal, task + 56, self::task(4) + 56]),
            4 => {}
            _ => writer.ring(&[signal, task + 56]),
        }
        if number == 0 {
            continue;
        }
        let place = PIDS + 0x80 * number;
        writer.pointer(place + 8, task + 72);
        let (leaf, slot) = (u64::from(pid) / 64, u64::from(pid) % 64);
        let node = NODES + 0x400 * (1 + leaf.min(2));
        writer.word(NODES + 8 + 8 * leaf, writer.gva(node) | 2);
        writer.pointer(node + 8 + 8 * slot, place);
    }
}

/// The types.
fn types() -> Vec<u8> {
    let mut btf = Builder::default();
    let long = btf.int("long", 8);
    let list = structure(&mut btf, "list_head", 16, &[("next", long, 0), ("prev", long, 8)]);
    let common = [
        ("skc_node", long, 0),
        ("skc_nulls_node", long, 0),
        ("skc_family", long, 16),
        ("skc_state", long, 18),
        ("skc_num", long, 20),
        ("skc_dport", long, 22),
        ("skc_net", long, 24),
        ("skc_rcv_saddr", long, 32),
        ("skc_daddr", long, 36),
        ("skc_v6_daddr", long, 48),
        ("skc_v6_rcv_saddr", long, 64),
    ];
    structure(&mut btf, "sock_common", 0x50, &common);
    structure(
        &mut btf,
        "sock",
        0x90,
        &[("sk_socket", long, 0x80), ("sk_uid", long, 0x88), ("sk_type", long, 0x8c)],
    );
    structure(&mut btf, "socket_alloc", 0x60, &[("socket", long, 0), ("vfs_inode", long, 0x20)]);
    structure(&mut btf, "inode", 0x40, &[("i_ino", long, 0x20)]);
    structure(&mut btf, "unix_sock", 0xa0, &[("addr", long, 0x90), ("peer", long, 0x98)]);
    structure(&mut btf, "unix_address", 16, &[("len", long, 0), ("name", long, 4)]);
    let ns = structure(&mut btf, "ns_common", 8, &[("inum", long, 0)]);
    let row = structure(&mut btf, "inet_timewait_death_row", 16, &[("hashinfo", long, 0)]);
    let ipv4 = structure(&mut btf, "netns_ipv4", 16, &[("tcp_death_row", row, 0)]);
    let table = structure(&mut btf, "unix_table", 8, &[("buckets", long, 0)]);
    let unx = structure(&mut btf, "netns_unix", 8, &[("table", table, 0)]);
    structure(
        &mut btf,
        "net",
        64,
        &[("list", list, 0), ("ns", ns, 16), ("ipv4", ipv4, 24), ("unx", unx, 32)],
    );
    let hashinfo = [
        ("ehash", long, 0),
        ("ehash_mask", long, 8),
        ("lhash2", long, 16),
        ("lhash2_mask", long, 24),
    ];
    structure(&mut btf, "inet_hashinfo", 32, &hashinfo);
    structure(&mut btf, "inet_ehash_bucket", 8, &[("chain", long, 0)]);
    structure(&mut btf, "inet_listen_hashbucket", 16, &[("nulls_head", long, 8)]);
    structure(&mut btf, "udp_table", 16, &[("hash", long, 0), ("mask", long, 8)]);
    structure(&mut btf, "udp_hslot", 16, &[("head", long, 0)]);
    structure(&mut btf, "raw_hashinfo", 0x800, &[("ht", long, 0)]);
    let kobject = structure(&mut btf, "kobject", 16, &[("entry", list, 0)]);
    structure(&mut btf, "module_kobject", 24, &[("kobj", kobject, 0), ("mod", long, 16)]);
    structure(&mut btf, "kset", 16, &[("list", list, 0)]);
    structure(&mut btf, "module_memory", 16, &[("base", long, 0), ("size", long, 8)]);
    structure(&mut btf, "module_use", 32, &[("source_list", list, 0), ("source", long, 16)]);
    let module = [
        ("state", long, 0),
        ("list", list, LIST),
        ("name", long, 0x20),
        ("mem", long, 0xa0),
        ("refcnt", long, 0x80),
        ("source_list", list, 0x88),
        ("kallsyms", long, 0x98),
    ];
    structure(&mut btf, "module", 0x110, &module);
    structure(
        &mut btf,
        "mod_kallsyms",
        24,
        &[("symtab", long, 0), ("num_symtab", long, 8), ("strtab", long, 16)],
    );
    let task = [
        ("tasks", list, TASK_LIST),
        ("pid", long, 24),
        ("tgid", long, 28),
        ("comm", long, 32),
        ("signal", long, 48),
        ("thread_node", list, 56),
        ("pid_links", list, 72),
    ];
    structure(&mut btf, "task_struct", 0x80, &task);
    structure(&mut btf, "signal_struct", 16, &[("thread_head", list, 0)]);
    let tree = structure(&mut btf, "xarray", 8, &[("xa_head", long, 0)]);
    let idr = structure(&mut btf, "idr", 8, &[("idr_rt", tree, 0)]);
    structure(&mut btf, "pid_namespace", 8, &[("idr", idr, 0)]);
    structure(&mut btf, "pid", 16, &[("tasks", long, 8)]);
    structure(&mut btf, "xa_node", 0x208, &[("shift", long, 0), ("slots", long, 8)]);
    btf.build()
}

pub(crate) fn structure(
    btf: &mut Builder,
    name: &str,
    size: u32,
    members: &[(&str, u32, u64)],
) -> u32 {
    let place = |bytes: u64| u32::try_from(bytes * 8).unwrap();
    let members: Vec<_> =
        members.iter().map(|(name, id, at)| (*name, *id, place(*at), 0)).collect();
    btf.structure(4, name, size, &members)
}
