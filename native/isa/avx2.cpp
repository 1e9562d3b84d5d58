#define TILEFOLD_ISA avx2
#include "../simd/avx2.h"

#include "../unit.inl"
