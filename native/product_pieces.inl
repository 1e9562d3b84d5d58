// The microkernel for numbers that have more bits than bf16, where silicon multiplies tiles of bf16: a
// float32 is a sum of three pieces, a float16, or a weight beside float16 values, of two. Products of pieces
// are exact; of nine (four) those are left out that lie below the last bit of what they are added to, so six
// (three; four for scores of float16, whose lse is a float32) make one product.
//
// Per 32 rows of A, 32 lanes and a step of 32 dims or keys: 24 products of 16 cycles into four tile
// registers, and 14 loads, for one of the factors stays when the pair changes. Matrices lie in whole tiles
// one after another, because loads of rows 128 or 256 bytes apart are what kept the unit waiting. Measured
// per product, keys from the second cache, on a core where the unit alone takes 4.8 to 5.1 ns: 6.0 like
// this; 6.8 to 7.8 with rows apart; 6.2 (64 dims) to 10 (128) with 48 lanes in six registers, rows apart,
// pair by pair; 7 to 10 pair by pair at each step of depth; 6.5 to 7.7 with 16 rows by 48 lanes. Asking for
// the next step's tiles: nothing.
//
// A whole block of 128 keys x 48 lanes takes 6.2 us at dim 64 and 11.5 at 128, where vectors take 8.6 and 17:
// products 3.5 and 7, weights and their pieces 1.2 (24 vector operations each), what is left is scores and
// sums on their way from tiles to vectors. Blocks of 64 keys are slower. Half the error of a chain of
// multiply-adds comes for nothing: sums are shorter.
//
// A piece below the smallest normal number counts as 0, so numbers under 1e-33 have fewer bits, and a number
// that would round up to infinity has none: what it meets is NaN, and is then multiplied as it is.

namespace tilefold {
namespace {

constexpr int A_TILE = 256;  // pairs in a tile: 16 rows of 16

// Three pieces hold queries times the scale; with two, which hold what is stored, it comes after the product.
template <int P>
struct Pieces : Amx {
    static constexpr int PIECES = P, WIDE = 2, NEXT = A_TILE;
    static constexpr bool SCALED = P == 3;
    template <int N, class X>
    static TILEFOLD_INLINE X* pair_at(X* weights, int64_t key) {
        return weights + key / 32 * (P * N * 16) + key % 32 / 2 * 16;
    }
};

// A matrix as A: groups of 32 rows, [group][steps of 32 in depth][piece][2][16][16]; `group` pairs to the
// next. Rows of a last group beyond its first 16 are not read where there are none.
template <int P>
struct Tiled {
    static constexpr int64_t STEP = P * 2 * A_TILE;
    const uint32_t* at;
    int64_t group;

