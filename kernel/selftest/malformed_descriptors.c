// SPDX-License-Identifier: GPL-2.0-only
/* A host whose descriptor cannot be: an error when attaching, the end of a view that is open. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"

#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define RAM	0x1000000UL

#define FIELD(name)	offsetof(struct kvmmem_descriptor, name), sizeof(((struct kvmmem_descriptor *)0)->name)

#define MALFORMED(name, value)	{ FIELD(name), value },

static const struct { unsigned int at, size; unsigned long value; } malformed[] = {
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

static void tell(unsigned int i)
{
	host_shows_usual(0, RW);
	host_begins(0);
	memcpy((char *)descriptor(0) + malformed[i].at, &malformed[i].value, malformed[i].size);
	host_ends(0);
}

static void when_attaching(void)
{
	int count = sizeof(malformed) / sizeof(*malformed), fd = device();
	long before = counter("invalid_answers");

	for (int i = 0; i < count; i++) {
		tell(i);
		CHECK_REFUSED(attach(fd, 0, 0), EIO);
		CHECK_EQUAL(counter("invalid_answers"), before + i + 1);
	}
	CHECK_EQUAL(counter("views"), 0);
	close(fd);
}

static void when_open(void)
{
	int count = sizeof(malformed) / sizeof(*malformed);
	long before = counter("invalid_answers");

	for (int i = 0; i < count; i++) {
		char *p, byte;
		int fd;

		host_shows_usual(0, RW);
		fd = attached(0, 0);
		p = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, HUGE);
		CHECK_EQUAL(signal_of_read(p), 0);
		tell(i);
		CHECK_EQUAL(polled(fd, LONG), POLLPRI | POLLHUP);
		CHECK_EQUAL(signal_of_read(p), SIGBUS);
		CHECK_REFUSED(pread(fd, &byte, 1, HUGE), ESTALE);
		CHECK_EQUAL(ranges_of(fd).state, KVMMEM_STATE_GONE);
		CHECK_EQUAL(counter("invalid_answers"), before + i + 1);
		munmap(p, PAGE);
		close(fd);
	}
	CHECK_EQUAL(counter("views"), 0);
}

static void generations(void)
{
	long before = counter("invalid_answers");
	char byte;
	int fd;

	/* One that goes back. */
	host_shows_usual(0, RW);
	fd = attached(0, 0);
	descriptor(0)->generation -= 2;
	CHECK_REFUSED(pread(fd, &byte, 1, HUGE), ESTALE);
	CHECK_EQUAL(counter("invalid_answers"), before + 1);
	close(fd);

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
