// SPDX-License-Identifier: GPL-2.0-only
/* libkvmi's region ioctls. */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"

#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define ZERO	5
#define OTHER	1
#define NARROW	6

static const unsigned char *uuid_of(int number)
{
	return descriptor(number)->uuid;
}

static struct kvm_guest_mem_map region;

static int map_region(int fd, int number, unsigned long gpa)
{
	region = (struct kvm_guest_mem_map){ .token.token[0] = number, .gpa = gpa };
	return ioctl(fd, KVM_GUEST_MEM_MAP, &region);
}

static int unmap_region(int fd, unsigned long gpa)
{
	return ioctl(fd, KVM_GUEST_MEM_UNMAP, gpa);
}

static void probe(void)
{
	int fd = device();

	CHECK_EQUAL(unmap_region(fd, 0), 0);
	CHECK_EQUAL(unmap_region(fd, 0), 0);
	CHECK_REFUSED(unmap_region(fd, PAGE), EINVAL);
	CHECK_REFUSED(map_region(fd, ZERO, 0), EINVAL);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_OPEN, 8), EFAULT);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_MAP, 8), EFAULT);
	close(fd);
}

static void as_libkvmi_does(void)
{
	int fd = device();
	char *low, *next;

	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), 0);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), EALREADY);
	CHECK_REFUSED(attach(fd, 0, 0), EISCONN);
	CHECK_REFUSED(unmap_region(fd, 0), EINVAL);
	/* The region around an address. */
	CHECK_EQUAL(map_region(fd, ZERO, 0x1234), 0);
	CHECK_EQUAL(region.gpa, 0);
	CHECK_EQUAL(region.length, LOW_SIZE);
	CHECK_EQUAL(counter("views"), 1);
	CHECK_REFUSED(map_region(fd, ZERO, 0x8000), EALREADY);
	low = mmap(NULL, LOW_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(low != MAP_FAILED);
	CHECK_EQUAL(*(unsigned long *)(low + PAGE), LOW_AT + PAGE);
	/* Not yet mapped: no memory of it. */
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, HUGE) == MAP_FAILED && errno == EINVAL);
	CHECK_EQUAL(map_region(fd, ZERO, HUGE + 5 * PAGE), 0);
	CHECK_EQUAL(region.gpa, HUGE);
	CHECK_EQUAL(region.length, HUGE_SIZE);
	CHECK_EQUAL(counter("views"), 1);
	next = mmap(NULL, region.length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, region.gpa);
	CHECK_EQUAL(*(unsigned long *)next, content(HUGE));
	CHECK_REFUSED(map_region(fd, ZERO, LOW_SIZE), ENXIO);

	CHECK_REFUSED(unmap_region(fd, PAGE), EINVAL);
	munmap(low, PAGE);
	CHECK_EQUAL(unmap_region(fd, 0), 0);
	CHECK_REFUSED(unmap_region(fd, 0), EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EINVAL);
	/* Memory that is left keeps the region, as it keeps a closed file. */
	CHECK_EQUAL(*(unsigned long *)(low + PAGE), LOW_AT + PAGE);
	munmap(low + PAGE, LOW_SIZE - PAGE);
	CHECK_EQUAL(*(unsigned long *)next, content(HUGE));
	CHECK_EQUAL(map_region(fd, ZERO, 0), 0);
	CHECK_EQUAL(unmap_region(fd, 0), 0);
	CHECK_EQUAL(counter("views"), 1);
	/* With the last region goes the view, also for memory that is left; the next one begins anew. */
	CHECK_EQUAL(unmap_region(fd, HUGE), 0);
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(signal_of_read(next), SIGBUS);
	CHECK_EQUAL(map_region(fd, ZERO, HUGE), 0);
	CHECK_EQUAL(counter("views"), 1);
	CHECK_EQUAL(signal_of_read(next), SIGBUS);
	munmap(next, HUGE_SIZE);
	close(fd);
	CHECK_EQUAL(counter("views"), 0);
}

