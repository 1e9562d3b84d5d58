// The table of one machine: which kernel serves which storage type. Included last, once per unit.

namespace tilefold {
namespace {

// Gradients are computed in E whatever the storage, but by tiles, which are fast enough for halves.
template <class K, bool IN_TILES>
struct ForGradients {
    using Kernel = Single;
};
template <>
struct ForGradients<Double, false> {
    using Kernel = Double;
};
template <class K>
struct ForGradients<K, true> {
    using Kernel = K;
};

template <class T>
constexpr DType STORED_AS = __is_same(T, Half)     ? DType::float16
                            : __is_same(T, BFloat) ? DType::bfloat16
                            : __is_same(T, float)  ? DType::float32
                                                   : DType::float64;

template <class K, class T>
constexpr Kernels kernels_of() {
    using E = typename K::E;
    using P = Packing<K, T>;
    Kernels k{};
    k.lanes = LANES<E>;
    k.tile_rows = K::WIDE * LANES<E>;
    k.most_rows = MOST_TILES * k.tile_rows;
    k.block_k = sizeof(E) == 8 ? 64 : K::PAIR == 2 && !K::IN_TILES ? 256 : 128;
    k.element = sizeof(E);
    k.value_bytes = P::always_values ? int(sizeof(typename K::A)) / K::PAIR * K::PIECES : 0;
    k.key_bytes = P::always_keys ? k.value_bytes : 0;
    k.panels = K::PIECES > 1 ? int64_t(16) << 20 : INT64_MAX;
    k.multiple = P::multiple;
    k.packed_rows = P::rows;
    k.scratch = scratch_of<K, T>;
    k.tile = fold_tiles<K, T>;
    k.few_rows = FEW_ROWS;
    // Fewer do not pay for taking keys and values to pieces: 8 heads of 64 tokens take 3 % longer, of 32 half
    // as long again, of 128 a tenth less.
    k.steady_rows = K::PIECES > 1 ? 64 : 0;
    k.grad_rows = Single::WIDE * LANES<E>;
    // In vectors, one head of 4096 tokens takes up to 6 % more with twice as many, for keys then come from
    // afar more often. Tiles of silicon are faster with more: 4 heads of 2048 tokens take 4 to 10 % less
    // (causal 12 to 17 %). Numbers in pieces are packed, which a tall piece shares: 8 causal heads of 256
    // tokens take a fifth less with 4 than with 16.
    k.pieces_each = K::PIECES > 1 ? 4 : K::IN_TILES ? 16 : 8;
    // Tiles of silicon are so fast that it counts: 256 rows over 8192 keys of 128 dims take a fifth less in
    // one piece than in six.
    k.reading = K::IN_TILES ? 0.25 : 0;
    k.join = join_states<E, T>;
    k.tap = tap_weights<K, T>;
    k.tap_scratch = tap_scratch<K, T>;
    if constexpr (K::PIECES > 1) {
        k.grad = replay_gradient<Single, T, K>;
        k.grad_scratch = gradient_scratch<Single, T, K>;
    } else {
        k.row = fold_row<K, T>;
#ifdef TILEFOLD_HAS_TILES
        if constexpr (!__is_same(T, double)) k.codes = fold_codes<T>;
#endif
        using Grad = typename ForGradients<K, K::IN_TILES>::Kernel;
        k.grad = replay_gradient<Grad, T>;
        k.grad_scratch = gradient_scratch<Grad, T>;
    }
    return k;
}

#ifndef TILEFOLD_HAS_DOT2
constexpr Kernels table[] = {
    kernels_of<Single, Half>(),
    kernels_of<Single, BFloat>(),
    kernels_of<Single, float>(),
    kernels_of<Double, double>(),
};
#elif !defined(TILEFOLD_HAS_TILES)
constexpr Kernels in_pairs = kernels_of<Dot, BFloat>();
#else
constexpr Kernels in_tiles = kernels_of<Amx, BFloat>();

// Vectors serve few rows of the wider types, but for codes.
template <class T>
int64_t scratch_beside_codes(const Call& c, int64_t rows) {
    const int64_t bytes = avx512::kernels(STORED_AS<T>).scratch(c, rows);
    return is_integer(c.kv_type) ? most(bytes, scratch_of_codes<T>(c)) : bytes;
}
template <class T>
Kernels in_vectors() {
    Kernels k = avx512::kernels(STORED_AS<T>);
    k.codes = fold_codes<T>;
    k.scratch = scratch_beside_codes<T>;
    return k;
}
template <int P, class T>
const Kernels& in_pieces() {
    static const Kernels steady = in_vectors<T>();
    static const Kernels k = [] {
        Kernels k = kernels_of<Pieces<P>, T>();
        k.steady = &steady;
        return k;
    }();
    return k;
}
#endif

}  // namespace

// What a machine adds to one before it is all that is compiled again.
namespace TILEFOLD_ISA {
const Kernels& kernels(DType storage) {
#ifndef TILEFOLD_HAS_DOT2
    return table[int(storage)];
#elif !defined(TILEFOLD_HAS_TILES)
    return storage == DType::bfloat16 ? in_pairs : avx512::kernels(storage);
#else
    switch (storage) {
        case DType::float16:
            return in_pieces<2, Half>();
        case DType::bfloat16:
            return in_tiles;
        case DType::float32:
            return in_pieces<3, float>();
        default:
            return avx512::kernels(storage);
    }
#endif
}
}  // namespace TILEFOLD_ISA

}  // namespace tilefold
