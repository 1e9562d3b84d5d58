#define TILEFOLD_ISA avx512
#include "../simd/avx512.h"
#include "../tiles.h"
#include "../product.inl"
#include "../pack.inl"
#include "../scores.inl"
#include "../fold.inl"
#include "../row.inl"
#include "../kernels.inl"
