/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Maps one page of another virtual machine and compares its first bytes with
 * an expected marker, with nothing but kvmmem.h and the KVMI wire format.
 *
 *   cc -static -Wall -Wextra -Werror -I crates/kvmmem-abi/include/uapi \
 *      -o marker examples/c/marker.c
 *
 * Environment: KVMMEM_KVMI_PORT (vsock port to listen on), KVMMEM_TARGET_GPA
 * (address of the page in the target), KVMMEM_MARKER_HEX (the bytes expected
 * there), KVMMEM_DEVICE (default /dev/kvmmem). Exits with 0 if the marker is
 * there and gone again after the unmap, with 1 if not.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

#include "kvmmem.h"

#define PAGE 4096
#define WAIT_SECONDS 60

#define KVMI_EVENT 1
#define KVMI_GET_VERSION 2
#define KVMI_GET_MAP_TOKEN 22

struct kvmi_header {
	uint16_t id;
	uint16_t size; /* of the payload */
	uint32_t seq;
};

struct kvmi_error {
	int32_t err; /* 0 or -KVM_Exxx */
	uint32_t padding;
};

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static void fail_plain(const char *what)
{
	fprintf(stderr, "%s\n", what);
	exit(1);
}

static const char *need(const char *name)
{
	const char *value = getenv(name);

	if (!value || !*value) {
		fprintf(stderr, "%s is not set\n", name);
		exit(1);
	}
	return value;
}

static uint64_t number(const char *name)
{
	const char *text = need(name);
	char *end;
	uint64_t value = strtoull(text, &end, 0);

	if (*end) {
		fprintf(stderr, "%s=%s is no number\n", name, text);
		exit(1);
	}
	return value;
}

/* Reads pairs of hexadecimal digits; returns the number of bytes. */
static size_t hex(const char *text, uint8_t *bytes, size_t room)
{
	size_t count = 0;
	unsigned int byte;
	int used;

	for (; *text; text += 2) {
		if (count == room || sscanf(text, "%2x%n", &byte, &used) != 1 || used != 2)
			fail_plain("KVMMEM_MARKER_HEX is not pairs of hexadecimal digits");
		bytes[count++] = (uint8_t)byte;
	}
	return count;
}

static void receive(int fd, void *buffer, size_t size)
{
	ssize_t got = recv(fd, buffer, size, MSG_WAITALL);

	if (got < 0)
		fail("recv");
	if ((size_t)got != size)
		fail_plain("the host closed the connection");
}

static void transmit(int fd, const void *buffer, size_t size)
{
	if (send(fd, buffer, size, MSG_NOSIGNAL) != (ssize_t)size)
		fail("send");
}

static void skip(int fd, size_t size)
{
	uint8_t byte;

	while (size--)
		receive(fd, &byte, 1);
}

static void too_late(int signal)
{
	static const char text[] = "gave up waiting for the host\n";

	(void)signal;
	if (write(STDERR_FILENO, text, sizeof(text) - 1) < 0)
		_exit(2);
	_exit(1);
}

/* The tool listens, the host connects: one connection for each target. */
static int accept_target(uint32_t port)
{
	struct sockaddr_vm address = {
		.svm_family = AF_VSOCK,
		.svm_cid = VMADDR_CID_ANY,
		.svm_port = port,
	};
	struct sockaddr_vm peer;
	socklen_t size = sizeof(peer);
	int listener = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);
	int fd;

	if (listener < 0)
		fail("socket(AF_VSOCK)");
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 1))
		fail("listen");
	fd = accept4(listener, (struct sockaddr *)&peer, &size, SOCK_CLOEXEC);
	if (fd < 0)
		fail("accept");
	if (peer.svm_cid != VMADDR_CID_HOST)
		fail_plain("a peer other than the host connected");
	close(listener);
	return fd;
}

/* The host introduces the target; the tool answers with 24 bytes. */
static void handshake(int fd)
{
	struct {
		uint32_t size;
		uint8_t cookie_hash[20];
	} answer = { .size = sizeof(answer) };
	struct {
		uint32_t size;
		uint8_t uuid[16];
		uint32_t padding;
		int64_t start_time_ms;
		char name[64];
	} hello;

	receive(fd, &hello, sizeof(hello));
	if (hello.size < sizeof(hello) || hello.size > 65536)
		fail_plain("the host's handshake has an unknown size");
	skip(fd, hello.size - sizeof(hello));
	transmit(fd, &answer, sizeof(answer));
	printf("connected to %.63s\n", hello.name);
}

/* Sends a command without arguments; its result goes to data. */
static void command(int fd, uint16_t id, uint32_t seq, void *data, size_t size)
{
	struct kvmi_header header = { .id = id, .seq = seq };
	struct kvmi_error error;

	transmit(fd, &header, sizeof(header));
	for (;;) {
		receive(fd, &header, sizeof(header));
		if (header.id != KVMI_EVENT)
			break;
		skip(fd, header.size);
	}
	if (header.id != id || header.seq != seq || header.size < sizeof(error))
		fail_plain("the host answered another question");
	receive(fd, &error, sizeof(error));
	if (error.err) {
		fprintf(stderr, "command %u: KVM error %d\n", id, -error.err);
		exit(1);
	}
	if (header.size < sizeof(error) + size)
		fail_plain("the host's answer is too short");
	receive(fd, data, size);
	skip(fd, header.size - sizeof(error) - size);
}

int main(void)
{
	const char *path = getenv("KVMMEM_DEVICE");
	uint32_t version[2];
	struct kvmi_mem_map map;
	uint8_t expected[PAGE], seen[PAGE];
	volatile uint8_t *page;
	size_t offset, count, i;
	uint64_t gpa;
	int tool, device;

	count = hex(need("KVMMEM_MARKER_HEX"), expected, sizeof(expected));
	gpa = number("KVMMEM_TARGET_GPA");
	offset = gpa % PAGE;
	map.gpa = gpa - offset;
	if (count > PAGE - offset)
		fail_plain("the marker does not end in the page");
	signal(SIGALRM, too_late);
	alarm(WAIT_SECONDS);
	device = open(path ? path : "/dev/kvmmem", O_RDWR | O_CLOEXEC);
	if (device < 0)
		fail(path ? path : "/dev/kvmmem");

	/* The page that is replaced: private, anonymous, present. */
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
	if (page == MAP_FAILED)
		fail("mmap");
	map.gva = (uintptr_t)page;

	tool = accept_target((uint32_t)number("KVMMEM_KVMI_PORT"));
	handshake(tool);
	command(tool, KVMI_GET_VERSION, 1, version, sizeof(version));
	command(tool, KVMI_GET_MAP_TOKEN, 2, &map.token, sizeof(map.token));

	if (ioctl(device, KVM_INTRO_MEM_MAP, &map))
		fail("KVM_INTRO_MEM_MAP");
	for (i = 0; i < count; i++)
		seen[i] = page[offset + i];
	if (ioctl(device, KVM_INTRO_MEM_UNMAP, map.gva))
		fail("KVM_INTRO_MEM_UNMAP");

	if (memcmp(seen, expected, count))
		fail_plain("the target's page holds something else");
	for (i = 0; i < PAGE; i++)
		if (page[i])
			fail_plain("the page is not zero after the unmap");
	printf("marker of %zu bytes found at gpa %#llx; the page is zero again\n", count,
	       (unsigned long long)gpa);
	return 0;
}
