// SPDX-License-Identifier: GPL-2.0-only
/* Threads that attach, map, touch, read, seek, poll, fork and detach at random, under a host that changes its mind. */
#define _GNU_SOURCE
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"

#define RW		(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define FILES		4
#define AREAS		4
#define THREADS		4
#define SECONDS		3

static int files[FILES];
static char *areas[AREAS];
static int stopping;
static __thread sigjmp_buf back;

static void jump_back(int number)
{
	siglongjmp(back, number);
}

static void touch(volatile char *p, int is_write)
{
	if (!sigsetjmp(back, 1)) {
		if (is_write)
			*p = 1;
		else
			(void)*p;
	}
}

static void one_step(unsigned int *seed)
{
	int fd = files[rand_r(seed) % FILES], dice = rand_r(seed) % 100, status;
	char **area = &areas[rand_r(seed) % AREAS];
	unsigned long gpa = HUGE + rand_r(seed) % (HUGE_SIZE / PAGE) * PAGE;
	struct pollfd poll_fd = { .fd = fd, .events = POLLPRI };
	struct kvmmem_ranges ranges = {};
	char buffer[300] = {};
	ssize_t done = 0;
	pid_t child;

	if (dice < 15) {
		attach(fd, rand_r(seed) % 3, rand_r(seed) % 2);
	} else if (dice < 20) {
		ioctl(fd, KVMMEM_DETACH, 0);
	} else if (dice < 35) {
		mmap(*area, HUGE_SIZE, PROT_READ | rand_r(seed) % 2 * PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, HUGE);
	} else if (dice < 70) {
		touch(*area + rand_r(seed) % HUGE_SIZE, rand_r(seed) % 2);
	} else if (dice < 80) {
		done = pread(fd, *area + rand_r(seed) % (HUGE_SIZE / 2), 3 * PAGE, gpa);
	} else if (dice < 85) {
		done = pwrite(fd, buffer, sizeof(buffer), gpa);
	} else if (dice < 90) {
		lseek(fd, gpa, rand_r(seed) % 5);
	} else if (dice < 95) {
		poll(&poll_fd, 1, rand_r(seed) % 3);
		ioctl(fd, KVMMEM_RANGES, &ranges);
	} else if (dice < 98) {
		munmap(*area + gpa - HUGE, PAGE);
	} else {
		child = fork();
		if (!child) {
			touch(*area + 5 * PAGE, 0);
			_exit(0);
		}
		waitpid(child, &status, 0);
	}
	if (done > (ssize_t)(3 * PAGE))
		abort();
}

static void *tool(void *number)
{
	unsigned int seed = (unsigned long)number * 7919 + 3;

	while (!__atomic_load_n(&stopping, __ATOMIC_RELAXED))
		one_step(&seed);
	return NULL;
}

static void *moody_host(void *unused)
{
	unsigned int seed = 5;

	while (!__atomic_load_n(&stopping, __ATOMIC_RELAXED)) {
		int number = rand_r(&seed) % 3, dice = rand_r(&seed) % 10;
		struct kvmmem_window_range range = { HUGE, HUGE_SIZE, HUGE_AT + rand_r(&seed) % 20 * PAGE, 0, 0 };

		if (dice < 4)
			host_shows(number, RW, &range, 1);
		else if (dice < 7)
			host_shows_usual(number, 1 + rand_r(&seed) % 2 * 2);
		else if (dice < 8)
			host_sets_state(number, 1 + rand_r(&seed) % 4);
		else if (dice < 9)
			host_answers(-(rand_r(&seed) % 2));
		usleep(rand_r(&seed) % 5000);
	}
	host_answers(0);
	return unused;
}

static void storm(void)
{
	struct sigaction action = { .sa_handler = jump_back };
	pthread_t threads[THREADS], host;

	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	for (int i = 0; i < FILES; i++)
		files[i] = device();
	for (int i = 0; i < AREAS; i++) {
		areas[i] = pages(2 * HUGE_SIZE / PAGE);
		areas[i] += -(unsigned long)areas[i] & (HUGE_SIZE - 1);
	}
	CHECK_EQUAL(pthread_create(&host, NULL, moody_host, NULL), 0);
	for (unsigned long i = 0; i < THREADS; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, tool, (void *)i), 0);
	sleep(SECONDS);
	__atomic_store_n(&stopping, 1, __ATOMIC_RELAXED);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	pthread_join(host, NULL);
	CHECK(counter("faults-2m") > 0);
	CHECK(counter("faults-4k") > 0);
	CHECK(counter("faults-refused") > 0);
	CHECK(counter("events") > 0);
}

static void storm_and_kill(void)
{
	pid_t child = fork();

	if (!child) {
		storm();
		_exit(0);
	}
	usleep(SECONDS * 300000);
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	host_answers(0);
	/* What it had forked last may outlive it a little. */
	CHECK(WITHIN(!counter("views")));
}

void test_storm(void)
{
	for (int i = 0; i < 3; i++)
		host_shows_usual(i, RW);
	in_child(storm);
	CHECK_EQUAL(counter("views"), 0);
	for (int i = 0; i < 3; i++)
		storm_and_kill();
}
