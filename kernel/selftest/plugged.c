// SPDX-License-Identifier: GPL-2.0-only
/* A view that comes as PCI devices: shown, changed, revoked. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "plug.h"

#define RO	KVMMEM_RIGHT_READ
#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define SPAN	(THIRD + THIRD_SIZE - FIRST)

static unsigned long number_at(const char *p)
{
	return *(const volatile unsigned long *)p;
}

static unsigned long number_read(int fd, unsigned long gpa)
{
	unsigned long number = 0;

	CHECK_EQUAL(pread(fd, &number, 8, gpa), 8);
	return number;
}

static void shown(int fd)
{
	struct kvmmem_ranges ranges = ranges_of(fd);
	struct kvmmem_range *range = (struct kvmmem_range *)(unsigned long)ranges.ranges;
	unsigned long two[2 * PAGE / 8];

	CHECK_EQUAL(ranges.state, KVMMEM_STATE_OPEN);
	CHECK_EQUAL(ranges.rights, RW);
	CHECK_EQUAL(ranges.generation, page_of(HEAD_A)->generation);
	CHECK_EQUAL(ranges.uuid[15], 0x60);
	CHECK_EQUAL(ranges.count, 3);
	CHECK(range[0].gpa == FIRST && range[1].len == SECOND_SIZE && range[2].gpa == THIRD);
	for (unsigned long gpa = FIRST; gpa < THIRD + THIRD_SIZE; gpa += gpa < SECOND ? 2 * MIB : PAGE)
		if (gpa < FIRST + FIRST_SIZE || gpa >= SECOND)
			CHECK_EQUAL(number_read(fd, gpa), shared_content(gpa));
	/* From a window into one of another slot. */
	CHECK_EQUAL(pread(fd, two, 2 * PAGE, THIRD - PAGE), 2 * PAGE);
	CHECK_EQUAL(two[0], shared_content(THIRD - PAGE));
	CHECK_EQUAL(two[PAGE / 8], shared_content(THIRD));
	CHECK_REFUSED(pread(fd, two, 8, FIRST + FIRST_SIZE), ENXIO);
	CHECK_EQUAL(lseek(fd, FIRST, SEEK_HOLE), FIRST + FIRST_SIZE);
	CHECK_EQUAL(lseek(fd, FIRST + FIRST_SIZE, SEEK_DATA), SECOND);
	CHECK_EQUAL(lseek(fd, 0, SEEK_END), THIRD + THIRD_SIZE);
}

static void mapped(int fd)
{
	unsigned long number = 4711;
	char *p = mmap(NULL, SPAN, PROT_READ | PROT_WRITE, MAP_SHARED, fd, FIRST);

	CHECK(p != MAP_FAILED);
	CHECK_EQUAL(number_at(p), shared_content(FIRST));
	CHECK_EQUAL(number_at(p + SECOND - FIRST), shared_content(SECOND));
	CHECK_EQUAL(number_at(p + THIRD - FIRST), shared_content(THIRD));
	CHECK(stats_of(fd).faults_2m > 0);
	CHECK_EQUAL(cached_how("A.1"), 'b');
	CHECK_EQUAL(signal_of_read(p + FIRST_SIZE), SIGBUS);
	/* What the target writes is seen, and it sees what is written. */
	*shared(FIRST_AT + PAGE) = 42;
	CHECK_EQUAL(number_at(p + PAGE), 42);
	CHECK_EQUAL(pwrite(fd, &number, 8, FIRST + PAGE), 8);
	CHECK_EQUAL(*shared(FIRST_AT + PAGE), 4711);
	*(volatile unsigned long *)(p + PAGE) = shared_content(FIRST + PAGE);
	CHECK_EQUAL(*shared(FIRST_AT + PAGE), shared_content(FIRST + PAGE));
	/* The host has made this window read-only, even where the page says otherwise. */
	CHECK_EQUAL(pwrite(fd, &number, 8, SECOND), 8);
	*(volatile unsigned long *)(p + SECOND - FIRST) = 4711;
	CHECK_EQUAL(*shared(SECOND_AT), shared_content(SECOND));
	munmap(p, SPAN);
}

