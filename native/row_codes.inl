// The two products of few rows over int8 and int4, where the machine multiplies tiles of bytes and a row has
// one scale. Codes are not decoded: they are multiplied as they lie, and their scales afterwards, on scores
// and on weights. A query, and a row of weights, become integers of 30 bits below their largest, whose four
// digits of base 256 (-128 to 127) are operands of their own; sixteen columns or rows of a tile hold those of
// four rows. Sums of products of digits are exact, and what puts digits together rounds as sums in float do.
// A number is its code times its scale, not rounded to the type of the queries, so these are not the bits of
// fold.inl: a call that wants those has codes decoded (sweep.cpp says which).
//
// Measured in the second cache, four rows, 128 dims: int8 11 ns per key and int4 12, decoded 24 and 23.
// Scales by groups of dims were tried, with sums of their own for each: at groups of 32 dims 30 ns, decoded
// 24, for each group's products are put together and its weights become digits of their own.

namespace tilefold {
namespace {

constexpr int FEW = 4, DIGITS = 4, TILE_ROW = 64;  // rows whose digits fill a tile; bytes of a row of a tile
constexpr int TILE = 256;                          // words of 32 bits of a tile

// Sixteen numbers times 2 to `shift` as digits: all lowest ones first.
TILEFOLD_INLINE __m512i digits_of(F32 x, float shift) {
    const __m512i bias = _mm512_set1_epi32(int(0x80808080));
    const __m512i number = _mm512_cvtps_epi32(_mm512_scalef_ps((__m512)x, _mm512_set1_ps(shift)));
    const __m512i digits = _mm512_xor_si512(_mm512_add_epi32(number, bias), bias);
    const __m512i ordered = _mm512_set_epi32(
        0x3f3b3733, 0x2f2b2723, 0x1f1b1713, 0x0f0b0703, 0x3e3a3632, 0x2e2a2622, 0x1e1a1612, 0x0e0a0602,
        0x3d393531, 0x2d292521, 0x1d191511, 0x0d090501, 0x3c383430, 0x2c282420, 0x1c181410, 0x0c080400);
    return _mm512_permutexvar_epi8(ordered, digits);
}
// The shift that makes numbers of at most `top` integers below 2 to 30.
TILEFOLD_INLINE float shift_for(float top) {
    return 29 - _mm_cvtss_f32(_mm_getexp_ss(_mm_setzero_ps(), _mm_set_ss(top > 1e-37f ? top : 1e-37f)));
}
// Shifted numbers from the products of their digits, the highest last; and as they were before the shift.
TILEFOLD_INLINE F32 number_of(const __m512i (&products)[DIGITS]) {
    F32 sum{};
    each<DIGITS>([&](auto i) TILEFOLD_LAMBDA {
        const F32 y = (F32)_mm512_cvtepi32_ps(products[DIGITS - 1 - i]);
        sum = i ? fma(sum, set<float>(256), y) : y;
    });
    return sum;
}
TILEFOLD_INLINE F32 moved_back(F32 x, float shift) {
    return (F32)_mm512_scalef_ps((__m512)x, _mm512_set1_ps(-shift));
}

// Four vectors of four groups: the groups change places with the vectors.
TILEFOLD_INLINE void turn_groups(__m512i (&x)[4]) {
    const __m512i a = _mm512_shuffle_i32x4(x[0], x[1], 0x44), b = _mm512_shuffle_i32x4(x[0], x[1], 0xee);
    const __m512i c = _mm512_shuffle_i32x4(x[2], x[3], 0x44), d = _mm512_shuffle_i32x4(x[2], x[3], 0xee);
    x[0] = _mm512_shuffle_i32x4(a, c, 0x88), x[1] = _mm512_shuffle_i32x4(a, c, 0xdd);
    x[2] = _mm512_shuffle_i32x4(b, d, 0x88), x[3] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

// How rows of keys, or of values, fall into bytes.
struct CodeRow {
    int64_t width, bytes;
    bool halves;  // two dims to a byte

    CodeRow(DType type, int64_t width_)
        : width(width_), bytes(type == DType::int4 ? width_ / 2 : width_), halves(type == DType::int4) {}

    int64_t chunks() const { return up(bytes, TILE_ROW) / TILE_ROW; }
    // Keys are taken in steps of 64 codes: those of a chunk, or its lower halves and then its upper ones.
    int64_t steps() const { return chunks() << halves; }
};

// Scales of n keys from k on, as multiples of which codes come as they are read.
TILEFOLD_INLINE F32 scales_of(const Coded& x, bool halves, int64_t k, int64_t n) {
    const float* const at = x.scale[k / GROUP];
    const __mmask16 there = __mmask16(n >= 16 ? 0xffff : (1u << n) - 1);
    F32 s{};
    if (x.scale_row == 1)
        s = (F32)_mm512_maskz_loadu_ps(there, at);
    else
        for (int64_t i = 0; i < least(n, 16); i++) s[i] = at[i * x.scale_row];
    return s * set<float>(halves ? 1.f / 16 : 1);
}

// Bytes from `at` on of a row that has `left` more.
TILEFOLD_INLINE __m512i some_bytes(const char* at, int64_t left) {
    return left >= TILE_ROW ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8((uint64_t(1) << left) - 1, at);
}
// Halves of bytes as codes, sixteen times as large.
TILEFOLD_INLINE __m512i lower_halves(__m512i x) {
    return _mm512_and_si512(_mm512_slli_epi16(x, 4), _mm512_set1_epi8(char(0xf0)));
}
TILEFOLD_INLINE __m512i upper_halves(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi8(char(0xf0))); }

// Up to 64 keys, as tiles are loaded from them.
struct KeyTiles {
    const char* at[4];
    int64_t row[4], count;

