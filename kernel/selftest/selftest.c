// SPDX-License-Identifier: GPL-2.0-only
/* The init of the test machine: loads the module, runs the tests, powers off. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#include "../../crates/kvmmem-abi/include/uapi/kvmmem.h"
#include "host.h"
#include "inject.h"
#include "machine.h"
#include "plug.h"
#include "random_storm.h"
#include "selftest.h"

int checks, failures;

void host_answers(int answer)
{
	outl(answer, HOST_PORT);
}

int device(void)
{
	int fd = open("/dev/kvmmem", O_RDWR | O_NOFOLLOW);

	CHECK(fd >= 0);
	return fd;
}

int map_gpa(int fd, const void *gva, unsigned long gpa)
{
	struct kvmi_mem_map argument = { .gpa = gpa, .gva = (unsigned long)gva };

	return ioctl(fd, KVM_INTRO_MEM_MAP, &argument);
}

int map(int fd, const void *gva)
{
	return map_gpa(fd, gva, 0);
}

int unmap(int fd, const void *gva)
{
	return ioctl(fd, KVM_INTRO_MEM_UNMAP, gva);
}

int load_module(const char *parameters)
{
	int fd = open("/kvmmem.ko", O_RDONLY);
	int result = syscall(SYS_finit_module, fd, parameters, 0);
	int error = errno;

	close(fd);
	errno = error;
	return result;
}

int unload_module(void)
{
	return syscall(SYS_delete_module, "kvmmem", O_NONBLOCK);
}

char *pages(unsigned long count)
{
	char *p = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

/* The number after the line's first word, which is the name. */
static long number(const char *path, const char *name)
{
	char word[64], line[256];
	long value, found = -1;
	FILE *file = fopen(path, "r");

	while (file && fgets(line, sizeof(line), file))
		if (sscanf(line, "%63[^: \t]%*[: \t]%ld", word, &value) == 2 && !strcmp(word, name))
			found = value;
	if (file)
		fclose(file);
	return found;
}

long counter(const char *name)
{
	return number("/sys/kernel/debug/kvmmem/counters", name);
}

long fdinfo(int fd, const char *name)
{
	char path[64];

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	return number(path, name);
}

long free_pages(void)
{
	return number("/proc/meminfo", "MemFree") * 1024 / (long)PAGE;
}

long pinned(void)
{
	/* Folds the counts of each CPU into the totals. */
	int fd = open("/proc/sys/vm/stat_refresh", O_WRONLY);

	CHECK_EQUAL(write(fd, "1", 1), 1);
	close(fd);
	return number("/proc/vmstat", "nr_foll_pin_acquired") - number("/proc/vmstat", "nr_foll_pin_released");
}

long charged(void)
{
	return number("/proc/self/status", "VmPin") * 1024 / (long)PAGE;
}

void monitor(const char *format, ...)
{
	static FILE *port;
	va_list arguments;

	if (!port)
		port = fopen("/dev/ttyS1", "w");
	CHECK(port != NULL);
	va_start(arguments, format);
	vfprintf(port, format, arguments);
	va_end(arguments);
	fputc('\n', port);
	CHECK_EQUAL(fflush(port), 0);
}

void progress(const char *format, ...)
{
	struct timespec now;
	char text[80];
	va_list arguments;

	va_start(arguments, format);
	vsnprintf(text, sizeof(text), format, arguments);
	va_end(arguments);
	clock_gettime(CLOCK_MONOTONIC, &now);
	printf("selftest: %ld s: %s\n", (long)now.tv_sec, text);
}

void in_child(void (*run)(void))
{
	int *counts = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t child = fork();
	int status;

	if (!child) {
		checks = failures = 0;
		run();
		counts[0] = checks;
		counts[1] = failures;
		_exit(0);
	}
	waitpid(child, &status, 0);
	CHECK_EQUAL(status, 0);
	checks += counts[0];
	failures += counts[1];
	munmap(counts, PAGE);
}

static void mount_all(void)
{
	static const char *const mounts[][2] = {
		{ "proc", "/proc" }, { "sysfs", "/sys" }, { "debugfs", "/sys/kernel/debug" }, { "devtmpfs", "/dev" },
	};

	for (unsigned int i = 0; i < sizeof(mounts) / sizeof(*mounts); i++) {
		mkdir(mounts[i][1], 0755);
		mount(mounts[i][0], mounts[i][1], mounts[i][0], 0, NULL);
	}
}

static void test_view_unload(void)
{
	int fd = attached(0, 0);

	CHECK_REFUSED(unload_module(), EAGAIN);
	close(fd);
	/* At once, while the view's work may still be on its way. */
	CHECK_EQUAL(unload_module(), 0);
}

