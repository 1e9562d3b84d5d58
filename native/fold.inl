// Sweep one on one machine: twin of fold.py, which is the specification.
//
// A tile is up to WIDE vectors of query rows of one key head; a piece is up to MOST_TILES of them. For each
// block of keys: scores Sᵀ (keys × lanes) in cache, their maximum, weights in place, then Oᵀ += Vᵀ·P; lanes
// are queries throughout, so maximum, sum and rescale are vertical. Per score: 2·dim + 2·v_dim flops of
// multiply-add, and 17 vector operations of softmax (scale, max, store; load, subtract, 11 of exp, add,
// store; with powers of two in silicon exp takes 8), that is 12 % of the arithmetic at dim 64 and 6 % at dim
// 128. Reads per block: keys and values once (from L2 or beyond), Qᵀ once per strip of keys from L1.
//
// Each SEGMENT of keys is folded from empty, block by block on an absolute grid, and segments are merged left
// to right. A hidden key adds exactly 0 and an all-hidden block leaves a lane as it is to the bit, so a row's
// bits depend on nothing but its own keys.

namespace tilefold {
namespace {

constexpr int MOST_TILES = 8;

// Where a block's keys and values are to be read.
template <class K>
struct Block {
    Matrix<K> keys;    // rows are keys, depth is dim
    Matrix<K> values;  // rows are value dims, depth is keys
};

// How storage T reaches kernel K.
template <class K, class T>
struct Packing {
    static constexpr bool always_values = !__is_same(T, typename K::A);  // values are packed
    static constexpr bool always_keys = always_values && (K::PAIR == 1 || K::PIECES > 1);
    static constexpr int multiple = K::PAIR * K::DEPTH;
    static constexpr int rows = K::PIECES > 1 ? 32 : 1;  // packed matrices have them in groups of so many
};

// The state that a row begins with: its sink, or nothing.
template <class E>
E first_max(const Call& c, const Unit& u, int64_t r) {
    return u.sinks ? E(u.sinks[r % c.group]) : -INFINITE<E>;
}
template <class E>
E first_sum(E max) {
    return max > -INFINITE<E> ? E(1) : E(0);
}

template <class E>
bool all_finite(const E* x, int64_t n) {
    Vec<E> odd{};
    for (const E* end = x + n; x < end; x += LANES<E>) odd += load(x) - load(x);  // 0, or NaN for good
    return !any(odd != Vec<E>{});
}

// What a finished row's accumulator is multiplied by; stores its log-sum-exp.
template <class E>
E settle(const Call& c, const Unit& u, const Row& row, E m, E d) {
    // A row that sees keys and still found only −inf has overflowed: that is NaN, never a silent 0.
    if (m == -INFINITE<E> && sees_any<E>(c, u, row)) d = m = E(__builtin_nan(""));
    if (m == INFINITE<E>) __atomic_store_n(u.infinite, 1, __ATOMIC_RELAXED);
    if (u.lse)
        static_cast<E*>(u.lse)[row.at(c.lse)] =
            d == 0 ? -INFINITE<E> : E(double(m) + __builtin_log(double(d)));
    return d == 0 ? E(0) : 1 / d;
}

// What the tiles of a piece share: the block that is being folded, its scores, and where keys and values are
// read.
template <class K, class T>
struct Desk {
    using E = typename K::E;
    using A = typename K::A;
    using P = Packing<K, T>;
    static constexpr int N = K::WIDE * LANES<E>;

    const Call& c;
    const Unit& u;
    Worker& w;
    const int64_t depth, pitch;   // of a score's dot product, and of a packed block of values, in A
    E *scores, *weights;          // the latter in the place of the former, but in pieces beside them
    char *own_keys, *own_values;  // a block packed for this piece alone
    A* clean;                     // values without NaN and infinity
    uint8_t* seen;
    T *key_rows, *value_rows;  // of a block whose pages lie apart
    Rowed<T> k, v;
    int64_t brought = -1, packed = -1;  // the blocks in k and v, and in own_keys and own_values

