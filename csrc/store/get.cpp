// The way out: prefetch, read-ahead, verification, copies.
#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <utility>

#include "store/checksum.h"
#include "store/errors.h"
#include "store/store.h"

namespace mgd {

void TieredStore::read_chunk(const Entry& entry, uint32_t chunk, Buffer& buffer) {
    const Header& h = entry.header;
    const size_t bytes = h.chunk_size(chunk);
    const uint64_t offset = h.header_bytes + chunk * h.chunk_bytes;
    const std::string path = directory_->path_of(entry.name);
    Meter::Span span(read_, bytes);
    DirectFile file = DirectFile::open(directory_->fd(), entry.name, path, mode_);
    const size_t have = file.read(buffer.data(), bytes, offset);
    if (have < bytes)
        throw CorruptState(h.key, chunk,
                           path + ": expected " + std::to_string(bytes) + " bytes at offset " + std::to_string(offset) +
                               "; got a file that ends after " + std::to_string(have));
    span.done();
}

// Reads a chunk (already marked as loading) in a thread. A failure leaves it absent: the get that needs it reads it
// again and reports the failure.
void TieredStore::load_later(const EntryPtr& entry, uint32_t chunk, BufferPtr buffer, bool urgent) {
    auto job = [this, entry, chunk, buffer = std::move(buffer)]() mutable {
        bool good = true;
        try {
            read_chunk(*entry, chunk, *buffer);
        } catch (...) {
            good = false;
        }
        {
            std::lock_guard lock(mutex_);
            Entry::Slot& slot = entry->slots[chunk];
            const auto found = entries_.find(entry->header.key);
            good = good && found != entries_.end() && (found->second == entry || slot.awaited != 0);
            slot.state = good ? Entry::Chunk::loaded : Entry::Chunk::absent;
            slot.verified = false;
            if (good) slot.buffer = std::move(buffer);
        }
        buffer.reset();
        changed_.notify_all();
        pool_->nudge();  // a loaded chunk is one that a waiter may drop
    };
    io_.submit(std::move(job), urgent);
}

void TieredStore::prefetch(const std::vector<std::string>& keys) {
    Use use(*this);
    {
        std::lock_guard lock(mutex_);
        std::vector<EntryPtr> found;
        for (const std::string& key : keys) found.push_back(find(key));
        for (EntryPtr& entry : found)
            if (entry->tier == Tier::disk) wanted_.emplace_back(std::move(entry), 0);
    }
    pump();
}

// Starts as many of the wanted reads as there are free buffers, unless somebody waits for one.
void TieredStore::pump() {
    std::lock_guard lock(mutex_);
    while (!prefetched_.empty() &&
           prefetched_.front().first->slots[prefetched_.front().second].state == Entry::Chunk::absent)
        prefetched_.pop_front();
    while (!wanted_.empty() && !closing_) {
        auto& [entry, next] = wanted_.front();
        const auto found = entries_.find(entry->header.key);
        const bool gone = found == entries_.end() || found->second != entry;
        if (!gone && entry->state == Entry::State::writing) return;  // finish() pumps again
        if (gone || entry->state == Entry::State::failed || next == entry->header.chunks() ||
            entry->header.chunk_bytes > options_.staging_bytes) {
            wanted_.pop_front();
            continue;
        }
        if (entry->slots[next].state == Entry::Chunk::absent) {
            BufferPtr buffer;
            try {
                if (pool_->waiters() == 0) buffer = pool_->try_acquire(buffer_size(*entry, next));
            } catch (const std::bad_alloc&) {
                // the same as no room
            }
            if (!buffer) return;
            entry->slots[next].state = Entry::Chunk::loading;
            prefetched_.emplace_back(entry, next);
            load_later(entry, next, std::move(buffer), false);
        }
        ++next;
    }
}

// Starts reads of the chunks [from, to) while buffers are free.
void TieredStore::read_ahead(const EntryPtr& entry, uint32_t from, uint32_t to) {
    for (uint32_t i = from; i < std::min(to, entry->header.chunks()); ++i) {
        std::lock_guard lock(mutex_);
        if (entry->slots[i].state != Entry::Chunk::absent) continue;
        BufferPtr buffer = pool_->try_acquire(buffer_size(*entry, i));
        if (!buffer) return;
        entry->slots[i].state = Entry::Chunk::loading;
        prefetched_.emplace_back(entry, i);
        load_later(entry, i, std::move(buffer), true);
    }
}

// The chunk's contents: from its buffer, or from the file.
BufferPtr TieredStore::take(const EntryPtr& entry, uint32_t chunk, bool wait, bool* verified) {
    Entry::Slot& slot = entry->slots[chunk];
    *verified = false;
    {
        std::unique_lock lock(mutex_);
        ++slot.awaited;
        changed_.wait(lock, [&] { return slot.state != Entry::Chunk::loading; });
        --slot.awaited;
        if (slot.state == Entry::Chunk::loaded) {
            slot.state = Entry::Chunk::absent;
            *verified = std::exchange(slot.verified, false);
            ++hits_;
            return std::move(slot.buffer);
        }
    }
    const size_t bytes = buffer_size(*entry, chunk);
    BufferPtr buffer = wait ? acquire(bytes) : pool_->try_acquire(bytes);
    if (buffer) read_chunk(*entry, chunk, *buffer);
    return buffer;
}

Get::Get(TieredStore& store, const std::string& key) : use_(store) {
    std::unique_lock lock(store.mutex_);
    entry_ = store.find(key);
    store.changed_.wait(lock, [this] { return entry_->state != Entry::State::writing; });
    if (entry_->error) std::rethrow_exception(entry_->error);
    if (entry_->tier == Tier::disk && entry_->header.chunk_bytes > store.options_.staging_bytes &&
        entry_->header.payload_bytes > store.options_.staging_bytes)
        throw StoreFull(entry_->header.chunk_bytes, store.options_.staging_bytes, "staging");
}

void Get::verify(uint32_t i, uint64_t sum, const char* data) const {
    const Header& h = entry_->header;
    if (sum == h.sums[i] && h.possible(i, data)) return;
    char text[96] = "expected bools of 0 and 1; got other bytes";
    if (sum != h.sums[i])
        std::snprintf(text, sizeof text, "expected checksum %016" PRIx64 "; got %016" PRIx64, h.sums[i], sum);
    const bool on_disk = entry_->tier == Tier::disk;
    throw CorruptState(h.key, i,
                       (on_disk ? use_.store->directory_->path_of(entry_->name) : "host memory") + ": " + text);
}

const Header& Get::header() const { return entry_->header; }

BufferPtr Get::chunk(uint32_t i, bool wait) {
    TieredStore* store = use_.store;
    if (entry_->tier == Tier::host) return entry_->slots[i].buffer;  // constant since the entry is ready
    store->read_ahead(entry_, i + 1, i + 1 + 2 * store->io_.count());
    store->pump();  // the buffer of the chunk before is free again
    return store->take(entry_, i, wait, &verified_);
}

void Get::keep(uint32_t i, BufferPtr buffer, bool verified) {
    TieredStore* store = use_.store;
    std::lock_guard lock(store->mutex_);
    const auto found = store->entries_.find(entry_->header.key);
    Entry::Slot& slot = entry_->slots[i];
    if (entry_->tier != Tier::disk || found == store->entries_.end() || found->second != entry_ ||
        slot.state != Entry::Chunk::absent)
        return;
    slot.state = Entry::Chunk::loaded;
    slot.buffer = std::move(buffer);
    slot.verified = verified;
    store->prefetched_.emplace_front(entry_, i);
}

void Get::end() {
    if (use_.store != nullptr) use_.store->pump();
    use_.end();
}

void TieredStore::get(const std::string& key, const std::vector<void*>& targets, bool keep) {
    Get get(*this, key);
    const Header& h = get.header();
    Meter::Span span(get_, h.tensor_bytes());
    for (uint32_t i = 0; i < h.chunks(); ++i) {
        BufferPtr buffer = get.chunk(i, true);
        const std::vector<Piece> pieces = h.pieces(i);
        const auto to = [&](const Piece& p) { return static_cast<char*>(targets[p.tensor]) + p.tensor_offset; };
        const auto scatter = [&](size_t begin, size_t end) {  // into the cache: what is fetched is used next
            for (const Piece& p : pieces) {
                const size_t a = std::max(begin, p.chunk_offset), b = std::min(end, p.chunk_offset + p.bytes);
                if (a < b) std::memcpy(to(p) + (a - p.chunk_offset), buffer->data() + a, b - a);
            }
        };
        if (get.verified() || !get.summed()) {
            scatter(0, h.chunk_size(i));
        } else {
            get.verify(i, checksum_in_tiles(buffer->data(), h.chunk_size(i), nullptr, scatter), buffer->data());
        }
        if (keep) get.keep(i, std::move(buffer), true);
    }
    get.end();
    span.done();
}

}  // namespace mgd
