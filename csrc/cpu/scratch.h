// Memory that ops compute in.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace dalle_fast {

// Memory of one thread, kept from call to call: fresh pages cost more than what is done with them. On a cache line's bounds: a
// vector that crosses them costs two accesses.
class Scratch {
 public:
  float* take(int64_t floats) {
    if (floats > size_) {
      memory_.reset();
      memory_.reset(new (std::align_val_t{64}) float[floats]);
      size_ = floats;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(float* memory) const { operator delete[](memory, std::align_val_t{64}); }
  };
  std::unique_ptr<float[], Free> memory_;
  int64_t size_ = 0;
};

inline thread_local Scratch of_tasks;  // of the task that a thread is at

}  // namespace dalle_fast
