// What kernels over rows of numbers share: dtypes, rows that lie apart, threads, tails, a value rounded on the way.
#pragma once

#include <algorithm>

#include "avx512.h"

namespace xeon {

// Rows of `width` numbers that lie together: [n, width] or [n, heads, width], where rows may lie further apart than they are wide.
template <class T>
struct Rows {
  T* first;
  int64_t count, inner, outer_step, inner_step, width;

  T* operator[](int64_t row) const { return first + (row / inner) * outer_step + (row % inner) * inner_step; }
};

inline void check_rows(const Tensor& x, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(x.is_cpu(), name, " is not on the CPU");
  STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 3, name, " has ", x.dim(), " dimensions, and not 2 or 3");
  STD_TORCH_CHECK(x.scalar_type() == like.scalar_type(), name, " has another dtype");
  STD_TORCH_CHECK(x.numel() == 0 || x.size(x.dim() - 1) == 1 || x.stride(x.dim() - 1) == 1, name, "'s rows are not contiguous");
}

template <class T>
Rows<T> rows_of(const Tensor& x) {
  const bool heads = x.dim() == 3;
  const int64_t n = x.size(0), inner = heads ? x.size(1) : 1, width = x.size(x.dim() - 1);
  auto* first = static_cast<T*>(const_cast<void*>(x.const_data_ptr()));
  return {first, n * inner, std::max<int64_t>(1, inner), x.stride(0), heads ? x.stride(1) : 0, width};
}

inline void check_same(const Tensor& x, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(x.sizes() == other.sizes(), name, " has another shape");
}

inline void check_vector(const Tensor& x, int64_t length, ScalarType type, const char* name) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.numel() == length && x.scalar_type() == type, name,
                  " is no contiguous vector of ", length, " numbers of its dtype on the CPU");
}

// f(T()) with T = uint16_t for bf16, float for fp32.
template <class F>
void by_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::BFloat16) return f(uint16_t());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "the kernels take bf16 and fp32");
  f(float());
}

// f(begin, end) over parts of the rows; a thread is not woken for less than it takes to wake it.
template <class F>
void over_rows(int64_t rows, int64_t width, const F& f) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16384 / std::max<int64_t>(1, width)), f);
}

// Before the portable loops: compiled for AVX2 as well, which the loader takes where it is. Without fused products, so the same numbers.
#define XEON_PORTABLE __attribute__((target_clones("avx2", "default")))

inline float rounded(float value, const uint16_t*) { return from_bf16(to_bf16(value)); }
inline float rounded(float value, const float*) { return value; }

XEON_INLINE __m512 rounded16(__m512 value, const uint16_t*) {  // widen(round_bf16(value)), not packed in between
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __m512i kept = _mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  return _mm512_mask_mov_ps(_mm512_castsi512_ps(kept), _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q), value);
}
XEON_INLINE __m512 rounded16(__m512 value, const float*) { return value; }

// Asks for what will be read 1 KB further on: with long sums between loads processors do not look so far ahead by themselves (measured on an
// EPYC: SwiGLU of 2,048 x 5,632 in 6.4 ms instead of 11.4). Behind the last row it asks for what is never read, which is harmless.
template <class T>
XEON_INLINE void ahead(const T* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at) + 1024, _MM_HINT_T0);
}

// The lanes of a step that are before the end.
XEON_INLINE __mmask16 until(int64_t left) { return left >= 16 ? __mmask16(0xffff) : __mmask16((1u << left) - 1); }

template <class T>
XEON_INLINE void put16(T* to, __m512 value, __mmask16 mask) {
  if (mask == 0xffff)
    store16(to, value);
  else
    store16(to, value, mask);
}

}  // namespace xeon
