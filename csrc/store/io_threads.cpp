#include "store/io_threads.h"

#include <pthread.h>
#include <signal.h>

namespace mgd {

IoThreads::IoThreads(unsigned threads) {
    // Signals belong to the program's own threads: a new thread inherits the mask of the one that makes it.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    for (unsigned i = 0; i < threads; ++i)
        threads_.emplace_back([this] {
            pthread_setname_np(pthread_self(), "mgd-store");  // for `top -H`, and for who places threads on cores
            run();
        });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
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
