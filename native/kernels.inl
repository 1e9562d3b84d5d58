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

template <class K, class T>
constexpr Kernels kernels_of() {
    using E = typename K::E;
    using P = Packing<K, T>;
    Kernels k{};
    k.lanes = LANES<E>;
    k.tile_rows = WIDEST * LANES<E>;
    k.most_rows = MOST_TILES * k.tile_rows;
    k.block_k = sizeof(E) == 8 ? 64 : K::PAIR == 2 && !K::IN_TILES ? 256 : 128;
    k.element = sizeof(E);
    k.key_bytes = P::always_keys ? sizeof(E) : 0;
    k.value_bytes = P::always_values ? sizeof(typename K::A) / K::PAIR : 0;
    k.multiple = P::multiple;
    k.scratch = scratch_of<K, T>;
    k.tile = fold_tiles<K, T>;
    k.few_rows = FEW_ROWS;
    // Twice as many: 4 heads of 2048 tokens take 4 to 10 % less in tiles of silicon (causal 12 to 17 %), and
    // one head of 4096 tokens up to 6 % more in vectors, for keys then come from afar more often.
    k.pieces_each = K::IN_TILES ? 16 : 8;
    // Tiles of silicon are so fast that it counts: 256 rows over 8192 keys of 128 dims take a fifth less in
    // one piece than in six.
    k.reading = K::IN_TILES ? 0.25 : 0;
    k.row = fold_row<K, T>;
#ifdef TILEFOLD_HAS_TILES
    if constexpr (!__is_same(T, double)) k.codes = fold_codes<T>;
#endif
    k.join = join_states<E, T>;
    k.tap = tap_weights<K, T>;
    k.tap_scratch = tap_scratch<K, T>;
    using Grad = typename ForGradients<K, K::IN_TILES>::Kernel;
    k.grad = replay_gradient<Grad, T>;
    k.grad_scratch = gradient_scratch<Grad, T>;
    return k;
}

#if defined(TILEFOLD_HAS_TILES)
using BFloatKernel = Amx;
#elif defined(TILEFOLD_HAS_DOT2)
using BFloatKernel = Dot;
#else
using BFloatKernel = Single;
#endif

constexpr Kernels table[] = {
    kernels_of<Single, Half>(),
    kernels_of<BFloatKernel, BFloat>(),
    kernels_of<Single, float>(),
    kernels_of<Double, double>(),
};

}  // namespace

namespace TILEFOLD_ISA {
const Kernels& kernels(DType storage) { return table[int(storage)]; }
}  // namespace TILEFOLD_ISA

}  // namespace tilefold
