// How fast this machine is at best: the roofs that a benchmark's shares refer to. Measured, never looked up.
#pragma once

#include <cstddef>

namespace tilefold {

// Each keeps `threads` threads busy for about `seconds` and gives what all of them did per second, in the
// best of a few passes; 0 where this machine has no such thing. A multiply-add counts as two operations.
double f32_peak(int threads, double seconds);       // multiply-add of float
double f64_peak(int threads, double seconds);       // multiply-add of double
double bf16_dot_peak(int threads, double seconds);  // AVX-512: dot products of pairs of bfloat16, into float
double amx_peak(int threads, double seconds);       // AMX: products of tiles of bfloat16, into float

// Bytes per second, of reading a buffer of `bytes` again and again. What fits into caches is read from there.
double read_peak(int threads, double seconds, std::size_t bytes);

}  // namespace tilefold
