#define TILEFOLD_ISA avx512
#include "../simd/avx512.h"

#include "../unit.inl"
