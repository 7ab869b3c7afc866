// Rotary positions (Su et al. 2021, arXiv:2104.09864) in place, first half of a head against its second, as Llama's checkpoints have them.
#include "rows.h"

namespace xeon {
namespace {

// (a, b) of the two halves -> (a c - b s, b c' + a s'), or back: (a c + b s', b c' - a s). Each product is rounded, then the sum.
template <class T, class C, bool backwards>
XEON_AVX512 void turn_avx512(T* x, const C* cos, const C* sin, int64_t half) {
  for (int64_t i = 0; i < half; i += 16) {
    const __mmask16 mask = until(half - i);
    ahead(x + i);
    ahead(x + half + i);
    const __m512 a = load16(x + i, mask), b = load16(x + half + i, mask);
    const __m512 ca = rounded16(load16(cos + i, mask), x), cb = rounded16(load16(cos + half + i, mask), x);
    const __m512 sa = rounded16(load16(sin + i, mask), x), sb = rounded16(load16(sin + half + i, mask), x);
    const __m512 ac = rounded16(_mm512_mul_ps(a, ca), x), bc = rounded16(_mm512_mul_ps(b, cb), x);
    if constexpr (backwards) {
      put16(x + i, _mm512_add_ps(ac, rounded16(_mm512_mul_ps(b, sb), x)), mask);
      put16(x + half + i, _mm512_sub_ps(bc, rounded16(_mm512_mul_ps(a, sa), x)), mask);
    } else {
      put16(x + i, _mm512_sub_ps(ac, rounded16(_mm512_mul_ps(b, sa), x)), mask);
      put16(x + half + i, _mm512_add_ps(bc, rounded16(_mm512_mul_ps(a, sb), x)), mask);
    }
  }
}

template <class T, class C, bool backwards>
XEON_PORTABLE void turn(T* x, const C* cos, const C* sin, int64_t half) {
#pragma GCC ivdep
  for (int64_t i = 0; i < half; ++i) {
    const float a = load(x + i), b = load(x + half + i);
    const float ac = rounded(a * rounded(load(cos + i), x), x), bc = rounded(b * rounded(load(cos + half + i), x), x);
    const float sa = rounded(load(sin + i), x), sb = rounded(load(sin + half + i), x);
    store(x + i, backwards ? ac + rounded(b * sb, x) : ac - rounded(b * sa, x));
    store(x + half + i, backwards ? bc - rounded(a * sa, x) : bc + rounded(a * sb, x));
  }
}

// Turns x [n, heads, d] by cos and sin [n, d], in x's dtype or fp32.
void rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool back) {
  check_rows(x, x, "x");
  STD_TORCH_CHECK(x.dim() == 3 && x.size(2) % 2 == 0, "x is not [n, heads, d] with an even d");
  check_vector(cos, x.size(0) * x.size(2), cos.scalar_type(), "cos");
  check_vector(sin, x.size(0) * x.size(2), cos.scalar_type(), "sin");
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> of = rows_of<T>(x);
    const int64_t heads = of.inner, d = of.width;
    const bool avx512 = path() >= Path::avx512;
    by_dtype(cos, [&](auto other) {
      using C = decltype(other);
      const auto* c = static_cast<const C*>(cos.const_data_ptr());
      const auto* s = static_cast<const C*>(sin.const_data_ptr());
      auto* const step = back ? (avx512 ? &turn_avx512<T, C, true> : &turn<T, C, true>) : (avx512 ? &turn_avx512<T, C, false> : &turn<T, C, false>);
      over_rows(x.size(0), heads * d, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row)
          for (int64_t head = 0; head < heads; ++head) step(of[row * heads + head], c + row * d, s + row * d, d / 2);
      });
    });
  });
}

}  // namespace
}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) { m.def("rotate_(Tensor(a!) x, Tensor cos, Tensor sin, bool back) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CPU, m) { m.impl("rotate_", TORCH_BOX(&xeon::rotate)); }
