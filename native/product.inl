// The one microkernel: C[rows][N] = A · B, where A is read as scalar broadcasts from wherever it lies and the
// lanes of B and C are queries. By strides alone it serves K·Qᵀ (rows are keys, depth is dim) and Vᵀ·P (rows
// are value dimensions, depth is keys), so neither keys nor values are rearranged.
//
// Cost of one step of depth with 8 rows and 3 vectors of lanes: 24 multiply-adds, 8 broadcasts, 3 loads; the
// loads take 5.5 of the 12 cycles that two multiply-add units need. 24 accumulators, 3 vectors of B and one
// broadcast fill 28 of 32 registers. Measured on an Intel core whose registers alone give 93 % of two per
// cycle: 3 loads of B cost 1 %, the 8 broadcasts 9 %, the counting 2 %, so 82 % is what this loop can give
// there (a wide matrix product of MKL gives 78 %). Tried on AVX-512: 16 × 2 spills, 8 × 1 waits for latency
// (16 × 1 does not), 6 × 4 and 4 × 6 and 9 × 3 are no faster, nor is depth by twos, nor asking for the next
// strip's rows of A, one at each step; broadcasts inside the multiply-adds are 15 % slower.
//
// NEON has as many registers and multiplies by element, so that 8 loads of numbers take the place of the
// broadcasts. A tile is only 12 rows there: with two multiply-adds per cycle its keys and values come from
// the second cache at 2.7 bytes per cycle, and from memory at an eighth of that (MOST_TILES). Not measured.

namespace tilefold {
namespace {

// How a kernel multiplies: E is what it accumulates in, A the element that it broadcasts, PAIR the keys or
// dims per A, PIECES the bf16 numbers that one number is the sum of, WIDE the vectors of lanes in a tile at
// most. SCALED says that queries are multiplied by the scale before. It takes keys in multiples of KEYS, and
// depth in multiples of DEPTH. Whoever works longer between products calls stay_awake() now and then.
struct InVectors {
    static constexpr int PIECES = 1, WIDE = 3;
    static constexpr bool IN_TILES = false, SCALED = false;
    static TILEFOLD_INLINE void stay_awake() {}
};
struct Single : InVectors {
    using E = float;
    using A = float;
    static constexpr int PAIR = 1, KEYS = 1, DEPTH = 1;
    static TILEFOLD_INLINE F32 step(F32 acc, A a, F32 b) { return fma(a, b, acc); }
};
struct Double : InVectors {
    using E = double;
    using A = double;
    static constexpr int PAIR = 1, KEYS = 1, DEPTH = 1;
    static TILEFOLD_INLINE F64 step(F64 acc, A a, F64 b) { return fma(a, b, acc); }
};
#ifdef TILEFOLD_HAS_DOT2
// Weights of two keys lie together; of N lanes, vectors are NEXT apart.
struct InPairs {
    using E = float;
    using A = uint32_t;
    static constexpr int PAIR = 2, NEXT = LANES<float>;
    template <int N, class X>
    static TILEFOLD_INLINE X* pair_at(X* weights, int64_t key) {
        return weights + key / 2 * N;
    }
};
struct Dot : InVectors, InPairs {
    static constexpr int KEYS = 2, DEPTH = 1;
    static TILEFOLD_INLINE F32 step(F32 acc, A a, U32 b) { return dot2(acc, set<uint32_t>(a), b); }
};
#endif

constexpr int STRIP = TILEFOLD_REGISTERS == 32 ? 8 : 4;  // rows of C held in registers

// A matrix of A as it lies: element (r, k) is at[r * row + k * step].
template <class A>
struct Source {
    const A* at;
    int64_t row, step;

