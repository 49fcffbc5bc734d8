// Matrices as the passes take them.
#pragma once
#include "parallel.h"
#include "vector.h"

// hycam_NAME_avx512 or hycam_NAME_avx2, for `library.py` to choose from
#define JOIN_NAMES(name, set) hycam_##name##_##set
#define NAME_FOR_SET(name, set) JOIN_NAMES(name, set)
#define EXPORT(name) extern "C" __attribute__((visibility("default"))) void NAME_FOR_SET(name, VECTOR_SET)

namespace VECTOR_SET {

enum DType : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// f(T*) with the type of a dtype
template <class F>
void with_type(int64_t dtype, F f) {
  if (dtype == kFloat32) f(static_cast<float*>(nullptr));
  else if (dtype == kBFloat16) f(static_cast<BFloat16*>(nullptr));
  else f(static_cast<Float16*>(nullptr));
}

// Part of a row whose dtype is known when it runs; absent where ``at`` is null.
struct Row {
  char* at;
  int64_t dtype;

  explicit operator bool() const { return at != nullptr; }
  int64_t itemsize() const { return dtype == kFloat32 ? 4 : 2; }
  Row from(int64_t column) const { return {at ? at + column * itemsize() : nullptr, dtype}; }

  template <class Lanes>
  Vector get(int64_t j, Lanes lanes) const {
    if (dtype == kFloat32) return load(reinterpret_cast<const float*>(at) + j, lanes);
    if (dtype == kBFloat16) return load(reinterpret_cast<const BFloat16*>(at) + j, lanes);
    return load(reinterpret_cast<const Float16*>(at) + j, lanes);
  }
  template <class Lanes>
  void put(int64_t j, Vector x, Lanes lanes) const {
    if (dtype == kFloat32) return store(reinterpret_cast<float*>(at) + j, x, lanes);
    if (dtype == kBFloat16) return store(reinterpret_cast<BFloat16*>(at) + j, x, lanes);
    store(reinterpret_cast<Float16*>(at) + j, x, lanes);
  }
};

// A matrix whose rows are contiguous; ``stride`` counts elements. Absent where ``data`` is null.
struct Rows {
  void* data;
  int64_t stride;
  int64_t dtype;

  Row operator[](int64_t t) const {
    Row first{static_cast<char*>(data), dtype};
    return first.from(t * stride);
  }
};

// rows a thread takes at a time: some 16 thousand elements
inline int64_t rows_per_block(int64_t d) { return d < 16384 ? 16384 / (d < 1 ? 1 : d) : 1; }

// f(t) for the rows t below ``tokens``, each on one thread
template <class F>
void each_row(int64_t tokens, int64_t d, int64_t threads, F f) {
  const int64_t rows = rows_per_block(d);
  parallel_blocks((tokens + rows - 1) / rows, threads, [&](int64_t block) {
    const int64_t end = (block + 1) * rows < tokens ? (block + 1) * rows : tokens;
    for (int64_t t = block * rows; t < end; t++) f(t);
  });
}

}  // namespace VECTOR_SET
