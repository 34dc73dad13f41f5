#include "store/store.h"

#include <unistd.h>

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <cstring>

#include "store/checksum.h"
#include "store/errors.h"

namespace mgd {

struct Entry {
    enum class State { writing, ready, failed };
    enum class Chunk { absent, loading, loaded };
    struct Slot {
        Chunk state = Chunk::absent;
        unsigned awaited = 0;  // gets that wait for it: not to be dropped
        BufferPtr buffer;
    };

    Header header;
    Tier tier = Tier::host;
    std::string name;         // of the finished file
    uint64_t file_bytes = 0;  // counted against the disk limit while writing, and afterwards as `published`
    uint64_t published = 0;   // bytes of the file that bears `name` now: this entry's, or the one it replaces
    std::string temporary;

    // All below under the store's mutex, but `file`, which has its own.
    State state = State::writing;
    std::exception_ptr error;
    bool write_failed = false;  // rather than found damaged
    uint32_t parts = 1;         // chunks still to write, and one until the put is closed
    std::vector<Slot> slots;

    std::mutex file_mutex;
    std::unique_ptr<DirectFile> file;
};

// --- opening and closing ---------------------------------------------------------------------------------------

TieredStore::TieredStore(const StoreOptions& options)
    : options_(options),
      pool_(std::make_shared<BufferPool>(options.host_bytes)),
      owner_(getpid()),
      io_(options.directory.empty() ? 0 : std::max(1u, options.threads)) {
    if (options.directory.empty()) return;
    directory_.emplace(options.persistent ? StoreDirectory::persistent(options.directory)
                                          : StoreDirectory::scratch(options.directory));
    if (options.persistent) load_entries();
}

TieredStore::~TieredStore() {
    try {
        close();
    } catch (const std::exception&) {
        // close() has let go of everything; who wants to know of failed writes calls it
    }
}

bool TieredStore::forked() const { return getpid() != owner_; }

void TieredStore::load_entries() {
    directory_->remove_unfinished();
    for (const StoreDirectory::File& found : directory_->entries()) {
        auto entry = std::make_shared<Entry>();
        const std::string path = directory_->path_of(found.name);
        entry->header.key = found.key;
        entry->tier = Tier::disk;
        entry->name = found.name;
        entry->state = Entry::State::ready;
        try {
            if (!found.regular) throw StoreIOError(ELOOP, path, "is not a regular file, and a store follows no links");
            DirectFile file = DirectFile::open(directory_->fd(), found.name, path, mode_);
            entry->published = file.size();
            auto buffer = std::make_shared<BufferPool>(UINT64_MAX)->try_acquire(kPage);
            size_t have = file.read(buffer->data(), kPage, 0);
            if (have < kPage)
                throw CorruptState(found.key, kWholeFile,
                                   path + ": a header of at least " + std::to_string(kPage) +
                                       " bytes was expected, the file ends after " + std::to_string(have));
            const uint64_t length = Header::header_length(buffer->data(), entry->published, found.key, path);
            if (length > kPage) {
                buffer = std::make_shared<BufferPool>(UINT64_MAX)->try_acquire(length);
                have = file.read(buffer->data(), length, 0);
            }
            entry->header = Header::decode(buffer->data(), have, entry->published, found.key, path);
        } catch (const std::runtime_error&) {
            entry->state = Entry::State::failed;  // the other entries are as good as before; get() tells of this one
            entry->error = std::current_exception();
        }
        entry->slots.resize(entry->header.chunks());
        disk_used_ += entry->published;
        entries_[found.key] = entry;
    }
    disk_peak_ = disk_used_;
}

void TieredStore::enter() {
    if (forked())
        throw StoreClosed("the store belongs to process " + std::to_string(owner_) +
                          " and cannot be used in a fork of it; open one there");
    std::lock_guard lock(mutex_);
    if (closing_) throw StoreClosed("the store is closed; open a new one");
    ++calls_;
}

void TieredStore::leave() {
    {
        std::lock_guard lock(mutex_);
        --calls_;
    }
    changed_.notify_all();
}

void TieredStore::flush() {
    Use use(*this);
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return writing_ == 0; });
    for (const auto& [key, entry] : entries_)
        if (entry->write_failed) std::rethrow_exception(entry->error);
}

