// The microkernel's override where the machine multiplies tiles in silicon: 32 rows of C by up to 48 lanes in
// six tile registers, one more for A and one for B. Per step of 32 dims: 2 loads of A, 6 of B (8 cycles each
// from the first cache) and 6 products of 16 cycles, so the unit is busy; C takes a detour through memory to
// become vectors.
//
// Measured per 128 keys x 48 lanes at dim 64: products 0.31 us for scores and 0.28 for values, as the unit
// allows; the vectors of softmax 1.0 us when exp took eleven instructions (8 to 10 cycles each, the two ports
// are full); and 0.7 us more when the three follow one another, of which 0.25 were the unit waking up again
// (stay_awake() below). That costs the vectors 0.1 us; called four times as often it costs them all that it
// brings. With exp of eight instructions the whole takes 2.35 us, at dim 128 3.66. Tried without gain: the
// next rows' products before this one's vectors, scores straight to their place and one pass over them there,
// prefetch of values and accumulators during softmax, blocks of 32, 64 and 256 keys, keys and values in whole
// tiles and 32 lanes as product_pieces.inl has them (2.55 and 3.75 us). In a loop of its own also: single
// steps of the products of the tiles before and after woven between every two to four rows of weights, 2.6 us
// for 2.6 at dim 64 and 3.5 for 3.8 at dim 128, too little for three tiles' scores in the first cache at
// once.

