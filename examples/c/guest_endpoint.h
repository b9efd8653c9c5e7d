/* SPDX-License-Identifier: Apache-2.0 OR MIT */
/*
 * Asks the host's guest endpoint for a view: what a tool does before
 * KVMMEM_ATTACH where the driver has KVMMEM_FEAT_DEVICES, that is in a VM under
 * a stock QEMU. A frame is a 32-bit little-endian length and that many bytes of
 * JSON.
 */
#ifndef KVMMEM_GUEST_ENDPOINT_H
#define KVMMEM_GUEST_ENDPOINT_H

#include <endian.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define KVMMEM_GUEST_PORT_DEFAULT 27510
#define KVMMEM_MAX_FRAME 4096

/* 0 where all of it was read. */
static int read_all(int fd, void *to, size_t length)
{
	for (size_t done = 0; done < length;) {
		ssize_t count = read(fd, (char *)to + done, length - done);

		if (count <= 0)
			return -1;
		done += count;
	}
	return 0;
}

/*
 * Asks for the view of `token` (64 hex digits). Returns a descriptor to keep
 * open as long as the view is wanted, and in `ticket` the token (64 hex digits
 * and a 0) for KVMMEM_ATTACH; or -1 with the reason on standard error.
 */
static int guest_endpoint_open(const char *token, int read_only, char ticket[65])
{
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST };
	const char *port = getenv("KVMMEM_GUEST_PORT");
	char frame[4 + KVMMEM_MAX_FRAME + 1];
	const char *answer;
	uint32_t length;
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	host.svm_port = port ? strtoul(port, NULL, 10) : KVMMEM_GUEST_PORT_DEFAULT;
	if (fd < 0 || connect(fd, (struct sockaddr *)&host, sizeof(host)) < 0) {
		perror("the host's guest endpoint");
		goto failed;
	}
	length = snprintf(frame + 4, KVMMEM_MAX_FRAME,
			  "{\"open\":{\"token\":\"%.64s\",\"read_only\":%s,"
			  "\"caller\":{\"pid\":%u,\"uid\":%u,\"comm\":\"%.15s\"}}}",
			  token, read_only ? "true" : "false", getpid(), getuid(), "c-tool");
	memcpy(frame, &(uint32_t){ htole32(length) }, 4);
	if (write(fd, frame, 4 + length) != (ssize_t)(4 + length) || read_all(fd, &length, 4) < 0) {
		perror("the host's guest endpoint");
		goto failed;
	}
	length = le32toh(length);
	if (length < 1 || length > KVMMEM_MAX_FRAME || read_all(fd, frame, length) < 0)
		length = 0;
	frame[length] = 0;
	answer = strstr(frame, "\"ticket\":\"");
	if (!strncmp(frame, "{\"opened\":", 10) && answer && sscanf(answer + 10, "%64[0-9a-f]", ticket) == 1)
		return fd;
	fprintf(stderr, "the host's guest endpoint: %s\n", length ? frame : "no answer");
failed:
	if (fd >= 0)
		close(fd);
	return -1;
}

#endif
