// scale → softcap → bias and ALiBi → mask: the one order of score transforms. Twin of scores.py.
// A hidden score is −inf whatever it was.
// A block without transforms has its scale and its diagonal applied in registers, on the way from the
// product.

namespace tilefold {
namespace {

template <class E>
constexpr E INFINITE = E(__builtin_inf());

// What is subtracted from scores before exp: their maximum, but nothing where nobody has been seen, since
// −inf − (−inf) is NaN. The only place that looks after it.
template <class E>
TILEFOLD_INLINE Vec<E> shift_of(Vec<E> top) {
    return select<E>(top == set<E>(-INFINITE<E>), Vec<E>{}, top);
}

// One number of an array whose type is known only at run time.
template <class E>
TILEFOLD_INLINE E number(const void* p, DType type, int64_t at) {
    switch (type) {
        case DType::float16:
            return E(one(static_cast<const Half*>(p)[at]));
        case DType::bfloat16:
            return E(one(static_cast<const BFloat*>(p)[at]));
        case DType::float32:
            return E(static_cast<const float*>(p)[at]);
        default:
            return E(static_cast<const double*>(p)[at]);
    }
}

// Whether E holds `distance` and the n whole numbers below it as they are.
template <class E>
TILEFOLD_INLINE bool holds(int64_t distance, int64_t n) {
    constexpr int64_t MOST = int64_t(1) << (sizeof(E) == 4 ? 24 : 53);
    return distance <= MOST && distance >= n - MOST;
}

// Brings the biases of a block of keys near, some rows at a time, while its products are computed: rows lie
// too far apart for the processor to guess.
class Ahead {
   public:
    Ahead(const Call& c, const Unit& u, int64_t r0, int64_t rows, int64_t j0, int64_t j1, int strip)
        : row_(r0, c.group),
          strides_(c.bias),
          width_(width(c.bias_type)),
          at_(static_cast<const char*>(u.bias) + j0 * width_),
          bytes_((j1 - j0) * width_),
          left_(u.bias && c.bias.col == 1 ? rows : 0),
          at_once_((rows * strip + j1 - j0 - 1) / (j1 - j0)) {}

    // Called once for every `strip` keys.
    TILEFOLD_INLINE void step() {
        for (int64_t n = least(at_once_, left_); n > 0; n--, left_--, row_.next())
            for (int64_t b = 0; b < bytes_; b += 64)
                __builtin_prefetch(at_ + row_.at(strides_) * width_ + b, 0, 2);
    }