static void attached_once(void)
{
	int fd = device(), other = device();
	char *p;

	CHECK_REFUSED(attach(fd, 1, 0), ENOENT);
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	CHECK_EQUAL(counter("views"), 1);
	CHECK_REFUSED(attach(fd, 0, 0), EISCONN);
	CHECK_REFUSED(attach(other, 0, 0), ENOENT);
	shown(fd);
	mapped(fd);
	/* Own memory that is the target's: read from one window into another. */
	p = mmap(NULL, FIRST_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, FIRST);
	CHECK_EQUAL(pread(fd, p + 4 * MIB, PAGE, THIRD), PAGE);
	CHECK_EQUAL(*shared(FIRST_AT + 4 * MIB), shared_content(THIRD));
	*shared(FIRST_AT + 4 * MIB) = FIRST_AT + 4 * MIB;
	munmap(p, FIRST_SIZE);
	close(fd);
	/* The token was used, and the host follows no more: the driver itself does. */
	CHECK_EQUAL(counter("views"), 0);
	CHECK_REFUSED(attach(other, 0, 0), ENOENT);
	plug_sets_state(HEAD_A, KVMMEM_STATE_GONE);
	CHECK(plug_is_seen(HEAD_A));
	CHECK(!is_mapped("A.1"));
	close(other);
}

static void changed(void)
{
	const struct kvmmem_window_range moved[] = { { FIRST, 2 * MIB, FIRST_AT + PAGE, 1, 0 } };
	int fd;
	char *p;

	plug_shows_usual(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = attached(0, 0);
	p = mmap(NULL, SPAN, PROT_READ, MAP_SHARED, fd, FIRST);
	CHECK_EQUAL(number_at(p), shared_content(FIRST));
	CHECK_EQUAL(number_at(p + SECOND - FIRST), shared_content(SECOND));
	plug_shows(HEAD_A, RO, moved, 1);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(polled(fd, LONG), POLLPRI);
	CHECK_EQUAL(number_at(p), FIRST_AT + PAGE);
	CHECK_EQUAL(signal_of_read(p + SECOND - FIRST), SIGBUS);
	CHECK_REFUSED(pwrite(fd, &fd, 4, FIRST), EACCES);
	/* A reset of the target: nothing but the generation. */
	plug_shows(HEAD_A, RO, moved, 1);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(number_read(fd, FIRST), FIRST_AT + PAGE);
	CHECK_EQUAL(stats_of(fd).events, 2);
	munmap(p, SPAN);
	close(fd);
}

static void ended(unsigned int state, int error)
{
	char *p, byte;
	int fd;

	plug_shows_usual(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = attached(0, 0);
	p = mmap(NULL, SPAN, PROT_READ, MAP_SHARED, fd, FIRST);
	CHECK_EQUAL(number_at(p), shared_content(FIRST));
	CHECK(is_mapped("A.1"));
	plug_sets_state(HEAD_A, state);
	CHECK(plug_is_seen(HEAD_A));
	/* Nothing is left when the host is told, though the file is open. */
	CHECK(!is_mapped("A.1") && !is_mapped("A.2") && !is_mapped("B.1"));
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_REFUSED(pread(fd, &byte, 1, FIRST), error);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI | POLLHUP);
	CHECK_EQUAL(ranges_of(fd).state, state);
	plug_sets_state(HEAD_A, KVMMEM_STATE_GONE);
	CHECK(plug_is_seen(HEAD_A));
	munmap(p, SPAN);
	close(fd);

	/* Before a file has it. */
	plug_shows_usual(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	plug_sets_state(HEAD_A, state);
	CHECK(plug_is_seen(HEAD_A));
	fd = device();
	CHECK_REFUSED(attach(fd, 0, 0), error);
	close(fd);
}

/* libkvmi's regions work on every kind of view. */
static void as_regions(void)
{
	struct kvm_guest_mem_map region = { .gpa = FIRST + 5 * PAGE };
	unsigned char uuid[16];
	int fd = device();
	char *p;

	plug_shows_usual(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	memset(uuid, 0x60, sizeof(uuid));
	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid), 0);
	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_MAP, &region), 0);
	CHECK(region.gpa == FIRST && region.length == FIRST_SIZE);
	p = mmap(NULL, FIRST_SIZE, PROT_READ, MAP_SHARED, fd, FIRST);
	CHECK_EQUAL(number_at(p), shared_content(FIRST));
	munmap(p, FIRST_SIZE);
	/* A region more needs a token more, and so a slot more. */
	region.gpa = SECOND;
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_MAP, &region), ENOENT);
	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_UNMAP, FIRST), 0);
	CHECK(!is_mapped("A.1"));
	close(fd);
}

void test_plug(void)
{
	plug_writes(HEAD_A, 0, 0);
	plug_writes(HEAD_B, 0, 1);
	plug_shows_usual(HEAD_A);
	plug_in_view();
	attached_once();
	changed();
	ended(KVMMEM_STATE_REVOKED, EKEYREVOKED);
	ended(KVMMEM_STATE_GONE, ESTALE);
	as_regions();
	unplug_view();
	CHECK(!is_there("A.2"));
}
