// NF4 in bitsandbytes' storage format, both ways. Two codes a byte, the earlier in the high half; a scale (the largest magnitude) for each 64
// numbers in the order of memory, across rows; the scales themselves as 8-bit codes with a scale for each 256 of them, less their mean.
// Bit-equal to bitsandbytes 0.50.2: the same fp32 operations in the same order. A block has 16 possible products code * scale, so these are
// made and rounded once, and each number is looked up.
#include <bit>
#include <limits>
#include <optional>

#include "avx512.h"

namespace xeon {
namespace {

constexpr int64_t BLOCK = 64;
constexpr float SMALLEST = 1e-38f;  // what bitsandbytes divides a smaller block by

// Dettmers et al. 2023, arXiv:2305.14314, appendix E
constexpr float CODE[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};

constexpr float bound(int i) { return i < 15 ? (CODE[i] + CODE[i + 1]) / 2 : std::numeric_limits<float>::infinity(); }

struct Bounds {
  float at[16];
  constexpr Bounds() : at{} {
    for (int i = 0; i < 16; ++i) at[i] = bound(i);
  }
};
constexpr Bounds BOUNDS;

struct Scales {
  const float* plain;    // one a block, or null where they are quantised:
  const uint8_t* codes;  // one a block
  const float* book;     // [256]
  const float* of_codes;
  float offset;
  int shift;  // log2 of how many codes share one of of_codes

  float at(int64_t block) const {
    if (plain) return plain[block];
    const float product = book[codes[block]] * of_codes[block >> shift];
    return product + offset;
  }
};

// What a code stands for in a block; `twice` rounds to bf16 before fp32 is written, as a weight kept in bf16 would be.
inline void number(uint16_t* to, float product, bool) { *to = to_bf16(product); }
inline void number(float* to, float product, bool twice) { *to = twice ? from_bf16(to_bf16(product)) : product; }

// Numbers [first, last) of the whole, to out[first] and so on; `first` begins a block.
template <typename Out>
void dequantise_portable(const uint8_t* packed, const Scales& scales, Out* out, int64_t first, int64_t last, bool twice) {
  for (int64_t begin = first; begin < last; begin += BLOCK) {
    const float scale = scales.at(begin / BLOCK);
    Out table[16];
    for (int i = 0; i < 16; ++i) number(&table[i], CODE[i] * scale, twice);
    const int64_t end = begin + BLOCK < last ? begin + BLOCK : last;
    int64_t i = begin;
    for (; i + 1 < end; i += 2) {
      const uint8_t byte = packed[i / 2];
      out[i] = table[byte >> 4];
      out[i + 1] = table[byte & 15];
    }
    if (i < end) out[i] = table[packed[i / 2] >> 4];
  }
}

XEON_AVX512 void dequantise_avx512(const uint8_t* packed, const Scales& scales, uint16_t* out, int64_t first, int64_t last, bool, bool stream) {
  const __m512 code = _mm512_loadu_ps(CODE);
  for (int64_t block = first; block < last; ++block) {
    // 32 words, the 16 twice: the lookup reads five bits, of which the fifth may be anything
    const __m512i table = _mm512_broadcast_i64x4(round_bf16(_mm512_mul_ps(code, _mm512_set1_ps(scales.at(block)))));
    for (int half = 0; half < 2; ++half) {
      const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + block * 32 + half * 16)));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
      const __m512i numbers = _mm512_permutexvar_epi16(index, table);
      auto* to = reinterpret_cast<__m512i*>(out + block * BLOCK + half * 32);
      if (stream) {
        _mm512_stream_si512(to, numbers);
      } else {
        _mm512_storeu_si512(to, numbers);
      }
    }
  }
}

XEON_AVX512 void dequantise_avx512(const uint8_t* packed, const Scales& scales, float* out, int64_t first, int64_t last, bool twice, bool stream) {
  const __m512 code = _mm512_loadu_ps(CODE);
  for (int64_t block = first; block < last; ++block) {
    __m512 table = _mm512_mul_ps(code, _mm512_set1_ps(scales.at(block)));
    if (twice) table = widen(round_bf16(table));
    for (int part = 0; part < 4; ++part) {
      const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + block * 32 + part * 8)));
      const __m512i index = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
      const __m512 numbers = _mm512_permutexvar_ps(index, table);
      float* to = out + block * BLOCK + part * 16;
      if (stream) {
        _mm512_stream_ps(to, numbers);
      } else {
        _mm512_storeu_ps(to, numbers);
      }
    }
  }
}

