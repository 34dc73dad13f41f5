#include "store/lock.h"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstdlib>
#include <mutex>
#include <set>

#include "store/errors.h"
#include "store/faults.h"
#include "store/files.h"

namespace mgd {
namespace {

// The lock files that this process has open. Never destroyed: a fork may come at any time.
struct Held {
    std::mutex mutex;
    std::set<int> files;
};

Held& held() {
    static Held* all = [] {
        pthread_atfork([] { held().mutex.lock(); }, [] { held().mutex.unlock(); },
                       [] {
                           for (const int fd : held().files) ::close(fd);
                           held().files.clear();
                           held().mutex.unlock();
                       });
        return new Held;
    }();
    return *all;
}

// What the lock file says; its first 32 bytes.
std::string contents(int fd) {
    char text[32];
    const ssize_t bytes = pread(fd, text, sizeof text, 0);
    return std::string(text, bytes > 0 ? static_cast<size_t>(bytes) : 0);
}

// 0 also for a process that has ended.
int64_t running_process(const std::string& text) {
    const long pid = std::atol(text.c_str());
    return pid > 0 && (kill(static_cast<pid_t>(pid), 0) == 0 || errno == EPERM) ? pid : 0;
}

}  // namespace

std::optional<DirectoryLock> DirectoryLock::take(int directory, const std::string& path, int64_t* holder) {
    const std::string name = path + "/" + kLock;
    std::lock_guard lock(held().mutex);  // no fork between opening the file and noting it
    if (faults::hit(faults::Kind::open_read_only)) throw StoreIOError(EROFS, name, "cannot create the lock file");
    faults::change("create", name);
    Fd fd(openat(directory, kLock, O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK, 0600));
    if (!fd) files::fail(name, "cannot open or create the lock file");
    struct flock whole{};
    whole.l_type = F_WRLCK;
    whole.l_whence = SEEK_SET;
    if (fcntl(fd.get(), F_OFD_SETLK, &whole) != 0) {
        if (errno != EAGAIN && errno != EACCES) files::fail(name, "cannot lock");
        *holder = running_process(contents(fd.get()));
        return std::nullopt;
    }
    // Only now: what was removed before we had the lock is no lock, and what bears another name may be anything.
    struct stat status{};
    if (fstat(fd.get(), &status) != 0) files::fail(name, "cannot read the lock file");
    if (!S_ISREG(status.st_mode)) throw StoreIOError(ELOOP, name, "is not a regular file");
    if (status.st_nlink == 0) throw StoreIOError(ENOENT, name, "was removed");
    if (status.st_nlink > 1) throw StoreIOError(EMLINK, name, "has a second name, and a store writes through none");
    const std::string pid = std::to_string(getpid()) + "\n";
    faults::change("write", name);
    if (pwrite(fd.get(), pid.data(), pid.size(), 0) != static_cast<ssize_t>(pid.size()))
        files::fail(name, "cannot write the lock file");
    faults::change("truncate", name);
    if (ftruncate(fd.get(), static_cast<off_t>(pid.size())) != 0) files::fail(name, "cannot write the lock file");
    held().files.insert(fd.get());
    return DirectoryLock(fd.release());
}

void DirectoryLock::release() {
    if (fd_ < 0) return;
    std::lock_guard lock(held().mutex);
    if (held().files.erase(fd_) != 0) ::close(fd_);  // in a fork it is closed already
    fd_ = -1;
}

bool is_lock_file(int directory, const std::string& path) {
    const Fd fd(openat(directory, kLock, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | O_NONBLOCK));
    if (!fd) {
        if (errno == ELOOP) return false;
        files::fail(path + "/" + kLock, "cannot open the lock file");
    }
    const std::string text = contents(fd.get());
    return std::all_of(text.begin(), text.end(), [](char c) { return (c >= '0' && c <= '9') || c == '\n'; });
}

}  // namespace mgd
