#include "optim/threads.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace mgd {
namespace {

// The floating-point mode (rounding, flush-to-zero) belongs to a thread: workers take over the caller's, or results
// would depend on which thread computed them.
unsigned floating_point_mode() {
#if defined(__SSE2__)
    return _mm_getcsr();
#else
    return 0;
#endif
}
void set_floating_point_mode([[maybe_unused]] unsigned mode) {
#if defined(__SSE2__)
    _mm_setcsr(mode);
#endif
}

class ThreadPool {
  public:
    bool try_run(int threads, int64_t items, void (*body)(void*, int64_t), void* context) {
        std::unique_lock<std::mutex> busy(busy_, std::try_to_lock);
        if (!busy.owns_lock()) return false;
        std::unique_lock<std::mutex> lock(mutex_);
        start_workers(threads - 1);
        body_ = body;
        context_ = context;
        items_ = items;
        next_.store(0, std::memory_order_relaxed);
        mode_ = floating_point_mode();
        open_ = std::min(threads - 1, workers_);
        for (int i = 0; i < open_; ++i) wake_.notify_one();
        lock.unlock();
        work(body, context, items);
        lock.lock();
        open_ = 0;  // no thread may join any more
        done_.wait(lock, [this] { return active_ == 0; });
        return true;
    }

  private:
    void start_workers(int wanted) {
        if (workers_ >= wanted) return;
        sigset_t all, before;  // signals are the interpreter's: workers start with all of them blocked
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        try {
            for (; workers_ < wanted; ++workers_) std::thread([this] { serve(); }).detach();
        } catch (const std::system_error&) {
            // Fewer workers than asked for: the caller's thread does what they would have done.
        }
        pthread_sigmask(SIG_SETMASK, &before, nullptr);
    }

    void serve() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [this] { return open_ > 0; });
            --open_;
            ++active_;
            const auto body = body_;
            void* const context = context_;
            const int64_t items = items_;
            set_floating_point_mode(mode_);
            lock.unlock();
            work(body, context, items);
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    void work(void (*body)(void*, int64_t), void* context, int64_t items) {
        for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, i);
    }

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    int workers_ = 0, open_ = 0, active_ = 0;
    void (*body_)(void*, int64_t) = nullptr;
    void* context_ = nullptr;
    int64_t items_ = 0;
    unsigned mode_ = 0;
    std::atomic<int64_t> next_{0};
};

// Never destroyed: sleeping workers must not outlive it at exit. A forked child has no workers and gets a new pool.
std::atomic<ThreadPool*> pool{nullptr};

ThreadPool& the_pool() {
    static std::once_flag once;
    std::call_once(once, [] {
        pool.store(new ThreadPool);
        pthread_atfork(nullptr, nullptr, [] { pool.store(new ThreadPool); });
    });
    return *pool.load();
}

}  // namespace

void parallel_for(int threads, int64_t items, void (*body)(void*, int64_t), void* context) {
    if (threads > items) threads = static_cast<int>(items);
    if (threads > 1 && the_pool().try_run(threads, items, body, context)) return;
    for (int64_t i = 0; i < items; ++i) body(context, i);
}

}  // namespace mgd
