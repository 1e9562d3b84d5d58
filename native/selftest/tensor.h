// Random numbers, storage types, and arrays in any order.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "../problem.h"
#include "../sweep.h"

namespace {

using namespace tilefold;

using Wide = long double;
constexpr double INF = std::numeric_limits<double>::infinity(),
                 NONE = std::numeric_limits<double>::quiet_NaN();

// ---- numbers ----

// SplitMix64.
struct Random {
    uint64_t state;
    explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15u + 1) {}
    uint64_t next() {
        uint64_t x = state += 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        return x ^ x >> 31;
    }
    int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
    double between(double lo, double hi) { return lo + (hi - lo) * double(next() >> 11) * 0x1p-53; }
};

constexpr DType TYPES[] = {DType::float32, DType::float64, DType::bfloat16, DType::float16};

const char* name(DType t) {
    const char* const names[] = {"float16", "bfloat16", "float32",       "float64",
                                 "uint8",   "int8",     "float8_e4m3fn", "int4"};
    return names[int(t)];
}

int mantissa(DType t) {  // bits that are stored
    return t == DType::float64 ? 52 : t == DType::float32 ? 23 : t == DType::float16 ? 10 : 7;
}
double roundoff(DType t) { return ldexp(1, -1 - mantissa(t)); }
// Half a step between the smallest numbers, which are no closer to each other than that.
double least_error(DType t) { return t == DType::float16 ? 0x1p-25 : 0; }

double number_of(uint16_t bits, int m) {
    const int exponents = (1 << (15 - m)) - 1, e = bits >> m & exponents, f = bits & ((1 << m) - 1);
    const double x =
        e == exponents ? (f ? NONE : INF) : ldexp(e ? f | 1 << m : f, std::max(e, 1) - exponents / 2 - m);
    return bits & 0x8000 ? -x : x;
}
uint16_t bits_of(double x, int m) {
    const int exponents = (1 << (15 - m)) - 1, sign = std::signbit(x) ? 0x8000 : 0, infinite = exponents << m;
    if (std::isnan(x)) return uint16_t(infinite | 1 << (m - 1));
    if (std::isinf(x) || x == 0) return uint16_t(sign | (x == 0 ? 0 : infinite));
    const int e = std::max(ilogb(x), 1 - exponents / 2);
    const int64_t bits =
        (int64_t(e + exponents / 2 - 1) << m) + llrint(ldexp(fabs(x), m - e));  // may carry upwards
    return uint16_t(sign | std::min<int64_t>(bits, infinite));
}
double rounded(double x, DType t) { return number_of(bits_of(x, mantissa(t)), mantissa(t)); }

// ---- arrays ----

enum Order { PLAIN, BSHD, GAPS, REVERSED };

// (*lead, heads, rows, cols) in memory of exactly its extent, what lies between its elements included. Axes
// in `repeated` (bit 0 the last) have stride 0.
class Tensor {
   public:
    Tensor() = default;
    Tensor(DType type, std::vector<int64_t> shape, Order order, unsigned repeated = 0)
        : type_(type), shape_(std::move(shape)), strides_(shape_.size()) {
        const int n = int(shape_.size());
        std::vector<int> axes;
        for (int axis = n - 1; axis >= 0; axis--) axes.push_back(axis);
        if (order == BSHD) std::swap(axes[1], axes[2]);
        int64_t step = order == GAPS ? 3 : 1, first = order == GAPS ? 1 : 0, last = 0;
        for (int axis : axes) {
            if (repeated >> (n - 1 - axis) & 1) continue;
            strides_[size_t(axis)] = order == REVERSED ? -step : step;
            const int64_t reach = step * std::max<int64_t>(shape_[size_t(axis)] - 1, 0);
            (order == REVERSED ? first : last) += reach;
            step = step * std::max<int64_t>(shape_[size_t(axis)], 1) + (order == GAPS ? 1 : 0);
        }
        const bool empty = std::find(shape_.begin(), shape_.end(), 0) != shape_.end();
        memory_.assign(empty ? 0 : size_t((first + last + 1) * width(type)), char(0xff));
        memory_.reserve(1);  // a pointer that is not null
        first_ = empty ? 0 : first;
    }

    int64_t items() const {
        int64_t n = 1;
        for (size_t i = 0; i + 3 < shape_.size(); i++) n *= shape_[i];
        return n;
    }
    char* at(int64_t item, int64_t head, int64_t row, int64_t col) {
        const size_t n = shape_.size();
        int64_t x = first_ + head * strides_[n - 3] + row * strides_[n - 2] + col * strides_[n - 1];
        for (size_t i = n - 3; i-- > 0; item /= shape_[i]) x += item % shape_[i] * strides_[i];
        return memory_.data() + x * width(type_);
    }
    double get(int64_t item, int64_t head, int64_t row, int64_t col) const {
        const char* p = const_cast<Tensor*>(this)->at(item, head, row, col);
        if (type_ == DType::uint8) return *reinterpret_cast<const uint8_t*>(p);
        if (type_ == DType::float64) return *reinterpret_cast<const double*>(p);
        if (type_ == DType::float32) return *reinterpret_cast<const float*>(p);
        return number_of(*reinterpret_cast<const uint16_t*>(p), mantissa(type_));
    }
    void set(int64_t item, int64_t head, int64_t row, int64_t col, double x) {
        char* const p = at(item, head, row, col);
        if (type_ == DType::uint8)
            *reinterpret_cast<uint8_t*>(p) = uint8_t(x);
        else if (type_ == DType::float64)
            *reinterpret_cast<double*>(p) = x;
        else if (type_ == DType::float32)
            *reinterpret_cast<float*>(p) = float(x);
        else
            *reinterpret_cast<uint16_t*>(p) = bits_of(x, mantissa(type_));
    }
    template <class F>
    void fill(F&& f) {
        const size_t n = shape_.size();
        for (int64_t b = 0; b < items(); b++)
            for (int64_t h = 0; h < shape_[n - 3]; h++)
                for (int64_t r = 0; r < shape_[n - 2]; r++)
                    for (int64_t c = 0; c < shape_[n - 1]; c++) set(b, h, r, c, f(b, h, r, c));
    }
    // As the core is told of it, from some row on; `columns` says whether the last axis counts (that of lse
    // does not).
    Array array(int64_t row = 0, bool columns = true) {
        const int dims = int(shape_.size()) - !columns;
        char* const data = memory_.data() + (first_ + row * strides_[shape_.size() - 2]) * width(type_);
        return {data, dims, shape_.data(), strides_.data(), type_};
    }
    int64_t bytes_per_element() const { return width(type_); }
    std::vector<char>& memory() { return memory_; }

   private:
    DType type_ = DType::float32;
    std::vector<int64_t> shape_, strides_;
    std::vector<char> memory_;
    int64_t first_ = 0;
};
}  // namespace
