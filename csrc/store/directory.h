// The directory of a store: its marker, its lock, its files. Everything is reached through the open directory and
// without following symbolic links, so nothing outside it is ever touched.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace mgd {

class StoreDirectory {
  public:
    // A fresh directory `mgd-scratch-*` under `parent`, after removing those that a crash left there.
    static StoreDirectory scratch(const std::string& parent);
    // The store at `path`, made if there is nothing (or an empty directory).
    static StoreDirectory persistent(const std::string& path);
    ~StoreDirectory();
    StoreDirectory(StoreDirectory&& other) noexcept;
    StoreDirectory& operator=(StoreDirectory&&) = delete;

    int fd() const { return fd_; }
    const std::string& path() const { return path_; }
    std::string path_of(const std::string& name) const { return path_ + "/" + name; }

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
    StoreDirectory(std::string path, int fd, int lock, bool is_scratch)
        : path_(std::move(path)), fd_(fd), lock_(lock), scratch_(is_scratch) {}

    std::string path_;
    int fd_ = -1, lock_ = -1;
    bool scratch_ = false;
};

// Removes the scratch directories under `parent` that no process holds. Returns how many.
int sweep_scratch(const std::string& parent);

// A temporary file's name; remove_unfinished() knows it.
std::string temporary_name(const std::string& name, uint64_t sequence);

}  // namespace mgd
