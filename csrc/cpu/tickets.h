// Phases of tasks inside one parallel region: what barriers between a fixed team of threads would do, for any number of threads.
//
// Every thread walks through the same phases. Tasks are numbered through all of them; a thread takes the next number, goes on to
// the phase it belongs to, waits until every task before that phase is done, and does it. A thread that the machine slows down
// takes fewer tasks, one that starts late joins in, and one alone does everything.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dalle_fast {

class Tickets {
 public:
  int64_t take() { return taken_.fetch_add(1, std::memory_order_relaxed); }
  void finish() { done_.fetch_add(1, std::memory_order_release); }
  bool all_done(int64_t count) const { return done_.load(std::memory_order_acquire) >= count; }

  void wait_for(int64_t count) const {
    for (int spins = 0; !all_done(count); ++spins) {
      if (spins < kSpins) {
        pause();
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  static constexpr int kSpins = 20000;  // about a millisecond: phases are shorter, unless a core was taken away
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  alignas(64) std::atomic<int64_t> taken_{0};
  alignas(64) std::atomic<int64_t> done_{0};
};

// One thread's walk.
class Walk {
 public:
  explicit Walk(Tickets& tickets) : tickets_(tickets), ticket_(tickets.take()) {}

  // Does its share of tasks 0 .. count - 1. `ahead` is told of the next task where that has to wait.
  template <class Task, class Ahead>
  void phase(int64_t count, const Task& task, const Ahead& ahead) {
    const int64_t end = first_ + count;
    while (ticket_ < end) {
      if (!tickets_.all_done(first_)) {
        ahead(ticket_ - first_);
        tickets_.wait_for(first_);
      }
      task(ticket_ - first_);
      tickets_.finish();
      ticket_ = tickets_.take();
    }
    first_ = end;
  }

  template <class Task>
  void phase(int64_t count, const Task& task) {
    phase(count, task, [](int64_t) {});
  }

 private:
  Tickets& tickets_;
  int64_t ticket_;
  int64_t first_ = 0;  // number of the next phase's first task
};

}  // namespace dalle_fast
