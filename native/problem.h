// Twin of problem.py: what is to be computed, and nothing about how.
// Fields and flags are listed once, as macros, so that what module.cpp reports to Python cannot drift from
// what the compiler sees. Python's None has no type here: each comment below names the value that stands for
// it.
#pragma once

#include <stdint.h>

namespace tilefold {

// The last three are codes: keys and values that a scale makes numbers of. int4 lies in pairs, two to a byte.
enum class DType : uint8_t { float16, bfloat16, float32, float64, uint8, int8, float8_e4m3fn, int4 };

static constexpr bool is_code(DType type) { return type >= DType::int8; }
static constexpr bool is_integer(DType code) { return code == DType::int8 || code == DType::int4; }

// Bytes of an element of an array.
static constexpr int64_t width(DType type) {
    constexpr int64_t bytes[] = {2, 2, 4, 8, 1, 1, 1, 1};
    return bytes[int(type)];
}

#define TILEFOLD_LAYOUT(row) row(DENSE, 0) row(VARLEN, 1) row(PAGED, 2)

#define TILEFOLD_HAS(row) \
    row(SPANS, 1) row(BITS, 2) row(BIAS, 4) row(ALIBI, 8) row(SINKS, 16) row(LENGTHS, 32)

#define TILEFOLD_WANT(row) \
    row(LSE, 1) row(GRAD, 2) row(INVARIANT, 4) row(ROWS, 8) row(KEYS, 16) row(SHOWN, 32)

#define TILEFOLD_ENUMERATOR(name, value) name = value,
enum Layout : uint8_t { TILEFOLD_LAYOUT(TILEFOLD_ENUMERATOR) };
enum Has : uint32_t { TILEFOLD_HAS(TILEFOLD_ENUMERATOR) };
enum Want : uint32_t { TILEFOLD_WANT(TILEFOLD_ENUMERATOR) };
#undef TILEFOLD_ENUMERATOR

// None for left and right. A quarter of the range, so that i + offset ± left never overflows.
constexpr int64_t UNLIMITED = INT64_MAX / 4;

// None for offset: each sequence of a ragged batch uses its own kv_len − q_len. Compared, never added.
constexpr int64_t PER_SEQUENCE = INT64_MIN;

// None for softcap; a cap in use is greater than zero.
constexpr double NO_SOFTCAP = 0.0;

// Key j is visible to query i iff i + offset − left ≤ j ≤ i + offset + right.
struct Band {
    int64_t left;    // UNLIMITED, or any integer: a band may lie wholly beside the diagonal
    int64_t right;   // the same
    int64_t offset;  // the position of query 0 among the keys, or PER_SEQUENCE
};

// C++ type, name, and the annotation that the field carries in problem.py.
#define TILEFOLD_PROBLEM(field)            \
    field(int64_t, batch, "int")           \
    field(int64_t, heads, "int")           \
    field(int64_t, kv_heads, "int")        \
    field(int64_t, q_len, "int")           \
    field(int64_t, kv_len, "int")          \
    field(int64_t, dim, "int")             \
    field(int64_t, v_dim, "int")           \
    field(DType, q_dtype, "str")           \
    field(DType, kv_dtype, "str")          \
    field(DType, acc_dtype, "str")         \
    field(double, scale, "float")          \
    field(double, softcap, "float | None") \
    field(double, dropout, "float")        \
    field(Band, band, "Band")              \
    field(Layout, layout, "Layout")        \
    field(Has, has, "Has")                 \
    field(Want, want, "Want")

#define TILEFOLD_MEMBER(type, name, annotation) type name;
struct Problem {
    TILEFOLD_PROBLEM(TILEFOLD_MEMBER)
};
#undef TILEFOLD_MEMBER

}  // namespace tilefold
