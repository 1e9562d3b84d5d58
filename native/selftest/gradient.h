// The backward pass written out, and checked: on every machine, whole and in panels, the same bits for any
// threads. Gradients are a function of out and lse as they were given, rounded as they are.
#pragma once

#include "calls.h"

namespace {

// What the backward pass is given.
struct Given {
    Tensor out, lse, dout, dlse;
    bool has_dlse;

    Given(const Data& x, const Expected& e) : has_dlse(x.c.number % 2) {
        std::vector<int64_t> shape;
        if (x.c.lengths != PACKED) shape = {x.c.batch};
        shape.insert(shape.end(), {x.p.heads, x.p.q_len, x.p.v_dim});
        out = Tensor(x.c.type, shape, x.c.order), dout = Tensor(x.c.type, shape, x.c.order);
        shape.back() = 1;
        lse = Tensor(x.p.acc_dtype, shape, PLAIN), dlse = Tensor(x.p.acc_dtype, shape, PLAIN);
        Random random(uint64_t(x.c.number) + 11);
        dout.fill([&](auto...) { return random.between(-1, 1); });
        dlse.fill([&](auto...) { return random.between(-1, 1); });
        size_t at = 0, row = 0;
        for (const Frame& f : x.frames)
            for (int64_t h = 0; h < x.p.heads; h++)
                for (int64_t i = f.q0; i < f.q0 + f.q_len; i++) {
                    for (int64_t d = 0; d < x.p.v_dim; d++)
                        out.set(f.item, h, i, d, double(e.right.out[at++]));
                    lse.set(f.item, h, i, 0, double(e.right.lse[row++]));
                }
    }
};

// dq, dk, dv, dbias and dsinks, each as (items, heads, rows, columns) one after the other; a bias of size 1
// where it is repeated.
struct Gradient {
    std::vector<Wide> of[5];
};
const char* const NAMES[] = {"dq", "dk", "dv", "dbias", "dsinks"};

struct Extent {
    int64_t heads, rows, cols;
    size_t at(int64_t item, int64_t head, int64_t row, int64_t col) const {
        return size_t(((item * heads + head) * rows + row) * cols + col);
    }
};
struct Extents {
    Extent q, k, v, bias;
    int64_t items;
    unsigned repeats;

