// Several threads at once, on those that PyTorch has already where its OpenMP is libgomp.
//
// libgomp's threads keep their processors busy for a while after each operation, waiting for the next. Threads of our
// own have to share with them: between two matrix products of PyTorch's, a kernel took twice as long.

#pragma once

#include <atomic>
#include <cstdint>
#include <thread>
#include <vector>

extern "C" void GOMP_parallel(void (*)(void*), void*, unsigned, unsigned) __attribute__((weak));

// work(0), ..., work(parts - 1), each once, on as many threads
template <typename Work>
void in_parallel(int64_t parts, const Work& work) {
  struct Shared {
    const Work& work;
    const int64_t parts;
    std::atomic<int64_t> next{0};
    // the runtime may give fewer threads than asked for, so parts are taken and not dealt out
    static void run(void* self) {
      auto& shared = *static_cast<Shared*>(self);
      for (int64_t part = shared.next++; part < shared.parts; part = shared.next++) shared.work(part);
    }
  } shared{work, parts};
  if (GOMP_parallel) {
    GOMP_parallel(Shared::run, &shared, unsigned(parts), 0);
    return;
  }
  std::vector<std::thread> others;
  for (int64_t t = 1; t < parts; ++t) others.emplace_back(Shared::run, &shared);
  Shared::run(&shared);
  for (auto& other : others) other.join();
}
