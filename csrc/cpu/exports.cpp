#include "exports.h"

#include "isa.h"

const char* dalle_fast_source_digest() { return DALLE_FAST_SOURCE_DIGEST; }

void dalle_fast_set_parallel_for(dalle_fast::ParallelFor parallel_for) { dalle_fast::set_parallel_for(parallel_for); }

int32_t dalle_fast_isa() { return static_cast<int32_t>(dalle_fast::current_isa()); }

int32_t dalle_fast_isa_supported(int32_t isa) {
  return isa >= 0 && isa < dalle_fast::kIsaCount && dalle_fast::isa_supported(static_cast<dalle_fast::Isa>(isa));
}

void dalle_fast_set_isa(int32_t isa) { dalle_fast::set_isa(static_cast<dalle_fast::Isa>(isa)); }
