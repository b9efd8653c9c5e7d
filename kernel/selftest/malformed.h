/* SPDX-License-Identifier: GPL-2.0-only */
/* Descriptors that cannot be, whichever way they come. */
#ifndef MALFORMED_H
#define MALFORMED_H

#include <poll.h>
#include <signal.h>
#include <stddef.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define RAM	0x1000000UL

#define FIELD(name)	offsetof(struct kvmmem_descriptor, name), sizeof(((struct kvmmem_descriptor *)0)->name)
#define MALFORMED(name, value)	{ FIELD(name), value },
#define COUNT(array)	((int)(sizeof(array) / sizeof(*(array))))

struct malformed { unsigned int at, size; unsigned long value; };

static inline void spoil(struct kvmmem_descriptor *descriptor, const struct malformed *how)
{
	memcpy((char *)descriptor + how->at, &how->value, how->size);
}

/* A view that is open ends when its page is spoilt. */
static inline void check_end(unsigned long gpa, void (*tell)(int), int i)
{
	int fd = attached(0, 0);
	char *p = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, gpa), byte;

	CHECK_EQUAL(signal_of_read(p), 0);
	tell(i);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI | POLLHUP);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_REFUSED(pread(fd, &byte, 1, gpa), ESTALE);
	CHECK_EQUAL(ranges_of(fd).state, KVMMEM_STATE_GONE);
	munmap(p, PAGE);
	close(fd);
}

/* One whose generation goes back. */
static inline void check_generation(unsigned long gpa, struct kvmmem_descriptor *descriptor)
{
	int fd = attached(0, 0);
	char byte;

	descriptor->generation -= 2;
	CHECK_REFUSED(pread(fd, &byte, 1, gpa), ESTALE);
	close(fd);
}

#endif