/* What is replaced when the machine goes down is given back before; run.sh looks for what the kernel says of it. */
static void leave_pages(void)
{
	char *p = pages(2);
	int fd;

	CHECK_EQUAL(load_module(LOAD), 0);
	fd = device();
	CHECK_EQUAL(map(fd, p), 0);
	CHECK_EQUAL(map(fd, p + PAGE), 0);
}

static void with_interrupt(void)
{
	CHECK_EQUAL(load_module(LOAD_INTERRUPT), 0);
	host_raises(1);
	host_fills();
	RUN(test_events);
	RUN(test_interrupt);
	RUN(test_failing_interrupt);
	RUN(random_storm_of_windows);
	RUN(test_nothing_left);
	for (int i = 0; i < 20; i++) {
		host_shows_usual(0, KVMMEM_RIGHT_READ);
		test_view_unload();
		CHECK_EQUAL(load_module(LOAD_INTERRUPT), 0);
	}
	CHECK_EQUAL(unload_module(), 0);
	host_raises(0);
}

static void with_views(void)
{
	host_opens();
	RUN(test_sleep);
	RUN(test_attach);
	RUN(test_memory);
	RUN(test_positions);
	RUN(test_events);
	RUN(test_malformed_descriptors);
	RUN(test_memory_runs_out);
	RUN(test_failing_allocations);
	RUN(test_sharing, "/init");
	RUN(test_regions);
	RUN(test_storm);
	RUN(test_nothing_left);
	for (int i = 0; i < 20; i++) {
		host_shows_usual(0, KVMMEM_RIGHT_READ);
		test_view_unload();
		CHECK_EQUAL(load_module(LOAD_VIEWS), 0);
	}
	CHECK_EQUAL(unload_module(), 0);
	with_interrupt();

	CHECK_EQUAL(load_module(LOAD_VIEWS " regions=0"), 0);
	RUN(test_no_regions);
	CHECK_EQUAL(unload_module(), 0);
	CHECK_EQUAL(load_module(LOAD " force_window=1 test_descriptor=0x1000000"), 0);
	RUN(test_wrong_page);
	CHECK_EQUAL(unload_module(), 0);
	CHECK_EQUAL(load_module(LOAD " force_window=1 test_descriptor=0x20000800"), 0);
	RUN(test_wrong_page);
	CHECK_EQUAL(unload_module(), 0);
	CHECK_EQUAL(load_module(LOAD " force_window=1 test_descriptor=0x8000000000000"), 0);
	RUN(test_wrong_page);
	CHECK_EQUAL(unload_module(), 0);
	RUN(test_failing_load);
}

static void say_end(const char *where)
{
	printf("selftest: %s: %d of %d checks passed\n", where, checks - failures, checks);
	/* Before the kernel's own last line. */
	tcdrain(STDOUT_FILENO);
	reboot(RB_POWER_OFF);
}

int main(int argc, char **argv)
{
	setvbuf(stdout, NULL, _IONBF, 0);
	if (iopl(3))
		return 1;
	if (argc == 2 && !strcmp(argv[1], "costs")) {
		mount_all();
		CHECK_EQUAL(load_module(LOAD_VIEWS), 0);
		print_costs();
		printf("selftest: %d of %d checks passed\n", checks - failures, checks);
		tcdrain(STDOUT_FILENO);
		reboot(RB_POWER_OFF);
	}
	if (argc == 3) {
		if (!strcmp(argv[1], "storm"))
			storm_after_exec(argv[2]);
		if (!strcmp(argv[1], "exec"))
			test_exec(atoi(argv[2]));
		else
			test_view_exec(atoi(argv[2]));
		return failures != 0;
	}
	mount_all();
	if (is_after("kexec"))
		test_after_kexec();
	if (is_after("crash")) {
		test_after_crash();
		say_end("after kexec and a crash");
	}
	can_inject();
	forget_leaks();
	/* This machine's host has no CPUID signature, but there is a PCI bus. */
	in_child(test_devices);
	CHECK_EQUAL(load_module(LOAD), 0);
	CHECK_EQUAL(chmod("/dev/kvmmem", 0666), 0);
	if (!failures) {
		RUN(test_arguments);
		in_child(test_opening);
		RUN(test_ownership, argv[0]);
		RUN(test_limits);
		RUN(test_races);
		RUN(test_quarantine);
		RUN(test_no_views);
		RUN(test_memory_hotplug);
		RUN(test_unload);
		CHECK_EQUAL(load_module(LOAD_VIEWS), 0);
		/* Not in process 1, whose signals the kernel logs. */
		in_child(with_views);
	} else {
		CHECK_EQUAL(unload_module(), 0);
	}
	RUN(check_leaks);
	load_next_kernel(0);
	leave_pages();
	printf("selftest: %d of %d checks passed\n", checks - failures, checks);
	start_next_kernel();
	say_end("there is no other kernel");
}
