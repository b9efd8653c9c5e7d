// SPDX-License-Identifier: GPL-2.0-only
/* Several processes: who sees what, and what fork, exec, passing and death do with a view. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "host.h"

#define RO	KVMMEM_RIGHT_READ

static int shared;
static char *shared_pages;

static unsigned long read_number(int fd, unsigned long gpa)
{
	unsigned long number = 0;

	CHECK_EQUAL(pread(fd, &number, sizeof(number), gpa), sizeof(number));
	return number;
}

static void child_of_a_tool(void)
{
	/* The view belongs to the open file, which is the same one. */
	CHECK_EQUAL(*(unsigned long *)shared_pages, content(HUGE));
	CHECK_EQUAL(*(unsigned long *)(shared_pages + 4 * MIB), content(HUGE + 4 * MIB));
	CHECK_EQUAL(read_number(shared, LOW), content(LOW));
	CHECK_REFUSED(attach(shared, 0, 0), EISCONN);
	close(shared);
}

static void child_that_detaches(void)
{
	CHECK_EQUAL(ioctl(shared, KVMMEM_DETACH, 0), 0);
	CHECK_EQUAL(signal_of_read(shared_pages), SIGBUS);
}

static void tool_forks(void)
{
	shared = attached(0, 0);
	shared_pages = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, shared, HUGE);
	CHECK_EQUAL(*(unsigned long *)shared_pages, content(HUGE));
	in_child(child_of_a_tool);
	CHECK_EQUAL(counter("views"), 1);
	CHECK_EQUAL(*(unsigned long *)shared_pages, content(HUGE));
	in_child(child_that_detaches);
	CHECK_EQUAL(counter("views"), 0);
	CHECK_EQUAL(signal_of_read(shared_pages), SIGBUS);
	munmap(shared_pages, HUGE_SIZE);
	close(shared);
}

/* In the program that a tool executed, with the tool's file. */
void test_view_exec(int fd)
{
	CHECK_EQUAL(read_number(fd, HUGE), content(HUGE));
	CHECK_EQUAL(counter("views"), 1);
	close(fd);
	CHECK_EQUAL(counter("views"), 0);
}

static void tool_executes(const char *self)
{
	int status;
	pid_t tool = fork();

	if (!tool) {
		char number[12];
		int fd = attached(0, 0);
		char *p = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, fd, HUGE);

		CHECK_EQUAL(*p, *window(HUGE_AT));
		snprintf(number, sizeof(number), "%d", fd);
		execl(self, self, "view", number, NULL);
		_exit(2);
	}
	waitpid(tool, &status, 0);
	CHECK_EQUAL(status, 0);
	CHECK_EQUAL(counter("views"), 0);
}

/* Another process holds the file of one that was killed; the view lives on with it. */
static void file_outlives_tool(void)
{
	int channel[2], theirs, ours, pid_fd;
	pid_t tool;

	CHECK_EQUAL(pipe(channel), 0);
	tool = fork();
	if (!tool) {
		int fd = attached(0, 0);

		if (write(channel[1], &fd, sizeof(fd)) == sizeof(fd))
			pause();
		_exit(0);
	}
	CHECK_EQUAL(read(channel[0], &theirs, sizeof(theirs)), sizeof(theirs));
	pid_fd = syscall(SYS_pidfd_open, tool, 0);
	ours = syscall(SYS_pidfd_getfd, pid_fd, theirs, 0);
	kill(tool, SIGKILL);
	waitpid(tool, NULL, 0);
	CHECK_EQUAL(read_number(ours, HUGE), content(HUGE));
	CHECK_EQUAL(counter("views"), 1);
	close(ours);
	CHECK_EQUAL(counter("views"), 0);
	close(pid_fd);
}

/* Two grants in one window: each file sees the ranges of its own. */
static void own_ranges_only(void)
{
	const struct kvmmem_window_range low = { LOW, LOW_SIZE, LOW_AT, 0, 0 }, huge = { HUGE, HUGE_SIZE, HUGE_AT, 0, 0 };
	int a, b;
	char byte, *p;

	host_shows(3, RO, &low, 1);
	host_shows(4, RO, &huge, 1);
	a = attached(3, 0);
	b = attached(4, 0);
	CHECK_EQUAL(read_number(a, LOW), content(LOW));
	CHECK_EQUAL(pread(a, &byte, 1, HUGE), 0);
	CHECK_EQUAL(read_number(b, HUGE), content(HUGE));
	CHECK_REFUSED(pread(b, &byte, 1, LOW), ENXIO);
	/* A change of one view takes pages of the other, which come back. */
	p = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, b, HUGE);
	CHECK_EQUAL(*(unsigned long *)p, content(HUGE));
	host_sets_state(3, KVMMEM_STATE_REVOKED);
	CHECK_REFUSED(pread(a, &byte, 1, LOW), EKEYREVOKED);
	CHECK_EQUAL(*(unsigned long *)p, content(HUGE));
	CHECK_EQUAL(polled(b, 0), 1);
	munmap(p, HUGE_SIZE);
	close(a);
	close(b);
}

static void killed_tool(void)
{
	pid_t tool = fork();

	if (!tool) {
		for (int i = 0; i < 8; i++) {
			char *p = mmap(NULL, HUGE_SIZE, PROT_READ, MAP_SHARED, attached(0, 0), HUGE);

			CHECK_EQUAL(*p, *window(HUGE_AT));
		}
		kill(getpid(), SIGKILL);
	}
	waitpid(tool, NULL, 0);
	CHECK_EQUAL(counter("views"), 0);
}

void test_sharing(const char *self)
{
	host_shows_usual(0, RO);
	tool_forks();
	tool_executes(self);
	file_outlives_tool();
	own_ranges_only();
	killed_tool();
}
