// Enough of CUDA to run kernels.cu on a CPU, for the tests: slow, but it does what a card does or says that it cannot.
//
// Blocks run one after another. The threads of a block are fibers (stacks of their own, one runs at a time): each runs
// until it waits in __syncthreads, __syncwarp or a warp operation, and goes on when all the others are there too. The
// order in which they run changes from block to block, so that what works by luck in one order does not in the other.
// A warp operation that not all 32 lanes reach, or a barrier that not all threads of a block reach, is an error here;
// on a card it is undefined.

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

using std::exp, std::log, std::max, std::min, std::sqrt, std::tanh;

#define __global__
#define __device__ static
#define __shared__ static  // one block at a time

struct Size {
    unsigned x, y, z;
};

namespace cuda_on_cpu {

constexpr size_t STACK = 1 << 16;
enum State { READY, AT_WARP, AT_BLOCK, DONE };

struct Fiber {
    ucontext_t start;                                  // on a stack of its own
    std::unique_ptr<char[]> stack{new char[STACK]};
    bool started;
    jmp_buf here;                                      // where it waits (faster to go to than a ucontext)
    Size index;
    State state;
    unsigned round;                                    // warp operations so far
    unsigned char value[2][8];                         // what this lane gives to the last two of them
    std::pair<const char*, int> operation;             // the last one, and its argument
};

static std::vector<std::unique_ptr<Fiber>> fibers;     // reused from launch to launch
static size_t threads, current;
static Size grid, block, block_index;
static jmp_buf scheduler;
static std::function<void()> body;
static std::string error;

__attribute__((noinline)) static void wait(State state) {
    fibers[current]->state = state;
    if (!_setjmp(fibers[current]->here)) _longjmp(scheduler, 1);
}

static void run_fiber() {
    body();
    wait(DONE);
}

__attribute__((noinline)) static void run_until_it_waits(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.here, 1);
    fiber.started = true;
    setcontext(&fiber.start);
}

// All 32 lanes give a value and go on when all are there. Returns which of their two values to read.
static unsigned meet(unsigned mask, const char* operation, int argument, const void* value, size_t size) {
    Fiber& me = *fibers[current];
    if (mask != 0xffffffff) error = std::string(operation) + " with a partial mask is not supported";
    const unsigned place = me.round++ % 2;  // a lane is at most one operation ahead of another
    std::memcpy(me.value[place], value, size);
    me.operation = {operation, argument};
    wait(AT_WARP);
    return place;
}

template <class T>
T value_of(unsigned lane, unsigned place) {
    T value;
    std::memcpy(&value, fibers[current / 32 * 32 + lane]->value[place], sizeof(T));
    return value;
}

// Let those go on that all wait for each other; false if there are none.
static bool release() {
    size_t released = 0, at_block = 0;
    for (size_t warp = 0; warp < threads; warp += 32) {
        size_t at_warp = 0;
        for (size_t t = warp; t < std::min(warp + 32, threads); t++) {
            at_warp += fibers[t]->state == AT_WARP && fibers[t]->operation == fibers[warp]->operation;
            at_block += fibers[t]->state == AT_BLOCK;
        }
        for (size_t t = warp; at_warp == 32 && t < warp + 32; t++, released++) fibers[t]->state = READY;
    }
    for (size_t t = 0; at_block == threads && t < threads; t++, released++) fibers[t]->state = READY;
    return released > 0;
}

static void run_block(bool backwards) {
    for (size_t t = 0; t < threads; t++) {
        Fiber& fiber = *fibers[t];
        fiber.index = {unsigned(t % block.x), unsigned(t / block.x % block.y), unsigned(t / block.x / block.y)};
        fiber.state = READY;
        fiber.round = 0;
        fiber.started = false;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = fiber.stack.get();
        fiber.start.uc_stack.ss_size = STACK;
        makecontext(&fiber.start, run_fiber, 0);
    }
    for (size_t done = 0; done < threads && error.empty();) {
        for (size_t k = 0; k < threads; k++) {
            current = backwards ? threads - 1 - k : k;
            if (fibers[current]->state != READY) continue;
            run_until_it_waits(*fibers[current]);
            done += fibers[current]->state == DONE;
        }
        if (done < threads && !release()) error = "threads wait for others that will never come";
    }
}

template <class... Args, size_t... I>
const char* launch(void (*kernel)(Args...), Size g, Size b, void** args, std::index_sequence<I...>) {
    grid = g;
    block = b;
    threads = size_t(b.x) * b.y * b.z;
    error.clear();
    if (threads < 1 || threads > 1024 || g.x < 1 || g.x > 2147483647 || g.y < 1 || g.y > 65535 || g.z != 1)
        return "invalid configuration argument";
    while (fibers.size() < threads) fibers.emplace_back(new Fiber);
    body = [=] { kernel(*static_cast<Args*>(args[I])...); };
    for (unsigned y = 0; y < g.y; y++)
        for (unsigned x = 0; x < g.x && error.empty(); x++) {
            block_index = {x, y, 0};
            run_block((x + y) % 2);
        }
    return error.empty() ? nullptr : error.c_str();
}

template <class... Args>
const char* launch(void (*kernel)(Args...), Size g, Size b, void** args) {
    return launch(kernel, g, b, args, std::index_sequence_for<Args...>());
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::fibers[cuda_on_cpu::current]->index)
#define blockIdx (cuda_on_cpu::block_index)
#define blockDim (cuda_on_cpu::block)
#define gridDim (cuda_on_cpu::grid)

static inline int __ffs(int bits) { return __builtin_ffs(bits); }

static inline void __syncthreads() { cuda_on_cpu::wait(cuda_on_cpu::AT_BLOCK); }

static inline void __syncwarp() { cuda_on_cpu::meet(0xffffffff, "__syncwarp", 0, "", 0); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int other) {
    const unsigned place = cuda_on_cpu::meet(mask, "__shfl_xor_sync", other, &value, sizeof(T));
    return cuda_on_cpu::value_of<T>((cuda_on_cpu::current % 32) ^ other, place);
}

static inline unsigned __ballot_sync(unsigned mask, bool value) {
    const unsigned place = cuda_on_cpu::meet(mask, "__ballot_sync", 0, &value, sizeof(value));
    unsigned bits = 0;
    for (unsigned lane = 0; lane < 32; lane++) bits |= unsigned(cuda_on_cpu::value_of<bool>(lane, place)) << lane;
    return bits;
}

// The entry that ctypes calls: args are pointers to the kernel's arguments, as for cuLaunchKernel.
#define LAUNCHER(kernel) \
    extern "C" const char* launch_##kernel(const unsigned* g, const unsigned* b, void** args) { \
        return cuda_on_cpu::launch(kernel, {g[0], g[1], g[2]}, {b[0], b[1], b[2]}, args); \
    }
