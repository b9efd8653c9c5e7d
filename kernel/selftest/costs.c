// SPDX-License-Identifier: GPL-2.0-only
/*
 * What the paths that tools use most cost, in guest instructions: COSTS=1 run.sh KERNEL MODULE. With -icount, the
 * time stamp counter of QEMU's emulation counts instructions, so that the figures hold on any machine.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
#include <x86intrin.h>

#include "host.h"

#define ROUNDS	5
#define OPENS	1000
#define AREAS	10000

static unsigned long opening(const char *path)
{
	unsigned long start = __rdtsc();

	for (int i = 0; i < OPENS; i++)
		close(open(path, O_RDWR));
	return (__rdtsc() - start) / OPENS;
}

/* A fault for each page: stores into shared memory Linux maps page by page, loads it maps sixteen at a time. */
static unsigned long touching(char *p, int is_store)
{
	unsigned long start = __rdtsc();

	for (unsigned long at = 0; at < HUGE_SIZE; at += PAGE)
		if (is_store)
			*(volatile char *)(p + at) = 1;
		else
			(void)*(volatile char *)(p + at);
	return (__rdtsc() - start) / (HUGE_SIZE / PAGE);
}

static unsigned long least(unsigned long a, unsigned long b)
{
	return a < b ? a : b;
}

static void compare(const char *what, unsigned long cost, const char *floor, unsigned long own)
{
	printf("costs: %s %lu, %s %lu: %lu.%02lu\n", what, cost, floor, own, cost / own, cost * 100 / own % 100);
}

/* The least of some rounds, the two sides in turns: what the machine does beside is not counted. */
static void compare_opening(const char *what)
{
	unsigned long device = -1, null = -1;

	for (int i = 0; i < ROUNDS; i++) {
		device = least(device, opening("/dev/kvmmem"));
		null = least(null, opening("/dev/null"));
	}
	compare(what, device, "of /dev/null", null);
}

static void compare_touching(void)
{
	int memory = memfd_create("own", 0), fd = attached(0, 0);
	unsigned long view = -1, minor = -1;

	CHECK_EQUAL(ftruncate(memory, HUGE_SIZE), 0);
	/* The first round gives the file its pages. */
	for (int i = 0; i < ROUNDS; i++) {
		char *p = mmap(NULL, HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);

		minor = least(minor, touching(p, 1));
		munmap(p, HUGE_SIZE);
		p = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, fd, HUGE);
		madvise(p, HUGE_SIZE, MADV_NOHUGEPAGE);
		view = least(view, touching(p, 0));
		munmap(p, HUGE_SIZE);
	}
	compare("first touch by 4 KiB", view, "minor fault", minor);
	close(fd);
	close(memory);
}

void print_costs(void)
{
	char *areas;

	host_opens();
	host_shows_usual(0, KVMMEM_RIGHT_READ);
	compare_opening("open and close");
	areas = pages(AREAS);
	for (int i = 0; i < AREAS; i += 2)
		mprotect(areas + i * PAGE, PAGE, PROT_NONE);
	compare_opening("with 10,000 areas");
	munmap(areas, AREAS * PAGE);
	compare_touching();
}
