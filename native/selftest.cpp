// The core checked without Python, where sanitizers and emulators can reach it: every machine that this CPU
// has, every storage type, against attention written out in a wider type. The facts to know: kernels are
// called through a table of this file's own, which fills their scratch with NaN before each piece and finds
// writes beyond its end; the memory of calls is this file's too (the linker then has no use for memory.cpp),
// filled with NaN, guarded, and refused where a test wants that. A case is a number: each list of
// possibilities is shuffled anew for every run of as many cases as it is long, so all of it is used soon, in
// any company. Usage: selftest [number of cases [the first one]]

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "executor.h"
#include "fold.h"
#include "memory.h"
#include "problem.h"
#include "sweep.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
// What valgrind is told and asked; nothing where it does not watch.
#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define RUNNING_ON_VALGRIND 0
#define VALGRIND_MAKE_MEM_NOACCESS(at, bytes)
#define VALGRIND_MAKE_MEM_DEFINED(at, bytes)
#define VALGRIND_MAKE_MEM_UNDEFINED(at, bytes)
#endif

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int CASES = 120;
constexpr double MOST_WORK = 1e6;
#else
constexpr int CASES = 240;
constexpr double MOST_WORK = 5e6;  // of a case: about the operations of the plain method
#endif

using Wide = long double;
constexpr double INF = std::numeric_limits<double>::infinity(),
                 NONE = std::numeric_limits<double>::quiet_NaN();

// ---- what goes wrong ----

char here[512] = "before the first case";
std::atomic<int> failures{0}, failures_here{0};

void say_where() {
    fprintf(stderr, "selftest: in %s\n", here);
    fflush(stderr);
}

void expect(bool good, std::string_view what) {
    if (good) return;
    failures++;
    if (failures_here++ < 3) printf("FAILED  %s: %.*s\n", here, int(what.size()), what.data());
}

void enter(const std::string& where) {
    snprintf(here, sizeof here, "%s", where.c_str());
    failures_here = 0;
}

// ---- memory: guarded, poisoned, refused ----

constexpr int64_t GUARD = 1024;
constexpr unsigned char PATTERN = 0xa5;  // of guards; whatever has no value yet is 0xff, NaN in every type

void blank(char* at, int64_t bytes) {
    memset(at, 0xff, size_t(bytes));
    VALGRIND_MAKE_MEM_UNDEFINED(at, bytes);
}

void guard(char* at) {
    memset(at, PATTERN, GUARD);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(at, GUARD);
#endif
    VALGRIND_MAKE_MEM_NOACCESS(at, GUARD);
}
bool unguard(char* at) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(at, GUARD);
#endif
    VALGRIND_MAKE_MEM_DEFINED(at, GUARD);
    return std::all_of(at, at + GUARD, [](char c) { return static_cast<unsigned char>(c) == PATTERN; });
}

std::atomic<int64_t> refused{0};  // the allocation that fails, counted from now on; 0 for none
int64_t memory_bytes = 0;         // of the last call

bool refuse() { return refused.load() > 0 && refused.fetch_sub(1) == 1; }

}  // namespace

