// SPDX-License-Identifier: GPL-2.0-only
/* The host's side of a view that comes as PCI devices, played by the test. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "plug.h"

#define DEVICES		"/sys/bus/pci/devices/0000:00:"
#define DRIVER		"/sys/bus/pci/drivers/kvmmem/"
#define HEADS		3

static struct kvmmem_descriptor *heads[HEADS];
static char *common;

/* Of 32 bytes, the first one as given, the others 0. */
static const unsigned char digests[3][32] = {
	{ 0x66, 0x68, 0x7a, 0xad, 0xf8, 0x62, 0xbd, 0x77, 0x6c, 0x8f, 0xc1, 0x8b, 0x8e, 0x9f, 0x8e, 0x20,
	  0x08, 0x97, 0x14, 0x85, 0x6e, 0xe2, 0x33, 0xb3, 0x90, 0x2a, 0x59, 0x1d, 0x0d, 0x5f, 0x29, 0x25 },
	{ 0x01, 0xd0, 0xfa, 0xbd, 0x25, 0x1f, 0xcb, 0xbe, 0x2b, 0x93, 0xb4, 0xb9, 0x27, 0xb2, 0x6a, 0xd2,
	  0xa1, 0xa9, 0x90, 0x77, 0x15, 0x2e, 0x45, 0xde, 0xd1, 0xe6, 0x78, 0xaf, 0xa4, 0x5d, 0xbe, 0xc5 },
	{ 0x57, 0x78, 0xf9, 0x85, 0xdb, 0x75, 0x4c, 0x66, 0x28, 0x69, 0x1f, 0x56, 0xfa, 0xda, 0xe5, 0x0c,
	  0x65, 0xfd, 0xdb, 0xe8, 0xeb, 0x2e, 0x93, 0x03, 0x96, 0x33, 0xfe, 0xfa, 0x05, 0xd4, 0x5e, 0x31 },
};

const unsigned char *plug_digest(int token)
{
	return digests[token];
}

static int sysfs_write(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY), error = 0;

	if (fd < 0)
		return errno;
	if (write(fd, text, strlen(text)) < 0)
		error = errno;
	close(fd);
	return error;
}

static void *host_memory(const char *slot, unsigned long size)
{
	char path[96];
	void *p;
	int fd;

	snprintf(path, sizeof(path), DEVICES "%s.0/enable", slot);
	CHECK_EQUAL(sysfs_write(path, "1"), 0);
	snprintf(path, sizeof(path), DEVICES "%s.0/resource2", slot);
	fd = open(path, O_RDWR);
	p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	CHECK(p != MAP_FAILED);
	close(fd);
	return p;
}

void plug_opens(void)
{
	heads[HEAD_A] = host_memory("18", PAGE);
	heads[HEAD_B] = host_memory("19", PAGE);
	heads[HEAD_COLD] = host_memory("1a", PAGE);
	common = host_memory("1b", SHARED_SIZE);
	for (unsigned long at = 0; at < SHARED_SIZE; at += PAGE)
		*shared(at) = at;
}

struct kvmmem_descriptor *page_of(int head)
{
	return heads[head];
}

unsigned long *shared(unsigned long offset)
{
	return (unsigned long *)(common + offset);
}

unsigned long shared_content(unsigned long gpa)
{
	return gpa >= THIRD ? gpa - THIRD + THIRD_AT : gpa >= SECOND ? gpa - SECOND + SECOND_AT : gpa - FIRST + FIRST_AT;
}

void plug_begins(int head)
{
	__atomic_or_fetch(&heads[head]->generation, 1, __ATOMIC_SEQ_CST);
}

void plug_ends(int head)
{
	__atomic_add_fetch(&heads[head]->generation, 1, __ATOMIC_SEQ_CST);
}

void plug_writes(int head, int token, int number)
{
	struct kvmmem_descriptor *d = heads[head];

	memset(d, 0, sizeof(*d));
	d->magic = KVMMEM_DESCRIPTOR_MAGIC;
	d->version = KVMMEM_DESCRIPTOR_VERSION;
	d->slot = number;
	memcpy(d->token_digest, digests[token], 32);
}

void plug_shows(int head, unsigned int rights, const struct kvmmem_window_range *ranges, int count)
{
	struct kvmmem_descriptor *d = heads[head];

	plug_begins(head);
	d->range_size = sizeof(*ranges);
	d->state = KVMMEM_STATE_OPEN;
	d->rights = rights;
	memset(d->uuid, 0x60 + head, sizeof(d->uuid));
	d->range_count = count;
	memcpy(d->ranges, ranges, count * sizeof(*ranges));
	plug_ends(head);
}

void plug_shows_usual(int head)
{
	const struct kvmmem_window_range usual[] = {
		{ FIRST, FIRST_SIZE, FIRST_AT, 1, 0 },
		{ SECOND, SECOND_SIZE, SECOND_AT, 2, 0 },
		{ THIRD, THIRD_SIZE, THIRD_AT, 8, 0 },
	};

	plug_shows(head, KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE, usual, 3);
}

