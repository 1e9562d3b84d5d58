// The only code that knows storage types and layouts. Queries become Qᵀ (lanes are queries), keys and values
// become panels where storage is not already what the microkernel reads, outputs go back to rows.

namespace tilefold {
namespace {

// Rows of keys or values one after another: the first, and the steps.
template <class T>
struct Rowed {
    const T* at;
    int64_t row, col;
    const T* from(int64_t n) const { return at + n * row; }
};

// Key rows k0 … k1 page by page: f(page, its first row that is wanted, how many of them).
template <class F>
TILEFOLD_INLINE void each_page(const Call& c, const Unit& u, int64_t k0, int64_t k1, F&& f) {
    for (int64_t k = k0, n; k < k1; k += n) {
        n = least(c.page - k % c.page, k1 - k);
        f(u.table[k / c.page], k % c.page, n);
    }
}

// One row of codes, `col` elements apart, times its scales, rounded to T.
template <class C, class T>
TILEFOLD_INLINE void decode(const C* from, int64_t col, const float* scale, const Pages& p, int64_t width,
                            T* to) {
    constexpr int W = LANES<float>;
    for (int64_t d = 0; d < width; scale += p.scale.col) {
        const int64_t end = least(d + p.group, width);
#ifdef TILEFOLD_HAS_DECODE
        if constexpr (__is_same(T, BFloat))
            for (; d + 32 <= end && col == 1; d += 32) {
                const auto numbers = decoded(from + d / C::EACH, *scale);
                memcpy(to + d, &numbers, sizeof numbers);
            }
#endif
        if (col == 1)
            for (; d + W <= end; d += W) narrow(to + d, widen(from + d / C::EACH) * set<float>(*scale));
        for (; d < end; d++) put(to + d, one(from[d / C::EACH * col], d % C::EACH) * *scale);
    }
}

// Rows ahead that are asked for while one is decoded: from head to head and page to page no processor
// foresees them.
constexpr int CODES_AHEAD = 16;

// Key rows k0 … k1 of codes as rows of T. Rows of no page are 0; nobody sees them.
template <class C, class T>
__attribute__((noinline)) void decode_rows(const Call& c, const Unit& u, const void* base,
                                           const float* scales, const Strides& s, const Pages& p,
                                           int64_t width, int64_t k0, int64_t k1, T* to) {
    each_page(c, u, k0, k1, [&](int64_t page, int64_t at, int64_t n) {
        if (page < 0) {
            memset(to, 0, size_t(n * width) * sizeof(T));
            to += n * width;
            return;
        }
        const C* row = static_cast<const C*>(base) + page * p.step + at * s.row;
        const float* scale = scales + page * p.scale_step + at * p.scale.row;
        for (int64_t i = 0; i < n; i++, row += s.row, scale += p.scale.row, to += width) {
            const char* const ahead = reinterpret_cast<const char*>(row + CODES_AHEAD * s.row);
            for (int64_t line = 0; line < width / C::EACH; line += 64) __builtin_prefetch(ahead + line);
            decode(row, s.col, scale, p, width, to);
        }
    });
}

// Key rows k0 … k1 of the unit's keys or values: where they lie, if that is one after another; else, from
// pages that lie apart, or where they are codes, copied to `own`. Rows of no page are 0; nobody sees them.
template <class T>
Rowed<T> bring(const Call& c, const Unit& u, const void* base, const float* scales, const Strides& s,
               const Pages& p, int64_t width, int64_t k0, int64_t k1, T* own) {
    const T* const from = static_cast<const T*>(base);
    if (!c.page) return {from + k0 * s.row, s.row, s.col};
    if constexpr (!__is_same(T, double))
        if (is_code(c.kv_type)) {
            const auto rows = c.kv_type == DType::int8            ? decode_rows<Int8, T>
                              : c.kv_type == DType::float8_e4m3fn ? decode_rows<Float8, T>
                                                                  : decode_rows<Int4, T>;
            rows(c, u, base, scales, s, p, width, k0, k1, own);
            return {own, width, 1};
        }
    const int64_t* const table = u.table;
    const int64_t first = k0 / c.page, last = (k1 - 1) / c.page;
    bool apart = table[first] < 0;
    for (int64_t n = first; n < last; n++) apart |= table[n + 1] != table[n] + 1 || p.step != c.page * s.row;
    if (!apart) return {from + table[first] * p.step + k0 % c.page * s.row, s.row, s.col};
    T* to = own;
    each_page(c, u, k0, k1, [&](int64_t page, int64_t at, int64_t n) {
        const T* row = from + page * p.step + at * s.row;
        if (page >= 0 && s.col == 1 && s.row == width) {
            memcpy(to, row, size_t(n * width) * sizeof(T));
            to += n * width;
            return;
        }
        for (int64_t i = 0; i < n; i++, row += s.row, to += width)
            if (page < 0)
                memset(to, 0, size_t(width) * sizeof(T));
            else if (s.col == 1)
                memcpy(to, row, size_t(width) * sizeof(T));
            else
                for (int64_t d = 0; d < width; d++) to[d] = row[d * s.col];
    });
    return {own, width, 1};
}

// The same, of keys and of values.
template <class T>
Rowed<T> bring_keys(const Call& c, const Unit& u, int64_t k0, int64_t k1, T* own) {
    return bring(c, u, u.k, u.k_scale, c.k, c.k_pages, c.dim, k0, k1, own);
}
template <class T>
Rowed<T> bring_values(const Call& c, const Unit& u, int64_t k0, int64_t k1, T* own) {
    return bring(c, u, u.v, u.v_scale, c.v, c.v_pages, c.v_dim, k0, k1, own);
}

// The keys of a unit, or its values.
struct Side {
    const void* base;
    const float* scales;
    const Strides& strides;
    const Pages& pages;
    int64_t width;
};
TILEFOLD_INLINE Side keys_of(const Call& c, const Unit& u) { return {u.k, u.k_scale, c.k, c.k_pages, c.dim}; }
TILEFOLD_INLINE Side values_of(const Call& c, const Unit& u) {
    return {u.v, u.v_scale, c.v, c.v_pages, c.v_dim};
}

// Rows of a block, in groups that lie one after another each.
constexpr int64_t GROUP = 16;
template <class T>
struct Grouped {
    const T* at[SEGMENT / GROUP];
    int64_t row, col;
    const T* from(int64_t n) const { return at[n / GROUP] + n % GROUP * row; }
};

// at(n, page, row of it) for every group of key rows k0 … k1; false where pages do not hold whole groups.
template <class F>
TILEFOLD_INLINE bool each_group(const Call& c, const Unit& u, int64_t k0, int64_t k1, F&& at) {
    if (c.page % GROUP || k0 % GROUP) return false;
    for (int64_t k = k0; k < k1; k += GROUP) {
        const int64_t page = u.table[k / c.page];
        if (page < 0) return false;
        at((k - k0) / GROUP, page, k % c.page);
    }
    return true;
}

// Key rows k0 … k1 of a side: where they lie if each group does, else copied to `own`; so also, where they
// must be `whole`, if their elements lie apart.
template <class T>
void group(const Call& c, const Unit& u, const Side& x, int64_t k0, int64_t k1, T* own, Grouped<T>& to,
           bool whole) {
    const Strides& s = x.strides;
    to.row = s.row, to.col = s.col;
    if (c.page && !is_code(c.kv_type) && (s.col == 1 || !whole) &&
        each_group(c, u, k0, k1, [&](int64_t n, int64_t page, int64_t row) TILEFOLD_LAMBDA {
            to.at[n] = static_cast<const T*>(x.base) + page * x.pages.step + row * s.row;
        }))
        return;
    Rowed<T> rows = bring(c, u, x.base, x.scales, s, x.pages, x.width, k0, k1, own);
    if (whole && rows.col != 1) {
        for (int64_t k = 0; k < k1 - k0; k++)
            for (int64_t d = 0; d < x.width; d++) own[k * x.width + d] = rows.from(k)[d * rows.col];
        rows = {own, x.width, 1};
    }
    to.row = rows.row, to.col = rows.col;
    for (int64_t k = 0; k < k1 - k0; k += GROUP) to.at[k / GROUP] = rows.from(k);
}

// Rows of codes in such groups, and the scales of each row's first dims; steps from row to row in bytes and
// in scales.
struct Coded {
    const char* at[SEGMENT / GROUP];
    const float* scale[SEGMENT / GROUP];
    int64_t row, scale_row;
};
TILEFOLD_INLINE bool codes_in_place(const Call& c, const Unit& u, const Side& x, int64_t k0, int64_t k1,
                                    Coded& to) {
    if (x.strides.col != 1) return false;
    const Pages& p = x.pages;
    to.row = x.strides.row, to.scale_row = p.scale.row;
    return each_group(c, u, k0, k1, [&](int64_t n, int64_t page, int64_t row) TILEFOLD_LAMBDA {
        to.at[n] = static_cast<const char*>(x.base) + page * p.step + row * x.strides.row;
        to.scale[n] = x.scales + page * p.scale_step + row * p.scale.row;
    });
}
// Copies of rows with one scale each that lie in any other way. Rows of no page are 0; nobody sees them.
inline void copy_codes(const Call& c, const Unit& u, const Side& x, int64_t bytes, int64_t k0, int64_t k1,
                       char* own, float* scales, Coded& to) {
    const Pages& p = x.pages;
    to.row = bytes, to.scale_row = 1;
    for (int64_t k = 0; k < k1 - k0; k += GROUP)
        to.at[k / GROUP] = own + k * bytes, to.scale[k / GROUP] = scales + k;
    each_page(c, u, k0, k1, [&](int64_t page, int64_t at, int64_t n) {
        for (int64_t i = at; i < at + n; i++, own += bytes) {
            *scales++ = page < 0 ? 0 : x.scales[page * p.scale_step + i * p.scale.row];
            const char* const row = static_cast<const char*>(x.base) + page * p.step + i * x.strides.row;
            for (int64_t b = 0; b < bytes; b++) own[b] = page < 0 ? char(0) : row[b * x.strides.col];
        }
    });
}

// Query or output row r of a unit, in elements from its start.
TILEFOLD_INLINE int64_t row_at(const Strides& s, int64_t group, int64_t r) { return Row(r, group).at(s); }

// Where W rows of an array lie, from row r0 + i on; lanes beyond `rows` repeat the last one.
template <int W, class T>
TILEFOLD_INLINE void rows_from(T* base, const Strides& s, int64_t group, int64_t r0, int64_t i, int64_t rows,
                               T* (&at)[W]) {
    Row row(r0 + least(i, rows - 1), group);
    for (int r = 0; r < W; r++) {
        at[r] = base + row.at(s);
        if (i + r + 1 < rows) row.next();
    }
}

// Rows r0 … of an array as columns [width][N] of E: Qᵀ. Lanes beyond `rows` repeat the last row.
template <class T, class E, int N>
void pack_columns(const T* base, const Strides& s, int64_t group, int64_t r0, int64_t rows, int64_t width,
                  E* to) {
    constexpr int W = LANES<E>;
    for (int i = 0; i < N; i += W) {
        const T* from[W];
        rows_from<W>(base, s, group, r0, i, rows, from);
        int64_t d = 0;
        if (s.col == 1)
            for (; d + W <= width; d += W) {
                Vec<E> x[W];
                each<W>([&](auto r) TILEFOLD_LAMBDA { x[r] = widen(from[r] + d); });
                transpose<E>(x);
                each<W>([&](auto r) TILEFOLD_LAMBDA { store(to + (d + r) * N + i, x[r]); });
            }
        for (; d < width; d++)
            for (int r = 0; r < W; r++) to[d * N + i + r] = one(from[r][d * s.col]);
    }
}

#ifdef TILEFOLD_HAS_DOT2
// The same in pairs, [pairs][N]; a last odd dim has a partner of 0, and so have dims up to `pairs`.
template <int N>
void pack_column_pairs(const BFloat* base, const Strides& s, int64_t group, int64_t r0, int64_t rows,
                       int64_t width, int64_t pairs, uint32_t* to) {
    constexpr int W = LANES<float>;
    for (int i = 0; i < N; i += W) {
        const BFloat* from[W];
        rows_from<W>(base, s, group, r0, i, rows, from);
        int64_t p = 0;
        if (s.col == 1)
            for (; 2 * (p + W) <= width; p += W) {
                F32 x[W];
                each<W>([&](auto r) TILEFOLD_LAMBDA {
                    x[r] = load(reinterpret_cast<const float*>(from[r] + 2 * p));
                });
                transpose<float>(x);
                each<W>([&](auto r) TILEFOLD_LAMBDA { store(to + (p + r) * N + i, bits_as<U32>(x[r])); });
            }
        for (; p < pairs; p++)
            for (int r = 0; r < W; r++) {
                uint32_t low = 0, high = 0;
                if (2 * p < width) low = from[r][2 * p * s.col].bits;
                if (2 * p + 1 < width) high = from[r][(2 * p + 1) * s.col].bits;
                to[p * N + i + r] = low | high << 16;
            }
    }
}
#endif

// Rows [n][width] of T as rows of E, `pitch` apart.
template <class T, class E>
void widen_rows(const Rowed<T>& rows, int64_t n, int64_t width, E* to, int64_t pitch) {
    constexpr int W = LANES<E>;
    for (int64_t j = 0; j < n; j++, to += pitch) {
        const T* const from = rows.from(j);
        int64_t d = 0;
        if (rows.col == 1)
            for (; d + W <= width; d += W) store(to + d, widen(from + d));
        for (; d < width; d++) to[d] = one(from[d * rows.col]);
    }
}

// Rows of bf16 as they are, `pitch` elements apart, padded with 0.
inline void copy_rows(const Rowed<BFloat>& rows, int64_t n, int64_t width, BFloat* to, int64_t pitch) {
    for (int64_t j = 0; j < n; j++, to += pitch) {
        const BFloat* const from = rows.from(j);
        if (rows.col == 1)
            memcpy(to, from, size_t(width) * sizeof(BFloat));
        else
            for (int64_t d = 0; d < width; d++) to[d] = from[d * rows.col];
        memset(to + width, 0, size_t(pitch - width) * sizeof(BFloat));
    }
}

#ifdef TILEFOLD_HAS_DOT2
// Values [n][width] as pairs of keys by dimension, [width][pitch] of pairs: Vᵀ, so that a row of A is a
// dimension. Keys beyond n count as 0 up to `pitch` pairs.
inline void pack_value_pairs(const Rowed<BFloat>& rows, int64_t n, int64_t width, uint32_t* to,
                             int64_t pitch) {
    constexpr int W = LANES<float>;
    for (int64_t p0 = 0; p0 < pitch; p0 += W) {
        int64_t d = 0;
        if (rows.col == 1 && p0 + W <= pitch)
            for (; d + W <= width; d += W) {
                F32 x[W] = {};
                each<W>([&](auto r) TILEFOLD_LAMBDA {
                    const int64_t key = 2 * (p0 + r);
                    const BFloat* const at = rows.from(key) + d;
                    if (key < n) x[r] = bits_as<F32>(bits_as<U32>(spread(at)));
                    if (key + 1 < n)
                        x[r] = bits_as<F32>(bits_as<U32>(x[r]) | bits_as<U32>(widen(at + rows.row)));
                });
                if (2 * p0 < n) transpose<float>(x);
                each<W>([&](auto r)
                            TILEFOLD_LAMBDA { store(to + (d + r) * pitch + p0, bits_as<U32>(x[r])); });
            }
        for (; d < width; d++)
            for (int64_t p = p0; p < least(p0 + W, pitch); p++) {
                uint32_t low = 0, high = 0;
                if (2 * p < n) low = rows.from(2 * p)[d * rows.col].bits;
                if (2 * p + 1 < n) high = rows.from(2 * p + 1)[d * rows.col].bits;
                to[d * pitch + p] = low | high << 16;
            }
    }
}
#endif

#ifdef TILEFOLD_HAS_TILES
// ---- numbers in P pieces of bf16, in tiles (product_pieces.inl) ----

// Numbers d … d + 15 of a row as floats, 0 beyond the width.
template <class T>
TILEFOLD_INLINE F32 sixteen(const T* row, int64_t col, int64_t d, int64_t width) {
    if (col == 1 && d + 16 <= width) return widen(row + d);
    F32 x{};
    for (int64_t n = 0; n < 16 && d + n < width; n++) x[n] = one(row[(d + n) * col]);
    return x;
}

// Keys [n][width] as A, depth being dims, of which d has d + 16 as its partner; keys beyond n are 0 up to 32.
template <class K, class T>
void pack_key_tiles(K, const Rowed<T>& rows, int64_t n, int64_t width, uint32_t* to) {
    constexpr int P = K::PIECES;
    const int64_t steps = up(width, 32) / 32;
    for (int64_t j = 0; j < up(n, 32); j++) {
        uint32_t* at = to + j / 32 * steps * Tiled<P>::STEP + j % 32 * 16;
        for (int64_t s = 0; s < steps; s++, at += Tiled<P>::STEP) {
            U32 x[P]{};
            if (j < n)
                pair_pieces(sixteen(rows.from(j), rows.col, 32 * s, width),
                            sixteen(rows.from(j), rows.col, 32 * s + 16, width), x);
            each<P>([&](auto i) TILEFOLD_LAMBDA { store(at + i * 2 * A_TILE, x[i]); });
        }
    }
}

// Pairs of two squares of numbers, transposed, as tiles `pitch` apart.
template <int P>
TILEFOLD_INLINE void put_transposed(F32 (&low)[16], F32 (&high)[16], uint32_t* to, int64_t pitch) {
    transpose<float>(low);
    transpose<float>(high);
    each<16>([&](auto r) TILEFOLD_LAMBDA {
        U32 x[P];
        pair_pieces(low[r], high[r], x);
        each<P>([&](auto i) TILEFOLD_LAMBDA { store(to + i * pitch + r * 16, x[i]); });
    });
}

// Query rows, times `scale`, as B to multiply those with: [step][piece][N / 16][16 pairs][16].
template <int N, class K, class T>
void pack_query_tiles(K, Int<N>, const T* base, const Strides& s, int64_t group, int64_t r0, int64_t rows,
                      int64_t width, float scale, uint32_t* to) {
    constexpr int P = K::PIECES;
    const F32 factor = set<float>(scale);
    for (int i = 0; i < N; i += 16) {
        const T* from[16];
        rows_from<16>(base, s, group, r0, i, rows, from);
        uint32_t* at = to + i * 16;
        for (int64_t d = 0; d < width; d += 32, at += P * N * 16) {
            F32 low[16], high[16];
            each<16>([&](auto r) TILEFOLD_LAMBDA {
                low[r] = sixteen(from[r], s.col, d, width) * factor;
                high[r] = sixteen(from[r], s.col, d + 16, width) * factor;
            });
            put_transposed<P>(low, high, at, N * 16);
        }
    }
}

// Values [n][width] as A: rows are dims, depth is keys, of which those beyond n are 0 up to `keys`, a
// multiple of 32. With `clean`, what has no finite pieces is 0 too.
template <class K, class T>
void pack_value_tiles(K, const Rowed<T>& rows, int64_t n, int64_t width, int64_t keys, uint32_t* to,
                      bool clean = false) {
    constexpr int P = K::PIECES;
    const int64_t group = keys / 32 * Tiled<P>::STEP;
    const auto values = [&](int64_t key, int64_t d) TILEFOLD_LAMBDA {
        if (key >= n) return F32{};
        F32 x = sixteen(rows.from(key), rows.col, d, width);
        if (clean)
            for (int i = 0; i < 16; i++) x[i] = has_pieces(x[i]) ? x[i] : 0;
        return x;
    };
    for (int64_t k = 0; k < keys; k += 32)
        for (int64_t d = 0; d < width; d += 16) {
            F32 low[16], high[16];
            each<16>([&](auto r) TILEFOLD_LAMBDA {
                low[r] = values(k + 2 * r, d);
                high[r] = values(k + 2 * r + 1, d);
            });
            put_transposed<P>(low, high, to + d / 32 * group + k / 32 * Tiled<P>::STEP + d % 32 * 16,
                              2 * A_TILE);
        }
}
#endif

// Finished columns [width][N] of E, times `factor` per lane, to rows of T. Zeros are positive: whether one
// was negative may depend on hidden neighbours.
template <class T, class E, int N>
void unpack_columns(T* base, const Strides& s, int64_t group, int64_t r0, int64_t rows, int64_t width,
                    const E* from, const E* factor) {
    constexpr int W = LANES<E>;
    for (int i = 0; i < N && i < rows; i += W) {
        const Vec<E> f = load(factor + i);
        T* to[W];
        rows_from<W>(base, s, group, r0, i, rows, to);
        const int64_t count = least(W, rows - i);
        int64_t d = 0;
        if (s.col == 1)
            for (; d + W <= width; d += W) {
                Vec<E> x[W];
                each<W>([&](auto r) TILEFOLD_LAMBDA { x[r] = load(from + (d + r) * N + i) * f + Vec<E>{}; });
                transpose<E>(x);
                each<W>([&](auto r) TILEFOLD_LAMBDA {
                    if (r < count) narrow(to[r] + d, x[r]);
                });
            }
        for (; d < width; d++)
            for (int r = 0; r < count; r++) put(to[r] + d * s.col, E(from[d * N + i + r] * f[r] + E(0)));
    }
}

}  // namespace
}  // namespace tilefold
