// SPDX-License-Identifier: GPL-2.0-only
/* A tool of the random storm: one operation after another. Calls may fail; what is read is the target's. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"
#include "random_storm.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif
#define AREAS		4
#define AREA_PAGES	2048
#define OWN_PAGES	32
/* Operations of a child. */
#define CHILD		40
/* Where in a page tools write: the number at its beginning says which one it is. */
#define SCRATCH		128

static struct storm *storm;
static unsigned long state;
static char *areas[AREAS], *own;
static int is_child;
static pid_t earlier;
static sigjmp_buf back;

static unsigned int dice(unsigned int limit)
{
	return below(&state, limit);
}

static int a_file(void)
{
	return FILES_FD + dice(FILES);
}

static char *a_page(void)
{
	return areas[dice(AREAS)] + dice(AREA_PAGES) * PAGE;
}

static unsigned long an_address(void)
{
	int place = dice(2);

	return storm->places[place].gpa + dice(storm->places[place].size / PAGE) * PAGE;
}

static char *an_own_page(void)
{
	return own + dice(OWN_PAGES) * PAGE;
}

static void jump_back(int number)
{
	siglongjmp(back, number);
}

/* What stands at the beginning of a target's page is a multiple of its size. */
static void look_at(unsigned long number)
{
	if (number % PAGE)
		__atomic_add_fetch(&storm->wrong, 1, __ATOMIC_RELAXED);
}

static void open_file(void)
{
	int fd = open("/dev/kvmmem", O_RDWR);

	if (fd >= 0) {
		dup2(fd, a_file());
		close(fd);
	}
}

static void attach_file(void)
{
	attach(a_file(), dice(storm->tokens), dice(4) == 0);
}

static void detach_file(void)
{
	ioctl(a_file(), KVMMEM_DETACH, 0);
}

static void map_page(void)
{
	map(a_file(), an_own_page());
}

static void unmap_page(void)
{
	unmap(a_file(), an_own_page());
}

static void renew_page(void)
{
	char *p = an_own_page();

	if (dice(2))
		madvise(p, PAGE, MADV_DONTNEED);
	else
		mmap(p, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
}

static void open_regions(void)
{
	unsigned char uuid[16];

	memset(uuid, storm->uuid + dice(storm->tokens), sizeof(uuid));
	ioctl(a_file(), KVM_GUEST_MEM_OPEN, uuid);
}

static void map_region(void)
{
	struct kvm_guest_mem_map region = { .token.token[0] = dice(storm->tokens), .gpa = an_address() };

	ioctl(a_file(), KVM_GUEST_MEM_MAP, &region);
}

static void unmap_region(void)
{
	ioctl(a_file(), KVM_GUEST_MEM_UNMAP, storm->places[dice(2)].gpa);
}

static void map_area(void)
{
	int place = dice(2), protection = PROT_READ | (dice(2) ? PROT_WRITE : 0);

	mmap(areas[dice(AREAS)], storm->places[place].size, protection, MAP_SHARED | MAP_FIXED | (dice(8) ? 0 : MAP_POPULATE),
	     a_file(), storm->places[place].gpa);
}

static void unmap_part(void)
{
	munmap(a_page(), (1 + dice(16)) * PAGE);
}

static void move_part(void)
{
	unsigned long len = dice(4) ? PAGE * AREA_PAGES : PAGE * (1 + dice(16));
	int from = dice(AREAS), to = (from + 1 + dice(AREAS - 1)) % AREAS;

	mremap(areas[from], len, len, MREMAP_MAYMOVE | MREMAP_FIXED, areas[to]);
}

static void advise(void)
{
	static const int advice[] = {
		MADV_DONTNEED, MADV_DONTFORK, MADV_DOFORK, MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_COLD, MADV_PAGEOUT,
		MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_WILLNEED, MADV_FREE, MADV_MERGEABLE, MADV_UNMERGEABLE,
		MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_COLLAPSE,
	};
	int which = advice[dice(sizeof(advice) / sizeof(*advice))];

	if (dice(2))
		madvise(a_page(), (1 + dice(600)) * PAGE, which);
	else
		madvise(an_own_page(), PAGE, which);
}

static void protect(void)
{
	mprotect(a_page(), (1 + dice(16)) * PAGE, dice(2) ? PROT_READ : PROT_READ | PROT_WRITE);
}

static void lock(void)
{
	if (dice(2))
		mlock(a_page(), (1 + dice(4)) * PAGE);
	else
		munlock(a_page(), (1 + dice(64)) * PAGE);
}

static void touch(void)
{
	char *p = a_page();
	int is_write = dice(3) == 0;

	if (sigsetjmp(back, 1))
		return;
	if (is_write)
		*(volatile char *)(p + SCRATCH) = 1;
	else
		look_at(*(volatile unsigned long *)p);
}

static void touch_own(void)
{
	if (!sigsetjmp(back, 1))
		*(volatile char *)(an_own_page() + SCRATCH) = 1;
}

static void copy_out(void)
{
	unsigned long buffer[3 * PAGE / 8] = {};
	ssize_t count = pread(a_file(), buffer, sizeof(buffer), an_address());

	for (ssize_t at = 0; at + 8 <= count; at += PAGE)
		look_at(buffer[at / 8]);
	if (count > (ssize_t)sizeof(buffer))
		look_at(1);
}

static void copy_in(void)
{
	char buffer[300] = {};

	(void)!pwrite(a_file(), buffer, sizeof(buffer), an_address() + SCRATCH);
}

/* From one place of a target to another, through mappings of this device or none. */
static void copy_across(void)
{
	if (dice(2))
		(void)!pread(a_file(), a_page(), (1 + dice(40)) * PAGE, an_address());
	else
		(void)!pwrite(a_file(), a_page(), (1 + dice(40)) * PAGE, an_address());
}

static void seek(void)
{
	lseek(a_file(), an_address(), dice(6));
}

static void wait_for_change(void)
{
	struct pollfd poll_fd = { .fd = a_file(), .events = POLLPRI | POLLIN * dice(2) };

	poll(&poll_fd, 1, dice(6));
}

static void ask(void)
{
	static struct kvmmem_range room[4];
	struct kvmmem_ranges ranges = { .capacity = dice(5), .ranges = (unsigned long)room };
	struct kvmmem_info info;
	struct kvmmem_stats stats;
	int fd = a_file();

	ioctl(fd, KVMMEM_RANGES, &ranges);
	ioctl(fd, KVMMEM_INFO, &info);
	ioctl(fd, KVMMEM_STATS, &stats);
	fdinfo(fd, "kvmmem-mapped");
}

void open_channel(void)
{
	int ends[2];

	CHECK_EQUAL(socketpair(AF_UNIX, SOCK_DGRAM, 0, ends), 0);
	dup2(ends[0], SEND_FD);
	dup2(ends[1], RECEIVE_FD);
	close(ends[0]);
	close(ends[1]);
}

static void send_file(void)
{
	int fd = a_file();
	char byte = 0, room[CMSG_SPACE(sizeof(fd))] = {};
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };
	struct cmsghdr *control = CMSG_FIRSTHDR(&message);

	control->cmsg_level = SOL_SOCKET;
	control->cmsg_type = SCM_RIGHTS;
	control->cmsg_len = CMSG_LEN(sizeof(fd));
	memcpy(CMSG_DATA(control), &fd, sizeof(fd));
	sendmsg(SEND_FD, &message, MSG_DONTWAIT);
}

