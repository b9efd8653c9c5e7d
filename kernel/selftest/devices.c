// SPDX-License-Identifier: GPL-2.0-only
/* The module where the host shows views as PCI devices. */
#define _GNU_SOURCE
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine.h"
#include "plug.h"
#include "random_storm.h"

static void without_hypercalls(void)
{
	struct kvmmem_info info;
	char *page = pages(1);
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVMMEM_INFO, &info), 0);
	CHECK_EQUAL(info.features & ~KVMMEM_FEAT_HUGE_1G,
		    KVMMEM_FEAT_VIEWS | KVMMEM_FEAT_HUGE_2M | KVMMEM_FEAT_REGIONS | KVMMEM_FEAT_DEVICES);
	CHECK_REFUSED(map(fd, page), ENOENT);
	CHECK_REFUSED(unmap(fd, page), ENOENT);
	CHECK_REFUSED(attach(fd, 0, 0), ENOENT);
	munmap(page, PAGE);
	close(fd);
}

static void bound(const char *function, int error)
{
	CHECK_EQUAL(bind(function), error);
}

/* Others' ivshmem: the function 0 is no descriptor, or none of its size. */
static void left_alone(void)
{
	/* Its function 0 could become ours. Neither stays enabled. */
	bound("10.0", ENODEV);
	bound("10.1", EAGAIN);
	CHECK_EQUAL(enablers("10.0"), 0);
	CHECK_EQUAL(enablers("10.1"), 0);
	bound("18.0", ENODEV);
	bound("1b.0", ENODEV);
}

/* The firmware has put these BARs below 4 GiB, where MTRRs forbid write-back: cached all the same, in small pages. */
static void below_4g(void)
{
	const struct kvmmem_window_range range = { FIRST, WINDOW_COLD, 0, 1, 0 };
	struct kvmmem_stats stats;
	char *p;
	int fd;

	plug_writes(HEAD_COLD, 2, 0);
	plug_shows(HEAD_COLD, KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE, &range, 1);
	bound("10.1", EAGAIN);
	bound("10.0", 0);
	/* Has waited for function 0 since the module was loaded. The kernel names its driver before it is probed. */
	CHECK(is_bound("10.1"));
	CHECK_EQUAL(enablers("10.0"), 1);
	CHECK(WITHIN(enablers("10.1") == 1));
	CHECK(plug_is_seen(HEAD_COLD));
	fd = attached(2, 0);
	CHECK_EQUAL(cached_how("10.1"), 't');
	p = mmap(NULL, WINDOW_COLD, PROT_READ | PROT_WRITE, MAP_SHARED, fd, FIRST);
	for (unsigned long at = 0; at < WINDOW_COLD; at += PAGE)
		CHECK_EQUAL(*(volatile unsigned long *)(p + at), at);
	*(volatile unsigned long *)p = 42;
	CHECK_EQUAL(*shared(0), 42);
	*shared(0) = 0;
	CHECK_EQUAL(pread(fd, p + PAGE, PAGE, FIRST), PAGE);
	CHECK_EQUAL(*shared(PAGE), 0);
	*shared(PAGE) = PAGE;
	stats = stats_of(fd);
	CHECK_EQUAL(stats.faults_4k, WINDOW_COLD / PAGE);
	CHECK_EQUAL(stats.faults_2m, 0);
	munmap(p, WINDOW_COLD);
	close(fd);
	CHECK_EQUAL(unbind("10.1"), 0);
	CHECK_EQUAL(unbind("10.0"), 0);
	CHECK_EQUAL(enablers("10.0"), 0);
	CHECK_EQUAL(enablers("10.1"), 0);
	CHECK(!is_mapped("10.1"));
}

void test_devices(void)
{
	plug_opens();
	CHECK_EQUAL(load_module(""), 0);
	RUN(without_hypercalls);
	RUN(left_alone);
	RUN(below_4g);
	RUN(test_sleep_of_devices);
	RUN(test_plug);
	RUN(test_window_page);
	RUN(test_unplug);
	RUN(test_malformed_devices);
	RUN(test_plug_storm);
	RUN(test_failing_plug);
	RUN(random_storm_of_devices);
	CHECK_EQUAL(unload_module(), 0);
}
