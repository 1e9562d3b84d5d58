// Any machine: vectors of 16 bytes, which a baseline x86-64 or ARM has, and no fused multiply-add.
#pragma once

#define TILEFOLD_BYTES 16
#define TILEFOLD_REGISTERS 16
#define TILEFOLD_UNFUSED

#if defined(__SSE2__)
#include <emmintrin.h>

#define TILEFOLD_HAS_ARITHMETIC
namespace {
template <class V>
inline __attribute__((always_inline)) V fma(V a, V b, V c) {
    return a * b + c;
}
inline __attribute__((always_inline)) __m128 max(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
inline __attribute__((always_inline)) __m128d max(__m128d a, __m128d b) { return _mm_max_pd(a, b); }
}  // namespace
#endif

#include "words.h"
