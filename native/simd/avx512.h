// AVX-512 (F, BW, DQ, VL): vectors of 64 bytes, thirty-two of them.
#pragma once

// The intrinsics of GCC 12 begin some results as "undefined" and then warn of it.
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>

#define TILEFOLD_BYTES 64
#define TILEFOLD_REGISTERS 32
#define TILEFOLD_HAS_ARITHMETIC
#define TILEFOLD_HAS_ANY
#define TILEFOLD_HAS_BITS_OF
#define TILEFOLD_HAS_SPREAD
#define TILEFOLD_HAS_HALF
#define TILEFOLD_HAS_SPREAD_BYTES
#define TILEFOLD_HAS_FLOAT8
#define TILEFOLD_HAS_POWERS

namespace {
#define WORD inline __attribute__((always_inline))
WORD __m512 fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
WORD __m512d fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
WORD __m512 max(__m512 a, __m512 b) { return _mm512_max_ps(a, b); }
WORD __m512d max(__m512d a, __m512d b) { return _mm512_max_pd(a, b); }
// x less the whole number below it, and x times two to the whole number below `power`.
WORD __m512 fraction(__m512 x) { return _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
WORD __m512d fraction(__m512d x) { return _mm512_reduce_pd(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC); }
WORD __m512 times_power(__m512 x, __m512 power) { return _mm512_scalef_ps(x, power); }
WORD __m512d times_power(__m512d x, __m512d power) { return _mm512_scalef_pd(x, power); }
template <class M>
WORD bool any(M m) {
    return _mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0;
}
template <class M>
WORD unsigned bits_of(M m) {
    if constexpr (sizeof(m[0]) == 4)
        return _mm512_movepi32_mask((__m512i)m);
    else
        return _mm512_movepi64_mask((__m512i)m);
}
WORD __m512i spread(const void* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
}
WORD __m512i spread_bytes(const void* p) {
    return _mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
}
WORD __m512i spread_pairs(const void* p) {
    return _mm512_cvtepu8_epi64(_mm_loadl_epi64(static_cast<const __m128i*>(p)));
}
}  // namespace

#include "words.h"

namespace {
WORD F32 widen(const Half* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
WORD void narrow(Half* p, F32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
// As halves 256 times too small: they have the same layout, one more bit of exponent, and another NaN.
WORD F32 widen(const Float8* p) {
    const __m256i x =
        _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 7);
    const __m256i none = _mm256_set1_epi16(0x3f80),
                  special = _mm256_cmpeq_epi16(_mm256_and_si256(x, none), none);
    const __m256i half = _mm256_or_si256(_mm256_and_si256(x, _mm256_set1_epi16(short(0xbf80))),
                                         _mm256_and_si256(special, _mm256_set1_epi16(0x7c00)));
    return _mm512_cvtph_ps(half) * _mm512_set1_ps(256);
}
#undef WORD
}  // namespace