   private:
    Row row_;
    const Strides strides_;
    const int64_t width_;
    const char* const at_;
    const int64_t bytes_;
    int64_t left_;
    const int64_t at_once_;
};

// The biases of W lanes for W keys: x[r] holds lane r, key by key; only `keys` of them exist.
template <class E>
void load_bias(Vec<E> (&x)[LANES<E>], const Call& c, const int64_t* at, const void* bias, int64_t j,
               int64_t keys) {
    constexpr int W = LANES<E>;
    const bool whole = keys >= W && c.bias.col == 1;
    for (int r = 0; r < W; r++) {
        const int64_t from = at[r] + j * c.bias.col;
        if constexpr (sizeof(E) == 4) {
            if (whole && c.bias_type == DType::float32) {
                x[r] = load(static_cast<const float*>(bias) + from);
                continue;
            }
            if (whole && c.bias_type == DType::bfloat16) {
                x[r] = widen(static_cast<const BFloat*>(bias) + from);
                continue;
            }
            if (whole && c.bias_type == DType::float16) {
                x[r] = widen(static_cast<const Half*>(bias) + from);
                continue;
            }
        } else if (whole && c.bias_type == DType::float64) {
            x[r] = load(static_cast<const double*>(bias) + from);
            continue;
        }
        for (int k = 0; k < W; k++)
            x[r][k] = k < keys ? number<E>(bias, c.bias_type, from + k * c.bias.col) : E(0);
    }
}

// Whether single cells are visible, as masks of W lanes for W keys: x[r] holds lane r, key by key.
template <class E>
void load_cells(Vec<E> (&x)[LANES<E>], const Call& c, const Unit& u, const int64_t* query, const int64_t* at,
                int64_t j, int64_t keys) {
    constexpr int W = LANES<E>;
    using M = Mask<E>;
    for (int r = 0; r < W; r++) {
        M seen = M{} - 1;
        if (u.bits) {
            const int64_t first = j - c.bits_start;
            const uint8_t* row = u.bits + (query[r] - u.first_row) * c.bits_bytes;
            uint32_t word = 0;
            // A block may begin before the first bit: kernels take keys in multiples.
            for (int64_t byte = first >> 3, n = 0; n < 4 && byte + n < c.bits_bytes; n++)
                if (byte + n >= 0) word |= uint32_t(row[byte + n]) << (8 * n);
            word >>= first & 7;
            M bit{};
            for (int k = 0; k < W; k++) bit[k] = 1 << k;
            seen = ((M{} + typename Float<E>::Integer(word)) & bit) != 0;
        }
        if (u.cells) {
            M cell{};
            for (int k = 0; k < W && k < keys; k++) cell[k] = u.cells[at[r] + (j + k) * c.cells.col];
            seen &= cell != 0;
        }
        x[r] = bits_as<Vec<E>>(seen);
    }
}

// Whether single cells show key j to a query row.
inline bool shows(const Call& c, const Unit& u, const Row& row, int64_t j) {
    const int64_t bit = j - c.bits_start;  // a block may begin before the first one
    if (u.bits &&
        (bit < 0 || !(u.bits[(row.query - u.first_row) * c.bits_bytes + (bit >> 3)] >> (bit & 7) & 1)))
        return false;
    return !u.cells || u.cells[row.at(c.cells) + j * c.cells.col];
}

// Whether a query row sees key j; slow, for the few times that scores cannot tell.
template <class E>
bool sees(const Call& c, const Unit& u, const Row& row, int64_t j) {
    const int64_t spans = u.lo ? c.spans : 1;
    bool covered = false;
    for (int64_t n = 0; n < spans && !covered; n++) {
        int64_t lo, hi;
        if (u.lo)
            Sight<1>::span(row.query, n, c, u, lo, hi);
        else
            band_of(u, row.query, lo, hi);
        covered = lo <= j && j < hi;
    }
    if (!covered || !shows(c, u, row, j)) return false;
    return !u.bias || number<E>(u.bias, c.bias_type, row.at(c.bias) + j * c.bias.col) != -INFINITE<E>;
}

// Whether it sees any key at all: asked only where no score was above −inf.
template <class E>
bool sees_any(const Call& c, const Unit& u, const Row& row) {
    Sight<1> sight;
    sight.look(c, u, row.query * c.group + row.head, 1);
    for (int64_t j = sight.lo[0]; j < sight.hi[0]; j++)
        if (sees<E>(c, u, row, j)) return true;
    return false;
}

// Transforms the scaled products s[key][N] of keys j0 … j1 in place, one vector of lanes at a time; `top`
// takes each lane's maximum. `edge` says whether spans must be tested; `capped_to` may take what the softcap
// gave.
template <class K, class E, int NR>
void finish_scores(const Call& c, const Unit& u, const Sight<NR * LANES<E>>& sight, int64_t r0, int64_t rows,
                   int64_t j0, int64_t j1, bool edge, E* s, Vec<E> (&top)[NR], E* capped_to) {
    constexpr int W = LANES<E>, N = NR * W;
    using M = Mask<E>;
    const Vec<E> none = set<E>(-INFINITE<E>), cap = set<E>(E(c.softcap));
    const Vec<E> lost = set<E>(E(__builtin_nan("")));  // one NaN like another
    const bool singles = u.bits || u.cells, capped = c.softcap != NO_SOFTCAP;
    bool near = true;  // distances are differences in E; those that it does not hold are rounded one by one
    const bool only_bias = u.bias && !capped && !u.alibi && !singles && !edge;
    const int64_t spans = edge ? (u.lo ? c.spans : 1) : 0;
    for (int v = 0; v < NR; v++) {
        int64_t query[W], bias_at[W], cells_at[W];
        Vec<E> slope{}, at{};
        Row each_row(r0 + least(v * W, rows - 1), c.group);
        for (int k = 0; k < W; k++) {  // what nobody asks for is not worked out: this is a tenth of the time
            query[k] = each_row.query;
            if (u.bias) bias_at[k] = each_row.at(c.bias);
            if (singles) cells_at[k] = each_row.at(c.cells);
            if (u.alibi) {
                slope[k] = E(u.alibi[each_row.head]);
                at[k] = E(each_row.query + u.band.offset - j0);
                near &= holds<E>(each_row.query + u.band.offset - j0, c.block_k);
            }
            if (v * W + k + 1 < rows) each_row.next();
        }
        for (int64_t j = j0; j < j1; j += W) {
            const int64_t keys = least(W, j1 - j);
            if ((j - j0) % 32 == 0) K::stay_awake();
            Vec<E> bias[W], cells[W];
            M seen[W];
            if (u.bias) {
                load_bias<E>(bias, c, bias_at, u.bias, j, keys);
                transpose<E>(bias);
            }
            if (singles) {
                load_cells<E>(cells, c, u, query, cells_at, j, keys);
                transpose<E>(cells);
            }
            if (edge)
                for (int k = 0; k < W; k++) seen[k] = M{};
            for (int64_t n = 0; n < spans; n++) {
                M lo, hi;
                for (int k = 0; k < W; k++) {
                    int64_t a = sight.lo[v * W + k], b = sight.hi[v * W + k];
                    if (u.lo) Sight<N>::span(query[k], n, c, u, a, b);
                    lo[k] = typename Float<E>::Integer(within(a - j, 0, W));
                    hi[k] = typename Float<E>::Integer(within(b - j, 0, W));
                }
                for (int k = 0; k < W; k++) seen[k] |= (lo <= k) & (hi > k);
            }
            E* row = s + (j - j0) * N + v * W;
            if (only_bias) {
                M odd{};
                const auto add = [&](int64_t k, Vec<E>& highest) TILEFOLD_LAMBDA {
                    const Vec<E> x = load(row + k * N) + bias[k];
                    odd |= x != x;
                    highest = max(x, highest);
                    store(row + k * N, x);
                };
                Vec<E> other[3] = {top[v], top[v], top[v]};  // keys would wait for one another's maximum
                int64_t k = 0;
                for (; k + 4 <= keys; k += 4) {
                    add(k, top[v]);
                    each<3>([&](auto i) TILEFOLD_LAMBDA { add(k + 1 + i, other[i]); });
                }
                for (; k < keys; k++) add(k, top[v]);
                each<3>([&](auto i) TILEFOLD_LAMBDA { top[v] = max(other[i], top[v]); });
                // A hidden score is −inf now, or NaN if it was NaN or +inf.
                for (int64_t k = 0; k < keys && any(odd); k++) {
                    const Vec<E> x = load(row + k * N);
                    store(row + k * N, select<E>(x == x, x, select<E>(bias[k] == none, none, lost)));
                }
                continue;
            }
            for (int64_t k = 0; k < keys; k++, row += N) {
                Vec<E> x = load(row);
                if (capped) x = cap * tanh<E>(x / cap);
                if (capped_to) store(capped_to + (row - s), x);
                M hidden{};
                if (u.bias) {
                    hidden = bias[k] == none;
                    x += bias[k];
                }
                if (u.alibi) {
                    Vec<E> far = at - set<E>(E(j - j0 + k));
                    for (int n = 0; n < W && !near; n++) far[n] = E(query[n] + u.band.offset - j - k);
                    x -= slope * max(far, -far);
                }
                x = select<E>(x == x, x, lost);
                if (singles) hidden |= ~bits_as<M>(cells[k]);
                if (edge) hidden |= ~seen[k];
                x = select<E>(hidden, none, x);
                top[v] = max(x, top[v]);
                store(row, x);
            }
        }
    }
}

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

// The query rows of a tile, as lanes of NR vectors, and their scores.
template <class K, class T, int NR>
struct Lanes {
    using E = typename K::E;
    using A = typename K::A;
    static constexpr int W = LANES<E>, N = NR * W;

