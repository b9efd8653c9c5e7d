// SPDX-License-Identifier: GPL-2.0-only
/* Tools that attach, read and map, while the host changes its pages and devices come and go. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "plug.h"

#define TOOLS	4
#define ROUNDS	20
#define RO	KVMMEM_RIGHT_READ

static struct { int stopping, views, failures; } *common;

static int is_expected(int error)
{
	return error == ESTALE || error == EKEYREVOKED || error == ENXIO || error == EAGAIN || error == ENOTCONN;
}

/* Uses the view until it ends: nothing that it reads is another place's. */
static void use(int fd)
{
	unsigned long number, wrong = 0, unexpected = 0;
	char *p = mmap(NULL, FIRST_SIZE, PROT_READ, MAP_SHARED, fd, FIRST);

	for (unsigned long at = 0; polled(fd, 0) & POLLIN; at = (at + 64 * PAGE) % FIRST_SIZE) {
		long count = pread(fd, &number, 8, FIRST + at);

		/* Nothing is read behind the end of what is shown. */
		if (count < 0)
			unexpected += !is_expected(errno);
		else if (count)
			wrong += number % PAGE;
		if (p != MAP_FAILED)
			signal_of_read(p + at);
		ranges_of(fd);
	}
	CHECK_EQUAL(wrong, 0);
	CHECK_EQUAL(unexpected, 0);
	if (p != MAP_FAILED)
		munmap(p, FIRST_SIZE);
}

static void tool(unsigned int seed)
{
	int fd = device();

	while (!__atomic_load_n(&common->stopping, __ATOMIC_RELAXED)) {
		if (attach(fd, 0, 0)) {
			CHECK(errno == ENOENT || is_expected(errno) || errno == EIO);
			usleep(100);
			continue;
		}
		__atomic_add_fetch(&common->views, 1, __ATOMIC_RELAXED);
		switch (rand_r(&seed) % 3) {
		case 0:
			break;
		case 1:
			ioctl(fd, KVMMEM_DETACH, 0);
			continue;
		default:
			use(fd);
		}
		close(fd);
		fd = device();
	}
	close(fd);
}

static void run_tool(unsigned int seed)
{
	failures = 0;
	tool(seed);
	__atomic_add_fetch(&common->failures, failures, __ATOMIC_RELAXED);
	_exit(0);
}

static void change(unsigned int what)
{
	const struct kvmmem_window_range moved = { FIRST, FIRST_SIZE / 2, FIRST_AT + 7 * PAGE, 1, 0 };
	static const char *const functions[] = { "A.0", "A.1", "A.2", "B.0", "B.1" };

	switch (what % 4) {
	case 0:
		plug_sets_state(HEAD_A, KVMMEM_STATE_REVOKED);
		plug_shows_usual(HEAD_A);
		break;
	case 1:
		plug_shows(HEAD_A, RO, &moved, 1);
		break;
	case 2:
		plug_shows_usual(HEAD_A);
		break;
	default:
		/* It may have been unbound already. */
		unbind(functions[what / 4 % 5]);
		CHECK(!is_mapped(functions[what / 4 % 5]));
	}
}

void test_plug_storm(void)
{
	unsigned int seed = 1;

	common = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	plug_writes(HEAD_A, 0, 0);
	plug_shows_usual(HEAD_A);
	plug_in_view();
	for (int i = 0; i < TOOLS; i++)
		if (!fork())
			run_tool(i);
	for (int i = 0; i < ROUNDS; i++) {
		for (int j = 0; j < 5; j++) {
			usleep(rand_r(&seed) % 4000);
			change(rand_r(&seed));
		}
		plug_shows_usual(HEAD_A);
		CHECK_EQUAL(rebind_all(), 0);
	}
	__atomic_store_n(&common->stopping, 1, __ATOMIC_RELAXED);
	plug_sets_state(HEAD_A, KVMMEM_STATE_GONE);
	CHECK(plug_is_seen(HEAD_A));
	while (wait(NULL) > 0)
		;
	CHECK_EQUAL(common->failures, 0);
	CHECK(common->views > ROUNDS / 4);
	CHECK_EQUAL(counter("views"), 0);
	unplug_view();
}
