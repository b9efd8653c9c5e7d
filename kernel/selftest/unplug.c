// SPDX-License-Identifier: GPL-2.0-only
/* A view whose PCI devices go: the host unplugs them, or root unbinds them from the driver. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "plug.h"

#define SPAN	(THIRD + THIRD_SIZE - FIRST)

/* A file with the view, whose pages of all windows are mapped at `p`. */
static int in_use(char **p)
{
	int fd;

	plug_shows_usual(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = attached(0, 0);
	*p = mmap(NULL, SPAN, PROT_READ, MAP_SHARED, fd, FIRST);
	CHECK(*p != MAP_FAILED);
	CHECK_EQUAL(signal_of_read(*p), 0);
	CHECK_EQUAL(signal_of_read(*p + SECOND - FIRST), 0);
	CHECK_EQUAL(signal_of_read(*p + THIRD - FIRST), 0);
	return fd;
}

static void gone(int fd, char *p)
{
	char byte;

	CHECK_EQUAL(polled(fd, LONG), POLLPRI | POLLHUP);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_EQUAL(signal_of_read(p + SECOND - FIRST), SIGBUS);
	CHECK_EQUAL(signal_of_read(p + THIRD - FIRST), SIGBUS);
	CHECK_REFUSED(pread(fd, &byte, 1, FIRST), ESTALE);
	CHECK_REFUSED(pwrite(fd, &byte, 1, FIRST), ESTALE);
	CHECK_REFUSED(lseek(fd, FIRST, SEEK_DATA), ESTALE);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, FIRST) == MAP_FAILED && errno == ESTALE);
	CHECK_EQUAL(ranges_of(fd).state, KVMMEM_STATE_GONE);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-view-state"), KVMMEM_STATE_GONE);
	CHECK_EQUAL(counter("views"), 1);
	munmap(p, SPAN);
}

static void by_host(void)
{
	char *p;
	int fd = in_use(&p);

	unplug_view();
	gone(fd, p);
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	CHECK_REFUSED(attach(fd, 0, 0), ENOENT);
	close(fd);
	plug_in_view();
}

static void by_sysfs(const char *function)
{
	char *p, byte;
	int fd = in_use(&p);

	CHECK_EQUAL(unbind(function), 0);
	/* Not a moment later, and though the file is open. */
	CHECK(!is_mapped(function));
	if (function[2] != '0')
		CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_REFUSED(pread(fd, &byte, 1, FIRST), ESTALE);
	gone(fd, p);
	CHECK_EQUAL(bind(function), 0);
	CHECK_REFUSED(pread(fd, &byte, 1, FIRST), ESTALE);
	close(fd);
	/* Before a file has it: not complete, and complete again. */
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(unbind(function), 0);
	fd = device();
	CHECK_REFUSED(attach(fd, 0, 0), ENOENT);
	page_of(HEAD_A)->seen_generation = 0;
	CHECK_EQUAL(bind(function), 0);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	close(fd);
}

static int blocked_fd;

static void *blocked_reader(void *p)
{
	char byte;

	/* All but the last page is there. */
	CHECK_EQUAL(pread(blocked_fd, p, 3 * PAGE, FIRST), 2 * PAGE);
	CHECK_REFUSED(pread(blocked_fd, &byte, 1, FIRST), ESTALE);
	return NULL;
}

/* A reader whose own memory does not come does not keep a device from being unbound. */
static void with_blocked_reader(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	struct uffdio_register area = { .mode = UFFDIO_REGISTER_MODE_MISSING };
	struct uffdio_zeropage zero;
	char *own = pages(3), *p;
	struct uffd_msg message;
	pthread_t thread;
	int faults = syscall(SYS_userfaultfd, O_CLOEXEC);

	CHECK(faults >= 0 && !ioctl(faults, UFFDIO_API, &api));
	own[0] = own[PAGE] = 1;
	area.range.start = (unsigned long)own;
	area.range.len = 3 * PAGE;
	CHECK_EQUAL(ioctl(faults, UFFDIO_REGISTER, &area), 0);
	blocked_fd = in_use(&p);
	CHECK_EQUAL(pthread_create(&thread, NULL, blocked_reader, own), 0);
	CHECK_EQUAL(read(faults, &message, sizeof(message)), sizeof(message));
	CHECK_EQUAL(message.arg.pagefault.address & -PAGE, (unsigned long)own + 2 * PAGE);
	CHECK_EQUAL(unbind("A.1"), 0);
	CHECK(!is_mapped("A.1"));
	zero.range.start = (unsigned long)own + 2 * PAGE;
	zero.range.len = PAGE;
	zero.mode = 0;
	CHECK_EQUAL(ioctl(faults, UFFDIO_ZEROPAGE, &zero), 0);
	pthread_join(thread, NULL);
	close(faults);
	munmap(own, 3 * PAGE);
	gone(blocked_fd, p);
	close(blocked_fd);
	CHECK_EQUAL(bind("A.1"), 0);
}

/* Functions that are probed before their function 0. */
static void in_any_order(void)
{
	CHECK_EQUAL(unbind("A.0"), 0);
	CHECK_EQUAL(unbind("A.1"), 0);
	CHECK_EQUAL(unbind("A.2"), 0);
	page_of(HEAD_A)->seen_generation = 0;
	plug_shows_usual(HEAD_A);
	probe("A.2");
	probe("A.1");
	CHECK_EQUAL(bind("A.0"), 0);
	CHECK(is_bound("A.1") && is_bound("A.2"));
	CHECK(plug_is_seen(HEAD_A));
}

static void unloaded(void)
{
	char *p;
	int fd = in_use(&p);

	CHECK_REFUSED(unload_module(), EAGAIN);
	munmap(p, SPAN);
	close(fd);
	CHECK_EQUAL(unload_module(), 0);
	CHECK(!is_mapped("A.0") && !is_mapped("A.1"));
	page_of(HEAD_A)->seen_generation = 0;
	CHECK_EQUAL(load_module(""), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = attached(0, 0);
	close(fd);
}

void test_unplug(void)
{
	plug_shows_usual(HEAD_A);
	plug_in_view();
	by_host();
	by_sysfs("A.0");
	by_sysfs("A.2");
	by_sysfs("B.0");
	by_sysfs("B.1");
	with_blocked_reader();
	in_any_order();
	unloaded();
}
