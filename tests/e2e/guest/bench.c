// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * kvmmem-bench: times a view against the guest's own memory, with kvmmem.h and plain loads.
 *
 *   kvmmem-bench memory GPA LEN ROUNDS T0 T1 T2 T3     loads and first touches in LEN bytes, a multiple of 2 MiB
 *   kvmmem-bench attach GPA LEN ROUNDS T0 T1 T2 T3     ATTACH and DETACH, LEN bytes touched in between
 *   kvmmem-bench exits GPA LEN ROUNDS T0 T1 T2 T3      ROUNDS operations of each kind, for the host to count
 *
 * Prints one JSON object a line: {"name": ..., "nanos": [...]}. What is compared is taken in turns, so that a
 * disturbance meets both.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "kvmmem.h"

#define PAGE 4096UL
#define LARGE_PAGE (2UL << 20)
#define MOST 1000
#define LOADS 100000
#define OPENS 1000
#define AREAS 10000

static struct kvmmem_attach request;
static uint64_t sink;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000000000ULL + time.tv_nsec;
}

static void say(const char *name, const uint64_t *nanos, int count)
{
	printf("{\"name\":\"%s\",\"nanos\":[", name);
	for (int i = 0; i < count; i++)
		printf("%s%llu", i ? "," : "", (unsigned long long)nanos[i]);
	printf("]}\n");
	fflush(stdout);
}

static int attach(void)
{
	int fd = open("/dev/kvmmem", O_RDWR | O_CLOEXEC);

	if (fd < 0)
		fail("open");
	if (ioctl(fd, KVMMEM_ATTACH, &request) < 0)
		fail("attach");
	return fd;
}

static char *map(int fd, uint64_t offset, uint64_t length, int protection)
{
	char *at = mmap(NULL, length, protection, MAP_SHARED, fd, offset);

	if (at == MAP_FAILED)
		fail("mmap");
	return at;
}

static uint64_t sequential(const char *at, uint64_t length)
{
	const uint64_t *words = (const uint64_t *)at;
	uint64_t start = now(), sum = 0;

	for (uint64_t i = 0; i < length / 8; i++)
		sum += words[i];
	sink += sum;
	return now() - start;
}

static uint64_t scattered(const char *at, uint64_t length)
{
	const volatile uint64_t *words = (const volatile uint64_t *)at;
	uint64_t state = 88172645463325252ULL, sum = 0, start = now();

	for (int i = 0; i < LOADS; i++) {
		state ^= state << 13;
		state ^= state >> 7;
		state ^= state << 17;
		sum += words[state % (length / 8)];
	}
	sink += sum;
	return now() - start;
}

/* One access to each page of this size; what it costs is the faults. */
static uint64_t touch(char *at, uint64_t length, uint64_t size, int store)
{
	uint64_t start = now(), sum = 0;

	for (uint64_t i = 0; i < length; i += size) {
		if (store)
			*(volatile char *)(at + i) = 1;
		else
			sum += *(const volatile char *)(at + i);
	}
	sink += sum;
	return now() - start;
}

static uint64_t opening(const char *path)
{
	uint64_t start = now();

	for (int i = 0; i < OPENS; i++) {
		int fd = open(path, O_RDWR | O_CLOEXEC);

		if (fd < 0)
			fail(path);
		close(fd);
	}
	return now() - start;
}

