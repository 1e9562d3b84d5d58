// Each roof is one loop that does nothing else. On x86 and ARM it is written in assembly, so that
// accumulators stay in registers: arrays of vectors left to the compiler went to the stack, and showed a
// third of the truth.
//
// Cost model: a multiply-add takes 4 cycles and two start in each, on ARM up to four; a product of tiles
// takes 52 and one starts every 16. So 12 vectors, on ARM 24, or 6 tiles are under way at any time. No
// operand is zero: zeros need less power, and let a processor clock higher than it does in real work.
//
// The best of a few passes counts, because whatever else the machine does only ever takes away.

#include "peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <iterator>
#include <memory>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace tilefold {
namespace {

constexpr int PASSES = 5;
constexpr long TURNS = 2048;      // of a loop between two looks at the clock: some tens of microseconds
constexpr std::size_t ROW = 512;  // bytes that one turn of a reading loop takes

using Clock = std::chrono::steady_clock;
using Loop = void (*)(long turns);
using Reader = void (*)(const char* from, const char* end);  // a multiple of ROW bytes

double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Threads that begin together. One that cannot be had is an exception, once those that were had have ended.
class Team {
   public:
    template <class Work>
    static void run(int threads, const Work& work) {
        Team team;
        for (int number = 1; number < threads; ++number)
            team.members.emplace_back([&team, &work, number] {
                while (team.state == WAIT) std::this_thread::yield();
                if (team.state == GO) work(number);
            });
        team.state = GO;
        work(0);
    }

    ~Team() {
        int waiting = WAIT;
        state.compare_exchange_strong(waiting, STOP);
        for (std::thread& member : members) member.join();
    }

