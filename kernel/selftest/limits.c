// SPDX-License-Identifier: GPL-2.0-only
/* How much may be mapped, and unloading. */
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include "selftest.h"

#define DEFAULT_LIMIT	65536
#define MEMLOCK_PAGES	16

static void ordinary_user(void)
{
	struct rlimit limit = { MEMLOCK_PAGES * PAGE, MEMLOCK_PAGES * PAGE };
	char *p = pages(MEMLOCK_PAGES + 1);
	int a = device(), b = device();

	setrlimit(RLIMIT_MEMLOCK, &limit);
	CHECK_EQUAL(setuid(1000), 0);
	for (int i = 0; i < MEMLOCK_PAGES; i++)
		CHECK_EQUAL(map(i % 2 ? a : b, p + i * PAGE), 0);
	CHECK_EQUAL(charged(), MEMLOCK_PAGES);
	CHECK_REFUSED(map(a, p + MEMLOCK_PAGES * PAGE), ENOMEM);
	CHECK_EQUAL(unmap(b, p), 0);
	CHECK_EQUAL(map(a, p + MEMLOCK_PAGES * PAGE), 0);
	CHECK_REFUSED(map(a, p), ENOMEM);
}

void test_limits(void)
{
	char *p = pages(DEFAULT_LIMIT + 1);
	int fd = device(), mapped = 0;

	in_child(ordinary_user);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-limit"), DEFAULT_LIMIT);
	for (int i = 0; i < DEFAULT_LIMIT; i++)
		mapped += map(fd, p + i * PAGE) == 0;
	CHECK_EQUAL(mapped, DEFAULT_LIMIT);
	CHECK_REFUSED(map(fd, p + DEFAULT_LIMIT * PAGE), ENOMEM);
	CHECK_EQUAL(charged(), DEFAULT_LIMIT);
	close(fd);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(charged(), 0);
	CHECK_EQUAL(pinned(), 0);
	munmap(p, (DEFAULT_LIMIT + 1) * PAGE);
}

void test_unload(void)
{
	long before = pinned();
	char *p = pages(4);
	int fd = device();

	CHECK_REFUSED(unload_module(), EAGAIN);
	close(fd);
	CHECK_EQUAL(unload_module(), 0);
	/* Quarantined pages stay pinned when the module goes. */
	CHECK_EQUAL(pinned(), before);

	CHECK_EQUAL(load_module(LOAD " max_pages_per_file=3"), 0);
	fd = device();
	for (int i = 0; i < 3; i++)
		CHECK_EQUAL(map(fd, p + i * PAGE), 0);
	CHECK_REFUSED(map(fd, p + 3 * PAGE), ENOMEM);
	CHECK_EQUAL(unmap(fd, p), 0);
	CHECK_EQUAL(map(fd, p + 3 * PAGE), 0);
	close(fd);
	CHECK_EQUAL(unload_module(), 0);

	/* A CPU without the instruction: an error, not an oops. */
	CHECK_EQUAL(load_module("force_vmcall=1"), 0);
	fd = device();
	CHECK_REFUSED(map(fd, p), EIO);
	close(fd);
	CHECK_EQUAL(unload_module(), 0);
}
