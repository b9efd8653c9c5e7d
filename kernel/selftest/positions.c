// SPDX-License-Identifier: GPL-2.0-only
/* pread, pwrite, read, write and lseek of a view. */
#define _GNU_SOURCE
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "host.h"

#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define LOW_END	(LOW + LOW_SIZE)

static char buffer[MIB];

static int is_content(unsigned long gpa, unsigned long size)
{
	for (unsigned long at = -gpa % PAGE; at + sizeof(long) <= size; at += PAGE)
		if (*(unsigned long *)(buffer + at) != content(gpa + at))
			return 0;
	return 1;
}

static void reading(int fd)
{
	struct iovec parts[] = { { buffer, 5000 }, { buffer + 5000, 3000 } };
	char *bad = pages(2);

	CHECK_EQUAL(pread(fd, buffer, MIB, HUGE), MIB);
	CHECK(is_content(HUGE, MIB));
	CHECK_EQUAL(pread(fd, buffer, 0, HUGE), 0);
	CHECK_EQUAL(preadv(fd, parts, 2, HUGE + 100), 8000);
	CHECK(is_content(HUGE + 100, 8000));
	/* Over the seam of two ranges, which lie apart in the window. */
	CHECK_EQUAL(pread(fd, buffer, 4 * PAGE, NEXT - 2 * PAGE), 4 * PAGE);
	CHECK(is_content(NEXT - 2 * PAGE, 4 * PAGE));
	/* Short where a range ends, nothing at the end, an error in a hole. */
	CHECK_EQUAL(pread(fd, buffer, 200, LOW_END - 100), 100);
	CHECK_EQUAL(pread(fd, buffer, 200, END - 100), 100);
	CHECK_EQUAL(pread(fd, buffer, 200, END), 0);
	CHECK_EQUAL(pread(fd, buffer, 200, 1L << 62), 0);
	CHECK_REFUSED(pread(fd, buffer, 200, 0), ENXIO);
	CHECK_REFUSED(pread(fd, buffer, 200, LOW - 1), ENXIO);
	CHECK_REFUSED(pread(fd, buffer, 200, LOW_END), ENXIO);
	CHECK_REFUSED(pread(fd, buffer, 200, -PAGE), EINVAL);
	/* As much as the buffer can take. */
	munmap(bad + PAGE, PAGE);
	CHECK_EQUAL(pread(fd, bad, 2 * PAGE, HUGE), PAGE);
	CHECK_REFUSED(pread(fd, bad + PAGE, PAGE, HUGE), EFAULT);
	munmap(bad, PAGE);
}

static void writing(int fd)
{
	char *gone = pages(1);

	munmap(gone, PAGE);
	memset(buffer, 7, PAGE);
	CHECK_EQUAL(pwrite(fd, buffer, PAGE, NEXT - 100), PAGE);
	CHECK_EQUAL(*window(HUGE_AT + HUGE_SIZE - 100), 7);
	CHECK_EQUAL(*window(HUGE_AT + HUGE_SIZE - 1), 7);
	CHECK_EQUAL(*window(NEXT_AT), 7);
	CHECK_EQUAL(*window(NEXT_AT + PAGE - 101), 7);
	CHECK(*window(NEXT_AT + PAGE - 100) != 7);
	CHECK_EQUAL(pwrite(fd, buffer, 200, END - 100), 100);
	CHECK_REFUSED(pwrite(fd, buffer, 200, END), ENXIO);
	CHECK_REFUSED(pwrite(fd, buffer, 200, 0), ENXIO);
	CHECK_REFUSED(pwrite(fd, gone, 200, HUGE), EFAULT);
	*(unsigned long *)window(NEXT_AT) = NEXT_AT;
}

/* The buffer is a mapping of the same file: its faults need what the copy must not hold. */
static void onto_itself(int fd)
{
	char *p = mmap(NULL, HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, HUGE);

	CHECK_EQUAL(pread(fd, p + 4 * MIB, 3 * PAGE, LOW), 3 * PAGE);
	CHECK_EQUAL(*(unsigned long *)window(HUGE_AT + 4 * MIB + PAGE), LOW_AT + PAGE);
	CHECK_EQUAL(pwrite(fd, p + 6 * MIB, PAGE, HUGE + 4 * MIB), PAGE);
	CHECK_EQUAL(*(unsigned long *)window(HUGE_AT + 4 * MIB), HUGE_AT + 6 * MIB);
	munmap(p, HUGE_SIZE);
	for (unsigned long at = 4 * MIB; at < 5 * MIB; at += PAGE)
		*(unsigned long *)window(HUGE_AT + at) = HUGE_AT + at;
}

