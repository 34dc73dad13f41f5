// System calls on the files of a store: relative to an open directory, closed to other users, never through a link,
// and with the faults that tests ask for. They return -1 and set errno as the calls of the system do.
#pragma once

#include <string>
#include <vector>

namespace mgd {

class Fd {
  public:
    explicit Fd(int fd = -1) : fd_(fd) {}
    ~Fd() { reset(); }
    Fd(Fd&& other) noexcept : fd_(other.release()) {}
    Fd& operator=(Fd&& other) noexcept {
        reset(other.release());
        return *this;
    }
    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    int release() {
        const int fd = fd_;
        fd_ = -1;
        return fd;
    }
    void reset(int fd = -1);

  private:
    int fd_;
};

namespace files {

int create(int directory, const std::string& name, int flags);  // a new file: there is none of this name
int rename(int directory, const std::string& from, const std::string& to);
int unlink(int directory, const std::string& name, int flags = 0);
int sync(int fd, const std::string& path);
int sync_directory(int fd, const std::string& path);  // a no-op where the file system does not offer it
Fd open_directory(int at, const std::string& name, int flags = 0);

// Makes the directory and its parents, durably; returns its absolute path, which a later chdir does not change.
std::string make_directories(const std::string& path);

// What is in the directory. Throws StoreIOError: a directory that cannot be listed is not an empty one.
std::vector<std::string> names(int directory, const std::string& path);

// Throws the StoreIOError of errno.
[[noreturn]] void fail(const std::string& path, const std::string& what);

}  // namespace files
}  // namespace mgd
