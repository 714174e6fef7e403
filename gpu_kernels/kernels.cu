// The CUDA kernels of fused.py: operations that would pass over memory a dozen times as array code.
//
// Letters as in grassmann.py: T tokens, L length, d width, r rank, V vocabulary, n = r(r-1)/2.
// `real` is float, or double to check gradients. A block has 256 threads: 8 warps of 32 lanes. In
// most kernels a block has a chunk of the tokens, and each warp takes one token at a time. Lane k
// of the warp takes the token's coordinates k, k + 32, k + 64, … A sum over tokens, such as the
// gradient of a bias, is computed by the kernel that reads the rows anyway. After every 8 tokens a
// block adds them to its own row of `parts` (blocks, …), and `gather` adds up the parts. All sums
// have a fixed order, so a run repeats bit for bit.

// `in` promises that no thread writes there while the kernel runs: the compiler may read through a
// cache that does not see such writes. What a kernel writes and reads again is never an `in`.
using in = const real* __restrict__;
using out = real* __restrict__;
using wide = long long;
using words = const wide* __restrict__;
using indices = const int* __restrict__;
using bytes = const unsigned char* __restrict__;

#define RESIDENT 256, (sizeof(real) == 4 ? 6 : 4)  // threads of a block; blocks on a multiprocessor
#define EACH(i, size) for (int i = threadIdx.x; i < (size); i += 32)  // this lane's share of `size`
#define EIGHTS(k) for (int k = blockIdx.x * chunk, end = min(T, k + chunk); k < end; k += 8)
#define MINE(t, first) if (const int t = first + (int)threadIdx.y; t < T)  // this warp's, of the 8
#define EACH_TOKEN(t) EIGHTS(first) MINE(t, first)  // this warp's share of its block's tokens

__device__ int thread() { return threadIdx.y * 32 + threadIdx.x; }
__device__ wide element() { return blockIdx.x * 256ll + thread(); }
__device__ real plus(const real* x, const real* b, int i) { return x[i] + (b ? b[i] : 0); }

// The sum, or the largest, of x over the 32 lanes of a warp; every lane gets it
__device__ real warp_sum(real x) {
    for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(~0u, x, k);
    return x;
}
__device__ real warp_max(real x) {
    for (int k = 16; k > 0; k /= 2) x = max(x, __shfl_xor_sync(~0u, x, k));
    return x;
}

// sums_i += Σ_t f(t, i) over the 8 tokens from `first` on, i < d. A block's first 8 start at 0.
template <class F> __device__ void add_eight(int T, int chunk, int first, int d, F f, real* sums) {
    for (int i = thread(); i < d; i += 256) {
        real sum = first % chunk ? sums[i] : 0;
        #pragma unroll 4
        for (int t = first; t < min(T, first + 8); t++) sum += f(t, i);
        sums[i] = sum;
    }
}

// x / (1 - rate), or 0 where random < rate. `random` is a hash of key and place (SplitMix64,
// Steele, Lea and Flood 2014). The backward computes the hash again, so no mask is stored.
__device__ real dropped(real x, unsigned long long key, wide place, real rate) {
    unsigned long long bits = key + (place + 1) * 0x9e3779b97f4a7c15ull;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
    const real random = (real)((bits ^ bits >> 31) >> 40) / (1 << 24);
    return random >= rate ? x / (1 - rate) : 0;
}

extern "C" __global__ void dropout(wide n, words key, wide place, real rate, in x, out y) {
    const wide i = element();
    if (i < n) y[i] = dropped(x[i], *key, place + i, rate);
}

// sum = residual + D(x + bias),  x̂ = (sum - mean) / σ,  y = w ⊙ x̂ + b, rows `row` apart
// With hg = [h | g] (T, 2d) and α = sigmoid(x + bias):  sum = residual + D(α ⊙ h + (1-α) ⊙ g)
// Key, bias, hg and residual may be missing. Without `sum`, x is already the sum.
extern "C" __global__ void __launch_bounds__(RESIDENT) layernorm_forward(
    int T, int chunk, int d, int row, real eps, words key, wide place, real rate, in bias,
    in hg, in residual, in w, in b, const real* x, real* sum, out y, out mean, out inv_std) {
    EACH_TOKEN(t) {
        const size_t first = (size_t)t * d;
        real total = 0, squares = 0;
        EACH(i, d) {
            real x_i = plus(x + first, bias, i);
            if (hg) {
                const real h = hg[2 * first + i], g = hg[2 * first + d + i];
                const real alpha = 1 / (1 + exp(-x_i));
                x_i = alpha * h + (1 - alpha) * g;
            }
            if (key) x_i = dropped(x_i, *key, place + first + i, rate);
            if (residual) x_i += residual[first + i];
            if (sum) sum[first + i] = x_i;
            total += x_i;
        }
        const real *all = (sum ? sum : x) + first, center = warp_sum(total) / d;
        EACH(i, d) squares += (all[i] - center) * (all[i] - center);
        const real scale = 1 / sqrt(warp_sum(squares) / d + eps);
        EACH(i, d) y[(size_t)t * row + i] = w[i] * ((all[i] - center) * scale) + b[i];
        if (threadIdx.x == 0) mean[t] = center, inv_std[t] = scale;
    }
}

