// SPDX-License-Identifier: GPL-2.0-only
/* Each allocation of each call fails once: the call says so, leaves nothing behind, and can be made again. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"
#include "inject.h"

#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define LAZY	2
#define ZERO	5
/* At least as many as a process allocates while it exits. */
#define EXITS	30

static int fd;
static char *own, *area;

static int call_open(void)
{
	fd = open("/dev/kvmmem", O_RDWR);
	return fd < 0 ? -1 : 0;
}

static void close_file(void)
{
	close(fd);
}

static int call_map(void)
{
	return map(fd, own);
}

static int call_unmap(void)
{
	return unmap(fd, own);
}

static void undo_map(void)
{
	CHECK_EQUAL(unmap(fd, own), 0);
	/* A fresh page the next time. */
	madvise(own, PAGE, MADV_DONTNEED);
}

static void map_again(void)
{
	CHECK_EQUAL(map(fd, own), 0);
}

/* The first MAP of a process, which then gets its table. Whether an allocation failed. */
static int first_map(int n)
{
	int status, error, is_injected;
	pid_t tool = fork();

	if (!tool) {
		failures = 0;
		fd = device();
		inject(n);
		error = map(fd, own) ? errno : 0;
		is_injected = injected();
		CHECK(!error || (is_injected && (error == ENOMEM || error == EAGAIN)));
		if (error)
			CHECK_EQUAL(map(fd, own), 0);
		CHECK_EQUAL(counter("mapped"), 1);
		_exit(failures ? 2 : is_injected);
	}
	waitpid(tool, &status, 0);
	CHECK(WIFEXITED(status) && WEXITSTATUS(status) < 2);
	CHECK_EQUAL(counter("mapped"), 0);
	return WIFEXITED(status) && WEXITSTATUS(status) == 1;
}

static void first_maps(void)
{
	int n = 1;

	progress("a process's first MAP");
	while (first_map(n))
		n++;
	CHECK(n > 1);
}

/* Closing and dying cannot fail. */
static void last_close(void)
{
	int is_injected = 1;

	for (int n = 1; is_injected; n++) {
		fd = attached(0, 0);
		CHECK_EQUAL(map(fd, own), 0);
		area = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, fd, HUGE);
		CHECK_EQUAL(signal_of_read(area), 0);
		munmap(area, HUGE_SIZE);
		inject(n);
		CHECK_EQUAL(close(fd), 0);
		is_injected = injected();
		CHECK_EQUAL(counter("mapped"), 0);
		CHECK_EQUAL(counter("views"), 0);
	}
}

static void last_breath(void)
{
	for (int n = 1; n < EXITS; n++) {
		pid_t tool = fork();

		if (!tool) {
			fd = attached(0, 0);
			area = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, fd, HUGE);
			if (map(fd, own) || signal_of_read(area))
				_exit(1);
			inject(n);
			_exit(0);
		}
		CHECK(waitpid(tool, NULL, 0) == tool);
		CHECK(WITHIN(!counter("mapped")));
		CHECK(WITHIN(!counter("views")));
	}
}

static int call_attach(void)
{
	return attach(fd, 0, 0);
}

static int call_detach(void)
{
	return ioctl(fd, KVMMEM_DETACH, 0);
}

static void undo_attach(void)
{
	CHECK_EQUAL(call_detach(), 0);
}

static void attach_again(void)
{
	CHECK_EQUAL(attach(fd, 0, 0), 0);
}

static void nothing(void)
{
}

static int call_ranges(void)
{
	static struct kvmmem_range room[KVMMEM_MAX_RANGES];
	struct kvmmem_ranges argument = { .capacity = KVMMEM_MAX_RANGES, .ranges = (unsigned long)room };

	return ioctl(fd, KVMMEM_RANGES, &argument);
}

static int call_info(void)
{
	struct kvmmem_info info;
	struct kvmmem_stats stats;

	return ioctl(fd, KVMMEM_INFO, &info) || ioctl(fd, KVMMEM_STATS, &stats) ? -1 : 0;
}

static int call_mmap(void)
{
	area = mmap(NULL, HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, HUGE);
	return area == MAP_FAILED ? -1 : 0;
}

static void undo_mmap(void)
{
	CHECK_EQUAL(munmap(area, HUGE_SIZE), 0);
}

static void mmap_again(void)
{
	void *p = mmap(area, HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, HUGE);

	CHECK(p == area);
}

/* An area becomes two. */
static int call_split(void)
{
	return munmap(area + PAGE, PAGE);
}

