// The taps over keys as a call: a piece is a query head and a segment of its keys, whatever heads share the
// keys: pools are per query head. Pieces write apart from one another, so they are taken in any order.

#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "layouts.h"
#include "memory.h"
#include "sweep.h"
#include "work.h"

namespace tilefold {
namespace {

class Tapping : Sequences {
   public:
    Tapping(const Problem& p, const Kernels& k, int64_t workers, const Arrays& a, const Pools& pools,
            const Selection& part, Stop& stop)
        : Sequences(p, a, part, k.block_k, true), k_(k), workers_(workers), pools_(pools), stop_(stop) {
        c_.v_dim = 0;
        c_.taps = {};
        c_.pack_keys = packs_pairs(k);
    }

    Report run(Team team) {
        int64_t longest = 0, pieces = 0;
        for (const Frame& f : frames_) {
            check_sizes(p_, f.q_len, f.kv_len);
            longest = std::max(longest, f.kv_len);
            ends_.push_back(pieces += last_row(f) > first_row(f) ? kv_heads() * segments(f) : 0);
        }
        if (!pieces) return {};
        const int workers = int(std::clamp<int64_t>(workers_, 1, pieces));
        KeyTaps sizes{};
        sizes.pools = int(pools_.keys.size()), sizes.maps = int(pools_.maps.size());
        sizes.cells = int(pools_.cells.size());
        scratch_bytes_ = aligned(std::max(k_.tap_scratch(c_, sizes), steady(k_).tap_scratch(c_, sizes)));
        most_segments_ = ceil_div(longest, SEGMENT);
        double aside = 0;
        for (const Pools::Map& map : pools_.maps) aside += double(map.rows) * double(most_segments_);
        const double units = double(frames_.size()) * double(kv_heads());
        check_bytes(double(workers) * double(scratch_bytes_) + units * aside * sizeof(double));
        aside_bytes_ = size_t(units * aside) * sizeof(double);
        Memory memory(workers * scratch_bytes_ + int64_t(aside_bytes_));
        scratch_ = memory.data();
        aside_ = reinterpret_cast<double*>(memory.data() + workers * scratch_bytes_);
        memset(aside_, 0, aside_bytes_);
        const int took = tilefold::run(
            team, workers, [](void* self, int worker) { static_cast<Tapping*>(self)->work(worker); }, this,
            &stop_);
        if (!took)
            throw std::runtime_error(
                "the process was forked in the middle of this call, whose sums are lost");
        bring_together();
        return {memory.bytes(), false};
    }

   private:
    static int64_t segments(const Frame& f) { return ceil_div(f.kv_len, SEGMENT); }

    void work(int worker) {
        [[maybe_unused]] const ArithmeticMode ours{};
        Line line{stop_, worker};
        Worker w = line.worker(scratch_ + worker * scratch_bytes_);
        while (!stop_.check(worker)) {
            const int64_t n = next_.fetch_add(1, std::memory_order_relaxed);
            if (n >= ends_.back()) return;
            const size_t at = size_t(std::upper_bound(ends_.begin(), ends_.end(), n) - ends_.begin());
            const Frame& f = frames_[at];
            const int64_t here = n - (at ? ends_[at - 1] : 0), head = here / segments(f);
            KeyTaps taps = of(f, at, head);
            of_sequence(f, k_).tap(c_, unit(f, head), taps, {first_row(f), last_row(f), here % segments(f)},
                                   w);
        }
    }

    // What is pooled of one head of a sequence.
    KeyTaps of(const Frame& f, size_t at, int64_t n) const {
        KeyTaps taps{};
        const int64_t h = head(n);
        for (const Pools::Keys& keys : pools_.keys) {
            const double* const factors = keys.factors ? keys.factors + f.item * p_.q_len + f.q0 : nullptr;
            taps.pool[taps.pools++] = {factors, keys.to + (f.item * p_.heads + h) * p_.kv_len + f.k0,
                                       keys.highest};
        }
        double* aside = aside_ + (int64_t(at) * kv_heads() + n) * most_segments_ * all_map_rows();
        for (const Pools::Map& map : pools_.maps) {
            const int64_t* const ends = map.ends + sequence(f) * (map.rows + map.cols + 2);
            taps.map[taps.maps++] = {ends,
                                     ends + map.rows + 1,
                                     map.rows,
                                     map.cols,
                                     map.to + (sequence(f) * p_.heads + h) * map.rows * map.cols,
                                     aside,
                                     map.highest};
            aside += most_segments_ * map.rows;
        }
        for (const Pools::Cells& cells : pools_.cells) {
            const int64_t pitch = cells.k1 - cells.k0;
            char* const to =
                static_cast<char*>(cells.to) + (f.item * p_.heads + h) * cells.rows * pitch * k_.element;
            taps.cell[taps.cells++] = {cells.slots + f.q0, cells.k0 - f.k0, cells.k1 - f.k0, to, pitch};
        }
        return taps;
    }
    int64_t all_map_rows() const {
        int64_t rows = 0;
        for (const Pools::Map& map : pools_.maps) rows += map.rows;
        return rows;
    }

    // Adds what segments laid aside to the bins that began before them, in their order.
    void bring_together() const {
        for (size_t at = 0; at < frames_.size(); at++)
            for (int64_t n = 0; n < kv_heads(); n++) {
                const KeyTaps taps = of(frames_[at], at, n);
                for (int m = 0; m < taps.maps; m++)
                    for (int64_t s = 1; s < segments(frames_[at]); s++) add_aside(taps.map[m], s);
            }
    }
    static void add_aside(const MapPool& map, int64_t segment) {
        const int64_t col =
            std::upper_bound(map.col_ends, map.col_ends + map.cols, segment * SEGMENT) - map.col_ends - 1;
        if (map.col_ends[col] == segment * SEGMENT) return;
        for (int64_t r = 0; r < map.rows; r++) {
            double& to = map.to[r * map.cols + col];
            const double x = map.aside[segment * map.rows + r];
            to = !map.highest ? to + x : x > to || x != x ? x : to;
        }
    }

    const Kernels& k_;
    const int64_t workers_;
    const Pools& pools_;
    Stop& stop_;
    std::vector<int64_t> ends_;  // pieces up to and with each frame
    std::atomic<int64_t> next_{0};
    char* scratch_ = nullptr;
    double* aside_ = nullptr;
    size_t aside_bytes_ = 0;
    int64_t scratch_bytes_ = 0, most_segments_ = 0;
};

}  // namespace

Report tap(const Problem& p, const Kernels& kernels, const Settings& s, const Arrays& a, const Pools& pools,
           const Selection& part, Team team, Stop& stop) {
    if (!p.batch || !p.q_len || !p.heads || !p.kv_len) return {};
    return Tapping(p, kernels, s.workers, a, pools, part, stop).run(team);
}

}  // namespace tilefold
