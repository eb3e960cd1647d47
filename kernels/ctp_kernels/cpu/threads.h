// Several threads at once, on those that PyTorch has already where its OpenMP is libgomp.
//
// libgomp's threads keep their processors busy for a while after each operation, waiting for the next. Threads of our
// own have to share with them: between two matrix products of PyTorch's, a kernel took twice as long.

#pragma once

#include <atomic>
#include <cstdint>
#include <new>
#include <thread>
#include <vector>

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));

// work(0), ..., work(parts - 1), each once; returns 1 if one of them ran out of memory, else 0.
// Always asks for all threads: libgomp ends those that are not asked for, and makes them anew at the next operation.
template <typename Work>
int in_parallel(int64_t threads, int64_t parts, const Work& work) {
  struct Shared {
    const Work& work;
    const int64_t parts;
    std::atomic<int64_t> next{0};
    std::atomic<int> failed{0};
    // the runtime may give fewer threads than asked for, so parts are taken and not dealt out
    static void run(void* self) {
      auto& shared = *static_cast<Shared*>(self);
      try {
        for (int64_t part = shared.next++; part < shared.parts; part = shared.next++) shared.work(part);
      } catch (const std::bad_alloc&) {
        shared.failed = 1;
      }
    }
  } shared{work, parts};
  if (GOMP_parallel) {
    GOMP_parallel(Shared::run, &shared, unsigned(threads), 0);
    return shared.failed;
  }
  std::vector<std::thread> others;
  try {
    for (int64_t t = 1; t < parts; ++t) others.emplace_back(Shared::run, &shared);
  } catch (const std::exception&) {
    // no more threads to be had: those there are take all parts
  }
  Shared::run(&shared);
  for (auto& other : others) other.join();
  return shared.failed;
}
