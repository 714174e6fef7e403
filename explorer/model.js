"use strict";
// The streaming step of grassmann.py, op by op, under the same names: one token in, one row out.
// Vectors are rows, W has shape (in, out) and lies row after row; every op writes into its last
// arguments, so that a token allocates nothing. Letters for sizes are those of grassmann.py.

const accumulate = (x, W, y) => {  // y += x W; eight rows of W at a time: y is touched seldom
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
};
const linear = (x, W, b, y) => { y.set(b); accumulate(x, W, y); };  // y = x W + b

const dot = (a, b) => {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
};
const norm = a => Math.sqrt(dot(a, a));
const distance = (a, b) => {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += (a[i] - b[i]) ** 2;
  return Math.sqrt(sum);
};

function layernorm(x, w, b, y) {
  const d = x.length;
  let mean = 0, square = 0;
  for (let i = 0; i < d; i++) mean += x[i] / d;
  for (let i = 0; i < d; i++) square += (x[i] - mean) ** 2 / d;
  const inv_std = 1 / Math.sqrt(square + 1e-5);
  for (let i = 0; i < d; i++) y[i] = (x[i] - mean) * inv_std * w[i] + b[i];
}

const GELU_C = Math.sqrt(2 / Math.PI), GELU_CA = GELU_C * 0.044715;