    // Keys from j on of n. What is stored can be loaded as a tile only some time later: this is called one
    // turn ahead, and `room` is for two turns.
    void prepare(const Coded& keys, const CodeRow& form, int64_t j, int64_t n, char* room) {
        const int64_t pitch = form.steps() * TILE_ROW;
        count = least(4, up(n - j, GROUP) / GROUP);
        for (int64_t i = 0; i < count; i++) {
            const int64_t first = j + i * GROUP, there = least(GROUP, n - first);
            const char* from = keys.at[first / GROUP];
            if (!form.halves && there == GROUP && form.bytes % TILE_ROW == 0) {
                at[i] = from, row[i] = keys.row;
                continue;
            }
            char* to = room + (j / 64 % 2 * 4 + i) * GROUP * pitch;
            at[i] = to, row[i] = pitch;
            for (int64_t k = 0; k < GROUP; k++, from += keys.row)
                for (int64_t b = 0; b < form.bytes; b += TILE_ROW) {
                    const __m512i x =
                        k < there ? some_bytes(from + b, form.bytes - b) : _mm512_setzero_si512();
                    _mm512_store_si512(to, form.halves ? lower_halves(x) : x);
                    if (form.halves) _mm512_store_si512(to + TILE_ROW, upper_halves(x));
                    to += TILE_ROW << form.halves;
                }
        }
    }

