// SPDX-License-Identifier: GPL-2.0-only
/* A host that refuses to undo: the page is kept, even after the file is closed and the process has ended. */
#define _GNU_SOURCE
#include <sys/mman.h>
#include <unistd.h>

#include "selftest.h"

static void dies_against_the_hosts_will(void)
{
	char *p = pages(8);
	int fd = device();

	for (int i = 0; i < 8; i++)
		CHECK_EQUAL(map(fd, p + i * PAGE), 0);
	host_answers(-KVM_EPERM);
}

void test_quarantine(void)
{
	long before = counter("quarantined"), refused = counter("refused");
	int fd = device(), other = device();
	char *p = pages(4);

	for (int i = 0; i < 4; i++)
		CHECK_EQUAL(map(fd, p + i * PAGE), 0);
	host_answers(-KVM_EPERM);
	CHECK_REFUSED(unmap(other, p), EIO);
	CHECK_REFUSED(unmap(fd, p), EIO);
	CHECK_REFUSED(map(fd, p), EALREADY);
	CHECK_EQUAL(counter("quarantined"), before + 1);
	CHECK_EQUAL(counter("mapped"), 3);
	CHECK_EQUAL(counter("refused"), refused + 2);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-quarantined"), 1);
	host_answers(0);
	CHECK_EQUAL(unmap(other, p), 0);
	CHECK_EQUAL(counter("quarantined"), before);
	CHECK_EQUAL(map(fd, p), 0);

	/* Closed, refused; another file of the process can still bring a page back. */
	host_answers(-KVM_EPERM);
	close(fd);
	CHECK_EQUAL(counter("quarantined"), before + 4);
	CHECK_EQUAL(counter("mapped"), 0);
	host_answers(0);
	CHECK_REFUSED(map(other, p), EALREADY);
	CHECK_EQUAL(unmap(other, p), 0);
	CHECK_EQUAL(map(other, p), 0);
	CHECK_EQUAL(charged(), 4);

	/* With the last file the rest is kept for good; the process is charged no longer, after a grace period. */
	close(other);
	munmap(p, 4 * PAGE);
	CHECK(WITHIN(!charged()));
	CHECK_EQUAL(counter("quarantined"), before + 3);
	CHECK_EQUAL(pinned(), before + 3);

	in_child(dies_against_the_hosts_will);
	host_answers(0);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(counter("quarantined"), before + 11);
	CHECK_EQUAL(pinned(), before + 11);
}
