// The pool is one gate, where the caller opens seats, workers take them and the caller closes what is left.
// Idle workers sleep and never spin: a spinning one would keep the core from whatever library is called next.
// After a fork the child has the pool's memory and none of its threads, so there the pool starts anew.

#include "executor.h"

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>

#if defined(__linux__)
#include <dlfcn.h>
#include <limits.h>
#include <link.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#else
#include <condition_variable>
#include <mutex>
#endif
#if !defined(_WIN32)
#include <pthread.h>
#include <signal.h>
#endif

namespace tilefold {
namespace {

using Clock = std::chrono::steady_clock;
using Body = void (*)(void* context, int worker);

constexpr std::chrono::milliseconds POLL_EVERY{50};

// How long a caller that is done looks for the last worker before it sleeps: about what waking up costs. With
// two items of 20 µs a region took 54 µs after 5 µs of patience and 21 µs after 20 µs; on a virtual machine,
// where an idle processor needs some 80 µs to come back, a step of decoding took 482 µs after 20 µs of
// patience and 454 µs after 200 µs.
constexpr std::chrono::microseconds PATIENCE{100};

// A number that threads sleep on until somebody changes it and wakes them; they may also wake for no reason.
#if defined(__linux__)

struct Word {
    std::atomic<uint32_t> value{0};

    void sleep(uint32_t unless_changed_from, const timespec* limit = nullptr) noexcept {
        syscall(SYS_futex, &value, FUTEX_WAIT_PRIVATE, unless_changed_from, limit, nullptr, 0);
    }

    void sleep(uint32_t unless_changed_from, std::chrono::nanoseconds limit) noexcept {
        const timespec relative{0, static_cast<long>(limit.count())};
        sleep(unless_changed_from, &relative);
    }

    void wake(int sleepers) noexcept {
        syscall(SYS_futex, &value, FUTEX_WAKE_PRIVATE, sleepers, nullptr, nullptr, 0);
    }
};

#else

struct Word {
    std::atomic<uint32_t> value{0};
    std::mutex mutex;
    std::condition_variable bell;

    void sleep(uint32_t unless_changed_from, std::chrono::nanoseconds limit = std::chrono::hours(1)) {
        std::unique_lock lock(mutex);
        if (value.load() == unless_changed_from) bell.wait_for(lock, limit);
    }

    // Holding the mutex for a moment means that nobody is between looking at the value and falling asleep.
    void wake(int sleepers) {
        {
            std::lock_guard lock(mutex);
        }
        while (sleepers-- > 0) bell.notify_one();
    }
};

#endif

void relax() noexcept {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) && !defined(_MSC_VER)
    asm volatile("yield");
#endif
}

class Pool {
   public:
    std::atomic<bool> busy{false};  // held by the one caller that may use a team, OpenMP's included

    int run(int workers, Body body, void* context, Stop* stop) noexcept;

   private:
    static constexpr uint32_t SEAT = 1 << 16;
    static constexpr uint32_t JOINED = SEAT - 1;
    static_assert(MAX_THREADS <= JOINED);

    void grow(int helpers) noexcept;
    void avoid_caller() noexcept;
    void work() noexcept;
    void wake_children(int worker, int helpers) noexcept;

    // Touched only by the holder of `busy`.
    int size_ = 0;
    int placed_ = 0;    // workers that have been told where to run
    int avoided_ = -1;  // the processor that they keep free for the caller
#if defined(__linux__)
    pthread_t threads_[MAX_THREADS];
#endif

    // Seats still open · SEAT + workers that took one. Only who took a seat may read body_ and context_.
    alignas(64) Word gate_;
    Body body_ = nullptr;
    void* context_ = nullptr;

    // Workers that have left, minus those that the caller has counted at the gate: 0 when the last has left.
    alignas(64) Word balance_;
};

// Leaked: workers sleep on it until the process is gone, whatever is destroyed before.
Pool& pool = *new Pool;
unsigned forks = 0;

struct OpenMP {
    using Parallel = void (*)(void (*region)(void*), void* data, unsigned threads, unsigned flags);
    using Ask = int (*)();

