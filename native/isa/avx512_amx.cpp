#define TILEFOLD_ISA avx512_amx
#include "../simd/avx512_amx.h"

#include "../unit.inl"
