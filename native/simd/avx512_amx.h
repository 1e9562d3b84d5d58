// AVX-512 with AMX: a unit of its own multiplies tiles of 16 x 32 by 32 x 16 bf16 numbers, some thirty times
// as fast as the dot product of vectors. Its registers belong to a thread between load and release of a
// configuration, and the operating system must have been asked for them first (dispatch.cpp does).
#pragma once

#include "avx512_bf16.h"

#define TILEFOLD_HAS_TILES
