// A case is a number: each list of possibilities is shuffled anew for every run of as many cases as it is
// long, so all of it is used soon, in any company. `Data` are its arrays and what they mean.
#pragma once

#include <initializer_list>
#include <numeric>
#include <string>

#include "pages.h"

namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int CASES = 120;
constexpr double MOST_WORK = 1e6;
#else
constexpr int CASES = 240;
constexpr double MOST_WORK = 5e6;  // of a case: about the operations of the plain method
#endif

enum Lengths { WHOLE, PADDED, PACKED, PAGES };
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
    DType bias, stored;  // the latter in pages
    int64_t page;
    unsigned bias_repeats;
    bool invariant;

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
        lengths = one(WHOLE, WHOLE, PADDED, PACKED, PAGES);
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
        stored = one(t, DType::int8, DType::float8_e4m3fn, DType::int4), page = one(1, 5, 16, 128, 1000);
        invariant = one(false, true);
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
        if (lengths != PAGES || t == DType::float64) stored = t;
        if (stored == DType::int4) dim += dim % 2, v_dim += v_dim % 2;
    }

    bool padded() const { return lengths == PADDED || lengths == PAGES; }

    std::string text() const {
        const char* const orders[] = {"", " BSHD", " gaps", " reversed"};
        const char* const bands[] = {"", " causal", " top-left", " window", " beside", " far"};
        const char* const hidden[] = {"", " spans", " bits", " cells"};
        const char* const ragged[] = {"", " padded", " packed", " pages of "};
        char s[200];
        snprintf(s, sizeof s, "case %d: %s b%d h%d/%d q%d k%d d%d/%d", number, name(type), int(batch),
                 int(kv_heads * group), int(kv_heads), int(q_len), int(kv_len), int(dim), int(v_dim));
        const std::string pages =
            lengths == PAGES ? std::to_string(page) + (stored != type ? std::string(" ") + name(stored) : "")
                             : "";
        return s + (ragged[lengths] + pages) + orders[order] + bands[affine] + hidden[hides] +
               (by_head && hides ? " by head" : "") + (softcap != NO_SOFTCAP ? " softcap" : "") +
               (biased ? std::string(" bias ") + name(bias) : "") + (alibi ? " alibi" : "") +
               (sinks ? " sinks" : "") + (poison ? " poison" : "") + (lse ? "" : " no lse") +
               (invariant ? " invariant" : "");
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
    Tensor exact_k, exact_v;  // of codes
    Table table;
    Store k_pages, v_pages;
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
        if (c.padded()) spoil_padding();
        if (c.poison) spoil_some(random);
        if (c.lengths == PAGES) {
            table = Table(c.page, p.kv_len, kv_ends, random);
            const auto store = [&](Tensor& x, Tensor& exact, int64_t width) {
                if (is_code(c.stored))
                    exact = Tensor(DType::float64, shape(c.kv_heads, p.kv_len, width), PLAIN);
                return Store(x, exact, c.stored, c.kv_heads, width, c.order, table, kv_ends, random);
            };
            k_pages = store(k, exact_k, c.dim), v_pages = store(v, exact_v, c.v_dim);
        }
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

    // Whether codes are multiplied as they lie on a machine that does so, where rows are few: then numbers of
    // the sequence are not rounded to the type of the queries.
    bool has_codes() const {
        return c.lengths == PAGES && is_integer(c.stored) && !c.invariant && k_pages.groups == 1 &&
               v_pages.groups == 1;
    }
    bool is_exact(const Frame& f) const { return has_codes() && f.q_len * c.group <= 8; }

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
        p.q_len = c.q_len, p.kv_len = c.lengths == PAGES ? up(c.kv_len, c.page) : c.kv_len;
        if (c.lengths == WHOLE) return;
        const bool none = random.below(c.lengths == PAGES ? 16 : 4) == 0;  // no sequence has keys
        if (c.lengths == PACKED) q_ends = kv_ends = {0};
        for (int64_t n = 0; n < c.batch; n++) {
            int64_t queries = random.below(c.q_len + 1), keys = none ? 0 : random.below(c.kv_len + 1);
            if (n == 0) queries = c.q_len;
            if (n == (c.lengths == PAGES ? 0 : 1) && !none) keys = c.kv_len;
            if (c.lengths == PACKED) queries += q_ends.back(), keys += kv_ends.back();
            q_ends.push_back(queries), kv_ends.push_back(keys);
        }
        if (c.lengths == PACKED) p.q_len = q_ends.back(), p.kv_len = kv_ends.back();
    }
    std::vector<int64_t> leading_shape() const {
        if (c.lengths == PACKED || (c.batch == 1 && c.number % 2 && c.lengths != PAGES)) return {};
        if (c.batch == 4 && c.lengths != PAGES) return {2, 2};
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
        p.q_dtype = c.type, p.kv_dtype = c.stored;
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
        p.layout = c.lengths == PACKED ? VARLEN : c.lengths == PAGES ? PAGED : DENSE;
        const std::pair<bool, Has> there[] = {{c.hides == SPANS_HIDE || c.hides == BITS_HIDE, SPANS},
                                              {c.hides == BITS_HIDE, BITS},
                                              {c.biased, BIAS},
                                              {c.alibi, ALIBI},
                                              {c.sinks, SINKS},
                                              {c.padded(), LENGTHS}};
        for (const auto& [yes, bit] : there) p.has = yes ? Has(p.has | bit) : p.has;
        p.want = Want((c.lse ? unsigned(LSE) : 0) | (c.invariant ? unsigned(INVARIANT) : 0));
        for (int64_t n = 0; n < c.batch; n++) {
            const size_t at = size_t(n);
            Frame f{n, n, 0, 0, c.q_len, c.kv_len, 0};
            if (c.padded()) f.q_len = q_ends[at], f.kv_len = kv_ends[at];
            if (c.lengths == PACKED)
                f = {
                    n, 0, q_ends[at], kv_ends[at], q_ends[at + 1] - q_ends[at], kv_ends[at + 1] - kv_ends[at],
                    0};
            f.offset = p.band.offset == PER_SEQUENCE ? f.kv_len - f.q_len : p.band.offset;
            frames.push_back(f);
        }
    }
};
}  // namespace
