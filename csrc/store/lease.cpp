// Entries that pass through the store without a copy.
#include "store/lease.h"

#include <cstring>

#include "store/checksum.h"
#include "store/errors.h"
#include "store/store.h"

namespace mgd {

std::unique_ptr<Lease> TieredStore::reserve(uint64_t bytes) {
    Use use(*this);
    std::unique_ptr<Lease> lease = Lease::take(leases_, bytes);
    if (!lease) return nullptr;
    lease->buffer = acquire(lease->bytes());
    last_reserved_ = lease->bytes();
    return lease;
}

void TieredStore::commit(std::string key, bool sequence, std::vector<TensorInfo> tensors, const Lease& lease) {
    // One chunk, so that a view of the entry lies in one piece, too.
    Header header = Header::make(std::move(key), sequence, std::move(tensors), lease.bytes());
    if (header.chunks() != 1)
        throw BadStoreArgument("expected an entry of at most " + std::to_string(lease.bytes()) +
                               " bytes, as reserved; got " + std::to_string(header.payload_bytes));
    Put put(*this, std::move(header), Tier::disk);
    const Header& h = put.header();
    Meter::Span span(put_, h.tensor_bytes());
    h.clear_padding(0, lease.buffer->data());
    put.commit(0, lease.buffer, checksum(lease.buffer->data(), h.chunk_size(0)));
    put.close();
    span.done();
    ++committed_;
}

std::unique_ptr<Lease> TieredStore::view(const std::string& key, bool keep) {
    Get get(*this, key);
    const Header& h = get.header();
    if (get.tier() != Tier::disk || h.chunks() != 1) return nullptr;
    std::unique_ptr<Lease> lease = Lease::take(leases_, get.buffer_size(0));
    if (!lease) return nullptr;
    Meter::Span span(get_, h.tensor_bytes());
    lease->buffer = get.chunk(0, true);
    get.verify(0, checksum(lease->buffer->data(), h.chunk_size(0)), lease->buffer->data());
    if (keep) get.keep(0, lease->buffer, false);  // its user may write to it
    get.end();
    span.done();
    ++viewed_;
    return lease;
}

}  // namespace mgd
