// What the library is before an instruction set is chosen; compiled for any x86-64.
#include "parallel.h"

OpenMPParallel hycam_openmp_parallel = nullptr;

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void hycam_use_openmp(OpenMPParallel parallel) { hycam_openmp_parallel = parallel; }

// The checksum of the sources.
EXPORT uint32_t hycam_sources() { return HYCAM_SOURCES; }

// Whether the machine and its system run the vectors of `vector.h`, the wider first.
EXPORT int hycam_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

EXPORT int hycam_has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}
