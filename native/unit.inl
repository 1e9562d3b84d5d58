// The algorithms of one machine, each built on those before it. A unit in isa/ names the machine, includes
// its vocabulary and then this; nothing of the standard library may come in with it.

// clang-format off
#include "tiles.h"
#include "product.inl"
#ifdef TILEFOLD_HAS_TILES
#include "product_amx.inl"
#include "product_pieces.inl"
#endif
#include "pack.inl"
#include "scores.inl"
#include "stats.inl"
#include "fold.inl"
#include "ahead.inl"
#include "row_vectors.inl"
#ifdef TILEFOLD_HAS_TILES
#include "row_amx.inl"
#include "row_codes.inl"
#endif
#include "row.inl"
#include "replay.inl"
#include "taps.inl"
#include "kernels.inl"
// clang-format on