    // Products with the digits of four queries, to [4][16 keys][DIGITS][FEW].
    void multiply(int64_t steps, const uint32_t* queries, int32_t* to, Requests& requests) const {
        settle_memory();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int64_t b = 0; b < steps * TILE_ROW; b += TILE_ROW, queries += TILE) {
            _tile_loadd(6, queries, 64);
            _tile_loadd(4, at[0] + b, row[0]);
            _tile_dpbssd(0, 4, 6);
            requests.some();
            if (count > 1) {
                _tile_loadd(5, at[1] + b, row[1]);
                _tile_dpbssd(1, 5, 6);
                requests.some();
            }
            if (count > 2) {
                _tile_loadd(4, at[2] + b, row[2]);
                _tile_dpbssd(2, 4, 6);
                requests.some();
            }
            if (count > 3) {
                _tile_loadd(5, at[3] + b, row[3]);
                _tile_dpbssd(3, 5, 6);
                requests.some();
            }
        }
        _tile_stored(0, to, 64);
        _tile_stored(1, to + TILE, 64);
        _tile_stored(2, to + 2 * TILE, 64);
        _tile_stored(3, to + 3 * TILE, 64);
        settle_memory();
    }
};

// Products of digits [16 keys][DIGITS][FEW] put together: numbers of FEW rows, lanes are keys.
TILEFOLD_INLINE void numbers_of_keys(const int32_t* from, F32 (&to)[FEW]) {
    __m512 y[4];  // of keys i, i + 4, i + 8, i + 12
    each<4>([&](auto i) TILEFOLD_LAMBDA {
        __m512i x[DIGITS];
        each<4>([&](auto j) TILEFOLD_LAMBDA { x[j] = _mm512_load_si512(from + (i + 4 * j) * 16); });
        turn_groups(x);
        y[i] = (__m512)number_of(x);
    });
    turn_fours(y);
    each<FEW>([&](auto r) TILEFOLD_LAMBDA { to[r] = (F32)y[r]; });
}

// R query rows. Twin of RowVectors and RowTiles.
template <int R>
struct RowCodes {
    static_assert(R % FEW == 0);
    static constexpr bool SPREADS = true;                    // what is not finite makes all of a row NaN
    static constexpr int FOURS = R / FEW, MOST = 4 / FOURS;  // tiles of values at once

    const Call& c;
    const Unit& u;
    const int64_t pitch;
    const CodeRow keys, values;
    const int64_t size;  // of a part of `weights`
    uint32_t* queries;   // [FOURS][steps][16 times 4 codes][DIGITS][FEW]
    float* plain;        // [R][dim], queries as they are
    int8_t* weights;     // [FOURS][steps of 64 keys][FEW][DIGITS][64]
    char* desk;          // sums and room of two turns, of keys and then of values
    char* own;           // rows that are copied
    float *own_scales, *scaled;
    float* parts;  // [R][8 vectors], values' sums of a chunk
    Coded coded;
    float query_shift[R], weight_shift[R];
    bool odd[R];  // a query has NaN or infinity
    const float* scores = nullptr;

    RowCodes(const Call& c_, const Unit& u_, int64_t pitch_, Arena& a)
        : c(c_),
          u(u_),
          pitch(pitch_),
          keys(c_.kv_type, c_.dim),
          values(c_.kv_type, c_.v_dim),
          size(up(c_.block_k, TILE_ROW) * FEW * DIGITS) {
        const int64_t key_room = 2 * FOURS * 4 * TILE * 4 + 2 * 4 * GROUP * keys.steps() * TILE_ROW,
                      value_room = 4 * TILE * 4 + 2 * MOST * TILE * 4;
        queries = a.template take<uint32_t>(FOURS * keys.steps() * TILE);
        plain = a.template take<float>(R * up(c.dim, 16));
        weights = a.template take<int8_t>(FOURS * size);
        desk = a.template take<char>(most(key_room, value_room));
        own = a.template take<char>(c.block_k * most(keys.bytes, values.bytes));
        own_scales = a.template take<float>(c.block_k);
        scaled = a.template take<float>(up(c.block_k, 16));
        parts = a.template take<float>(R * 8 * 16);
    }

    template <class T>
    void begin(const T* (&from)[R]) {
        const int64_t dim = up(c.dim, 16);
        memset(queries, 0, size_t(FOURS * keys.steps() * TILE) * sizeof(uint32_t));
        for (int r = 0; r < R; r++) {
            float* const q = plain + r * dim;
            F32 top{}, wrong{};
            for (int64_t d = 0; d < dim; d += 16) {
                const F32 y = some<float>(from[r] + d * c.q.col, c.q.col, c.dim - d);
                store(q + d, y);
                top = max(y, top), top = max(-y, top), wrong += y - y;
            }
            odd[r] = any(wrong != F32{});
            query_shift[r] = shift_for(odd[r] ? 1 : _mm512_reduce_max_ps((__m512)top));
            if (!odd[r]) digits_of_query(q, query_shift[r], queries + r / FEW * keys.steps() * TILE, r % FEW);
        }
    }

