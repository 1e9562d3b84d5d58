// Sweep two on one machine, for everything that pools finished weights over query rows: twin of the taps over
// keys in taps.py.
//
// A piece is one segment of the keys of one query head; tiles of query rows pass through it, up to MOST_TILES
// at a time, block by block. Per score: 2·dim flops and 14 vector operations (subtract, 11 of exp or 8, load,
// store), then a load and an addition for each pool and each map. A pool keeps one sum per key and lane, in
// the second cache; lanes are added in double once in FLUSH groups of tiles, so that no chain of additions
// is longer than FLUSH · MOST_TILES. A map's bin within a block is summed down the keys first, lanes apart,
// so what its rows cost does not count.
//
// The piece in which a bin of a map begins adds to it; what later segments hold of it they lay aside, and
// taps.cpp adds that in order. So no two pieces write one number, and bits do not depend on threads.

namespace tilefold {
namespace {

constexpr int FLUSH = 8;

template <class K, class T>
struct Taps {
    using E = typename K::E;
    using A = typename K::A;
    static constexpr int NR = K::WIDE, W = LANES<E>, N = NR * W;

    const Call& c;
    const Unit& u;
    const KeyTaps& taps;
    Desk<K, T> desk;
    E *sums, *shift;  // [pools][segment][W]; [N]
    int32_t* bins;    // of a tile's rows, [maps][N]
    Lanes<K, T, NR> lanes[MOST_TILES];
    E* factors;  // [tiles][pools][N]
    int64_t s0 = 0, s1 = 0;

    Taps(const Call& c_, const Unit& u_, const KeyTaps& taps_, Worker& w, Arena& a)
        : c(c_), u(u_), taps(taps_), desk(c_, u_, w, a) {
        sums = a.template take<E>(taps.pools * SEGMENT * W);
        shift = a.template take<E>(MOST_TILES * N);
        bins = a.template take<int32_t>(MOST_TILES * taps.maps * N);
        factors = a.template take<E>(MOST_TILES * taps.pools * N);
        for (auto& tile : lanes) tile.lay_out_queries(desk.depth, a);
    }

    // ---- the tile ----

    // Whether anybody asks for these rows.
    bool wanted(int64_t r0, int64_t rows) const {
        bool some = taps.maps > 0;
        for (int n = 0; n < taps.pools; n++) {
            if (!taps.pool[n].factors) return true;
            for (int64_t r = r0; r < r0 + rows && !some; r++) some = taps.pool[n].factors[r] != 0;
        }
        for (int n = 0; n < taps.cells; n++)
            for (int64_t r = r0; r < r0 + rows && !some; r++) some = taps.cell[n].slots[r] >= 0;
        return some;
    }

    void open(int n, int64_t r0, int64_t rows) {
        lanes[n].look(c, u, r0, rows);
        lanes[n].pack(c, u, desk.depth);
        for (int64_t r = 0; r < N; r++) {
            // Beyond every score, a shift leaves nothing of what padding lanes repeat.
            const E lse = r < rows ? static_cast<const E*>(u.lse)[(r0 + r) * c.lse.row] : INFINITE<E>;
            shift[n * N + r] = lse == -INFINITE<E> ? E(0) : lse;
            for (int p = 0; p < taps.pools; p++) {
                const double* const of = taps.pool[p].factors;
                factors[(n * taps.pools + p) * N + r] = r >= rows ? E(0) : of ? E(of[r0 + r]) : E(1);
            }
            for (int m = 0; m < taps.maps; m++)
                bins[(n * taps.maps + m) * N + r] =
                    r < rows ? int32_t(bin_of(taps.map[m].row_ends, taps.map[m].rows, r0 + r)) : -1;
        }
    }

    // Of `count` bins with ends[0] = 0, the one that holds i: the last that begins at or before it.
    static int64_t bin_of(const int64_t* ends, int64_t count, int64_t i) {
        int64_t lo = 0, hi = count;
        while (hi - lo > 1) {
            const int64_t middle = (lo + hi) / 2;
            (ends[middle] <= i ? lo : hi) = middle;
        }
        return lo;
    }

    // ---- the block ----