    std::atomic<Parallel> parallel{nullptr};
    std::atomic<Ask> in_parallel{nullptr};
    std::atomic<Ask> max_threads{nullptr};
    std::atomic<unsigned long long> searched{0};  // libraries ever loaded, at the last vain search
} openmp;

// Nobody else runs in the child yet. An OpenMP team is as dead as our workers, and its library does not know.
void after_fork() noexcept {
    ++forks;
    openmp.parallel.store(nullptr);
    new (&pool) Pool;
}

#if defined(_WIN32)
const bool fork_is_safe = true;
#else
const bool fork_is_safe = pthread_atfork(nullptr, nullptr, after_fork) == 0;
#endif

// New threads inherit the signal mask, so every signal goes to a thread that is not ours. Faults are left
// alone: blocked, they would end the process without a word from faulthandler.
void Pool::grow(int helpers) noexcept {
    if (size_ >= helpers || !fork_is_safe) return;
#if !defined(_WIN32)
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
#endif
    try {
        for (; size_ < helpers; ++size_) {
            std::thread thread(&Pool::work, this);
#if defined(__linux__)
            threads_[size_] = thread.native_handle();
#endif
            thread.detach();
        }
    } catch (...) {
        // No more threads or no more memory: those there are will do.
    }
#if !defined(_WIN32)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
}

// Left alone, a woken worker often queues on the very processor that its waker keeps busy and starts when
// that is done: kernels that run as guests do so by habit, since to them a sleeping virtual processor is one
// that is away. (Two items of 200 µs then took 400 µs, with this 260.) So the allowed processors are dealt
// out to the workers like cards, and whoever was dealt the caller's goes without it. Only a caller that has
// moved has anything to do here.
void Pool::avoid_caller() noexcept {
#if defined(__linux__)
    const int here = sched_getcpu();
    if (here == avoided_ && size_ == placed_) return;
    cpu_set_t allowed, hand;
    if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    int cards[CPU_SETSIZE], count = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu)
        if (CPU_ISSET(cpu, &allowed)) cards[count++] = cpu;
    CPU_CLR(here, &allowed);
    for (int worker = 0; worker < size_; ++worker) {
        bool changed = size_ != placed_;
        CPU_ZERO(&hand);
        for (int card = worker; card < count; card += size_) {
            changed |= cards[card] == here || cards[card] == avoided_;
            if (cards[card] != here) CPU_SET(cards[card], &hand);
        }
        if (CPU_COUNT(&hand) == 0) {
            hand = allowed;
            changed = true;
        }
        if (changed) pthread_setaffinity_np(threads_[worker], sizeof hand, &hand);
    }
    avoided_ = here;
    placed_ = size_;
#endif
}

// Waking is shared out as a binary tree, so that a large team does not cost its caller one system call's work
// for each worker: worker i wakes those who become workers 2i + 1 and 2i + 2.
void Pool::wake_children(int worker, int helpers) noexcept {
    const int children = std::min(helpers - 2 * worker, 2);
    if (children > 0) gate_.wake(children);
}

void Pool::work() noexcept {
#if defined(__linux__)
    pthread_setname_np(pthread_self(), "tilefold");
#endif
    for (;;) {
        uint32_t seen = gate_.value.load(std::memory_order_relaxed);
        if (seen < SEAT) {
            gate_.sleep(seen);
            continue;
        }
        // It does not matter if `seen` is from an earlier region than the one joined: the job is read below.
        if (!gate_.value.compare_exchange_weak(seen, seen - SEAT + 1, std::memory_order_acquire,
                                               std::memory_order_relaxed))
            continue;
        const int joined = static_cast<int>(seen & JOINED);
        wake_children(joined + 1, joined + static_cast<int>(seen / SEAT));
        body_(context_, joined + 1);
        gate_.value.fetch_and(JOINED, std::memory_order_relaxed);
        if (balance_.value.fetch_add(1, std::memory_order_acq_rel) + 1 == 0) balance_.wake(1);
    }
}

