// The door between Python and the core: check, convert, release the GIL, call. The only file that includes
// Python. Type stubs are made from the signatures and docstrings below, so both are written for readers of
// Python.

#include <fenv.h>
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "exchange.h"
#include "executor.h"
#include "peak.h"
#include "problem.h"
#include "sweep.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using Flags = nb::typed<nb::dict, nb::str, bool>;
using Values = nb::typed<nb::dict, nb::str, int>;
using Enums = nb::typed<nb::dict, nb::str, Values>;

static_assert(std::is_trivially_copyable_v<tilefold::Problem>);

const char* version() { return TILEFOLD_VERSION; }

Flags cpu_features() {
    nb::dict flags;
    for (const tilefold::Feature& feature : tilefold::features()) flags[feature.name] = feature.present;
    return flags;
}

const char* isa() { return tilefold::choose(std::getenv("TILEFOLD_ISA")).name; }

std::vector<std::pair<std::string, std::string>> problem_fields() {
#define ROW(type, name, annotation) {#name, annotation},
    return {TILEFOLD_PROBLEM(ROW)};
#undef ROW
}

Values values(std::initializer_list<std::pair<const char*, int>> rows) {
    nb::dict table;
    for (const auto& [name, value] : rows) table[name] = value;
    return table;
}

Enums problem_enums() {
    nb::dict enums;
#define ROW(name, value) {#name, tilefold::name},
    enums["Layout"] = values({TILEFOLD_LAYOUT(ROW)});
    enums["Has"] = values({TILEFOLD_HAS(ROW)});
    enums["Want"] = values({TILEFOLD_WANT(ROW)});
#undef ROW
    return enums;
}

using tilefold::Array;
using tilefold::DType;
using Input = nb::ndarray<nb::ro, nb::device::cpu>;
using Output = nb::ndarray<nb::device::cpu>;
using Integers = nb::ndarray<const int64_t, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const double, nb::c_contig, nb::device::cpu>;
using Sums = nb::ndarray<double, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<const uint8_t, nb::c_contig, nb::device::cpu>;

DType dtype(const std::string& name) {
    if (name == "float16") return DType::float16;
    if (name == "bfloat16") return DType::bfloat16;
    if (name == "float32") return DType::float32;
    if (name == "float64") return DType::float64;
    if (name == "int8") return DType::int8;
    if (name == "float8_e4m3fn") return DType::float8_e4m3fn;
    if (name == "int4") return DType::int4;
    throw std::invalid_argument("the native core has no type " + name);
}

// Python's bfloat16 crosses as uint16, the only such type that arrays of a call have.
template <class A>
Array array(const A& x) {
    const nb::dlpack::dtype t = x.dtype();
    const bool real = t.code == uint8_t(nb::dlpack::dtype_code::Float);
    const DType type = t.bits == 8            ? DType::uint8
                       : t.bits == 64         ? DType::float64
                       : t.bits == 32         ? DType::float32
                       : real && t.bits == 16 ? DType::float16
                                              : DType::bfloat16;
    // An empty array may have no memory, and must not be taken for one that was not given.
    static char nothing;
    char* data = static_cast<char*>(const_cast<void*>(static_cast<const void*>(x.data())));
    return {data ? data : &nothing, int(x.ndim()), x.shape_ptr(), x.stride_ptr(), type};
}
template <class A>
Array array(const std::optional<A>& x) {
    return x ? array(*x) : Array{};
}
template <class T, class A>
const T* data(const std::optional<A>& x) {
    return x ? x->data() : nullptr;
}

// What an array of Python's is, asked through nanobind; `held` keeps it there. False if it is none that can
// be read.
bool look(nb::handle x, Input& held, tilefold::dlpack::Tensor& t) {
    if (!nb::try_cast(x, held)) return false;
    const nb::dlpack::dtype type = held.dtype();
    t = {const_cast<void*>(held.data()),
         {tilefold::dlpack::CPU, 0},
         int32_t(held.ndim()),
         {type.code, type.bits, type.lanes},
         const_cast<int64_t*>(held.shape_ptr()),
         const_cast<int64_t*>(held.stride_ptr()),
         0};
    return true;
}

// What a call was given beside q, k, v and numbers, as Python hands it on: each None, or as the caller has
// it. Lengths, or with `packed` cumulative ones; of a cache the block table, its first keys (see
// layouts.Stored) and scales; `kind` tells types apart that cross as the same integers; numbers per head.
struct Given {
    bool packed;
    nb::handle q_ends, kv_ends, table, first, kept, k_scale, v_scale;
    int64_t kind;
    nb::handle alibi, sinks;

    explicit Given(const nb::tuple& x)
        : packed(item(x, 0).is(Py_True)),
          q_ends(item(x, 1)),
          kv_ends(item(x, 2)),
          table(item(x, 3)),
          first(item(x, 4)),
          kept(item(x, 5)),
          k_scale(item(x, 6)),
          v_scale(item(x, 7)),
          kind(nb::cast<int64_t>(item(x, 8))),
          alibi(item(x, 9)),
          sinks(item(x, 10)) {}
    static nb::handle item(const nb::tuple& x, int n) {
        PyObject* found = PyTuple_GetItem(x.ptr(), n);
        if (!found) throw nb::python_error();
        return found;
    }

    // Which of them there are.
    int64_t parts() const {
        int64_t bits = packed;
        for (nb::handle x : {q_ends, kv_ends, table, first, k_scale, v_scale, alibi, sinks})
            bits = bits << 1 | !x.is_none();
        return bits;
    }
};

// The same of a call that was understood before. The fact to know: what can change between two calls is
// copied first, and the copy is checked, as call.py does at the first one. Whatever is wrong ends in `false`;
// the sentence about it is Python's.
template <class Look>
class Checked {
   public:
    // `look(object, held, tensor)` describes an array, or says that it is none.
    Checked(const tilefold::Problem& problem, Look look) : p_(problem), look_(std::move(look)) {}

