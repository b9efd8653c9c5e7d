#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Runs the selftest in a virtual machine under QEMU's software emulation: run.sh KERNEL MODULE [FURTHER QEMU OPTIONS]
# Succeeds if all checks passed and the kernel complained about nothing. Needs qemu-system-x86, cpio and a C compiler.
set -eu
kernel=$(readlink -f "$1")
module=$(readlink -f "$2")
shift 2
here=$(dirname "$(readlink -f "$0")")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

mkdir "$folder/root"
${CC:-cc} -O1 -Wall -Wextra -Werror -static -pthread -o "$folder/root/init" "$here"/*.c
cp "$module" "$folder/root/kvmmem.ko"
(cd "$folder/root" && find . | cpio --quiet -o -H newc) >"$folder/initrd"

timeout 300 qemu-system-x86_64 -accel tcg,thread=single -cpu qemu64,+pdpe1gb -smp 2 -m 1G -nodefaults -display none \
	-no-reboot -serial stdio -device pc-testdev -kernel "$kernel" -initrd "$folder/initrd" \
	-append 'console=ttyS0 quiet loglevel=6 panic=-1 memmap=256M$0x20000000' "$@" | tr -d '\r' | tee "$folder/log"

complaint='BUG:|WARNING:|Oops|Call Trace|general protection|kernel panic'
if grep -qE "$complaint" "$folder/log"; then
	echo "selftest: the kernel complained (see above)" >&2
	exit 1
fi
grep -qE '^selftest: ([0-9]+) of \1 checks passed$' "$folder/log"
