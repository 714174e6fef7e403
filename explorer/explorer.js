"use strict";
// The page around model.js. Each character leaves a row of numbers; everything is drawn from the rows.
const $ = id => document.getElementById(id), all = css => [...document.querySelectorAll(css)];
const LONGEST = 5000;  // characters that are read
const SCALES = { characters: /[^]/gu, words: /\S+|\s+/gu, lines: /[^\n]+|\n/gu,
  "blocks of 64": /[^]{64}/gu, "blocks of 256": /[^]{256}/gu };

// ---- reading and writing ----
function unpack() {  // the model in this page; throws if the page is damaged
  const page = JSON.parse($("model-data").textContent), packed = atob($("weights").textContent);
  const bytes = new Uint8Array(packed.length); let sum = 0, at = 0;
  for (let i = 0; i < packed.length; i++) sum += bytes[i] = packed.charCodeAt(i);
  if (sum !== page.sum) throw Error("its weights have changed");
  const power = e => 2 ** (Math.max(e, 1) - 25);  // of a float16: sign, 5 bits, 10 bits
  const half = n => (n >> 15 ? -1 : 1) * power(n >> 10 & 31) * (n & 1023 | (n & 31744 && 1024));
  const weights = page.dtype === "<f4" ? new Float32Array(bytes.buffer)
    : new Float32Array(new Uint16Array(bytes.buffer)).map(half);
  const take = shape => weights.subarray(at, at += shape.reduce((n, side) => n * side));
  const params = page.params.map(([name, shape]) => [name, take(shape)]);
  return [page, new Model(page.config, Object.fromEntries(params))];
}

class Reader {  // what one model, whole or with parts switched off, makes of the text
  constructor(model, off) {
    Object.assign(this, { model, off, tokens: [], rows: [], next: 0, read: -1 });
  }
  want(tokens) {  // keep the rows before a change, and the rows after it that it cannot reach
    const { tokens: old, rows, model: { config, reach } } = this;
    let p = 0, q = 0, least = Math.min(old.length, tokens.length);
    for (; p < least && old[p] === tokens[p]; p++);
    for (; q < least - p && old.at(-1 - q) === tokens.at(-1 - q); q++);
    const kept = config.positions || config.memory ? 0 : Math.max(0, q - reach);
    const fresh = Array(tokens.length - p - kept).fill(null);
    this.rows = [...rows.slice(0, p), ...fresh, ...rows.slice(old.length - kept)];
    Object.assign(this, { tokens, next: 0, read: this.read > p ? -1 : this.read });
  }
  work(until) {  // read on until that time; true when all is read
    for (; this.next < this.tokens.length; this.next++) {
      if (this.rows[this.next]) continue; else if (performance.now() > until) return false;
      const { model, tokens, next, off } = this;
      const logits = model.stream_step(this.after(next), tokens[next], off);
      const row = this.rows[next] = model.row, first = likeliest(logits);
      const total = logits.reduce((sum, x) => sum + Math.exp(x - logits[first]), 0);
      Object.assign(row, { first, total: logits[first] + Math.log(total) });  // log Σ exp(logits)
      if (next % 8 === 7) row.state = structuredClone(this.state);
      this.read = next + 1;
    }
    return true;
  }
  after(n) {  // the decoder's state after n characters, from the last state that a row has kept
    let t = n;
    if (this.read === n) return this.state;
    while (t && !this.rows[t - 1].state) t--;
    this.state = t ? structuredClone(this.rows[t - 1].state) : this.model.stream_init();
    for (; t < n; t++) this.model.stream_step(this.state, this.tokens[t], this.off);
    this.read = n; return this.state;
  }
  logits(t) { return this.model.head(this.rows[t].last); }
  bits(t) {  // the surprise at character t; NaN where nothing was expected
    const row = this.rows[t - 1], { E, config: { d_model: d } } = this.model;
    const e = E.subarray(this.tokens[t] * d, (this.tokens[t] + 1) * d);
    return row ? (row.total - dot(row.last, e)) / Math.LN2 : NaN;
  }
  look(t, layer) {  // the numbers that are drawn
    const { z, s, alpha, mixer, network, share } = this.rows[t].layers[layer];
    const before = this.rows[t - 1]?.layers[layer] ?? { z: z.map(() => 0), s };
    return { ...sides(z, s), before: sides(before.z, before.s), alpha, share: [...share],
      mixer: mixer / (mixer + network || 1), reads: this.reads(t, layer),
      angles: principal_angles(plane(before.z, before.s), plane(z, s)) };
  }
  *letters() {  // the characters that the model writes after the text, without end
    const { model, tokens, off } = this, random = random_numbers($("seed").valueAsNumber || 0);
    const T = $("temperature").valueAsNumber, temperature = Math.max(0, T >= 0 ? T : 0.8);
    const top_k = Math.max(1, Math.floor($("top-k").valueAsNumber) || Infinity);
    const sorted = model.logits.slice();
    this.work(Infinity);
    const state = structuredClone(this.after(tokens.length)), n = tokens.length;
    let logits = n ? this.logits(n - 1) : model.stream_step(state, ids.get(10) ?? page.start, off);
    for (;;) {
      logits = logits.slice();  // a copy, since other readers overwrite the model's logits
      const token = sample(logits, temperature, top_k, random, sorted);
      yield character(token); logits = model.stream_step(state, token, off);
    }
  }
  reads(t, layer) {  // memory: z is given Σ (z·k) v over all that wrote; their shares
    const { position, layers } = this.rows[t], { z } = layers[layer], start = t - position;
    const wrote = this.model.config.memory ? this.rows.slice(start, t + 1) : [];
    const lengths = wrote.map(row => {
      const { k, v } = row.layers[layer]; return Math.abs(dot(z, k)) * norm(v);
    });
    const total = mean(lengths) * lengths.length || 1;
    return lengths.map((x, k) => [start + k, x / total]).sort((x, y) => y[1] - x[1]);
  }
}

