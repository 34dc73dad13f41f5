// The way in: room, copies, write-behind, the header last, the rename; and removal.
#include <algorithm>
#include <cstring>

#include "store/checksum.h"
#include "store/errors.h"
#include "store/store.h"

namespace mgd {

Put::Put(TieredStore& store, Header header, Tier tier) : use_(store) {
    const std::string name = file_name(header.key);  // refuses a key that is too long, in every tier
    std::unique_lock lock(store.mutex_);
    const StoreOptions& o = store.options_;
    uint64_t& used = tier == Tier::host ? store.host_used_ : store.disk_used_;
    const uint64_t limit = tier == Tier::host ? o.host_bytes - o.staging_bytes : store.directory_ ? o.disk_bytes : 0;
    const uint64_t needs = tier == Tier::host ? header.payload_bytes : header.file_bytes();
    const auto room = [&] { return limit - std::min(limit, used); };  // it may be reopened with less than it fills
    store.changed_.wait(lock, [&] { return needs <= room() || tier == Tier::host || store.removing_ == 0; });
    const uint64_t has = room();
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
    const size_t bytes = use_.store->buffer_size(*entry_, chunk);
    BufferPtr buffer = wait ? use_.store->acquire(bytes) : use_.store->pool_->try_acquire(bytes);
    if (!buffer) return nullptr;
    h.clear_padding(chunk, buffer->data());
    return buffer;
}

void Put::commit(uint32_t chunk, BufferPtr buffer, uint64_t sum) {
    entry_->header.sums[chunk] = sum;
    accept(chunk, std::move(buffer), true);
}

void Put::commit(uint32_t chunk, BufferPtr buffer) { accept(chunk, std::move(buffer), false); }

void Put::accept(uint32_t chunk, BufferPtr buffer, bool summed) {
    TieredStore* store = use_.store;
    {
        std::lock_guard lock(store->mutex_);
        if (entry_->tier == Tier::host) {
            entry_->summed = entry_->summed && summed;
            entry_->slots[chunk].state = Entry::Chunk::loaded;
            entry_->slots[chunk].buffer = std::move(buffer);
            return;
        }
        ++entry_->parts;
    }
    store->io_.submit([store, entry = entry_, chunk, summed, buffer = std::move(buffer)]() mutable {
        std::exception_ptr error;
        try {
            if (!summed) entry->header.sums[chunk] = checksum(buffer->data(), entry->header.chunk_size(chunk));
            store->write_chunk(entry, chunk, *buffer);
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
        {
            std::lock_guard lock(store->mutex_);
            EntryPtr& current = store->entries_[entry_->header.key];
            replaced = std::move(current);
            current = entry_;
            if (replaced) {
                store->forget(*replaced);
                std::swap(entry_->published, replaced->published);
            }
            if (entry_->tier == Tier::host) entry_->state = Entry::State::ready;
        }
        if (entry_->tier == Tier::host) store->discard_file(*entry_);  // the key moves from disk to memory
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
        const std::vector<Piece> pieces = h.pieces(i);
        const auto from = [&](const Piece& p) { return static_cast<const char*>(sources[p.tensor]) + p.tensor_offset; };
        const auto gather = [&](size_t begin, size_t end) {
            for (const Piece& p : pieces) {
                const size_t a = std::max(begin, p.chunk_offset), b = std::min(end, p.chunk_offset + p.bytes);
                if (a < b) std::memcpy(buffer->data() + a, from(p) + (a - p.chunk_offset), b - a);
            }
        };
        uint64_t sum;
        if (pieces.size() == 1 && pieces[0].bytes == h.chunk_size(i)) {
            sum = copy_with_checksum(buffer->data(), from(pieces[0]), pieces[0].bytes);
        } else {
            sum = checksum_in_tiles(buffer->data(), h.chunk_size(i), gather, nullptr);
        }
        put.commit(i, std::move(buffer), sum);
    }
    put.close();
    span.done();
}

void TieredStore::write_chunk(const EntryPtr& entry, uint32_t chunk, const Buffer& buffer) {
    {
        std::lock_guard lock(mutex_);
        if (entry->error) return;
    }
    const Header& h = entry->header;
    const size_t bytes = h.chunk_size(chunk);  // a reserved buffer may be larger
    Meter::Span span(write_, bytes);
    {
        std::lock_guard lock(entry->file_mutex);
        if (!entry->file) {
            entry->file = std::make_unique<DirectFile>(
                DirectFile::create(directory_->fd(), entry->temporary, directory_->path_of(entry->temporary), mode_));
            entry->file->reserve(h.file_bytes());
        }
    }
    entry->file->write(buffer.data(), bytes, h.header_bytes + chunk * h.chunk_bytes);
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
            Header& h = entry->header;
            {
                std::lock_guard lock(mutex_);
                h.id = id_;
            }
            const AlignedBytes header = aligned_bytes(h.header_bytes);
            h.encode(header.get());
            entry->file->write(header.get(), h.header_bytes, 0);
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
        suspect_ |= entry->write_failed;
        disk_used_ -= renamed ? replaced : entry->file_bytes;
        --writing_;
        removing_ -= entry->doomed;
    }
    changed_.notify_all();
}

void TieredStore::remove(const std::string& key) {
    Use use(*this);
    EntryPtr entry;
    {
        std::lock_guard names(names_mutex_);
        {
            std::lock_guard lock(mutex_);
            entry = find(key);
            entries_.erase(key);
            forget(*entry);
        }
        if (entry->tier == Tier::disk) discard_file(*entry);
    }
    pump();
}

void TieredStore::clear() {
    Use use(*this);
    {
        std::lock_guard names(names_mutex_);
        if (options_.persistent) directory_->clear();  // from here on what is on the disk is to be removed
        std::map<std::string, EntryPtr> all;
        {
            std::lock_guard lock(mutex_);
            if (options_.persistent) id_ = directory_->id();
            all.swap(entries_);
            for (const auto& [key, entry] : all) forget(*entry);
        }
        for (const auto& [key, entry] : all)
            if (entry->tier == Tier::disk) discard_file(*entry);
    }
    pump();
}

// Takes the file that bears the entry's name, if there is one, out of the way; a thread removes it, which can take as
// long as reading it would. Its room counts as free when it is gone.
void TieredStore::discard_file(Entry& entry) {
    if (!directory_) return;
    std::string aside;
    uint64_t bytes;
    {
        std::lock_guard lock(mutex_);
        aside = temporary_name(entry.name, sequence_++);
        bytes = entry.published;
        entry.published = 0;
        ++removing_;
    }
    const auto gone = [this, bytes] {
        {
            std::lock_guard lock(mutex_);
            disk_used_ -= bytes;
            --removing_;
        }
        changed_.notify_all();
    };
    bool exists = false;
    try {
        exists = directory_->move_aside(entry.name, aside);
    } catch (...) {
        gone();
        throw;
    }
    if (!exists) return gone();
    io_.submit([this, aside, gone] {
        try {
            directory_->unlink(aside);
        } catch (const StoreIOError&) {
            // the next open removes it
        }
        gone();
    });
}

}  // namespace mgd
