/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A host that opens views: descriptor pages and a window in memory that the
 * test machine's kernel was told to leave alone (memmap= in run.sh). The module
 * is loaded with test_descriptor, so that a token's first byte chooses the page.
 */
#ifndef HOST_H
#define HOST_H

#include "../../crates/kvmmem-abi/include/uapi/kvmmem.h"
#include "selftest.h"

#define MIB		(1UL << 20)
#define GIB		(1UL << 30)
#define RESERVED	0x20000000UL
#define RESERVED_SIZE	(256 * MIB)
#define WINDOW		(RESERVED + 64 * MIB)
#define WINDOW_SIZE	(192 * MIB)
/* No memory at all, but not RAM either. */
#define NOWHERE		GIB
#define LOAD_VIEWS	LOAD " force_window=1 test_descriptor=0x20000000"
/* An interrupt that no device of the machine has, and the ports by which pc-testdev raises interrupts. */
#define GSI		7
#define LOAD_INTERRUPT	LOAD_VIEWS " force_gsi=7"
#define TEST_IRQS	0x2000

/* The ranges of the usual view: unaligned, aligned to 2 MiB, adjacent to that one. */
#define LOW		0x1000UL
#define LOW_SIZE	0x9e000UL
#define HUGE		(4 * MIB)
#define HUGE_SIZE	(8 * MIB)
#define NEXT		(HUGE + HUGE_SIZE)
#define NEXT_SIZE	0x5000UL
#define END		(NEXT + NEXT_SIZE)
#define LOW_AT		0x3000UL
#define HUGE_AT		(16 * MIB)
#define NEXT_AT		(32 * MIB + 0x7000)

/* Makes the reserved memory readable for this process. */
void host_opens(void);

/* Writes each page's number into the window, as at first: its offset. */
void host_fills(void);

/* A descriptor page as memory, and memory of the window. */
struct kvmmem_descriptor *descriptor(int number);
char *window(unsigned long offset);

/* Shows the usual view, or these ranges, at a higher generation. */
void host_shows_usual(int number, unsigned int rights);
void host_shows(int number, unsigned int rights, const struct kvmmem_window_range *ranges, int count);

/* Changes the page: what is between the two happens at once. */
void host_begins(int number);
void host_ends(int number);
void host_sets_state(int number, unsigned int state);

/* Whether it raises the interrupt after each change. */
void host_raises(int it_does);

/* The first number of the target's page at this address, as the window has it. */
unsigned long content(unsigned long gpa);

int attach(int fd, int number, unsigned int flags);
struct kvmmem_ranges ranges_of(int fd);
struct kvmmem_stats stats_of(int fd);
/* A file with the view of this page. */
int attached(int number, unsigned int flags);

/* What poll tells at once, or within this time. */
int polled(int fd, int milliseconds);

/* Whether reading or writing the byte raises a signal: its number, or 0. */
int signal_of_read(const volatile char *p);
int signal_of_write(volatile char *p);

/* Instructions of opening and of faults, for print. */
void print_costs(void);
void test_no_views(void);
void test_attach(void);
void test_memory_runs_out(void);
void test_failing_allocations(void);
void test_failing_load(void);
void test_memory(void);
void test_positions(void);
void test_events(void);
void test_interrupt(void);
void test_failing_interrupt(void);
void test_malformed_descriptors(void);
void test_sharing(const char *self);
void test_regions(void);
void test_storm(void);
void test_nothing_left(void);
void test_no_regions(void);
void test_wrong_page(void);
void test_view_exec(int fd);

#endif
