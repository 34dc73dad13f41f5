// A few threads that run I/O jobs in the order given, urgent ones first.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace mgd {

class IoThreads {
  public:
    using Job = std::function<void()>;  // must not throw

    // Throws StoreIOError, which names `path`, when the system refuses a thread.
    IoThreads(unsigned threads, const std::string& path);
    ~IoThreads() { stop(); }
    void submit(Job job, bool urgent = false);
    void stop();  // runs what was submitted, then joins
    unsigned count() const { return static_cast<unsigned>(threads_.size()); }

  private:
    void run();

    std::mutex mutex_;
    std::condition_variable wake_;
    std::deque<Job> urgent_, ordinary_;
    bool stopping_ = false;
    std::vector<std::thread> threads_;
};

}  // namespace mgd
