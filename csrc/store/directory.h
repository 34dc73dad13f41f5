// The directory of a store: its marker, its lock, its files. Everything is reached through the open directory and
// without following symbolic links, so nothing outside it is ever touched.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "store/files.h"
#include "store/lock.h"
#include "store/marker.h"

namespace mgd {

class StoreDirectory {
  public:
    // A fresh directory `mgd-scratch-*` under `parent`, after removing those that a crash left there.
    static StoreDirectory scratch(const std::string& parent);
    // The store at `path`, made if there is nothing (or an empty directory).
    static StoreDirectory persistent(const std::string& path);
    ~StoreDirectory();
    StoreDirectory(StoreDirectory&& other) = default;
    StoreDirectory& operator=(StoreDirectory&&) = delete;

    int fd() const { return fd_.get(); }
    const std::string& path() const { return path_; }
    std::string path_of(const std::string& name) const { return path_ + "/" + name; }

    // Entries bear the id. Those of `cleared` are of no store any more: clear() has made the one from the other.
    const StoreId& id() const { return marker_.id; }
    const StoreId& cleared() const { return marker_.cleared; }
    void clear();

    struct File {
        std::string name, key;
        bool regular;
    };
    std::vector<File> entries() const;  // the files named as entries are
    void remove_unfinished() const;     // temporary files of writers that did not finish
    void rename(const std::string& from, const std::string& to) const;
    bool move_aside(const std::string& from, const std::string& to) const;  // false when there is no such file
    void unlink(const std::string& name) const;                             // silent when the file is gone already
    void sync() const;
    // Removes a scratch directory and releases the lock. Errors are swallowed: the next start sweeps again.
    void close();

  private:
    StoreDirectory(std::string path, Fd fd, DirectoryLock lock, const Marker& marker)
        : path_(std::move(path)), fd_(std::move(fd)), lock_(std::move(lock)), marker_(marker) {}
    static std::optional<StoreDirectory> try_scratch(const std::string& parent);

    std::string path_;
    Fd fd_;
    DirectoryLock lock_;
    Marker marker_;
};

// Removes the scratch directories under `parent` that no process holds. Returns how many.
int sweep_scratch(const std::string& parent);

// A temporary file's name; remove_unfinished() knows it.
std::string temporary_name(const std::string& name, uint64_t sequence);

}  // namespace mgd
