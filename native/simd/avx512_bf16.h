// AVX-512 with the bf16 dot product: pairs of bf16 numbers are multiplied and summed in float.
// Subnormal inputs and results of the dot product count as 0 (that is the instruction).
#pragma once

#define TILEFOLD_HAS_DOT2
#define TILEFOLD_HAS_NARROW
#define TILEFOLD_HAS_DECODE

#include "avx512.h"

namespace {
inline __attribute__((always_inline)) F32 dot2(F32 acc, U32 a, U32 b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
inline __attribute__((always_inline)) void narrow(BFloat* p, F32 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
// The same; what was stored, as floats.
inline __attribute__((always_inline)) F32 narrowed(BFloat* p, F32 x) {
    const __m256i bits = (__m256i)_mm512_cvtneps_pbh(x);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// Two vectors as one of bf16 numbers, in order.
inline __attribute__((always_inline)) __m512i narrowed(F32 x, F32 y) {
    return (__m512i)_mm512_cvtne2ps_pbh(y, x);
}
// Thirty-two codes times a scale, as bf16 numbers.
inline __attribute__((always_inline)) __m512i decoded(const Int8* p, float scale) {
    const F32 s = _mm512_set1_ps(scale);
    return narrowed(widen(p) * s, widen(p + 16) * s);
}
// See widen() of sixteen.
inline __attribute__((always_inline)) __m512i decoded(const Float8* p, float scale) {
    const __m512i x =
        _mm512_slli_epi16(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 7);
    const __m512i none = _mm512_set1_epi16(0x3f80);
    const __mmask32 special = _mm512_cmpeq_epi16_mask(_mm512_and_si512(x, none), none);
    const __m512i half = _mm512_or_si512(_mm512_and_si512(x, _mm512_set1_epi16(short(0xbf80))),
                                         _mm512_maskz_mov_epi16(special, _mm512_set1_epi16(0x7c00)));
    const F32 s = _mm512_set1_ps(scale), small = _mm512_set1_ps(256);
    return narrowed(_mm512_cvtph_ps(_mm512_castsi512_si256(half)) * small * s,
                    _mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1)) * small * s);
}
// Four bits and a scale make one of sixteen numbers, which are looked up. Of a place only five bits count,
// and there the table repeats, so whatever stands above the four does not matter.
inline __attribute__((always_inline)) __m512i decoded(const Int4* p, float scale) {
    const F32 codes = {0, 1, 2, 3, 4, 5, 6, 7, -8, -7, -6, -5, -4, -3, -2, -1};
    const __m512i numbers =
        _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(codes * _mm512_set1_ps(scale)));
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_permutexvar_epi16(_mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12)), numbers);
}
}  // namespace