   private:
    enum : int { WAIT, GO, STOP };
    std::atomic<int> state = WAIT;
    std::vector<std::thread> members;
};

// `work(number)` does a little in thread `number` and says how much. Rates of threads add up.
template <class Work>
double best(int threads, double seconds, const Work& work) {
    std::vector<double> rates(static_cast<std::size_t>(threads));
    double most = 0;
    for (int pass = 0; pass < PASSES; ++pass) {
        Team::run(threads, [&](int number) {
            const Clock::time_point start = Clock::now();
            double done = 0, took = 0;
            do {
                done += work(number);
                took = since(start);
            } while (took < seconds / PASSES);
            rates[static_cast<std::size_t>(number)] = done / took;
        });
        double sum = 0;
        for (const double rate : rates) sum += rate;
        most = std::max(most, sum);
    }
    return most;
}

double best_of_loop(Loop loop, double per_turn, int threads, double seconds) {
    return best(std::max(threads, 1), seconds, [=](int) {
        loop(TURNS);
        return per_turn * static_cast<double>(TURNS);
    });
}

// Operations in one turn of a loop of so many accumulators.
constexpr double turn_of_fma(int lanes, int chains = 12) { return 2.0 * chains * lanes; }

// What the compiler makes of plain vectors. Chains begin differently, or they would be one, and x * y + z
// cannot be taken out of the loop as x + y * z would be.
template <class T>
void fma_portable(long turns) {
    typedef T V __attribute__((vector_size(16)));
    const V y = V{} + T(0.37), z = V{} + T(0.0059);
    V a = z, b = z * 2, c = z * 3, d = z * 4, e = z * 5, f = z * 6;
    V g = z * 7, h = z * 8, i = z * 9, j = z * 10, k = z * 11, l = z * 12;
    for (; turns > 0; --turns) {
        a = a * y + z, b = b * y + z, c = c * y + z, d = d * y + z, e = e * y + z, f = f * y + z;
        g = g * y + z, h = h * y + z, i = i * y + z, j = j * y + z, k = k * y + z, l = l * y + z;
    }
    const V all = a + b + c + d + e + f + g + h + i + j + k + l;
    volatile T kept = all[0];
    (void)kept;
}

void read_portable(const char* from, const char* end) {
    typedef std::uint64_t V __attribute__((vector_size(16)));
    V a = {}, b = {}, c = {}, d = {};
    for (; from != end; from += 4 * sizeof(V)) {
        const V* x = reinterpret_cast<const V*>(from);
        a |= x[0], b |= x[1], c |= x[2], d |= x[3];
    }
    const V any = a | b | c | d;
    volatile std::uint64_t kept = any[0] | any[1];
    (void)kept;
}

#if defined(__x86_64__)

// Twelve chains of one operation: register 0...11 takes in f(register 12, register 13).
#define LOOP_OF_CHAINS(name, isa, reg, broadcast, operation, type, first, second)       \
    __attribute__((target(isa))) void name(long turns) {                                \
        const type x = first, y = second;                                               \
        asm volatile(                                                                   \
            broadcast " %[x], %%" reg "12\n"                                            \
            broadcast " %[y], %%" reg "13\n"                                            \
            ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"                                        \
            broadcast " %[x], %%" reg "\\r\n"                                           \
            ".endr\n"                                                                   \
            ".p2align 4\n"                                                              \
            "1:\n"                                                                      \
            ".irp r,0,1,2,3,4,5,6,7,8,9,10,11\n"                                        \
            operation " %%" reg "12, %%" reg "13, %%" reg "\\r\n"                       \
            ".endr\n"                                                                   \
            "dec %[turns]\n"                                                            \
            "jnz 1b\n"                                                                  \
            "vzeroupper\n"                                                              \
            : [turns] "+r"(turns)                                                       \
            : [x] "m"(x), [y] "m"(y)                                                    \
            : "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7",     \
              "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13");                      \
    }

LOOP_OF_CHAINS(f32_ymm, "avx2,fma", "ymm", "vbroadcastss", "vfmadd231ps", float, 0.37f, 0.0059f)
LOOP_OF_CHAINS(f64_ymm, "avx2,fma", "ymm", "vbroadcastsd", "vfmadd231pd", double, 0.37, 0.0059)
LOOP_OF_CHAINS(f32_zmm, "avx512f", "zmm", "vbroadcastss", "vfmadd231ps", float, 0.37f, 0.0059f)
LOOP_OF_CHAINS(f64_zmm, "avx512f", "zmm", "vbroadcastsd", "vfmadd231pd", double, 0.37, 0.0059)
// The same two numbers in pairs of bfloat16.
LOOP_OF_CHAINS(bf16_zmm, "avx512f,avx512bf16", "zmm", "vpbroadcastd", "vdpbf16ps", std::uint32_t, 0x3ebd3ebd,
               0x3bc13bc1)

#define LOOP_OF_READS(name, isa, reg, operation, width, parts)                          \
    __attribute__((target(isa))) void name(const char* from, const char* end) {         \
        for (; from != end; from += ROW)                                                \
            asm volatile(                                                               \
                ".irp part," parts "\n"                                                 \
                operation " \\part*" width "(%[from]), %%" reg "0, %%" reg "1\n"        \
                ".endr\n"                                                               \
                :                                                                       \
                : [from] "r"(from)                                                      \
                : "memory", "xmm0", "xmm1");                                            \
        asm volatile("vzeroupper" : : : "xmm0", "xmm1");                                \
    }

LOOP_OF_READS(read_ymm, "avx2", "ymm", "vpor", "32", "0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15")
LOOP_OF_READS(read_zmm, "avx512f", "zmm", "vpord", "64", "0,1,2,3,4,5,6,7")

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() { return __builtin_cpu_supports("avx512f"); }
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

// How ldtilecfg wants it: eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

constexpr double TILE_PRODUCTS = 6;                     // of a turn
constexpr double TILE_OPERATIONS = 2.0 * 16 * 16 * 32;  // of a product: 16 x 32 by 32 x 16

__attribute__((target("amx-tile,amx-bf16"))) void bf16_tiles(long turns) {
    const TileConfig config;
    std::uint32_t numbers[16][16];
    for (auto& row : numbers) std::fill(std::begin(row), std::end(row), 0x3ebd3bc1);
    const long stride = sizeof numbers[0];
    asm volatile(
        "ldtilecfg %[config]\n"
        ".irp r,0,1,2,3,4,5,6,7\n"
        "tileloadd (%[numbers],%[stride],1), %%tmm\\r\n"
        ".endr\n"
        ".p2align 4\n"
        "1:\n"
        ".irp r,0,1,2,3,4,5\n"
        "tdpbf16ps %%tmm7, %%tmm6, %%tmm\\r\n"
        ".endr\n"
        "dec %[turns]\n"
        "jnz 1b\n"
        "tilerelease\n"
        : [turns] "+r"(turns)
        : [config] "m"(config), [numbers] "r"(numbers), [stride] "r"(stride)
        : "cc", "memory");
}

// The processor has tiles of bfloat16, the system saves them, and Linux lets this process have them.
bool has_amx() {
#if defined(__linux__)
    constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24, osxsave = 1u << 27, tiles_saved = 3u << 17;
    constexpr int ask_for_permission = 0x1023, tile_data = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & osxsave)) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (amx_bf16 | amx_tile)) != (amx_bf16 | amx_tile))
        return false;
    asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a & tiles_saved) == tiles_saved && syscall(SYS_arch_prctl, ask_for_permission, tile_data) == 0;
