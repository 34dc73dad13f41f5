#include "store/store.h"

#include <unistd.h>

#include <algorithm>

#include "store/errors.h"

namespace mgd {

// --- opening and closing ---------------------------------------------------------------------------------------

TieredStore::TieredStore(const StoreOptions& options)
    : options_(options),
      pool_(std::make_shared<BufferPool>(options.host_bytes)),
      owner_(getpid()),
      leases_(std::make_shared<LeaseAccount>(options.staging_bytes, options.chunk_bytes)),
      io_(options.directory.empty() ? 0 : std::max(1u, options.threads), options.directory) {
    if (options.directory.empty()) return;
    directory_.emplace(options.persistent ? StoreDirectory::persistent(options.directory)
                                          : StoreDirectory::scratch(options.directory));
    id_ = directory_->id();
    if (options.persistent) load_entries();
}

TieredStore::~TieredStore() {
    try {
        close();
    } catch (const std::exception&) {
        // close() has released everything; a caller that wants to know of failed writes calls it
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
        bool cleared = false;
        try {
            if (!found.regular) throw StoreIOError(ELOOP, path, "is not a regular file, and a store follows no links");
            DirectFile file = DirectFile::open(directory_->fd(), found.name, path, mode_);
            entry->published = file.size();
            AlignedBytes header = aligned_bytes(kPage);
            size_t have = file.read(header.get(), kPage, 0);
            if (have < kPage)
                throw CorruptState(found.key, kWholeFile,
                                   path + ": expected a header of at least " + std::to_string(kPage) +
                                       " bytes; got a file that ends after " + std::to_string(have));
            const uint64_t length = Header::header_length(header.get(), entry->published, found.key, path);
            if (length > kPage) {
                header = aligned_bytes(length);
                have = file.read(header.get(), length, 0);
            }
            Header decoded = Header::decode(header.get(), have, entry->published, found.key, path);
            cleared = decoded.id == directory_->cleared();
            if (!cleared && decoded.id != directory_->id())
                throw ForeignEntry(found.key, path + " of store " + hex(decoded.id) + ", in the directory of store " +
                                                  hex(directory_->id()));
            entry->header = std::move(decoded);
        } catch (const std::runtime_error&) {
            entry->state = Entry::State::failed;  // the other entries are unaffected; get() reports this one
            entry->error = std::current_exception();
        }
        if (cleared) {
            directory_->unlink(found.name);
            continue;
        }
        entry->slots.resize(entry->header.chunks());
        if (entry->header.chunks() != 0) leases_->know(buffer_size(*entry, 0));
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

void TieredStore::check() {
    Use use(*this);
    std::lock_guard lock(mutex_);
    if (!suspect_) return;
    for (const auto& [key, entry] : entries_)
        if (entry->write_failed) std::rethrow_exception(entry->error);
    suspect_ = false;
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
            drops_,          committed_,
            viewed_,         put_.reading(),
            get_.reading(),  write_.reading(),
            read_.reading(), mode_.direct(),
            mode_.why(),     directory_ ? directory_->path() : ""};
}

// --- room ------------------------------------------------------------------------------------------------------

Header TieredStore::layout(std::string key, bool sequence, std::vector<TensorInfo> tensors) const {
    // Chunks as large as the reserved buffers, unless these are much smaller: one size of buffers serves all.
    const uint64_t reserved = last_reserved_;
    const uint64_t chunk = reserved >= options_.chunk_bytes / 4 ? reserved : options_.chunk_bytes;
    return Header::make(std::move(key), sequence, std::move(tensors), chunk);
}

// Bytes of the buffer for a chunk: in the disk tier all chunks of an entry have one size, so that buffers are used
// again rather than mapped afresh.
size_t TieredStore::buffer_size(const Entry& entry, uint32_t chunk) const {
    const Header& h = entry.header;
    const bool alike = entry.tier == Tier::disk && (h.chunks() > 1 || h.chunk_bytes - h.payload_bytes < kLeaseUnit);
    return alike ? std::min<uint64_t>(h.chunk_bytes, options_.staging_bytes) : h.chunk_size(chunk);
}

// Lets go of what an entry that left the table holds; a get that is under way keeps what it uses.
void TieredStore::forget(Entry& entry) {
    if (entry.tier == Tier::host) {
        host_used_ -= entry.header.payload_bytes;
        return;
    }
    if (entry.state == Entry::State::writing) {
        entry.doomed = true;
        ++removing_;
    }
    for (Entry::Slot& slot : entry.slots) {  // what is loading now is released when it arrives
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

}  // namespace mgd
