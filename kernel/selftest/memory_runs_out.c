// SPDX-License-Identifier: GPL-2.0-only
/* This machine has no memory left for a while: nothing ends by it, and the host is not blamed. */
#define _GNU_SOURCE
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)

/* In a module built for the selftest (knobs.rs): these mappings of foreign memory into the kernel fail. */
static void mappings_fail(int fd, unsigned int after, unsigned int count)
{
	CHECK_EQUAL(ioctl(fd, _IO('i', 0xf0), after << 16 | count), 0);
}

static void when_attaching(void)
{
	int fd = device();

	/* The descriptor's page, and each of the three ranges. */
	for (int after = 0; after < 4; after++) {
		mappings_fail(fd, after, 1);
		CHECK_REFUSED(attach(fd, 0, 0), ENOMEM);
	}
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	close(fd);
}

static void when_it_changes(void)
{
	int fd = attached(0, 0);
	char *p = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, HUGE), byte;

	mappings_fail(fd, 1, 20);
	host_shows_usual(0, RW);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI);
	CHECK_EQUAL(signal_of_read(p), 0);
	CHECK_EQUAL(pread(fd, &byte, 1, HUGE), 1);
	CHECK_EQUAL(ranges_of(fd).state, KVMMEM_STATE_OPEN);
	/* Without waiting. */
	mappings_fail(fd, 0, 1 << 15);
	host_shows_usual(0, RW);
	CHECK_REFUSED(pread(fd, &byte, 1, HUGE), ENOMEM);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, HUGE) == MAP_FAILED && errno == ENOMEM);
	mappings_fail(fd, 0, 0);
	CHECK_EQUAL(pread(fd, &byte, 1, HUGE), 1);
	munmap(p, PAGE);
	close(fd);
}

static void in_a_fault(void)
{
	/* Of two GiB only the first is mapped into the kernel at once. There is no memory; what is read there is ones. */
	const struct kvmmem_window_range large = { 0, 2 * GIB, 0, 0, 0 };
	long refused = counter("faults-refused");
	char *p;
	int fd;

	host_shows(2, RW, &large, 1);
	host_begins(2);
	descriptor(2)->window_gpa = NOWHERE;
	descriptor(2)->window_len = 2 * GIB;
	host_ends(2);
	fd = attached(2, 0);
	p = mmap(NULL, 2 * GIB, PROT_READ, MAP_SHARED, fd, 0);
	CHECK(p != MAP_FAILED);
	mappings_fail(fd, 0, 5);
	CHECK_EQUAL(signal_of_read(p + GIB), 0);
	CHECK_EQUAL(counter("faults-refused"), refused);
	munmap(p, 2 * GIB);
	close(fd);
}

void test_memory_runs_out(void)
{
	long invalid = counter("invalid_answers");

	host_shows_usual(0, RW);
	when_attaching();
	when_it_changes();
	in_a_fault();
	CHECK_EQUAL(counter("invalid_answers"), invalid);
	CHECK_EQUAL(counter("views"), 0);
}
