// Any machine: vectors of 16 bytes, which a baseline x86-64 or ARM has, and no fused multiply-add.
#pragma once

#define TILEFOLD_BYTES 16
#define TILEFOLD_REGISTERS 16
#define TILEFOLD_UNFUSED

#if defined(__SSE2__)
#include <emmintrin.h>
#include <stdint.h>
#include <string.h>

#define TILEFOLD_HAS_ARITHMETIC
#define TILEFOLD_HAS_SPREAD_BYTES
namespace {
template <class V>
inline __attribute__((always_inline)) V fma(V a, V b, V c) {
    return a * b + c;
}
inline __attribute__((always_inline)) __m128 max(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
inline __attribute__((always_inline)) __m128d max(__m128d a, __m128d b) { return _mm_max_pd(a, b); }
inline __attribute__((always_inline)) __m128i spread_bytes(const void* p) {
    int32_t four;
    memcpy(&four, p, sizeof four);
    const __m128i x = _mm_cvtsi32_si128(four), twice = _mm_unpacklo_epi8(x, x);
    return _mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24);
}
inline __attribute__((always_inline)) __m128i spread_pairs(const void* p) {
    uint16_t two;
    memcpy(&two, p, sizeof two);
    const __m128i zero = _mm_setzero_si128(), x = _mm_unpacklo_epi8(_mm_cvtsi32_si128(two), zero);
    return _mm_unpacklo_epi32(_mm_unpacklo_epi16(x, zero), zero);
}
}  // namespace
#endif

#include "words.h"
