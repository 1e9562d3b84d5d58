// Sweep one for few query rows: decoding. Arithmetic is scarce there and memory is not, so keys and values
// are read once, in the order in which they lie, and serve all the rows (the heads that share them).
//
// Scores: lanes are keys, so W rows of keys are transposed in registers; per key of 128 floats that is 32
// shuffles and 8 multiply-adds per query row. Values: lanes are dimensions. Each element is summed in the
// very order of fold.inl, so a row has the same bits here and there: decoding reproduces prefill. Tried: dot
// products along the dimensions, which need no shuffles but sum in another order; asking for all that comes
// with a loop of its own, which costs more than it brings. For bf16 on a machine that multiplies tiles: keys
// as rows of A, interleaved values as B. That took 20 ns per key of 128 dims instead of 23 from the second
// cache, and nothing off from memory, where all waits for what was asked for in bursts.

namespace tilefold {
namespace {

template <class E, class T>
__attribute__((noinline)) Vec<E> gathered(const T* p, int64_t col, int64_t n) {
    Vec<E> x{};
    for (int64_t i = 0; i < least(n, LANES<E>); i++) x[i] = one(p[i * col]);
    return x;
}
// `n` elements of storage from `p`, `col` apart, as a vector; the others are 0.
template <class E, class T>
TILEFOLD_INLINE Vec<E> some(const T* p, int64_t col, int64_t n) {
    return __builtin_expect(n >= LANES<E> && col == 1, 1) ? widen(p) : gathered<E>(p, col, n);
}

#ifdef TILEFOLD_HAS_DOT2
__attribute__((noinline)) U32 gathered_pairs(const BFloat* p, int64_t col, int64_t n) {
    U32 x{};
    for (int64_t i = 0; i < least(n, 2 * LANES<float>); i++)
        x[i / 2] |= uint32_t(p[i * col].bits) << (i % 2 * 16);
    return x;
}
// The same for pairs of bf16 dims: n of them, two to a lane.
TILEFOLD_INLINE U32 some_pairs(const BFloat* p, int64_t col, int64_t n) {
    if (__builtin_expect(n >= 2 * LANES<float> && col == 1, 1))
        return load(reinterpret_cast<const uint32_t*>(p));
    return gathered_pairs(p, col, n);
}
#endif

constexpr int FEW_ROWS = 8;
// Rows ahead that are asked for while one is read. Keys and values are read in columns of blocks, which no
// processor foresees: asking took 13 % off from the third cache and 25 % off from memory.
constexpr int KEYS_AHEAD = 16, VALUES_AHEAD = 48;

// The two sides of a step as the row kernel has them: B, the element of a query or of weights that is
// broadcast (EACH of them per step), and X, what it meets, made of a vector of dims or of the values of one
// or two keys.
template <class K>
struct Step {
    using B = typename K::A;
    using X = Vec<B>;
    static constexpr int EACH = 1;
    static TILEFOLD_INLINE X of_dims(Vec<typename K::E> x) { return bits_as<X>(x); }
    static TILEFOLD_INLINE X of_keys(Vec<typename K::E> even, Vec<typename K::E> odd) {
        if constexpr (K::PAIR == 1)
            return even;
        else
            return bits_as<U32>(even) >> 16 | bits_as<U32>(odd);
    }
};

// N sums; `add` is one step of one of them, `close` comes after every DEPTH steps and after the last one.
template <class K, int N>
struct Sums {
    Vec<typename K::E> total[N];

    TILEFOLD_INLINE Sums() {
        each<N>([&](auto n) TILEFOLD_LAMBDA { total[n] = Vec<typename K::E>{}; });
    }
    TILEFOLD_INLINE void add(int n, const typename K::A* b, typename Step<K>::X x) {
        total[n] = K::step(total[n], *b, x);
    }
    TILEFOLD_INLINE void close() {}
};

#ifdef TILEFOLD_HAS_TILES
// What the tile unit does: the even and the odd elements of sixteen pairs in a chain each, from 0, whose sum
// joins the total. The order is documented (Intel's manual, TDPBF16PS), so vectors give the same bits.
template <>
struct Step<Amx> {
    using B = float;
    struct X {
        F32 even, odd;
    };
    static constexpr int EACH = 2;
    static TILEFOLD_INLINE X of_dims(F32 x) {
        const U32 pairs = bits_as<U32>(x);
        return {bits_as<F32>(pairs << 16), bits_as<F32>(pairs & 0xffff0000u)};
    }
    static TILEFOLD_INLINE X of_keys(F32 even, F32 odd) { return {even, odd}; }
};
template <int N>
struct Sums<Amx, N> {
    F32 total[N], even[N], odd[N];

