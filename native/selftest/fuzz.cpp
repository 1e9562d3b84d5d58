// Bytes become a problem, its arrays and what part of it is folded, all as the door may hand them over; the
// core has to survive and to keep its word: the same bits for any tiles, splits and threads, nothing written
// but what belongs to the selection, and averages of values that are no larger than the largest. The facts to
// know: arrays lie in memory of exactly their extent, so that the address sanitizer sees a read beside one,
// and sizes that no machine has are only planned with. Under libFuzzer (built with TILEFOLD_LIBFUZZER) the
// bytes grow towards new code; without it main() below draws them, in a process of its own, so that it can
// say of which input that one died. Usage: fuzz seconds [the first input [the last one]]

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "../dispatch.h"
#include "../executor.h"
#include "../sweep.h"

namespace {

using namespace tilefold;

[[noreturn]] void fail(const std::string& what, const Problem& p) {
    fprintf(stderr, "FAILED  %s: type %d b%lld h%lld/%lld q%lld k%lld d%lld v%lld layout %d has %d\n",
            what.c_str(), int(p.q_dtype), (long long)p.batch, (long long)p.heads, (long long)p.kv_heads,
            (long long)p.q_len, (long long)p.kv_len, (long long)p.dim, (long long)p.v_dim, int(p.layout),
            int(p.has));
    abort();
}

// ---- bytes ----

// What is left of the input; zeros when it is at its end.
class Bytes {
   public:
    Bytes(const uint8_t* data, size_t size) : at_(data), end_(data + size), first_(data) {}

    uint8_t byte() { return at_ < end_ ? *at_++ : 0; }
    uint64_t word(int bytes) {
        uint64_t x = 0;
        for (int n = 0; n < bytes; n++) x = x << 8 | byte();
        return x;
    }
    bool coin() { return byte() & 1; }
    int64_t below(int64_t n) { return int64_t(word(n > 256 ? 2 : 1) % uint64_t(n)); }
    template <class T>
    T one(std::initializer_list<T> list) {
        return list.begin()[below(int64_t(list.size()))];
    }
    // A size from 0 to `most`, small ones and the ends more often.
    int64_t size(int64_t most) {
        const int64_t few = std::min<int64_t>(most, 9);
        return one({below(few + 1), below(most + 1), most, below(std::min<int64_t>(most, 40) + 1)});
    }
    double number() { return std::bit_cast<double>(word(8)); }
    // Finite where it is summed, too.
    double finite(DType sums) {
        const double x = coin() ? number() : (double(byte()) - 100) / 32;
        return std::isfinite(sums == DType::float64 ? x : double(float(x))) ? x : 1;
    }
    // Everything from the start again and again, mixed so that it does not repeat.
    uint8_t endless() {
        mixed_ = mixed_ * 6364136223846793005u + 1442695040888963407u;
        const size_t size = size_t(end_ - first_);
        return uint8_t((size ? first_[turn_++ % size] : 0) ^ mixed_ >> 56);
    }

   private:
    const uint8_t *at_, *end_, *first_;
    size_t turn_ = 0;
    uint64_t mixed_ = 1;
};

// ---- arrays ----

constexpr char UNWRITTEN = char(0xff);

// Memory of exactly an array's extent. Axes lie in any order, at any distance, forwards, backwards or, where
// `repeats` allows it, on one another.
class Memory {
   public:
    Memory(Bytes& bytes, DType type, std::vector<int64_t> shape, bool repeats, char content = UNWRITTEN)
        : shape_(std::move(shape)) {
        strides_.resize(shape_.size());
        std::vector<size_t> axes;
        for (size_t axis = shape_.size(); axis-- > 0;) axes.push_back(axis);
        if (bytes.coin())
            for (size_t n = axes.size() - 1; n > 0; n--)
                std::swap(axes[n], axes[size_t(bytes.below(int64_t(n) + 1))]);
        int64_t step = bytes.one({1, 1, 1, 2, 5}), first = 0, last = 0;
        for (size_t axis : axes) {
            const int how = int(bytes.below(8));
            if (how == 0 && repeats) continue;
            strides_[axis] = how == 1 ? -step : step;
            const int64_t reach = step * std::max<int64_t>(shape_[axis] - 1, 0);
            (how == 1 ? first : last) += reach;
            step = step * std::max<int64_t>(shape_[axis], 1) + (how == 2 ? bytes.below(4) : 0);
        }
        const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
        data_.assign(empty ? 0 : size_t((first + last + 1) * width(type)), content);
        data_.shrink_to_fit();
        array_ = {data_.data() + (empty ? 0 : first * width(type)), int(shape_.size()), shape_.data(),
                  strides_.data(), type};
        if (!array_.data) array_.data = &nothing_;
    }
    Memory(const Memory&) = delete;

