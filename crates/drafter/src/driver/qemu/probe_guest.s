# A guest that does, in a millisecond, what kills Linux under a KVM that cannot run Linux: loaded
# as a PVH kernel at 1 MiB, it enters long mode, takes an INT3 at CPL 0, uses CMPXCHG16B and XRSTOR
# there, counts for a while (an emulated supervisor mode is a thousand times too slow), goes to
# CPL 3 by SYSRET and comes back by SYSCALL. Success is the value 0x2a on port 0xf4, which QEMU's
# isa-debug-exit turns into exit status 85; whatever else happens is a failure.
#
# Assembled into drafter's read-only data and never executed by drafter itself.

    .pushsection .rodata.drafter_probe_guest, "a"
    .balign 16
    .globl drafter_probe_guest_start
    .globl drafter_probe_guest_end
    .hidden drafter_probe_guest_start
    .hidden drafter_probe_guest_end

    .set BASE, 0x100000
    .set PML4, 0x2000
    .set PDPT, 0x3000
    .set PD, 0x4000
    .set IDT, 0x5000
    .set XSAVE, 0x6000
    .set STACK, 0x8000
    .set USER_STACK, 0x9000

drafter_probe_guest_start:
    .code32
    cli
    cld
    xorl %eax, %eax             # the firmware was here before us
    movl $PML4, %edi
    movl $((USER_STACK - PML4) / 4), %ecx
    rep stosl
    # Page tables: the first 2 MiB, identity, for both privilege levels.
    movl $(PDPT + 7), PML4
    movl $(PD + 7), PDPT
    movl $0x87, PD
    movl $PML4, %eax
    movl %eax, %cr3
    movl %cr4, %eax
    orl $0x620, %eax            # PAE, OSFXSR, OSXMMEXCPT
    movl %eax, %cr4
    movl $0xc0000080, %ecx      # EFER: SCE, LME
    rdmsr
    orl $0x101, %eax
    wrmsr
    lgdtl BASE + (gdt_pointer - drafter_probe_guest_start)
    movl %cr0, %eax
    andl $0xfffffff3, %eax      # not EM, not TS
    orl $0x80000023, %eax       # PG, NE, MP, PE
    movl %eax, %cr0
    ljmpl $0x08, $(BASE + (long_mode - drafter_probe_guest_start))

    .code64
long_mode:
    movl $0x10, %eax
    movl %eax, %ds
    movl %eax, %es
    movl %eax, %ss
    movl $STACK, %esp

    # IDT with one gate: vector 3.
    movl $(BASE + (on_int3 - drafter_probe_guest_start)), %eax
    movl $(IDT + 3 * 16), %edi
    movw %ax, (%rdi)
    movw $0x08, 2(%rdi)
    movw $0x8e00, 4(%rdi)
    shrl $16, %eax
    movw %ax, 6(%rdi)
    movq $0, 8(%rdi)
    movl $(BASE + (idt_pointer - drafter_probe_guest_start)), %eax
    lidt (%rax)
    xorl %ebx, %ebx
    int3
    cmpl $1, %ebx
    jne failed

    # CMPXCHG16B of zeros with zeros stores rcx:rbx.
    movl $XSAVE, %edi
    xorl %eax, %eax
    xorl %edx, %edx
    xorl %ecx, %ecx
    lock cmpxchg16b (%rdi)
    jnz failed
    cmpq $1, (%rdi)
    jne failed
    movq $0, (%rdi)

    # XRSTOR of an area that asks for the initial state, where there is XSAVE.
    movl $1, %eax
    xorl %ecx, %ecx
    cpuid
    btl $26, %ecx
    jnc no_xsave
    movq %cr4, %rax
    orl $0x40000, %eax          # OSXSAVE
    movq %rax, %cr4
    movl $1, %eax
    xorl %edx, %edx
    xorl %ecx, %ecx
    xsetbv
    movl $0x1f80, XSAVE + 24    # MXCSR
    movl $3, %eax
    xorl %edx, %edx
    movl $XSAVE, %edi
    xrstor64 (%rdi)
no_xsave:

    movl $20000000, %ecx
count:
    decl %ecx
    jnz count

    movl $0xc0000081, %ecx      # STAR: SYSCALL to 0x08/0x10, SYSRET to 0x23/0x1b
    xorl %eax, %eax
    movl $0x00100008, %edx
    wrmsr
    movl $0xc0000082, %ecx      # LSTAR
    movl $(BASE + (on_syscall - drafter_probe_guest_start)), %eax
    xorl %edx, %edx
    wrmsr
    movl $0xc0000084, %ecx      # FMASK
    movl $0x200, %eax
    xorl %edx, %edx
    wrmsr
    movl $(BASE + (user - drafter_probe_guest_start)), %ecx
    movl $0x2, %r11d
    movl $USER_STACK, %esp
    sysretq

user:
    movl %cs, %eax
    andl $3, %eax
    cmpl $3, %eax
    jne failed
    syscall
    jmp failed

on_syscall:
    movl %cs, %eax
    testl $3, %eax
    jnz failed
    movq %cr0, %rax             # faults at CPL 3, whatever CS says
    movb $0x2a, %al
    outb %al, $0xf4
    jmp halt

on_int3:
    incl %ebx
    iretq

failed:
    movb $0x01, %al
    outb %al, $0xf4
halt:
    hlt
    jmp halt

    .balign 8
gdt:
    .quad 0
    .quad 0x00af9b000000ffff    # 0x08 code, CPL 0, 64 bit
    .quad 0x00cf93000000ffff    # 0x10 data, CPL 0
    .quad 0x00cff3000000ffff    # 0x18 data, CPL 3
    .quad 0x00affb000000ffff    # 0x20 code, CPL 3, 64 bit
gdt_pointer:
    .word gdt_pointer - gdt - 1
    .long BASE + (gdt - drafter_probe_guest_start)
    .long 0
idt_pointer:
    .word 4 * 16 - 1
    .quad IDT
drafter_probe_guest_end:
    .popsection
