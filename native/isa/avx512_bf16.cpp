#define TILEFOLD_ISA avx512_bf16
#include "../simd/avx512_bf16.h"

#include "../unit.inl"
