/* Answers the cpuid instructions that `benchmarks.restrict` has made invalid, with everything wider than AVX2 left out.
 *
 * The handler looks at the two bytes that faulted. Compilers never emit them, so any other invalid
 * instruction is a real fault, and ends the process as it would have without us. */

#define _GNU_SOURCE /* the names of the registers */
#include <cpuid.h>
#include <signal.h>
#include <ucontext.h>

static const unsigned char INVALID[2] = {0x0f, 0x0a};

/* Leaf 7: AVX512 in all its parts, AMX. */
static const unsigned EBX_7_0 = 1u << 16 | 1u << 17 | 1u << 21 | 1u << 26 | 1u << 27 | 1u << 28 | 1u << 30 | 1u << 31;
static const unsigned ECX_7_0 = 1u << 1 | 1u << 6 | 1u << 11 | 1u << 12 | 1u << 14;
static const unsigned EDX_7_0 = 1u << 2 | 1u << 3 | 1u << 8 | 1u << 22 | 1u << 23 | 1u << 24 | 1u << 25;
/* Its first subleaf: AVX-VNNI, AVX512-BF16, AMX-FP16, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AMX-COMPLEX,
 * AVX-VNNI-INT16, AVX10. */
static const unsigned EAX_7_1 = 1u << 4 | 1u << 5 | 1u << 21 | 1u << 23;
static const unsigned EDX_7_1 = 1u << 4 | 1u << 5 | 1u << 8 | 1u << 10 | 1u << 19;

static void answer(int number, siginfo_t *info, void *context) {
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)registers[REG_RIP];
    (void)info;
    if (at[0] != INVALID[0] || at[1] != INVALID[1]) {
        signal(number, SIG_DFL); /* returning repeats the instruction, now with the default action */
        return;
    }
    unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX];
    unsigned eax, ebx, ecx, edx;
    __cpuid_count(leaf, subleaf, eax, ebx, ecx, edx);
    if (leaf == 7 && subleaf == 0) {
        ebx &= ~EBX_7_0;
        ecx &= ~ECX_7_0;
        edx &= ~EDX_7_0;
    } else if (leaf == 7 && subleaf == 1) {
        eax &= ~EAX_7_1;
        edx &= ~EDX_7_1;
    }
    registers[REG_RAX] = eax;
    registers[REG_RBX] = ebx;
    registers[REG_RCX] = ecx;
    registers[REG_RDX] = edx;
    registers[REG_RIP] += sizeof INVALID;
}

__attribute__((constructor)) static void install(void) {
    struct sigaction action = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGILL, &action, 0);
}
