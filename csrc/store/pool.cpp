#include "store/pool.h"

#include <sys/mman.h>

#include <algorithm>

namespace mgd {

namespace {

constexpr size_t kHugePage = 2 << 20;

// Fresh zeroed memory, in huge pages as far as it has whole ones: fewer faults and shorter I/O vectors. Null when the
// system has none.
char* map(size_t bytes) {
    const size_t slack = bytes >= kHugePage ? kHugePage - kPage : 0;  // to begin at a huge page
    void* found = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return nullptr;
    char* begin = static_cast<char*>(found);
    char* data = begin;
    if (slack != 0) {
        data += round_up(reinterpret_cast<uintptr_t>(begin), kHugePage) - reinterpret_cast<uintptr_t>(begin);
        if (data != begin) munmap(begin, static_cast<size_t>(data - begin));
        if (data != begin + slack) munmap(data + bytes, static_cast<size_t>(begin + slack - data));
    }
    madvise(data, bytes, MADV_HUGEPAGE);  // harmless where refused
    return data;
}

}  // namespace

Buffer::~Buffer() { pool_->release(data_, bytes_); }

void BufferPool::set_hooks(Hook mapped, Hook unmapping) {
    mapped_hook_ = std::move(mapped);
    unmapping_hook_ = std::move(unmapping);
}

BufferPtr BufferPool::try_acquire(size_t bytes) {
    bytes = std::max<size_t>(round_up(bytes, kPage), kPage);
    std::vector<Block> evicted;
    {
        std::lock_guard lock(mutex_);
        auto& same_size = free_[bytes];
        if (!same_size.empty()) {
            char* data = same_size.back();
            same_size.pop_back();
            in_use_ += bytes;
            ++reused_;
            return std::make_shared<Buffer>(shared_from_this(), data, bytes);
        }
        if (in_use_ + bytes > limit_) return nullptr;
        for (auto it = free_.begin(); it != free_.end() && mapped_ + bytes > limit_;) {
            while (!it->second.empty() && mapped_ + bytes > limit_) {
                evicted.push_back({it->second.back(), it->first});
                it->second.pop_back();
                mapped_ -= it->first;
            }
            it = it->second.empty() ? free_.erase(it) : std::next(it);
        }
        mapped_ += bytes;
        in_use_ += bytes;
        peak_ = std::max(peak_, mapped_);
    }
    unmap(evicted);
    char* data = map(bytes);
    if (data == nullptr) {
        std::lock_guard lock(mutex_);
        mapped_ -= bytes;
        in_use_ -= bytes;
        throw std::bad_alloc();
    }
    if (mapped_hook_) mapped_hook_(data, bytes);
    return std::make_shared<Buffer>(shared_from_this(), data, bytes);
}

void BufferPool::release(char* data, size_t bytes) {
    {
        std::lock_guard lock(mutex_);
        free_[bytes].push_back(data);
        in_use_ -= bytes;
        ++ticket_;
    }
    released_.notify_all();
}

uint64_t BufferPool::ticket() const {
    std::lock_guard lock(mutex_);
    return ticket_;
}

void BufferPool::wait(uint64_t ticket) {
    std::unique_lock lock(mutex_);
    ++waiters_;
    released_.wait(lock, [&] { return ticket_ != ticket; });
    --waiters_;
}

void BufferPool::nudge() {
    {
        std::lock_guard lock(mutex_);
        ++ticket_;
    }
    released_.notify_all();
}

unsigned BufferPool::waiters() const {
    std::lock_guard lock(mutex_);
    return waiters_;
}

void BufferPool::unmap(const std::vector<Block>& blocks) {
    for (const Block& block : blocks) {
        if (unmapping_hook_) unmapping_hook_(block.data, block.bytes);
        munmap(block.data, block.bytes);
    }
}

void BufferPool::trim() {
    std::vector<Block> evicted;
    {
        std::lock_guard lock(mutex_);
        for (auto& [bytes, blocks] : free_) {
            for (char* data : blocks) evicted.push_back({data, bytes});
            mapped_ -= bytes * blocks.size();
        }
        free_.clear();
    }
    unmap(evicted);
}

BufferPool::Stats BufferPool::stats() const {
    std::lock_guard lock(mutex_);
    return {limit_, mapped_, in_use_, peak_, reused_};
}

}  // namespace mgd
