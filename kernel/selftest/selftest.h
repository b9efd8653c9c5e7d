/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Tests of kvmmem.ko against a host that does as it is told: the module is
 * built with KVMMEM_SELFTEST=y and loaded with force_port, and behind that port is QEMU's pc-testdev, whose
 * register reads back what was written. The host "agrees" when it holds 0 and
 * refuses when it holds -KVM_Exxx; no memory is replaced.
 */
#ifndef SELFTEST_H
#define SELFTEST_H

#include <errno.h>
#include <stdio.h>
#include <unistd.h>

#define PAGE		4096UL
#define HOST_PORT	0xe0
#define LOAD		"force_port=0xe0"
#define KVM_EPERM	1

extern int checks, failures;

#define CHECK(condition)							\
	do {									\
		checks++;							\
		if (!(condition)) {						\
			failures++;						\
			printf("FAILED %s:%d: %s (errno %d)\n", __FILE__, __LINE__, #condition, errno); \
		}								\
	} while (0)

#define CHECK_EQUAL(value, expected)						\
	do {									\
		long value_ = (value), expected_ = (expected);			\
										\
		checks++;							\
		if (value_ != expected_) {					\
			failures++;						\
			printf("FAILED %s:%d: %s is %ld, not %ld\n", __FILE__, __LINE__, #value, value_, expected_); \
		}								\
	} while (0)

/* The call must fail with this errno. */
#define CHECK_REFUSED(call, error)						\
	do {									\
		errno = 0;							\
		CHECK((call) == -1);						\
		CHECK_EQUAL(errno, error);					\
	} while (0)

/* Whether it comes to hold, in a minute at most: the emulated machine may be slow. */
#define WITHIN(condition)						\
	({								\
		int tries_ = 0;						\
									\
		while (!(condition) && ++tries_ < 60000)		\
			usleep(1000);					\
		!!(condition);						\
	})

/* How long what must come is polled for, milliseconds. */
#define LONG		60000

/* What the host answers from now on. */
void host_answers(int answer);

/* /dev/kvmmem and its two ioctls. */
int device(void);
int map(int fd, const void *gva);
int map_gpa(int fd, const void *gva, unsigned long gpa);
int unmap(int fd, const void *gva);

int load_module(const char *parameters);
int unload_module(void);

/* Private, anonymous, writable pages. */
char *pages(unsigned long count);

/* A line "name value" of debugfs, or "name:\tvalue" of fdinfo. */
long counter(const char *name);
long fdinfo(int fd, const char *name);

/* Pages that the machine has free. */
long free_pages(void);

/* Pages pinned in the whole machine, and charged to this process. */
long pinned(void);
long charged(void);

/* A line for QEMU's monitor. */
__attribute__((format(printf, 1, 2))) void monitor(const char *format, ...);

/* Prints where the selftest is, with the seconds since the machine started. */
__attribute__((format(printf, 1, 2))) void progress(const char *format, ...);

/* Runs a test that takes these arguments. */
#define RUN(test, ...)								\
	do {									\
		progress("%s", #test);						\
		test(__VA_ARGS__);						\
	} while (0)

/* Runs the function in a child; its failures and checks count here. */
void in_child(void (*run)(void));

void test_arguments(void);
void test_opening(void);
void test_ownership(const char *self);
void test_exec(int inherited);
void test_limits(void);
void test_races(void);
void test_quarantine(void);
void test_unload(void);

#endif
