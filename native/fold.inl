// Sweep one on one machine: twin of fold.py, which is the specification.
//
// A tile is up to WIDEST vectors of query rows of one key head. For each block of keys: scores Sᵀ (keys × lanes) in
// cache, their maximum, weights in place, then Oᵀ += Vᵀ·P; lanes are queries throughout, so maximum, sum and rescale are
// vertical. Per score: 2·dim + 2·v_dim flops of multiply-add, and 17 vector operations of softmax (scale, max, store;
// load, subtract, 11 of exp, add, store), that is 12 % of the arithmetic at dim 64 and 6 % at dim 128.
// Reads per block: keys and values once (from L2 or beyond), Qᵀ once per strip of keys from L1.
//
// Each SEGMENT of keys is folded from empty, block by block on an absolute grid, and segments are merged left to right. A
// hidden key adds exactly 0 and an all-hidden block leaves a lane as it is to the bit, so a row's bits depend on
// nothing but its own keys.

namespace tilefold {
namespace {

constexpr int64_t ALIGN = 64;
constexpr int64_t aligned(int64_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

// Hands out pieces of a worker's scratch; with a null base it only counts.
struct Arena {
    char* at;
    int64_t bytes = 0;
    template <class T>
    T* take(int64_t n) {
        T* p = reinterpret_cast<T*>(at + bytes);
        bytes += aligned(n * int64_t(sizeof(T)));
        return p;
    }
};

// Where a block's keys and values are to be read.
template <class K>
struct Block {
    Source<typename K::A> keys;    // rows are keys, depth is dim
    Source<typename K::A> values;  // rows are value dims, depth is keys
};

// How storage T reaches kernel K.
template <class K, class T>
struct Packing {
    static constexpr bool always_values = !__is_same(T, typename K::A);  // values are packed
    static constexpr bool always_keys = always_values && K::PAIR == 1;
    static constexpr int multiple = K::PAIR == 1 ? 1 : 2;
};

constexpr int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// What a finished row's accumulator is multiplied by; stores its log-sum-exp.
template <class E>
E settle(const Call& c, const Unit& u, int64_t r, E m, E d) {
    // A row that sees keys and still found only −inf has overflowed: that is NaN, never a silent 0.
    if (m == -INFINITE<E> && sees_any<E>(c, u, r)) d = m = E(__builtin_nan(""));
    if (u.lse)
        static_cast<E*>(u.lse)[row_at(c.lse, c.group, r)] =
            d == 0 ? -INFINITE<E> : E(double(m) + __builtin_log(double(d)));
    return d == 0 ? E(0) : 1 / d;
}

template <class K, class T, int NR>
struct Tile {
    using E = typename K::E;
    using A = typename K::A;
    using P = Packing<K, T>;
    static constexpr int W = LANES<E>, N = NR * W;

    const Call& c;
    const Unit& u;
    Worker& w;
    const int64_t r0, rows, depth;  // depth of a score's dot product, in A
    Sight<N> sight;
    A* queries;
    E *scores, *part, *total;  // scores and weights; accumulators of this segment, and of those before it
    E *max_part, *sum_part, *max_total, *sum_total, *factor;
    char *own_keys, *own_values;  // a block packed for this tile alone
    A* clean;                     // values without NaN and infinity
    uint8_t* seen;

    Tile(const Call& c_, const Unit& u_, Worker& w_, int64_t r0_, int64_t r1)
        : c(c_), u(u_), w(w_), r0(r0_), rows(r1 - r0_), depth(depth_of(c_)) {
        Arena a{w.scratch};
        lay_out(a);
    }

    static int64_t depth_of(const Call& c) { return K::PAIR == 1 ? c.dim : up(c.dim, P::multiple) / K::PAIR; }
    static int64_t pitch(const Call& c) { return up(c.block_k, 2) / K::PAIR; }

    static int64_t bytes(const Call& c, const Unit& u, Worker& w) {
        Tile t(c, u, w, 0, 1);
        Arena a{nullptr};
        t.lay_out(a);
        return a.bytes;
    }

    void lay_out(Arena& a) {
        queries = a.template take<A>(depth * N);
        scores = a.template take<E>(up(c.block_k, 2) * N);
        part = a.template take<E>(c.v_dim * N);
        total = a.template take<E>(c.v_dim * N);
        max_part = a.template take<E>(N);
        sum_part = a.template take<E>(N);
        max_total = a.template take<E>(N);
        sum_total = a.template take<E>(N);
        factor = a.template take<E>(N);
        own_keys = a.template take<char>(P::always_keys || c.pack_keys ? c.block_k * depth * int64_t(sizeof(A)) : 0);
        own_values = a.template take<char>(P::always_values ? pitch(c) * K::PAIR / K::PAIR * c.v_dim * int64_t(sizeof(A)) : 0);
        clean = a.template take<A>(pitch(c) * c.v_dim);
        seen = a.template take<uint8_t>(c.block_k * N);
    }

    // ---- keys and values of a block, packed if need be ----

    void pack(int64_t k0, int64_t k1, char* keys, char* values) {
        const T* k = static_cast<const T*>(u.k) + k0 * c.k.row;
        const T* v = static_cast<const T*>(u.v) + k0 * c.v.row;
        if constexpr (K::PAIR == 1) {
            if constexpr (P::always_keys) {
                widen_rows<T, E>(k, c.k.row, c.k.col, k1 - k0, c.dim, reinterpret_cast<E*>(keys), c.dim);
                widen_rows<T, E>(v, c.v.row, c.v.col, k1 - k0, c.v_dim, reinterpret_cast<E*>(values), c.v_dim);
            }
        } else {
#ifdef TILEFOLD_HAS_DOT2
            if (c.pack_keys)
                copy_rows(k, c.k.row, c.k.col, k1 - k0, c.dim, reinterpret_cast<BFloat*>(keys), depth * K::PAIR);
            pack_value_pairs(v, c.v.row, c.v.col, k1 - k0, c.v_dim, reinterpret_cast<uint32_t*>(values), pitch(c));
#endif
        }
    }

    Block<K> block(int64_t k0, int64_t k1) {
        Block<K> b;
        const bool keys_packed = P::always_keys || c.pack_keys;
        char *keys = own_keys, *values = own_values;
        if constexpr (P::always_values) {
            if (u.panel.done) {
                const int64_t n = k0 / c.block_k;
                keys = static_cast<char*>(u.panel.keys) + n * c.block_k * depth * int64_t(sizeof(A));
                values = static_cast<char*>(u.panel.values) + n * pitch(c) * c.v_dim * int64_t(sizeof(A));
                int32_t nobody = 0;
                if (__atomic_load_n(u.panel.done + n, __ATOMIC_ACQUIRE) != 2) {
                    if (__atomic_compare_exchange_n(u.panel.done + n, &nobody, 1, false, __ATOMIC_ACQ_REL,
                                                    __ATOMIC_ACQUIRE)) {
                        pack(k0, k1, keys, values);
                        __atomic_store_n(u.panel.done + n, 2, __ATOMIC_RELEASE);
                    } else {
                        while (__atomic_load_n(u.panel.done + n, __ATOMIC_ACQUIRE) != 2) w.relax(w.context);
                    }
                }
            } else {
                pack(k0, k1, keys, values);
            }
        }
        if (keys_packed)
            b.keys = {reinterpret_cast<const A*>(keys), depth, 1};
        else
            b.keys = {reinterpret_cast<const A*>(static_cast<const T*>(u.k) + k0 * c.k.row), c.k.row / K::PAIR,
                      K::PAIR == 1 ? c.k.col : 1};
        if constexpr (!P::always_values)
            b.values = {reinterpret_cast<const A*>(static_cast<const T*>(u.v) + k0 * c.v.row), c.v.col, c.v.row};
        else if constexpr (K::PAIR == 1)
            b.values = {reinterpret_cast<const A*>(values), 1, c.v_dim};
        else
            b.values = {reinterpret_cast<const A*>(values), pitch(c), 1};
        return b;
    }

    // ---- the steps of a block ----

    // Scores of keys j0 … j1 (block starts at k0) into scores[j − j0]; raises `top`.
    void score(const Block<K>& b, int64_t k0, int64_t j0, int64_t j1, Kind kind, Vec<E> (&top)[NR]) {
        const bool plain = c.softcap == NO_SOFTCAP && !u.bias && !u.alibi && !sight.holes;
        const bool edge = kind == Kind::EDGE;
        E* const s = scores - (j0 - k0) * N;  // by key of the block
        if (!plain) {
            const Vec<E> scale = set<E>(E(c.scale));
            product<K, NR>(b.keys, queries, depth, j0 - k0, j1 - k0, [&](int64_t j, auto& acc) TILEFOLD_LAMBDA {
                constexpr int MR = int(sizeof(acc) / sizeof(acc[0]));
                each<MR>([&](auto r) TILEFOLD_LAMBDA {
                    each<NR>([&](auto i) TILEFOLD_LAMBDA { store(s + (j + r) * N + i * W, acc[r][i] * scale); });
                });
            });
            finish_scores<E, NR>(c, u, sight, r0, rows, j0, j1, edge, scores, top);
            return;
        }
        const Vec<E> scale = set<E>(E(c.scale)), none = set<E>(-INFINITE<E>);
        Mask<E> lo[NR], hi[NR];  // relative to the block
        int64_t full0 = k0, full1 = j1;
        if (edge) {
            for (int r = 0; r < N; r++) {
                lo[r / W][r % W] = typename Float<E>::Integer(within(sight.lo[r] - k0, 0, c.block_k));
                hi[r / W][r % W] = typename Float<E>::Integer(within(sight.hi[r] - k0, 0, c.block_k));
            }
            full0 = sight.full_first, full1 = sight.full_last;
        }
        product<K, NR>(b.keys, queries, depth, j0 - k0, j1 - k0, [&](int64_t j, auto& acc) TILEFOLD_LAMBDA {
            constexpr int MR = int(sizeof(acc) / sizeof(acc[0]));
            const bool test = k0 + j < full0 || k0 + j + MR > full1;
            each<MR>([&](auto r) TILEFOLD_LAMBDA {
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    Vec<E> x = acc[r][i] * scale;
                    if (__builtin_expect(test, 0)) {
                        const Mask<E> at = Mask<E>{} + typename Float<E>::Integer(j + r);
                        x = select<E>((lo[i] <= at) & (hi[i] > at), x, none);
                    }
                    top[i] = max(x, top[i]);
                    store(s + (j + r) * N + i * W, x);
                });
            });
        });
    }