    Desk(const Call& c_, const Unit& u_, Worker& w_, Arena& a)
        : c(c_),
          u(u_),
          w(w_),
          depth(up(c.dim, P::multiple) / K::PAIR),
          pitch(up(c.block_k, K::KEYS) / K::PAIR) {
        const bool keys = P::always_keys || c.pack_keys;
        scores = weights = a.template take<E>(up(c.block_k, K::KEYS) * N);
        if (K::PIECES > 1) weights = a.template take<E>(pitch * K::PIECES * N);
        own_keys = a.template take<char>(keys ? key_bytes() : 0);
        own_values = a.template take<char>(P::always_values ? value_bytes() : 0);
        clean = a.template take<A>(value_bytes() / int64_t(sizeof(A)));
        seen = a.template take<uint8_t>(c.block_k * N);
        key_rows = a.template take<T>(c.page ? c.block_k * c.dim : 0);
        value_rows = a.template take<T>(c.page ? c.block_k * c.v_dim : 0);
    }

    // Of a packed block.
    int64_t key_bytes() const { return up(c.block_k, P::rows) * depth * K::PIECES * int64_t(sizeof(A)); }
    int64_t value_bytes() const { return pitch * up(c.v_dim, P::rows) * K::PIECES * int64_t(sizeof(A)); }

    Block<K> block(int64_t k0, int64_t k1) {
        Block<K> b;
        char *keys = own_keys, *values = own_values;
        if constexpr (P::always_values) {
            if (u.panel.done)
                from_panel(k0, keys, values);
            else if (packed != k0)
                pack(k0, k1, keys, values), packed = k0;
        }
        if constexpr (K::PIECES > 1) {
            b.keys = {reinterpret_cast<const A*>(keys), P::rows * depth * K::PIECES};
            b.values = {reinterpret_cast<const A*>(values), P::rows * pitch * K::PIECES};
        } else {
            if (P::always_keys || c.pack_keys)
                b.keys = {reinterpret_cast<const A*>(keys), depth, 1};
            else
                bring_rows(k0, k1),
                    b.keys = {reinterpret_cast<const A*>(k.at), k.row / K::PAIR, K::PAIR == 1 ? k.col : 1};
            if constexpr (!P::always_values)
                b.values = {reinterpret_cast<const A*>(v.at), v.col, v.row};
            else if constexpr (K::PAIR == 1)
                b.values = {reinterpret_cast<const A*>(values), 1, c.v_dim};
            else
                b.values = {reinterpret_cast<const A*>(values), pitch, 1};
        }
        return b;
    }

    // Brings the rows of a block as they are stored to k and v.
    void bring_rows(int64_t k0, int64_t k1) {
        if (brought == k0) return;
        k = bring_keys(c, u, k0, k1, key_rows);
        v = bring_values(c, u, k0, k1, value_rows);
        brought = k0;
    }

   private:
    // The unit's shared panels: whoever needs a block first fills it. The others fill the next ones until it
    // is there, or wait.
    void from_panel(int64_t k0, char*& keys, char*& values) {
        const int64_t n = k0 / c.block_k;
        keys = static_cast<char*>(u.panel.keys) + n * key_bytes();
        values = static_cast<char*>(u.panel.values) + n * value_bytes();
        const int32_t* const done = u.panel.done + n;
        if (__atomic_load_n(done, __ATOMIC_ACQUIRE) == 2) return;
        fill(n);
        for (int64_t next = n + 1; __atomic_load_n(done, __ATOMIC_ACQUIRE) != 2; next++)
            if (next * c.block_k >= u.kv_len || !fill(next)) w.relax(w.context);
    }
    // Block n of the panels, unless somebody is at it.
    bool fill(int64_t n) {
        int32_t* const done = u.panel.done + n;
        int32_t nobody = 0;
        if (!__atomic_compare_exchange_n(done, &nobody, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE))
            return false;
        pack(n * c.block_k, least((n + 1) * c.block_k, u.kv_len),
             static_cast<char*>(u.panel.keys) + n * key_bytes(),
             static_cast<char*>(u.panel.values) + n * value_bytes());
        __atomic_store_n(done, 2, __ATOMIC_RELEASE);
        return true;
    }

