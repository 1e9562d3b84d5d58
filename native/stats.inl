// The monoid: how two states of a row become one; and what a fold can tell of a row's weights before they are
// finished: more monoids, folded beside the maximum and the sum of a tile. Twin of stats.py, and of the taps
// over rows in taps.py.
//
// Per score, beside the 17 operations of softmax: one for the entropy, one for a distance (four near the
// diagonal), two to look for scores that belong into a list, two for the mass in a region, but only in blocks
// that the region cuts. All but lists and peak are sums of e^(s − m) · x, rescaled as the sum itself is; the
// tilt, Σ e^(s − m) · (s − m), moves with m too. A list is the output itself: rows see their segments from
// left to right, whatever the plan.
//
// What costs is the lists: a row of n random scores enters about k · (1 + ln(n / k)) of them, 63 for k = 8
// and n = 8192, some 45 cycles each. At dim 64 that is 13 % of a call; it was 27 % with lists kept number by
// number, and 18 % with every find looked for and entered at once.

namespace tilefold {
namespace {

// Two states become one: the maximum of both, and what each side is multiplied by. The monoid's only formula.
template <class E>
struct Meeting {
    Vec<E> max, keep, gain;

    TILEFOLD_INLINE Meeting(Vec<E> a, Vec<E> b) : max(::max(a, b)) {
        const Vec<E> shift = shift_of<E>(max);
        keep = exp<E>(a - shift);
        gain = exp<E>(b - shift);
    }
    TILEFOLD_INLINE Vec<E> operator()(Vec<E> old, Vec<E> next) const { return fma(next, gain, old * keep); }
};

template <class E>
E natural_log(E x) {
    return E(__builtin_log(double(x)));
}

// Of the N lanes of a tile.
template <class E, int N>
struct Statistics {
    static constexpr int W = LANES<E>, NR = N / W, AHEAD = 4, FAR = 1024;

    E *tilt_part, *tilt_total, *far_part, *far_total, *peak, *bar;
    E *mass_part, *mass_total;  // [regions][N]
    int64_t *query, *list;      // of each lane: its query, and where its list begins

    void lay_out(const Call& c, Arena& a) {
        if (!c.taps.any) return;
        E** const per_lane[] = {&tilt_part, &tilt_total, &far_part, &far_total, &peak, &bar};
        for (E** one : per_lane) *one = a.template take<E>(N);
        mass_part = a.template take<E>(MOST_REGIONS * N);
        mass_total = a.template take<E>(MOST_REGIONS * N);
        query = a.template take<int64_t>(N);
        list = a.template take<int64_t>(N);
    }

    void begin(const Call& c, const Unit& u, int64_t r0, int64_t rows) {
        Row row(r0, c.group);
        for (int r = 0; r < N; r++) {
            query[r] = row.query;
            list[r] = row.at(c.lse) * up(c.taps.top, LIST_STEP);
            peak[r] = bar[r] = -INFINITE<E>;
            tilt_total[r] = far_total[r] = 0;
            if (r + 1 < rows) row.next();
        }
        memset(mass_total, 0, size_t(MOST_REGIONS * N) * sizeof(E));
        for (int64_t g = 0; g < c.taps.regions; g++)
            for (int64_t n = 0; n < least(c.taps.spans, SPANS); n++) hull[g][n] = hull_of(c, u, g, n);
    }
    void begin_segment() const {
        memset(tilt_part, 0, N * sizeof(E));
        memset(far_part, 0, N * sizeof(E));
        memset(mass_part, 0, size_t(MOST_REGIONS * N) * sizeof(E));
    }

    // ---- a block of scores s[keys][N], of keys j0 … ----

