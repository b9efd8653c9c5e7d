// SPDX-License-Identifier: GPL-2.0-only
/* Mapping a view: which pages, of which size and type, with which rights. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

#define RO	KVMMEM_RIGHT_READ
#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)

static char *map_view(int fd, int protection, unsigned long gpa, unsigned long size)
{
	char *p = mmap(NULL, size, protection, MAP_SHARED, fd, gpa);

	CHECK(p != MAP_FAILED);
	return p;
}

static unsigned long number_at(const char *p)
{
	return *(const volatile unsigned long *)p;
}

static void small_pages(void)
{
	int fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ | PROT_WRITE, 0, MIB);
	struct kvmmem_stats stats;

	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_EQUAL(signal_of_read(p + LOW + LOW_SIZE), SIGBUS);
	CHECK_EQUAL(signal_of_write(p + MIB - 1), SIGBUS);
	CHECK_EQUAL(number_at(p + LOW), LOW_AT);
	CHECK_EQUAL(number_at(p + LOW + LOW_SIZE - PAGE), LOW_AT + LOW_SIZE - PAGE);
	p[LOW + 100] = 42;
	CHECK_EQUAL(*window(LOW_AT + 100), 42);
	*window(LOW_AT + 101) = 43;
	CHECK_EQUAL(p[LOW + 101], 43);
	stats = stats_of(fd);
	CHECK_EQUAL(stats.faults_4k, 2);
	CHECK_EQUAL(stats.faults_2m, 0);
	CHECK_EQUAL(stats.faults_refused, 3);
	munmap(p, MIB);
	close(fd);
}

static void huge_pages(void)
{
	int fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ, HUGE, HUGE_SIZE + NEXT_SIZE);
	struct kvmmem_stats stats;

	CHECK_EQUAL((unsigned long)p % (2 * MIB), 0);
	for (unsigned long at = 0; at < HUGE_SIZE + NEXT_SIZE; at += PAGE)
		CHECK_EQUAL(number_at(p + at), content(HUGE + at));
	stats = stats_of(fd);
	CHECK_EQUAL(stats.faults_2m, HUGE_SIZE / (2 * MIB));
	CHECK_EQUAL(stats.faults_4k, NEXT_SIZE / PAGE);
	/* A part of a huge page goes: the rest comes back by faults. */
	munmap(p + PAGE, PAGE);
	CHECK_EQUAL(number_at(p), content(HUGE));
	CHECK_EQUAL(number_at(p + 2 * PAGE), content(HUGE + 2 * PAGE));
	CHECK_EQUAL(signal_of_read(p + PAGE), SIGSEGV);
	munmap(p, HUGE_SIZE + NEXT_SIZE);

	/* Not where the mapping does not reach around the page. */
	p = map_view(fd, PROT_READ, HUGE + PAGE, 2 * MIB);
	stats = stats_of(fd);
	CHECK_EQUAL(number_at(p), content(HUGE + PAGE));
	CHECK_EQUAL(stats_of(fd).faults_2m, stats.faults_2m);
	CHECK_EQUAL(stats_of(fd).faults_4k, stats.faults_4k + 1);
	munmap(p, 2 * MIB);
	close(fd);
}

/* 1 GiB of nothing: no device answers there, but the page tables are filled all the same. */
static void largest_pages(void)
{
	const struct kvmmem_window_range range = { GIB, GIB, 0, 0, 0 };
	struct kvmmem_info info;
	int fd;
	char *p;

	host_shows(2, RO, &range, 1);
	host_begins(2);
	descriptor(2)->window_gpa = NOWHERE;
	descriptor(2)->window_len = GIB;
	host_ends(2);
	fd = attached(2, 0);
	CHECK_EQUAL(ioctl(fd, KVMMEM_INFO, &info), 0);
	CHECK_EQUAL(info.features & KVMMEM_FEAT_HUGE_1G, KVMMEM_FEAT_HUGE_1G);
	p = map_view(fd, PROT_READ, GIB, GIB);
	CHECK_EQUAL((unsigned long)p % GIB, 0);
	CHECK_EQUAL(signal_of_read(p + GIB / 2), 0);
	CHECK_EQUAL(stats_of(fd).faults_1g, 1);
	CHECK_EQUAL(stats_of(fd).faults_2m, 0);
	munmap(p, GIB);
	close(fd);
}

