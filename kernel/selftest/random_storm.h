/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Processes that do anything at random, under a host that does too. The choices
 * depend on the seed (storm_seed= on the kernel's command line) and on nothing
 * else; what happens at the same time differs from run to run.
 */
#ifndef RANDOM_STORM_H
#define RANDOM_STORM_H

/* Of views that a hypercall opens, with v1 beside them; and of views that come as PCI devices. */
void random_storm_of_windows(void);
void random_storm_of_devices(void);
/* In the program that a tool executed, which is the tool again. Does not return. */
void storm_after_exec(const char *seed);

/* What all processes of a storm share, by a file of this number. */
#define COMMON_FD	50
/* The two ends of a socket by which tools pass files to each other. */
#define SEND_FD		51
#define RECEIVE_FD	52
void open_channel(void);
/* The files of a tool. */
#define FILES_FD	60
#define FILES		4

struct storm {
	int stopping, wrong, tokens, uuid;
	unsigned long operations;
	/* Of the target, as the host shows it usually. */
	struct { unsigned long gpa, size; } places[2];
};

/* A random number below the limit. */
unsigned int below(unsigned long *state, unsigned int limit);
unsigned long seeded(unsigned long seed, unsigned long number);

/* Does anything at random until the storm stops. */
void run_random_tool(struct storm *storm, unsigned long seed);

#endif
