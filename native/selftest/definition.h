// Attention written out, the results of a call, and how far they may be from it.
#pragma once

#include <memory>

#include "case.h"
#include "guard.h"

namespace {

// out and lse, poisoned and with every byte accounted for.
struct Result {
    Tensor out, lse;
    bool has_lse;
    int64_t bytes = 0;  // of workspace, as fold() says

    Result(const Data& x, bool guarded = true) : has_lse(x.c.lse) {
        std::vector<int64_t> shape;
        if (x.c.lengths != PACKED) shape = {x.c.batch};
        shape.insert(shape.end(), {x.p.heads, x.p.q_len, x.p.v_dim});
        out = Tensor(x.c.type, shape, guarded ? x.c.order : PLAIN);
        shape.back() = 1;
        if (has_lse) lse = Tensor(x.p.acc_dtype, shape, guarded && x.c.order == BSHD ? BSHD : PLAIN);
    }

    // Whether nothing was written but some query rows of each sequence, and those are the same bits as in
    // `other`.
    bool only(const Data& x, int64_t first, int64_t last, Result* other = nullptr) {
        bool same = true;
        std::vector<char> out_rest = out.memory(), lse_rest = lse.memory();
        const auto wipe = [&](Tensor& t, std::vector<char>& rest, char* p, Tensor* theirs, char* q) {
            const size_t n = size_t(t.bytes_per_element());
            if (theirs) same &= memcmp(p, q, n) == 0;
            memset(rest.data() + (p - t.memory().data()), 0xff, n);
        };
        for (const Frame& f : x.frames)
            for (int64_t h = 0; h < x.p.heads; h++)
                for (int64_t i = f.q0 + first; i < f.q0 + std::min(last, f.q_len); i++) {
                    for (int64_t d = 0; d < x.p.v_dim; d++)
                        wipe(out, out_rest, out.at(f.item, h, i, d), other ? &other->out : nullptr,
                             other ? other->out.at(f.item, h, i, d) : nullptr);
                    if (has_lse)
                        wipe(lse, lse_rest, lse.at(f.item, h, i, 0), other ? &other->lse : nullptr,
                             other ? other->lse.at(f.item, h, i, 0) : nullptr);
                }
        const auto blank = [](const std::vector<char>& bytes) {
            return bytes.empty() ||
                   (bytes[0] == char(0xff) && !memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1));
        };
        expect(blank(out_rest) && blank(lse_rest), "wrote where no result belongs");
        return same;
    }
};

// ---- the definition ----

// out and lse, sequence by sequence, head by head, row by row.
struct Values {
    std::vector<Wide> out, lse;
};

// Attention written out, in R. Inputs are moved by up to `nudge` of themselves; with `short_weights` the
// weights that values are multiplied by are rounded to bfloat16. `exact`: as on a machine that
// multiplies codes as they lie.
template <class R>
Values evaluate(const Data& x, double nudge, bool short_weights, bool exact, int draw = 0) {
    Values y;
    Random random(uint64_t(x.c.number) + 77 + uint64_t(draw) * 1000003);
    const auto moved = [&](double v) { return R(v) * R(1 + nudge * random.between(-1, 1)); };
    const int64_t dim = x.p.dim, v_dim = x.p.v_dim;
    std::vector<R> q, k, v, s, acc;
    std::vector<char> seen;
    for (const Frame& f : x.frames) {
        const bool unrounded = exact && x.is_exact(f);
        const Tensor &keys = unrounded ? x.exact_k : x.k, &values = unrounded ? x.exact_v : x.v;
        for (int64_t head = 0; head < x.p.heads; head++) {
            if (head % x.c.group == 0) {
                const int64_t h = head / x.c.group;
                k.clear(), v.clear();
                for (int64_t j = f.k0; j < f.k0 + f.kv_len; j++) {
                    for (int64_t d = 0; d < dim; d++) k.push_back(moved(keys.get(f.item, h, j, d)));
                    for (int64_t d = 0; d < v_dim; d++) v.push_back(moved(values.get(f.item, h, j, d)));
                }
            }
            const size_t per_head = size_t(f.item * x.p.heads + head);
            for (int64_t i = 0; i < f.q_len; i++) {
                q.clear();
                for (int64_t d = 0; d < dim; d++) q.push_back(moved(x.q.get(f.item, head, f.q0 + i, d)));
                x.look(f, head, i, seen);
                s.assign(seen.size(), 0);
                const R sink = x.c.sinks ? R(x.sinks[per_head]) : R(-INF);
                R m = sink;
                for (int64_t j = 0; j < f.kv_len; j++) {
                    if (!seen[size_t(j)]) continue;
                    R a = 0;
                    for (int64_t d = 0; d < dim; d++) a += q[size_t(d)] * k[size_t(j * dim + d)];
                    a *= R(x.p.scale);
                    if (x.p.softcap != NO_SOFTCAP) a = R(x.p.softcap) * std::tanh(a / R(x.p.softcap));
                    if (x.c.biased) a += moved(x.bias.get(f.item, head, f.q0 + i, f.k0 + j));
                    if (x.c.alibi) a -= R(x.alibi[per_head]) * R(std::abs(i + f.offset - j));
                    s[size_t(j)] = a;
                    if (a > m) m = a;
                }
                R sum = sink > R(-INF) ? std::exp(sink - m) : R(0);
                acc.assign(size_t(v_dim), 0);
                for (int64_t j = 0; j < f.kv_len; j++) {
                    if (!seen[size_t(j)]) continue;
                    R w = std::exp(s[size_t(j)] - m);
                    sum += w;
                    if (short_weights) w = R(rounded(double(w), DType::bfloat16));
                    for (int64_t d = 0; d < v_dim; d++) acc[size_t(d)] += w * v[size_t(j * v_dim + d)];
                }
                const bool nothing = m == R(-INF) && sum == 0;
                for (R a : acc) y.out.push_back(nothing ? R(0) : a / sum);
                y.lse.push_back(nothing ? R(-INF) : m + std::log(sum));
            }
        }
    }
    return y;
}