static int is_write_back(unsigned long start, unsigned long end)
{
	char line[128], wanted[128];
	FILE *list = fopen("/sys/kernel/debug/x86/pat_memtype_list", "r");
	int found = 0;

	snprintf(wanted, sizeof(wanted), "PAT: [mem 0x%016lx-0x%016lx] write-back\n", start, end);
	CHECK(list != NULL);
	while (list && fgets(line, sizeof(line), list))
		found += !strcmp(line, wanted);
	if (list)
		fclose(list);
	return found;
}

static void cached(void)
{
	int fd;

	CHECK_EQUAL(is_write_back(WINDOW + HUGE_AT, WINDOW + HUGE_AT + HUGE_SIZE), 0);
	CHECK_EQUAL(is_write_back(RESERVED, RESERVED + PAGE), 0);
	fd = attached(0, 0);
	CHECK_EQUAL(is_write_back(WINDOW + HUGE_AT, WINDOW + HUGE_AT + HUGE_SIZE), 1);
	CHECK_EQUAL(is_write_back(WINDOW + LOW_AT, WINDOW + LOW_AT + LOW_SIZE), 1);
	CHECK_EQUAL(is_write_back(RESERVED, RESERVED + PAGE), 1);
	close(fd);
	CHECK(WITHIN(!is_write_back(WINDOW + HUGE_AT, WINDOW + HUGE_AT + HUGE_SIZE)));
	CHECK(WITHIN(!is_write_back(RESERVED, RESERVED + PAGE)));
}

/* How many of the kernel's own mappings show the reserved memory. */
static int mapped_by_kernel(void)
{
	char line[512], *at;
	FILE *list = fopen("/proc/vmallocinfo", "r");
	int found = 0;

	CHECK(list != NULL);
	while (list && fgets(line, sizeof(line), list)) {
		at = strstr(line, " phys=");
		if (at && strtoul(at + 6, NULL, 16) - RESERVED < RESERVED_SIZE)
			found++;
	}
	if (list)
		fclose(list);
	return found;
}

void test_nothing_left(void)
{
	int fd;

	host_shows_usual(0, RW);
	CHECK(WITHIN(mapped_by_kernel() == 0));
	fd = attached(0, 0);
	/* The descriptor and three ranges. */
	CHECK(WITHIN(mapped_by_kernel() == 4));
	host_shows_usual(0, RO);
	ranges_of(fd);
	CHECK(WITHIN(mapped_by_kernel() == 4));
	host_sets_state(0, KVMMEM_STATE_REVOKED);
	ranges_of(fd);
	CHECK(WITHIN(mapped_by_kernel() == 1));
	close(fd);
	CHECK(WITHIN(mapped_by_kernel() == 0));
	CHECK(WITHIN(!is_write_back(RESERVED, RESERVED + PAGE)));
	CHECK(WITHIN(counter("views") == 0));
}

static void refuse(int fd, int protection, int mmap_flags, unsigned long gpa, unsigned long size, int error)
{
	errno = 0;
	CHECK(mmap(NULL, size, protection, mmap_flags, fd, gpa) == MAP_FAILED);
	CHECK_EQUAL(errno, error);
}

