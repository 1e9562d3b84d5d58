// The core checked without Python, where sanitizers and emulators can reach it: every machine that this CPU
// has, every storage type, forward and backward, against attention written out in a wider type. The fact to
// know: kernels are called through a table of the test's own, which fills their scratch with NaN before each
// piece and finds writes beyond its end. Usage: selftest [number of cases [the first one]]

#include <signal.h>

#include <chrono>
#include <optional>
#include <stdexcept>

#include "../dispatch.h"
#include "gradient.h"
#include "taps.h"

namespace {

struct Tally {
    int cases = 0, calls = 0, worst_case = -1;
    double worst = 0, worst_gradient = 0;
};

// One case on one machine.
void check(const Data& x, const Expected& e, const Kernels& kernels, Tally& tally) {
    const Kernels k = watch_kernels(kernels);
    const bool rounds = x.c.type == DType::bfloat16 && k.value_bytes == 2;
    Random random(uint64_t(x.c.number) + 5);
    const auto fold_whole = [&](const Settings& s, Team team) {
        Result r(x);
        fold_rows(x, x.p, k, s, team, 0, x.p.q_len, 0, r);
        tally.calls++;
        return r;
    };
    const auto judge = [&](Result& r, const std::string& what) {
        const double share = (steady(k).codes && e.exact ? *e.exact : e).share(x, r, rounds);
        if (share > tally.worst) tally.worst = share, tally.worst_case = x.c.number;
        expect(share <= 1, what + " is off by " + std::to_string(share) + " of what is allowed");
    };
    const auto settings_of = [](const Settings& s) {
        return "tiles of " + std::to_string(s.tile_rows) + " rows, blocks of " + std::to_string(s.block_k) +
               ", splits " + std::to_string(s.splits) + ", workers " + std::to_string(s.workers);
    };
    tally.cases++;

    // The plan for one thread, and all it promises.
    const Settings plain = plan(x.p, k, 1);
    Result first = fold_whole(plain, Team::OWN);
    judge(first, "the result");
    first.only(x, 0, x.p.q_len);
    const int64_t predicted = workspace(x.p, k, plain);
    const bool nothing_to_do = first.bytes == 0 && x.p.q_len == 0;
    if (x.c.lengths == WHOLE && !nothing_to_do)
        expect(first.bytes == predicted,
               "took " + std::to_string(first.bytes) + " bytes, predicted " + std::to_string(predicted));
    else
        expect(first.bytes <= predicted, "took more bytes than predicted");

    // Other tiles, splits and threads: the same bits.
    const Settings busy = plan(x.p, k, 3);
    for (int n = 0; n < 3; n++) {
        Settings s = n ? resized(x.p, k, {1 + random.below(k.most_rows), k.block_k, 1 + n % 2, 1 + n}) : busy;
        Result r = fold_whole(s, Team::OWN);
        expect(r.only(x, 0, x.p.q_len, &first), settings_of(s) + ": not the same bits");
    }

    // Other blocks of keys: as good.
    const Settings other = resized(x.p, k, {k.tile_rows, 16 + random.below(150), 1, 1});
    Result r = fold_whole(other, Team::SERIAL);
    judge(r, settings_of(other));

    // Where keys and values lie, and what they are stored as: the same bits.
    if (x.c.lengths == PAGES && !(steady(k).codes && e.exact)) {
        Problem dense = x.p;
        dense.layout = DENSE, dense.kv_dtype = x.c.type;
        Result plain_arrays(x);
        fold_rows(x, dense, k, plain, Team::SERIAL, 0, x.p.q_len, 0, plain_arrays);
        expect(plain_arrays.only(x, 0, x.p.q_len, &first), "plain arrays: not the same bits");
        tally.calls++;
    }

    // A row alone, within its call and as a call of its own (decoding): the same bits, but where only calls
    // that ask for it have them.
    if (!x.p.q_len || x.c.q_len == 0) return;
    Problem steady_one = x.p;
    std::optional<Result> by_steady;
    if (k.steady) {
        steady_one.want = Want(steady_one.want | INVARIANT);
        fold_rows(x, steady_one, k, plan(steady_one, k, 2), Team::OWN, 0, x.p.q_len, 0, by_steady.emplace(x));
        const double share = e.share(x, *by_steady, rounds);
        expect(share <= 1,
               "by steady kernels, it is off by " + std::to_string(share) + " of what is allowed");
    }
    Result& whole = by_steady ? *by_steady : first;
    for (int n = 0; n < 2; n++) {
        const int64_t i = n ? random.below(x.c.q_len) : x.c.q_len - 1;
        Result row(x);
        fold_rows(x, x.p, k, plain, Team::SERIAL, i, i + 1, 0, row);
        expect(row.only(x, i, i + 1, &first),
               "query " + std::to_string(i) + " folded alone: not the same bits");
        if (x.c.lengths != WHOLE) continue;
        Problem decode = steady_one;
        decode.q_len = 1, decode.band.offset += i;
        Result token(x);
        fold_rows(x, decode, k, plan(decode, k, 1 + 2 * n), Team::OWN, 0, 1, i, token);
        expect(token.only(x, i, i + 1, &whole), "query " + std::to_string(i) + " decoded: not the same bits");
        tally.calls += 2;
    }
}

// ---- what is not a case ----

// A call ends early when it is told to, and the next one is right.
void check_stop(const Kernels& kernels) {
    enter("a call that is stopped");
    constexpr int64_t LENGTH = 40000, DIM = 16;
    std::vector<float> x(LENGTH * DIM, 0.5f), out(x.size(), -1.0f);
    const int64_t shape[] = {1, LENGTH, DIM}, strides[] = {LENGTH * DIM, DIM, 1};
    Problem p{};
    p.batch = p.heads = p.kv_heads = 1;
    p.q_len = p.kv_len = LENGTH, p.dim = p.v_dim = DIM;
    p.q_dtype = p.kv_dtype = p.acc_dtype = DType::float32;
    p.scale = 0.1, p.softcap = NO_SOFTCAP, p.band = {UNLIMITED, UNLIMITED, 0};
    Arrays a;
    a.q = a.k = a.v = {reinterpret_cast<char*>(x.data()), 3, shape, strides, DType::float32};
    a.out = a.q, a.out.data = reinterpret_cast<char*>(out.data());
    Selection part;
    part.last_row = p.q_len;
    using Clock = std::chrono::steady_clock;
    for (int threads : {1, 3}) {
        Clock::time_point asked{};
        Stop stop(
            {[](void* when) { return *static_cast<Clock::time_point*>(when) = Clock::now(), true; }, &asked});
        tilefold::fold(p, kernels, plan(p, kernels, threads), a, part, Team::OWN, stop);
        const double late = std::chrono::duration<double>(Clock::now() - asked).count();
        expect(asked != Clock::time_point{}, "nobody asked whether to stop");
        // An emulator needs a second for the keys of a piece between two looks.
        expect(late < 5, "went on for " + std::to_string(late) + " s");
        expect(out[0] == -1.0f || out.back() == -1.0f, "was done before it was asked to stop");
    }
}

// With every allocation failing in turn there is an exception or the right result, and the next call is
// right. Each call asks for more threads than there were, so that some fail to start.
void check_no_memory(const Kernels& kernels) {
    Case c(3, DType::float32);
    c.lengths = PADDED, c.hides = NOTHING, c.poison = false;
    c.batch = 2, c.kv_heads = 1, c.q_len = 33, c.kv_len = 1030, c.dim = c.v_dim = 8;
    enter("no memory, " + c.text());
    const Data x(c);
    const Kernels k = watch_kernels(kernels);
    const Settings serial = resized(x.p, k, {16, k.block_k, 2, 1});
    Result right(x);
    fold_rows(x, x.p, k, serial, Team::SERIAL, 0, x.p.q_len, 0, right);
    bool thrown = true;
    int n = 0;
    while (thrown && n < 1000) {
        Result r(x);
        Settings s = serial;
        s.workers = 6 + ++n;
        thrown = false;
        refused = n;
        try {
            fold_rows(x, x.p, k, s, Team::OWN, 0, x.p.q_len, 0, r);
        } catch (const std::bad_alloc&) {
            thrown = true;
        }
        const bool reached = refused.exchange(0) == 0;
        if (!thrown) expect(r.only(x, 0, x.p.q_len, &right), "not the same bits");
        thrown |= reached;  // or swallowed: a thread less
        Result next(x);
        fold_rows(x, x.p, k, serial, Team::OWN, 0, x.p.q_len, 0, next);
        expect(next.only(x, 0, x.p.q_len, &right), "the next call: not the same bits");
    }
    expect(n > 2 && n < 1000, "allocations were not counted");
    printf("no memory    each of %d allocations refused in turn\n", n - 1);
}

// Names of all machines, from what is said of a name that is none.
std::vector<std::string> machine_names() {
    std::vector<std::string> names;
    try {
        choose("?");
    } catch (const std::invalid_argument& error) {
        std::string text = error.what();
        text.erase(0, text.rfind(':') + 1);
        while (!text.empty()) {
            text.erase(0, 1);
            names.push_back(text.substr(0, text.find(' ')));
            text.erase(0, names.back().size());
        }
    }
    return names;
}

// The machine whose kernels another one has for a type, if they are not its own.
const Machine* lender(const std::vector<const Machine*>& machines, size_t m, DType type) {
    for (size_t n = machines.size(); --n > m;)
        if (&machines[n]->kernels(type) == &machines[m]->kernels(type)) return machines[n];
    return nullptr;
}

}  // namespace