    // Everything into `a`, whose q and k are there.
    bool take(const Given& given, tilefold::Arrays& a) {
        if (given.packed ? !cumulative(given.q_ends, p_.q_len, q_ends_) ||
                               !cumulative(given.kv_ends, p_.kv_len, kv_ends_)
                         : !lengths(given.q_ends, a.q, p_.q_len, q_ends_) ||
                               !lengths(given.kv_ends, a.q, p_.kv_len, kv_ends_))
            return false;
        if (!given.q_ends.is_none()) a.q_ends = q_ends_.data();
        if (!given.kv_ends.is_none()) a.kv_ends = kv_ends_.data();
        if (p_.layout == tilefold::PAGED ? !pages(given.table, a) : !given.table.is_none()) return false;
        if (tilefold::is_code(p_.kv_dtype) &&
            !(scale(given.k_scale, a.k, 0, a.k_scale) && scale(given.v_scale, a.v, 1, a.v_scale)))
            return false;
        if (!per_head(given.alibi, a.q, false, alibi_) || !per_head(given.sinks, a.q, true, sinks_))
            return false;
        if (!given.alibi.is_none()) a.alibi = alibi_.data();
        if (!given.sinks.is_none()) a.sinks = sinks_.data();
        return given.first.is_none() || holds(given, a.q);
    }

    // Results are new and dense: what belongs to no sequence is written with the rest of them.
    void fill_padding(const tilefold::Arrays& a) const {
        if (p_.layout == tilefold::VARLEN ||
            std::ranges::all_of(q_ends_, [&](int64_t n) { return n == p_.q_len; }))
            return;
        const int64_t rows = p_.batch * p_.heads * p_.q_len;
        std::memset(a.out.data, 0, size_t(rows * p_.v_dim * tilefold::width(a.out.type)));
        if (a.lse && a.lse.type == DType::float64)
            std::fill_n(reinterpret_cast<double*>(a.lse.data), rows, -INFINITY);
        else if (a.lse)
            std::fill_n(reinterpret_cast<float*>(a.lse.data), rows, -INFINITY);
    }

   private:
    using Tensor = tilefold::dlpack::Tensor;

    static bool integer(nb::handle x, int64_t& own) {
        int overflow = 0;
        own = PyLong_AsLongLongAndOverflow(x.ptr(), &overflow);
        return !overflow;
    }
    bool look(nb::handle x, Input& held, Tensor& t) const {
        return look_(x, held, t) && t.device.type == tilefold::dlpack::CPU && t.dtype.lanes == 1;
    }

    // `use` of every number, in order, until it says false.
    template <class T, class Use>
    static bool each(const Tensor& t, Use&& use) {
        return each<T>(t, 0, static_cast<const char*>(t.data) + t.offset, use);
    }
    template <class T, class Use>
    static bool each(const Tensor& t, int axis, const char* at, Use& use) {
        if (axis == t.dims) {
            T x;
            std::memcpy(&x, at, sizeof x);
            return use(x);
        }
        for (int64_t n = 0; n < t.shape[axis]; ++n)
            if (!each<T>(t, axis + 1, at + n * t.strides[axis] * int64_t(sizeof(T)), use)) return false;
        return true;
    }

    // Integers of any width.
    bool integers(nb::handle x, Input& held, Tensor& t, std::vector<int64_t>& own) const {
        using namespace tilefold::dlpack;
        if (!look(x, held, t)) return false;
        own.clear();
        const auto keep = [&](auto n) { return own.push_back(int64_t(n)), std::in_range<int64_t>(n); };
        const int bits = t.dtype.bits;
        if (t.dtype.code == SIGNED)
            return bits == 64   ? each<int64_t>(t, keep)
                   : bits == 32 ? each<int32_t>(t, keep)
                   : bits == 16 ? each<int16_t>(t, keep)
                                : bits == 8 && each<int8_t>(t, keep);
        if (t.dtype.code == UNSIGNED)
            return bits == 64   ? each<uint64_t>(t, keep)
                   : bits == 32 ? each<uint32_t>(t, keep)
                   : bits == 16 ? each<uint16_t>(t, keep)
                                : bits == 8 && each<uint8_t>(t, keep);
        return false;
    }

    // Numbers of any floating type.
    bool floats(nb::handle x, Input& held, Tensor& t, std::vector<double>& own) const {
        using namespace tilefold::dlpack;
        if (!look(x, held, t)) return false;
        own.clear();
        const auto keep = [&](double n) { return own.push_back(n), true; };
        if (t.dtype.code == BFLOAT && t.dtype.bits == 16)
            return each<uint16_t>(t,
                                  [&](uint16_t n) { return keep(std::bit_cast<float>(uint32_t(n) << 16)); });
        if (t.dtype.code != FLOAT) return false;
        return t.dtype.bits == 64   ? each<double>(t, keep)
               : t.dtype.bits == 32 ? each<float>(t, keep)
               : t.dtype.bits == 16 ? each<uint16_t>(t, [&](uint16_t n) { return keep(half(n)); })
                                    : false;
    }
    static double half(uint16_t n) {
        const int exponent = n >> 10 & 31, part = n & 1023;
        const double size = exponent == 31 ? (part ? NAN : INFINITY)
                            : exponent     ? std::ldexp(1024 + part, exponent - 25)
                                           : std::ldexp(part, -24);
        return n >> 15 ? -size : size;
    }

    // One for each query head, of slopes also for each sequence; finite where scores are summed, but for
    // sinks of −inf.
    bool per_head(nb::handle x, const Array& q, bool sinks, std::vector<double>& own) const {
        if (x.is_none()) return true;
        Input held;
        Tensor t;
        if (!floats(x, held, t, own)) return false;
        const bool wide = p_.acc_dtype == DType::float64;
        for (double n : own) {
            const double sum = wide ? n : double(float(n));
            if (sinks ? std::isnan(sum) || sum == INFINITY : !std::isfinite(sum)) return false;
        }
        const size_t heads = size_t(p_.heads),
                     all = p_.layout == tilefold::VARLEN ? heads : size_t(p_.batch) * heads;
        if (t.dims == 1 && own.size() == heads) {
            own.resize(all);
            for (size_t n = heads; n < all; ++n) own[n] = own[n - heads];
            return true;
        }
        return !sinks && t.dims == q.dims - 2 && std::equal(t.shape, t.shape + t.dims, q.shape);
    }

    // One integer, or one for each of the leading dimensions of q.
    bool lengths(nb::handle x, const Array& q, int64_t most, std::vector<int64_t>& own) const {
        if (x.is_none()) return true;
        if (!spread(x, q, own)) return false;
        return std::ranges::all_of(own, [&](int64_t n) { return 0 <= n && n <= most; });
    }
    bool spread(nb::handle x, const Array& q, std::vector<int64_t>& own) const {
        if (PyLong_CheckExact(x.ptr())) {
            int64_t every;
            const bool fits = integer(x, every);
            own.assign(size_t(p_.batch), every);
            return fits;
        }
        Input held;
        Tensor t;
        if (!integers(x, held, t, own)) return false;
        if (t.dims == 0) own.assign(size_t(p_.batch), int64_t(own[0]));
        return t.dims == 0 || (t.dims == q.dims - 3 && std::equal(t.shape, t.shape + t.dims, q.shape));
    }