static int call_protect(void)
{
	return mprotect(area + 3 * PAGE, PAGE, PROT_READ);
}

static char *elsewhere;

static int call_move(void)
{
	return mremap(area, HUGE_SIZE, HUGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere) == elsewhere ? 0 : -1;
}

static void move_back(void)
{
	CHECK(mremap(elsewhere, HUGE_SIZE, HUGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, area) == area);
}

static int call_fork(void)
{
	int status;
	pid_t child = fork();

	if (!child)
		_exit(signal_of_read(area));
	if (child < 0)
		return -1;
	waitpid(child, &status, 0);
	CHECK_EQUAL(status, 0);
	return 0;
}

static int touch_small(void)
{
	return signal_of_read(area + PAGE);
}

static int touch_huge(void)
{
	return signal_of_read(area + 2 * MIB);
}

/* The host's change takes all pages away. */
static int call_refresh(void)
{
	char byte;

	host_shows_usual(0, RW);
	return pread(fd, &byte, 1, HUGE) == 1 ? 0 : -1;
}

static int call_refresh_by_mmap(void)
{
	host_shows_usual(0, RW);
	return call_mmap();
}

static int call_poll(void)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLPRI };

	host_shows_usual(0, RW);
	return poll(&poll_fd, 1, LONG) < 0 ? -1 : poll_fd.revents == POLLPRI ? 0 : -1;
}

static void take_event(void)
{
	CHECK_EQUAL(ranges_of(fd).state, KVMMEM_STATE_OPEN);
}

/*
 * Memory that is mapped into the kernel when it is used first: what lies beyond a multiple of 1 GiB. Little of it, as
 * KASAN allocates a page for each eight that are mapped.
 */
static void attach_lazy(void)
{
	if (fd >= 0)
		close(fd);
	fd = attached(LAZY, 0);
}

static int call_lazy_read(void)
{
	char byte;

	return pread(fd, &byte, 1, MIB) == 1 ? 0 : -1;
}

static int touch_lazy(void)
{
	char *p = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, MIB);
	int number;

	if (p == MAP_FAILED)
		return -1;
	number = signal_of_read(p);
	munmap(p, PAGE);
	return number;
}

static int call_seek(void)
{
	return lseek(fd, HUGE, SEEK_DATA) == (off_t)HUGE && lseek(fd, HUGE, SEEK_HOLE) > 0 ? 0 : -1;
}

static int call_region_open(void)
{
	return ioctl(fd, KVM_GUEST_MEM_OPEN, descriptor(ZERO)->uuid);
}

static void undo_region_open(void)
{
	close(fd);
	fd = device();
}

static int call_region_map(void)
{
	struct kvm_guest_mem_map region = { .token.token[0] = ZERO, .gpa = HUGE };

	return ioctl(fd, KVM_GUEST_MEM_MAP, &region);
}

static int call_region_unmap(void)
{
	return ioctl(fd, KVM_GUEST_MEM_UNMAP, HUGE);
}

static void undo_region_map(void)
{
	CHECK_EQUAL(call_region_unmap(), 0);
}

static void map_region_again(void)
{
	CHECK_EQUAL(call_region_map(), 0);
}

static void v1(void)
{
	CHECK(each_fails("open", call_open, close_file) > 0);
	first_maps();
	fd = device();
	CHECK_EQUAL(map(fd, own), 0);
	undo_map();
	CHECK(each_fails("v1's MAP", call_map, undo_map) > 0);
	map_again();
	each_fails("v1's UNMAP", call_unmap, map_again);
	close(fd);
	CHECK_EQUAL(counter("mapped"), 0);
}

