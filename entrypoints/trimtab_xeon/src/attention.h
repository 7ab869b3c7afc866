// What both directions of attention have in common: samples, blocks of them, and the parts in which they are computed.
//
// A block has keys as rows and (token, head) pairs of queries as columns, 16 to a register, so that a column's maximum, sum and mask are
// lanes of registers, and weights are made where the next products take them. Query heads that share a key head stand side by side.
#pragma once

#include "blocks.h"

#include <cmath>
#include <vector>

namespace xeon {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

struct Call {
  int64_t heads, keys_heads, repeat, width, window;  // window < 0: none
  float scale;
};

struct Sample {
  int64_t begin, length;
};

struct Block {  // columns of one sample and key head
  int64_t first, count, wide;  // wide: count up to T::columns
  int64_t from, to;            // keys that any of them sees
  int64_t early, late;         // its first and last token
  alignas(64) int32_t tokens[kColumns];
};

// The first column, in steps of T::columns, that sees a key or any after it: those before it are left out.
template <class T>
int64_t seeing_from(const Call& call, const Block& block, int64_t key) {
  return std::max<int64_t>(0, key * call.repeat - block.first) / T::columns * T::columns;
}

template <class T>
Block block_of(const Call& call, const Sample& sample, int64_t first, int64_t last) {
  Block block;
  block.first = first;
  block.count = std::min(kColumns, last - first);
  block.wide = up(block.count, T::columns);
  for (int64_t i = 0; i < block.wide; ++i)  // columns that are none stand where the last one does
    block.tokens[i] = static_cast<int32_t>((first + std::min(i, block.count - 1)) / call.repeat);
  block.early = block.tokens[0];
  block.late = block.tokens[block.count - 1];
  block.from = call.window < 0 ? 0 : std::max<int64_t>(0, block.early - call.window + 1) / T::keys * T::keys;
  block.to = std::min(block.late + 1, sample.length);
  return block;
}

// Which of 16 columns, by their tokens, see a key: it is not after them, nor `window` or more before them.
XEON_DOT_INLINE __mmask16 seeing(__m512i tokens, int64_t key, int64_t window) {
  const __m512i place = _mm512_set1_epi32(static_cast<int32_t>(key));
  const __mmask16 seen = _mm512_cmple_epi32_mask(place, tokens);
  if (window < 0) return seen;
  return _mm512_mask_cmpgt_epi32_mask(seen, place, _mm512_sub_epi32(tokens, _mm512_set1_epi32(static_cast<int32_t>(window))));
}

template <class Number>
struct View {  // [n, heads, width]
  Number* data;
  int64_t token, head;
  Number* at(int64_t place, int64_t which) const { return data + place * token + which * head; }
};

template <class Number>
View<Number> view(const Tensor& tensor) {
  return {reinterpret_cast<Number*>(tensor.data_ptr()), tensor.stride(0), tensor.stride(1)};
}

template <class Number>
void point(const View<const Number>& view, const Call& call, const Sample& sample, const Block& block, int64_t key_head,
           const Number** rows) {
  for (int64_t i = 0; i < block.count; ++i) {
    const int64_t column = block.first + i;
    rows[i] = view.at(sample.begin + column / call.repeat, key_head * call.repeat + column % call.repeat);
  }
}

// The rows of a part's keys or values from `from` on, `count` of them and zeros up to T::deep, as they are: [rows][width up to T::deep].
template <class T>
void lay_rows(const View<const typename T::Number>& view, const Sample& sample, int64_t head, int64_t from, int64_t count, int64_t width,
              typename T::Number* to) {
  const int64_t deep = up(width, T::deep);
  for (int64_t i = 0; i < count; ++i) {
    std::copy_n(view.at(sample.begin + from + i, head), width, to + i * deep);
    std::fill_n(to + i * deep + width, deep - width, typename T::Number(0));
  }
  std::fill_n(to + count * deep, (up(count, T::deep) - count) * deep, typename T::Number(0));
}

// The same rows below each other (lay_below), or for tiles each kKeys of them turned, of the last as many as there are up to T::deep.
template <class T>
void lay_rows_below(const View<const typename T::Number>& view, const Sample& sample, int64_t head, int64_t from, int64_t count,
                    int64_t width, int64_t step, uint32_t* to) {
  const typename T::Number* rows[kKeys];
  for (int64_t first = 0; first < count; first += kKeys) {
    const int64_t some = std::min(kKeys, count - first);
    for (int64_t i = 0; i < some; ++i) rows[i] = view.at(sample.begin + from + first + i, head);
    (by_tiles<T> ? lay_turned<T> : lay_below<T>)(rows, some, width, step, to + first / T::per * step);
  }
}

// What lay_rows_below made, as a product's left side [step][keys] from row `row` on, for tiles a multiple of kKeys.
template <class T>
Left turned(const uint32_t* below, int64_t row, int64_t step) {
  const char* data = reinterpret_cast<const char*>(below + row / T::per * step);
  if constexpr (by_tiles<T>) return {data, 4 * kKeys / T::per, 4};
  return {data, 4, 4 * step};
}

// Columns [width][kColumns] fp32, times a factor of their own -> rows of numbers.
template <class T>
XEON_DOT void put_columns(const float* from, const float* factor, const Call& call, const Sample& sample, const Block& block,
                          int64_t key_head, const View<typename T::Number>& to) {
  for (int64_t column = 0; column < block.count; column += 16) {
    const __m512 times = _mm512_loadu_ps(factor + column);
    for (int64_t i = 0; i < call.width; i += 16) {
      const int64_t there = std::min<int64_t>(16, call.width - i);
      __m512i numbers[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j)
        numbers[j] = j < there ? _mm512_castps_si512(_mm512_mul_ps(_mm512_loadu_ps(from + (i + j) * kColumns + column), times))
                               : _mm512_setzero_si512();
      transpose(numbers);
      const __mmask16 mask = static_cast<__mmask16>((1u << there) - 1u);
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j) {
        if (column + j >= block.count) continue;
        const int64_t place = block.first + column + j;
        auto* here = to.at(sample.begin + place / call.repeat, key_head * call.repeat + place % call.repeat) + i;
        store16(here, _mm512_castsi512_ps(numbers[j]), mask);
      }
    }
  }
}

