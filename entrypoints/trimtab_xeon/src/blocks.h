// What attention computes a block of: products of small matrices in cache, and the layouts that they take.
//
// C [rows, columns] fp32 += A B, whose depth is counted in units of 4 bytes: two bf16 numbers, multiplied by vdpbf16ps or by tiles of AMX, or
// one fp32 number. B's units lie [depth][columns], columns in sixteens; A's are broadcast from anywhere, or for tiles lie side by side.
#pragma once

#ifndef __clang__  // gcc 12 takes its own headers' undefined registers for variables that were forgotten
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "avx512.h"
#include "tiles.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>

namespace xeon {
namespace {

// vdpbf16ps is met in the instances for bf16 alone, which run only where the processor has it
#define XEON_DOT __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c,bmi,bmi2")))
#define XEON_DOT_INLINE XEON_DOT inline __attribute__((always_inline))

constexpr int64_t kColumns = 128, kKeys = 64;  // of a block

struct Pairs {
  using Number = uint16_t;
  static constexpr int64_t per = 2;       // numbers in a unit
  static constexpr int64_t deep = 2;      // a product's depth is a multiple of so many numbers, the last of them zeros
  static constexpr int64_t columns = 16;  // a block's columns are
  static constexpr int64_t keys = 2;      // and where its keys begin
};
struct Singles {
  using Number = float;
  static constexpr int64_t per = 1, deep = 1, columns = 16, keys = 1;
};
struct Tiles {
  using Number = uint16_t;
  static constexpr int64_t per = 2, deep = 2 * kSide, columns = deep, keys = kKeys;
};
template <class T>
constexpr bool by_tiles = T::deep > T::per;

struct NoRegisters {};
template <class T>
using Registers = std::conditional_t<by_tiles<T>, TileRegisters, NoRegisters>;  // a thread holds them while it computes products

inline int64_t up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// ---- products

template <class T>
XEON_DOT_INLINE __m512 multiply_add(__m512i left, __m512i right, __m512 sum) {
  if constexpr (T::per == 2)
    return _mm512_dpbf16_ps(sum, (__m512bh)left, (__m512bh)right);
  else
    return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
}

struct Left {  // units at data + row * rows + depth * step bytes
  const char* data;
  int64_t rows, step;
};
struct Right {  // units [depth][step]
  const uint32_t* data;
  int64_t step;
};

template <class T, int M, int N, bool add>
XEON_DOT void tile(Left a, Right b, int64_t depth, float* c, int64_t c_step) {
  __m512 sum[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) sum[m][n] = add ? _mm512_loadu_ps(c + m * c_step + 16 * n) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k) {
    __m512i right[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) right[n] = _mm512_loadu_si512(b.data + k * b.step + 16 * n);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      int32_t unit;
      std::memcpy(&unit, a.data + m * a.rows + k * a.step, 4);
      const __m512i left = _mm512_set1_epi32(unit);
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) sum[m][n] = multiply_add<T>(left, right[n], sum[m][n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) _mm512_storeu_ps(c + m * c_step + 16 * n, sum[m][n]);
}

// C [rows, columns] (+)= A [rows, depth] B [depth, columns]; columns in sixteens, and for tiles the rows that are there
template <class T, bool add>
void product(int64_t rows, int64_t columns, int64_t depth, Left a, Right b, float* c, int64_t c_step) {
  if constexpr (by_tiles<T>) return multiply_by_tiles<add>(rows, columns, depth, a.data, a.rows, b.data, b.step, c, c_step);
  using Tile = void (*)(Left, Right, int64_t, float*, int64_t);
#define XEON_ROW(M) {tile<T, M, 1, add>, tile<T, M, 2, add>, tile<T, M, 3, add>, tile<T, M, 4, add>}
  static constexpr Tile tiles[6][4] = {XEON_ROW(1), XEON_ROW(2), XEON_ROW(3), XEON_ROW(4), XEON_ROW(5), XEON_ROW(6)};
#undef XEON_ROW
  const int64_t turns = (rows + 5) / 6, wide = (columns + 63) / 64;
  for (int64_t j = 0; j < wide; ++j) {
    const int64_t left = columns * j / 16 / wide * 16, right = columns * (j + 1) / 16 / wide * 16;
    for (int64_t i = 0; i < turns; ++i) {
      const int64_t top = rows * i / turns, bottom = rows * (i + 1) / turns;
      tiles[bottom - top - 1][(right - left) / 16 - 1]({a.data + top * a.rows, a.rows, a.step}, {b.data + left, b.step}, depth,
                                                       c + top * c_step + left, c_step);
    }
  }
}

// ---- what is laid out anew

XEON_DOT_INLINE void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
    r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
    r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
  }
}

