// What every kernel file includes: torch's stable ABI, the path chosen at run time, bf16.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

namespace xeon {

using torch::stable::Tensor;
using torch::headeronly::ScalarType;

enum class Path : int { portable = 1, avx512 = 2, amx = 3 };  // each with all that is before it

// The path in force: the best that this processor runs, or the one that was forced. Read it once per op, outside the loop.
Path path();

// Before a function with AVX-512 intrinsics. It reaches neither lambdas nor called functions: mark those too, and call one marked
// function per range inside parallel_for. The features are Skylake-SP's, so no AVX512-BF16 and no VBMI (round_bf16 below).
#define XEON_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,bmi,bmi2")))

inline float from_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// To nearest, ties to even, a NaN to 0x7fc0: as torch rounds.
inline uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float load(const uint16_t* from) { return from_bf16(*from); }
inline float load(const float* from) { return *from; }
inline void store(uint16_t* to, float value) { *to = to_bf16(value); }
inline void store(float* to, float value) { *to = value; }

}  // namespace xeon