    bool cumulative(nb::handle x, int64_t total, std::vector<int64_t>& own) const {
        Input held;
        Tensor t;
        return integers(x, held, t, own) && t.dims == 1 && t.dtype.code == tilefold::dlpack::SIGNED &&
               t.dtype.bits >= 32 && int64_t(own.size()) == p_.batch + 1 && own.front() == 0 &&
               own.back() == total && std::ranges::is_sorted(own);
    }

    // Codes without a table: each sequence is one page.
    bool pages(nb::handle x, tilefold::Arrays& a) {
        const int64_t count = a.k.shape[0];
        Input held;
        Tensor t;
        if (x.is_none()) {
            table_.resize(size_t(p_.batch));
            std::iota(table_.begin(), table_.end(), int64_t(0));
            a.table_width = 1;
        } else {
            if (!integers(x, held, t, table_) || t.dims != 2 || t.shape[0] != p_.batch) return false;
            a.table_width = t.shape[1];
        }
        a.table = table_.data();
        return a.table_width * a.k.shape[2] == p_.kv_len &&
               std::ranges::all_of(table_, [&](int64_t page) { return -1 <= page && page < count; });
    }

    // One number for a page and head, for each of their rows, or for groups of dims: always as the last.
    bool scale(nb::handle x, const Array& codes, int n, Array& scale) {
        Tensor t;
        if (!look(x, held_[n], t) || t.dtype.code != tilefold::dlpack::FLOAT || t.dtype.bits != 32 ||
            t.dims < 2 || t.dims > 4)
            return false;
        int64_t *shape = shapes_[n], *strides = shape + 4;
        for (int axis = 0; axis < 4; ++axis) {
            shape[axis] = axis < t.dims ? t.shape[axis] : axis == 2 ? codes.shape[2] : 1;
            strides[axis] = axis < t.dims ? t.strides[axis] : 0;
        }
        char* data = static_cast<char*>(t.data) + t.offset;
        scale = {data, 4, shape, strides, DType::float32};
        return reinterpret_cast<uintptr_t>(data) % sizeof(float) == 0 &&
               std::equal(shape, shape + 3, codes.shape);
    }

    // Whether no query sees a key that a cache forgot.
    bool holds(const Given& given, const Array& q) {
        int64_t kept;
        if (given.kv_ends.is_none() || !PyLong_CheckExact(given.kept.ptr()) || !integer(given.kept, kept) ||
            !spread(given.first, q, first_))
            return false;
        for (size_t n = 0; n < kv_ends_.size(); ++n) {
            const int64_t q_len = q_ends_.empty() ? p_.q_len : q_ends_[n], begins = kv_ends_[n] - q_len;
            const int64_t lo = std::max(kept, begins - p_.band.left);
            const int64_t hi = std::min({first_[n], kv_ends_[n], begins + q_len + p_.band.right});
            if (q_len && lo < hi) return false;
        }
        return true;
    }

    const tilefold::Problem& p_;
    const Look look_;
    std::vector<int64_t> q_ends_, kv_ends_, table_, first_;
    std::vector<double> alibi_, sinks_;
    Input held_[2];
    int64_t shapes_[2][8];
};

double peak(const std::string& what, int threads, double seconds, size_t bytes) {
    if (threads < 1 || threads > tilefold::MAX_THREADS)
        throw std::invalid_argument("threads must be 1 to 4096, got " + std::to_string(threads));
    if (what == "f32") return tilefold::f32_peak(threads, seconds);
    if (what == "f64") return tilefold::f64_peak(threads, seconds);
    if (what == "bf16_dot") return tilefold::bf16_dot_peak(threads, seconds);
    if (what == "amx") return tilefold::amx_peak(threads, seconds);
    if (what == "read") return tilefold::read_peak(threads, seconds, bytes);
    throw std::invalid_argument("what must be f32, f64, bf16_dot, amx or read, got " + what);
}

// Signals are the main thread's; any other must not ask Python, which may be on its way out.
bool is_main_thread() {
#if defined(__linux__)
    return getpid() == gettid();
#else
    return true;
#endif
}

// Python's own code runs in the arithmetic that the caller had, not in that of a fold.
bool interrupted(void* callers) {
    fenv_t folds;
    fegetenv(&folds);
    fesetenv(static_cast<const fenv_t*>(callers));
    bool stop;
    {
        nb::gil_scoped_acquire gil;
        stop = PyErr_CheckSignals() != 0;
    }
    fesetenv(&folds);
    return stop;
}

// What a fold is to tell of each row: arrays of the shape of lse, a list after it, a region before it.
class RowArrays {
   public:
    RowArrays(std::optional<Output> entropy, std::optional<Output> peak, std::optional<Output> distance,
              std::optional<Output> mass, std::optional<Output> top_scores, std::optional<Output> top_keys,
              int64_t top, std::optional<Integers> lo, std::optional<Integers> hi)
        : entropy_(entropy),
          peak_(peak),
          distance_(distance),
          mass_(mass),
          top_scores_(top_scores),
          top_keys_(top_keys),
          top_(top),
          lo_(lo),
          hi_(hi) {
        const int64_t list = tilefold::up(top, tilefold::LIST_STEP);
        if (top_scores_.has_value() != (top > 0) || top_keys_.has_value() != (top > 0) ||
            (top && (int64_t(top_scores_->shape(top_scores_->ndim() - 1)) != list ||
                     int64_t(top_keys_->shape(top_keys_->ndim() - 1)) != list)) ||
            lo_.has_value() != hi_.has_value() || mass_.has_value() != lo_.has_value() ||
            (lo_ && int64_t(lo_->shape(0)) > tilefold::MOST_REGIONS))
            throw std::invalid_argument("lists need keys, and at most 8 regions their spans");
    }

