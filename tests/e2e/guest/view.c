// SPDX-License-Identifier: Apache-2.0 OR MIT
/*
 * kvmmem-view: does to a view on /dev/kvmmem what each command says, right or wrong.
 *
 * Driven like kvmmem-raw, line by line; each command is answered by one line: "ok [VALUES]", "errno NAME", or
 * "signal NAME" where a load or a store raised one. It uses kvmmem.h and POSIX alone, and checks nothing.
 *
 *   open                        -> ok SLOT
 *   close SLOT
 *   adopt FD                    -> ok SLOT        takes an inherited descriptor as a slot
 *   fd SLOT                     -> ok FD
 *   info SLOT                   -> ok VERSION FEATURES MAX_RANGES EVENT_MS
 *   attach SLOT FLAGS T0 T1 T2 T3
 *   ranges SLOT                 -> ok GENERATION STATE RIGHTS UUID COUNT GPA+LEN,...
 *   detach SLOT
 *   stats SLOT                  -> ok 4K 2M 1G REFUSED READ WRITTEN EVENTS
 *   mmap SLOT GPA LEN r|rw shared|private          -> ok ADDRESS
 *   munmap ADDRESS LEN
 *   mprotect ADDRESS LEN r|rw
 *   load ADDRESS COUNT          -> ok HEX         volatile bytes
 *   touch ADDRESS LEN STEP      -> ok BYTES       one load each STEP bytes
 *   store ADDRESS VALUE                           one volatile u64
 *   spin ADDRESS MS [MOST]      -> ok CHANGES     loads a u64 over and over, until it has changed so often
 *   pread SLOT GPA COUNT        -> ok HEX
 *   pwrite SLOT GPA HEX         -> ok COUNT
 *   seek SLOT OFFSET set|end|data|hole             -> ok OFFSET
 *   poll SLOT MS                -> ok EVENTS MICROSECONDS
 *   fork COMMAND...             -> what a forked child answers
 *   announce COMMAND...         -> ok, then what the command answers
 *   hold                                          forks a child that holds what it has until it is killed
 *   exec                                          starts this program anew in place, files kept open
 *   region SLOT open UUID | map GPA T0 T1 T2 T3 -> ok GPA LEN | unmap GPA        libkvmi's calls
 *   fdinfo SLOT NAME            -> ok VALUE
 *   poke GPA TARGET_GPA VALUE COUNT               writes a view's window through /dev/mem COUNT times, each right after
 *                                                 a page fault, with any rights: GPA is its descriptor's page
 *   ask PORT ro|rw TOKEN        -> ok SLOT TICKET has the host open a view; it lasts until the slot is closed
 *   first PORT TOKEN GPA        -> ok MICROSECONDS    open, attach and 8 bytes of pread, and ends it all
 *   bars                        -> ok COUNT BYTES     the windows that came as PCI devices
 *   barwrite OFFSET VALUE       -> ok COUNT       takes each window from the driver and stores a u64 into it, right
 *                                                 after page faults
 *   write PATH TEXT             -> ok
 *   reboot                                        restarts the machine, as root
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "devices.h"
#include "kvmmem.h"

#define PAGE 4096UL
#define SLOTS 64
#define MOST 65536
#define WORDS 10

static int slots[SLOTS];
static sigjmp_buf landing;
static unsigned char buffer[MOST];

static void caught(int signal)
{
	siglongjmp(landing, signal);
}

static void answer(long result)
{
	if (result < 0)
		printf("errno %s\n", strerrorname_np(errno));
	else
		printf("ok\n");
}

static void answer_value(long value)
{
	if (value < 0)
		printf("errno %s\n", strerrorname_np(errno));
	else
		printf("ok 0x%lx\n", (unsigned long)value);
}

static void answer_bytes(const unsigned char *bytes, long count)
{
	if (count < 0) {
		answer(count);
		return;
	}
	printf("ok ");
	for (long i = 0; i < count; i++)
		printf("%02x", bytes[i]);
	printf("\n");
}

static uint64_t number(const char *word)
{
	return strtoull(word, NULL, 0);
}

static int fd_of(const char *word)
{
	unsigned long slot = number(word);

	return slot < SLOTS ? slots[slot] : -1;
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

static size_t bytes_of(const char *hex, unsigned char *bytes, size_t most)
{
	size_t count = 0;
	unsigned byte;

	while (count < most && sscanf(hex + 2 * count, "%2x", &byte) == 1)
		bytes[count++] = byte;
	return count;
}

static int protection(const char *word)
{
	return strcmp(word, "rw") ? PROT_READ : PROT_READ | PROT_WRITE;
}

static long micros(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static void ranges(int fd)
{
	struct kvmmem_range room[64];
	struct kvmmem_ranges ask = { .capacity = 64, .ranges = (uintptr_t)room };

	if (ioctl(fd, KVMMEM_RANGES, &ask) < 0) {
		answer(-1);
		return;
	}
	printf("ok %llu %u %u ", (unsigned long long)ask.generation, ask.state, ask.rights);
	for (int i = 0; i < 16; i++)
		printf("%02x", ask.uuid[i]);
	printf(" %u ", ask.count);
	for (unsigned i = 0; i < ask.count && i < 64; i++)
		printf("0x%llx+0x%llx,", (unsigned long long)room[i].gpa, (unsigned long long)room[i].len);
	printf("\n");
}

static void memory(int argc, char **argv)
{
	volatile unsigned char *at = (volatile unsigned char *)number(argv[1]);
	uint64_t argument = number(argv[2]);

	if (!strcmp(argv[0], "load")) {
		for (uint64_t i = 0; i < argument && i < MOST; i++)
			buffer[i] = at[i];
		answer_bytes(buffer, argument < MOST ? argument : MOST);
	} else if (!strcmp(argv[0], "touch")) {
		uint64_t step = number(argv[3]), sum = 0;

		for (uint64_t i = 0; i < argument; i += step ? step : PAGE)
			sum += at[i] | 1;
		answer_value(sum != 0 ? argument : 0);
	} else if (!strcmp(argv[0], "store")) {
		*(volatile uint64_t *)at = argument;
		answer(0);
	} else {
		uint64_t last = *(volatile uint64_t *)at, changes = 0, most = argc == 4 ? number(argv[3]) : UINT64_MAX;
		long end = micros() + argument * 1000;

		while (micros() < end && changes < most) {
			uint64_t seen = *(volatile uint64_t *)at;

			changes += seen != last;
			last = seen;
		}
		answer_value(changes);
	}
}

static void region(int argc, char **argv)
{
	int fd = fd_of(argv[1]);

	if (argc == 4 && !strcmp(argv[2], "open")) {
		bytes_of(argv[3], buffer, 16);
		answer(ioctl(fd, KVM_GUEST_MEM_OPEN, buffer));
	} else if (argc == 8 && !strcmp(argv[2], "map")) {
		struct kvm_guest_mem_map map = { .gpa = number(argv[3]) };

		for (int i = 0; i < 4; i++)
			map.token.token[i] = number(argv[4 + i]);
		if (ioctl(fd, KVM_GUEST_MEM_MAP, &map) < 0)
			answer(-1);
		else
			printf("ok 0x%llx 0x%llx\n", (unsigned long long)map.gpa, (unsigned long long)map.length);
	} else if (argc == 4 && !strcmp(argv[2], "unmap")) {
		answer(ioctl(fd, KVM_GUEST_MEM_UNMAP, (unsigned long)number(argv[3])));
	} else {
		printf("unknown region call\n");
	}
}

static void fdinfo(int fd, const char *name)
{
	char path[64], line[256];
	FILE *info;

	snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fd);
	info = fopen(path, "r");
	while (info && fgets(line, sizeof(line), info)) {
		size_t length = strlen(name);

		if (!strncmp(line, name, length) && line[length] == ':') {
			printf("ok %s\n", strtok(line + length + 1, " \t\n"));
			fclose(info);
			return;
		}
	}
	if (info)
		fclose(info);
	errno = ENODATA;
	answer(-1);
}

static volatile void *physical(int fd, uint64_t gpa, int prot)
{
	return mmap(NULL, PAGE, prot, MAP_SHARED, fd, gpa & ~(PAGE - 1));
}

static void poke(uint64_t page, uint64_t target, uint64_t value, unsigned long count)
{
	int fd = open("/dev/mem", O_RDWR);
	volatile struct kvmmem_descriptor *descriptor = MAP_FAILED;
	volatile uint64_t *at = MAP_FAILED;

	if (fd >= 0)
		descriptor = physical(fd, page, PROT_READ);
	errno = descriptor == MAP_FAILED ? errno : ENXIO;
	for (unsigned i = 0; descriptor != MAP_FAILED && i < descriptor->range_count; i++) {
		volatile struct kvmmem_window_range *range = &descriptor->ranges[i];

		if (target >= range->gpa && target - range->gpa < range->len)
			at = physical(fd, descriptor->window_gpa + range->offset + (target - range->gpa),
				      PROT_READ | PROT_WRITE);
	}
	if (at == MAP_FAILED) {
		answer(-1);
		return;
	}
	answer(store_after_fault(&at[target % PAGE / 8], value, count));
	munmap((void *)at, PAGE);
	munmap((void *)descriptor, PAGE);
	close(fd);
}

static void run(int argc, char **argv)
{
	const char *verb = argv[0];
	int fd = argc > 1 ? fd_of(argv[1]) : -1;

	if (!strcmp(verb, "open")) {
		int new = open("/dev/kvmmem", O_RDWR);

		answer_value(new < 0 ? -1 : keep(new));
	} else if (!strcmp(verb, "exec")) {
		char *args[] = { "kvmmem-view", NULL };

		fflush(stdout);
		execv("/proc/self/exe", args);
		answer(-1);
	} else if (argc == 2 && !strcmp(verb, "close")) {
		unsigned long slot = number(argv[1]);

		answer(close(fd));
		if (slot < SLOTS)
			slots[slot] = -1;
	} else if (argc == 2 && !strcmp(verb, "adopt")) {
		answer_value(keep((int)number(argv[1])));
	} else if (argc == 2 && !strcmp(verb, "fd")) {
		answer_value(fd);
	} else if (argc == 2 && !strcmp(verb, "info")) {
		struct kvmmem_info info;

		if (ioctl(fd, KVMMEM_INFO, &info) < 0)
			answer(-1);
		else
			printf("ok %u %#x %u %u\n", info.version, info.features, info.max_ranges, info.event_ms);
	} else if (argc == 7 && !strcmp(verb, "attach")) {
		struct kvmmem_attach attach = { .flags = number(argv[2]) };

		for (int i = 0; i < 4; i++)
			attach.token.token[i] = number(argv[3 + i]);
		answer(ioctl(fd, KVMMEM_ATTACH, &attach));
	} else if (argc == 2 && !strcmp(verb, "ranges")) {
		ranges(fd);
	} else if (argc == 2 && !strcmp(verb, "detach")) {
		answer(ioctl(fd, KVMMEM_DETACH));
	} else if (argc == 2 && !strcmp(verb, "stats")) {
		struct kvmmem_stats s;

		if (ioctl(fd, KVMMEM_STATS, &s) < 0)
			answer(-1);
		else
			printf("ok %llu %llu %llu %llu %llu %llu %llu\n", (unsigned long long)s.faults_4k,
			       (unsigned long long)s.faults_2m, (unsigned long long)s.faults_1g,
			       (unsigned long long)s.faults_refused, (unsigned long long)s.read_bytes,
			       (unsigned long long)s.written_bytes, (unsigned long long)s.events);
	} else if (argc == 6 && !strcmp(verb, "mmap")) {
		int flags = strcmp(argv[5], "private") ? MAP_SHARED : MAP_PRIVATE;
		void *at = mmap(NULL, number(argv[3]), protection(argv[4]), flags, fd, number(argv[2]));

		answer_value(at == MAP_FAILED ? -1 : (long)at);
	} else if (argc == 3 && !strcmp(verb, "munmap")) {
		answer(munmap((void *)number(argv[1]), number(argv[2])));
	} else if (argc == 4 && !strcmp(verb, "mprotect")) {
		answer(mprotect((void *)number(argv[1]), number(argv[2]), protection(argv[3])));
	} else if ((argc == 3 && (!strcmp(verb, "load") || !strcmp(verb, "store") || !strcmp(verb, "spin"))) ||
		   (argc == 4 && (!strcmp(verb, "touch") || !strcmp(verb, "spin")))) {
		int signal = sigsetjmp(landing, 1);

		if (signal)
			printf("signal SIG%s\n", sigabbrev_np(signal));
		else
			memory(argc, argv);
	} else if (argc == 4 && !strcmp(verb, "pread")) {
		uint64_t count = number(argv[3]);

		answer_bytes(buffer, pread(fd, buffer, count < MOST ? count : MOST, number(argv[2])));
	} else if (argc == 4 && !strcmp(verb, "pwrite")) {
		size_t count = bytes_of(argv[3], buffer, MOST);

		answer_value(pwrite(fd, buffer, count, number(argv[2])));
	} else if (argc == 4 && !strcmp(verb, "seek")) {
		int whence = !strcmp(argv[3], "data") ? SEEK_DATA : !strcmp(argv[3], "hole") ? SEEK_HOLE :
			     !strcmp(argv[3], "end") ? SEEK_END : SEEK_SET;

		answer_value(lseek(fd, number(argv[2]), whence));
	} else if (argc == 3 && !strcmp(verb, "poll")) {
		struct pollfd ask = { .fd = fd, .events = POLLPRI };
		long start = micros();
		int result = poll(&ask, 1, (int)number(argv[2]));

		if (result < 0)
			answer(-1);
		else
			printf("ok %s%s%s%s%ld\n", ask.revents & POLLPRI ? "pri " : "", ask.revents & POLLHUP ? "hup " : "",
			       ask.revents & POLLERR ? "err " : "", ask.revents ? "" : "none ", micros() - start);
	} else if (argc >= 2 && !strcmp(verb, "fork")) {
		fflush(stdout);
		if (fork() == 0) {
			run(argc - 1, argv + 1);
			fflush(stdout);
			_exit(0);
		}
		wait(NULL);
	} else if (argc == 1 && !strcmp(verb, "hold")) {
		fflush(stdout);
		if (fork() == 0) {
			/* Only what is tested stays open: the driver's pipes must not. */
			for (int fd = 0; fd < 3; fd++)
				close(fd);
			for (;;)
				pause();
		}
		answer(0);
	} else if (argc >= 2 && !strcmp(verb, "announce")) {
		answer(0);
		fflush(stdout);
		run(argc - 1, argv + 1);
	} else if (argc >= 4 && !strcmp(verb, "region")) {
		region(argc, argv);
	} else if (argc == 3 && !strcmp(verb, "fdinfo")) {
		fdinfo(fd, argv[2]);
	} else if (argc == 5 && !strcmp(verb, "poke")) {
		poke(number(argv[1]), number(argv[2]), number(argv[3]), number(argv[4]));
	} else if (argc == 4 && !strcmp(verb, "ask")) {
		const char *words;
		char ticket[65] = "";
		int connection = guest_endpoint_open(number(argv[1]), !strcmp(argv[2], "ro"), argv[3], ticket, &words);
		long slot = connection < 0 ? -1 : keep(connection);

		if (slot >= 0)
			printf("ok 0x%lx %s\n", (unsigned long)slot, ticket);
		else
			printf("errno %s\n", words ? words : strerrorname_np(errno));
	} else if (argc == 4 && !strcmp(verb, "first")) {
		first(number(argv[1]), argv[2], number(argv[3]));
	} else if (argc == 1 && !strcmp(verb, "bars")) {
		bars(0, 0, 0);
	} else if (argc == 3 && !strcmp(verb, "barwrite")) {
		bars(1, number(argv[1]), number(argv[2]));
	} else if (argc == 3 && !strcmp(verb, "write")) {
		answer(put(argv[1], argv[2]));
	} else if (argc == 1 && !strcmp(verb, "reboot")) {
		answer(reboot(RB_AUTOBOOT));
	} else {
		printf("unknown command %s\n", verb);
	}
}

int main(void)
{
	struct sigaction action = { .sa_handler = caught };
	static char line[4096];

	sigaction(SIGBUS, &action, NULL);
	sigaction(SIGSEGV, &action, NULL);
	for (int i = 0; i < SLOTS; i++)
		slots[i] = -1;
	setvbuf(stdin, NULL, _IONBF, 0);
	while (fgets(line, sizeof(line), stdin)) {
		char *argv[WORDS];
		int argc = 0;

		for (char *word = strtok(line, " \n"); word && argc < WORDS; word = strtok(NULL, " \n"))
			argv[argc++] = word;
		if (argc == 0)
			continue;
		run(argc, argv);
		fflush(stdout);
	}
	return 0;
}
