/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR Apache-2.0 OR MIT */
/*
 * /dev/kvmmem: the memory of another virtual machine, the target.
 *
 * Views: attach the open file with a token, then use it by mmap (MAP_SHARED,
 * offset = the target's guest-physical address), pread, pwrite, lseek
 * (SEEK_DATA, SEEK_HOLE too) and poll (POLLPRI: something changed, POLLHUP: the
 * view has ended).
 *
 * v1, one page at a time: MAP replaces one page-aligned, private, anonymous,
 * writable page of the caller by a page of the target that the token names;
 * UNMAP, closing the file or the end of the process brings a fresh zero page.
 *
 * v2, libkvmi's regions: open for a target, map the region around an address,
 * mmap it at the offset that equals its first address.
 */
#ifndef _UAPI_KVMMEM_H
#define _UAPI_KVMMEM_H

#include <linux/ioctl.h>
#include <linux/types.h>

struct kvmi_map_mem_token {
	__u64 token[4];
};

/* Map the target's gpa over the page at gva. */
struct kvmi_mem_map {
	struct kvmi_map_mem_token token;
	__u64 gpa;
	__u64 gva;
};

#define KVM_INTRO_MEM_MAP	_IOW('i', 0x01, struct kvmi_mem_map)
/* The argument is the gva itself, not a pointer to it. 8 bytes, also where a long has 4. */
#define KVM_INTRO_MEM_UNMAP	_IOW('i', 0x02, __u64)

/* The region that holds gpa. In: token, gpa. Out: gpa, the region's first, and its length. */
struct kvm_guest_mem_map {
	struct kvmi_map_mem_token token;
	__u64 gpa;
	__u64 length;
};

/* The argument points to the target's UUID, 16 bytes. */
#define KVM_GUEST_MEM_OPEN	_IOW('i', 0x01, __u64)
#define KVM_GUEST_MEM_MAP	_IOWR('i', 0x02, struct kvm_guest_mem_map)
/* The argument is the region's first gpa itself; before OPEN, 0 asks whether there are regions. */
#define KVM_GUEST_MEM_UNMAP	_IOW('i', 0x03, __u64)

/* What the driver and its host can do. */
struct kvmmem_info {
	__u32 version;		/* KVMMEM_VERSION */
	__u32 features;		/* KVMMEM_FEAT_* */
	__u32 max_ranges;	/* of a view */
	__u32 event_ms;		/* the longest from a change until poll tells of it */
	__u32 reserved[4];
};

#define KVMMEM_VERSION		1
#define KVMMEM_FEAT_VIEWS	(1U << 0)	/* views can be attached */
#define KVMMEM_FEAT_HUGE_2M	(1U << 1)	/* mappings use pages of 2 MiB */
#define KVMMEM_FEAT_HUGE_1G	(1U << 2)	/* and of 1 GiB */
#define KVMMEM_FEAT_SEEK	(1U << 3)	/* SEEK_DATA knows memory that the target gave back */
#define KVMMEM_FEAT_REGIONS	(1U << 4)	/* KVM_GUEST_MEM_* are offered */
/* Bit 5 is reserved: drivers before version 0.2 set it. */
#define KVMMEM_FEAT_DEVICES	(1U << 6)	/* views are PCI devices, opened at the broker's guest endpoint */

struct kvmmem_attach {
	struct kvmi_map_mem_token token;
	__u32 flags;		/* KVMMEM_ATTACH_* */
	__u32 reserved;		/* 0 */
};

#define KVMMEM_ATTACH_READ_ONLY	(1U << 0)

/* Memory of the target that the view reaches. Disjoint, page-aligned, ascending. */
struct kvmmem_range {
	__u64 gpa;
	__u64 len;
};

struct kvmmem_ranges {
	__u64 generation;	/* out: grows with each change */
	__u32 state;		/* out: KVMMEM_STATE_* */
	__u32 rights;		/* out: KVMMEM_RIGHT_* */
	__u8 uuid[16];		/* out: the target's */
	__u32 capacity;		/* in: room for so many */
	__u32 count;		/* out: so many there are */
	__u64 ranges;		/* in: address of struct kvmmem_range[capacity] */
};

#define KVMMEM_STATE_OPEN	1
#define KVMMEM_STATE_REVOKED	2	/* the grant was revoked */
#define KVMMEM_STATE_GONE	3	/* the target or its host's service is gone */
#define KVMMEM_RIGHT_READ	(1U << 0)
#define KVMMEM_RIGHT_WRITE	(1U << 1)

/* Of this file's view, since it was attached. */
struct kvmmem_stats {
	__u64 faults_4k;
	__u64 faults_2m;
	__u64 faults_1g;
	__u64 faults_refused;	/* SIGBUS */
	__u64 read_bytes;
	__u64 written_bytes;
	__u64 events;		/* changes that the host made */
	__u64 instance;		/* one run of the target: not reset, its RAM not changed; 0: not known */
};

