"use strict";
// The streaming step of grassmann.py, op by op, under the same names. Vectors are rows, W (in, out)
// lies row after row; an op writes into its last argument.

function accumulate(x, W, y) {  // y += x W; eight rows of W at a time, to read and write y less often
  const n = y.length, whole = x.length - x.length % 8;
  for (let i = 0; i < whole; i += 8) {
    const a = x[i], b = x[i + 1], c = x[i + 2], d = x[i + 3];
    const e = x[i + 4], f = x[i + 5], g = x[i + 6], h = x[i + 7];
    for (let k = 0, j = i * n; k < n; k++, j++) {
      y[k] += a * W[j] + b * W[j + n] + (c * W[j + 2 * n] + d * W[j + 3 * n])
        + (e * W[j + 4 * n] + f * W[j + 5 * n] + (g * W[j + 6 * n] + h * W[j + 7 * n]));
    }
  }
  for (let i = whole; i < x.length; i++) {
    for (let k = 0, j = i * n; k < n; k++, j++) y[k] += x[i] * W[j];
  }
}
const linear = (x, W, b, y) => { y.set(b); accumulate(x, W, y); };  // y = x W + b
function dot(a, b) {
  let sum = 0; for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}
const norm = a => Math.sqrt(dot(a, a));
const distance = (a, b) => Math.sqrt(Math.max(0, dot(a, a) - 2 * dot(a, b) + dot(b, b)));
function layernorm(x, { w, b }, y) {
  let mean = 0, variance = 0; for (let i = 0; i < x.length; i++) mean += x[i] / x.length;
  for (let i = 0; i < x.length; i++) variance += (x[i] - mean) ** 2 / x.length;
  const inv_std = 1 / Math.sqrt(variance + 1e-5);
  for (let i = 0; i < x.length; i++) y[i] = (x[i] - mean) * inv_std * w[i] + b[i];
}
const sigmoid = x => 1 / (1 + Math.exp(-x));
function gelu(x) {  // in place; (1 + tanh q)/2 is sigmoid(2q)
  const c = 2 * Math.sqrt(2 / Math.PI), ca = c * 0.044715;
  for (let i = 0; i < x.length; i++) x[i] *= sigmoid(x[i] * (c + ca * x[i] * x[i]));
  return x;
}
function plucker(u, v, p) {  // p_ij = u_i v_j - u_j v_i for i < j
  for (let i = 0, n = 0; i < u.length; i++) {
    for (let j = i + 1; j < u.length; j++) p[n++] = u[i] * v[j] - u[j] * v[i];
  }
}
function add_wedge(A, u, v) {  // A += u ∧ v as an antisymmetric matrix (r, r)
  for (let i = 0, n = 0; i < u.length; i++) {
    for (let j = 0; j < u.length; j++) A[n++] += u[i] * v[j] - v[i] * u[j];
  }
}
function unit_area(u, v) {  // 1 / |u ∧ v|, the factor of v; 0 if there is no plane
  const tiny = 1.1754943508222875e-38, uu = dot(u, u), vv = dot(v, v), uv = dot(u, v);
  if (uu <= tiny || vv <= tiny) return 0;
  const height = v.reduce((sum, x, i) => sum + (x - uv / uu * u[i]) ** 2, 0);
  return height > Math.max(1e-10 * vv, tiny) ? 1 / Math.sqrt(height * uu) : 0;
}
class Model {
  constructor(config, params) {
    const { vocab_size: V, d_model: d, rank: r, d_ff } = config, size = n => new Float32Array(n);
    const scope = part => Object.fromEntries(Object.entries(params).filter(([name]) =>
      name.startsWith(`${part}.`)).map(([name, a]) => [name.slice(part.length + 1), a]));
    this.layers = config.offsets.map((offsets, i) => {
      const [mix, ffn, ln1, ln2] = ["mix", "ffn", "ln1", "ln2"].map(x => scope(`blocks.${i}.${x}`));
      return { offsets, reach: Math.max(...offsets), mix, ffn, ln1, ln2 };
    });
    this.reach = this.layers.reduce((sum, layer) => sum + layer.reach, 0);
    const { E, P } = params, E_T = E.map((_, k) => E[k % V * d + Math.floor(k / V)]);  // (d, V)
    Object.assign(this, { config, size, E, E_T, P, ln_f: scope("ln_f"), logits: size(V),
      h: size(d), before: size(d), normed: size(d), mixed: size(d), hg: size(2 * d), a: size(d),
      out: size(d), inner: size(d_ff), p: size(r * (r - 1) / 2), q: size(r), c: size(r) });
    this.g = this.hg.subarray(d);
  }
  // s = Σ_Δ w_Δ ⊙ z_{t-Δ}, or the average of z_{t-Δ}; share_Δ is |term_Δ| / Σ |terms|.
  partner({ z, s, share }, { offsets, reach, mix: w }, past, position, off) {
    const { rank: r, taps, normalize } = this.config, { q } = this;
    let valid = 0, total = 0; for (const delta of offsets) valid += delta <= position;
    for (let k = 0; k < offsets.length; k++) {
      if (offsets[k] > position || off[offsets[k]]) continue;
      const from = (position - offsets[k]) % reach * r;
      for (let i = 0; i < r; i++) q[i] = past.z[from + i] * (taps ? w.taps[k * r + i] : 1);
      const scale = taps ? 1 : (normalize ? unit_area(z, q) : 1) / valid;
      for (let i = 0; i < r; i++) s[i] += scale * q[i];
      total += share[k] = scale * norm(q);
    }
    for (let k = 0; k < offsets.length; k++) share[k] /= total || 1;
    const scale = taps && normalize ? unit_area(z, s) : 1;
    for (let i = 0; i < r; i++) s[i] *= scale;
  }
  memory({ z, s, k, v }, { M }, seen, c) {  // k += s, M += kᵀ v, c = z M / sqrt(r t)
    for (let i = 0, n = 0; i < k.length; i++) {
      k[i] += s[i]; for (let j = 0; j < v.length; j++) M[n++] += k[i] * v[j];
    }
    accumulate(z, M, c.fill(0)); const scale = 1 / Math.sqrt(c.length * seen);
    for (let i = 0; i < c.length; i++) c[i] *= scale;
  }
  gate(h, w, half, out) {  // α = sigmoid([h ; g] W + b), out = α ⊙ h + (1-α) ⊙ g; the mean of α
    const { a, g, hg } = this; let sum = 0;
    hg.set(h); linear(hg, w.W_gate, w.b_gate, a);
    for (let i = 0; i < a.length; i++) {
      const alpha = half ? 0.5 : sigmoid(a[i]);
      out[i] = g[i] + alpha * (h[i] - g[i]); sum += alpha;
    }
    return sum / a.length;
  }
  mix(h, layer, past, position, off, out) {  // reduce, look back, span a plane, project back, blend
    const { mix: w, reach, offsets } = layer, { p, g, c, size, config: { rank: r, memory } } = this;
    const kv = size(2 * r), kept = { z: size(r), s: size(r), share: size(offsets.length) };
    linear(h, w.W_red, w.b_red, kept.z); this.partner(kept, layer, past, position, off);
    past.z.set(kept.z, position % reach * r); plucker(kept.z, kept.s, p);
    g.set(w.b_plu);
    if (!off.wedge) accumulate(p, w.W_plu, g);
    if (memory) {
      linear(h, w.W_kv, w.b_kv, kv); Object.assign(kept, { k: kv.subarray(0, r), v: kv.subarray(r) });
      this.memory(kept, past, ++past.seen, c);
      if (!off.memory) accumulate(c, w.W_mem, g);
    }
    kept.alpha = this.gate(h, w, off.gate, out); return kept;
  }
  ffn(x, w, out) {
    linear(x, w.W_1, w.b_1, this.inner); linear(gelu(this.inner), w.W_2, w.b_2, out);
  }
  // h ← h + mix(LN1(h)), h ← h + FFN(LN2(h)); the paper's: h ← LN1(mix(h)), h ← LN2(h + FFN(h)).
  block(layer, past, position, off) {  // returns what is kept, and how far mixer and FFN moved the state
    const { h, before, normed, mixed, out } = this, prenorm = this.config.block === "prenorm";
    before.set(h);
    if (prenorm) layernorm(h, layer.ln1, normed);
    const kept = this.mix(prenorm ? normed : h, layer, past, position, off, mixed);
    if (!prenorm) layernorm(off.mixer ? before : mixed, layer.ln1, h);
    else if (!off.mixer) for (let i = 0; i < h.length; i++) h[i] += mixed[i];
    kept.mixer = distance(before, h); before.set(h);
    if (prenorm) layernorm(h, layer.ln2, normed);
    this.ffn(prenorm ? normed : h, layer.ffn, out);
    for (let i = 0; i < h.length; i++) h[i] += out[i];
    if (!prenorm) layernorm(h, layer.ln2, h);
    kept.network = distance(before, h); return kept;
  }
  head(last) {  // logits = last Eᵀ
    accumulate(last, this.E_T, this.logits.fill(0));
    return this.logits;
  }
  forward(state, token, off = []) {  // embed, N blocks; returns a row of what is kept of the token
    const { config, h, E, P } = this, d = config.d_model, { position, past } = state;
    for (let i = 0; i < d; i++) h[i] = E[token * d + i];
    if (config.positions) for (let i = 0; i < d; i++) h[i] += P[position * d + i];
    const layers = this.layers.map((layer, i) =>
      this.block(layer, past[i], position, off[i] || {}));
    const last = h.slice();
    if (config.block === "prenorm") layernorm(h, this.ln_f, last);
    return { position: state.position++, layers, last };
  }
  stream_init() {  // per layer the last z, in a ring, and the memory
    const { rank: r, memory } = this.config, M = () => new Float64Array(memory ? r * r : 0);
    const past = this.layers.map(({ reach }) => ({ z: this.size(reach * r), M: M(), seen: 0 }));
    return { past, position: 0, recent: [] };
  }
  stream_step(state, token, off) {  // off: what is switched off, for each layer
    const { positions, context } = this.config;
    if (positions && state.position === context) {  // positions end: read the last half again from 0
      const again = state.recent.slice(state.recent.length - (context >> 1));
      Object.assign(state, this.stream_init(), { recent: again });
      for (const old of again) this.forward(state, old, off);
    }
    if (positions) state.recent.push(token);
    this.row = this.forward(state, token, off);
    return this.head(this.row.last);
  }
}
const likeliest = logits => logits.indexOf(Math.max(...logits));
// Draw from softmax(logits / temperature), among the top_k largest. `sorted` is an array to sort them in.
function sample(logits, temperature, top_k, random, sorted) {
  const most = likeliest(logits);
  sorted.set(logits);
  const least = top_k < logits.length ? sorted.sort()[logits.length - top_k] : -Infinity;
  const weight = x => x < least ? 0 : Math.exp((x - logits[most]) / temperature);
  let total = 0; for (let k = 0; k < logits.length; k++) total += weight(logits[k]);
  let left = random() * total;
  for (let k = 0; k < logits.length && temperature > 0; k++) {
    if ((left -= weight(logits[k])) < 0) return k;
  }
  return most;
}
const random_numbers = seed => () => {  // mulberry32: the same seed, the same numbers in [0, 1)
  let t = seed = seed + 0x6D2B79F5 | 0;
  t = Math.imul(t ^ t >>> 15, t | 1); t ^= t + Math.imul(t ^ t >>> 7, t | 61);
  return ((t ^ t >>> 14) >>> 0) / 4294967296;
};
