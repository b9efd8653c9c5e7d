// SPDX-License-Identifier: GPL-2.0-only
/* What may be mapped where, and which errno says what. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "selftest.h"

#define HUGE_PAGE	(2UL << 20)
#define KERNEL_TEXT	((void *)0xffffffff81000000)
#define USER_END	((char *)0x7ffffffff000)
#define MAP_IOCTL	0x40306901U

static void host_errors(void)
{
	static const struct { int answer, error; } table[] = {
		{ -1, EPERM }, { -2, ENOENT }, { -7, EINVAL }, { -11, EAGAIN }, { -12, ENOMEM }, { -14, EFAULT },
		{ -16, EALREADY }, { -22, EINVAL }, { -95, EOPNOTSUPP }, { -1000, EOPNOTSUPP },
		/* No errors of KVM's. */
		{ -5, EIO }, { -999, EIO }, { 77, EIO },
	};
	const int count = sizeof(table) / sizeof(*table);
	long refused = counter("refused"), before = pinned();
	char *page = pages(1);
	int fd = device();

	for (int i = 0; i < count; i++) {
		host_answers(table[i].answer);
		CHECK_REFUSED(map(fd, page), table[i].error);
	}
	host_answers(0);
	CHECK_EQUAL(counter("refused"), refused + count);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-mapped"), 0);
	CHECK_EQUAL(charged(), 0);
	CHECK_EQUAL(pinned(), before);
	close(fd);
}

static void bad_numbers(int fd, char *page)
{
	CHECK_REFUSED(map(fd, page + 1), EINVAL);
	CHECK_REFUSED(map_gpa(fd, page, 8), EINVAL);
	CHECK_REFUSED(unmap(fd, page + 8), EINVAL);
	CHECK_REFUSED(map(fd, NULL), EFAULT);
	CHECK_REFUSED(map(fd, USER_END - PAGE), EFAULT);
	/* As in the 2019 patch: access_ok(). */
	CHECK_REFUSED(map(fd, USER_END), EINVAL);
	CHECK_REFUSED(map(fd, KERNEL_TEXT), EINVAL);
	CHECK_REFUSED(map(fd, (void *)-PAGE), EINVAL);
	CHECK_REFUSED(unmap(fd, KERNEL_TEXT), ENOENT);
	CHECK_REFUSED(ioctl(fd, MAP_IOCTL, 16), EFAULT);
	CHECK_REFUSED(ioctl(fd, MAP_IOCTL, KERNEL_TEXT), EFAULT);
	/* UNMAP with the size of a 32-bit long, MAP as _IOWR, and others. */
	CHECK_REFUSED(ioctl(fd, 0x40046902U, page), ENOTTY);
	CHECK_REFUSED(ioctl(fd, 0xc0306901U, page), ENOTTY);
	CHECK_REFUSED(ioctl(fd, 0x40306902U, page), ENOTTY);
	CHECK_REFUSED(ioctl(fd, 0, 0), ENOTTY);
}

static void refuse(int fd, int protection, int flags, int file, unsigned long size)
{
	char *p = mmap(NULL, size, protection, flags, file, 0);

	CHECK(p != MAP_FAILED);
	CHECK_REFUSED(map(fd, p), EINVAL);
	if (protection & PROT_WRITE) {
		*p = 1;
		CHECK_REFUSED(map(fd, p), EINVAL);
	}
	munmap(p, size);
}

static void unsuitable_memory(int fd)
{
	const int rw = PROT_READ | PROT_WRITE, anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
	int file = open("/scratch", O_RDWR | O_CREAT, 0600);
	int huge = open("/proc/sys/vm/nr_hugepages", O_WRONLY);

	CHECK_EQUAL(ftruncate(file, PAGE), 0);
	CHECK_EQUAL(write(huge, "2", 1), 1);
	refuse(fd, PROT_READ, anonymous, -1, PAGE);
	refuse(fd, PROT_NONE, anonymous, -1, PAGE);
	refuse(fd, rw, MAP_SHARED | MAP_ANONYMOUS, -1, PAGE);
	refuse(fd, rw, MAP_SHARED, file, PAGE);
	refuse(fd, rw, MAP_PRIVATE, file, PAGE);
	refuse(fd, rw, anonymous | MAP_HUGETLB, -1, HUGE_PAGE);
	/* This program's text. */
	CHECK_REFUSED(map(fd, (void *)((unsigned long)unsuitable_memory & ~(PAGE - 1))), EINVAL);
	close(huge);
	close(file);
}

static void transparent_huge_page(int fd)
{
	char *area = pages(2 * HUGE_PAGE / PAGE);
	char *huge = (char *)(((unsigned long)area + HUGE_PAGE - 1) & ~(HUGE_PAGE - 1));
	int mapped = 0, unmapped = 0;

	madvise(huge, HUGE_PAGE, MADV_HUGEPAGE);
	memset(huge, 1, HUGE_PAGE);
	for (unsigned long i = 0; i < HUGE_PAGE; i += PAGE)
		mapped += map(fd, huge + i) == 0;
	for (unsigned long i = 0; i < HUGE_PAGE; i += PAGE)
		unmapped += unmap(fd, huge + i) == 0;
	CHECK_EQUAL(mapped, HUGE_PAGE / PAGE);
	CHECK_EQUAL(unmapped, HUGE_PAGE / PAGE);
	munmap(area, 2 * HUGE_PAGE);
}

/* The tool does as it likes with its addresses; UNMAP finds the page all the same. */
static void memory_goes_first(int fd)
{
	char *p = pages(3), *elsewhere = pages(1);

	CHECK_EQUAL(map(fd, p), 0);
	munmap(p, PAGE);
	CHECK_REFUSED(map(fd, p), EALREADY);
	CHECK_EQUAL(unmap(fd, p), 0);

	CHECK_EQUAL(map(fd, p + PAGE), 0);
	madvise(p + PAGE, PAGE, MADV_DONTNEED);
	p[PAGE] = 1;
	CHECK_EQUAL(unmap(fd, p + PAGE), 0);

	CHECK_EQUAL(map(fd, p + 2 * PAGE), 0);
	CHECK(mremap(p + 2 * PAGE, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere) != MAP_FAILED);
	CHECK_EQUAL(unmap(fd, p + 2 * PAGE), 0);
}

void test_arguments(void)
{
	int fd = device();
	char *page = pages(1);

	host_errors();
	CHECK_EQUAL(map(fd, page), 0);
	CHECK_REFUSED(map_gpa(fd, page, PAGE), EALREADY);
	CHECK_EQUAL(charged(), 1);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-mapped"), 1);
	CHECK_EQUAL(unmap(fd, page), 0);
	CHECK_REFUSED(unmap(fd, page), ENOENT);
	CHECK_EQUAL(charged(), 0);
	bad_numbers(fd, page);
	unsuitable_memory(fd);
	transparent_huge_page(fd);
	memory_goes_first(fd);
	close(fd);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(pinned(), 0);
}