    // Scores become weights, in place; for pairs two rows become one of bf16 pairs. Returns their sums in `sum`.
    void weigh(int64_t keys, const Vec<E> (&shift)[NR], Vec<E> (&sum)[NR]) {
        each<NR>([&](auto i) TILEFOLD_LAMBDA { sum[i] = Vec<E>{}; });
        if constexpr (K::PAIR == 1) {
            for (E *s = scores, *end = scores + keys * N; s < end; s += N)
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    const Vec<E> p = exp<E>(load(s + i * W) - shift[i]);
                    sum[i] += p;
                    store(s + i * W, p);
                });
        } else {
            if (keys & 1)
                each<NR>([&](auto i) TILEFOLD_LAMBDA { store(scores + keys * N + i * W, set<E>(-INFINITE<E>)); });
            E* to = scores;
            for (E *s = scores, *end = scores + keys * N; s < end; s += 2 * N, to += N)
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    const Vec<E> p = exp<E>(load(s + i * W) - shift[i]);
                    const Vec<E> q = exp<E>(load(s + N + i * W) - shift[i]);
                    sum[i] += p;
                    sum[i] += q;
                    store(to + i * W, bits_as<Vec<E>>((bits_as<U32>(p) + 0x8000u) >> 16 |
                                                      ((bits_as<U32>(q) + 0x8000u) & 0xffff0000u)));
                });
        }
    }

    // Oᵀ of the segment: times `keep`, plus Vᵀ·P of this block.
    void accumulate(Source<A> values, int64_t keys, const Vec<E> (&keep)[NR], bool first) {
        const int64_t steps = (keys + K::PAIR - 1) / K::PAIR;
        const A* p = reinterpret_cast<const A*>(scores);
        product<K, NR>(values, p, steps, 0, c.v_dim, [&](int64_t d, auto& acc) TILEFOLD_LAMBDA {
            constexpr int MR = int(sizeof(acc) / sizeof(acc[0]));
            each<MR>([&](auto r) TILEFOLD_LAMBDA {
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    E* o = part + (d + r) * N + i * W;
                    store(o, first ? acc[r][i] : fma(load(o), keep[i], acc[r][i]));
                });
            });
        });
    }

    // ---- a block whose values hold NaN or infinity that some lane does not see ----

    void note_seen(int64_t keys) {
        for (int64_t n = 0; n < keys * N; n++) seen[n] = scores[n] != -INFINITE<E>;
    }

    // The product with non-finite values taken as 0, then each of them added to the lanes that see it.
    void accumulate_carefully(Source<A> values, int64_t keys, const Vec<E> (&keep)[NR], bool first) {
        const int64_t steps = (keys + K::PAIR - 1) / K::PAIR;
        for (int64_t d = 0; d < c.v_dim; d++)
            for (int64_t k = 0; k < steps; k++) {
                A a = values.at[d * values.row + k * values.step];
                for (int half = 0; half < K::PAIR; half++)
                    if (!finite(value(a, half))) a = without(a, half);
                clean[d * steps + k] = a;
            }
        accumulate({clean, steps, 1}, keys, keep, first);
        for (int64_t d = 0; d < c.v_dim; d++)
            for (int64_t j = 0; j < keys; j++) {
                const E x = value(values.at[d * values.row + j / K::PAIR * values.step], int(j % K::PAIR));
                if (finite(x)) continue;
                for (int r = 0; r < N; r++)
                    if (seen[j * N + r]) part[d * N + r] += x * weight(j, r);
            }
    }
    static bool finite(E x) { return x - x == 0; }
    static E value(A a, int half) {
        if constexpr (K::PAIR == 1)
            return a;
        else
            return one(BFloat{uint16_t(half ? a >> 16 : a)});
    }
    static A without(A a, int half) {
        if constexpr (K::PAIR == 1)
            return A(0);
        else
            return half ? a & 0xffffu : a & 0xffff0000u;
    }
    E weight(int64_t j, int r) const {
        if constexpr (K::PAIR == 1)
            return scores[j * N + r];
        else
            return value(bits_as<uint32_t>(scores[j / 2 * N + r]), int(j & 1));
    }

    // ---- segments ----

    // Folds the keys of one segment from empty into part, max_part, sum_part; false if no lane sees any of them.
    bool fold_segment(int64_t s0, int64_t s1) {
        bool hidden = false;
        if (!fold_segment<false>(s0, s1, hidden)) return false;
        if (hidden && !all_finite()) fold_segment<true>(s0, s1, hidden);
        return true;
    }

    template <bool CAREFUL>
    bool fold_segment(int64_t s0, int64_t s1, bool& hidden) {
        Vec<E> m[NR], sum[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            m[i] = set<E>(-INFINITE<E>);
            sum[i] = Vec<E>{};
        });
        bool first = true;
        const int64_t begin = most(s0, sight.first), end = least(s1, sight.last);
        for (int64_t k0 = begin / c.block_k * c.block_k; k0 < end; k0 += c.block_k) {
            const int64_t j0 = most(k0, begin / K::PAIR * K::PAIR), j1 = least(k0 + c.block_k, end);
            const Kind kind = sight.kind(c, u, r0, rows, j0, j1);
            if (kind == Kind::EMPTY) continue;
            hidden |= kind == Kind::EDGE || u.bias;
            const Block<K> b = block(k0, least(k0 + c.block_k, u.kv_len));
            Vec<E> top[NR], shift[NR], keep[NR], added[NR];
            each<NR>([&](auto i) TILEFOLD_LAMBDA { top[i] = m[i]; });
            score(b, k0, j0, j1, kind, top);
            if constexpr (CAREFUL) note_seen(j1 - j0);
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                shift[i] = select<E>(top[i] == set<E>(-INFINITE<E>), Vec<E>{}, top[i]);
                keep[i] = exp<E>(m[i] - shift[i]);
                m[i] = top[i];
            });
            weigh(j1 - j0, shift, added);
            each<NR>([&](auto i) TILEFOLD_LAMBDA { sum[i] = fma(sum[i], keep[i], added[i]); });
            const Source<A> values = b.values.from(0, (j0 - k0) / K::PAIR);
            if constexpr (CAREFUL)
                accumulate_carefully(values, j1 - j0, keep, first);
            else
                accumulate(values, j1 - j0, keep, first);
            first = false;
        }
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            store(max_part + i * W, m[i]);
            store(sum_part + i * W, sum[i]);
        });
        return !first;
    }

    bool all_finite() const {
        Vec<E> odd{};
        for (const E *o = part, *end = part + c.v_dim * N; o < end; o += W) {
            const Vec<E> x = load(o);
            odd += x - x;  // 0, or NaN for good
        }
        return !any(odd != Vec<E>{});
    }

    // Joins this segment to those before it.
    void merge() {
        Vec<E> keep[NR], gain[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            const Vec<E> a = load(max_total + i * W), b = load(max_part + i * W), m = max(a, b);
            const Vec<E> shift = select<E>(m == set<E>(-INFINITE<E>), Vec<E>{}, m);
            keep[i] = exp<E>(a - shift);
            gain[i] = exp<E>(b - shift);
            store(max_total + i * W, m);
            store(sum_total + i * W, fma(load(sum_part + i * W), gain[i], load(sum_total + i * W) * keep[i]));
        });
        for (int64_t at = 0; at < c.v_dim * N; at += N)
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                E* o = total + at + i * W;
                store(o, fma(load(part + at + i * W), gain[i], load(o) * keep[i]));
            });
    }

    void begin_total() {
        for (int r = 0; r < N; r++) {
            const E sink = u.sinks ? E(u.sinks[(r0 + least(r, rows - 1)) % c.group]) : -INFINITE<E>;
            max_total[r] = sink;
            sum_total[r] = sink > -INFINITE<E> ? E(1) : E(0);
        }
        memset(total, 0, size_t(c.v_dim * N) * sizeof(E));
    }

    void swap_total() {
        E* t = part;
        part = total, total = t;
        t = max_part, max_part = max_total, max_total = t;
        t = sum_part, sum_part = sum_total, sum_total = t;
    }

    void load_queries() {
        if constexpr (K::PAIR == 1) pack_queries<T, E, N>(c, u, r0, rows, queries);
#ifdef TILEFOLD_HAS_DOT2
        else
            pack_query_pairs<N>(c, u, r0, rows, depth, queries);
#endif
    }

    // All keys, from the sinks to the output.
    void run() {
        sight.look(c, u, r0, rows);
        load_queries();
        bool empty = !u.sinks;
        if (!empty) begin_total();
        for (int64_t s = sight.first / SEGMENT * SEGMENT; s < sight.last; s += SEGMENT) {
            if (w.stop(w.context)) return;
            if (!fold_segment(s, s + SEGMENT)) continue;
            if (empty)
                swap_total();  // merging with nothing
            else
                merge();
            empty = false;
        }
        if (empty) begin_total();
        finalize();
    }

    // The keys of one segment, to a state.
    void run_segment(int64_t segment, E* state) {
        sight.look(c, u, r0, rows);
        load_queries();
        const int64_t pitch = state_elements(c.v_dim);
        if (!fold_segment(segment * SEGMENT, (segment + 1) * SEGMENT)) {
            for (int64_t r = 0; r < rows; r++, state += pitch) {
                memset(state, 0, size_t(pitch) * sizeof(E));
                state[0] = -INFINITE<E>;
            }
            return;
        }
        for (int64_t r = 0; r < rows; r++, state += pitch) {
            state[0] = max_part[r];
            state[1] = sum_part[r];
            for (int64_t d = 0; d < pitch - 16; d++) state[16 + d] = d < c.v_dim ? part[d * N + r] : E(0);
        }
    }

    void finalize() {
        for (int r = 0; r < rows; r++) factor[r] = settle(c, u, r0 + r, max_total[r], sum_total[r]);
        for (int64_t r = rows; r < N; r++) factor[r] = 0;
        unpack_output<T, E, N>(c, u, r0, rows, total, factor);
    }
};