    void block(int n, int64_t k0) {
        const Lanes<K, T, NR>& tile = lanes[n];
        const int64_t j0 = most(k0, most(s0, tile.sight.first) / K::KEYS * K::KEYS);
        const int64_t j1 = least(k0 + c.block_k, least(s1, tile.sight.last));
        if (j0 >= j1) return;
        const Kind kind = tile.sight.kind(c, u, tile.r0, tile.rows, j0, j1);
        if (kind == Kind::EMPTY) return;
        const Block<K> b = desk.block(k0, least(k0 + c.block_k, u.kv_len));
        if constexpr (K::PIECES > 1) desk.bring_rows(k0, least(k0 + c.block_k, u.kv_len));
        tile.score_surely(c, u, b.keys, desk.depth, k0, j0, j1, kind, desk.scores, nullptr, desk.k);
        weigh(shift + n * N, j1 - j0);
        for (int p = 0; p < taps.pools; p++) add_to_pool(n, p, j0, j1 - j0);
        for (int m = 0; m < taps.maps; m++) add_to_map(n, m, j0, j1);
        for (int x = 0; x < taps.cells; x++) copy_cells(tile, taps.cell[x], j0, j1);
    }

    void weigh(const E* less_by, int64_t keys) const {
        Vec<E> less[NR];
        bool odd = false;
        each<NR>([&](auto i)
                     TILEFOLD_LAMBDA { less[i] = load(less_by + i * W), odd |= any(less[i] != less[i]); });
        E* const end = desk.scores + keys * N;
        if (odd)  // a row that is NaN has no say over keys it does not see
            for (E* s = desk.scores; s < end; s += N)
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    const Vec<E> x = load(s + i * W);
                    store(s + i * W, select<E>(x == set<E>(-INFINITE<E>), Vec<E>{}, exp<E>(x - less[i])));
                });
        else
            for (E* s = desk.scores; s < end; s += N)
                each<NR>([&](auto i)
                             TILEFOLD_LAMBDA { store(s + i * W, exp<E>(load(s + i * W) - less[i])); });
    }

