// The CUDA kernels of gpu.py: what would take a dozen passes over memory, written array by array.
//
// Letters as in grassmann.py: T tokens, L length, d width, r rank, V vocabulary, n = r(r-1)/2.
// `real` is float, or double to check gradients: gpu.py compiles this file for each. A kernel that
// works token by token gives each a warp (block (32, 8): 32 lanes, 8 tokens), whose lanes share its
// coordinates: lane k has k, k + 32, k + 64, …, so r = 32 is one step and any other size works
// too. All sums have a fixed order (no atomics): a run repeats bit for bit.

#define EVERY_LANE 0xffffffff
#define EACH(i, size) for (int i = threadIdx.x; i < (size); i += 32)  // a lane's share of the size

__device__ int token() { return blockIdx.x * blockDim.y + threadIdx.y; }

__device__ long long element() { return (long long)blockIdx.x * blockDim.x + threadIdx.x; }

// Sums over tokens: a thread adds one column of chunk number blockIdx.x, gpu.py adds the chunks.
__device__ int column() { return blockIdx.y * blockDim.x + threadIdx.x; }

// Sum and maximum over the 32 lanes of a warp; every lane gets the result.
__device__ real warp_sum(real x) {
    for (int k = 16; k > 0; k /= 2) x += __shfl_xor_sync(EVERY_LANE, x, k);
    return x;
}

__device__ real warp_max(real x) {
    for (int k = 16; k > 0; k /= 2) x = max(x, __shfl_xor_sync(EVERY_LANE, x, k));
    return x;
}

// Σ_t x_t over one chunk of tokens: parts (chunks, d)
extern "C" __global__ void column_sums(int T, int chunk, int d, const real* x, real* parts) {
    const int i = column(), first = blockIdx.x * chunk;
    if (i >= d) return;
    real sum = 0;
    for (int t = first; t < min(first + chunk, T); t++) sum += x[(size_t)t * d + i];
    parts[(size_t)blockIdx.x * d + i] = sum;
}

// ---- LayerNorm ----------------------------------------------------------------------------------

// sum = x + residual (sum = x where there is no residual),  x̂ = (sum - mean) / σ,  y = w ⊙ x̂ + b
extern "C" __global__ void layernorm_forward(
    int T, int d, real eps, const real* x, const real* residual, const real* w, const real* b,
    real* sum, real* y, real* mean, real* inv_std
) {
    const int t = token();
    if (t >= T) return;
    const size_t row = (size_t)t * d;
    if (residual) EACH(i, d) sum[row + i] = x[row + i] + residual[row + i];
    const real* h = (residual ? sum : x) + row;
    real total = 0, squares = 0;
    EACH(i, d) total += h[i];
    const real center = warp_sum(total) / d;
    EACH(i, d) squares += (h[i] - center) * (h[i] - center);
    const real scale = 1 / sqrt(warp_sum(squares) / d + eps);
    EACH(i, d) y[row + i] = w[i] * ((h[i] - center) * scale) + b[i];
    if (threadIdx.x == 0) mean[t] = center, inv_std[t] = scale;
}

// dx̂ = w ⊙ dy,  dx = (dx̂ - mean(dx̂) - x̂ mean(dx̂ ⊙ x̂)) / σ, plus dsum (which may be missing)
extern "C" __global__ void layernorm_backward(
    int T, int d, const real* dy, const real* dsum, const real* x, const real* w, const real* mean,
    const real* inv_std, real* dx
) {
    const int t = token();
    if (t >= T) return;
    const size_t row = (size_t)t * d;
    const real center = mean[t], scale = inv_std[t];
    real total = 0, along = 0;
    EACH(i, d) {
        const real dx_hat = w[i] * dy[row + i];
        total += dx_hat;
        along += dx_hat * (x[row + i] - center) * scale;
    }
    total = warp_sum(total) / d, along = warp_sum(along) / d;
    EACH(i, d) {
        const real x_hat = (x[row + i] - center) * scale, dx_hat = w[i] * dy[row + i];
        dx[row + i] = (dsum ? dsum[row + i] : 0) + scale * (dx_hat - total - x_hat * along);
    }
}

