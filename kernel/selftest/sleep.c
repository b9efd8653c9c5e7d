// SPDX-License-Identifier: GPL-2.0-only
/*
 * Hibernation and suspend: not while memory of a target is in use, and nothing new meanwhile. Opening /dev/snapshot
 * begins a hibernation, or the return from one, with the same notifiers as the real thing; closing it ends that.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine.h"
#include "plug.h"

#define SNAPSHOT	"/dev/snapshot"

static void is_refused(void)
{
	CHECK_REFUSED(open(SNAPSHOT, O_RDONLY), EBUSY);
	CHECK_REFUSED(open(SNAPSHOT, O_WRONLY), EBUSY);
}

static int begin(int how)
{
	int fd = open(SNAPSHOT, how);

	CHECK(fd >= 0);
	return fd;
}

static void with_page(int fd, char *p)
{
	CHECK_EQUAL(map(fd, p), 0);
	is_refused();
	CHECK_EQUAL(unmap(fd, p), 0);
}

static void with_view(int fd)
{
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	is_refused();
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
}

static void nothing_begins(int fd, char *p, int how)
{
	struct kvm_guest_mem_map region = { .gpa = HUGE };
	int sleep = begin(how), other = device();

	CHECK_REFUSED(map(fd, p), EAGAIN);
	CHECK_REFUSED(attach(fd, 0, 0), EAGAIN);
	CHECK_EQUAL(ioctl(other, KVM_GUEST_MEM_OPEN, descriptor(0)->uuid), 0);
	CHECK_REFUSED(ioctl(other, KVM_GUEST_MEM_MAP, &region), EAGAIN);
	close(sleep);
	CHECK_EQUAL(ioctl(other, KVM_GUEST_MEM_MAP, &region), 0);
	close(other);
}

void test_sleep(void)
{
	char *p = pages(1);
	int fd = device();

	host_shows_usual(0, KVMMEM_RIGHT_READ);
	with_page(fd, p);
	with_view(fd);
	nothing_begins(fd, p, O_RDONLY);
	nothing_begins(fd, p, O_WRONLY);
	/* Awake again. */
	with_page(fd, p);
	with_view(fd);
	munmap(p, PAGE);
	close(fd);
}

/* Also where no file has the view: what is plugged in may be another's when the machine wakes up. */
void test_sleep_of_devices(void)
{
	int sleep;

	plug_writes(HEAD_A, 0, 0);
	plug_writes(HEAD_B, 0, 1);
	plug_shows_usual(HEAD_A);
	plug_in_view();
	is_refused();
	unplug_view();
	sleep = begin(O_RDONLY);
	CHECK_EQUAL(bind("10.0"), EAGAIN);
	close(sleep);
	CHECK_EQUAL(bind("10.0"), 0);
	is_refused();
	CHECK_EQUAL(unbind("10.0"), 0);
	close(begin(O_RDONLY));
}