    const Array& array() const { return array_; }
    std::vector<char>& bytes() { return data_; }
    // Where element `index`, counted over the axes in order, begins.
    size_t at(int64_t index) const {
        int64_t x = array_.data - data_.data();
        for (size_t axis = shape_.size(); axis-- > 0; index /= shape_[axis])
            x += index % shape_[axis] * strides_[axis] * width(array_.type);
        return size_t(x);
    }

   private:
    std::vector<int64_t> shape_, strides_;
    std::vector<char> data_;
    Array array_;
    char nothing_ = 0;
};

double half(uint16_t bits, int mantissa) {
    const int most = (1 << (15 - mantissa)) - 1, e = bits >> mantissa & most,
              f = bits & ((1 << mantissa) - 1);
    if (e == most) return f ? std::numeric_limits<double>::quiet_NaN() : bits & 0x8000 ? -INFINITY : INFINITY;
    const double x = std::ldexp(e ? f | 1 << mantissa : f, std::max(e, 1) - most / 2 - mantissa);
    return bits & 0x8000 ? -x : x;
}

template <class T>
T read(const char* from) {
    T x;
    memcpy(&x, from, sizeof x);
    return x;
}

double value(const char* from, DType type) {
    if (type == DType::float64) return read<double>(from);
    if (type == DType::float32) return double(read<float>(from));
    return half(read<uint16_t>(from), type == DType::float16 ? 10 : 7);
}

// A number of at most 1: its exponent is less than that of 1.
void tame(char* at, DType type) {
    const int64_t last = width(type) - 1;
    at[last] = char(at[last] & 0x80 ? 0xbf : 0x3f);
    if (type == DType::float16) at[last] = char(at[last] & ~0x04);
    if (type == DType::bfloat16 || type == DType::float32) at[last - 1] = char(at[last - 1] & 0x7f);
    if (type == DType::float64) at[last - 1] = char(at[last - 1] & 0xef);
}

void fill(Memory& x, Bytes& bytes, bool tamed) {
    std::vector<char>& data = x.bytes();
    const int64_t step = width(x.array().type);
    for (char& c : data) c = char(bytes.endless());
    for (char& c : data)
        if (step == 1 && c < 0) c = 0;  // of cells half are hidden
    for (int64_t n = 0; tamed && step > 1 && n < int64_t(data.size()); n += step)
        tame(data.data() + n, x.array().type);
}

// One NaN is like another.
bool same(const char* a, const char* b, DType type) {
    return !memcmp(a, b, size_t(width(type))) || (std::isnan(value(a, type)) && std::isnan(value(b, type)));
}

// ---- machines ----

const std::vector<const Machine*>& machines() {
    static const std::vector<const Machine*> found = [] {
        std::vector<const Machine*> list;
        for (const char* name :
             {"avx512_amx", "avx512_bf16", "avx512", "avx2", "neon_bf16", "neon", "scalar"})
            try {
                list.push_back(&choose(name));
            } catch (const std::invalid_argument&) {
            }
        return list;
    }();
    return found;
}

// ---- sizes that are only planned with ----

// Whether arrays of such sizes may exist: no product of theirs that is not 0 takes 2^63 bytes.
bool may_exist(std::initializer_list<int64_t> sizes, int64_t bytes) {
    __int128 product = bytes;
    for (int64_t n : sizes)
        if (n && (product *= n) >= __int128(1) << 63) return false;
    return true;
}

void check_sizes(Bytes& bytes, Problem p, const Kernels& k) {
    // Of at most so many bits, and often at either end of what those can say.
    const auto any = [&](int bits) {
        const int64_t most = int64_t(~uint64_t(0) >> 1 >> (63 - bits));
        return bytes.one({most, most / 2 + 1, int64_t(bytes.word(8) & uint64_t(most))});
    };
    int left = 60;  // bits of what may exist
    const auto size = [&] {
        const int bits = int(bytes.below(left + 1));
        left -= bits;
        return any(bits);
    };
    p.batch = size(), p.kv_heads = std::max<int64_t>(size(), 1), p.q_len = size(), p.kv_len = size();
    const int64_t group = size();
    p.dim = size(), p.v_dim = size();
    if (!may_exist({p.kv_heads, group}, 1)) return;
    p.heads = p.kv_heads * group;
    const int64_t item = width(p.q_dtype), lead = p.layout == VARLEN ? 1 : p.batch;
    const int64_t wide = std::max({p.dim, p.v_dim, int64_t(1)});
    if (!may_exist({lead, p.heads, p.q_len, p.dim}, item) ||
        !may_exist({lead, p.kv_heads, p.kv_len, p.dim}, item) ||
        !may_exist({lead, p.kv_heads, p.kv_len, p.v_dim}, item) ||
        !may_exist({lead, p.heads, p.q_len, p.v_dim}, item) || !may_exist({p.batch}, 8))
        return;
    if (p.batch && p.heads &&
        !may_exist({p.batch, p.heads, std::max<int64_t>(p.q_len, 1), std::max<int64_t>(p.kv_len, 1), wide},
                   8))
        return;
    for (const Settings& s :
         {plan(p, k, int(1 + bytes.below(64))), resized(p, k, {any(63), any(63), any(63), any(63)})}) {
        const Settings again = resized(p, k, s);
        if (s.tile_rows < 1 || s.block_k < 1 || s.splits < 1 || s.workers < 1) fail("no settings", p);
        if (again.tile_rows != s.tile_rows || again.block_k != s.block_k || again.splits != s.splits ||
            again.workers != s.workers)
            fail("settings change when they are taken up", p);
        try {
            if (workspace(p, k, s) < 0 || grad_workspace(p, k, grad_plan(p, k, 3)) < 0)
                fail("a negative number of bytes", p);
        } catch (const std::length_error&) {
        }
    }
}

// ---- problems that are folded ----

struct Fuzz {
    Bytes& bytes;
    Problem p;
    const Kernels& kernels;
    std::vector<int64_t> lead, q_ends, kv_ends, lo, hi;
    std::vector<uint8_t> bits;
    std::vector<double> alibi, sinks;
    bool tamed;
    Arrays a;
    Selection part;