// dx̂ = w ⊙ dy,  dsum = (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂)) / σ + dmore; dmore may be missing
// dx = D(dsum); dx may be missing if it equals dsum.  With a gate, α comes from x + bias again:
//   dhg = [α ⊙ D(dsum) | (1-α) ⊙ D(dsum)],  dx = D(dsum) ⊙ (h - g) ⊙ α (1-α)
// parts (blocks, 3, d): dw = Σ_t dy ⊙ x̂,  db = Σ_t dy,  dbias = Σ_t dx
extern "C" __global__ void __launch_bounds__(RESIDENT) layernorm_backward(
    int T, int chunk, int d, int row, words key, wide place, real rate, in dy, in dmore,
    in sum, in w, in mean, in inv_std, in x, in bias, in hg, out dsum, out dx, out dhg, out parts) {
    parts += (size_t)blockIdx.x * 3 * d;
    EIGHTS(first_token) {
        MINE(t, first_token) {
            const size_t first = (size_t)t * d;
            const real *dy_t = dy + (size_t)t * row, center = mean[t], scale = inv_std[t];
            real total = 0, along = 0;
            EACH(i, d) {
                total += w[i] * dy_t[i];
                along += w[i] * dy_t[i] * (sum[first + i] - center) * scale;
            }
            total = warp_sum(total) / d, along = warp_sum(along) / d;
            EACH(i, d) {
                const real x_hat = (sum[first + i] - center) * scale;
                real dx_i = scale * (w[i] * dy_t[i] - total - x_hat * along);
                if (dmore) dx_i += dmore[first + i];
                dsum[first + i] = dx_i;
                if (key) dx_i = dropped(dx_i, *key, place + first + i, rate);
                if (hg) {
                    const real h = hg[2 * first + i], g = hg[2 * first + d + i];
                    const real alpha = 1 / (1 + exp(-plus(x + first, bias, i)));
                    dhg[2 * first + i] = alpha * dx_i, dhg[2 * first + d + i] = (1 - alpha) * dx_i;
                    dx_i *= (h - g) * alpha * (1 - alpha);
                }
                if (dx) dx[first + i] = dx_i;
            }
        }
        __syncthreads();  // from here on a thread reads what others wrote
        for (int i = thread(); i < d; i += 256) {
            real dw = 0, db = 0, dbias = 0;
            #pragma unroll 1  // (more at a time would spill registers)
            for (int t = first_token; t < min(T, first_token + 8); t++) {
                const real dy_i = dy[(size_t)t * row + i];
                dw += dy_i * (sum[(size_t)t * d + i] - mean[t]) * inv_std[t];
                db += dy_i;
                dbias += (dx ? dx : dsum)[(size_t)t * d + i];
            }
            const bool more = first_token % chunk;  // the block's first 8 tokens start at 0
            parts[i] = (more ? parts[i] : 0) + dw;
            parts[d + i] = (more ? parts[d + i] : 0) + db;
            parts[2 * d + i] = (more ? parts[2 * d + i] : 0) + dbias;
        }
    }
}

// tanh q(z),  q(z) = c (z + a z³),  c = sqrt(2/π), a = 0.044715; z is clipped where tanh is ±1
__device__ real gelu_tanh(real z, real* slope) {
    const real c = 0.7978845608028654, a = 0.044715;
    z = min(max(z, (real)-10), (real)10);
    const real t = tanh(c * z * (1 + a * z * z));
    *slope = (real)0.5 * c * z * (1 + 3 * a * z * z) * (1 - t * t);
    return t;
}

// y = GELU(z) = z/2 (1 + tanh q(z)),  z = x + b
extern "C" __global__ void gelu_forward(int T, int chunk, int d, in x, in b, out y) {
    EACH_TOKEN(t) EACH(i, d) {
        const real z = plus(x + (size_t)t * d, b, i);
        real slope;
        y[(size_t)t * d + i] = (real)0.5 * z * (1 + gelu_tanh(z, &slope));
    }
}

