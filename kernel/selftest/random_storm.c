// SPDX-License-Identifier: GPL-2.0-only
/* The random storm: keeps tools running, kills some, and plays their host. */
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "plug.h"
#include "random_storm.h"

#define RO	KVMMEM_RIGHT_READ
#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)
#define TOOLS	5
/* Of each storm, where no minutes are asked for. */
#define SECONDS	3

static struct storm *storm;
static unsigned long host_state;
static pid_t tools[TOOLS];
static int started, killed;

/* xorshift64* */
unsigned int below(unsigned long *state, unsigned int limit)
{
	*state ^= *state >> 12;
	*state ^= *state << 25;
	*state ^= *state >> 27;
	return (*state * 0x2545f4914f6cdd1dUL >> 32) % limit;
}

/* splitmix64, never 0 */
unsigned long seeded(unsigned long seed, unsigned long number)
{
	unsigned long z = seed + (number + 1) * 0x9e3779b97f4a7c15UL;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9UL;
	z = (z ^ z >> 27) * 0x94d049bb133111ebUL;
	return (z ^ z >> 31) | 1;
}

static unsigned long option(const char *name, unsigned long otherwise)
{
	const char *text = getenv(name);

	return text ? strtoul(text, NULL, 10) : otherwise;
}

static unsigned int dice(unsigned int limit)
{
	return below(&host_state, limit);
}

static struct storm *map_common(void)
{
	return mmap(NULL, sizeof(*storm), PROT_READ | PROT_WRITE, MAP_SHARED, COMMON_FD, 0);
}

void storm_after_exec(const char *seed)
{
	run_random_tool(map_common(), strtoul(seed, NULL, 10));
}

static void start_tool(int i, unsigned long seed)
{
	tools[i] = fork();
	if (!tools[i])
		run_random_tool(storm, seeded(seed, started));
	started++;
}

static void replace_ended(unsigned long seed)
{
	int status;
	pid_t ended;

	while ((ended = waitpid(-1, &status, WNOHANG)) > 0) {
		/* None by a signal but the one that is sent here. */
		CHECK(WIFEXITED(status) || WTERMSIG(status) == SIGKILL);
		for (int i = 0; i < TOOLS; i++)
			if (tools[i] == ended)
				start_tool(i, seed);
	}
}

static void begin(void)
{
	int fd = memfd_create("storm", 0);

	CHECK(fd >= 0 && !ftruncate(fd, sizeof(*storm)));
	dup2(fd, COMMON_FD);
	close(fd);
	storm = map_common();
	open_channel();
	/* Children of tools that are killed come here. */
	prctl(PR_SET_CHILD_SUBREAPER, 1);
}

static void end(void)
{
	__atomic_store_n(&storm->stopping, 1, __ATOMIC_RELAXED);
	while (wait(NULL) > 0)
		;
	/* With files that were sent and not received. */
	for (int fd = COMMON_FD; fd <= RECEIVE_FD; fd++)
		close(fd);
	CHECK_EQUAL(storm->wrong, 0);
	CHECK(storm->operations > 0);
	CHECK(WITHIN(!counter("mapped")));
	CHECK(WITHIN(!counter("views")));
}

static void rage(const char *name, void (*host)(void))
{
	unsigned long seed = option("storm_seed", 1), minutes = option("storm_minutes", 0);
	time_t last = time(NULL) + (minutes ? 30 * minutes : SECONDS);

	host_state = seeded(seed, 1000000);
	started = killed = 0;
	for (int i = 0; i < TOOLS; i++)
		start_tool(i, seed);
	while (time(NULL) < last && !storm->wrong) {
		host();
		if (!dice(10)) {
			kill(tools[dice(TOOLS)], SIGKILL);
			killed++;
		}
		replace_ended(seed);
		usleep(dice(4000));
	}
	end();
	printf("selftest: storm of %s: seed %lu, %lu operations, %d tools killed\n", name, seed, storm->operations, killed);
}

static void host_of_windows(void)
{
	int number = dice(3);
	const struct kvmmem_window_range moved = { HUGE, HUGE_SIZE, HUGE_AT + dice(20) * PAGE, 0, 0 };

	switch (dice(10)) {
	case 0 ... 2:
		host_shows(number, RW, &moved, 1);
		break;
	case 3 ... 6:
		host_shows_usual(number, dice(2) ? RW : RO);
		break;
	case 7:
		host_sets_state(number, KVMMEM_STATE_REVOKED + dice(2));
		break;
	case 8:
		/* In the midst of a change for a while. */
		host_begins(number);
		usleep(dice(3000));
		host_ends(number);
		break;
	default:
		host_answers(-KVM_EPERM);
		usleep(dice(1000));
		host_answers(0);
	}
}

void random_storm_of_windows(void)
{
	long before = pinned() - counter("quarantined");

	begin();
	storm->tokens = 3;
	storm->uuid = 0x40;
	storm->places[0].gpa = HUGE;
	storm->places[0].size = HUGE_SIZE;
	storm->places[1].gpa = LOW;
	storm->places[1].size = LOW_SIZE;
	host_fills();
	for (int i = 0; i < 3; i++)
		host_shows_usual(i, RW);
	rage("windows", host_of_windows);
	host_answers(0);
	/* But for the pages that the host refused to give back to a dying process. */
	CHECK(WITHIN(pinned() - counter("quarantined") == before));
	munmap(storm, sizeof(*storm));
}

static void host_of_devices(void)
{
	static const char *const functions[] = { "A.0", "A.1", "A.2", "B.0", "B.1" };
	const struct kvmmem_window_range moved = { FIRST, FIRST_SIZE / 2, FIRST_AT + 7 * PAGE, 1, 0 };

	switch (dice(60)) {
	case 0:
		unplug_view();
		plug_shows_usual(HEAD_A);
		plug_in_view();
		break;
	case 1 ... 9:
		plug_sets_state(HEAD_A, KVMMEM_STATE_REVOKED + dice(2));
		break;
	case 10 ... 19:
		plug_shows(HEAD_A, dice(2) ? RW : RO, &moved, 1);
		break;
	case 20 ... 24:
		unbind(functions[dice(5)]);
		break;
	case 25 ... 29:
		bind(functions[dice(5)]);
		break;
	case 30 ... 39:
		plug_shows_usual(HEAD_A);
		CHECK_EQUAL(rebind_all(), 0);
		break;
	default:
		plug_shows_usual(HEAD_A);
	}
}

void random_storm_of_devices(void)
{
	begin();
	storm->tokens = 1;
	storm->uuid = 0x60;
	storm->places[0].gpa = FIRST;
	storm->places[0].size = FIRST_SIZE;
	storm->places[1].gpa = SECOND;
	storm->places[1].size = SECOND_SIZE;
	for (unsigned long at = 0; at < SHARED_SIZE; at += PAGE)
		*shared(at) = at;
	plug_writes(HEAD_A, 0, 0);
	plug_writes(HEAD_B, 0, 1);
	plug_shows_usual(HEAD_A);
	plug_in_view();
	rage("devices", host_of_devices);
	plug_shows_usual(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	unplug_view();
	munmap(storm, sizeof(*storm));
}