// ---- planes (in Python: experiments/flow.py) ----
const mean = list => list.reduce((sum, x) => sum + x, 0) / list.length;
const unit = a => Float64Array.from(a, x => x / norm(a));
function sides(z, s) {  // of the parallelogram: lengths, angle, area
  const along = dot(z, s), area = Math.sqrt(Math.max(0, dot(z, z) * dot(s, s) - along * along));
  return { z: norm(z), s: norm(s), angle: Math.atan2(area, along), area };
}
function plane(u, v) {  // an orthonormal basis, or null where u and v span no plane
  const a = unit(u), along = unit(v), b = along.map((x, i) => x - dot(a, along) * a[i]);
  return norm(b) > 1e-5 ? [a, unit(b)] : null;
}
function principal_angles(P, Q) {  // ascending; their cosines: the singular values of P Qᵀ
  if (!P || !Q) return null;
  const [[p, q], [v, w]] = Q.map(c => P.map(a => dot(a, c)));
  const plus = Math.hypot(p + w, q - v), minus = Math.hypot(p - w, q + v);  // sum, difference
  return [plus + minus, Math.abs(plus - minus)].map(x => Math.acos(Math.min(1, x / 2)));
}
function nearest_plane(rows) {  // to A = Σ z ∧ s: spanned by u and u A, where A² stretches u most
  const r = rows[0].z.length, A = new Float64Array(r * r);
  const turned = u => { const y = new Float64Array(r); accumulate(u, A, y); return y; };
  for (const { z, s } of rows) add_wedge(A, z, s);
  let u = unit(A.subarray(0, r).map((_, i) => Math.cos(i * i)));  // any start will do
  for (let round = 0, moved = 1; round < 1000 && moved > 1e-12; round++) {
    const next = unit(turned(turned(u)));
    [moved, u] = [1 - Math.abs(dot(u, next)), next];
  }
  return plane(u, turned(u));
}
function pieces(text, scale) {  // [from, to) of each character, word, line or block
  let to = 0;
  const found = text.match(SCALES[scale]) || [], bounds = found.map(s => [to, to += [...s].length]);
  return bounds.filter((_, k) => scale === "characters" || found[k].trim());
}
function path(reader, layer, scale) {  // steps from plane to plane, and distances to random other planes
  const random = random_numbers(0), points = [], text = reader.tokens.map(character).join("");
  const found = pieces(text, scale), rows = reader.rows.map(row => row.layers[layer]);
  const planes = found.map(([from, to]) => nearest_plane(rows.slice(from, to)));
  const apart = (P, Q) => P && Q ? Math.hypot(...principal_angles(P, Q)) : NaN;
  for (let k = 1; k < planes.length; k++) {
    const other = () => (k + 1 + Math.floor(random() * (planes.length - 1))) % planes.length;
    const others = Array.from("12345678", () => apart(planes[other()], planes[k]));
    const step = apart(planes[k - 1], planes[k]), noise = mean(others.filter(x => x >= 0));
    const pair = [found[k - 1], found[k]], t = found[k][0];
    if (step >= 0 && noise >= 0) points.push({ t, step, noise, pair });
  }
  const [step, noise] = ["step", "noise"].map(key => mean(points.map(p => p[key])));
  const spread = mean(points.map(p => (p.step - p.noise - step + noise) ** 2));
  const error = Math.sqrt(spread / points.length) / noise;  // one standard error of the ratio
  return { points, step, noise, ratio: step / noise, error };
}