    Fuzz(Bytes& b, const Problem& p_, const Kernels& k) : bytes(b), p(p_), kernels(k) {
        choose_sizes();
        tamed = bytes.coin();
        p.scale = tamed ? bytes.one({0.0, 0.3, -1.0, 1.0}) : bytes.finite(p.acc_dtype);
        p.softcap = bytes.below(4) ? NO_SOFTCAP
                    : tamed        ? 1 + double(bytes.byte())
                                   : std::abs(bytes.finite(p.acc_dtype));
        p.want = bytes.coin() ? LSE : Want(0);
    }

    int64_t sequences() const { return p.batch; }
    int64_t q_of(int64_t n) const {
        return q_ends.empty()       ? p.q_len
               : p.layout == VARLEN ? q_ends[size_t(n + 1)] - q_ends[size_t(n)]
                                    : q_ends[size_t(n)];
    }
    int64_t kv_of(int64_t n) const {
        return kv_ends.empty()      ? p.kv_len
               : p.layout == VARLEN ? kv_ends[size_t(n + 1)] - kv_ends[size_t(n)]
                                    : kv_ends[size_t(n)];
    }

    std::vector<int64_t> shape(int64_t heads, int64_t rows, int64_t cols = -1) const {
        std::vector<int64_t> s = lead;
        s.insert(s.end(), {heads, rows});
        if (cols >= 0) s.push_back(cols);
        return s;
    }

