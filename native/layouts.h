// Where each sequence of a call lies, and what a kernel is told of it: common to both sweeps. Twin of
// layouts.py. Work falls into units, a sequence and a key head each.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <vector>

#include "fold.h"
#include "problem.h"
#include "sweep.h"

namespace tilefold {

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// One sequence within the arrays.
struct Frame {
    int64_t item;  // of the leading axes
    int64_t q0, k0, q_len, kv_len;
};

class Sequences {
   public:
    // `apart`: each query head is a unit of its own.
    Sequences(const Problem& p, const Arrays& a, const Selection& part, int64_t block_k, bool apart = false)
        : p_(p), a_(a), part_(part), group_(p.heads / p.kv_heads), apart_(apart), c_{} {
        c_.group = part.head < 0 && !apart ? group_ : 1;
        c_.dim = p.dim, c_.v_dim = p.v_dim, c_.scale = p.scale, c_.softcap = p.softcap;
        c_.bias_type = a.bias.type;
        c_.q = inner(a.q), c_.k = inner(a.k), c_.v = inner(a.v), c_.out = inner(a.out);
        c_.lse = inner(a.lse, 0);
        c_.bias = inner(a.bias), c_.cells = inner(a.cells);
        c_.spans = part.spans, c_.bits_bytes = part.bits_bytes, c_.bits_start = part.bits_start;
        c_.block_k = block_k;
        if (p.layout == PAGED) {
            c_.page = a.k.shape[a.k.dims - 2];
            c_.k_pages = pages(a.k, a.k_scale, p.dim), c_.v_pages = pages(a.v, a.v_scale, p.v_dim);
        }
        c_.kv_type = p.kv_dtype;
        c_.taps = {bool(p.want & ROWS), a.rows.top,       part.regions,
                   part.region_spans,   part.region_rows, a.rows.mass_step};
        find_frames();
    }

   protected:
    // The last axes of an array, zeros where it was not given.
    static Strides inner(const Array& a, int columns = 1) {
        if (!a) return {};
        const int64_t* s = a.strides + a.dims - columns;
        return {s[-2], s[-1], columns ? s[0] : 0};
    }

    // Keys or values of `width` dims, and their scales where they have any.
    static Pages pages(const Array& a, const Array& scale, int64_t width) {
        if (!scale) return {a.strides[0], 0, {}, 0};
        return {a.strides[0], scale.strides[0], inner(scale), width / std::max<int64_t>(scale.shape[3], 1)};
    }

    // Elements from the start of `a` to item `item` of its leading axes.
    static int64_t lead_at(const Array& a, int inner_dims, int64_t item) {
        int64_t at = 0;
        for (int i = a.dims - inner_dims - 1; i >= 0 && item; i--) {  // a pool of no pages has item 0 too
            at += item % a.shape[i] * a.strides[i];
            item /= a.shape[i];
        }
        return at;
    }

    // Where a head's row, its number of a row, or its cell with key 0 lies; null in an array not given.
    static char* row(const Array& a, int64_t item, int64_t head, int64_t row) {
        if (!a) return nullptr;
        const Strides s = inner(a);
        return a.data + (lead_at(a, 3, item) + head * s.head + row * s.row) * width(a.type);
    }
    static char* number(const Array& a, int64_t item, int64_t head, int64_t row) {
        if (!a) return nullptr;
        const Strides s = inner(a, 0);
        return a.data + (lead_at(a, 2, item) + head * s.head + row * s.row) * width(a.type);
    }
    static char* cell(const Array& a, const Frame& f, int64_t head) {
        if (!a) return nullptr;
        return row(a, f.item, head, f.q0) + f.k0 * inner(a).col * width(a.type);
    }

    // The kernels of a sequence.
    const Kernels& of_sequence(const Frame& f, const Kernels& k) const {
        return p_.want & INVARIANT || f.q_len * group_ <= k.steady_rows ? steady(k) : k;
    }

    int64_t first_row(const Frame& f) const { return std::min(part_.first_row, f.q_len); }
    int64_t last_row(const Frame& f) const { return std::min(part_.last_row, f.q_len); }
    int64_t tiles(const Frame& f, int64_t tile_rows) const {
        return ceil_div((last_row(f) - first_row(f)) * c_.group, tile_rows);
    }

