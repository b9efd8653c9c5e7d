// SPDX-License-Identifier: GPL-2.0-only
/* kexec and kdump with pages mapped: the kernel that is started next does without them, and the module works in it. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <termios.h>
#include <unistd.h>

#include "machine.h"
#include "selftest.h"

void load_next_kernel(int is_for_crash)
{
	int kernel = open("/kernel", O_RDONLY), initrd = open(is_for_crash ? "/third" : "/second", O_RDONLY), fd = open("/proc/cmdline", O_RDONLY);
	/* Of 128 MiB the debug kernel needs 100 before it runs. */
	const char *added = is_for_crash ? " after=crash nr_cpus=1" : " after=kexec crashkernel=192M";
	char line[1024];
	ssize_t count = read(fd, line, sizeof(line) - 64);

	CHECK(kernel >= 0 && initrd >= 0 && count > 0);
	line[count - 1] = 0;
	strcat(line, added);
	CHECK_EQUAL(syscall(SYS_kexec_file_load, kernel, initrd, strlen(line) + 1, line,
			    is_for_crash ? KEXEC_FILE_ON_CRASH : 0), 0);
	close(fd);
	close(initrd);
	close(kernel);
}

void start_next_kernel(void)
{
	tcdrain(STDOUT_FILENO);
	syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, NULL);
}

void crash(void)
{
	int fd = open("/proc/sysrq-trigger", O_WRONLY);

	puts("selftest: crashes on purpose");
	tcdrain(STDOUT_FILENO);
	(void)!write(fd, "c", 1);
}

int is_after(const char *what)
{
	const char *after = getenv("after");

	/* The last one counts, as each kernel's command line begins with that of the one before. */
	return after && !strcmp(after, what);
}

static void works(void)
{
	char *p = pages(2);
	int fd;

	CHECK_EQUAL(load_module(LOAD), 0);
	fd = device();
	CHECK_EQUAL(map(fd, p), 0);
	CHECK_EQUAL(map(fd, p + PAGE), 0);
	CHECK_EQUAL(counter("mapped"), 2);
	/* Left open. */
}

void test_after_kexec(void)
{
	works();
	load_next_kernel(1);
	crash();
}

void test_after_crash(void)
{
	puts("selftest: the kernel of a crash runs");
	CHECK(!access("/proc/vmcore", R_OK));
	works();
}
