// SPDX-License-Identifier: GPL-2.0-only
/* Opening the device, and the first MAP of a process, while signals keep coming. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include "selftest.h"

#define ROUNDS	2000

static volatile int caught;

static void count(int number)
{
	(void)number;
	caught++;
}

/* No call is interrupted: tools that were not written for that do not ask again. */
void test_opening(void)
{
	struct sigaction action = { .sa_handler = count };
	int opened = 0, mapped = 0, last = 0;
	char *p = pages(1);
	pid_t storm;

	sigaction(SIGUSR1, &action, NULL);
	storm = fork();
	if (!storm)
		for (;;)
			kill(getppid(), SIGUSR1);
	for (int i = 0; i < ROUNDS; i++) {
		int fd = open("/dev/kvmmem", O_RDWR);

		opened += fd >= 0;
		if (fd < 0 || map(fd, p))
			last = errno;
		else
			mapped++;
		close(fd);
	}
	kill(storm, SIGKILL);
	while (waitpid(storm, NULL, 0) < 0)
		;
	signal(SIGUSR1, SIG_IGN);
	CHECK(caught > 0);
	CHECK_EQUAL(opened, ROUNDS);
	CHECK_EQUAL(mapped, ROUNDS);
	CHECK_EQUAL(last, 0);
	munmap(p, PAGE);
}
