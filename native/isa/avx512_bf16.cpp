#define TILEFOLD_ISA avx512_bf16
#include "../simd/avx512_bf16.h"
#include "../tiles.h"
#include "../product.inl"
#include "../pack.inl"
#include "../scores.inl"
#include "../fold.inl"
#include "../row.inl"
#include "../kernels.inl"
