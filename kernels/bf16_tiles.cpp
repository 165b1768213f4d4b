#include "kernels/bf16_tiles.hpp"

#include "kernels/bf16_lanes.hpp"
#include "kernels/instruction_set.hpp"

// Compiled for avx512_bf16 and AMX (see CMakeLists.txt); no templates of the standard library in here.
namespace shardtune::bf16 {
namespace {

// Which number of two rows (those of the second from index 32 on) goes where when they are paired.
struct alignas(64) Interleave {
  std::uint16_t low[kBlock] = {}, high[kBlock] = {};
  constexpr Interleave() {
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 32);
      high[i] = static_cast<std::uint16_t>(low[i] + 16);
    }
  }
};
constexpr Interleave kInterleave;

bool has_tiles() { return instruction_set() == InstructionSet::amx; }

// --- AMX: a tile is 16 rows of 64 bytes ------------------------------------------------------------------------------

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// Not a local: GCC 12 does not know that ldtilecfg reads all of it, and would leave stores to it out.
constexpr TileConfig kTileConfig;

// 32 x 32 numbers of c: sums in tiles 0 to 3, a in 4 and 5, b in 6 and 7. Tile numbers are part of the instruction.
void multiply_on_tiles(const Product& p, std::int64_t m, std::int64_t n) {
  const std::int64_t a_bytes = p.lda * 2, b_bytes = p.ldb * 4, c_bytes = p.ldc * 4;
  float *c0 = p.c + m * p.ldc + n, *c1 = c0 + kLanes * p.ldc;
  if (p.adds) {
    _tile_loadd(0, c0, c_bytes);
    _tile_loadd(1, c0 + kLanes, c_bytes);
    _tile_loadd(2, c1, c_bytes);
    _tile_loadd(3, c1 + kLanes, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const std::uint16_t *a0 = p.a + m * p.lda, *a1 = a0 + kLanes * p.lda;
  const std::uint32_t* b = p.b + n;
  for (std::int64_t k = 0; k < p.k; k += kBlock, a0 += p.a_step, a1 += p.a_step, b += kLanes * p.ldb) {
    _tile_loadd(4, a0, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kLanes, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c0, c_bytes);
  _tile_stored(1, c0 + kLanes, c_bytes);
  _tile_stored(2, c1, c_bytes);
  _tile_stored(3, c1 + kLanes, c_bytes);
}

// --- vdpbf16ps
// ---------------------------------------------------------------------------------------------------------

// kRows rows and 32 columns of c.
template <int kRows>
void multiply_on_lanes(const Product& p, std::int64_t m, std::int64_t n) {
  __m512 sum[kRows][2];
  float* c = p.c + m * p.ldc + n;
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) sum[r][v] = p.adds ? _mm512_loadu_ps(c + r * p.ldc + v * kLanes) : _mm512_setzero_ps();
  const std::uint32_t* b = p.b + n;
  for (std::int64_t k = 0; k < p.k; k += 2, b += p.ldb) {
    const std::uint16_t* a = p.a + m * p.lda + k / kBlock * p.a_step + k % kBlock;
    const auto b0 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b)),
               b1 = reinterpret_cast<__m512bh>(_mm512_loadu_si512(b + kLanes));
    for (int r = 0; r < kRows; ++r) {
      std::int32_t word;
      __builtin_memcpy(&word, a + r * p.lda, sizeof word);
      const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], factor, b0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], factor, b1);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * p.ldc + v * kLanes, sum[r][v]);
}

// -------------------------------------------------------------------------------------------------------------------------

// value_of(sums, column): what is stored of 16 of them. 32 columns are one store.
template <bool kStreams, class ValueOf>
[[gnu::always_inline]] inline void store_rows(const Sums& sums, const Target& into, const ValueOf& value_of) {
  const float* from = sums.data;
  std::uint16_t* row = into.data;
  for (std::int64_t r = 0; r < sums.rows; ++r, from += sums.stride, row += into.stride) {
    std::int64_t c = 0;
    for (; c + kBlock <= sums.columns; c += kBlock) {
      const __m512 low = value_of(from + c, c), high = value_of(from + c + kLanes, c + kLanes);
      const auto both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
      if constexpr (kStreams)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(row + c), both);
      else
        _mm512_storeu_si512(row + c, both);
    }
    for (; c < sums.columns; c += kLanes) store_bf16(row + c, lanes_below(sums.columns - c), value_of(from + c, c));
  }
}
template <class ValueOf>
void store_rows(const Sums& sums, const Target& into, const ValueOf& value_of) {
  if (into.streams)
    store_rows<true>(sums, into, value_of);
  else
    store_rows<false>(sums, into, value_of);
}

}  // namespace

TileSession::TileSession() {
  if (!has_tiles()) return;
  _tile_loadconfig(&kTileConfig);
}
TileSession::~TileSession() {
  _mm_sfence();
  if (has_tiles()) _tile_release();  // also tells the processor to save less at a switch of threads
}