    void put(tilefold::Arrays& arrays, tilefold::Selection& part) const {
        auto& to = arrays.rows;
        to.entropy = at(entropy_), to.peak = at(peak_), to.distance = at(distance_), to.mass = at(mass_);
        to.top_scores = at(top_scores_), to.top_keys = at(top_keys_), to.top = top_;
        if (!mass_) return;
        to.mass_step = mass_->shape(0) ? int64_t(mass_->size() / mass_->shape(0)) : 0;
        part.regions = int64_t(lo_->shape(0)), part.region_rows = int64_t(lo_->shape(1));
        part.region_spans = int64_t(lo_->shape(2)), part.region_lo = lo_->data(),
        part.region_hi = hi_->data();
    }

   private:
    static void* at(const std::optional<Output>& x) { return x ? x->data() : nullptr; }
    std::optional<Output> entropy_, peak_, distance_, mass_, top_scores_, top_keys_;
    int64_t top_;
    std::optional<Integers> lo_, hi_;
};

// What sweep two is to pool.
class PoolArrays {
   public:
    void add_keys(Sums to, std::optional<Floats> factors, bool highest) {
        room(pools_.keys.size());
        pools_.keys.push_back({factors ? factors->data() : nullptr, to.data(), highest});
    }
    void add_map(Sums to, Integers ends, bool highest) {
        room(pools_.maps.size());
        const size_t n = to.ndim();
        pools_.maps.push_back(
            {ends.data(), int64_t(to.shape(n - 2)), int64_t(to.shape(n - 1)), to.data(), highest});
        if (int64_t(ends.shape(ends.ndim() - 1)) != pools_.maps.back().rows + pools_.maps.back().cols + 2)
            throw std::invalid_argument("a map of r rows and c cols has r + c + 2 ends");
    }
    void add_cells(Output to, Integers slots, int64_t k0) {
        room(pools_.cells.size());
        const size_t n = to.ndim();
        pools_.cells.push_back(
            {slots.data(), int64_t(to.shape(n - 2)), k0, k0 + int64_t(to.shape(n - 1)), to.data()});
    }
    const tilefold::Pools& pools() const { return pools_; }

   private:
    static void room(size_t n) {
        if (n >= tilefold::MOST_POOLS) throw std::invalid_argument("at most 8 pools of a kind");
    }
    tilefold::Pools pools_;
};

// A problem and how it is folded: made once per plan, run for every call.
class Fold {
   public:
    Fold(int64_t batch, int64_t heads, int64_t kv_heads, int64_t q_len, int64_t kv_len, int64_t dim,
         int64_t v_dim, const std::string& q_dtype, const std::string& kv_dtype, const std::string& acc_dtype,
         double scale, std::optional<double> softcap, double dropout,
         std::tuple<std::optional<int64_t>, std::optional<int64_t>, std::optional<int64_t>> band, int layout,
         int has, int want)
        : problem_{batch,
                   heads,
                   kv_heads,
                   q_len,
                   kv_len,
                   dim,
                   v_dim,
                   dtype(q_dtype),
                   dtype(kv_dtype),
                   dtype(acc_dtype),
                   scale,
                   softcap.value_or(tilefold::NO_SOFTCAP),
                   dropout,
                   {std::get<0>(band).value_or(tilefold::UNLIMITED),
                    std::get<1>(band).value_or(tilefold::UNLIMITED),
                    std::get<2>(band).value_or(tilefold::PER_SEQUENCE)},
                   tilefold::Layout(layout),
                   tilefold::Has(has),
                   tilefold::Want(want)},
          machine_(tilefold::choose(std::getenv("TILEFOLD_ISA"))),
          kernels_(machine_.kernels(problem_.q_dtype)),
          settings_(choose(1)) {}

    // (query rows of a tile, keys of a block, splits, workers, bytes)
    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> plan(int threads) {
        settings_ = choose(threads);
        return settings();
    }

    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> resize(int64_t tile_rows, int64_t block_k,
                                                                   int64_t splits, int64_t workers) {
        settings_ = {tile_rows, block_k, splits, workers};
        settings_ = backward() ? choose(int(workers)) : tilefold::resized(problem_, kernels_, settings_);
        return settings();
    }

    std::pair<int64_t, bool> run(Input q, Input k, Input v, Output out, std::optional<Output> lse,
                                 std::optional<Input> bias, std::optional<Input> cells,
                                 std::optional<Floats> alibi, std::optional<Floats> sinks,
                                 std::optional<Integers> q_ends, std::optional<Integers> kv_ends,
                                 std::optional<Integers> table, std::optional<Input> k_scale,
                                 std::optional<Input> v_scale, int64_t first_row, int64_t last_row,
                                 int64_t frame, int64_t head, std::optional<Integers> lo,
                                 std::optional<Integers> hi, std::optional<Bytes> bits, int64_t bits_start,
                                 int team, const RowArrays* rows) const {
        tilefold::Arrays arrays =
            inputs(q, k, v, array(out), array(lse), bias, cells, alibi, sinks, q_ends, kv_ends);
        if (table) arrays.table = table->data(), arrays.table_width = int64_t(table->shape(1));
        arrays.k_scale = array(k_scale), arrays.v_scale = array(v_scale);
        if (tilefold::is_code(problem_.kv_dtype) != bool(k_scale && v_scale))
            throw std::invalid_argument("keys and values have scales where they are codes, and only there");
        tilefold::Selection part = selection(first_row, last_row, frame, head, lo, hi, bits, bits_start);
        if (rows) rows->put(arrays, part);
        const tilefold::Report report = fold(arrays, part, team);
        return {report.bytes, report.infinite};
    }

    int64_t gradient(Input q, Input k, Input v, Input out, Input lse, std::optional<Input> bias,
                     std::optional<Input> cells, std::optional<Floats> alibi, std::optional<Floats> sinks,
                     std::optional<Integers> q_ends, std::optional<Integers> kv_ends, Input dout,
                     std::optional<Input> dlse, Output dq, Output dk, Output dv, std::optional<Output> dbias,
                     std::optional<Sums> dsinks, bool add, int64_t first_row, int64_t last_row, int64_t frame,
                     int64_t head, std::optional<Integers> lo, std::optional<Integers> hi,
                     std::optional<Bytes> bits, int64_t bits_start, int team) const {
        const tilefold::Arrays arrays =
            inputs(q, k, v, array(out), array(lse), bias, cells, alibi, sinks, q_ends, kv_ends);
        const tilefold::Gradients gradients{array(dout),
                                            array(dlse),
                                            array(dq),
                                            array(dk),
                                            array(dv),
                                            array(dbias),
                                            dsinks ? dsinks->data() : nullptr,
                                            add};
        return differentiate(arrays, gradients,
                             selection(first_row, last_row, frame, head, lo, hi, bits, bits_start), team)
            .bytes;
    }

