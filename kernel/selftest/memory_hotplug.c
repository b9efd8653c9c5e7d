// SPDX-License-Identifier: GPL-2.0-only
/* Memory that is plugged in while pages of v1 are mapped, and goes again. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "machine.h"
#include "selftest.h"

#define MEMORY	"/sys/devices/system/memory/"
/* More than what an empty block is filled up with at once. */
#define PAGES	2048

static int write_text(const char *name, const char *text)
{
	char path[96];
	int fd, result;

	snprintf(path, sizeof(path), MEMORY "%s", name);
	fd = open(path, O_WRONLY);
	result = fd < 0 || write(fd, text, strlen(text)) < 0 ? errno : 0;
	close(fd);
	return result;
}

static unsigned long read_hexadecimal(const char *name)
{
	char path[96];
	unsigned long value = 0;
	FILE *file;

	snprintf(path, sizeof(path), MEMORY "%s", name);
	file = fopen(path, "r");
	if (file) {
		if (fscanf(file, "%lx", &value) != 1)
			value = 0;
		fclose(file);
	}
	return value;
}

/* The number of the block that is not online; -1 where there is none. */
static int offline_block(void)
{
	DIR *folder = opendir(MEMORY);
	struct dirent *entry;
	int number, found = -1;

	while (folder && (entry = readdir(folder))) {
		char path[300], state[16] = "";
		FILE *file;

		if (sscanf(entry->d_name, "memory%d", &number) != 1)
			continue;
		snprintf(path, sizeof(path), MEMORY "%s/state", entry->d_name);
		file = fopen(path, "r");
		if (file && fscanf(file, "%15s", state) == 1 && !strcmp(state, "offline"))
			found = number;
		if (file)
			fclose(file);
	}
	if (folder)
		closedir(folder);
	return found;
}

/* The physical address of a page, which is there. */
static unsigned long physical(const char *p)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	unsigned long entry = 0;

	CHECK_EQUAL(pread(fd, &entry, 8, (unsigned long)p / PAGE * 8), 8);
	close(fd);
	return (entry & ((1UL << 55) - 1)) * PAGE;
}

/* It may be tried again: what lies there has to move first. */
static int goes_offline(int block, const char *state)
{
	write_text(state, "offline");
	return offline_block() == block;
}

void test_memory_hotplug(void)
{
	unsigned long size = read_hexadecimal("block_size_bytes"), start, at;
	char state[32], *p = NULL;
	int fd = device(), block, found = 0;

	CHECK_EQUAL(write_text("auto_online_blocks", "offline"), 0);
	monitor("object_add memory-backend-ram,id=more,size=128M");
	monitor("device_add pc-dimm,id=dimm,memdev=more");
	CHECK(WITHIN(offline_block() >= 0));
	block = offline_block();
	snprintf(state, sizeof(state), "memory%d/state", block);
	start = block * size;
	CHECK_EQUAL(write_text(state, "online_movable"), 0);
	/* Memory of processes is taken from there first. */
	p = pages(PAGES);
	for (at = 0; at < PAGES && !found; at++) {
		p[at * PAGE] = 1;
		found = physical(p + at * PAGE) - start < size;
	}
	at--;
	CHECK(found);
	/* A page that is pinned for long does not stay where memory may go. */
	CHECK_EQUAL(map(fd, p + at * PAGE), 0);
	CHECK(physical(p + at * PAGE) - start >= size);
	CHECK(WITHIN(goes_offline(block, state)));
	CHECK_EQUAL(counter("mapped"), 1);
	monitor("device_del dimm");
	CHECK(WITHIN(offline_block() < 0));
	CHECK_EQUAL(unmap(fd, p + at * PAGE), 0);
	munmap(p, PAGES * PAGE);
	close(fd);
}