// dx = dy ⊙ GELU'(z),  GELU' = (1 + tanh q)/2 + z/2 (1 - tanh² q) q'(z);  parts (blocks, d): Σ_t dx
extern "C" __global__ void gelu_backward(
    int T, int chunk, int d, in dy, in x, in b, out dx, out parts) {
    EIGHTS(first) {
        MINE(t, first) EACH(i, d) {
            const size_t e = (size_t)t * d + i;
            real slope;
            const real tanh_q = gelu_tanh(plus(x + (size_t)t * d, b, i), &slope);
            dx[e] = dy[e] * (slope + (real)0.5 * (1 + tanh_q));
        }
        __syncthreads();
        const auto dx_ti = [=](int t, int i) { return dx[(size_t)t * d + i]; };
        add_eight(T, chunk, first, d, dx_ti, parts + (size_t)blockIdx.x * d);
    }
}

// x = text[at + 0, …, L-1] of each window, y = text[at + 1, …, L]; a token has `size` bytes
extern "C" __global__ void windows(wide n, int L, int size, words at, bytes text, int* x, int* y) {
    const wide i = element();
    if (i >= n) return;
    bytes token = text + (at[i / L] + i % L) * size;
    x[i] = y[i] = 0;
    for (int k = 0; k < min(size, 4); k++) x[i] |= token[k] << 8 * k;
    for (int k = 0; k < min(size, 4); k++) y[i] |= token[size + k] << 8 * k;
}

// loss_t = log Σ_k exp(x_k - max) - (x_target - max),  dlogits = (softmax(x) - onehot(target)) / T
extern "C" __global__ void cross_entropy(
    int T, int chunk, int V, in logits, indices targets, out losses, out dlogits) {
    EACH_TOKEN(t) {
        const real* x = logits + (size_t)t * V;
        real top = x[0], total = 0;
        EACH(k, V) top = max(top, x[k]);
        top = warp_max(top);
        EACH(k, V) total += exp(x[k] - top);
        total = warp_sum(total);
        EACH(k, V) dlogits[(size_t)t * V + k] = (exp(x[k] - top) / total - (k == targets[t])) / T;
        if (threadIdx.x == 0) losses[t] = log(total) - (x[targets[t]] - top);
    }
}

// ---- the wedge product --------------------------------------------------------------------------

// z = x + b (b may be missing), for the tokens from `past` on in each window of L
// s_t = Σ_Δ w_Δ ⊙ z_{t-Δ} over the m offsets with t - Δ >= 0; without taps, s is given
// p_t = z_t ∧ s_t,  p_ij = z_i s_j - z_j s_i, where I and J (n) are the index pairs i < j
// g = b_plu, the right half of [h | g], to which p W_plu will be added
extern "C" __global__ void wedge_forward(
    int T, int chunk, int L, int past, int r, int m, int n, int d, indices offsets, indices I,
    indices J, in x, in b, in taps, in b_plu, out z, out s, out p, out g) {
    EACH_TOKEN(t) {
        const int position = past + t % (L - past);
        const real* x_t = x + ((size_t)(t / (L - past)) * L + position) * r;
        real *z_t = z + (size_t)t * r, *s_t = s + (size_t)t * r;
        EACH(i, r) {
            real s_i = 0;
            for (int k = 0; taps && k < m; k++)
                if (offsets[k] <= position)
                    s_i += taps[k * r + i] * plus(x_t - (size_t)offsets[k] * r, b, i);
            z_t[i] = plus(x_t, b, i);
            if (taps) s_t[i] = s_i;
        }
        __syncwarp();  // from here on a lane reads what others wrote
        EACH(e, n) p[(size_t)t * n + e] = z_t[I[e]] * s_t[J[e]] - z_t[J[e]] * s_t[I[e]];
        EACH(i, d) g[(size_t)t * 2 * d + i] = b_plu[i];
    }
}

// dz_i = Σ_j A_ij s_j,  ds_i = -Σ_j A_ij z_j,  A antisymmetric with A_ij = dp_ij for i < j
extern "C" __global__ void wedge_backward(
    int T, int chunk, int r, int n, in dp, in z, in s, out dz, out ds) {
    __shared__ real staged[8][496];  // each warp keeps its token's dp in fast memory, if r <= 32
    EACH_TOKEN(t) {
        const real *z_t = z + (size_t)t * r, *s_t = s + (size_t)t * r, *A = dp + (size_t)t * n;
        if (n <= 496) {
            __syncwarp();  // all lanes are done with the token before
            EACH(e, n) staged[threadIdx.y][e] = A[e];
            __syncwarp();
            A = staged[threadIdx.y];
        }
        EACH(i, r) {
            real dz_i = 0, ds_i = 0;
            for (int j = 0; j < r; j++) {
                if (j == i) continue;
                const int k = min(i, j), place = k * (2 * r - k - 1) / 2 + max(i, j) - k - 1;
                const real A_ij = i < j ? A[place] : -A[place];
                dz_i += A_ij * s_t[j];
                ds_i -= A_ij * z_t[j];
            }
            dz[(size_t)t * r + i] = dz_i, ds[(size_t)t * r + i] = ds_i;
        }
    }
}