    // The highest scores of each row. Of equal ones the first is kept. Few keys are above a row's bar, and no
    // processor foresees which: so first those groups of keys that hold one are noted, without a branch; then
    // the finds of each group, a word for each vector of rows.
    void list_highest(const Call& c, const Unit& u, int64_t rows, const E* s, int64_t j0,
                      int64_t keys) const {
        static_assert(AHEAD * W <= 64);
        if (!c.taps.top) return;
        int16_t groups[SEGMENT / AHEAD];
        int count = 0;
        Vec<E> bars[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { bars[i] = load(bar + i * W); });
        for (int64_t j = 0; j < keys; j += AHEAD) {
            Mask<E> found{};
            const int64_t n = least(AHEAD, keys - j);
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                const E* const x = s + j * N + i * W;
                Vec<E> highest = load(x);
                if (__builtin_expect(n == AHEAD, 1))
                    each<AHEAD - 1>([&](auto k)
                                        TILEFOLD_LAMBDA { highest = max(load(x + (k + 1) * N), highest); });
                else
                    for (int64_t k = 1; k < n; k++) highest = max(load(x + k * N), highest);
                found |= highest > bars[i];
            });
            groups[count] = int16_t(j);
            count += any(found);
        }
        const bool many = count * AHEAD * 4 > keys;  // then bars rise on the way
        for (int g = 0; g < count; g++) {
            const int64_t j = groups[g], n = least(AHEAD, keys - j);
            struct {
                uint64_t word;
                int64_t first;
            } finds[NR + 1];
            int some = 0;
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                if (many) bars[i] = load(bar + i * W);
                uint64_t word = 0;
                for (int64_t k = 0; k < n; k++)
                    word |= uint64_t(bits_of(load(s + (j + k) * N + i * W) > bars[i])) << (k * W);
                finds[some] = {word, i * W};
                some += word != 0;
            });
            for (int f = 0; f < some; f++)
                for (uint64_t left = finds[f].word; left; left &= left - 1) {
                    const int64_t at = __builtin_ctzll(left), k = j + at / W, r = finds[f].first + at % W;
                    const E x = s[k * N + r];
                    if (r < rows && x > bar[r]) insert(c, u, r, x, j0 + k);
                }
        }
    }

    // What a block adds to a segment: the sum of its weights, and those of weights times what the score lies
    // below the shift, and times the number of the key.
    struct Sums {
        Vec<E> weights[NR], tilt[NR], keys[NR];
    };
    // Weights in place of scores, and their sums.
    template <bool KEYS>
    static TILEFOLD_INLINE void weigh(E* s, int64_t keys, const Vec<E> (&shift)[NR], Sums& sums) {
        Vec<E> total_of[NR], tilt_of[NR], keys_of[NR], less[NR], number{};
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            total_of[i] = tilt_of[i] = keys_of[i] = Vec<E>{}, less[i] = shift[i];
        });
        for (E* const end = s + keys * N; s < end; s += N, number += set<E>(E(1)))
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                const Vec<E> x = at_least<E>(load(s + i * W) - less[i]), p = exp_within<E>(x);
                total_of[i] += p;
                tilt_of[i] = fma(p, x, tilt_of[i]);
                if constexpr (KEYS) keys_of[i] = fma(p, number, keys_of[i]);
                store(s + i * W, p);
            });
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            sums.weights[i] = total_of[i], sums.tilt[i] = tilt_of[i], sums.keys[i] = keys_of[i];
        });
    }

    // Adds a block of weights to the segment: the sum before it, what it is multiplied by, and where the
    // maximum was.
    void add(const Call& c, const Unit& u, const E* p, int64_t j0, int64_t keys, const E* sum_part,
             const Vec<E> (&before)[NR], const Vec<E> (&shift)[NR], const Vec<E> (&keep)[NR],
             const Sums& sums) const {
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            const Vec<E> gone = at_least<E>(before[i] - shift[i]);
            const Vec<E> moved = fma(load(sum_part + i * W), gone, load(tilt_part + i * W));
            store(tilt_part + i * W, fma(moved, keep[i], sums.tilt[i]));
        });
        if (u.seen.distance) add_distance(u, p, j0, keys, keep, sums);
        for (int64_t g = 0; g < c.taps.regions; g++) {
            E* const mass = mass_part + g * N;
            each<NR>([&](auto i) TILEFOLD_LAMBDA { store(mass + i * W, load(mass + i * W) * keep[i]); });
            for (int64_t n = 0; n < c.taps.spans; n++) add_mass(c, u, g, n, p, j0, keys, sums.weights);
        }
    }

    // Joins the segment to those before it, as Tile::merge does; the sums are those before that.
    void merge(const Meeting<E>& meet, int i, const E* max_total, const E* sum_total, const E* max_part,
               const E* sum_part, int64_t regions) const {
        const Vec<E> shift = shift_of<E>(meet.max);
        const auto moved = [&](const E* tilt, const E* sum, const E* top) TILEFOLD_LAMBDA {
            return fma(load(sum + i), at_least<E>(load(top + i) - shift), load(tilt + i));
        };
        store(tilt_total + i,
              meet(moved(tilt_total, sum_total, max_total), moved(tilt_part, sum_part, max_part)));
        store(far_total + i, meet(load(far_total + i), load(far_part + i)));
        for (int64_t at = i; at < regions * N; at += N)
            store(mass_total + at, meet(load(mass_total + at), load(mass_part + at)));
    }
    void swap() {
        exchange(tilt_part, tilt_total);
        exchange(far_part, far_total);
        exchange(mass_part, mass_total);
    }
    void raise(const E* max_part) const {
        for (int i = 0; i < N; i += W) store(peak + i, max(load(max_part + i), load(peak + i)));
    }

    // The sums of a finished row, whose log-sum-exp is known.
    void finish(const Call& c, const Unit& u, int64_t r, const Row& row, E d, E factor) const {
        const int64_t at = row.at(c.lse);
        const E lse = static_cast<const E*>(u.lse)[at];
        const E odd = lse == lse ? E(0) : lse;
        const auto put = [&](void* to, E x) {
            if (to) static_cast<E*>(to)[at] = x + odd;
        };
        put(u.seen.entropy, d > 0 ? natural_log(d) - tilt_total[r] * factor : E(0));
        put(u.seen.peak, peak[r]);
        put(u.seen.distance, far_total[r] * factor);
        for (int64_t g = 0; g < c.taps.regions; g++)
            put(static_cast<E*>(u.seen.mass) + g * c.taps.step, mass_total[g * N + r] * factor);
    }

   private:
    static void exchange(E*& a, E*& b) {
        E* const t = a;
        a = b;
        b = t;
    }

    // Lists are whole vectors: from the last one up, what is lower moves down by one.
    void insert(const Call& c, const Unit& u, int64_t r, E score, int64_t key) const {
        using I = typename Float<E>::Integer;
        E* const scores = static_cast<E*>(u.seen.top_scores) + list[r];
        I* const keys = static_cast<I*>(u.seen.top_keys) + list[r];
        const Vec<E> x = set<E>(score);
        const Mask<E> name = Mask<E>{} + I(u.seen.first_key + key);
        for (int64_t at = (c.taps.top - 1) / W * W; at >= 0; at -= W) {
            const Vec<E> old = load(scores + at), above = at ? load(scores + at - W) : x;
            const Mask<E> old_keys = whole(keys + at), keys_above = at ? whole(keys + at - W) : name;
            const Mask<E> lower = old < x;
            if (!any(lower)) break;
            const Vec<E> next = moved_up(above, old);
            const Mask<E> still = next < x, next_keys = moved_up(keys_above, old_keys);
            store(scores + at, select<E>(lower, select<E>(still, next, x), old));
            const Mask<E> to = lower ? (still ? next_keys : name) : old_keys;
            memcpy(keys + at, &to, sizeof to);
        }
        bar[r] = scores[c.taps.top - 1];
    }
    static TILEFOLD_INLINE Mask<E> whole(const void* p) {
        Mask<E> x;
        memcpy(&x, p, sizeof x);
        return x;
    }

    // Far from all its rows, the distances of a block are that of its first key, less the keys' numbers.
    void add_distance(const Unit& u, const E* p, int64_t j0, int64_t keys, const Vec<E> (&keep)[NR],
                      const Sums& sums) const {
        for (int i = 0; i < NR; i++) {
            Vec<E> at{}, sum{};
            bool after = true, before = true;
            for (int r = 0; r < W; r++) {
                const int64_t far = query[i * W + r] + u.band.offset - j0;
                at[r] = E(far);
                after &= far >= FAR, before &= far <= -FAR;
            }
            if (after || before) {
                sum = fma(at, sums.weights[i], -sums.keys[i]);
                if (before) sum = -sum;
            } else {
                for (int64_t j = 0; j < keys; j++) {
                    const Vec<E> far = at - set<E>(E(j));
                    sum = fma(load(p + j * N + i * W), max(far, -far), sum);
                }
            }
            store(far_part + i * W, fma(load(far_part + i * W), keep[i], sum));
        }
    }

    // The weights of a block within span n of region g.
    void add_mass(const Call& c, const Unit& u, int64_t g, int64_t n, const E* p, int64_t j0, int64_t keys,
                  const Vec<E> (&added)[NR]) const {
        const Hull h = n < SPANS ? hull[g][n] : hull_of(c, u, g, n);
        if (j0 >= h.last || j0 + keys <= h.first) return;
        E* const mass = mass_part + g * N;
        if (j0 >= h.full_first && j0 + keys <= h.full_last) {
            each<NR>([&](auto i) TILEFOLD_LAMBDA { store(mass + i * W, load(mass + i * W) + added[i]); });
            return;
        }
        Mask<E> lo[NR], hi[NR];
        for (int r = 0; r < N; r++) {
            const int64_t at = span_at(c, u, g, n, r);
            lo[r / W][r % W] = typename Float<E>::Integer(within(u.seen.lo[at] - j0, 0, keys));
            hi[r / W][r % W] = typename Float<E>::Integer(within(u.seen.hi[at] - j0, 0, keys));
        }
        for (int i = 0; i < NR; i++) {
            Vec<E> sum{};
            for (int64_t j = 0; j < keys; j++) {
                const Mask<E> at = Mask<E>{} + typename Float<E>::Integer(j);
                sum += select<E>((lo[i] <= at) & (hi[i] > at), load(p + j * N + i * W), Vec<E>{});
            }
            store(mass + i * W, load(mass + i * W) + sum);
        }
    }

    // What some lane, and what every lane, has of a span of a region.
    struct Hull {
        int64_t first, last, full_first, full_last;
    };
    static constexpr int SPANS = 4;
    Hull hull[MOST_REGIONS][SPANS];

    int64_t span_at(const Call& c, const Unit& u, int64_t g, int64_t n, int64_t r) const {
        return (g * c.taps.rows + query[r] - u.first_row) * c.taps.spans + n;
    }
    Hull hull_of(const Call& c, const Unit& u, int64_t g, int64_t n) const {
        Hull h{INT64_MAX, 0, 0, INT64_MAX};
        for (int64_t r = 0; r < N; r++) {
            const int64_t lo = u.seen.lo[span_at(c, u, g, n, r)], hi = u.seen.hi[span_at(c, u, g, n, r)];
            if (lo < hi) h.first = least(h.first, lo), h.last = most(h.last, hi);
            h.full_first = most(h.full_first, lo), h.full_last = least(h.full_last, hi);
        }
        return h;
    }
};

}  // namespace
}  // namespace tilefold
