// The two products of few rows where the machine multiplies tiles in silicon. Vectors need 110 cycles per key
// of 128 dims and four rows (shuffles, and a sum of its own for even and odd elements), more than memory
// takes; tiles need 20 for both, and some 30 more go by until keys and values have come from the second
// cache. Scores: sixteen keys as they lie are A, queries are columns of B, four groups of keys at once.
// Values: weights are rows of A; B are two keys' values interleaved, 64 dims at a time so that they stay in
// the first cache, in the order that one instruction gives, which the results undo. Codes become numbers on
// the way, in registers. Each number is the chain of products that product_amx.inl makes, where A and B have
// changed places, so it has the same bits.

namespace tilefold {
namespace {

constexpr int64_t MOST_CODES = 1024;  // dims of codes that are not copied first

// Rows of a block as they lie, in groups of GROUP: bf16 numbers one after another, or codes and their scales.
struct Laid : Coded {
    DType type;
    int64_t width, scale_of[MOST_CODES / 32];  // the latter by 32 dims

    // Dims d … d + 31 of row k; 0 beyond the width.
    template <class C>
    TILEFOLD_INLINE __m512i dims(int64_t k, int64_t d) const {
        const C* const p = reinterpret_cast<const C*>(at[k / GROUP]) + k % GROUP * row;
        if constexpr (!__is_same(C, BFloat))
            return decoded(p + d / C::EACH, scale[k / GROUP][k % GROUP * scale_row + scale_of[d / 32]]);
        else if (d + 32 <= width)
            return _mm512_loadu_si512(p + d);
        else
            return _mm512_maskz_loadu_epi16((1u << (width - d)) - 1, p + d);
    }

