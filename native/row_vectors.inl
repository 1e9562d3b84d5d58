// The two products of few rows in vectors. Scores: lanes are keys, so W rows of keys are transposed in
// registers; per key of 128 floats that is 32 shuffles and 8 multiply-adds per query row. Values: lanes are
// dimensions. Each element is summed in the very order of fold.inl, so a row has the same bits here and
// there: decoding reproduces prefill. Tried: dot products along the dimensions, which need no shuffles but
// sum in another order.

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

// The two sides of a step: A, the element of a query or of weights that is broadcast, and what it meets, made
// of a vector of dims or of the values of one or two keys.
template <class K>
struct Step {
    using X = Vec<typename K::A>;
    static TILEFOLD_INLINE X of_dims(Vec<typename K::E> x) { return bits_as<X>(x); }
    static TILEFOLD_INLINE X of_keys(Vec<typename K::E> even, Vec<typename K::E> odd) {
        if constexpr (K::PAIR == 1)
            return even;
        else
            return bits_as<U32>(even) >> 16 | bits_as<U32>(odd);
    }
};

// Sums of R rows, each in the order of keys: four rows at a time, or each addition would wait for the one
// before. Tiles leave them to this, too.
template <class E, int R>
struct InOrder {
    typedef float Four __attribute__((vector_size(16)));
    static constexpr bool FOURS = __is_same(E, float) && R % 4 == 0;
    Four fours[FOURS ? R / 4 : 1] = {};
    E ones[R] = {};

    // A vector's number of keys, from x[R][pitch]; those that do not exist are 0.
    TILEFOLD_INLINE void add(const E* x, int64_t pitch) {
        if constexpr (!FOURS)
            for (int k = 0; k < LANES<E>; k++)
                each<R>([&](auto r) TILEFOLD_LAMBDA { ones[r] += x[r * pitch + k]; });
        else
            for (int k = 0; k < LANES<E>; k += 4, x += 4)
                each<R / 4>([&](auto n)
                                TILEFOLD_LAMBDA { fours[n] = added(fours[n], x + n * 4 * pitch, pitch); });
    }
    void store(E (&sum)[R]) const {
        for (int r = 0; r < R; r++) sum[r] = FOURS ? E(fours[FOURS ? r / 4 : 0][r % 4]) : ones[r];
    }

   private:
    static TILEFOLD_INLINE Four added(Four sum, const float* x, int64_t pitch) {
        Four rows[4];
        each<4>([&](auto r) TILEFOLD_LAMBDA { memcpy(&rows[r], x + r * pitch, sizeof(Four)); });
        const Four a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5),
                   b = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5),
                   c = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7),
                   d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
        sum += __builtin_shufflevector(a, b, 0, 1, 4, 5);
        sum += __builtin_shufflevector(a, b, 2, 3, 6, 7);
        sum += __builtin_shufflevector(c, d, 0, 1, 4, 5);
        return sum + __builtin_shufflevector(c, d, 2, 3, 6, 7);
    }
};

// R query rows, and what few rows need of a block: brought keys, products with them, weights,
// brought values, sums of those. Twin of RowTiles.
template <class K, class T, int R>
struct RowVectors {
    using E = typename K::E;
    using A = typename K::A;
    using X = typename Step<K>::X;
    static constexpr bool SPREADS = false;  // see RowCodes
    static constexpr int W = LANES<E>, PAIR = K::PAIR;
    static constexpr int MOST = R >= 8 ? 3 : R >= 4 ? 4 : 8;  // vectors of dims of values at once

    const Call& c;
    const Unit& u;
    const int64_t depth, pitch, width;  // of queries, of scores and weights, and value dims in whole vectors
    A* queries;                         // [R][depth]
    A* weights;                         // [R][pitch]
    T* own;                             // where keys, then values are copied to, or made of codes
    Grouped<T> rows;                    // of the block in work: keys, then values