void TieredStore::close() {
    std::exception_ptr error;
    {
        std::unique_lock lock(mutex_);
        if (closed_) return;
        closing_ = true;
        changed_.wait(lock, [this] { return calls_ == 0 && writing_ == 0; });
        if (closed_) return;
        closed_ = true;
        wanted_.clear();
        for (const auto& [key, entry] : entries_)
            if (options_.persistent && entry->write_failed && !error) error = entry->error;
    }
    io_.stop();
    entries_.clear();
    prefetched_.clear();
    pool_->trim();
    if (directory_) directory_->close();
    if (error) std::rethrow_exception(error);
}

// --- looking up ------------------------------------------------------------------------------------------------

EntryPtr TieredStore::find(const std::string& key) const {
    const auto found = entries_.find(key);
    if (found == entries_.end()) throw MissingKey(key);
    return found->second;
}

TieredStore::Description TieredStore::describe(const std::string& key) const {
    std::lock_guard lock(mutex_);
    const EntryPtr entry = find(key);
    if (entry->error && !entry->write_failed) std::rethrow_exception(entry->error);
    return {entry->tier, entry->header.sequence, entry->header.tensors};
}

bool TieredStore::contains(const std::string& key) const {
    std::lock_guard lock(mutex_);
    return entries_.count(key) != 0;
}

std::vector<std::string> TieredStore::keys() const {
    std::lock_guard lock(mutex_);
    std::vector<std::string> result;
    for (const auto& [key, entry] : entries_) result.push_back(key);
    return result;
}

TieredStore::Stats TieredStore::stats() const {
    std::lock_guard lock(mutex_);
    return {pool_->stats(),  options_.host_bytes - options_.staging_bytes,
            host_used_,      options_.disk_bytes,
            disk_used_,      disk_peak_,
            entries_.size(), hits_,
            drops_,          put_.reading(),
            get_.reading(),  write_.reading(),
            read_.reading(), mode_.direct(),
            mode_.why(),     directory_ ? directory_->path() : ""};
}

// --- room ------------------------------------------------------------------------------------------------------

Header TieredStore::layout(std::string key, bool sequence, std::vector<TensorInfo> tensors) const {
    return Header::make(std::move(key), sequence, std::move(tensors), options_.chunk_bytes);
}

// Lets go of what an entry that left the table holds; a get that is under way keeps what it uses.
void TieredStore::forget(Entry& entry) {
    if (entry.tier == Tier::host) {
        host_used_ -= entry.header.payload_bytes;
        return;
    }
    for (Entry::Slot& slot : entry.slots) {  // what is loading now is let go of when it comes
        if (slot.state != Entry::Chunk::loaded) continue;
        slot.state = Entry::Chunk::absent;
        slot.buffer.reset();
    }
}

// Waits for a buffer; see the header for why that ends.
BufferPtr TieredStore::acquire(size_t bytes) {
    for (;;) {
        const uint64_t ticket = pool_->ticket();
        if (BufferPtr buffer = pool_->try_acquire(bytes)) return buffer;
        if (!drop_one_prefetched()) pool_->wait(ticket);
    }
}

// Lets go of the prefetched chunk that is wanted last. False when there is none.
bool TieredStore::drop_one_prefetched() {
    BufferPtr dropped;  // released after the lock
    std::lock_guard lock(mutex_);
    for (auto it = prefetched_.rbegin(); it != prefetched_.rend(); ++it) {
        Entry::Slot& slot = it->first->slots[it->second];
        if (slot.state != Entry::Chunk::loaded || slot.awaited != 0) continue;
        slot.state = Entry::Chunk::absent;
        dropped = std::move(slot.buffer);
        prefetched_.erase(std::next(it).base());
        ++drops_;
        return true;
    }
    return false;
}