static void wrong_tokens(void)
{
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), 0);
	CHECK_REFUSED(map_region(fd, OTHER, HUGE), ENOENT);
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(map_region(fd, ZERO, 0), 0);
	CHECK_REFUSED(map_region(fd, OTHER, HUGE), ENOENT);
	/* This target's, but for less. */
	CHECK_REFUSED(map_region(fd, NARROW, HUGE), ENXIO);
	host_answers(-2);
	CHECK_REFUSED(map_region(fd, ZERO, HUGE), ENOENT);
	host_answers(0);
	CHECK_EQUAL(counter("views"), 1);
	close(fd);
}

static void revoked_region(void)
{
	int fd = device();
	char *p;

	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), 0);
	CHECK_EQUAL(map_region(fd, ZERO, 0), 0);
	p = mmap(NULL, LOW_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	host_sets_state(ZERO, KVMMEM_STATE_REVOKED);
	CHECK_REFUSED(map_region(fd, ZERO, HUGE), EKEYREVOKED);
	CHECK(WITHIN(signal_of_read(p) == SIGBUS));
	munmap(p, LOW_SIZE);
	CHECK_EQUAL(unmap_region(fd, 0), 0);
	close(fd);
}

/* A process without the device's memory does not hinder others. */
static void forked_child(void)
{
	int fd = device(), go[2], status;
	pid_t child;
	char *p;

	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), 0);
	CHECK_EQUAL(map_region(fd, ZERO, 0), 0);
	p = mmap(NULL, LOW_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK_EQUAL(*(unsigned long *)(p + PAGE), LOW_AT + PAGE);
	CHECK_EQUAL(pipe(go), 0);
	child = fork();
	if (!child) {
		char byte;

		close(go[1]);
		(void)!read(go[0], &byte, 1);
		_exit(signal_of_read(p));
	}
	munmap(p, LOW_SIZE);
	CHECK_EQUAL(unmap_region(fd, 0), 0);
	CHECK_EQUAL(map_region(fd, ZERO, 0), 0);
	CHECK_EQUAL(unmap_region(fd, 0), 0);
	close(go[0]);
	close(go[1]);
	waitpid(child, &status, 0);
	CHECK_EQUAL(WEXITSTATUS(status), SIGSEGV);
	close(fd);
}

/* A MAP whose answer does not reach the tool leaves nothing mapped. */
static void answer_lost(void)
{
	struct kvm_guest_mem_map *argument = (void *)pages(1);
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), 0);
	argument->token.token[0] = ZERO;
	CHECK_EQUAL(mprotect(argument, PAGE, PROT_READ), 0);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_MAP, argument), EFAULT);
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(map_region(fd, ZERO, 0), 0);
	munmap(argument, PAGE);
	close(fd);
}

/* v1 goes on beside v2. */
static void first_version(void)
{
	int fd = device();
	char *page = pages(1);

	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), 0);
	CHECK_EQUAL(map(fd, page), 0);
	CHECK_EQUAL(unmap(fd, page), 0);
	munmap(page, PAGE);
	close(fd);
}

void test_regions(void)
{
	const struct kvmmem_window_range ranges[] = {
		{ 0, LOW_SIZE, LOW_AT, 0, 0 }, { HUGE, HUGE_SIZE, HUGE_AT, 0, 0 },
	};

	host_shows(ZERO, RW, ranges, 2);
	host_shows(NARROW, RW, ranges, 1);
	memcpy(descriptor(NARROW)->uuid, uuid_of(ZERO), 16);
	host_shows_usual(OTHER, RW);
	probe();
	as_libkvmi_does();
	wrong_tokens();
	forked_child();
	answer_lost();
	revoked_region();
	first_version();
}

/* In a module that was told not to offer them. */
void test_no_regions(void)
{
	struct kvmmem_info info;
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVMMEM_INFO, &info), 0);
	CHECK_EQUAL(info.features & KVMMEM_FEAT_REGIONS, 0);
	CHECK_EQUAL(info.features & KVMMEM_FEAT_VIEWS, KVMMEM_FEAT_VIEWS);
	CHECK_REFUSED(unmap_region(fd, 0), ENOTTY);
	CHECK_REFUSED(map_region(fd, ZERO, 0), ENOTTY);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid_of(ZERO)), ENOTTY);
	close(fd);
}