template <typename Out>
void dequantise_into(const Tensor& packed, const Scales& scales, Tensor& out, bool twice, int64_t stream_from) {
  const auto* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  auto* to = static_cast<Out*>(out.mutable_data_ptr());
  const int64_t n = out.numel(), blocks = n / BLOCK, size = sizeof(Out);
  const int64_t gap = out.is_contiguous() ? 0 : out.stride(0) - out.size(1);  // between rows, which are whole blocks then
  const int64_t blocks_a_row = gap ? out.size(1) / BLOCK : blocks;
  const bool wide = path() >= Path::avx512;
  // past the caches and not through them, which would read each line before it is overwritten; whole lines only
  const bool stream = wide && n * size >= stream_from && reinterpret_cast<uintptr_t>(to) % 64 == 0 && gap * size % 64 == 0;
  torch::stable::parallel_for(0, blocks, 1024, [&](int64_t first, int64_t last) {
    while (first < last) {
      const int64_t row = first / blocks_a_row;
      const int64_t end = (row + 1) * blocks_a_row < last ? (row + 1) * blocks_a_row : last;
      if (wide) {
        dequantise_avx512(from, scales, to + row * gap, first, end, twice, stream);
      } else {
        dequantise_portable(from, scales, to + row * gap, first * BLOCK, end * BLOCK, twice);
      }
      first = end;
    }
    if (stream) _mm_sfence();  // before another thread is told that it is there
  });
  dequantise_portable(from, scales, to, blocks * BLOCK, n, twice);
}

void dequantise(Tensor packed, Tensor absmax, std::optional<Tensor> book, std::optional<Tensor> of_codes, std::optional<Tensor> offset,
                int64_t codes_a_scale, Tensor out, bool twice, int64_t stream_from) {
  const int64_t n = out.numel(), blocks = (n + BLOCK - 1) / BLOCK;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == (n + 1) / 2,
                  "packed must be contiguous uint8, two codes a byte: ", (n + 1) / 2, " bytes for ", n, " numbers, not ", packed.numel());
  STD_TORCH_CHECK(absmax.is_contiguous() && absmax.numel() == blocks, "absmax must have one number a block of 64: ", blocks, ", not ", absmax.numel());
  STD_TORCH_CHECK(out.is_contiguous() || (out.dim() == 2 && out.stride(1) == 1 && out.stride(0) >= out.size(1) && out.size(1) % BLOCK == 0),
                  "out must be contiguous, or rows of whole blocks of 64");
  Scales scales{};
  if (book.has_value()) {
    STD_TORCH_CHECK(of_codes.has_value() && offset.has_value() && codes_a_scale > 0 && std::has_single_bit(static_cast<uint64_t>(codes_a_scale)),
                    "quantised scales need their own scales, an offset, and a power of two as block");
    STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Byte && book->scalar_type() == ScalarType::Float && book->is_contiguous() &&
                        book->numel() == 256 && of_codes->scalar_type() == ScalarType::Float && of_codes->is_contiguous() &&
                        of_codes->numel() == (blocks + codes_a_scale - 1) / codes_a_scale && offset->scalar_type() == ScalarType::Float &&
                        offset->numel() == 1,
                    "quantised scales are uint8 with 256 fp32 values, one fp32 scale for ", codes_a_scale, " of them and one fp32 offset");
    scales.codes = static_cast<const uint8_t*>(absmax.const_data_ptr());
    scales.book = static_cast<const float*>(book->const_data_ptr());
    scales.of_codes = static_cast<const float*>(of_codes->const_data_ptr());
    scales.offset = *static_cast<const float*>(offset->const_data_ptr());
    scales.shift = std::countr_zero(static_cast<uint64_t>(codes_a_scale));
  } else {
    STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float, "absmax must be fp32 where it is not quantised");
    scales.plain = static_cast<const float*>(absmax.const_data_ptr());
  }
  if (out.scalar_type() == ScalarType::BFloat16) {
    dequantise_into<uint16_t>(packed, scales, out, twice, stream_from);
  } else {
    STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float, "out must be bf16 or fp32");
    dequantise_into<float>(packed, scales, out, twice, stream_from);
  }
}

// How many bounds lie below v: its code. A NaN lies above all, as in torch's bucketize.
inline uint8_t code_of(float v) {
  int i = 0;
  for (int step = 8; step; step /= 2) i += !(BOUNDS.at[i + step - 1] >= v) ? step : 0;
  return static_cast<uint8_t>(i);
}

// The largest magnitude: the bits of fp32 without their sign are ordered as the numbers are, with NaN above all.
template <typename In>
float largest_portable(const In* from, int64_t count) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto magnitude = static_cast<int32_t>(std::bit_cast<uint32_t>(load(from + i)) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
  }
  return std::bit_cast<float>(largest);
}

inline float divisor(float largest) { return largest < SMALLEST ? SMALLEST : largest; }

// A whole block is multiplied by the reciprocal; what is left behind the last one is divided, and its scale is the divisor.
template <typename In>
void quantise_portable(const In* from, uint8_t* packed, float* absmax, int64_t first, int64_t last) {
  for (int64_t block = first; block < last; ++block) {
    const In* numbers = from + block * BLOCK;
    absmax[block] = largest_portable(numbers, BLOCK);
    const float reciprocal = 1.0f / divisor(absmax[block]);
    float v[BLOCK];
    uint32_t codes[BLOCK] = {};
    for (int i = 0; i < BLOCK; ++i) v[i] = load(numbers + i) * reciprocal;
    for (int j = 0; j < 15; ++j) {  // no search: compilers make vectors of this
      for (int i = 0; i < BLOCK; ++i) codes[i] += !(BOUNDS.at[j] >= v[i]);
    }
    for (int i = 0; i < BLOCK; i += 2) packed[block * 32 + i / 2] = static_cast<uint8_t>(codes[i] << 4 | codes[i + 1]);
  }
}