    template <class F>
    void as_stored(F&& f) const {
        if (type == DType::int8)
            f(Int8{});
        else if (type == DType::float8_e4m3fn)
            f(Float8{});
        else if (type == DType::int4)
            f(Int4{});
        else
            f(BFloat{});
    }
};

// Four vectors of four groups of four: each group is transposed.
TILEFOLD_INLINE void turn_fours(__m512 (&x)[4]) {
    const __m512d a = (__m512d)_mm512_unpacklo_ps(x[0], x[1]), b = (__m512d)_mm512_unpackhi_ps(x[0], x[1]);
    const __m512d c = (__m512d)_mm512_unpacklo_ps(x[2], x[3]), d = (__m512d)_mm512_unpackhi_ps(x[2], x[3]);
    x[0] = (__m512)_mm512_unpacklo_pd(a, c), x[1] = (__m512)_mm512_unpackhi_pd(a, c);
    x[2] = (__m512)_mm512_unpacklo_pd(b, d), x[3] = (__m512)_mm512_unpackhi_pd(b, d);
}

constexpr int STEP = 32, AT_ONCE = 4;  // keys or dims of a product of tiles; tiles of C

TILEFOLD_INLINE int64_t steps(int64_t n) { return up(n, STEP) / STEP; }

// Products of groups of keys, `row` bytes apart, with all queries to [groups][16 keys][16].
// `queries`: [pairs of dims][16].
template <int G>
TILEFOLD_INLINE void multiply_groups(const BFloat* const (&at)[AT_ONCE], const int64_t (&row)[AT_ONCE],
                                     int64_t dim, const uint32_t* queries, float* to, Requests& requests) {
    settle_memory();
    _tile_zero(0);
    if constexpr (G > 1) _tile_zero(1);
    if constexpr (G > 2) _tile_zero(2);
    if constexpr (G > 3) _tile_zero(3);
    for (int64_t d = 0; d < dim; d += STEP, queries += 256) {
        _tile_loadd(6, queries, 64);
        _tile_loadd(4, at[0] + d, row[0]);
        _tile_dpbf16ps(0, 4, 6);
        requests.some();
        if constexpr (G > 1) {
            _tile_loadd(5, at[1] + d, row[1]);
            _tile_dpbf16ps(1, 5, 6);
            requests.some();
        }
        if constexpr (G > 2) {
            _tile_loadd(4, at[2] + d, row[2]);
            _tile_dpbf16ps(2, 4, 6);
            requests.some();
        }
        if constexpr (G > 3) {
            _tile_loadd(5, at[3] + d, row[3]);
            _tile_dpbf16ps(3, 5, 6);
            requests.some();
        }
    }
    _tile_stored(0, to, 64);
    if constexpr (G > 1) _tile_stored(1, to + 256, 64);
    if constexpr (G > 2) _tile_stored(2, to + 512, 64);
    if constexpr (G > 3) _tile_stored(3, to + 768, 64);
}

// The same for n keys. What is stored can be loaded as a tile only some time later: groups that are not read
// where they lie go to `rows`, which has room for two times AT_ONCE, while the unit is at those before.
template <class C>
__attribute__((noinline)) void multiply_keys(const Laid& keys, int64_t n, const uint32_t* queries,
                                             BFloat* rows, float* to, Requests& requests) {
    const int64_t dim = up(keys.width, STEP);
    constexpr int64_t MOST = AT_ONCE * GROUP;
    // Keys from j on, as tiles are loaded from them.
    struct Groups {
        const BFloat* at[AT_ONCE];
        int64_t row[AT_ONCE], count;
    } now, next;
    const auto prepare = [&](int64_t j, Groups& to) TILEFOLD_LAMBDA {
        to.count = least(AT_ONCE, up(n - j, GROUP) / GROUP);
        for (int64_t g = 0; g < to.count; g++) {
            const int64_t first = j + g * GROUP, some = least(GROUP, n - first);
            if (__is_same(C, BFloat) && some == GROUP && keys.width == dim) {
                to.at[g] = reinterpret_cast<const BFloat*>(keys.at[first / GROUP]), to.row[g] = keys.row * 2;
                continue;
            }
            BFloat* const own = rows + (j / MOST % 2 * MOST + g * GROUP) * dim;
            to.at[g] = own, to.row[g] = dim * 2;
            for (int64_t k = 0; k < GROUP; k++)
                for (int64_t d = 0; d < dim; d += STEP)
                    _mm512_store_si512(own + k * dim + d,
                                       k < some ? keys.dims<C>(first + k, d) : _mm512_setzero_si512());
        }
    };
    prepare(0, next);
    for (int64_t j = 0; j < n; j += MOST, to += AT_ONCE * 256) {
        now = next;
        if (j + MOST < n) prepare(j + MOST, next);
        switch (now.count) {
            case 1:
                multiply_groups<1>(now.at, now.row, dim, queries, to, requests);
                break;
            case 2:
                multiply_groups<2>(now.at, now.row, dim, queries, to, requests);
                break;
            case 3:
                multiply_groups<3>(now.at, now.row, dim, queries, to, requests);
                break;
            default:
                multiply_groups<4>(now.at, now.row, dim, queries, to, requests);
        }
    }
    settle_memory();
}

// Values of a step of keys, of which those before n exist, from dim d on: two keys interleaved,
// [tiles][16 pairs][16].
template <class C, int TILES>
TILEFOLD_INLINE void interleave(const Laid& values, int64_t k0, int64_t n, int64_t d, uint32_t* to,
                                Requests& requests) {
    const auto pair = [&](int64_t k, bool even, bool odd) TILEFOLD_LAMBDA {
        each<TILES / 2>([&](auto t) TILEFOLD_LAMBDA {
            const __m512i x = even ? values.dims<C>(k, d + t * STEP) : _mm512_setzero_si512();
            const __m512i y = odd ? values.dims<C>(k + 1, d + t * STEP) : _mm512_setzero_si512();
            _mm512_store_si512(to + t * 512, _mm512_unpacklo_epi16(x, y));
            _mm512_store_si512(to + t * 512 + 256, _mm512_unpackhi_epi16(x, y));
        });
        to += 16;
    };
    if (k0 + STEP > n) {
        for (int64_t k = k0; k < k0 + STEP; k += 2) pair(k, k < n, k + 1 < n);
        return;
    }
    for (int64_t k = k0; k < k0 + STEP; k += 4) {
        requests.some();
        pair(k, true, true);
        pair(k + 2, true, true);
    }
}

template <int TILES>
TILEFOLD_INLINE void multiply_step(const uint32_t* a, const uint32_t* b, Requests& requests) {
    _tile_loadd(6, a, 64);
    _tile_loadd(4, b, 64);
    _tile_dpbf16ps(0, 6, 4);
    requests.some();
    _tile_loadd(5, b + 256, 64);
    _tile_dpbf16ps(1, 6, 5);
    requests.some();
    if constexpr (TILES > 2) {
        _tile_loadd(4, b + 512, 64);
        _tile_dpbf16ps(2, 6, 4);
        requests.some();
        _tile_loadd(5, b + 768, 64);
        _tile_dpbf16ps(3, 6, 5);
        requests.some();
    }
}

// Sums over n keys of `weights` times values from dim d on, TILES tiles at once, to [tiles][16 rows][16].
// `room` is for two steps: one is interleaved while the unit is at the one before.
template <class C, int TILES>
TILEFOLD_INLINE void multiply_dims(const Laid& values, int64_t n, int64_t d, int64_t d1,
                                   const uint32_t* weights, uint32_t* room, float* to, Requests& requests) {
    const int64_t all = steps(n);
    uint32_t *now = room, *before = room + AT_ONCE * 256;
    interleave<C, TILES>(values, 0, n, d, before, requests);
    for (int64_t d_next, s = 0, s_next; d < d1; d = d_next, s = s_next) {
        s_next = s + 1, d_next = d;
        if (s_next == all) s_next = 0, d_next += TILES * 16;
        if (d_next < d1) interleave<C, TILES>(values, s_next * STEP, n, d_next, now, requests);
        settle_memory();
        if (s == 0) {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (TILES > 2) {
                _tile_zero(2);
                _tile_zero(3);
            }
        }
        multiply_step<TILES>(weights + s * 256, before, requests);
        uint32_t* const other = before;
        before = now, now = other;
        if (s_next) continue;
        _tile_stored(0, to, 64);
        _tile_stored(1, to + 256, 64);
        if constexpr (TILES > 2) {
            _tile_stored(2, to + 512, 64);
            _tile_stored(3, to + 768, 64);
        }
        to += TILES * 256;
    }
    settle_memory();
}
template <class C>
__attribute__((noinline)) void multiply_values(const Laid& values, int64_t n, const uint32_t* weights,
                                               uint32_t* room, float* to, Requests& requests) {
    const int64_t most_at_once = values.width / 64 * 64, width = up(values.width, STEP);
    if (most_at_once) multiply_dims<C, 4>(values, n, 0, most_at_once, weights, room, to, requests);
    if (width - most_at_once > STEP)
        multiply_dims<C, 4>(values, n, most_at_once, width, weights, room, to + most_at_once * 16, requests);
    else if (width > most_at_once)
        multiply_dims<C, 2>(values, n, most_at_once, width, weights, room, to + most_at_once * 16, requests);
}

// Twin of RowVectors.
template <int R>
struct RowTiles {
    static_assert(R <= 8);
    static constexpr bool SPREADS = false;  // see RowCodes
    static constexpr int FOURS = (R + 3) / 4;

