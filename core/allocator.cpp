#include "core/allocator.hpp"

#include <malloc.h>

namespace shardtune {

void tune_allocator() {
  // By default every tensor above 32 MiB is mapped afresh and faulted in page by page, each time.
  ::mallopt(M_MMAP_MAX, 0);
  ::mallopt(M_TRIM_THRESHOLD, -1);
  ::mallopt(M_TOP_PAD, 64 << 20);
}

}  // namespace shardtune
