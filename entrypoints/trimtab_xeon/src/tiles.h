// Products of bf16 by AMX: eight registers, each a tile of 16 rows of 16 units (two bf16 numbers, or one fp32 number).
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, and volume 2, TDPBF16PS.
//
// With XEON_EMULATED_TILES the instructions are computed in plain C++, so that all around them is tested where there is no AMX.
#pragma once

#include <cstdint>
#include <cstring>

namespace xeon {
namespace {

constexpr int64_t kSide = 16;  // rows of a tile, and units of a row

#ifndef XEON_EMULATED_TILES

// As assembly: by gcc 12's intrinsics a load seems not to read memory, and stores before it may be moved behind it.
template <int T>
inline void load_tile(const void* from, int64_t bytes) {  // a row every so many bytes
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(bytes), "i"(T) : "memory");
}
template <int T>
inline void store_tile(void* to, int64_t bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(bytes), "i"(T) : "memory");
}
template <int T>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(T));
}
template <int C, int A, int B>
inline void multiply_tiles() {  // C += A B
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

// While it lives, the thread's tile registers are as above; they are let go for whoever comes next, such as oneDNN.
struct TileRegisters {
  TileRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, first_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    static_assert(sizeof shape == 64);
    asm volatile("ldtilecfg %0" ::"m"(shape));
  }
  ~TileRegisters() { asm volatile("tilerelease"); }
  TileRegisters(const TileRegisters&) = delete;
};

#else

thread_local uint32_t emulated[8][kSide][kSide];

inline float half_of(uint32_t unit, int which) {
  const uint32_t bits = which == 0 ? unit << 16 : unit & 0xffff0000u;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <int T>
inline void load_tile(const void* from, int64_t bytes) {
  for (int64_t row = 0; row < kSide; ++row) std::memcpy(emulated[T][row], static_cast<const char*>(from) + row * bytes, 64);
}
template <int T>
inline void store_tile(void* to, int64_t bytes) {
  for (int64_t row = 0; row < kSide; ++row) std::memcpy(static_cast<char*>(to) + row * bytes, emulated[T][row], 64);
}
template <int T>
inline void zero_tile() {
  std::memset(emulated[T], 0, sizeof emulated[T]);
}
template <int C, int A, int B>
inline void multiply_tiles() {  // even and odd numbers have sums of their own until the end; subnormal numbers are not made zero here
  for (int64_t m = 0; m < kSide; ++m) {
    float sums[2][kSide] = {};
    for (int64_t k = 0; k < kSide; ++k)
      for (int which = 0; which < 2; ++which)
        for (int64_t n = 0; n < kSide; ++n) sums[which][n] += half_of(emulated[A][m][k], which) * half_of(emulated[B][k][n], which);
    for (int64_t n = 0; n < kSide; ++n) {
      float sum;
      std::memcpy(&sum, &emulated[C][m][n], 4);
      sum += sums[0][n] + sums[1][n];
      std::memcpy(&emulated[C][m][n], &sum, 4);
    }
  }
}
struct TileRegisters {
  TileRegisters() { std::memset(emulated, 0xff, sizeof emulated); }  // NaN: nothing may be taken from before
  ~TileRegisters() { std::memset(emulated, 0xff, sizeof emulated); }
};

#endif

// C [16 M, 16 N] fp32 (+)= A [16 M, depth] B [depth, 16 N]; depth in units, a multiple of 16. `a` has a row every `a_bytes`, `b` and
// `c` one every `b_step` and `c_step` units.
template <bool add, int M, int N>
inline void multiply_by_tiles(const char* a, int64_t a_bytes, const uint32_t* b, int64_t b_step, int64_t depth, float* c, int64_t c_step) {
  const int64_t c_row = kSide * c_step;
  const auto begin = [&]<int T>(const float* from) {
    if constexpr (add)
      load_tile<T>(from, 4 * c_step);
    else
      zero_tile<T>();
  };
  begin.template operator()<0>(c);
  if constexpr (N > 1) begin.template operator()<1>(c + kSide);
  if constexpr (M > 1) begin.template operator()<2>(c + c_row);
  if constexpr (M > 1 && N > 1) begin.template operator()<3>(c + c_row + kSide);
  for (int64_t k = 0; k < depth; k += kSide) {
    load_tile<6>(b + k * b_step, 4 * b_step);
    load_tile<4>(a + 4 * k, a_bytes);
    multiply_tiles<0, 4, 6>();
    if constexpr (N > 1) {
      load_tile<7>(b + k * b_step + kSide, 4 * b_step);
      multiply_tiles<1, 4, 7>();
    }
    if constexpr (M > 1) {
      load_tile<5>(a + kSide * a_bytes + 4 * k, a_bytes);
      multiply_tiles<2, 5, 6>();
    }
    if constexpr (M > 1 && N > 1) multiply_tiles<3, 5, 7>();
  }
  store_tile<0>(c, 4 * c_step);
  if constexpr (N > 1) store_tile<1>(c + kSide, 4 * c_step);
  if constexpr (M > 1) store_tile<2>(c + c_row, 4 * c_step);
  if constexpr (M > 1 && N > 1) store_tile<3>(c + c_row + kSide, 4 * c_step);
}

// The same for any number of rows and of columns, each up to the next multiple of 16: so many rows of A and C must be there.
template <bool add>
void multiply_by_tiles(int64_t rows, int64_t columns, int64_t depth, const char* a, int64_t a_bytes, const uint32_t* b, int64_t b_step,
                       float* c, int64_t c_step) {
  for (int64_t j = 0; j < columns; j += 2 * kSide)
    for (int64_t i = 0; i < rows; i += 2 * kSide) {
      const bool two_rows = rows - i > kSide, two_columns = columns - j > kSide;
      const auto turn = two_rows ? (two_columns ? multiply_by_tiles<add, 2, 2> : multiply_by_tiles<add, 2, 1>)
                                 : (two_columns ? multiply_by_tiles<add, 1, 2> : multiply_by_tiles<add, 1, 1>);
      turn(a + i * a_bytes, a_bytes, b + j, b_step, depth, c + i * c_step + j, c_step);
    }
}

}  // namespace
}  // namespace xeon