    // How many units a sequence has, and of one of them its key head and its first query head.
    int64_t kv_heads() const { return part_.head >= 0 ? 1 : apart_ ? p_.heads : p_.kv_heads; }
    int64_t kv_head(int64_t n) const { return head(n) / group_; }
    int64_t head(int64_t n) const { return part_.head >= 0 ? part_.head : apart_ ? n : n * group_; }

    // The number of a sequence as it was given; frames are sorted.
    int64_t sequence(const Frame& f) const {
        if (p_.layout != VARLEN) return f.item;
        return std::upper_bound(a_.q_ends, a_.q_ends + p_.batch, f.q0) - a_.q_ends - 1;
    }

    // Key head n of those that are folded.
    Unit unit(const Frame& f, int64_t n) {
        Unit u{};
        u.q = row(a_.q, f.item, head(n), f.q0);
        const bool paged = p_.layout == PAGED;
        u.k = row(a_.k, paged ? 0 : f.item, kv_head(n), f.k0);
        u.v = row(a_.v, paged ? 0 : f.item, kv_head(n), f.k0);
        if (paged) u.table = a_.table + f.item * a_.table_width;
        u.k_scale = reinterpret_cast<const float*>(row(a_.k_scale, 0, kv_head(n), 0));
        u.v_scale = reinterpret_cast<const float*>(row(a_.v_scale, 0, kv_head(n), 0));
        u.out = row(a_.out, f.item, head(n), f.q0);
        u.lse = number(a_.lse, f.item, head(n), f.q0);
        u.kv_len = f.kv_len, u.first_row = first_row(f);
        u.band = p_.band;
        if (u.band.offset == PER_SEQUENCE) u.band.offset = f.kv_len - f.q_len;
        u.bias = cell(a_.bias, f, head(n));
        u.cells = reinterpret_cast<const uint8_t*>(cell(a_.cells, f, head(n)));
        u.lo = part_.lo, u.hi = part_.hi, u.bits = part_.bits;
        if (a_.alibi) u.alibi = a_.alibi + f.item * p_.heads + head(n);
        if (a_.sinks) u.sinks = a_.sinks + f.item * p_.heads + head(n);
        u.infinite = &infinite_;
        if (c_.taps.any) tell(u, f);
        return u;
    }

    const Problem& p_;
    const Arrays& a_;
    const Selection& part_;
    const int64_t group_;
    const bool apart_;
    Call c_;
    std::vector<Frame> frames_;  // those with the most work first
    int32_t infinite_ = 0;

   private:
    void tell(Unit& u, const Frame& f) const {
        const int64_t wide = width(a_.lse.type), at = (static_cast<char*>(u.lse) - a_.lse.data) / wide;
        const auto from = [&](void* base, int64_t n) {
            return base ? static_cast<char*>(base) + n * wide : nullptr;
        };
        u.seen.entropy = from(a_.rows.entropy, at), u.seen.peak = from(a_.rows.peak, at);
        u.seen.distance = from(a_.rows.distance, at), u.seen.mass = from(a_.rows.mass, at);
        const int64_t list = at * up(a_.rows.top, LIST_STEP);
        u.seen.top_scores = from(a_.rows.top_scores, list), u.seen.top_keys = from(a_.rows.top_keys, list);
        u.seen.lo = part_.region_lo, u.seen.hi = part_.region_hi, u.seen.first_key = f.k0;
    }

    void find_frames() {
        const bool packed = p_.layout == VARLEN;
        const int64_t first = part_.frame < 0 ? 0 : part_.frame,
                      last = part_.frame < 0 ? p_.batch : first + 1;
        frames_.reserve(size_t(last - first));
        for (int64_t n = first; n < last; n++) {
            if (packed)
                frames_.push_back({0, a_.q_ends[n], a_.kv_ends[n], a_.q_ends[n + 1] - a_.q_ends[n],
                                   a_.kv_ends[n + 1] - a_.kv_ends[n]});
            else
                frames_.push_back(
                    {n, 0, 0, a_.q_ends ? a_.q_ends[n] : p_.q_len, a_.kv_ends ? a_.kv_ends[n] : p_.kv_len});
        }
        if (packed || p_.has & LENGTHS)
            std::stable_sort(frames_.begin(), frames_.end(), [](const Frame& x, const Frame& y) {
                return x.q_len * x.kv_len > y.q_len * y.kv_len;
            });
    }
};

}  // namespace tilefold