template <typename In>
void quantise_rest(const In* from, uint8_t* packed, float* absmax, int64_t count) {
  *absmax = divisor(largest_portable(from, count));
  for (int64_t i = 0; i < count; i += 2) {
    const float second = i + 1 < count ? load(from + i + 1) / *absmax : 0.0f;
    packed[i / 2] = static_cast<uint8_t>(code_of(load(from + i) / *absmax) << 4 | code_of(second));
  }
}

template <typename In>
XEON_AVX512 void quantise_avx512(const In* from, uint8_t* packed, float* absmax, int64_t first, int64_t last) {
  // bounds as a search tree: the table of each step is the bounds from that step on
  const __m512 first_bound = _mm512_set1_ps(BOUNDS.at[7]);
  const __m512 by4 = _mm512_maskz_loadu_ps(0x1fff, BOUNDS.at + 3), by2 = _mm512_maskz_loadu_ps(0x7fff, BOUNDS.at + 1),
               by1 = _mm512_loadu_ps(BOUNDS.at);
  const __m512i eight = _mm512_set1_epi32(8), four = _mm512_set1_epi32(4), two = _mm512_set1_epi32(2), one = _mm512_set1_epi32(1);
  for (int64_t block = first; block < last; ++block) {
    __m512 numbers[4], largest = _mm512_setzero_ps();
    __mmask16 nan = 0;
    for (int i = 0; i < 4; ++i) {
      numbers[i] = load16(from + block * BLOCK + i * 16);
      largest = _mm512_max_ps(largest, _mm512_abs_ps(numbers[i]));
      nan = static_cast<__mmask16>(nan | _mm512_cmp_ps_mask(numbers[i], numbers[i], _CMP_UNORD_Q));
    }
    absmax[block] = nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(largest);
    const __m512 reciprocal = _mm512_set1_ps(1.0f / divisor(absmax[block]));
    for (int i = 0; i < 4; ++i) {
      const __m512 v = _mm512_mul_ps(numbers[i], reciprocal);
      __m512i code = _mm512_maskz_mov_epi32(_mm512_cmp_ps_mask(first_bound, v, _CMP_NGE_UQ), eight);
      code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(_mm512_permutexvar_ps(code, by4), v, _CMP_NGE_UQ), code, four);
      code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(_mm512_permutexvar_ps(code, by2), v, _CMP_NGE_UQ), code, two);
      code = _mm512_mask_add_epi32(code, _mm512_cmp_ps_mask(_mm512_permutexvar_ps(code, by1), v, _CMP_NGE_UQ), code, one);
      const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(code, 4), _mm512_srli_epi64(code, 32));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(packed + block * 32 + i * 8), _mm512_cvtepi64_epi8(pairs));
    }
  }
}

template <typename In>
void quantise_from(const Tensor& weight, Tensor& packed, Tensor& absmax) {
  const auto* from = static_cast<const In*>(weight.const_data_ptr());
  auto* to = static_cast<uint8_t*>(packed.mutable_data_ptr());
  auto* scales = static_cast<float*>(absmax.mutable_data_ptr());
  const int64_t n = weight.numel(), blocks = n / BLOCK;
  const bool wide = path() >= Path::avx512;
  torch::stable::parallel_for(0, blocks, 256, [&](int64_t first, int64_t last) {
    if (wide) {
      quantise_avx512(from, to, scales, first, last);
    } else {
      quantise_portable(from, to, scales, first, last);
    }
  });
  if (n % BLOCK) quantise_rest(from + blocks * BLOCK, to + blocks * 32, scales + blocks, n % BLOCK);
}

void quantise(Tensor weight, Tensor packed, Tensor absmax) {
  const int64_t n = weight.numel();
  STD_TORCH_CHECK(weight.is_contiguous(), "weight must be contiguous");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.numel() == (n + 1) / 2,
                  "packed must be contiguous uint8 with ", (n + 1) / 2, " bytes");
  STD_TORCH_CHECK(absmax.scalar_type() == ScalarType::Float && absmax.is_contiguous() && absmax.numel() == (n + BLOCK - 1) / BLOCK,
                  "absmax must be contiguous fp32 with one number a block of 64");
  if (weight.scalar_type() == ScalarType::BFloat16) {
    quantise_from<uint16_t>(weight, packed, absmax);
  } else {
    STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "weight must be bf16 or fp32");
    quantise_from<float>(weight, packed, absmax);
  }
}

}  // namespace
}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) {
  m.def(
      "nf4_dequantise(Tensor packed, Tensor absmax, Tensor? book, Tensor? of_codes, Tensor? offset, int codes_a_scale, Tensor(a!) out, "
      "bool twice, int stream_from) -> ()");
  m.def("nf4_quantise(Tensor weight, Tensor(a!) packed, Tensor(b!) absmax) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CPU, m) {
  m.impl("nf4_dequantise", TORCH_BOX(&xeon::dequantise));
  m.impl("nf4_quantise", TORCH_BOX(&xeon::quantise));
}
