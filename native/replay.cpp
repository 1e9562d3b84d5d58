// The backward pass as a call: which pieces it falls into and who takes them. A piece is a unit and a segment
// of its keys; dk and dv are the piece's own, dq is summed over the segments of a unit in their order. So
// pieces of as many units as there are workers take turns, segment by segment: nobody waits long for the
// segment before. The fact to know: whoever waits, waits for a piece that was taken earlier, so nobody waits
// for ever.
//
// A bias that is broadcast makes pieces share what they add to; these are done by one worker, in order.

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

int64_t segments_of(int64_t kv_len, int64_t keys) { return std::max<int64_t>(1, ceil_div(kv_len, keys)); }

struct Shape {
    int64_t units, tiles, segments;  // tiles and segments of the longest unit
    int64_t slots;                   // units whose dq is being summed
    int64_t scratch, sums, turns;

    Shape(const Problem& p, const Kernels& k, const Settings& s, int64_t q_len, int64_t kv_len) {
        check_sizes(p, q_len, kv_len);
        const int64_t group = p.heads / p.kv_heads, keys = grad_segment(p.dim, p.v_dim);
        units = p.batch * p.kv_heads;
        tiles = ceil_div(q_len * group, k.grad_rows);
        segments = segments_of(kv_len, keys);
        // Pieces may share a bias; only the arrays tell whether they do.
        slots = segments == 1 ? 0 : p.has & BIAS ? units : std::min(units, 2 * s.workers);
        Call c{};
        c.dim = p.dim, c.v_dim = p.v_dim, c.group = group, c.block_k = GRAD_BLOCK, c.softcap = p.softcap;
        scratch = aligned(std::max(k.grad_scratch(c), steady(k).grad_scratch(c)));
        sums = aligned(tiles * p.dim * k.grad_rows * k.element);
        turns = aligned(tiles * int64_t(sizeof(int32_t)));
    }

    int64_t bytes(int64_t workers) const {
        check_bytes(double(workers) * double(scratch) + double(slots) * (double(sums) + double(turns)));
        return workers * scratch + slots * (sums + turns);
    }
};

class Backward : Sequences {
   public:
    Backward(const Problem& p, const Kernels& k, const Settings& s, const Arrays& a, const Gradients& g,
             const Selection& part, Stop& stop)
        : Sequences(p, a, part, GRAD_BLOCK),
          k_(k),
          s_(s),
          g_(g),
          stop_(stop),
          keys_(grad_segment(p.dim, p.v_dim)) {
        call_.dout = inner(g.dout), call_.dlse = inner(g.dlse, 0);
        call_.dq = inner(g.dq), call_.dk = inner(g.dk), call_.dv = inner(g.dv), call_.dbias = inner(g.dbias);
        call_.add = g.add;
    }

    Report run(Team team) {
        int64_t q_len = 0, kv_len = 0;
        for (const Frame& f : frames_) q_len = std::max(q_len, f.q_len), kv_len = std::max(kv_len, f.kv_len);
        const Shape shape(p_, k_, s_, q_len, kv_len);
        list_pieces();
        if (jobs_.empty()) return {};
        Memory memory(shape.bytes(s_.workers));
        lay_out(shape, memory.data());
        const int workers = int(std::max<int64_t>(1, std::min(s_.workers, int64_t(jobs_.size()))));
        const int took = tilefold::run(
            team, workers, [](void* self, int worker) { static_cast<Backward*>(self)->work(worker); }, this,
            &stop_);
        if (!took) start_again();
        return {memory.bytes(), false};
    }

   private:
    struct Piece {
        int32_t frame, head;
        int64_t segment;
    };
    // The sums of one unit at a time; `left` pieces of it are not done yet.
    struct Slot {
        void* sums;
        int32_t* turns;
        std::atomic<int64_t> unit{-1}, left{0};
    };

    int64_t order(const Piece& p) const { return p.frame * kv_heads() + p.head; }
    int64_t segments(const Piece& p) const { return segments_of(frames_[size_t(p.frame)].kv_len, keys_); }

    // Pieces in order, and where each worker's share of them ends: at one segment of a class of units, which
    // are those that share a bias: one, or those of one head, or of one item, or all.
    void list_pieces() {
        bool items = false, heads = false, keys = false;  // over what a bias is broadcast
        if (g_.dbias) {
            const Array& b = g_.dbias;
            for (int i = 0; i < b.dims - 3; i++) items |= b.shape[i] > 1 && !b.strides[i];
            items |= p_.layout == VARLEN && (!call_.dbias.row || !call_.dbias.col);
            heads = p_.heads > 1 && !call_.dbias.head;
            keys = p_.kv_len > 1 && !call_.dbias.col;
        }
        const int64_t every = int64_t(frames_.size()), all_heads = kv_heads();
        const int64_t across = heads ? 1 : all_heads, classes = (items ? 1 : every) * across;
        const int64_t together = items || heads || keys ? classes : s_.workers;
        for (int64_t first = 0; first < classes; first += together)
            for (int64_t n = 0, more = 1; more; n++) {
                more = 0;
                for (int64_t share = first; share < std::min(classes, first + together); share++) {
                    const int64_t frame = items ? 0 : share / across, head = heads ? 0 : share % across;
                    for (int64_t f = frame; f < (items ? every : frame + 1); f++)
                        for (int64_t h = head; h < (heads ? all_heads : head + 1); h++)
                            more |= add({int32_t(f), int32_t(h), n}, keys);
                    if (jobs_.empty() ? !pieces_.empty() : jobs_.back() != pieces_.size())
                        jobs_.push_back(pieces_.size());
                }
                if (keys) break;
            }
    }
    // Segment n of a unit, or that one and all after it; whether there was one.
    bool add(Piece p, bool and_others) {
        const int64_t end = and_others ? segments(p) : std::min(segments(p), p.segment + 1);
        if (p.segment >= end) return false;
        for (; p.segment < end; p.segment++) pieces_.push_back(p);
        return true;
    }