// --- writing ---------------------------------------------------------------------------------------------------

Put::Put(TieredStore& store, Header header, Tier tier) : use_(store) {
    const std::string name = file_name(header.key);  // refuses a key that is too long, in every tier
    std::lock_guard lock(store.mutex_);
    const StoreOptions& o = store.options_;
    uint64_t& used = tier == Tier::host ? store.host_used_ : store.disk_used_;
    const uint64_t limit = tier == Tier::host ? o.host_bytes - o.staging_bytes : store.directory_ ? o.disk_bytes : 0;
    const uint64_t needs = tier == Tier::host ? header.payload_bytes : header.file_bytes();
    const uint64_t has = limit - std::min(limit, used);  // a store may be reopened with less room than it fills
    if (needs > has || (tier == Tier::disk && !store.directory_))
        throw StoreFull(needs, has, tier == Tier::host ? "host" : "disk");
    used += needs;
    entry_ = std::make_shared<Entry>();
    entry_->tier = tier;
    entry_->name = name;
    entry_->slots.resize(header.chunks());
    entry_->header = std::move(header);
    if (tier == Tier::host) return;
    entry_->file_bytes = needs;
    entry_->temporary = temporary_name(name, store.sequence_++);
    store.disk_peak_ = std::max(store.disk_peak_, store.disk_used_);
    ++store.writing_;
}

const Header& Put::header() const { return entry_->header; }

BufferPtr Put::buffer(uint32_t chunk, bool wait) {
    const Header& h = entry_->header;
    const size_t bytes = h.chunk_size(chunk);
    BufferPtr buffer = wait ? use_.store->acquire(bytes) : use_.store->pool_->try_acquire(bytes);
    if (!buffer) return nullptr;
    size_t end = 0;
    for (const Piece& piece : h.pieces(chunk)) {
        std::memset(buffer->data() + end, 0, piece.chunk_offset - end);
        end = piece.chunk_offset + piece.bytes;
    }
    std::memset(buffer->data() + end, 0, bytes - end);
    return buffer;
}

void Put::commit(uint32_t chunk, BufferPtr buffer) {
    TieredStore* store = use_.store;
    {
        std::lock_guard lock(store->mutex_);
        if (entry_->tier == Tier::host) {
            entry_->slots[chunk].state = Entry::Chunk::loaded;
            entry_->slots[chunk].buffer = std::move(buffer);
            return;
        }
        ++entry_->parts;
    }
    store->io_.submit([store, entry = entry_, chunk, buffer = std::move(buffer)]() mutable {
        std::exception_ptr error;
        try {
            store->write_chunk(entry, chunk, buffer);
        } catch (...) {
            error = std::current_exception();
        }
        buffer.reset();
        store->finish_part(entry, error);
    });
}

void Put::close() {
    TieredStore* store = use_.store;
    EntryPtr replaced;
    {
        std::lock_guard names(store->names_mutex_);
        std::unique_lock lock(store->mutex_);
        EntryPtr& current = store->entries_[entry_->header.key];
        replaced = std::move(current);
        current = entry_;
        if (replaced) {
            store->forget(*replaced);
            entry_->published = replaced->published;
            replaced->published = 0;
        }
        if (entry_->tier == Tier::host) {
            entry_->state = Entry::State::ready;
            if (entry_->published != 0) {  // the key moves from disk to memory
                store->disk_used_ -= entry_->published;
                entry_->published = 0;
                lock.unlock();
                store->directory_->unlink(entry_->name);
            }
        }
    }
    const EntryPtr entry = std::move(entry_);
    if (entry->tier == Tier::disk) store->io_.submit([store, entry] { store->finish_part(entry, nullptr); });
    use_.end();
}