#else
    return false;
#endif
}

#elif defined(__aarch64__)

// Twenty-four chains of multiply-adds: register 0...23 takes in register 24 times register 25.
#define LOOP_OF_FMLA(name, lanes)                                                       \
    void name(long turns) {                                                             \
        asm volatile(                                                                   \
            ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"    \
            "fmov v\\r\\()." lanes ", #0.5\n"                                           \
            ".endr\n"                                                                   \
            "fmov v24." lanes ", #0.4375\n"                                             \
            "fmov v25." lanes ", #0.1328125\n"                                          \
            "1:\n"                                                                      \
            ".irp r,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23\n"    \
            "fmla v\\r\\()." lanes ", v24." lanes ", v25." lanes "\n"                   \
            ".endr\n"                                                                   \
            "subs %[turns], %[turns], #1\n"                                             \
            "b.ne 1b\n"                                                                 \
            : [turns] "+r"(turns)                                                       \
            :                                                                           \
            : "cc", "v0", "v1", "v2", "v3", "v4", "v5", "v6", "v7", "v8", "v9", "v10",  \
              "v11", "v12", "v13", "v14", "v15", "v16", "v17", "v18", "v19", "v20",     \
              "v21", "v22", "v23", "v24", "v25");                                       \
    }

LOOP_OF_FMLA(f32_neon, "4s")
LOOP_OF_FMLA(f64_neon, "2d")

#endif

Reader reader() {
#if defined(__x86_64__)
    if (has_avx512()) return read_zmm;
    if (has_avx2()) return read_ymm;
#endif
    return read_portable;
}

}  // namespace

double f32_peak(int threads, double seconds) {
#if defined(__x86_64__)
    if (has_avx512()) return best_of_loop(f32_zmm, turn_of_fma(16), threads, seconds);
    if (has_avx2()) return best_of_loop(f32_ymm, turn_of_fma(8), threads, seconds);
#endif
#if defined(__aarch64__)
    return best_of_loop(f32_neon, turn_of_fma(4, 24), threads, seconds);
#else
    return best_of_loop(fma_portable<float>, turn_of_fma(4), threads, seconds);
#endif
}

double f64_peak(int threads, double seconds) {
#if defined(__x86_64__)
    if (has_avx512()) return best_of_loop(f64_zmm, turn_of_fma(8), threads, seconds);
    if (has_avx2()) return best_of_loop(f64_ymm, turn_of_fma(4), threads, seconds);
#endif
#if defined(__aarch64__)
    return best_of_loop(f64_neon, turn_of_fma(2, 24), threads, seconds);
#else
    return best_of_loop(fma_portable<double>, turn_of_fma(2), threads, seconds);
#endif
}

double bf16_dot_peak(int threads, double seconds) {
#if defined(__x86_64__)
    if (has_avx512bf16()) return best_of_loop(bf16_zmm, turn_of_fma(32), threads, seconds);
#endif
    (void)threads, (void)seconds;
    return 0;
}

double amx_peak(int threads, double seconds) {
#if defined(__x86_64__)
    if (has_amx()) return best_of_loop(bf16_tiles, TILE_PRODUCTS * TILE_OPERATIONS, threads, seconds);
#endif
    (void)threads, (void)seconds;
    return 0;
}

double read_peak(int threads, double seconds, std::size_t bytes) {
    threads = std::max(threads, 1);
    const Reader read = reader();
    const std::size_t part = std::max<std::size_t>(bytes / static_cast<std::size_t>(threads) / ROW, 1) * ROW;
    const std::unique_ptr<char[]> buffer(new char[part * static_cast<std::size_t>(threads)]);
    const auto own = [&](int number) { return buffer.get() + part * static_cast<std::size_t>(number); };
    // Each thread writes its part first: pages that were never written are all one and the same page.
    Team::run(threads, [&](int number) { std::fill_n(own(number), part, char(number + 1)); });
    return best(threads, seconds, [&](int number) {
        read(own(number), own(number) + part);
        return static_cast<double>(part);
    });
}

}  // namespace tilefold
