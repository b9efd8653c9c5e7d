// SPDX-License-Identifier: GPL-2.0-only
/* v1 and v2 where views are PCI devices: MAP with the tokens that a view's page lists. */
#define _GNU_SOURCE
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "plug.h"

#define RO	KVMMEM_RIGHT_READ
#define RW	(KVMMEM_RIGHT_READ | KVMMEM_RIGHT_WRITE)

/* The view's ticket, and two tokens. */
#define TICKET	0
#define ONE	1
#define TWO	2

static struct kvmmem_token_list *list(void)
{
	return (struct kvmmem_token_list *)(page_of(HEAD_A) + 1);
}

static void lists(int entry, int token)
{
	for (int i = 0; i < KVMMEM_MAX_TOKENS; i++)
		if (!memcmp(list()->digests[i], plug_digest(token), KVMMEM_DIGEST_SIZE))
			memset(list()->digests[i], 0, KVMMEM_DIGEST_SIZE);
	list()->used[entry] = 0;
	memcpy(list()->digests[entry], plug_digest(token), KVMMEM_DIGEST_SIZE);
}

static int is_used(int entry)
{
	return !memcmp(&list()->used[entry], list()->digests[entry], sizeof(list()->used[entry]));
}

static int map_page(int fd, const void *gva, unsigned long gpa, int token)
{
	struct kvmi_mem_map argument = { .token.token[0] = token, .gpa = gpa, .gva = (unsigned long)gva };

	return ioctl(fd, KVM_INTRO_MEM_MAP, &argument);
}

static unsigned long number_at(const char *p)
{
	return *(const volatile unsigned long *)p;
}

/* A page of the tool's, which is not zero. */
static char *own_page(void)
{
	char *p = pages(1);

	*(volatile unsigned long *)p = 4711;
	return p;
}

static void mapped(int fd, char *p, unsigned long gpa)
{
	lists(3, ONE);
	CHECK_EQUAL(map_page(fd, p, gpa, ONE), 0);
	CHECK(is_used(3));
	CHECK_EQUAL(number_at(p), shared_content(gpa));
}

static void once_around(void)
{
	char *p = own_page(), *q = own_page();
	int fd = device();

	CHECK_REFUSED(map_page(fd, p, FIRST, ONE), ENOENT);
	lists(63, TWO);
	CHECK_REFUSED(map_page(fd, p, FIRST, ONE), ENOENT);
	CHECK_EQUAL(number_at(p), 4711);
	lists(5, ONE);
	CHECK_EQUAL(map_page(fd, p, THIRD + PAGE, ONE), 0);
	CHECK(is_used(5) && !is_used(63));
	CHECK_EQUAL(counter("mapped"), 1);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-mapped"), 1);
	CHECK_EQUAL(number_at(p), shared_content(THIRD + PAGE));
	*shared(THIRD_AT + PAGE) = 42;
	CHECK_EQUAL(number_at(p), 42);
	*(volatile unsigned long *)p = shared_content(THIRD + PAGE);
	CHECK_EQUAL(*shared(THIRD_AT + PAGE), shared_content(THIRD + PAGE));
	/* Once. The other one is still good, and for the same page as well. */
	CHECK_REFUSED(map_page(fd, q, FIRST, ONE), ENOENT);
	CHECK_REFUSED(map_page(fd, p, FIRST, TWO), EALREADY);
	CHECK_EQUAL(map_page(fd, q, THIRD + PAGE, TWO), 0);
	CHECK_EQUAL(number_at(q), shared_content(THIRD + PAGE));
	CHECK_EQUAL(unmap(fd, p), 0);
	CHECK_EQUAL(number_at(p), 0);
	*(volatile unsigned long *)p = 1;
	CHECK_EQUAL(*shared(THIRD_AT + PAGE), shared_content(THIRD + PAGE));
	CHECK_REFUSED(unmap(fd, p), ENOENT);
	CHECK_REFUSED(unmap(fd, p + 1), EINVAL);
	mapped(fd, p, FIRST);
	/* Withdrawn by the host. */
	memset(list()->digests[3], 0, KVMMEM_DIGEST_SIZE);
	CHECK_REFUSED(map_page(fd, q, FIRST, ONE), EALREADY);
	CHECK_EQUAL(unmap(fd, q), 0);
	CHECK_REFUSED(map_page(fd, q, FIRST, ONE), ENOENT);
	close(fd);
	CHECK_EQUAL(number_at(p), 0);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(counter("views"), 0);
	munmap(p, PAGE);
	munmap(q, PAGE);
}

