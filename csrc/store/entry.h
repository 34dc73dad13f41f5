// One stored entry: its header, where it is, and what of it is in buffers.
#pragma once

#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "store/direct_file.h"
#include "store/format.h"
#include "store/pool.h"

namespace mgd {

enum class Tier { host, disk };

struct Entry {
    enum class State { writing, ready, failed };
    enum class Chunk { absent, loading, loaded };
    struct Slot {
        Chunk state = Chunk::absent;
        unsigned awaited = 0;   // gets that wait for it: not to be dropped
        bool verified = false;  // a kept buffer that no caller has held since it was verified
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
    bool doomed = false;        // removed or replaced while it is being written
    bool write_failed = false;  // rather than found damaged
    bool summed = true;         // false: of the host tier, filled by a device without a checksum
    uint32_t parts = 1;         // chunks still to write, and one until the put is closed
    std::vector<Slot> slots;

    std::mutex file_mutex;
    std::unique_ptr<DirectFile> file;
};

using EntryPtr = std::shared_ptr<Entry>;

}  // namespace mgd
