// Sweep one for few query rows: decoding. Arithmetic is scarce there and memory is not, so keys and values
// are read once, in the order in which they lie, and serve all the rows (the heads that share them). What is
// multiplied how is said in row_vectors.inl and row_amx.inl, where the order of sums is that of fold.inl, to
// the bit, and in row_codes.inl, where it is not. Tried: asking for all that comes with a loop of its own,
// which costs more than it brings.

namespace tilefold {
namespace {

constexpr int FEW_ROWS = 8;

template <class K, class T, int R>
struct Products {
    using Type = RowVectors<K, T, R>;
};
#ifdef TILEFOLD_HAS_TILES
template <int R>
struct Products<Amx, BFloat, R> {
    using Type = RowTiles<R>;
};
// Codes as they lie, whatever the type of the queries.
struct Codes {
    using E = float;
    static constexpr int KEYS = GROUP;
};
template <class T, int R>
struct Products<Codes, T, R> {
    using Type = RowCodes<R>;
};
#endif

template <class K, class T, int R>
struct Rows {
    using E = typename K::E;
    using M = Mask<E>;
    using Few = typename Products<K, T, R>::Type;
    static constexpr int W = LANES<E>;

    const Call& c;
    const Unit& u;
    Worker& w;
    const int64_t r0, rows, pitch, width;  // of scores, and value dims in whole vectors
    Few few;
    Requests requests;
    E* scores;        // and weights, [R][pitch]
    E *part, *total;  // [R][width]
    E max_part[R], sum_part[R], max_total[R], sum_total[R];
    Sight<R> sight;
    bool first, hidden, empty;

    Rows(const Call& c_, const Unit& u_, Worker& w_, int64_t r0_, int64_t rows_, Arena& a)
        : c(c_),
          u(u_),
          w(w_),
          r0(r0_),
          rows(rows_),
          pitch(up(c.block_k, 2 * W)),
          width(up(c.v_dim, W)),
          few(c, u, pitch, a) {
        scores = a.template take<E>(R * pitch);
        part = a.template take<E>(R * width);
        total = a.template take<E>(R * width);
    }

    int64_t row_of(int r) const { return r0 + least(r, rows - 1); }

    void begin() {
        sight.look(c, u, r0, rows);
        const T* from[R];
        for (int r = 0; r < R; r++) from[r] = static_cast<const T*>(u.q) + row_at(c.q, c.group, row_of(r));
        few.begin(from);
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

    // Scores of keys j0 … j1 into scores[r][j − j0], whole vectors with −inf at the end; raises `top`.
    void score(int64_t j0, int64_t j1, Kind kind, E (&top)[R]) {
        const bool plain = c.softcap == NO_SOFTCAP && !u.bias && !u.alibi && !sight.holes;
        Vec<E> highest[R];
        each<R>([&](auto r) TILEFOLD_LAMBDA { highest[r] = set<E>(-INFINITE<E>); });
        const M at = __builtin_convertvector(iota<E>(), M);
        const Vec<E> scale = set<E>(E(c.scale));
        const auto finish = [&](int64_t k, Vec<E>(&acc)[R]) TILEFOLD_LAMBDA {
            const int64_t n = least(W, j1 - j0 - k);
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                Vec<E> x = acc[r] * scale;
                if (!plain) x = transformed(x, r, j0 + k, n);
                if (kind == Kind::EDGE || n < W)
                    x = select<E>(visible(r, j0 + k, at) & (at < typename Float<E>::Integer(n)), x,
                                  set<E>(-INFINITE<E>));
                highest[r] = max(x, highest[r]);
                store(scores + r * pitch + k, x);
            });
        };
        few.multiply(j1 - j0, requests, finish);
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