static void refused(void)
{
	char *p = own_page(), *shared_page;
	int fd = device();

	lists(0, ONE);
	CHECK_REFUSED(map_page(fd, p + 8, FIRST, ONE), EINVAL);
	CHECK_REFUSED(map_page(fd, p, FIRST + 8, ONE), EINVAL);
	CHECK_REFUSED(map_page(fd, (void *)-PAGE, FIRST, ONE), EINVAL);
	CHECK_REFUSED(ioctl(fd, KVM_INTRO_MEM_MAP, 8), EFAULT);
	CHECK_REFUSED(map_page(fd, p, FIRST + FIRST_SIZE, ONE), EFAULT);
	CHECK_REFUSED(map_page(fd, p, 1UL << 60, ONE), EFAULT);
	shared_page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	CHECK_REFUSED(map_page(fd, shared_page, FIRST, ONE), EINVAL);
	munmap(shared_page, PAGE);
	CHECK_REFUSED(map_page(fd, shared_page, FIRST, ONE), EFAULT);
	mprotect(p, PAGE, PROT_READ);
	CHECK_REFUSED(map_page(fd, p, FIRST, ONE), EINVAL);
	mprotect(p, PAGE, PROT_READ | PROT_WRITE);
	CHECK_EQUAL(number_at(p), 4711);
	/* None of that has used it. */
	CHECK(!is_used(0));
	CHECK_EQUAL(map_page(fd, p, FIRST, ONE), 0);
	/* No way to run it, and none to another page. */
	CHECK_REFUSED(mprotect(p, PAGE, PROT_READ | PROT_EXEC), EACCES);
	CHECK(mremap(p, PAGE, 2 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED);
	CHECK(mremap(p, 0, PAGE, MREMAP_MAYMOVE) == MAP_FAILED);
	CHECK(mremap(p, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_DONTUNMAP) == MAP_FAILED);
	/* Nor to a child. */
	CHECK_REFUSED(madvise(p, PAGE, MADV_DOFORK), EINVAL);
	CHECK_EQUAL(syscall(SYS_remap_file_pages, p, PAGE, 0, FIRST / PAGE + 1, 0), -1);
	CHECK(signal_of_read(p) == SIGSEGV || number_at(p) == shared_content(FIRST));
	close(fd);
	munmap(p, PAGE);
}

static void as_a_child(int fd, char *p)
{
	pid_t child = fork();
	int status;

	if (!child) {
		signal(SIGSEGV, SIG_DFL);
		if (ioctl(fd, KVM_INTRO_MEM_UNMAP, p) != -1 || errno != EINVAL)
			_exit(1);
		number_at(p);
		_exit(0);
	}
	waitpid(child, &status, 0);
	CHECK(WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
}

static void lived(void)
{
	char *p = own_page(), *q = own_page(), *moved;
	int fd = device(), other = device();

	/* Through any file; closing one spares the other's. */
	mapped(fd, p, FIRST);
	mapped(other, q, FIRST + MIB);
	CHECK_EQUAL(unmap(other, p), 0);
	CHECK_EQUAL(number_at(p), 0);
	mapped(fd, p, FIRST + PAGE);
	close(other);
	CHECK_EQUAL(number_at(q), 0);
	CHECK_EQUAL(number_at(p), shared_content(FIRST + PAGE));
	as_a_child(fd, p);
	CHECK_EQUAL(number_at(p), shared_content(FIRST + PAGE));
	/* munmap undoes it, and what comes there then is the tool's. */
	munmap(p, PAGE);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_REFUSED(unmap(fd, p), ENOENT);
	CHECK(mmap(p, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p);
	*(volatile unsigned long *)p = 12;
	mapped(fd, q, FIRST);
	moved = mremap(q, PAGE, PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, pages(1));
	CHECK(moved != MAP_FAILED);
	CHECK_EQUAL(number_at(moved), shared_content(FIRST));
	CHECK_EQUAL(counter("mapped"), 1);
	CHECK_EQUAL(unmap(fd, moved), 0);
	CHECK_EQUAL(number_at(moved), 0);
	mapped(fd, moved, FIRST);
	close(fd);
	CHECK_EQUAL(number_at(moved), 0);
	CHECK_EQUAL(number_at(p), 12);
	CHECK_EQUAL(counter("mapped"), 0);
	munmap(p, PAGE);
	munmap(moved, PAGE);
}

/* The opener is gone, or another process closes the file last. */
static void closed_elsewhere(void)
{
	char *p = own_page();
	int fd = device(), ends[2];
	pid_t child;

	CHECK_EQUAL(pipe(ends), 0);
	mapped(fd, p, FIRST);
	child = fork();
	if (!child) {
		char byte;

		_exit(read(ends[0], &byte, 1) != 1);
	}
	close(fd);
	/* The child still has it. */
	CHECK_EQUAL(number_at(p), shared_content(FIRST));
	CHECK_EQUAL(write(ends[1], "", 1), 1);
	waitpid(child, NULL, 0);
	CHECK(WITHIN(signal_of_read(p) == SIGBUS));
	CHECK_EQUAL(counter("views"), 0);
	munmap(p, PAGE);
	close(ends[0]);
	close(ends[1]);
}

static void exits(void)
{
	mapped(device(), own_page(), FIRST);
}

static void limited(void)
{
	char *p = pages(64);
	int fd = device();

	for (int i = 0; i < 64; i++) {
		mapped(fd, p + i * PAGE, FIRST + i * PAGE);
		CHECK_EQUAL(counter("mapped"), i + 1);
	}
	for (int i = 0; i < 64; i++)
		CHECK_EQUAL(number_at(p + i * PAGE), shared_content(FIRST + i * PAGE));
	for (int i = 0; i < 64; i += 2)
		CHECK_EQUAL(unmap(fd, p + i * PAGE), 0);
	CHECK_EQUAL(fdinfo(fd, "kvmmem-mapped"), 32);
	close(fd);
	for (int i = 0; i < 64; i++)
		CHECK_EQUAL(number_at(p + i * PAGE), 0);
	CHECK_EQUAL(counter("mapped"), 0);
	munmap(p, 64 * PAGE);
}

/* libkvmi's regions, beside v1 and in two files. */
static void as_regions(void)
{
	struct kvm_guest_mem_map region = { .gpa = FIRST + 5 * PAGE };
	char *p, *q = own_page();
	unsigned char uuid[16];
	int fd = device(), other = device(), v1 = device();

	memset(uuid, 0x60, sizeof(uuid));
	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_OPEN, uuid), 0);
	CHECK_EQUAL(ioctl(other, KVM_GUEST_MEM_OPEN, uuid), 0);
	region.token.token[0] = ONE;
	CHECK_REFUSED(ioctl(fd, KVM_GUEST_MEM_MAP, &region), ENOENT);
	lists(0, ONE);
	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_MAP, &region), 0);
	CHECK(region.gpa == FIRST && region.length == FIRST_SIZE && is_used(0));
	CHECK_REFUSED(ioctl(other, KVM_GUEST_MEM_MAP, &region), ENOENT);
	lists(1, TWO);
	region = (struct kvm_guest_mem_map){ .token.token[0] = TWO, .gpa = THIRD };
	CHECK_EQUAL(ioctl(other, KVM_GUEST_MEM_MAP, &region), 0);
	CHECK(region.gpa == THIRD && region.length == THIRD_SIZE);
	mapped(v1, q, FIRST);
	CHECK_EQUAL(counter("views"), 3);
	p = mmap(NULL, FIRST_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, FIRST);
	CHECK_EQUAL(number_at(p), shared_content(FIRST));
	munmap(p, FIRST_SIZE);
	CHECK_EQUAL(ioctl(fd, KVM_GUEST_MEM_UNMAP, FIRST), 0);
	/* Each file acknowledges changes by itself, and the host hears of the last. */
	plug_shows_usual(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(number_at(q), shared_content(FIRST));
	close(fd);
	close(other);
	plug_shows_usual(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
	close(v1);
	plug_shows_usual(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
	CHECK(!is_mapped("A.1"));
	munmap(q, PAGE);
}

static void read_only(void)
{
	const struct kvmmem_window_range range[] = { { FIRST, FIRST_SIZE, FIRST_AT, 1, 0 } };
	char *p = own_page();
	int fd = device();

	plug_shows(HEAD_A, RO, range, 1);
	CHECK(plug_is_seen(HEAD_A));
	lists(0, ONE);
	CHECK_REFUSED(map_page(fd, p, FIRST, ONE), EPERM);
	CHECK(!is_used(0));
	CHECK_EQUAL(number_at(p), 4711);
	plug_shows_usual(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(map_page(fd, p, FIRST, ONE), 0);
	close(fd);
	munmap(p, PAGE);
}

static void ended(void)
{
	char *p = own_page(), *q = own_page();
	int fd = device();

	mapped(fd, p, FIRST);
	mapped(fd, q, FIRST + MIB);
	plug_sets_state(HEAD_A, KVMMEM_STATE_REVOKED);
	CHECK(plug_is_seen(HEAD_A));
	CHECK(!is_mapped("A.1"));
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_EQUAL(signal_of_write(q), SIGBUS);
	lists(0, ONE);
	CHECK_REFUSED(map_page(fd, p, FIRST, ONE), EALREADY);
	CHECK_EQUAL(unmap(fd, p), 0);
	CHECK_EQUAL(number_at(p), 0);
	CHECK_REFUSED(map_page(fd, p, FIRST, ONE), ENOENT);
	/* The host shows it again, as another view. */
	plug_shows_usual(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
	mapped(fd, p, FIRST);
	CHECK_EQUAL(signal_of_read(q), SIGBUS);
	/* Its devices go under it. */
	unplug_view();
	CHECK_EQUAL(signal_of_read(p), SIGBUS);
	CHECK_REFUSED(map_page(fd, own_page(), FIRST, TWO), ENOENT);
	close(fd);
	CHECK_EQUAL(number_at(p), 0);
	CHECK_EQUAL(number_at(q), 0);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK_EQUAL(counter("views"), 0);
	munmap(p, PAGE);
	munmap(q, PAGE);
}

void test_window_page(void)
{
	plug_writes(HEAD_A, TICKET, 0);
	plug_writes(HEAD_B, TICKET, 1);
	memset(list(), 0, sizeof(*list()));
	page_of(HEAD_A)->flags = KVMMEM_FLAG_TOKENS;
	plug_shows_usual(HEAD_A);
	plug_in_view();
	once_around();
	refused();
	lived();
	closed_elsewhere();
	in_child(exits);
	CHECK_EQUAL(counter("mapped"), 0);
	CHECK(WITHIN(counter("views") == 0));
	limited();
	as_regions();
	read_only();
	ended();
	/* The page is another view's now. */
	memset(list(), 0, sizeof(*list()));
	page_of(HEAD_A)->flags = 0;
}