    const Call& c;
    const Unit& u;
    const int64_t pitch;
    uint32_t* queries;   // [pairs of dims][16], 0 beyond R
    uint32_t* weights;   // [steps][16 rows][16 pairs of keys], 0 beyond R
    uint32_t* room;      // of two steps of values
    float* sums;         // of keys, then of values
    BFloat *own, *rows;  // a block that is copied; groups of keys that are not read where they lie
    BFloat* clean;       // values without NaN and infinity
    Grouped<BFloat> grouped;
    Laid laid;

    RowTiles(const Call& c_, const Unit& u_, int64_t pitch_, Arena& a) : c(c_), u(u_), pitch(pitch_) {
        const int64_t dim = up(c.dim, STEP), v_dim = up(c.v_dim, STEP), keys = up(c.block_k, AT_ONCE * GROUP);
        queries = a.template take<uint32_t>(dim / 2 * 16);
        weights = a.template take<uint32_t>(steps(c.block_k) * 256);
        room = a.template take<uint32_t>(2 * AT_ONCE * 256);
        sums = a.template take<float>(most(keys, v_dim) * 16);
        own = a.template take<BFloat>(c.block_k * most(c.dim, c.v_dim));
        rows = a.template take<BFloat>(2 * AT_ONCE * GROUP * dim);
        clean = a.template take<BFloat>(c.block_k * c.v_dim);
    }

    void begin(const BFloat* (&from)[R]) const {
        const auto bits = [&](int r, int64_t d) {
            return d < c.dim ? uint32_t(from[r][d * c.q.col].bits) : 0u;
        };
        const int64_t pairs = up(c.dim, STEP) / 2;
        memset(queries, 0, size_t(pairs * 16) * sizeof(uint32_t));
        memset(weights, 0, size_t(steps(c.block_k) * 256) * sizeof(uint32_t));
        for (int r = 0; r < R; r++)
            for (int64_t p = 0; p < pairs; p++)
                queries[p * 16 + r] = bits(r, 2 * p) | bits(r, 2 * p + 1) << 16;
    }

    void bring_keys(int64_t j0, int64_t j1) {
        const Side x = keys_of(c, u);
        if (!lay_codes(x, j0, j1)) lay(x, j0, j1);
    }
    template <bool CAREFUL>
    void bring_values(int64_t j0, int64_t j1) {
        const Side x = values_of(c, u);
        if (!CAREFUL) {
            if (!lay_codes(x, j0, j1)) lay(x, j0, j1);
            return;
        }
        lay(x, j0, j1);
        for (int64_t k = 0; k < j1 - j0; k++)
            for (int64_t d = 0; d < c.v_dim; d++) {
                const BFloat b = grouped.from(k)[d];
                clean[k * c.v_dim + d] = one(b) - one(b) == 0 ? b : BFloat{0};
            }
        laid.row = c.v_dim;
        for (int64_t k = 0; k < j1 - j0; k += GROUP) laid.at[k / GROUP] = bytes(clean + k * c.v_dim);
    }
    float value(int64_t k, int64_t d) const { return one(grouped.from(k)[d]); }

