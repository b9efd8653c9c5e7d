// SPDX-License-Identifier: GPL-2.0-only
/* A host whose PCI devices cannot be: a complaint, or the end of a view that is open. */
#define _GNU_SOURCE
#include "malformed.h"
#include "plug.h"

static const struct malformed malformed[] = {
	{ FIELD(version), 2 },
	{ FIELD(range_size), 24 },
	{ FIELD(state), 0 },
	{ FIELD(rights), 0 },
	{ FIELD(range_count), 65 },
	{ FIELD(ranges[0].len), 0 },
	{ FIELD(ranges[0].offset), WINDOW_1 - PAGE },
	{ FIELD(ranges[0].offset), -PAGE },
	{ FIELD(ranges[1].offset), WINDOW_2 - SECOND_SIZE + PAGE },
	{ FIELD(ranges[2].offset), WINDOW_8 },
	{ FIELD(ranges[2].gpa), SECOND },
	{ FIELD(window_gpa), PAGE },
	{ FIELD(ranges[0].window), 0 },
};

static void tell(int i)
{
	plug_shows_usual(HEAD_A);
	plug_begins(HEAD_A);
	/* No device, though the page says where: this machine's RAM. */
	if (!malformed[i].value && malformed[i].at == offsetof(struct kvmmem_descriptor, ranges[0].window)) {
		page_of(HEAD_A)->window_gpa = RAM;
		page_of(HEAD_A)->window_len = WINDOW_1;
	}
	spoil(page_of(HEAD_A), &malformed[i]);
	plug_ends(HEAD_A);
}

static void restore_page(void)
{
	plug_begins(HEAD_A);
	page_of(HEAD_A)->version = KVMMEM_DESCRIPTOR_VERSION;
	page_of(HEAD_A)->window_gpa = 0;
	page_of(HEAD_A)->window_len = 0;
	plug_ends(HEAD_A);
	plug_shows_usual(HEAD_A);
}

static void when_plugged_in(void)
{
	int fd = device();

	for (int i = 0; i < COUNT(malformed); i++) {
		tell(i);
		CHECK_EQUAL(rebind_all(), 0);
		CHECK_EQUAL(plug_complaint(HEAD_A), KVMMEM_COMPLAINT_INVALID);
		CHECK_EQUAL(page_of(HEAD_A)->seen_generation, 0);
		CHECK_REFUSED(attach(fd, 0, 0), ENOENT);
		restore_page();
	}
	close(fd);
}

static void when_open(void)
{
	for (int i = 0; i < COUNT(malformed); i++) {
		CHECK_EQUAL(rebind_all(), 0);
		CHECK(plug_is_seen(HEAD_A));
		check_end(FIRST, tell, i);
		CHECK_EQUAL(plug_complaint(HEAD_A), KVMMEM_COMPLAINT_INVALID);
		restore_page();
	}
}

/* What may still come is no reason to complain, and nothing that can be attached to. */
static void incomplete(void)
{
	static const unsigned int missing[] = { 3, 7, 9, 15, 1000, -1 };
	int fd = device();

	for (int i = 0; i < COUNT(missing); i++) {
		plug_begins(HEAD_A);
		page_of(HEAD_A)->ranges[1].window = missing[i];
		plug_ends(HEAD_A);
		CHECK_EQUAL(rebind_all(), 0);
		usleep(20000);
		CHECK(!page_of(HEAD_A)->seen_generation && !page_of(HEAD_A)->complaint);
		CHECK_REFUSED(attach(fd, 0, 0), ENOENT);
	}
	/* It comes. */
	plug_shows_usual(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	close(fd);

	/* A page that the host is still changing. */
	plug_begins(HEAD_A);
	CHECK_EQUAL(rebind_all(), 0);
	usleep(20000);
	CHECK(!page_of(HEAD_A)->seen_generation && !page_of(HEAD_A)->complaint);
	plug_ends(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
}

static void generations(void)
{
	char byte;
	int fd;

	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	check_generation(FIRST, page_of(HEAD_A));

	/* A host that is stopped in the midst of a change: the ticket stays good. */
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = device();
	plug_begins(HEAD_A);
	CHECK_REFUSED(attach(fd, 0, 0), EAGAIN);
	plug_ends(HEAD_A);
	CHECK(plug_is_seen(HEAD_A));
	CHECK_EQUAL(attach(fd, 0, 0), 0);
	CHECK_REFUSED(attach(fd, 0, 0), EISCONN);
	plug_begins(HEAD_A);
	CHECK_REFUSED(pread(fd, &byte, 1, FIRST), EAGAIN);
	plug_ends(HEAD_A);
	CHECK_EQUAL(pread(fd, &byte, 1, FIRST), 1);
	CHECK(plug_is_seen(HEAD_A));
	close(fd);

	/* Devices that go in the midst of a change. */
	CHECK_EQUAL(rebind_all(), 0);
	CHECK(plug_is_seen(HEAD_A));
	fd = attached(0, 0);
	plug_begins(HEAD_A);
	CHECK_EQUAL(unbind("A.1"), 0);
	CHECK_EQUAL(polled(fd, LONG), POLLPRI | POLLHUP);
	CHECK_REFUSED(pread(fd, &byte, 1, FIRST), ESTALE);
	plug_ends(HEAD_A);
	close(fd);
	CHECK_EQUAL(bind("A.1"), 0);
}

/* Function 0 is no descriptor: neither it nor the others are ours. */
static void no_descriptor(void)
{
	unbind("A.1");
	unbind("A.2");
	unbind("A.0");
	page_of(HEAD_A)->magic++;
	CHECK_EQUAL(bind("A.0"), ENODEV);
	CHECK_EQUAL(bind("A.1"), EAGAIN);
	page_of(HEAD_A)->magic--;
	CHECK_EQUAL(bind("A.0"), 0);
	CHECK_EQUAL(bind("A.1"), 0);
	CHECK_EQUAL(bind("A.2"), 0);
}

/* More than the bus has addresses for. */
static void no_address(void)
{
	const struct kvmmem_window_range range = { FIRST, PAGE, 0, 1, 0 };
	int fd = device();

	plug_writes(HEAD_A, 0, 0);
	plug_shows(HEAD_A, KVMMEM_RIGHT_READ, &range, 1);
	plug_in("0f.1", "huge,size=4G");
	plug_in("0f.0", "page0,size=4K");
	CHECK_EQUAL(plug_complaint(HEAD_A), KVMMEM_COMPLAINT_NO_ADDRESS);
	CHECK_EQUAL(page_of(HEAD_A)->seen_generation, 0);
	CHECK_REFUSED(attach(fd, 0, 0), ENOENT);
	unplug("0f.0");
	close(fd);
}

void test_malformed_devices(void)
{
	when_plugged_in();
	when_open();
	incomplete();
	generations();
	no_descriptor();
	unplug_view();
	no_address();
}