    void lay_out(const Shape& shape, char* at) {
        scratch_ = at, scratch_bytes_ = shape.scratch;
        at += s_.workers * shape.scratch;
        slots_ = std::vector<Slot>(size_t(shape.slots));
        turns_bytes_ = size_t(shape.turns);
        for (Slot& slot : slots_) {
            slot.sums = at, slot.turns = reinterpret_cast<int32_t*>(at + shape.sums);
            at += shape.sums + shape.turns;
        }
    }

    // In a process that was forked in the middle of the call.
    void start_again() {
        if (g_.add || g_.dbias || g_.dsinks)
            throw std::runtime_error(
                "the process was forked in the middle of this call, whose sums are lost");
        for (Slot& slot : slots_) slot.unit = -1, slot.left = 0;
        next_ = 0;
        work(0);
    }

    void work(int worker) {
        [[maybe_unused]] const ArithmeticMode ours{};
        Line line{stop_, worker};
        Worker w = line.worker(scratch_ + worker * scratch_bytes_);
        while (!stop_.check(worker)) {
            const size_t n = next_.fetch_add(1, std::memory_order_relaxed);
            if (n >= jobs_.size()) return;
            for (size_t i = n ? jobs_[n - 1] : 0; i < jobs_[n]; i++) take(pieces_[i], w);
        }
    }

    void take(const Piece& p, Worker& w) {
        const Frame& f = frames_[size_t(p.frame)];
        const Unit u = unit(f, p.head);
        const int64_t h = head(p.head);
        GradUnit to{};
        to.dout = row(g_.dout, f.item, h, f.q0), to.dlse = number(g_.dlse, f.item, h, f.q0);
        to.dq = row(g_.dq, f.item, h, f.q0);
        to.dk = row(g_.dk, f.item, kv_head(p.head), f.k0), to.dv = row(g_.dv, f.item, kv_head(p.head), f.k0);
        to.dbias = cell(g_.dbias, f, h);
        if (g_.dsinks) to.dsinks = g_.dsinks + sequence(f) * p_.heads + h;
        Slot* slot = slots_.empty() || segments(p) == 1 ? nullptr : &slots_[size_t(order(p)) % slots_.size()];
        if (slot && !enter(*slot, p, w)) return;
        if (slot) to.sums = slot->sums, to.turns = slot->turns;
        of_sequence(f, k_).grad(c_, u, call_, to,
                                {first_row(f) * c_.group, last_row(f) * c_.group, p.segment, keys_}, w);
        if (slot) slot->left.fetch_sub(1, std::memory_order_acq_rel);
    }

    // Makes the slot this unit's, once its last unit is done; whoever has the unit's first segment does it.
    bool enter(Slot& slot, const Piece& p, Worker& w) {
        if (p.segment == 0) {
            while (slot.left.load(std::memory_order_acquire)) {
                if (w.stop(w.context)) return false;
                w.relax(w.context);
            }
            memset(slot.turns, 0, turns_bytes_);
            slot.left.store(segments(p), std::memory_order_relaxed);
            slot.unit.store(order(p), std::memory_order_release);
        }
        while (slot.unit.load(std::memory_order_acquire) != order(p)) {
            if (w.stop(w.context)) return false;
            w.relax(w.context);
        }
        return true;
    }

    const Kernels& k_;
    const Settings& s_;
    const Gradients& g_;
    Stop& stop_;
    const int64_t keys_;  // of a segment
    GradCall call_{};
    std::vector<Piece> pieces_;
    std::vector<size_t> jobs_;
    std::vector<Slot> slots_;
    std::atomic<size_t> next_{0};
    char* scratch_ = nullptr;
    int64_t scratch_bytes_ = 0;
    size_t turns_bytes_ = 0;
};

}  // namespace

Settings grad_plan(const Problem& p, const Kernels& k, int threads) {
    const int64_t units = p.batch * p.kv_heads,
                  segments = segments_of(p.kv_len, grad_segment(p.dim, p.v_dim));
    const int64_t worth = threads_worth(cells(p) * (6.0 * double(p.dim) + 4.0 * double(p.v_dim)));
    const int64_t most = std::min(units * segments, worth);
    return {k.grad_rows, GRAD_BLOCK, segments, std::clamp<int64_t>(most, 1, threads)};
}

int64_t grad_workspace(const Problem& p, const Kernels& k, const Settings& s) {
    if (!p.batch || !p.heads) return 0;
    return Shape(p, k, s, p.q_len, p.kv_len).bytes(s.workers);
}

Report gradient(const Problem& p, const Kernels& kernels, const Settings& s, const Arrays& a,
                const Gradients& g, const Selection& part, Team team, Stop& stop) {
    if (!p.batch || !p.heads) return {};
    return Backward(p, kernels, s, a, g, part, stop).run(team);
}

}  // namespace tilefold
