// Attention of packed rows, backward: weights are made again from scores and log-sum-exps.
// Dao et al. 2022, arXiv:2205.14135, appendix B.2.
#include "attention.h"

namespace xeon {
namespace {

// Scores and gradients of weights [keys][kColumns] -> weights and gradients of scores (but for the scale), the latter in both layouts;
// zeros up to the next multiple of T::deep.
template <class T>
XEON_DOT void slope(const float* scores, const float* d_weights, const Block& block, int64_t key, int64_t keys, int64_t left, bool whole,
                    int64_t window, float scale, const float* lse, const float* delta, typename T::Number* weights,
                    typename T::Number* d_scores, uint32_t* below) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2e);
  for (int64_t column = left; column < block.wide; column += 16) {
    const __m512i tokens = _mm512_load_si512(block.tokens + column);
    const __m512 shift = _mm512_load_ps(lse + column), less = _mm512_load_ps(delta + column);
    for (int64_t k = 0; k < keys; k += T::per) {
      __m512 weight[T::per], d_score[T::per];
#pragma GCC unroll 2
      for (int i = 0; i < T::per; ++i) {
        const int64_t at = (k + i) * kColumns + column;
        weight[i] = exp2<T>(_mm512_fmsub_ps(_mm512_load_ps(scores + at), factor, shift));
        d_score[i] = _mm512_mul_ps(weight[i], _mm512_sub_ps(_mm512_load_ps(d_weights + at), less));
        if (!whole) {
          const __mmask16 seen = seeing(tokens, key + k + i, window);
          weight[i] = _mm512_maskz_mov_ps(seen, weight[i]);
          d_score[i] = _mm512_maskz_mov_ps(seen, d_score[i]);
        }
      }
      const int64_t at = k * kColumns + column;
      if constexpr (T::per == 2) {
        __m512i both;
        interleave(weight[0], weight[1], both);
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights + at), _mm512_castsi512_si256(both));
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights + at + kColumns), _mm512_extracti64x4_epi64(both, 1));
        _mm512_store_si512(below + k / 2 * kColumns + column, interleave(d_score[0], d_score[1], both));
        _mm256_store_si256(reinterpret_cast<__m256i*>(d_scores + at), _mm512_castsi512_si256(both));
        _mm256_store_si256(reinterpret_cast<__m256i*>(d_scores + at + kColumns), _mm512_extracti64x4_epi64(both, 1));
      } else {
        _mm512_store_ps(weights + at, weight[0]);
        _mm512_store_ps(d_scores + at, d_score[0]);
      }
    }
    if constexpr (by_tiles<T>)
      for (int64_t k = keys; k < up(keys, T::deep); ++k) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(weights + k * kColumns + column), _mm256_setzero_si256());
        _mm256_store_si256(reinterpret_cast<__m256i*>(d_scores + k * kColumns + column), _mm256_setzero_si256());
        _mm512_store_si512(below + k / 2 * kColumns + column, _mm512_setzero_si512());
      }
  }
}

// sum of d_out * out of each column, and log-sum-exps in powers of two; columns that are none get no weight
template <class T>
XEON_DOT void sums_of(const typename T::Number* const* d_rows, const typename T::Number* const* rows, const Block& block, int64_t width,
                      float* delta) {
  for (int64_t i = 0; i < block.wide; ++i) {
    __m512 sum = _mm512_setzero_ps();
    if (i < block.count)
      for (int64_t j = 0; j < width; j += 16) {
        const __mmask16 mask = static_cast<__mmask16>((1u << std::min<int64_t>(16, width - j)) - 1u);
        sum = _mm512_fmadd_ps(load16(d_rows[i] + j, mask), load16(rows[i] + j, mask), sum);
      }
    delta[i] = _mm512_reduce_add_ps(sum);
  }
}

template <class T>
struct Backward {
  using Number = typename T::Number;
  Call call;
  View<const Number> query, key, value, out, d_out;
  View<Number> dq, dk, dv;
  const float* lse;
  int64_t n;

  static int64_t bytes(const Call& call, int64_t longest) {
    const int64_t rows = up(longest, T::keys), size = static_cast<int64_t>(sizeof(Number));
    const int64_t step = up(call.width, 16), deep = up(call.width, T::deep);
    const int64_t part = 2 * rows * deep * size + 4 * rows / T::per * step + 2 * 4 * rows * step;
    const int64_t columns = 4 * kColumns * (2 * (deep / T::per) + 2 * kKeys + kKeys / T::per + step + 3) +
                            2 * 4 * (kColumns / T::per) * step + 2 * size * kKeys * kColumns + 3 * 8 * kColumns;
    return part + columns + 64 * 24;
  }

