// How work is spread over threads: serially, on our own pool, or on the OpenMP team of a library that is
// already loaded. An invited thread may never come: one that has not started when the caller has nothing left
// to do is not waited for and never enters the body. So items of work are taken from a shared counter, never
// dealt out by worker number.
#pragma once

#include <atomic>
#include <chrono>

namespace tilefold {

enum class Team : int { SERIAL, OWN, OPENMP };

// Polled by the calling thread only: `ask` returns true when the call shall stop (Ctrl-C).
struct Poll {
    bool (*ask)(void* context);
    void* context;
};

// Whether one call shall end early. Bodies check it between items, and run() while it waits for workers.
class Stop {
   public:
    explicit Stop(Poll poll = {nullptr, nullptr}) noexcept;

    // Worker 0 asks the poll, after 50 ms and at most every 50 ms; the others only see what it was told.
    bool check(int worker) noexcept;

    // For a worker that cannot go on.
    void request() noexcept { stopped_.store(true, std::memory_order_relaxed); }

   private:
    Poll poll_;
    std::atomic<bool> stopped_{false};
    std::chrono::steady_clock::time_point next_;
};

// One parallel region: body(context, worker) runs once on each of at most `workers` threads, each with its
// own number, worker 0 being the caller. It must not throw, and when it returns on one thread nobody else is
// let in, since nothing can be left to share. A call made inside a region, or while another thread is in one,
// runs on its own thread alone. Returns how many threads took part; 0 only in a process that `ask` forked,
// where the other workers and their items are lost. (From Team::OPENMP such a process never returns.)
int run(Team team, int workers, void (*body)(void* context, int worker), void* context,
        Stop* stop = nullptr) noexcept;

// Whether Team::OPENMP has a team to borrow; else, and always in a forked child, it runs on our own pool.
bool has_openmp() noexcept;

// The library that has_openmp() found, or null.
const char* openmp_path() noexcept;

constexpr int MAX_THREADS = 4096;

// TILEFOLD_NUM_THREADS, else the first number in OMP_NUM_THREADS, else the processors this process may use.
// Throws std::invalid_argument for a TILEFOLD_NUM_THREADS that is not a number of threads.
int default_threads();

// For the whole process; 0 takes it back. Throws std::invalid_argument unless 0 ≤ count ≤ MAX_THREADS.
void set_threads(int count);

// What set_threads() said, else `otherwise` if positive, else default_threads() as it was when first needed.
int threads(int otherwise = 0);

}  // namespace tilefold