    int64_t r0, rows;
    Sight<N> sight;
    A* queries;  // Qᵀ, [depth][N]; in pieces times the scale, as pack_query_tiles gives it

    void lay_out_queries(int64_t depth, Arena& a) { queries = a.template take<A>(depth * K::PIECES * N); }

    void look(const Call& c, const Unit& u, int64_t r0_, int64_t rows_) {
        r0 = r0_, rows = rows_;
        sight.look(c, u, r0, rows);
    }
    void pack(const Call& c, const Unit& u, [[maybe_unused]] int64_t depth) {
        if constexpr (K::PIECES > 1)
            return pack_query_tiles(K{}, Int<N>{}, static_cast<const T*>(u.q), c.q, c.group, r0, rows, c.dim,
                                    K::SCALED ? E(c.scale) : E(1), queries);
        if constexpr (K::PAIR == 1)
            pack_columns<T, E, N>(static_cast<const T*>(u.q), c.q, c.group, r0, rows, c.dim, queries);
#ifdef TILEFOLD_HAS_DOT2
        else if constexpr (K::PIECES == 1)
            pack_column_pairs<N>(static_cast<const T*>(u.q), c.q, c.group, r0, rows, c.dim, depth, queries);
#endif
    }

    // Keys that are multiplied at a time.
    static constexpr int AT_ONCE = K::PIECES > 1 ? 32 : STRIP;