static void refused_mappings(int fd)
{
	refuse(fd, PROT_READ, MAP_PRIVATE, HUGE, PAGE, EINVAL);
	refuse(fd, PROT_READ, MAP_SHARED, 0, PAGE, ENXIO);
	refuse(fd, PROT_READ, MAP_SHARED, LOW + LOW_SIZE, PAGE, ENXIO);
	refuse(fd, PROT_READ, MAP_SHARED, END, PAGE, ENXIO);
	refuse(fd, PROT_READ, MAP_SHARED, 1UL << 62, PAGE, ENXIO);
	refuse(fd, PROT_READ, MAP_SHARED, -2 * PAGE, PAGE, ENXIO);
	refuse(fd, PROT_READ, MAP_SHARED, HUGE + 1, PAGE, EINVAL);
}

/* The target's memory is data. */
static void not_executable(void)
{
	int fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ, HUGE, PAGE);

	refuse(fd, PROT_READ | PROT_EXEC, MAP_SHARED, HUGE, PAGE, EACCES);
	CHECK_REFUSED(mprotect(p, PAGE, PROT_READ | PROT_EXEC), EACCES);
	munmap(p, PAGE);
	close(fd);
}

/* Address 0 is where it is asked for, and nowhere else. */
static void at_zero(void)
{
	int fd = attached(0, 0), limit = open("/proc/sys/vm/mmap_min_addr", O_WRONLY);
	void *p;

	CHECK_EQUAL(write(limit, "0", 1), 1);
	/* Below this program, which begins at 4 MiB. */
	p = mmap(NULL, 2 * MIB, PROT_READ, MAP_SHARED | MAP_FIXED, fd, HUGE + PAGE);
	CHECK(!p);
	munmap(p, 2 * MIB);
	CHECK_EQUAL(write(limit, "65536", 5), 5);
	close(limit);
	close(fd);
}

static void read_only(int fd)
{
	long before = pinned();
	char *p, byte = 1;

	refused_mappings(fd);
	refuse(fd, PROT_READ | PROT_WRITE, MAP_SHARED, HUGE, PAGE, EACCES);
	CHECK_REFUSED(pwrite(fd, &byte, 1, HUGE), EACCES);
	p = map_view(fd, PROT_READ, HUGE, 2 * MIB);
	CHECK_REFUSED(mprotect(p, PAGE, PROT_READ | PROT_WRITE), EACCES);
	CHECK_EQUAL(number_at(p), content(HUGE));
	CHECK_EQUAL(signal_of_write(p), SIGSEGV);
	CHECK_EQUAL(number_at(p), content(HUGE));
	CHECK_REFUSED((long)mremap(p, 2 * MIB, 4 * MIB, MREMAP_MAYMOVE), EFAULT);
	munmap(p, 2 * MIB);
	CHECK_EQUAL(pinned(), before);
	close(fd);
}

/* A mapping that was left when its view was detached shows nothing, of the next view neither. */
static void detached(void)
{
	int fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ | PROT_WRITE, HUGE, HUGE_SIZE), *q;

	CHECK_EQUAL(number_at(p), content(HUGE));
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_EQUAL(signal_of_write(p + 4 * MIB), SIGBUS);
	CHECK_EQUAL(attach(fd, 1, KVMMEM_ATTACH_READ_ONLY), 0);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	q = map_view(fd, PROT_READ, HUGE, HUGE_SIZE);
	CHECK_EQUAL(number_at(q), content(HUGE));
	CHECK_EQUAL(signal_of_write(p), SIGBUS);
	/* Mappings outlive the descriptor, and the view with them. */
	close(fd);
	CHECK_EQUAL(number_at(q + 4 * MIB), content(HUGE + 4 * MIB));
	CHECK_EQUAL(counter("views"), 1);
	munmap(q, HUGE_SIZE);
	munmap(p, HUGE_SIZE);
	CHECK_EQUAL(counter("views"), 0);
}

void test_memory(void)
{
	host_shows_usual(0, RW);
	host_shows_usual(1, RW);
	small_pages();
	huge_pages();
	largest_pages();
	cached();
	read_only(attached(0, KVMMEM_ATTACH_READ_ONLY));
	host_shows_usual(0, RO);
	read_only(attached(0, 0));
	host_shows_usual(0, RW);
	not_executable();
	at_zero();
	detached();
}
