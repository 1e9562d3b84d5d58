// Sweep two on one machine, with the backward pass as its tap: twin of replay.py, which is the specification.
//
// A piece is one segment of a unit's keys; it goes through the tiles of query rows upwards. With lse known
// every weight is rebuilt, P = e^(S − lse); with delta = Σ dout · out − dlse the gradient of a score is dS =
// P · (dout · V − delta). Five products per block of keys and tile: S and dP have keys as rows and queries as
// lanes, like the forward's; dQᵀ += Kᵀ · dS the same; dV += P · dout and dK += dS · Q have keys as rows and
// dims as lanes. dK and dV of a segment stay in the second cache; dQ of a tile is one sum per segment, and
// the segments add to it in turn, so that its order is that of the keys, whoever computes what.
//
// Where tiles are multiplied in silicon (bf16), S and dP are exact products of what is stored; for the three
// sums P and dS are taken as sums of two halves of bf16, whose 16 bits leave no error that the result could
// hold.
//
// A hidden cell has P = 0 and dS = 0 exactly. Still 0 · NaN is NaN, so a block in which something is hidden
// and something is not finite is multiplied with that taken as 0, and it is added where it is seen.

namespace tilefold {
namespace {

// Rows r0 … of an array as rows [rows][pitch] of E, padded with 0.
template <class T, class E>
void pack_rows(const T* base, const Strides& s, int64_t group, int64_t r0, int64_t rows, int64_t width,
               int64_t pitch, E* to) {
    Row row(r0, group);
    for (int64_t r = 0; r < rows; r++, row.next(), to += pitch) {
        widen_rows<T, E>({base + row.at(s), 0, s.col}, 1, width, to, pitch);
        for (int64_t d = width; d < pitch; d++) to[d] = 0;
    }
}

template <class E, class T>
bool finite_rows(const T* x, int64_t row, int64_t col, int64_t n, int64_t width) {
    bool finite = true;
    for (int64_t j = 0; j < n; j++, x += row) {
        Vec<E> odd{};
        int64_t d = 0;
        if (col == 1)
            for (; d + LANES<E> <= width; d += LANES<E>) odd += widen(x + d) - widen(x + d);
        finite &= !any(odd != Vec<E>{});
        for (; d < width; d++) finite &= one(x[d * col]) - one(x[d * col]) == 0;
    }
    return finite;
}

// `from` with 0 for what is not finite; x - x is NaN then.
template <class E>
void clean(const E* from, int64_t n, E* to) {
    for (int64_t i = 0; i < n; i += LANES<E>) {
        const Vec<E> x = load(from + i);
        store(to + i, select<E>(x - x == 0, x, Vec<E>{}));
    }
}

// S is the kernel whose scores the forward pass had: weights are theirs only if scores are the same.
template <class K, class T, class S>
struct Replay {
    using E = typename K::E;
    using A = typename K::A;
    static constexpr int NR = K::WIDE, W = LANES<E>, N = NR * W;
    static constexpr bool PACKED = !__is_same(T, E), IN_TILES = K::IN_TILES;
    static_assert(K::PAIR == 1 || (IN_TILES && N % 16 == 0));  // a row and its lower halves: whole tiles
    // In tiles, pairs: of a block's keys, and of a tile's rows.
    static constexpr int64_t KEY_PAIRS = GRAD_BLOCK / 2, ROW_PAIRS = N / 2;

    const Call& c;
    const Unit& u;
    const GradCall& g;
    const GradUnit& to;
    Worker& w;
    const int64_t segment, dims, v_dims;  // keys per segment; vectors of dims
    const int64_t depth, v_depth;         // of products over dims, in A
    const int64_t score_depth;            // the same of scores, in S's
    const bool capped;

