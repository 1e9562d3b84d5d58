// Kernels that are watched, and calls as the door makes them.
#pragma once

#include <type_traits>

#include "../executor.h"
#include "../fold.h"
#include "definition.h"

namespace {

// The kernels of a machine, watched. One call at a time, so what it needs to know may be global.
const Kernels* watched;
int64_t scratch_bytes;

// Those of a sequence of few rows, or those of the call.
template <auto kernel, bool STEADY>
void watch(const Call& c, const Unit& u, const Piece& p, Worker& w) {
    char* const end = w.scratch + scratch_bytes;
    blank(w.scratch, scratch_bytes);
    guard(end);
    ((STEADY ? steady(*watched) : *watched).*kernel)(c, u, p, w);
    expect(unguard(end), p.r1 - p.r0 <= watched->few_rows ? "few rows wrote beyond the end of their scratch"
                                                          : "a tile wrote beyond the end of its scratch");
}

template <bool STEADY>
void watch_gradient(const Call& c, const Unit& u, const GradCall& g, const GradUnit& to, const GradPiece& p,
                    Worker& w) {
    char* const end = w.scratch + scratch_bytes;
    blank(w.scratch, scratch_bytes);
    guard(end);
    (STEADY ? steady(*watched) : *watched).grad(c, u, g, to, p, w);
    expect(unguard(end), "a gradient wrote beyond the end of its scratch");
}

template <bool STEADY>
void watch_taps(const Call& c, const Unit& u, const KeyTaps& taps, const TapPiece& p, Worker& w) {
    char* const end = w.scratch + scratch_bytes;
    blank(w.scratch, scratch_bytes);
    guard(end);
    (STEADY ? steady(*watched) : *watched).tap(c, u, taps, p, w);
    expect(unguard(end), "taps wrote beyond the end of their scratch");
}

// Either table asks for the scratch of both, so that it does not matter which is asked last.
template <bool STEADY>
void watch_table(Kernels& k) {
    k.scratch = [](const Call& c, int64_t rows) {
        const int64_t own = watched->scratch(c, std::min<int64_t>(rows, watched->most_rows));
        return (scratch_bytes = std::max(own, steady(*watched).scratch(c, rows))) + GUARD;
    };
    k.tile = watch<&Kernels::tile, STEADY>;
    if (k.row) k.row = watch<&Kernels::row, STEADY>;
    if (k.codes) k.codes = watch<&Kernels::codes, STEADY>;
    k.grad_scratch = [](const Call& c) {
        return (scratch_bytes =
                    aligned(std::max(watched->grad_scratch(c), steady(*watched).grad_scratch(c)))) +
               GUARD;
    };
    k.grad = watch_gradient<STEADY>;
    k.tap_scratch = [](const Call& c, const KeyTaps& taps) {
        return (scratch_bytes =
                    aligned(std::max(watched->tap_scratch(c, taps), steady(*watched).tap_scratch(c, taps)))) +
               GUARD;
    };
    k.tap = watch_taps<STEADY>;
}

Kernels watch_kernels(const Kernels& kernels) {
    static Kernels few;
    watched = &kernels;
    Kernels k = kernels;
    if (k.steady) {
        few = *k.steady;
        watch_table<true>(few);
        k.steady = &few;
    }
    watch_table<false>(k);
    return k;
}

// The arrays of a case, queries from row `at` on; keys and values in pages where the problem says so.
Arrays arrays_of(const Data& x, const Problem& p, int64_t at, Tensor& out, Tensor* lse) {
    Data& writable = const_cast<Data&>(x);
    Arrays a{writable.q.array(at), writable.k.array(), writable.v.array(), out.array(at), {}, {}, {}};
    if (lse) a.lse = lse->array(at, false);
    if (p.layout == PAGED) {
        a.k = writable.k_pages.rows.array(), a.v = writable.v_pages.rows.array();
        a.table = x.table.at.data(), a.table_width = x.table.width;
        if (is_code(p.kv_dtype))
            a.k_scale = writable.k_pages.scales.array(), a.v_scale = writable.v_pages.scales.array();
    }
    if (x.c.biased) a.bias = writable.bias.array(at);
    if (x.c.hides == CELLS_HIDE) a.cells = writable.cells.array(at);
    if (x.c.alibi) a.alibi = x.alibi.data();
    if (x.c.sinks) a.sinks = x.sinks.data();
    if (x.c.lengths != WHOLE) a.q_ends = x.q_ends.data(), a.kv_ends = x.kv_ends.data();
    return a;
}

bool in_panels(const Data& x) { return x.c.hides == SPANS_HIDE || x.c.hides == BITS_HIDE; }

// Query rows first … last of each sequence as the door calls the core: at once, or, where a mask has spans or
// bits, by sequence, by panel of rows, and by head if it says so. `at` is the query that row 0 of the problem
// is.
template <class Call>
void in_parts(const Data& x, const Problem& p, int64_t first, int64_t last, int64_t at, Call&& call) {
    Selection part;
    part.first_row = first, part.last_row = last;
    if (!in_panels(x)) return call(part);
    constexpr int64_t PANEL = 97;
    for (const Frame& f : x.frames)
        for (int64_t row = first; row < std::min(last, f.q_len); row += PANEL)
            for (int64_t head = x.c.by_head ? 0 : -1; head < (x.c.by_head ? p.heads : 0); head++) {
                part.frame = f.n, part.head = head;
                part.first_row = row, part.last_row = std::min({row + PANEL, last, f.q_len});
                const int64_t rows = part.last_row - row;
                std::vector<int64_t> lo, hi;
                int64_t start = f.kv_len, stop = 0;
                for (int64_t i = 0; i < rows; i++) {
                    int64_t b0, b1;
                    x.band(f, at + row + i, b0, b1);
                    if (b1 > b0) start = std::min(start, b0), stop = std::max(stop, b1);
                    if (x.c.hides == BITS_HIDE)
                        lo.push_back(b0), hi.push_back(b1);
                    else
                        for (const auto& [s0, s1] : x.spans(f, std::max<int64_t>(head, 0), at + row + i))
                            lo.push_back(s0), hi.push_back(s1);
                }
                part.spans = int64_t(lo.size()) / rows, part.lo = lo.data(), part.hi = hi.data();
                std::vector<uint8_t> bits;
                if (x.c.hides == BITS_HIDE) {
                    start = std::min(start, stop);
                    part.bits_start = start, part.bits_bytes = (stop - start + 7) / 8;
                    bits.assign(size_t(rows * part.bits_bytes), 0);
                    bits.reserve(1);
                    part.bits = bits.data();
                    for (int64_t i = 0; i < rows; i++)
                        for (int64_t j = start; j < stop; j++)
                            if (x.bit(f, std::max<int64_t>(head, 0), at + row + i, j))
                                bits[size_t(i * part.bits_bytes + (j - start) / 8)] |=
                                    uint8_t(1 << (j - start) % 8);
                }
                call(part);
            }
}
// Folds query rows first … last of each sequence.
void fold_rows(const Data& x, const Problem& p, const Kernels& k, const Settings& s, Team team, int64_t first,
               int64_t last, int64_t at, Result& r) {
    const Arrays a = arrays_of(x, p, at, r.out, r.has_lse ? &r.lse : nullptr);
    in_parts(x, p, first, last, at, [&](const Selection& part) {
        Stop stop;
        memory_bytes = 0;
        const int64_t bytes = tilefold::fold(p, k, s, a, part, team, stop).bytes;
        expect(bytes == memory_bytes, "fold() does not say how much it allocated");
        r.bytes = std::max(r.bytes, bytes);
    });
}

}  // namespace
