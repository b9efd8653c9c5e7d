// SPDX-License-Identifier: GPL-2.0-only
/* A host whose descriptor cannot be: an error when attaching, the end of a view that is open. */
#define _GNU_SOURCE
#include <sys/wait.h>

#include "malformed.h"

static const struct malformed malformed[] = {
#include "../../crates/kvmmem-abi/tests/malformed_descriptors.inc"
	/* By hypercall alone: window 0 is the only one, and the ranges fit in it. */
	{ FIELD(window_len), HUGE_AT + HUGE_SIZE - PAGE },
	{ FIELD(ranges[1].len), HUGE_SIZE + PAGE },
	{ FIELD(ranges[1].window), 1 },
	/* Possible, but not here: this machine's RAM, and more than its CPU can address. */
	{ FIELD(window_gpa), RAM },
	{ FIELD(window_gpa), RESERVED - PAGE },
	{ FIELD(window_gpa), 1UL << 51 },
};

static void tell(int i)
{
	host_shows_usual(0, RW);
	host_begins(0);
	spoil(descriptor(0), &malformed[i]);
	host_ends(0);
}

static void when_attaching(void)
{
	long before = counter("invalid_answers");
	int fd = device();

	for (int i = 0; i < COUNT(malformed); i++) {
		tell(i);
		CHECK_REFUSED(attach(fd, 0, 0), EIO);
		CHECK_EQUAL(counter("invalid_answers"), before + i + 1);
	}
	CHECK_EQUAL(counter("views"), 0);
	close(fd);
}

static void when_open(void)
{
	long before = counter("invalid_answers");

	for (int i = 0; i < COUNT(malformed); i++) {
		host_shows_usual(0, RW);
		check_end(HUGE, tell, i);
		CHECK_EQUAL(counter("invalid_answers"), before + i + 1);
	}
	CHECK_EQUAL(counter("views"), 0);
}

static void generations(void)
{
	long before = counter("invalid_answers");
	char byte;
	int fd;

	host_shows_usual(0, RW);
	check_generation(HUGE, descriptor(0));
	CHECK_EQUAL(counter("invalid_answers"), before + 1);

	/* A host that is stopped in the midst of a change: nothing is said about it, and the view goes on after it. */
	host_begins(0);
	fd = device();
	CHECK_REFUSED(attach(fd, 0, 0), EAGAIN);
	host_ends(0);
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	host_begins(0);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, HUGE) == MAP_FAILED && errno == EAGAIN);
	CHECK_REFUSED(pread(fd, &byte, 1, HUGE), EAGAIN);
	CHECK_REFUSED(pwrite(fd, &byte, 1, HUGE), EAGAIN);
	CHECK_EQUAL(polled(fd, 0), POLLIN);
	CHECK_EQUAL(ranges_of(fd).state, KVMMEM_STATE_OPEN);
	host_ends(0);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI);
	CHECK_EQUAL(pread(fd, &byte, 1, HUGE), 1);
	CHECK_EQUAL(counter("invalid_answers"), before + 1);
	close(fd);

	/* One that takes its time. */
	fd = attached(0, 0);
	host_begins(0);
	if (!fork()) {
		usleep(100000);
		host_ends(0);
		_exit(0);
	}
	CHECK_EQUAL(pread(fd, &byte, 1, HUGE), 1);
	CHECK_EQUAL(counter("invalid_answers"), before + 1);
	/* The child has the view open until it ends. */
	CHECK(wait(NULL) > 0);
	close(fd);
}

/* In a module whose descriptor pages are where none can be. */
void test_wrong_page(void)
{
	long before = counter("invalid_answers");
	int fd = device();

	CHECK_REFUSED(attach(fd, 0, 0), EIO);
	CHECK_EQUAL(counter("invalid_answers"), before + 1);
	CHECK_EQUAL(counter("views"), 0);
	close(fd);
}

void test_malformed_descriptors(void)
{
	when_attaching();
	when_open();
	generations();
}
