// SPDX-License-Identifier: GPL-2.0-only
/* Allocations fail while a view's PCI devices are bound, used and unbound, and plugged in. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "inject.h"
#include "plug.h"

#define ROUNDS		20
#define PERCENT		30

static const char *const functions[] = { "A.0", "A.1", "A.2", "B.0", "B.1" };
static const char *function;
static int fd;

static int call_bind(void)
{
	errno = bind(function);
	/* What the kernel says where it has no memory to reserve a BAR. */
	if (errno == EBUSY)
		errno = ENOMEM;
	return errno ? -1 : 0;
}

static int call_unbind(void)
{
	errno = unbind(function);
	return errno ? -1 : 0;
}

static void undo_bind(void)
{
	CHECK_EQUAL(unbind(function), 0);
	CHECK_EQUAL(enablers(function), 0);
	CHECK(!is_mapped(function));
}

static void bind_again(void)
{
	CHECK_EQUAL(bind(function), 0);
	CHECK_EQUAL(enablers(function), 1);
}

/* Written by sysfs, so that this thread is the one that allocates. */
static void bound_and_unbound(void)
{
	for (int i = 0; i < 5; i++) {
		function = functions[i];
		each_fails("unbind", call_unbind, bind_again);
		CHECK_EQUAL(unbind(function), 0);
		CHECK(each_fails("bind", call_bind, undo_bind) > 0);
		bind_again();
	}
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
}

static int call_attach(void)
{
	return attach(fd, 0, 0);
}

/* A slot that a file had is not given to another one. */
static void attach_anew(void)
{
	close(fd);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = device();
}

static int call_refresh(void)
{
	char byte;

	plug_shows_usual(HEAD_A);
	return pread(fd, &byte, 1, FIRST) == 1 ? 0 : -1;
}

static void nothing(void)
{
}

static void attached_and_changed(void)
{
	fd = device();
	CHECK(each_fails("ATTACH of devices", call_attach, attach_anew) > 0);
	CHECK_EQUAL(call_attach(), 0);
	CHECK(each_fails("a change of devices", call_refresh, nothing) > 0);
	close(fd);
}

static void is_fine(void)
{
	unsigned long number = 1;

	plug_shows_usual(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = attached(0, 0);
	CHECK_EQUAL(pread(fd, &number, 8, FIRST), 8);
	CHECK_EQUAL(number, shared_content(FIRST));
	close(fd);
}

static int open_some_time(void)
{
	int opened;

	while ((opened = open("/dev/kvmmem", O_RDWR)) < 0)
		CHECK_EQUAL(errno, ENOMEM);
	return opened;
}

static int is_expected(int error)
{
	return error == ENOMEM || error == EAGAIN || error == ENOENT || error == ESTALE;
}

/* In the workers that look at slots and views, and in those that bind what is plugged in. */
static void in_workers(void)
{
	char byte, *p;

	for (int i = 0; i < ROUNDS; i++) {
		CHECK_EQUAL(rebind_all(), 0);
		page_of(HEAD_A)->seen_generation = 0;
		inject_in_module(PERCENT);
		plug_shows_usual(HEAD_A);
		unbind("A.1");
		bind("A.1");
		fd = open_some_time();
		if (attach(fd, 0, 0)) {
			CHECK(is_expected(errno));
		} else {
			p = mmap(NULL, FIRST_SIZE, PROT_READ, MAP_SHARED, fd, FIRST);
			plug_shows_usual(HEAD_A);
			if (pread(fd, &byte, 1, FIRST) < 0)
				CHECK(is_expected(errno));
			if (p != MAP_FAILED) {
				signal_of_read(p);
				munmap(p, FIRST_SIZE);
			}
		}
		close(fd);
		inject_in_module(0);
		is_fine();
	}
}

static void when_plugged_in(void)
{
	unplug_view();
	plug_shows_usual(HEAD_A);
	for (int i = 0; i < ROUNDS / 4; i++) {
		inject_in_module(PERCENT);
		plug_in_parts();
		inject_in_module(0);
		for (int j = 0; j < 5; j++) {
			CHECK(WITHIN(is_there(functions[j])));
			/* Where binding failed. */
			probe(functions[j]);
		}
		for (int j = 0; j < 5; j++)
			CHECK(is_bound(functions[j]));
		is_fine();
		unplug_view();
	}
	plug_in_view();
}

void test_failing_plug(void)
{
	long invalid;

	if (!can_inject())
		return;
	invalid = counter("invalid_answers");
	plug_writes(HEAD_A, 0, 0);
	plug_writes(HEAD_B, 0, 1);
	plug_shows_usual(HEAD_A);
	plug_in_view();
	bound_and_unbound();
	attached_and_changed();
	RUN(in_workers);
	RUN(when_plugged_in);
	unplug_view();
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(counter("invalid_answers"), invalid);
}
