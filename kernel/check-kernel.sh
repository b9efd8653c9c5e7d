#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Whether the kernel build directory $1 can build a Rust module; if not, why not and what to do.
set -eu
kdir=$1

refuse() {
	echo "kvmmem: cannot build against $kdir:" >&2
	printf 'kvmmem:   %s\n' "$@" >&2
	exit 1
}

config=$kdir/include/config/auto.conf
[ -r "$config" ] || refuse "there is no $config." \
	"Install the kernel's headers (Debian, Ubuntu: linux-headers-\$(uname -r); Arch: linux-headers), or set KDIR."

grep -q '^CONFIG_RUST=y' "$config" || refuse "this kernel was configured without Rust (CONFIG_RUST is not set)." \
	"kvmmem needs a kernel from 7.3 on with CONFIG_RUST=y; Debian's 7.3 and Arch's kernels are."

missing=
for crate in core kernel bindings macros pin_init; do
	set -- "$kdir"/rust/lib$crate.*
	[ -e "$1" ] || missing="$missing $crate"
done
[ -z "$missing" ] || refuse "its Rust metadata is missing (rust/*.rmeta, rust/*.so; here:$missing)." \
	"Ubuntu: install linux-lib-rust-*. Arch: linux-headers has it. Debian's headers packages lack it: unpack" \
	"linux-source of the same version, copy the headers' .config and Module.symvers into it, run" \
	"'make LOCALVERSION=+... modules_prepare' there (LOCALVERSION as in 'uname -r'), and set KDIR to that tree."

wanted=$(sed -n 's/^CONFIG_RUSTC_VERSION=//p' "$config")
rustc=${RUSTC:-rustc}
found=$("$rustc" --version 2>/dev/null | sed -n 's/^rustc \([0-9]*\)\.\([0-9]*\)\.\([0-9]*\).*/\1 \2 \3/p')
[ -n "$found" ] || refuse "there is no Rust compiler ($rustc)." "Install the one that built this kernel (rustc $wanted)."
# shellcheck disable=SC2086 # three numbers
found=$(printf '%d%03d%02d' $found)
[ "$found" = "$wanted" ] || refuse "its Rust metadata is of rustc $wanted, but $rustc is $found." \
	"Rust metadata is bound to the exact compiler: set RUSTC to the one that built this kernel."
