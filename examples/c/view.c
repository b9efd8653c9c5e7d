/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Looks for a marker in the whole memory of another virtual machine, with
 * nothing but kvmmem.h, lseek, mmap and pread.
 *
 *   cc -static -Wall -Wextra -Werror -I crates/kvmmem-abi/include/uapi \
 *      -o view examples/c/view.c
 *
 * Environment: KVMMEM_TOKEN (the token of a grant, 64 hex digits, as
 * `kvmmem grant create` prints it), KVMMEM_MARKER_HEX (the bytes to look for),
 * KVMMEM_DEVICE (default /dev/kvmmem). Prints each place; exits with 0 if there
 * is one, with 1 if not. A marker has 64 bytes at most.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

#include "guest_endpoint.h"
#include "kvmmem.h"

#define PAGE 4096
#define MARKER_MOST 64

/* What of the target is mapped at a time: a multiple of 2 MiB, so that faults map that much. */
#define PIECE (32UL << 20)

/* A page whose grant was revoked, or that the target no longer has, raises SIGBUS. */
static void lost(int signal)
{
	static const char message[] = "the target's memory is no longer there\n";

	(void)signal;
	_exit(write(2, message, sizeof(message) - 1) < 0 ? 2 : 1);
}

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static const char *need(const char *name)
{
	const char *value = getenv(name);

	if (!value) {
		fprintf(stderr, "%s is not set\n", name);
		exit(1);
	}
	return value;
}

/* Bytes in the order of the digits, which is the token's on the wire. */
static size_t parse_hex(const char *hex, unsigned char *bytes, size_t most)
{
	size_t count = 0;
	unsigned byte;

	while (count < most && sscanf(hex + 2 * count, "%2x", &byte) == 1)
		bytes[count++] = byte;
	return count;
}

/* Looks through [from, to), which has data, through a mapping; counts the places. */
static long look(int fd, uint64_t from, uint64_t to, const unsigned char *marker, size_t length)
{
	static unsigned char copy[PIECE + MARKER_MOST];
	size_t kept = 0; /* The end of the last piece, where a marker may begin that ends in the next one. */
	long found = 0;

	while (from < to) {
		size_t part = to - from < PIECE ? to - from : PIECE;
		unsigned char *target = mmap(NULL, part, PROT_READ, MAP_SHARED, fd, from);
		unsigned char *end = copy + kept + part;

		if (target == MAP_FAILED)
			fail("mmap");
		/* The target goes on running: what is searched is a copy. */
		memcpy(copy + kept, target, part);
		munmap(target, part);
		for (unsigned char *at = copy; (at = memmem(at, end - at, marker, length)); at++) {
			printf("marker at gpa %#lx\n", (unsigned long)(from - kept + (at - copy)));
			found++;
		}
		from += part;
		kept = (size_t)(end - copy) < length - 1 ? (size_t)(end - copy) : length - 1;
		memmove(copy, end - kept, kept);
	}
	return found;
}

int main(void)
{
	const char *path = getenv("KVMMEM_DEVICE") ? getenv("KVMMEM_DEVICE") : "/dev/kvmmem";
	unsigned char marker[MARKER_MOST], again[MARKER_MOST];
	struct sigaction action = { .sa_handler = lost };
	struct kvmmem_range room[KVMMEM_MAX_RANGES];
	struct kvmmem_ranges ranges = { .capacity = KVMMEM_MAX_RANGES, .ranges = (uintptr_t)room };
	struct kvmmem_attach attach = { 0 };
	struct kvmmem_info info;
	char ticket[65];
	size_t length = parse_hex(need("KVMMEM_MARKER_HEX"), marker, sizeof(marker));
	long found = 0;
	int fd;

	if (strlen(getenv("KVMMEM_MARKER_HEX")) > 2 * MARKER_MOST) {
		fprintf(stderr, "KVMMEM_MARKER_HEX holds more than %d bytes\n", MARKER_MOST);
		return 1;
	}
	if (length == 0 || parse_hex(need("KVMMEM_TOKEN"), (unsigned char *)&attach.token, 32) != 32) {
		fprintf(stderr, "KVMMEM_TOKEN is not 64 hex digits, or KVMMEM_MARKER_HEX holds none\n");
		return 1;
	}
	sigaction(SIGBUS, &action, NULL);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail(path);
	if (ioctl(fd, KVMMEM_INFO, &info) < 0)
		fail("info");
	/* The connection is the view's: it stays open until this program ends. */
	if (info.features & KVMMEM_FEAT_DEVICES) {
		if (guest_endpoint_open(getenv("KVMMEM_TOKEN"), 0, ticket) < 0)
			return 1;
		parse_hex(ticket, (unsigned char *)&attach.token, 32);
	}
	if (ioctl(fd, KVMMEM_ATTACH, &attach) < 0)
		fail("attach");
	if (ioctl(fd, KVMMEM_RANGES, &ranges) < 0)
		fail("ranges");

	for (unsigned i = 0; i < ranges.count; i++) {
		uint64_t end = room[i].gpa + room[i].len;
		off_t data = lseek(fd, room[i].gpa, SEEK_DATA);

		printf("range %#llx+%#llx\n", (unsigned long long)room[i].gpa, (unsigned long long)room[i].len);
		/* What the target never used, or gave back, is skipped: reading would make its host allocate it. */
		while (data >= 0 && (uint64_t)data < end) {
			off_t hole = lseek(fd, data, SEEK_HOLE);
			uint64_t to = hole < 0 || (uint64_t)hole > end ? end : (uint64_t)hole;

			found += look(fd, data, to, marker, length);
			data = lseek(fd, to, SEEK_DATA);
		}
	}
	if (pread(fd, again, sizeof(again), room[0].gpa) < 0)
		fail("pread");
	if (ioctl(fd, KVMMEM_DETACH) < 0)
		fail("detach");
	if (pread(fd, again, sizeof(again), room[0].gpa) >= 0 || errno != ENOTCONN) {
		fprintf(stderr, "the view is still there after DETACH\n");
		return 1;
	}
	printf("%ld found\n", found);
	return found ? 0 : 1;
}
