#define TILEFOLD_ISA avx2
#include "../simd/avx2.h"
#include "../tiles.h"
#include "../product.inl"
#include "../pack.inl"
#include "../scores.inl"
#include "../fold.inl"
#include "../row.inl"
#include "../kernels.inl"