    // Of the segment.
    int64_t s0 = 0, s1 = 0;
    A *own_keys, *own_values;    // [segment][depth], [segment][v_depth]: packed, where storage is not E
    typename S::A* key_pieces;   // [block][32 keys …], where scores are multiplied in pieces
    A* keys_across;              // in tiles: [block][dim][KEY_PAIRS], without what is not finite
    Source<A> keys{}, values{};  // from key s0
    E *dk, *dv;                  // [segment][dims · W]
    bool odd_keys[8];            // per block: a key or value that is not finite
    // Of the tile.
    Lanes<S, T, NR> lanes;
    E *q, *dout;              // [N][dims · W], [N][v_dims · W]
    A* dout_columns;          // [v_depth][N]
    A *q_pairs, *dout_pairs;  // in tiles: [2][ROW_PAIRS][dims · W] and so on, without what is not finite
    E *clean_q, *clean_dout;  // without what is not finite
    E *dq, *delta, *shift, *scale;  // [dim][N], [N] …
    E* row_sums;                    // [N], of dS, where dbias sums over keys
    bool odd;                       // something of the tile is not finite
    // Of the block.
    E *p, *ds, *before_bias, *clean_keys;  // [block][N] …; scores after the softcap; [block][dim]
    A *p_halves, *ds_halves;               // in tiles: [block][2][ROW_PAIRS]
    A* ds_pairs;                           // in tiles: [2][KEY_PAIRS][N]
    uint8_t* seen;

    Replay(const Call& c_, const Unit& u_, const GradCall& g_, const GradUnit& to_, Worker& w_, Arena& a)
        : c(c_),
          u(u_),
          g(g_),
          to(to_),
          w(w_),
          segment(grad_segment(c.dim, c.v_dim)),
          dims((c.dim + W - 1) / W),
          v_dims((c.v_dim + W - 1) / W),
          depth(up(c.dim, K::PAIR * K::DEPTH) / K::PAIR),
          v_depth(up(c.v_dim, K::PAIR * K::DEPTH) / K::PAIR),
          score_depth(up(c.dim, S::PAIR * S::DEPTH) / S::PAIR),
          capped(c.softcap != NO_SOFTCAP) {
        own_keys = a.template take<A>(PACKED ? segment * depth : 0);
        own_values = a.template take<A>(PACKED ? segment * v_depth : 0);
        key_pieces = a.template take<typename S::A>(S::PIECES > 1 ? segment * score_depth * S::PIECES : 0);
        keys_across = a.template take<A>(IN_TILES ? segment / GRAD_BLOCK * c.dim * KEY_PAIRS : 0);
        dk = a.template take<E>(segment * dims * W);
        dv = a.template take<E>(segment * v_dims * W);
        lanes.lay_out_queries(score_depth, a);
        q = a.template take<E>(N * dims * W);
        dout = a.template take<E>(N * v_dims * W);
        dout_columns = a.template take<A>(v_depth * N);
        q_pairs = a.template take<A>(IN_TILES ? 2 * ROW_PAIRS * dims * W : 0);
        dout_pairs = a.template take<A>(IN_TILES ? 2 * ROW_PAIRS * v_dims * W : 0);
        clean_q = a.template take<E>(N * dims * W);
        clean_dout = a.template take<E>(N * v_dims * W);
        dq = a.template take<E>(c.dim * N);
        delta = a.template take<E>(N);
        shift = a.template take<E>(N);
        scale = a.template take<E>(N);
        row_sums = a.template take<E>(N);
        p = a.template take<E>(c.block_k * N);
        ds = a.template take<E>(c.block_k * N);
        before_bias = a.template take<E>(capped ? c.block_k * N : 0);
        clean_keys = a.template take<E>(IN_TILES ? 0 : c.block_k * c.dim);
        p_halves = a.template take<A>(IN_TILES ? c.block_k * 2 * ROW_PAIRS : 0);
        ds_halves = a.template take<A>(IN_TILES ? c.block_k * 2 * ROW_PAIRS : 0);
        ds_pairs = a.template take<A>(IN_TILES ? 2 * KEY_PAIRS * N : 0);
        seen = a.template take<uint8_t>(c.block_k * N);
    }

    // ---- the segment ----

