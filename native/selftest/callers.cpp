// Many threads call at once: each result has the bits of the same call alone, whoever has the pool and the
// kept memory. Written for the thread sanitizer, which sees every access that nothing orders. The facts to
// know: the memory of calls is memory.cpp's here, which selftest.cpp replaces; a borrowed OpenMP team is left
// out, because no sanitizer instruments libgomp and so every wait in it would look like none. Usage: callers
// [rounds]

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "../dispatch.h"
#include "../executor.h"
#include "../sweep.h"

namespace {

using namespace tilefold;

constexpr int CALLERS = 6, ROUNDS = 200;

std::atomic<int> failures{0}, stopped{0}, helped{0};

// What is called: sequences one after the other where there are several, else one of them.
struct Shape {
    DType type;
    int64_t heads, kv_heads, q_len, kv_len, dim;
    bool causal, packed;
};

constexpr Shape SHAPES[] = {
    {DType::float32, 4, 2, 70, 90, 16, true, false},      // keys and values read where they lie
    {DType::float16, 4, 2, 150, 200, 16, true, false},    // panels that several tiles share
    {DType::bfloat16, 6, 3, 150, 130, 24, false, false},  // the same, in pairs on some machines
    {DType::float32, 2, 1, 1, 3000, 16, false, false},    // segments of keys that are joined
    {DType::float64, 4, 4, 90, 120, 8, true, true},       // sequences of different lengths
};
const int64_t ENDS[] = {0, 50, 53, 90}, KV_ENDS[] = {0, 20, 60, 120};

// A number of about 1, as it is stored.
void put(std::vector<char>& x, DType type, int64_t at, uint32_t bits) {
    char* const to = x.data() + at * width(type);
    const double number = (bits & 1 ? -1 : 1) * (1 + double(bits >> 8) * 0x1p-24);
    const float single = float(number);
    const uint16_t sign = uint16_t(bits & 1 ? 0x8000 : 0);
    const uint16_t half =
        uint16_t(sign | (type == DType::float16 ? 0x3c00 | bits >> 22 : 0x3f80 | bits >> 25));
    if (type == DType::float64) memcpy(to, &number, sizeof number);
    if (type == DType::float32) memcpy(to, &single, sizeof single);
    if (width(type) == 2) memcpy(to, &half, sizeof half);
}

// A problem and its inputs, which nobody writes once they are made.
struct Given {
    Problem p{};
    const Kernels& kernels;
    std::vector<char> q, k, v;
    int64_t q_shape[3], k_shape[3], q_strides[3], k_strides[3], lse_strides[2];

    Given(const Shape& s, const Machine& machine) : kernels(machine.kernels(s.type)) {
        p.batch = s.packed ? int64_t(std::size(ENDS)) - 1 : 1;
        p.heads = s.heads, p.kv_heads = s.kv_heads, p.q_len = s.q_len, p.kv_len = s.kv_len;
        p.dim = p.v_dim = s.dim, p.q_dtype = p.kv_dtype = s.type;
        p.acc_dtype = s.type == DType::float64 ? DType::float64 : DType::float32;
        p.scale = 1 / std::sqrt(double(s.dim)), p.softcap = NO_SOFTCAP;
        p.band = {UNLIMITED, s.causal ? 0 : UNLIMITED, s.packed ? PER_SEQUENCE : s.kv_len - s.q_len};
        p.layout = s.packed ? VARLEN : DENSE, p.want = LSE;
        lay_out(s.heads, s.q_len, s.dim, q_shape, q_strides);
        lay_out(s.kv_heads, s.kv_len, s.dim, k_shape, k_strides);
        lse_strides[0] = s.q_len, lse_strides[1] = 1;
        q.resize(size_t(s.heads * s.q_len * s.dim * width(s.type)));
        k.resize(size_t(s.kv_heads * s.kv_len * s.dim * width(s.type))), v.resize(k.size());
        uint32_t random = 1;
        for (std::vector<char>* x : {&q, &k, &v})
            for (int64_t i = 0; i < int64_t(x->size()) / width(s.type); i++)
                put(*x, s.type, i, random = random * 1664525 + 1013904223);
    }

    static void lay_out(int64_t heads, int64_t rows, int64_t cols, int64_t* shape, int64_t* strides) {
        shape[0] = heads, shape[1] = rows, shape[2] = cols;
        strides[0] = rows * cols, strides[1] = cols, strides[2] = 1;
    }

    static Array array(const std::vector<char>& x, int dims, const int64_t* shape, const int64_t* strides,
                       DType type) {
        return {const_cast<char*>(x.data()), dims, shape, strides, type};
    }
};

// The results of one call, full of NaN before it.
struct Result {
    std::vector<char> out, lse;

