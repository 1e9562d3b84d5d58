// What few rows read next, asked for at an even pace: keys and values, wherever they lie.
//
// Decoding waits for memory, so memory must never wait for it. Asked for in bursts, or in columns of a block
// as products read them, lines come one queue at a time (the first cache has 16 places); in the order in
// which they lie, a few between any two pieces of arithmetic and into the second cache, they also wake the
// processor's own foresight. Measured on bf16 keys of 128 dims in memory, four rows, two threads, products in
// tiles: nothing asked 42 ns per key, all of a block at once 33, at an even pace into the first cache 36,
// into the second 28; reading alone 27. Values of a block are asked for while its scores are made, the next
// block's keys while its values are added up.

namespace tilefold {
namespace {

// Lines of memory of rows k0 … k1, in the order in which they lie.
class Requests {
   public:
    // From now on asks for these rows, all of them within `turns` calls of some(). `size`: bytes of an
    // element, if it is no code. Elements that lie apart are left to the processor.
    void begin(const Call& c, const Unit& u, const Side& x, int64_t size, int64_t k0, int64_t k1,
               int64_t turns) {
        if (is_code(c.kv_type)) size = 1;
        table_ = c.page ? u.table : nullptr, page_ = c.page;
        base_ = static_cast<const char*>(x.base), row_ = x.strides.row * size, step_ = x.pages.step * size;
        width_ = (c.kv_type == DType::int4 ? x.width / 2 : x.width) * size;
        k_ = k0, last_ = x.strides.col == 1 ? k1 : k0;
        at_ = end_ = nullptr, more_ = 0;
        const int64_t lines = most(last_ - k0, 0) * ((width_ + LINE - 1) / LINE);
        pace_ = up(lines, most(turns, 1)) / most(turns, 1);
    }
    TILEFOLD_INLINE void some() {
        for (int64_t n = pace_; n > 0; n--, at_ += LINE) {
            if (at_ >= end_) {
                if (more_-- > 0)
                    end_ += row_, at_ = end_ - width_;
                else if (!turn())
                    return;
            }
            ask(at_);
        }
    }

   private:
    static constexpr int64_t LINE = 64;

    static TILEFOLD_INLINE void ask(const char* at) { __builtin_prefetch(at, 0, 2); }

    // Goes to the next rows that lie at even steps.
    __attribute__((noinline)) bool turn() {
        while (k_ < last_) {
            int64_t n = last_ - k_, page = 0, at = k_;
            if (table_) page = table_[k_ / page_], at = k_ % page_, n = least(n, page_ - at);
            k_ += n;
            if (page < 0) continue;
            at_ = base_ + page * step_ + at * row_;
            more_ = row_ == width_ ? 0 : n - 1;
            end_ = at_ + (row_ == width_ ? n : 1) * width_;
            return true;
        }
        return false;
    }

    const int64_t* table_ = nullptr;
    const char *base_ = nullptr, *at_ = nullptr, *end_ = nullptr;
    int64_t page_ = 0, row_ = 0, step_ = 0, width_ = 0, k_ = 0, last_ = 0, more_ = 0, pace_ = 0;
};

}  // namespace
}  // namespace tilefold