    void bring_keys(int64_t j0, int64_t j1) { bring(keys_of(c, u), keys, j0, j1); }
    template <bool CAREFUL>
    void bring_values(int64_t j0, int64_t j1) {
        bring(values_of(c, u), values, j0, j1);
    }
    float value(int64_t k, int64_t d) const { return number(values, k, d); }

    int64_t key_turns(int64_t n) const { return up(n, GROUP) / GROUP * (FOURS * keys.steps() + 1); }
    int64_t value_turns(int64_t n) const { return up(n, TILE_ROW) / TILE_ROW * passes() * (16 + MOST); }

    template <class Take>
    TILEFOLD_INLINE void multiply(int64_t n, Requests& requests, Take&& take) {
        // The unit is one turn ahead of digits being put together, and its keys are ready one turn before.
        KeyTiles tiles[2];
        const auto sums = [&](int64_t turn, int four) TILEFOLD_LAMBDA {
            return reinterpret_cast<int32_t*>(desk) + (turn % 2 * FOURS + four) * 4 * TILE;
        };
        char* const room = desk + 2 * FOURS * 4 * TILE * 4;
        const auto prepare = [&](int64_t turn) TILEFOLD_LAMBDA {
            if (turn * 64 < n) tiles[turn % 2].prepare(coded, keys, turn * 64, n, room);
        };
        const auto begin = [&](int64_t turn) TILEFOLD_LAMBDA {
            for (int f = 0; f < FOURS && turn * 64 < n; f++)
                tiles[turn % 2].multiply(keys.steps(), queries + f * keys.steps() * TILE, sums(turn, f),
                                         requests);
        };
        prepare(0), prepare(1), begin(0);
        for (int64_t turn = 0; turn * 64 < n; turn++) {
            begin(turn + 1), prepare(turn + 2);

            for (int64_t k = turn * 64, i = 0; k < least(n, turn * 64 + 64); k += GROUP, i++) {
                F32 acc[R];
                requests.some();
                each<FOURS>([&](auto f) TILEFOLD_LAMBDA {
                    F32 y[FEW];
                    numbers_of_keys(sums(turn, f) + i * TILE, y);
                    each<FEW>([&](auto r) TILEFOLD_LAMBDA { acc[f * FEW + r] = y[r]; });
                });
                scale_scores(k, least(GROUP, n - k), acc);
                take(k, acc);
            }
        }
    }

