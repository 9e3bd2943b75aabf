// A thread pool: parallel(n, task) calls task(i) once for every i of 0 … n-1, on any free thread.
//
// Not OpenMP: with GCC's runtime beside the one in Paddle's MKL, two spinning threads would compete for every core.
#pragma once
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool();  // never destroyed: its threads still sleep when the process ends
    return *pool;
  }
  int threads() const { return want_; }
  // Workers are woken and spin while this lives, for a caller with many short calls: waking one takes longer than most.
  struct Awake {
    Awake() {
      Pool& pool = get();
      if (getpid() != pool.owner_) return;
      {
        std::lock_guard<std::mutex> lock(pool.sleep_);
        pool.awake_.fetch_add(1);
      }
      pool.wake_.notify_all();
      counted = true;
    }
    ~Awake() {
      if (counted) get().awake_.fetch_sub(1);
    }
    bool counted = false;
  };
  void parallel(long n, const std::function<void(long)>& task) {
    std::unique_lock<std::mutex> one(calls_, std::try_to_lock);
    // A call from within a task, from another thread, or in a forked child (which has no workers) runs all tasks
    // itself.
    if (n < 2 || want_ < 2 || !one || getpid() != owner_) {
      for (long i = 0; i < n; i++) task(i);
      return;
    }
    while ((int)workers_.size() < want_ - 1) {
      workers_.emplace_back([this] { work(); });
      workers_.back().detach();
    }
    next_.store((round_ << 32) + NONE);  // before n_ changes: a late thread must not take a task of the last round
    task_ = &task, done_.store(0), n_.store(n);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      round_ = (round_ + 1) & NONE;
      next_.store(round_ << 32);
    }
    wake_.notify_all();
    run(round_);
    // Wait for tasks that workers took, but not for workers that are still waking up: in a small call that takes
    // longest.
    for (int spins = 0; done_.load() < n; spins++)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  Pool() {
    cpu_set_t allowed;
    want_ = sched_getaffinity(0, sizeof(allowed), &allowed) ? 1 : CPU_COUNT(&allowed);
    if (const char* share = getenv("PADDLE_LLM_THREADS"))
      want_ = std::max(1, std::min(want_, atoi(share)));  // set by kernels/__init__.py
  }
  static constexpr uint64_t NONE = 0xFFFFFFFF;
  static constexpr int LONG = 1 << 20;
  // Take tasks of this round until there are none or the round is over. A late thread may read n_ or task_ of a later
  // round, but then next_ has changed and it takes nothing.
  void run(uint64_t round) {
    for (;;) {
      uint64_t now = next_.load();
      const long i = (long)(now & NONE);
      if (now >> 32 != round || i >= n_.load()) return;
      if (!next_.compare_exchange_weak(now, now + 1)) continue;
      (*task_)(i);
      done_.fetch_add(1);
    }
  }
  void work() {
    uint64_t seen = 0;
    for (;;) {
      uint64_t now = seen;
      for (int spins = 0; (now = next_.load() >> 32) == seen && spins < (awake_.load() ? LONG : 2000); spins++)
        __builtin_ia32_pause();
      if (now == seen) {  // only a sleeper takes the mutex, which the caller still holds when others see its call
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return round_ != seen || awake_.load(); });
        now = round_;
      }
      if (now == seen) continue;
      seen = now;
      run(seen);
    }
  }
  std::mutex calls_, sleep_;
  std::condition_variable wake_;
  std::vector<std::thread> workers_;
  uint64_t round_ = 0;             // number of calls, in 32 bits; changes only with both mutexes held
  std::atomic<uint64_t> next_{0};  // upper half: the round; lower half: its next task
  std::atomic<long> done_{0}, n_{0};
  std::atomic<int> awake_{0};      // how many callers ask workers to spin
  const std::function<void(long)>* task_ = nullptr;
  const pid_t owner_ = getpid();
  int want_;  // threads, including the caller's
};

static inline void parallel(long n, const std::function<void(long)>& task) { Pool::get().parallel(n, task); }
static inline int threads() {
  return Pool::get().threads();
}  // only for integer sums; splits of float sums depend on shapes
