"use strict";
// The page around model.js: what is read is kept row by row, and everything is drawn from the rows.

const $ = id => document.getElementById(id);
const SVG = new Set(["svg", "g", "path", "line", "text", "title"]);
const LONGEST = 5000;  // characters that are read
const PARTS = { wedge: "wedge", memory: "memory", gate: "gate", mixer: "mixer" };
const BLOCKS = { characters: 1, words: 0, lines: 0, "blocks of 16": 16, "blocks of 64": 64,
                 "blocks of 256": 256 };

function el(tag, attributes = {}, ...children) {
  const svg = SVG.has(tag), space = "http://www.w3.org/2000/svg";
  const node = svg ? document.createElementNS(space, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// ---- the model in this page -----------------------------------------------------------------------

function unpack() {  // Raises an error where the page is damaged
  const page = JSON.parse($("model-data").textContent), packed = atob($("weights").textContent);
  const bytes = new Uint8Array(packed.length);
  let a = 1, b = 0, at = 0;
  for (let i = 0; i < bytes.length; i++) {
    bytes[i] = packed.charCodeAt(i);
    a = (a + bytes[i]) % 65521;
    b = (b + a) % 65521;
  }
  if ((b * 65536 + a) !== page.adler32) throw Error("the weights are not those that were written");
  const scale = Float64Array.from({ length: 32 }, (_, e) => 2 ** (Math.max(e, 1) - 25));
  const half = n => (n & 32768 ? -1 : 1) * scale[n >> 10 & 31] * ((n & 1023) + (n >> 10 & 31 ? 1024 : 0));
  const all = page.dtype === "<f2" ? Float32Array.from(new Uint16Array(bytes.buffer), half)
    : new Float32Array(bytes.buffer);
  const params = page.params.map(([name, shape]) => {
    return [name, all.subarray(at, at += shape.reduce((n, side) => n * side))];
  });
  if (at !== all.length) throw Error("weights are missing");
  return { page, model: new Model(page.config, Object.fromEntries(params)) };
}

// What one model, whole or with parts switched off, has read of the text: a row for each character.
class Reader {
  constructor(model, off = []) {
    Object.assign(this, { model, off, tokens: [], rows: [], next: 0, read: -1 });
  }

  // Keep what the change leaves as it was: all before it, and all that lies beyond its reach.
  want(tokens) {
    const { tokens: old, rows } = this, { config, reach } = this.model;
    const least = Math.min(old.length, tokens.length);
    let p = 0, q = 0;
    while (p < least && old[p] === tokens[p]) p++;
    while (q < least - p && old[old.length - 1 - q] === tokens[tokens.length - 1 - q]) q++;
    const keep = config.positions || config.memory ? 0 : Math.max(0, q - reach);
    const unread = Array(Math.max(0, tokens.length - p - keep)).fill(null);
    this.rows = rows.slice(0, p).concat(unread, rows.slice(old.length - keep));
    this.tokens = tokens;
    this.next = 0;
    if (this.read > p) this.read = -1;
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
    return true;
  }

  start(t) {  // where the window begins in which t is read: without positions there is only one
    const { positions, context } = this.model.config, half = context >> 1, step = context - half;
    return positions ? Math.max(0, step * Math.floor((t - half) / step)) : 0;
  }

  restore(n) {  // the decoder's state after n characters
    const { model, tokens, rows, off } = this, state = model.stream_init();
    if (model.config.positions) {
      state.recent = n ? tokens.slice(this.start(n - 1), n) : [];
      for (const token of state.recent) model.forward(state, token, off);
      return state;
    }
    state.position = n;
    state.past.forEach((past, i) => {
      const { reach } = model.layers[i], { memory } = model.config;
      for (let t = memory ? 0 : Math.max(0, n - reach); t < n; t++) {
        const { z, a, b } = model.view(rows[t], i);
        past.z.set(z, t % reach * z.length);
        if (memory) add_wedge(past.M, a, b);
      }
      past.seen = n;
    });
    return state;
  }

  logits(t) {
    const { model } = this;
    model.head(model.last_of(this.rows[t]), model.logits);
    return model.logits;
  }

  bits(t) {  // the surprise at character t; NaN where nothing was expected
    const row = this.rows[t - 1], { E, config: { d_model: d } } = this.model, k = this.tokens[t] * d;
    if (!row) return NaN;
    return (row[0] - dot(this.model.last_of(row), E.subarray(k, k + d))) / Math.LN2;
  }

  loss() { return mean(this.tokens.map((_, t) => this.bits(t)).filter(x => x === x)); }

  likeliest(t) {  // ten tokens and their probabilities
    const logits = this.logits(t), total = this.rows[t][0];
    const order = Array.from(logits.keys()).sort((i, j) => logits[j] - logits[i]).slice(0, 10);
    return order.map(token => ({ token, p: Math.exp(logits[token] - total) }));
  }

  planes(t, layer) {
    const { z, s } = this.model.view(this.rows[t], layer);
    return plane(z, s);
  }

  look(t, layer) {  // the numbers that are drawn
    const { z, s, a, b, numbers, share } = this.model.view(this.rows[t], layer);
    const before = t ? this.model.view(this.rows[t - 1], layer) : null, reads = [];
    for (let i = this.start(t), total = 0; a.length && i <= t; i++) {
      const { a, b } = this.model.view(this.rows[i], layer), x = dot(z, a), y = dot(z, b);
      reads.push(Math.sqrt(Math.max(0, x * x * dot(b, b) + y * y * dot(a, a) - 2 * x * y * dot(a, b))));
      total += reads.at(-1);
      if (i === t) reads.forEach((length, k) => { reads[k] = total && length / total; });
    }
    const angles = before && principal_angles(plane(before.z, before.s), plane(z, s));
    return { ...sides(z, s), before: before && sides(before.z, before.s), angles,
             share: Array.from(share).slice(0, this.model.layers[layer].offsets.length),
             alpha: numbers[0], mixer: numbers[1], ffn: numbers[2], reads };
  }
}

// ---- planes (experiments/flow.py has the same in Python) ------------------------------------------

const mean = list => list.reduce((sum, x) => sum + x, 0) / list.length;
const scaled = (a, c) => Float64Array.from(a, x => c * x);

function sides(z, s) {  // of the parallelogram: lengths, angle, area
  const base = norm(z), along = base && dot(z, s) / base;
  const height = base && distance(s, scaled(z, along / base));
  return { z: base, s: norm(s), angle: Math.atan2(height, along), area: base * height };
}

function plane(u, v) {  // an orthonormal basis, or null where u and v span no plane
  const a = scaled(u, 1 / norm(u)), v1 = scaled(v, 1 / norm(v));
  let b = v1.map((x, i) => x - dot(a, v1) * a[i]);
  if (!(norm(b) > 1e-5)) return null;
  return [a, scaled(b, 1 / norm(b))];
}

function principal_angles(P, Q) {  // ascending; null without two planes
  if (!P || !Q) return null;
  const [a, b] = P, m = Q.map(c => [dot(a, c), dot(b, c)]);
  const outside = Q.map((c, k) => c.map((x, i) => x - m[k][0] * a[i] - m[k][1] * b[i]));
  const plus = Math.hypot(m[0][0] + m[1][1], m[0][1] - m[1][0]);
  const minus = Math.hypot(m[0][0] - m[1][1], m[0][1] + m[1][0]);  // of the singular values, cosines
  const e = dot(outside[0], outside[0]), f = dot(outside[0], outside[1]), g = dot(outside[1], outside[1]);
  const root = Math.hypot((e - g) / 2, f), sine = square => Math.sqrt(Math.max(0, square));
  return [Math.atan2(sine((e + g) / 2 - root), (plus + minus) / 2),
          Math.atan2(sine((e + g) / 2 + root), Math.abs(plus - minus) / 2)];
}

function nearest_plane(pairs) {  // to the sum of z ∧ s: the first two singular vectors of A
  const r = pairs[0].z.length, A = new Float64Array(r * r);
  for (const { z, s } of pairs) add_wedge(A, z, s);
  let C = A;
  for (let round = 0; round < 11; round++) {  // AᵀA, then its powers: the first pair outgrows all
    const next = new Float64Array(r * r);
    for (let i = 0; i < r; i++) accumulate(C.subarray(i * r, i * r + r), C, next.subarray(i * r, i * r + r));
    C = scaled(next, 1 / Math.max(...next.map(Math.abs)));
  }
  const columns = Array.from({ length: r }, (_, i) => C.subarray(i * r, i * r + r));
  const longest = list => list.reduce((x, y) => norm(y) > norm(x) ? y : x), first = longest(columns);
  const rest = columns.map(c => c.map((x, i) => x - dot(c, first) / dot(first, first) * first[i]));
  return plane(first, longest(rest));
}

function spans(text, scale) {  // [from, to) of each piece of the text at this scale
  const found = [], inside = scale === "words" ? c => /\S/u.test(c) : c => c !== "\n";
  if (BLOCKS[scale]) {
    for (let t = 0; t + BLOCKS[scale] <= text.length; t += BLOCKS[scale]) found.push([t, t + BLOCKS[scale]]);
    return found;
  }
  for (let t = 0; t < text.length; t++) {
    if (!inside(text[t])) continue;
    if (t && inside(text[t - 1])) found.at(-1)[1] = t + 1;
    else found.push([t, t + 1]);
  }
  return found;
}

function path(reader, text, layer, scale) {  // steps from plane to plane, and their mean to random others
  const { model, rows } = reader, random = random_numbers(0), pieces = spans(text, scale);
  const planes = pieces.map(([from, to]) => {
    return scale === "characters" ? reader.planes(from, layer)
      : nearest_plane(rows.slice(from, to).map(row => model.view(row, layer)));
  });
  const apart = (P, Q) => P && Q ? Math.hypot(...principal_angles(P, Q)) : NaN, points = [];
  const others = Math.max(2, Math.min(16, Math.ceil(8000 / planes.length)));
  for (let k = 1; k < planes.length; k++) {
    const step = apart(planes[k - 1], planes[k]), noise = [];
    for (let n = 0; n < others; n++) {
      const j = (k + 1 + Math.floor(random() * (planes.length - 1))) % planes.length;
      noise.push(apart(planes[j], planes[k]));
    }
    const fine = noise.filter(x => x === x);
    if (step === step && fine.length) points.push({ t: pieces[k][0], step, noise: mean(fine) });
  }
  const noise = mean(points.map(p => p.noise)), step = mean(points.map(p => p.step));
  const spread = Math.sqrt(mean(points.map(p => (p.step - p.noise - step + noise) ** 2)));
  return { points, step, noise, ratio: step / noise, error: spread / Math.sqrt(points.length) / noise };
}

// Goes on from the end of what a reader has read.
class Writer {
  constructor(reader) {
    const { model } = reader, top_k = $("top-k").valueAsNumber, temperature = $("temperature").valueAsNumber;
    this.temperature = temperature >= 0 ? temperature : 0.8;
    this.top_k = top_k >= 1 ? top_k : Infinity;
    this.random = random_numbers($("seed").valueAsNumber || 0);
    this.logits = new Float32Array(model.logits.length);
    this.sorted = new Float32Array(model.logits.length);
    Object.assign(this, { model, off: reader.off, state: reader.restore(reader.tokens.length) });
    if (reader.tokens.length) this.logits.set(reader.logits(reader.tokens.length - 1));
    else this.hear(page.vocab.includes(10) ? page.vocab.indexOf(10) : page.start);
  }

  hear(token) { this.logits.set(this.model.stream_step(this.state, token, this.off)); }

  next() {
    const token = sample(this.logits, this.temperature, this.top_k, this.random, this.sorted);
    this.hear(token);
    return String.fromCodePoint(page.vocab[token]);
  }

  write(n) { return Array.from({ length: n }, () => this.next()).join(""); }
}

// ---- the page -------------------------------------------------------------------------------------

let page, model, intact, touched = null, writer = null, written = "", cells = [], places = [];
const state = { off: new Set(), at: 0, hover: -1, tab: "layers", scale: "words" }, timers = {};
const drawn = [];  // a span for each character of the text
const number = (x, digits = 2) => Number.isFinite(x) ? x.toFixed(digits) : "–";
const percent = x => x >= 0.0995 || x === 0 ? `${Math.round(100 * x)}%` : `${(100 * x).toFixed(1)}%`;
const degrees = x => Number.isFinite(x) ? `${Math.round(x * 180 / Math.PI)}°` : "–";
const many = x => Math.round(x).toLocaleString("en");
const later = (name, wait, f) => { clearTimeout(timers[name]); timers[name] = setTimeout(f, wait); };
const shown = () => touched || intact;

function glyph(c) {  // a character as one can see it
  const known = { " ": "␣", "\n": "↵", "\t": "⇥" }[c];
  if (known) return known;
  if (/[\p{C}\p{Z}]/u.test(c)) return `U+${c.codePointAt(0).toString(16).toUpperCase()}`;
  return /\p{M}/u.test(c) ? `◌${c}` : c;
}
const character = token => String.fromCodePoint(page.vocab[token]);
const quoted = token => `“${glyph(character(token))}”`;

function read() {  // what stands in the text box
  const box = $("text"), ids = new Map(page.vocab.map((c, k) => [c, k])), unknown = new Set(), notes = [];
  let points = Array.from(box.value.slice(0, 2 * LONGEST)).slice(0, LONGEST), at = 0;
  if (points.join("").length < box.value.length) {
    box.value = points.join("");
    notes.push(`Only the first ${many(LONGEST)} characters are read; the rest was cut off.`);
  }
  const tokens = [];
  places = [];
  cells = points.map((c, i) => {
    const token = ids.get(c.codePointAt(0));
    if (token === undefined) unknown.add(glyph(c));
    else places.push(i), tokens.push(token);
    return { c, end: at += c.length, t: token === undefined ? -1 : tokens.length - 1 };
  });
  const some = [...unknown].slice(0, 10).join(" ");
  if (unknown.size) notes.push(`The model has never seen ${some}${unknown.size > 10 ? " …" : ""}: skipped.`);
  $("note").textContent = notes.join(" ");
  for (const reader of [intact, touched]) reader?.want(tokens);
  state.at = Math.max(0, Math.min(state.at, tokens.length - 1));
  refresh();
}

function refresh(budget = 24) {  // read on as long as time allows, draw, and go on later
  const until = performance.now() + budget;
  const done = intact.work(until) && (!touched || touched.work(until));
  draw();
  later("read", 0, () => done ? settle() : refresh(12));
}

function settle() {  // slower things, once all is read and nobody types
  later("save", 250, save);
  later("slow", 120, () => state.tab === "flow" ? draw_paths() : state.tab === "touch" && go_on());
}

function choose(t) {
  if (t < 0 || t >= shown().tokens.length || (t === state.at && state.hover < 0)) return;
  state.at = t;
  state.hover = -1;
  draw();
  later("save", 250, save);
}

function draw() {
  const reader = shown(), t = state.hover >= 0 && state.hover < reader.tokens.length ? state.hover : state.at;
  draw_text(reader, t);
  draw_loss(reader);
  if (!reader.tokens.length) return [$("next"), $("cards")].forEach(node => node.replaceChildren());
  if (!reader.rows[t] || (touched && !intact.rows[t])) return;
  draw_next(reader, t);
  if (state.tab === "layers") draw_layers(reader, t);
  for (const line of document.querySelectorAll(".here")) place_here(line, t);
}

function draw_text(reader, chosen) {
  const colour = touched ? document.querySelector("[name=colour]:checked").value : "touched";
  const look = reader.rows[chosen] && model.config.memory ? reader.look(chosen, model.layers.length - 1) : null;
  while (drawn.length > cells.length) drawn.pop().node.remove();
  while (drawn.length < cells.length) {
    const node = el("span");
    drawn.push({ node, c: "", key: "" });
    $("cells").append(node);
  }
  cells.forEach(({ c, t }, i) => {
    const cell = drawn[i], whole = t < 0 ? NaN : intact.bits(t), now = t < 0 ? NaN : reader.bits(t);
    const bits = colour === "change" ? (now - whole) * 2 : colour === "intact" ? whole : now;
    const changed = touched && t >= 0 && reader.rows[t] && intact.rows[t] && reader.rows[t][1] !== intact.rows[t][1];
    const names = [c === "\n" && "end", t < 0 && "unknown", t === chosen && "chosen", changed && "changed",
                   bits < 0 && "better", look?.reads[t] > 0.08 && "read"].filter(Boolean).join(" ");
    const key = `${names}|${Math.round(Math.min(8, Math.abs(bits)) * 78 / 8) || 0}`;
    if (cell.c !== c) cell.node.textContent = cell.c = c;
    if (cell.key === key) return;
    cell.key = key;
    cell.node.className = names;
    cell.node.style.setProperty("--b", key.split("|")[1]);
  });
}

function draw_loss(reader) {
  const whole = intact.loss(), now = reader.loss(), b = text => el("b", {}, text);
  const left = reader.tokens.length - reader.next, wait = left > 0 ? ` · reading, ${many(left)} to go` : "";
  const line = touched ? ["Loss: intact ", b(number(whole)), ", touched ", b(number(now)),
    ` bits a character (${now < whole ? "−" : "+"}${number(Math.abs(now - whole))})`] : ["Loss ", b(number(whole)),
    ` bits a character`];
  $("loss").replaceChildren(...reader.tokens.length > 1 ? line : ["Type something."], wait);
  $("touched").hidden = !touched;
  if (!touched) return;
  const places = reader.rows.filter((row, t) => row && intact.rows[t] && row[1] !== intact.rows[t][1]).length;
  $("changes").textContent = `${[...state.off].map(name).join(", ")}: off. At ${many(places)} of `
    + `${many(reader.rows.length)} characters (underlined) another one is likeliest next.`;
}

function draw_next(reader, t) {
  const { tokens } = reader, came = tokens[t + 1], logits = touched && Float32Array.from(intact.logits(t));
  const list = reader.likeliest(t), whole = token => Math.exp(logits[token] - intact.rows[t][0]);
  const before = tokens.slice(Math.max(0, t - 11), t + 1).map(k => glyph(character(k))).join("");
  $("after").textContent = `After ${t > 11 ? "…" : ""}${before} comes`;
  if (came !== undefined && !list.some(({ token }) => token === came)) {
    list.push({ token: came, p: 2 ** -reader.bits(t + 1) });
  }
  $("next").replaceChildren(...list.map(({ token, p }) => {
    const bar = (p, kind) => el("div", { class: `bar ${kind}`, style: `width: ${(100 * p).toFixed(2)}%` });
    const bars = el("td", {}, bar(p, ""), ...touched ? [bar(whole(token), "whole")] : []);
    const words = token === came ? `came · ${percent(p)}` : touched ? `${percent(whole(token))} → ${percent(p)}` : percent(p);
    return el("tr", token === came ? { class: "came" } : {},
              el("th", { scope: "row" }, glyph(character(token))), bars, el("td", {}, words));
  }));
}

// ---- the layers -----------------------------------------------------------------------------------

function draw_layers(reader, t) {
  const looks = model.layers.map((_, i) => reader.look(t, i)), { tokens } = reader, boxes = [];
  for (const { z, s, angle, before: b } of looks) {
    boxes.push([z, s, angle], ...b ? [[b.z, b.s, b.angle]] : []);
  }
  const scale = Math.min(...boxes.map(([z, s, angle]) => {
    return Math.min(130 / (z + s * Math.abs(Math.cos(angle)) + 1e-9), 88 / (s * Math.sin(angle) + 1e-9));
  }));
  $("chosen").textContent = `${quoted(tokens[t])}, character ${many(t + 1)} of ${many(tokens.length)}`
    + (t ? `; it came with ${number(reader.bits(t))} bits of surprise` : "") + (touched ? " (touched model)" : "");
  $("cards").replaceChildren(...looks.map((look, i) => {
    const { offsets } = model.layers[i], k = look.share.indexOf(Math.max(...look.share));
    const most = look.share[k] > 0 ? `; here mostly at ${quoted(tokens[t - offsets[k]])}, ${offsets[k]} back `
      + `(${percent(look.share[k])} of s)` : "; here there is nothing to look at";
    const number_of = (name, ...values) => el("span", {}, `${name} `, ...values);
    const b = text => el("b", {}, text), meter = x => el("span", { class: "meter" }, el("i", { style: `width: ${100 * x}%` }));
    const moved = look.mixer + look.ffn, mixer = moved ? look.mixer / moved : 0;
    const reads = Array.from(look.reads.entries()).sort((x, y) => y[1] - x[1]).slice(0, 4).map(([from, share]) => {
      return `${quoted(tokens[from])} ${t - from} back (${percent(share)})`;
    });
    return el("section", { class: "card" },
      el("h3", {}, `Layer ${i + 1}`, el("span", {}, `looks ${offsets.join(", ")} back${most}`)),
      el("div", { class: "pictures" }, draw_planes(look, scale), draw_arcs(tokens, t, offsets, look.share)),
      el("div", { class: "numbers" },
        number_of("|z|", b(number(look.z))), number_of("|s|", b(number(look.s))),
        number_of("angle", b(look.area ? degrees(look.angle) : "–")), number_of("area", b(number(look.area))),
        number_of("from the plane before", b(look.angles ? look.angles.map(degrees).join(", ") : "–")),
        number_of("gate: keeps", meter(look.alpha), b(percent(look.alpha))),
        number_of("change: mixer", meter(mixer), b(`${percent(mixer)}`), " network ", b(percent(1 - mixer))),
        ...reads.length ? [number_of("memory: reads", reads.join(", "))] : []));
  }));
}

function draw_planes({ z, s, angle, area, before, angles }, scale) {
  const label = `Sides ${number(z)} and ${number(s)}, angle ${degrees(angle)}`;
  const svg = el("svg", { viewBox: "0 0 330 116", role: "img", "aria-label": label });
  const one = (sides, left, kind) => {
    const x = scale * sides.s * Math.cos(sides.angle), y = scale * sides.s * Math.sin(sides.angle), w = scale * sides.z;
    const at = left + (140 - Math.abs(x) - w) / 2 - Math.min(0, x), low = 102;
    const way = (...points) => `M${points.map(([x, y]) => `${(at + x).toFixed(1)} ${(low - y).toFixed(1)}`).join("L")}`;
    const side = (name, to) => el("path", { class: `side ${name}`, d: way([0, 0], to) });
    svg.append(el("g", { class: kind }, el("path", { class: "area", d: `${way([0, 0], [w, 0], [w + x, y], [x, y])}Z` }),
      side("z", [w, 0]), side("s", [x, y])));
    if (!kind) {
      svg.append(el("text", { class: "z", x: at + w / 2, y: low + 13 }, "z"),
                 el("text", { class: "s", x: at + x + (x < 0 ? -10 : 6), y: Math.max(10, low - y) }, "s"));
    }
  };
  if (before) one(before, 0, "before");
  if (area) one({ z, s, angle }, 190, "");
  else svg.append(el("text", { class: "mid", x: 260, y: 64 }, "no plane"));
  (angles || []).forEach((theta, k) => {
    const low = 48 + 46 * k, x = 152, r = 24;
    const to = `${x + r * Math.cos(theta)} ${low - r * Math.sin(theta)}`;
    svg.append(el("path", { class: "axis", fill: "none", d: `M${x + r} ${low}A${r} ${r} 0 0 0 ${x} ${low - r}` }),
      el("path", { class: "side here", d: `M${x + r} ${low}L${x} ${low}L${to}` }),
      el("text", { x: x + r + 4, y: low }, degrees(theta)));
  });
  return svg;
}

function draw_arcs(tokens, t, offsets, share) {
  const reach = Math.max(...offsets), all = [...Array(reach + 1).keys()];
  const back = (reach > 20 ? all.filter(n => n < 6 || offsets.includes(n)) : all).reverse();
  const width = Math.max(340, 20 * back.length), cell = Math.min(30, width / back.length);
  const svg = el("svg", { viewBox: `0 0 ${width} 116`, role: "img", "aria-label": "Shares of the partner: "
    + offsets.map((n, k) => `${n} back ${percent(share[k])}`).join(", ") });
  const x = n => width - cell * (back.length - back.indexOf(n) - 0.5);
  back.forEach((n, k) => {
    if (n > t) return;
    svg.append(el("text", { class: "glyph", x: x(n), y: 30 }, glyph(character(tokens[t - n]))));
    if (k && back[k - 1] > n + 1) svg.append(el("text", { class: "mid", x: x(n) - cell / 2, y: 30 }, "…"));
  });
  offsets.forEach((n, k) => {
    if (n > t) return;
    const from = x(0), to = x(n), deep = 38 + Math.min(96, 14 + (from - to) * 0.5);
    svg.append(el("path", { class: "arc", d: `M${from} 38C${from} ${deep} ${to} ${deep} ${to} 38`,
                            "stroke-width": (0.4 + 14 * share[k]).toFixed(2) }),
      el("text", { class: "mid", x: to, y: 10 }, `${Math.round(100 * share[k])}%`));
  });
  return svg;
}

// ---- switches, flow, writing ----------------------------------------------------------------------

const name = key => {  // 2-4: offset 4 of layer 2; 2-gate
  const [layer, part] = key.split("-");
  return `${PARTS[part] || `offset ${part}`} of layer ${layer}`;
};

function build_switches() {
  const parts = Object.keys(PARTS).filter(part => part !== "memory" || model.config.memory);
  const offsets = [...new Set(model.layers.flatMap(layer => layer.offsets))].sort((a, b) => a - b);
  const all = key => model.layers.map((layer, i) => [layer, `${i + 1}-${key}`])
    .filter(([layer]) => PARTS[key] || layer.offsets.includes(key)).map(([, key]) => key);
  const button = (words, keys, label) => {
    const node = el("button", { role: "switch", "aria-label": label, "data-keys": keys.join() }, words);
    node.onclick = () => {
      const off = keys.every(key => state.off.has(key));
      for (const key of keys) if (off) state.off.delete(key); else state.off.add(key);
      touch();
    };
    return node;
  };
  const row = (title, offsets, keys, of) => el("div", { class: "switches" }, el("span", {}, title),
    el("span", { class: "soft" }, "offset"), ...offsets.map(n => button(n, keys(n), `offset ${n} of ${of}`)),
    el("span", { class: "soft" }, ""), ...parts.map(part => button(PARTS[part], keys(part), `${PARTS[part]} of ${of}`)));
  $("switches").append(row("All layers", offsets, all, "all layers"), ...model.layers.map((layer, i) => {
    return row(`Layer ${i + 1}`, layer.offsets, key => [`${i + 1}-${key}`], `layer ${i + 1}`);
  }));
}

function touch() {
  const off = model.layers.map((_, i) => {
    const keys = [...state.off].filter(key => key.startsWith(`${i + 1}-`)).map(key => key.split("-")[1]);
    return Object.fromEntries([["offsets", new Set(keys.map(Number))], ...keys.map(key => [key, true])]);
  });
  touched = state.off.size ? new Reader(model, off) : null;
  touched?.want(intact.tokens);
  for (const node of $("switches").querySelectorAll("[role=switch]")) {
    node.setAttribute("aria-checked", !node.dataset.keys.split(",").every(key => state.off.has(key)));
  }
  refresh();
}

function go_on() {
  $("on-intact").textContent = new Writer(intact).write(120);
  $("on-touched").textContent = touched ? new Writer(touched).write(120) : "Nothing is switched off.";
}

function place_here(line, t) {
  for (const side of ["x1", "x2"]) line.setAttribute(side, (t + 0.5) / Math.max(1, shown().tokens.length) * 1000);
}

function draw_paths(layer = 0) {
  const reader = shown(), T = reader.tokens.length, thing = state.scale.replace(/^blocks/, "neighbouring blocks");
  if (reader.next < T) return;
  if (!layer) $("paths").replaceChildren();
  const { points, step, noise, ratio, error } = path(reader, reader.tokens.map(character), layer, state.scale);
  const y = x => (2.2214 - x) * 36, way = key => points.map((p, k) => {
    return `${k ? "L" : "M"}${((p.t + 0.5) / T * 1000).toFixed(1)} ${y(p[key]).toFixed(1)}`;
  }).join("");
  const nearer = Math.abs(1 - ratio), clear = nearer > Math.max(2 * error, 0.01);
  const verdict = points.length < 8 ? `too few ${thing} to tell: ${points.length} steps. Put a longer text in, or let the model write one`
    : !clear ? "no flow: as far apart as in random order"
    : ratio > 1 ? `no flow: ${percent(nearer)} farther apart than in random order`
    : `${nearer < 0.15 ? "a faint flow" : "a flow"}: ${percent(nearer)} nearer than in random order`;
  const svg = el("svg", { viewBox: "0 0 1000 80", height: 80, preserveAspectRatio: "none", role: "img",
                          "aria-label": `Steps of layer ${layer + 1} along the text` },
    el("line", { class: "axis", x1: 0, x2: 1000, y1: 80, y2: 80 }), el("path", { class: "random", d: way("noise") }),
    el("path", { class: "line", d: way("step") }), el("line", { class: "here", y1: 0, y2: 80 }));
  svg.onclick = event => {
    const { left, width } = svg.getBoundingClientRect();
    choose(Math.floor((event.clientX - left) / width * T));
  };
  const few = points.length < 2, b = x => el("b", {}, few ? "–" : x);
  $("paths").append(el("section", { class: "card" }, el("h3", {}, `Layer ${layer + 1}`, el("span", {}, verdict)), svg,
    el("div", { class: "numbers" }, el("span", {}, "mean step ", b(number(step))),
      el("span", {}, "in random order ", b(number(noise))), el("span", {}, "ratio ", b(`${number(ratio)} ± ${number(error)}`)))));
  place_here(svg.lastChild, state.at);
  if (layer + 1 < model.layers.length) later("slow", 0, () => draw_paths(layer + 1));
}

function write_on() {
  const fast = $("fast").checked, until = performance.now() + 25, before = writer.count;
  do { written += writer.next(); writer.count++; } while (fast && performance.now() < until);
  written = written.slice(-LONGEST);
  const box = $("written"), { layers, config: { rank: r, n_layer, d_model, memory, positions, context } } = model;
  box.textContent = written.slice(-2000);
  box.scrollTop = box.scrollHeight;
  if (performance.now() - writer.since > 500) {
    writer.rate = (writer.count - writer.counted) / (performance.now() - writer.since) * 1000;
    Object.assign(writer, { since: performance.now(), counted: writer.count });
  }
  const ours = layers.reduce((sum, { reach }) => sum + reach * r, 0) + (memory ? n_layer * r * (r - 1) / 2 : 0)
    + (positions ? context : 0), b = x => el("b", {}, many(x));
  $("counter").replaceChildren(b(writer.count), " characters, ", b(writer.rate), " a second. This model remembers ",
    b(ours), " numbers; a Transformer of its size would keep ", b(2 * n_layer * d_model * (writer.read + writer.count)), " by now.");
  later("write", fast ? 0 : 25, write_on);
}

function start_or_stop() {
  if (writer) clearTimeout(timers.write);
  else {
    written = "";
    writer = Object.assign(new Writer(shown()), { count: 0, counted: 0, rate: 0, since: performance.now() });
    writer.read = intact.tokens.length;
    write_on();
  }
  if ($("start").textContent === "Stop") writer = null;
  $("start").textContent = writer ? "Stop" : "Start";
}

// ---- the address, events, start -------------------------------------------------------------------

const FIELDS = ["temperature", "top-k", "seed"];

function save() {  // so that a finding can be sent to someone
  const text = $("text").value, query = new URLSearchParams();
  if (text !== page.text) query.set("text", text);
  query.set("at", state.at);
  if (state.off.size) query.set("off", [...state.off].join());
  query.set("tab", state.tab);
  query.set("scale", state.scale);
  for (const id of FIELDS) if ($(id).value !== $(id).defaultValue) query.set(id, $(id).value);
  state.saved = `#${query}`;
  history.replaceState(null, "", state.saved);
}

function load() {
  if (location.hash && location.hash === state.saved) return;
  const query = new URLSearchParams(location.hash.slice(1)), get = (key, usual) => query.get(key) ?? usual;
  const known = [...$("switches").querySelectorAll("[role=switch]")].flatMap(node => node.dataset.keys.split(","));
  $("text").value = get("text", page.text);
  state.at = Math.max(0, Math.floor(Number(get("at", 40))) || 0);
  state.off = new Set(get("off", "").split(",").filter(key => known.includes(key)));
  state.scale = get("scale", "") in BLOCKS ? get("scale") : "words";
  for (const id of FIELDS) $(id).value = get(id, $(id).defaultValue);
  $("scales").querySelectorAll("input").forEach(node => { node.checked = node.value === state.scale; });
  touched = null;
  read();
  touch();
  show(get("tab", "layers"));
}

function show(tab, focus = false) {
  state.tab = $(`tab-${tab}`) ? tab : "layers";
  for (const node of document.querySelectorAll("[role=tab]")) {
    const on = node.id === `tab-${state.tab}`;
    node.setAttribute("aria-selected", on);
    node.tabIndex = on ? 0 : -1;
    $(node.getAttribute("aria-controls")).hidden = !on;
    if (on && focus) node.focus();
  }
  refresh();
}

function listen() {
  const box = $("text"), tabs = [...document.querySelectorAll("[role=tab]")].map(node => node.id.slice(4));
  const under = event => {  // the character under the pointer
    const node = document.elementsFromPoint(event.clientX, event.clientY).find(node => node.parentNode === $("cells"));
    return cells[drawn.findIndex(cell => cell.node === node)];
  };
  const hover = t => { if (t !== state.hover) { state.hover = t; draw(); } };
  const caret = () => {
    if (document.activeElement !== box || box.selectionStart !== box.selectionEnd) return;
    const cell = cells.findLast(cell => cell.t >= 0 && cell.end <= box.selectionStart);
    choose(cell ? cell.t : 0);
  };
  box.oninput = () => { read(); caret(); };
  document.addEventListener("selectionchange", caret);
  box.onclick = event => {
    const cell = under(event);
    if (cell && cell.t >= 0 && box.selectionStart === box.selectionEnd) {
      box.setSelectionRange(cell.end, cell.end);
      choose(cell.t);
    }
  };
  box.onpointermove = event => hover(event.pointerType === "mouse" && !event.buttons ? under(event)?.t ?? -1 : -1);
  box.onpointerleave = () => hover(-1);
  $("mend").onclick = () => { state.off.clear(); touch(); };
  $("jump").onclick = () => {
    const changed = t => touched.rows[t] && intact.rows[t] && touched.rows[t][1] !== intact.rows[t][1];
    const all = touched.rows.map((_, t) => t).filter(changed);
    choose(all.find(t => t > state.at) ?? all[0] ?? -1);
    drawn[places[state.at]]?.node.scrollIntoView({ block: "nearest" });
  };
  $("colour").onchange = draw;
  for (const tab of tabs) {
    $(`tab-${tab}`).onclick = () => show(tab);
    $(`tab-${tab}`).onkeydown = ({ key }) => {
      const way = { ArrowRight: 1, ArrowLeft: -1 }[key];
      if (way) show(tabs[(tabs.indexOf(tab) + way + tabs.length) % tabs.length], true);
    };
  }
  for (const scale of Object.keys(BLOCKS)) {
    $("scales").append(el("label", {}, el("input", { type: "radio", name: "scale", value: scale }), scale));
  }
  $("scales").onchange = ({ target }) => { state.scale = target.value; settle(); };
  for (const id of FIELDS) $(id).onchange = settle;
  $("start").onclick = start_or_stop;
  $("take").onclick = () => { box.value = `${box.value}${written}`.slice(-LONGEST); read(); };
  window.addEventListener("hashchange", load);
}

function begin() {
  ({ page, model } = unpack());
  intact = new Reader(model);
  const parameters = page.params.reduce((sum, [, shape]) => sum + shape.reduce((n, side) => n * side), 0);
  const best = page.best ? `, ${number(page.best[1] / Math.LN2)} bits a character on text it was not trained on` : "";
  $("model").textContent = `${page.name}: ${many(parameters)} parameters, ${model.layers.length} layers, `
    + `an alphabet of ${many(page.vocab.length)}${best}.`;
  for (const id of ["memory-term", "memory-switch"]) $(id).hidden = !model.config.memory;
  page.text ||= new Writer(intact).write(400);
  listen();
  build_switches();
  $("broken").hidden = true;
  $("page").hidden = false;
  load();
  window.explorer = {
    model, state, intact, touched: () => touched, path, principal_angles,
    logits(text) {
      const stream = model.stream_init(), ids = Array.from(text, c => page.vocab.indexOf(c.codePointAt(0)));
      if (ids.includes(-1)) throw Error("a character that the model has never seen");
      return ids.map(token => Array.from(model.stream_step(stream, token)));
    },
  };
}

try {
  begin();
} catch (error) {
  $("page").hidden = true;
  $("broken").hidden = false;
  $("broken").textContent = `This page is damaged (${error.message}). Make it anew: python -m explorer`;
}