// dw = Σ_t dy ⊙ x̂,  db = Σ_t dy, each over one chunk of tokens: parts (chunks, 2, d)
extern "C" __global__ void layernorm_weights(
    int T, int chunk, int d, const real* dy, const real* x, const real* mean, const real* inv_std,
    real* parts
) {
    const int i = column(), first = blockIdx.x * chunk;
    if (i >= d) return;
    real dw = 0, db = 0;
    for (int t = first; t < min(first + chunk, T); t++) {
        const real dy_ti = dy[(size_t)t * d + i];
        dw += dy_ti * (x[(size_t)t * d + i] - mean[t]) * inv_std[t];
        db += dy_ti;
    }
    parts[(size_t)blockIdx.x * 2 * d + i] = dw;
    parts[(size_t)blockIdx.x * 2 * d + d + i] = db;
}

// ---- GELU and dropout ---------------------------------------------------------------------------

// tanh q(z),  q(z) = c (z + a z³),  c = sqrt(2/π), a = 0.044715; z is clipped where tanh is ±1
__device__ real gelu_tanh(real z, real* slope) {
    const real c = 0.7978845608028654, a = 0.044715;
    z = min(max(z, (real)-10), (real)10);
    const real t = tanh(c * z * (1 + a * z * z));
    *slope = (real)0.5 * c * z * (1 + 3 * a * z * z) * (1 - t * t);
    return t;
}

// y = GELU(z) = z/2 (1 + tanh q(z)),  z = x + b (b may be missing)
extern "C" __global__ void bias_gelu_forward(int T, int d, const real* x, const real* b, real* y) {
    const int t = token();
    if (t >= T) return;
    const size_t row = (size_t)t * d;
    EACH(i, d) {
        const real z = x[row + i] + (b ? b[i] : 0);
        real slope;
        y[row + i] = (real)0.5 * z * (1 + gelu_tanh(z, &slope));
    }
}

// dx = dy ⊙ GELU'(z),  GELU' = (1 + tanh q)/2 + z/2 (1 - tanh² q) q'(z)
extern "C" __global__ void bias_gelu_backward(
    int T, int d, const real* dy, const real* x, const real* b, real* dx
) {
    const int t = token();
    if (t >= T) return;
    const size_t row = (size_t)t * d;
    EACH(i, d) {
        real slope;
        const real tanh_q = gelu_tanh(x[row + i] + (b ? b[i] : 0), &slope);
        dx[row + i] = dy[row + i] * (slope + (real)0.5 * (1 + tanh_q));
    }
}

// y = keep ⊙ x / (1 - rate), where keep_i = [random_i >= rate] is a function of the key and i alone
// (SplitMix64, Steele, Lea and Flood 2014), so that the backward draws it again and stores nothing
extern "C" __global__ void dropout(
    long long n, const long long* key, real rate, const real* x, real* y
) {
    const long long i = element();
    if (i >= n) return;
    unsigned long long bits = *key + (i + 1) * 0x9e3779b97f4a7c15ull;
    bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9ull;
    bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebull;
    bits ^= bits >> 31;
    const real random = (real)(bits >> 40) / (1 << 24);
    y[i] = random >= rate ? x[i] / (1 - rate) : 0;
}

// ---- embedding and loss -------------------------------------------------------------------------

// dE_k = Σ dx_t over the tokens t that are k; block (32, 8) for 32 columns of a row k. Its 8 warps
// look at 32 tokens at a time each and add the rows that are k in order, and then their 8 sums
extern "C" __global__ void embedding_backward(
    int T, int d, const int* tokens, const real* dx, real* dE
) {
    __shared__ real sums[8][32];
    const int lane = threadIdx.x, k = blockIdx.x, i = blockIdx.y * 32 + lane;
    real sum = 0;
    for (int first = 32 * threadIdx.y; first < T; first += 32 * 8) {
        const bool is_k = first + lane < T && tokens[first + lane] == k;
        for (unsigned found = __ballot_sync(EVERY_LANE, is_k); found; found &= found - 1)
            if (i < d) sum += dx[(size_t)(first + __ffs(found) - 1) * d + i];
    }
    sums[threadIdx.y][lane] = sum;
    __syncthreads();
    if (threadIdx.y > 0 || i >= d) return;
    for (int warp = 1; warp < 8; warp++) sum += sums[warp][lane];
    dE[(size_t)k * d + i] = sum;
}

