// SPDX-License-Identifier: GPL-2.0-only
/* What the host changes reaches the tool: by poll, as an errno, as SIGBUS. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

#define RO	KVMMEM_RIGHT_READ
#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define PLACES	4
#define SWAPS	60

static const struct kvmmem_window_range moved[] = { { HUGE, 2 * MIB, HUGE_AT + 64 * MIB, 0, 0 } };

static unsigned long number_at(const char *p)
{
	return *(const volatile unsigned long *)p;
}

static void changed(void)
{
	int fd = attached(0, 0);
	char *p = mmap(NULL, HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, HUGE);
	unsigned long generation = ranges_of(fd).generation, read_number;
	long events = counter("events");

	CHECK_EQUAL(number_at(p), content(HUGE));
	CHECK_EQUAL(number_at(p + 4 * MIB), content(HUGE + 4 * MIB));
	CHECK_EQUAL(polled(fd, 0), POLLIN);
	host_shows(0, RW, moved, 1);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI);
	CHECK_EQUAL(number_at(p), HUGE_AT + 64 * MIB);
	CHECK_EQUAL(signal_of_read(p + 4 * MIB), SIGBUS);
	CHECK_EQUAL(pread(fd, &read_number, 8, HUGE), 8);
	CHECK_EQUAL(read_number, HUGE_AT + 64 * MIB);
	CHECK_EQUAL(pread(fd, &read_number, 8, HUGE + 4 * MIB), 0);
	/* Told until it is asked for. */
	CHECK_EQUAL(polled(fd, 0), POLLPRI | POLLIN);
	CHECK_EQUAL(ranges_of(fd).generation, generation + 2);
	CHECK_EQUAL(polled(fd, 0), POLLIN);
	CHECK_EQUAL(stats_of(fd).events, 1);
	CHECK_EQUAL(counter("events"), events + 1);

	/* Without waiting: a position is looked up in what there is now. */
	host_shows_usual(0, RW);
	CHECK_EQUAL(pread(fd, &read_number, 8, HUGE + 4 * MIB), 8);
	CHECK_EQUAL(read_number, content(HUGE + 4 * MIB));
	CHECK_EQUAL(ranges_of(fd).count, 3);
	CHECK_EQUAL(polled(fd, 0), POLLIN);

	/* The grant was narrowed to reading: what could be written through is gone. */
	host_shows_usual(0, RO);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI);
	CHECK_EQUAL(signal_of_write(p), SIGBUS);
	CHECK_REFUSED(pwrite(fd, &read_number, 8, HUGE), EACCES);
	CHECK(mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED, fd, HUGE) == MAP_FAILED && errno == EACCES);
	munmap(p, HUGE_SIZE);
	close(fd);
}

static void ended(unsigned int state, int error)
{
	struct kvmmem_ranges ranges;
	int fd = attached(0, 0);
	char *p = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, fd, HUGE), byte;

	CHECK_EQUAL(number_at(p), content(HUGE));
	host_sets_state(0, state);
	/* Not one byte more, even before the event. */
	CHECK_REFUSED(pread(fd, &byte, 1, HUGE), error);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI | POLLHUP);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_EQUAL(signal_of_read(p + 4 * MIB), SIGBUS);
	CHECK_REFUSED(pread(fd, &byte, 1, HUGE), error);
	CHECK_REFUSED(pread(fd, &byte, 1, 0), error);
	CHECK_REFUSED(pwrite(fd, &byte, 1, HUGE), error);
	CHECK_REFUSED(lseek(fd, HUGE, SEEK_DATA), error);
	CHECK_REFUSED(lseek(fd, 0, SEEK_END), error);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, HUGE) == MAP_FAILED && errno == error);
	ranges = ranges_of(fd);
	CHECK_EQUAL(ranges.state, state);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-view-state"), state);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-view-generation"), ranges.generation);
	CHECK_EQUAL(ranges.count, 0);
	CHECK_EQUAL(polled(fd, 0), POLLHUP);
	/* What has ended does not begin again. */
	host_shows_usual(0, RW);
	CHECK_REFUSED(pread(fd, &byte, 1, HUGE), error);
	CHECK_REFUSED(attach(fd, 0, 0), EISCONN);
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	munmap(p, HUGE_SIZE);
	close(fd);

	host_sets_state(0, state);
	fd = device();
	CHECK_REFUSED(attach(fd, 0, 0), error);
	close(fd);
	host_shows_usual(0, RW);
}

static void *detach_soon(void *fd)
{
	usleep(50000);
	CHECK_EQUAL(ioctl(*(int *)fd, KVMMEM_DETACH, 0), 0);
	return NULL;
}

static void detached_while_polled(void)
{
	int fd = attached(0, 0);
	pthread_t thread;

	CHECK_EQUAL(pthread_create(&thread, NULL, detach_soon, &fd), 0);
	CHECK_EQUAL(polled(fd, LONG), POLLERR);
	pthread_join(thread, NULL);
	close(fd);
}

static char *racing;
static int stopping;

static void *toucher(void *unused)
{
	while (!__atomic_load_n(&stopping, __ATOMIC_RELAXED))
		for (unsigned long at = 0; at < 2 * MIB; at += 64 * PAGE)
			(void)number_at(racing + at);
	return unused;
}

/* Pages that come by faults while they are taken away: once an event was told, no page of before is left. */
static void nothing_stale(void)
{
	struct kvmmem_window_range range = { HUGE, 2 * MIB, 0, 0, 0 };
	pthread_t threads[2];
	int fd = attached(0, 0), stale = 0;

	__atomic_store_n(&stopping, 0, __ATOMIC_RELAXED);
	racing = mmap(NULL, 2 * MIB, PROT_READ, MAP_SHARED, fd, HUGE);
	for (int i = 0; i < 2; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, toucher, NULL), 0);
	for (int i = 0; i < SWAPS; i++) {
		/* Every other one is not aligned to 2 MiB, and comes by small pages. */
		range.offset = (16 + 2 * (i % PLACES)) * MIB + i % 2 * PAGE;
		host_shows(0, RO, &range, 1);
		CHECK_EQUAL(polled(fd, LONG), POLLPRI);
		ranges_of(fd);
		for (unsigned long at = 0; at < 2 * MIB; at += PAGE)
			stale += number_at(racing + at) != range.offset + at;
	}
	CHECK_EQUAL(stale, 0);
	__atomic_store_n(&stopping, 1, __ATOMIC_RELAXED);
	for (int i = 0; i < 2; i++)
		pthread_join(threads[i], NULL);
	CHECK_EQUAL(stats_of(fd).events, SWAPS);
	munmap(racing, 2 * MIB);
	close(fd);
	host_shows_usual(0, RW);
}

void test_events(void)
{
	host_shows_usual(0, RW);
	changed();
	host_shows_usual(0, RW);
	ended(KVMMEM_STATE_REVOKED, EKEYREVOKED);
	ended(KVMMEM_STATE_GONE, ESTALE);
	detached_while_polled();
	nothing_stale();
}
