// SPDX-License-Identifier: GPL-2.0-only
/* The module where the host shows views as PCI devices. */
#define _GNU_SOURCE
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "plug.h"

static void without_hypercalls(void)
{
	struct kvmmem_info info;
	char *page = pages(1);
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVMMEM_INFO, &info), 0);
	CHECK_EQUAL(info.features & ~KVMMEM_FEAT_HUGE_1G,
		    KVMMEM_FEAT_VIEWS | KVMMEM_FEAT_HUGE_2M | KVMMEM_FEAT_REGIONS | KVMMEM_FEAT_DEVICES);
	CHECK_REFUSED(map(fd, page), EOPNOTSUPP);
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
	bound("10.0", ENODEV);
	bound("10.1", ENODEV);
	bound("18.0", ENODEV);
	bound("1b.0", ENODEV);
}

/* The firmware has put the BARs below 4 GiB, where MTRRs forbid caching. */
static void not_cached(void)
{
	const struct kvmmem_window_range range = { FIRST, PAGE, 0, 1, 0 };
	long complaints = counter("complaints");
	int fd = device();

	plug_writes(HEAD_COLD, 2, 0);
	plug_shows(HEAD_COLD, KVMMEM_RIGHT_READ, &range, 1);
	bound("10.1", ENODEV);
	bound("10.0", 0);
	bound("10.1", 0);
	CHECK_EQUAL(plug_complaint(HEAD_COLD), KVMMEM_COMPLAINT_NOT_CACHED);
	CHECK_EQUAL(counter("complaints"), complaints + 1);
	CHECK_REFUSED(attach(fd, 2, 0), ENOENT);
	CHECK_EQUAL(page_of(HEAD_COLD)->seen_generation, 0);
	CHECK(!is_mapped("10.1"));
	close(fd);
	CHECK_EQUAL(unbind("10.1"), 0);
	CHECK_EQUAL(unbind("10.0"), 0);
}

void test_devices(void)
{
	plug_opens();
	CHECK_EQUAL(load_module(""), 0);
	without_hypercalls();
	left_alone();
	not_cached();
	test_plug();
	test_unplug();
	test_plug_lies();
	test_plug_storm();
	CHECK_EQUAL(unload_module(), 0);
}
