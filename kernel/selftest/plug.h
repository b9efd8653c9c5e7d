/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * A host that shows views as PCI devices. The test tells QEMU's monitor what to
 * plug in (run.sh), and reaches the files behind it by larger devices. Slot A
 * has windows 1 and 2, the latter read-only, and slot B window 8, of one view.
 */
#ifndef PLUG_H
#define PLUG_H

#include "host.h"

#define WINDOW_1	(16 * MIB)
#define WINDOW_2	(8 * MIB)
#define WINDOW_8	(4 * MIB)
#define WINDOW_COLD	(2 * MIB)
#define SHARED_SIZE	(32 * MIB)

/* The view's usual ranges: huge pages of window 1, the read-only window, the second slot's. */
#define FIRST		(2 * MIB)
#define FIRST_SIZE	(8 * MIB)
#define FIRST_AT	(4 * MIB)
#define SECOND		(12 * MIB)
#define SECOND_SIZE	(1 * MIB)
#define SECOND_AT	(64 * PAGE)
#define THIRD		(SECOND + SECOND_SIZE)
#define THIRD_SIZE	(3 * PAGE)
#define THIRD_AT	(5 * PAGE)

/* The pages of the descriptors, as the host has them. */
#define HEAD_A		0
#define HEAD_B		1
#define HEAD_COLD	2

/* Opens the ways to the host's files. */
void plug_opens(void);
struct kvmmem_descriptor *page_of(int head);
/* The first number of this page of the windows' common file. */
unsigned long *shared(unsigned long offset);
unsigned long shared_content(unsigned long gpa);

/* SHA-256 of this token, whose first byte is its number. */
const unsigned char *plug_digest(int token);
/* Writes a page for this token's first byte; shows other ranges at a higher generation. */
void plug_writes(int head, int token, int number);
void plug_shows(int head, unsigned int rights, const struct kvmmem_window_range *ranges, int count);
void plug_shows_usual(int head);
void plug_begins(int head);
void plug_ends(int head);
void plug_sets_state(int head, unsigned int state);

/* Whether the driver follows the page's generation, complains, or neither, within a second. */
int plug_is_seen(int head);
unsigned int plug_complaint(int head);

/*
 * QEMU's monitor: plugs a file ("memory,size=16M") in as function "A.1"; the
 * guest sees nothing of it before function 0. Unplugs the slot of a function.
 */
void plug_in(const char *function, const char *file);
void unplug(const char *function);
/* All functions of the usual view; and until the driver has them all. */
void plug_in_parts(void);
void plug_in_view(void);
void unplug_view(void);

/* sysfs: 0, or an errno. Functions of slot A or B, or of one by its number: "10.1". */
int bind(const char *function);
int unbind(const char *function);
/* As when it is found on the bus: tried again if it has to wait. */
void probe(const char *function);
int rebind_all(void);
int is_bound(const char *function);
int is_there(const char *function);
/* How the kernel has anything mapped of a function's BAR 2: 'b' write-back, 't' write-through, '-' uncached, 0 not. */
int cached_how(const char *function);
int is_mapped(const char *function);
/* How many drivers and users have a function enabled. */
int enablers(const char *function);

void test_plug(void);
void test_unplug(void);
void test_window_page(void);
void test_malformed_devices(void);
void test_plug_storm(void);
void test_failing_plug(void);
/* Loads and unloads the module. */
void test_devices(void);

#endif
