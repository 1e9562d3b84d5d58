// What the workers of either sweep share: their line to the outside, the mode of their arithmetic, how many
// are worth waking, and how large a problem may be.
#pragma once

#include <stdint.h>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include <algorithm>
#include <stdexcept>
#include <thread>

#include "executor.h"
#include "fold.h"
#include "problem.h"

namespace tilefold {

// The mode of arithmetic while this lives, whatever the thread's own is: bits must not depend on who computes
// them. Rounding is to nearest, and results below the smallest normal number become 0: the weights of far
// keys fall that low (any ALiBi does it), and x86 takes some 150 cycles for each product with such a number.
class ArithmeticMode {
#if defined(__SSE2__)
   public:
    ArithmeticMode() : before_(_mm_getcsr()) { _mm_setcsr(_MM_MASK_MASK | _MM_FLUSH_ZERO_ON); }
    ~ArithmeticMode() { _mm_setcsr(before_); }

   private:
    const unsigned before_;
#endif
};

// How kernels ask whether to stop, and what they do while they wait for one another.
struct Line {
    Stop& stop;
    int number;

    Worker worker(char* scratch) {
        return {scratch, this, [](void* x) { return static_cast<Line*>(x)->asked(); },
                [](void* x) {
                    if (!static_cast<Line*>(x)->asked()) std::this_thread::yield();
                }};
    }
    bool asked() { return stop.check(number); }
};

// Waking a thread costs as much as some millions of operations.
constexpr double OPERATIONS_PER_THREAD = 4e6;

inline double cells(const Problem& p) {
    return double(p.batch * p.heads) * double(p.q_len) * double(p.kv_len);
}
inline int64_t threads_worth(double operations) {
    return int64_t(std::min(operations / OPERATIONS_PER_THREAD, double(MAX_THREADS)));
}

// Within these no sum of bytes overflows, on any machine that exists.
constexpr double MOST_BYTES = 4e18;
constexpr int64_t MOST_SIZE = int64_t(1) << 40;

[[noreturn]] inline void too_large() {
    throw std::length_error("the problem is too large: its workspace overflows 2^63 bytes");
}
inline void check_sizes(const Problem& p, int64_t q_len, int64_t kv_len) {
    if (std::max({p.dim, p.v_dim, q_len, kv_len}) > MOST_SIZE) too_large();
}
inline void check_bytes(double bytes) {
    if (bytes > MOST_BYTES) too_large();
}

}  // namespace tilefold