    int64_t key_turns(int64_t n) const { return up(n, GROUP) / GROUP * steps(c.dim); }
    int64_t value_turns(int64_t n) const {
        return steps(n) * (up(c.v_dim, 64) / 64 * 8 + steps(c.v_dim) * 2);
    }

    template <class Take>
    TILEFOLD_INLINE void multiply(int64_t n, Requests& requests, Take&& take) {
        laid.as_stored([&](auto code) TILEFOLD_LAMBDA {
            multiply_keys<decltype(code)>(laid, n, queries, rows, sums, requests);
        });
        for (int64_t j = 0; j < n; j += GROUP) {
            F32 acc[R];
            turned(sums + j * 16, acc);
            take(j, acc);
        }
    }

    void weigh(float* scores, int64_t n, const float (&shift)[R], float (&sum)[R]) const {
        InOrder<float, R> total;
        for (int64_t k = 0; k < n; k += GROUP) {
            if (k % 64 == 0) Amx::stay_awake();
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                float* const s = scores + r * pitch + k;
                const F32 x = exp<float>(load(s) - set<float>(shift[r]));
                store(s, x);
                _mm256_store_si256(
                    reinterpret_cast<__m256i*>(weights + k / STEP * 256 + r * 16 + k % STEP / 2),
                    _mm512_cvtepi32_epi16((__m512i)pair_up<U32>(x, F32{})));
            });
            total.add(scores + k, pitch);
        }
        total.store(sum);
        if (const int64_t whole = up(n, GROUP); whole % STEP)
            for (int r = 0; r < R; r++) memset(weights + whole / STEP * 256 + r * 16 + 8, 0, 32);
    }

    template <bool CAREFUL, class Take>
    TILEFOLD_INLINE void add_up(int64_t n, Requests& requests, Take&& take) {
        laid.as_stored([&](auto code) TILEFOLD_LAMBDA {
            multiply_values<decltype(code)>(laid, n, weights, room, sums, requests);
        });
        // Lower and upper halves of eight dims came apart when two keys were interleaved.
        const float* from = sums;
        for (int64_t d = 0; d < c.v_dim; d += STEP, from += 512)
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                const F32 a = load(from + r * 16), b = load(from + 256 + r * 16);
                take(d, r,
                     __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
                if (d + 16 < c.v_dim)
                    take(d + 16, r,
                         __builtin_shufflevector(a, b, 8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29,
                                                 30, 31));
            });
    }

   private:
    // Codes where they lie, if 32 of them share a scale.
    bool lay_codes(const Side& x, int64_t j0, int64_t j1) {
        const Pages& p = x.pages;
        if (!is_code(c.kv_type) || x.width > MOST_CODES || x.width % STEP || p.group % STEP) return false;
        laid.type = c.kv_type, laid.width = x.width;
        for (int64_t d = 0; d < x.width; d += 32) laid.scale_of[d / 32] = d / p.group * p.scale.col;
        return codes_in_place(c, u, x, j0, j1, laid);
    }
    void lay(const Side& x, int64_t j0, int64_t j1) {
        group(c, u, x, j0, j1, own, grouped, true);
        laid.type = DType::bfloat16, laid.width = x.width, laid.row = grouped.row;
        for (int64_t k = 0; k < j1 - j0; k += GROUP) laid.at[k / GROUP] = bytes(grouped.at[k / GROUP]);
    }
    static const char* bytes(const BFloat* p) { return reinterpret_cast<const char*>(p); }

    // Sixteen rows of R numbers as R vectors, four numbers at a time.
    static TILEFOLD_INLINE void turned(const float* from, F32 (&to)[R]) {
        each<FOURS>([&](auto four) TILEFOLD_LAMBDA {
            __m512 x[4];
            each<4>([&](auto i) TILEFOLD_LAMBDA {
                const float* const p = from + i * 16 + four * 4;
                x[i] = _mm512_castps128_ps512(_mm_load_ps(p));
                x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x00f0, _mm_load_ps(p + 4 * 16));
                x[i] = _mm512_mask_broadcast_f32x4(x[i], 0x0f00, _mm_load_ps(p + 8 * 16));
                x[i] = _mm512_mask_broadcast_f32x4(x[i], 0xf000, _mm_load_ps(p + 12 * 16));
            });
            turn_fours(x);
            each<4>([&](auto i) TILEFOLD_LAMBDA {
                if constexpr (four * 4 + i < R) to[four * 4 + i] = x[i];
            });
        });
    }
};

}  // namespace
}  // namespace tilefold