    void set(Has bit) { p.has = Has(p.has | bit); }

    void choose_sizes() {
        const int64_t group = bytes.one<int64_t>({1, 1, 2, 3, 5, 0});
        p.kv_heads = 1 + bytes.below(2), p.heads = group * p.kv_heads;
        p.dim = bytes.size(70), p.v_dim = bytes.size(70);
        const int64_t most_keys = bytes.below(8) ? 150 : 2100, most_queries = bytes.below(8) ? 40 : 300;
        const bool packed = p.layout == VARLEN, padded = !packed && bytes.below(3) == 0;
        if (packed) {
            p.batch = bytes.below(4), q_ends = kv_ends = {0};
            for (int64_t n = 0; n < p.batch; n++) {
                q_ends.push_back(q_ends.back() + bytes.size(most_queries / 2));
                kv_ends.push_back(kv_ends.back() + bytes.size(most_keys / 2));
            }
            p.q_len = q_ends.back(), p.kv_len = kv_ends.back();
        } else {
            for (int64_t n = bytes.below(3); n > 0; n--) lead.push_back(bytes.one<int64_t>({1, 2, 3, 0}));
            p.batch = 1;
            for (int64_t n : lead) p.batch *= n;
            p.q_len = bytes.size(most_queries), p.kv_len = bytes.size(most_keys);
            if (padded) {
                set(LENGTHS);
                const int which = int(bytes.below(3));
                for (int64_t n = 0; n < p.batch; n++) {
                    if (which != 1) q_ends.push_back(bytes.below(p.q_len + 1));
                    if (which != 0) kv_ends.push_back(bytes.below(p.kv_len + 1));
                }
            }
        }
        // About a million operations are enough for anything to happen.
        const auto work = [&] {
            return double(p.batch * p.heads) * double(p.q_len + 4) * double(p.kv_len + 40) *
                   double(p.dim + p.v_dim + 30);
        };
        if (work() > 3e6) p.dim = std::min<int64_t>(p.dim, 9), p.v_dim = std::min<int64_t>(p.v_dim, 6);
        if (work() > 1e7) p.heads = p.kv_heads = 1;
        q_ends.shrink_to_fit(), kv_ends.shrink_to_fit();
        const int64_t far = int64_t(1) << 60;
        const auto limit = [&](int64_t none) {
            return bytes.one<int64_t>({none, none, 0, bytes.below(60), -bytes.below(60), far, -far, 1 << 20});
        };
        p.band = {limit(UNLIMITED), limit(UNLIMITED), p.kv_len - p.q_len};
        const bool ragged = packed || padded;
        if (bytes.below(3) == 0) p.band.offset = limit(0);
        if (ragged && bytes.coin()) p.band.offset = PER_SEQUENCE;
    }

    std::vector<double> per_head(bool may_be_hidden) {
        std::vector<double> x;
        for (int64_t n = 0; n < (p.layout == VARLEN ? 1 : p.batch) * p.heads; n++) {
            const double number = tamed ? double(bytes.byte()) / 64 - 1 : bytes.finite(p.acc_dtype);
            x.push_back(may_be_hidden && bytes.below(8) == 0 ? -INFINITY : number);
        }
        x.reserve(1);
        return x;
    }