    void pack(int64_t k0, int64_t k1, char* keys, char* values) {
        bring_rows(k0, k1);
        if constexpr (K::PIECES > 1) {
            pack_key_tiles(K{}, k, k1 - k0, c.dim, reinterpret_cast<A*>(keys));
            pack_value_tiles(K{}, v, k1 - k0, c.v_dim, 2 * pitch, reinterpret_cast<A*>(values));
        } else if constexpr (P::always_keys) {
            widen_rows<T, E>(k, k1 - k0, c.dim, reinterpret_cast<E*>(keys), c.dim);
            widen_rows<T, E>(v, k1 - k0, c.v_dim, reinterpret_cast<E*>(values), c.v_dim);
        } else {
#ifdef TILEFOLD_HAS_DOT2
            if (c.pack_keys) copy_rows(k, k1 - k0, c.dim, reinterpret_cast<BFloat*>(keys), depth * K::PAIR);
            pack_value_pairs(v, k1 - k0, c.v_dim, reinterpret_cast<uint32_t*>(values), pitch);
#endif
        }
    }
};

// NR vectors of query rows and their state.
template <class K, class T, int NR>
struct Tile : Lanes<K, T, NR> {
    using E = typename K::E;
    using A = typename K::A;
    static constexpr int W = LANES<E>, N = NR * W;
    using Lanes<K, T, NR>::r0;
    using Lanes<K, T, NR>::rows;
    using Lanes<K, T, NR>::sight;

    E *part, *total;  // accumulators of this segment, and of those before it
    E *max_part, *sum_part, *max_total, *sum_total, *factor;
    bool first, hidden, empty;  // nothing folded in this segment; a cell hidden in it; no segment before it
    Statistics<E, N> statistics;

    void lay_out(const Call& c, int64_t depth, Arena& a) {
        this->lay_out_queries(depth, a);
        part = a.template take<E>(c.v_dim * N);
        total = a.template take<E>(c.v_dim * N);
        max_part = a.template take<E>(N);
        sum_part = a.template take<E>(N);
        max_total = a.template take<E>(N);
        sum_total = a.template take<E>(N);
        factor = a.template take<E>(N);
        statistics.lay_out(c, a);
    }

    // ---- the steps of a block ----

    // Weights of two keys to where the product takes those of lanes i · W …
    static TILEFOLD_INLINE void put_pair(E* to, int i, Vec<E> p, Vec<E> q) {
        if constexpr (K::PIECES == 1) {
            store(to + i * K::NEXT, bits_as<Vec<E>>(pair_up<U32>(p, q)));
        } else {
            U32 pieces[K::PIECES];
            pair_weights(p, q, pieces);
            each<K::PIECES>([&](auto n) TILEFOLD_LAMBDA {
                store(to + (n * NR + i) * K::NEXT, bits_as<Vec<E>>(pieces[n]));
            });
        }
    }

