// The tiered store: entries of named tensors in host memory or on disk, written once and read back in an order known
// beforehand. Every entry is cut into chunks; a chunk is the unit of buffering, of I/O and of checksums.
//
//   put       copies chunk by chunk into pool buffers. In the host tier they stay there; for the disk tier a thread
//             writes each and releases its buffer, so a put returns when its last chunk is copied (write-behind).
//   prefetch  reads chunks of the given entries, in order, into buffers that are free.
//   get       takes each chunk from its buffer, or reads it now, a few chunks ahead.
//   reserve   lends out a buffer, which commit then writes as it is; view lends one out with an entry of one chunk.
//
// Why nothing blocks forever: a thread waits for a buffer only while it holds none, or holds buffers of the host
// tier, whose total is bounded below the pool's limit by `staging`, or leases, which leave room for the largest chunk
// (lease.h). All other buffers are being written, read or copied, which ends by itself, or are prefetched, and then a
// waiter drops them (they are still on disk).
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "store/direct_file.h"
#include "store/directory.h"
#include "store/entry.h"
#include "store/format.h"
#include "store/io_threads.h"
#include "store/lease.h"
#include "store/meter.h"
#include "store/pool.h"

namespace mgd {

struct StoreOptions {
    uint64_t host_bytes = 0;     // limit of the pool: host tier and staging together
    uint64_t staging_bytes = 0;  // the part of it the host tier may not fill
    uint64_t chunk_bytes = 0;    // of new entries; a multiple of kPage, at most staging_bytes where there is a disk
    std::string directory;       // empty: no disk tier
    uint64_t disk_bytes = 0;
    bool persistent = false, durable = false;
    unsigned threads = 2;
};

class TieredStore {
  public:
    explicit TieredStore(const StoreOptions& options);
    ~TieredStore();

    Header layout(std::string key, bool sequence, std::vector<TensorInfo> tensors) const;

    // One pointer per tensor. put copies out of the pointers, get into them. put throws StoreFull (whose text is the
    // tier's name) before it copies anything.
    void put(Header header, const std::vector<const void*>& sources, Tier tier);
    void get(const std::string& key, const std::vector<void*>& targets, bool keep = false);
    void prefetch(const std::vector<std::string>& keys);
    void remove(const std::string& key);
    void clear();  // every entry, in one step: a process that ends meanwhile leaves all of them or none

    // Without a copy. Both leases are null where their account has no room; a view is also null for an entry that is
    // not one chunk of the disk tier. A committed buffer becomes the entry: writing to it afterwards damages the entry,
    // and get reports it. keep (of get, too): the entry will be read again soon, so its buffers stay filled while
    // their room is not needed.
    std::unique_ptr<Lease> reserve(uint64_t bytes);
    void commit(std::string key, bool sequence, std::vector<TensorInfo> tensors, const Lease& lease);
    std::unique_ptr<Lease> view(const std::string& key, bool keep);

    struct Description {
        Tier tier;
        bool sequence;
        std::vector<TensorInfo> tensors;
    };
    Description describe(const std::string& key) const;  // throws what get would about a damaged header
    bool contains(const std::string& key) const;
    std::vector<std::string> keys() const;  // sorted

    void flush();  // waits for every write; throws the error of one that failed
    void check();  // throws the error of a write that has failed by now, without waiting
    void close();  // flush, then releases everything; idempotent. A scratch store forgets failed writes.

    struct Stats {
        BufferPool::Stats pool;
        uint64_t host_limit, host_used, disk_limit, disk_used, disk_peak, entries, prefetch_hits, prefetch_drops;
        uint64_t committed, viewed;            // without a copy
        Meter::Reading put, get, write, read;  // copies in and out of buffers; files
        bool direct;
        std::string why_buffered, directory;
    };
    Stats stats() const;
    BufferPool& pool() { return *pool_; }

    // The store belongs to the process that made it; in a fork only forgetting it is safe.
    bool forked() const;

  private:
    friend class Put;
    friend class Get;

    void enter();  // a call begins; throws StoreClosed
    void leave();
    struct Use {
        explicit Use(TieredStore& s) : store(&s) { s.enter(); }
        ~Use() { end(); }
        void end() {
            if (store != nullptr) store->leave();
            store = nullptr;
        }
        TieredStore* store;
    };

