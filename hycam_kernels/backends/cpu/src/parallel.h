// Loops over blocks on the threads of the OpenMP runtime that torch has loaded: the library links none of its own.
#pragma once
#include <atomic>
#include <cstdint>

// GOMP_parallel(function, data, threads, flags): runs function(data) on each of the threads, the caller among them.
// Every OpenMP runtime on Linux has it.
using OpenMPParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
extern OpenMPParallel hycam_openmp_parallel;

// f(block) for each block below ``blocks``, in any order, on any thread.
template <class F>
void parallel_blocks(int64_t blocks, int64_t threads, F f) {
  if (threads > blocks) threads = blocks;
  if (threads <= 1) {
    for (int64_t block = 0; block < blocks; block++) f(block);
    return;
  }
  struct Work {
    F& f;
    int64_t blocks;
    std::atomic<int64_t> next;
  } work{f, blocks, {0}};
  hycam_openmp_parallel(
      [](void* data) {
        Work& work = *static_cast<Work*>(data);
        for (int64_t block; (block = work.next.fetch_add(1, std::memory_order_relaxed)) < work.blocks;) work.f(block);
      },
      &work, static_cast<unsigned>(threads), 0);
}
