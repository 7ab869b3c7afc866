// Loads and stores of 16 numbers, bf16 or fp32, for functions marked XEON_AVX512. Nothing here is called on other processors.
#pragma once

#include <immintrin.h>

#include "kernel.h"

namespace xeon {

#define XEON_INLINE XEON_AVX512 inline __attribute__((always_inline))

// bf16, to nearest, ties to even, NaN to 0x7fc0. vcvtneps2bf16 would lose subnormal numbers, and older Xeons lack it.
XEON_INLINE __m256i round_bf16(__m512 value) {
  const __m512i bits = _mm512_castps_si512(value);
  const __m512i even = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(even, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

XEON_INLINE __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

XEON_INLINE __m512 load16(const uint16_t* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }
XEON_INLINE __m512 load16(const float* from) { return _mm512_loadu_ps(from); }
XEON_INLINE __m512 load16(const uint16_t* from, __mmask16 mask) { return widen(_mm256_maskz_loadu_epi16(mask, from)); }
XEON_INLINE __m512 load16(const float* from, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, from); }

XEON_INLINE void store16(uint16_t* to, __m512 value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), round_bf16(value)); }
XEON_INLINE void store16(float* to, __m512 value) { _mm512_storeu_ps(to, value); }
XEON_INLINE void store16(uint16_t* to, __m512 value, __mmask16 mask) { _mm256_mask_storeu_epi16(to, mask, round_bf16(value)); }
XEON_INLINE void store16(float* to, __m512 value, __mmask16 mask) { _mm512_mask_storeu_ps(to, mask, value); }

}  // namespace xeon