    TILEFOLD_INLINE Sums() {
        each<N>([&](auto n) TILEFOLD_LAMBDA { total[n] = even[n] = odd[n] = F32{}; });
    }
    TILEFOLD_INLINE void add(int n, const float* b, Step<Amx>::X x) {
        even[n] = fma(set<float>(b[0]), x.even, even[n]);
        odd[n] = fma(set<float>(b[1]), x.odd, odd[n]);
    }
    TILEFOLD_INLINE void close() {
        each<N>([&](auto n) TILEFOLD_LAMBDA {
            total[n] += even[n] + odd[n];
            even[n] = odd[n] = F32{};
        });
    }
};
#endif

template <class K, class T, int R>
struct Rows {
    using E = typename K::E;
    using B = typename Step<K>::B;
    using X = typename Step<K>::X;
    using M = Mask<E>;
    static constexpr int W = LANES<E>, PAIR = K::PAIR;
    static constexpr int EACH = Step<K>::EACH;

    const Call& c;
    const Unit& u;
    Worker& w;
    const int64_t r0, rows, depth, keys_most, width;  // width: value dims in whole vectors
    Rowed<T> keys, values;                            // of the block in work, from its first key on
    const T *next_keys, *next_values;                 // of the block after it
    T *key_rows, *value_rows;                         // where they are copied to from pages that lie apart
    B* queries;                                       // [R][depth · EACH]
    E* scores;                                        // [R][keys of a block]
    B* weights;                                       // the same, as they are broadcast
    E *part, *total;                                  // [R][width]
    E max_part[R], sum_part[R], max_total[R], sum_total[R];
    Sight<R> sight;
    bool first, hidden, empty;

    Rows(const Call& c_, const Unit& u_, Worker& w_, int64_t r0_, int64_t rows_, Arena& a)
        : c(c_),
          u(u_),
          w(w_),
          r0(r0_),
          rows(rows_),
          depth(up(c.dim, PAIR * W) / PAIR),
          keys_most(up(c.block_k, 2 * W)),
          width(up(c.v_dim, W)) {
        queries = a.template take<B>(R * depth * EACH);
        scores = a.template take<E>(R * keys_most);
        weights = a.template take<B>(R * keys_most);
        part = a.template take<E>(R * width);
        total = a.template take<E>(R * width);
        key_rows = a.template take<T>(c.page ? c.block_k * c.dim : 0);
        value_rows = a.template take<T>(c.page ? c.block_k * c.v_dim : 0);
    }

    int64_t row_of(int r) const { return r0 + least(r, rows - 1); }

    void begin() {
        sight.look(c, u, r0, rows);
        const T* q = static_cast<const T*>(u.q);
        for (int r = 0; r < R; r++) {
            const T* from = q + row_at(c.q, c.group, row_of(r));
            B* const to = queries + r * depth * EACH;
            if constexpr (PAIR == EACH)
                for (int64_t d = 0; d < depth * EACH; d++)
                    to[d] = d < c.dim ? E(one(from[d * c.q.col])) : E(0);
            else
                for (int64_t d = 0; d < depth; d++)
                    to[d] = (2 * d < c.dim ? uint32_t(from[2 * d * c.q.col].bits) : 0u) |
                            (2 * d + 1 < c.dim ? uint32_t(from[(2 * d + 1) * c.q.col].bits) << 16 : 0u);
        }
        empty = !u.sinks;
        if (!empty) begin_total();
    }

    void begin_total() {
        for (int r = 0; r < R; r++) {
            max_total[r] = first_max<E>(c, u, row_of(r));
            sum_total[r] = first_sum(max_total[r]);
        }
        memset(total, 0, size_t(R * width) * sizeof(E));
    }

    // ---- the steps of a block ----

