// SPDX-License-Identifier: GPL-2.0-only
/* A host that raises an interrupt when it has changed a view: no view is polled then. */
#define _GNU_SOURCE
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define FILES	3

/* How many interrupts the module's handlers were called for; -1 without a handler. */
static long interrupts(void)
{
	FILE *file = fopen("/proc/interrupts", "r");
	char line[512], *at, *end;
	long count = -1;

	while (file && fgets(line, sizeof(line), file)) {
		if (!strstr(line, "kvmmem"))
			continue;
		count = 0;
		/* One number for each CPU. */
		for (at = strchr(line, ':') + 1; count += strtol(at, &end, 10), end != at;)
			at = end;
	}
	if (file)
		fclose(file);
	return count;
}

void test_interrupt(void)
{
	int files[FILES];
	long before;
	char *p;

	CHECK_EQUAL(interrupts(), -1);
	host_shows_usual(0, RW);
	for (int i = 0; i < FILES; i++)
		files[i] = attached(0, 0);
	before = interrupts();
	CHECK(before >= 0);
	p = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, files[0], HUGE);
	CHECK_EQUAL(signal_of_read(p), 0);
	host_sets_state(0, KVMMEM_STATE_REVOKED);
	for (int i = 0; i < FILES; i++)
		CHECK_EQUAL(polled(files[i], LONG), POLLPRI | POLLHUP);
	/* poll looks for itself: the interrupt may be on its way still, to the other CPU. */
	CHECK(WITHIN(interrupts() > before));
	CHECK(signal_of_read(p) != 0);
	/* One of several files is closed: the others' handlers stay. */
	close(files[0]);
	host_shows_usual(0, RW);
	files[0] = attached(0, 0);
	close(files[1]);
	before = interrupts();
	host_shows_usual(0, RW);
	CHECK_EQUAL(polled(files[0], LONG), POLLPRI);
	CHECK(WITHIN(interrupts() > before));
	munmap(p, HUGE_SIZE);
	close(files[0]);
	close(files[2]);
	CHECK_EQUAL(interrupts(), -1);
}