#define KVMMEM_INFO		_IOR('i', 0x40, struct kvmmem_info)
#define KVMMEM_ATTACH		_IOW('i', 0x41, struct kvmmem_attach)
#define KVMMEM_RANGES		_IOWR('i', 0x42, struct kvmmem_ranges)
#define KVMMEM_DETACH		_IO('i', 0x43)
#define KVMMEM_STATS		_IOR('i', 0x44, struct kvmmem_stats)

/* Hypercalls, CPL 0 only; results are 0 or -KVM_Exxx. */
#ifndef KVM_HC_MEM_MAP
#define KVM_HC_MEM_MAP		32
#define KVM_HC_MEM_UNMAP	33
#endif
#define KVM_HC_VIEW_ATTACH	40
#define KVM_HC_VIEW_DETACH	41
#define KVM_HC_VIEW_SEEK	42
#define KVM_HC_MEM_UNMAP_ALL	43

/* KVM_HC_VIEW_ATTACH: a0 points to the request, a1 to the result. */
struct kvmmem_attach_request {
	struct kvmi_map_mem_token token;
	__u32 pid;
	__u32 uid;
	__u8 comm[16];
	__u32 flags;		/* KVMMEM_ATTACH_* */
	__u32 reserved;
};

struct kvmmem_attach_result {
	__u64 descriptor_gpa;	/* names the view in the other two */
	__u64 window_gpa;
	__u64 window_len;
	__u64 reserved;
};

/* KVM_HC_VIEW_SEEK: a0 = descriptor_gpa, a1 points to a __u64 gpa, in and out, a2 = what to look for. */
#define KVMMEM_SEEK_DATA	0
#define KVMMEM_SEEK_HOLE	1

/* KVM_HC_MEM_UNMAP_ALL: a0 = what becomes of the replaced pages' content. */
#define KVMMEM_UNMAP_ALL_ZERO	0
#define KVMMEM_UNMAP_ALL_KEEP	1

/* The descriptor page of a view, little-endian. The host makes generation odd while it changes the page. */
struct kvmmem_window_range {
	__u64 gpa;
	__u64 len;
	__u64 offset;		/* in its window */
	__u32 window;
	__u32 reserved;
};

#define KVMMEM_DESCRIPTOR_MAGIC		0x57564d454d4d564bULL	/* "KVMMEMVW" */
#define KVMMEM_DESCRIPTOR_VERSION	1
#define KVMMEM_MAX_RANGES		64
#define KVMMEM_SLOT_WINDOWS		7	/* functions 1 to 7 of a PCI slot */
#define KVMMEM_FLAG_TOKENS		(1U << 0)	/* struct kvmmem_token_list follows */

#define KVMMEM_SEEN_ALL			(~0ULL)	/* as seen_generation: nothing of the view is used any more */

/* Why the driver cannot show windows that are PCI devices. */
#define KVMMEM_COMPLAINT_NO_ADDRESS	1	/* a BAR has no address: too little room behind the bridge */
#define KVMMEM_COMPLAINT_NOT_CACHED	2	/* a BAR cannot be cached */
#define KVMMEM_COMPLAINT_INVALID	3	/* the descriptor cannot be, or not with these windows */

struct kvmmem_descriptor {
	__u64 magic;
	__u32 version;
	__u32 range_size;	/* sizeof(struct kvmmem_window_range) */
	__u64 generation;
	__u32 state;		/* KVMMEM_STATE_* */
	__u32 rights;		/* KVMMEM_RIGHT_* */
	__u8 token_digest[32];	/* SHA-256 */
	__u8 uuid[16];
	__u64 window_gpa;
	__u64 window_len;
	__u32 range_count;
	__u32 flags;		/* KVMMEM_FLAG_* */
	__u64 seen_generation;	/* the driver's: the highest that it has acted upon */
	__u32 slot;		/* of the view's slots, from 0 on */
	__u32 complaint;	/* the driver's: 0, or KVMMEM_COMPLAINT_* */
	__u64 instance;		/* one run of the target; 0: not known */
	struct kvmmem_window_range ranges[KVMMEM_MAX_RANGES];
};

/* Behind the descriptor: the tokens of KVMI that wait to be used. Not covered by the generation. */
#define KVMMEM_MAX_TOKENS	64
#define KVMMEM_DIGEST_SIZE	24

struct kvmmem_token_list {
	__u8 digests[KVMMEM_MAX_TOKENS][KVMMEM_DIGEST_SIZE];	/* of SHA-256; 0: free */
	__u32 used[KVMMEM_MAX_TOKENS];	/* the driver's: first 4 bytes of the digest that it has used */
};

/* CPUID leaves of the host's side. */
#define KVMMEM_CPUID_SIGNATURE	0x40000100
#define KVMMEM_CPUID_FEATURES	0x40000101
#define KVMMEM_SIGNATURE	"KVMMEMKVMMEM"
#define KVMMEM_FEATURE_VMCALL	(1U << 0)
#define KVMMEM_FEATURE_DOORBELL	(1U << 1)
#define KVMMEM_FEATURE_WINDOW	(1U << 2)
#define KVMMEM_FEATURE_INTERRUPT	(1U << 3)

#endif /* _UAPI_KVMMEM_H */
