// AVX2, FMA and F16C: vectors of 32 bytes, sixteen of them.
#pragma once

#include <immintrin.h>

#define TILEFOLD_BYTES 32
#define TILEFOLD_REGISTERS 16
#define TILEFOLD_HAS_ARITHMETIC
#define TILEFOLD_HAS_ANY
#define TILEFOLD_HAS_BITS_OF
#define TILEFOLD_HAS_SPREAD
#define TILEFOLD_HAS_HALF
#define TILEFOLD_HAS_SPREAD_BYTES
#define TILEFOLD_HAS_FLOAT8

namespace {
#define WORD inline __attribute__((always_inline))
WORD __m256 fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
WORD __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
WORD __m256 max(__m256 a, __m256 b) { return _mm256_max_ps(a, b); }
WORD __m256d max(__m256d a, __m256d b) { return _mm256_max_pd(a, b); }
template <class M>
WORD bool any(M m) {
    return !_mm256_testz_si256((__m256i)m, (__m256i)m);
}
template <class M>
WORD unsigned bits_of(M m) {
    if constexpr (sizeof(m[0]) == 4)
        return unsigned(_mm256_movemask_ps((__m256)m));
    else
        return unsigned(_mm256_movemask_pd((__m256d)m));
}
WORD __m256i spread(const void* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
WORD __m256i spread_bytes(const void* p) {
    return _mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
WORD __m256i spread_pairs(const void* p) { return _mm256_cvtepu8_epi64(_mm_loadu_si32(p)); }
}  // namespace

#include "words.h"

namespace {
WORD F32 widen(const Half* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
WORD void narrow(Half* p, F32 x) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// As halves 256 times too small: they have the same layout, one more bit of exponent, and another NaN.
WORD F32 widen(const Float8* p) {
    const __m128i x =
        _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
    const __m128i none = _mm_set1_epi16(0x3f80), special = _mm_cmpeq_epi16(_mm_and_si128(x, none), none);
    const __m128i half = _mm_or_si128(_mm_and_si128(x, _mm_set1_epi16(short(0xbf80))),
                                      _mm_and_si128(special, _mm_set1_epi16(0x7c00)));
    return _mm256_cvtph_ps(half) * _mm256_set1_ps(256);
}
#undef WORD
}  // namespace
