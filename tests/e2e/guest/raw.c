// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * kvmmem-raw: does to /dev/kvmmem what each command says, right or wrong.
 *
 * The scenarios drive it line by line over its standard input; each command is
 * answered by one line, "ok [VALUE]", "errno NAME" or "signal NAME". It uses kvmmem.h alone, as
 * a C tool would, and checks nothing: that is the driver's part.
 *
 *   open                       -> ok SLOT          open the device
 *   close SLOT                                     close it again
 *   page KIND                  -> ok ADDRESS       anon, shared, file, readonly, hole, stack
 *   pages COUNT                -> ok ADDRESS       COUNT anonymous pages in a row
 *   munmap ADDRESS                                 give one page back to the kernel
 *   remap ADDRESS                                  munmap, then a new anonymous page there
 *   map SLOT ADDRESS GPA T0 T1 T2 T3               KVM_INTRO_MEM_MAP
 *   unmap SLOT ADDRESS                             KVM_INTRO_MEM_UNMAP
 *   ioctl SLOT NUMBER ARGUMENT                     any other
 *   read ADDRESS               -> ok HEX           the first 48 bytes, one volatile byte at a time
 *   write ADDRESS VALUE                            one volatile u64
 *   child SLOT ADDRESS         -> ok ERRNO HEX     in a forked child: UNMAP's errno, then the bytes it sees
 *   orphan SLOT                                    forks a child that holds the file open until it is killed
 *   exec                                           starts this program anew in place, files kept open
 *   adopt FD                   -> ok SLOT          takes an inherited descriptor as a slot
 *   fd SLOT                    -> ok FD
 *   memlock BYTES                                  sets RLIMIT_MEMLOCK
 *   usage                      -> ok PINNED_KB     VmPin of this process
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kvmmem.h"

#define PAGE 4096UL
#define SLOTS 64
#define SHOWN 48

static int slots[SLOTS];

static void answer(long result)
{
	if (result < 0)
		printf("errno %s\n", strerrorname_np(errno));
	else
		printf("ok\n");
}

static void answer_value(uint64_t value)
{
	printf("ok %#lx\n", (unsigned long)value);
}

static int slot_fd(const char *word)
{
	unsigned long slot = strtoul(word, NULL, 0);

	return slot < SLOTS ? slots[slot] : -1;
}

static uint64_t number(const char *word)
{
	return strtoull(word, NULL, 0);
}

static long keep(int fd)
{
	for (int i = 0; i < SLOTS; i++) {
		if (slots[i] < 0) {
			slots[i] = fd;
			return i;
		}
	}
	errno = EMFILE;
	return -1;
}

static void *new_page(const char *kind, size_t count)
{
	int prot = PROT_READ | PROT_WRITE, flags = MAP_PRIVATE | MAP_ANONYMOUS, fd = -1;
	void *page;

	if (!strcmp(kind, "shared"))
		flags = MAP_SHARED | MAP_ANONYMOUS;
	if (!strcmp(kind, "file")) {
		/* Private and writable, but its pages come from the page cache. */
		flags = MAP_PRIVATE;
		fd = open("/proc/self/exe", O_RDONLY);
	}
	if (!strcmp(kind, "stack"))
		flags |= MAP_GROWSDOWN;
	page = mmap(NULL, count * PAGE, prot, flags, fd, 0);
	if (fd >= 0)
		close(fd);
	if (page == MAP_FAILED)
		return page;
	if (!strcmp(kind, "hole")) {
		munmap(page, count * PAGE);
		return page;
	}
	if (!strcmp(kind, "anon"))
		memset(page, 0xa5, count * PAGE);
	if (!strcmp(kind, "readonly"))
		mprotect(page, count * PAGE, PROT_READ);
	return page;
}

static sigjmp_buf escape;

static void on_signal(int number)
{
	siglongjmp(escape, number);
}

static void show(uint64_t address, const char *before)
{
	const volatile unsigned char *bytes = (const volatile unsigned char *)address;
	unsigned char seen[SHOWN];
	int number = sigsetjmp(escape, 1);

	if (number) {
		printf("signal SIG%s\n", sigabbrev_np(number));
		return;
	}
	for (int i = 0; i < SHOWN; i++)
		seen[i] = bytes[i];
	printf("ok %s", before);
	for (int i = 0; i < SHOWN; i++)
		printf("%02x", seen[i]);
	printf("\n");
}

static void child(int fd, uint64_t address)
{
	pid_t pid;

	fflush(stdout);
	pid = fork();
	if (pid == 0) {
		char before[32];
		long result = ioctl(fd, KVM_INTRO_MEM_UNMAP, address);

		snprintf(before, sizeof(before), "%s ", result < 0 ? strerrorname_np(errno) : "0");
		show(address, before);
		fflush(stdout);
		_exit(0);
	}
	waitpid(pid, NULL, 0);
}

