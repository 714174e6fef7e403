// Enough of CUDA to run kernels.cu on a CPU, for the tests. It does what a GPU does, or names what
// is undefined there.
//
// Blocks run one after another. The threads of a block are fibers: each has a stack, and one runs
// at a time, until it waits in __syncthreads, __syncwarp or a warp operation. It goes on when all
// other fibers wait there, too. The order changes from block to block: code that works by luck in
// one order fails in the other. A warp operation that not all 32 lanes reach, or a barrier that not
// all threads of a block reach, is an error; on a GPU it is undefined.

#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <tuple>

using std::exp, std::log, std::max, std::min, std::sqrt, std::tanh;

#define __global__
#define __device__ static
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time

struct Size { unsigned x, y; };

namespace cuda_on_cpu {
enum State { NEW, READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    char stack[1 << 16];
    ucontext_t start;                       // on this stack
    jmp_buf here;                           // where it waits; faster than a ucontext
    Size index;
    State state;
    unsigned round;                         // warp operations so far
    unsigned char value[2][8];              // this lane's values in the last two of them
    std::pair<const char*, int> operation;  // the last operation, and its argument
};

static std::deque<Fiber> fibers;  // reused from launch to launch
static size_t threads, current;
static Size block, block_index;
static jmp_buf scheduler;
static std::function<void()> body;
static std::string error;

__attribute__((noinline)) static void wait(State state) {
    fibers[current].state = state;
    if (!_setjmp(fibers[current].here)) _longjmp(scheduler, 1);
}

static void run_fiber() {
    body();
    wait(DONE);
}

__attribute__((noinline)) static void run_until_it_waits(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.state == READY) _longjmp(fiber.here, 1);
    setcontext(&fiber.start);
}

// Every lane gives a value, waits for all 32 lanes, and gets the values of all lanes.
template <class T>
std::array<T, 32> meet(unsigned mask, const char* operation, int argument, T value) {
    Fiber& me = fibers[current];
    if (mask != 0xffffffff) error = std::string(operation) + " with a partial mask, unsupported";
    const unsigned place = me.round++ % 2;  // a lane is at most one operation ahead of another
    std::memcpy(me.value[place], &value, sizeof(T));
    me.operation = {operation, argument};
    wait(AT_WARP);
    std::array<T, 32> all;
    for (size_t lane = 0; lane < 32; lane++)
        std::memcpy(&all[lane], fibers[current / 32 * 32 + lane].value[place], sizeof(T));
    return all;
}

// Let fibers go on that all wait for each other. Returns false if there are none.
static bool release() {
    bool released = false;
    const auto ready = [&](size_t first, size_t size, State state) {
        for (size_t t = first; t < first + size; t++)
            if (t >= threads || fibers[t].state != state ||
                (state == AT_WARP && fibers[t].operation != fibers[first].operation)) return;
        for (size_t t = first; t < first + size; t++) fibers[t].state = READY;
        released = true;
    };
    for (size_t warp = 0; warp < threads; warp += 32) ready(warp, 32, AT_WARP);
    ready(0, threads, AT_BLOCK);
    return released;
}

static void run_block(bool backwards) {
    for (size_t t = 0; t < threads; t++) {
        Fiber& fiber = fibers[t];
        fiber.index = {unsigned(t % block.x), unsigned(t / block.x)};
        fiber.state = NEW;
        fiber.round = 0;
        fiber.start.uc_stack.ss_sp = fiber.stack;
        fiber.start.uc_stack.ss_size = sizeof(fiber.stack);
        makecontext(&fiber.start, run_fiber, 0);
    }
    for (size_t done = 0; done < threads && error.empty();) {
        for (size_t k = 0; k < threads; k++) {
            current = backwards ? threads - 1 - k : k;
            if (fibers[current].state > READY) continue;
            run_until_it_waits(fibers[current]);
            done += fibers[current].state == DONE;
        }
        if (done < threads && !release()) error = "threads wait for others that will never come";
    }
}

template <class... Args>
const char* launch(void (*kernel)(Args...), unsigned blocks, Size b, void** args) {
    block = b, threads = size_t(b.x) * b.y;
    error.clear();
    if (threads < 1 || threads > 1024 || blocks < 1 || blocks > 2147483647)
        return "invalid configuration argument";
    while (fibers.size() < threads) getcontext(&fibers.emplace_back().start);
    const std::tuple<Args...> values{*static_cast<Args*>(*args++)...};  // in {}, from left to right
    body = [=] { std::apply(kernel, values); };
    for (block_index = {0, 0}; block_index.x < blocks && error.empty(); block_index.x++)
        run_block(block_index.x % 2);
    return error.empty() ? nullptr : error.c_str();
}
}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::fibers[cuda_on_cpu::current].index)
#define blockIdx (cuda_on_cpu::block_index)

static inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::AT_BLOCK); }
static inline void __syncwarp() { cuda_on_cpu::meet(0xffffffff, "__syncwarp", 0, '-'); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    const auto all = cuda_on_cpu::meet(mask, "__shfl_xor_sync", other, value);
    return all[cuda_on_cpu::current % 32 ^ other];
}

// The entry that ctypes calls: args are pointers to the kernel's arguments, as for cuLaunchKernel.
#define LAUNCHER(kernel) \
    extern "C" const char* launch_##kernel(unsigned blocks, unsigned x, unsigned y, void** args) { \
        return cuda_on_cpu::launch(kernel, blocks, {x, y}, args); \
    }