    // Some rows of all sequences, or of one, or of one head of it with spans and bits of its own.
    void select() {
        part.last_row = p.q_len;
        if (sequences() && bytes.coin()) part.frame = bytes.below(sequences());
        if (part.frame >= 0 && p.heads && bytes.coin()) part.head = bytes.below(p.heads);
        const int64_t rows = part.frame < 0 ? p.q_len : q_of(part.frame);
        if (bytes.coin() && (p.layout != VARLEN || part.frame >= 0)) {
            part.first_row = bytes.below(rows + 1);
            part.last_row = part.first_row + bytes.below(rows - part.first_row + 1);
        }
        if (part.frame < 0 || bytes.coin()) return;
        part.last_row = std::min(part.last_row, rows);
        set(SPANS);
        const bool cell_by_cell = bytes.coin();
        part.spans = cell_by_cell ? 1 : bytes.one<int64_t>({1, 1, 2, 4});
        const int64_t keys = kv_of(part.frame), n = std::max<int64_t>(part.last_row - part.first_row, 0);
        int64_t first = keys, last = 0;
        for (int64_t i = 0; i < n; i++) {
            std::vector<int64_t> cuts;
            for (int64_t s = 0; s < 2 * part.spans; s++) cuts.push_back(bytes.below(keys + 1));
            std::sort(cuts.begin(), cuts.end());
            for (size_t s = 0; s < cuts.size(); s += 2) {
                lo.push_back(cuts[s]), hi.push_back(cuts[s + 1]);
                if (cuts[s] < cuts[s + 1])
                    first = std::min(first, cuts[s]), last = std::max(last, cuts[s + 1]);
            }
        }
        lo.reserve(1), hi.reserve(1);
        part.lo = lo.data(), part.hi = hi.data();
        if (!cell_by_cell) return;
        set(BITS);
        first = std::min(first, last);
        part.bits_start = first, part.bits_bytes = (last - first + 7) / 8;
        for (int64_t x = n * part.bits_bytes; x > 0; x--) bits.push_back(bytes.endless());
        bits.reserve(1), bits.shrink_to_fit();
        part.bits = bits.data();
    }

    // Whether query row `i` of sequence `n` and a head belong to what is folded.
    bool selected(int64_t n, int64_t head, int64_t i) const {
        return (part.frame < 0 || part.frame == n) && (part.head < 0 || part.head == head) &&
               i >= part.first_row && i < std::min(part.last_row, q_of(n));
    }

    struct Results {
        Memory out, lse;
    };

    Results make(Bytes layout) {
        return {Memory(layout, p.q_dtype, shape(p.heads, p.q_len, p.v_dim), false),
                Memory(layout, p.acc_dtype, shape(p.heads, p.q_len), false)};
    }

    void fold(Results& r, const Settings& s, Team team, bool stopped = false) {
        a.out = r.out.array();
        a.lse = p.want & LSE ? r.lse.array() : Array{};
        Stop stop;
        if (stopped) stop.request();
        const int64_t took = tilefold::fold(p, kernels, s, a, part, team, stop).bytes;
        if (took > workspace(p, kernels, s)) fail("took more bytes than planned", p);
    }

    // Every number that belongs to the selection is the same in both and every other is as it was.
    void compare(Results& x, Results& y, double most) {
        const bool packed = p.layout == VARLEN;
        std::vector<char> out_rest = x.out.bytes(), lse_rest = x.lse.bytes();
        const auto check = [&](Memory& one, Memory& other, std::vector<char>& rest, int64_t index) {
            const size_t at = one.at(index);
            const DType type = one.array().type;
            if (!same(one.bytes().data() + at, other.bytes().data() + at, type)) fail("not the same bits", p);
            memset(rest.data() + at, UNWRITTEN, size_t(width(type)));
        };
        for (int64_t n = 0; n < sequences(); n++)
            for (int64_t h = 0; h < p.heads; h++)
                for (int64_t i = 0; i < q_of(n); i++) {
                    if (!selected(n, h, i)) continue;
                    const int64_t row =
                        packed ? h * p.q_len + q_ends[size_t(n)] + i : (n * p.heads + h) * p.q_len + i;
                    for (int64_t d = 0; d < p.v_dim; d++) {
                        check(x.out, y.out, out_rest, row * p.v_dim + d);
                        const char* const o = x.out.bytes().data() + x.out.at(row * p.v_dim + d);
                        if (tamed && !(std::abs(value(o, p.q_dtype)) <= most))
                            fail("no average of values", p);
                    }
                    if (p.want & LSE) check(x.lse, y.lse, lse_rest, row);
                }
        for (const std::vector<char>* rest : {&out_rest, &lse_rest})
            if (std::any_of(rest->begin(), rest->end(), [](char c) { return c != UNWRITTEN; }))
                fail("wrote where no result belongs", p);
    }