    // Scaled products of the rows with W keys of the block, of which `n` exist.
    TILEFOLD_INLINE void products(const T* from, const T* ahead, int64_t n, Vec<E> (&acc)[R]) const {
        const B* q = queries;
        Sums<K, R> sums;
        const auto add = [&](int64_t d, Vec<E> keys) TILEFOLD_LAMBDA {
            const X x = Step<K>::of_dims(keys);
            each<R>([&](auto r) TILEFOLD_LAMBDA { sums.add(r, q + (r * depth + d) * EACH, x); });
        };
        Vec<E> x[W];
        int64_t at = 0;
        for (; at + W <= c.dim / PAIR; at += W) {
            columns(from, ahead, n, at, x);
            each<W>([&](auto d) TILEFOLD_LAMBDA { add(at + d, x[d]); });
            sums.close();
        }
        if (const int64_t left = up(c.dim, PAIR) / PAIR - at) {
            columns(from, ahead, n, at, x);
            for (int64_t d = 0; d < left; d++) add(at + d, x[d]);
            sums.close();
        }
        const Vec<E> scale = set<E>(E(c.scale));
        each<R>([&](auto r) TILEFOLD_LAMBDA { acc[r] = sums.total[r] * scale; });
    }
    // x[d]: dim (or pair of dims) at + d of W keys.
    TILEFOLD_INLINE void columns(const T* from, const T* ahead, int64_t n, int64_t at, Vec<E> (&x)[W]) const {
        each<W>([&](auto key) TILEFOLD_LAMBDA {
            const int64_t there = least(key, n - 1) * keys.row + PAIR * at * keys.col;
            const T* p = from + there;
            __builtin_prefetch(ahead + there);
            if constexpr (PAIR == 1)
                x[key] = some<E>(p, keys.col, c.dim - at);
#ifdef TILEFOLD_HAS_DOT2
            else
                x[key] = bits_as<Vec<E>>(some_pairs(p, keys.col, c.dim - 2 * at));
#endif
        });
        transpose<E>(x);
    }

    // Scores of keys j0 … j1 into scores[r][j − j0], whole vectors with −inf at the end; raises `top`.
    void score(int64_t j0, int64_t j1, Kind kind, E (&top)[R]) {
        const bool plain = c.softcap == NO_SOFTCAP && !u.bias && !u.alibi && !sight.holes;
        Vec<E> highest[R];
        each<R>([&](auto r) TILEFOLD_LAMBDA { highest[r] = set<E>(-INFINITE<E>); });
        const M at = __builtin_convertvector(iota<E>(), M);
        for (int64_t j = j0; j < j1; j += W) {
            const int64_t n = least(W, j1 - j);
            Vec<E> acc[R];
            const int64_t later = j - j0 + KEYS_AHEAD;
            products(keys.from(j - j0),
                     later < j1 - j0 ? keys.from(later) : next_keys + (later - (j1 - j0)) * keys.row, n, acc);
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                Vec<E> x = acc[r];
                if (!plain) x = transformed(x, r, j, n);
                if (kind == Kind::EDGE || n < W)
                    x = select<E>(visible(r, j, at) & (at < typename Float<E>::Integer(n)), x,
                                  set<E>(-INFINITE<E>));
                highest[r] = max(x, highest[r]);
                store(scores + r * keys_most + (j - j0), x);
            });
        }
        each<R>([&](auto r) TILEFOLD_LAMBDA {
            for (int k = 0; k < W; k++) top[r] = highest[r][k] > top[r] ? E(highest[r][k]) : top[r];
        });
    }

    __attribute__((noinline)) M visible(int r, int64_t j, M at) const {
        using I = typename Float<E>::Integer;
        if (!u.lo) return (at >= I(within(sight.lo[r] - j, 0, W))) & (at < I(within(sight.hi[r] - j, 0, W)));
        M seen{};
        for (int64_t n = 0; n < c.spans; n++) {
            int64_t lo, hi;
            Sight<R>::span(row_of(r) / c.group, n, c, u, lo, hi);
            seen |= (at >= I(within(lo - j, 0, W))) & (at < I(within(hi - j, 0, W)));
        }
        return seen;
    }

