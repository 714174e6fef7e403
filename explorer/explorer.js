"use strict";
// The page around model.js: each character read leaves a row of numbers, and all is drawn from the rows.
const $ = id => document.getElementById(id), all = selector => [...document.querySelectorAll(selector)];
const LONGEST = 5000;  // characters that are read
const SCALES = { characters: 1, words: /\S/u, lines: /[^\n]/u, "blocks of 16": 16, "blocks of 64": 64, "blocks of 256": 256 };

// ---- reading and writing ----------------------------------------------------------------------------
function unpack() {  // the model in this page; throws where the page is damaged
  const page = JSON.parse($("model-data").textContent), packed = atob($("weights").textContent);
  const bytes = new Uint8Array(packed.length), power = e => 2 ** (Math.max(e, 1) - 25);
  const half = n => (n >> 15 ? -1 : 1) * power(n >> 10 & 31) * (n & 1023 | (n & 31744 ? 1024 : 0));  // a float16
  let a = 1, b = 0, at = 0;
  for (let i = 0; i < bytes.length; i++) {
    a = (a + (bytes[i] = packed.charCodeAt(i))) % 65521;
    b = (b + a) % 65521;
  }
  if (b * 65536 + a !== page.adler32) throw Error("its weights are not those that were written");
  const weights = page.dtype === "<f4" ? new Float32Array(bytes.buffer)
    : new Float32Array(new Uint16Array(bytes.buffer)).map(half);
  const take = shape => weights.subarray(at, at += shape.reduce((n, side) => n * side));
  const params = page.params.map(([name, shape]) => [name, take(shape)]);
  return [page, new Model(page.config, Object.fromEntries(params)), weights.length];
}

class Reader {  // what one model, whole or with parts switched off, makes of the text
  constructor(model, off) { Object.assign(this, { model, off, tokens: [], rows: [], read: -1, next: 0 }); }
  want(tokens) {  // keep the rows before the change, and those that lie beyond its reach
    const { tokens: old, rows, model: { config, reach } } = this, least = Math.min(old.length, tokens.length);
    let p = 0, q = 0;
    while (p < least && old[p] === tokens[p]) p++;
    while (q < least - p && old[old.length - 1 - q] === tokens[tokens.length - 1 - q]) q++;
    const endless = config.positions || config.memory, kept = endless ? 0 : Math.max(0, q - reach);
    if (endless && p < this.read) p = 0;  // its reach: then all is read anew
    this.rows = [...rows.slice(0, p), ...Array(tokens.length - p - kept).fill(null), ...rows.slice(old.length - kept)];
    Object.assign(this, { tokens, next: 0, read: this.read > p ? -1 : this.read });
  }
  work(until) {  // read on until that time; true when all is read
    for (; this.next < this.tokens.length; this.next++) {
      if (this.rows[this.next]) continue;
      if (performance.now() > until) return false;
      if (this.read !== this.next) this.state = this.restore(this.next);
      this.model.stream_step(this.state, this.tokens[this.next], this.off);
      this.rows[this.next] = this.model.kept.slice();
      this.read = this.next + 1;
    }
    if (this.read !== this.next) Object.assign(this, { state: this.restore(this.next), read: this.next });
    return true;
  }
  restore(n) {  // the decoder's state after n characters, from the z that are kept of the last ones
    const state = this.model.stream_init();
    state.past.forEach(({ z: ring }, i) => {
      const { reach } = this.model.layers[i], { rank } = this.model.config;
      for (let t = Math.max(0, n - reach); t < n; t++) ring.set(this.row(t, i).z, t % reach * rank);
    });
    return Object.assign(state, { position: n });
  }
  row(t, layer) { return this.model.view(this.rows[t], layer); }
  logits(t) { return this.model.head(this.model.last_of(this.rows[t]), this.model.logits); }
  bits(t) {  // the surprise at character t; NaN where nothing was expected
    const row = this.rows[t - 1], { E, config: { d_model: d } } = this.model, k = this.tokens[t] * d;
    return row ? (row[0] - dot(this.model.last_of(row), E.subarray(k, k + d))) / Math.LN2 : NaN;
  }
  look(t, layer) {  // the numbers that are drawn
    const { z, s, numbers: [alpha, mixer, ffn], share } = this.row(t, layer);
    const before = t ? this.row(t - 1, layer) : { z: z.map(() => 0), s };
    return { ...sides(z, s), before: sides(before.z, before.s), alpha, mixer: mixer / (mixer + ffn || 1),
             angles: principal_angles(plane(before.z, before.s), plane(z, s)),
             share: [...share].slice(0, this.model.layers[layer].offsets.length), reads: this.reads(t, layer) };
  }
  reads(t, layer) {  // the memory gives z back Σ (z·a) b - (z·b) a over all that wrote: their shares
    const { z } = this.row(t, layer), start = t - this.rows[t][2], lengths = [];
    for (let i = start; i <= t && this.model.config.memory; i++) {
      const { a, b } = this.row(i, layer), x = dot(z, a), y = dot(z, b);
      lengths.push(norm(b.map((v, k) => x * v - y * a[k])));
    }
    const total = mean(lengths) * lengths.length || 1, shares = lengths.map((x, k) => [start + k, x / total]);
    return shares.sort((x, y) => y[1] - x[1]);  // [place, share], the largest first
  }
}

