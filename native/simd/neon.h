// NEON, the Advanced SIMD of AArch64: vectors of 16 bytes, thirty-two of them, and multiply-add always there.
// Its own maxima keep or drop NaN on whichever side it stands, so max is a comparison and a choice.
#pragma once

#include <arm_neon.h>
#include <string.h>

#define TILEFOLD_BYTES 16
#define TILEFOLD_REGISTERS 32
#define TILEFOLD_HAS_ARITHMETIC
#define TILEFOLD_HAS_BY_ELEMENT
#define TILEFOLD_HAS_ANY
#define TILEFOLD_HAS_SPREAD
#define TILEFOLD_HAS_HALF
#define TILEFOLD_HAS_SPREAD_BYTES

namespace {
#define WORD inline __attribute__((always_inline))
// To compilers the types of intrinsics are others than these, though they convert.
typedef float Floats __attribute__((vector_size(16)));
typedef double Doubles __attribute__((vector_size(16)));

WORD Floats fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
WORD Doubles fma(Doubles a, Doubles b, Doubles c) { return vfmaq_f64(c, a, b); }
// By element. From a number in memory compilers would make a load that broadcasts, which occupies a unit that
// multiplies.
WORD Floats fma(float a, Floats b, Floats c) {
    asm("fmla %0.4s, %1.4s, %2.s[0]" : "+w"(c) : "w"(b), "w"(a));
    return c;
}
WORD Doubles fma(double a, Doubles b, Doubles c) {
    asm("fmla %0.2d, %1.2d, %2.d[0]" : "+w"(c) : "w"(b), "w"(a));
    return c;
}
template <class V>
WORD V max(V a, V b) {
    return a > b ? a : b;
}
template <class M>
WORD bool any(M m) {
    return vmaxvq_u32((uint32x4_t)m) != 0;
}
WORD uint32x4_t spread(const void* p) { return vmovl_u16(vld1_u16(static_cast<const uint16_t*>(p))); }
WORD int32x4_t spread_bytes(const void* p) {
    uint32_t four;
    memcpy(&four, p, sizeof four);
    return vmovl_s16(vget_low_s16(vmovl_s8(vcreate_s8(four))));
}
WORD uint64x2_t spread_pairs(const void* p) {
    uint16_t two;
    memcpy(&two, p, sizeof two);
    return vmovl_u32(vget_low_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(two))))));
}
}  // namespace

#include "words.h"

namespace {
WORD F32 widen(const Half* p) {
    return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
WORD void narrow(Half* p, F32 x) {
    vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32(x)));
}
#undef WORD
}  // namespace