// ---- the text ----
let page, ids, model, intact, touched, writer, saved;
const state = { off: new Set(), at: 0, hover: -1 }, timers = {}, form = $("instruments");
const box = $("text"), cells = [];  // a span for each character, with its place t, -1: skipped
const later = (id, wait, f) => { clearTimeout(timers[id]); timers[id] = f && setTimeout(f, wait); };
const choose = t => { Object.assign(state, { at: t, hover: -1 }); draw(); };
const shown = () => touched || intact, character = token => String.fromCodePoint(page.vocab[token]);
const number = (x, digits = 2) => Number.isFinite(x) ? x.toFixed(digits) : "–";
const many = x => Math.round(x).toLocaleString("en");
const percent = x => `${(100 * x).toFixed(x < 0.0995 ? 1 : 0)}%`;
const degrees = x => `${Math.round(x * 180 / Math.PI)}°`;
const item = (what, x) => `<span>${what} <b>${x}</b></span>`;
const differs = t => touched?.rows[t] && touched.rows[t].first !== intact.rows[t]?.first;
const write = (letters, n) => Array.from({ length: n }, () => letters.next().value).join("");
function glyph(c) {  // a visible form of a character or a token; safe in HTML
  if (typeof c === "number") return glyph(character(c));
  const point = c.codePointAt(), named = { " ": "␣", "\n": "↵", "\t": "⇥" }[c];
  if (named || /[\p{C}\p{Z}]/u.test(c)) return named || `U+${point.toString(16).toUpperCase()}`;
  return `${/\p{M}/u.test(c) ? "◌" : ""}&#${point};`;
}
function read() {  // the text box
  const unknown = new Set(), tokens = [], another = () => document.createElement("span");
  let end = 0;
  const points = Array.from(box.value = box.value.slice(0, LONGEST));
  while (cells.length > points.length) cells.pop().remove();
  while (cells.length < points.length) cells.push($("cells").appendChild(another()));
  points.forEach((c, k) => {
    const token = ids.get(c.codePointAt()), t = token >= 0 ? tokens.push(token) - 1 : -1;
    if (t < 0) unknown.add(c);
    if (cells[k].textContent !== c) cells[k].textContent = c;
    Object.assign(cells[k], { end: end += c.length, t });
  });
  const skipped = [...unknown].slice(0, 20).map(glyph).join(" ");
  for (const node of all(".note")) node.innerHTML =
    (end < LONGEST ? "" : `No more than ${many(LONGEST)} characters are read. `)
    + (skipped && `Left out, since the model has never seen them: ${skipped}`);
  $("prompt").textContent = tokens.slice(-60).map(character).join(""); run(false, null);
  for (const reader of [intact, touched]) reader?.want(tokens);
  state.at = Math.max(0, Math.min(state.at, tokens.length - 1)); refresh();
}
function refresh() {  // read on for 24 ms, draw, go on later
  const until = performance.now() + 24;
  const done = intact.work(until) && (!touched || touched.work(until));
  const slow = { flow: draw_paths, touch: go_on }[form.tab.value];  // when nobody types
  draw(); later("slow", done ? 120 : 0, done ? slow : refresh);
}
function draw() {
  const reader = shown(), t = state.hover < 0 ? state.at : state.hover;
  later("save", 250, save); draw_text(reader, t); $("guess").textContent = "";
  if (!reader.tokens.length) for (const id of ["after", "next", "cards", "chosen"]) $(id).innerHTML = "";
  if (!reader.rows[t] || !intact.rows[t]) return;
  draw_next(reader, t); draw_point(t);
  if (form.tab.value === "layers") draw_layers(reader, t);
}
function draw_text(reader, chosen) {  // colours show bits, or with parts off, the change in bits
  const { tokens } = reader, left = tokens.length - reader.next, places = [...tokens.keys()];
  const [before, now] = [intact, reader].map(reader => places.map(t => reader.bits(t)));
  const [whole, loss] = [before, now].map(bits => number(mean(bits.filter(x => x >= 0))));
  for (const cell of cells) {
    const { t } = cell, bits = touched ? 2 * (now[t] - before[t]) : now[t];
    const names = `${cell.textContent === "\n" ? "end " : ""}${t < 0 ? "unknown " : ""}${
      t === chosen ? "chosen " : ""}${differs(t) ? "changed " : ""}${bits < 0 ? "better" : ""}`;
    if (cell.className !== names) cell.className = names;
    const b = `${Math.round(Math.min(8, Math.abs(bits || 0)) * 10)}%`;
    if (cell.b !== b) cell.style.setProperty("--b", cell.b = b);
  }
  $("loss").innerHTML = tokens.length < 2 ? "Type something." : `Loss: ${
    touched ? `<b>${whole}</b> → ` : ""}<b>${loss}</b> bits a character${
    left ? `; ${many(left)} still to read` : ""}.`;
  const name = key => `layer ${key.replace(/-(?=\d)/, " offset ").replace("-", " ")}`;
  $("changes").hidden = !($("key").hidden = touched);
  $("jump").disabled = $("mend").disabled = !touched;
  $("changes").textContent = `Off: ${[...state.off].map(name).join(", ")}. Underlined: ${
    many(places.filter(differs).length)} of ${many(tokens.length)} characters after which the model now
    guesses another character. Red: a greater surprise than before. Green: a smaller surprise. Arrows:
    with all parts on → with parts off.`;
}
function draw_next(reader, t) {
  const { tokens } = reader, came = tokens[t + 1], from = Math.max(0, t - 11);
  const [whole, p] = [intact, reader].map(reader =>
    Array.from(reader.logits(t), x => Math.exp(x - reader.rows[t].total)));
  const list = [...p.keys()].sort((i, j) => p[j] - p[i]);
  const bar = (x, kind) => `<div class="bar ${kind}" style="width: ${100 * x}%"></div>`;
  const odds = k => `${touched ? `${percent(whole[k])} → ` : ""}${percent(p[k])}`;
  const before = tokens.slice(from, t + 1).map(glyph).join("");
  const most = [[intact, whole], [reader, p]].map(([{ rows }, p]) =>
    `<code>${glyph(rows[t].first)}</code> <b>${percent(p[rows[t].first])}</b>`);
  $("guess").innerHTML = `Likeliest next: ${most.slice(touched ? 0 : 1).join(" → ")}`;
  $("after").innerHTML = `After <code dir="auto">${from ? "…" : ""}${before}</code> comes${
    touched ? ' <span class="soft">(thin bar: all parts on)</span>' : ""}`;
  $("next").innerHTML = list.filter((k, rank) => rank < 10 || k === came).map(k => `
    <tr class="${k === came ? "came" : ""}"><th scope="row">${glyph(k)}</th>
      <td>${bar(p[k], "")}${touched ? bar(whole[k], "whole") : ""}</td>
      <td>${k === came ? "came next · " : ""}${odds(k)}</td></tr>`).join("");
}
function draw_layers(reader, t) {
  const looks = model.layers.map((_, i) => reader.look(t, i)), { tokens, rows } = reader;
  const read = rows.filter(row => row).map(row => row.layers);
  const fit = ({ z, s, angle }) => Math.min(130 / (z + s * Math.abs(Math.cos(angle))), 86 / s, 1e9);
  const scale = Math.min(...looks.flatMap(look => [look, look.before].map(fit)));
  const name = n => `“<bdi>${glyph(tokens[t - n])}</bdi>”`;
  const meter = x => `<span class="meter"><i style="width: ${100 * x}%"></i></span> ${percent(x)}`;
  $("chosen").innerHTML = `${name(0)}, character ${many(t + 1)} of ${many(tokens.length)}${
    t ? `: a surprise of ${number(reader.bits(t))} bits` : ""}${touched ? " (parts are off)" : ""}`;
  $("cards").innerHTML = looks.map((look, i) => {
    const { offsets } = model.layers[i], { share } = look, most = Math.max(...share);
    const at = (n, x) => `${name(n)}, ${n} back (${percent(x)})`;
    const usual = offsets.map((n, k) => `${n} back ${percent(mean(read.map(x => x[i].share[k])))}`);
    const reads = look.reads.slice(0, 4).map(([k, x]) => at(t - k, x));
    return `<section class="card"><h3>Layer ${i + 1} <span>looks back by ${offsets.join(", ")}; here ${
      most ? `mostly at ${at(offsets[share.indexOf(most)], most)}`
      : "s is 0, so there is no plane; the mixer adds its own state and a bias"}</span></h3>
      <div class="pictures">${draw_planes(look, scale)}${draw_arcs(tokens, t, offsets, share)}</div>
      <div class="numbers">${item("|z|", number(look.z))}${item("|s|", number(look.s))}
      ${item("angle", look.area ? degrees(look.angle) : "–")}${item("area", number(look.area))}
      ${item("gate keeps", meter(look.alpha))}${item("change by the mixer", meter(look.mixer))}
      ${item("by the network", percent(1 - look.mixer))}
      ${item("mean shares over the text:", usual.join(", "))}
      ${reads.length ? `<span>memory: reads ${reads.join("; ")}</span>` : ""}</div></section>`;
  }).join("");
}
const way = points => `M${points.map(p => p.map(x => x.toFixed(1)).join(" ")).join("L")}`;
function parallelogram({ z, s, angle, area }, scale, middle, kind) {  // z lies, s stands on it
  if (!area) return `<text x="${middle - 24}" y="64">no plane</text>`;
  const [w, x, y] = [z, s * Math.cos(angle), s * Math.sin(angle)].map(length => scale * length);
  const left = middle - (w + x) / 2, o = [left, 100], a = [left + w, 100], b = [left + x, 100 - y];
  return `<g class="${kind}"><path class="area" d="${way([o, a, [a[0] + x, b[1]], b])}Z"/>
    <path class="side z" d="${way([o, a])}"/><path class="side s" d="${way([o, b])}"/>
    <text class="z" x="${left + w / 2}" y="113">z</text>
    <text class="s" x="${b[0] - 3}" y="${b[1] - 5}">s</text></g>`;
}
function draw_planes(look, scale) {
  const dials = (look.angles || []).map((angle, k) => {
    const y = 46 + 46 * k, to = [146 + 26 * Math.cos(angle), y - 26 * Math.sin(angle)];
    return `<path class="dial" d="${way([[146, y], [172, y]])}A26 26 0 0 0 ${to.join(" ")}Z"/>
      <text x="176" y="${y}">${degrees(angle)}</text>`;
  });
  return `<svg viewBox="0 0 344 116" role="img" aria-label="z and s, now and one character before;
    principal angles ${(look.angles || ["none"]).map(x => x >= 0 ? degrees(x) : x).join(", ")}">${
    parallelogram(look.before, scale, 70, "before")}${dials.join("")}${
    parallelogram(look, scale, 274, "")}</svg>`;
}
function draw_arcs(tokens, t, offsets, share) {  // on a long way, only the offsets
  const reach = Math.max(...offsets), stops = [...Array(reach + 1).keys()].filter(n =>
    n <= t && (reach <= 20 || n < 6 || offsets.includes(n)));
  const cell = Math.min(26, 344 / stops.length), last = stops.length - 0.5;
  const x = n => cell * (last - stops.indexOf(n));
  const letters = stops.map((n, k) => `<text class="glyph" x="${x(n)}" y="30">${
    glyph(tokens[t - n])}${k && stops[k - 1] < n - 1 ? "…" : ""}</text>`);
  const arcs = offsets.map((n, k) => {
    const low = 52 + (x(0) - x(n)) / 3.3;
    return n > t ? "" : `<path class="arc" stroke-width="${0.4 + 14 * share[k]}"
      d="M${x(0)} 38C${x(0)} ${low} ${x(n)} ${low} ${x(n)} 38"/>
      <text class="mid" x="${x(n)}" y="10">${Math.round(100 * share[k])}</text>`;
  });
  return `<svg viewBox="0 0 344 ${60 + cell * stops.length / 5}" role="img"
    aria-label="Shares of s: ${offsets.map((n, k) => `${n} back ${percent(share[k])}`).join(", ")}">${letters.join("")}${arcs.join("")}</svg>`;
}