    // Scores become weights; for pairs two rows become one of bf16 pairs. Returns their sums in `sum`.
    static void weigh(E* scores, [[maybe_unused]] E* weights, int64_t keys, const Vec<E> (&shift)[NR],
                      Vec<E> (&sum)[NR]) {
        Vec<E> total_of[NR], less[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { total_of[i] = Vec<E>{}, less[i] = shift[i]; });
        if constexpr (K::PAIR == 1) {
            for (E *s = scores, *end = scores + keys * N; s < end; s += N)
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    const Vec<E> p = exp<E>(load(s + i * W) - less[i]);
                    total_of[i] += p;
                    store(s + i * W, p);
                });
        } else {
            const int64_t whole = up(keys, K::KEYS);
            for (E *s = scores + keys * N, *end = scores + whole * N; s < end; s += W)
                store(s, set<E>(-INFINITE<E>));
            E* s = scores;
            for (int64_t key = 0; key < whole; key += 2, s += 2 * N) {
                if (key % (K::PIECES == 1 ? 64 : 16) == 0) K::stay_awake();
                E* const to = K::template pair_at<N>(weights, key);
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    const Vec<E> p = exp<E>(load(s + i * W) - less[i]);
                    const Vec<E> q = exp<E>(load(s + N + i * W) - less[i]);
                    total_of[i] += p;
                    total_of[i] += q;
                    put_pair(to, i, p, q);
                });
            }
        }
        each<NR>([&](auto i) TILEFOLD_LAMBDA { sum[i] = total_of[i]; });
    }

    // The same, and what a call wants to know of its rows. Done again, a block has nothing new to list.
    template <bool CAREFUL>
    void weigh_and_tell(Desk<K, T>& desk, int64_t j0, int64_t j1, const Vec<E> (&before)[NR],
                        const Vec<E> (&shift)[NR], const Vec<E> (&keep)[NR], Vec<E> (&sum)[NR]) {
        E* const scores = desk.scores;
        const int64_t keys = j1 - j0;
        typename Statistics<E, N>::Sums sums;
        if (!CAREFUL) statistics.list_highest(desk.c, desk.u, rows, scores, j0, keys);
        if (desk.u.seen.distance)
            statistics.template weigh<true>(scores, keys, shift, sums);
        else
            statistics.template weigh<false>(scores, keys, shift, sums);
        statistics.add(desk.c, desk.u, scores, j0, keys, sum_part, before, shift, keep, sums);
        each<NR>([&](auto i) TILEFOLD_LAMBDA { sum[i] = sums.weights[i]; });
        if constexpr (K::PAIR == 2) {
            const int64_t whole = up(keys, K::KEYS);
            memset(scores + keys * N, 0, size_t((whole - keys) * N) * sizeof(E));
            E* s = scores;
            for (int64_t key = 0; key < whole; key += 2, s += 2 * N)
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    put_pair(K::template pair_at<N>(desk.weights, key), i, load(s + i * W),
                             load(s + N + i * W));
                });
        }
    }

    // Oᵀ of the segment: times `keep`, plus Vᵀ·P of this block.
    void accumulate(const Desk<K, T>& desk, Matrix<K> values, int64_t keys, const Vec<E> (&keep)[NR]) {
        const int64_t steps = up(keys, K::KEYS) / K::PAIR;
        const A* p = reinterpret_cast<const A*>(desk.weights);
        // Vectors may alias anything, so what a strip needs is copied to where they cannot reach.
        E* const to = part;
        const bool fresh = first;
        Vec<E> factor_of[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { factor_of[i] = keep[i]; });
        const auto add = [=](int64_t d, auto& acc) TILEFOLD_LAMBDA {
            constexpr int MR = int(sizeof(acc) / sizeof(acc[0]));
            E* const o = to + d * N;
            if (fresh)
                each<MR>([&](auto r) TILEFOLD_LAMBDA {
                    each<NR>([&](auto i) TILEFOLD_LAMBDA { store(o + r * N + i * W, acc[r][i]); });
                });
            else
                each<MR>([&](auto r) TILEFOLD_LAMBDA {
                    each<NR>([&](auto i) TILEFOLD_LAMBDA {
                        store(o + r * N + i * W, fma(load(o + r * N + i * W), factor_of[i], acc[r][i]));
                    });
                });
        };
        product<K, NR>(values, p, steps, 0, desk.c.v_dim, add);
    }

    // ---- a block whose values hold NaN or infinity that some lane does not see ----

    // The product with non-finite values taken as 0, then each of them added to the lanes that see it.
    // `values` stand `from` keys into the block.
    void accumulate_carefully(const Desk<K, T>& desk, Matrix<K> values, [[maybe_unused]] int64_t from,
                              int64_t keys, const Vec<E> (&keep)[NR]) {
        const int64_t steps = up(keys, K::KEYS) / K::PAIR;
        const auto add = [&](int64_t d, int64_t j, E x) {
            for (int r = 0; r < N; r++)
                if (desk.seen[j * N + r]) part[d * N + r] += x * weight(desk.weights, j, r);
        };
        if constexpr (K::PIECES > 1) {
            const Rowed<T> rows{desk.v.from(from), desk.v.row, desk.v.col};
            pack_value_tiles(K{}, rows, keys, desk.c.v_dim, 2 * steps, desk.clean, true);
            accumulate(desk, {desk.clean, 32 * steps * K::PIECES}, keys, keep);
            for (int64_t j = 0; j < keys; j++)
                for (int64_t d = 0; d < desk.c.v_dim; d++)
                    if (const E x = one(rows.from(j)[d * rows.col]); !has_pieces(x)) add(d, j, x);
        } else {
            for (int64_t d = 0; d < desk.c.v_dim; d++)
                for (int64_t k = 0; k < steps; k++) {
                    A a = values.at[d * values.row + k * values.step];
                    for (int half = 0; half < K::PAIR; half++)
                        if (!finite(value(a, half))) a = without(a, half);
                    desk.clean[d * steps + k] = a;
                }
            accumulate(desk, {desk.clean, steps, 1}, keys, keep);
            for (int64_t d = 0; d < desk.c.v_dim; d++)
                for (int64_t j = 0; j < keys; j++) {
                    const E x =
                        value(values.at[d * values.row + j / K::PAIR * values.step], int(j % K::PAIR));
                    if (!finite(x)) add(d, j, x);
                }
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
    static E weight(const E* weights, int64_t j, int r) {
        if constexpr (K::PAIR == 1) {
            return weights[j * N + r];
        } else {
            const E* const at = K::template pair_at<N>(weights, j) + r / W * K::NEXT + r % W;
            E sum = 0;
            for (int n = 0; n < K::PIECES; n++)
                sum += value(bits_as<uint32_t>(at[n * NR * K::NEXT]), int(j & 1));
            return sum;
        }
    }

    // ---- segments ----

    void begin_segment(const Call& c) {
        for (int r = 0; r < N; r++) max_part[r] = -INFINITE<E>, sum_part[r] = 0;
        if (c.taps.any) statistics.begin_segment();
        first = true, hidden = false;
    }

    // Keys k0 … of one block, as far as they belong to the segment s0 … s1 and somebody here sees them.
    template <bool CAREFUL>
    void fold_block(Desk<K, T>& desk, int64_t k0, int64_t s0, int64_t s1) {
        const Call& c = desk.c;
        const Unit& u = desk.u;
        const int64_t j0 = most(k0, most(s0, sight.first) / K::KEYS * K::KEYS);
        const int64_t j1 = least(k0 + c.block_k, least(s1, sight.last));
        if (j0 >= j1) return;
        const Kind kind = sight.kind(c, u, r0, rows, j0, j1);
        if (kind == Kind::EMPTY) return;
        // Keys beyond an end that is no multiple are read too, with weight 0.
        hidden |= kind == Kind::EDGE || u.bias || (j1 % K::KEYS && j1 < u.kv_len);
        const Block<K> b = desk.block(k0, least(k0 + c.block_k, u.kv_len));
        Vec<E> top[NR], before[NR], shift[NR], keep[NR], added[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { top[i] = load(max_part + i * W); });
        const Rowed<T>* raw = nullptr;
        if constexpr (CAREFUL && K::PIECES > 1) {
            desk.bring_rows(k0, least(k0 + c.block_k, u.kv_len));
            raw = &desk.k;
        }
        this->score(c, u, b.keys, desk.depth, k0, j0, j1, kind, desk.scores, top, nullptr, raw);
        if constexpr (CAREFUL) this->note_seen(c, u, j0, j1 - j0, desk.seen);
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            shift[i] = shift_of<E>(top[i]);
            before[i] = load(max_part + i * W);
            keep[i] = exp<E>(before[i] - shift[i]);
            store(max_part + i * W, top[i]);
        });
        if (__builtin_expect(c.taps.any, 0))
            weigh_and_tell<CAREFUL>(desk, j0, j1, before, shift, keep, added);
        else
            weigh(desk.scores, desk.weights, j1 - j0, shift, added);
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            store(sum_part + i * W, fma(load(sum_part + i * W), keep[i], added[i]));
        });
        const Matrix<K> values = b.values.from(0, (j0 - k0) / K::PAIR);
        if constexpr (CAREFUL)
            accumulate_carefully(desk, values, j0 - k0, j1 - j0, keep);
        else
            accumulate(desk, values, j1 - j0, keep);
        first = false;
    }

    // Looks at what the segment gave; only where something is not finite, and something is hidden or numbers
    // were taken to pieces, which infinity has none of, is it done again.
    void check(Desk<K, T>& desk, int64_t s0, int64_t s1) {
        if (first || (!hidden && K::PIECES == 1) || all_finite(part, desk.c.v_dim * N)) return;
        begin_segment(desk.c);
        for (int64_t k0 = s0 / desk.c.block_k * desk.c.block_k; k0 < s1; k0 += desk.c.block_k)
            fold_block<true>(desk, k0, s0, s1);
    }

    // Joins this segment to those before it.
    void merge(const Call& c) {
        if (first) return;
        if (c.taps.any) statistics.raise(max_part);
        if (empty) {  // merging with nothing
            swap(part, total);
            swap(max_part, max_total);
            swap(sum_part, sum_total);
            if (c.taps.any) statistics.swap();
            empty = false;
            return;
        }
        for (int i = 0; i < N; i += W) {
            const Meeting<E> meet(load(max_total + i), load(max_part + i));
            if (c.taps.any)
                statistics.merge(meet, i, max_total, sum_total, max_part, sum_part, c.taps.regions);
            store(max_total + i, meet.max);
            store(sum_total + i, meet(load(sum_total + i), load(sum_part + i)));
            for (int64_t at = i; at < c.v_dim * N; at += N)
                store(total + at, meet(load(total + at), load(part + at)));
        }
    }
    static void swap(E*& a, E*& b) {
        E* const t = a;
        a = b;
        b = t;
    }

    void begin_total(const Call& c, const Unit& u) {
        for (int r = 0; r < N; r++) {
            max_total[r] = first_max<E>(c, u, r0 + least(r, rows - 1));
            sum_total[r] = first_sum(max_total[r]);
        }
        memset(total, 0, size_t(c.v_dim * N) * sizeof(E));
    }

    void begin(const Desk<K, T>& desk, int64_t r0_, int64_t rows_) {
        const Call& c = desk.c;
        const Unit& u = desk.u;
        this->look(c, u, r0_, rows_);
        this->pack(c, u, desk.depth);
        empty = !u.sinks;
        if (!empty) begin_total(c, u);
        if (c.taps.any) statistics.begin(c, u, r0, rows);
    }

    void finish(const Call& c, const Unit& u) {
        if (empty) begin_total(c, u);
        Row row(r0, c.group);
        for (int r = 0; r < rows; r++, row.next()) {
            factor[r] = settle(c, u, row, max_total[r], sum_total[r]);
            if (c.taps.any) statistics.finish(c, u, r, row, sum_total[r], factor[r]);
        }
        for (int64_t r = rows; r < N; r++) factor[r] = 0;
        unpack_columns<T, E, N>(static_cast<T*>(u.out), c.out, c.group, r0, rows, c.v_dim, total, factor);
    }

    // The state of this segment, row by row.
    void save(const Call& c, E* state) const {
        const int64_t pitch = state_elements(c.v_dim);
        for (int64_t r = 0; r < rows; r++, state += pitch) {
            memset(state, 0, size_t(pitch) * sizeof(E));
            state[0] = max_part[r];
            state[1] = sum_part[r];
            if (!first)
                for (int64_t d = 0; d < c.v_dim; d++) state[16 + d] = part[d * N + r];
        }
    }
};