    int64_t tap(Input q, Input k, Input lse, std::optional<Input> bias, std::optional<Input> cells,
                std::optional<Floats> alibi, std::optional<Integers> q_ends, std::optional<Integers> kv_ends,
                std::optional<Integers> table, std::optional<Input> k_scale, int64_t first_row,
                int64_t last_row, int64_t frame, int64_t head, std::optional<Integers> lo,
                std::optional<Integers> hi, std::optional<Bytes> bits, int64_t bits_start, int team,
                const PoolArrays& pools) const {
        tilefold::Arrays arrays = inputs(q, k, k, {}, array(lse), bias, cells, alibi, {}, q_ends, kv_ends);
        if (table) arrays.table = table->data(), arrays.table_width = int64_t(table->shape(1));
        arrays.k_scale = arrays.v_scale = array(k_scale);
        const tilefold::Selection part =
            selection(first_row, last_row, frame, head, lo, hi, bits, bits_start);
        return guarded([&](tilefold::Stop& stop) {
                   return tilefold::tap(problem_, kernels_, settings_, arrays, pools.pools(), part,
                                        tilefold::Team(team), stop);
               })
            .bytes;
    }

    // The whole of a call that was understood before; −1 where it must be looked at in full, as an address is
    // no multiple of its item size, or something is wrong with what else was given.
    int64_t run_known(Input q, Input k, Input v, Output out, std::optional<Output> lse, int team,
                      std::optional<nb::tuple> given) const {
        tilefold::Arrays arrays{array(q), array(k), array(v), array(out), array(lse), {}, {}};
        for (const Array* x : {&arrays.q, &arrays.k, &arrays.v})
            if (reinterpret_cast<uintptr_t>(x->data) % size_t(tilefold::width(x->type))) return -1;
        if (!given) return fold(arrays, everything(), team).bytes;
        Checked checked(problem_, [](nb::handle x, Input& held, tilefold::dlpack::Tensor& t) {
            return look(x, held, t);
        });
        if (!checked.take(Given(*given), arrays)) return -1;
        checked.fill_padding(arrays);
        return fold(arrays, everything(), team).bytes;
    }

    tilefold::Selection everything() const {
        tilefold::Selection part{};
        part.last_row = problem_.q_len;
        return part;
    }

    tilefold::Report fold(const tilefold::Arrays& arrays, const tilefold::Selection& part, int team) const {
        return guarded([&](tilefold::Stop& stop) {
            return tilefold::fold(problem_, kernels_, settings_, arrays, part, tilefold::Team(team), stop);
        });
    }

    tilefold::Report differentiate(const tilefold::Arrays& arrays, const tilefold::Gradients& gradients,
                                   const tilefold::Selection& part, int team) const {
        return guarded([&](tilefold::Stop& stop) {
            return tilefold::gradient(problem_, kernels_, settings_, arrays, gradients, part,
                                      tilefold::Team(team), stop);
        });
    }

    const char* isa() const { return machine_.name; }
    bool steady() const { return tilefold::is_steady(problem_, kernels_); }
    const tilefold::Problem& problem() const { return problem_; }

   private:
    bool backward() const { return problem_.want & tilefold::GRAD; }
    tilefold::Settings choose(int threads) const {
        return backward() ? tilefold::grad_plan(problem_, kernels_, threads)
                          : tilefold::plan(problem_, kernels_, threads);
    }
    int64_t workspace() const {
        return backward() ? tilefold::grad_workspace(problem_, kernels_, settings_)
                          : tilefold::workspace(problem_, kernels_, settings_);
    }

    static tilefold::Arrays inputs(const Input& q, const Input& k, const Input& v, const Array& out,
                                   const Array& lse, const std::optional<Input>& bias,
                                   const std::optional<Input>& cells, const std::optional<Floats>& alibi,
                                   const std::optional<Floats>& sinks, const std::optional<Integers>& q_ends,
                                   const std::optional<Integers>& kv_ends) {
        return {array(q),
                array(k),
                array(v),
                out,
                lse,
                array(bias),
                array(cells),
                data<double>(alibi),
                data<double>(sinks),
                data<int64_t>(q_ends),
                data<int64_t>(kv_ends)};
    }

    static tilefold::Selection selection(int64_t first_row, int64_t last_row, int64_t frame, int64_t head,
                                         const std::optional<Integers>& lo, const std::optional<Integers>& hi,
                                         const std::optional<Bytes>& bits, int64_t bits_start) {
        tilefold::Selection part{};
        part.frame = frame, part.head = head, part.first_row = first_row, part.last_row = last_row;
        if (lo) part.spans = int64_t(lo->shape(1)), part.lo = lo->data(), part.hi = hi->data();
        if (bits)
            part.bits = bits->data(), part.bits_bytes = int64_t(bits->shape(1)), part.bits_start = bits_start;
        return part;
    }

    // A sweep without the GIL; what went wrong in it becomes Python's.
    template <class Sweep>
    tilefold::Report guarded(Sweep&& sweep) const {
        fenv_t callers;
        fegetenv(&callers);
        tilefold::Stop stop({is_main_thread() ? interrupted : nullptr, &callers});
        tilefold::Report report{};
        try {
            nb::gil_scoped_release unlocked;
            report = sweep(stop);
        } catch (const std::bad_alloc&) {
            PyErr_Format(PyExc_MemoryError, "unable to allocate %lld bytes of workspace",
                         static_cast<long long>(workspace()));
        }
        if (PyErr_Occurred()) throw nb::python_error();
        return report;
    }

    std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t> settings() const {
        return {settings_.tile_rows, settings_.block_k, settings_.splits, settings_.workers, workspace()};
    }

    tilefold::Problem problem_;
    const tilefold::Machine& machine_;
    const tilefold::Kernels& kernels_;
    tilefold::Settings settings_;
};

