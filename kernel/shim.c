// SPDX-License-Identifier: GPL-2.0-only
/* What the module needs and C has as macros or inline functions only. The callers and their arguments: sys/. */
#include <linux/hugetlb.h>
#include <linux/mm.h>
#include <linux/mmu_notifier.h>
#include <linux/pci.h>
#include <linux/reboot.h>
#include <linux/sched/signal.h>
#include <linux/suspend.h>
#include <linux/uaccess.h>
#include <asm/alternative.h>
#include <asm/asm.h>
#include <asm/cpufeature.h>
#include <crypto/sha2.h>
#include <crypto/utils.h>

__diag_ignore_all("-Wmissing-prototypes", "called from Rust only");

/*
 * rdi = 0: KVM looks there for the sub-function of Xen's hypercall 32. Where the
 * CPU does not know the instruction, the result is nr, which is no answer of KVM's.
 */
long kvmmem_vmcall(unsigned long nr, unsigned long a0, unsigned long a1, unsigned long a2)
{
	asm volatile("1: " ALTERNATIVE("vmcall", "vmmcall", X86_FEATURE_VMMCALL) "\n2:" _ASM_EXTABLE(1b, 2b)
		     : "+a"(nr) : "b"(a0), "c"(a1), "d"(a2), "S"(0L), "D"(0L) : "memory");
	return nr;
}

long kvmmem_doorbell(u16 port, unsigned long nr, unsigned long a0, unsigned long a1, unsigned long a2)
{
	asm volatile("inl %%dx, %%eax" : "+a"(nr) : "d"(port), "b"(a0), "c"(a1), "D"(a2), "S"(0L) : "memory");
	return (int)nr;
}

u64 kvmmem_page_gpa(struct page *page)
{
	return page_to_phys(page);
}

bool kvmmem_page_is_anonymous(struct page *page)
{
	struct folio *folio = page_folio(page);

	return folio_test_anon(folio) && !folio_test_ksm(folio) && !folio_test_hugetlb(folio) && !folio_is_zone_device(folio);
}

/* Like the other users of pinned_vm, against RLIMIT_MEMLOCK of the calling process. */
int kvmmem_charge(struct mm_struct *mm)
{
	if (atomic64_inc_return(&mm->pinned_vm) <= rlimit(RLIMIT_MEMLOCK) >> PAGE_SHIFT || capable(CAP_IPC_LOCK))
		return 0;
	atomic64_dec(&mm->pinned_vm);
	return -ENOMEM;
}

void kvmmem_uncharge(struct mm_struct *mm)
{
	atomic64_dec(&mm->pinned_vm);
}

bool kvmmem_is_killed(void)
{
	return fatal_signal_pending(current);
}

struct mmu_notifier *kvmmem_notifier_get(const struct mmu_notifier_ops *ops, struct mm_struct *mm)
{
	return mmu_notifier_get(ops, mm);
}

int kvmmem_register_reboot_notifier(struct notifier_block *block)
{
	return register_reboot_notifier(block);
}

int kvmmem_unregister_reboot_notifier(struct notifier_block *block)
{
	return unregister_reboot_notifier(block);
}

int kvmmem_register_pm_notifier(struct notifier_block *block)
{
	return register_pm_notifier(block);
}

int kvmmem_unregister_pm_notifier(struct notifier_block *block)
{
	return unregister_pm_notifier(block);
}

int kvmmem_pci_domain(struct pci_dev *device)
{
	return pci_domain_nr(device->bus);
}

void kvmmem_set_pfnmap(struct vm_area_struct *vma)
{
	vm_flags_set(vma, VM_PFNMAP);
}

void kvmmem_pagefault_disable(void)
{
	pagefault_disable();
}

void kvmmem_pagefault_enable(void)
{
	pagefault_enable();
}

void kvmmem_sha256(const u8 *data, size_t len, u8 *out)
{
	sha256(data, len, out);
}

bool kvmmem_differ(const void *a, const void *b, size_t len)
{
	return crypto_memneq(a, b, len);
}
