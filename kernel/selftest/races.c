// SPDX-License-Identifier: GPL-2.0-only
/* Threads that map, unmap, open, close, fork and change their memory at random, with a host that refuses at times. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "selftest.h"

#define AREA_PAGES	64
#define FILES		4
#define THREADS		6
#define SECONDS		2
#define KILLS		4

static char *area;
static int files[FILES];
static int stopping;

static void one_step(unsigned int *seed)
{
	int *file = &files[rand_r(seed) % FILES];
	int fd = __atomic_load_n(file, __ATOMIC_RELAXED);
	char *page = area + rand_r(seed) % AREA_PAGES * PAGE;
	int dice = rand_r(seed) % 1024;

	if (dice < 400) {
		map(fd, page);
	} else if (dice < 800) {
		unmap(fd, page);
	} else if (dice < 900) {
		madvise(page, PAGE, MADV_DONTNEED);
		*page = 1;
	} else if (dice < 1000) {
		mmap(page, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	} else if (dice < 1010) {
		close(__atomic_exchange_n(file, open("/dev/kvmmem", O_RDWR), __ATOMIC_RELAXED));
	} else if (dice < 1020) {
		host_answers(-KVM_EPERM);
		usleep(rand_r(seed) % 2000);
		host_answers(0);
	} else {
		pid_t child = fork();

		if (!child) {
			unmap(fd, page);
			_exit(0);
		}
		waitpid(child, NULL, 0);
	}
}

static void *racer(void *number)
{
	unsigned int seed = (unsigned long)number * 7919 + 1;

	while (!__atomic_load_n(&stopping, __ATOMIC_RELAXED))
		one_step(&seed);
	return NULL;
}

static void start(pthread_t threads[THREADS])
{
	area = pages(AREA_PAGES);
	for (int i = 0; i < FILES; i++)
		files[i] = device();
	for (unsigned long i = 0; i < THREADS; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, racer, (void *)i), 0);
}

static void race_to_the_end(void)
{
	pthread_t threads[THREADS];

	start(threads);
	sleep(SECONDS);
	__atomic_store_n(&stopping, 1, __ATOMIC_RELAXED);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	host_answers(0);
	/* Through one file, whichever mapped it: nothing may stay behind. */
	for (int i = 0; i < AREA_PAGES; i++)
		unmap(files[0], area + i * PAGE);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(charged(), 0);
}

static void race_and_kill(void)
{
	pid_t tool = fork();

	if (!tool) {
		pthread_t threads[THREADS];

		start(threads);
		pause();
	}
	usleep(SECONDS * 500000);
	kill(tool, SIGKILL);
	waitpid(tool, NULL, 0);
	host_answers(0);
}

void test_races(void)
{
	in_child(race_to_the_end);
	for (int i = 0; i < KILLS; i++)
		race_and_kill();
	CHECK(counter("total") > 0);
	/* What they had forked last may outlive them a little. */
	CHECK(WITHIN(!counter("mapped")));
	/* Every page is back, but for those that the host refused to a dying process. */
	CHECK(WITHIN(pinned() == counter("quarantined")));
}