void plug_sets_state(int head, unsigned int state)
{
	plug_begins(head);
	heads[head]->state = state;
	plug_ends(head);
}

/* Each view gets slots of its own, as the host frees them some time after they were emptied. */
static int slot_a;

static const char *place(const char *function)
{
	static char name[8];

	if (*function != 'A' && *function != 'B')
		return function;
	snprintf(name, sizeof(name), "%02x%s", slot_a + *function - 'A', function + 1);
	return name;
}

int plug_is_seen(int head)
{
	volatile struct kvmmem_descriptor *d = heads[head];

	return WITHIN(d->seen_generation == d->generation);
}

unsigned int plug_complaint(int head)
{
	volatile struct kvmmem_descriptor *d = heads[head];

	return WITHIN(d->complaint) ? d->complaint : 0;
}

int is_there(const char *function)
{
	char path[96];
	struct stat status;

	snprintf(path, sizeof(path), DEVICES "%s", place(function));
	return !stat(path, &status);
}

int is_bound(const char *function)
{
	char path[96];
	struct stat status;

	snprintf(path, sizeof(path), DRIVER "0000:00:%s", place(function));
	return WITHIN(!stat(path, &status));
}

void plug_in(const char *function, const char *file)
{
	static int objects;

	/* New ones each time: QEMU 7.2 aborts when a backend is used again whose BAR was not decoded at last. */
	objects++;
	function = place(function);
	monitor("object_add memory-backend-file,id=o%d,share=on,mem-path=%s", objects, file);
	monitor("device_add ivshmem-plain,id=f%s,addr=%s,multifunction=on,memdev=o%d", function, function, objects);
}

void unplug(const char *function)
{
	monitor("device_del f%s", place(function));
	CHECK(WITHIN(!is_there(function)));
}

void plug_in_parts(void)
{
	/* 2 to 15: from 16 on are the devices that are always there. */
	slot_a = slot_a % 14 + 2;
	plug_in("B.1", "memory,size=4M");
	plug_in("B.0", "page1,size=4K");
	plug_in("A.1", "memory,size=16M");
	plug_in("A.2", "memory,size=8M,readonly=on");
	plug_in("A.0", "page0,size=4K");
}

void plug_in_view(void)
{
	plug_in_parts();
	CHECK(plug_is_seen(HEAD_A));
	CHECK(is_bound("A.0") && is_bound("A.1") && is_bound("A.2") && is_bound("B.0") && is_bound("B.1"));
}

void unplug_view(void)
{
	unplug("A.0");
	unplug("B.0");
}

static int tell_driver(const char *what, const char *function)
{
	char path[96], name[32];

	snprintf(path, sizeof(path), DRIVER "%s", what);
	snprintf(name, sizeof(name), "0000:00:%s", place(function));
	return sysfs_write(path, name);
}

int bind(const char *function)
{
	return tell_driver("bind", function);
}

int unbind(const char *function)
{
	return tell_driver("unbind", function);
}

void probe(const char *function)
{
	char name[32];

	snprintf(name, sizeof(name), "0000:00:%s", place(function));
	sysfs_write("/sys/bus/pci/drivers_probe", name);
}

int rebind_all(void)
{
	static const char *const functions[] = { "A.0", "A.1", "A.2", "B.0", "B.1" };
	int error = 0;

	for (int i = 4; i >= 0; i--)
		unbind(functions[i]);
	page_of(HEAD_A)->seen_generation = 0;
	page_of(HEAD_A)->complaint = 0;
	for (int i = 0; i < 5; i++)
		error |= bind(functions[i]);
	return error;
}

int cached_how(const char *function)
{
	unsigned long start[8], end[8], from, to;
	char path[96], line[256], type[32];
	int count = 0, found = 0;
	FILE *file;

	snprintf(path, sizeof(path), DEVICES "%s/resource", place(function));
	file = fopen(path, "r");
	while (file && count < 3 && fgets(line, sizeof(line), file))
		count += sscanf(line, "%lx %lx", &start[count], &end[count]) == 2;
	if (file)
		fclose(file);
	file = fopen("/sys/kernel/debug/x86/pat_memtype_list", "r");
	CHECK(file && count == 3);
	while (file && count == 3 && fgets(line, sizeof(line), file))
		if (sscanf(line, "PAT: [mem %lx-%lx] %31s", &from, &to, type) == 3 && from < end[2] && to > start[2])
			found = !strcmp(type, "write-back") ? 'b' : !strcmp(type, "write-through") ? 't' : '-';
	if (file)
		fclose(file);
	return found;
}

int is_mapped(const char *function)
{
	return cached_how(function);
}

int enablers(const char *function)
{
	char path[96];
	int count = -1;
	FILE *file;

	snprintf(path, sizeof(path), DEVICES "%s/enable", place(function));
	file = fopen(path, "r");
	if (file) {
		if (fscanf(file, "%d", &count) != 1)
			count = -1;
		fclose(file);
	}
	return count;
}
