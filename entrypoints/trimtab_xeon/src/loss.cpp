// Losses of rows of logits, whose gradient takes the logits' place: each row is read three times, while it is in cache, and written once.
#include <cmath>
#include <limits>
#include <vector>

#include "exp.h"
#include "rows.h"

namespace xeon {
namespace {

// A row's softmax is exp(x - largest) / sum. A NaN in the row makes the sum NaN, and so does an infinite largest number.
struct Softmax {
  float largest, sum;

  double log_of(float logit) const { return static_cast<double>(logit) - largest - std::log(static_cast<double>(sum)); }
};

template <class T>
XEON_AVX512 Softmax softmax_avx512(const T* x, int64_t width) {
  const __m512 none = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  __m512 most[4] = {none, none, none, none};
  int64_t i = 0;
  for (; i + 64 <= width; i += 64)
    for (int part = 0; part < 4; ++part) {
      ahead(x + i + 16 * part);
      most[part] = _mm512_max_ps(most[part], load16(x + i + 16 * part));
    }
  for (; i < width; i += 16) {
    const __mmask16 mask = until(width - i);
    most[0] = _mm512_mask_max_ps(most[0], mask, most[0], load16(x + i, mask));
  }
  const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
  const __m512 shift = _mm512_set1_ps(largest);
  __m512 sums[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
  for (i = 0; i + 64 <= width; i += 64)
    for (int part = 0; part < 4; ++part) sums[part] = _mm512_add_ps(sums[part], exp16(_mm512_sub_ps(load16(x + i + 16 * part), shift)));
  for (; i < width; i += 16) {
    const __mmask16 mask = until(width - i);
    sums[0] = _mm512_mask_add_ps(sums[0], mask, sums[0], exp16(_mm512_sub_ps(load16(x + i, mask), shift)));
  }
  return {largest, _mm512_reduce_add_ps(_mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3])))};
}

template <class T>
XEON_PORTABLE Softmax softmax(const T* x, int64_t width) {
  float most[16];
  std::fill(most, most + 16, -std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + 16 <= width; i += 16)
    for (int lane = 0; lane < 16; ++lane) most[lane] = std::max(most[lane], load(x + i + lane));
  for (; i < width; ++i) most[0] = std::max(most[0], load(x + i));
  const float largest = *std::max_element(most, most + 16);
  float sums[16] = {};
  for (i = 0; i + 16 <= width; i += 16)
    for (int lane = 0; lane < 16; ++lane) sums[lane] += exp_of(load(x + i + lane) - largest);
  for (; i < width; ++i) sums[0] += exp_of(load(x + i) - largest);
  float sum = 0;
  for (float part : sums) sum += part;
  return {largest, sum};
}

// x becomes factor * exp(x - largest).
template <class T>
XEON_AVX512 void spread_avx512(T* x, int64_t width, float largest, float factor) {
  const __m512 shift = _mm512_set1_ps(largest), times = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < width; i += 16) {
    const __mmask16 mask = until(width - i);
    put16(x + i, _mm512_mul_ps(exp16(_mm512_sub_ps(load16(x + i, mask), shift)), times), mask);
  }
}

template <class T>
XEON_PORTABLE void spread(T* x, int64_t width, float largest, float factor) {
#pragma GCC ivdep
  for (int64_t i = 0; i < width; ++i) store(x + i, exp_of(load(x + i) - largest) * factor);
}

void check_ids(const Tensor& ids, int64_t rows, int64_t each, int64_t vocabulary) {
  check_vector(ids, rows * each, ScalarType::Long, "the tokens' ids");
  const auto* id = static_cast<const int64_t*>(ids.const_data_ptr());
  for (int64_t i = 0; i < rows * each; ++i)
    STD_TORCH_CHECK(id[i] >= 0 && id[i] < vocabulary, "token ", id[i], " is outside the vocabulary of ", vocabulary);
}

