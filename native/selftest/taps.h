// What is told of rows and pooled over them, checked: the same bits for any threads, and masses that sum to
// the rows that see a key. What each statistic is worth is held against the whole matrix from Python.
#pragma once

#include "calls.h"

namespace {

// All that one call of each sweep fills.
template <class E>
struct Seen {
    using Name = std::conditional_t<sizeof(E) == 4, int32_t, int64_t>;
    static constexpr int64_t ROWS_OF_MAP = 5, COLS_OF_MAP = 7, LISTED = 3, CELLS = 9;

    Tensor out, lse;
    std::vector<E> entropy, peak, distance, mass, top, cells;
    std::vector<Name> names;
    std::vector<double> sums, some, highest, map, highest_map;

    Seen(const Data& x, const Kernels& k, int threads, Team team) {
        const int64_t items = x.c.lengths == PACKED ? 1 : x.c.batch;
        const size_t heads = size_t(items * x.p.heads), rows = heads * size_t(x.p.q_len);
        Result like(x, false);
        out = like.out;
        std::vector<int64_t> shape = {x.p.heads, x.p.q_len, 1};
        if (x.c.lengths != PACKED) shape.insert(shape.begin(), x.c.batch);
        lse = Tensor(x.p.acc_dtype, shape, PLAIN);
        for (auto* one : {&entropy, &peak, &distance, &mass}) one->assign(rows, 0);
        top.assign(rows * LIST_STEP, -E(INF)), names.assign(rows * LIST_STEP, -1);
        for (auto* one : {&sums, &some, &highest}) one->assign(heads * size_t(x.p.kv_len), 0);
        for (auto* one : {&map, &highest_map})
            one->assign(size_t(x.c.batch * x.p.heads * ROWS_OF_MAP * COLS_OF_MAP), 0);
        cells.assign(heads * 2 * CELLS, 0);

        Problem p = x.p;
        p.want = Want(p.want | LSE | ROWS | KEYS);
        const Settings s = plan(p, k, threads);
        Arrays a = arrays_of(x, p, 0, out, &lse);
        a.rows.entropy = entropy.data(), a.rows.peak = peak.data(), a.rows.distance = distance.data();
        a.rows.top_scores = top.data(), a.rows.top_keys = names.data(), a.rows.top = LISTED;
        in_parts(x, p, 0, p.q_len, 0, [&](const Selection& given) {
            Selection part = given;
            std::vector<int64_t> lo, hi;
            if (part.frame >= 0) {  // spans of a region are those of one sequence
                part.regions = 1, part.region_spans = 1, part.region_rows = part.last_row - part.first_row;
                lo.assign(size_t(part.region_rows), 0), hi.assign(size_t(part.region_rows), 3);
                part.region_lo = lo.data(), part.region_hi = hi.data();
                a.rows.mass = mass.data();
            }
            Stop stop;
            tilefold::fold(p, k, s, a, part, team, stop);
        });
        pool(x, p, k, s, a, team);
    }

    void pool(const Data& x, const Problem& p, const Kernels& k, const Settings& s, const Arrays& a,
              Team team) {
        const int64_t items = x.c.lengths == PACKED ? 1 : x.c.batch;
        std::vector<double> factors(size_t(items * p.q_len));
        for (size_t i = 0; i < factors.size(); i++) factors[i] = double(i % 3) / 2;
        std::vector<int64_t> slots(size_t(p.q_len), -1), ends;
        if (p.q_len) slots.back() = 1, slots.front() = 0;
        std::vector<const Frame*> ordered(size_t(x.c.batch));
        for (const Frame& f : x.frames) ordered[size_t(f.n)] = &f;
        for (const Frame* f : ordered)
            for (const auto& [bins, length] : {std::pair{ROWS_OF_MAP, f->q_len}, {COLS_OF_MAP, f->kv_len}})
                for (int64_t n = 0; n <= bins; n++) ends.push_back(n * length / bins);
        Pools pools;
        pools.keys = {{nullptr, sums.data(), false},
                      {factors.data(), some.data(), false},
                      {nullptr, highest.data(), true}};
        pools.maps = {{ends.data(), ROWS_OF_MAP, COLS_OF_MAP, map.data(), false},
                      {ends.data(), ROWS_OF_MAP, COLS_OF_MAP, highest_map.data(), true}};
        pools.cells = {{slots.data(), 2, 0, std::min(CELLS, p.kv_len), cells.data()}};
        Arrays keys = a;
        keys.v = keys.k, keys.v_scale = keys.k_scale;
        Problem weights = p;
        weights.v_dim = 0;
        in_parts(x, p, 0, p.q_len, 0, [&](const Selection& part) {
            Stop stop;
            memory_bytes = 0;
            const int64_t bytes = tilefold::tap(weights, k, s, keys, pools, part, team, stop).bytes;
            expect(bytes == memory_bytes, "tap() does not say how much it allocated");
        });
    }

    bool same(const Seen& other) const {
        const auto alike = [](const auto& a, const auto& b) {
            return a.empty() || memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0;
        };
        return alike(entropy, other.entropy) && alike(peak, other.peak) && alike(distance, other.distance) &&
               alike(mass, other.mass) && alike(top, other.top) && alike(names, other.names) &&
               alike(sums, other.sums) && alike(some, other.some) && alike(highest, other.highest) &&
               alike(map, other.map) && alike(highest_map, other.highest_map) && alike(cells, other.cells);
    }
};

template <class E>
void check_taps_of(const Data& x, const Expected& e, const Kernels& kernels) {
    const Kernels k = watch_kernels(kernels);
    const Seen<E> alone(x, k, 1, Team::SERIAL), together(x, k, 3, Team::OWN);
    expect(alone.same(together), "taps: not the same bits for three threads");

    double rows = 0, bound = 1;
    size_t at = 0;
    for (const Frame& f : x.frames)
        for (int64_t h = 0; h < x.p.heads; h++)
            for (int64_t i = 0; i < f.q_len; i++, bound++) {
                const double lse = double(e.right.lse[at++]);
                if (lse != lse) return;  // such a row makes every sum NaN that it is part of
                if (lse == -INF) continue;
                rows += 1 - (x.c.sinks ? std::exp(x.sinks[size_t(f.item * x.p.heads + h)] - lse) : 0);
            }
    const auto total = [](const std::vector<double>& x) { return std::accumulate(x.begin(), x.end(), 0.0); };
    // Scores of narrow types differ from those of the definition by their inputs' own rounding only.
    const double allowed = bound * 1e-3;
    expect(std::abs(total(alone.sums) - rows) <= allowed, "masses of keys sum to " +
                                                              std::to_string(total(alone.sums)) + " for " +
                                                              std::to_string(rows) + " rows");
    expect(std::abs(total(alone.map) - rows) <= allowed, "a map does not sum to the rows");
}

void check_taps(const Data& x, const Expected& e, const Kernels& kernels) {
    if (x.p.acc_dtype == DType::float64)
        check_taps_of<double>(x, e, kernels);
    else
        check_taps_of<float>(x, e, kernels);
}

}  // namespace
