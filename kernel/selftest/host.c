// SPDX-License-Identifier: GPL-2.0-only
/* The host's side of a view, played by the test. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <string.h>
#include <sys/io.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

static char *reserved;
static int raises;
static sigjmp_buf back;

void host_opens(void)
{
	int fd = open("/dev/mem", O_RDWR);

	reserved = mmap(NULL, RESERVED_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, RESERVED);
	CHECK(reserved != MAP_FAILED);
	close(fd);
	host_fills();
}

void host_fills(void)
{
	for (unsigned long at = 0; at < WINDOW_SIZE; at += PAGE)
		*(unsigned long *)window(at) = at;
}

struct kvmmem_descriptor *descriptor(int number)
{
	return (struct kvmmem_descriptor *)(reserved + number * PAGE);
}

char *window(unsigned long offset)
{
	return reserved + (WINDOW - RESERVED) + offset;
}

void host_begins(int number)
{
	__atomic_or_fetch(&descriptor(number)->generation, 1, __ATOMIC_SEQ_CST);
}

void host_ends(int number)
{
	__atomic_add_fetch(&descriptor(number)->generation, 1, __ATOMIC_SEQ_CST);
	if (raises) {
		outb(1, TEST_IRQS + GSI);
		outb(0, TEST_IRQS + GSI);
	}
}

void host_raises(int it_does)
{
	raises = it_does;
}

void host_sets_state(int number, unsigned int state)
{
	host_begins(number);
	descriptor(number)->state = state;
	host_ends(number);
}

void host_shows(int number, unsigned int rights, const struct kvmmem_window_range *ranges, int count)
{
	struct kvmmem_descriptor *d = descriptor(number);

	host_begins(number);
	d->magic = KVMMEM_DESCRIPTOR_MAGIC;
	d->version = KVMMEM_DESCRIPTOR_VERSION;
	d->range_size = sizeof(*ranges);
	d->state = KVMMEM_STATE_OPEN;
	d->rights = rights;
	memset(d->uuid, 0x40 + number, sizeof(d->uuid));
	d->window_gpa = WINDOW;
	d->window_len = WINDOW_SIZE;
	d->range_count = count;
	memcpy(d->ranges, ranges, count * sizeof(*ranges));
	host_ends(number);
}

void host_shows_usual(int number, unsigned int rights)
{
	const struct kvmmem_window_range usual[] = {
		{ LOW, LOW_SIZE, LOW_AT, 0, 0 }, { HUGE, HUGE_SIZE, HUGE_AT, 0, 0 }, { NEXT, NEXT_SIZE, NEXT_AT, 0, 0 },
	};

	host_shows(number, rights, usual, 3);
}

unsigned long content(unsigned long gpa)
{
	return gpa >= NEXT ? gpa - NEXT + NEXT_AT : gpa >= HUGE ? gpa - HUGE + HUGE_AT : gpa - LOW + LOW_AT;
}

int attach(int fd, int number, unsigned int flags)
{
	struct kvmmem_attach argument = { .token.token[0] = number, .flags = flags };

	return ioctl(fd, KVMMEM_ATTACH, &argument);
}

int attached(int number, unsigned int flags)
{
	int fd = device();

	CHECK_EQUAL(attach(fd, number, flags), 0);
	return fd;
}

struct kvmmem_ranges ranges_of(int fd)
{
	static struct kvmmem_range room[KVMMEM_MAX_RANGES];
	struct kvmmem_ranges argument = { .capacity = KVMMEM_MAX_RANGES, .ranges = (unsigned long)room };

	CHECK_EQUAL(ioctl(fd, KVMMEM_RANGES, &argument), 0);
	return argument;
}

struct kvmmem_stats stats_of(int fd)
{
	struct kvmmem_stats stats;

	CHECK_EQUAL(ioctl(fd, KVMMEM_STATS, &stats), 0);
	return stats;
}

int polled(int fd, int milliseconds)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLPRI | (milliseconds ? 0 : POLLIN) };

	CHECK(poll(&poll_fd, 1, milliseconds) >= 0);
	return poll_fd.revents;
}

static void jump_back(int number)
{
	siglongjmp(back, number);
}

static int signal_of(volatile char *p, int is_write)
{
	struct sigaction action = { .sa_handler = jump_back }, bus, segv;
	int number;

	sigaction(SIGBUS, &action, &bus);
	sigaction(SIGSEGV, &action, &segv);
	number = sigsetjmp(back, 1);
	if (!number) {
		if (is_write)
			*p = 1;
		else
			(void)*p;
	}
	sigaction(SIGBUS, &bus, NULL);
	sigaction(SIGSEGV, &segv, NULL);
	return number;
}

int signal_of_read(const volatile char *p)
{
	return signal_of((volatile char *)p, 0);
}

int signal_of_write(volatile char *p)
{
	return signal_of(p, 1);
}