    void open_segment(const GradPiece& piece) {
        s0 = piece.segment * piece.keys;
        s1 = least(s0 + piece.keys, u.kv_len);
        const int64_t n = most(s1 - s0, 0);
        const T* k = static_cast<const T*>(u.k) + s0 * c.k.row;
        const T* v = static_cast<const T*>(u.v) + s0 * c.v.row;
        if constexpr (IN_TILES) {
            copy_rows({k, c.k.row, c.k.col}, n, c.dim, reinterpret_cast<BFloat*>(own_keys), 2 * depth);
            copy_rows({v, c.v.row, c.v.col}, n, c.v_dim, reinterpret_cast<BFloat*>(own_values), 2 * v_depth);
            keys = {own_keys, depth, 1}, values = {own_values, v_depth, 1};
        } else if constexpr (PACKED) {
            widen_rows<T, E>({k, c.k.row, c.k.col}, n, c.dim, own_keys, c.dim);
            widen_rows<T, E>({v, c.v.row, c.v.col}, n, c.v_dim, own_values, c.v_dim);
            keys = {own_keys, c.dim, 1}, values = {own_values, c.v_dim, 1};
        } else {
            keys = {k, c.k.row, c.k.col}, values = {v, c.v.row, c.v.col};
        }
        memset(dk, 0, size_t(n * dims * W) * sizeof(E));
        memset(dv, 0, size_t(n * v_dims * W) * sizeof(E));
        for (int64_t j = 0; j < n; j += c.block_k) {
            const int64_t count = least(c.block_k, n - j), number = j / c.block_k;
            odd_keys[number] = !finite_rows<E>(k + j * c.k.row, c.k.row, c.k.col, count, c.dim) ||
                               !finite_rows<E>(v + j * c.v.row, c.v.row, c.v.col, count, c.v_dim);
            if constexpr (S::PIECES > 1)
                pack_key_tiles(S{}, Rowed<T>{k + j * c.k.row, c.k.row, c.k.col}, count, c.dim,
                               key_pieces + j * score_depth * S::PIECES);
            if constexpr (IN_TILES) {
                A* const across = keys_across + number * c.dim * KEY_PAIRS;
                pack_value_pairs({k + j * c.k.row, c.k.row, c.k.col}, count, c.dim, across, KEY_PAIRS);
                for (int64_t x = 0; x < c.dim * KEY_PAIRS && odd_keys[number]; x++)
                    across[x] &= ((across[x] & 0x7f80u) == 0x7f80u ? 0xffff0000u : ~0u) &
                                 ((across[x] & 0x7f800000u) == 0x7f800000u ? 0xffffu : ~0u);
            }
        }
    }

    void close_segment() const {
        write_rows(dk, dims, c.dim, E(c.scale), to.dk, g.dk);
        write_rows(dv, v_dims, c.v_dim, E(1), to.dv, g.dv);
    }
    void write_rows(const E* from, int64_t vectors, int64_t width, E times, void* base,
                    const Strides& s) const {
        for (int64_t j = s0; j < s1; j++, from += vectors * W) {
            if (g.add) {
                E* const row = static_cast<E*>(base) + j * s.row;
                for (int64_t d = 0; d < width; d++) row[d * s.col] += from[d] * times;
            } else {
                T* const row = static_cast<T*>(base) + j * s.row;
                int64_t d = 0;
                if (s.col == 1)
                    for (; d + W <= width; d += W) narrow(row + d, load(from + d) * set<E>(times) + Vec<E>{});
                for (; d < width; d++) put(row + d * s.col, E(from[d] * times + E(0)));
            }
        }
    }

    // ---- the tile ----

