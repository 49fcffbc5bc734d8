// The element-wise terms of the op: docs/op.md has the equations. Every sum is in float32 and in an order of its own row,
// so that no result depends on the threads.
#include "rows.h"

namespace VECTOR_SET {
namespace {

// columns that are worked on at a time: what the experts share of them stays in the first-level cache
constexpr int64_t kColumns = 512;
struct alignas(64) Columns { float at[kColumns]; };

// z = scale * product + shift, with a shift or without; the product as it is where both say nothing
struct Affine {
  float scale;
  const float* shift;

  template <class Lanes>
  Vector operator()(Vector product, int64_t j, Lanes lanes) const {
    return shift ? fma(fill(scale), product, load(shift + j, lanes)) : mul(fill(scale), product);
  }
};
struct Identity {
  template <class Lanes>
  Vector operator()(Vector product, int64_t, Lanes) const { return product; }
};

// fusion += p SiLU(z)
template <class T, class Map>
void add_expert(const T* product, Map map, float p, Columns& fusion, int64_t n) {
  const Vector weight = fill(p);
  each_vector(n, [&](int64_t j, auto lanes) {
    const Vector z = map(load(product + j, lanes), j, lanes);
    const Vector activation = mul(z, sigmoid(z));
    store(fusion.at + j, fma(weight, activation, load(fusion.at + j, Whole{})), Whole{});
  });
}

// fusion += p SiLU(z); product = scaled_p d_fusion SiLU'(z); returns the sum of d_fusion SiLU(z).
// With a = SiLU(z) = z q, q = sigmoid(z): SiLU'(z) = q + a (1 - q).
template <class T, class Map>
float expert_backward(
    T* product, Map map, float p, float scaled_p, const Columns& d_fusion, Columns& fusion, int64_t n) {
  const Vector weight = fill(p), d_weight = fill(scaled_p), one = fill(1.f);
  Vector d_p = fill(0.f);
  each_vector(n, [&](int64_t j, auto lanes) {
    const Vector z = map(load(product + j, lanes), j, lanes);
    const Vector gate = sigmoid(z), activation = mul(z, gate);
    const Vector d = load(d_fusion.at + j, Whole{});
    store(fusion.at + j, fma(weight, activation, load(fusion.at + j, Whole{})), Whole{});
    d_p = fma(d, activation, d_p);
    store(product + j, mul(mul(d_weight, d), fma(activation, sub(one, gate), gate)), lanes);
  });
  return sum(d_p);
}

void zero(Columns& columns, int64_t n) {
  each_vector(n, [&](int64_t j, auto) { store(columns.at + j, fill(0.f), Whole{}); });
}

// What one call works on; absent parts are null. ``product`` is [E, T, d], the other matrices [T, d].
template <class T>
struct Experts {
  T* product;
  int64_t expert_stride, row_stride;
  int64_t count, d;
  const float* p;      // [T, E]
  const float* shift;  // [E, d]
  float scale;

