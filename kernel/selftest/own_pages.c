// SPDX-License-Identifier: GPL-2.0-only
/* Views where the host opens no window: each page is one of the driver's own, asked for when it is first used. */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"

#define EVERYTHING	(1UL << 52)
#define RW		(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define MANY		16384UL
#define ROUNDS		8

static char buffer[4 * PAGE];
static int shared;
static char *shared_pages;

static char *map_view(int fd, int protection, unsigned long gpa, unsigned long size)
{
	char *p = mmap(NULL, size, protection, MAP_SHARED, fd, gpa);

	CHECK(p != MAP_FAILED);
	return p;
}

static void what_is_told(void)
{
	struct kvmmem_info info;
	struct kvmmem_ranges ranges;
	struct kvmmem_range *range;
	int fd = device();

	CHECK_EQUAL(ioctl(fd, KVMMEM_INFO, &info), 0);
	CHECK_EQUAL(info.version, KVMMEM_VERSION);
	CHECK_EQUAL(info.features, KVMMEM_FEAT_VIEWS | KVMMEM_FEAT_PAGES);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_UNMAP, 0), ENOTTY);
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_OPEN, &info), ENOTTY);
	CHECK_REFUSED(pread(fd, buffer, 1, 0), ENOTCONN);
	/* Attaching asks the host nothing. */
	host_answers(-KVM_EPERM);
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	host_answers(0);
	CHECK_REFUSED(attach(fd, 0, 0), EISCONN);
	CHECK_EQUAL(counter("views"), 1);
	ranges = ranges_of(fd);
	range = (struct kvmmem_range *)(unsigned long)ranges.ranges;
	CHECK_EQUAL(ranges.state, KVMMEM_STATE_OPEN);
	CHECK_EQUAL(ranges.rights, RW);
	CHECK_EQUAL(ranges.count, 1);
	CHECK(range->gpa == 0 && range->len == EVERYTHING);
	CHECK_EQUAL(lseek(fd, 0, SEEK_END), EVERYTHING);
	CHECK_EQUAL(lseek(fd, 5, SEEK_DATA), 5);
	CHECK_EQUAL(lseek(fd, 5, SEEK_HOLE), EVERYTHING);
	CHECK_REFUSED(lseek(fd, EVERYTHING, SEEK_DATA), ENXIO);
	CHECK_EQUAL(pread(fd, buffer, 1, EVERYTHING), 0);
	CHECK_REFUSED(pwrite(fd, buffer, 1, EVERYTHING), ENXIO);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, EVERYTHING) == MAP_FAILED && errno == ENXIO);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK_EQUAL(polled(fd, 50), 0);
	CHECK_EQUAL(ranges_of(fd).generation, ranges.generation);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	CHECK_REFUSED(pread(fd, buffer, 1, 0), ENOTCONN);
	CHECK_EQUAL(counter("views"), 0);
	close(fd);
}

static void child_of_a_tool(void)
{
	CHECK_EQUAL(shared_pages[HUGE - LOW], 4);
	CHECK_EQUAL(shared_pages[HUGE + PAGE - LOW], 0);
	shared_pages[HUGE + PAGE - LOW] = 5;
	close(shared);
}