// ---- switches, flow, writing ----
function build_controls() {
  const { layers, config: { memory } } = model, every = [...layers.keys()];
  const scale = name => `<label><input type="radio" name="scale" value="${name}">${name}</label>`;
  const offsets = [...new Set(layers.flatMap(layer => layer.offsets))].sort((a, b) => a - b);
  const parts = ["wedge", "gate", "mixer", ...memory ? ["memory"] : [], ...offsets];
  const row = (name, few) => `<div class="switches"><b>${name}</b>${
    parts.map(part => {
      const keys = few.filter(i => !(part > 0) || layers[i].offsets.includes(part)).map(i =>
        `${i + 1}-${part}`), label = `${part > 0 ? "offset " : ""}${part} of ${name}`;
      return keys.length ? `${part === offsets[0] ? "offset" : ""} <button type="button"
        role="switch" aria-label="${label}" data-keys="${keys}">${part}</button>` : "";
    }).join("")}</div>`;
  const rows = every.map(i => row(`layer ${i + 1}`, [i]));
  $("scales").innerHTML = Object.keys(SCALES).map(scale).join("");
  $("switches").innerHTML = row("all layers", every) + rows.join("");
}
const keys = node => node.dataset.keys?.split(",") || [];
function touch() {  // what is switched off now
  const off = model.layers.map(() => ({})), is_on = key => !state.off.has(key);
  for (const key of state.off) off[key.split("-")[0] - 1][key.split("-")[1]] = true;
  touched = state.off.size ? new Reader(model, off) : null; touched?.want(intact.tokens);
  for (const node of all("[role=switch]")) node.ariaChecked = keys(node).some(is_on);
  run(false, null); show();
}
function go_on() {
  $("on-intact").textContent = write(intact.letters(), 120);
  $("on-touched").textContent = touched ? write(touched.letters(), 120) : "(no part is off)";
}
const x_of = t => ((t + 0.5) / Math.max(1, shown().tokens.length) * 1000).toFixed(1);
function draw_point(t) {  // marks the chosen character on the paths, and names the step that ends there
  const piece = ([from, to]) => `“<bdi>${shown().tokens.slice(from, Math.min(to, from + 24))
    .map(glyph).join("")}${to > from + 24 ? "…" : ""}</bdi>”`;
  for (const svg of all("#paths svg")) {
    const { pair, step, noise } = svg.points.findLast(p => p.t <= t) || {};
    svg.lastElementChild.setAttribute("transform", `translate(${x_of(t)})`);
    svg.parentNode.querySelector(".point").innerHTML = pair ? item(
      `${pair.map(piece).join(" → ")}:`, `${number(step)}</b>, to other planes <b>${number(noise)}`) : "";
  }
}
function draw_paths(layer = 0) {
  if (!layer) $("paths").innerHTML = "";
  const { points, step, noise, ratio, error } = path(shown(), layer, form.scale.value);
  const line = key => way(points.map(p => [Number(x_of(p.t)), 36 * (2.2214 - p[key])]));
  const change = Math.abs(1 - ratio), far = ratio > 1 ? "farther apart" : "nearer";
  const n = points.length, few = n < 8, verdict = few ? `the text is too short: ${n} of at least 8 steps`
    : noise < 1e-3 ? "always the same plane"
    : change < Math.max(2 * error, 0.01) ? "no flow: neighbours are as far apart as in random order"
    : `${ratio > 1 ? "no" : change < 0.1 ? "hardly a" : "a"} flow: neighbours are ${percent(change)} ${far} than in random order`;
  $("paths").insertAdjacentHTML("beforeend", `<section class="card"><h3>Layer ${layer + 1} <span>${
    form.scale.value}: ${verdict}</span></h3>${few ? "" : `<span>2.22: nothing in common</span>
    <svg viewBox="0 0 1000 80" height="80" preserveAspectRatio="none" role="img"
      aria-label="Steps along the text"><path class="axis" d="M0 80H1000M0 0H1000"/>
      <path class="random" d="${line("noise")}"/><path class="line" d="${line("step")}"/>
      <path class="here" d="M0 0V80"/></svg><span>0: the same plane</span>
    <p class="point"></p><div class="numbers">${item("mean step", number(step, 3))}
      ${item("in random order", number(noise, 3))}
      ${item("ratio", `${number(ratio, 3)} ± ${number(error, 3)}`)}</div>`}</section>`);
  for (const svg of all("#paths .card:last-child svg")) svg.points = points; draw_point(state.at);
  if (layer + 1 < model.layers.length) later("slow", 0, () => draw_paths(layer + 1));
}
function write_on() {
  const { letters, written, start, began, from } = writer, until = performance.now() + 25;
  const { rank: r, n_layer, d_model, memory } = model.config, fast = $("fast").checked;
  do written.push(letters.next().value);
  while (fast && written.length < writer.until && performance.now() < until);
  $("written").textContent = written.join(""); $("output").scrollTop = 1e6;
  $("counter").innerHTML = Object.entries({ "characters": written.length,
    "a second": 1000 * (written.length - from) / (performance.now() - began),
    "numbers that this model remembers": (model.reach + memory * n_layer * r) * r,
    "numbers that a Transformer of this size would keep by now": 2 * n_layer * d_model
      * (start + written.length) }).map(([name, n]) => item(name, many(n))).join("");
  written.length < writer.until ? later("write", fast ? 0 : 25, write_on) : run(false);
}
function run(on, from = writer) {  // on: write as many characters as the field says; else stop
  clearTimeout(timers.write); writer = from;
  if (!writer) $("written").textContent = $("counter").textContent = "";
  $("start").textContent = on ? "Stop" : writer ? "Start again" : "Start";
  $("more").hidden = on || !writer; if (!on) return;
  const n = writer.written.length, until = n + Math.max(1, $("length").valueAsNumber || 300);
  Object.assign(writer, { until, from: n, began: performance.now() }); write_on();
}