    explicit Extents(const Data& x)
        : q{x.p.heads, x.p.q_len, x.p.dim},
          k{x.p.kv_heads, x.p.kv_len, x.p.dim},
          v{x.p.kv_heads, x.p.kv_len, x.p.v_dim},
          items(x.c.lengths == PACKED ? 1 : x.c.batch),
          repeats(x.c.bias_repeats) {
        const auto extent = [&](unsigned axis, int64_t size) {
            return repeats & axis ? std::min<int64_t>(1, size) : size;
        };
        bias = {extent(4, x.p.heads), extent(2, x.p.q_len), extent(1, x.p.kv_len)};
    }
    size_t bias_at(int64_t item, int64_t head, int64_t row, int64_t col) const {
        return bias.at(item, repeats & 4 ? 0 : head, repeats & 2 ? 0 : row, repeats & 1 ? 0 : col);
    }
};

// In R; inputs are moved by up to `nudge` of themselves.
template <class R>
Gradient differentiate(const Data& x, const Given& given, double nudge) {
    const Extents n(x);
    std::vector<R> of[5];
    of[0].resize(size_t(n.items * n.q.heads * n.q.rows * n.q.cols));
    of[1].resize(size_t(n.items * n.k.heads * n.k.rows * n.k.cols));
    of[2].resize(size_t(n.items * n.v.heads * n.v.rows * n.v.cols));
    if (x.c.biased) of[3].resize(size_t(n.items * n.bias.heads * n.bias.rows * n.bias.cols));
    if (x.c.sinks) of[4].resize(size_t(x.c.batch * x.p.heads));
    Random random(uint64_t(x.c.number) + 78);
    const auto moved = [&](double v) { return R(v) * R(1 + nudge * random.between(-1, 1)); };
    std::vector<R> q, g, k, v;
    std::vector<char> seen;
    for (const Frame& f : x.frames)
        for (int64_t head = 0; head < x.p.heads; head++) {
            const int64_t h = head / x.c.group;
            const size_t per_head = size_t(f.item * x.p.heads + head);
            if (head % x.c.group == 0) {
                k.clear(), v.clear();
                for (int64_t j = f.k0; j < f.k0 + f.kv_len; j++) {
                    for (int64_t d = 0; d < x.p.dim; d++) k.push_back(moved(x.k.get(f.item, h, j, d)));
                    for (int64_t d = 0; d < x.p.v_dim; d++) v.push_back(moved(x.v.get(f.item, h, j, d)));
                }
            }
            for (int64_t i = 0; i < f.q_len; i++) {
                const int64_t row = f.q0 + i;
                x.look(f, head, i, seen);
                const bool live = std::find(seen.begin(), seen.end(), 1) != seen.end();
                const R lse = R(given.lse.get(f.item, head, row, 0));
                q.clear(), g.clear();
                for (int64_t d = 0; d < x.p.dim; d++) q.push_back(moved(x.q.get(f.item, head, row, d)));
                for (int64_t d = 0; d < x.p.v_dim; d++)
                    g.push_back(moved(given.dout.get(f.item, head, row, d)));
                R delta = 0;
                for (int64_t d = 0; d < x.p.v_dim && live; d++)
                    delta += g[size_t(d)] * R(given.out.get(f.item, head, row, d));
                if (given.has_dlse && lse != R(-INF)) delta -= R(given.dlse.get(f.item, head, row, 0));
                if (x.c.sinks && lse != R(-INF)) {
                    const R weight = std::exp(R(x.sinks[per_head]) - lse);
                    if (weight != 0) of[4][size_t(f.n * x.p.heads + head)] -= weight * delta;
                }
                for (int64_t j = 0; j < f.kv_len; j++) {
                    if (!seen[size_t(j)]) continue;
                    R s = 0, dp = 0;
                    for (int64_t d = 0; d < x.p.dim; d++) s += q[size_t(d)] * k[size_t(j * x.p.dim + d)];
                    for (int64_t d = 0; d < x.p.v_dim; d++) dp += g[size_t(d)] * v[size_t(j * x.p.v_dim + d)];
                    s *= R(x.p.scale);
                    R slope = 1;
                    if (x.p.softcap != NO_SOFTCAP) {
                        const R t = std::tanh(s / R(x.p.softcap));
                        s = R(x.p.softcap) * t, slope = 1 - t * t;
                    }
                    if (x.c.biased) s += moved(x.bias.get(f.item, head, row, f.k0 + j));
                    if (x.c.alibi) s -= R(x.alibi[per_head]) * R(std::abs(i + f.offset - j));
                    const R p = std::exp(s - lse), ds = p * (dp - delta), raw = ds * slope * R(x.p.scale);
                    if (x.c.biased) of[3][n.bias_at(f.item, head, row, f.k0 + j)] += ds;
                    for (int64_t d = 0; d < x.p.dim; d++) {
                        of[0][n.q.at(f.item, head, row, d)] += raw * k[size_t(j * x.p.dim + d)];
                        of[1][n.k.at(f.item, h, f.k0 + j, d)] += raw * q[size_t(d)];
                    }
                    for (int64_t d = 0; d < x.p.v_dim; d++)
                        of[2][n.v.at(f.item, h, f.k0 + j, d)] += p * g[size_t(d)];
                }
            }
        }
    Gradient y;
    for (int m = 0; m < 5; m++) y.of[m].assign(of[m].begin(), of[m].end());
    return y;
}

// The right gradients, and how far others may be from them, as in Expected.
struct ExpectedGradient {
    Given given;
    Gradient right;
    Wide allowed[5];

