// A pool of threads of our own: parallel(n, task) calls task(i) for every i of 0 … n-1, each once, on whichever thread is free.
//
// Not OpenMP: GCC's runtime beside the one that Paddle's MKL brings would put two waiting threads on every core.
#pragma once
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool();  // never destroyed: its threads sleep when the process ends
    return *pool;
  }
  void parallel(long n, const std::function<void(long)>& task) {
    std::unique_lock<std::mutex> one(calls_, std::try_to_lock);
    // A call from within a task, from another thread, or in a forked child, which has no workers, runs by itself.
    if (n < 2 || want_ < 2 || !one || getpid() != owner_) {
      for (long i = 0; i < n; i++) task(i);
      return;
    }
    while ((int)workers_.size() < want_ - 1) {
      workers_.emplace_back([this] { work(); });
      workers_.back().detach();
    }
    task_ = &task, n_ = n, next_.store(0), left_.store(want_ - 1);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      round_.fetch_add(1);
    }
    wake_.notify_all();
    run();
    for (int spins = 0; left_.load(std::memory_order_acquire) > 0; spins++)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  Pool() {
    cpu_set_t allowed;
    want_ = sched_getaffinity(0, sizeof(allowed), &allowed) ? 1 : CPU_COUNT(&allowed);
  }
  void run() {
    for (long i; (i = next_.fetch_add(1)) < n_;) (*task_)(i);
  }
  void work() {
    long seen = 0;
    for (;;) {
      for (int spins = 0; round_.load() == seen && spins < 2000; spins++) __builtin_ia32_pause();
      {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return round_.load() != seen; });
      }
      seen = round_.load();
      run();
      left_.fetch_sub(1, std::memory_order_release);
    }
  }
  std::mutex calls_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  std::atomic<long> next_{0}, round_{0};
  std::atomic<int> left_{0};
  const std::function<void(long)>* task_ = nullptr;
  long n_ = 0;
  const pid_t owner_ = getpid();
  int want_;  // threads, the caller's among them
};

static inline void parallel(long n, const std::function<void(long)>& task) { Pool::get().parallel(n, task); }