void multiply(const Product& p) {
  const bool on_tiles = has_tiles();
  for (std::int64_t m = 0; m < p.m; m += kBlock)
    for (std::int64_t n = 0; n < p.n; n += kBlock) {
      if (on_tiles) {
        multiply_on_tiles(p, m, n);
      } else {
        for (std::int64_t row = m; row < m + kBlock && row < p.m; row += 8) multiply_on_lanes<8>(p, row, n);
      }
    }
}

void copy_rows(const std::uint16_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               std::uint16_t* into, std::int64_t into_stride) {
  const std::int64_t width = padded(columns);
  for (std::int64_t r = 0; r < padded(rows); ++r, into += into_stride)
    for (std::int64_t c = 0; c < width; c += 32) {
      const std::int64_t left = r < rows ? columns - c : 0;
      const __m512i value = left >= 32 ? _mm512_loadu_si512(from + r * stride + c)
                            : left > 0 ? _mm512_maskz_loadu_epi16((1U << left) - 1U, from + r * stride + c)
                                       : _mm512_setzero_si512();
      _mm512_storeu_si512(into + c, value);
    }
}

void pair_rows(const std::uint16_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               std::uint32_t* into, std::int64_t into_stride) {
  const __m512i low = _mm512_load_si512(kInterleave.low), high = _mm512_load_si512(kInterleave.high);
  for (std::int64_t r = 0; r < rows; r += 2, into += into_stride, from += 2 * stride)
    for (std::int64_t c = 0; c < columns; c += kBlock) {
      const __m512i even = _mm512_loadu_si512(from + c), odd = _mm512_loadu_si512(from + stride + c);
      _mm512_storeu_si512(into + c, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_storeu_si512(into + c + kLanes, _mm512_permutex2var_epi16(even, high, odd));
    }
}

void transpose_words(const std::uint32_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                     std::uint32_t* into, std::int64_t into_stride) {
  for (std::int64_t r = 0; r < rows; r += kLanes)
    for (std::int64_t c = 0; c < columns; c += kLanes)
      avx512::transpose_16(from + r * stride + c, stride, {}, into + c * into_stride + r, into_stride);
}

void store_block(const Sums& sums, const Target& into, float factor) {
  const __m512 scale = _mm512_set1_ps(factor);
  store_rows(sums, into,
             [&](const float* from, std::int64_t /*column*/) { return _mm512_mul_ps(_mm512_loadu_ps(from), scale); });
}

void store_with_bias(const Sums& sums, const std::uint16_t* bias, const Target& into) {
  store_rows(sums, into, [&](const float* from, std::int64_t column) {
    return _mm512_add_ps(_mm512_loadu_ps(from), load_bf16(bias + column, lanes_below(sums.columns - column)));
  });
}

void store_rounded(const Sums& sums, const TargetOf<float>& into) {
  const float* from = sums.data;
  float* row = into.data;
  for (std::int64_t r = 0; r < sums.rows; ++r, from += sums.stride, row += into.stride)
    for (std::int64_t c = 0; c < sums.columns; c += kLanes) {
      const auto rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(_mm512_loadu_ps(from + c)));
      const __m512 value = widened(rounded);
      if (into.streams)
        _mm512_stream_ps(row + c, value);
      else
        _mm512_mask_storeu_ps(row + c, lanes_below(sums.columns - c), value);
    }
}

void copy_block(const std::uint16_t* from, std::int64_t rows, std::int64_t columns, const Target& into) {
  std::uint16_t* row = into.data;
  const __mmask32 lanes = columns >= kBlock ? ~__mmask32{0} : (__mmask32{1} << columns) - 1;
  for (std::int64_t r = 0; r < rows; ++r, from += kBlock, row += into.stride)
    if (into.streams)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(row), _mm512_load_si512(from));
    else
      _mm512_mask_storeu_epi16(row, lanes, _mm512_load_si512(from));
}

void add_block(const Sums& sums, float* into, std::int64_t stride) {
  for (std::int64_t r = 0; r < sums.rows; ++r)
    for (std::int64_t c = 0; c < sums.columns; c += kLanes) {
      const __mmask16 lanes = lanes_below(sums.columns - c);
      float* at = into + r * stride + c;
      _mm512_mask_storeu_ps(
          at, lanes, _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, at), _mm512_loadu_ps(sums.data + r * sums.stride + c)));
    }
}

void sum_columns(const std::uint16_t* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                 std::uint16_t* into) {
  const __mmask16 lanes[] = {lanes_below(columns), lanes_below(columns - kLanes)};
  __m512 total[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  for (std::int64_t first = 0; first < rows; first += 64) {
    __m512 part[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    const std::int64_t last = first + 64 < rows ? first + 64 : rows;
    for (std::int64_t r = first; r < last; ++r)
      for (int v = 0; v < 2; ++v) part[v] = _mm512_add_ps(part[v], load_bf16(x + r * stride + v * kLanes, lanes[v]));
    for (int v = 0; v < 2; ++v) total[v] = _mm512_add_ps(total[v], part[v]);
  }
  for (int v = 0; v < 2; ++v) store_bf16(into + v * kLanes, lanes[v], total[v]);
}

}  // namespace shardtune::bf16