  bool plain() const { return scale == 1.f && !shift; }
  T* row(int64_t k, int64_t t, int64_t column) const { return product + k * expert_stride + t * row_stride + column; }
  Affine map(int64_t k, int64_t column) const { return {scale, shift ? shift + k * d + column : nullptr}; }
};

template <class T>
void forward(
    int64_t tokens, const T* s, int64_t s_stride, const Experts<T>& experts, Rows attn, Rows residual, Rows out,
    int64_t threads) {
  const int64_t d = experts.d;
  each_row(tokens, d, threads, [&](int64_t t) {
    Columns fusion;
    for (int64_t column = 0; column < d; column += kColumns) {
      const int64_t n = d - column < kColumns ? d - column : kColumns;
      if (s) {
        const T* row = s + t * s_stride + column;
        each_vector(n, [&](int64_t j, auto lanes) {
          const Vector x = load(row + j, lanes);
          store(fusion.at + j, mul(x, sigmoid(x)), Whole{});
        });
      } else {
        zero(fusion, n);
      }
      for (int64_t k = 0; k < experts.count; k++) {
        const float p = experts.p[t * experts.count + k];
        const T* product = experts.row(k, t, column);
        if (experts.plain()) add_expert(product, Identity{}, p, fusion, n);
        else add_expert(product, experts.map(k, column), p, fusion, n);
      }
      const Row a = attn[t].from(column), r = residual[t].from(column), o = out[t].from(column);
      each_vector(n, [&](int64_t j, auto lanes) {
        const Vector x = a.get(j, lanes);
        const Vector stream = r ? add(x, r.get(j, lanes)) : x;
        o.put(j, fma(load(fusion.at + j, Whole{}), stream, x), lanes);
      });
    }
  });
}

template <class T>
void backward(
    int64_t tokens, const T* s, int64_t s_stride, T* d_s, int64_t d_s_stride, const Experts<T>& experts, float* d_p,
    Rows grad, Rows attn, Rows residual, Rows d_attn, Rows d_residual, int64_t threads) {
  const int64_t d = experts.d;
  each_row(tokens, d, threads, [&](int64_t t) {
    Columns fusion, d_fusion;
    for (int64_t k = 0; k < experts.count; k++) d_p[t * experts.count + k] = 0.f;
    for (int64_t column = 0; column < d; column += kColumns) {
      const int64_t n = d - column < kColumns ? d - column : kColumns;
      const Row g = grad[t].from(column), a = attn[t].from(column), r = residual[t].from(column);
      each_vector(n, [&](int64_t j, auto lanes) {
        const Vector x = a.get(j, lanes);
        store(d_fusion.at + j, mul(g.get(j, lanes), r ? add(x, r.get(j, lanes)) : x), Whole{});
      });
      if (s) {
        const T* row = s + t * s_stride + column;
        T* d_row = d_s + t * d_s_stride + column;
        each_vector(n, [&](int64_t j, auto lanes) {
          const Vector x = load(row + j, lanes);
          const Vector gate = sigmoid(x), activation = mul(x, gate);
          store(fusion.at + j, activation, Whole{});
          const Vector slope = fma(activation, sub(fill(1.f), gate), gate);
          store(d_row + j, mul(load(d_fusion.at + j, Whole{}), slope), lanes);
        });
      } else {
        zero(fusion, n);
      }
      for (int64_t k = 0; k < experts.count; k++) {
        const float p = experts.p[t * experts.count + k], scaled_p = p * experts.scale;
        T* product = experts.row(k, t, column);
        d_p[t * experts.count + k] +=
            experts.plain() ? expert_backward(product, Identity{}, p, scaled_p, d_fusion, fusion, n)
                            : expert_backward(product, experts.map(k, column), p, scaled_p, d_fusion, fusion, n);
      }
      const Row d_a = d_attn[t].from(column), d_r = d_residual[t].from(column);
      if (d_a || d_r) {
        each_vector(n, [&](int64_t j, auto lanes) {
          const Vector upstream = g.get(j, lanes), d_stream = mul(load(fusion.at + j, Whole{}), upstream);
          if (d_r) d_r.put(j, d_stream, lanes);
          if (d_a) d_a.put(j, add(d_stream, upstream), lanes);
        });
      }
    }
  });
}

}  // namespace
}  // namespace VECTOR_SET

using namespace VECTOR_SET;

// h_out = h_att + stream * (SiLU(S) + sum_k p_k SiLU(scale product_k + shift_k)).
// S and the products are of ``dtype``; shift is in float32 already times scale.
EXPORT(modulate)(
    int64_t tokens, int64_t d, int64_t count, int64_t dtype, const void* s, int64_t s_stride, void* product,
    int64_t expert_stride, int64_t row_stride, const float* p, const float* shift, float scale, Rows attn,
    Rows residual, Rows out, int64_t threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Experts<T> experts{static_cast<T*>(product), expert_stride, row_stride, count, d, p, shift, scale};
    forward(tokens, static_cast<const T*>(s), s_stride, experts, attn, residual, out, threads);
  });
}

// The gradients of S, of each product (in its place), of p [T, E], of h_att and of h_in from that of h_out.
EXPORT(modulate_backward)(
    int64_t tokens, int64_t d, int64_t count, int64_t dtype, const void* s, int64_t s_stride, void* d_s,
    int64_t d_s_stride, void* product, int64_t expert_stride, int64_t row_stride, const float* p, float* d_p,
    const float* shift, float scale, Rows grad, Rows attn, Rows residual, Rows d_attn, Rows d_residual,
    int64_t threads) {
  with_type(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Experts<T> experts{static_cast<T*>(product), expert_stride, row_stride, count, d, p, shift, scale};
    backward(
        tokens, static_cast<const T*>(s), s_stride, static_cast<T*>(d_s), d_s_stride, experts, d_p, grad, attn,
        residual, d_attn, d_residual, threads);
  });
}
