# SPDX-License-Identifier: Apache-2.0 OR MIT
#
# The routines of guarded.rs, each of which returns how many bytes it has not copied.
#
# The foreign address is in rsi in all that loads and in rdi in all that stores, and what is left in rcx, up to date at
# each access. So all that the handler needs to know of an instruction is whether it is one of the loads or one of the
# stores; it goes on at kvmmem_guarded_end.

# A symbol for other objects of the program, but not for other programs.
.macro routine name
    .globl \name
    .hidden \name
    .type \name, @function
    .p2align 4
\name:
.endm

# rdx bytes, a multiple of 64.
.macro copy_blocks
    mov rcx, rdx
2:  test rcx, rcx
    jz kvmmem_guarded_end
    movups xmm0, [rsi]
    movups xmm1, [rsi + 16]
    movups xmm2, [rsi + 32]
    movups xmm3, [rsi + 48]
    movups [rdi], xmm0
    movups [rdi + 16], xmm1
    movups [rdi + 32], xmm2
    movups [rdi + 48], xmm3
    add rsi, 64
    add rdi, 64
    sub rcx, 64
    jmp 2b
.endm

# rdx bytes. A fault in the middle leaves rcx at the number of those not copied.
.macro copy_bytes
    mov rcx, rdx
    rep movsb
    jmp kvmmem_guarded_end
.endm

# A word at rdi, into rdx.
.macro load_word size, instruction:vararg
    mov rsi, rdi
    mov ecx, \size
    \instruction
    xor ecx, ecx
    jmp kvmmem_guarded_end
.endm

# A word, to rdi.
.macro store_word size, register
    mov ecx, \size
    mov [rdi], \register
    xor ecx, ecx
    jmp kvmmem_guarded_end
.endm

.pushsection .text.kvmmem_guarded, "ax", @progbits

routine kvmmem_guarded_loads
routine kvmmem_guarded_load_blocks
    copy_blocks
routine kvmmem_guarded_load_bytes
    copy_bytes
routine kvmmem_guarded_load_1
    load_word 1, movzx edx, byte ptr [rsi]
routine kvmmem_guarded_load_2
    load_word 2, movzx edx, word ptr [rsi]
routine kvmmem_guarded_load_4
    load_word 4, mov edx, [rsi]
routine kvmmem_guarded_load_8
    load_word 8, mov rdx, [rsi]

routine kvmmem_guarded_stores
routine kvmmem_guarded_store_blocks
    copy_blocks
routine kvmmem_guarded_store_bytes
    copy_bytes
routine kvmmem_guarded_store_1
    store_word 1, sil
routine kvmmem_guarded_store_2
    store_word 2, si
routine kvmmem_guarded_store_4
    store_word 4, esi
routine kvmmem_guarded_store_8
    store_word 8, rsi

routine kvmmem_guarded_end
    mov rax, rcx
    ret

.popsection

.purgem routine
.purgem copy_blocks
.purgem copy_bytes
.purgem load_word
.purgem store_word