static void views(void)
{
	long refused;

	fd = device();
	CHECK(each_fails("ATTACH", call_attach, undo_attach) > 0);
	attach_again();
	CHECK(each_fails("RANGES", call_ranges, nothing) > 0);
	each_fails("INFO and STATS", call_info, nothing);
	each_fails("DETACH", call_detach, attach_again);
	CHECK(each_fails("lseek", call_seek, nothing) > 0);
	CHECK(each_fails("a change that is read", call_refresh, nothing) > 0);
	each_fails("a change that is polled for", call_poll, take_event);
	CHECK(each_fails("a change that is mapped", call_refresh_by_mmap, undo_mmap) > 0);
	CHECK(each_fails("mmap", call_mmap, undo_mmap) > 0);
	CHECK_EQUAL(call_mmap(), 0);
	elsewhere = mmap(NULL, HUGE_SIZE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(each_fails("munmap", call_split, mmap_again) > 0);
	CHECK(each_fails("mprotect", call_protect, mmap_again) > 0);
	CHECK(each_fails("mremap", call_move, move_back) > 0);
	CHECK(each_fails("fork", call_fork, nothing) > 0);
	refused = counter("faults-refused");
	mmap_again();
	/* Nothing to allocate where the table above is there. */
	each_fails("a fault of a large page", touch_huge, mmap_again);
	undo_mmap();
	close(fd);
	CHECK_EQUAL(counter("faults-refused"), refused);
	munmap(elsewhere, HUGE_SIZE);
	CHECK_EQUAL(counter("views"), 0);
}

static void remap_small(void)
{
	munmap(area, 2 * MIB);
	CHECK(mmap(area, LOW_SIZE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, LOW) == area);
}

/* The only area in its 2 MiB, so that the table of its pages goes with it. */
static void small_faults(void)
{
	fd = attached(0, 0);
	area = mmap(NULL, 6 * MIB, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	area += -(unsigned long)area & (2 * MIB - 1);
	remap_small();
	CHECK(each_fails("a fault of a small page", touch_small, remap_small) > 0);
	close(fd);
	munmap(area, LOW_SIZE);
}

static void lazy(void)
{
	const struct kvmmem_window_range large = { 0, 2 * MIB, 0, 0, 0 };
	long refused = counter("faults-refused");

	host_shows(LAZY, RW, &large, 1);
	host_begins(LAZY);
	descriptor(LAZY)->window_gpa = NOWHERE + GIB - MIB;
	descriptor(LAZY)->window_len = 2 * MIB;
	host_ends(LAZY);
	fd = -1;
	attach_lazy();
	CHECK(each_fails("a read that maps", call_lazy_read, attach_lazy) > 0);
	CHECK(each_fails("a fault that maps", touch_lazy, attach_lazy) > 0);
	CHECK_EQUAL(counter("faults-refused"), refused);
	close(fd);
}

static void regions(void)
{
	fd = device();
	each_fails("the regions' OPEN", call_region_open, undo_region_open);
	CHECK_EQUAL(call_region_open(), 0);
	CHECK(each_fails("the regions' MAP", call_region_map, undo_region_map) > 0);
	map_region_again();
	each_fails("the regions' UNMAP", call_region_unmap, map_region_again);
	close(fd);
	CHECK_EQUAL(counter("views"), 0);
}

/* A file's first view. Without memory for the interrupt's handler it is polled. */
static int call_first_attach(void)
{
	if (call_open())
		return -1;
	if (!call_attach())
		return 0;
	close(fd);
	return -1;
}

static void undo_first_attach(void)
{
	host_shows_usual(0, RW);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI);
	close(fd);
}

void test_failing_interrupt(void)
{
	host_shows_usual(0, RW);
	if (can_inject())
		CHECK(each_fails("ATTACH with an interrupt", call_first_attach, undo_first_attach) > 0);
	CHECK_EQUAL(counter("views"), 0);
}

/* Also when the module is loaded: its own part of that. */
static int call_load(void)
{
	return load_module(LOAD_VIEWS);
}

static int call_load_driver(void)
{
	int result = load_module("");

	/* What the kernel says where it has no memory for the folder of a module's drivers. */
	if (errno == EINVAL)
		errno = ENOMEM;
	return result;
}

static void undo_load(void)
{
	CHECK_EQUAL(unload_module(), 0);
}

void test_failing_load(void)
{
	if (!can_inject())
		return;
	CHECK(each_fails_in_modules("finit_module", call_load, undo_load) > 0);
	CHECK(each_fails_in_modules("finit_module with the PCI driver", call_load_driver, undo_load) > 0);
}

void test_failing_allocations(void)
{
	long invalid = counter("invalid_answers"), quarantined = counter("views-quarantined"), before = pinned();

	if (!can_inject()) {
		puts("selftest: this kernel has no fault injection");
		return;
	}
	host_shows_usual(0, RW);
	host_shows_usual(ZERO, RW);
	own = pages(1);
	v1();
	views();
	small_faults();
	lazy();
	regions();
	RUN(last_close);
	RUN(last_breath);
	munmap(own, PAGE);
	CHECK_EQUAL(counter("invalid_answers"), invalid);
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(counter("views-quarantined"), quarantined);
	CHECK_EQUAL(pinned(), before);
}
