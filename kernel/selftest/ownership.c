// SPDX-License-Identifier: GPL-2.0-only
/* Files and processes: whose mapping is it, and when does it end. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "selftest.h"

#define TOOL_PAGES 100

static int inherited;
static char *inherited_page;

static void two_files(void)
{
	int a = device(), b = device();
	char *p = pages(8);

	for (int i = 0; i < 8; i++)
		CHECK_EQUAL(map(i % 2 ? a : b, p + i * PAGE), 0);
	CHECK_REFUSED(map(a, p), EALREADY);
	CHECK_EQUAL(unmap(a, p), 0);
	CHECK_EQUAL(fdinfo(a, "kvmmem-mapped"), 4);
	CHECK_EQUAL(fdinfo(b, "kvmmem-mapped"), 3);
	close(a);
	CHECK_EQUAL(counter("mapped"), 3);
	CHECK_REFUSED(unmap(b, p + PAGE), ENOENT);
	CHECK_EQUAL(unmap(b, p + 2 * PAGE), 0);
	CHECK_EQUAL(map(b, p + PAGE), 0);
	close(b);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(charged(), 0);
}

static void child_of_a_tool(void)
{
	int own;

	CHECK_REFUSED(map(inherited, inherited_page), EINVAL);
	CHECK_REFUSED(unmap(inherited, inherited_page), EINVAL);
	CHECK_EQUAL(*inherited_page, 42);
	own = device();
	CHECK_EQUAL(map(own, inherited_page), 0);
	CHECK_EQUAL(counter("mapped"), 2);
	close(inherited);
}

static void tool_forks(void)
{
	inherited = device();
	inherited_page = pages(1);
	CHECK_EQUAL(map(inherited, inherited_page), 0);
	*inherited_page = 42;
	in_child(child_of_a_tool);
	/* The child's mapping ended with it; this one did not. */
	CHECK_EQUAL(counter("mapped"), 1);
	CHECK_EQUAL(unmap(inherited, inherited_page), 0);
	close(inherited);
}

/* In the program that a tool executed, with the tool's file. */
void test_exec(int fd)
{
	char *page = pages(1);

	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_REFUSED(map(fd, page), EINVAL);
	CHECK_REFUSED(unmap(fd, page), EINVAL);
	CHECK_EQUAL(map(device(), page), 0);
}

static void tool_executes(const char *self)
{
	int status;
	pid_t tool = fork();

	if (!tool) {
		char *p = pages(2), number[12];
		int fd = device();

		map(fd, p);
		map(fd, p + PAGE);
		snprintf(number, sizeof(number), "%d", fd);
		execl(self, self, "exec", number, NULL);
		_exit(2);
	}
	waitpid(tool, &status, 0);
	CHECK_EQUAL(status, 0);
}

/* The tool is killed while another process holds its file. */
static void file_outlives_tool(void)
{
	int channel[2], theirs, ours, status, pid_fd;
	char *page = pages(1);
	pid_t tool;

	CHECK_EQUAL(pipe(channel), 0);
	tool = fork();
	if (!tool) {
		char *p = pages(TOOL_PAGES);
		int fd = device();

		for (int i = 0; i < TOOL_PAGES; i++)
			map(fd, p + i * PAGE);
		if (write(channel[1], &fd, sizeof(fd)) == sizeof(fd))
			pause();
		_exit(0);
	}
	CHECK_EQUAL(read(channel[0], &theirs, sizeof(theirs)), sizeof(theirs));
	pid_fd = syscall(SYS_pidfd_open, tool, 0);
	ours = syscall(SYS_pidfd_getfd, pid_fd, theirs, 0);
	CHECK(ours >= 0);
	CHECK_EQUAL(counter("mapped"), TOOL_PAGES);
	CHECK_REFUSED(map(ours, page), EINVAL);
	CHECK_REFUSED(unmap(ours, page), EINVAL);
	kill(tool, SIGKILL);
	waitpid(tool, &status, 0);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(fdinfo(ours, "kvmmem-mapped"), 0);
	CHECK_REFUSED(map(ours, page), EINVAL);
	CHECK_EQUAL(pinned(), 0);
	close(ours);
	close(pid_fd);
}

void test_ownership(const char *self)
{
	two_files();
	tool_forks();
	tool_executes(self);
	file_outlives_tool();
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(pinned(), 0);
}