    // Adds the values that are not finite to the rows that see them.
    void add_infinite(int64_t n, const uint8_t* seen) {
        for (int64_t k = 0; k < n; k++)
            for (int64_t d = 0; d < c.v_dim; d++) {
                const E x = few.value(k, d);
                if (x - x == 0) continue;
                for (int r = 0; r < R; r++)
                    if (seen[r * pitch + k]) part[r * width + d] += x * scores[r * pitch + k];
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
        hidden |= kind == Kind::EDGE || u.bias || Few::SPREADS;
        E top[R], shift[R], keep[R], added[R];
        for (int r = 0; r < R; r++) top[r] = max_part[r];
        const int64_t n = j1 - j0;
        few.bring_keys(j0, j1);
        requests.begin(c, u, values_of(c, u), sizeof(T), j0, j1, few.key_turns(n));
        score(j0, j1, kind, top);
        uint8_t seen[CAREFUL ? R * SEGMENT : 1];  // a block is at most a segment
        if constexpr (CAREFUL)
            for (int r = 0; r < R; r++)
                for (int64_t k = 0; k < j1 - j0; k++)
                    seen[r * pitch + k] = sees<E>(c, u, Row(row_of(r), c.group), j0 + k);
        for (int r = 0; r < R; r++) {
            shift[r] = shift_of<E>(set<E>(top[r]))[0];
            keep[r] = exp<E>(set<E>(max_part[r]) - set<E>(shift[r]))[0];
            max_part[r] = top[r];
        }
        few.weigh(scores, n, shift, added);
        for (int r = 0; r < R; r++)
            sum_part[r] = fma(set<E>(sum_part[r]), set<E>(keep[r]), set<E>(added[r]))[0];
        few.template bring_values<CAREFUL>(j0, j1);
        requests.begin(c, u, keys_of(c, u), sizeof(T), j1, least(j1 + c.block_k, sight.last),
                       few.value_turns(n));
        few.template add_up<CAREFUL>(n, requests, [&](int64_t d, int r, Vec<E> sum) TILEFOLD_LAMBDA {
            E* const o = part + r * width + d;
            store(o, first ? sum : fma(load(o), set<E>(keep[r]), sum));
        });
        if constexpr (CAREFUL) add_infinite(n, seen);
        first = false;
    }

    void fold_segment(int64_t s0, int64_t s1) {
        begin_segment();
        const int64_t begin = most(s0, sight.first) / c.block_k * c.block_k, last = least(s1, sight.last);
        for (int64_t k0 = begin; k0 < last; k0 += c.block_k) fold_block<false>(k0, s0, s1);
        if (first || !hidden || all_finite(part, R * width)) return;
        begin_segment();
        for (int64_t k0 = begin; k0 < last; k0 += c.block_k) fold_block<true>(k0, s0, s1);
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

#ifdef TILEFOLD_HAS_TILES
template <class T>
void fold_codes(const Call& c, const Unit& u, const Piece& p, Worker& w) {
    const TileRegisters ours;
    Arena a{w.scratch};
    const int64_t rows = p.r1 - p.r0;
    if (rows <= FEW)
        Rows<Codes, T, FEW>(c, u, w, p.r0, rows, a).run(p);
    else
        Rows<Codes, T, FEW_ROWS>(c, u, w, p.r0, rows, a).run(p);
}
template <class T>
int64_t scratch_of_codes(const Call& c) {
    Worker w{};
    static const Unit u{};
    Arena few{nullptr};
    Rows<Codes, T, FEW_ROWS>(c, u, w, 0, 1, few);
    return few.bytes;
}
#endif

template <class K, class T>
void fold_row(const Call& c, const Unit& u, const Piece& p, Worker& w) {
#ifdef TILEFOLD_HAS_TILES
    if constexpr (K::IN_TILES) {
        const TileRegisters ours;
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
    if constexpr (K::PIECES > 1) return tiles.bytes;
    Rows<K, T, FEW_ROWS>(c, u, w, 0, 1, few);  // the last piece of many rows may be one of few
    int64_t bytes = most(tiles.bytes, few.bytes);
#ifdef TILEFOLD_HAS_TILES
    if constexpr (!__is_same(T, double))
        if (is_integer(c.kv_type)) bytes = most(bytes, scratch_of_codes<T>(c));
#endif
    return bytes;
}

}  // namespace
}  // namespace tilefold
