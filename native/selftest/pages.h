// Keys and values of a case in pages that lie anyhow, as they are or as codes. The fact to know: rows that no
// sequence has stay what fresh memory is, NaN, and so do their scales.
#pragma once

#include "tensor.h"

namespace {

// What half `n` of a byte of codes stands for.
double number_of_code(DType type, uint8_t byte, int64_t n) {
    if (type == DType::int8) return int8_t(byte);
    if (type == DType::int4) return ((n ? byte >> 4 : byte & 15) ^ 8) - 8;
    const int e = byte >> 3 & 15, m = byte & 7;
    if (e == 15 && m == 7) return NONE;
    const double x = ldexp(e ? 8 + m : m, std::max(e, 1) - 10);
    return byte & 0x80 ? -x : x;
}

// Which page holds rows n · page and on of each sequence, and how many pages there are.
struct Table {
    int64_t page, width, pages;
    std::vector<int64_t> at;

    Table() = default;
    Table(int64_t page_, int64_t kv_len, const std::vector<int64_t>& ends, Random& random)
        : page(page_), width(kv_len / page_), pages(int64_t(ends.size()) * width + 2) {
        std::vector<int64_t> order(static_cast<size_t>(pages));
        for (size_t n = 0; n < order.size(); n++) order[n] = int64_t(n);
        if (random.below(4))
            for (size_t n = order.size() - 1; n > 0; n--)
                std::swap(order[n], order[size_t(random.below(int64_t(n) + 1))]);
        for (size_t n = 0; n < ends.size(); n++)
            for (int64_t i = 0; i < width; i++)
                at.push_back(i * page < ends[n] ? order[n * size_t(width) + size_t(i)] : -1);
        at.reserve(1);
    }
    int64_t of(size_t sequence, int64_t row) const {
        return at[sequence * size_t(width) + size_t(row / page)];
    }
};

// Keys, or values.
struct Store {
    Tensor rows, scales;
    int64_t groups = 1;  // of dims that share a scale

    Store() = default;
    // The rows of `dense` (batch, heads, kv_len, width). Codes are random, and `dense` becomes what they
    // stand for, rounded to its type, and `exact` the same unrounded; a row that begins with NaN has NaN
    // scales.
    Store(Tensor& dense, Tensor& exact, DType stored, int64_t heads, int64_t width, Order order,
          const Table& t, const std::vector<int64_t>& ends, Random& random) {
        const int64_t each = stored == DType::int4 ? 2 : 1;
        rows = Tensor(stored, {t.pages, heads, t.page, width / each}, order);
        const auto every = [&](auto&& f) {
            for (size_t n = 0; n < ends.size(); n++)
                for (int64_t j = 0; j < ends[n]; j++)
                    for (int64_t h = 0; h < heads; h++) f(int64_t(n), t.of(n, j), h, j);
        };
        if (!is_code(stored)) {
            every([&](int64_t n, int64_t page, int64_t h, int64_t j) {
                for (int64_t d = 0; d < width; d++) rows.set(page, h, j % t.page, d, dense.get(n, h, j, d));
            });
            return;
        }
        groups = random.below(2) ? 4 : 1;
        if (width % (groups * each)) groups = 1;
        // One scale for a page and head, or one for each row.
        scales = Tensor(DType::float32, {t.pages, heads, t.page, groups}, order, random.below(3) ? 0 : 2);
        every([&](int64_t n, int64_t page, int64_t h, int64_t j) {
            const bool none = width && std::isnan(dense.get(n, h, j, 0));
            for (int64_t g = 0; g < groups; g++)
                scales.set(page, h, j % t.page, g, none ? NONE : random.between(0.004, 0.02));
            for (int64_t d = 0; d < width; d++)
                if (d % each == 0) *rows.at(page, h, j % t.page, d / each) = char(code(stored, random));
        });
        every([&](int64_t n, int64_t page, int64_t h, int64_t j) {
            for (int64_t d = 0; d < width; d++) {
                const double x =
                    number_of_code(stored, uint8_t(*rows.at(page, h, j % t.page, d / each)), d % each);
                const double scale = scales.get(page, h, j % t.page, d / (width / groups));
                dense.set(n, h, j, d, double(float(x * scale)));
                exact.set(n, h, j, d, x * scale);
            }
        });
    }

   private:
    static uint8_t code(DType stored, Random& random) {
        const uint8_t byte = uint8_t(random.next() >> 32);
        // No NaN, and nothing that makes softmax a choice of one key.
        return stored == DType::float8_e4m3fn ? uint8_t(byte & 0xbf) : byte;
    }
};
}  // namespace
