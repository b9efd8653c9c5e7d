/* SPDX-License-Identifier: GPL-2.0-only */
/* The kernel's fault injection and its search for leaks, where it was built with them (debug.config). */
#ifndef INJECT_H
#define INJECT_H

/* Whether allocations can be made to fail. Process 1 asks first, and opens the ways. */
int can_inject(void);

/* The n-th allocation that this thread makes from here on fails; whether one did, and no further one fails. */
void inject(int n);
int injected(void);

/*
 * Calls again and again, as the first allocation fails, then the second, until none does. The call returns 0, or -1
 * with an errno that says that there was no memory; then it is made once more, and succeeds. What it did is undone each
 * time. Returns how many allocations failed.
 */
int each_fails(const char *name, int (*call)(void), void (*undo)(void));

/* The same with the allocations of modules alone, and of what they call. */
int each_fails_in_modules(const char *name, int (*call)(void), void (*undo)(void));

/* Allocations that the module makes in any thread fail by chance: so many of 100. 0: none any more. */
void inject_in_module(int percent);

/* What has leaked since `forget_leaks`: prints it, and fails. */
void forget_leaks(void);
void check_leaks(void);

#endif
