// The whole op for few tokens without gradients, its products included: reading each weight once, as it is stored, is
// the work. Sums are in float32, each in an order of its own, so that no result depends on the threads.
#include "routing.h"
#include "rows.h"

namespace VECTOR_SET {
namespace {

constexpr int64_t kColumns = 64;     // of the output that a thread makes at a time
constexpr int64_t kBlockRows = 32;   // of A that a thread multiplies by at a time
constexpr int64_t kSmall = 1 << 16;  // weights that one thread multiplies by faster than several begin

// [rows, n], contiguous; absent where ``data`` is null.
struct Weight {
  void* data;
  int64_t dtype;
};

// out[t, i] = sum_j x[t, j] weight[i, j], for ``rows`` rows and ``tokens`` tokens; each has ``parts`` sums, of every
// ``parts``-th vector
template <int rows, int parts, int tokens, class T>
void dot_products(const T* weight, int64_t n, const float* x, int64_t x_stride, float* out, int64_t out_stride) {
  Vector sums[tokens][rows][parts];
  for (auto& of_token : sums)
    for (auto& of_row : of_token)
      for (Vector& one : of_row) one = fill(0.f);
  const auto add_part = [&](int64_t j, int part, auto lanes) {
    Vector of_tokens[tokens];
    for (int t = 0; t < tokens; t++) of_tokens[t] = load(x + t * x_stride + j, lanes);
    for (int i = 0; i < rows; i++) {
      const Vector w = load(weight + i * n + j, lanes);
      for (int t = 0; t < tokens; t++) sums[t][i][part] = fma(of_tokens[t], w, sums[t][i][part]);
    }
  };
  int64_t j = 0;
  for (; j + parts * kLanes <= n; j += parts * kLanes)
    for (int part = 0; part < parts; part++) add_part(j + part * kLanes, part, Whole{});
  each_vector(n - j, [&](int64_t rest, auto lanes) { add_part(j + rest, 0, lanes); });
  for (int t = 0; t < tokens; t++)
    for (int i = 0; i < rows; i++) {
      Vector total = sums[t][i][0];
      for (int part = 1; part < parts; part++) total = add(total, sums[t][i][part]);
      out[t * out_stride + i] = sum(total);
    }
}

// the same for the rows from ``first`` to ``last`` of a weight, out beginning at the first
template <int rows, int parts, int tokens, class T>
void each_rows(
    const T* weight, int64_t first, int64_t last, int64_t n, const float* x, int64_t x_stride, float* out,
    int64_t out_stride) {
  int64_t i = first;
  for (; i + rows <= last; i += rows)
    dot_products<rows, parts, tokens>(weight + i * n, n, x, x_stride, out + i - first, out_stride);
  for (; i < last; i++) dot_products<1, parts, tokens>(weight + i * n, n, x, x_stride, out + i - first, out_stride);
}

// A long row is read alone, from its beginning to its end, which memory is fastest at; short ones are read side by side.
// There are as many sums as hide an addition's latency, and as registers hold.
template <int tokens>
void multiply(
    Weight weight, int64_t first, int64_t last, int64_t n, const float* x, int64_t x_stride, float* out,
    int64_t out_stride) {
  with_type(weight.dtype, [&](auto* type) {
    const auto* data = static_cast<decltype(type)>(weight.data);
    if (n >= 8 * kLanes)
      each_rows<1, tokens <= 2 ? 4 : 2, tokens>(data, first, last, n, x, x_stride, out, out_stride);
    else
      each_rows<tokens <= 2 || kLanes == 16 ? 4 : 2, 1, tokens>(data, first, last, n, x, x_stride, out, out_stride);
  });
}

// What one call works on. The experts' products have ``inner`` columns: r of V, or d of h with full-rank experts.
struct Call {
  int64_t d, count, rank;
  Weight shared, a, n, b, router;
  const float *shared_bias, *a_bias, *n_bias, *b_bias, *router_bias;
  float tau, scale;
  bool hard;
  int64_t threads;
};

// What the tokens of a block share: h [tokens, d] and, with low-rank experts, U and V [tokens, E r].
struct Scratch {
  float *h, *u, *v;
};

// U = h A^T + a and the router's logits
template <int tokens>
void project(const Call& call, const Scratch& at, float* logits) {
  const int64_t joined = call.a.data ? call.count * call.rank : 0;
  const int64_t blocks = (joined + kBlockRows - 1) / kBlockRows;
  parallel_blocks(blocks + 1, call.threads, [&](int64_t block) {
    if (block == blocks) {
      multiply<tokens>(call.router, 0, call.count, call.d, at.h, call.d, logits, call.count);
      return;
    }
    const int64_t first = block * kBlockRows, last = first + kBlockRows < joined ? first + kBlockRows : joined;
    multiply<tokens>(call.a, first, last, call.d, at.h, call.d, at.u + first, joined);
    if (call.a_bias)
      for (int t = 0; t < tokens; t++)
        for (int64_t i = first; i < last; i++) at.u[t * joined + i] += call.a_bias[i];
  });
}

// V_k = U_k N_k^T + n_k
template <int tokens>
void mix(const Call& call, const Scratch& at) {
  const int64_t rank = call.rank, joined = call.count * rank;
  parallel_blocks(call.count, joined * rank < kSmall ? 1 : call.threads, [&](int64_t k) {
    const int64_t first = k * rank;
    multiply<tokens>(call.n, first, first + rank, rank, at.u + first, joined, at.v + first, joined);
    if (call.n_bias)
      for (int t = 0; t < tokens; t++)
        for (int64_t i = first; i < first + rank; i++) at.v[t * joined + i] += call.n_bias[i];
  });
}

// fusion += p SiLU(scale (x + bias)) of some columns
void add_activation(const float* x, const float* bias, float scale, float p, float* fusion, int64_t columns) {
  each_vector(columns, [&](int64_t j, auto lanes) {
    const Vector product = load(x + j, lanes);
    const Vector z = mul(fill(scale), bias ? add(product, load(bias + j, lanes)) : product);
    store(fusion + j, fma(fill(p), mul(z, sigmoid(z)), load(fusion + j, lanes)), lanes);
  });
}

// h_out of some columns
template <int tokens>
void modulate_columns(
    const Call& call, const Scratch& at, const float* p, int64_t column, int64_t columns, Rows attn, Rows residual,
    Rows out) {
  const bool low_rank = call.n.data;
  const int64_t inner = low_rank ? call.rank : call.d, stride = low_rank ? call.count * call.rank : call.d;
  alignas(64) float fusion[tokens][kColumns] = {}, products[tokens][kColumns];
  if (call.shared.data) {
    multiply<tokens>(call.shared, column, column + columns, call.d, at.h, call.d, products[0], kColumns);
    const float* bias = call.shared_bias ? call.shared_bias + column : nullptr;
    for (int t = 0; t < tokens; t++) add_activation(products[t], bias, 1.f, 1.f, fusion[t], columns);
  }
  for (int64_t k = 0; k < call.count; k++) {
    // chosen, not multiplied by 0: what an expert that isn't used makes may be infinite
    bool uses[tokens], used = false;
    for (int t = 0; t < tokens; t++) used |= uses[t] = !call.hard || chosen(p + t * call.count, call.count) == k;
    if (!used) continue;
    const float* x = low_rank ? at.v + k * inner : at.h;
    const int64_t first = k * call.d + column;
    multiply<tokens>(call.b, first, first + columns, inner, x, stride, products[0], kColumns);
    const float* bias = call.b_bias ? call.b_bias + first : nullptr;
    for (int t = 0; t < tokens; t++)
      if (uses[t]) add_activation(products[t], bias, call.scale, p[t * call.count + k], fusion[t], columns);
  }
  for (int t = 0; t < tokens; t++) {
    const Row a = attn[t].from(column), r = residual[t].from(column), o = out[t].from(column);
    each_vector(columns, [&](int64_t j, auto lanes) {
      const Vector x = a.get(j, lanes);
      o.put(j, fma(load(fusion[t] + j, lanes), r ? add(x, r.get(j, lanes)) : x, x), lanes);
    });
  }
}

template <int tokens>
void forward(
    const Call& call, const Scratch& at, Rows hidden, Rows attn, Rows residual, Rows out, const float* noise,
    float* logits, float* p) {
  const int64_t d = call.d, count = call.count;
  for (int t = 0; t < tokens; t++) {
    const Row row = hidden[t];
    each_vector(d, [&](int64_t j, auto lanes) { store(at.h + t * d + j, row.get(j, lanes), lanes); });
  }
  if (count) {
    project<tokens>(call, at, logits);
    for (int t = 0; t < tokens; t++) {
      float* of_token = logits + t * count;
      if (call.router_bias)
        for (int64_t k = 0; k < count; k++) of_token[k] += call.router_bias[k];
      softmax(of_token, noise ? noise + t * count : nullptr, call.tau, count, p + t * count);
      if (call.hard) one_hot(p + t * count, count, p + t * count);
    }
    if (call.n.data) mix<tokens>(call, at);
  }
  parallel_blocks((d + kColumns - 1) / kColumns, call.threads, [&](int64_t block) {
    const int64_t column = block * kColumns, columns = d - column < kColumns ? d - column : kColumns;
    modulate_columns<tokens>(call, at, p, column, columns, attn, residual, out);
  });
}

}  // namespace
}  // namespace VECTOR_SET

