#include "store/io_threads.h"

#include <pthread.h>
#include <signal.h>

#include <cerrno>
#include <system_error>

#include "store/errors.h"
#include "store/faults.h"

namespace mgd {

namespace {

// Signals belong to the program's own threads: a new thread inherits the mask of the one that makes it.
class SignalsBlocked {
  public:
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

  private:
    sigset_t before_;
};

}  // namespace

IoThreads::IoThreads(unsigned threads, const std::string& path) {
    const SignalsBlocked blocked;
    try {
        for (unsigned i = 0; i < threads; ++i) {
            if (faults::hit(faults::Kind::thread_error)) throw std::system_error(EAGAIN, std::generic_category());
            threads_.emplace_back([this] {
                pthread_setname_np(pthread_self(), "mgd-store");  // for `top -H`, and for who places threads on cores
                run();
            });
        }
    } catch (const std::system_error& error) {
        stop();
        throw StoreIOError(error.code().value(), path, "cannot start a thread for the store");
    }
}

void IoThreads::submit(Job job, bool urgent) {
    {
        std::lock_guard lock(mutex_);
        (urgent ? urgent_ : ordinary_).push_back(std::move(job));
    }
    wake_.notify_one();
}

void IoThreads::stop() {
    {
        std::lock_guard lock(mutex_);
        stopping_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void IoThreads::run() {
    for (;;) {
        Job job;
        {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [this] { return stopping_ || !urgent_.empty() || !ordinary_.empty(); });
            std::deque<Job>& queue = urgent_.empty() ? ordinary_ : urgent_;
            if (queue.empty()) return;
            job = std::move(queue.front());
            queue.pop_front();
        }
        job();
    }
}

}  // namespace mgd