class Writer {  // goes on from the end of what a reader has read
  constructor(reader) {
    const value = (id, least, usual) => $(id).valueAsNumber >= least ? $(id).valueAsNumber : usual;
    const { model, off, tokens } = reader, size = () => new Float32Array(model.logits.length);
    reader.work(Infinity);
    Object.assign(this, { model, off, state: structuredClone(reader.state), logits: size(), sorted: size(),
      temperature: value("temperature", 0, 0.8), top_k: value("top-k", 1, Infinity),
      random: random_numbers(value("seed", 0, 0)), start: tokens.length, count: 0 });
    if (tokens.length) this.logits.set(reader.logits(tokens.length - 1));
    else this.hear(page.vocab.includes(10) ? page.vocab.indexOf(10) : page.start);
  }
  hear(token) { this.logits.set(this.model.stream_step(this.state, token, this.off)); }
  write(n) {
    let text = "";
    for (; n > 0; n--, this.count++) {
      const token = sample(this.logits, this.temperature, this.top_k, this.random, this.sorted);
      text += character(token);
      this.hear(token);
    }
    return text;
  }
}

// ---- planes (in Python: experiments/flow.py) --------------------------------------------------------
const mean = list => list.reduce((sum, x) => sum + x, 0) / list.length;
function sides(z, s) {  // of the parallelogram: lengths, angle, area
  const along = dot(z, s), area = Math.sqrt(Math.max(0, dot(z, z) * dot(s, s) - along * along));
  return { z: norm(z), s: norm(s), angle: Math.atan2(area, along), area };
}
function plane(u, v) {  // an orthonormal basis, or null where u and v span no plane
  const unit = a => Float64Array.from(a, x => x / norm(a)), a = unit(u), along = unit(v);
  const b = along.map((x, i) => x - dot(a, along) * a[i]);
  return norm(b) > 1e-5 ? [a, unit(b)] : null;
}
function principal_angles(P, Q) {  // ascending: cosines inside the plane P, sines outside of it
  if (!P || !Q) return null;
  const [[p, q], [v, w]] = Q.map(c => P.map(a => dot(a, c)));
  const [c, d] = Q.map((c, k) => c.map((x, i) => x - [p, v][k] * P[0][i] - [q, w][k] * P[1][i]));
  const plus = Math.hypot(p + w, q - v), minus = Math.hypot(p - w, q + v);  // sum and difference
  const half = (dot(c, c) + dot(d, d)) / 2, root = Math.hypot((dot(c, c) - dot(d, d)) / 2, dot(c, d));
  return [Math.atan2(Math.sqrt(Math.max(0, half - root)), (plus + minus) / 2),
          Math.atan2(Math.sqrt(half + root), Math.abs(plus - minus) / 2)];
}
function nearest_plane(rows) {  // to A = Σ z ∧ s: the one that A stretches most, and turns in itself
  const r = rows[0].z.length, zeros = n => new Float64Array(n), A = zeros(r * r);
  const times = (X, B) => {  // X B, for one row or many
    const out = zeros(X.length);
    for (let i = 0; i < X.length; i += r) accumulate(X.subarray(i, i + r), B, out.subarray(i, i + r));
    return out;
  };
  for (const { z, s } of rows) add_wedge(A, z, s);
  let power = A;
  for (let round = 0; round < 11; round++) {
    const square = times(power, power), most = square.reduce((x, y) => Math.max(x, Math.abs(y)), 0);
    power = square.map(x => x / most);
  }
  const u = times(zeros(r).map((_, i) => Math.cos(i * i)), power);  // from any vector
  return plane(u, times(u, A));
}
function pieces(text, scale) {  // [from, to) of each character, word, line or block
  const rule = SCALES[scale], found = [], blocks = Math.floor(text.length / rule) || 0;
  for (let k = 0; k < blocks; k++) found.push([k * rule, (k + 1) * rule]);
  for (let t = 0; t < text.length && rule.test; t++) {
    if (rule.test(text[t]) && t && rule.test(text[t - 1])) found.at(-1)[1]++;
    else if (rule.test(text[t])) found.push([t, t + 1]);
  }
  return found;
}
function path(reader, layer, scale) {  // steps from plane to plane, and their mean to random others
  const random = random_numbers(0), points = [], found = pieces(reader.tokens.map(character), scale);
  const planes = found.map(([from, to]) => {
    const rows = reader.rows.slice(from, to).map(row => reader.model.view(row, layer));
    return rows.length > 1 ? nearest_plane(rows) : plane(rows[0].z, rows[0].s);
  });
  const apart = (P, Q) => P && Q ? Math.hypot(...principal_angles(P, Q)) : NaN;
  const others = Array(Math.max(2, Math.min(16, Math.ceil(8000 / planes.length)))).fill();
  for (let k = 1; k < planes.length; k++) {
    const any = () => planes[(k + 1 + Math.floor(random() * (planes.length - 1))) % planes.length];
    const noise = mean(others.map(() => apart(any(), planes[k])).filter(x => x === x));
    const step = apart(planes[k - 1], planes[k]);
    if (step === step && noise === noise) points.push({ t: found[k][0], step, noise });
  }
  const [step, noise] = [mean(points.map(p => p.step)), mean(points.map(p => p.noise))];
  const spread = Math.sqrt(mean(points.map(p => (p.step - p.noise - step + noise) ** 2)) / points.length);
  return { points, step, noise, ratio: step / noise, error: spread / noise };
}

