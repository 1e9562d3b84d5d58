// Units are pairs of a sequence and a key head; a unit falls into tiles of query rows; a tile is one piece,
// or one per segment of keys. Pieces are taken from one counter: units with the most work first, in a unit
// the last rows first, because under a diagonal they see the most keys. The fact to know: of a sequence as
// many units are in work at a time as there are workers, and panels of packed keys and values exist for so
// many only.

#include "sweep.h"

#include <string.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "layouts.h"
#include "memory.h"
#include "work.h"

namespace tilefold {
namespace {

struct Shape {
    int64_t units, tiles, segments;  // tiles and segments of the longest unit
    int64_t slots;                   // of panels
    int64_t panel_keys, panel_values, panel_blocks;
    int64_t scratch, state, states, counters;

    // q_len and kv_len are those of the longest sequences.
    Shape(const Problem& p, const Kernels& k, const Settings& s, int64_t q_len, int64_t kv_len) {
        check_sizes(p, q_len, kv_len);
        units = p.batch * p.kv_heads;
        const int64_t group = p.heads / p.kv_heads;
        tiles = ceil_div(q_len * group, s.tile_rows);
        segments = s.splits > 1 ? std::max<int64_t>(1, ceil_div(kv_len, SEGMENT)) : 1;
        Call c{};
        c.dim = p.dim, c.v_dim = p.v_dim, c.group = group, c.block_k = s.block_k;
        c.page = p.layout == PAGED;
        c.kv_type = p.kv_dtype;
        c.taps.any = p.want & ROWS;
        c.pack_keys = packs_pairs(k);  // whether they lie in pairs is known only with the arrays
        const int64_t rows = std::min(s.tile_rows, std::max<int64_t>(q_len * group, 1));
        scratch = 0;
        if (k.steady) scratch = k.steady->scratch(c, std::min<int64_t>(rows, k.steady_rows));
        scratch = std::max(scratch, k.scratch(c, rows));
        const bool panels = k.value_bytes && tiles > 1 && s.splits == 1;
        slots = panels ? std::min(units, s.workers) : 0;
        panel_blocks = panels ? ceil_div(kv_len, s.block_k) : 0;
        const int64_t key_bytes = c.pack_keys ? k.value_bytes : k.key_bytes;
        panel_keys = aligned(panel_blocks * s.block_k * up(p.dim, k.multiple) * key_bytes);
        panel_values =
            aligned(panel_blocks * up(s.block_k, k.multiple) * up(p.v_dim, k.packed_rows) * k.value_bytes);
        if (double(slots) * double(slot_bytes()) > double(k.panels))
            slots = panel_blocks = panel_keys = panel_values = 0;
        state = aligned(std::min(s.tile_rows, q_len * group) * state_elements(p.v_dim) * k.element);
        states = s.splits > 1 ? units * tiles * segments : 0;
        counters = s.splits > 1 ? units * tiles : 0;
    }

    int64_t slot_bytes() const {
        return panel_keys + panel_values + aligned(panel_blocks * int64_t(sizeof(int32_t)));
    }
    int64_t bytes(int64_t workers) const {
        const double most = double(workers) * double(scratch) + double(slots) * double(slot_bytes()) +
                            double(states) * double(state);
        check_bytes(most);
        return workers * aligned(scratch) + slots * slot_bytes() + states * state +
               aligned(counters * int64_t(sizeof(int32_t)));
    }
};

class Sweep : Sequences {
   public:
    Sweep(const Problem& p, const Kernels& k, const Settings& s, const Arrays& a, const Selection& part,
          Stop& stop)
        : Sequences(p, a, part, s.block_k), k_(k), s_(s), stop_(stop) {
        c_.pack_keys = packs_pairs(k) &&
                       (is_code(p.kv_dtype) ? p.dim % k.multiple : strided_keys(a.k, p.dim, k.multiple));
        codes_ = steady(k).codes && is_integer(p.kv_dtype) && !(p.want & (INVARIANT | GRAD | KEYS)) &&
                 whole(c_.k_pages, p.dim) && whole(c_.v_pages, p.v_dim);
    }

    // Whether all dims share a scale.
    static bool whole(const Pages& p, int64_t width) { return 0 < width && width == p.group; }