    void open_tile(int64_t r0, int64_t rows) {
        const T* const douts = static_cast<const T*>(to.dout);
        lanes.pack(c, u, score_depth);
        pack_rows<T, E>(static_cast<const T*>(u.q), c.q, c.group, r0, rows, c.dim, dims * W, q);
        pack_rows<T, E>(douts, g.dout, c.group, r0, rows, c.v_dim, v_dims * W, dout);
        if constexpr (IN_TILES)
            pack_column_pairs<N>(douts, g.dout, c.group, r0, rows, c.v_dim, v_depth, dout_columns);
        else
            pack_columns<T, E, N>(douts, g.dout, c.group, r0, rows, c.v_dim, dout_columns);
        odd = !all_finite(q, rows * dims * W) || !all_finite(dout, rows * v_dims * W);
        Row row(r0, c.group);
        for (int64_t r = 0; r < rows; r++, row.next()) {
            const E lse = static_cast<const E*>(u.lse)[row.at(c.lse)];
            shift[r] = lse == -INFINITE<E> ? E(0) : lse;
            if (odd && !sees_any<E>(c, u, row)) clear(r);
            delta[r] = output_times_dout(r, row);
            if (to.dlse && lse != -INFINITE<E>) delta[r] -= static_cast<const E*>(to.dlse)[row.at(g.dlse)];
            odd |= !(shift[r] - shift[r] == 0 && delta[r] - delta[r] == 0);
        }
        for (int64_t r = rows; r < N; r++) shift[r] = shift[rows - 1], delta[r] = delta[rows - 1];
        if (odd) {
            clean(q, rows * dims * W, clean_q);
            clean(dout, rows * v_dims * W, clean_dout);
        }
        if constexpr (IN_TILES) {
            pair_rows(odd ? clean_q : q, dims * W, q_pairs);
            pair_rows(odd ? clean_dout : dout, v_dims * W, dout_pairs);
        }
        memset(dq, 0, size_t(c.dim * N) * sizeof(E));
        memset(row_sums, 0, N * sizeof(E));
    }
    // Rows of bf16 numbers as pairs of neighbours, [ROW_PAIRS][pitch], twice: for the halves of what they are
    // multiplied with. Rows that do not exist are 0.
    void pair_rows(const E* x, int64_t pitch, A* pairs) const {
        const int64_t again = ROW_PAIRS * pitch;
        for (int64_t r = 0; r < 2 * ROW_PAIRS; r += 2, pairs += pitch)
            for (int64_t d = 0; d < pitch; d += W) {
                Vec<A> pair{};
                if (r < lanes.rows) pair = bits_as<Vec<A>>(load(x + r * pitch + d)) >> 16;
                if (r + 1 < lanes.rows) pair |= bits_as<Vec<A>>(load(x + (r + 1) * pitch + d));
                store(pairs + d, pair);
                store(pairs + again + d, pair);
            }
    }
    // What a row that sees no key holds does not matter.
    void clear(int64_t r) {
        memset(q + r * dims * W, 0, size_t(dims * W) * sizeof(E));
        memset(dout + r * v_dims * W, 0, size_t(v_dims * W) * sizeof(E));
        for (int64_t d = 0; d < v_depth; d++) dout_columns[d * N + r] = 0;
    }
    E output_times_dout(int64_t r, const Row& row) const {
        const T* const out = static_cast<const T*>(u.out) + row.at(c.out);
        const E* const x = dout + r * v_dims * W;
        Vec<E> sum{};
        int64_t d = 0;
        if (c.out.col == 1)
            for (; d + W <= c.v_dim; d += W) sum = fma(load(x + d), widen(out + d), sum);
        E total = 0;
        for (int i = 0; i < W; i++) total += sum[i];
        for (; d < c.v_dim; d++) total += x[d] * one(out[d * c.out.col]);
        return total;
    }

    // The gradient of each head's sink: −Σ e^(sink − lse) · delta.
    void add_sinks(int64_t r0, int64_t rows) const {
        Row row(r0, c.group);
        for (int64_t r = 0; r < rows; r++, row.next()) {
            const E lse = static_cast<const E*>(u.lse)[row.at(c.lse)];
            const double weight = lse == -INFINITE<E> ? 0 : __builtin_exp(u.sinks[row.head] - double(lse));
            if (weight != 0) to.dsinks[row.head] -= weight * double(delta[r]);
        }
    }