    static Memory nothing_or(Bytes& bytes, bool there, DType type, std::vector<int64_t> shape,
                             char content = UNWRITTEN) {
        return Memory(bytes, type, there ? std::move(shape) : std::vector<int64_t>{0}, true, content);
    }

    void run() {
        Memory q(bytes, p.q_dtype, shape(p.heads, p.q_len, p.dim), true);
        Memory k(bytes, p.q_dtype, shape(p.kv_heads, p.kv_len, p.dim), true);
        Memory v(bytes, p.q_dtype, shape(p.kv_heads, p.kv_len, p.v_dim), true);
        const DType type = bytes.one({DType::float16, DType::bfloat16, DType::float32, DType::float64});
        const bool biased = bytes.below(3) == 0, hidden = bytes.below(4) == 0;
        Memory bias = nothing_or(bytes, biased, type, shape(p.heads, p.q_len, p.kv_len));
        Memory cells = nothing_or(bytes, hidden, DType::uint8, shape(p.heads, p.q_len, p.kv_len));
        if (bytes.below(4) == 0) alibi = per_head(false), set(ALIBI), a.alibi = alibi.data();
        if (bytes.below(4) == 0) sinks = per_head(true), set(SINKS), a.sinks = sinks.data();
        if (hidden) set(SPANS), a.cells = cells.array();
        if (biased) set(BIAS), a.bias = bias.array();
        if (!hidden)
            select();
        else
            part.last_row = p.q_len;
        for (Memory* x : {&q, &k, &v, &bias, &cells}) fill(*x, bytes, tamed);
        a.q = q.array(), a.k = k.array(), a.v = v.array();
        a.q_ends = q_ends.empty() ? nullptr : q_ends.data(),
        a.kv_ends = kv_ends.empty() ? nullptr : kv_ends.data();

        const Bytes layout = bytes;
        Results first = make(layout), second = make(layout);
        const Settings other = resized(
            p, kernels,
            {1 + bytes.below(kernels.most_rows), kernels.block_k, 1 + bytes.below(2), 1 + bytes.below(3)});
        if (bytes.below(16) == 0) {
            Results third = make(layout);
            fold(third, other, Team::OWN, true);
        }
        fold(first, plan(p, kernels, 1), Team::SERIAL);
        fold(second, other, Team::OWN);
        // The largest of tame values is 1; weights and the result are rounded.
        compare(first, second, 1 + 0x1p-6);
        if (p.want & LSE && bytes.coin()) differentiate(first);
    }

    // Whatever a pass backward writes, and what it is written over: numbers to be added to, or none.
    struct Sums {
        Memory dq, dk, dv, dbias;
        std::vector<double> dsinks;
    };

    Sums make(Bytes layout, bool add, bool biased) const {
        const DType kept = add ? p.acc_dtype : p.q_dtype;
        const char content = add || p.has & LENGTHS ? 0 : UNWRITTEN;
        return {Memory(layout, p.q_dtype, shape(p.heads, p.q_len, p.dim), false, content),
                Memory(layout, kept, shape(p.kv_heads, p.kv_len, p.dim), false, content),
                Memory(layout, kept, shape(p.kv_heads, p.kv_len, p.v_dim), false, content),
                nothing_or(layout, biased, p.acc_dtype, shape(p.heads, p.q_len, p.kv_len), 0),
                std::vector<double>(size_t(p.batch * p.heads))};
    }

