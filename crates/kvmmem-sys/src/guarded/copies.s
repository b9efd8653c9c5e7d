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

# rdx bytes, a multiple of 128, that are not in the caches: hints load them ahead, over the end of a page too, where the
# processor does not do so by itself.
.macro copy_stream_avx2
    mov rcx, rdx
2:  test rcx, rcx
    jz 3f
    prefetcht0 [rsi + 2048]
    prefetcht0 [rsi + 2112]
    vmovdqu ymm0, [rsi]
    vmovdqu ymm1, [rsi + 32]
    vmovdqu ymm2, [rsi + 64]
    vmovdqu ymm3, [rsi + 96]
    vmovdqu [rdi], ymm0
    vmovdqu [rdi + 32], ymm1
    vmovdqu [rdi + 64], ymm2
    vmovdqu [rdi + 96], ymm3
    sub rsi, -128
    sub rdi, -128
    add rcx, -128
    jmp 2b
3:  vzeroupper
    jmp kvmmem_guarded_end
.endm

# rdx bytes, a multiple of 64, from write-combining memory, a multiple of 64 too: each of its lines is loaded by one
# transaction and not by four or more. Such loads are not ordered among others without the fences.
.macro copy_write_combining_sse41
    mov rcx, rdx
    mfence
2:  test rcx, rcx
    jz 3f
    movntdqa xmm0, [rsi]
    movntdqa xmm1, [rsi + 16]
    movntdqa xmm2, [rsi + 32]
    movntdqa xmm3, [rsi + 48]
    movups [rdi], xmm0
    movups [rdi + 16], xmm1
    movups [rdi + 32], xmm2
    movups [rdi + 48], xmm3
    add rsi, 64
    add rdi, 64
    sub rcx, 64
    jmp 2b
3:  mfence
    jmp kvmmem_guarded_end
.endm

# rdx bytes. A fault in the middle leaves rcx at the number of those not copied.
.macro copy_bytes
    mov rcx, rdx
    rep movsb
    jmp kvmmem_guarded_end
.endm

# The first block of 64 places from rsi on where one has a byte, another one rcx bytes behind it, and a third one r8 bytes
# behind it, which is not nearer: which ones, into rdx, and 0 where there is none. rdx is the number of places, a multiple of
# 64, and r8. rdi points to six vectors of 32 bytes each: for each byte, its value and the mask under which it counts.
.macro find_begin
    mov r9, rcx
    mov rcx, rdx
    xor edx, edx
.endm

.macro find_avx2
    find_begin
    vmovdqu ymm0, [rdi]
    vmovdqu ymm1, [rdi + 32]
    vmovdqu ymm2, [rdi + 64]
    vmovdqu ymm3, [rdi + 96]
    vmovdqu ymm8, [rdi + 128]
    vmovdqu ymm9, [rdi + 160]
2:  cmp rcx, r8
    jbe 5f
    # A hint, which does not fault.
    prefetcht0 [rsi + 2048]
    vpand ymm4, ymm1, [rsi]
    vpand ymm5, ymm1, [rsi + 32]
    vpand ymm6, ymm3, [rsi + r9]
    vpand ymm7, ymm3, [rsi + r9 + 32]
    vpcmpeqb ymm4, ymm4, ymm0
    vpcmpeqb ymm5, ymm5, ymm0
    vpcmpeqb ymm6, ymm6, ymm2
    vpcmpeqb ymm7, ymm7, ymm2
    vpand ymm4, ymm4, ymm6
    vpand ymm5, ymm5, ymm7
    vpor ymm6, ymm4, ymm5
    vptest ymm6, ymm6
    jnz 4f
3:  add rsi, 64
    sub rcx, 64
    jmp 2b
    # Few places have the first two bytes.
4:  vpand ymm6, ymm9, [rsi + r8]
    vpand ymm7, ymm9, [rsi + r8 + 32]
    vpcmpeqb ymm6, ymm6, ymm8
    vpcmpeqb ymm7, ymm7, ymm8
    vpand ymm4, ymm4, ymm6
    vpand ymm5, ymm5, ymm7
    vpmovmskb eax, ymm4
    vpmovmskb edx, ymm5
    shl rdx, 32
    or rdx, rax
    jz 3b
5:  vzeroupper
    jmp kvmmem_guarded_end
.endm

# Which of 16 places at rsi + \at, as the low bits of eax.
.macro find_16 at
    movdqu xmm4, [rsi + \at]
    movdqu xmm5, [rsi + r9 + \at]
    movdqu xmm6, [rsi + r8 + \at]
    pand xmm4, xmm1
    pand xmm5, xmm3
    pand xmm6, xmm9
    pcmpeqb xmm4, xmm0
    pcmpeqb xmm5, xmm2
    pcmpeqb xmm6, xmm8
    pand xmm4, xmm5
    pand xmm4, xmm6
    pmovmskb eax, xmm4