template <class K, class T, int NR>
void fold_rows(const Call& c, const Unit& u, const Piece& p, Worker& w) {
    Tile<K, T, NR> tile(c, u, w, p.r0, p.r1);
    if (p.segment < 0)
        tile.run();
    else
        tile.run_segment(p.segment, static_cast<typename K::E*>(p.state));
}

// A row's accumulator of whole vectors to its output.
template <class E, class T>
void finish_row(const Call& c, const Unit& u, int64_t r, E m, E d, const E* acc) {
    constexpr int W = LANES<E>;
    const E factor = settle(c, u, r, m, d);
    T* out = static_cast<T*>(u.out) + row_at(c.out, c.group, r);
    int64_t x = 0;
    if (c.out.col == 1)
        for (; x + W <= c.v_dim; x += W) narrow(out + x, load(acc + x) * set<E>(factor));
    for (; x < c.v_dim; x++) put(out + x * c.out.col, acc[x] * factor);
}

template <class K, class T>
void fold_tile(const Call& c, const Unit& u, const Piece& p, Worker& w) {
    switch ((p.r1 - p.r0 + LANES<typename K::E> - 1) / LANES<typename K::E>) {
        case 1: return fold_rows<K, T, 1>(c, u, p, w);
        case 2: return fold_rows<K, T, 2>(c, u, p, w);
        default: return fold_rows<K, T, 3>(c, u, p, w);
    }
}