    RowVectors(const Call& c_, const Unit& u_, int64_t pitch_, Arena& a)
        : c(c_), u(u_), depth(up(c.dim, PAIR * W) / PAIR), pitch(pitch_), width(up(c.v_dim, W)) {
        queries = a.template take<A>(R * depth);
        weights = a.template take<A>(R * pitch);
        own = a.template take<T>(c.page ? c.block_k * most(c.dim, c.v_dim) : 0);
    }

    void begin(const T* (&from)[R]) {
        for (int r = 0; r < R; r++) {
            const auto query = [&](int64_t d) { return from[r][d * c.q.col]; };
            A* const to = queries + r * depth;
            if constexpr (PAIR == 1)
                for (int64_t d = 0; d < depth; d++) to[d] = d < c.dim ? E(one(query(d))) : E(0);
            else
                for (int64_t d = 0; d < depth; d++)
                    to[d] = (2 * d < c.dim ? uint32_t(query(2 * d).bits) : 0u) |
                            (2 * d + 1 < c.dim ? uint32_t(query(2 * d + 1).bits) << 16 : 0u);
        }
    }

    void bring_keys(int64_t j0, int64_t j1) { group(c, u, keys_of(c, u), j0, j1, own, rows, false); }
    template <bool CAREFUL>
    void bring_values(int64_t j0, int64_t j1) {
        group(c, u, values_of(c, u), j0, j1, own, rows, false);
    }
    E value(int64_t k, int64_t d) const { return one(rows.from(k)[d * rows.col]); }

    // How often requests are made of n keys, and of their values.
    int64_t key_turns(int64_t n) const { return up(n, W) / 4 * (depth / W); }
    int64_t value_turns(int64_t n) const {
        return up(n, GROUP) / 4 * (width / (MOST * W) + width / W % MOST);
    }

    // take(j, acc): the products of the rows with W keys of the block from j on.
    template <class Take>
    TILEFOLD_INLINE void multiply(int64_t n, Requests& requests, Take&& take) {
        for (int64_t j = 0; j < n; j += W) {
            Vec<E> acc[R];
            multiply(rows.from(j), least(W, n - j), requests, acc);
            take(j, acc);
        }
    }