    ExpectedGradient(const Data& x, const Expected& e) : given(x, e) {
        const bool wide = is_wide(x);
        const double step = 2 * roundoff(x.p.acc_dtype);
        right = wide ? differentiate<Wide>(x, given, 0) : differentiate<double>(x, given, 0);
        const Gradient moved =
            wide ? differentiate<Wide>(x, given, step) : differentiate<double>(x, given, step);
        const Gradient plain = x.c.type == DType::float64 ? differentiate<double>(x, given, 0)
                                                          : differentiate<float>(x, given, 0);
        for (int m = 0; m < 5; m++)
            allowed[m] = 8 * std::max(error(plain.of[m], right.of[m]), error(moved.of[m], right.of[m])) +
                         std::max(Wide(roundoff(m < 3 ? x.c.type : x.p.acc_dtype)) * largest(right.of[m]),
                                  Wide(m < 3 ? least_error(x.c.type) : 0));
    }
};

// One backward pass on one machine: its results as vectors.
Gradient run_gradient(const Data& x, ExpectedGradient& e, const Kernels& k, int threads, Team team) {
    const Extents n(x);
    const bool add = in_panels(x);
    const auto make = [&](DType type, const Extent& of, Order order, unsigned repeats = 0) {
        std::vector<int64_t> shape;
        if (x.c.lengths != PACKED) shape = {x.c.batch};
        shape.insert(shape.end(), {of.heads, of.rows, of.cols});
        return Tensor(type, shape, order, repeats);
    };
    const DType kept = add ? x.p.acc_dtype : x.c.type;
    Tensor dq = make(x.c.type, n.q, x.c.order), dk = make(kept, n.k, x.c.order),
           dv = make(kept, n.v, x.c.order);
    Tensor dbias;
    std::vector<double> dsinks(size_t(x.c.batch * x.p.heads));
    if (add || x.c.lengths == PADDED)
        for (Tensor* t : {&dq, &dk, &dv}) t->fill([](auto...) { return 0.0; });
    if (x.c.biased) {
        dbias = make(x.p.acc_dtype, {x.p.heads, x.p.q_len, x.p.kv_len}, PLAIN, x.c.bias_repeats);
        dbias.fill([](auto...) { return 0.0; });
    }
    const Arrays a = arrays_of(x, x.p, 0, e.given.out, &e.given.lse);
    Gradients g{e.given.dout.array(), {}, dq.array(), dk.array(), dv.array(), {}, nullptr, add};
    if (e.given.has_dlse) g.dlse = e.given.dlse.array(0, false);
    if (x.c.biased) g.dbias = dbias.array();
    if (x.c.sinks) g.dsinks = dsinks.data();
    const Settings s = grad_plan(x.p, k, threads);
    int64_t most = 0;
    in_parts(x, x.p, 0, x.p.q_len, 0, [&](const Selection& part) {
        Stop stop;
        memory_bytes = 0;
        const int64_t bytes = tilefold::gradient(x.p, k, s, a, g, part, team, stop).bytes;
        expect(bytes == memory_bytes, "gradient() does not say how much it allocated");
        most = std::max(most, bytes);
    });
    const int64_t predicted = grad_workspace(x.p, k, s);
    expect(x.c.lengths == WHOLE && !add ? most == predicted : most <= predicted,
           "a gradient took " + std::to_string(most) + " bytes, predicted " + std::to_string(predicted));
    Gradient got;
    const auto read = [&](int m, const Tensor& t, const Extent& of) {
        for (int64_t item = 0; item < n.items; item++)
            for (int64_t h = 0; h < of.heads; h++)
                for (int64_t r = 0; r < of.rows; r++)
                    for (int64_t d = 0; d < of.cols; d++) got.of[m].push_back(t.get(item, h, r, d));
    };
    read(0, dq, n.q), read(1, dk, n.k), read(2, dv, n.v);
    if (x.c.biased) read(3, dbias, n.bias);
    if (x.c.sinks) got.of[4].assign(dsinks.begin(), dsinks.end());
    return got;
}

double check_gradient(const Data& x, ExpectedGradient& e, const Kernels& kernels) {
    const Kernels k = watch_kernels(kernels);
    const Gradient first = run_gradient(x, e, k, 1, Team::SERIAL);
    double worst = 0;
    for (int m = 0; m < 5; m++) {
        const Wide off = error(first.of[m], e.right.of[m]);
        const double share = off == 0 ? 0 : e.allowed[m] > 0 ? double(off / e.allowed[m]) : INF;
        expect(share <= 1, NAMES[m] + (" is off by " + std::to_string(share)) + " of what is allowed");
        worst = std::max(worst, share);
    }
    const Gradient again = run_gradient(x, e, k, 3, Team::OWN);
    for (int m = 0; m < 5; m++)
        expect(error(again.of[m], first.of[m]) == 0,
               NAMES[m] + std::string(" of 3 threads: not the same bits"));
    return worst;
}

}  // namespace
