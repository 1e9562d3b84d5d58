// One call on this machine: which pieces of work it falls into, who takes them, and the memory they need.
// Compiled once; the kernels do the arithmetic. Everything that a plan predicts is computed by the same
// functions that later allocate.
#pragma once

#include <stdint.h>

#include <vector>

#include "executor.h"
#include "fold.h"
#include "problem.h"

namespace tilefold {

// How a problem is folded: tiles of at most `tile_rows` query rows (heads of a group counted), keys in blocks
// of `block_k`, the keys of a row in one piece or one piece per segment.
struct Settings {
    int64_t tile_rows, block_k;
    int64_t splits;
    int64_t workers;
};

// An array as it lies; strides in elements.
struct Array {
    char* data = nullptr;
    int dims = 0;
    const int64_t* shape = nullptr;
    const int64_t* strides = nullptr;
    DType type = DType::float32;
    explicit operator bool() const { return data != nullptr; }
};

// The arrays of a call: q (*lead, heads, q_len, dim), k and v, out, lse without the last axis; bias and cells
// broadcast to (*lead, heads, q_len, kv_len); alibi and sinks contiguous float64 (*lead, heads).
struct Arrays {
    Array q, k, v, out, lse, bias, cells;
    const double *alibi = nullptr, *sinks = nullptr;
    // Lengths per batch item, or cumulative ones when packed.
    const int64_t *q_ends = nullptr, *kv_ends = nullptr;
    // Where k and v are (pages, kv_heads, page, dim; int4: dim / 2): the pages of each batch item,
    // `table_width` of them, −1 none.
    const int64_t* table = nullptr;
    int64_t table_width = 0;
    // Where k and v are codes: float32 (pages, kv_heads, page, groups of dims).
    Array k_scale = {}, v_scale = {};
    // What is to be told of each row; these lie as lse does, one mass after another.
    struct {
        void *entropy = nullptr, *peak = nullptr, *distance = nullptr, *mass = nullptr, *top_scores = nullptr,
             *top_keys = nullptr;
        int64_t top = 0, mass_step = 0;
    } rows = {};
};

// What part of a call is folded, and what the mask says of it: query rows first_row … last_row of each
// sequence, or of sequence `frame` and query head `head` alone where they are not negative.
struct Selection {
    int64_t frame = -1, head = -1;
    int64_t first_row = 0, last_row = 0;
    int64_t spans = 0;
    const int64_t *lo = nullptr, *hi = nullptr;
    const uint8_t* bits = nullptr;
    int64_t bits_bytes = 0, bits_start = 0;
    // The spans of regions whose mass is told, from first_row on; of one sequence.
    int64_t regions = 0, region_spans = 0, region_rows = 0;
    const int64_t *region_lo = nullptr, *region_hi = nullptr;
};

// Whether the kernels of a call give its rows the bits that each has alone (`Kernels::steady`).
bool is_steady(const Problem& p, const Kernels& kernels);

// The best settings, at most `threads` workers.
Settings plan(const Problem& p, const Kernels& kernels, int threads);

// The nearest to `s` that the kernels can do.
Settings resized(const Problem& p, const Kernels& kernels, Settings s);

// Bytes that fold() will allocate; fewer where all sequences are shorter than q_len and kv_len.
int64_t workspace(const Problem& p, const Kernels& kernels, const Settings& s);

// What a call tells beside its results.
struct Report {
    int64_t bytes;  // allocated
    bool infinite;  // the highest score of some row was +inf
};

// Throws std::bad_alloc. Where `stop` ended it early the results are incomplete.
Report fold(const Problem& p, const Kernels& kernels, const Settings& s, const Arrays& a,
            const Selection& part, Team team, Stop& stop);

// What the backward pass reads and writes beside the arrays of a call (out and lse among them): dq, dk and dv
// in the storage type, or dk and dv in the accumulate type, to be added to, where `add` says so; dbias in the
// accumulate type, a view with steps of 0 where it is summed; dsinks (sequences, heads).
struct Gradients {
    Array dout, dlse, dq, dk, dv, dbias;
    double* dsinks = nullptr;
    bool add = false;
};

// The same four for the backward pass. Its tiles and blocks are the kernels' own.
Settings grad_plan(const Problem& p, const Kernels& kernels, int threads);
int64_t grad_workspace(const Problem& p, const Kernels& kernels, const Settings& s);
Report gradient(const Problem& p, const Kernels& kernels, const Settings& s, const Arrays& a,
                const Gradients& g, const Selection& part, Team team, Stop& stop);

// What is pooled of finished weights over query rows: per key (items, heads, kv_len); in maps (sequences,
// heads, rows, cols), with the ends of each sequence's bins, rows + 1 and then cols + 1; single cells (items,
// heads, rows, k1 − k0) of query rows that have a slot. Arrays are contiguous and zero; a call for some of
// the rows adds to them. `lse` of the call is read.
struct Pools {
    struct Keys {
        const double* factors;  // (items, q_len), null: every query counts 1
        double* to;
        bool highest;
    };
    struct Map {
        const int64_t* ends;
        int64_t rows, cols;
        double* to;
        bool highest;
    };
    struct Cells {
        const int64_t* slots;  // (q_len), −1 none
        int64_t rows, k0, k1;
        void* to;
    };
    std::vector<Keys> keys;  // at most MOST_POOLS of each
    std::vector<Map> maps;
    std::vector<Cells> cells;
};
Report tap(const Problem& p, const Kernels& kernels, const Settings& s, const Arrays& a, const Pools& pools,
           const Selection& part, Team team, Stop& stop);

}  // namespace tilefold
