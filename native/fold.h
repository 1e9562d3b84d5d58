// What a kernel is told, and the table of kernels that each machine offers. Shared by code that is compiled
// once for everyone and code that is compiled per machine, so nothing of the standard library may be included
// here: a weak symbol compiled for AVX-512 could be linked for all.
#pragma once

#include "problem.h"

namespace tilefold {

// Functions in headers are static: an inline one that is not inlined is a weak symbol.
static constexpr int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
static constexpr int64_t aligned(int64_t bytes) { return up(bytes, 64); }

// Distances in elements, of either sign.
struct Strides {
    int64_t head = 0, row = 0, col = 0;
};

// Keys or values in pages: the step from one page to the next and, where they are codes, that of their
// scales, of which a row has one for every `group` dims.
struct Pages {
    int64_t step, scale_step;
    Strides scale;  // its col is from one group to the next
    int64_t group;
};

// What a fold tells of each query row on its way (stats.inl), and where that goes: arrays in the
// accumulate type that lie as lse does, of which a unit has its own part, null where nobody asks. `top` is
// how many scores of a row are listed, in lists of whole steps, and their keys in integers as wide. A region
// is another mask, of which the mass is told: `spans` spans for each of `rows` rows, one region after
// another, and so the masses, `step` apart.
constexpr int MOST_REGIONS = 8, LIST_STEP = 16;
struct RowTaps {
    bool any;
    int64_t top;
    int64_t regions, spans, rows, step;
};
struct RowSeen {
    void *entropy, *peak, *distance, *mass, *top_scores, *top_keys;
    const int64_t *lo, *hi;  // spans of regions, from first_row
    int64_t first_key;       // what key 0 is called
};

// The facts of a call that every piece of it shares. Query rows are counted through the heads that share a
// key head: row r is query r / group of head r % group, so that neighbours in a tile see nearly the same
// keys.
struct Call {
    int64_t group, dim, v_dim;
    double scale, softcap;
    DType bias_type;
    Strides q, k, v, out, lse, bias, cells;
    int64_t spans;           // spans per query row where a unit has any, else 0
    int64_t bits_bytes;      // bytes of bits per query row
    int64_t bits_start;      // the key that bit 0 stands for
    int64_t block_k;         // keys per block; blocks lie on an absolute grid
    int64_t page;            // key rows per page, 0 where keys lie one after another
    Pages k_pages, v_pages;  // with pages only
    DType kv_type;           // of keys and values: that of the queries, or codes
    bool pack_keys;          // keys are copied into panels too, not only values
    RowTaps taps;
};

// Converted keys and values of one key head, filled block by block by whoever needs a block first.
struct Panel {
    void* keys;
    void* values;
    int32_t* done;  // per block: 0 nobody, 1 somebody is at it, 2 there
};

// One sequence and one key head. Pointers stand at its query 0, first head of the group, and key 0 (of page
// 0).
struct Unit {
    const void *q, *k, *v;
    void *out, *lse;  // lse may be null
    int64_t kv_len;
    const int64_t* table;            // where k and v lie in pages: which page is the n-th, −1 none
    const float *k_scale, *v_scale;  // of codes, of row 0 of page 0
    bool codes;                      // are multiplied as they lie: all rows of the sequence are few
    int64_t first_row;               // the query that row 0 of spans and bits stands for
    Band band;                       // offset resolved
    const void* bias;                // null without
    const uint8_t* cells;            // a boolean array, null without
    const int64_t *lo, *hi;          // spans per query from first_row, null without
    const uint8_t* bits;             // packed cells per query from first_row, null without
    const double *alibi, *sinks;     // per head of the group, null without
    int32_t* infinite;               // set to 1 where the highest score of a row is +inf
    Panel panel;                     // null pointers where nothing is packed for several tiles
    RowSeen seen;
};

// One thread's memory and its line to the outside.
struct Worker {
    char* scratch;
    void* context;
    bool (*stop)(void* context);   // asked now and then: true means that the result is not wanted any more
    void (*relax)(void* context);  // called while waiting for another worker
};

// Rows r0 … r1 of a unit over all keys, or over the keys of one segment only: then the state goes to `state`.
struct Piece {
    int64_t r0, r1;
    int64_t segment;  // −1: all of them, and the rows are finalized
    void* state;
};

// What the backward pass adds to a call: `add` says that dk and dv are running sums in the accumulate type,
// which a call for some of the rows adds to; else they are written, in the storage type.
struct GradCall {
    Strides dout, dlse, dq, dk, dv, dbias;
    bool add;
};

// The same for a unit. dlse, dbias and dsinks are null where there are none; dbias is in the accumulate type,
// with steps of 0 where it is summed; dsinks are per head of the group.
struct GradUnit {
    const void *dout, *dlse;
    void *dq, *dk, *dv, *dbias;
    double* dsinks;
    void* sums;      // dq of each tile, [tile][dim][rows]; null where the keys are one segment
    int32_t* turns;  // per tile: segments that have added to it
};

// Rows r0 … r1 of a unit with the keys of one of its segments.
struct GradPiece {
    int64_t r0, r1;
    int64_t segment, keys;  // which one, and keys per segment
};

// What sweep two pools over the rows of one query head (taps.inl). A pool is per key, in double: a sum, or
// the highest; `factors` say how much each query counts, null: all alike. A map has bins [rows][cols] that
// end where its ends say, a count of bins and 1 more of each; `aside` is [segments][rows]. Cells are copied
// for the rows that have a slot.
constexpr int MOST_POOLS = 8;
struct KeyPool {
    const double* factors;
    double* to;
    bool highest;
};
struct MapPool {
    const int64_t *row_ends, *col_ends;
    int64_t rows, cols;
    double *to, *aside;
    bool highest;
};
struct CellPool {
    const int64_t* slots;  // per query, −1 none
    int64_t k0, k1;
    void* to;  // in the accumulate type, [slots][pitch]
    int64_t pitch;
};
struct KeyTaps {
    int pools, maps, cells;
    KeyPool pool[MOST_POOLS];
    MapPool map[MOST_POOLS];
    CellPool cell[MOST_POOLS];
};
struct TapPiece {
    int64_t r0, r1;
    int64_t segment;
};

// Keys per block and per segment of the backward pass: what a worker keeps of dk, dv and packed keys fits the
// second cache.
constexpr int64_t GRAD_BLOCK = 128;
static constexpr int64_t grad_segment(int64_t dim, int64_t v_dim) {
    return dim + v_dim <= 256 ? 512 : dim + v_dim <= 512 ? 256 : 128;
}

// Keys are folded in segments of so many, each from empty, and segments are merged from left to right: the
// one order that every plan keeps, whatever the rows, the threads or the splits.
constexpr int64_t SEGMENT = 1024;

// What a machine offers for one storage type.
struct Kernels {
    int lanes;        // query rows in a vector
    int tile_rows;    // query rows in a tile
    int most_rows;    // query rows in a piece at most
    int few_rows;     // up to so many query rows `row` is the faster one
    int steady_rows;  // up to so many query rows a sequence has the `steady` kernels, where there are any
    int grad_rows;    // query rows in a tile of the backward pass
    int pieces_each;  // so many pieces for each worker are enough, where tiles are many
    double reading;   // time that a piece takes to read keys and values, in tiles; 0 where it hardly counts
    int block_k;      // keys per block
    int element;      // bytes of an accumulator element
    int key_bytes;    // bytes of a packed key's element, 0 where keys are read where they lie
    int value_bytes;  // the same of values
    int64_t panels;   // bytes that panels may take; where they are more, each piece packs for itself
    int multiple;     // elements of keys that are read at once: rows are padded to a multiple of it
    int packed_rows;  // packed matrices have their rows in groups of so many
    int64_t (*scratch)(const Call&, int64_t rows);
    void (*tile)(const Call&, const Unit&, const Piece&, Worker&);
    void (*row)(const Call&, const Unit&, const Piece&, Worker&);
    // The same over codes, not in the bits of their numbers; null where it would bring nothing.
    void (*codes)(const Call&, const Unit&, const Piece&, Worker&);
    int64_t (*grad_scratch)(const Call&);
    // Adds this segment to dq, and writes its dk and dv.
    void (*grad)(const Call&, const Unit&, const GradCall&, const GradUnit&, const GradPiece&, Worker&);
    int64_t (*tap_scratch)(const Call&, const KeyTaps&);  // of which the counts are looked at
    void (*tap)(const Call&, const Unit&, const KeyTaps&, const TapPiece&, Worker&);
    // Merge the states of `segments` segments, `stride` bytes apart, and finalize.
    void (*join)(const Call&, const Unit&, const Piece&, int64_t segments, int64_t stride);
    // The kernels of sequences of few rows, and of calls that want the same bits whatever a row is among:
    // these here round otherwise, and have no `row`. Null where all have these.
    const Kernels* steady;
};

// Whether keys are packed where they do not lie in pairs.
static inline bool packs_pairs(const Kernels& k) { return k.value_bytes && !k.key_bytes; }

static inline const Kernels& steady(const Kernels& k) { return k.steady ? *k.steady : k; }

// Elements of the state of one row: maximum, sum, and from the sixteenth on the accumulator, in whole
// vectors.
static constexpr int64_t state_elements(int64_t v_dim) { return (v_dim + 15) / 16 * 16 + 16; }

// The kernels of each machine, by storage type.
#define TILEFOLD_UNIT(isa)                 \
    namespace isa {                        \
    const Kernels& kernels(DType storage); \
    }
TILEFOLD_UNIT(scalar)
#if defined(__x86_64__)
TILEFOLD_UNIT(avx2)
TILEFOLD_UNIT(avx512)
TILEFOLD_UNIT(avx512_bf16)
TILEFOLD_UNIT(avx512_amx)
#endif
#if defined(__aarch64__)
TILEFOLD_UNIT(neon)
#endif
#undef TILEFOLD_UNIT

}  // namespace tilefold