    // take(key of the block, acc) for the products of keys j0 … j1, strip by strip; meanwhile() is called
    // every AT_ONCE keys. Where K multiplies pieces, products lie in `s` too, and those that are not finite
    // are made again if `raw` has the rows of the block.
    template <class Meanwhile, class Take>
    TILEFOLD_INLINE void multiply([[maybe_unused]] const Call& c, [[maybe_unused]] const Unit& u,
                                  Matrix<K> keys, int64_t depth, int64_t j0, int64_t j1,
                                  [[maybe_unused]] E* s, [[maybe_unused]] const Rowed<T>* raw,
                                  Meanwhile&& meanwhile, Take&& take) const {
        if constexpr (K::PIECES == 1) {
            product<K, NR>(keys, queries, depth, j0, j1, [&](int64_t j, auto& acc) TILEFOLD_LAMBDA {
                meanwhile();
                take(j, acc);
            });
        } else {
            for (int64_t j = j0; j < j1; j += AT_ONCE) {
                meanwhile();
                multiply_rows<K, NR, true>(keys.from(j, 0), queries, depth, least(AT_ONCE, j1 - j),
                                           s + j * N);
            }
            if (raw)
                for (int64_t j = j0; j < j1; j++)
                    for (int r = 0; r < N; r++) {
                        E& x = s[j * N + r];
                        if (x - x != 0) x = product_of(c, u, r, raw->from(j), raw->col);
                    }
            each_strip<NR>(s + j0 * N, j0, j1, take);
        }
    }

    // One scaled product, as a chain of multiply-adds over the dims.
    E product_of(const Call& c, const Unit& u, int r, const T* key, int64_t col) const {
        const T* const q = static_cast<const T*>(u.q) + row_at(c.q, c.group, r0 + least(r, rows - 1));
        E sum = 0;
        for (int64_t d = 0; d < c.dim; d++) sum = __builtin_fma(one(key[d * col]), one(q[d * c.q.col]), sum);
        return K::SCALED ? sum * E(c.scale) : sum;
    }

    static TILEFOLD_INLINE Vec<E> scaled(Vec<E> x, Vec<E> scale) {
        if constexpr (K::SCALED)
            return x;
        else
            return x * scale;
    }