    // Adds what this segment gave to the tile's dq, after the segments before it; the last one writes it.
    void hand_over(int64_t tile, int64_t number, int64_t first, int64_t last) {
        E* sum = dq;
        if (to.sums) {
            sum = static_cast<E*>(to.sums) + tile * c.dim * N;
            int32_t* const turn = to.turns + tile;
            while (__atomic_load_n(turn, __ATOMIC_ACQUIRE) != int32_t(number - first)) {
                if (w.stop(w.context)) return;
                w.relax(w.context);
            }
            if (number == first)
                memcpy(sum, dq, size_t(c.dim * N) * sizeof(E));
            else
                for (int64_t x = 0; x < c.dim * N; x += W) store(sum + x, load(sum + x) + load(dq + x));
        }
        if (number == last) write_dq(sum);
        if (to.sums) __atomic_store_n(to.turns + tile, int32_t(number - first + 1), __ATOMIC_RELEASE);
    }
    void write_dq(const E* from) {
        for (int r = 0; r < N; r++) scale[r] = E(c.scale);
        unpack_columns<T, E, N>(static_cast<T*>(to.dq), g.dq, c.group, lanes.r0, lanes.rows, c.dim, from,
                                scale);
    }

    // ---- the block ----

    void block(int64_t k0, int64_t j0, int64_t j1) {
        const Kind kind = lanes.sight.kind(c, u, lanes.r0, lanes.rows, j0, j1);
        if (kind == Kind::EMPTY) return;
        const int64_t n = j1 - j0, first = j0 - s0;
        // In tiles what is not finite has been taken out already.
        const bool hides = kind == Kind::EDGE || u.bias || IN_TILES;
        const bool careful = hides && (odd || odd_keys[(k0 - s0) / c.block_k]);
        lanes.score_surely(c, u, score_keys(k0 - s0), score_depth, k0, j0, j1, kind, p,
                           capped ? before_bias : nullptr,
                           {static_cast<const T*>(u.k) + k0 * c.k.row, c.k.row, c.k.col});
        weights(n);
        if (careful) {
            lanes.note_seen(c, u, j0, n, seen);
            hide(p, n);
        }
        gradients(first, n);
        if (careful) hide(ds, n);
        if (to.dbias) add_bias(j0, n);
        if (capped) chain_softcap(n);
        if constexpr (IN_TILES) {
            reduce_in_tiles(k0 - s0, first, n);
        } else if (careful) {
            reduce_carefully(first, n);
        } else {
            reduce(keys.from(first, 0), q, dout, first, n);
        }
        if (careful) add_odd(first, n);
    }

    Matrix<S> score_keys(int64_t from) const {
        if constexpr (S::PIECES > 1)
            return {key_pieces + from * score_depth * S::PIECES, 32 * score_depth * S::PIECES};
        else
            return keys.from(from, 0);
    }

    void weights(int64_t n) const {
        Vec<E> less[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { less[i] = load(shift + i * W); });
        for (E *s = p, *end = p + n * N; s < end; s += N)
            each<NR>([&](auto i) TILEFOLD_LAMBDA { store(s + i * W, exp<E>(load(s + i * W) - less[i])); });
    }

    // dS of the scores as they were before the softmax. A weight of 0 has none, whatever it is multiplied
    // with.
    void gradients(int64_t first, int64_t n) const {
        const E* const weight = p;
        E* const result = ds;
        Vec<E> less[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { less[i] = load(delta + i * W); });
        const auto take = [=](int64_t j, auto& acc) TILEFOLD_LAMBDA {
            constexpr int MR = int(sizeof(acc) / sizeof(acc[0]));
            each<MR>([&](auto r) TILEFOLD_LAMBDA {
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    const int64_t at = (j + r) * N + i * W;
                    const Vec<E> x = load(weight + at);
                    store(result + at, select<E>(x == 0, Vec<E>{}, x * (acc[r][i] - less[i])));
                });
            });
        };
        product<K, NR>(values.from(first, 0), dout_columns, v_depth, 0, n, take);
    }

