// One row per machine, best first: the first row whose needs are all present is the machine that runs.
// AVX-512F alone is not enough for AVX-512: a row needs every feature that code for it may be compiled with.

#include "dispatch.h"

#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace tilefold {
namespace {

enum Bit : unsigned {
    AVX2 = 1 << 0,
    FMA = 1 << 1,
    F16C = 1 << 2,
    AVX512F = 1 << 3,
    AVX512BW = 1 << 4,
    AVX512DQ = 1 << 5,
    AVX512VL = 1 << 6,
    AVX512BF16 = 1 << 7,
    NEON = 1 << 8,
    BF16 = 1 << 9,
    AMX = 1 << 10,
    AVX512VBMI = 1 << 11,
};

#if defined(__x86_64__)
constexpr unsigned NEEDS_AVX2 = AVX2 | FMA | F16C;
constexpr unsigned NEEDS_AVX512 = NEEDS_AVX2 | AVX512F | AVX512BW | AVX512DQ | AVX512VL;
#endif

constexpr Machine machines[] = {
#if defined(__x86_64__)
    {"avx512_amx", NEEDS_AVX512 | AVX512BF16 | AVX512VBMI | AMX, avx512_amx::kernels},
    {"avx512_bf16", NEEDS_AVX512 | AVX512BF16, avx512_bf16::kernels},
    {"avx512", NEEDS_AVX512, avx512::kernels},
    {"avx2", NEEDS_AVX2, avx2::kernels},
#endif
#if defined(__aarch64__)
    {"neon", NEON, neon::kernels},
#endif
    {"scalar", 0, scalar::kernels},
};

#if defined(__x86_64__)

// Clang's __builtin_cpu_supports did not always know this name. The bit says nothing of the operating system,
// but a machine that needs f16c needs avx2 too, and there the builtin has asked for both.
bool has_f16c() {
    unsigned eax, ebx, ecx, edx;
    return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}

// Tiles of bf16 and of bytes, in the processor and granted by the operating system, which keeps their 8 KiB
// out of a thread's state until a process asks.
bool has_amx() {
    unsigned eax, ebx, ecx, edx;
    constexpr unsigned all = 1 << 22 | 1 << 24 | 1 << 25;  // bf16, tiles, int8
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
    if ((edx & all) != all) return false;
#if defined(__linux__)
    constexpr long arch_req_xcomp_perm = 0x1023, xtiledata = 18;
    return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xtiledata) == 0;
#else
    return false;
#endif
}

#elif defined(__aarch64__)

bool has_bf16() {
#if defined(__linux__)
    constexpr unsigned long hwcap2_bf16 = 1 << 14;
    return getauxval(AT_HWCAP2) & hwcap2_bf16;
#elif defined(__APPLE__)
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname("hw.optional.arm.FEAT_BF16", &value, &size, nullptr, 0) == 0 && value;
#else
    return false;
#endif
}

#endif

unsigned present() {
    unsigned bits = 0;
    for (const Feature& feature : features())
        if (feature.present) bits |= feature.bit;
    return bits;
}

bool supported(const Machine& machine) { return (machine.needs & ~present()) == 0; }

}  // namespace

std::span<const Feature> features() {
#if defined(__x86_64__)
    static const Feature table[] = {
        {"avx2", AVX2, __builtin_cpu_supports("avx2") != 0},
        {"fma", FMA, __builtin_cpu_supports("fma") != 0},
        {"f16c", F16C, has_f16c()},
        {"avx512f", AVX512F, __builtin_cpu_supports("avx512f") != 0},
        {"avx512bw", AVX512BW, __builtin_cpu_supports("avx512bw") != 0},
        {"avx512dq", AVX512DQ, __builtin_cpu_supports("avx512dq") != 0},
        {"avx512vl", AVX512VL, __builtin_cpu_supports("avx512vl") != 0},
        {"avx512vbmi", AVX512VBMI, __builtin_cpu_supports("avx512vbmi") != 0},
        {"avx512bf16", AVX512BF16, __builtin_cpu_supports("avx512bf16") != 0},
        {"amx", AMX, has_amx()},
    };
    return table;
#elif defined(__aarch64__)
    static const Feature table[] = {
        {"neon", NEON, true},
        {"bf16", BF16, has_bf16()},
    };
    return table;
#else
    return {};
#endif
}

const Machine& choose(const char* name) {
    const std::string wanted = name ? name : "";
    std::string known, usable;
    bool exists = false;
    for (const Machine& machine : machines) {
        const bool here = supported(machine);
        if (here && (wanted.empty() || wanted == machine.name)) return machine;
        exists |= wanted == machine.name;
        known += std::string(" ") + machine.name;
        if (here) usable += std::string(" ") + machine.name;
    }
    throw std::invalid_argument("TILEFOLD_ISA=" + wanted +
                                (exists ? " is not supported by this CPU, which has:" + usable
                                        : " is not a machine; expected one of:" + known));
}

}  // namespace tilefold