// Out of line: where it sees only one of the two, GCC warns that new and free do not match.
__attribute__((noinline)) void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
    return refuse() ? nullptr : malloc(bytes ? bytes : 1);
}
__attribute__((noinline)) void* operator new(size_t bytes) {
    if (void* p = operator new(bytes, std::nothrow)) return p;
    throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept { free(p); }

namespace tilefold {

Memory::Memory(int64_t bytes) : data_(nullptr), bytes_(bytes), capacity_(bytes + GUARD) {
    if (!refuse()) data_ = static_cast<char*>(aligned_alloc(64, size_t((capacity_ + 63) / 64 * 64)));
    if (!data_) throw std::bad_alloc();
    memory_bytes = bytes;
    blank(data_, bytes);
    guard(data_ + bytes);
}
Memory::~Memory() {
    expect(unguard(data_ + bytes_), "wrote beyond the end of the workspace");
    free(data_);
}

}  // namespace tilefold

namespace {

using namespace tilefold;

// The kernels of a machine, watched. One call at a time, so what it needs to know may be global.
const Kernels* watched;
int64_t scratch_bytes;

template <auto kernel>
void watch(const Call& c, const Unit& u, const Piece& p, Worker& w) {
    char* const end = w.scratch + scratch_bytes;
    blank(w.scratch, scratch_bytes);
    guard(end);
    (watched->*kernel)(c, u, p, w);
    expect(unguard(end), p.r1 - p.r0 <= watched->few_rows ? "few rows wrote beyond the end of their scratch"
                                                          : "a tile wrote beyond the end of its scratch");
}

Kernels watch_kernels(const Kernels& kernels) {
    watched = &kernels;
    Kernels k = kernels;
    k.scratch = [](const Call& c, int64_t rows) {
        return (scratch_bytes = watched->scratch(c, rows)) + GUARD;
    };
    k.tile = watch<&Kernels::tile>;
    k.row = watch<&Kernels::row>;
    return k;
}

// ---- numbers ----

// SplitMix64.
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t next() {
        uint64_t x = state += 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return x ^ x >> 31;
    }
    int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
    double between(double lo, double hi) { return lo + (hi - lo) * double(next() >> 11) * 0x1p-53; }
};

constexpr DType TYPES[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

const char* name(DType t) {
    const char* const names[] = {"float16", "bfloat16", "float32", "float64", "uint8"};
    return names[int(t)];
}

int mantissa(DType t) {  // bits that are stored
    return t == DType::float64 ? 52 : t == DType::float32 ? 23 : t == DType::float16 ? 10 : 7;
}
double roundoff(DType t) { return ldexp(1, -1 - mantissa(t)); }

double number_of(uint16_t bits, int m) {
    const int exponents = (1 << (15 - m)) - 1, e = bits >> m & exponents, f = bits & ((1 << m) - 1);
    const double x =
        e == exponents ? (f ? NONE : INF) : ldexp(e ? f | 1 << m : f, std::max(e, 1) - exponents / 2 - m);
    return bits & 0x8000 ? -x : x;
}
uint16_t bits_of(double x, int m) {
    const int exponents = (1 << (15 - m)) - 1, sign = std::signbit(x) ? 0x8000 : 0, infinite = exponents << m;
    if (std::isnan(x)) return uint16_t(infinite | 1 << (m - 1));
    if (std::isinf(x) || x == 0) return uint16_t(sign | (x == 0 ? 0 : infinite));
    const int e = std::max(ilogb(x), 1 - exponents / 2);
    const int64_t bits =
        (int64_t(e + exponents / 2 - 1) << m) + llrint(ldexp(fabs(x), m - e));  // may carry upwards
    return uint16_t(sign | std::min<int64_t>(bits, infinite));
}
double rounded(double x, DType t) { return number_of(bits_of(x, mantissa(t)), mantissa(t)); }

// ---- arrays ----

enum Order { PLAIN, BSHD, GAPS, REVERSED };

// (*lead, heads, rows, cols) in memory of exactly its extent, what lies between its elements included. Axes
// in `repeated` (bit 0 the last) have stride 0.
class Tensor {
   public:
    Tensor() = default;
    Tensor(DType type, std::vector<int64_t> shape, Order order, unsigned repeated = 0)
        : type_(type), shape_(std::move(shape)), strides_(shape_.size()) {
        const int n = int(shape_.size());
        std::vector<int> axes;
        for (int axis = n - 1; axis >= 0; axis--) axes.push_back(axis);
        if (order == BSHD) std::swap(axes[1], axes[2]);
        int64_t step = order == GAPS ? 3 : 1, first = order == GAPS ? 1 : 0, last = 0;
        for (int axis : axes) {
            if (repeated >> (n - 1 - axis) & 1) continue;
            strides_[size_t(axis)] = order == REVERSED ? -step : step;
            const int64_t reach = step * std::max<int64_t>(shape_[size_t(axis)] - 1, 0);
            (order == REVERSED ? first : last) += reach;
            step = step * std::max<int64_t>(shape_[size_t(axis)], 1) + (order == GAPS ? 1 : 0);
        }
        const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
        memory_.assign(empty ? 0 : size_t((first + last + 1) * width(type)), char(0xff));
        memory_.reserve(1);  // a pointer that is not null
        first_ = empty ? 0 : first;
    }

    int64_t items() const {
        int64_t n = 1;
        for (size_t i = 0; i + 3 < shape_.size(); i++) n *= shape_[i];
        return n;
    }
    char* at(int64_t item, int64_t head, int64_t row, int64_t col) {
        const size_t n = shape_.size();
        int64_t x = first_ + head * strides_[n - 3] + row * strides_[n - 2] + col * strides_[n - 1];
        for (size_t i = n - 3; i-- > 0; item /= shape_[i]) x += item % shape_[i] * strides_[i];
        return memory_.data() + x * width(type_);
    }
    double get(int64_t item, int64_t head, int64_t row, int64_t col) const {
        const char* p = const_cast<Tensor*>(this)->at(item, head, row, col);
        if (type_ == DType::uint8) return *reinterpret_cast<const uint8_t*>(p);
        if (type_ == DType::float64) return *reinterpret_cast<const double*>(p);
        if (type_ == DType::float32) return *reinterpret_cast<const float*>(p);
        return number_of(*reinterpret_cast<const uint16_t*>(p), mantissa(type_));
    }
    void set(int64_t item, int64_t head, int64_t row, int64_t col, double x) {
        char* const p = at(item, head, row, col);
        if (type_ == DType::uint8)
            *reinterpret_cast<uint8_t*>(p) = uint8_t(x);
        else if (type_ == DType::float64)
            *reinterpret_cast<double*>(p) = x;
        else if (type_ == DType::float32)
            *reinterpret_cast<float*>(p) = float(x);
        else
            *reinterpret_cast<uint16_t*>(p) = bits_of(x, mantissa(type_));
    }
    template <class F>
    void fill(F&& f) {
        const size_t n = shape_.size();
        for (int64_t b = 0; b < items(); b++)
            for (int64_t h = 0; h < shape_[n - 3]; h++)
                for (int64_t r = 0; r < shape_[n - 2]; r++)
                    for (int64_t c = 0; c < shape_[n - 1]; c++) set(b, h, r, c, f(b, h, r, c));
    }
    // As the core is told of it, from some row on; `columns` says whether the last axis counts (that of lse
    // does not).
    Array array(int64_t row = 0, bool columns = true) {
        const int dims = int(shape_.size()) - !columns;
        char* const data = memory_.data() + (first_ + row * strides_[shape_.size() - 2]) * width(type_);
        return {data, dims, shape_.data(), strides_.data(), type_};
    }
    int64_t bytes_per_element() const { return width(type_); }
    std::vector<char>& memory() { return memory_; }

   private:
    DType type_ = DType::float32;
    std::vector<int64_t> shape_, strides_;
    std::vector<char> memory_;
    int64_t first_ = 0;
};

// ---- cases ----

enum Lengths { WHOLE, PADDED, PACKED };
enum Hides { NOTHING, SPANS_HIDE, BITS_HIDE, CELLS_HIDE };
enum Affine { UNBANDED, CAUSAL, TOP_LEFT, WINDOW, BESIDE, FAR };

// Which of a list a case has: each appears once in any `size` cases that begin at a multiple of it.
size_t pick(int number, int axis, size_t size) {
    const int n = int(size);
    std::vector<size_t> order(size);
    std::iota(order.begin(), order.end(), 0);
    Random random(uint64_t(number / n) * 1000 + uint64_t(axis));
    for (int i = n - 1; i > 0; i--) std::swap(order[size_t(i)], order[size_t(random.below(i + 1))]);
    return order[size_t(number % n)];
}

struct Case {
    int number;
    DType type;
    int64_t batch, kv_heads, group, q_len, kv_len, dim, v_dim;
    Lengths lengths;
    Order order;
    Affine affine;
    Hides hides;
    double softcap;
    bool by_head, biased, alibi, sinks, lse, poison;
    DType bias;
    unsigned bias_repeats;

    Case(int n, DType t) : number(n), type(t) {
        int axis = 0;
        const auto one = [&](auto... x) {
            const std::initializer_list<std::common_type_t<decltype(x)...>> list{x...};
            return list.begin()[pick(n, axis++, list.size())];
        };
        q_len = one(0, 1, 7, 33, 130, 700, 1030, 2100), kv_len = one(0, 1, 7, 33, 130, 700, 1030, 2100);
        dim = one(1, 5, 8, 33, 64, 80, 128, 300), v_dim = one(1, 5, 8, 33, 64, 80, 128, 300);
        if (one(false, false, false, false, false, false, true)) dim = 1100 + 33 * (n % 40);
        batch = one(1, 2, 4), kv_heads = one(1, 2, 3), group = one(1, 4, 7);
        lengths = one(WHOLE, WHOLE, PADDED, PACKED);
        order = one(PLAIN, BSHD, GAPS, REVERSED);
        affine = one(UNBANDED, UNBANDED, CAUSAL, CAUSAL, TOP_LEFT, WINDOW, WINDOW, BESIDE, FAR);
        hides = one(NOTHING, NOTHING, NOTHING, NOTHING, SPANS_HIDE, BITS_HIDE, CELLS_HIDE);
        softcap = one(NO_SOFTCAP, NO_SOFTCAP, NO_SOFTCAP, 3.5);
        by_head = one(false, true);
        biased = one(false, false, true);
        bias = one(DType::float16, DType::bfloat16, DType::float32, DType::float64);
        bias_repeats = one(0u, 2u, 4u, 6u);
        alibi = one(false, false, false, true);
        sinks = one(false, false, true);
        lse = one(true, true, true, false);
        poison = one(false, false, true);
        const auto too_much = [&] {
            const double cell = double(dim + v_dim + 40) * (t == DType::float64 ? 4 : 1);
            const double work = double(batch * kv_heads * group * (q_len + 4) * (kv_len + 60)) * cell;
            return work > MOST_WORK * (number % 8 ? 1 : 15);
        };
        if (too_much()) batch = 1;
        if (too_much()) kv_heads = 1;
        if (too_much()) dim = std::min<int64_t>(dim, 33), v_dim = std::min<int64_t>(v_dim, 33);
        if (too_much()) dim = std::min<int64_t>(dim, 8), v_dim = std::min<int64_t>(v_dim, 5);
        if (too_much()) q_len = std::min<int64_t>(q_len, 130);
        if (too_much()) group = std::min<int64_t>(group, 4), q_len = std::min<int64_t>(q_len, 33);
    }

    std::string text() const {
        const char* const orders[] = {"", " BSHD", " gaps", " reversed"};
        const char* const bands[] = {"", " causal", " top-left", " window", " beside", " far"};
        const char* const hidden[] = {"", " spans", " bits", " cells"};
        const char* const ragged[] = {"", " padded", " packed"};
        char s[200];
        snprintf(s, sizeof s, "case %d: %s b%d h%d/%d q%d k%d d%d/%d", number, name(type), int(batch),
                 int(kv_heads * group), int(kv_heads), int(q_len), int(kv_len), int(dim), int(v_dim));
        return s + std::string(ragged[lengths]) + orders[order] + bands[affine] + hidden[hides] +
               (by_head && hides ? " by head" : "") + (softcap != NO_SOFTCAP ? " softcap" : "") +
               (biased ? std::string(" bias ") + name(bias) : "") + (alibi ? " alibi" : "") +
               (sinks ? " sinks" : "") + (poison ? " poison" : "") + (lse ? "" : " no lse");
    }
};

// One sequence.
struct Frame {
    int64_t n, item, q0, k0, q_len, kv_len, offset;
};

// The arrays of a case and what they mean.
struct Data {
    const Case c;
    Problem p{};
    std::vector<Frame> frames;
    std::vector<int64_t> q_ends, kv_ends;
    Tensor q, k, v, bias, cells;
    std::vector<double> alibi, sinks;

    explicit Data(const Case& c_) : c(c_) {
        Random random(uint64_t(c.number));
        choose_lengths(random);
        const auto lead = leading_shape();
        const auto shape = [&](int64_t heads, int64_t rows, int64_t cols) {
            std::vector<int64_t> s = lead;
            s.insert(s.end(), {heads, rows, cols});
            return s;
        };
        const int64_t heads = c.kv_heads * c.group;
        q = Tensor(c.type, shape(heads, p.q_len, c.dim), c.order);
        k = Tensor(c.type, shape(c.kv_heads, p.kv_len, c.dim), c.order);
        v = Tensor(c.type, shape(c.kv_heads, p.kv_len, c.v_dim), c.order);
        for (Tensor* x : {&q, &k, &v}) x->fill([&](auto...) { return random.between(-1.7, 1.7); });
        if (c.lengths == PADDED) spoil_padding();
        if (c.poison) spoil_some(random);
        if (c.biased) {
            bias = Tensor(c.bias, shape(heads, p.q_len, p.kv_len), c.order, c.bias_repeats);
            bias.fill([&](auto...) { return random.below(20) ? random.between(-2, 2) : -INF; });
        }
        if (c.hides == CELLS_HIDE) {
            cells = Tensor(DType::uint8, shape(heads, p.q_len, p.kv_len), c.order, c.by_head ? 0 : 4);
            cells.fill([&](auto...) { return double(random.below(3)); });
        }
        for (int64_t n = 0; n < (c.lengths == PACKED ? 1 : c.batch) * heads; n++) {
            if (c.alibi) alibi.push_back(random.between(0, 0.02));
            if (c.sinks) sinks.push_back(random.below(8) ? random.between(-3, 3) : -INF);
        }
        describe();
    }

    // Which keys of its sequence a query sees.
    void look(const Frame& f, int64_t head, int64_t i, std::vector<char>& seen) const {
        seen.assign(size_t(f.kv_len), 0);
        int64_t lo, hi;
        band(f, i, lo, hi);
        for (int64_t j = lo; j < hi; j++) seen[size_t(j)] = 1;
        if (c.hides == SPANS_HIDE) {
            std::vector<char> covered(seen.size());
            for (const auto& [a, b] : spans(f, head, i))
                for (int64_t j = a; j < b; j++) covered[size_t(j)] = 1;
            for (size_t j = 0; j < seen.size(); j++) seen[j] &= covered[j];
        }
        for (int64_t j = lo; j < hi; j++) {
            if (c.hides == BITS_HIDE) seen[size_t(j)] &= bit(f, head, i, j);
            if (c.hides == CELLS_HIDE) seen[size_t(j)] &= cells.get(f.item, head, f.q0 + i, f.k0 + j) != 0;
            if (c.biased) seen[size_t(j)] &= bias.get(f.item, head, f.q0 + i, f.k0 + j) != -INF;
        }
    }

    void band(const Frame& f, int64_t i, int64_t& lo, int64_t& hi) const {
        const int64_t at = i + f.offset;
        lo = p.band.left >= UNLIMITED ? 0 : std::clamp<int64_t>(at - p.band.left, 0, f.kv_len);
        hi = p.band.right >= UNLIMITED ? f.kv_len : std::clamp<int64_t>(at + p.band.right + 1, lo, f.kv_len);
    }
    // Three disjoint spans, some of them empty; for one query in eight all of them.
    std::vector<std::pair<int64_t, int64_t>> spans(const Frame& f, int64_t head, int64_t i) const {
        Random random(seed(f, head, i));
        int64_t cuts[6] = {};
        if (random.below(8))
            for (int64_t& cut : cuts) cut = random.below(f.kv_len + 1);
        std::sort(cuts, cuts + 6);
        return {{cuts[0], cuts[1]}, {cuts[2], cuts[3]}, {cuts[4], cuts[5]}};
    }
    bool bit(const Frame& f, int64_t head, int64_t i, int64_t j) const {
        return Random(seed(f, head, i) * 4099 + uint64_t(j)).below(3) != 0;
    }

   private:
    uint64_t seed(const Frame& f, int64_t head, int64_t i) const {
        return uint64_t(((c.number * 64 + f.n) * 64 + (c.by_head ? head : 0)) * 4099 + i);
    }

    void choose_lengths(Random& random) {
        p.q_len = c.q_len, p.kv_len = c.kv_len;
        if (c.lengths == WHOLE) return;
        const bool none = random.below(4) == 0;  // no sequence has keys
        if (c.lengths == PACKED) q_ends = kv_ends = {0};
        for (int64_t n = 0; n < c.batch; n++) {
            int64_t queries = random.below(c.q_len + 1), keys = none ? 0 : random.below(c.kv_len + 1);
            if (n == 0) queries = c.q_len;
            if (n == 1 && !none) keys = c.kv_len;
            if (c.lengths == PACKED) queries += q_ends.back(), keys += kv_ends.back();
            q_ends.push_back(queries), kv_ends.push_back(keys);
        }
        if (c.lengths == PACKED) p.q_len = q_ends.back(), p.kv_len = kv_ends.back();
    }
    std::vector<int64_t> leading_shape() const {
        if (c.lengths == PACKED || (c.batch == 1 && c.number % 2)) return {};
        if (c.batch == 4) return {2, 2};
        return {c.batch};
    }
    void spoil_padding() {
        const auto spoil = [](Tensor& x, int64_t item, int64_t heads, int64_t first, int64_t last,
                              int64_t cols) {
            for (int64_t h = 0; h < heads; h++)
                for (int64_t r = first; r < last; r++)
                    for (int64_t d = 0; d < cols; d++) x.set(item, h, r, d, NONE);
        };
        for (int64_t n = 0; n < c.batch; n++) {
            spoil(q, n, c.kv_heads * c.group, q_ends[size_t(n)], p.q_len, c.dim);
            spoil(k, n, c.kv_heads, kv_ends[size_t(n)], p.kv_len, c.dim);
            spoil(v, n, c.kv_heads, kv_ends[size_t(n)], p.kv_len, c.v_dim);
        }
    }
    // A query, a key, a value and some of another value: whoever sees them is spoilt, nobody else.
    void spoil_some(Random& random) {
        if (!p.q_len || !p.kv_len) return;
        const int64_t query = random.below(p.q_len), key = p.kv_len - 1 - random.below((p.kv_len + 1) / 2);
        for (int64_t b = 0; b < q.items(); b++) {
            q.set(b, 0, query, c.dim / 2, NONE);
            for (int64_t h = 0; h < c.kv_heads; h++) {
                for (int64_t d = 0; d < c.dim; d++) k.set(b, h, key, d, NONE);
                for (int64_t d = 0; d < c.v_dim; d++) v.set(b, h, key, d, NONE);
                v.set(b, h, p.kv_len / 2, c.v_dim / 2, random.below(2) ? INF : NONE);
            }
        }
    }
    void describe() {
        const bool ragged = c.lengths != WHOLE;
        p.batch = c.batch, p.heads = c.kv_heads * c.group, p.kv_heads = c.kv_heads;
        p.dim = c.dim, p.v_dim = c.v_dim;
        p.q_dtype = p.kv_dtype = c.type;
        p.acc_dtype = c.type == DType::float64 ? DType::float64 : DType::float32;
        p.scale = c.number % 3 ? 1 / sqrt(double(c.dim)) : 0.3;
        p.softcap = c.softcap;
        const int64_t offset = ragged ? PER_SEQUENCE : c.kv_len - c.q_len, far = int64_t(1) << 60;
        const Band bands[] = {{UNLIMITED, UNLIMITED, offset},
                              {UNLIMITED, 0, offset},
                              {UNLIMITED, 0, 0},
                              {40, 5, offset},
                              {-30, 90, offset},
                              {far, -far, offset}};
        p.band = bands[c.affine];
        if (c.affine == FAR && c.number % 2) p.band = {far, far, offset};
        p.layout = c.lengths == PACKED ? VARLEN : DENSE;
        const std::pair<bool, Has> there[] = {{c.hides == SPANS_HIDE || c.hides == BITS_HIDE, SPANS},
                                              {c.hides == BITS_HIDE, BITS},
                                              {c.biased, BIAS},
                                              {c.alibi, ALIBI},
                                              {c.sinks, SINKS},
                                              {c.lengths == PADDED, LENGTHS}};
        for (const auto& [yes, bit] : there) p.has = yes ? Has(p.has | bit) : p.has;
        p.want = c.lse ? LSE : Want(0);
        for (int64_t n = 0; n < c.batch; n++) {
            const size_t at = size_t(n);
            Frame f{n, n, 0, 0, c.q_len, c.kv_len, 0};
            if (c.lengths == PADDED) f.q_len = q_ends[at], f.kv_len = kv_ends[at];
            if (c.lengths == PACKED)
                f = {
                    n, 0, q_ends[at], kv_ends[at], q_ends[at + 1] - q_ends[at], kv_ends[at + 1] - kv_ends[at],
                    0};
            f.offset = p.band.offset == PER_SEQUENCE ? f.kv_len - f.q_len : p.band.offset;
            frames.push_back(f);
        }
    }
};

// ---- results ----

// out and lse, poisoned and with every byte accounted for.
struct Result {
    Tensor out, lse;
    bool has_lse;
    int64_t bytes = 0;  // of workspace, as fold() says

    Result(const Data& x, bool guarded = true) : has_lse(x.c.lse) {
        std::vector<int64_t> shape;
        if (x.c.lengths != PACKED) shape = {x.c.batch};
        shape.insert(shape.end(), {x.p.heads, x.p.q_len, x.p.v_dim});
        out = Tensor(x.c.type, shape, guarded ? x.c.order : PLAIN);
        shape.back() = 1;
        if (has_lse) lse = Tensor(x.p.acc_dtype, shape, guarded && x.c.order == BSHD ? BSHD : PLAIN);
    }

    // Whether nothing was written but some query rows of each sequence, and those are the same bits as in
    // `other`.
    bool only(const Data& x, int64_t first, int64_t last, Result* other = nullptr) {
        bool same = true;
        std::vector<char> out_rest = out.memory(), lse_rest = lse.memory();
        const auto wipe = [&](Tensor& t, std::vector<char>& rest, char* p, Tensor* theirs, char* q) {
            const size_t n = size_t(t.bytes_per_element());
            if (theirs) same &= memcmp(p, q, n) == 0;
            memset(rest.data() + (p - t.memory().data()), 0xff, n);
        };
        for (const Frame& f : x.frames)
            for (int64_t h = 0; h < x.p.heads; h++)
                for (int64_t i = f.q0 + first; i < f.q0 + std::min(last, f.q_len); i++) {
                    for (int64_t d = 0; d < x.p.v_dim; d++)
                        wipe(out, out_rest, out.at(f.item, h, i, d), other ? &other->out : nullptr,
                             other ? other->out.at(f.item, h, i, d) : nullptr);
                    if (has_lse)
                        wipe(lse, lse_rest, lse.at(f.item, h, i, 0), other ? &other->lse : nullptr,
                             other ? other->lse.at(f.item, h, i, 0) : nullptr);
                }
        const auto blank = [](const std::vector<char>& bytes) {
            return bytes.empty() ||
                   (bytes[0] == char(0xff) && !memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1));
        };
        expect(blank(out_rest) && blank(lse_rest), "wrote where no result belongs");
        return same;
    }
};

// ---- the definition ----

// out and lse, sequence by sequence, head by head, row by row.
struct Values {
    std::vector<Wide> out, lse;
};

// Attention written out, in R. Inputs are moved by up to `nudge` of themselves; with `short_weights` the
// weights that values are multiplied by are rounded to bfloat16.
template <class R>
Values evaluate(const Data& x, double nudge, bool short_weights) {
    Values y;
    Random random(uint64_t(x.c.number) + 77);
    const auto moved = [&](double v) { return R(v) * R(1 + nudge * random.between(-1, 1)); };
    const int64_t dim = x.p.dim, v_dim = x.p.v_dim;
    std::vector<R> q, k, v, s, acc;
    std::vector<char> seen;
    for (const Frame& f : x.frames)
        for (int64_t head = 0; head < x.p.heads; head++) {
            if (head % x.c.group == 0) {
                const int64_t h = head / x.c.group;
                k.clear(), v.clear();
                for (int64_t j = f.k0; j < f.k0 + f.kv_len; j++) {
                    for (int64_t d = 0; d < dim; d++) k.push_back(moved(x.k.get(f.item, h, j, d)));
                    for (int64_t d = 0; d < v_dim; d++) v.push_back(moved(x.v.get(f.item, h, j, d)));
                }
            }
            const size_t per_head = size_t(f.item * x.p.heads + head);
            for (int64_t i = 0; i < f.q_len; i++) {
                q.clear();
                for (int64_t d = 0; d < dim; d++) q.push_back(moved(x.q.get(f.item, head, f.q0 + i, d)));
                x.look(f, head, i, seen);
                s.assign(seen.size(), 0);
                const R sink = x.c.sinks ? R(x.sinks[per_head]) : R(-INF);
                R m = sink;
                for (int64_t j = 0; j < f.kv_len; j++) {
                    if (!seen[size_t(j)]) continue;
                    R a = 0;
                    for (int64_t d = 0; d < dim; d++) a += q[size_t(d)] * k[size_t(j * dim + d)];
                    a *= R(x.p.scale);
                    if (x.p.softcap != NO_SOFTCAP) a = R(x.p.softcap) * std::tanh(a / R(x.p.softcap));
                    if (x.c.biased) a += moved(x.bias.get(f.item, head, f.q0 + i, f.k0 + j));
                    if (x.c.alibi) a -= R(x.alibi[per_head]) * R(std::abs(i + f.offset - j));
                    s[size_t(j)] = a;
                    if (a > m) m = a;
                }
                R sum = sink > R(-INF) ? std::exp(sink - m) : R(0);
                acc.assign(size_t(v_dim), 0);
                for (int64_t j = 0; j < f.kv_len; j++) {
                    if (!seen[size_t(j)]) continue;
                    R w = std::exp(s[size_t(j)] - m);
                    sum += w;
                    if (short_weights) w = R(rounded(double(w), DType::bfloat16));
                    for (int64_t d = 0; d < v_dim; d++) acc[size_t(d)] += w * v[size_t(j * v_dim + d)];
                }
                const bool nothing = m == R(-INF) && sum == 0;
                for (R a : acc) y.out.push_back(nothing ? R(0) : a / sum);
                y.lse.push_back(nothing ? R(-INF) : m + std::log(sum));
            }
        }
    return y;
}

// Valgrind's std::isfinite takes a long infinity for finite.
bool finite(Wide x) { return x - x == 0; }

// The largest finite error; infinite where NaN and infinity stand in other places.
Wide error(const std::vector<Wide>& got, const std::vector<Wide>& right) {
    Wide most = 0;
    for (size_t n = 0; n < right.size(); n++) {
        const Wide a = got[n], b = right[n];
        if (finite(b) && finite(a))
            most = std::max(most, std::abs(a - b));
        else if (!(std::isnan(a) && std::isnan(b)) && a != b)
            return INF;
    }
    return most;
}
Wide largest(const std::vector<Wide>& x) {
    Wide most = 0;
    for (Wide a : x)
        if (finite(a)) most = std::max(most, std::abs(a));
    return most;
}

// The right results, and how far others may be from them: eight times as far as honest evaluations are (the
// plain method in the accumulate type; the definition on inputs that moved by a rounding), plus one rounding.
struct Expected {
    Values right;
    Wide out[2], lse;  // by whether weights are rounded to bfloat16

    explicit Expected(const Data& x) {
        const bool wide = x.c.type == DType::float64 && !RUNNING_ON_VALGRIND;  // there both are 64 bits
        right = wide ? evaluate<Wide>(x, 0, false) : evaluate<double>(x, 0, false);
        const double step = 2 * roundoff(x.p.acc_dtype);
        const Values moved = wide ? evaluate<Wide>(x, step, false) : evaluate<double>(x, step, false);
        for (bool rounds : {false, true}) {
            if (rounds && x.c.type != DType::bfloat16) break;
            const Values plain =
                x.c.type == DType::float64 ? evaluate<double>(x, 0, false) : evaluate<float>(x, 0, rounds);
            out[rounds] = 8 * std::max(error(plain.out, right.out), error(moved.out, right.out)) +
                          Wide(roundoff(x.c.type)) * largest(right.out);
            if (!rounds)
                lse = 8 * std::max(error(plain.lse, right.lse), error(moved.lse, right.lse)) +
                      Wide(roundoff(x.p.acc_dtype)) * largest(right.lse);
        }
    }

    // The larger share of what is allowed.
    double share(const Data& x, Result& r, bool rounds) const {
        Values got;
        for (const Frame& f : x.frames)
            for (int64_t h = 0; h < x.p.heads; h++)
                for (int64_t i = f.q0; i < f.q0 + f.q_len; i++) {
                    for (int64_t d = 0; d < x.p.v_dim; d++) got.out.push_back(r.out.get(f.item, h, i, d));
                    if (r.has_lse) got.lse.push_back(r.lse.get(f.item, h, i, 0));
                }
        const auto of = [](Wide e, Wide allowed) {
            return e == 0 ? 0 : allowed > 0 ? double(e / allowed) : INF;
        };
        const double o = of(error(got.out, right.out), out[rounds]);
        return r.has_lse ? std::max(o, of(error(got.lse, right.lse), lse)) : o;
    }
};

// ---- calls ----

// Query rows first … last of each sequence as the door calls the core: at once, or, where a mask has spans or
// bits, by sequence, by panel of rows, and by head if it says so. `at` is the query that row 0 of the problem
// is.
void fold_rows(const Data& x, const Problem& p, const Kernels& k, const Settings& s, Team team, int64_t first,
               int64_t last, int64_t at, Result& r) {
    Data& writable = const_cast<Data&>(x);
    Arrays a{writable.q.array(at), writable.k.array(), writable.v.array(), r.out.array(at), {}, {}, {}};
    if (r.has_lse) a.lse = r.lse.array(at, false);
    if (x.c.biased) a.bias = writable.bias.array(at);
    if (x.c.hides == CELLS_HIDE) a.cells = writable.cells.array(at);
    if (x.c.alibi) a.alibi = x.alibi.data();
    if (x.c.sinks) a.sinks = x.sinks.data();
    if (x.c.lengths != WHOLE) a.q_ends = x.q_ends.data(), a.kv_ends = x.kv_ends.data();
    const auto fold_part = [&](const Selection& part) {
        Stop stop;
        memory_bytes = 0;
        const int64_t bytes = tilefold::fold(p, k, s, a, part, team, stop).bytes;
        expect(bytes == memory_bytes, "fold() does not say how much it allocated");
        r.bytes = std::max(r.bytes, bytes);
    };
    Selection part;
    part.first_row = first, part.last_row = last;
    if (x.c.hides != SPANS_HIDE && x.c.hides != BITS_HIDE) return fold_part(part);
    constexpr int64_t PANEL = 97;
    for (const Frame& f : x.frames)
        for (int64_t row = first; row < std::min(last, f.q_len); row += PANEL)
            for (int64_t head = x.c.by_head ? 0 : -1; head < (x.c.by_head ? p.heads : 0); head++) {
                part.frame = f.n, part.head = head;
                part.first_row = row, part.last_row = std::min({row + PANEL, last, f.q_len});
                const int64_t rows = part.last_row - row;
                std::vector<int64_t> lo, hi;
                int64_t start = f.kv_len, stop = 0;
                for (int64_t i = 0; i < rows; i++) {
                    int64_t b0, b1;
                    x.band(f, at + row + i, b0, b1);
                    if (b1 > b0) start = std::min(start, b0), stop = std::max(stop, b1);
                    if (x.c.hides == BITS_HIDE)
                        lo.push_back(b0), hi.push_back(b1);
                    else
                        for (const auto& [s0, s1] : x.spans(f, std::max<int64_t>(head, 0), at + row + i))
                            lo.push_back(s0), hi.push_back(s1);
                }
                part.spans = int64_t(lo.size()) / rows, part.lo = lo.data(), part.hi = hi.data();
                std::vector<uint8_t> bits;
                if (x.c.hides == BITS_HIDE) {
                    start = std::min(start, stop);
                    part.bits_start = start, part.bits_bytes = (stop - start + 7) / 8;
                    bits.assign(size_t(rows * part.bits_bytes), 0);
                    bits.reserve(1);
                    part.bits = bits.data();
                    for (int64_t i = 0; i < rows; i++)
                        for (int64_t j = start; j < stop; j++)
                            if (x.bit(f, std::max<int64_t>(head, 0), at + row + i, j))
                                bits[size_t(i * part.bits_bytes + (j - start) / 8)] |=
                                    uint8_t(1 << (j - start) % 8);
                }
                fold_part(part);
            }
}

struct Tally {
    int cases = 0, calls = 0, worst_case = -1;
    double worst = 0;
};

// One case on one machine.
void check(const Data& x, const Expected& e, const Kernels& kernels, Tally& tally) {
    const Kernels k = watch_kernels(kernels);
    const bool rounds = x.c.type == DType::bfloat16 && k.value_bytes == 2;
    Random random(uint64_t(x.c.number) + 5);
    const auto fold_whole = [&](const Settings& s, Team team) {
        Result r(x);
        fold_rows(x, x.p, k, s, team, 0, x.p.q_len, 0, r);
        tally.calls++;
        return r;
    };
    const auto judge = [&](Result& r, const std::string& what) {
        const double share = e.share(x, r, rounds);
        if (share > tally.worst) tally.worst = share, tally.worst_case = x.c.number;
        expect(share <= 1, what + " is off by " + std::to_string(share) + " of what is allowed");
    };
    const auto settings_of = [](const Settings& s) {
        return "tiles of " + std::to_string(s.tile_rows) + " rows, blocks of " + std::to_string(s.block_k) +
               ", splits " + std::to_string(s.splits) + ", workers " + std::to_string(s.workers);
    };
    tally.cases++;

    // The plan for one thread, and all it promises.
    const Settings plain = plan(x.p, k, 1);
    Result first = fold_whole(plain, Team::OWN);
    judge(first, "the result");
    first.only(x, 0, x.p.q_len);
    const int64_t predicted = workspace(x.p, k, plain);
    const bool nothing_to_do = first.bytes == 0 && x.p.q_len == 0;
    if (x.c.lengths == WHOLE && !nothing_to_do)
        expect(first.bytes == predicted,
               "took " + std::to_string(first.bytes) + " bytes, predicted " + std::to_string(predicted));
    else
        expect(first.bytes <= predicted, "took more bytes than predicted");

    // Other tiles, splits and threads: the same bits.
    const Settings busy = plan(x.p, k, 3);
    for (int n = 0; n < 3; n++) {
        Settings s = n ? resized(x.p, k, {1 + random.below(k.most_rows), k.block_k, 1 + n % 2, 1 + n}) : busy;
        Result r = fold_whole(s, Team::OWN);
        expect(r.only(x, 0, x.p.q_len, &first), settings_of(s) + ": not the same bits");
    }

    // Other blocks of keys: as good.
    const Settings other = resized(x.p, k, {k.tile_rows, 16 + random.below(150), 1, 1});
    Result r = fold_whole(other, Team::SERIAL);
    judge(r, settings_of(other));

    // A row alone, within its call and as a call of its own (decoding): the same bits.
    if (!x.p.q_len || x.c.q_len == 0) return;
    for (int n = 0; n < 2; n++) {
        const int64_t i = n ? random.below(x.c.q_len) : x.c.q_len - 1;
        Result row(x);
        fold_rows(x, x.p, k, plain, Team::SERIAL, i, i + 1, 0, row);
        expect(row.only(x, i, i + 1, &first),
               "query " + std::to_string(i) + " folded alone: not the same bits");
        if (x.c.lengths != WHOLE) continue;
        Problem decode = x.p;
        decode.q_len = 1, decode.band.offset += i;
        Result token(x);
        fold_rows(x, decode, k, plan(decode, k, 1 + 2 * n), Team::OWN, 0, 1, i, token);
        expect(token.only(x, i, i + 1, &first), "query " + std::to_string(i) + " decoded: not the same bits");
        tally.calls += 2;
    }
}

// ---- what is not a case ----

// A call ends early when it is told to, and the next one is right.
void check_stop(const Kernels& kernels) {
    enter("a call that is stopped");
    constexpr int64_t LENGTH = 40000, DIM = 16;
    std::vector<float> x(LENGTH * DIM, 0.5f), out(x.size(), -1.0f);
    const int64_t shape[] = {1, LENGTH, DIM}, strides[] = {LENGTH * DIM, DIM, 1};
    Problem p{};
    p.batch = p.heads = p.kv_heads = 1;
    p.q_len = p.kv_len = LENGTH, p.dim = p.v_dim = DIM;
    p.q_dtype = p.kv_dtype = p.acc_dtype = DType::float32;
    p.scale = 0.1, p.softcap = NO_SOFTCAP, p.band = {UNLIMITED, UNLIMITED, 0};
    Arrays a;
    a.q = a.k = a.v = {reinterpret_cast<char*>(x.data()), 3, shape, strides, DType::float32};
    a.out = a.q, a.out.data = reinterpret_cast<char*>(out.data());
    Selection part;
    part.last_row = p.q_len;
    using Clock = std::chrono::steady_clock;
    for (int threads : {1, 3}) {
        Clock::time_point asked{};
        Stop stop(
            {[](void* when) { return *static_cast<Clock::time_point*>(when) = Clock::now(), true; }, &asked});
        tilefold::fold(p, kernels, plan(p, kernels, threads), a, part, Team::OWN, stop);
        const double late = std::chrono::duration<double>(Clock::now() - asked).count();
        expect(asked != Clock::time_point{}, "nobody asked whether to stop");
        // An emulator needs a second for the keys of a piece between two looks.
        expect(late < 5, "went on for " + std::to_string(late) + " s");
        expect(out[0] == -1.0f || out.back() == -1.0f, "was done before it was asked to stop");
    }
}

// With every allocation failing in turn there is an exception or the right result, and the next call is
// right. Each call asks for more threads than there were, so that some fail to start.
void check_no_memory(const Kernels& kernels) {
    Case c(3, DType::float32);
    c.lengths = PADDED, c.hides = NOTHING, c.poison = false;
    c.batch = 2, c.kv_heads = 1, c.q_len = 33, c.kv_len = 1030, c.dim = c.v_dim = 8;
    enter("no memory, " + c.text());
    const Data x(c);
    const Kernels k = watch_kernels(kernels);
    const Settings serial = resized(x.p, k, {16, k.block_k, 2, 1});
    Result right(x);
    fold_rows(x, x.p, k, serial, Team::SERIAL, 0, x.p.q_len, 0, right);
    bool thrown = true;
    int n = 0;
    while (thrown && n < 1000) {
        Result r(x);
        Settings s = serial;
        s.workers = 6 + ++n;
        thrown = false;
        refused = n;
        try {
            fold_rows(x, x.p, k, s, Team::OWN, 0, x.p.q_len, 0, r);
        } catch (const std::bad_alloc&) {
            thrown = true;
        }
        const bool reached = refused.exchange(0) == 0;
        if (!thrown) expect(r.only(x, 0, x.p.q_len, &right), "not the same bits");
        thrown |= reached;  // or swallowed: a thread less
        Result next(x);
        fold_rows(x, x.p, k, serial, Team::OWN, 0, x.p.q_len, 0, next);
        expect(next.only(x, 0, x.p.q_len, &right), "the next call: not the same bits");
    }
    expect(n > 2 && n < 1000, "allocations were not counted");
    printf("no memory    each of %d allocations refused in turn\n", n - 1);
}

// Names of all machines, from what is said of a name that is none.
std::vector<std::string> machine_names() {
    std::vector<std::string> names;
    try {
        choose("?");
    } catch (const std::invalid_argument& error) {
        std::string text = error.what();
        text.erase(0, text.rfind(':') + 1);
        while (!text.empty()) {
            text.erase(0, 1);
            names.push_back(text.substr(0, text.find(' ')));
            text.erase(0, names.back().size());
        }
    }
    return names;
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : CASES, first = argc > 2 ? atoi(argv[2]) : 0;
    setvbuf(stdout, nullptr, _IOLBF, 0);
#if defined(__SANITIZE_ADDRESS__)
    __asan_set_death_callback(say_where);
#else
    for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
        signal(fault, [](int signal) {
            say_where();
            _Exit(128 + signal);
        });
#endif
    std::vector<const Machine*> machines;
    const std::vector<std::string> names = machine_names();
    for (const std::string& name : names) try {
            machines.push_back(&choose(name.c_str()));
        } catch (const std::invalid_argument& error) {
            printf("%-12s skipped: %s\n", name.c_str(), error.what());
        }
    if (machines.empty()) return printf("FAILED  no machine at all\n"), 1;

    std::vector<std::vector<Tally>> tallies(machines.size(), std::vector<Tally>(std::size(TYPES)));
    for (int n = first; n < first + cases; n++)
        for (size_t t = 0; t < std::size(TYPES); t++) {
            const Case c(n, TYPES[t]);
            enter(c.text());
            const Data x(c);
            const Expected e(x);
            for (size_t m = 0; m < machines.size(); m++) {
                enter(machines[m]->name + (", " + c.text()));
                check(x, e, machines[m]->kernels(c.type), tallies[m][t]);
            }
        }
    check_stop(machines[0]->kernels(DType::float32));
    check_no_memory(machines[0]->kernels(DType::float32));
    for (size_t m = 0; m < machines.size(); m++)
        for (size_t t = 0; t < std::size(TYPES); t++) {
            const Tally& y = tallies[m][t];
            printf("%-12s %-8s %4d cases, %5d calls, worst error %.2f of what is allowed (case %d)\n",
                   machines[m]->name, name(TYPES[t]), y.cases, y.calls, y.worst, y.worst_case);
        }
    if (failures) printf("FAILED  %d times; `selftest 1 N` repeats case N alone\n", failures.load());
    return failures ? 1 : 0;
}