    void chain_softcap(int64_t n) const {
        const Vec<E> cap = set<E>(E(c.softcap));
        for (int64_t at = 0; at < n * N; at += W) {
            const Vec<E> x = load(ds + at), t = load(before_bias + at) / cap;
            store(ds + at, select<E>(x == 0, Vec<E>{}, x * (set<E>(E(1)) - t * t)));
        }
    }

    // What belongs to one element is first added up within the block, or over all keys of the tile: where
    // terms are alike, one chain through all cells of a call errs by a share of as many roundings as it has
    // terms.
    void add_bias(int64_t j0, int64_t n) const {
        if (g.dbias.col == 0) return add_to_row_sums(n);
        E* const base = static_cast<E*>(to.dbias) + j0 * g.dbias.col;
        for (int i = 0; i < NR; i++) {
            const int64_t count = within(lanes.rows - i * W, 0, W);
            int64_t at[W], first[W];
            place_bias(i * W, count, at, first);
            for (int64_t j = 0; j < n; j += W) {
                Vec<E> x[W];
                each<W>([&](auto k) TILEFOLD_LAMBDA {
                    x[k] = j + k < n ? load(ds + (j + k) * N + i * W) : Vec<E>{};
                });
                transpose<E>(x);
                for (int64_t r = 0; r < count; r++)
                    if (first[r] != r) x[first[r]] += x[r];
                for (int64_t r = 0; r < count; r++)
                    if (first[r] == r) add_to_bias(base + at[r] + j * g.dbias.col, x[r], least(W, n - j));
            }
        }
    }

    void add_to_row_sums(int64_t n) const {
        for (int i = 0; i < NR; i++) {
            Vec<E> sum{};
            for (int64_t j = 0; j < n; j += 8) {
                Vec<E> few{};
                for (int64_t k = j; k < least(j + 8, n); k++) few += load(ds + k * N + i * W);
                sum += few;
            }
            store(row_sums + i * W, load(row_sums + i * W) + sum);
        }
    }

    void add_row_sums() const {
        int64_t at[N], first[N];
        place_bias(0, lanes.rows, at, first);
        for (int64_t r = 0; r < lanes.rows; r++)
            if (first[r] != r) row_sums[first[r]] += row_sums[r];
        for (int64_t r = 0; r < lanes.rows; r++)
            if (first[r] == r) static_cast<E*>(to.dbias)[at[r]] += row_sums[r];
    }

    // Where `count` rows of the tile lie in dbias, and the first of them that lies where each does.
    void place_bias(int64_t r0, int64_t count, int64_t* at, int64_t* first) const {
        Row row(lanes.r0 + least(r0, lanes.rows - 1), c.group);
        const bool shared = !g.dbias.row || (!g.dbias.head && c.group > 1);
        for (int64_t r = 0; r < count; r++, row.next()) {
            at[r] = row.at(g.dbias);
            first[r] = shared ? 0 : r;
            while (at[first[r]] != at[r]) first[r]++;
        }
    }

    void add_to_bias(E* to_row, Vec<E> x, int64_t n) const {
        if (n == W && g.dbias.col == 1) {
            store(to_row, load(to_row) + x);
            return;
        }
        E terms[W];
        store(terms, x);
        for (int64_t k = 0; k < n; k++) to_row[k * g.dbias.col] += terms[k];
    }