// Σ_k exp(x_k - max) of a token's V logits x, and their maximum; every lane gets both
__device__ real sum_exp(int V, const real* x, real* top) {
    real largest = x[0], total = 0;
    EACH(k, V) largest = max(largest, x[k]);
    *top = warp_max(largest);
    EACH(k, V) total += exp(x[k] - *top);
    return warp_sum(total);
}

// loss_t = log Σ_k exp(x_k - max) - (x_target - max),  x = logits_t
extern "C" __global__ void cross_entropy_forward(
    int T, int V, const real* logits, const int* targets, real* loss
) {
    const int t = token();
    if (t >= T) return;
    const real* x = logits + (size_t)t * V;
    real top;
    const real total = sum_exp(V, x, &top);
    if (threadIdx.x == 0) loss[t] = log(total) - (x[targets[t]] - top);
}

// dlogits = (softmax(x) - onehot(target)) dloss, dloss already divided by T
extern "C" __global__ void cross_entropy_backward(
    int T, int V, real dloss, const real* logits, const int* targets, real* dlogits
) {
    const int t = token();
    if (t >= T) return;
    const real* x = logits + (size_t)t * V;
    real top;
    const real total = sum_exp(V, x, &top);
    EACH(k, V) dlogits[(size_t)t * V + k] = (exp(x[k] - top) / total - (k == targets[t])) * dloss;
}

// ---- the wedge product --------------------------------------------------------------------------

// What the gradient of 1/|u ∧ v| needs (`unit_area_forward` in grassmann.py); v⊥ = v - (u·v/u·u) u,
// u⊥ likewise, |v⊥|² = |v|² sin²θ, |u⊥|² = |u|² sin²θ. All zero where the two span no plane.
struct Plane {
    real inv_area;                  // 1/|u ∧ v| = 1 / (|u| |v⊥|)
    real uv_over_uu, uv_over_vv;    // u·v / u·u, u·v / v·v
    real inv_v_perp2, inv_u_perp2;  // 1/|v⊥|², 1/|u⊥|²
};

__device__ Plane plane(int r, const real* u, const real* v) {
    const real tiny = sizeof(real) == 4 ? 1.1754944e-38 : 2.2250738585072014e-308, parallel = 1e-5;
    real uu = 0, vv = 0, uv = 0, height = 0;
    EACH(i, r) {
        uu += u[i] * u[i];
        vv += v[i] * v[i];
        uv += u[i] * v[i];
    }
    uu = warp_sum(uu), vv = warp_sum(vv), uv = warp_sum(uv);
    if (!(uu > tiny && vv > tiny)) return Plane();
    EACH(i, r) height += (v[i] - uv / uu * u[i]) * (v[i] - uv / uu * u[i]);
    height = warp_sum(height);  // |v⊥|²
    if (!(height > max(parallel * parallel * vv, tiny))) return Plane();
    return {1 / (sqrt(uu) * sqrt(height)), uv / uu, uv / vv, 1 / height, vv / height / uu};
}

// p_t = z_t ∧ s_t, p_ij = z_i s_j - z_j s_i, of the tokens from `past` on in windows of L; s (T, r)
//   taps:     s_t = Σ_Δ w_Δ ⊙ z_{t-Δ};  normalised, p_t is divided by |z_t ∧ s_t|
//   average:  s_t = 1/|valid| Σ_Δ c_Δ z_{t-Δ},  c_Δ = 1/|z_t ∧ z_{t-Δ}| if normalised, else 1
// Δ runs over the m offsets with t - Δ >= 0; I and J (n) are the index pairs i < j
extern "C" __global__ void wedge_forward(
    int T, int L, int past, int r, int m, int n, int normalize, const int* offsets, const int* I, const int* J,
    const real* z, const real* taps, real* s, real* p
) {
    const int t = token();
    if (t >= T) return;
    const int position = past + t % (L - past);
    const real* u = z + ((size_t)(t / (L - past)) * L + position) * r;
    s += (size_t)t * r;
    int valid = 0;
    EACH(i, r) s[i] = 0;
    for (int k = 0; k < m; k++) {
        if (offsets[k] > position) continue;
        const real* v = u - (size_t)offsets[k] * r;
        const real c = normalize && !taps ? plane(r, u, v).inv_area : 1;
        EACH(i, r) s[i] += (taps ? taps[k * r + i] : c) * v[i];
        valid++;
    }
    if (!taps) EACH(i, r) s[i] /= max(valid, 1);
    __syncwarp();  // from here on a lane reads what others wrote
    const real c = normalize && taps ? plane(r, u, s).inv_area : 1;
    EACH(e, n) p[(size_t)t * n + e] = c * (u[I[e]] * s[J[e]] - u[J[e]] * s[I[e]]);
}

