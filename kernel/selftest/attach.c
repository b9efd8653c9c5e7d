// SPDX-License-Identifier: GPL-2.0-only
/* Attaching, detaching, and every errno of the ioctls of views. */
#define _GNU_SOURCE
#include <poll.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "host.h"

#define KERNEL_TEXT	0xffffffff81000000UL

static void without_a_view(void)
{
	struct kvmmem_info info;
	struct kvmmem_ranges ranges = {};
	struct kvmmem_stats stats;
	char byte;
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVMMEM_INFO, &info), 0);
	CHECK_EQUAL(info.features & ~KVMMEM_FEAT_HUGE_1G,
		    KVMMEM_FEAT_VIEWS | KVMMEM_FEAT_HUGE_2M | KVMMEM_FEAT_SEEK | KVMMEM_FEAT_REGIONS);
	CHECK_EQUAL(info.max_ranges, KVMMEM_MAX_RANGES);
	CHECK_EQUAL(info.event_ms, 10);
	CHECK_REFUSED(ioctl(fd, KVMMEM_INFO, KERNEL_TEXT), EFAULT);
	CHECK_REFUSED(ioctl(fd, KVMMEM_RANGES, &ranges), ENOTCONN);
	CHECK_REFUSED(ioctl(fd, KVMMEM_STATS, &stats), ENOTCONN);
	CHECK_REFUSED(ioctl(fd, KVMMEM_DETACH, 0), ENOTCONN);
	CHECK_REFUSED(pread(fd, &byte, 1, HUGE), ENOTCONN);
	CHECK_REFUSED(pwrite(fd, &byte, 1, HUGE), ENOTCONN);
	CHECK_REFUSED(lseek(fd, 0, SEEK_SET), ENOTCONN);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, HUGE) == MAP_FAILED && errno == ENOTCONN);
	CHECK_EQUAL(polled(fd, 0), POLLERR);
	close(fd);
}

static void host_refuses(void)
{
	static const struct { int answer, error; } table[] = {
		{ -1, EPERM }, { -2, ENOENT }, { -7, EINVAL }, { -11, EAGAIN }, { -12, ENOMEM }, { -14, EFAULT },
		{ -16, EALREADY }, { -22, EINVAL }, { -95, EOPNOTSUPP }, { -1000, EOPNOTSUPP }, { -5, EIO }, { 77, EIO },
	};
	long refused = counter("refused");
	int count = sizeof(table) / sizeof(*table), fd = device();

	for (int i = 0; i < count; i++) {
		host_answers(table[i].answer);
		CHECK_REFUSED(attach(fd, 0, 0), table[i].error);
	}
	host_answers(0);
	CHECK_EQUAL(counter("refused"), refused + count);
	CHECK_EQUAL(counter("views"), 0);
	close(fd);
}

static void bad_arguments(void)
{
	struct kvmmem_attach argument = { .reserved = 1 };
	struct kvmmem_ranges ranges = { .capacity = 1, .ranges = KERNEL_TEXT };
	struct kvmmem_range room[2] = {};
	int fd = device();

	CHECK_REFUSED(attach(fd, 0, 2), EINVAL);
	CHECK_REFUSED(ioctl(fd, KVMMEM_ATTACH, &argument), EINVAL);
	CHECK_REFUSED(ioctl(fd, KVMMEM_ATTACH, KERNEL_TEXT), EFAULT);
	CHECK_REFUSED(ioctl(fd, KVMMEM_ATTACH, 0), EFAULT);
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	CHECK_REFUSED(attach(fd, 0, 0), EISCONN);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_OPEN, room), EISCONN);
	CHECK_REFUSED(ioctl(fd, KVMMEM_RANGES, KERNEL_TEXT), EFAULT);
	CHECK_REFUSED(ioctl(fd, KVMMEM_RANGES, &ranges), EFAULT);
	CHECK_REFUSED(ioctl(fd, KVMMEM_STATS, KERNEL_TEXT), EFAULT);
	/* Less room than ranges: no more is written. */
	ranges.ranges = (unsigned long)room;
	CHECK_EQUAL(ioctl(fd, KVMMEM_RANGES, &ranges), 0);
	CHECK_EQUAL(ranges.count, 3);
	CHECK(room[0].gpa == LOW && room[0].len == LOW_SIZE && !room[1].gpa && !room[1].len);
	close(fd);
}

static void attach_and_detach(void)
{
	struct kvmmem_ranges ranges;
	struct kvmmem_range *range;
	int fd = device(), other;

	CHECK_EQUAL(attach(fd, 0, 0), 0);
	CHECK_EQUAL(counter("views"), 1);
	ranges = ranges_of(fd);
	range = (struct kvmmem_range *)(unsigned long)ranges.ranges;
	CHECK_EQUAL(ranges.state, KVMMEM_STATE_OPEN);
	CHECK_EQUAL(ranges.rights, KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE);
	CHECK_EQUAL(ranges.generation, descriptor(0)->generation);
	CHECK(!memcmp(ranges.uuid, descriptor(0)->uuid, 16));
	CHECK_EQUAL(ranges.count, 3);
	CHECK(range[0].gpa == LOW && range[0].len == LOW_SIZE);
	CHECK(range[1].gpa == HUGE && range[1].len == HUGE_SIZE);
	CHECK(range[2].gpa == NEXT && range[2].len == NEXT_SIZE);
	/* Each file has its own. */
	other = attached(1, KVMMEM_ATTACH_READ_ONLY);
	CHECK_EQUAL(counter("views"), 2);
	ranges = ranges_of(other);
	CHECK_EQUAL(ranges.rights, KVMMEM_RIGHT_READ);
	CHECK_EQUAL(ranges.uuid[0], 0x41);
	close(other);
	CHECK_EQUAL(counter("views"), 1);
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	CHECK_REFUSED(ioctl(fd, KVMMEM_DETACH, 0), ENOTCONN);
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(attach(fd, 1, 0), 0);
	close(fd);
	CHECK_EQUAL(counter("views"), 0);
}

/* A view that the host refuses to close is counted. */
static void host_keeps_view(void)
{
	long quarantined = counter("views-quarantined");
	int fd = attached(0, 0);

	host_answers(-KVM_EPERM);
	close(fd);
	host_answers(0);
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(counter("views-quarantined"), quarantined + 1);
}

/* A host that serves v1's hypercalls and opens no views. */
void test_no_views(void)
{
	struct kvmmem_info info;
	char uuid[16] = {}, byte;
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVMMEM_INFO, &info), 0);
	CHECK_EQUAL(info.features, 0);
	CHECK_REFUSED(attach(fd, 0, 0), EOPNOTSUPP);
	CHECK_REFUSED(pread(fd, &byte, 1, 0), ENOTCONN);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_UNMAP, 0), ENOTTY);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid), ENOTTY);
	close(fd);
}

void test_attach(void)
{
	host_shows_usual(0, KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE);
	host_shows_usual(1, KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE);
	without_a_view();
	host_refuses();
	bad_arguments();
	attach_and_detach();
	host_keeps_view();
}