// All the rows of a piece, as tiles that are folded block by block together: a block of keys and values comes
// from memory once for all of them, and then from the second cache.
template <class K, class T>
struct Tiles {
    using E = typename K::E;
    static constexpr int W = LANES<E>, WIDE = K::WIDE, N = WIDE * W;

    Desk<K, T> desk;
    int64_t count;  // of whole tiles
    int last;       // vectors of rows in the last one, 0 if it is whole
    Tile<K, T, WIDE> whole[MOST_TILES];
    Tile<K, T, 1> one_left;
    Tile<K, T, 2> two_left;

    Tiles(const Call& c, const Unit& u, Worker& w, int64_t rows, Arena& a) : desk(c, u, w, a) {
        static_assert(WIDE == 2 || WIDE == 3);
        count = rows / N;
        last = int((rows % N + W - 1) / W);
        if (last == WIDE) count++, last = 0;
        each_tile([&](auto& tile) TILEFOLD_LAMBDA { tile.lay_out(c, desk.depth, a); });
    }

    template <class F>
    void each_tile(F&& f) {
        for (int64_t n = 0; n < count; n++) f(whole[n]);
        if (last == 1) f(one_left);
        if constexpr (WIDE == 3)
            if (last == 2) f(two_left);
    }

    void fold_segment(int64_t s0, int64_t s1, int64_t begin, int64_t end) {
        const int64_t block_k = desk.c.block_k;
        each_tile([&](auto& tile) TILEFOLD_LAMBDA { tile.begin_segment(desk.c); });
        for (int64_t k0 = most(s0, begin) / block_k * block_k; k0 < least(s1, end); k0 += block_k)
            each_tile([&](auto& tile) TILEFOLD_LAMBDA { tile.template fold_block<false>(desk, k0, s0, s1); });
        each_tile([&](auto& tile) TILEFOLD_LAMBDA { tile.check(desk, s0, s1); });
    }