// With taps: dz_t += Σ_Δ w_Δ ⊙ ds_{t+Δ}, from the tokens t+Δ whose partner is t. Else m is 0.
// parts (blocks, r + m r + d): db_red = Σ_t dz,  dw_Δ = Σ_t ds_{t+Δ} ⊙ z_t,  db_plu = Σ_t dg
extern "C" __global__ void partner_backward(
    int T, int chunk, int L, int r, int m, int d, indices offsets, in z, in taps, in ds, in dg,
    out dz, out parts) {
    parts += (size_t)blockIdx.x * (r + m * r + d);
    EIGHTS(first) {
        MINE(t, first) EACH(i, r) {
            real dz_i = dz[(size_t)t * r + i];
            for (int k = 0; k < m; k++)
                if (t % L + offsets[k] < L)
                    dz_i += taps[k * r + i] * ds[(size_t)(t + offsets[k]) * r + i];
            dz[(size_t)t * r + i] = dz_i;
        }
        __syncthreads();
        const auto tap = [=](int t, int e) {
            const int delta = offsets[e / r], i = e % r;
            return t % L + delta < L ? ds[(size_t)(t + delta) * r + i] * z[(size_t)t * r + i] : 0;
        };
        add_eight(T, chunk, first, r, [=](int t, int i) { return dz[(size_t)t * r + i]; }, parts);
        add_eight(T, chunk, first, m * r, tap, parts + r);
        real* db_plu = parts + r + m * r;
        add_eight(T, chunk, first, d, [=](int t, int i) { return dg[2ll * t * d + i]; }, db_plu);
    }
}

// ---- the optimiser, over the buffers of all parameters ------------------------------------------

// Adds up the parts of all gradients into the buffer `grads`. A row of `table`: a gradient's first
// thread, its place in the buffer, the address, number and distance of its parts.
extern "C" __global__ void gather(wide n, int rows, words table, real* grads) {
    const wide i = element();
    if (i >= n) return;
    int low = 0;  // the last row that begins at i or before
    for (int high = rows; high - low > 1;) {
        const int middle = (low + high) / 2;
        if (table[5 * middle] <= i) low = middle; else high = middle;
    }
    const wide *row = table + 5 * low, e = i - row[0];
    const real* part = (const real*)row[2] + e;
    real sum = 0;
    #pragma unroll 8
    for (int k = 0; k < row[3]; k++) sum += part[k * row[4]];
    grads[row[1] + e] = sum;
}

__device__ double block_sum(double x) {  // over the 256 threads of a block; every one gets it
    __shared__ double sums[256];
    sums[thread()] = x;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (thread() < half) sums[thread()] += sums[thread() + half];
    }
    __syncthreads();
    return sums[0];
}

// Σ g² in double; 256 blocks
extern "C" __global__ void sum_of_squares(wide n, in g, double* parts) {
    double sum = 0;
    for (wide i = element(); i < n; i += 256 * 256) sum += (double)g[i] * g[i];
    if (sum = block_sum(sum); thread() == 0) parts[blockIdx.x] = sum;
}

// g ← g max_norm/norm where norm > max_norm;  norm = sqrt(Σ parts); 256 blocks
extern "C" __global__ void clip(wide n, real max_norm, out g, const double* parts, double* norm) {
    const double all = sqrt(block_sum(parts[thread()]));
    const real factor = all > max_norm ? max_norm / all : 1;
    for (wide i = element(); i < n; i += 256 * 256) g[i] *= factor;
    if (element() == 0) *norm = all;
}

// m ← β₁ m + (1-β₁) g,  v ← β₂ v + (1-β₂) g²,  θ ← θ - lr (m̂ / (sqrt(v̂) + eps) + λ θ) at step k,
// λ for the first `matrices`;  rates: lr / (1 - β₁^(k+1)), 1 / (1 - β₂^(k+1)), lr λ, 1 - β₁, …, eps
extern "C" __global__ void adamw(
    wide n, wide matrices, in g, out theta, out m, out v, const double* rates) {
    const wide i = element();
    if (i >= n) return;
    const real lr = rates[0], inv_fix_2 = rates[1], decay = rates[2];
    m[i] += (real)rates[3] * (g[i] - m[i]);
    v[i] += (real)rates[4] * (g[i] * g[i] - v[i]);
    const real kept = i < matrices ? theta[i] * (1 - decay) : theta[i];
    theta[i] = kept - lr * m[i] / (sqrt(v[i] * inv_fix_2) + (real)rates[5]);
}