    // Rows of a product, added to those of `sum`.
    struct Add {
        E* sum;
        template <int MR>
        TILEFOLD_INLINE void operator()(int64_t d, Vec<E> (&acc)[MR][NR]) const {
            each<MR>([&](auto r) TILEFOLD_LAMBDA {
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    E* const at = sum + (d + r) * N + i * W;
                    store(at, load(at) + acc[r][i]);
                });
            });
        }
    };

    // The three sums: over keys into dq, over rows into dk and dv.
    void reduce(Source<A> ks, const E* qs, const E* douts, int64_t first, int64_t n) {
        product<K, NR>(Source<E>{ks.at, ks.step, ks.row}, ds, n, 0, c.dim, Add{dq});
        add_product<K>(Source<E>{p, N, 1}, douts, lanes.rows, 0, n, v_dims, dv + first * v_dims * W);
        add_product<K>(Source<E>{ds, N, 1}, qs, lanes.rows, 0, n, dims, dk + first * dims * W);
    }

    void reduce_in_tiles([[maybe_unused]] int64_t block, [[maybe_unused]] int64_t first,
                         [[maybe_unused]] int64_t n) {
#ifdef TILEFOLD_HAS_TILES
        if constexpr (IN_TILES) {
            halve(n);
            const A* const across = keys_across + block / c.block_k * c.dim * KEY_PAIRS + (first - block) / 2;
            product<K, NR>(Source<A>{across, KEY_PAIRS, 1}, ds_pairs, up(n, 32) / 2, 0, c.dim, Add{dq}, N,
                           KEY_PAIRS * N);
            const int64_t rows = up(n, 16), halves = 2 * ROW_PAIRS;
            add_product<K>(Source<A>{p_halves, halves, 1}, dout_pairs, halves, 0, rows, v_dims,
                           dv + first * v_dims * W);
            add_product<K>(Source<A>{ds_halves, halves, 1}, q_pairs, halves, 0, rows, dims,
                           dk + first * dims * W);
        }
#endif
    }
#ifdef TILEFOLD_HAS_TILES
    // P and dS as sums of two bf16 numbers: by rows of keys, and dS by pairs of keys too.
    void halve(int64_t n) {
        if (lanes.rows < N) clear_padding(n);
        if (n % 2) memset(ds + n * N, 0, size_t(N) * sizeof(E));
        const size_t rest = size_t((up(n, 16) - n) * 2 * ROW_PAIRS) * sizeof(A);
        memset(p_halves + n * 2 * ROW_PAIRS, 0, rest);
        memset(ds_halves + n * 2 * ROW_PAIRS, 0, rest);
        memset(ds_pairs + up(n, 2) / 2 * N, 0, size_t((up(n, 32) - up(n, 2)) / 2 * N) * sizeof(A));
        memset(ds_pairs + (KEY_PAIRS + up(n, 2) / 2) * N, 0,
               size_t((up(n, 32) - up(n, 2)) / 2 * N) * sizeof(A));
        for (int64_t j = 0; j < n; j += 2)
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                halves_of(p, p_halves, j, i);
                if (j + 1 < n) halves_of(p, p_halves, j + 1, i);
                const Half2 even = halves_of(ds, ds_halves, j, i),
                            odd_one = halves_of(ds, ds_halves, j + 1, i);
                A* const to_pairs = ds_pairs + j / 2 * N + i * W;
                store(to_pairs, bits_as<U32>(even.high) >> 16 | bits_as<U32>(odd_one.high));
                store(to_pairs + KEY_PAIRS * N, bits_as<U32>(even.low) >> 16 | bits_as<U32>(odd_one.low));
            });
    }
    struct Half2 {
        F32 high, low;
    };
    TILEFOLD_INLINE Half2 halves_of(const E* from, A* halves, int64_t j, int i) const {
        const F32 x = load(from + j * N + i * W);
        BFloat* const at = reinterpret_cast<BFloat*>(halves + j * 2 * ROW_PAIRS) + i * W;
        const F32 high = narrowed(at, x);
        const F32 low = narrowed(at + N, select<E>(x == high, F32{}, x - high));
        return {high, low};
    }
    void clear_padding(int64_t n) {
        for (int64_t j = 0; j < n; j++)
            for (int64_t r = lanes.rows; r < N; r++) p[j * N + r] = ds[j * N + r] = 0;
    }