    // softcap → bias and ALiBi → single hidden cells, for row r and keys from j on.
    __attribute__((noinline)) Vec<E> transformed(Vec<E> x, int r, int64_t j, int64_t n) const {
        const Row row(row_of(r), c.group);
        const Vec<E> none = set<E>(-INFINITE<E>);
        if (c.softcap != NO_SOFTCAP) x = set<E>(E(c.softcap)) * tanh<E>(x / set<E>(E(c.softcap)));
        M hide{};
        if (u.bias) {
            const int64_t from = row.at(c.bias) + j * c.bias.col;
            Vec<E> bias{};
            for (int k = 0; k < n; k++) bias[k] = number<E>(u.bias, c.bias_type, from + k * c.bias.col);
            hide = bias == none;
            x += bias;
        }
        if (u.alibi) {
            // The same differences as in a tile, whose first key they are counted from there: exact, or
            // rounded once.
            const int64_t distance = row.query + u.band.offset - j;
            Vec<E> far = set<E>(E(distance)) - iota<E>();
            for (int k = 0; k < W && !holds<E>(distance, W); k++) far[k] = E(distance - k);
            x -= set<E>(E(u.alibi[row.head])) * max(far, -far);
        }
        x = select<E>(x == x, x, set<E>(E(__builtin_nan(""))));
        for (int k = 0; k < n && (u.bits || u.cells); k++)
            if (!shows(c, u, row, j + k)) hide[k] = -1;
        return select<E>(hide, none, x);
    }

    void weigh(int64_t keys, const E (&shift)[R], E (&sum)[R]) {
        const int64_t whole = up(keys, W);
        for (int r = 0; r < R; r++) {
            E* s = scores + r * keys_most;
            for (int64_t k = 0; k < whole; k += W) store(s + k, exp<E>(load(s + k) - set<E>(shift[r])));
        }
        for (int r = 0; r < R; r++) sum[r] = 0;
        for (int64_t k = 0; k < keys; k++)
            for (int r = 0; r < R; r++) sum[r] += scores[r * keys_most + k];
        for (int r = 0; r < R; r++) {
            const E* s = scores + r * keys_most;
            B* p = weights + r * keys_most;
            if constexpr (PAIR == 1)
                memcpy(p, s, size_t(keys) * sizeof(E));
            else if constexpr (EACH == 2)
                for (int64_t k = 0; k < whole; k += W)
                    store(p + k, bits_as<F32>(pair_up<U32>(F32{}, load(s + k)) & 0xffff0000u));
            else
                for (int64_t k = 0; k < keys; k += 2)
                    p[k / 2] = pair_up<uint32_t>(s[k], k + 1 < keys ? s[k + 1] : E(0));
        }
    }