inline std::vector<Sample> samples_of(const Tensor& places, int64_t n) {
  STD_TORCH_CHECK(places.dim() == 2 && places.size(1) == 2 && places.scalar_type() == ScalarType::Long && places.is_contiguous(),
                  "places are [samples, 2] int64: begin and length");
  const int64_t* numbers = static_cast<const int64_t*>(places.data_ptr());
  std::vector<Sample> samples;
  for (int64_t i = 0; i < places.size(0); ++i) {
    const int64_t begin = numbers[2 * i], length = numbers[2 * i + 1];
    STD_TORCH_CHECK(begin >= 0 && length > 0 && length <= n - begin, "a sample lies outside the row");
    samples.push_back({begin, length});
  }
  std::stable_sort(samples.begin(), samples.end(), [](const Sample& one, const Sample& other) { return one.length > other.length; });
  return samples;
}

inline void check(const Tensor& tensor, const Tensor& like, int64_t heads) {
  STD_TORCH_CHECK(tensor.dim() == 3 && tensor.size(0) == like.size(0) && tensor.size(1) == heads && tensor.size(2) == like.size(2) &&
                      tensor.stride(2) == 1 && tensor.scalar_type() == like.scalar_type() && tensor.is_cpu(),
                  "attention takes [n, heads, width] on the CPU, of one dtype and width, a head's numbers side by side");
}

inline Call call_of(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& lse, double scale, int64_t window) {
  STD_TORCH_CHECK(query.dim() == 3 && key.dim() == 3, "attention takes [n, heads, width]");
  const int64_t heads = query.size(1), keys_heads = key.size(1);
  check(query, query, heads);
  check(key, query, keys_heads);
  check(value, query, keys_heads);
  STD_TORCH_CHECK(keys_heads > 0 && heads % keys_heads == 0, "the heads of keys do not divide those of queries");
  STD_TORCH_CHECK(query.size(2) > 0 && query.size(2) % 2 == 0 && scale > 0, "attention takes an even width and a scale above 0");
  STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == heads && lse.size(1) == query.size(0) && lse.is_contiguous() &&
                      lse.scalar_type() == ScalarType::Float && lse.is_cpu(),
                  "log-sum-exps are [heads, n] in fp32, contiguous");
  return {heads, keys_heads, heads / keys_heads, query.size(2), window, static_cast<float>(scale)};
}

// Columns first.. to last of a sample and key head: what a thread computes at once. Parts `part` of `parts` of equal cost.
struct Task {
  size_t sample;
  int64_t head, first, last, part, parts;
};

// A sample's columns are split where whole samples and heads would leave threads idle: each part lays out its keys anew.
// Four tasks for each thread balance few threads best; many get one each, for the backward pass keeps sums for every part of a sample.
inline std::vector<Task> tasks_of(const Call& call, const std::vector<Sample>& samples) {
  const double threads = torch::stable::get_num_threads();
  double all = 0;
  for (const Sample& sample : samples) all += static_cast<double>(sample.length) * static_cast<double>(sample.length);
  const double most = all * static_cast<double>(call.keys_heads) / (threads * std::clamp(16 / threads, 1.0, 4.0));
  std::vector<Task> tasks;
  for (size_t i = 0; i < samples.size(); ++i) {
    const int64_t columns = samples[i].length * call.repeat, blocks = (columns + kColumns - 1) / kColumns;
    const double cost = static_cast<double>(samples[i].length) * static_cast<double>(samples[i].length);
    const int64_t parts = std::clamp<int64_t>(static_cast<int64_t>(std::ceil(cost / most)), 1, (blocks + 3) / 4);
    for (int64_t head = 0; head < call.keys_heads; ++head) {
      int64_t first = 0;
      for (int64_t part = 0; part < parts; ++part) {  // a block costs as much as it has keys, so parts of equal cost end at square roots
        const double share = static_cast<double>(part + 1) / static_cast<double>(parts);
        const int64_t ends = static_cast<int64_t>(std::llround(static_cast<double>(blocks) * (call.window < 0 ? std::sqrt(share) : share)));
        const int64_t last = part + 1 == parts ? columns : std::min(columns, ends * kColumns);
        tasks.push_back({i, head, first, last, part, parts});
        first = last;
      }
    }
  }
  return tasks;
}

// Whether attention takes bf16 (else fp32) here.
inline bool takes(bool bf16) {
  return path() == Path::amx || (path() == Path::avx512 && (!bf16 || __builtin_cpu_supports("avx512bf16")));
}

inline bool is_bf16(const Tensor& query) {
  const bool bf16 = query.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK((bf16 || query.scalar_type() == ScalarType::Float) && takes(bf16),
                  "attention takes fp32 where there is AVX-512, and bf16 where there is AVX512-BF16");
  return bf16;
}

}  // namespace
}  // namespace xeon