  // Adds to d_keys, d_values [sample's rows][step] what the part's columns give; writes their gradient of the query.
  void part(const Sample& sample, const Task& task, Memory& memory, float* d_keys, float* d_values) const {
    const int64_t step = up(call.width, 16), deep = up(call.width, T::deep), size = static_cast<int64_t>(sizeof(Number));
    const int64_t from = block_of<T>(call, sample, task.first, task.last).from, until = (task.last - 1) / call.repeat + 1;
    const int64_t rows = up(until - from, T::keys);
    Number *keys = memory.template take<Number>(rows * deep), *values = memory.template take<Number>(rows * deep);
    uint32_t* keys_below = memory.template take<uint32_t>(rows / T::per * step);
    lay_rows<T>(key, sample, task.head, from, until - from, call.width, keys);
    lay_rows<T>(value, sample, task.head, from, until - from, call.width, values);
    lay_rows_below<T>(key, sample, task.head, from, until - from, call.width, step, keys_below);
    const Number** q_rows = memory.template take<const Number*>(kColumns);
    const Number** d_rows = memory.template take<const Number*>(kColumns);
    const Number** o_rows = memory.template take<const Number*>(kColumns);
    uint32_t* across = memory.template take<uint32_t>(deep / T::per * kColumns);
    uint32_t* d_across = memory.template take<uint32_t>(deep / T::per * kColumns);
    uint32_t* below = memory.template take<uint32_t>(kColumns / T::per * step);
    uint32_t* d_below = memory.template take<uint32_t>(kColumns / T::per * step);
    float *scores = memory.template take<float>(kKeys * kColumns), *d_weights = memory.template take<float>(kKeys * kColumns);
    Number *weights = memory.template take<Number>(kKeys * kColumns), *d_scores = memory.template take<Number>(kKeys * kColumns);
    uint32_t* d_units = memory.template take<uint32_t>(kKeys / T::per * kColumns);
    float* d_query = memory.template take<float>(step * kColumns);
    float *shift = memory.template take<float>(kColumns), *delta = memory.template take<float>(kColumns);
    float* scales = memory.template take<float>(kColumns);
    std::fill_n(scales, kColumns, call.scale);
    for (int64_t first = task.first; first < task.last; first += kColumns) {
      const Block block = block_of<T>(call, sample, first, task.last);
      point<Number>(query, call, sample, block, task.head, q_rows);
      point<Number>(d_out, call, sample, block, task.head, d_rows);
      point<Number>(out, call, sample, block, task.head, o_rows);
      lay_across<T>(q_rows, block.count, call.width, across);
      lay_across<T>(d_rows, block.count, call.width, d_across);
      lay_below<T>(q_rows, block.count, call.width, step, below);
      lay_below<T>(d_rows, block.count, call.width, step, d_below);
      sums_of<T>(d_rows, o_rows, block, call.width, delta);
      for (int64_t i = 0; i < block.wide; ++i) {
        const int64_t column = block.first + i;
        const float* of_head = lse + (task.head * call.repeat + column % call.repeat) * n + sample.begin;
        shift[i] = i < block.count ? kLog2e * of_head[column / call.repeat] : 1e30f;
      }
      for (int64_t key = block.from; key < block.to; key += kKeys) {
        const int64_t count = up(std::min(kKeys, block.to - key), T::per), summed = up(count, T::deep) / T::per;
        const int64_t left = seeing_from<T>(call, block, key), wide = block.wide - left, row = key - from;
        const int64_t depth = (up(block.count, T::deep) - left) / T::per, under = left / T::per * step;
        const bool whole = key + count - 1 <= block.early && (call.window < 0 || key > block.late - call.window);
        const auto natural = [&](const Number* all) {
          return Left{reinterpret_cast<const char*>(all + row * deep), deep * size, 4};
        };
        const auto made = [&](const Number* all) { return Left{reinterpret_cast<const char*>(all + left), kColumns * size, 4}; };
        product<T, false>(count, wide, deep / T::per, natural(keys), {across + left, kColumns}, scores + left, kColumns);
        product<T, false>(count, wide, deep / T::per, natural(values), {d_across + left, kColumns}, d_weights + left, kColumns);
        slope<T>(scores, d_weights, block, key, count, left, whole, call.window, call.scale, shift, delta, weights, d_scores, d_units);
        product<T, true>(count, step, depth, made(weights), {d_below + under, step}, d_values + key * step, step);
        product<T, true>(count, step, depth, made(d_scores), {below + under, step}, d_keys + key * step, step);
        const Left across_keys = turned<T>(keys_below, row, step);
        const Right units{(T::per == 2 ? d_units : reinterpret_cast<const uint32_t*>(d_scores)) + left, kColumns};
        if (key == block.from)
          product<T, false>(call.width, wide, summed, across_keys, units, d_query, kColumns);
        else
          product<T, true>(call.width, wide, summed, across_keys, units, d_query + left, kColumns);
      }
      put_columns<T>(d_query, scales, call, sample, block, task.head, dq);
    }
  }
};

