// A small persistent thread pool. Workers sleep between jobs and never spin.

#pragma once

#include <cstdint>

namespace mgd {

// Calls body(context, i) once for every i in [0, items), on up to `threads` threads, the calling one among them, and
// returns when all are done. Runs everything on the calling thread where `threads` is 1, where the pool is busy with
// another caller's job, or where no thread can be started. `body` must not throw.
void parallel_for(int threads, int64_t items, void (*body)(void*, int64_t), void* context);

}  // namespace mgd
