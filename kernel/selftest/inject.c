// SPDX-License-Identifier: GPL-2.0-only
/* Fault injection: /proc/thread-self/fail-nth and debugfs. kmemleak. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "inject.h"
#include "selftest.h"

#define DEBUGFS		"/sys/kernel/debug/"
#define LEAKS		DEBUGFS "kmemleak"
#define EVERYWHERE	"0xffffffffffffffff"
/* More allocations than any call makes. */
#define MOST		2000

static const char *const kinds[] = { "failslab", "fail_page_alloc" };

static int write_text(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), result = -1;

	if (fd >= 0) {
		result = write(fd, text, strlen(text)) < 0 ? -1 : 0;
		close(fd);
	}
	return result;
}

static int set(const char *kind, const char *name, const char *value)
{
	char path[96];

	snprintf(path, sizeof(path), DEBUGFS "%s/%s", kind, name);
	return write_text(path, value);
}

int can_inject(void)
{
	static int answer = -1;

	if (answer >= 0)
		return answer;
	answer = !access("/proc/self/fail-nth", W_OK);
	for (int i = 0; answer && i < 2; i++) {
		CHECK_EQUAL(set(kinds[i], "ignore-gfp-wait", "N"), 0);
		/* Not a stack for each. */
		CHECK_EQUAL(set(kinds[i], "verbose", "0"), 0);
		CHECK_EQUAL(set(kinds[i], "times", "-1"), 0);
		CHECK_EQUAL(set(kinds[i], "stacktrace-depth", "32"), 0);
	}
	if (answer) {
		CHECK_EQUAL(set(kinds[1], "ignore-gfp-highmem", "N"), 0);
		CHECK_EQUAL(set(kinds[1], "min-order", "0"), 0);
	}
	return answer;
}

/* The file is that of the thread which opened it. */
static __thread int file = -1, owner;

static int own_file(void)
{
	if (file >= 0 && owner != gettid())
		close(file), file = -1;
	if (file < 0) {
		file = open("/proc/thread-self/fail-nth", O_RDWR | O_CLOEXEC);
		owner = gettid();
	}
	return file;
}

void inject(int n)
{
	char text[16];
	int fd = own_file();

	snprintf(text, sizeof(text), "%d", n);
	if (pwrite(fd, text, strlen(text), 0) < 0)
		CHECK(!"fail-nth can be written");
}

int injected(void)
{
	char text[16] = {};
	int fd = own_file();

	if (pread(fd, text, sizeof(text) - 1, 0) <= 0)
		CHECK(!"fail-nth can be read");
	pwrite(fd, "0", 1, 0);
	/* What is left of the count. */
	return !atoi(text);
}

int each_fails(const char *name, int (*call)(void), void (*undo)(void))
{
	int n, result, error, is_injected, before = failures;

	progress("%s", name);
	for (n = 1; n < MOST; n++) {
		inject(n);
		errno = 0;
		result = call();
		error = errno;
		is_injected = injected();
		errno = error;
		if (result) {
			CHECK(is_injected);
			CHECK(error == ENOMEM || error == EAGAIN);
			CHECK_EQUAL(call(), 0);
		}
		undo();
		if (!is_injected || failures > before)
			break;
	}
	CHECK(n < MOST);
	progress("%s failed with each of %d allocations", name, n - 1);
	if (failures > before)
		printf("FAILED with allocation %d of %s\n", n, name);
	return n - 1;
}

static void of_module(char start[24], char end[24])
{
	unsigned long address, size;
	char line[256], name[64];
	FILE *modules = fopen("/proc/modules", "r");

	while (modules && fgets(line, sizeof(line), modules))
		if (sscanf(line, "%63s %lu %*s %*s %*s %lx", name, &size, &address) == 3 && !strcmp(name, "kvmmem")) {
			snprintf(start, 24, "%#lx", address);
			snprintf(end, 24, "%#lx", address + size);
		}
	if (modules)
		fclose(modules);
}

/* Those of code from start to end, and of what it calls. */
static void set_range(const char *start, const char *end, const char *percent)
{
	for (int i = 0; i < 2; i++) {
		/* Never any other's: first the chance goes, and it comes last. */
		CHECK_EQUAL(set(kinds[i], "probability", "0"), 0);
		CHECK_EQUAL(set(kinds[i], "require-start", start), 0);
		CHECK_EQUAL(set(kinds[i], "require-end", end), 0);
		CHECK_EQUAL(set(kinds[i], "probability", percent), 0);
	}
}

void inject_in_module(int percent)
{
	char start[24] = "0", end[24] = EVERYWHERE, text[16];

	if (percent)
		of_module(start, end);
	CHECK(!percent || start[1]);
	snprintf(text, sizeof(text), "%d", percent);
	set_range(start, end, text);
}

int each_fails_in_modules(const char *name, int (*call)(void), void (*undo)(void))
{
	int count;

	/* Where modules are in a kernel that is placed at random, which is below. */
	set_range("0xffffffffc0000000", "0xffffffffff000000", "0");
	count = each_fails(name, call, undo);
	set_range("0", EVERYWHERE, "0");
	return count;
}

void forget_leaks(void)
{
	if (!access(LEAKS, W_OK)) {
		CHECK_EQUAL(write_text(LEAKS, "scan"), 0);
		CHECK_EQUAL(write_text(LEAKS, "clear"), 0);
	}
}

void check_leaks(void)
{
	char text[4096];
	ssize_t count;
	int fd;

	if (access(LEAKS, W_OK))
		return;
	/* An object that is young, or was just moved from one place to another, is not reported, or wrongly. */
	for (int i = 0; i < 3; i++) {
		sleep(6);
		CHECK_EQUAL(write_text(LEAKS, "scan"), 0);
	}
	fd = open(LEAKS, O_RDONLY);
	count = read(fd, text, sizeof(text));
	CHECK_EQUAL(count, 0);
	for (; count > 0; count = read(fd, text, sizeof(text)))
		fwrite(text, 1, count, stdout);
	close(fd);
}
