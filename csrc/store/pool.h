// A pool of page-aligned buffers under one byte limit. Sizes are exact (rounded up to a page, never to a power of
// two: an entry of 2.1 GB does not cost 4). A released buffer is kept for the next request of its size and
// unmapped when a request of another size needs the room, so mapped memory never exceeds the limit.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <unordered_map>
#include <vector>

namespace mgd {

constexpr size_t kPage =
    4096;  // alignment of memory, file offsets and lengths: what O_DIRECT requires on every file system

constexpr uint64_t round_up(uint64_t n, uint64_t unit) { return (n + unit - 1) / unit * unit; }

// Page-aligned memory outside any pool, for headers. Throws std::bad_alloc.
struct FreeMemory {
    void operator()(char* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<char, FreeMemory>;
inline AlignedBytes aligned_bytes(size_t bytes) {
    auto* p = static_cast<char*>(std::aligned_alloc(kPage, round_up(bytes, kPage)));
    if (p == nullptr) throw std::bad_alloc();
    return AlignedBytes(p);
}

class BufferPool;

// Owner of one buffer; hands it back to the pool when destroyed, and keeps the pool alive until then.
class Buffer {
  public:
    Buffer(std::shared_ptr<BufferPool> pool, char* data, size_t bytes)
        : pool_(std::move(pool)), data_(data), bytes_(bytes) {}
    ~Buffer();
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    char* data() const { return data_; }
    size_t size() const { return bytes_; }

  private:
    std::shared_ptr<BufferPool> pool_;
    char* data_;
    size_t bytes_;
};

using BufferPtr = std::shared_ptr<Buffer>;

class BufferPool : public std::enable_shared_from_this<BufferPool> {
  public:
    struct Stats {
        uint64_t limit, mapped, in_use, peak, reused;
    };
    // Called with fresh memory before its first use and before it is unmapped (to pin it for a GPU and back).
    // Never called under the pool's lock.
    using Hook = std::function<void(void*, size_t)>;

    explicit BufferPool(uint64_t limit) : limit_(limit) {}
    ~BufferPool() { trim(); }

    void set_hooks(Hook mapped, Hook unmapping);

    // A buffer of `bytes` (rounded up to a page), or null when the limit leaves no room now.
    // Throws std::bad_alloc when the system has no memory.
    BufferPtr try_acquire(size_t bytes);

    // To wait without losing a wake-up: read ticket(), try, and wait(ticket) for any release after the reading.
    uint64_t ticket() const;
    void wait(uint64_t ticket);
    void nudge();  // wakes the waiters as a release does
    unsigned waiters() const;

    void trim();  // unmaps the buffers that are not in use
    uint64_t limit() const { return limit_; }
    Stats stats() const;

  private:
    friend class Buffer;
    struct Block {
        char* data;
        size_t bytes;
    };
    void release(char* data, size_t bytes);
    void unmap(const std::vector<Block>& blocks);

    const uint64_t limit_;
    mutable std::mutex mutex_;
    std::condition_variable released_;
    std::unordered_map<size_t, std::vector<char*>> free_;
    uint64_t mapped_ = 0, in_use_ = 0, peak_ = 0, reused_ = 0, ticket_ = 0;
    unsigned waiters_ = 0;
    Hook mapped_hook_, unmapping_hook_;
};

}  // namespace mgd