    // Accumulators of this block over keys j0 … j1, then joined to those of the segment.
    template <bool CAREFUL>
    void accumulate(int64_t j0, int64_t j1, const E (&keep)[R]) {
        // Vectors of dims at once.
        constexpr int MOST = K::IN_TILES ? (R >= 4 ? 2 : R >= 2 ? 4 : 8) : R >= 8 ? 3 : R >= 4 ? 4 : 8;
        int64_t d = 0;
        for (; d + MOST * W <= width; d += MOST * W) dims<MOST, CAREFUL>(d, j0, j1, keep);
        for (; d < width; d += W) dims<1, CAREFUL>(d, j0, j1, keep);
    }
    template <int C, bool CAREFUL>
    __attribute__((noinline)) void dims(int64_t d, int64_t j0, int64_t j1, const E (&keep)[R]) {
        if (!CAREFUL && values.col == 1 && d + C * W <= c.v_dim)
            dims<C, Values::WHOLE>(d, j0, j1, keep);
        else
            dims<C, CAREFUL ? Values::CAREFUL : Values::SOME>(d, j0, j1, keep);
    }
    // How values are read: whole vectors of them, or some, or those that are not finite as 0.
    enum class Values { WHOLE, SOME, CAREFUL };
    template <int C, Values HOW>
    TILEFOLD_INLINE void dims(int64_t d, int64_t j0, int64_t j1, const E (&keep)[R]) {
        const T* v = values.at + d * values.col;
        const T* ahead = v + VALUES_AHEAD * values.row;
        // The key from which on the next block is asked for.
        const int64_t turn = most(j1 - j0 - VALUES_AHEAD, 0) / PAIR * PAIR;
        const B* p = weights;
        Sums<K, R * C> sums;
        const auto step = [&](auto keys) TILEFOLD_LAMBDA {
            each<keys>([&](auto key) TILEFOLD_LAMBDA {
                const char* p = reinterpret_cast<const char*>(ahead + key * values.row);
                each<(C * W * sizeof(T) + 63) / 64>(
                    [&](auto line) TILEFOLD_LAMBDA { __builtin_prefetch(p + line * 64); });
            });
            X x[C];
            each<C>([&](auto i) TILEFOLD_LAMBDA {
                const Vec<E> even = loaded<HOW>(v + i * W * values.col, c.v_dim - d - i * W);
                x[i] = Step<K>::of_keys(
                    even, keys > 1 ? loaded<HOW>(v + values.row + i * W * values.col, c.v_dim - d - i * W)
                                   : Vec<E>{});
            });
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                each<C>([&](auto i) TILEFOLD_LAMBDA { sums.add(r * C + i, p + r * keys_most, x[i]); });
            });
        };
        int64_t k = 0;
        for (; k + PAIR <= j1 - j0;
             k += PAIR, v += PAIR * values.row, p += EACH, ahead += PAIR * values.row) {
            if (k == turn) ahead = next_values + d * values.col;
            step(Int<PAIR>{});
            if (K::DEPTH > 1 && (k / PAIR + 1) % K::DEPTH == 0) sums.close();
        }
        if (k < j1 - j0) step(Int<1>{});
        sums.close();
        each<R>([&](auto r) TILEFOLD_LAMBDA {
            each<C>([&](auto i) TILEFOLD_LAMBDA {
                E* o = part + r * width + d + i * W;
                const Vec<E> sum = sums.total[r * C + i];
                store(o, first ? sum : fma(load(o), set<E>(keep[r]), sum));
            });
        });
    }
    // W values of one key, of which `n` exist.
    template <Values HOW>
    TILEFOLD_INLINE Vec<E> loaded(const T* v, int64_t n) const {
        if constexpr (HOW == Values::WHOLE) return widen(v);
        const Vec<E> x = some<E>(v, values.col, n);
        return HOW == Values::CAREFUL ? select<E>(x - x == 0, x, Vec<E>{}) : x;
    }

    // Adds the values that are not finite to the rows that see them.
    void add_infinite(int64_t j0, int64_t j1, const uint8_t* seen) {
        for (int64_t k = 0; k < j1 - j0; k++) {
            const T* v = values.from(k);
            for (int64_t d = 0; d < c.v_dim; d++) {
                const E x = one(v[d * values.col]);
                if (x - x == 0) continue;
                for (int r = 0; r < R; r++)
                    if (seen[r * keys_most + k]) part[r * width + d] += x * scores[r * keys_most + k];
            }
        }
    }

    // ---- segments ----

    void begin_segment() {
        for (int r = 0; r < R; r++) max_part[r] = -INFINITE<E>, sum_part[r] = 0;
        first = true, hidden = false;
    }

    template <bool CAREFUL>
    void fold_block(int64_t k0, int64_t s0, int64_t s1) {
        const int64_t j0 = most(k0, most(s0, sight.first) / K::KEYS * K::KEYS);
        const int64_t j1 = least(k0 + c.block_k, least(s1, sight.last));
        if (j0 >= j1) return;
        const Kind kind = sight.kind(c, u, r0, rows, j0, j1);
        if (kind == Kind::EMPTY) return;
        hidden |= kind == Kind::EDGE || u.bias;
        E top[R], shift[R], keep[R], added[R];
        for (int r = 0; r < R; r++) top[r] = max_part[r];
        keys = bring_keys(c, u, j0, j1, key_rows);
        values = bring_values(c, u, j0, j1, value_rows);
        next_keys = after(c, u, u.k, c.k, c.k_pages, j1, keys.at);
        next_values = after(c, u, u.v, c.v, c.v_pages, j1, values.at);
        score(j0, j1, kind, top);
        uint8_t seen[CAREFUL ? R * SEGMENT : 1];  // a block is at most a segment
        if constexpr (CAREFUL)
            for (int r = 0; r < R; r++)
                for (int64_t k = 0; k < j1 - j0; k++)
                    seen[r * keys_most + k] = sees<E>(c, u, Row(row_of(r), c.group), j0 + k);
        for (int r = 0; r < R; r++) {
            shift[r] = shift_of<E>(set<E>(top[r]))[0];
            keep[r] = exp<E>(set<E>(max_part[r]) - set<E>(shift[r]))[0];
            max_part[r] = top[r];
        }
        weigh(j1 - j0, shift, added);
        for (int r = 0; r < R; r++)
            sum_part[r] = fma(set<E>(sum_part[r]), set<E>(keep[r]), set<E>(added[r]))[0];
        accumulate<CAREFUL>(j0, j1, keep);
        if constexpr (CAREFUL) add_infinite(j0, j1, seen);
        first = false;
    }

    void fold_segment(int64_t s0, int64_t s1) {
        begin_segment();
        const int64_t begin = most(s0, sight.first) / c.block_k * c.block_k, end = least(s1, sight.last);
        for (int64_t k0 = begin; k0 < end; k0 += c.block_k) fold_block<false>(k0, s0, s1);
        if (first || !hidden || all_finite(part, R * width)) return;
        begin_segment();
        for (int64_t k0 = begin; k0 < end; k0 += c.block_k) fold_block<true>(k0, s0, s1);
    }

    void merge() {
        if (first) return;
        if (empty) {
            E* const t = part;
            part = total, total = t;
            for (int r = 0; r < R; r++) max_total[r] = max_part[r], sum_total[r] = sum_part[r];
            empty = false;
            return;
        }
        for (int r = 0; r < R; r++) {
            const Meeting<E> meet(set<E>(max_total[r]), set<E>(max_part[r]));
            max_total[r] = meet.max[0];
            sum_total[r] = meet(set<E>(sum_total[r]), set<E>(sum_part[r]))[0];
            for (int64_t d = r * width; d < (r + 1) * width; d += W)
                store(total + d, meet(load(total + d), load(part + d)));
        }
    }

    void run(const Piece& p) {
        begin();
        if (p.segment >= 0) {
            fold_segment(p.segment * SEGMENT, (p.segment + 1) * SEGMENT);
            const int64_t pitch = state_elements(c.v_dim);
            E* state = static_cast<E*>(p.state);
            for (int r = 0; r < rows; r++, state += pitch) {
                memset(state, 0, size_t(pitch) * sizeof(E));
                state[0] = max_part[r], state[1] = sum_part[r];
                if (!first) memcpy(state + 16, part + r * width, size_t(c.v_dim) * sizeof(E));
            }
            return;
        }
        for (int64_t s = sight.first / SEGMENT * SEGMENT; s < sight.last; s += SEGMENT) {
            if (w.stop(w.context)) return;
            fold_segment(s, s + SEGMENT);
            merge();
        }
        if (empty) begin_total();
        for (int r = 0; r < rows; r++)
            finish_row<E, T>(c, u, r0 + r, max_total[r], sum_total[r], total + r * width);
    }
};