// ---- the address, events, start ----
function save() {  // so that a finding can be sent to someone
  const query = new URLSearchParams({ at: state.at, tab: form.tab.value, scale: form.scale.value });
  if (state.off.size) query.set("off", [...state.off].join());
  if (box.value !== page.text) query.set("text", box.value);
  history.replaceState(null, "", saved = `#${query}`);
}
function load() {
  if (location.hash && location.hash === saved) return;
  const query = new URLSearchParams(location.hash.slice(1));
  const known = all("[role=switch]").flatMap(keys);
  box.value = query.get("text") ?? page.text; state.at = Math.floor(query.get("at") ?? page.at) || 0;
  state.off = new Set(query.get("off")?.split(",").filter(key => known.includes(key)));
  for (const tab of ["layers", query.get("tab")]) form.tab.value = tab;  // no effect if there is no such tab
  for (const scale of ["words", query.get("scale")]) form.scale.value = scale;
  read(); touch(); [$("page").hidden, $("broken").hidden] = [false, true];
  if (intact.tokens.length) go_to(state.at);
  if (!location.hash && page.at > 0 && intact.work(Infinity)) tour(0);
}
function go_to(t) {  // choose the character, scroll to it, and put the caret behind it
  const cell = cells.find(cell => cell.t === t);
  box.setSelectionRange(cell.end, cell.end); cell.scrollIntoView({ block: "nearest" });
  choose(t);
}
function show() {
  for (const { value } of form.tab) $(value).hidden = value !== form.tab.value;
  refresh();
}
function explain({ target }) {  // shows beside a term what it means, and where the lesson has more
  const term = target.closest(".term"), gloss = $("gloss"), [says, lesson] = gloss.children;
  if (!term) return;
  says.textContent = term.title;
  lesson.textContent = `More in the lesson, tutorial.md: “${term.dataset.lesson}”.`;
  gloss.hidePopover(); gloss.showPopover({ source: term });
}

