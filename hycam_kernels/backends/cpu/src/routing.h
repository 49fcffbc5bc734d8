// A token's routing weights.
#pragma once
#include <cmath>

#include "vector.h"

namespace VECTOR_SET {

// out = softmax((logits + noise) / tau); NaN of a NaN
inline void softmax(const float* logits, const float* noise, float tau, int64_t count, float* out) {
  float largest = -INFINITY, total = 0.f;
  for (int64_t k = 0; k < count; k++) {
    out[k] = (noise ? logits[k] + noise[k] : logits[k]) / tau;
    largest = out[k] > largest ? out[k] : largest;
  }
  for (int64_t k = 0; k < count; k++) total += out[k] = std::exp(out[k] - largest);
  for (int64_t k = 0; k < count; k++) out[k] /= total;
}

// the expert of the largest p, the first of equals
inline int64_t chosen(const float* p, int64_t count) {
  int64_t best = 0;
  for (int64_t k = 1; k < count; k++) best = p[k] > p[best] ? k : best;
  return best;
}

// one-hot at the largest p, NaN where p is; ``used`` may be p
inline void one_hot(const float* p, int64_t count, float* used) {
  const int64_t best = chosen(p, count);
  for (int64_t k = 0; k < count; k++) used[k] = (k == best ? 1.f : 0.f) + (p[k] - p[k]);
}

}  // namespace VECTOR_SET