// Valgrind's std::isfinite takes a long infinity for finite.
bool finite(Wide x) { return x - x == 0; }

// The largest finite error; infinite where NaN and infinity stand in other places.
Wide error(const std::vector<Wide>& got, const std::vector<Wide>& right) {
    Wide most = 0;
    for (size_t n = 0; n < right.size(); n++) {
        const Wide a = got[n], b = right[n];
        if (finite(b) && finite(a))
            most = std::max(most, std::abs(a - b));
        else if (!(std::isnan(a) && std::isnan(b)) && a != b)
            return INF;
    }
    return most;
}
Wide largest(const std::vector<Wide>& x) {
    Wide most = 0;
    for (Wide a : x)
        if (finite(a)) most = std::max(most, std::abs(a));
    return most;
}

// Whether the right results are computed in long double. Under valgrind it has 64 bits like any other.
bool is_wide(const Data& x) { return x.c.type == DType::float64 && !RUNNING_ON_VALGRIND; }

// The right results, and how far others may be from them: eight times as far as honest evaluations are (the
// plain method in the accumulate type; the definition on inputs that moved by a rounding), plus one rounding.
struct Expected {
    Values right;
    Wide out[2], lse;                 // by whether weights are rounded to bfloat16
    std::unique_ptr<Expected> exact;  // on a machine that multiplies codes as they lie

    explicit Expected(const Data& x, bool is_exact = false) {
        if (x.has_codes() && !is_exact) exact = std::make_unique<Expected>(x, true);
        const bool wide = is_wide(x);
        right = wide ? evaluate<Wide>(x, 0, false, is_exact) : evaluate<double>(x, 0, false, is_exact);
        const double step = 2 * roundoff(x.p.acc_dtype);
        const Values moved =
            wide ? evaluate<Wide>(x, step, false, is_exact) : evaluate<double>(x, step, false, is_exact);
        for (bool rounds : {false, true}) {
            if (rounds && x.c.type != DType::bfloat16) break;
            const Values plain = x.c.type == DType::float64 ? evaluate<double>(x, 0, false, is_exact)
                                                            : evaluate<float>(x, 0, rounds, is_exact);
            out[rounds] = 8 * std::max(error(plain.out, right.out), error(moved.out, right.out)) +
                          Wide(roundoff(x.c.type)) * largest(right.out);
            if (!rounds)
                lse = 8 * std::max(error(plain.lse, right.lse), error(moved.lse, right.lse)) +
                      Wide(roundoff(x.p.acc_dtype)) * largest(right.lse);
        }
        // Where right results are no wider than what they judge, the plain method shows no error at all: then
        // inputs are moved more often, lest one draw be a lucky one.
        for (int draw = 1; x.c.type == DType::float64 && !wide && draw < 8; draw++) {
            const Values again = evaluate<double>(x, step, false, is_exact, draw);
            out[0] = std::max(
                out[0], 8 * error(again.out, right.out) + Wide(roundoff(x.c.type)) * largest(right.out));
            lse = std::max(
                lse, 8 * error(again.lse, right.lse) + Wide(roundoff(x.p.acc_dtype)) * largest(right.lse));
        }
    }

    // The larger share of what is allowed.
    double share(const Data& x, Result& r, bool rounds) const {
        Values got;
        for (const Frame& f : x.frames)
            for (int64_t h = 0; h < x.p.heads; h++)
                for (int64_t i = f.q0; i < f.q0 + f.q_len; i++) {
                    for (int64_t d = 0; d < x.p.v_dim; d++) got.out.push_back(r.out.get(f.item, h, i, d));
                    if (r.has_lse) got.lse.push_back(r.lse.get(f.item, h, i, 0));
                }
        const auto of = [](Wide e, Wide allowed) {
            return e == 0 ? 0 : allowed > 0 ? double(e / allowed) : INF;
        };
        const double o = of(error(got.out, right.out), out[rounds]);
        return r.has_lse ? std::max(o, of(error(got.lse, right.lse), lse)) : o;
    }
};
}  // namespace