// ---- the text ---------------------------------------------------------------------------------------
let page, model, intact, touched, writer, saved, written = "", cells = [];
const state = { off: new Set(), at: 0, hover: -1, tab: "layers", scale: "words" }, timers = {};
const spans = [];  // a span for each cell, a character of the text
const later = (name, wait, f) => { clearTimeout(timers[name]); timers[name] = setTimeout(f, wait); };
const shown = () => touched || intact, character = token => String.fromCodePoint(page.vocab[token]);
const number = x => Number.isFinite(x) ? x.toFixed(2) : "–", many = x => Math.round(x).toLocaleString("en");
const percent = x => x >= 0.0995 || !x ? `${Math.round(100 * x)}%` : `${(100 * x).toFixed(1)}%`;
const degrees = x => `${Math.round(x * 180 / Math.PI)}°`;
const differs = t => touched?.rows[t] && intact.rows[t] && touched.rows[t][1] !== intact.rows[t][1];
function glyph(token) {  // a character as one can see it, safe in HTML
  const c = typeof token === "number" ? character(token) : token, named = { " ": "␣", "\n": "↵", "\t": "⇥" }[c];
  if (named || /[&<>"]/.test(c)) return named || `&#${c.charCodeAt()};`;
  if (/[\p{C}\p{Z}]/u.test(c)) return `U+${c.codePointAt().toString(16).toUpperCase()}`;
  return /\p{M}/u.test(c) ? `◌${c}` : c;
}
function read() {  // what stands in the text box
  const box = $("text"), ids = new Map(page.vocab.map((c, k) => [c, k])), unknown = new Set(), tokens = [];
  const points = Array.from(box.value.slice(0, 2 * LONGEST)).slice(0, LONGEST);
  const cut = points.join("").length < box.value.length;
  if (cut) box.value = points.join("");
  let end = 0;
  cells = points.map(c => {
    const token = ids.get(c.codePointAt()), known = token !== undefined;
    if (!known) unknown.add(c);
    return { c, end: end += c.length, t: known ? tokens.push(token) - 1 : -1 };
  });
  $("note").innerHTML = (cut ? `Only the first ${many(LONGEST)} characters are read, the rest was cut off. ` : "")
    + (unknown.size ? `Skipped, as the model has never seen them: ${[...unknown].slice(0, 20).map(glyph).join(" ")}` : "");
  for (const reader of [intact, touched]) reader?.want(tokens);
  state.at = Math.max(0, Math.min(state.at, tokens.length - 1));
  refresh();
}
function refresh() {  // read on for 24 ms, draw, go on later
  const until = performance.now() + 24, done = intact.work(until) && (!touched || touched.work(until));
  draw();
  clearTimeout(timers.slow);
  const slow = { flow: draw_paths, touch: go_on }[state.tab];  // once all is read and nobody types
  if (done && slow) later("slow", 120, slow);
  if (!done) later("read", 0, refresh);
}
function choose(t) {
  if (!(t >= 0 && t < shown().tokens.length)) return;
  Object.assign(state, { at: t, hover: -1 });
  draw();
}
function draw() {
  const reader = shown(), t = state.hover < 0 ? state.at : state.hover;
  later("save", 250, save);
  draw_text(reader, t);
  if (!reader.tokens.length) $("next").innerHTML = $("cards").innerHTML = $("chosen").innerHTML = "";
  if (!reader.rows[t] || !intact.rows[t]) return;
  draw_next(reader, t);
  if (state.tab === "layers") draw_layers(reader, t);
  for (const line of all(".here")) line.setAttribute("transform", `translate(${x_of(t)})`);
}
function draw_text(reader, chosen) {
  const colour = touched ? $("colour").value : "intact", left = reader.tokens.length - reader.next;
  const [before, after] = [intact, reader].map(reader => reader.tokens.map((_, t) => reader.bits(t)));
  const [whole, now] = [before, after].map(bits => mean(bits.filter(x => x === x)));
  const edit = cells.findIndex(({ c }, i) => spans[i]?.textContent !== c);  // -1: the end was cut off
  while (spans.length > cells.length) spans.splice(edit, 1)[0].remove();
  const fresh = () => $("cells").insertBefore(document.createElement("span"), spans[edit] || null);
  while (spans.length < cells.length) spans.splice(edit, 0, fresh());
  cells.forEach(({ c, t }, i) => {
    const bits = colour === "change" ? 2 * (after[t] - before[t]) : (colour === "intact" ? before : after)[t];
    const node = spans[i], strength = `${Math.round(Math.min(8, Math.abs(bits || 0)) * 10)}%`;
    const names = `${c === "\n" ? "end " : ""}${t < 0 ? "unknown " : ""}${t === chosen ? "chosen " : ""}${
      differs(t) ? "changed " : ""}${bits < 0 ? "better" : ""}`;
    if (node.textContent !== c) node.textContent = c;
    if (node.className !== names) node.className = names;
    if (node.style.getPropertyValue("--b") !== strength) node.style.setProperty("--b", strength);
  });
  $("loss").innerHTML = reader.tokens.length < 2 ? "Type something." : (touched
    ? `Loss: intact <b>${number(whole)}</b>, touched <b>${number(now)}</b> bits a character (${
      now < whole ? "−" : "+"}${number(Math.abs(now - whole))})`
    : `Loss: <b>${number(whole)}</b> bits a character`) + (left ? `; ${many(left)} still to read` : "");
  $("touched").hidden = !touched;
  $("changes").textContent = `Off: ${names_off()}. At ${many(before.filter((_, t) => differs(t)).length)} of ${
    many(before.length)} characters, underlined, another one is likeliest next.`;
}
function draw_next(reader, t) {
  const chances = reader => Array.from(reader.logits(t), x => Math.exp(x - reader.rows[t][0])), { tokens } = reader;
  const p = chances(reader), whole = chances(intact), came = tokens[t + 1];
  const list = [...p.keys()].sort((i, j) => p[j] - p[i]), rank = list.indexOf(came);
  const before = tokens.slice(Math.max(0, t - 11), t + 1).map(glyph).join("");
  const bar = (p, kind) => `<div class="bar ${kind}" style="width: ${(100 * p).toFixed(2)}%"></div>`;
  $("after").innerHTML = `After <code>${t > 11 ? "…" : ""}${before}</code> comes${touched ? ' <span class="soft">(intact → touched)</span>' : ""}`;
  $("next").innerHTML = list.slice(0, 10).concat(rank >= 10 ? came : []).map(k => `<tr${
    k === came ? ' class="came"' : ""}><th scope="row">${glyph(k)}</th>
    <td>${bar(p[k], "")}${touched ? bar(whole[k], "whole") : ""}</td><td>${k === came ? "came · " : ""}${
    touched ? `${percent(whole[k])} → ` : ""}${percent(p[k])}</td></tr>`).join("");
}

// ---- layers -----------------------------------------------------------------------------------------
function draw_layers(reader, t) {
  const looks = model.layers.map((_, i) => reader.look(t, i)), { tokens } = reader;
  const scale = Math.min(...looks.flatMap(look => [look, look.before]).map(({ z, s, angle }) => Math.min(
    130 / (z + s * Math.abs(Math.cos(angle)) + 1e-9), 86 / (s * Math.sin(angle) + 1e-9))));
  const meter = x => `<span class="meter"><i style="width: ${100 * x}%"></i></span> <b>${percent(x)}</b>`;
  const at = n => `“${glyph(tokens[t - n])}”, ${n} back`, item = (name, value) => `<span>${name} <b>${value}</b></span>`;
  $("chosen").innerHTML = `“${glyph(tokens[t])}”, character ${many(t + 1)} of ${many(tokens.length)}${
    t ? `: a surprise of ${number(reader.bits(t))} bits` : ""}${touched ? " (touched model)" : ""}`;
  $("cards").innerHTML = looks.map((look, i) => {
    const { offsets } = model.layers[i], most = look.share.indexOf(Math.max(...look.share));
    const reads = look.reads.slice(0, 4).map(([from, share]) => `${at(t - from)} (${percent(share)})`);
    return `<section class="card"><h3>Layer ${i + 1} <span>looks ${offsets.join(", ")} back; here ${
      look.share[most] ? `most at ${at(offsets[most])} (${percent(look.share[most])} of s)`
      : "there is nothing to look at"}</span></h3>
      <div class="pictures">${draw_planes(look, scale)}${draw_arcs(tokens, t, offsets, look.share)}</div>
      <div class="numbers">${item("|z|", number(look.z))}${item("|s|", number(look.s))}
      ${item("angle", look.area ? degrees(look.angle) : "–")}${item("area", number(look.area))}
      ${item("from the plane before", look.angles?.map(degrees).join(", ") || "–")}
      <span>gate: keeps ${meter(look.alpha)}</span>
      <span>change: mixer ${meter(look.mixer)}, network <b>${percent(1 - look.mixer)}</b></span>
      ${reads.length ? `<span>memory: reads ${reads.join("; ")}</span>` : ""}</div></section>`;
  }).join("");
}
const way = points => `M${points.map(p => p.map(x => x.toFixed(1)).join(" ")).join("L")}`;
function draw_planes(look, scale) {
  const one = ({ z, s, angle }, left, kind) => {
    const [w, x, y] = [z, s * Math.cos(angle), s * Math.sin(angle)].map(length => scale * length);
    const at = left + (140 - Math.abs(x) - w) / 2 - Math.min(0, x), o = [at, 100], end = [at + x, 100 - y];
    return `<g class="${kind}"><path class="area" d="${way([o, [at + w, 100], [at + w + x, 100 - y], end])}Z"/>
      <path class="side z" d="${way([o, [at + w, 100]])}"/><path class="side s" d="${way([o, end])}"/>
      <text class="z" x="${at + w / 2}" y="113">z</text><text class="s" x="${end[0] - 3}" y="${end[1] - 5}">s</text></g>`;
  };
  const dials = look.angles?.map((angle, k) => {
    const o = [146, 46 + 46 * k], to = [o[0] + 26 * Math.cos(angle), o[1] - 26 * Math.sin(angle)];
    return `<path class="dial" d="${way([o, [172, o[1]]])}A26 26 0 0 0 ${to.join(" ")}Z"/>
      <text x="176" y="${o[1]}">${degrees(angle)}</text>`;
  }) || [];
  return `<svg viewBox="0 0 344 116" role="img" aria-label="Parallelogram of z and s, and that of the character before">
    ${look.before.area ? one(look.before, 0, "before") : ""}${dials.join("")}
    ${look.area ? one(look, 204, "") : '<text x="240" y="64">no plane</text>'}</svg>`;
}
function draw_arcs(tokens, t, offsets, share) {
  const reach = Math.max(...offsets);  // of a long way only the stops
  const places = [...Array(reach + 1).keys()].filter(n => reach <= 20 || n < 6 || offsets.includes(n));
  const cell = Math.min(26, 344 / places.length), x = n => 344 - cell * (places.indexOf(n) + 0.5);
  const letters = places.filter(n => n <= t).map((n, k) => `<text class="glyph" x="${x(n)}" y="30">${
    glyph(tokens[t - n])}</text>${k && places[k - 1] < n - 1 ? `<text class="mid" x="${x(n) + cell / 2}" y="30">…</text>` : ""}`);
  const arcs = offsets.map((n, k) => {
    const low = 52 + (x(0) - x(n)) / 3.3;
    return n > t ? "" : `<path class="arc" stroke-width="${0.4 + 14 * share[k]}" d="M${x(0)} 38C${x(0)} ${low} ${x(n)} ${low} ${
      x(n)} 38"/><text class="mid" x="${x(n)}" y="10">${Math.round(100 * share[k])}${cell > 24 ? "%" : ""}</text>`;
  });
  return `<svg viewBox="0 0 344 116" role="img" aria-label="Arcs to the places that make up s">${
    letters.join("")}${arcs.join("")}</svg>`;
}

// ---- switches, flow, writing ------------------------------------------------------------------------
function build_switches() {
  const parts = ["wedge", "gate", "mixer", ...model.config.memory ? ["memory"] : []];
  const row = (layers, of) => {
    const offsets = [...new Set(layers.flatMap(i => model.layers[i].offsets))].sort((a, b) => a - b);
    const has = part => layers.filter(i => !(part > 0) || model.layers[i].offsets.includes(part));
    const list = some => some.map(part => `<button role="switch" aria-label="${part > 0 ? `offset ${part}` : part} of ${of}"
      data-keys="${has(part).map(i => `${i + 1}-${part}`)}">${part}</button>`).join("");
    return `<div class="switches"><span>${of}</span><div><span class="soft">offset</span>${list(offsets)}</div>
      <div>${list(parts)}</div></div>`;
  };
  const layers = model.layers.map((_, i) => i), rows = layers.map(i => row([i], `layer ${i + 1}`));
  $("switches").innerHTML = row(layers, "all layers") + rows.join("");
}
function names_off() {  // offset 1 of all layers, gate of layer 3
  const left = new Set(state.off), news = node => node.dataset.keys.split(",").filter(key => left.delete(key)).length;
  return all("[role=switch][aria-checked=false]").filter(news).map(node => node.getAttribute("aria-label")).join(", ");
}
function touch() {  // what is switched off now
  const off = model.layers.map((_, i) => Object.fromEntries([...state.off].map(key => key.split("-"))
    .filter(([layer]) => Number(layer) === i + 1).map(([, part]) => [part, true])));
  touched = state.off.size ? new Reader(model, off) : null;
  touched?.want(intact.tokens);
  const on = node => !node.dataset.keys.split(",").every(key => state.off.has(key));
  for (const node of all("[role=switch]")) node.setAttribute("aria-checked", on(node));
  refresh();
}
function go_on() {
  $("on-intact").textContent = new Writer(intact).write(120);
  $("on-touched").textContent = touched ? new Writer(touched).write(120) : "(nothing is switched off)";
}
const x_of = t => ((t + 0.5) / Math.max(1, shown().tokens.length) * 1000).toFixed(1);
function draw_paths(layer = 0) {
  if (!layer) $("paths").innerHTML = "";
  const { points, step, noise, ratio, error } = path(shown(), layer, state.scale);
  const nearer = percent(Math.abs(1 - ratio)), line = key => points.length > 1
    ? way(points.map(p => [Number(x_of(p.t)), (2.2214 - p[key]) * 36])) : "";
  const verdict = points.length < 8 ? `too short a text to tell: ${points.length} steps (let it write one)`
    : Math.abs(1 - ratio) <= Math.max(2 * error, 0.01) ? "no flow: as far apart as in random order"
    : ratio > 1 ? `no flow: ${nearer} farther apart than in random order`
    : `${ratio > 0.85 ? "a faint flow" : "a flow"}: ${nearer} nearer than in random order`;
  $("paths").insertAdjacentHTML("beforeend", `<section class="card"><h3>Layer ${layer + 1} <span>${state.scale}: ${verdict}</span></h3>
    <svg viewBox="0 0 1000 80" height="80" preserveAspectRatio="none" role="img" aria-label="Steps along the text">
    <path class="axis" d="M0 80H1000"/><path class="random" d="${line("noise")}"/><path class="line" d="${line("step")}"/>
    <path class="here" d="M0 0V80" transform="translate(${x_of(state.at)})"/></svg>
    <div class="numbers"><span>mean step <b>${number(step)}</b></span><span>in random order <b>${number(noise)}</b></span>
    <span>ratio <b>${number(ratio)} ± ${number(error)}</b></span></div></section>`);
  if (layer + 1 < model.layers.length) later("slow", 0, () => draw_paths(layer + 1));
}
function write_on() {
  const fast = $("fast").checked, until = performance.now() + 25, { rank: r, n_layer, d_model, memory } = model.config;
  do written += writer.write(1); while (fast && performance.now() < until);
  written = written.slice(-LONGEST);
  $("written").textContent = written.slice(-2000);
  $("written").scrollTop = 1e6;
  const since = performance.now(), passed = since - writer.since, { count } = writer;
  if (passed > 500) Object.assign(writer, { since, counted: count, rate: (count - writer.counted) / passed * 1000 });
  const ours = model.layers.reduce((sum, { reach }) => sum + reach * r + (memory ? r * (r - 1) / 2 : 0), 0);
  $("counter").innerHTML = `<b>${many(count)}</b> characters, <b>${many(writer.rate)}</b> a second. This model
    remembers <b>${many(ours)}</b> numbers; a Transformer of its size would keep
    <b>${many(2 * n_layer * d_model * (writer.start + count))}</b> by now.`;
  later("write", fast ? 0 : 25, write_on);
}
function start_or_stop() {
  clearTimeout(timers.write);
  writer = writer ? null : Object.assign(new Writer(shown()), { counted: 0, rate: 0, since: performance.now() });
  $("start").textContent = writer ? "Stop" : "Start";
  if (writer) { written = ""; write_on(); }
}

// ---- the address, events, start ---------------------------------------------------------------------
function save() {  // so that a finding can be sent to someone
  const query = new URLSearchParams({ at: state.at, tab: state.tab, scale: state.scale });
  if (state.off.size) query.set("off", [...state.off].join());
  if ($("text").value !== page.text) query.set("text", $("text").value);
  history.replaceState(null, "", saved = `#${query}`);
}
function load() {
  if (location.hash && location.hash === saved) return;
  const query = new URLSearchParams(location.hash.slice(1)), get = (key, usual) => query.get(key) ?? usual;
  const keys = all("[role=switch]").flatMap(node => node.dataset.keys.split(","));
  $("text").value = get("text", page.text);
  Object.assign(state, { at: Math.floor(get("at", 27)) || 0, off: new Set(get("off", "").split(",").filter(
    key => keys.includes(key))), scale: Object.hasOwn(SCALES, get("scale")) ? get("scale") : "words" });
  for (const node of all("[name=scale]")) node.checked = node.value === state.scale;
  read();
  touch();
  show(get("tab", "layers"));
}
function show(tab) {
  state.tab = $(`tab-${tab}`) ? tab : "layers";
  for (const node of all("[role=tab]")) {
    const on = node.id === `tab-${state.tab}`;
    Object.assign(node, { ariaSelected: on, tabIndex: on ? 0 : -1 });
    $(node.getAttribute("aria-controls")).hidden = !on;
  }
  refresh();
}
function listen() {
  const box = $("text"), under = event => cells[spans.indexOf(document.elementsFromPoint(event.clientX, event.clientY)
    .find(node => node.parentNode === $("cells")))]?.t ?? -1;  // the character under the pointer
  const hover = t => { if (t !== state.hover) { state.hover = t; draw(); } }, alone = () => box.selectionStart === box.selectionEnd;
  const before = () => cells.findLast(cell => cell.t >= 0 && cell.end <= box.selectionStart);
  const caret = () => { if (document.activeElement === box && alone()) choose(before()?.t ?? 0); };
  const go_to = t => {
    const k = cells.findIndex(cell => cell.t === t);
    if (k < 0) return;
    box.setSelectionRange(cells[k].end, cells[k].end);
    spans[k].scrollIntoView({ block: "nearest" });
    choose(t);
  };
  document.addEventListener("selectionchange", caret);
  box.oninput = () => { read(); caret(); };
  box.onclick = event => { if (alone() && under(event) >= 0) go_to(under(event)); };
  box.onpointermove = event => hover(event.pointerType === "mouse" && !event.buttons ? under(event) : -1);
  box.onpointerleave = () => hover(-1);
  $("colour").onchange = draw;
  $("mend").onclick = () => { state.off.clear(); touch(); };
  $("jump").onclick = () => {
    const places = intact.rows.map((_, t) => t).filter(differs);
    go_to(places.find(t => t > state.at) ?? places[0]);
  };
  $("switches").onclick = ({ target }) => {
    const keys = target.dataset.keys?.split(",") || [], off = keys.every(key => state.off.has(key));
    for (const key of keys) state.off[off ? "delete" : "add"](key);
    if (keys.length) touch();
  };
  all("[role=tab]").forEach((node, k, tabs) => {
    node.onclick = () => show(node.id.slice(4));
    node.onfocus = node.onclick;
    node.onkeydown = ({ key }) => tabs.at((k + ({ ArrowRight: 1, ArrowLeft: -1 }[key] ?? 0)) % tabs.length).focus();
  });
  const radio = scale => `<label><input type="radio" name="scale" value="${scale}">${scale}</label>`;
  $("scales").innerHTML += Object.keys(SCALES).map(radio).join("");
  $("scales").onchange = ({ target }) => { state.scale = target.value; refresh(); };
  $("paths").onclick = ({ target, clientX }) => {
    const { left, width } = target.closest("section").getBoundingClientRect();
    if (target.closest("svg")) go_to(Math.floor((clientX - left) / width * intact.tokens.length));
  };
  $("start").onclick = start_or_stop;
  $("take").onclick = () => { box.value = (box.value + written).slice(-LONGEST); read(); };
  window.onhashchange = load;
}
try {
  let parameters;
  [page, model, parameters] = unpack();
  intact = new Reader(model);
  $("model").textContent = `${page.name}: ${many(parameters)} parameters, ${model.layers.length} layers, an alphabet of `
    + `${many(page.vocab.length)}${page.best ? `, ${number(page.best[1] / Math.LN2)} bits a character on text held out` : ""}.`;
  for (const node of all(".memory")) node.hidden = !model.config.memory;
  page.text ||= new Writer(intact).write(400);
  listen();
  build_switches();
  load();
  [$("page").hidden, $("broken").hidden] = [false, true];
  const done = () => [intact, touched].every(reader => !reader?.rows.includes(null));
  const step = (c, stream) => [...model.stream_step(stream, page.vocab.indexOf(c.codePointAt()))];
  const logits = (text, stream = model.stream_init()) => Array.from(text, c => step(c, stream));
  window.explorer = { model, state, shown, done, logits };  // for tests, and for the curious
} catch (error) {
  $("broken").textContent = `This page is damaged (${error.message}). Make it anew: python -m explorer`;
}
