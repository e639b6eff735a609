// Instruction sets: the one place that knows which exist, and the one way a kernel is chosen among them.
//
// A file named *_kernel.cpp is compiled once for each instruction set, with DALLE_FAST_ISA naming the set (dalle_fast/_build.py
// holds the flags). Everything in it lives in dalle_fast::DALLE_FAST_ISA, and it includes no C++ standard header: an inline
// function shared between sets could be linked in from the wrong one.
//
// amx is avx512 with matrix tiles besides: files named *_amx_kernel.cpp are compiled for it alone, and what has none of them
// runs as with avx512. Where the compiler does not know the tiles, DALLE_FAST_HAS_AMX is not defined and the set is not there.
#pragma once

#include <cstdint>

namespace dalle_fast {

enum class Isa : int { baseline = 0, avx2 = 1, avx512 = 2, amx = 3 };
constexpr int kIsaCount = 4;

bool isa_supported(Isa isa);  // by this processor, this operating system and this build
Isa current_isa();
void set_isa(Isa isa);  // the caller checked that it is supported

}  // namespace dalle_fast

// DALLE_FAST_KERNEL(name, (int n, float* out), (n, out)) declares `name` for every instruction set and defines
// dalle_fast::name, which calls the one in force.
#if defined(__x86_64__)
#define DALLE_FAST_KERNEL(name, parameters, arguments)      \
  namespace dalle_fast {                                    \
  namespace baseline {                                      \
  void name parameters;                                     \
  }                                                         \
  namespace avx2 {                                          \
  void name parameters;                                     \
  }                                                         \
  namespace avx512 {                                        \
  void name parameters;                                     \
  }                                                         \
  inline void name parameters {                             \
    switch (current_isa()) {                                \
      case Isa::amx:                                        \
      case Isa::avx512:                                     \
        return avx512::name arguments;                      \
      case Isa::avx2:                                       \
        return avx2::name arguments;                        \
      case Isa::baseline:                                   \
        return baseline::name arguments;                    \
    }                                                       \
  }                                                         \
  }
#else
#define DALLE_FAST_KERNEL(name, parameters, arguments) \
  namespace dalle_fast {                               \
  namespace baseline {                                 \
  void name parameters;                                \
  }                                                    \
  inline void name parameters {                        \
    baseline::name arguments;                          \
  }                                                    \
  }
#endif