namespace tilefold {
namespace {

struct Amx : InPairs {
    static constexpr int KEYS = 32, DEPTH = 16, PIECES = 1, WIDE = 3;
    static constexpr bool IN_TILES = true, SCALED = false;
    // The unit that multiplies tiles goes to sleep some 0.6 us after its last product and takes 0.3 us to
    // wake; loads and stores of tiles do not keep it up. No tile in these registers lives longer than a
    // product of tiles takes. In the backward pass this brings nothing.
    static TILEFOLD_INLINE void stay_awake() { _tile_dpbssd(7, 4, 5); }
};

// GCC's tile loads do not tell it that they read memory: what was stored must be stored by then.
TILEFOLD_INLINE void settle_memory() { __asm__ volatile("" ::: "memory"); }

// All tile registers as 16 rows of 64 bytes, for as long as this lives.
struct TileRegisters {
    TileRegisters() {
        alignas(64) uint8_t config[64] = {1};
        for (int t = 0; t < 8; t++) {
            config[16 + 2 * t] = 64;
            config[48 + t] = 16;
        }
        __asm__ volatile("" ::"r"(config) : "memory");
        _tile_loadconfig(config);
    }
    ~TileRegisters() { _tile_release(); }
};

// Tile registers are named by literals, so a step of depth is written out for each width.
#define TILEFOLD_ROW(c0, c1, c2)                                     \
    _tile_loadd(7, b, pitch * 4);                                    \
    _tile_dpbf16ps(c0, 6, 7);                                        \
    if constexpr (NR > 1) {                                          \
        _tile_loadd(7, b + 16, pitch * 4);                           \
        _tile_dpbf16ps(c1, 6, 7);                                    \
    }                                                                \
    if constexpr (NR > 2) {                                          \
        _tile_loadd(7, b + 32, pitch * 4);                           \
        _tile_dpbf16ps(c2, 6, 7);                                    \
    }
#define TILEFOLD_EACH(DO)                                  \
    DO(0, 0, 0);                                           \
    if constexpr (NR > 1) DO(1, 0, 16);                    \
    if constexpr (NR > 2) DO(2, 0, 32);                    \
    if constexpr (ROWS == Rows16::TWO) {                   \
        DO(3, 16, 0);                                      \
        if constexpr (NR > 1) DO(4, 16, 16);               \
        if constexpr (NR > 2) DO(5, 16, 32);               \
    }
#define TILEFOLD_ZERO(c, row, lane) _tile_zero(c)
#define TILEFOLD_LOAD(c, row, lane) _tile_loadd(c, to + (row) * to_pitch + (lane), to_pitch * 4)
#define TILEFOLD_STORE(c, row, lane) _tile_stored(c, to + (row) * to_pitch + (lane), to_pitch * 4)

// ROWS rows of A · B to `to`, or added to what is there: 32, 16, or fewer, of which `few` exist and nothing
// beyond is read. Numbers of B may be sums of two, the second ones `lower` elements on.
enum class Rows16 { TWO, ONE, FEW };
template <int NR, Rows16 ROWS, bool ADD = false>
TILEFOLD_INLINE void tile_product(Source<uint32_t> a, int64_t few, const uint32_t* b, int64_t depth,
                                  float* to, int64_t pitch = NR * 16, int64_t lower = 0,
                                  int64_t to_pitch = NR * 16) {
    alignas(64) uint32_t part[16 * 16];
    settle_memory();
    if constexpr (ADD) {
        TILEFOLD_EACH(TILEFOLD_LOAD)
    } else {
        TILEFOLD_EACH(TILEFOLD_ZERO)
    }
    const uint32_t* const begin = b;
    for (int64_t n = 0; n < (lower ? 2 : 1); n++) {
        b = begin + n * lower;
        const uint32_t *a0 = a.at, *a1 = a0 + 16 * a.row;
        for (int64_t k = 0; k < depth; k += 16, a0 += 16, a1 += 16, b += 16 * pitch) {
            if constexpr (ROWS == Rows16::FEW) {
                for (int64_t x = 0; x < few; x++) memcpy(part + x * 16, a0 + x * a.row, 64);
                settle_memory();
                _tile_loadd(6, part, 64);
            } else {
                _tile_loadd(6, a0, a.row * 4);
            }
            TILEFOLD_ROW(0, 1, 2)
            if constexpr (ROWS == Rows16::TWO) {
                _tile_loadd(6, a1, a.row * 4);
                TILEFOLD_ROW(3, 4, 5)
            }
        }
    }
    TILEFOLD_EACH(TILEFOLD_STORE)
    if constexpr (ADD) settle_memory();
}
#undef TILEFOLD_ROW
#undef TILEFOLD_EACH
#undef TILEFOLD_ZERO
#undef TILEFOLD_LOAD
#undef TILEFOLD_STORE

template <class K, int NR, class Take>
    requires(K::IN_TILES && K::PIECES == 1)
TILEFOLD_INLINE void product(Source<uint32_t> a, const uint32_t* b, int64_t depth, int64_t r0, int64_t r1,
                             Take&& take, int64_t pitch = NR * 16, int64_t lower = 0) {
    alignas(64) float c[32 * NR * 16];
    depth = up(depth, K::DEPTH);
    for (int64_t r = r0; r < r1;) {
        int64_t rows = 32;
        if (r1 - r >= 32) {
            tile_product<NR, Rows16::TWO>(a.from(r, 0), 0, b, depth, c, pitch, lower);
        } else if (r1 - r >= 16) {
            tile_product<NR, Rows16::ONE>(a.from(r, 0), 0, b, depth, c, pitch, lower);
            rows = 16;
        } else {
            rows = r1 - r;
            tile_product<NR, Rows16::FEW>(a.from(r, 0), rows, b, depth, c, pitch, lower);
        }
        int64_t x = 0;
        for (; x + STRIP <= rows; x += STRIP) {
            F32 acc[STRIP][NR];
            each<STRIP>([&](auto i) TILEFOLD_LAMBDA {
                each<NR>([&](auto v) TILEFOLD_LAMBDA { acc[i][v] = load(c + ((x + i) * NR + v) * 16); });
            });
            take(r + x, acc);
        }
        for (; x < rows; x++) {
            F32 acc[1][NR];
            each<NR>([&](auto v) TILEFOLD_LAMBDA { acc[0][v] = load(c + (x * NR + v) * 16); });
            take(r + x, acc);
        }
        r += rows;
    }
}

// C += A · B for rows r0 … r1, a multiple of 16, where B and C have `vectors` vectors to a row and each
// number of A has a lower half.
template <class K>
    requires(K::IN_TILES)
void add_product(Source<uint32_t> a, const uint32_t* b, int64_t depth, int64_t r0, int64_t r1,
                 int64_t vectors, float* c) {
    const int64_t pitch = vectors * 16;
    each_group(vectors, [&](auto nr) TILEFOLD_LAMBDA {
        constexpr int NR = nr;
        int64_t r = r0;
        for (; r + 32 <= r1; r += 32)
            tile_product<NR, Rows16::TWO, true>(a.from(r, 0), 0, b, depth, c + r * pitch, pitch, 0, pitch);
        if (r < r1)
            tile_product<NR, Rows16::ONE, true>(a.from(r, 0), 0, b, depth, c + r * pitch, pitch, 0, pitch);
        b += NR * 16;
        c += NR * 16;
    });
}

}  // namespace
}  // namespace tilefold
