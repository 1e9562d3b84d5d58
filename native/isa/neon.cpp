#define TILEFOLD_ISA neon
#include "../simd/neon.h"

#include "../unit.inl"
