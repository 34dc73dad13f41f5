// Faults on demand, for tests: the nth system call of a kind from now on fails in a chosen way. Only a build with the
// CMake option MGD_FAULT_INJECTION has them; in any other, hit() is a constant and the compiler drops the faults.
#pragma once

#include <string>
#include <vector>

namespace mgd::faults {

enum class Kind {
    none,
    short_read,
    short_write,
    interrupted,     // EINTR
    read_error,      // EIO
    write_error,     // EIO
    no_space,        // ENOSPC
    zero_write,      // a write that makes no progress
    open_read_only,  // EROFS
    refuse_direct,   // EINVAL to a transfer through O_DIRECT
    sync_error,      // EIO from fsync
    rename_error,    // EIO
    list_error,      // EIO from reading a directory
    thread_error,    // EAGAIN from making a thread
    killed,          // SIGKILL before a call that changes the disk
    recorded,        // no fault: such calls are noted
};

#ifdef MGD_FAULT_INJECTION

// Arms one fault: calls nth, nth + 1, ... nth + times - 1 of that kind are hit (nth counts from 1).
// "none" disarms. Returns how many calls of the kind armed before were seen. Throws BadStoreArgument on an unknown
// name.
long arm(const std::string& kind, long nth, long times);

// What was recorded: the call and the last part of the path, in order.
std::vector<std::string> record();

// To be called before every system call that changes the disk.
void change(const char* call, const std::string& path);

// Whether this call is to fail. Costs one relaxed load when nothing is armed.
bool hit(Kind kind);

#else

constexpr bool hit(Kind) { return false; }
inline void change(const char*, const std::string&) {}

#endif

}  // namespace mgd::faults
