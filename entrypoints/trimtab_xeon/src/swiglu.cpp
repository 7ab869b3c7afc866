// SwiGLU (Shazeer 2020, arXiv:2002.05202): silu(gate) * up of rows [gate, up], forward and backward.
#include "exp.h"
#include "rows.h"

namespace xeon {
namespace {

XEON_INLINE __m512 sigmoid16(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f);
  return _mm512_div_ps(one, _mm512_add_ps(one, exp16(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exp_of(-x)); }

template <class T>
XEON_AVX512 void forward_avx512(const T* gate, const T* up, T* act, int64_t width) {
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = until(width - i);
    ahead(gate + i);
    ahead(up + i);
    const __m512 g = load16(gate + i, mask);
    const __m512 silu = rounded16(_mm512_mul_ps(g, sigmoid16(g)), act);
    put16(act + i, _mm512_mul_ps(silu, load16(up + i, mask)), mask);
  }
}

template <class T>
XEON_PORTABLE void forward(const T* gate, const T* up, T* act, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    const float g = load(gate + i);
    store(act + i, rounded(g * sigmoid(g), act) * load(up + i));
  }
}

// silu'(g) = s (1 + g (1 - s)), s = sigmoid(g). d_gate may be gate and d_up may be up.
template <class T>
XEON_AVX512 void backward_avx512(const T* d, const T* gate, const T* up, T* d_gate, T* d_up, T* act, int64_t width) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = until(width - i);
    ahead(gate + i);
    ahead(up + i);
    ahead(d + i);
    const __m512 g = load16(gate + i, mask), u = load16(up + i, mask), above = load16(d + i, mask);
    const __m512 s = sigmoid16(g), silu = _mm512_mul_ps(g, s);
    const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
    put16(act + i, _mm512_mul_ps(rounded16(silu, act), u), mask);
    put16(d_gate + i, _mm512_mul_ps(_mm512_mul_ps(above, u), slope), mask);
    put16(d_up + i, _mm512_mul_ps(above, silu), mask);
  }
}

template <class T>
XEON_PORTABLE void backward(const T* d, const T* gate, const T* up, T* d_gate, T* d_up, T* act, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    const float g = load(gate + i), u = load(up + i), above = load(d + i);
    const float s = sigmoid(g), silu = g * s, slope = s * (1.0f + g * (1.0f - s));
    store(act + i, rounded(silu, act) * u);
    store(d_gate + i, above * u * slope);
    store(d_up + i, above * silu);
  }
}

void check_halves(const Tensor& gate_up, const Tensor& act, const char* name) {
  check_rows(gate_up, gate_up, "gate_up");
  check_rows(act, gate_up, name);
  STD_TORCH_CHECK(gate_up.dim() == 2 && act.dim() == 2 && gate_up.size(0) == act.size(0) && gate_up.size(1) == 2 * act.size(1), name,
                  " [n, f] is not half as wide as gate_up [n, 2 f]");
}

void swiglu(const Tensor& gate_up, const Tensor& act) {
  check_halves(gate_up, act, "act");
  by_dtype(gate_up, [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> from = rows_of<const T>(gate_up);
    const Rows<T> to = rows_of<T>(act);
    const bool avx512 = path() >= Path::avx512;
    auto* const step = avx512 ? &forward_avx512<T> : &forward<T>;
    over_rows(to.count, to.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) step(from[row], from[row] + to.width, to[row], to.width);
    });
  });
}

void swiglu_backward(const Tensor& d, const Tensor& gate_up, const Tensor& d_gate_up, const Tensor& act) {
  check_halves(gate_up, act, "act");
  check_halves(gate_up, d, "d");
  check_rows(d_gate_up, gate_up, "d_gate_up");
  check_same(gate_up, d_gate_up, "d_gate_up");
  by_dtype(gate_up, [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> above = rows_of<const T>(d), from = rows_of<const T>(gate_up);
    const Rows<T> into = rows_of<T>(d_gate_up), again = rows_of<T>(act);
    const bool avx512 = path() >= Path::avx512;
    auto* const step = avx512 ? &backward_avx512<T> : &backward<T>;
    const int64_t width = again.width;
    over_rows(again.count, width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        step(above[row], from[row], from[row] + width, into[row], into[row] + width, again[row], width);
    });
  });
}

}  // namespace
}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) {
  m.def("swiglu(Tensor gate_up, Tensor(a!) act) -> ()");
  m.def("swiglu_backward(Tensor d, Tensor gate_up, Tensor(a!) d_gate_up, Tensor(b!) act) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CPU, m) {
  m.impl("swiglu", TORCH_BOX(&xeon::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&xeon::swiglu_backward));
}