// Repeated calls on a framework's tensors: what was understood once is not asked again (shortcut.py does this
// for NumPy). A call is known by the types, shapes and strides of its tensors and a few numbers; then a
// look-up, the results' memory from the framework, and the sweep are all that is left of it.
class Tensors {
   public:
    // `kind` is the tensor type, `parameter` another that adds nothing to it, `array` is NumPy's;
    // empty_strided(shape, strides, dtype=, device=) makes a tensor, and `device` is the CPU.
    Tensors(nb::handle kind, nb::handle parameter, nb::handle array, nb::object empty_strided,
            nb::object device)
        : kind_(kind.ptr()),
          parameter_(parameter.ptr()),
          array_(array.ptr()),
          empty_strided_(std::move(empty_strided)),
          device_(std::move(device)) {
        nb::object capsule = nb::getattr(kind, tilefold::dlpack::ExchangeApi::ATTRIBUTE);
        api_ = static_cast<const tilefold::dlpack::ExchangeApi*>(
            PyCapsule_GetPointer(capsule.ptr(), tilefold::dlpack::ExchangeApi::CAPSULE));
        if (!api_) throw nb::python_error();
        if (api_->version.major != tilefold::dlpack::ExchangeApi::MAJOR)
            throw std::invalid_argument("the tensors speak another version of DLPack's exchange API");
        names_ = nb::make_tuple("dtype", "device");
    }

    // Each gives the results of a call that is known, or None. With `given`, k and v may be arrays of
    // Python's.
    nb::object fold(nb::handle q, nb::handle k, nb::handle v, int facts, std::optional<double> scale,
                    std::optional<double> softcap, int64_t left, int64_t right,
                    std::optional<nb::tuple> given, int team) {
        Key key(facts, scale, softcap, left, right);
        std::shared_ptr<const Known> known;
        const std::optional<Given> there = given ? std::optional<Given>(*given) : std::nullopt;
        if (!take(key, {q, k, v}) || !take(key, there) || !(known = find(key))) return nb::none();
        tilefold::Arrays arrays{key.arrays[0], key.arrays[1], key.arrays[2], {}, {}, {}, {}};
        Checked checked(known->fold->problem(),
                        [this](nb::handle x, Input& held, tilefold::dlpack::Tensor& t) {
                            return look(x.ptr(), held, t);
                        });
        if (there && !checked.take(*there, arrays)) return nb::none();
        nb::object results[MOST_RESULTS];
        Array made[MOST_RESULTS];
        allocate(*known, results, made);
        arrays.out = made[0], arrays.lse = made[1];
        if (there) checked.fill_padding(arrays);
        known->fold->fold(arrays, known->fold->everything(), team);
        if (known->results.size() == 1) return std::move(results[0]);
        return nb::make_tuple(std::move(results[0]), std::move(results[1]));
    }

    nb::object gradient(nb::handle q, nb::handle k, nb::handle v, nb::handle out, nb::handle lse,
                        nb::handle dout, int facts, std::optional<double> scale,
                        std::optional<double> softcap, int team) {
        Key key(facts, scale, softcap, -1, -1);
        std::shared_ptr<const Known> known;
        if (!take(key, {q, k, v, out, lse, dout}) || !(known = find(key))) return nb::none();
        nb::object results[MOST_RESULTS];
        Array made[MOST_RESULTS];
        allocate(*known, results, made);
        const tilefold::Arrays arrays{
            key.arrays[0], key.arrays[1], key.arrays[2], key.arrays[3], key.arrays[4], {}, {}};
        const tilefold::Gradients gradients{key.arrays[5], {}, made[0], made[1], made[2], {}};
        known->fold->differentiate(arrays, gradients, known->fold->everything(), team);
        return nb::make_tuple(std::move(results[0]), std::move(results[1]), std::move(results[2]));
    }

    // What the next call of this kind needs: how it runs, and (shape, strides, dtype) of each result.
    void remember(const std::vector<nb::object>& tensors, int facts, std::optional<double> scale,
                  std::optional<double> softcap, int64_t left, int64_t right, std::optional<nb::tuple> given,
                  nb::object fold, const std::vector<nb::tuple>& results) {
        Key key(facts, scale, softcap, left, right);
        if (results.size() > MOST_RESULTS) throw std::invalid_argument("a call has at most three results");
        if (!take(key, tensors) || !take(key, given ? std::optional<Given>(*given) : std::nullopt)) return;
        auto known = std::make_shared<const Known>(Known{fold, nb::cast<const Fold*>(fold), results});
        nb::ft_lock_guard lock(mutex_);
        if (known_.size() >= MOST_KNOWN) known_.clear();
        known_.insert_or_assign(std::string(key.text()), std::move(known));
    }

    size_t size() const { return known_.size(); }

   private:
    static constexpr size_t MOST_KNOWN = 1024, MOST_RESULTS = 3, MOST_TENSORS = 6, MOST_DIMS = 8;

    struct Known {
        nb::object holder;  // keeps the Fold alive
        const Fold* fold;
        std::vector<nb::tuple> results;
    };

    // What tells a call from others, number by number, and its tensors, whose shape and strides lie there.
    struct Key {
        int64_t numbers[10 + MOST_TENSORS * (2 + 2 * MOST_DIMS)];
        size_t length = 0;
        Array arrays[MOST_TENSORS];
        Input held[MOST_TENSORS];

        // `left` and `right` of a window, −1 for none.
        Key(int facts, std::optional<double> scale, std::optional<double> softcap, int64_t left,
            int64_t right) {
            add(facts);
            add(scale ? std::bit_cast<int64_t>(*scale)
                      : -1);  // −1 is the pattern of a NaN, which no scale is
            add(softcap ? std::bit_cast<int64_t>(*softcap) : -1);
            add(left), add(right);
        }
        void add(int64_t x) { numbers[length++] = x; }
        std::string_view text() const {
            return {reinterpret_cast<const char*>(numbers), length * sizeof(int64_t)};
        }
    };

    struct Hash {
        using is_transparent = void;
        size_t operator()(std::string_view text) const { return std::hash<std::string_view>()(text); }
    };

