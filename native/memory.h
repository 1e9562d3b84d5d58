// The memory of calls: aligned, counted, and kept for the next call while it is small, since fresh pages cost
// more than a small call's arithmetic.
#pragma once

#include <stdint.h>

namespace tilefold {

// Bytes from take to destruction. Throws std::bad_alloc.
class Memory {
   public:
    explicit Memory(int64_t bytes);
    ~Memory();
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    char* data() const { return data_; }
    int64_t bytes() const { return bytes_; }

   private:
    char* data_;
    int64_t bytes_, capacity_;
};

}  // namespace tilefold