/* One page for each address, whether it is read, written or mapped, and by whom. */
static void same_pages(void)
{
	long total = counter("total");

	shared = attached(0, 0);
	memset(buffer, 3, sizeof(buffer));
	CHECK_EQUAL(pread(shared, buffer, 2 * PAGE, LOW + 7), 2 * PAGE);
	CHECK(!buffer[0] && !buffer[2 * PAGE - 1] && buffer[2 * PAGE] == 3);
	CHECK_EQUAL(counter("mapped"), 3);
	shared_pages = map_view(shared, PROT_READ | PROT_WRITE, LOW, 8 * MIB);
	CHECK_EQUAL(pwrite(shared, "12", 2, LOW + PAGE - 1), 2);
	CHECK(shared_pages[PAGE - 1] == '1' && shared_pages[PAGE] == '2');
	shared_pages[HUGE - LOW] = 4;
	CHECK_EQUAL(pread(shared, buffer, 1, HUGE), 1);
	CHECK_EQUAL(buffer[0], 4);
	CHECK_EQUAL(counter("mapped"), 4);
	in_child(child_of_a_tool);
	CHECK_EQUAL(shared_pages[HUGE + PAGE - LOW], 5);
	CHECK_EQUAL(counter("mapped"), 5);
	/* From one page of the view to the next one, and back again by its mapping. */
	CHECK_EQUAL(pread(shared, shared_pages + 20 * PAGE, PAGE, HUGE), PAGE);
	CHECK_EQUAL(shared_pages[20 * PAGE], 4);
	CHECK_EQUAL(counter("mapped"), 6);
	CHECK_EQUAL(stats_of(shared).faults_2m, 0);
	/* What is unmapped stays the view's. */
	munmap(shared_pages, 8 * MIB);
	CHECK_EQUAL(counter("mapped"), 6);
	CHECK_EQUAL(pread(shared, buffer, 1, HUGE + PAGE), 1);
	CHECK_EQUAL(buffer[0], 5);
	close(shared);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(counter("total"), total + 6);
	CHECK_EQUAL(counter("views"), 0);
}

static void read_only(void)
{
	int fd = attached(0, KVMMEM_ATTACH_READ_ONLY);
	char *p = map_view(fd, PROT_READ, LOW, PAGE);

	CHECK_EQUAL(ranges_of(fd).rights, KVMMEM_RIGHT_READ);
	CHECK_REFUSED(pwrite(fd, buffer, 1, LOW), EACCES);
	CHECK(mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED, fd, LOW) == MAP_FAILED && errno == EACCES);
	CHECK_REFUSED(mprotect(p, PAGE, PROT_READ | PROT_WRITE), EACCES);
	CHECK_EQUAL(signal_of_write(p), SIGSEGV);
	CHECK_EQUAL(signal_of_read(p), 0);
	munmap(p, PAGE);
	close(fd);
}

/* Nothing is kept of a refusal: the next one asks again. */
static void host_refuses(void)
{
	static const struct { int answer, error; } table[] = {
		{ -1, EPERM }, { -2, ENOENT }, { -7, EINVAL }, { -11, EAGAIN }, { -12, ENOMEM }, { -14, ENXIO },
		{ -16, EALREADY }, { -22, EINVAL }, { -95, EOPNOTSUPP }, { -1000, EOPNOTSUPP }, { -5, EIO }, { 77, EIO },
	};
	long refused = counter("refused");
	int count = sizeof(table) / sizeof(*table), fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ | PROT_WRITE, LOW, 2 * PAGE);

	CHECK_EQUAL(signal_of_read(p), 0);
	for (int i = 0; i < count; i++) {
		host_answers(table[i].answer);
		CHECK_REFUSED(pread(fd, buffer, 1, LOW + PAGE), table[i].error);
		CHECK_REFUSED(pwrite(fd, buffer, 1, LOW + PAGE), table[i].error);
		CHECK_EQUAL(signal_of_read(p + PAGE), SIGBUS);
		/* What is shown already stays, up to where it ends. */
		CHECK_EQUAL(pread(fd, buffer, 2 * PAGE, LOW), PAGE);
	}
	CHECK_EQUAL(counter("refused"), refused + 4 * count);
	CHECK_EQUAL(counter("mapped"), 1);
	host_answers(0);
	CHECK_EQUAL(signal_of_write(p + PAGE), 0);
	CHECK_EQUAL(counter("mapped"), 2);
	munmap(p, 2 * PAGE);
	close(fd);
	CHECK_EQUAL(counter("mapped"), 0);
}

