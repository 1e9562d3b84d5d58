#define TILEFOLD_ISA scalar
#include "../simd/scalar.h"

#include "../unit.inl"
