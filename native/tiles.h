// Which keys the rows of a tile see: nobody else knows geometry. Twin of tiles.py.
// A block of keys is EMPTY (skipped), FULL (nothing is tested) or EDGE. The fact to know: padding lanes
// repeat the tile's last row, so they never make a FULL block an EDGE.
#pragma once

#include "fold.h"

namespace tilefold {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t within(int64_t x, int64_t lo, int64_t hi) { return least(most(x, lo), hi); }

// Query and head of row r, counted on without dividing: rows follow one another.
struct Row {
    int64_t query, head;
    const int64_t group;

    Row(int64_t r, int64_t group_) : query(r / group_), head(r % group_), group(group_) {}
    void next() {
        if (++head == group) head = 0, query++;
    }
    int64_t at(const Strides& s) const { return query * s.row + head * s.head; }
};

// What query i sees of the band: lo ≤ j < hi within the sequence.
inline void band_of(const Unit& u, int64_t i, int64_t& lo, int64_t& hi) {
    const int64_t at = i + u.band.offset;
    lo = within(u.band.left >= UNLIMITED ? 0 : at - u.band.left, 0, u.kv_len);
    hi = within(u.band.right >= UNLIMITED ? u.kv_len : at + u.band.right + 1, 0, u.kv_len);
    if (hi < lo) hi = lo;
}

enum class Kind { EMPTY, FULL, EDGE };

// The keys that N lanes see: per lane the hull lo ≤ j < hi, and the hull of all of them.
template <int N>
struct Sight {
    int64_t lo[N], hi[N];
    int64_t first, last;            // hull over lanes
    int64_t full_first, full_last;  // what every lane's hull covers
    bool holes;                     // a lane may not see all of its hull

    void look(const Call& c, const Unit& u, int64_t r0, int64_t rows) {
        holes = c.spans > 1 || u.bits || u.cells;
        if (!u.lo && u.band.left >= UNLIMITED && u.band.right >= UNLIMITED) {
            for (int r = 0; r < N; r++) lo[r] = 0, hi[r] = u.kv_len;
            first = full_first = 0, last = full_last = u.kv_len;
            return;
        }
        first = INT64_MAX, last = 0, full_first = 0, full_last = INT64_MAX;
        Row row(r0, c.group);
        for (int r = 0; r < N; r++) {
            if (r && (row.head || r >= rows)) {  // the query before, or a padding lane
                lo[r] = lo[r - 1], hi[r] = hi[r - 1];
            } else {
                band_of(u, row.query, lo[r], hi[r]);
                if (u.lo) clip_to_spans(c, u, row.query, lo[r], hi[r]);
                if (hi[r] > lo[r]) {
                    first = least(first, lo[r]);
                    last = most(last, hi[r]);
                }
                full_first = most(full_first, lo[r]);
                full_last = least(full_last, hi[r]);
            }
            if (r + 1 < rows) row.next();
        }
        if (last == 0) first = 0;
    }

    Kind kind(const Call& c, const Unit& u, int64_t r0, int64_t rows, int64_t k0, int64_t k1) const {
        if (k1 <= first || k0 >= last) return Kind::EMPTY;
        if (u.bits || u.cells) return Kind::EDGE;
        if (!holes) return k0 >= full_first && k1 <= full_last ? Kind::FULL : Kind::EDGE;
        bool some = false, all = true;
        for (int64_t i = r0 / c.group; i <= (r0 + rows - 1) / c.group; i++) {
            bool covered = false;
            for (int64_t n = 0; n < c.spans; n++) {
                int64_t a, b;
                span(i, n, c, u, a, b);
                some |= a < k1 && b > k0;
                covered |= a <= k0 && b >= k1;
            }
            all &= covered;
        }
        return all ? Kind::FULL : some ? Kind::EDGE : Kind::EMPTY;
    }

    // Span n of query i, within its band.
    static void span(int64_t i, int64_t n, const Call& c, const Unit& u, int64_t& lo, int64_t& hi) {
        band_of(u, i, lo, hi);
        const int64_t at = (i - u.first_row) * c.spans + n;
        lo = most(lo, u.lo[at]);
        hi = most(least(hi, u.hi[at]), lo);
    }

   private:
    static void clip_to_spans(const Call& c, const Unit& u, int64_t i, int64_t& lo, int64_t& hi) {
        int64_t first = INT64_MAX, last = 0;
        for (int64_t n = 0; n < c.spans; n++) {
            int64_t a, b;
            span(i, n, c, u, a, b);
            if (b > a) first = least(first, a), last = most(last, b);
        }
        lo = least(first, last);
        hi = last;
    }
};

}  // namespace
}  // namespace tilefold
