/* SPDX-License-Identifier: GPL-2.0-only */
/* What happens to the machine as a whole: sleep, memory that is plugged in, another kernel. */
#ifndef MACHINE_H
#define MACHINE_H

void test_sleep(void);
void test_sleep_of_devices(void);
void test_memory_hotplug(void);

/* Loads the kernel that is started next, by kexec or when this one panics. */
void load_next_kernel(int is_for_crash);
/* These do not return. */
void start_next_kernel(void);
void crash(void);
/* In the kernels that were started so. */
int is_after(const char *what);
void test_after_kexec(void);
void test_after_crash(void);

#endif