    static bool strided_keys(const Array& k, int64_t dim, int64_t multiple) {
        const Strides s = inner(k);
        return s.col != 1 || dim % multiple || s.row % multiple || s.head % multiple ||
               reinterpret_cast<uintptr_t>(k.data) % 4 || odd_lead(k, multiple);
    }

    Report run(Team team) {
        for (const Frame& f : frames_)
            q_most_ = std::max(q_most_, f.q_len), kv_most_ = std::max(kv_most_, f.kv_len);
        const Shape shape(p_, k_, s_, q_most_, kv_most_);
        const int64_t pieces = count_pieces();
        if (!pieces) return {};
        const int workers = int(std::max<int64_t>(1, std::min(s_.workers, pieces)));
        Memory memory(shape.bytes(s_.workers));
        lay_out(shape, memory.data());
        const int took = tilefold::run(
            team, workers, [](void* self, int worker) { static_cast<Sweep*>(self)->work(worker); }, this,
            &stop_);
        if (!took) start_again();
        return {memory.bytes(), infinite_ != 0};
    }

   private:
    // In a process that was forked in the middle of the call: the other workers and their pieces stayed
    // behind.
    void start_again() {
        for (Slot& slot : slots_) slot.unit = -1, slot.left = 0;
        memset(undone_, 0, undone_bytes_);
        next_ = 0;
        work(0);
    }

    // Panels of one unit at a time; `left` pieces of it are not done yet.
    struct Slot {
        Panel panel;
        std::atomic<int64_t> unit{-1};
        std::atomic<int64_t> left{0};
    };

    static bool odd_lead(const Array& k, int64_t multiple) {
        for (int i = 0; i < k.dims - 3; i++)
            if (k.strides[i] % multiple) return true;
        return false;
    }

    int64_t tiles(const Frame& f) const { return Sequences::tiles(f, s_.tile_rows); }
    int64_t segments(const Frame& f) const {
        return s_.splits > 1 ? std::max<int64_t>(1, ceil_div(f.kv_len, SEGMENT)) : 1;
    }

    int64_t count_pieces() {
        ends_.reserve(frames_.size());
        int64_t sum = 0;
        for (const Frame& f : frames_) ends_.push_back(sum += kv_heads() * tiles(f) * segments(f));
        return sum;
    }

    void lay_out(const Shape& shape, char* at) {
        scratch_ = at, scratch_bytes_ = aligned(shape.scratch);
        at += s_.workers * scratch_bytes_;
        slots_ = std::vector<Slot>(size_t(shape.slots));
        for (Slot& slot : slots_) {
            slot.panel = {at, at + shape.panel_keys,
                          reinterpret_cast<int32_t*>(at + shape.panel_keys + shape.panel_values)};
            at += shape.slot_bytes();
        }
        states_ = at, state_bytes_ = shape.state;
        at += shape.states * shape.state;
        undone_ = reinterpret_cast<int32_t*>(at);
        undone_bytes_ = size_t(shape.counters) * sizeof(int32_t);
        memset(undone_, 0, undone_bytes_);
    }

    void work(int worker) {
        [[maybe_unused]] const ArithmeticMode ours{};
        Line line{stop_, worker};
        Worker w = line.worker(scratch_ + worker * scratch_bytes_);
        while (!stop_.check(worker)) {
            const int64_t n = next_.fetch_add(1, std::memory_order_relaxed);
            if (ends_.empty() || n >= ends_.back()) return;
            take(n, w);
        }
    }

    void take(int64_t n, Worker& w) {
        const size_t at = size_t(std::upper_bound(ends_.begin(), ends_.end(), n) - ends_.begin());
        const Frame& f = frames_[at];
        n -= at ? ends_[at - 1] : 0;
        const int64_t tiles_here = tiles(f), segments_here = segments(f),
                      per_unit = tiles_here * segments_here;
        // As many units alternate as there are workers, so that each mostly has its own near.
        const int64_t team = std::min(kv_heads(), s_.workers), begin = n / (per_unit * team) * team;
        const int64_t width = std::min(team, kv_heads() - begin);
        n -= begin * per_unit;
        const int64_t head = begin + n % width, rest = n / width;
        const int64_t tile = tiles_here - 1 - rest / segments_here;
        Unit u = unit(f, head);
        const Kernels& k = of_sequence(f, k_);
        u.codes = codes_ && f.q_len * group_ <= k.few_rows;
        Piece piece{};
        piece.r0 = u.first_row * c_.group + tile * s_.tile_rows;
        piece.r1 = std::min(piece.r0 + s_.tile_rows, last_row(f) * c_.group);
        const int64_t order = int64_t(at) * kv_heads() + head;  // of the unit
        if (s_.splits > 1) {
            split(k, u, piece, order, tile, rest % segments_here, segments_here, w);
            return;
        }
        piece.segment = -1;
        Slot* slot =
            slots_.empty() || tiles_here == 1 || &k != &k_ ? nullptr : &slots_[size_t(order) % slots_.size()];
        if (slot && !enter(*slot, order, tiles_here, rest == 0, w)) return;
        if (slot) u.panel = slot->panel;
        fold_piece(k, u, piece, w);
        if (slot) slot->left.fetch_sub(1, std::memory_order_acq_rel);
    }