// Row pointers [count] of `width` numbers each -> units [width / per][kColumns]; what is there up to the multiples of T becomes 0.
template <class T>
XEON_DOT void lay_across(const typename T::Number* const* rows, int64_t count, int64_t width, uint32_t* out) {
  const int64_t units = width / T::per;
  for (int64_t column = 0; column < up(count, T::columns); column += 16)
    for (int64_t unit = 0; unit < units; unit += 16) {
      const int64_t there = std::min<int64_t>(16, units - unit);
      const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1u);
      __m512i block[16];
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        block[i] = column + i < count ? _mm512_maskz_loadu_epi32(mask, rows[column + i] + unit * T::per) : _mm512_setzero_si512();
      transpose(block);
#pragma GCC unroll 16
      for (int64_t i = 0; i < 16; ++i)
        if (by_tiles<T> || i < there) _mm512_storeu_si512(out + (unit + i) * kColumns + column, block[i]);
    }
}

// Sixteen units from column i on, each of numbers that stand below each other in rows `row` and after; 0 where there are none.
template <class T>
XEON_DOT_INLINE __m512i units_below(const typename T::Number* const* rows, int64_t count, int64_t width, int64_t row, int64_t i) {
  const __mmask16 mask = static_cast<__mmask16>((1u << std::clamp<int64_t>(width - i, 0, 16)) - 1u);
  if (row >= count) return _mm512_setzero_si512();
  if constexpr (T::per == 1) return _mm512_maskz_loadu_epi32(mask, rows[row] + i);
  const __m512i upper = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[row] + i));
  if (row + 1 >= count) return upper;
  return _mm512_or_si512(upper, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, rows[row + 1] + i)), 16));
}

// The same rows -> units [count / per][step], each of numbers that stand below each other; step >= width, count up to T::deep.
template <class T>
XEON_DOT void lay_below(const typename T::Number* const* rows, int64_t count, int64_t width, int64_t step, uint32_t* out) {
  for (int64_t row = 0; row < up(count, T::deep); row += T::per)
    for (int64_t i = 0; i < step; i += 16) _mm512_storeu_si512(out + row / T::per * step + i, units_below<T>(rows, count, width, row, i));
}

// The same units, each row's side by side: [step][kKeys / per], as far as there are some.
template <class T>
XEON_DOT void lay_turned(const typename T::Number* const* rows, int64_t count, int64_t width, int64_t step, uint32_t* out) {
  for (int64_t i = 0; i < step; i += 16)
    for (int64_t unit = 0; unit < up(count, T::deep) / T::per; unit += 16) {
      __m512i block[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j) block[j] = units_below<T>(rows, count, width, (unit + j) * T::per, i);
      transpose(block);
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j) _mm512_storeu_si512(out + (i + j) * (kKeys / T::per) + unit, block[j]);
    }
}

// ---- numbers

// 2^x to 3e-6 (bf16) or 2e-7 (fp32) of it, by Taylor's series around the nearest whole number. NaN stays NaN.
template <class T>
XEON_DOT_INLINE __m512 exp2(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, 8), part = _mm512_sub_ps(x, whole);
  __m512 sum;
  if constexpr (T::per == 2) {
    sum = _mm512_set1_ps(1.3333558146e-3f);
  } else {
    sum = _mm512_fmadd_ps(_mm512_set1_ps(1.5403530394e-4f), part, _mm512_set1_ps(1.3333558146e-3f));
  }
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(9.6181291076e-3f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.5504108665e-2f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.4022650696e-1f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.9314718056e-1f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, whole);
}

XEON_DOT_INLINE __m512i interleave(__m512 even, __m512 odd, __m512i& both) {  // two rows of bf16 as units; `both` one behind the other
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
#ifdef XEON_EMULATED_TILES
  both = _mm512_inserti64x4(_mm512_castsi256_si512(round_bf16(even)), round_bf16(odd), 1);
#else
  both = (__m512i)_mm512_cvtne2ps_pbh(odd, even);
#endif
  return _mm512_permutexvar_epi16(order, both);
}

// ---- memory and threads

struct Freed {
  void operator()(void* memory) const { std::free(memory); }
};
class Memory {  // bytes on the boundary of a cache line, handed out one piece after another
 public:
  explicit Memory(int64_t bytes)
      : start(static_cast<char*>(std::aligned_alloc(64, static_cast<size_t>(up(std::max<int64_t>(bytes, 64), 64))))) {
    if (start == nullptr) throw std::bad_alloc();
  }
  template <class What>
  What* take(int64_t count) {
    What* piece = reinterpret_cast<What*>(start.get() + used);
    used += up(count * static_cast<int64_t>(sizeof(What)), 64);
#ifdef XEON_EMULATED_TILES
    std::memset(static_cast<void*>(piece), 0xff, static_cast<size_t>(count) * sizeof(What));  // NaN: nothing may count on what was there
#endif
    return piece;
  }
  void give_back() { used = 0; }

 private:
  std::unique_ptr<char, Freed> start;
  int64_t used = 0;
};

// Runs work(index) for each index by as many threads as torch has; whoever is free takes the next.
template <class Work>
void each(int64_t count, const Work& work) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(next); });
}

}  // namespace
}  // namespace xeon