// ---- a first minute: what a button says; what a click on it does, and what the page says then ----
const block = () => innerWidth > 860 ? "nearest" : "start";  // a phone has one column
const see = (tab, id) => { form.tab.value = tab; show(); $(id).scrollIntoView({ block: block() }); };
const TOUR = [["", () => "New here? Take four clicks, one minute."],
  ["show a surprise", () => {
    const t = page.at, guess = glyph(intact.rows[t - 1].first), came = glyph(intact.tokens[t]);
    see("layers", "page"); go_to(t - 1);
    return `The model read this far and expected “${guess}”. “${came}” came next: a surprise of
      ${number(intact.bits(t), 1)} bits, so “${came}” is red. The table has more guesses.`;
  }],
  ["show the planes", () => {
    see("layers", "chosen"); go_to(page.at);
    return `In every layer, z comes from “${glyph(intact.tokens[page.at])}” and s from earlier characters.
      Both span a plane. The model guesses from these planes.`;
  }],
  ["switch the planes off", () => {
    state.off = new Set(model.layers.map((_, i) => `${i + 1}-wedge`)); touch(); see("touch", "switches");
    return "Nothing comes from the planes now. The line under the text shows the loss, before → after.";
  }],
  ["let the model write", () => {
    state.off.clear(); touch(); $("start").click(); see("write", "output");
    return "All parts are on again, and the model goes on from its text. Now type a text of your own.";
  }]];
