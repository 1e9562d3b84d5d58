// What goes wrong is said and counted; the memory of calls is guarded, filled with NaN, and refused where a
// test wants that. It takes the place of memory.cpp, which the linker then has no use for.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <new>
#include <string>
#include <string_view>

#include "../memory.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif
// What valgrind is told and asked; nothing where it does not watch.
#if __has_include(<valgrind/memcheck.h>)
#include <valgrind/memcheck.h>
#else
#define RUNNING_ON_VALGRIND 0
#define VALGRIND_MAKE_MEM_NOACCESS(at, bytes)
#define VALGRIND_MAKE_MEM_DEFINED(at, bytes)
#define VALGRIND_MAKE_MEM_UNDEFINED(at, bytes)
#endif

namespace {

char here[512] = "before the first case";
std::atomic<int> failures{0}, failures_here{0};

void say_where() {
    fprintf(stderr, "selftest: in %s\n", here);
    fflush(stderr);
}

void expect(bool good, std::string_view what) {
    if (good) return;
    failures++;
    if (failures_here++ < 3) printf("FAILED  %s: %.*s\n", here, int(what.size()), what.data());
}

void enter(const std::string& where) {
    snprintf(here, sizeof here, "%s", where.c_str());
    failures_here = 0;
}

// ---- memory: guarded, poisoned, refused ----

constexpr int64_t GUARD = 1024;
constexpr unsigned char PATTERN = 0xa5;  // of guards; whatever has no value yet is 0xff, NaN in every type

void blank(char* at, int64_t bytes) {
    memset(at, 0xff, size_t(bytes));
    VALGRIND_MAKE_MEM_UNDEFINED(at, bytes);
}

void guard(char* at) {
    memset(at, PATTERN, GUARD);
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(at, GUARD);
#endif
    VALGRIND_MAKE_MEM_NOACCESS(at, GUARD);
}
bool unguard(char* at) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(at, GUARD);
#endif
    VALGRIND_MAKE_MEM_DEFINED(at, GUARD);
    return std::all_of(at, at + GUARD, [](char c) { return static_cast<unsigned char>(c) == PATTERN; });
}

std::atomic<int64_t> refused{0};  // the allocation that fails, counted from now on; 0 for none
int64_t memory_bytes = 0;         // of the last call

bool refuse() { return refused.load() > 0 && refused.fetch_sub(1) == 1; }

}  // namespace

// Out of line: where it sees only one of the two, GCC warns that new and free do not match.
__attribute__((noinline)) void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
    return refuse() ? nullptr : malloc(bytes ? bytes : 1);
}
__attribute__((noinline)) void* operator new(size_t bytes) {
    if (void* p = operator new(bytes, std::nothrow)) return p;
    throw std::bad_alloc();
}
__attribute__((noinline)) void operator delete(void* p) noexcept { free(p); }
__attribute__((noinline)) void operator delete(void* p, size_t) noexcept { free(p); }

namespace tilefold {

Memory::Memory(int64_t bytes) : data_(nullptr), bytes_(bytes), capacity_(bytes + GUARD) {
    if (!refuse()) data_ = static_cast<char*>(aligned_alloc(64, size_t((capacity_ + 63) / 64 * 64)));
    if (!data_) throw std::bad_alloc();
    memory_bytes = bytes;
    blank(data_, bytes);
    guard(data_ + bytes);
}
Memory::~Memory() {
    expect(unguard(data_ + bytes_), "wrote beyond the end of the workspace");
    free(data_);
}

}  // namespace tilefold
