// AVX-512 with the bf16 dot product: pairs of bf16 numbers are multiplied and summed in float.
// Subnormal inputs and results of the dot product count as 0 (that is the instruction).
#pragma once

#include "avx512.h"

#define TILEFOLD_HAS_DOT2

namespace {
inline __attribute__((always_inline)) F32 dot2(F32 acc, U32 a, U32 b) {
    return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b);
}
}  // namespace