    void run(const Piece& p) {
        const Call& c = desk.c;
        const Unit& u = desk.u;
        int64_t r0 = p.r0, begin = INT64_MAX, end = 0;
        each_tile([&](auto& tile) TILEFOLD_LAMBDA {
            tile.begin(desk, r0, least(p.r1 - r0, N));
            r0 += N;
            if (tile.sight.last) begin = least(begin, tile.sight.first), end = most(end, tile.sight.last);
        });
        if (p.segment >= 0) {
            fold_segment(p.segment * SEGMENT, (p.segment + 1) * SEGMENT, begin, end);
            E* state = static_cast<E*>(p.state);
            each_tile([&](auto& tile) TILEFOLD_LAMBDA {
                tile.save(c, state);
                state += N * state_elements(c.v_dim);
            });
            return;
        }
        for (int64_t s = begin / SEGMENT * SEGMENT; s < end; s += SEGMENT) {
            if (desk.w.stop(desk.w.context)) return;
            fold_segment(s, s + SEGMENT, begin, end);
            each_tile([&](auto& tile) TILEFOLD_LAMBDA { tile.merge(c); });
        }
        each_tile([&](auto& tile) TILEFOLD_LAMBDA { tile.finish(c, u); });
    }
};

// A row's accumulator of whole vectors to its output.
template <class E, class T>
void finish_row(const Call& c, const Unit& u, int64_t r, E m, E d, const E* acc) {
    constexpr int W = LANES<E>;
    const Row row(r, c.group);
    const E factor = settle(c, u, row, m, d);
    T* out = static_cast<T*>(u.out) + row.at(c.out);
    int64_t x = 0;
    if (c.out.col == 1)
        for (; x + W <= c.v_dim; x += W) narrow(out + x, load(acc + x) * set<E>(factor) + Vec<E>{});
    for (; x < c.v_dim; x++) put(out + x * c.out.col, acc[x] * factor + E(0));
}

