// The router: logits, noise, softmax and the two token means, and their gradients. Sums over tokens are made in blocks of
// fixed size, and the blocks in their order: no result depends on the threads.
#include <cmath>

#include "routing.h"
#include "rows.h"

namespace VECTOR_SET {
namespace {

constexpr int64_t kTokens = 64;  // of a block of the sums over tokens

int64_t end_of(int64_t block, int64_t tokens) {
  return (block + 1) * kTokens < tokens ? (block + 1) * kTokens : tokens;
}

// dots[e] = sum_j x_j w_ej of the rows x = h_t and, with two rows, x = h_(t + 1)
template <int experts, int rows>
void dot_products(const Row* h, const float* weight, int64_t d, float* logits, int64_t stride) {
  Vector sums[rows][experts];
  for (auto& of_row : sums)
    for (Vector& one : of_row) one = fill(0.f);
  each_vector(d, [&](int64_t j, auto lanes) {
    Vector x[rows];
    for (int row = 0; row < rows; row++) x[row] = h[row].get(j, lanes);
    for (int e = 0; e < experts; e++) {
      const Vector w = load(weight + e * d + j, lanes);
      for (int row = 0; row < rows; row++) sums[row][e] = fma(x[row], w, sums[row][e]);
    }
  });
  for (int row = 0; row < rows; row++)
    for (int e = 0; e < experts; e++) logits[row * stride + e] = sum(sums[row][e]);
}

template <int rows>
void row_logits(const Row* h, const float* weight, int64_t d, int64_t count, float* logits) {
  int64_t e = 0;
  for (; e + 4 <= count; e += 4) dot_products<4, rows>(h, weight + e * d, d, logits + e, count);
  switch (count - e) {
    case 3: return dot_products<3, rows>(h, weight + e * d, d, logits + e, count);
    case 2: return dot_products<2, rows>(h, weight + e * d, d, logits + e, count);
    case 1: return dot_products<1, rows>(h, weight + e * d, d, logits + e, count);
  }
}

void make_logits(
    Rows hidden, const float* weight, const float* bias, int64_t start, int64_t end, int64_t d, int64_t count,
    float* logits) {
  int64_t t = start;
  for (; t + 2 <= end; t += 2) {
    const Row two[] = {hidden[t], hidden[t + 1]};
    row_logits<2>(two, weight, d, count, logits + t * count);
  }
  if (t < end) {
    const Row one = hidden[t];
    row_logits<1>(&one, weight, d, count, logits + t * count);
  }
  if (bias)
    for (t = start; t < end; t++)
      for (int64_t k = 0; k < count; k++) logits[t * count + k] += bias[k];
}

// sum_k g_k p_k
float weighted_sum(const float* grad, const float* p, int64_t count) {
  float total = 0.f;
  for (int64_t k = 0; k < count; k++) total += grad[k] * p[k];
  return total;
}

// what a mean over the counted tokens divides by: 1 where none counts
int64_t counted_tokens(const uint8_t* mask, int64_t tokens) {
  int64_t counted = 0;
  for (int64_t t = 0; t < tokens; t++) counted += !mask || mask[t];
  return counted > 1 ? counted : 1;
}

// Philox 4x32-10 of the counter (c, 0, 0, 0): its first word
inline uint32_t philox(uint64_t seed, uint32_t counter) {
  uint32_t c0 = counter, c1 = 0, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = 0xD2511F53ull * c0, product1 = 0xCD9E8D57ull * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace
}  // namespace VECTOR_SET

using namespace VECTOR_SET;

// The uniforms of the counters below ``size``, in [2^-31, 1): those of `hycam_kernels.philox` but for 0, whose logarithm
// would not be finite.
EXPORT(uniforms)(int64_t size, int64_t seed, float* out, int64_t threads) {
  constexpr int64_t kDraws = 1024;
  constexpr float kUnit = 4.6566127342e-10f;
  parallel_blocks((size + kDraws - 1) / kDraws, threads, [&](int64_t block) {
    const int64_t start = block * kDraws, end = start + kDraws < size ? start + kDraws : size;
    for (int64_t i = start; i < end; i++) {
      const int32_t word = static_cast<int32_t>(philox(static_cast<uint64_t>(seed), static_cast<uint32_t>(i)));
      // the negative half mirrored onto [0, 2^31)
      const float uniform = static_cast<float>(word < 0 ? ~word : word) * kUnit;
      out[i] = uniform > kUnit ? uniform : kUnit;
    }
  });
}

// Logits [T, E] = h W^T + bias (those given where ``weight`` is null), probs = softmax((logits + noise) / tau), with
// ``used`` the hard choice, and the means over the counted tokens of what is used and of softmax(logits).
// ``sums`` has room for 2 E doubles for each 64 tokens.
EXPORT(route)(
    int64_t tokens, int64_t d, int64_t count, Rows hidden, const float* weight, const float* bias, const float* noise,
    float tau, const uint8_t* mask, float* logits, float* probs, float* used, double* sums, float* load,
    float* router_prob, int64_t threads) {
  const int64_t blocks = (tokens + kTokens - 1) / kTokens;
  parallel_blocks(blocks, threads, [&](int64_t block) {
    const int64_t start = block * kTokens, end = end_of(block, tokens);
    if (weight) make_logits(hidden, weight, bias, start, end, d, count, logits);
    double* of_block = sums + block * 2 * count;
    for (int64_t k = 0; k < 2 * count; k++) of_block[k] = 0.;
    for (int64_t t = start; t < end; t++) {
      const float* row = logits + t * count;
      float* p = probs + t * count;
      // softmax(logits) is wanted for its mean alone; p takes its place
      softmax(row, nullptr, 1.f, count, p);
      if (!mask || mask[t])
        for (int64_t k = 0; k < count; k++) of_block[count + k] += p[k];
      softmax(row, noise ? noise + t * count : nullptr, tau, count, p);
      const float* counted = p;
      if (used) {
        one_hot(p, count, used + t * count);
        counted = used + t * count;
      }
      if (!mask || mask[t])
        for (int64_t k = 0; k < count; k++) of_block[k] += counted[k];
    }
  });
  const double share = 1. / static_cast<double>(counted_tokens(mask, tokens));
  for (int64_t k = 0; k < count; k++) {
    double used_sum = 0., prob_sum = 0.;
    for (int64_t block = 0; block < blocks; block++) {
      used_sum += sums[block * 2 * count + k];
      prob_sum += sums[(block * 2 + 1) * count + k];
    }
    load[k] = static_cast<float>(used_sum * share);
    router_prob[k] = static_cast<float>(prob_sum * share);
  }
}

// The gradient of the logits [T, E] through p and through both means; a token that doesn't count has those of p alone.
// ``narrow``, where it isn't absent, gets the same in the dtype of the products.
EXPORT(route_backward)(
    int64_t tokens, int64_t count, const float* probs, const float* logits, const float* d_probs,
    const float* grad_load, const float* grad_router_prob, float tau, const uint8_t* mask, float* d_logits, Rows narrow,
    int64_t threads) {
  const float share = 1.f / static_cast<float>(counted_tokens(mask, tokens));
  parallel_blocks((tokens + kTokens - 1) / kTokens, threads, [&](int64_t block) {
    for (int64_t t = block * kTokens; t < end_of(block, tokens); t++) {
      const float* p = probs + t * count;
      const bool counts = !mask || mask[t];
      float* d = d_logits + t * count;
      if (!d_probs && !counts) {
        // nothing reaches it; what it holds may be NaN
        for (int64_t k = 0; k < count; k++) d[k] = 0.f;
      } else {
        const bool has_load = grad_load && counts;
        for (int64_t k = 0; k < count; k++)
          d[k] = (d_probs ? d_probs[t * count + k] : 0.f) + (has_load ? share * grad_load[k] : 0.f);
        const float mean = weighted_sum(d, p, count);
        for (int64_t k = 0; k < count; k++) d[k] = p[k] * (d[k] - mean) / tau;
        if (grad_router_prob && counts) {
          const float* row = logits + t * count;
          float largest = -INFINITY, total = 0.f, dot = 0.f;
          for (int64_t k = 0; k < count; k++) largest = row[k] > largest ? row[k] : largest;
          for (int64_t k = 0; k < count; k++) {
            const float e = std::exp(row[k] - largest);
            total += e;
            dot += e * grad_router_prob[k];
          }
          for (int64_t k = 0; k < count; k++)
            d[k] += std::exp(row[k] - largest) / total * share * (grad_router_prob[k] - dot / total);
        }
      }
      if (narrow.data) {
        const Row row = narrow[t], wide{reinterpret_cast<char*>(d), kFloat32};
        each_vector(count, [&](int64_t k, auto lanes) { row.put(k, wide.get(k, lanes), lanes); });
      }
    }
  });
}

// out[e, j] = sum_t w[t, e] x[t, j] (w = 1 for every token where it is null), added to what is there if ``adds``; of the
// tokens of ``mask``, or of all. Each thread has columns of its own; 8 tokens are added up, 4 of these sums, and so on.
EXPORT(sum_tokens)(
    int64_t tokens, int64_t d, int64_t count, const float* weight, Rows values, const uint8_t* mask, float* out,
    int64_t adds, int64_t threads) {
  constexpr int64_t kColumns = 128, kParts = 4, kRows = 8 * kParts;
  parallel_blocks((d + kColumns - 1) / kColumns, threads, [&](int64_t strip) {
    const int64_t column = strip * kColumns, n = d - column < kColumns ? d - column : kColumns;
    if (!adds)
      for (int64_t e = 0; e < count; e++) std::memset(out + e * d + column, 0, n * sizeof(float));
    alignas(64) float x[kRows][kColumns];
    float w[kRows];
    int64_t of_row[kRows];
    for (int64_t t = 0; t < tokens;) {
      int64_t rows = 0;
      for (; t < tokens && rows < kRows; t++) {
        if (mask && !mask[t]) continue;
        const Row row = values[t].from(column);
        each_vector(n, [&](int64_t j, auto lanes) { store(x[rows] + j, row.get(j, lanes), Whole{}); });
        of_row[rows++] = t;
      }
      for (int64_t row = rows; row < kRows; row++) std::memset(x[row], 0, sizeof x[row]);
      for (int64_t e = 0; e < count; e++) {
        for (int64_t row = 0; row < kRows; row++)
          w[row] = row >= rows ? 0.f : weight ? weight[of_row[row] * count + e] : 1.f;
        float* sums = out + e * d + column;
        each_vector(n, [&](int64_t j, auto lanes) {
          Vector parts[kParts];
          for (Vector& part : parts) part = fill(0.f);
          for (int64_t row = 0; row < kRows; row += kParts)
            for (int64_t i = 0; i < kParts; i++) parts[i] = fma(fill(w[row + i]), load(x[row + i] + j, Whole{}), parts[i]);
          const Vector total = add(add(parts[0], parts[1]), add(parts[2], parts[3]));
          store(sums + j, add(load(sums + j, lanes), total), lanes);
        });
      }
    }
  });
}
