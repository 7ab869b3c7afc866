// exp in fp32 by the polynomial of Cephes' expf (S. Moshier). Beside exp in double precision, over every seventh fp32 number there is, at
// most 1.3 units in the last place off with AVX-512 and without. Too large gives infinity, too small 0; a NaN stays one.
#pragma once

#include "avx512.h"

namespace xeon {

namespace exp_constants {
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kHigh = 0.693359375f, kLow = -2.12194440e-4f;  // ln 2 in two parts: an integer times the first is exact
constexpr float kMost = 89.0f, kLeast = -104.0f;               // beyond these the result is infinity or 0
constexpr float kTerms[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
}  // namespace exp_constants

XEON_INLINE __m512 exp16(__m512 x) {
  using namespace exp_constants;
  x = _mm512_min_ps(_mm512_set1_ps(kMost), _mm512_max_ps(_mm512_set1_ps(kLeast), x));  // of a NaN the second operand is taken
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLow), _mm512_fnmadd_ps(n, _mm512_set1_ps(kHigh), x));
  __m512 sum = _mm512_set1_ps(kTerms[0]);
  for (int term = 1; term < 6; ++term) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(kTerms[term]));
  sum = _mm512_fmadd_ps(sum, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  return _mm512_scalef_ps(sum, n);
}

// Without branches or calls, so that compilers make vectors of it.
inline float exp_of(float x) {
  using namespace exp_constants;
  x = x > kMost ? kMost : x;  // a NaN stays
  x = x < kLeast ? kLeast : x;
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: added, it rounds to an integer in the low bits
  const float shifted = x * kLog2e + kToInteger;
  const float n = shifted - kToInteger;
  const float r = (x - n * kHigh) - n * kLow;
  float sum = kTerms[0];
  for (int term = 1; term < 6; ++term) sum = sum * r + kTerms[term];
  sum = sum * (r * r) + (r + 1.0f);
  int32_t power;  // 2^n in two factors: n alone is beyond the exponents that there are
  std::memcpy(&power, &shifted, sizeof power);
  power -= 0x4b400000;
  const int32_t half = power >> 1, first = (half + 127) << 23, second = (power - half + 127) << 23;
  float one, other;
  std::memcpy(&one, &first, sizeof one);
  std::memcpy(&other, &second, sizeof other);
  return sum * one * other;
}

}  // namespace xeon
