// One block of memory at most is kept between calls; a concurrent call that finds none makes its own.

#include "memory.h"

#include <stdlib.h>

#include <atomic>
#include <new>

namespace tilefold {
namespace {

constexpr int64_t PAGE = 4096, KEPT = 20 << 20;

struct Kept {
    char* data;
    int64_t capacity;
};
std::atomic<Kept*> kept{nullptr};  // never freed at exit: a thread may still be in a call

}  // namespace

Memory::Memory(int64_t bytes) : data_(nullptr), bytes_(bytes), capacity_(0) {
    if (bytes > KEPT) {
        if (bytes > INT64_MAX / 2) throw std::bad_alloc();
    } else if (Kept* k = kept.exchange(nullptr)) {
        if (k->capacity >= bytes)
            data_ = k->data, capacity_ = k->capacity;
        else
            free(k->data);
        delete k;
        if (data_) return;
    }
    capacity_ = (bytes + PAGE) / PAGE * PAGE;
    data_ = static_cast<char*>(aligned_alloc(PAGE, size_t(capacity_)));
    if (!data_) throw std::bad_alloc();
}

Memory::~Memory() {
    if (capacity_ <= KEPT) {
        Kept* mine = new (std::nothrow) Kept{data_, capacity_};
        Kept* other = mine ? kept.exchange(mine) : nullptr;
        if (other) free(other->data);
        delete other;
        if (mine) return;
    }
    free(data_);
}

}  // namespace tilefold