void Put::abort() {
    if (!entry_) return;
    TieredStore* store = use_.store;
    const EntryPtr entry = std::move(entry_);
    if (entry->tier == Tier::host) {
        std::lock_guard lock(store->mutex_);
        store->host_used_ -= entry->header.payload_bytes;
    } else {
        store->finish_part(entry, std::make_exception_ptr(std::runtime_error("the put was given up")));
    }
    use_.end();
}

void TieredStore::put(Header header, const std::vector<const void*>& sources, Tier tier) {
    Put put(*this, std::move(header), tier);
    const Header& h = put.header();
    Meter::Span span(put_, h.tensor_bytes());
    for (uint32_t i = 0; i < h.chunks(); ++i) {
        BufferPtr buffer = put.buffer(i, true);
        for (const Piece& p : h.pieces(i))
            std::memcpy(buffer->data() + p.chunk_offset, static_cast<const char*>(sources[p.tensor]) + p.tensor_offset,
                        p.bytes);
        put.commit(i, std::move(buffer));
    }
    put.close();
    span.done();
}

void TieredStore::write_chunk(const EntryPtr& entry, uint32_t chunk, const BufferPtr& buffer) {
    {
        std::lock_guard lock(mutex_);
        if (entry->error) return;
    }
    Meter::Span span(write_, buffer->size());
    Header& h = entry->header;
    {
        std::lock_guard lock(entry->file_mutex);
        if (!entry->file) {
            entry->file = std::make_unique<DirectFile>(
                DirectFile::create(directory_->fd(), entry->temporary, directory_->path_of(entry->temporary), mode_));
            entry->file->reserve(h.file_bytes());
        }
    }
    h.sums[chunk] = checksum(buffer->data(), buffer->size());
    entry->file->write(buffer->data(), buffer->size(), h.header_bytes + chunk * h.chunk_bytes);
    span.done();
}

// One chunk, or the put itself, is done with; the last one writes the header.
void TieredStore::finish_part(const EntryPtr& entry, std::exception_ptr error) {
    bool last;
    {
        std::lock_guard lock(mutex_);
        if (error && !entry->error) entry->error = error;
        last = --entry->parts == 0;
    }
    if (last) finish(entry);
    pump();
}

void TieredStore::finish(const EntryPtr& entry) {
    const auto current = [&] {
        std::lock_guard lock(mutex_);
        const auto found = entries_.find(entry->header.key);
        return found != entries_.end() && found->second == entry;
    };
    std::exception_ptr error;
    {
        std::lock_guard lock(mutex_);
        error = entry->error;
    }
    bool renamed = false;
    uint64_t replaced = 0;
    try {
        if (!error && current()) {
            if (!entry->file)  // an entry without a payload
                entry->file = std::make_unique<DirectFile>(DirectFile::create(
                    directory_->fd(), entry->temporary, directory_->path_of(entry->temporary), mode_));
            const Header& h = entry->header;
            const BufferPtr buffer = std::make_shared<BufferPool>(UINT64_MAX)->try_acquire(h.header_bytes);
            h.encode(buffer->data());
            entry->file->write(buffer->data(), h.header_bytes, 0);
            if (options_.durable) entry->file->sync();
            std::lock_guard names(names_mutex_);
            if (current()) {  // not removed, and no later put of this key
                directory_->rename(entry->temporary, entry->name);
                renamed = true;
                std::lock_guard lock(mutex_);
                replaced = entry->published;
                entry->published = entry->file_bytes;
            }
        }
        if (renamed && options_.durable) directory_->sync();
        if (!error && !renamed) throw MissingKey(entry->header.key);  // for a get that waited all the while
    } catch (...) {
        error = std::current_exception();
    }
    try {
        if (!renamed && entry->file) directory_->unlink(entry->temporary);
    } catch (const StoreIOError&) {
        // the next open removes it
    }
    entry->file.reset();
    {
        std::lock_guard lock(mutex_);
        entry->state = error ? Entry::State::failed : Entry::State::ready;
        entry->error = error;
        entry->write_failed = error != nullptr;  // matters only to the table, which a removed entry is not in
        disk_used_ -= renamed ? replaced : entry->file_bytes;
        --writing_;
    }
    changed_.notify_all();
}