template <class K, class T>
void fold_rows(const Call& c, const Unit& u, const Piece& p, Worker& w) {
    Arena a{w.scratch};
    const int64_t rows = p.r1 - p.r0;
    if (rows <= 1)
        Rows<K, T, 1>(c, u, w, p.r0, rows, a).run(p);
    else if (rows <= 2)
        Rows<K, T, 2>(c, u, w, p.r0, rows, a).run(p);
    else if (rows <= 4)
        Rows<K, T, 4>(c, u, w, p.r0, rows, a).run(p);
    else
        Rows<K, T, FEW_ROWS>(c, u, w, p.r0, rows, a).run(p);
}

template <class K, class T>
void fold_row(const Call& c, const Unit& u, const Piece& p, Worker& w) {
#ifdef TILEFOLD_HAS_TILES
    if constexpr (K::IN_TILES) {
        const SubnormalsAreZero as_in_tiles;
        fold_rows<K, T>(c, u, p, w);
        return;
    }
#endif
    fold_rows<K, T>(c, u, p, w);
}

// Bytes that either kernel may take for so many rows.
template <class K, class T>
int64_t scratch_of(const Call& c, int64_t rows) {
    Worker w{};
    static const Unit u{};
    Arena tiles{nullptr}, few{nullptr};
    Tiles<K, T>(c, u, w, rows, tiles);
    Rows<K, T, FEW_ROWS>(c, u, w, 0, 1, few);  // the last piece of many rows may be one of few
    return most(tiles.bytes, few.bytes);
}

}  // namespace
}  // namespace tilefold