static void usage(void)
{
	char line[256];
	unsigned long kb = 0;
	FILE *status = fopen("/proc/self/status", "r");

	while (status && fgets(line, sizeof(line), status))
		sscanf(line, "VmPin: %lu", &kb);
	if (status)
		fclose(status);
	answer_value(kb);
}

static void run(int argc, char **argv)
{
	const char *verb = argv[0];

	if (!strcmp(verb, "open")) {
		int fd = open("/dev/kvmmem", O_RDWR);
		long slot = fd < 0 ? -1 : keep(fd);

		if (slot < 0)
			answer(-1);
		else
			answer_value(slot);
	} else if (!strcmp(verb, "exec")) {
		char *args[] = { "kvmmem-raw", NULL };

		fflush(stdout);
		execv("/proc/self/exe", args);
		answer(-1);
	} else if (!strcmp(verb, "usage")) {
		usage();
	} else if (argc == 2 && !strcmp(verb, "close")) {
		unsigned long slot = number(argv[1]);

		answer(slot < SLOTS ? close(slots[slot]) : -1);
		if (slot < SLOTS)
			slots[slot] = -1;
	} else if (argc == 2 && !strcmp(verb, "page")) {
		void *page = new_page(argv[1], 1);

		if (page == MAP_FAILED)
			answer(-1);
		else
			answer_value((uint64_t)page);
	} else if (argc == 2 && !strcmp(verb, "pages")) {
		void *page = new_page("anon", number(argv[1]));

		if (page == MAP_FAILED)
			answer(-1);
		else
			answer_value((uint64_t)page);
	} else if (argc == 2 && !strcmp(verb, "munmap")) {
		answer(munmap((void *)number(argv[1]), PAGE));
	} else if (argc == 2 && !strcmp(verb, "remap")) {
		void *page = mmap((void *)number(argv[1]), PAGE, PROT_READ | PROT_WRITE,
				  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_POPULATE, -1, 0);

		answer(page == MAP_FAILED ? -1 : 0);
	} else if (argc == 8 && !strcmp(verb, "map")) {
		struct kvmi_mem_map map = { .gva = number(argv[2]), .gpa = number(argv[3]) };

		for (int i = 0; i < 4; i++)
			map.token.token[i] = number(argv[4 + i]);
		answer(ioctl(slot_fd(argv[1]), KVM_INTRO_MEM_MAP, &map));
	} else if (argc == 3 && !strcmp(verb, "unmap")) {
		answer(ioctl(slot_fd(argv[1]), KVM_INTRO_MEM_UNMAP, (unsigned long)number(argv[2])));
	} else if (argc == 4 && !strcmp(verb, "ioctl")) {
		answer(ioctl(slot_fd(argv[1]), (unsigned long)number(argv[2]), (unsigned long)number(argv[3])));
	} else if (argc == 2 && !strcmp(verb, "read")) {
		show(number(argv[1]), "");
	} else if (argc == 3 && !strcmp(verb, "write")) {
		*(volatile uint64_t *)number(argv[1]) = number(argv[2]);
		answer(0);
	} else if (argc == 3 && !strcmp(verb, "child")) {
		child(slot_fd(argv[1]), number(argv[2]));
	} else if (argc == 2 && !strcmp(verb, "orphan")) {
		fflush(stdout);
		if (fork() == 0) {
			/* Only the device stays open: the driver's pipes must not. */
			close(0);
			close(1);
			close(2);
			for (;;)
				pause();
		}
		answer(0);
	} else if (argc == 2 && !strcmp(verb, "adopt")) {
		long slot = keep((int)number(argv[1]));

		if (slot < 0)
			answer(-1);
		else
			answer_value(slot);
	} else if (argc == 2 && !strcmp(verb, "fd")) {
		answer_value(slot_fd(argv[1]));
	} else if (argc == 2 && !strcmp(verb, "memlock")) {
		struct rlimit limit = { number(argv[1]), number(argv[1]) };

		answer(setrlimit(RLIMIT_MEMLOCK, &limit));
	} else {
		printf("unknown command %s\n", verb);
	}
}

int main(void)
{
	char line[512];

	for (int i = 0; i < SLOTS; i++)
		slots[i] = -1;
	setvbuf(stdin, NULL, _IONBF, 0);
	signal(SIGBUS, on_signal);
	signal(SIGSEGV, on_signal);
	while (fgets(line, sizeof(line), stdin)) {
		char *argv[8];
		int argc = 0;

		for (char *word = strtok(line, " \n"); word && argc < 8; word = strtok(NULL, " \n"))
			argv[argc++] = word;
		if (argc == 0)
			continue;
		run(argc, argv);
		fflush(stdout);
	}
	return 0;
}
