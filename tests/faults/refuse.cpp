// Stands between the native core and its C library (LD_PRELOAD, glibc): counts what the core allocates,
// refuses the n-th allocation, and refuses threads. What is the core's is told by two facts: the caller's
// address lies in it, and the thread does not hold Python's lock, without which the core runs and nanobind,
// which is linked into it, does not.

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <new>

extern "C" {
void* __libc_malloc(size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);
int PyGILState_Check() __attribute__((weak));
}

namespace {

constexpr int MOST = 4096;

struct Block {
    void* at;
    size_t bytes;
};

uintptr_t first, last;                  // addresses of the core
std::atomic<int64_t> left{0};           // the allocation that is refused, counted from now on; 0 for none
std::atomic<int64_t> threads_left{-1};  // threads that may still be made; negative for any number
std::atomic_flag locked = ATOMIC_FLAG_INIT;
Block blocks[MOST];
int count;

template <class F>
void alone(F&& f) {
    while (locked.test_and_set(std::memory_order_acquire)) {
    }
    f();
    locked.clear(std::memory_order_release);
}

bool is_the_cores(void* caller) {
    const uintptr_t at = uintptr_t(caller);
    return at >= first && at < last && PyGILState_Check && !PyGILState_Check();
}

void* take(size_t alignment, size_t bytes, void* caller) {
    const bool counts = is_the_cores(caller);
    if (counts && left.load() > 0 && left.fetch_sub(1) == 1) return nullptr;
    void* p = alignment ? __libc_memalign(alignment, bytes) : __libc_malloc(bytes ? bytes : 1);
    if (p && counts)
        alone([&] {
            if (count == MOST) __builtin_trap();
            blocks[count++] = {p, bytes};
        });
    return p;
}

}  // namespace

#define CALLER __builtin_return_address(0)

void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return take(0, bytes, CALLER); }
void* operator new(size_t bytes) {
    if (void* p = take(0, bytes, CALLER)) return p;
    throw std::bad_alloc();
}

extern "C" {

void* aligned_alloc(size_t alignment, size_t bytes) { return take(alignment, bytes, CALLER); }

void free(void* p) {
    if (p && count)
        alone([&] {
            for (int n = 0; n < count; n++)
                if (blocks[n].at == p) {
                    blocks[n] = blocks[--count];
                    break;
                }
        });
    __libc_free(p);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*run)(void*), void* argument) {
    using Create = int(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
    static Create* const create = reinterpret_cast<Create*>(dlsym(RTLD_NEXT, "pthread_create"));
    if (threads_left.load() >= 0 && threads_left.fetch_sub(1) <= 0) {
        threads_left = 0;
        return EAGAIN;
    }
    return create(thread, attributes, run, argument);
}

// ---- what a test calls ----

void refuse_watch(uintptr_t from, uintptr_t to) { first = from, last = to; }
void refuse_allocation(int64_t n) { left = n; }
int64_t refuse_left() { return left; }
void refuse_threads_after(int64_t n) { threads_left = n; }
int64_t refuse_live_blocks() { return count; }
int64_t refuse_live_bytes() {
    int64_t bytes = 0;
    alone([&] {
        for (int n = 0; n < count; n++) bytes += int64_t(blocks[n].bytes);
    });
    return bytes;
}
}
