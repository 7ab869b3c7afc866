// Attention of packed rows, forward: each sample by itself, blocks of it in cache, only outputs written.
// Dao et al. 2022, arXiv:2205.14135.
#include "attention.h"

namespace xeon {
namespace {

// Scores [keys][kColumns] of keys key.. -> weights relative to each column's maximum so far, as units [keys / per][kColumns], and zeros
// up to the next multiple of T::deep; maxima (of scores) and sums of weights are brought up to date, `faded` is what earlier sums and
// outputs have to be multiplied with. Returns whether that is anything but 1.
template <class T>
XEON_DOT bool weigh(const float* scores, const Block& block, int64_t key, int64_t keys, int64_t left, bool whole, int64_t window,
                    float scale, float* maxima, float* sums, float* faded, uint32_t* weights) {
  const __m512 factor = _mm512_set1_ps(scale * kLog2e);
  bool changed = false;
  for (int64_t column = left; column < block.wide; column += 16) {
    const __m512i tokens = _mm512_load_si512(block.tokens + column);
    const __m512 before = _mm512_load_ps(maxima + column);
    __m512 most = before;
    if (whole)
      for (int64_t k = 0; k < keys; ++k) most = _mm512_max_ps(most, _mm512_load_ps(scores + k * kColumns + column));
    else
      for (int64_t k = 0; k < keys; ++k)
        most = _mm512_mask_max_ps(most, seeing(tokens, key + k, window), most, _mm512_load_ps(scores + k * kColumns + column));
    const __m512 shift = _mm512_mul_ps(most, factor);
    const __m512 fade = exp2<T>(_mm512_mul_ps(_mm512_sub_ps(before, most), factor));
    changed |= _mm512_cmp_ps_mask(before, most, _CMP_NEQ_UQ) != 0;
    __m512 sum = _mm512_mul_ps(_mm512_load_ps(sums + column), fade);
    for (int64_t k = 0; k < keys; k += T::per) {
      __m512 weight[T::per];
#pragma GCC unroll 2
      for (int i = 0; i < T::per; ++i) {
        weight[i] = exp2<T>(_mm512_fmsub_ps(_mm512_load_ps(scores + (k + i) * kColumns + column), factor, shift));
        if (!whole) weight[i] = _mm512_maskz_mov_ps(seeing(tokens, key + k + i, window), weight[i]);
        sum = _mm512_add_ps(sum, weight[i]);
      }
      __m512i units, both;
      if constexpr (T::per == 2)
        units = interleave(weight[0], weight[1], both);
      else
        units = _mm512_castps_si512(weight[0]);
      _mm512_store_si512(weights + k / T::per * kColumns + column, units);
    }
    for (int64_t k = keys; k < up(keys, T::deep); k += T::per)
      _mm512_store_si512(weights + k / T::per * kColumns + column, _mm512_setzero_si512());
    _mm512_store_ps(maxima + column, most);
    _mm512_store_ps(sums + column, sum);
    _mm512_store_ps(faded + column, fade);
  }
  return changed;
}

XEON_DOT void fade(float* out, int64_t width, int64_t left, int64_t right, const float* faded) {
  for (int64_t i = 0; i < width; ++i)
    for (int64_t column = left; column < right; column += 16) {
      float* here = out + i * kColumns + column;
      _mm512_store_ps(here, _mm512_mul_ps(_mm512_load_ps(here), _mm512_load_ps(faded + column)));
    }
}

template <class T>
struct Forward {
  using Number = typename T::Number;
  Call call;
  View<const Number> query, key, value;
  View<Number> out;
  float* lse;  // [heads, n]
  int64_t n;

  // of `part` and, beyond that, `columns`
  static int64_t bytes(const Call& call, int64_t longest) {
    const int64_t rows = up(longest, T::keys), size = static_cast<int64_t>(sizeof(Number));
    const int64_t step = up(call.width, 16), deep = up(call.width, T::deep);
    const int64_t part = rows * deep * size + 4 * rows / T::per * step;
    const int64_t columns = 4 * kColumns * (deep / T::per + kKeys + kKeys / T::per + step + 3) + 8 * kColumns;
    return part + columns + 64 * 10;
  }