using namespace VECTOR_SET;

// h_out [T, d], the logits and p as it is used [T, E] of 1 to 4 tokens: docs/op.md has the equations. ``b`` is [E, d, r]
// beside ``a`` [E, r, d] and ``n`` [E, r, r], or with none of them [E, d, d]. ``scratch`` has room for T (d + 2 E r)
// floats.
EXPORT(few_tokens)(
    int64_t tokens, int64_t d, int64_t count, int64_t rank, Rows hidden, Rows attn, Rows residual, Rows out,
    void* shared, int64_t shared_dtype, void* a, int64_t a_dtype, void* n, int64_t n_dtype, void* b, int64_t b_dtype,
    void* router, int64_t router_dtype, const float* shared_bias,
    const float* a_bias, const float* n_bias, const float* b_bias, const float* router_bias, const float* noise,
    float tau, float scale, int64_t hard, float* logits, float* p, float* scratch, int64_t threads) {
  const Call call{d, count, rank, {shared, shared_dtype}, {a, a_dtype}, {n, n_dtype}, {b, b_dtype},
                  {router, router_dtype}, shared_bias, a_bias, n_bias, b_bias, router_bias, tau, scale, hard != 0,
                  threads};
  const Scratch at{scratch, scratch + tokens * d, scratch + tokens * (d + count * rank)};
  switch (tokens) {
    case 1: return forward<1>(call, at, hidden, attn, residual, out, noise, logits, p);
    case 2: return forward<2>(call, at, hidden, attn, residual, out, noise, logits, p);
    case 3: return forward<3>(call, at, hidden, attn, residual, out, noise, logits, p);
    case 4: return forward<4>(call, at, hidden, attn, residual, out, noise, logits, p);
  }
}