int main(int argc, char** argv) {
    const int cases = argc > 1 ? atoi(argv[1]) : CASES, first = argc > 2 ? atoi(argv[2]) : 0;
    setvbuf(stdout, nullptr, _IOLBF, 0);
#if defined(__SANITIZE_ADDRESS__)
    __asan_set_death_callback(say_where);
#else
    for (int fault : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT})
        signal(fault, [](int signal) {
            say_where();
            _Exit(128 + signal);
        });
#endif
    std::vector<const Machine*> machines;
    const std::vector<std::string> names = machine_names();
    for (const std::string& name : names) try {
            machines.push_back(&choose(name.c_str()));
        } catch (const std::invalid_argument& error) {
            printf("%-12s skipped: %s\n", name.c_str(), error.what());
        }
    if (machines.empty()) return printf("FAILED  no machine at all\n"), 1;

    std::vector<std::vector<Tally>> tallies(machines.size(), std::vector<Tally>(std::size(TYPES)));
    for (int n = first; n < first + cases; n++)
        for (size_t t = 0; t < std::size(TYPES); t++) {
            const Case c(n, TYPES[t]);
            enter(c.text());
            const Data x(c);
            const Expected e(x);
            std::optional<ExpectedGradient> g;
            if (c.lengths != PAGES) g.emplace(x, e);
            for (size_t m = 0; m < machines.size(); m++) {
                if (lender(machines, m, c.type)) continue;
                enter(machines[m]->name + (", " + c.text()));
                Tally& tally = tallies[m][t];
                check(x, e, machines[m]->kernels(c.type), tally);
                check_taps(x, e, machines[m]->kernels(c.type));
                if (!g) continue;
                tally.worst_gradient =
                    std::max(tally.worst_gradient, check_gradient(x, *g, machines[m]->kernels(c.type)));
            }
        }
    check_stop(machines[0]->kernels(DType::float32));
    check_no_memory(machines[0]->kernels(DType::float32));
    for (size_t m = 0; m < machines.size(); m++)
        for (size_t t = 0; t < std::size(TYPES); t++) {
            const Tally& y = tallies[m][t];
            if (const Machine* other = lender(machines, m, TYPES[t])) {
                printf("%-12s %-8s has the kernels of %s\n", machines[m]->name, name(TYPES[t]), other->name);
                continue;
            }
            printf(
                "%-12s %-8s %4d cases, %5d calls, worst error %.2f of what is allowed (case %d), of "
                "gradients %.2f\n",
                machines[m]->name, name(TYPES[t]), y.cases, y.calls, y.worst, y.worst_case, y.worst_gradient);
        }
    if (failures) printf("FAILED  %d times; `selftest 1 N` repeats case N alone\n", failures.load());
    return failures ? 1 : 0;
}