  void part(const Sample& sample, const Task& task, Memory& memory) const {
    const int64_t step = up(call.width, 16), deep = up(call.width, T::deep), size = static_cast<int64_t>(sizeof(Number));
    const int64_t from = block_of<T>(call, sample, task.first, task.last).from, until = (task.last - 1) / call.repeat + 1;
    const int64_t rows = up(until - from, T::keys);
    Number* keys = memory.template take<Number>(rows * deep);
    uint32_t* values = memory.template take<uint32_t>(rows / T::per * step);
    lay_rows<T>(key, sample, task.head, from, until - from, call.width, keys);
    lay_rows_below<T>(value, sample, task.head, from, until - from, call.width, step, values);
    const Number** pointers = memory.template take<const Number*>(kColumns);
    uint32_t* across = memory.template take<uint32_t>(deep / T::per * kColumns);
    float* scores = memory.template take<float>(kKeys * kColumns);
    uint32_t* weights = memory.template take<uint32_t>(kKeys / T::per * kColumns);
    float* sum = memory.template take<float>(step * kColumns);
    float *maxima = memory.template take<float>(kColumns), *sums = memory.template take<float>(kColumns);
    float* faded = memory.template take<float>(kColumns);
    for (int64_t first = task.first; first < task.last; first += kColumns) {
      const Block block = block_of<T>(call, sample, first, task.last);
      point<Number>(query, call, sample, block, task.head, pointers);
      lay_across<T>(pointers, block.count, call.width, across);
      std::fill_n(maxima, kColumns, -1e30f);
      std::fill_n(sums, kColumns, 0.0f);
      for (int64_t key = block.from; key < block.to; key += kKeys) {
        const int64_t count = up(std::min(kKeys, block.to - key), T::per), summed = up(count, T::deep) / T::per;
        const int64_t left = seeing_from<T>(call, block, key), wide = block.wide - left;
        const bool whole = key + count - 1 <= block.early && (call.window < 0 || key > block.late - call.window);
        const Left natural{reinterpret_cast<const char*>(keys + (key - from) * deep), deep * size, 4};
        product<T, false>(count, wide, deep / T::per, natural, {across + left, kColumns}, scores + left, kColumns);
        const bool changed = weigh<T>(scores, block, key, count, left, whole, call.window, call.scale, maxima, sums, faded, weights);
        const Left across_keys = turned<T>(values, key - from, step);
        if (key == block.from) {
          product<T, false>(call.width, wide, summed, across_keys, {weights, kColumns}, sum, kColumns);
        } else {
          if (changed) fade(sum, call.width, left, block.wide, faded);
          product<T, true>(call.width, wide, summed, across_keys, {weights + left, kColumns}, sum + left, kColumns);
        }
      }
      for (int64_t i = 0; i < block.count; ++i) {
        const int64_t column = block.first + i;
        lse[(task.head * call.repeat + column % call.repeat) * n + sample.begin + column / call.repeat] =
            maxima[i] * call.scale + std::log(sums[i]);
      }
      for (int64_t i = 0; i < kColumns; ++i) faded[i] = 1.0f / sums[i];
      put_columns<T>(sum, faded, call, sample, block, task.head, out);
    }
  }
};

template <class T>
void forward(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& places, double scale, int64_t window, Tensor& out,
             Tensor& lse) {
  using Number = typename T::Number;
  const Call call = call_of(query, key, value, lse, scale, window);
  check(out, query, call.heads);
  const std::vector<Sample> samples = samples_of(places, query.size(0));
  if (samples.empty()) return;
  const Forward<T> job{call, view<const Number>(query), view<const Number>(key), view<const Number>(value), view<Number>(out),
                       static_cast<float*>(lse.data_ptr()), query.size(0)};
  const std::vector<Task> tasks = tasks_of(call, samples);
  each(static_cast<int64_t>(tasks.size()), [&](std::atomic<int64_t>& next) {
    Memory memory(Forward<T>::bytes(call, samples.front().length));
    [[maybe_unused]] const Registers<T> registers;
    for (size_t index = next++; index < tasks.size(); index = next++) {
      memory.give_back();
      job.part(samples[tasks[index].sample], tasks[index], memory);
    }
  });
}

bool attend_takes(bool bf16) { return takes(bf16); }

void attend(const Tensor query, const Tensor key, const Tensor value, const Tensor places, double scale, int64_t window, Tensor out,
            Tensor lse) {
  const auto by = !is_bf16(query) ? forward<Singles> : path() == Path::amx ? forward<Tiles> : forward<Pairs>;
  by(query, key, value, places, scale, window, out, lse);
}

}  // namespace
}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) {
  m.def("attend_takes(bool bf16) -> bool");
  m.def("attend(Tensor query, Tensor key, Tensor value, Tensor places, float scale, int window, Tensor(a!) out, Tensor(b!) lse) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CompositeExplicitAutograd, m) { m.impl("attend_takes", TORCH_BOX(&xeon::attend_takes)); }

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CPU, m) { m.impl("attend", TORCH_BOX(&xeon::attend)); }