    TILEFOLD_INLINE Source from(int64_t r, int64_t k) const { return {at + r * row + k * step, row, step}; }
};

// What kernel K reads keys and values as.
template <class K, bool IN_PIECES = (K::PIECES > 1)>
struct Matrix_ {
    using Type = Source<typename K::A>;
};
template <class K>
using Matrix = typename Matrix_<K>::Type;

// Rows of B are `pitch` elements apart.
template <class K, int MR, int NR>
TILEFOLD_INLINE void strip(Vec<typename K::E> (&acc)[MR][NR], Source<typename K::A> a, const typename K::A* b,
                           int64_t depth, int64_t pitch = NR * LANES<typename K::E>) {
    constexpr int W = LANES<typename K::E>;
    each<MR>([&](auto r) TILEFOLD_LAMBDA {
        each<NR>([&](auto i) TILEFOLD_LAMBDA { acc[r][i] = Vec<typename K::E>{}; });
    });
    for (int64_t k = 0; k < depth; k++) {
        Vec<typename K::A> lanes[NR];
        each<NR>([&](auto i) TILEFOLD_LAMBDA { lanes[i] = load(b + i * W); });
        each<MR>([&](auto r) TILEFOLD_LAMBDA {
            const typename K::A x = a.at[r * a.row];
            each<NR>([&](auto i) TILEFOLD_LAMBDA { acc[r][i] = K::step(acc[r][i], x, lanes[i]); });
        });
        a.at += a.step;
        b += pitch;
    }
}

// Rows r0 … r1 of A · B, handed to `take(r, acc)` strip by strip; rows counted from where `a` stands. Every
// element of C is one chain of additions in ascending depth, however many rows a strip has.
template <class K, int NR, class Take>
    requires(!K::IN_TILES)
TILEFOLD_INLINE void product(Source<typename K::A> a, const typename K::A* b, int64_t depth, int64_t r0,
                             int64_t r1, Take&& take) {
    int64_t r = r0;
    if constexpr (NR == 1)  // eight chains alone would wait for each other's latency
        for (; r + 2 * STRIP <= r1; r += 2 * STRIP) {
            Vec<typename K::E> acc[2 * STRIP][NR];
            strip<K, 2 * STRIP, NR>(acc, a.from(r, 0), b, depth);
            take(r, acc);
        }
    for (; r + STRIP <= r1; r += STRIP) {
        Vec<typename K::E> acc[STRIP][NR];
        strip<K, STRIP, NR>(acc, a.from(r, 0), b, depth);
        take(r, acc);
    }
    for (; r < r1; r++) {
        Vec<typename K::E> acc[1][NR];
        strip<K, 1, NR>(acc, a.from(r, 0), b, depth);
        take(r, acc);
    }
}

// f(NR) for groups of columns that make up `vectors` vectors, as wide as products are fast.
template <class F>
TILEFOLD_INLINE void each_group(int64_t vectors, F&& f) {
    int64_t left = vectors;
    for (; left > 4 || left == 3; left -= 3) f(Int<3>{});
    for (; left >= 2; left -= 2) f(Int<2>{});
    if (left) f(Int<1>{});
}

// C += A · B for rows r0 … r1, where B and C have `vectors` vectors to a row: products whose lanes are dims.
template <class K>
    requires(!K::IN_TILES)
void add_product(Source<typename K::A> a, const typename K::A* b, int64_t depth, int64_t r0, int64_t r1,
                 int64_t vectors, typename K::E* c) {
    constexpr int W = LANES<typename K::E>;
    const int64_t pitch = vectors * W;
    each_group(vectors, [&](auto nr) TILEFOLD_LAMBDA {
        constexpr int NR = nr;
        const auto rows = [&](int64_t r, auto mr) TILEFOLD_LAMBDA {
            constexpr int MR = mr;
            Vec<typename K::E> acc[MR][NR];
            strip<K, MR, NR>(acc, a.from(r, 0), b, depth, pitch);
            each<MR>([&](auto x) TILEFOLD_LAMBDA {
                each<NR>([&](auto i) TILEFOLD_LAMBDA {
                    typename K::E* const at = c + (r + x) * pitch + i * W;
                    store(at, load(at) + acc[x][i]);
                });
            });
        };
        int64_t r = r0;
        for (; r + STRIP <= r1; r += STRIP) rows(r, Int<STRIP>{});
        for (; r < r1; r++) rows(r, Int<1>{});
        b += NR * W;
        c += NR * W;
    });
}

}  // namespace
}  // namespace tilefold
