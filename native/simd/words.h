// The vocabulary that the algorithms are written in, spelled with vector extensions so that it runs on any
// machine. A machine's header says how wide a vector is (TILEFOLD_BYTES) and how many there are
// (TILEFOLD_REGISTERS), and replaces the words that it has in silicon. The fact to know: max(a, b) is b where
// either is NaN, so the operand that may be NaN goes first to be dropped and last to be kept; and products
// are fused into sums only where the word fma stands (-ffp-contract=off), since bits that depend on a
// compiler's mood could not be promised.
#pragma once

#include <stdint.h>
#include <string.h>

#define TILEFOLD_INLINE inline __attribute__((always_inline))
#define TILEFOLD_LAMBDA __attribute__((always_inline))

namespace {

// ---- counting at compile time (the standard library's own would leave weak symbols) ----

template <int N>
struct Int {
    constexpr operator int() const { return N; }
};
template <int... I>
struct Ints {};
template <int N, int... I>
struct Upto : Upto<N - 1, N - 1, I...> {};
template <int... I>
struct Upto<0, I...> {
    using type = Ints<I...>;
};

template <class F, int... I>
TILEFOLD_INLINE void each_of(F&& f, Ints<I...>) {
    (f(Int<I>{}), ...);
}
// f(0), f(1), … f(N − 1), unrolled: arrays of vectors indexed this way stay in registers.
template <int N, class F>
TILEFOLD_INLINE void each(F&& f) {
    each_of(f, typename Upto<N>::type{});
}

// ---- vectors ----

constexpr int BYTES = TILEFOLD_BYTES;

template <class E>
struct VectorOf {
    typedef E type __attribute__((vector_size(BYTES)));
    typedef E anywhere __attribute__((vector_size(BYTES), aligned(1), may_alias));
};
template <class E>
using Vec = typename VectorOf<E>::type;

using F32 = Vec<float>;
using F64 = Vec<double>;
using U32 = Vec<uint32_t>;

template <class E>
constexpr int LANES = BYTES / int(sizeof(E));

// The integers that are as wide as a float type, and what exp and rounding need to know of it.
template <class E>
struct Float;
template <>
struct Float<float> {
    using Integer = int32_t;
    static constexpr float magic = 12582912.0f;  // 1.5 · 2^23: adding it leaves an integer in the low bits
    static constexpr float least = -88.0f;       // e^least is 2^−127: the first power of two that counts as 0
    static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440e-4f;
    static constexpr int bias = 127, mantissa = 23;
    // e^f on ±ln(2) / 2, relative error 1.05e-7; the last two coefficients are exact, so that e^0 = 1.
    static constexpr float poly[] = {8.312501013278961e-03f,
                                     4.189033061265945e-02f,
                                     1.6667115688323975e-01f,
                                     4.9999231100082397e-01f,
                                     1.0f,
                                     1.0f};
    // 2^f from 0 to 1, relative error 1.05e-7; 2^0 = 1.
    static constexpr float powers[] = {1.8852015491575003e-03f, 8.976903744041920e-03f,
                                       5.582971125841141e-02f,  2.4015620350837708e-01f,
                                       6.931519508361816e-01f,  1.0f};
    // (e^f − 1) / f to the last bit or nearly, for scores, whose errors no sum averages away.
    static constexpr float fine[] = {1.0f / 40320, 1.0f / 5040, 1.0f / 720, 1.0f / 120,
                                     1.0f / 24,    1.0f / 6,    0.5f,       1.0f};
    static constexpr int terms = 6, power_terms = 6, fine_terms = 8;
};
template <>
struct Float<double> {
    using Integer = int64_t;
    static constexpr double magic = 6755399441055744.0;  // 1.5 · 2^52
    static constexpr double least = -709.0;
    static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
    static constexpr int bias = 1023, mantissa = 52;
    // 1 / n!: the remainder on ±ln(2) / 2 is 4e-18.
    static constexpr double poly[] = {1.0 / 6227020800,
                                      1.0 / 479001600,
                                      1.0 / 39916800,
                                      1.0 / 3628800,
                                      1.0 / 362880,
                                      1.0 / 40320,
                                      1.0 / 5040,
                                      1.0 / 720,
                                      1.0 / 120,
                                      1.0 / 24,
                                      1.0 / 6,
                                      0.5,
                                      1.0,
                                      1.0};
    // 2^f from 0 to 1, relative error 5.7e-18; 2^0 = 1.
    static constexpr double powers[] = {
        6.301730363648477e-10,  6.5389430641937864e-09, 1.0257985483823956e-07, 1.3207743488691723e-06,
        1.5253225510944827e-05, 0.00015403509699779989, 0.0013333558715705764,  0.00961812909779609,
        0.05550410866580712,    0.24022650695905148,    0.6931471805599462,     1.0};
    static constexpr int terms = 14, power_terms = 12,
                         fine_terms = 13;  // without its last term it is (e^f − 1) / f
    static constexpr const double (&fine)[14] = poly;
};
constexpr double LOG2E = 1.4426950408889634, LN2 = 0.6931471805599453;
template <class E>
using Mask = Vec<typename Float<E>::Integer>;  // every bit of a lane set, or none

template <class E>
TILEFOLD_INLINE Vec<E> load(const E* p) {
    return *reinterpret_cast<const typename VectorOf<E>::anywhere*>(p);
}
template <class E>
TILEFOLD_INLINE void store(E* p, Vec<E> x) {
    *reinterpret_cast<typename VectorOf<E>::anywhere*>(p) = x;
}
template <class E>
TILEFOLD_INLINE Vec<E> set(E x) {
    return x - Vec<E>{};
}
template <class E>
TILEFOLD_INLINE Vec<E> iota() {
    Vec<E> x{};
    for (int i = 0; i < LANES<E>; i++) x[i] = E(i);
    return x;
}
template <class To, class From>
TILEFOLD_INLINE To bits_as(From x) {
    static_assert(sizeof(To) == sizeof(From));
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}
template <class E>
TILEFOLD_INLINE Vec<E> select(Mask<E> m, Vec<E> yes, Vec<E> no) {
    return m ? yes : no;
}

// ---- words that machines replace ----

#ifndef TILEFOLD_HAS_ARITHMETIC
template <class V>
TILEFOLD_INLINE V fma(V a, V b, V c) {
    return a * b + c;
}
template <class V>
TILEFOLD_INLINE V max(V a, V b) {
    return a > b ? a : b;
}
#endif

#ifndef TILEFOLD_HAS_BY_ELEMENT
// The same with one number for all lanes of a.
TILEFOLD_INLINE F32 fma(float a, F32 b, F32 c) { return fma(set<float>(a), b, c); }
TILEFOLD_INLINE F64 fma(double a, F64 b, F64 c) { return fma(set<double>(a), b, c); }
#endif

#ifndef TILEFOLD_HAS_ANY
template <class M>
TILEFOLD_INLINE bool any(M m) {
    uint64_t word[sizeof(M) / 8], all = 0;
    memcpy(word, &m, sizeof m);
    for (uint64_t w : word) all |= w;
    return all != 0;
}
#endif

#ifndef TILEFOLD_HAS_BITS_OF
// Bit i says whether lane i of a mask is set.
template <class M>
TILEFOLD_INLINE uint32_t bits_of(M m) {
    uint32_t bits = 0;
    for (int i = 0; i < int(sizeof(m) / sizeof(m[0])); i++) bits |= uint32_t(m[i] & 1) << i;
    return bits;
}
#endif

#ifndef TILEFOLD_HAS_SPREAD
// A vector's number of 16-bit integers, each in 32 bits.
TILEFOLD_INLINE U32 spread(const void* p) {
    typedef uint16_t Short __attribute__((vector_size(BYTES / 2)));
    Short raw;
    memcpy(&raw, p, sizeof raw);
    return __builtin_convertvector(raw, U32);
}
#endif

// Half-precision numbers are storage only: they become float when they are loaded.
struct Half {
    uint16_t bits;
};
struct BFloat {
    uint16_t bits;
};

TILEFOLD_INLINE float one(float x) { return x; }
TILEFOLD_INLINE double one(double x) { return x; }
TILEFOLD_INLINE float one(BFloat x) { return bits_as<float>(uint32_t(x.bits) << 16); }
TILEFOLD_INLINE float one(Half x) {
    const uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = uint32_t(x.bits & 0x7fff) << 13;
    // Subnormal halves are given a leading 1, which is taken off again: a float that is subnormal might count
    // as 0.
    const float small = bits_as<float>(rest + 0x38800000u) - 0x1p-14f;
    const uint32_t y = rest >= 0x0f800000u  ? rest | 0x7f800000u
                       : rest < 0x00800000u ? bits_as<uint32_t>(small)
                                            : rest + 0x38000000u;
    return bits_as<float>(y | sign);
}

TILEFOLD_INLINE void put(float* p, float x) { *p = x; }
TILEFOLD_INLINE void put(double* p, double x) { *p = x; }
TILEFOLD_INLINE void put(BFloat* p, float x) {
    const uint32_t u = bits_as<uint32_t>(x);
    p->bits = uint16_t(x != x ? (u >> 16) | 0x40 : (u + 0x7fff + ((u >> 16) & 1)) >> 16);
}
TILEFOLD_INLINE void put(Half* p, float x) {
    const uint32_t u = bits_as<uint32_t>(x), sign = (u >> 16) & 0x8000, a = u & 0x7fffffff;
    uint32_t h;
    if (a > 0x7f800000)
        h = 0x7e00;
    else if (a >= 0x477ff000)  // 65520 and beyond round to infinity
        h = 0x7c00;
    else if (a < 0x38800000)  // subnormal: adding 0.5 leaves the rounded bits at the bottom
        h = bits_as<uint32_t>(bits_as<float>(a) + 0.5f) - 0x3f000000;
    else
        h = (a + 0xfff + ((a >> 13) & 1) - 0x38000000) >> 13;
    p->bits = uint16_t(h | sign);
}

#ifndef TILEFOLD_HAS_HALF
TILEFOLD_INLINE F32 widen(const Half* p) {
    F32 x;
    for (int i = 0; i < LANES<float>; i++) x[i] = one(p[i]);
    return x;
}
TILEFOLD_INLINE void narrow(Half* p, F32 x) {
    for (int i = 0; i < LANES<float>; i++) put(p + i, x[i]);
}
#endif
TILEFOLD_INLINE F32 widen(const BFloat* p) { return bits_as<F32>(bits_as<U32>(spread(p)) << 16); }
#ifndef TILEFOLD_HAS_NARROW
TILEFOLD_INLINE void narrow(BFloat* p, F32 x) {
    typedef uint16_t Short __attribute__((vector_size(BYTES / 2)));
    const U32 u = bits_as<U32>(x);
    const U32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
    const Short raw = __builtin_convertvector((x != x) ? quiet : rounded, Short);
    memcpy(p, &raw, sizeof raw);
}
#endif
TILEFOLD_INLINE F32 widen(const float* p) { return load(p); }
TILEFOLD_INLINE F64 widen(const double* p) { return load(p); }
TILEFOLD_INLINE void narrow(float* p, F32 x) { store(p, x); }
TILEFOLD_INLINE void narrow(double* p, F64 x) { store(p, x); }

// ---- codes: storage of keys and values only, which a scale makes numbers of (pack.inl) ----

struct Int8 {
    static constexpr int EACH = 1;
    int8_t bits;
};
// A sign, four bits of exponent and three of mantissa; no infinity, and one NaN of either sign.
struct Float8 {
    static constexpr int EACH = 1;
    uint8_t bits;
};
// Two to a byte, the first one in the lower half.
struct Int4 {
    static constexpr int EACH = 2;
    uint8_t bits;
};
using I32 = Vec<int32_t>;
using U64 = Vec<uint64_t>;

#ifndef TILEFOLD_HAS_SPREAD_BYTES
// A vector's number of bytes, each with its sign in 32 bits.
TILEFOLD_INLINE I32 spread_bytes(const void* p) {
    I32 x;
    for (int i = 0; i < LANES<float>; i++) x[i] = static_cast<const int8_t*>(p)[i];
    return x;
}
// Half as many, each in 64 bits.
TILEFOLD_INLINE U64 spread_pairs(const void* p) {
    U64 x;
    for (int i = 0; i < LANES<double>; i++) x[i] = static_cast<const uint8_t*>(p)[i];
    return x;
}
#endif

// Of one code, of which element `n` of its byte.
TILEFOLD_INLINE float one(Int8 x, int64_t) { return x.bits; }
TILEFOLD_INLINE float one(Int4 x, int64_t n) { return float(int8_t(n ? x.bits : x.bits << 4) >> 4); }
TILEFOLD_INLINE float one(Float8 x, int64_t) {
    const uint32_t sign = uint32_t(x.bits & 0x80) << 24, rest = uint32_t(x.bits & 0x7f) << 20;
    // Subnormal numbers are taken for twice as large ones with a leading 1, which is taken off again.
    const float small = bits_as<float>(rest + 0x3c800000u) - 0x1p-6f;
    const uint32_t y = rest >= 0x07f00000u  ? 0x7fc00000u
                       : rest < 0x00800000u ? bits_as<uint32_t>(small)
                                            : rest + 0x3c000000u;
    return bits_as<float>(y | sign);
}
TILEFOLD_INLINE F32 widen(const Int8* p) {
    return __builtin_convertvector(bits_as<I32>(spread_bytes(p)), F32);
}
TILEFOLD_INLINE F32 widen(const Int4* p) {
    const U64 bytes = bits_as<U64>(spread_pairs(p)), low = U64{} + 0xffffffffu;
    const I32 nibbles =
        bits_as<I32>((bytes << 28 & low) | (bytes << 56 & ~low));  // each at the top of its lane
    return __builtin_convertvector(nibbles >> 28, F32);
}
#ifndef TILEFOLD_HAS_FLOAT8
TILEFOLD_INLINE F32 widen(const Float8* p) {
    const U32 x = bits_as<U32>(spread_bytes(p)), sign = x & 0x80000000u, rest = (x & 0x7f) << 20;
    const U32 small = bits_as<U32>(bits_as<F32>(rest + 0x3c800000u) - set<float>(0x1p-6f));
    const U32 y = (rest < 0x00800000u) ? small : rest + 0x3c000000u;
    return bits_as<F32>(((rest >= 0x07f00000u) ? U32{} + 0x7fc00000u : y) | sign);
}
#endif

// ---- words made of words ----

// x = k · ln(2) + f with an integer k: f, and 2^k.
template <class E>
struct Reduced {
    Vec<E> f, power;
};
template <class E>
TILEFOLD_INLINE Reduced<E> reduce(Vec<E> x) {
    using T = Float<E>;
    const Vec<E> magic = set<E>(T::magic + E(T::bias));
    const Vec<E> z = fma(x, set<E>(E(LOG2E)), magic);  // its low bits are the exponent of 2^k
    const Vec<E> k = z - magic;
#ifdef TILEFOLD_UNFUSED  // the product would be rounded: in two parts, of which the first is exact
    const Vec<E> f = (x - k * set<E>(T::ln2_high)) - k * set<E>(T::ln2_low);
#else
    const Vec<E> f = fma(k, set<E>(E(-LN2)), x);
#endif
    return {f, bits_as<Vec<E>>(bits_as<Mask<E>>(z) << T::mantissa)};
}
// c[0] · f^(TERMS − 1) + … + c[TERMS − 1].
template <int TERMS, class E>
TILEFOLD_INLINE Vec<E> polynomial(const E* c, Vec<E> f) {
    Vec<E> p = set<E>(c[0]);
    each<TERMS - 1>([&](auto i) TILEFOLD_LAMBDA { p = fma(p, f, set<E>(c[i + 1])); });
    return p;
}

// The least number that exp tells from −inf, or x.
template <class E>
TILEFOLD_INLINE Vec<E> at_least(Vec<E> x) {
    return max(set<E>(Float<E>::least), x);
}
// e^x for least ≤ x ≤ 0 and NaN.
template <class E>
TILEFOLD_INLINE Vec<E> exp_within(Vec<E> x) {
#ifdef TILEFOLD_HAS_POWERS  // eight instructions for eleven, fourteen for nineteen
    const Vec<E> z = x * set<E>(E(LOG2E));
    return times_power(polynomial<Float<E>::power_terms>(Float<E>::powers, fraction(z)), z);
#else
    const Reduced<E> r = reduce<E>(x);
    return polynomial<Float<E>::terms>(Float<E>::poly, r.f) * r.power;
#endif
}
// e^x for x ≤ 0, −inf and NaN. Below about 1e-38 (1e-308) it is exactly 0; e^0 is exactly 1; NaN stays NaN.
template <class E>
TILEFOLD_INLINE Vec<E> exp(Vec<E> x) {
#ifdef TILEFOLD_HAS_POWERS
    return exp_within<E>(x);
#else
    return exp_within<E>(at_least<E>(x));
#endif
}

// tanh(x), accurate relative to x down to 0: with e = e^|2x| − 1 it is e / (e + 2).
template <class E>
TILEFOLD_INLINE Vec<E> tanh(Vec<E> x) {
    const Mask<E> negative = x < Vec<E>{};
    const Vec<E> size = select<E>(negative, -x, x);
    // Beyond 20 tanh is 1 in either type. NaN comes last, so it is kept.
    const Reduced<E> r = reduce<E>(-max(set<E>(E(-20)), -size) * set<E>(E(2)));
    const Vec<E> e =
        fma(polynomial<Float<E>::fine_terms>(Float<E>::fine, r.f) * r.f, r.power, r.power - set<E>(E(1)));
    Vec<E> y = e / (e + set<E>(E(2)));
    if constexpr (sizeof(E) == 4) {  // where most scores lie: x − x³ / 3 + …, whose one rounding is the last
        constexpr float odd[] = {-1382.0f / 155925, 62.0f / 2835, -17.0f / 315, 2.0f / 15, -1.0f / 3};
        const Vec<E> square = size * size;
        const Vec<E> small = fma(size * square, polynomial<5>(odd, square), size);
        y = select<E>(size < set<E>(E(0.25)), small, y);
    }
    return select<E>(negative, -y, y);
}

// Two weights as bf16, the first one in the lower half; rounded to nearest, halves upwards.
template <class Unsigned, class X>
TILEFOLD_INLINE Unsigned pair_up(X low, X high) {
    return (bits_as<Unsigned>(low) + 0x8000u) >> 16 | ((bits_as<Unsigned>(high) + 0x8000u) & 0xffff0000u);
}

template <class V, int... I>
TILEFOLD_INLINE V moved_up(V before, V x, Ints<I...>) {
    constexpr int W = sizeof...(I);
    return __builtin_shufflevector(before, x, (W + I - 1)...);
}
// Each lane has what was in the one below it, the first one what was in the last one of `before`.
template <class V>
TILEFOLD_INLINE V moved_up(V before, V x) {
    return moved_up(before, x, typename Upto<int(sizeof(x) / sizeof(x[0]))>::type{});
}

template <class E, int STEP, int... I>
TILEFOLD_INLINE void exchange(Vec<E>& a, Vec<E>& b, Ints<I...>) {
    constexpr int W = LANES<E>;
    const Vec<E> x = a, y = b;
    a = __builtin_shufflevector(x, y, ((I & STEP) ? W + (I - STEP) : I)...);
    b = __builtin_shufflevector(x, y, ((I & STEP) ? W + I : I + STEP)...);
}
template <class E, int STEP>
TILEFOLD_INLINE void transpose_from(Vec<E> (&x)[LANES<E>]) {
    if constexpr (STEP < LANES<E>) {
        each<LANES<E>>([&](auto r) TILEFOLD_LAMBDA {
            if constexpr (!(r & STEP)) exchange<E, STEP>(x[r], x[r + STEP], typename Upto<LANES<E>>::type{});
        });
        transpose_from<E, STEP * 2>(x);
    }
}
// A square of vectors: rows become columns.
template <class E>
TILEFOLD_INLINE void transpose(Vec<E> (&x)[LANES<E>]) {
    transpose_from<E, 1>(x);
}

}  // namespace
