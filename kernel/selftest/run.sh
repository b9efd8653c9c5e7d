#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
# Runs the selftest in a virtual machine under QEMU's software emulation:
# run.sh [--debug] [--minutes N] [--seed N] KERNEL MODULE [FURTHER QEMU OPTIONS]
#
# The module is one that was built with KVMMEM_SELFTEST=y. --debug: the kernel was built with debug.config, and its two
# CPUs run side by side. --minutes, --seed: of the random storm, which is short and always the same otherwise.
# With COSTS=1 it only counts what some calls cost (costs.c).
# Succeeds if all checks passed and the kernel complained about nothing. Needs qemu-system-x86, cpio and a C compiler.
set -eu
threads=single minutes=0 seed=1 options='' wanted='s/^//'
while :; do
	case $1 in
	--debug)
		threads=multi
		# Where an allocation fails, which the test wants, the kernel may show a stack.
		wanted='/vmalloc error: size\|page allocation failure/,/<\/TASK>/d'
		# An emulated CPU may wait for a busy machine.
		options='watchdog_thresh=60 rcupdate.rcu_cpu_stall_timeout=300 sysctl.kernel.hung_task_timeout_secs=300'
		shift
		;;
	--minutes) minutes=$2 && shift 2 ;;
	--seed) seed=$2 && shift 2 ;;
	*) break ;;
	esac
done
kernel=$(readlink -f "$1")
module=$(readlink -f "$2")
shift 2
here=$(dirname "$(readlink -f "$0")")
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

mkdir "$folder/root"
${CC:-cc} -O1 -Wall -Wextra -Werror -static -pthread -o "$folder/root/init" "$here"/*.c
cp "$module" "$folder/root/kvmmem.ko"
pack() {
	(cd "$folder/root" && find . | cpio --quiet -o -H newc) >"$1"
}
# The initial RAM disks of the kernel that is started by kexec, and of the one after its crash.
pack "$folder/third"
mv "$folder/third" "$folder/root"
cp "$kernel" "$folder/root/kernel"
pack "$folder/second"
mv "$folder/second" "$folder/root"
pack "$folder/initrd"

# The files of a host that shows views as PCI devices. The test says what is plugged in of them (plug.c), and reaches
# them by devices that are always there and larger. One slot with a window is there from the beginning.
cd "$folder"
truncate -s 1M page0 page1 page2
truncate -s 32M memory
ivshmem() {
	echo "-object memory-backend-file,id=at$1,mem-path=$2,share=on,size=$3 -device ivshmem-plain,memdev=at$1,addr=$1"
}
# shellcheck disable=SC2046 # lists of options
set -- $(ivshmem 18.0 page0 1M) $(ivshmem 19.0 page1 1M) $(ivshmem 1a.0 page2 1M) $(ivshmem 1b.0 memory 32M) \
	$(ivshmem 10.0 page2 4K),multifunction=on $(ivshmem 10.1 memory 2M) "$@"
mkfifo monitor.in monitor.out commands.in commands.out
[ -z "${COSTS:-}" ] || set -- "$@" -smp 1 -icount shift=0,sleep=off

# The second serial port is QEMU's monitor: messages of the kernel would get into lines on the first one.
cat monitor.out >monitor.log &
cat commands.out >monitor.in &

timeout $((3600 + minutes * 180)) qemu-system-x86_64 -accel tcg,thread=$threads -cpu qemu64,+pdpe1gb -smp 2 -m 1G,slots=1,maxmem=2G \
	-nodefaults -display none -no-reboot -serial stdio -serial pipe:commands -device pc-testdev -kernel "$kernel" -initrd initrd \
	-chardev pipe,id=monitor,path=monitor -mon monitor \
	-append "console=ttyS0 quiet loglevel=6 panic=-1 no_timer_check memmap=256M\$0x20000000 $options storm_minutes=$minutes storm_seed=$seed ${COSTS:+costs}" \
	"$@" | sed -u 's/\r$//' | tee log

complaint='BUG:|WARNING:|INFO: |ODEBUG|DEBUG_LOCKS|deprecated|Oops|Call Trace|general protection|Kernel panic|unreferenced object'
if sed -e '/^selftest: crashes on purpose/,/^selftest: the kernel of a crash runs/d; /deprecated remap_file_pages/d' -e "$wanted" log | grep -qE "$complaint"; then
	echo "selftest: the kernel complained (see above)" >&2
	exit 1
fi
if [ -n "${COSTS:-}" ]; then
	grep -qE '^selftest: ([0-9]+) of \1 checks passed$' log
	exit
fi
if ! grep -q 'kvmmem: the host gave 2 pages back before the reboot' log; then
	echo "selftest: the pages that were mapped at last were not given back" >&2
	exit 1
fi
if ! grep -qE '^selftest: after kexec and a crash: ([0-9]+) of \1 checks passed$' log; then
	echo "selftest: the kernel that was started by kexec, or the one after its crash, failed" >&2
	exit 1
fi
grep -qE '^selftest: ([0-9]+) of \1 checks passed$' log
