/* SPDX-License-Identifier: (GPL-2.0-only WITH Linux-syscall-note) OR Apache-2.0 OR MIT */
/*
 * /dev/kvmmem: map a page of another virtual machine into this process.
 *
 * MAP replaces one page-aligned, private, anonymous, writable page of the
 * caller by a page of the target that the token names; UNMAP, closing the
 * file or the end of the process brings a fresh zero page.
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
/* The argument is the gva itself, not a pointer to it. 8 bytes, whatever a long is. */
#define KVM_INTRO_MEM_UNMAP	_IOW('i', 0x02, __u64)

/* Hypercalls, CPL 0 only; results are 0 or -KVM_Exxx. */
#ifndef KVM_HC_MEM_MAP
#define KVM_HC_MEM_MAP		32
#define KVM_HC_MEM_UNMAP	33
#endif

/* CPUID leaves of the host's side. */
#define KVMMEM_CPUID_SIGNATURE	0x40000100
#define KVMMEM_CPUID_FEATURES	0x40000101
#define KVMMEM_SIGNATURE	"KVMMEMKVMMEM"
#define KVMMEM_FEATURE_VMCALL	(1U << 0)
#define KVMMEM_FEATURE_DOORBELL	(1U << 1)

#endif /* _UAPI_KVMMEM_H */
