// RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) forward and backward, rounded where transformers rounds.
#include <cmath>
#include <optional>

#include "rows.h"

namespace xeon {
namespace {

template <class T>
XEON_AVX512 float squares_avx512(const T* x, int64_t width) {
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64)
    for (int part = 0; part < 4; ++part) {
      ahead(x + i + 16 * part);
      const __m512 value = load16(x + i + 16 * part);
      sums[part] = _mm512_fmadd_ps(value, value, sums[part]);
    }
  for (; i < width; i += 16) {
    const __m512 value = load16(x + i, until(width - i));
    sums[0] = _mm512_fmadd_ps(value, value, sums[0]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])));
}

template <class T>
XEON_PORTABLE float squares(const T* x, int64_t width) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const float value = load(x + i + lane);
      sums[lane] += value * value;
    }
  for (; i < width; ++i) sums[0] += load(x + i) * load(x + i);
  float sum = 0;
  for (float part : sums) sum += part;
  return sum;
}

template <class T>
XEON_AVX512 void scale_avx512(const T* x, const T* weight, float rstd, T* y, int64_t width) {
  const __m512 scale = _mm512_set1_ps(rstd);
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = until(width - i);
    const __m512 normed = rounded16(_mm512_mul_ps(load16(x + i, mask), scale), x);
    put16(y + i, _mm512_mul_ps(load16(weight + i, mask), normed), mask);
  }
}

template <class T>
XEON_PORTABLE void scale(const T* x, const T* weight, float rstd, T* y, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) store(y + i, load(weight + i) * rounded(load(x + i) * rstd, x));
}

// The sum of dy * weight * (x * rstd).
template <class T>
XEON_AVX512 float along_avx512(const T* dy, const T* x, const T* weight, float rstd, int64_t width) {
  const __m512 scale = _mm512_set1_ps(rstd);
  __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (int64_t i = 0, part = 0; i < width; i += 16, part ^= 1) {
    const __mmask16 mask = until(width - i);
    ahead(dy + i);
    ahead(x + i);
    const __m512 scaled = _mm512_mul_ps(load16(dy + i, mask), load16(weight + i, mask));
    sums[part] = _mm512_fmadd_ps(scaled, _mm512_mul_ps(load16(x + i, mask), scale), sums[part]);
  }
  return _mm512_reduce_add_ps(_mm512_add_ps(sums[0], sums[1]));
}

template <class T>
XEON_PORTABLE float along(const T* dy, const T* x, const T* weight, float rstd, int64_t width) {
  float sums[16] = {};
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int lane = 0; lane < 16; ++lane) {
      const int64_t at = i + lane;
      sums[lane] += load(dy + at) * load(weight + at) * (load(x + at) * rstd);
    }
  for (; i < width; ++i) sums[0] += load(dy + i) * load(weight + i) * (load(x + i) * rstd);
  float sum = 0;
  for (float part : sums) sum += part;
  return sum;
}

template <class T, bool adds>
XEON_AVX512 void back_avx512(const T* dy, const T* x, const T* weight, const T* add, float rstd, float mean, T* dx, int64_t width) {
  const __m512 scale = _mm512_set1_ps(rstd), along = _mm512_set1_ps(mean);
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = until(width - i);
    const __m512 scaled = _mm512_mul_ps(load16(dy + i, mask), load16(weight + i, mask));
    const __m512 across = _mm512_fnmadd_ps(_mm512_mul_ps(load16(x + i, mask), scale), along, scaled);
    if constexpr (adds) {
      ahead(add + i);
      put16(dx + i, _mm512_fmadd_ps(across, scale, load16(add + i, mask)), mask);
    } else {
      put16(dx + i, _mm512_mul_ps(across, scale), mask);
    }
  }
}

template <class T, bool adds>
XEON_PORTABLE void back(const T* dy, const T* x, const T* weight, const T* add, float rstd, float mean, T* dx, int64_t width) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) {
    const float across = (load(dy + i) * load(weight + i) - (load(x + i) * rstd) * mean) * rstd;
    store(dx + i, adds ? across + load(add + i) : across);
  }
}

// y[row] = weight * round(x[row] rstd[row]), rstd = 1 / sqrt(mean(x^2) + eps). y may be x.
void rms_norm(const Tensor& x, const Tensor& weight, double eps, const Tensor& y, const Tensor& rstd) {
  check_rows(x, x, "x");
  check_rows(y, x, "y");
  check_same(x, y, "y");
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> from = rows_of<const T>(x);
    const Rows<T> to = rows_of<T>(y);
    check_vector(weight, from.width, x.scalar_type(), "weight");
    check_vector(rstd, from.count, ScalarType::Float, "rstd");
    const auto* gain = static_cast<const T*>(weight.const_data_ptr());
    auto* told = static_cast<float*>(rstd.mutable_data_ptr());
    const bool avx512 = path() >= Path::avx512;
    const float width = static_cast<float>(from.width), least = static_cast<float>(eps);
    over_rows(from.count, from.width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T* one = from[row];
        const float sum = avx512 ? squares_avx512(one, from.width) : squares(one, from.width);
        told[row] = 1.0f / std::sqrt(sum / width + least);
        if (avx512)
          scale_avx512(one, gain, told[row], to[row], from.width);
        else
          scale(one, gain, told[row], to[row], from.width);
      }
    });
  });
}

// dx = rstd (dy weight - (x rstd) mean(dy weight x rstd)) + add, rounded once. dx may be dy or add.
void rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& weight, std::optional<Tensor> add,
                       const Tensor& dx) {
  check_rows(x, x, "x");
  check_rows(dy, x, "dy");
  check_same(x, dy, "dy");
  check_rows(dx, x, "dx");
  check_same(x, dx, "dx");
  if (add) {
    check_rows(*add, x, "add");
    check_same(x, *add, "add");
  }
  by_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    const Rows<const T> upstream = rows_of<const T>(dy), from = rows_of<const T>(x), more = rows_of<const T>(add ? *add : x);
    const Rows<T> to = rows_of<T>(dx);
    check_vector(weight, from.width, x.scalar_type(), "weight");
    check_vector(rstd, from.count, ScalarType::Float, "rstd");
    const auto* gain = static_cast<const T*>(weight.const_data_ptr());
    const auto* told = static_cast<const float*>(rstd.const_data_ptr());
    const bool avx512 = path() >= Path::avx512;
    const int64_t width = from.width;
    auto* const step = add ? (avx512 ? &back_avx512<T, true> : &back<T, true>) : (avx512 ? &back_avx512<T, false> : &back<T, false>);
    over_rows(from.count, width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const T *above = upstream[row], *one = from[row];
        const float sum = avx512 ? along_avx512(above, one, gain, told[row], width) : along(above, one, gain, told[row], width);
        step(above, one, gain, more[row], told[row], sum / static_cast<float>(width), to[row], width);
      }
    });
  });
}

}  // namespace
}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float eps, Tensor(a!) y, Tensor(b!) rstd) -> ()");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor rstd, Tensor weight, Tensor? add, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&xeon::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&xeon::rms_norm_backward));
}