    // Makes the slot this unit's, once its last unit is done; whoever has the unit's first piece does it.
    bool enter(Slot& slot, int64_t order, int64_t pieces, bool first, Worker& w) {
        if (first) {
            while (slot.left.load(std::memory_order_acquire)) {
                if (w.stop(w.context)) return false;
                w.relax(w.context);
            }
            memset(slot.panel.done, 0, size_t(ceil_div(kv_most_, s_.block_k)) * sizeof(int32_t));
            slot.left.store(pieces, std::memory_order_relaxed);
            slot.unit.store(order, std::memory_order_release);
        }
        while (slot.unit.load(std::memory_order_acquire) != order) {
            if (w.stop(w.context)) return false;
            w.relax(w.context);
        }
        return true;
    }

    // One segment of a tile; the worker that brings the last one joins them.
    void split(const Kernels& k, const Unit& u, Piece& piece, int64_t order, int64_t tile, int64_t segment,
               int64_t segments, Worker& w) {
        const int64_t tiles_most = ceil_div(q_most_ * group_, s_.tile_rows);
        const int64_t job = order * tiles_most + tile;
        char* const states = states_ + job * most_segments() * state_bytes_;
        piece.segment = segment;
        piece.state = states + segment * state_bytes_;
        fold_piece(k, u, piece, w);
        if (std::atomic_ref<int32_t>(undone_[job]).fetch_add(1, std::memory_order_acq_rel) + 1 == segments) {
            piece.state = states;
            k_.join(c_, u, piece, segments, state_bytes_);
        }
    }
    int64_t most_segments() const { return std::max<int64_t>(1, ceil_div(kv_most_, SEGMENT)); }

    void fold_piece(const Kernels& k, const Unit& u, const Piece& piece, Worker& w) {
        if (piece.r1 - piece.r0 <= k.few_rows && k.row && !c_.taps.any)
            (u.codes ? k.codes : k.row)(c_, u, piece, w);
        else
            k.tile(c_, u, piece, w);
    }

