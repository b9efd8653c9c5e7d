// SPDX-License-Identifier: Apache-2.0 OR MIT
/* kvmmem-view's part for views that come as PCI devices, in VMs under a stock QEMU. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/vm_sockets.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "devices.h"
#include "kvmmem.h"

/* Stores into each window: one of them at least is the first exit after its page fault. */
#define STORES 64

int guest_endpoint_open(unsigned port, int read_only, const char *token, char ticket[65], const char **words)
{
	struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = port };
	struct timeval limit = { .tv_sec = 60 };
	static char text[4096];
	uint32_t length;
	int fd = socket(AF_VSOCK, SOCK_STREAM | SOCK_CLOEXEC, 0);

	*words = NULL;
	length = snprintf(text + 4, sizeof(text) - 4,
			  "{\"open\":{\"token\":\"%s\",\"read_only\":%s,\"caller\":{\"pid\":%d,\"uid\":%d,\"comm\":\"view\"}}}",
			  token, read_only ? "true" : "false", getpid(), getuid());
	memcpy(text, &length, 4);
	if (fd < 0 || connect(fd, (struct sockaddr *)&host, sizeof(host)) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0 ||
	    send(fd, text, length + 4, MSG_NOSIGNAL) < 0 || recv(fd, &length, 4, MSG_WAITALL) != 4 ||
	    recv(fd, text, length < sizeof(text) ? length : sizeof(text) - 1, MSG_WAITALL) <= 0) {
		close(fd);
		return -1;
	}
	text[length < sizeof(text) ? length : sizeof(text) - 1] = 0;
	if (strstr(text, "\"opened\"") && strstr(text, "\"ticket\":\"") &&
	    sscanf(strstr(text, "\"ticket\":\""), "\"ticket\":\"%64[0-9a-f]", ticket) == 1)
		return fd;
	close(fd);
	*words = text;
	return -1;
}

static long micros(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

static int attach(int fd, const char *token)
{
	struct kvmmem_attach attach = { 0 };
	unsigned char *bytes = (unsigned char *)&attach.token;

	for (size_t i = 0; i < sizeof(attach.token) && sscanf(token + 2 * i, "%2hhx", &bytes[i]) == 1; i++)
		;
	return ioctl(fd, KVMMEM_ATTACH, &attach);
}

/* From nothing to the first bytes, and back. */
void first(unsigned port, const char *token, uint64_t gpa)
{
	const char *words;
	unsigned char bytes[8];
	long start = micros(), end = 0;
	char ticket[65] = "";
	int device = -1, connection = guest_endpoint_open(port, 1, token, ticket, &words);

	if (connection >= 0 && (device = open("/dev/kvmmem", O_RDWR)) >= 0 && attach(device, ticket) == 0 &&
	    pread(device, bytes, 8, gpa) == 8)
		end = micros();
	if (end)
		printf("ok %ld\n", end - start);
	else
		printf("errno %s\n", words ? words : strerrorname_np(errno));
	close(device);
	close(connection);
}

long put(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	long result = fd < 0 ? -1 : write(fd, text, strlen(text));
	int error = errno;

	close(fd);
	errno = error;
	return result < 0 ? -1 : 0;
}

static int holds(const char *folder, const char *name, const char *text)
{
	char path[256], found[32] = "";
	FILE *file;

	snprintf(path, sizeof(path), "%s/%s", folder, name);
	file = fopen(path, "r");
	if (file && fgets(found, sizeof(found), file))
		found[strcspn(found, "\n")] = 0;
	if (file)
		fclose(file);
	return !strcmp(found, text);
}

long store_after_fault(volatile uint64_t *at, uint64_t value, unsigned long count)
{
	size_t page = sysconf(_SC_PAGESIZE);
	volatile unsigned char *own = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (own == MAP_FAILED)
		return -1;
	for (unsigned long i = 0; i < count; i++) {
		/* The kernel takes the page that it has just freed: the fault needs nothing of the host. */
		*own = 1;
		*at = value;
		madvise((void *)own, page, MADV_DONTNEED);
	}
	return munmap((void *)own, page);
}

/* All windows that came as PCI devices: a function of ivshmem's whose BAR 2 is no descriptor's page. */
void bars(int store, uint64_t offset, uint64_t value)
{
	unsigned long count = 0, bytes = 0;
	glob_t found;

	glob("/sys/bus/pci/devices/*", 0, NULL, &found);
	for (size_t i = 0; i < found.gl_pathc; i++) {
		const char *folder = found.gl_pathv[i], *name = strrchr(folder, '/') + 1;
		char path[256];
		struct stat bar;
		volatile uint64_t *at;
		int fd;

		snprintf(path, sizeof(path), "%s/resource2", folder);
		if (!holds(folder, "vendor", "0x1af4") || !holds(folder, "device", "0x1110") || stat(path, &bar) < 0 ||
		    name[strlen(name) - 1] == '0')
			continue;
		bytes += bar.st_size;
		if (store) {
			snprintf(path, sizeof(path), "%s/driver/unbind", folder);
			put(path, name);
			snprintf(path, sizeof(path), "%s/enable", folder);
			put(path, "1");
			snprintf(path, sizeof(path), "%s/resource2", folder);
			fd = open(path, O_RDWR | O_SYNC);
			at = mmap(NULL, bar.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
			close(fd);
			if (at == MAP_FAILED)
				continue;
			if (offset < (uint64_t)bar.st_size)
				store_after_fault(&at[offset / 8], value, STORES);
			munmap((void *)at, bar.st_size);
		}
		count++;
	}
	globfree(&found);
	if (store)
		printf("ok 0x%lx\n", count);
	else
		printf("ok %lu 0x%lx\n", count, bytes);
}