    void add_to_pool(int n, int which, int64_t j0, int64_t keys) const {
        const KeyPool& pool = taps.pool[which];
        E* to = sums + (which * SEGMENT + j0 - s0) * W;
        const E* p = desk.scores;
        const E* const end = p + keys * N;
        if (pool.highest) {
            for (; p < end; p += N, to += W) {
                Vec<E> top = load(to);
                each<NR>([&](auto i) TILEFOLD_LAMBDA { top = highest(load(p + i * W), top); });
                store(to, top);
            }
        } else if (!pool.factors) {
            for (; p < end; p += N, to += W) {
                Vec<E> sum = load(p);
                each<NR - 1>([&](auto i) TILEFOLD_LAMBDA { sum += load(p + (i + 1) * W); });
                store(to, load(to) + sum);
            }
        } else {
            Vec<E> factor[NR];
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                factor[i] = load(factors + (n * taps.pools + which) * N + i * W);
            });
            for (; p < end; p += N, to += W) {
                Vec<E> sum{};
                each<NR>([&](auto i) TILEFOLD_LAMBDA {  // a row that does not count may be NaN
                    sum += select<E>(factor[i] == Vec<E>{}, Vec<E>{}, load(p + i * W) * factor[i]);
                });
                store(to, load(to) + sum);
            }
        }
    }
    // NaN is higher than anything.
    static TILEFOLD_INLINE Vec<E> highest(Vec<E> x, Vec<E> top) {
        return select<E>((x > top) | (x != x), x, top);
    }
    static double highest(double x, double top) { return x > top || x != x ? x : top; }

    void add_to_map(int n, int which, int64_t j0, int64_t j1) const {
        const MapPool& map = taps.map[which];
        const int32_t* const row_bins = bins + (n * taps.maps + which) * N;
        int64_t col = bin_of(map.col_ends, map.cols, j0);
        for (int64_t j = j0; j < j1; col++) {
            while (map.col_ends[col + 1] <= j) col++;  // bins may be empty
            const int64_t stop = least(map.col_ends[col + 1], j1);
            E found[N];
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                Vec<E> pooled{};
                const E* p = desk.scores + (j - j0) * N + i * W;
                if (map.highest)
                    for (int64_t k = j; k < stop; k++, p += N) pooled = highest(load(p), pooled);
                else
                    for (int64_t k = j; k < stop;) {  // a few at a time: one chain of like terms errs one way
                        Vec<E> few{};
                        for (const int64_t end = least(k + 8, stop); k < end; k++, p += N) few += load(p);
                        pooled += few;
                    }
                store(found + i * W, pooled);
            });
            // What began before this segment is another's to write to.
            const bool own = map.col_ends[col] >= s0;
            double* const to = own ? map.to + col : map.aside + s0 / SEGMENT * map.rows;
            const int64_t step = own ? map.cols : 1;
            for (int64_t r = 0; r < lanes[n].rows;) {
                const int32_t row = row_bins[r];
                double pooled = 0;
                for (; r < lanes[n].rows && row_bins[r] == row; r++)
                    pooled = map.highest ? highest(double(found[r]), pooled) : pooled + double(found[r]);
                double& cell = to[row * step];
                cell = map.highest ? highest(pooled, cell) : cell + pooled;
            }
            j = stop;
        }
    }

    void copy_cells(const Lanes<K, T, NR>& tile, const CellPool& cell, int64_t j0, int64_t j1) const {
        const int64_t first = most(j0, cell.k0), last = least(j1, cell.k1);
        for (int64_t r = 0; r < tile.rows; r++) {
            const int64_t slot = cell.slots[tile.r0 + r];
            if (slot < 0) continue;
            E* const to = static_cast<E*>(cell.to) + slot * cell.pitch;
            for (int64_t j = first; j < last; j++) to[j - cell.k0] = desk.scores[(j - j0) * N + r];
        }
    }

    // ---- the piece ----

    void flush() const {
        for (int p = 0; p < taps.pools; p++) {
            E* const from = sums + p * SEGMENT * W;
            double* const to = taps.pool[p].to + s0;
            for (int64_t j = 0; j < s1 - s0; j++) {
                double pooled = 0;
                for (int i = 0; i < W; i++)
                    pooled = taps.pool[p].highest ? highest(double(from[j * W + i]), pooled)
                                                  : pooled + double(from[j * W + i]);
                to[j] = taps.pool[p].highest ? highest(pooled, to[j]) : to[j] + pooled;
            }
        }
        clear();
    }
    void clear() const { memset(sums, 0, size_t(taps.pools * SEGMENT * W) * sizeof(E)); }

    void run(const TapPiece& piece) {
        s0 = piece.segment * SEGMENT, s1 = least(s0 + SEGMENT, u.kv_len);
        clear();
        int64_t groups = 0;
        for (int64_t r0 = piece.r0; r0 < piece.r1;) {
            if (desk.w.stop(desk.w.context)) return;
            int count = 0;
            for (; r0 < piece.r1 && count < MOST_TILES; r0 += N) {
                const int64_t rows = least(N, piece.r1 - r0);
                if (!wanted(r0, rows)) continue;
                lanes[count].look(c, u, r0, rows);
                if (lanes[count].sight.last > s0 && lanes[count].sight.first < s1) open(count++, r0, rows);
            }
            for (int64_t k0 = s0 / c.block_k * c.block_k; k0 < s1 && count; k0 += c.block_k)
                for (int n = 0; n < count; n++) block(n, k0);
            if (++groups % FLUSH == 0) flush();
        }
        flush();
    }
};

template <class K, class T>
void tap_weights(const Call& c, const Unit& u, const KeyTaps& taps, const TapPiece& piece, Worker& w) {
    Arena a{w.scratch};
#ifdef TILEFOLD_HAS_TILES
    if constexpr (K::IN_TILES) {
        const TileRegisters ours;
        Taps<K, T>(c, u, taps, w, a).run(piece);
        return;
    }
#endif
    Taps<K, T>(c, u, taps, w, a).run(piece);
}

template <class K, class T>
int64_t tap_scratch(const Call& c, const KeyTaps& taps) {
    static const Unit u{};
    Worker w{};
    Arena a{nullptr};
    Taps<K, T>(c, u, taps, w, a);
    return a.bytes;
}

}  // namespace
}  // namespace tilefold