    // Row r, a multiple of 32, and pair k, one of 16.
    TILEFOLD_INLINE Tiled from(int64_t r, int64_t k) const {
        return {at + r / 32 * group + k / 16 * STEP, group};
    }
};
template <class K>
struct Matrix_<K, true> {
    using Type = Tiled<K::PIECES>;
};

// Two vectors as pairs, lane by lane, the first one in the lower half. Each piece is what is left of a
// number, rounded to nearest; the third takes all that is left.
template <int P>
TILEFOLD_INLINE void pair_pieces(F32 low, F32 high, U32 (&to)[P]) {
    each<P>([&](auto n) TILEFOLD_LAMBDA {
        const U32 l = bits_as<U32>(low) + 0x8000u, h = (bits_as<U32>(high) + 0x8000u) & 0xffff0000u;
        if constexpr (n == 2) {
            to[n] = bits_as<U32>(low) >> 16 | (bits_as<U32>(high) & 0xffff0000u);
        } else {
            to[n] = l >> 16 | h;
            low -= bits_as<F32>(l & 0xffff0000u), high -= bits_as<F32>(h);
        }
    });
}
// The same of weights, cut off instead of rounded but for the last piece of two: it is faster.
template <int P>
TILEFOLD_INLINE void pair_weights(F32 low, F32 high, U32 (&to)[P]) {
    each<P>([&](auto n) TILEFOLD_LAMBDA {
        if constexpr (n == 1 && P == 2) {
            to[n] = pair_up<U32>(low, high);
        } else {
            const U32 h = bits_as<U32>(high) & 0xffff0000u;
            to[n] = bits_as<U32>(low) >> 16 | h;
            low -= bits_as<F32>(bits_as<U32>(low) & 0xffff0000u), high -= bits_as<F32>(h);
        }
    });
}

// Whether the pieces of x are finite: its first one is rounded up.
TILEFOLD_INLINE bool has_pieces(float x) { return x < 0x1.ffp127f && x > -0x1.ffp127f; }

#define TILEFOLD_A(i)                            \
    _tile_loadd(4, a + (i) * 2 * A_TILE, 64);    \
    if constexpr (BOTH) _tile_loadd(5, a + (i) * 2 * A_TILE + A_TILE, 64)
#define TILEFOLD_B(j)                          \
    _tile_loadd(6, b + (j) * OF * A_TILE, 64); \
    if constexpr (NR > 1) _tile_loadd(7, b + (j) * OF * A_TILE + A_TILE, 64)
#define TILEFOLD_MULTIPLY                                 \
    _tile_dpbf16ps(0, 4, 6);                              \
    if constexpr (NR > 1) _tile_dpbf16ps(1, 4, 7);        \
    if constexpr (BOTH) _tile_dpbf16ps(2, 5, 6);          \
    if constexpr (BOTH && NR > 1) _tile_dpbf16ps(3, 5, 7)

// 32 rows of A · B, or 16, by NR vectors of lanes, of which a row of B and C has OF. B:
// [step][piece][OF][16][16]; C: [rows][OF * 16]. Of two pieces each, ALL products are made where nothing may
// be lost.
template <int P, int NR, int OF, bool BOTH, bool ALL>
TILEFOLD_INLINE void multiply_pieces(const uint32_t* a, const uint32_t* b, int64_t steps, float* to) {
    constexpr int64_t PITCH = OF * 64;
    settle_memory();
    _tile_zero(0);
    if constexpr (NR > 1) _tile_zero(1);
    if constexpr (BOTH) _tile_zero(2);
    if constexpr (BOTH && NR > 1) _tile_zero(3);
    for (; steps > 0; steps--, a += Tiled<P>::STEP, b += P * OF * A_TILE) {
        TILEFOLD_A(0);
        if constexpr (P == 3) {
            TILEFOLD_B(2);
            TILEFOLD_MULTIPLY;
        }
        TILEFOLD_B(1);
        TILEFOLD_MULTIPLY;
        if constexpr (P == 3) {
            TILEFOLD_A(1);
            TILEFOLD_MULTIPLY;
            TILEFOLD_B(0);
            TILEFOLD_MULTIPLY;
            TILEFOLD_A(2);
            TILEFOLD_MULTIPLY;
            TILEFOLD_A(0);
        } else {
            TILEFOLD_B(0);
            TILEFOLD_MULTIPLY;
            TILEFOLD_A(1);
        }
        TILEFOLD_MULTIPLY;
        if constexpr (P == 2 && ALL) {
            TILEFOLD_B(1);
            TILEFOLD_MULTIPLY;
        }
    }
    _tile_stored(0, to, PITCH);
    if constexpr (NR > 1) _tile_stored(1, to + 16, PITCH);
    if constexpr (BOTH) _tile_stored(2, to + 16 * OF * 16, PITCH);
    if constexpr (BOTH && NR > 1) _tile_stored(3, to + 16 * OF * 16 + 16, PITCH);
    settle_memory();
}
#undef TILEFOLD_A
#undef TILEFOLD_B
#undef TILEFOLD_MULTIPLY

// Up to 32 rows of A · B, rounded up to 16.
template <class K, int OF, bool ALL = false>
TILEFOLD_INLINE void multiply_rows(Tiled<K::PIECES> a, const uint32_t* b, int64_t depth, int64_t rows,
                                   float* to) {
    constexpr int P = K::PIECES, NR = OF < 2 ? OF : 2;
    const int64_t steps = up(depth, K::DEPTH) / K::DEPTH;
    if (rows > 16)
        multiply_pieces<P, NR, OF, true, ALL>(a.at, b, steps, to);
    else
        multiply_pieces<P, NR, OF, false, ALL>(a.at, b, steps, to);
    if constexpr (OF == 3) {
        b += 2 * A_TILE, to += 32;
        if (rows > 16)
            multiply_pieces<P, 1, OF, true, ALL>(a.at, b, steps, to);
        else
            multiply_pieces<P, 1, OF, false, ALL>(a.at, b, steps, to);
    }
}

// take(r, acc) for rows r0 … r1 of a product that lies at `from`, strip by strip.
template <int NR, class Take>
TILEFOLD_INLINE void each_strip(const float* from, int64_t r0, int64_t r1, Take&& take) {
    const auto rows = [&](int64_t r, auto mr) TILEFOLD_LAMBDA {
        constexpr int MR = mr;
        F32 acc[MR][NR];
        each<MR>([&](auto i) TILEFOLD_LAMBDA {
            each<NR>([&](auto v) TILEFOLD_LAMBDA { acc[i][v] = load(from + ((r - r0 + i) * NR + v) * 16); });
        });
        take(r, acc);
    };
    int64_t r = r0;
    for (; r + STRIP <= r1; r += STRIP) rows(r, Int<STRIP>{});
    for (; r < r1; r++) rows(r, Int<1>{});
}

// The microkernel's contract; r0 is a multiple of 32.
template <class K, int NR, class Take>
    requires(K::PIECES > 1)
TILEFOLD_INLINE void product(Tiled<K::PIECES> a, const uint32_t* b, int64_t depth, int64_t r0, int64_t r1,
                             Take&& take) {
    alignas(64) float c[32 * NR * 16];
    for (int64_t r = r0; r < r1; r += 32) {
        const int64_t rows = r1 - r < 32 ? r1 - r : 32;
        multiply_rows<K, NR>(a.from(r, 0), b, depth, rows, c);
        each_strip<NR>(c, r, r + rows, take);
    }
}

}  // namespace
}  // namespace tilefold
