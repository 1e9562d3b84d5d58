// The monoid: how two states of a row become one; and what a fold can tell of a row's weights before they are
// finished: more monoids, folded beside the maximum and the sum of a tile. Twin of stats.py, and of the taps
// over rows in taps.py.
//
// Per score, entropy costs two operations beside the 17 of softmax, a list of
// the highest three quarters of one where nothing is found, a distance four, the mass in a region one, and
// only in blocks that a region cuts. All but the lists and the peak are sums of e^(s − m) · x, rescaled as
// the sum itself is; the tilt, Σ e^(s − m) · (s − m), moves with m too. A list is the output itself: rows see
// their segments from left to right, whatever the plan.
//
// Tried: the scores' exponents taken once more, in a pass of its own (+9 % of a call at dim 64).

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
    static constexpr int W = LANES<E>, NR = N / W, AHEAD = 4;

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

    void begin(const Call& c, int64_t r0, int64_t rows) const {
        Row row(r0, c.group);
        for (int r = 0; r < N; r++) {
            query[r] = row.query;
            list[r] = row.at(c.lse) * c.taps.top;
            peak[r] = bar[r] = -INFINITE<E>;
            tilt_total[r] = far_total[r] = 0;
            if (r + 1 < rows) row.next();
        }
        memset(mass_total, 0, size_t(MOST_REGIONS * N) * sizeof(E));
    }
    void begin_segment() const {
        memset(tilt_part, 0, N * sizeof(E));
        memset(far_part, 0, N * sizeof(E));
        memset(mass_part, 0, size_t(MOST_REGIONS * N) * sizeof(E));
    }

    // ---- a block of scores s[keys][N], of keys j0 … ----

    // The highest scores of each row. Of equal ones the first is kept.
    void list_highest(const Call& c, const Unit& u, int64_t rows, const E* s, int64_t j0, int64_t keys) const {
        if (!c.taps.top) return;
        for (int64_t j = 0; j < keys; j += AHEAD) {
            Mask<E> found{};
            const int64_t n = least(AHEAD, keys - j);
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                Vec<E> highest = load(s + j * N + i * W);
                for (int64_t k = 1; k < n; k++) highest = max(load(s + (j + k) * N + i * W), highest);
                found |= highest > load(bar + i * W);
            });
            if (!any(found)) continue;
            for (int64_t k = 0; k < n; k++)
                for (int64_t r = 0; r < rows; r++)
                    if (s[(j + k) * N + r] > bar[r]) insert(c, u, r, s[(j + k) * N + r], j0 + j + k);
        }
    }

    // Weights in place of scores, their sums, and those of weights times what the score lies below the shift.
    static TILEFOLD_INLINE void weigh(E* s, int64_t keys, const Vec<E> (&shift)[NR], Vec<E> (&sum)[NR],
                                      Vec<E> (&tilt)[NR]) {
        Vec<E> total_of[NR], tilt_of[NR], less[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { total_of[i] = tilt_of[i] = Vec<E>{}, less[i] = shift[i]; });
        for (E* const end = s + keys * N; s < end; s += N)
            each<NR>([&](auto i) TILEFOLD_LAMBDA {
                const Vec<E> x = at_least(load(s + i * W) - less[i]), p = exp<E>(x);
                total_of[i] += p;
                tilt_of[i] = fma(p, x, tilt_of[i]);
                store(s + i * W, p);
            });
        each<NR>([&](auto i) TILEFOLD_LAMBDA { sum[i] = total_of[i], tilt[i] = tilt_of[i]; });
    }

    // Adds a block of weights to the segment: the sum before it, what it is multiplied by, and where the
    // maximum was.
    void add(const Call& c, const Unit& u, const E* p, int64_t j0, int64_t keys, const E* sum_part,
             const Vec<E> (&before)[NR], const Vec<E> (&shift)[NR], const Vec<E> (&keep)[NR],
             const Vec<E> (&added)[NR], const Vec<E> (&tilt)[NR]) const {
        each<NR>([&](auto i) TILEFOLD_LAMBDA {
            const Vec<E> moved = fma(load(sum_part + i * W), at_least(before[i] - shift[i]), load(tilt_part + i * W));
            store(tilt_part + i * W, fma(moved, keep[i], tilt[i]));
        });
        if (u.seen.distance) add_distance(u, p, j0, keys, keep);
        for (int64_t g = 0; g < c.taps.regions; g++) {
            E* const mass = mass_part + g * N;
            each<NR>([&](auto i) TILEFOLD_LAMBDA { store(mass + i * W, load(mass + i * W) * keep[i]); });
            for (int64_t n = 0; n < c.taps.spans; n++) add_mass(c, u, g, n, p, j0, keys, added);
        }
    }

    // Joins the segment to those before it, as Tile::merge does; the sums are those before that.
    void merge(const Meeting<E>& meet, int i, const E* max_total, const E* sum_total, const E* max_part,
               const E* sum_part, int64_t regions) const {
        const Vec<E> shift = shift_of<E>(meet.max);
        const auto moved = [&](const E* tilt, const E* sum, const E* top) TILEFOLD_LAMBDA {
            return fma(load(sum + i), at_least(load(top + i) - shift), load(tilt + i));
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

    // exp takes no less either, and 0 times it is 0.
    static TILEFOLD_INLINE Vec<E> at_least(Vec<E> x) { return max(set<E>(Float<E>::least), x); }

    void insert(const Call& c, const Unit& u, int64_t r, E score, int64_t key) const {
        E* const scores = static_cast<E*>(u.seen.top_scores) + list[r];
        int64_t* const keys = u.seen.top_keys + list[r];
        int64_t n = c.taps.top - 1;
        for (; n > 0 && scores[n - 1] < score; n--) scores[n] = scores[n - 1], keys[n] = keys[n - 1];
        scores[n] = score, keys[n] = u.seen.first_key + key;
        bar[r] = scores[c.taps.top - 1];
    }

    void add_distance(const Unit& u, const E* p, int64_t j0, int64_t keys, const Vec<E> (&keep)[NR]) const {
        for (int i = 0; i < NR; i++) {
            Vec<E> at{}, sum{};
            for (int r = 0; r < W; r++) at[r] = E(query[i * W + r] + u.band.offset - j0);
            for (int64_t j = 0; j < keys; j++) {
                const Vec<E> far = at - set<E>(E(j));
                sum = fma(load(p + j * N + i * W), max(far, -far), sum);
            }
            store(far_part + i * W, fma(load(far_part + i * W), keep[i], sum));
        }
    }

    // The weights of a block within span n of region g.
    void add_mass(const Call& c, const Unit& u, int64_t g, int64_t n, const E* p, int64_t j0, int64_t keys,
                  const Vec<E> (&added)[NR]) const {
        Mask<E> lo[NR], hi[NR];
        bool some = false, all = true;
        for (int r = 0; r < N; r++) {
            const int64_t at = (g * c.taps.rows + query[r] - u.first_row) * c.taps.spans + n;
            const int64_t a = within(u.seen.lo[at] - j0, 0, keys), b = within(u.seen.hi[at] - j0, 0, keys);
            lo[r / W][r % W] = typename Float<E>::Integer(a);
            hi[r / W][r % W] = typename Float<E>::Integer(b);
            some |= a < b, all &= a == 0 && b == keys;
        }
        if (!some) return;
        for (int i = 0; i < NR; i++) {
            E* const mass = mass_part + g * N + i * W;
            Vec<E> sum = added[i];
            if (!all) {
                sum = Vec<E>{};
                for (int64_t j = 0; j < keys; j++) {
                    const Mask<E> at = Mask<E>{} + typename Float<E>::Integer(j);
                    sum += select<E>((lo[i] <= at) & (hi[i] > at), load(p + j * N + i * W), Vec<E>{});
                }
            }
            store(mass, load(mass) + sum);
        }
    }
};

}  // namespace
}  // namespace tilefold