int Pool::run(int workers, Body body, void* context, Stop* stop) noexcept {
    grow(workers - 1);
    avoid_caller();
    const int helpers = std::min(workers - 1, size_);
    const unsigned forks_before = forks;
    body_ = body;
    context_ = context;
    gate_.value.store(static_cast<uint32_t>(helpers) * SEAT, std::memory_order_release);
    wake_children(0, helpers);
    body(context, 0);
    if (forks != forks_before) return 0;

    const uint32_t joined = gate_.value.exchange(0, std::memory_order_relaxed) & JOINED;
    uint32_t balance = balance_.value.fetch_sub(joined, std::memory_order_acq_rel) - joined;
    for (const auto end = Clock::now() + PATIENCE; balance != 0 && Clock::now() < end;) {
        relax();
        balance = balance_.value.load(std::memory_order_acquire);
    }
    while (balance != 0) {
        balance_.sleep(balance, POLL_EVERY);
        if (stop) stop->check(0);
        if (forks != forks_before) return 0;
        balance = balance_.value.load(std::memory_order_acquire);
    }
    return 1 + static_cast<int>(joined);
}

#if defined(__linux__)

struct Search {
    unsigned long long before, now;
    int rank;
    char path[PATH_MAX];
};

// Higher is better, 0 is no OpenMP library. Of several, torch's own has the workers that would be in our way.
int rank(std::string_view path) noexcept {
    const std::string_view file = path.substr(path.rfind('/') + 1);
    const bool gnu = file.starts_with("libgomp.") || file.starts_with("libgomp-");
    bool known = gnu;
    for (std::string_view name : {"libomp.", "libomp-", "libomp5.", "libiomp5.", "libiomp5-"})
        known |= file.starts_with(name);
    if (!known || file.starts_with("libgomp-plugin")) return 0;
    return 1 + gnu + 2 * (path.find("/torch/") != path.npos);
}

int consider(dl_phdr_info* info, size_t, void* data) noexcept {
    Search& search = *static_cast<Search*>(data);
    search.now = info->dlpi_adds;
    if (search.now == search.before) return 1;
    const std::string_view path = info->dlpi_name;
    const int found = rank(path);
    if (found > search.rank && path.size() < sizeof search.path) {
        search.rank = found;
        search.path[path.copy(search.path, path.size())] = '\0';
    }
    return 0;
}

// Two threads may search at once; they find the same.
OpenMP::Parallel find_openmp() noexcept {
    if (const auto known = openmp.parallel.load(std::memory_order_acquire)) return known;
    if (forks > 0) return nullptr;
    Search search{openmp.searched.load(std::memory_order_relaxed), 0, 0, {}};
    dl_iterate_phdr(consider, &search);
    void* library = search.rank > 0 ? dlopen(search.path, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
    void* parallel = library ? dlsym(library, "GOMP_parallel") : nullptr;
    if (!parallel) {
        openmp.searched.store(search.now, std::memory_order_relaxed);
        return nullptr;
    }
    openmp.in_parallel.store(reinterpret_cast<OpenMP::Ask>(dlsym(library, "omp_in_parallel")));
    openmp.max_threads.store(reinterpret_cast<OpenMP::Ask>(dlsym(library, "omp_get_max_threads")));
    openmp.parallel.store(reinterpret_cast<OpenMP::Parallel>(parallel), std::memory_order_release);
    return reinterpret_cast<OpenMP::Parallel>(parallel);
}

#else

OpenMP::Parallel find_openmp() noexcept { return nullptr; }

#endif

struct Region {
    const Body body;
    void* const context;
    const int workers;
    Stop* const stop;
    const std::thread::id caller = std::this_thread::get_id();
    const unsigned forks_before = forks;
    std::atomic<int> joined{1}, inside{0};
};

// The team's own barrier would not let the caller poll, so it waits here until the others are out of the
// body. In a child that was forked meanwhile there are no others.
void wait_for_others(const Region& region) noexcept {
    while (region.inside.load(std::memory_order_acquire) > 0 && forks == region.forks_before) {
        if (region.stop && region.stop->check(0)) return;
        std::this_thread::yield();
    }
}

void enter(void* data) noexcept {
    Region& region = *static_cast<Region*>(data);
    if (region.caller == std::this_thread::get_id()) {
        region.body(region.context, 0);
        wait_for_others(region);
        return;
    }
    const int worker = region.joined.fetch_add(1, std::memory_order_relaxed);
    if (worker >= region.workers) return;
    region.inside.fetch_add(1, std::memory_order_relaxed);
    region.body(region.context, worker);
    region.inside.fetch_sub(1, std::memory_order_release);
}

// A smaller team than before makes libgomp end threads, which it then creates again for their owner. So ours
// is no smaller than the owner's, and the surplus leaves at once, as in torch's own regions.
int run_openmp(OpenMP::Parallel parallel, int workers, Body body, void* context, Stop* stop) noexcept {
    const auto in_parallel = openmp.in_parallel.load();
    if (in_parallel && in_parallel()) {
        body(context, 0);
        return 1;
    }
    const auto max_threads = openmp.max_threads.load();
    Region region{body, context, workers, stop};
    parallel(enter, &region, static_cast<unsigned>(std::max(workers, max_threads ? max_threads() : 1)), 0);
    return std::min(region.joined.load(), workers);
}

// The number of threads that `text` says, up to blanks and `end` if that comes; 0 if it is none.
int parse(std::string_view text, char end) noexcept {
    const auto skip_blanks = [&] {
        text.remove_prefix(std::min(text.find_first_not_of(" \t"), text.size()));
    };
    int count = 0;
    skip_blanks();
    const auto [rest, error] = std::from_chars(text.data(), text.data() + text.size(), count);
    text.remove_prefix(static_cast<size_t>(rest - text.data()));
    skip_blanks();
    const bool good = error == std::errc() && count >= 1 && count <= MAX_THREADS;
    return good && (text.empty() || text.front() == end) ? count : 0;
}

int processors() noexcept {
#if defined(__linux__)
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof allowed, &allowed) == 0)
        return std::clamp(CPU_COUNT(&allowed), 1, MAX_THREADS);
