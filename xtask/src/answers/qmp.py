# SPDX-License-Identifier: Apache-2.0 OR MIT
"""qmp.py ADDRESS NOTE VMLINUX SCRIPT: runs a script as drgn does, for the guest of the QEMU with a monitor at ADDRESS.

`drgn --qemu` recognises a kernel by QEMU's vmcoreinfo device alone, and only at a unix socket; so the note is told here.
"""
import sys

import drgn

address, note, vmlinux, script = sys.argv[1:]
with open(note, "rb") as file:
    note = file.read()
prog = drgn.Program(platform=drgn.Platform(drgn.Architecture.X86_64), vmcoreinfo=note)
prog.set_qemu_qmp(address)
prog.set_linux_kernel_custom(note, True)
prog.load_debug_info([vmlinux])
with open(script) as file:
    exec(file.read())