    explicit Result(const Given& g)
        : out(g.q.size(), char(0xff)),
          lse(size_t(g.p.heads * g.p.q_len * width(g.p.acc_dtype)), char(0xff)) {}
    bool operator==(const Result&) const = default;
};

void fold_into(Result& r, const Given& g, const Settings& s, Team team, Stop& stop) {
    Arrays a;
    a.q = Given::array(g.q, 3, g.q_shape, g.q_strides, g.p.q_dtype);
    a.k = Given::array(g.k, 3, g.k_shape, g.k_strides, g.p.q_dtype);
    a.v = Given::array(g.v, 3, g.k_shape, g.k_strides, g.p.q_dtype);
    a.out = Given::array(r.out, 3, g.q_shape, g.q_strides, g.p.q_dtype);
    a.lse = Given::array(r.lse, 2, g.q_shape, g.lse_strides, g.p.acc_dtype);
    if (g.p.layout == VARLEN) a.q_ends = ENDS, a.kv_ends = KV_ENDS;
    Selection part;
    part.last_row = g.p.q_len;
    tilefold::fold(g.p, g.kernels, s, a, part, team, stop);
}

// Tiles, splits and workers differ from call to call; the bits may not.
Settings settings(const Given& g, int n) {
    return resized(g.p, g.kernels,
                   {1 + n * 7 % g.kernels.most_rows, g.kernels.block_k, 1 + n % 2, 2 + n % 3});
}

// Regions with next to nothing in them: nothing but the pool itself puts their callers in an order.
void enter_regions(int regions) {
    const auto body = [](void* context, int) {
        auto& here = *static_cast<std::atomic<int>*>(context);
        here++;
        for (int patience = 0; here < 2 && patience < 100; patience++) std::this_thread::yield();
    };
    for (int n = 0; n < regions; n++) {
        std::atomic<int> here{0};
        const int took = tilefold::run(Team::OWN, 3, body, &here);
        if (took != here) printf("FAILED  %d took part, %d are said to\n", here.load(), took), failures++;
        helped += took > 1;
    }
}

void call(const std::vector<Given>& given, const std::vector<Result>& right, int caller, int rounds) {
    for (int n = caller; n < caller + rounds; n++) {
        const size_t which = size_t(n) % given.size();
        const Given& g = given[which];
        Result r(g);
        Stop stop;
        const bool give_up = n % 5 == 4;
        if (give_up) stop.request();
        fold_into(r, g, settings(g, n), Team::OWN, stop);
        if (give_up)
            stopped++;
        else if (!(r == right[which]))
            printf("FAILED  caller %d, call %d: not the same bits\n", caller, n), failures++;
    }
    enter_regions(10 * rounds);
}

// While worker 0 waits or folds, its poll calls too, as a handler of a signal may.
void call_from_a_poll(const std::vector<Given>& given, const std::vector<Result>& right) {
    struct Poll {
        const Given& given;
        const Result& right;
        int asked = 0;
    } poll{given[1], right[1]};
    const Shape lasting{DType::float32, 8, 1, 300, 12000, 16, false, false};
    const Given g(lasting, choose("scalar"));
    Stop stop({[](void* context) {
                   auto& poll = *static_cast<Poll*>(context);
                   Result r(poll.given);
                   Stop inner;
                   fold_into(r, poll.given, settings(poll.given, ++poll.asked), Team::OWN, inner);
                   if (!(r == poll.right)) printf("FAILED  in a poll: not the same bits\n"), failures++;
                   return poll.asked > 3;
               },
               &poll});
    Result r(g);
    fold_into(r, g, settings(g, 1), Team::OWN, stop);
    if (!poll.asked) printf("FAILED  the call was too short to be asked\n"), failures++;
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : ROUNDS;
    setvbuf(stdout, nullptr, _IOLBF, 0);
    const std::vector<const Machine*> machines = {&choose(nullptr), &choose("scalar")};
    std::vector<Given> given;
    given.reserve(std::size(SHAPES) * machines.size());
    for (const Machine* machine : machines)
        for (const Shape& s : SHAPES) given.emplace_back(s, *machine);
    std::vector<Result> right;
    for (const Given& g : given) {
        Stop stop;
        fold_into(right.emplace_back(g), g, plan(g.p, g.kernels, 1), Team::SERIAL, stop);
    }
    std::vector<std::thread> callers;
    for (int n = 0; n < CALLERS; n++)
        callers.emplace_back(call, std::cref(given), std::cref(right), n, rounds);
    callers.emplace_back([rounds] {
        for (int n = 0; n < rounds; n++) {
            set_threads(n % 3);
            if (threads(2) < 1) failures++;
            has_openmp();
        }
    });
    for (std::thread& caller : callers) caller.join();
    call_from_a_poll(given, right);
    if (!helped) printf("FAILED  nobody helped\n"), failures++;
    if (!stopped) printf("FAILED  nobody gave up\n"), failures++;
    printf("callers      %d at once, %d calls each, %d of them given up\n", CALLERS, rounds, stopped.load());
    if (failures) printf("FAILED  %d times\n", failures.load());
    return failures ? 1 : 0;
}
