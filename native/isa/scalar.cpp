#define TILEFOLD_ISA scalar
#include "../simd/scalar.h"
#include "../tiles.h"
#include "../product.inl"
#include "../pack.inl"
#include "../scores.inl"
#include "../fold.inl"
#include "../row.inl"
#include "../kernels.inl"
