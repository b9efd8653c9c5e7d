// SPDX-License-Identifier: Apache-2.0 OR MIT
// Looks like a QEMU that has run its guest's firmware: 32 MiB of RAM in a sealed memfd that is mapped shared, and ACPI
// tables in it. The check of the packages runs it as another user's VM. Its name and arguments are what the broker
// reads; it ends by a signal.
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { SIZE = 32 << 20, BASE = SIZE - 0x4000 };

// Makes the bytes' sum zero.
static void seal(uint8_t *bytes, unsigned len, unsigned at)
{
	for (unsigned n = 0; n < len; n++)
		if (n != at)
			bytes[at] -= bytes[n];
}

// A table of so many 32-bit words behind its header.
static void table(uint8_t *to, const char *signature, const uint32_t *words, uint32_t count)
{
	uint32_t len = 36 + 4 * count;

	memcpy(to, signature, 4);
	memcpy(to + 4, &len, 4);
	memcpy(to + 36, words, 4 * count);
	seal(to, len, 9);
}

int main(void)
{
	int fd = memfd_create("ram", MFD_CLOEXEC | MFD_ALLOW_SEALING);
	uint8_t *ram;
	uint32_t root = BASE + 0x2000;

	if (fd < 0 || ftruncate(fd, SIZE) || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK)) {
		perror("memfd");
		return 1;
	}
	ram = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (ram == MAP_FAILED) {
		perror("mmap");
		return 1;
	}
	table(ram + BASE, "DSDT", NULL, 0);
	table(ram + BASE + 0x1000, "FACP", (uint32_t[]){ 0, BASE }, 2);
	table(ram + root, "RSDT", (uint32_t[]){ BASE + 0x1000 }, 1);
	memcpy(ram + 0xe0000, "RSD PTR \0FAKEVM\0", 16);
	memcpy(ram + 0xe0010, &root, 4);
	seal(ram + 0xe0000, 20, 8);
	for (;;)
		pause();
}