    // The tensors into the key; false where one must be looked at in full.
    template <class Handles>
    bool take(Key& key, const Handles& tensors) const {
        size_t n = 0;
        for (const auto& tensor : tensors)
            if (n == MOST_TENSORS || !take(key, tensor.ptr(), n++)) return false;
        return true;
    }
    // What of `given` a call is understood by; all else may be another each time.
    bool take(Key& key, const std::optional<Given>& given) const {
        if (!given) return true;
        key.add(given->parts()), key.add(given->kind);
        const nb::handle none = Py_None;
        for (nb::handle x :
             {given->table, given->packed ? given->q_ends : none, given->packed ? given->kv_ends : none}) {
            Input held;
            tilefold::dlpack::Tensor t;
            if (x.is_none()) continue;
            if (!look(x.ptr(), held, t) || t.dims < 1) return false;
            key.add(t.shape[t.dims - 1]);
        }
        size_t n = MOST_TENSORS;
        for (nb::handle x : {given->k_scale, given->v_scale})
            if (!x.is_none() && !take(key, x.ptr(), --n)) return false;
        return true;
    }
    bool take(Key& key, std::initializer_list<nb::handle> tensors) const {
        return take<std::initializer_list<nb::handle>>(key, tensors);
    }
    bool take(Key& key, PyObject* tensor, size_t n) const {
        tilefold::dlpack::Tensor t;
        Array& array = key.arrays[n];
        if (!look(tensor, key.held[n], t) || t.dims > int(MOST_DIMS)) return false;
        const int64_t* sizes = key.numbers + key.length + 1;
        if (!describe(t, sizes, array)) return false;
        key.add(t.dims << 16 | t.dtype.code << 8 | int(array.type));
        for (int i = 0; i < t.dims; ++i) key.add(t.shape[i]);
        for (int i = 0; i < t.dims; ++i) key.add(t.strides[i]);
        return true;
    }
    bool look(PyObject* x, Input& held, tilefold::dlpack::Tensor& t) const {
        if (reinterpret_cast<const PyObject*>(Py_TYPE(x)) == array_) return ::look(x, held, t);
        return look(x, t);
    }
    bool look(PyObject* tensor, tilefold::dlpack::Tensor& t) const {
        const PyObject* type = reinterpret_cast<const PyObject*>(Py_TYPE(tensor));
        if (type != kind_ && type != parameter_) return false;
        if (api_->look(tensor, &t) == 0) return true;
        PyErr_Clear();  // it is on no device that DLPack knows, or lies in no strides
        return false;
    }
    static bool describe(const tilefold::dlpack::Tensor& t, const int64_t* sizes, Array& array) {
        using namespace tilefold::dlpack;
        if (t.device.type != CPU || !type_of(t, array.type)) return false;
        static char nothing;  // an empty tensor may have no memory
        char* data = t.data ? static_cast<char*>(t.data) + t.offset : &nothing;
        if (t.data && reinterpret_cast<uintptr_t>(data) % (t.dtype.bits / 8)) return false;
        array = {data, t.dims, sizes, sizes + t.dims, array.type};
        return true;
    }
    // Codes and Python's bfloat16 come as integers, and a call that is known is told apart by the code too.
    static bool type_of(const tilefold::dlpack::Tensor& t, DType& type) {
        using namespace tilefold::dlpack;
        const bool real = t.dtype.code == FLOAT, half = t.dtype.code == BFLOAT || t.dtype.code == UNSIGNED;
        type = t.dtype.bits == 8            ? DType::uint8
               : t.dtype.bits == 16 && half ? DType::bfloat16
               : t.dtype.bits == 16         ? DType::float16
               : t.dtype.bits == 32         ? DType::float32
                                            : DType::float64;
        return t.dtype.lanes == 1 && t.dtype.bits <= 64 &&
               (real || t.dtype.bits == 8 || (t.dtype.bits == 16 && half));
    }

    std::shared_ptr<const Known> find(const Key& key) {
        nb::ft_lock_guard lock(mutex_);
        const auto found = known_.find(key.text());
        return found == known_.end() ? nullptr : found->second;
    }

    // The results' tensors; each description outlives the call, as `made` points into its tensor.
    void allocate(const Known& known, nb::object* results, Array* made) const {
        for (size_t n = 0; n < known.results.size(); ++n) {
            const nb::tuple& result = known.results[n];
            PyObject* arguments[] = {result[0].ptr(), result[1].ptr(), result[2].ptr(), device_.ptr()};
            results[n] = nb::steal(PyObject_Vectorcall(empty_strided_.ptr(), arguments, 2, names_.ptr()));
            if (!results[n].is_valid()) throw nb::python_error();
            tilefold::dlpack::Tensor t;
            if (!look(results[n].ptr(), t) || !describe(t, t.shape, made[n]))
                throw std::runtime_error("a new tensor cannot be written to");
            made[n].strides = t.strides;
        }
    }

    const PyObject *kind_, *parameter_, *array_;
    nb::object empty_strided_, device_, names_;
    const tilefold::dlpack::ExchangeApi* api_;
    std::unordered_map<std::string, std::shared_ptr<const Known>, Hash, std::equal_to<>> known_;
    nb::ft_mutex mutex_;
};

// nanobind shares the types of one domain among modules. Each copy of this one that a process loads is a
// domain of its own, or a second copy would be handed the first one's types.
const char* own_domain() {
    static const std::string name = "tilefold " + std::to_string(reinterpret_cast<uintptr_t>(&own_domain));
    return name.c_str();
}
#undef NB_DOMAIN_STR
#define NB_DOMAIN_STR own_domain()

}  // namespace