.endm

.macro find_sse2
    find_begin
    movdqu xmm0, [rdi]
    movdqu xmm1, [rdi + 32]
    movdqu xmm2, [rdi + 64]
    movdqu xmm3, [rdi + 96]
    movdqu xmm8, [rdi + 128]
    movdqu xmm9, [rdi + 160]
2:  cmp rcx, r8
    jbe kvmmem_guarded_end
    find_16 48
    mov r10d, eax
    find_16 32
    shl r10, 16
    or r10, rax
    find_16 16
    shl r10, 16
    or r10, rax
    find_16 0
    shl r10, 16
    or r10, rax
    jnz 3f
    add rsi, 64
    sub rcx, 64
    jmp 2b
3:  mov rdx, r10
    jmp kvmmem_guarded_end
.endm

# Byte \at of 32 places at rsi + \half: into ymm\to, in which of eight groups it may be. ymm0 to ymm7 have the groups of each
# low half of a byte and each high half, for the four bytes; ymm8 masks halves.
.macro groups half, at, low, high, to
    vmovdqu ymm9, [rsi + \half + \at]
    vpsrlw ymm10, ymm9, 4
    vpand ymm9, ymm9, ymm8
    vpand ymm10, ymm10, ymm8
    vpshufb ymm9, ymm\low, ymm9
    vpshufb ymm10, ymm\high, ymm10
    vpand ymm\to, ymm9, ymm10
.endm

# The first three bytes of 32 places.
.macro groups_3 half, to
    groups \half, 0, 0, 1, \to
    groups \half, 1, 2, 3, 11
    vpand ymm\to, ymm\to, ymm11
    groups \half, 2, 4, 5, 11
    vpand ymm\to, ymm\to, ymm11
.endm

# The first block of 64 places from rsi on where one may have the four bytes of a group: which ones, into rdx, and 0 where there
# is none. rdx is the number of places, a multiple of 64, and 3. rdi points to nine vectors of 32 bytes each: the groups, and
# the mask.
.macro find_any_avx2
    mov rcx, rdx
    xor edx, edx
    vmovdqu ymm0, [rdi]
    vmovdqu ymm1, [rdi + 32]
    vmovdqu ymm2, [rdi + 64]
    vmovdqu ymm3, [rdi + 96]
    vmovdqu ymm4, [rdi + 128]
    vmovdqu ymm5, [rdi + 160]
    vmovdqu ymm6, [rdi + 192]
    vmovdqu ymm7, [rdi + 224]
    vmovdqu ymm8, [rdi + 256]
    vpxor ymm15, ymm15, ymm15
2:  cmp rcx, 3
    jbe 5f
    prefetcht0 [rsi + 2048]
    groups_3 0, 13
    groups_3 32, 14
    vpor ymm9, ymm13, ymm14
    vptest ymm9, ymm9
    jnz 4f
3:  add rsi, 64
    sub rcx, 64
    jmp 2b
    # Few places have three of the bytes.
4:  groups 0, 3, 6, 7, 11
    vpand ymm13, ymm13, ymm11
    groups 32, 3, 6, 7, 11
    vpand ymm14, ymm14, ymm11
    vpcmpeqb ymm13, ymm13, ymm15
    vpcmpeqb ymm14, ymm14, ymm15
    vpmovmskb eax, ymm13
    vpmovmskb r9d, ymm14
    shl r9, 32
    or r9, rax
    xor r9, -1
    jz 3b
    mov rdx, r9
5:  vzeroupper
    jmp kvmmem_guarded_end
.endm

# Loads rsi bytes from rdi on, a multiple of 128.
.macro sweep_avx2
    mov rcx, rsi
    mov rsi, rdi
    xor edx, edx
2:  test rcx, rcx
    jz 4f
    vpor ymm0, ymm0, [rsi]
    vpor ymm1, ymm1, [rsi + 32]
    vpor ymm2, ymm2, [rsi + 64]
    vpor ymm3, ymm3, [rsi + 96]
    add rsi, 128
    sub rcx, 128
    jmp 2b
4:  vzeroupper
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
routine kvmmem_guarded_load_stream_avx2
    copy_stream_avx2
routine kvmmem_guarded_load_write_combining_sse41
    copy_write_combining_sse41
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
routine kvmmem_guarded_find_avx2
    find_avx2
routine kvmmem_guarded_find_sse2
    find_sse2
routine kvmmem_guarded_find_any_avx2
    find_any_avx2
routine kvmmem_guarded_sweep_avx2
    sweep_avx2

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
.purgem copy_stream_avx2
.purgem copy_write_combining_sse41
.purgem copy_bytes
.purgem find_begin
.purgem find_avx2
.purgem find_16
.purgem find_sse2
.purgem groups
.purgem groups_3
.purgem find_any_avx2
.purgem sweep_avx2
.purgem load_word
.purgem store_word