// losses[row] = -log softmax(x)[target]; x becomes scale (softmax - onehot).
void cross_entropy(const Tensor& logits, const Tensor& targets, double scale, const Tensor& losses) {
  check_rows(logits, logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2, "logits are not [n, vocabulary]");
  const int64_t n = logits.size(0), width = logits.size(1);
  check_ids(targets, n, 1, width);
  check_vector(losses, n, ScalarType::Float, "losses");
  const auto* wanted = static_cast<const int64_t*>(targets.const_data_ptr());
  auto* told = static_cast<float*>(losses.mutable_data_ptr());
  by_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> of = rows_of<T>(logits);
    const bool avx512 = path() >= Path::avx512;
    const auto times = static_cast<float>(scale);
    over_rows(n, width, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        T *x = of[row], *one = x + wanted[row];
        const Softmax found = avx512 ? softmax_avx512(x, width) : softmax(x, width);
        const double log_chance = found.log_of(load(one));
        (avx512 ? &spread_avx512<T> : &spread<T>)(x, width, found.largest, times / found.sum);
        told[row] = static_cast<float>(-log_chance);
        store(one, times * static_cast<float>(std::expm1(log_chance)));
      }
    });
  });
}

double x_log_y(double x, double y) { return x == 0 && !std::isnan(y) ? 0 : x * std::log(y); }

// Divergence from a teacher's k likeliest tokens and the rest as one event; x becomes scale times its gradient.
void divergence(const Tensor& logits, const Tensor& ids, const Tensor& chances, double scale, const Tensor& losses) {
  check_rows(logits, logits, "logits");
  STD_TORCH_CHECK(logits.dim() == 2 && ids.dim() == 2 && ids.size(0) == logits.size(0), "logits [n, vocabulary] and ids [n, k] do not fit");
  const int64_t n = logits.size(0), width = logits.size(1), k = ids.size(1);
  check_ids(ids, n, k, width);
  check_vector(chances, n * k, ScalarType::Float, "chances");
  check_vector(losses, n, ScalarType::Float, "losses");
  const auto* all_ids = static_cast<const int64_t*>(ids.const_data_ptr());
  const auto* all_chances = static_cast<const float*>(chances.const_data_ptr());
  auto* told = static_cast<float*>(losses.mutable_data_ptr());
  by_dtype(logits, [&](auto zero) {
    using T = decltype(zero);
    const Rows<T> of = rows_of<T>(logits);
    const bool avx512 = path() >= Path::avx512;
    over_rows(n, width, [&](int64_t begin, int64_t end) {
      std::vector<double> p(static_cast<size_t>(k));
      for (int64_t row = begin; row < end; ++row) {
        T* x = of[row];
        const int64_t* id = all_ids + row * k;
        const float* q = all_chances + row * k;
        const Softmax found = avx512 ? softmax_avx512(x, width) : softmax(x, width);
        double loss = 0, q_rest = 1, p_rest = 1;
        for (int64_t i = 0; i < k; ++i) {
          const double log_p = found.log_of(load(x + id[i]));
          p[i] = std::exp(log_p);
          loss += x_log_y(q[i], q[i]) - q[i] * log_p;
          q_rest -= q[i];
          p_rest -= p[i];
        }
        q_rest = q_rest < 0 ? 0 : q_rest;  // a NaN stays
        p_rest = p_rest < 1e-6 ? 1e-6 : p_rest;
        told[row] = static_cast<float>(loss + x_log_y(q_rest, q_rest) - x_log_y(q_rest, p_rest));
        const double factor = scale * (1 - q_rest / p_rest) / found.sum;
        (avx512 ? &spread_avx512<T> : &spread<T>)(x, width, found.largest, static_cast<float>(factor));
        for (int64_t i = 0; i < k; ++i) store(x + id[i], static_cast<float>(scale * (p[i] - q[i])));
      }
    });
  });
}

}  // namespace
}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) {
  m.def("cross_entropy_(Tensor(a!) logits, Tensor targets, float scale, Tensor(b!) losses) -> ()");
  m.def("divergence_(Tensor(a!) logits, Tensor ids, Tensor chances, float scale, Tensor(b!) losses) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CPU, m) {
  m.impl("cross_entropy_", TORCH_BOX(&xeon::cross_entropy));
  m.impl("divergence_", TORCH_BOX(&xeon::divergence));
}
