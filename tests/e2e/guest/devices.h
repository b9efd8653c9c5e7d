/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/* kvmmem-view's part for views that come as PCI devices. */
#ifndef DEVICES_H
#define DEVICES_H

#include <stdint.h>

/*
 * Has the host open a view, which lasts as long as the file that is returned; the ticket attaches it. -1 with errno, or
 * where the host refuses with its words.
 */
int guest_endpoint_open(unsigned port, int read_only, const char *token, char ticket[65], const char **words);

/* Times the way from a token to the first bytes, and answers. */
void first(unsigned port, const char *token, uint64_t gpa);

/* Stores a value this often, each time right after a page fault. -1 with errno. */
long store_after_fault(volatile uint64_t *at, uint64_t value, unsigned long count);

/*
 * Counts all windows that came as PCI devices, and answers: functions of ivshmem's but those that are a descriptor's. To
 * store, takes each from its driver and stores a u64 at this offset, right after page faults.
 */
void bars(int store, uint64_t offset, uint64_t value);

/* Writes to a file that exists. */
long put(const char *path, const char *text);

#endif