/* Mappings of before a DETACH show nothing, of a later view neither. */
static void detached(void)
{
	int fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ | PROT_WRITE, LOW, 2 * PAGE), *q;

	*p = 1;
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_EQUAL(signal_of_read(p + PAGE), SIGBUS);
	CHECK_EQUAL(attach(fd, 1, 0), 0);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	q = map_view(fd, PROT_READ | PROT_WRITE, LOW, PAGE);
	CHECK_EQUAL(*q, 0);
	/* Mappings outlive the descriptor, and the view with them. */
	close(fd);
	*q = 2;
	CHECK_EQUAL(counter("mapped"), 1);
	munmap(q, PAGE);
	munmap(p, 2 * PAGE);
	CHECK_EQUAL(counter("mapped"), 0);
}

/* A page that the host does not give back is kept for good. */
static void undo_refused(void)
{
	long quarantined = counter("quarantined"), refused = counter("refused");
	int fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ | PROT_WRITE, LOW, 3 * PAGE);

	CHECK_EQUAL(pread(fd, buffer, 3 * PAGE, LOW), 3 * PAGE);
	*p = 1;
	host_answers(-KVM_EPERM);
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	host_answers(0);
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(counter("quarantined"), quarantined + 3);
	CHECK_EQUAL(counter("refused"), refused + 3);
	munmap(p, 3 * PAGE);
	close(fd);
}

static long touch_many(void)
{
	int fd = attached(0, 0);
	char *p = map_view(fd, PROT_READ | PROT_WRITE, HUGE, MANY * PAGE);
	long left;

	for (unsigned long i = 0; i < MANY; i++)
		p[i * PAGE] = 1;
	left = free_pages();
	CHECK_EQUAL(counter("mapped"), MANY);
	munmap(p, MANY * PAGE);
	close(fd);
	CHECK_EQUAL(counter("mapped"), 0);
	return left;
}

/* By the free memory: the kernel keeps some of what was freed in lists of each CPU, but not of every round. */
static void none_leaked(void)
{
	long before, with;

	touch_many();
	before = free_pages();
	for (int i = 0; i < ROUNDS; i++)
		with = touch_many();
	CHECK(before - with > (long)MANY / 4);
	CHECK(before - free_pages() < (long)MANY);
}

static void killed_tool(void)
{
	pid_t tool = fork();

	if (!tool) {
		char *p = map_view(attached(0, 0), PROT_READ, HUGE, 64 * PAGE);

		for (int i = 0; i < 64; i++)
			CHECK_EQUAL(p[i * PAGE], 0);
		kill(getpid(), SIGKILL);
	}
	waitpid(tool, NULL, 0);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(counter("views"), 0);
}

/* In a module with max_pages_per_file=3. */
void test_few_own_pages(void)
{
	int fd = attached(0, 0), other = attached(0, 0);
	char *p = map_view(fd, PROT_READ, LOW, 4 * PAGE);

	CHECK_EQUAL(pread(fd, buffer, 4 * PAGE, LOW), 3 * PAGE);
	CHECK_REFUSED(pread(fd, buffer, 1, LOW + 3 * PAGE), ENOMEM);
	CHECK_EQUAL(signal_of_read(p + 3 * PAGE), SIGBUS);
	CHECK_EQUAL(signal_of_read(p + 2 * PAGE), 0);
	CHECK_EQUAL(pread(other, buffer, 4 * PAGE, LOW), 3 * PAGE);
	CHECK_EQUAL(ioctl(fd, KVMMEM_DETACH, 0), 0);
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	/* Refusals count for nothing. */
	host_answers(-KVM_EPERM);
	for (int i = 0; i < 10; i++)
		CHECK_REFUSED(pread(fd, buffer, 1, i * PAGE), EPERM);
	host_answers(0);
	CHECK_EQUAL(pread(fd, buffer, 4 * PAGE, LOW), 3 * PAGE);
	munmap(p, 4 * PAGE);
	close(fd);
	close(other);
	CHECK_EQUAL(counter("mapped"), 0);
}

void test_own_pages(void)
{
	what_is_told();
	same_pages();
	read_only();
	host_refuses();
	detached();
	undo_refused();
	none_leaked();
	killed_tool();
}