void TieredStore::remove(const std::string& key) {
    Use use(*this);
    EntryPtr entry;
    {
        std::lock_guard names(names_mutex_);
        uint64_t published;
        {
            std::lock_guard lock(mutex_);
            entry = find(key);
            entries_.erase(key);
            forget(*entry);
            published = entry->published;
            disk_used_ -= published;
            entry->published = 0;
        }
        if (published != 0 || (entry->tier == Tier::disk && entry->error)) directory_->unlink(entry->name);
    }
    pump();
}

// --- reading ---------------------------------------------------------------------------------------------------

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
                           path + ": " + std::to_string(bytes) + " bytes were expected at offset " +
                               std::to_string(offset) + ", the file ends after " + std::to_string(have));
    const uint64_t found = checksum(buffer.data(), bytes);
    if (found != h.sums[chunk]) {
        char text[96];
        std::snprintf(text, sizeof text, ": checksum %016" PRIx64 " expected, %016" PRIx64 " found", h.sums[chunk],
                      found);
        throw CorruptState(h.key, chunk, path + text);
    }
    span.done();
}

// Reads a chunk (already marked as loading) in a thread. A failure leaves it absent: the get that needs it reads it
// again, and tells.
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
                if (pool_->waiters() == 0) buffer = pool_->try_acquire(entry->header.chunk_size(next));
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
        BufferPtr buffer = pool_->try_acquire(entry->header.chunk_size(i));
        if (!buffer) return;
        entry->slots[i].state = Entry::Chunk::loading;
        prefetched_.emplace_back(entry, i);
        load_later(entry, i, std::move(buffer), true);
    }
}

// The chunk's contents: from its buffer, or from the file.
BufferPtr TieredStore::take(const EntryPtr& entry, uint32_t chunk, bool wait) {
    Entry::Slot& slot = entry->slots[chunk];
    {
        std::unique_lock lock(mutex_);
        ++slot.awaited;
        changed_.wait(lock, [&] { return slot.state != Entry::Chunk::loading; });
        --slot.awaited;
        if (slot.state == Entry::Chunk::loaded) {
            slot.state = Entry::Chunk::absent;
            ++hits_;
            return std::move(slot.buffer);
        }
    }
    const size_t bytes = entry->header.chunk_size(chunk);
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

const Header& Get::header() const { return entry_->header; }

BufferPtr Get::chunk(uint32_t i, bool wait) {
    TieredStore* store = use_.store;
    if (entry_->tier == Tier::host) return entry_->slots[i].buffer;  // constant since the entry is ready
    store->read_ahead(entry_, i + 1, i + 1 + 2 * store->io_.count());
    store->pump();  // the buffer of the chunk before is free again
    return store->take(entry_, i, wait);
}

void Get::end() {
    if (use_.store != nullptr) use_.store->pump();
    use_.end();
}

void TieredStore::get(const std::string& key, const std::vector<void*>& targets) {
    Get get(*this, key);
    const Header& h = get.header();
    Meter::Span span(get_, h.tensor_bytes());
    for (uint32_t i = 0; i < h.chunks(); ++i) {
        const BufferPtr buffer = get.chunk(i, true);
        for (const Piece& p : h.pieces(i))
            std::memcpy(static_cast<char*>(targets[p.tensor]) + p.tensor_offset, buffer->data() + p.chunk_offset,
                        p.bytes);
    }
    get.end();
    span.done();
}

}  // namespace mgd