// dp -> the gradients of z_t and of s_t, before it was divided by |valid|, du and ds (T, r):
//   du_i = Σ_j A_ij s_j,  ds_i = -Σ_j A_ij z_j,  A antisymmetric, A_ij = dp_ij for i < j
// and through q = s/|z ∧ s|, or each q = z_{t-Δ}/|z_t ∧ z_{t-Δ}| (`unit_area_backward`):
//   du -= (dq·q) u⊥/|u⊥|²,  ds = dq/|u ∧ v| - (dq·q) v⊥/|v⊥|²
extern "C" __global__ void wedge_backward(
    int T, int L, int r, int m, int n, int normalize, const int* offsets, const real* dp,
    const real* z, const real* taps, const real* s, real* du, real* ds
) {
    const int t = token();
    if (t >= T) return;
    const int position = t % L;
    const real* u = z + (size_t)t * r;
    dp += (size_t)t * n, s += (size_t)t * r, du += (size_t)t * r, ds += (size_t)t * r;
    int valid = 0;
    for (int k = 0; k < m; k++) valid += offsets[k] <= position;
    const real share = taps ? 1 : (real)1 / max(valid, 1);
    const Plane whole = normalize && taps ? plane(r, u, s) : Plane{1, 0, 0, 0, 0};
    real along = 0;
    EACH(i, r) {
        real du_i = 0, dq_i = 0;
        for (int j = 0; j < r; j++) {
            if (j == i) continue;
            const int low = min(i, j), place = low * (2 * r - low - 1) / 2 + max(i, j) - low - 1;
            const real A_ij = i < j ? dp[place] : -dp[place];
            du_i += A_ij * s[j];
            dq_i -= A_ij * u[j];
        }
        du[i] = du_i * whole.inv_area;
        ds[i] = dq_i * share;
        along += dq_i * s[i] * whole.inv_area;
    }
    if (normalize && taps) {
        along = warp_sum(along);
        EACH(i, r) {
            du[i] -= along * (u[i] - whole.uv_over_vv * s[i]) * whole.inv_u_perp2;
            const real v_perp = s[i] - whole.uv_over_uu * u[i];
            ds[i] = ds[i] * whole.inv_area - along * v_perp * whole.inv_v_perp2;
        }
    } else if (normalize) {
        for (int k = 0; k < m; k++) {
            if (offsets[k] > position) continue;
            const real* v = u - (size_t)offsets[k] * r;
            const Plane pair = plane(r, u, v);
            along = 0;
            EACH(i, r) along += ds[i] * v[i] * pair.inv_area;
            along = warp_sum(along);
            EACH(i, r) du[i] -= along * (u[i] - pair.uv_over_vv * v[i]) * pair.inv_u_perp2;
        }
    }
}

// dz_t = du_t + what flows back from the tokens t+Δ whose partner t is (dz holds du_t at first):
//   taps:     w_Δ ⊙ ds_{t+Δ}
//   average:  ds_{t+Δ}, if normalised ds_{t+Δ}/|u ∧ v| - (ds·q) v⊥/|v⊥|²,  u = z_{t+Δ}, v = z_t
extern "C" __global__ void partner_backward(
    int T, int L, int r, int m, int normalize, const int* offsets, const real* z, const real* taps,
    const real* ds, real* dz
) {
    const int t = token();
    if (t >= T) return;
    const real* v = z + (size_t)t * r;
    dz += (size_t)t * r;
    for (int k = 0; k < m; k++) {
        if (t % L + offsets[k] >= L) continue;
        const real *u = v + (size_t)offsets[k] * r, *dq = ds + (size_t)(t + offsets[k]) * r;
        if (taps) {
            EACH(i, r) dz[i] += taps[k * r + i] * dq[i];
        } else {
            const Plane pair = normalize ? plane(r, u, v) : Plane{1, 0, 0, 0, 0};
            real along = 0;
            EACH(i, r) along += dq[i] * v[i] * pair.inv_area;
            along = warp_sum(along);
            EACH(i, r) dz[i] += dq[i] * pair.inv_area
                - along * (v[i] - pair.uv_over_uu * u[i]) * pair.inv_v_perp2;
        }
    }
}

