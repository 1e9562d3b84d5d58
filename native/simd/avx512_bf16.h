// AVX-512 with the bf16 dot product: pairs of bf16 numbers are multiplied and summed in float.
// Subnormal inputs and results of the dot product count as 0 (that is the instruction).
#pragma once

#define TILEFOLD_HAS_DOT2
#define TILEFOLD_HAS_NARROW

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
}  // namespace