function tour(k) {
  const [said, next] = [TOUR[k]?.[1](), TOUR[k + 1]];
  $("guide").hidden = !said; $("guide").firstElementChild.innerHTML = said || "";
  $("step").textContent = next ? `${k + 1} of 4: ${next[0]}` : "Done"; $("skip").hidden = !next;
  $("step").onclick = () => tour(k + 1); $("skip").onclick = () => tour(TOUR.length);
}
function listen() {
  const alone = () => box.selectionStart === box.selectionEnd;
  const under = ({ x, y }) =>  // the character under the pointer, -1: none
    document.elementsFromPoint(x, y).find(node => node.parentNode === $("cells"))?.t ?? -1;
  const hover = t => { if (t !== state.hover) { state.hover = t; draw(); } };
  const caret = () => {  // the character before it is chosen
    const before = cells.findLast(cell => cell.t >= 0 && cell.end <= box.selectionStart);
    if (document.activeElement === box && alone()) choose(before?.t ?? 0);
  };
  document.onselectionchange = caret; box.oninput = () => { read(); caret(); };
  box.onclick = event => { if (alone() && under(event) >= 0) go_to(under(event)); };
  const mouse = event => event.pointerType === "mouse" && !event.buttons;
  box.onpointermove = event => hover(mouse(event) ? under(event) : -1);
  const step_at = ({ target, x }) => {  // the end of the step on a path that is nearest to the pointer
    const { points } = target, { left, width } = target.getBoundingClientRect();
    const away = p => Math.abs(x_of(p.t) / 1000 - (x - left) / width);
    return points ? points.reduce((p, q) => away(q) < away(p) ? q : p).t : -1;
  };
  $("paths").onpointermove = event => hover(mouse(event) ? step_at(event) : -1);
  $("paths").onclick = event => { if (step_at(event) >= 0) go_to(step_at(event)); };
  box.onpointerleave = $("paths").onpointerleave = () => hover(-1);
  $("mend").onclick = () => { state.off.clear(); touch(); };
  $("jump").onclick = () => {
    const places = [...intact.rows.keys()].filter(differs);
    if (places.length) go_to(places.find(t => t > state.at) ?? places[0]);
  };
  $("switches").onclick = ({ target }) => {
    const off = keys(target).every(key => state.off.has(key));
    for (const key of keys(target)) state.off[off ? "delete" : "add"](key);
    if (keys(target).length) touch();
  };
  document.onclick = explain; form.onchange = show;
  $("start").onclick = ({ target }) => target.textContent === "Stop" ? run(false)
    : run(true, { letters: shown().letters(), written: [], start: intact.tokens.length });
  $("more").onclick = () => run(true); window.onhashchange = load;
}
try {
  [page, model] = unpack(); ids = new Map(page.vocab.map((c, k) => [c, k]));
  intact = new Reader(model); $("model").textContent = page.about;
  for (const term of all(".term")) term.title = term.title.replace(/\s+/g, " ");
  for (const node of all(".memory")) node.hidden = !model.config.memory;
  build_controls();
  box.value = page.text.slice(0, LONGEST); page.text = box.value;  // with the line ends of a text box
  listen(); load();
  const done = () => [intact, touched].every(reader => !reader?.rows.includes(null));
  const logits = (text, stream = model.stream_init()) =>
    Array.from(text, c => [...model.stream_step(stream, ids.get(c.codePointAt()))]);
  window.explorer = { model, state, shown, done, logits };  // for tests, and for the curious
} catch (error) {
  $("broken").textContent = `Damaged: ${error.message.replace(/\.$/, "")}. Make the page again: python -m explorer`;
}