// dw_Δ = Σ_t ds_t ⊙ z_{t-Δ} over one chunk of tokens: parts (chunks, m, r), m r columns
extern "C" __global__ void taps_backward(
    int T, int chunk, int L, int r, int m, const int* offsets, const real* z, const real* ds,
    real* parts
) {
    const int e = column(), first = blockIdx.x * chunk;
    if (e >= m * r) return;
    const int delta = offsets[e / r], i = e % r;
    real dw = 0;
    for (int t = first; t < min(first + chunk, T); t++)
        if (t % L >= delta) dw += ds[(size_t)t * r + i] * z[(size_t)(t - delta) * r + i];
    parts[(size_t)blockIdx.x * m * r + e] = dw;
}

// ---- the gate -----------------------------------------------------------------------------------

// α = sigmoid(a + b),  out = α ⊙ h + (1-α) ⊙ g;  hg = [h ; g] (T, 2d), a = hg W (T, d) becomes α
extern "C" __global__ void gate_forward(
    int T, int d, const real* hg, const real* b, real* a, real* out
) {
    const int t = token();
    if (t >= T) return;
    const real *h = hg + (size_t)t * 2 * d, *g = h + d;
    EACH(i, d) {
        const size_t e = (size_t)t * d + i;
        const real alpha = 1 / (1 + exp(-(a[e] + b[i])));
        out[e] = alpha * h[i] + (1 - alpha) * g[i];
        a[e] = alpha;
    }
}

// da = dout ⊙ (h - g) ⊙ α(1-α)
extern "C" __global__ void gate_backward_logits(
    int T, int d, const real* dout, const real* hg, const real* alpha, real* da
) {
    const int t = token();
    if (t >= T) return;
    const real *h = hg + (size_t)t * 2 * d, *g = h + d;
    EACH(i, d) {
        const size_t e = (size_t)t * d + i;
        da[e] = dout[e] * (h[i] - g[i]) * alpha[e] * (1 - alpha[e]);
    }
}

// dh = α ⊙ dout + dhg_h,  dg = (1-α) ⊙ dout + dhg_g;  dhg = da Wᵀ (T, 2d) came through the gate
extern "C" __global__ void gate_backward(
    int T, int d, const real* dout, const real* alpha, const real* dhg, real* dh, real* dg
) {
    const int t = token();
    if (t >= T) return;
    EACH(i, d) {
        const size_t e = (size_t)t * d + i, both = (size_t)t * 2 * d + i;
        dh[e] = alpha[e] * dout[e] + dhg[both];
        dg[e] = (1 - alpha[e]) * dout[e] + dhg[both + d];
    }
}

// ---- the optimiser, over the flat buffers of all parameters -------------------------------------

// Σ g² in double, each block (256) its share: parts (blocks), always added in the same order
extern "C" __global__ void sum_of_squares(long long n, const real* g, double* parts) {
    __shared__ double sums[256];
    double sum = 0;
    for (long long i = element(); i < n; i += gridDim.x * blockDim.x) sum += (double)g[i] * g[i];
    sums[threadIdx.x] = sum;
    for (int half = 128; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0) parts[blockIdx.x] = sums[0];
}

// g ← g max_norm/norm where norm > max_norm
extern "C" __global__ void clip(long long n, real max_norm, real* g, const double* norm) {
    const long long i = element();
    if (i < n && *norm > max_norm) g[i] *= max_norm / *norm;
}

// m ← β₁ m + (1-β₁) g,  v ← β₂ v + (1-β₂) g²,  θ ← θ - lr (m̂ / (sqrt(v̂) + eps) + λ θ), where
// decay = lr λ is for the first `matrices` numbers only
extern "C" __global__ void adamw(
    long long n, long long matrices, real rate_1, real rate_2, real fix_1, real fix_2, real lr,
    real decay, real eps, const real* g, real* theta, real* m, real* v
) {
    const long long i = element();
    if (i >= n) return;
    m[i] += rate_1 * (g[i] - m[i]);         // rate_1 = 1 - β₁
    v[i] += rate_2 * (g[i] * g[i] - v[i]);  // rate_2 = 1 - β₂
    const real kept = i < matrices ? theta[i] * (1 - decay) : theta[i];
    theta[i] = kept - lr / fix_1 * m[i] / (sqrt(v[i] / fix_2) + eps);
}
