// Buffers of the pool in the hands of the store's user: reserved, to be written and committed without a copy, or
// viewed, with an entry's contents. Their holder may still wait for another buffer, so the account holds enough back
// for every wait to end: leases and the largest chunk of any entry together never exceed the pool's staging part.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>

#include "store/pool.h"

namespace mgd {

constexpr uint64_t kLeaseUnit = 16 * kPage;  // large reserved buffers are multiples of it: fewer sizes

class LeaseAccount {
  public:
    LeaseAccount(uint64_t staging, uint64_t chunk) : staging_(staging), largest_(chunk) {}

    // There is an entry with chunks of this size. Those of a reopened store are known before any lease.
    void know(uint64_t chunk) {
        std::lock_guard lock(mutex_);
        largest_ = std::max(largest_, chunk);
    }

    // Room for one more lease, of a buffer that may become a chunk of its whole size; false where there is none now.
    bool take(uint64_t bytes) {
        std::lock_guard lock(mutex_);
        const uint64_t largest = std::max(largest_, bytes);
        if (bytes > staging_ || out_ + bytes + largest > staging_) return false;
        largest_ = largest;
        out_ += bytes;
        return true;
    }

    void give_back(uint64_t bytes) {
        std::lock_guard lock(mutex_);
        out_ -= bytes;
    }

  private:
    std::mutex mutex_;
    const uint64_t staging_;
    uint64_t largest_, out_ = 0;
};

// One of them. It may outlive the store.
class Lease {
  public:
    // Null when the account has no room. The buffer is filled in later.
    static std::unique_ptr<Lease> take(const std::shared_ptr<LeaseAccount>& account, uint64_t bytes) {
        bytes = round_up(std::max<uint64_t>(bytes, 1), bytes < 16 * kLeaseUnit ? kPage : kLeaseUnit);
        if (!account->take(bytes)) return nullptr;
        return std::unique_ptr<Lease>(new Lease(account, bytes));
    }
    ~Lease() {
        buffer.reset();
        account_->give_back(bytes_);
    }
    Lease(const Lease&) = delete;
    Lease& operator=(const Lease&) = delete;
    uint64_t bytes() const { return bytes_; }

    BufferPtr buffer;

  private:
    Lease(std::shared_ptr<LeaseAccount> account, uint64_t bytes) : account_(std::move(account)), bytes_(bytes) {}

    std::shared_ptr<LeaseAccount> account_;
    uint64_t bytes_;
};

}  // namespace mgd
