# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What drgn runs: prints the processes, and on the last line how long that took."""
import time

from drgn.helpers.linux.list import list_for_each_entry

began = time.monotonic_ns()
for task in list_for_each_entry("struct task_struct", prog["init_task"].tasks.address_of_(), "tasks"):
    comm = task.comm.string_().decode(errors="backslashreplace")
    print(
        task.pid.value_(),
        task.real_parent.tgid.value_(),
        task.cred.uid.val.value_(),
        task.member_("__state").value_(),
        task.start_time.value_(),
        ascii(comm),
    )
print("nanoseconds:", time.monotonic_ns() - began)
