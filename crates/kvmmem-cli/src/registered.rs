// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMs that the broker knows as aligned columns: `target list`, `introspector list`.

use kvmmem_client::admin::TargetInfo;

use crate::escape::escape;
use crate::number::mebibytes;
use crate::output::columns;

/// The columns of every VM.
const HEADER: [&str; 6] = ["NAME", "UUID", "VCPUS", "MEMORY", "CID", "PID"];

/// The VMs as aligned columns.
pub(crate) fn lines(vms: &[TargetInfo]) -> Vec<String> {
    let rows = vms.iter().map(row);
    columns(&std::iter::once(HEADER.map(str::to_owned)).chain(rows).collect::<Vec<_>>())
}

/// The same with one more column.
pub(crate) fn lines_with(
    title: &str,
    vms: &[TargetInfo],
    cells: impl IntoIterator<Item = String>,
) -> Vec<String> {
    let append = |row: [String; 6], cell| {
        let [name, uuid, vcpus, memory, cid, pid] = row;
        [name, uuid, vcpus, memory, cid, pid, cell]
    };
    let header = append(HEADER.map(str::to_owned), title.to_owned());
    let rows = vms.iter().zip(cells).map(|(vm, cell)| append(row(vm), cell));
    columns(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

fn row(vm: &TargetInfo) -> [String; 6] {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    [
        escape(&vm.identity.name),
        vm.identity.uuid.to_string(),
        vm.identity.vcpus.to_string(),
        or_none((vm.memory_bytes > 0).then(|| mebibytes(vm.memory_bytes))),
        or_none(vm.identity.cid.map(|cid| cid.to_string())),
        vm.pid.to_string(),
    ]
}

/// A target without hooks, for tests.
#[cfg(test)]
pub(crate) fn example(name: &str) -> TargetInfo {
    use kvmmem_client::admin::VmIdentity;

    let target = VmIdentity::target(name, uuid::Uuid::nil());
    TargetInfo {
        id: 1,
        identity: VmIdentity { vcpus: 2, cid: Some(3), ..target },
        memory_bytes: 256 << 20,
        pid: 77,
        hooks: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_aligned_and_cannot_drive_the_terminal() {
        let mut vms = [example("a\x1b[2Jb"), TargetInfo { memory_bytes: 0, ..example("x") }];
        vms[1].identity.cid = None;
        assert_eq!(
            lines(&vms),
            [
                "NAME         UUID                                  VCPUS  MEMORY   CID  PID",
                "a\\u{1b}[2Jb  00000000-0000-0000-0000-000000000000  2      256 MiB  3    77",
                "x            00000000-0000-0000-0000-000000000000  2      -        -    77",
            ]
        );
        let cells = ["1 of 2", "-"].map(str::to_owned);
        assert_eq!(
            lines_with("FREE SLOTS", &vms, cells),
            [
                "NAME         UUID                                  VCPUS  MEMORY   CID  PID  FREE SLOTS",
                "a\\u{1b}[2Jb  00000000-0000-0000-0000-000000000000  2      256 MiB  3    77   1 of 2",
                "x            00000000-0000-0000-0000-000000000000  2      -        -    77   -",
            ]
        );
    }
}