    // Weights are added up by lanes: a key's is its place modulo 16.
    void weigh(float* from, int64_t n, const float (&shift)[R], float (&sum)[R]) {
        F32 total[R] = {};
        for (int64_t k = 0; k < n; k += 16) {
            if (k % 64 == 0) Amx::stay_awake();
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                float* const s = from + r * pitch + k;
                const F32 x = exp<float>(load(s) - set<float>(shift[r]));
                store(s, x), total[r] += x;
            });
        }
        each<R>([&](auto r) TILEFOLD_LAMBDA { sum[r] = _mm512_reduce_add_ps((__m512)total[r]); });
        scores = from;
    }

    template <bool CAREFUL, class Take>
    TILEFOLD_INLINE void add_up(int64_t n, Requests& requests, Take&& take) {
        // Values of a step of some tiles are ready two turns before the unit comes to them.
        const int64_t steps = up(n, TILE_ROW) / TILE_ROW;
        int32_t* const sums = reinterpret_cast<int32_t*>(desk);
        const auto room = [&](int64_t turn)
                              TILEFOLD_LAMBDA { return desk + 4 * TILE * 4 + turn % 2 * MOST * TILE * 4; };
        const auto prepare = [&](int64_t turn) TILEFOLD_LAMBDA {
            if (turn < passes() * steps)
                interleave(turn % steps * TILE_ROW, n, turn / steps, room(turn), requests);
        };
        digits_of_weights<CAREFUL>(n);
        prepare(0), prepare(1);
        for (int64_t pass = 0, turn = 0; pass < passes(); pass++) {
            for (int64_t s = 0; s < steps; s++, turn++) {
                multiply_step(s, room(turn), requests);
                prepare(turn + 2);
            }
            _tile_stored(0, sums, 64);
            _tile_stored(1, sums + TILE, 64);
            _tile_stored(2, sums + 2 * TILE, 64);
            _tile_stored(3, sums + 3 * TILE, 64);
            settle_memory();
            Amx::stay_awake();
            const int64_t in_chunk = pass % chunk_passes();
            each<MOST>([&](auto i) TILEFOLD_LAMBDA {
                each<R>([&](auto r) TILEFOLD_LAMBDA {
                    const int32_t* const from = sums + (r / FEW * MOST + i) * TILE + r % FEW * DIGITS * 16;
                    __m512i x[DIGITS];
                    each<DIGITS>([&](auto j) TILEFOLD_LAMBDA { x[j] = _mm512_load_si512(from + j * 16); });
                    store(parts + (r * 8 + in_chunk * MOST + i) * 16,
                          moved_back(number_of(x), weight_shift[r]));
                });
            });
            if (in_chunk + 1 < chunk_passes()) continue;
            const int64_t d0 = pass / chunk_passes() * (TILE_ROW << values.halves);
            each<R>([&](auto r) TILEFOLD_LAMBDA {
                float* const part = parts + r * 8 * 16;
                if (values.halves)
                    order_halves(part);
                else
                    order_words(part, 1);
                for (int64_t i = 0; i < 4 << values.halves && d0 + i * 16 < values.width; i++)
                    take(d0 + i * 16, r, load(part + i * 16));
            });
        }
    }

   private:
    // A chunk of values becomes tiles, of which each has every fourth word of 32 bits (of halves: two tiles),
    // because that is what four instructions make of four rows. MOST of them are a pass.
    int64_t chunk_passes() const { return (4 << values.halves) / MOST; }
    int64_t passes() const { return values.chunks() * chunk_passes(); }

    void bring(const Side& side, const CodeRow& form, int64_t j0, int64_t j1) {
        if (!codes_in_place(c, u, side, j0, j1, coded))
            copy_codes(c, u, side, form.bytes, j0, j1, own, own_scales, coded);
    }

    // What dim d of row k stands for.
    float number(const CodeRow& form, int64_t k, int64_t d) const {
        const int64_t i = k % GROUP;
        const char byte = coded.at[k / GROUP][i * coded.row + (form.halves ? d / 2 : d)];
        const float scale = coded.scale[k / GROUP][i * coded.scale_row];
        return form.halves ? one(Int4{uint8_t(byte)}, d % 2) * scale : one(Int8{int8_t(byte)}, 0) * scale;
    }

    // Digits of one query to their columns of B.
    void digits_of_query(const float* q, float shift, uint32_t* to, int column) const {
        const __m512i odds = _mm512_set_epi32(31, 29, 27, 25, 23, 21, 19, 17, 15, 13, 11, 9, 7, 5, 3, 1);
        const __m512i evens = _mm512_sub_epi32(odds, _mm512_set1_epi32(1));
        for (int64_t s = 0; s < keys.steps(); s++, to += TILE)
            for (int64_t b = 0; b < TILE_ROW; b += 16) {
                const int64_t d = keys.halves ? s / 2 * 2 * TILE_ROW + 2 * b : s * TILE_ROW + b;
                if (d >= c.dim) break;
                F32 y = load(q + d);
                if (keys.halves) {
                    const F32 z = d + 16 < c.dim ? load(q + d + 16) : F32{};
                    y = (F32)_mm512_permutex2var_ps((__m512)y, s % 2 ? odds : evens, (__m512)z);
                }
                alignas(64) uint32_t word[16];
                _mm512_store_si512(word, digits_of(y, shift));
                for (int n = 0; n < DIGITS; n++)
                    for (int64_t i = 0; i < 4; i++) to[(b / 4 + i) * 16 + n * FEW + column] = word[n * 4 + i];
            }
    }

    // Scores of n keys from k on, from products of codes and shifted queries.
    TILEFOLD_INLINE void scale_scores(int64_t k, int64_t n, F32 (&acc)[R]) const {
        const F32 scale = scales_of(coded, keys.halves, k, n);
        bool mend = any(scale - scale != F32{});
        each<R>([&](auto r) TILEFOLD_LAMBDA {
            acc[r] = moved_back(acc[r], query_shift[r]) * scale;
            mend |= odd[r];
        });
        if (__builtin_expect(mend, 0)) mend_scores(k, n, scale, acc);
    }
    // Queries and scales that are not finite have no digits.
    __attribute__((noinline)) void mend_scores(int64_t k, int64_t n, F32 scale, F32 (&acc)[R]) const {
        for (int r = 0; r < R; r++)
            for (int64_t i = 0; i < n; i++) {
                if (!odd[r] && scale[i] - scale[i] == 0) continue;
                float sum = 0;
                for (int64_t d = 0; d < c.dim; d++)
                    sum += plain[r * up(c.dim, 16) + d] * number(keys, k + i, d);
                acc[r][i] = sum;
            }
    }

    // Weights times values' scales as digits, rows of A. Scales that are not finite make all of a row NaN,
    // or, CAREFUL, count as 0.
    template <bool CAREFUL>
    __attribute__((noinline)) void digits_of_weights(int64_t n) {
        for (int r = 0; r < R; r++) {
            if (r % FEW == 0) Amx::stay_awake();
            // As integers, sizes have the order of their numbers, and NaN is the highest.
            __m512i top = _mm512_setzero_si512();
            for (int64_t k = 0; k < n; k += 16) {
                F32 scale = scales_of(coded, values.halves, k, n - k);
                if (CAREFUL) scale = select<float>(scale - scale == 0, scale, F32{});
                const F32 y = load(scores + r * pitch + k) * scale;
                store(scaled + k, y);
                top = _mm512_max_epu32(
                    top, _mm512_and_si512(_mm512_castps_si512((__m512)y), _mm512_set1_epi32(0x7fffffff)));
            }
            const float highest = bits_as<float>(_mm512_reduce_max_epu32(top)), shift = shift_for(highest);
            weight_shift[r] = highest - highest == 0 ? shift : __builtin_nanf("");
            int8_t* to = weights + r / FEW * size + r % FEW * DIGITS * TILE_ROW;
            for (int64_t k = 0; k < n; k += TILE_ROW, to += FEW * DIGITS * TILE_ROW) {
                __m512i y[4];
                each<4>([&](auto i) TILEFOLD_LAMBDA {
                    y[i] =
                        k + i * 16 < n ? digits_of(load(scaled + k + i * 16), shift) : _mm512_setzero_si512();
                });
                turn_groups(y);
                each<4>([&](auto i) TILEFOLD_LAMBDA { _mm512_store_si512(to + i * TILE_ROW, y[i]); });
            }
        }
    }

    // Values of 64 keys, of which those before n exist, for one pass: four keys interleaved, as B.
    TILEFOLD_INLINE void interleave(int64_t k0, int64_t n, int64_t pass, char* to, Requests& requests) const {
        const int64_t b = pass / chunk_passes() * TILE_ROW, at = pass % chunk_passes();
        each<4>([&](auto i) TILEFOLD_LAMBDA {
            if constexpr (i * MOST < 4)
                if (!values.halves && at == i) interleave_words<false, i * MOST>(k0, n, b, to, requests);
            if constexpr (i * MOST < 8)
                if (values.halves && at == i) interleave_words<true, i * MOST / 2>(k0, n, b, to, requests);
        });
    }
    // Of each four words of a chunk, those from FIRST on.
    template <bool HALVES, int FIRST>
    __attribute__((noinline)) void interleave_words(int64_t k0, int64_t n, int64_t b, char* to,
                                                    Requests& requests) const {
        const int64_t left = values.bytes - b, row = coded.row;
        const auto put = [&](char* tile, const __m512i(&x)[4]) TILEFOLD_LAMBDA {
            each<(HALVES ? MOST / 2 : MOST)>([&](auto i) TILEFOLD_LAMBDA {
                constexpr int word = FIRST + i;
                const auto pair = [](__m512i even, __m512i odd_one) TILEFOLD_LAMBDA {
                    return word < 2 ? _mm512_unpacklo_epi8(even, odd_one)
                                    : _mm512_unpackhi_epi8(even, odd_one);
                };
                const __m512i two = pair(x[0], x[1]), more = pair(x[2], x[3]);
                const __m512i y =
                    word % 2 ? _mm512_unpackhi_epi16(two, more) : _mm512_unpacklo_epi16(two, more);
                if constexpr (HALVES) {
                    _mm512_store_si512(tile + 2 * i * TILE * 4, lower_halves(y));
                    _mm512_store_si512(tile + (2 * i + 1) * TILE * 4, upper_halves(y));
                } else {
                    _mm512_store_si512(tile + i * TILE * 4, y);
                }
            });
        };
        for (int64_t k = k0; k < least(k0 + TILE_ROW, n); k += GROUP) {
            const char* from = coded.at[k / GROUP] + b;
            const int64_t there = least(GROUP, n - k);
            if (__builtin_expect(there == GROUP && left >= TILE_ROW, 1)) {
                for (const char* const end = from + GROUP * row; from != end; from += 4 * row, to += 64) {
                    requests.some();
                    const char *const first = from, *const third = from + 2 * row;
                    put(to, {_mm512_loadu_si512(first), _mm512_loadu_si512(first + row),
                             _mm512_loadu_si512(third), _mm512_loadu_si512(third + row)});
                }
                continue;
            }
            for (int64_t i = 0; i < there; i += 4, from += 4 * row, to += 64) {
                __m512i x[4];
                each<4>([&](auto key) TILEFOLD_LAMBDA {
                    x[key] = i + key < there ? some_bytes(from + key * row, left) : _mm512_setzero_si512();
                });
                put(to, x);
            }
        }
    }
    // Four vectors, `step` apart, of every fourth word.
    static TILEFOLD_INLINE void order_words(float* part, int step) {
        __m512i x[4];
        each<4>([&](auto i) TILEFOLD_LAMBDA { x[i] = _mm512_load_si512(part + i * step * 16); });
        turn_groups(x);
        each<4>([&](auto i) TILEFOLD_LAMBDA { _mm512_store_si512(part + i * step * 16, x[i]); });
    }
    // The same of words of bytes, whose lower and upper halves are vectors in turn.
    static TILEFOLD_INLINE void order_halves(float* part) {
        order_words(part, 2), order_words(part + 16, 2);
        const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i last = _mm512_add_epi32(first, _mm512_set1_epi32(8));
        for (float* const end = part + 128; part != end; part += 32) {
            const __m512i low = _mm512_load_si512(part), high = _mm512_load_si512(part + 16);
            _mm512_store_si512(part, _mm512_permutex2var_epi32(low, first, high));
            _mm512_store_si512(part + 16, _mm512_permutex2var_epi32(low, last, high));
        }
    }

    // One step of 64 keys for MOST tiles of values, which are added to C, or begin it.
    TILEFOLD_INLINE void multiply_step(int64_t step, const char* b, Requests& requests) const {
        settle_memory();
        if (step == 0) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        const int8_t* const a = weights + step * FEW * DIGITS * TILE_ROW;
        _tile_loadd(6, a, 64);
        if constexpr (FOURS == 2) _tile_loadd(7, a + size, 64);
        _tile_loadd(4, b, 64);
        _tile_dpbssd(0, 6, 4);
        if constexpr (FOURS == 2) _tile_dpbssd(2, 7, 4);
        requests.some();
        _tile_loadd(5, b + TILE * 4, 64);
        _tile_dpbssd(1, 6, 5);
        if constexpr (FOURS == 2) _tile_dpbssd(3, 7, 5);
        requests.some();
        if constexpr (FOURS == 1) {
            _tile_loadd(4, b + 2 * TILE * 4, 64);
            _tile_dpbssd(2, 6, 4);
            requests.some();
            _tile_loadd(5, b + 3 * TILE * 4, 64);
            _tile_dpbssd(3, 6, 5);
            requests.some();
        }
    }
};

}  // namespace
}  // namespace tilefold
