// SPDX-License-Identifier: GPL-2.0-only
/* Threads that use pages of the driver's own at once, while they are asked for, refused and given back. */
#define _GNU_SOURCE
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"

#define THREADS		4
#define PAGES		256UL
#define SECONDS		3

static int file, stopping;
static char *area;
static pthread_barrier_t start;
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

static void *toucher(void *number)
{
	char byte;

	pthread_barrier_wait(&start);
	for (unsigned long i = 0; i < PAGES; i++) {
		if ((i + (unsigned long)number) % 3)
			__atomic_add_fetch(&area[i * PAGE], 1, __ATOMIC_RELAXED);
		else
			CHECK_EQUAL(pread(file, &byte, 1, LOW + i * PAGE), 1);
	}
	return NULL;
}

/* Whoever comes first asks for the page, and nobody a second time. */
static void one_page_each(void)
{
	long total = counter("total"), sum = 0;
	pthread_t threads[THREADS];

	file = attached(0, 0);
	area = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, LOW);
	pthread_barrier_init(&start, NULL, THREADS);
	for (unsigned long i = 0; i < THREADS; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, toucher, (void *)i), 0);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	for (unsigned long i = 0; i < PAGES; i++)
		for (unsigned long thread = 0; thread < THREADS; thread++)
			sum += (i + thread) % 3 != 0;
	for (unsigned long i = 0; i < PAGES; i++)
		sum -= area[i * PAGE];
	CHECK_EQUAL(sum, 0);
	CHECK_EQUAL(counter("mapped"), PAGES);
	CHECK_EQUAL(counter("total"), total + PAGES);
	munmap(area, PAGES * PAGE);
	close(file);
	CHECK_EQUAL(counter("mapped"), 0);
}

static void one_step(unsigned int *seed)
{
	int dice = rand_r(seed) % 100;
	char *p = area + rand_r(seed) % (PAGES * PAGE);
	char bytes[300] = {};
	ssize_t done = 0;
	pid_t child;

	if (dice < 8) {
		ioctl(file, KVMMEM_DETACH, 0);
	} else if (dice < 25) {
		attach(file, 0, rand_r(seed) % 4 == 0);
	} else if (dice < 35) {
		mmap(area, PAGES * PAGE, PROT_READ | rand_r(seed) % 2 * PROT_WRITE, MAP_SHARED | MAP_FIXED, file, LOW);
	} else if (dice < 70) {
		touch(p, dice % 2);
	} else if (dice < 80) {
		done = pread(file, p, 3 * PAGE, LOW + rand_r(seed) % (PAGES * PAGE));
	} else if (dice < 90) {
		done = pwrite(file, bytes, sizeof(bytes), LOW + rand_r(seed) % (PAGES * PAGE));
	} else if (dice < 96) {
		host_answers(-(rand_r(seed) % 2 * (1 + rand_r(seed) % 14)));
		usleep(rand_r(seed) % 300);
		host_answers(0);
	} else if (dice < 98) {
		munmap(p - (unsigned long)p % PAGE, PAGE);
	} else {
		child = fork();
		if (!child) {
			touch(p, 0);
			_exit(0);
		}
		waitpid(child, NULL, 0);
	}
	(void)done;
}

static void *tool(void *number)
{
	unsigned int seed = (unsigned long)number * 7919 + 1;

	while (!__atomic_load_n(&stopping, __ATOMIC_RELAXED))
		one_step(&seed);
	return NULL;
}

static void storm(void)
{
	struct sigaction action = { .sa_handler = jump_back };
	pthread_t threads[THREADS];

	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	file = device();
	area = pages(PAGES + 4);
	for (unsigned long i = 0; i < THREADS; i++)
		CHECK_EQUAL(pthread_create(&threads[i], NULL, tool, (void *)i), 0);
	sleep(SECONDS);
	__atomic_store_n(&stopping, 1, __ATOMIC_RELAXED);
	for (int i = 0; i < THREADS; i++)
		pthread_join(threads[i], NULL);
	host_answers(0);
	close(file);
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
}

void test_own_races(void)
{
	long total;

	for (int i = 0; i < 5; i++)
		in_child(one_page_each);
	total = counter("total");
	in_child(storm);
	CHECK(counter("total") > total);
	for (int i = 0; i < 3; i++)
		storm_and_kill();
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(counter("views"), 0);
}