static void receive_file(void)
{
	int fd = -1;
	char byte, room[CMSG_SPACE(sizeof(fd))] = {};
	struct iovec part = { &byte, 1 };
	struct msghdr message = { .msg_iov = &part, .msg_iovlen = 1, .msg_control = room, .msg_controllen = sizeof(room) };
	struct cmsghdr *control;

	if (recvmsg(RECEIVE_FD, &message, MSG_DONTWAIT) < 0)
		return;
	control = CMSG_FIRSTHDR(&message);
	if (!control)
		return;
	memcpy(&fd, CMSG_DATA(control), sizeof(fd));
	dup2(fd, a_file());
	close(fd);
}

static void one_operation(void);

static void fork_child(void)
{
	pid_t child;

	if (is_child)
		return;
	if (earlier > 0)
		waitpid(earlier, NULL, 0);
	earlier = 0;
	child = fork();
	if (!child) {
		is_child = 1;
		for (int i = dice(CHILD); i && !__atomic_load_n(&storm->stopping, __ATOMIC_RELAXED); i--)
			one_operation();
		_exit(0);
	}
	if (dice(2))
		earlier = child;
	else if (child > 0)
		waitpid(child, NULL, 0);
}

static void execute(void)
{
	char seed[24];

	if (is_child)
		return;
	if (earlier > 0)
		waitpid(earlier, NULL, 0);
	earlier = 0;
	snprintf(seed, sizeof(seed), "%lu", state);
	execl("/init", "/init", "storm", seed, NULL);
}

static const struct { void (*run)(void); int weight; } operations[] = {
	{ open_file, 4 }, { attach_file, 16 }, { detach_file, 3 }, { map_page, 12 }, { unmap_page, 10 }, { renew_page, 4 },
	{ open_regions, 3 }, { map_region, 6 }, { unmap_region, 4 }, { map_area, 20 }, { unmap_part, 6 }, { move_part, 6 },
	{ advise, 8 }, { protect, 4 }, { lock, 3 }, { touch, 60 }, { touch_own, 10 }, { copy_out, 10 }, { copy_in, 5 },
	{ copy_across, 5 }, { seek, 4 }, { wait_for_change, 4 }, { ask, 3 }, { send_file, 4 }, { receive_file, 4 },
	{ fork_child, 2 }, { execute, 1 },
};

static void one_operation(void)
{
	int count = sizeof(operations) / sizeof(*operations), all = 0, at = 0, left;

	for (int i = 0; i < count; i++)
		all += operations[i].weight;
	for (left = dice(all); left >= operations[at].weight; at++)
		left -= operations[at].weight;
	operations[at].run();
	__atomic_add_fetch(&storm->operations, 1, __ATOMIC_RELAXED);
}

void run_random_tool(struct storm *common, unsigned long seed)
{
	struct sigaction action = { .sa_handler = jump_back };

	storm = common;
	state = seed;
	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	own = pages(OWN_PAGES);
	for (int i = 0; i < AREAS; i++) {
		areas[i] = mmap(NULL, (AREA_PAGES + HUGE_SIZE / PAGE) * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		areas[i] += -(unsigned long)areas[i] & (2 * MIB - 1);
	}
	while (!__atomic_load_n(&storm->stopping, __ATOMIC_RELAXED))
		one_operation();
	_exit(0);
}