#endif

    // ---- a block in which something is hidden and something is not finite ----

    void hide(E* x, int64_t n) const {
        for (int64_t at = 0; at < n * N; at++)
            if (!seen[at]) x[at] = 0;
    }

    void reduce_carefully(int64_t first, int64_t n) {
        const Source<A> ks = keys.from(first, 0);
        for (int64_t j = 0; j < n; j++)
            for (int64_t d = 0; d < c.dim; d++) {
                const E x = ks.at[j * ks.row + d * ks.step];
                clean_keys[j * c.dim + d] = x - x == 0 ? x : E(0);
            }
        reduce({clean_keys, c.dim, 1}, odd ? clean_q : q, odd ? clean_dout : dout, first, n);
    }
    void add_odd(int64_t first, int64_t n) {
        const int64_t rows = lanes.rows;
        const T* const k = static_cast<const T*>(u.k) + (s0 + first) * c.k.row;
        for (int64_t j = 0; j < n; j++)
            for (int64_t d = 0; d < c.dim; d++) {
                const E x = one(k[j * c.k.row + d * c.k.col]);
                if (x - x == 0) continue;
                for (int64_t r = 0; r < rows; r++)
                    if (seen[j * N + r]) dq[d * N + r] += ds[j * N + r] * x;
            }
        if (!odd) return;
        add_odd_rows(q, dims, c.dim, ds, dk + first * dims * W, n);
        add_odd_rows(dout, v_dims, c.v_dim, p, dv + first * v_dims * W, n);
    }
    void add_odd_rows(const E* rows, int64_t vectors, int64_t width, const E* by, E* sum, int64_t n) const {
        for (int64_t r = 0; r < lanes.rows; r++)
            for (int64_t d = 0; d < width; d++) {
                const E x = rows[r * vectors * W + d];
                if (x - x == 0) continue;
                for (int64_t j = 0; j < n; j++)
                    if (seen[j * N + r]) sum[j * vectors * W + d] += by[j * N + r] * x;
            }
    }

    // ---- the piece ----

    void run(const GradPiece& piece) {
        open_segment(piece);
        const int64_t number = piece.segment;
        int64_t tile = 0;
        for (int64_t r0 = piece.r0; r0 < piece.r1; r0 += N, tile++) {
            if (w.stop(w.context)) return;
            const int64_t rows = least(N, piece.r1 - r0);
            lanes.look(c, u, r0, rows);
            const bool none = lanes.sight.last <= lanes.sight.first;
            const int64_t first = none ? 0 : lanes.sight.first / piece.keys,
                          last = none ? 0 : (lanes.sight.last - 1) / piece.keys;
            const bool sinks = number == 0 && to.dsinks;
            if ((number < first || number > last) && !sinks) continue;
            open_tile(r0, rows);
            if (sinks) add_sinks(r0, rows);
            if (number < first || number > last) continue;
            const int64_t j0 = most(s0, lanes.sight.first), j1 = least(s1, lanes.sight.last);
            for (int64_t k0 = s0 + (j0 - s0) / c.block_k * c.block_k; k0 < j1; k0 += c.block_k)
                block(k0, most(k0, j0 / S::KEYS * S::KEYS), least(k0 + c.block_k, j1));
            if (to.dbias && g.dbias.col == 0 && j0 < j1)
                add_row_sums();  // without keys there may be no dbias
            hand_over(tile, number, first, last);
        }
        close_segment();
    }
};

template <class K, class T, class S = K>
void replay_gradient(const Call& c, const Unit& u, const GradCall& g, const GradUnit& to,
                     const GradPiece& piece, Worker& w) {
    Arena a{w.scratch};
#ifdef TILEFOLD_HAS_TILES
    if constexpr (S::IN_TILES) {
        const TileRegisters ours;
        Replay<K, T, S>(c, u, g, to, w, a).run(piece);
        return;
    }
#endif
    Replay<K, T, S>(c, u, g, to, w, a).run(piece);
}

template <class K, class T, class S = K>
int64_t gradient_scratch(const Call& c) {
    static const Unit u{};
    static const GradCall g{};
    static const GradUnit to{};
    Worker w{};
    Arena a{nullptr};
    Replay<K, T, S>(c, u, g, to, w, a);
    return a.bytes;
}

}  // namespace
}  // namespace tilefold