    void load_entries();
    EntryPtr find(const std::string& key) const;  // with mutex_ held; throws MissingKey
    BufferPtr acquire(size_t bytes);
    size_t buffer_size(const Entry& entry, uint32_t chunk) const;
    bool drop_one_prefetched();
    void pump();
    BufferPtr take(const EntryPtr& entry, uint32_t chunk, bool wait, bool* verified);
    void read_ahead(const EntryPtr& entry, uint32_t from, uint32_t to);
    void load_later(const EntryPtr& entry, uint32_t chunk, BufferPtr buffer, bool urgent);
    void read_chunk(const Entry& entry, uint32_t chunk, Buffer& buffer);  // unverified
    void write_chunk(const EntryPtr& entry, uint32_t chunk, const Buffer& buffer);
    void discard_file(Entry& entry);  // with names_mutex_ held
    void finish_part(const EntryPtr& entry, std::exception_ptr error);
    void finish(const EntryPtr& entry);
    void forget(Entry& entry);  // with mutex_ held

    const StoreOptions options_;
    std::shared_ptr<BufferPool> pool_;
    std::optional<StoreDirectory> directory_;
    IoMode mode_;
    const int owner_;

    std::mutex names_mutex_;  // orders renames and removals; taken before mutex_
    mutable std::mutex mutex_;
    mutable std::condition_variable changed_;  // an entry, a chunk or the number of calls changed state
    std::map<std::string, EntryPtr> entries_;
    StoreId id_{};                                          // of the entries that are written from now on
    std::deque<std::pair<EntryPtr, uint32_t>> wanted_;      // to prefetch: entry and its next chunk
    std::deque<std::pair<EntryPtr, uint32_t>> prefetched_;  // in order of issue
    uint64_t host_used_ = 0, disk_used_ = 0, disk_peak_ = 0, sequence_ = 0, hits_ = 0, drops_ = 0;
    int calls_ = 0, writing_ = 0;
    int removing_ = 0;  // files that will be gone soon: a put that lacks room waits for them
    bool closing_ = false, closed_ = false;
    bool suspect_ = false;  // a write has failed; the entry may be gone since
    Meter put_, get_, write_, read_;
    const std::shared_ptr<LeaseAccount> leases_;
    std::atomic<uint64_t> committed_{0}, viewed_{0}, last_reserved_{0};

    IoThreads io_;  // last: its threads use everything above
};

// One entry on its way in: fill the buffer of each chunk and commit it, then close. Without close nothing is stored.
class Put {
  public:
    Put(TieredStore& store, Header header, Tier tier);
    ~Put() { abort(); }
    const Header& header() const;
    BufferPtr buffer(uint32_t chunk, bool wait);  // null when none is free and !wait; padding is zero already
    void commit(uint32_t chunk, BufferPtr buffer, uint64_t sum);  // sum: checksum of the buffer
    // Without one: a thread computes it before it writes the chunk, and an entry of the host tier has none.
    void commit(uint32_t chunk, BufferPtr buffer);
    void close();
    void abort();  // no effect after close

  private:
    void accept(uint32_t chunk, BufferPtr buffer, bool summed);

    TieredStore::Use use_;
    EntryPtr entry_;
};

// One entry on its way out.
class Get {
  public:
    Get(TieredStore& store, const std::string& key);  // waits until the entry is written
    const Header& header() const;
    Tier tier() const { return entry_->tier; }
    size_t buffer_size(uint32_t i) const { return use_.store->buffer_size(*entry_, i); }
    // The chunk, not yet verified; null when it needs a buffer, none is free and !wait.
    BufferPtr chunk(uint32_t i, bool wait);
    void verify(uint32_t i, uint64_t sum, const char* data) const;  // throws CorruptState unless chunk i is as stored
    bool summed() const { return entry_->summed; }                  // whether there is a sum to verify
    bool verified() const { return verified_; }              // whether the last chunk was kept, and is known to be good
    void keep(uint32_t i, BufferPtr buffer, bool verified);  // for the next get
    void end();

  private:
    TieredStore::Use use_;
    EntryPtr entry_;
    bool verified_ = false;
};

}  // namespace mgd
