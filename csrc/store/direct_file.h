// One file of a store, read and written at explicit offsets, past the page cache where the file system allows it.
// Every transfer is checked: short ones are continued, EINTR is retried, no progress is an error.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <string>

namespace mgd {

// Whether the files of one directory use O_DIRECT. The first refusal is remembered, with its reason.
class IoMode {
  public:
    bool direct() const { return direct_.load(std::memory_order_relaxed); }
    void refuse(const std::string& why);
    std::string why() const;  // empty while direct

  private:
    std::atomic<bool> direct_{true};
    mutable std::mutex mutex_;
    std::string why_;
};

class DirectFile {
  public:
    // `name` inside the open directory `directory`; `path` is for messages. Symbolic links are never followed.
    static DirectFile create(int directory, const std::string& name, std::string path, IoMode& mode);
    static DirectFile open(int directory, const std::string& name, std::string path, IoMode& mode);
    ~DirectFile();
    DirectFile(DirectFile&& other) noexcept;
    DirectFile& operator=(DirectFile&&) = delete;

    // Memory, length and offset are multiples of kPage. Both throw StoreIOError.
    void write(const void* data, size_t bytes, uint64_t offset);
    size_t read(void* data, size_t bytes, uint64_t offset);  // fewer bytes than asked only at the end of the file

    void reserve(uint64_t bytes);  // allocates the blocks, so that a full disk shows early; a no-op where unsupported
    void sync();                   // data and length to the medium
    uint64_t size() const;
    const std::string& path() const { return path_; }

  private:
    DirectFile(int fd, std::string path, IoMode& mode, bool direct)
        : fd_(fd), path_(std::move(path)), mode_(&mode), direct_(direct) {}
    static DirectFile open_with(int directory, const std::string& name, std::string path, IoMode& mode, int flags);
    void leave_direct();
    template <class Call>
    size_t transfer(const char* what, size_t bytes, uint64_t offset, Call call);

    int fd_;
    std::string path_;
    IoMode* mode_;
    std::atomic<bool> direct_;
};

}  // namespace mgd