function gelu(x) {  // in place
  for (let i = 0; i < x.length; i++) {
    const z = Math.max(-10, Math.min(10, x[i]));
    x[i] *= 0.5 * (1 + Math.tanh(z * (GELU_C + GELU_CA * z * z)));
  }
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

function unit_area(u, v) {  // 1 / |u ∧ v|, by which v is multiplied; 0 where there is no plane
  const tiny = 1.1754943508222875e-38, uu = dot(u, u), vv = dot(v, v), uv = dot(u, v);
  let height = 0;
  if (uu <= tiny || vv <= tiny) return 0;
  for (let i = 0; i < u.length; i++) height += (v[i] - uv / uu * u[i]) ** 2;
  return height > Math.max(1e-10 * vv, tiny) ? 1 / Math.sqrt(height * uu) : 0;
}

// One model: its parameters, and the arrays that one token needs on its way through it.
class Model {
  constructor(config, params) {
    const { d_model: d, rank: r, n_layer, d_ff } = config;
    const size = n => new Float32Array(n);
    const most = Math.max(...config.offsets.map(layer => layer.length));
    Object.assign(this, { config, E: params.E, P: params.P, ln_f: scope(params, "ln_f.") });
    this.E_T = Float32Array.from(params.E, (_, k) => {  // (d, V): what `accumulate` takes
      return params.E[k % config.vocab_size * d + Math.floor(k / config.vocab_size)];
    });
    this.layers = config.offsets.map((offsets, i) => {
      const w = scope(params, `blocks.${i}.`);
      return { offsets, reach: Math.max(...offsets), ln1: scope(w, "ln1."), ln2: scope(w, "ln2."),
               mix: scope(w, "mix."), ffn: scope(w, "ffn.") };
    });
    this.reach = this.layers.reduce((sum, layer) => sum + layer.reach, 0);
    // What is kept of a token, in one array: log Σ exp(logits), the likeliest next token, the last
    // state, and per layer z, s, share, α, changes (and a, b where the model has a memory).
    this.width = 2 * r + most + 3 + (config.memory ? 2 * r : 0);
    this.kept = size(2 + d + n_layer * this.width);
    this.views = this.layers.map((_, i) => this.view(this.kept, i));
    Object.assign(this, { h: size(d), before: size(d), normed: size(d), mixed: size(d) });
    Object.assign(this, { hg: size(2 * d), a: size(d), inner: size(d_ff), out: size(d) });
    Object.assign(this, { p: size(r * (r - 1) / 2), q: size(r), c: size(r) });
    this.g = this.hg.subarray(d);
    this.last = this.last_of(this.kept);
    this.logits = size(config.vocab_size);
  }

  last_of(kept) { return kept.subarray(2, 2 + this.config.d_model); }

  view(kept, layer) {  // one layer's part of a kept row
    const { d_model, rank: r } = this.config, most = this.width - (this.config.memory ? 4 : 2) * r - 3;
    let at = 2 + d_model + layer * this.width;
    const take = n => kept.subarray(at, at += n);
    return { z: take(r), s: take(r), share: take(most), numbers: take(3), a: take(r), b: take(r),
             ab: kept.subarray(at - 2 * r, at) };
  }

  // s = Σ_Δ w_Δ ⊙ z_{t-Δ}, or the average; share_Δ is |term_Δ| / Σ |terms|.
  partner({ z, s, share }, layer, past, position, off) {
    const { rank: r, taps, normalize } = this.config, { q } = this;
    const { offsets, mix: w } = this.layers[layer];
    const valid = taps ? 1 : Math.max(1, offsets.filter(delta => delta <= position).length);
    let total = 0;
    s.fill(0);
    share.fill(0);
    for (let k = 0; k < offsets.length; k++) {
      if (offsets[k] > position || off.offsets?.has(offsets[k])) continue;
      const from = (position - offsets[k]) % this.layers[layer].reach * r;
      for (let i = 0; i < r; i++) q[i] = past.z[from + i] * (taps ? w.taps[k * r + i] : 1);
      const scale = (normalize && !taps ? unit_area(z, q) : 1) / valid;
      for (let i = 0; i < r; i++) s[i] += scale * q[i];
      total += share[k] = scale * norm(q);
    }
    if (total) for (let k = 0; k < offsets.length; k++) share[k] /= total;
    if (taps && normalize) {
      const scale = unit_area(z, s);
      for (let i = 0; i < r; i++) s[i] *= scale;
    }
  }

  memory({ z, a, b }, past, c) {  // M += a ∧ b, c = z ⌟ M / sqrt(t)
    const scale = 1 / Math.sqrt(++past.seen);
    add_wedge(past.M, a, b);
    c.fill(0);
    accumulate(z, past.M, c);
    for (let i = 0; i < c.length; i++) c[i] *= scale;
  }

  gate(h, w, numbers, out, fixed) {  // α = sigmoid([h ; g] W + b), out = α ⊙ h + (1-α) ⊙ g
    const { a, g, hg } = this;
    hg.set(h);
    linear(hg, w.W_gate, w.b_gate, a);
    let sum = 0;
    for (let i = 0; i < a.length; i++) {
      const alpha = fixed ? 0.5 : 0.5 + 0.5 * Math.tanh(0.5 * a[i]);
      out[i] = g[i] + alpha * (h[i] - g[i]);
      sum += alpha;
    }
    numbers[0] = sum / a.length;
  }

  mix(h, layer, past, position, off, out) {  // reduce, look back, span a plane, project back, blend
    const { mix: w, reach } = this.layers[layer], view = this.views[layer], { p, g, c } = this;
    linear(h, w.W_red, w.b_red, view.z);
    this.partner(view, layer, past, position, off);
    past.z.set(view.z, position % reach * view.z.length);
    g.set(w.b_plu);
    if (!off.wedge) {
      plucker(view.z, view.s, p);
      accumulate(p, w.W_plu, g);
    }
    if (this.config.memory) {
      linear(h, w.W_ab, w.b_ab, view.ab);
      this.memory(view, past, c);
      if (!off.memory) accumulate(c, w.W_mem, g);
    }
    this.gate(h, w, view.numbers, out, off.gate);
  }

  ffn(x, w, out) {
    linear(x, w.W_1, w.b_1, this.inner);
    gelu(this.inner);
    linear(this.inner, w.W_2, w.b_2, out);
  }

  // h ← h + mix(LN1(h)), h ← h + FFN(LN2(h)); the paper's: h ← LN1(mix(h)), h ← LN2(h + FFN(h)).
  block(layer, past, position, off) {
    const { ln1, ln2, ffn: w } = this.layers[layer], { h, before, normed, mixed, out } = this;
    const prenorm = this.config.block === "prenorm", { numbers } = this.views[layer];
    before.set(h);
    if (prenorm) layernorm(h, ln1.w, ln1.b, normed);
    this.mix(prenorm ? normed : h, layer, past, position, off, mixed);
    if (prenorm) for (let i = 0; i < h.length; i++) h[i] += off.mixer ? 0 : mixed[i];
    else layernorm(off.mixer ? before : mixed, ln1.w, ln1.b, h);
    numbers[1] = distance(before, h);  // how far the mixer moved the state, and the FFN
    before.set(h);
    if (prenorm) layernorm(h, ln2.w, ln2.b, normed);
    this.ffn(prenorm ? normed : h, w, out);
    for (let i = 0; i < h.length; i++) h[i] += out[i];
    if (!prenorm) { mixed.set(h); layernorm(mixed, ln2.w, ln2.b, h); }
    numbers[2] = distance(before, h);
  }

  head(h, logits) {  // logits = h Eᵀ
    let most = 0, total = 0;
    logits.fill(0);
    accumulate(h, this.E_T, logits);
    for (let k = 1; k < logits.length; k++) if (logits[k] > logits[most]) most = k;
    for (let k = 0; k < logits.length; k++) total += Math.exp(logits[k] - logits[most]);
    this.kept[0] = logits[most] + Math.log(total);
    this.kept[1] = most;
  }

  forward(state, token, off) {  // embed, N blocks, project onto the embedding
    const { config, h, last } = this, d = config.d_model, { position, past } = state;
    for (let i = 0; i < d; i++) h[i] = this.E[token * d + i];
    if (config.positions) for (let i = 0; i < d; i++) h[i] += this.P[position * d + i];
    for (let i = 0; i < config.n_layer; i++) this.block(i, past[i], position, off[i] || NOTHING);
    if (config.block === "prenorm") layernorm(h, this.ln_f.w, this.ln_f.b, last);
    else last.set(h);
    state.position++;
  }

  stream_init() {
    const { rank: r, memory } = this.config;
    const past = this.layers.map(({ reach }) => ({ z: new Float32Array(reach * r), seen: 0,
                                                   M: new Float64Array(memory ? r * r : 0) }));
    return { past, position: 0, recent: [] };
  }

  // Read one token: `logits` and `kept` are those after it. off: what is switched off, per layer.
  stream_step(state, token, off = []) {
    const { positions, context } = this.config;
    if (positions) {
      if (state.position === context) {  // the table ends here: read the last half again from 0
        const again = state.recent.slice(state.recent.length - (context >> 1));
        Object.assign(state, this.stream_init());
        for (const old of again) this.forward(state, old, off);
        state.recent = again;
      }
      state.recent.push(token);
    }
    this.forward(state, token, off);
    this.head(this.last, this.logits);
    return this.logits;
  }
}

const NOTHING = {};  // is switched off

function scope(params, prefix) {
  const names = Object.keys(params).filter(name => name.startsWith(prefix));
  return Object.fromEntries(names.map(name => [name.slice(prefix.length), params[name]]));
}

// Draw from softmax(logits / temperature), among the top_k largest; random() lies in [0, 1).
function sample(logits, temperature, top_k, random, sorted) {
  let most = 0, total = 0, least = -Infinity;
  for (let k = 1; k < logits.length; k++) if (logits[k] > logits[most]) most = k;
  if (temperature === 0) return most;
  if (top_k < logits.length) {
    sorted.set(logits);
    least = sorted.sort()[logits.length - top_k];
  }
  const weight = x => x < least ? 0 : Math.exp((x - logits[most]) / temperature);
  for (let k = 0; k < logits.length; k++) total += weight(logits[k]);
  let left = random() * total;
  for (let k = 0; k < logits.length; k++) if ((left -= weight(logits[k])) < 0) return k;
  return most;
}

function random_numbers(seed) {  // mulberry32: the same seed, the same numbers
  return () => {
    let t = seed = seed + 0x6D2B79F5 | 0;
    t = Math.imul(t ^ t >>> 15, t | 1);
    t ^= t + Math.imul(t ^ t >>> 7, t | 61);
    return ((t ^ t >>> 14) >>> 0) / 4294967296;
  };
}