    // Scores[R][pitch] become weights, in whole vectors; each row's are added up in the order of keys.
    void weigh(E* scores, int64_t n, const E (&shift)[R], E (&sum)[R]) {
        InOrder<E, R> total;
        for (int64_t k = 0; k < n; k += W) {
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                E* const s = scores + r * pitch + k;
                store(s, exp<E>(load(s) - set<E>(shift[r])));
            });
            total.add(scores + k, pitch);
        }
        total.store(sum);
        for (int r = 0; r < R; r++) {
            const E* s = scores + r * pitch;
            A* p = weights + r * pitch;
            if constexpr (PAIR == 1)
                memcpy(p, s, size_t(n) * sizeof(E));
            else
                for (int64_t k = 0; k < n; k += 2)
                    p[k / 2] = pair_up<uint32_t>(s[k], k + 1 < n ? s[k + 1] : E(0));
        }
    }

    // take(d, r, sum): Σ weight · value over n keys for W dims of row r from d on. CAREFUL: of finite values.
    template <bool CAREFUL, class Take>
    TILEFOLD_INLINE void add_up(int64_t n, Requests& requests, Take&& take) {
        const int64_t whole =
            CAREFUL || rows.col != 1 ? 0 : c.v_dim / W * W;  // dims that lie in whole vectors
        int64_t d = 0;
        for (; d + MOST * W <= whole; d += MOST * W) dims<MOST, Values::WHOLE>(d, n, requests, take);
        for (; d < whole; d += W) dims<1, Values::WHOLE>(d, n, requests, take);
        for (; d < width; d += W) dims<1, CAREFUL ? Values::CAREFUL : Values::SOME>(d, n, requests, take);
    }

   private:
    TILEFOLD_INLINE void multiply(const T* from, int64_t n, Requests& requests, Vec<E> (&acc)[R]) {
        const A* q = queries;
        each<R>([&](auto r) TILEFOLD_LAMBDA { acc[r] = Vec<E>{}; });
        const auto add = [&](int64_t d, Vec<E> keys) TILEFOLD_LAMBDA {
            const X x = Step<K>::of_dims(keys);
            each<R>([&](auto r) TILEFOLD_LAMBDA { acc[r] = K::step(acc[r], q[r * depth + d], x); });
        };
        Vec<E> x[W];
        int64_t at = 0;
        for (; at + W <= c.dim / PAIR; at += W) {
            columns(from, n, at, requests, x);
            each<W>([&](auto d) TILEFOLD_LAMBDA { add(at + d, x[d]); });
        }
        if (const int64_t left = up(c.dim, PAIR) / PAIR - at) {
            columns(from, n, at, requests, x);
            for (int64_t d = 0; d < left; d++) add(at + d, x[d]);
        }
    }
    // x[d]: dim (or pair of dims) at + d of W keys.
    TILEFOLD_INLINE void columns(const T* from, int64_t n, int64_t at, Requests& requests, Vec<E> (&x)[W]) {
        each<W>([&](auto key) TILEFOLD_LAMBDA {
            if constexpr (key % 4 == 0) requests.some();
            const T* p = from + least(key, n - 1) * rows.row + PAIR * at * rows.col;
            if constexpr (PAIR == 1)
                x[key] = some<E>(p, rows.col, c.dim - at);
#ifdef TILEFOLD_HAS_DOT2
            else
                x[key] = bits_as<Vec<E>>(some_pairs(p, rows.col, c.dim - 2 * at));
#endif
        });
        transpose<E>(x);
    }

    // How values are read: whole vectors of them, or some, or those that are not finite as 0.
    enum class Values { WHOLE, SOME, CAREFUL };
    template <int C, Values HOW, class Take>
    __attribute__((noinline)) void dims(int64_t d, int64_t n, Requests& requests, Take& take) {
        const T* v;
        const A* p = weights;
        Vec<E> acc[R][C];
        each<R>([&](auto r)
                    TILEFOLD_LAMBDA { each<C>([&](auto i) TILEFOLD_LAMBDA { acc[r][i] = Vec<E>{}; }); });
        const auto step = [&](auto keys) TILEFOLD_LAMBDA {
            X x[C];
            each<C>([&](auto i) TILEFOLD_LAMBDA {
                const T* const from = v + i * W * rows.col;
                const int64_t left = c.v_dim - d - i * W;
                const Vec<E> even = loaded<HOW>(from, left);
                x[i] = Step<K>::of_keys(even, keys > 1 ? loaded<HOW>(from + rows.row, left) : Vec<E>{});
            });
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                each<C>([&](auto i) TILEFOLD_LAMBDA { acc[r][i] = K::step(acc[r][i], p[r * pitch], x[i]); });
            });
        };
        for (int64_t k = 0; k < n;) {
            v = rows.from(k) + d * rows.col;
            const int64_t end = least(k + GROUP, n);
            for (; k + PAIR <= end; k += PAIR, v += PAIR * rows.row, p++) {
                if (k % 4 == 0) requests.some();
                step(Int<PAIR>{});
            }
            if (k < end) step(Int<1>{}), k++;
        }
        each<R>([&](auto r) TILEFOLD_LAMBDA {
            each<C>([&](auto i) TILEFOLD_LAMBDA { take(d + i * W, r, acc[r][i]); });
        });
    }
    // W values of one key, of which `n` exist.
    template <Values HOW>
    TILEFOLD_INLINE Vec<E> loaded(const T* v, int64_t n) const {
        if constexpr (HOW == Values::WHOLE) return widen(v);
        const Vec<E> x = some<E>(v, rows.col, n);
        return HOW == Values::CAREFUL ? select<E>(x - x == 0, x, Vec<E>{}) : x;
    }
};

}  // namespace
}  // namespace tilefold