template <class K, class T>
int64_t scratch_of(const Call& c, int64_t rows) {
    Worker w{};
    Unit u{};
    switch ((rows + LANES<typename K::E> - 1) / LANES<typename K::E>) {
        case 1: return Tile<K, T, 1>::bytes(c, u, w);
        case 2: return Tile<K, T, 2>::bytes(c, u, w);
        default: return Tile<K, T, 3>::bytes(c, u, w);
    }
}

// Merges the states of each row left to right, element by element as Tile::merge does, and finalizes.
template <class E, class T>
void join_states(const Call& c, const Unit& u, const Piece& p, int64_t segments, int64_t stride) {
    constexpr int W = LANES<E>;
    const int64_t pitch = state_elements(c.v_dim), width = pitch - 16;
    char* const states = static_cast<char*>(p.state);
    for (int64_t r = p.r0; r < p.r1; r++) {
        // Segment 0's own state becomes the total, after the sinks that come before it.
        E* const acc = reinterpret_cast<E*>(states) + (r - p.r0) * pitch;
        E m = u.sinks ? E(u.sinks[r % c.group]) : acc[0];
        E d = u.sinks ? E(m > -INFINITE<E>) : acc[1];
        for (int64_t n = u.sinks ? 0 : 1; n < segments; n++) {
            const E* next = reinterpret_cast<const E*>(states + n * stride) + (r - p.r0) * pitch;
            const E old = m;
            m = old > next[0] ? old : next[0];
            const Vec<E> shift = set<E>(m == -INFINITE<E> ? E(0) : m);
            const Vec<E> keep = exp<E>(set<E>(old) - shift), gain = exp<E>(set<E>(next[0]) - shift);
            d = fma(set<E>(next[1]), gain, set<E>(d) * keep)[0];
            for (int64_t x = 16; x < 16 + width; x += W)
                store(acc + x, fma(load(next + x), gain, (n == 0 ? Vec<E>{} : load(acc + x)) * keep));
        }
        finish_row<E, T>(c, u, r, m, d, acc + 16);
    }
}

}  // namespace
}  // namespace tilefold