    // Scores of keys j0 … j1 into scores[j − j0][N]; raises `top`. `keys` stand at key k0. `capped` takes the
    // scores after the softcap, where there is one; `raw` as multiply() wants it.
    void score(const Call& c, const Unit& u, Matrix<K> keys, int64_t depth, int64_t k0, int64_t j0,
               int64_t j1, Kind kind, E* scores, Vec<E> (&top)[NR], E* capped = nullptr,
               const Rowed<T>* raw = nullptr) const {
        const bool plain = c.softcap == NO_SOFTCAP && !u.bias && !u.alibi && !sight.holes;
        const bool edge = kind == Kind::EDGE;
        E* const s = scores - (j0 - k0) * N;  // by key of the block
        const Vec<E> scale = set<E>(E(c.scale)), none = set<E>(-INFINITE<E>);
        if (!plain) {
            Ahead ahead(c, u, r0, rows, j0, j1, AT_ONCE);
            const auto keep = [&](int64_t j, auto& acc) TILEFOLD_LAMBDA {
                constexpr int MR = int(sizeof(acc) / sizeof(acc[0]));
                E* const to = s + j * N;
                if constexpr (!K::SCALED)
                    each<MR>([&](auto r) TILEFOLD_LAMBDA {
                        each<NR>([&](auto i)
                                     TILEFOLD_LAMBDA { store(to + r * N + i * W, acc[r][i] * scale); });
                    });
            };
            multiply(
                c, u, keys, depth, j0 - k0, j1 - k0, s, raw, [&]() TILEFOLD_LAMBDA { ahead.step(); }, keep);
            finish_scores<K, E, NR>(c, u, sight, r0, rows, j0, j1, edge, scores, top, capped);
            return;
        }
        Mask<E> lo[NR]{}, hi[NR]{};  // relative to the block
        int64_t full0 = k0, full1 = j1;
        if (edge) {
            for (int r = 0; r < N; r++) {
                lo[r / W][r % W] = typename Float<E>::Integer(within(sight.lo[r] - k0, 0, c.block_k));
                hi[r / W][r % W] = typename Float<E>::Integer(within(sight.hi[r] - k0, 0, c.block_k));
            }
            full0 = sight.full_first, full1 = sight.full_last;
        }
        Vec<E> highest[NR];  // copies that stores cannot alias, so that they may stay in registers
        each<NR>([&](auto i) TILEFOLD_LAMBDA { highest[i] = top[i]; });
        const auto finish = [&](int64_t j, auto& acc) TILEFOLD_LAMBDA {
            constexpr int MR = int(sizeof(acc) / sizeof(acc[0]));
            E* const to = s + j * N;
            if (__builtin_expect(k0 + j < full0 || k0 + j + MR > full1, 0)) {
                each<MR>([&](auto r) TILEFOLD_LAMBDA {
                    const Mask<E> at = Mask<E>{} + typename Float<E>::Integer(j + r);
                    each<NR>([&](auto i) TILEFOLD_LAMBDA {
                        const Vec<E> x =
                            select<E>((lo[i] <= at) & (hi[i] > at), scaled(acc[r][i], scale), none);
                        highest[i] = max(x, highest[i]);
                        store(to + r * N + i * W, x);
                    });
                });
                return;
            }
            Vec<E> strip_top[NR];  // a chain of its own: through `highest` strips would wait for one another
            each<MR>([&](auto r) TILEFOLD_LAMBDA {
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    const Vec<E> x = scaled(acc[r][i], scale);
                    if constexpr (!K::SCALED) store(to + r * N + i * W, x);
                    if constexpr (r == 0)
                        strip_top[i] = x;
                    else
                        strip_top[i] = max(x, strip_top[i]);
                });
            });
            each<NR>([&](auto i) TILEFOLD_LAMBDA { highest[i] = max(strip_top[i], highest[i]); });
        };
        multiply(c, u, keys, depth, j0 - k0, j1 - k0, s, raw, []() TILEFOLD_LAMBDA {}, finish);
        each<NR>([&](auto i) TILEFOLD_LAMBDA { top[i] = highest[i]; });
    }

    // The same where nobody looks at what comes of it: products that the pieces of numbers do not give are
    // made from the rows of the block.
    void score_surely(const Call& c, const Unit& u, Matrix<K> keys, int64_t depth, int64_t k0, int64_t j0,
                      int64_t j1, Kind kind, E* scores, E* capped, const Rowed<T>& raw) const {
        Vec<E> top[NR]{};
        score(c, u, keys, depth, k0, j0, j1, kind, scores, top, capped);
        if constexpr (K::PIECES > 1) {
            Mask<E> odd{};
            for (const E *s = scores, *end = scores + (j1 - j0) * N; s < end; s += W)
                odd |= load(s) != load(s);
            if (any(odd)) score(c, u, keys, depth, k0, j0, j1, kind, scores, top, capped, &raw);
        }
    }

    // Which lanes see which of the keys from j0 on, [keys][N].
    void note_seen(const Call& c, const Unit& u, int64_t j0, int64_t keys, uint8_t* seen) const {
        Row row(r0, c.group);
        for (int r = 0; r < N; r++) {
            for (int64_t k = 0; k < keys; k++) seen[k * N + r] = sees<E>(c, u, row, j0 + k);
            if (r + 1 < rows) row.next();
        }
    }
};

}  // namespace
}  // namespace tilefold