NB_MODULE(_core, m) {
    // nanobind lets go of arrays under the main interpreter's lock: in another one a call would never return.
    if (PyInterpreterState_GetID(PyInterpreterState_Get()) != 0)
        throw std::runtime_error("it runs in the main interpreter only, and this is a subinterpreter");
    m.doc() = "The native core of tilefold.";
    nb::set_leak_warnings(false);  // a daemon thread in a call keeps its plan to the end of the process
    m.def("version", &version, "The version of tilefold that this core was built for.");
    m.def("cpu_features", &cpu_features,
          "The features that choose a machine, and whether this CPU and its operating system offer them.");
    m.def("isa", &isa,
          "The machine that runs here: the best one that the CPU supports, or the one that TILEFOLD_ISA "
          "names.\n\n"
          "ValueError where TILEFOLD_ISA names no machine, or one that this CPU does not support.");
    m.def("problem_fields", &problem_fields,
          "Name and Python annotation of each field of the native Problem, in order.");
    m.def("problem_enums", &problem_enums,
          "Name and value of each member of the native enumerations Layout, Has and Want.");
    m.def("threads", &tilefold::threads, "otherwise"_a = 0,
          "How many threads a call may use: what set_threads said, else `otherwise` if positive, else "
          "TILEFOLD_NUM_THREADS, OMP_NUM_THREADS or the processors of this process.");
    m.def("set_threads", &tilefold::set_threads, "count"_a, "Say it for the whole process; 0 takes it back.");
    m.def("openmp_path", &tilefold::openmp_path, "The OpenMP library that can be borrowed, or None.");
    m.def("peak", &peak, "what"_a, "threads"_a, "seconds"_a = 0.02, "bytes"_a = size_t(256) << 20,
          nb::call_guard<nb::gil_scoped_release>(),
          "Measure what this machine can do at best: operations per second of f32, f64, bf16_dot or amx, or "
          "bytes per "
          "second of read; 0 where it has no such thing.");
    nb::class_<RowArrays>(m, "Rows", "What a fold tells of each query row.")
        .def(nb::init<std::optional<Output>, std::optional<Output>, std::optional<Output>,
                      std::optional<Output>, std::optional<Output>, std::optional<Output>, int64_t,
                      std::optional<Integers>, std::optional<Integers>>(),
             "entropy"_a.none(), "peak"_a.none(), "distance"_a.none(), "mass"_a.none(), "top_scores"_a.none(),
             "top_keys"_a.none(), "top"_a, "lo"_a.none(), "hi"_a.none());
    nb::class_<PoolArrays>(m, "Pools", "What sweep two pools over query rows; the arrays must outlive it.")
        .def(nb::init<>())
        .def("add_keys", &PoolArrays::add_keys, "to"_a, "factors"_a.none(), "highest"_a,
             "Per key, (items, heads, kv_len).")
        .def("add_map", &PoolArrays::add_map, "to"_a, "ends"_a, "highest"_a,
             "Bins (sequences, heads, rows, cols), and where they end in each sequence.")
        .def("add_cells", &PoolArrays::add_cells, "to"_a, "slots"_a, "k0"_a,
             "Weights (items, heads, slots, keys) from key k0 on.");
    nb::class_<Fold>(m, "Fold", "A problem and how it is folded.")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, const std::string&,
                      const std::string&, const std::string&, double, std::optional<double>, double,
                      std::tuple<std::optional<int64_t>, std::optional<int64_t>, std::optional<int64_t>>, int,
                      int, int>(),
             "batch"_a, "heads"_a, "kv_heads"_a, "q_len"_a, "kv_len"_a, "dim"_a, "v_dim"_a, "q_dtype"_a,
             "kv_dtype"_a, "acc_dtype"_a, "scale"_a, "softcap"_a.none(), "dropout"_a, "band"_a, "layout"_a,
             "has"_a, "want"_a)
        .def_prop_ro("isa", &Fold::isa, "The machine whose kernels run.")
        .def_prop_ro("steady", &Fold::steady, "Whether rows have the bits that each has alone.")
        .def("plan", &Fold::plan, "threads"_a,
             "Choose: (query rows of a tile, keys of a block, splits, workers, bytes of workspace).")
        .def("resize", &Fold::resize, "tile_rows"_a, "block_k"_a, "splits"_a, "workers"_a,
             "Use the nearest settings that the kernels can do; the same tuple.")
        .def("run", &Fold::run, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a.none(), "bias"_a.none(),
             "cells"_a.none(), "alibi"_a.none(), "sinks"_a.none(), "q_ends"_a.none(), "kv_ends"_a.none(),
             "table"_a.none(), "k_scale"_a.none(), "v_scale"_a.none(), "first_row"_a, "last_row"_a, "frame"_a,
             "head"_a, "lo"_a.none(), "hi"_a.none(), "bits"_a.none(), "bits_start"_a, "team"_a,
             "rows"_a.none() = nb::none(),
             "Fill out and lse, and what is to be told of rows; the bytes of workspace it took, and whether "
             "the highest score of a row was "
             "+inf. Arrays of bfloat16 come as uint16, codes as bytes.")
        .def("gradient", &Fold::gradient, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "bias"_a.none(),
             "cells"_a.none(), "alibi"_a.none(), "sinks"_a.none(), "q_ends"_a.none(), "kv_ends"_a.none(),
             "dout"_a, "dlse"_a.none(), "dq"_a, "dk"_a, "dv"_a, "dbias"_a.none(), "dsinks"_a.none(), "add"_a,
             "first_row"_a, "last_row"_a, "frame"_a, "head"_a, "lo"_a.none(), "hi"_a.none(), "bits"_a.none(),
             "bits_start"_a, "team"_a,
             "Fill dq, dk and dv, or add to dk and dv in the accumulate type; add to dbias, a view over what "
             "was "
             "stored, and to dsinks (sequences, heads). The bytes of workspace it took.")
        .def("tap", &Fold::tap, "q"_a, "k"_a, "lse"_a, "bias"_a.none(), "cells"_a.none(), "alibi"_a.none(),
             "q_ends"_a.none(), "kv_ends"_a.none(), "table"_a.none(), "k_scale"_a.none(), "first_row"_a,
             "last_row"_a, "frame"_a, "head"_a, "lo"_a.none(), "hi"_a.none(), "bits"_a.none(), "bits_start"_a,
             "team"_a, "pools"_a,
             "Add the weights that lse finishes to the pools; the bytes of workspace it took.")
        .def("run_known", &Fold::run_known, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a.none(), "team"_a,
             "given"_a.none() = nb::none(),
             "The same for a whole call that was understood before; the bytes, or -1 if it must be looked at "
             "in full: "
             "an array is misaligned, or something `given` is wrong (packed, q_ends, kv_ends, table, first, "
             "kept, "
             "k_scale, v_scale, kind, alibi, sinks).");
    nb::class_<Tensors>(m, "Tensors", "Calls on a framework's tensors that were understood once.")
        .def(nb::init<nb::handle, nb::handle, nb::handle, nb::object, nb::object>(), "kind"_a, "parameter"_a,
             "array"_a, "empty_strided"_a, "device"_a)
        .def("fold", &Tensors::fold, "q"_a, "k"_a, "v"_a, "facts"_a, "scale"_a.none(), "softcap"_a.none(),
             "left"_a, "right"_a, "given"_a.none(), "team"_a,
             "The result of a call that is known, (out, lse) if it has two; None where it is not, or must be "
             "looked at "
             "in full. `left` and `right` of a window are -1 for none; `given` is what Fold.run_known takes.")
        .def("gradient", &Tensors::gradient, "q"_a, "k"_a, "v"_a, "out"_a, "lse"_a, "dout"_a, "facts"_a,
             "scale"_a.none(), "softcap"_a.none(), "team"_a, "(dq, dk, dv) of a call that is known, or None.")
        .def("remember", &Tensors::remember, "tensors"_a, "facts"_a, "scale"_a.none(), "softcap"_a.none(),
             "left"_a, "right"_a, "given"_a.none(), "fold"_a, "results"_a,
             "Make a call known: the Fold that runs it, and (shape, strides, dtype) of each result.")
        .def("__len__", &Tensors::size);
}