template <class K, class T>
void fold_tiles(const Call& c, const Unit& u, const Piece& p, Worker& w) {
    Arena a{w.scratch};
#ifdef TILEFOLD_HAS_TILES
    if constexpr (K::IN_TILES) {
        const TileRegisters ours;
        Tiles<K, T>(c, u, w, p.r1 - p.r0, a).run(p);
        return;
    }
#endif
    Tiles<K, T>(c, u, w, p.r1 - p.r0, a).run(p);
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
        E m = u.sinks ? first_max<E>(c, u, r) : acc[0];
        E d = u.sinks ? first_sum(m) : acc[1];
        for (int64_t n = u.sinks ? 0 : 1; n < segments; n++) {
            const E* next = reinterpret_cast<const E*>(states + n * stride) + (r - p.r0) * pitch;
            const Meeting<E> meet(set<E>(m), set<E>(next[0]));
            m = meet.max[0];
            d = meet(set<E>(d), set<E>(next[1]))[0];
            for (int64_t x = 16; x < 16 + width; x += W)
                store(acc + x, meet(n == 0 ? Vec<E>{} : load(acc + x), load(next + x)));
        }
        finish_row<E, T>(c, u, r, m, d, acc + 16);
    }
}

}  // namespace
}  // namespace tilefold