    const Kernels& k_;
    const Settings& s_;
    Stop& stop_;
    std::vector<int64_t> ends_;  // pieces up to and with each frame
    std::vector<Slot> slots_;
    int64_t q_most_ = 0, kv_most_ = 0;
    bool codes_;  // of sequences with few rows are multiplied as they lie
    std::atomic<int64_t> next_{0};
    char *scratch_ = nullptr, *states_ = nullptr;
    int32_t* undone_ = nullptr;
    size_t undone_bytes_ = 0;
    int64_t scratch_bytes_ = 0, state_bytes_ = 0;
};

// Keys that any row sees, at most.
double keys_seen(const Problem& p) {
    const double most = double(p.kv_len);
    if (p.band.left >= UNLIMITED || p.band.right >= UNLIMITED) return most;
    return std::min(most, double(p.band.left) + double(p.band.right) + double(p.q_len));
}

// Whether all rows see as many keys.
bool alike(const Problem& p) {
    return p.band.right >= UNLIMITED && p.band.left >= UNLIMITED && p.layout != VARLEN && !(p.has & SPANS) &&
           (p.batch == 1 || !(p.has & LENGTHS));
}

// How many tiles a piece of such rows best has, where each unit has `tiles`: the busiest worker has its
// number of pieces, and reads keys for each.
int64_t best_together(int64_t units, int64_t tiles, int threads, const Kernels& k) {
    int64_t best = 1;
    double least = 0;
    for (int64_t n = 1; n <= std::min<int64_t>(tiles, k.most_rows / k.tile_rows); n++) {
        const double takes = double(ceil_div(units * ceil_div(tiles, n), threads)) * (double(n) + k.reading);
        if (n == 1 || takes < least) best = n, least = takes;
    }
    return best;
}

// The kernels that a call has, of those for its type.
const Kernels& of_call(const Problem& p, const Kernels& k) {
    const int64_t rows = p.q_len * (p.heads / std::max<int64_t>(p.kv_heads, 1));
    const bool few = p.layout != VARLEN && rows <= k.steady_rows;
    return few || p.want & INVARIANT ? steady(k) : k;
}

}  // namespace

bool is_steady(const Problem& p, const Kernels& kernels) { return !of_call(p, kernels).steady; }

Settings plan(const Problem& p, const Kernels& kernels, int threads) {
    const Kernels& k = of_call(p, kernels);
    Settings s{};
    const int64_t rows = std::max<int64_t>(1, p.q_len * (p.heads / p.kv_heads));
    const int64_t units = p.layout == VARLEN ? p.kv_heads : p.batch * p.kv_heads;
    const int64_t tiles = units * ceil_div(rows, k.tile_rows);
    // Tiles of a piece share each block of keys while it is near, but pieces must be many enough for everyone
    // to be busy to the end.
    const int64_t together =
        k.reading > 0 && alike(p)
            ? best_together(units, ceil_div(rows, k.tile_rows), threads, k)
            : std::clamp<int64_t>(tiles / (k.pieces_each * threads), 1, k.most_rows / k.tile_rows);
    s.tile_rows = std::min(up(rows, k.lanes), together * k.tile_rows);
    s.block_k = k.block_k;
    const int64_t pieces = units * ceil_div(rows, s.tile_rows), segments = ceil_div(p.kv_len, SEGMENT);
    // A piece of its own per segment costs a state and a merge, and is in vain where a window shows no more.
    const bool split = p.layout != VARLEN && !(p.want & ROWS) && keys_seen(p) > SEGMENT && threads > 1 &&
                       pieces < 4 * threads;
    s.splits = split ? segments : 1;
    const int64_t worth = threads_worth(2.0 * cells(p) * double(p.dim + p.v_dim));
    const int64_t most = std::min<int64_t>(p.layout == VARLEN ? pieces + p.batch : pieces * s.splits, worth);
    s.workers = std::clamp<int64_t>(most, 1, threads);
    return resized(p, k, s);
}

Settings resized(const Problem& p, const Kernels& kernels, Settings s) {
    const Kernels& k = of_call(p, kernels);
    const int64_t group = std::max<int64_t>(1, p.heads / p.kv_heads),
                  rows = std::max<int64_t>(1, p.q_len * group);
    // Plans count rows per head, rounded up: what comes back from one must be what was planned.
    s.tile_rows = std::clamp<int64_t>(s.tile_rows, 1, k.most_rows);
    for (int64_t before = -1; before != s.tile_rows;) {
        before = s.tile_rows;
        s.tile_rows = std::clamp<int64_t>(up(before, group), 1, k.most_rows);
        if (s.tile_rows > k.tile_rows &&
            s.tile_rows < up(rows, k.lanes))  // the nearest number of whole tiles
            s.tile_rows = (s.tile_rows + k.tile_rows / 2) / k.tile_rows * k.tile_rows;
        s.tile_rows = std::min(s.tile_rows, up(rows, k.lanes));
    }
    s.block_k = up(std::clamp<int64_t>(s.block_k, 1, SEGMENT), 32);
    // A state holds no statistics.
    const int64_t segments =
        p.layout == VARLEN || p.want & ROWS ? 1 : std::max<int64_t>(1, ceil_div(p.kv_len, SEGMENT));
    s.splits = s.splits > 1 ? segments : 1;
    s.workers = std::clamp<int64_t>(s.workers, 1, MAX_THREADS);
    return s;
}

int64_t workspace(const Problem& p, const Kernels& kernels, const Settings& s) {
    if (!p.batch || !p.q_len || !p.heads) return 0;
    return Shape(p, of_call(p, kernels), s, p.q_len, p.kv_len).bytes(s.workers);
}

Report fold(const Problem& p, const Kernels& kernels, const Settings& s, const Arrays& a,
            const Selection& part, Team team, Stop& stop) {
    if (!p.batch || !p.q_len || !p.heads) return {};
    return Sweep(p, of_call(p, kernels), s, a, part, stop).run(team);
}

}  // namespace tilefold