    void differentiate(Results& forward) {
        const bool add = part.frame >= 0 || part.first_row > 0 || part.last_row < p.q_len;
        Memory dout(bytes, p.q_dtype, shape(p.heads, p.q_len, p.v_dim), true);
        Memory dlse(bytes, p.acc_dtype, shape(p.heads, p.q_len), true);
        fill(dout, bytes, tamed), fill(dlse, bytes, tamed);
        const bool slope_of_lse = bytes.coin();
        a.out = forward.out.array(), a.lse = forward.lse.array();
        p.want = Want(LSE | GRAD);
        const Bytes layout = bytes;
        Sums one = make(layout, add, bool(a.bias)), many = make(layout, add, bool(a.bias));
        for (Sums* s : {&one, &many}) {
            Gradients g{dout.array(),
                        slope_of_lse ? dlse.array() : Array{},
                        s->dq.array(),
                        s->dk.array(),
                        s->dv.array(),
                        a.bias ? s->dbias.array() : Array{},
                        a.sinks ? s->dsinks.data() : nullptr,
                        add};
            Settings settings = grad_plan(p, kernels, 1);
            settings.workers = s == &one ? 1 : 3;
            Stop stop;
            const int64_t took = tilefold::gradient(p, kernels, settings, a, g, part,
                                                    s == &one ? Team::SERIAL : Team::OWN, stop)
                                     .bytes;
            if (took > grad_workspace(p, kernels, settings))
                fail("a gradient took more bytes than planned", p);
        }
        for (auto x : {&Sums::dq, &Sums::dk, &Sums::dv, &Sums::dbias}) {
            const std::vector<char>& mine = (one.*x).bytes();
            const DType type = (one.*x).array().type;
            for (size_t at = 0; at < mine.size(); at += size_t(width(type)))
                if (!same(mine.data() + at, (many.*x).bytes().data() + at, type))
                    fail("a gradient has not the same bits", p);
        }
        for (size_t n = 0; n < one.dsinks.size(); n++)
            if (!same(reinterpret_cast<char*>(&one.dsinks[n]), reinterpret_cast<char*>(&many.dsinks[n]),
                      DType::float64))
                fail("a sink's gradient has not the same bits", p);
    }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    Bytes bytes(data, size);
    const Machine& machine = *machines()[size_t(bytes.below(int64_t(machines().size())))];
    Problem p{};
    p.q_dtype = p.kv_dtype = bytes.one({DType::float16, DType::bfloat16, DType::float32, DType::float64});
    p.acc_dtype = p.q_dtype == DType::float64 ? DType::float64 : DType::float32;
    p.layout = bytes.below(4) == 0 ? VARLEN : DENSE;
    const Kernels& kernels = machine.kernels(p.q_dtype);
    if (bytes.below(8) == 0)
        check_sizes(bytes, p, kernels);
    else
        Fuzz(bytes, p, kernels).run();
    return 0;
}

#if !defined(TILEFOLD_LIBFUZZER)

#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

namespace {

constexpr int64_t ALL = INT64_MAX;
constexpr int LONGEST = 60;  // seconds that an input may take

void run_input(int64_t number) {
    uint64_t random = uint64_t(number);
    const auto next = [&] {
        uint64_t x = random += 0x9e3779b97f4a7c15u;  // SplitMix64
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return x ^ x >> 31;
    };
    std::vector<uint8_t> bytes(size_t(next() % 300));
    for (uint8_t& byte : bytes) byte = uint8_t(next() >> 7);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
    const int64_t first = argc > 2 ? atoll(argv[2]) : 0, last = argc > 3   ? atoll(argv[3])
                                                                : argc > 2 ? first
                                                                           : ALL;
    const time_t end = time(nullptr) + (argc > 1 ? atoi(argv[1]) : 10);
    void* const page =
        mmap(nullptr, sizeof(int64_t), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (page == MAP_FAILED) return perror("fuzz"), 1;
    volatile int64_t& number = *static_cast<int64_t*>(page);
    const pid_t child = fork();
    if (child == 0) {
        for (int64_t n = first; n <= last && (argc > 2 || time(nullptr) < end); n++) {
            number = n;
            run_input(n);
        }
        _exit(0);
    }
    int status = 0, quiet = 0;
    for (int64_t seen = -1; waitpid(child, &status, WNOHANG) == 0; usleep(100000)) {
        quiet = seen == number ? quiet + 1 : 0;
        seen = number;
        if (quiet > 10 * LONGEST) kill(child, SIGKILL);
    }
    if (status) {
        printf("FAILED  in input %lld; `fuzz 0 %lld` repeats it\n", (long long)number, (long long)number);
        return 1;
    }
    printf("fuzz         %lld inputs\n", (long long)(number - first + 1));
    return 0;
}

#endif