#endif
    return std::clamp(static_cast<int>(std::thread::hardware_concurrency()), 1, MAX_THREADS);
}

std::atomic<int> chosen{0}, found{0};

}  // namespace

Stop::Stop(Poll poll) noexcept : poll_(poll), next_(Clock::now() + POLL_EVERY) {}

bool Stop::check(int worker) noexcept {
    if (stopped_.load(std::memory_order_relaxed)) return true;
    if (worker != 0 || !poll_.ask || Clock::now() < next_) return false;
    if (poll_.ask(poll_.context)) request();
    next_ = Clock::now() + POLL_EVERY;
    return stopped_.load(std::memory_order_relaxed);
}

int run(Team team, int workers, Body body, void* context, Stop* stop) noexcept {
    if (team == Team::SERIAL || workers < 2 || pool.busy.exchange(true, std::memory_order_acquire)) {
        body(context, 0);
        return 1;
    }
    workers = std::min(workers, MAX_THREADS);
    const unsigned forks_before = forks;
    const auto parallel = team == Team::OPENMP ? find_openmp() : nullptr;
    const int took_part = parallel ? run_openmp(parallel, workers, body, context, stop)
                                   : pool.run(workers, body, context, stop);
    if (forks == forks_before) pool.busy.store(false, std::memory_order_release);
    return took_part;
}

bool has_openmp() noexcept { return find_openmp() != nullptr; }

const char* openmp_path() noexcept {
#if defined(__linux__)
    const auto parallel = find_openmp();
    Dl_info info;
    if (parallel && dladdr(reinterpret_cast<void*>(parallel), &info)) return info.dli_fname;
#endif
    return nullptr;
}

int default_threads() {
    const char* ours = std::getenv("TILEFOLD_NUM_THREADS");
    if (ours && *ours) {
        if (const int count = parse(ours, '\0')) return count;
        throw std::invalid_argument(std::string("TILEFOLD_NUM_THREADS=") + ours +
                                    " is not a number of threads; expected an integer from 1 to " +
                                    std::to_string(MAX_THREADS));
    }
    const char* openmps = std::getenv("OMP_NUM_THREADS");
    const int count = openmps ? parse(openmps, ',') : 0;
    return count > 0 ? count : processors();
}

void set_threads(int count) {
    if (count < 0 || count > MAX_THREADS)
        throw std::invalid_argument("the number of threads was " + std::to_string(count) +
                                    "; expected an integer from 1 to " + std::to_string(MAX_THREADS) +
                                    ", or 0 for the default");
    chosen.store(count, std::memory_order_relaxed);
}

int threads(int otherwise) {
    if (const int count = chosen.load(std::memory_order_relaxed)) return count;
    if (otherwise > 0) return std::min(otherwise, MAX_THREADS);
    if (const int count = found.load(std::memory_order_relaxed)) return count;
    const int count = default_threads();
    found.store(count, std::memory_order_relaxed);
    return count;
}

}  // namespace tilefold
