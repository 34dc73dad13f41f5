// The lock of a directory, for as long as the object lives. It also keeps out a second store of the same process.
//
// It is an open-file-description lock, which a fork shares: a child that outlives its parent would hold it. So a fork
// closes the lock files of its parent at once, before anything else runs in it.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace mgd {

constexpr char kLock[] = "LOCK";

class DirectoryLock {
  public:
    // Takes the lock and writes our process id into its file. Nothing when another store has it: `holder` is then the
    // id of its process, 0 if unknown.
    static std::optional<DirectoryLock> take(int directory, const std::string& path, int64_t* holder);
    ~DirectoryLock() { release(); }
    DirectoryLock(DirectoryLock&& other) noexcept : fd_(other.fd_) { other.fd_ = -1; }
    DirectoryLock& operator=(DirectoryLock&&) = delete;
    void release();

  private:
    explicit DirectoryLock(int fd) : fd_(fd) {}

    int fd_;
};

// Whether the lock file is ours as far as its contents tell: a process id, or nothing.
bool is_lock_file(int directory, const std::string& path);

}  // namespace mgd