// The sum of `count` sums that lie `apart`, times `scale` -> rows from.. to of a sample in `to`.
template <class Number>
XEON_DOT void put_rows(const float* sums, int64_t count, int64_t apart, int64_t step, float scale, const Sample& sample, int64_t head,
                       int64_t width, int64_t from, int64_t until, const View<Number>& to) {
  for (int64_t row = from; row < until; ++row)
    for (int64_t i = 0; i < width; i += 16) {
      const __mmask16 mask = static_cast<__mmask16>((1u << std::min<int64_t>(16, width - i)) - 1u);
      __m512 sum = _mm512_loadu_ps(sums + row * step + i);
      for (int64_t k = 1; k < count; ++k) sum = _mm512_add_ps(sum, _mm512_loadu_ps(sums + k * apart + row * step + i));
      store16(to.at(sample.begin + row, head) + i, _mm512_mul_ps(sum, _mm512_set1_ps(scale)), mask);
    }
}

template <class T>
void backward(const Tensor& d_out, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse,
              const Tensor& places, double scale, int64_t window, Tensor& dq, Tensor& dk, Tensor& dv) {
  using Number = typename T::Number;
  const Call call = call_of(query, key, value, lse, scale, window);
  for (const Tensor* tensor : {&d_out, &out, static_cast<const Tensor*>(&dq)}) check(*tensor, query, call.heads);
  for (const Tensor* tensor : {&dk, &dv}) check(*tensor, query, call.keys_heads);
  const std::vector<Sample> samples = samples_of(places, query.size(0));
  if (samples.empty()) return;
  const Backward<T> job{call, view<const Number>(query), view<const Number>(key), view<const Number>(value), view<const Number>(out),
                        view<const Number>(d_out), view<Number>(dq), view<Number>(dk), view<Number>(dv),
                        static_cast<const float*>(lse.data_ptr()), query.size(0)};
  const std::vector<Task> tasks = tasks_of(call, samples);
  const int64_t step = up(call.width, 16);
  // keys and values of samples in several parts are summed afterwards, always in the same order
  const auto numbers = [&](const Task& task) { return up(samples[task.sample].length, T::deep) * step; };
  std::vector<int64_t> at(tasks.size());
  int64_t floats = 0;
  for (size_t index = 0; index < tasks.size(); ++index) {
    at[index] = floats;
    if (tasks[index].parts > 1) floats += 2 * numbers(tasks[index]);
  }
  Memory shared(4 * floats);
  float* sums = shared.take<float>(floats);
  const auto put = [&](const Task& task, const float* from, int64_t first, int64_t last) {
    const Sample& sample = samples[task.sample];
    const int64_t apart = 2 * numbers(task);
    put_rows<Number>(from, task.parts, apart, step, call.scale, sample, task.head, call.width, first, last, job.dk);
    put_rows<Number>(from + numbers(task), task.parts, apart, step, 1.0f, sample, task.head, call.width, first, last, job.dv);
  };
  each(static_cast<int64_t>(tasks.size()), [&](std::atomic<int64_t>& next) {
    Memory memory(Backward<T>::bytes(call, samples.front().length));
    [[maybe_unused]] const Registers<T> registers;
    for (size_t index = next++; index < tasks.size(); index = next++) {
      const Task& task = tasks[index];
      memory.give_back();
      float* mine = task.parts == 1 ? memory.take<float>(2 * numbers(task)) : sums + at[index];
      std::fill_n(mine, 2 * numbers(task), 0.0f);
      job.part(samples[task.sample], task, memory, mine, mine + numbers(task));
      if (task.parts == 1) put(task, mine, 0, samples[task.sample].length);
    }
  });
  constexpr int64_t rows = 256;  // that a thread sums at once
  std::vector<std::pair<size_t, int64_t>> left;
  for (size_t index = 0; index < tasks.size(); ++index)
    if (tasks[index].parts > 1 && tasks[index].part == 0)
      for (int64_t first = 0; first < samples[tasks[index].sample].length; first += rows) left.emplace_back(index, first);
  each(static_cast<int64_t>(left.size()), [&](std::atomic<int64_t>& next) {
    for (size_t turn = next++; turn < left.size(); turn = next++) {
      const auto [index, first] = left[turn];
      put(tasks[index], sums + at[index], first, std::min(first + rows, samples[tasks[index].sample].length));
    }
  });
}

void attend_backward(const Tensor d_out, const Tensor query, const Tensor key, const Tensor value, const Tensor out, const Tensor lse,
                     const Tensor places, double scale, int64_t window, Tensor dq, Tensor dk, Tensor dv) {
  const auto by = !is_bf16(query) ? backward<Singles> : path() == Path::amx ? backward<Tiles> : backward<Pairs>;
  by(d_out, query, key, value, out, lse, places, scale, window, dq, dk, dv);
}

}  // namespace
}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) {
  m.def(
      "attend_backward(Tensor d_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor places, float scale, "
      "int window, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CPU, m) { m.impl("attend_backward", TORCH_BOX(&xeon::attend_backward)); }