static void seeking(int fd)
{
	CHECK_EQUAL(lseek(fd, HUGE, SEEK_SET), HUGE);
	CHECK_EQUAL(read(fd, buffer, 2 * PAGE), 2 * PAGE);
	CHECK(is_content(HUGE, 2 * PAGE));
	CHECK_EQUAL(lseek(fd, -PAGE, SEEK_CUR), HUGE + PAGE);
	CHECK_EQUAL(read(fd, buffer, PAGE), PAGE);
	CHECK(is_content(HUGE + PAGE, PAGE));
	CHECK_EQUAL(write(fd, buffer, 10), 10);
	CHECK_EQUAL(lseek(fd, 0, SEEK_CUR), HUGE + 2 * PAGE + 10);
	*(unsigned long *)window(HUGE_AT + 2 * PAGE) = HUGE_AT + 2 * PAGE;
	CHECK_EQUAL(lseek(fd, -10, SEEK_END), END - 10);
	CHECK_EQUAL(read(fd, buffer, PAGE), 10);
	CHECK_EQUAL(read(fd, buffer, PAGE), 0);
	CHECK_REFUSED(lseek(fd, -1, SEEK_SET), EINVAL);
	CHECK_REFUSED(lseek(fd, -2 * END, SEEK_END), EINVAL);
	CHECK_REFUSED(lseek(fd, 0, 77), EINVAL);

	/* A host that says "right here" to everything. */
	CHECK_EQUAL(lseek(fd, 0, SEEK_DATA), LOW);
	CHECK_EQUAL(lseek(fd, LOW + 5, SEEK_DATA), LOW + 5);
	CHECK_EQUAL(lseek(fd, LOW_END, SEEK_DATA), HUGE);
	CHECK_EQUAL(lseek(fd, END - 1, SEEK_DATA), END - 1);
	CHECK_REFUSED(lseek(fd, END, SEEK_DATA), ENXIO);
	CHECK_REFUSED(lseek(fd, -1, SEEK_DATA), ENXIO);
	CHECK_EQUAL(lseek(fd, 0, SEEK_HOLE), 0);
	CHECK_EQUAL(lseek(fd, LOW + 5, SEEK_HOLE), LOW + 5);
	CHECK_EQUAL(lseek(fd, LOW_END + 5, SEEK_HOLE), LOW_END + 5);
	CHECK_REFUSED(lseek(fd, END, SEEK_HOLE), ENXIO);
	/* One that finds nothing. */
	host_answers(-2);
	CHECK_REFUSED(lseek(fd, 0, SEEK_DATA), ENXIO);
	CHECK_EQUAL(lseek(fd, LOW + 5, SEEK_HOLE), LOW_END);
	CHECK_EQUAL(lseek(fd, HUGE, SEEK_HOLE), END);
	/* One that does not know: the ranges count. */
	host_answers(-95);
	CHECK_EQUAL(lseek(fd, LOW_END, SEEK_DATA), HUGE);
	CHECK_EQUAL(lseek(fd, LOW, SEEK_HOLE), LOW_END);
	host_answers(-1);
	CHECK_REFUSED(lseek(fd, LOW, SEEK_DATA), EPERM);
	CHECK_REFUSED(lseek(fd, LOW, SEEK_HOLE), EPERM);
	host_answers(0);
}

void test_positions(void)
{
	struct kvmmem_stats stats;
	int fd;

	host_shows_usual(0, RW);
	fd = attached(0, 0);
	reading(fd);
	writing(fd);
	onto_itself(fd);
	seeking(fd);
	stats = stats_of(fd);
	CHECK_EQUAL(stats.read_bytes, MIB + 8000 + 4 * PAGE + 200 + PAGE + 3 * PAGE + 3 * PAGE + 10);
	CHECK_EQUAL(stats.written_bytes, PAGE + 100 + PAGE + 10);
	close(fd);
}