/* Opening and closing, by a process with many areas of memory. */
static void openings(int rounds)
{
	static uint64_t null[MOST], device[MOST];
	char *areas = mmap(NULL, AREAS * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (areas == MAP_FAILED)
		fail("areas");
	for (int i = 0; i < AREAS; i += 2)
		if (mprotect(areas + i * PAGE, PAGE, PROT_NONE) < 0)
			fail("areas");
	for (int i = 0; i < rounds; i++) {
		null[i] = opening("/dev/null");
		device[i] = opening("/dev/kvmmem");
	}
	munmap(areas, AREAS * PAGE);
	say("open, null", null, rounds);
	say("open, device", device, rounds);
}

static void memory(uint64_t gpa, uint64_t length, int rounds)
{
	static uint64_t own_seq[MOST], view_seq[MOST], own_any[MOST], view_any[MOST];
	static uint64_t minor[MOST], small[MOST], large[MOST];
	int fd = attach(), file = memfd_create("own", 0);
	char *view = map(fd, gpa, length, PROT_READ);
	char *own = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (own == MAP_FAILED || file < 0 || ftruncate(file, length) < 0)
		fail("own memory");
	memset(own, 1, length);
	/* So that the host has all pages of both in place. */
	sequential(own, length);
	sequential(view, length);
	for (int i = 0; i < rounds; i++) {
		own_seq[i] = sequential(own, length);
		view_seq[i] = sequential(view, length);
		own_any[i] = scattered(own, length);
		view_any[i] = scattered(view, length);
	}
	munmap(own, length);
	touch(map(file, 0, length, PROT_READ | PROT_WRITE), length, PAGE, 1);
	for (int i = 0; i < rounds; i++) {
		/* Stores, which Linux maps page by page: loads it maps sixteen at a time. */
		char *shared = map(file, 0, length, PROT_READ | PROT_WRITE);

		minor[i] = touch(shared, length, PAGE, 1) / (length / PAGE);
		munmap(shared, length);
		view = map(fd, gpa, length, PROT_READ);
		if (madvise(view, length, MADV_NOHUGEPAGE) < 0)
			fail("madvise");
		small[i] = touch(view, length, PAGE, 0) / (length / PAGE);
		munmap(view, length);
		view = map(fd, gpa, length, PROT_READ);
		large[i] = touch(view, length, LARGE_PAGE, 0) / (length / PAGE);
		munmap(view, length);
	}
	say("sequential, own", own_seq, rounds);
	say("sequential, view", view_seq, rounds);
	say("scattered, own", own_any, rounds);
	say("scattered, view", view_any, rounds);
	say("minor fault", minor, rounds);
	say("first touch, 4 KiB", small, rounds);
	say("first touch, 2 MiB", large, rounds);
	close(fd);
	openings(rounds);
}

static void attaching(uint64_t gpa, uint64_t length, int rounds)
{
	static uint64_t attached[MOST], detached[MOST];

	for (int i = 0; i < rounds; i++) {
		int fd = open("/dev/kvmmem", O_RDWR | O_CLOEXEC);
		uint64_t start = now();

		if (fd < 0 || ioctl(fd, KVMMEM_ATTACH, &request) < 0)
			fail("attach");
		attached[i] = now() - start;
		if (length)
			touch(map(fd, gpa, length, PROT_READ), length, PAGE, 0);
		start = now();
		if (ioctl(fd, KVMMEM_DETACH) < 0)
			fail("detach");
		detached[i] = now() - start;
		close(fd);
	}
	say("attach", attached, rounds);
	say("detach", detached, rounds);
}

/* Says what comes next and how often, and waits for a line: the host counts from there to the next one. */
static void phase(const char *name, uint64_t count)
{
	printf("{\"phase\":\"%s\",\"operations\":%llu}\n", name, (unsigned long long)count);
	fflush(stdout);
	if (fgetc(stdin) != '\n')
		fail("no answer");
}

static void exits(uint64_t gpa, uint64_t length, int rounds)
{
	static int views[MOST];
	struct kvmi_mem_map page = { .token = request.token, .gpa = gpa };
	char *own = mmap(NULL, rounds * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	int fd = open("/dev/kvmmem", O_RDWR | O_CLOEXEC);
	struct pollfd poller = { .events = POLLPRI };
	char *view;

	if (own == MAP_FAILED || fd < 0)
		fail("own memory");
	memset(own, 1, rounds * PAGE);
	phase("nothing", 1);
	phase("v1: map", rounds);
	for (int i = 0; i < rounds; i++) {
		page.gva = (uintptr_t)(own + i * PAGE);
		if (ioctl(fd, KVM_INTRO_MEM_MAP, &page) < 0)
			fail("map");
	}
	phase("v1: first touch", rounds);
	touch(own, rounds * PAGE, PAGE, 0);
	phase("v1: touch again", rounds);
	touch(own, rounds * PAGE, PAGE, 0);
	phase("v1: unmap", rounds);
	for (int i = 0; i < rounds; i++) {
		if (ioctl(fd, KVM_INTRO_MEM_UNMAP, (uintptr_t)(own + i * PAGE)) < 0)
			fail("unmap");
	}
	close(fd);
	phase("view: attach", rounds);
	for (int i = 0; i < rounds; i++)
		views[i] = attach();
	view = map(views[0], gpa, length, PROT_READ);
	if (madvise(view, length, MADV_NOHUGEPAGE) < 0)
		fail("madvise");
	phase("view: first touch, by 4 KiB", length / PAGE);
	touch(view, length, PAGE, 0);
	phase("view: touch again, by 4 KiB", length / PAGE);
	touch(view, length, PAGE, 0);
	munmap(view, length);
	view = map(views[1], gpa, length, PROT_READ);
	phase("view: first touch, by 2 MiB", length / LARGE_PAGE);
	touch(view, length, LARGE_PAGE, 0);
	munmap(view, length);
	phase("view: detach", rounds - 1);
	for (int i = 1; i < rounds; i++)
		close(views[i]);
	poller.fd = views[0];
	phase("view: revoke", 1);
	do {
		if (poll(&poller, 1, 60000) <= 0)
			fail("poll");
	} while (!(poller.revents & POLLHUP));
	phase("", 0);
}

int main(int argc, char **argv)
{
	uint64_t words[3];
	int rounds;

	if (argc != 9) {
		fprintf(stderr, "usage: %s memory|attach|exits GPA LEN ROUNDS T0 T1 T2 T3\n", argv[0]);
		return 2;
	}
	for (int i = 0; i < 3; i++)
		words[i] = strtoull(argv[2 + i], NULL, 0);
	for (int i = 0; i < 4; i++)
		request.token.token[i] = strtoull(argv[5 + i], NULL, 0);
	rounds = words[2] < MOST ? words[2] : MOST;
	if (!strcmp(argv[1], "memory"))
		memory(words[0], words[1], rounds);
	else if (!strcmp(argv[1], "exits"))
		exits(words[0], words[1], rounds);
	else
		attaching(words[0], words[1], rounds);
	return sink == 1;
}
